// Rows of tensors: chosen by decision, gathered and put back, as runtime.py does it.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

namespace py = pybind11;
using at::MemoryFormat;
using at::Tensor;
using Tensors = std::vector<Tensor>;

namespace {

// Bytes from which on a copy lets other threads of Python run, and is shared among those of torch.
constexpr int64_t LARGE = 1 << 20;

// Rows as finer ones, of which each holds several.
Tensor within(const Tensor& index, int64_t entries) {
  if (!index.defined() || entries == 1) {
    return index;
  }
  return index.unsqueeze(1).mul(entries).add(at::arange(entries, index.options())).view(-1);
}

// The memory format in which rows along dim 0 lie one after the other, each in one piece; none if they do not.
std::optional<MemoryFormat> rows_in(const Tensor& tensor, int64_t dim) {
  if (dim != 0 || tensor.is_conj() || tensor.is_neg()) {
    return std::nullopt;
  }
  if (tensor.is_contiguous()) {
    return MemoryFormat::Contiguous;
  }
  if (tensor.dim() == 4 && tensor.is_contiguous(MemoryFormat::ChannelsLast)) {
    return MemoryFormat::ChannelsLast;
  }
  return std::nullopt;
}

Tensor empty_rows(const Tensor& like, int64_t dim, int64_t count, MemoryFormat format) {
  c10::SmallVector<int64_t, 6> shape(like.sizes().begin(), like.sizes().end());
  shape[dim] = count;
  return at::empty(shape, like.options(), format);
}

// Copy rows: `to[target[i]] = from[source[i]]`, where no index means i itself.
void copy_rows(Tensor& to, const int64_t* target, const Tensor& from, const int64_t* source, int64_t count,
               int64_t entries) {
  const int64_t size = from.size(0) ? from.numel() / from.size(0) * entries * from.element_size() : 0;
  auto* written = static_cast<char*>(to.mutable_data_ptr());
  const auto* read = static_cast<const char*>(from.const_data_ptr());
  const auto copy = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(written + (target ? target[i] : i) * size, read + (source ? source[i] : i) * size, size);
    }
  };
  if (count * size < LARGE) {
    copy(0, count);
    return;
  }
  const py::gil_scoped_release others_run;
  at::parallel_for(0, count, std::max<int64_t>(1, LARGE / 8 / size), copy);
}

Tensor gather(const Tensor& tensor, const Tensor& index, int64_t dim, int64_t entries) {
  if (dim < 0) {
    return tensor;
  }
  const int64_t count = index.size(0);
  const auto format = rows_in(tensor, dim);
  if (format && (entries == 1 || *format == MemoryFormat::Contiguous)) {
    Tensor found = empty_rows(tensor, dim, count * entries, *format);
    copy_rows(found, nullptr, tensor, index.const_data_ptr<int64_t>(), count, entries);
    return found;
  }
  if (entries != 1) {
    return tensor.unflatten(dim, {-1, entries}).index_select(dim, index).flatten(dim, dim + 1);
  }
  if (dim == 0 && tensor.dim() == 4) {
    return tensor.permute({0, 2, 3, 1}).index_select(0, index).permute({0, 3, 1, 2});
  }
  return tensor.index_select(dim, index);
}

void scatter(Tensor& base, const Tensor& index, const Tensor& rows, int64_t dim, int64_t entries) {
  const auto format = rows_in(base, dim);
  if (format && format == rows_in(rows, dim) && base.dtype() == rows.dtype() &&
      (entries == 1 || *format == MemoryFormat::Contiguous)) {
    copy_rows(base, index.const_data_ptr<int64_t>(), rows, nullptr, index.size(0), entries);
  } else if (entries != 1) {
    base.unflatten(dim, {-1, entries}).index_copy_(dim, index, rows.unflatten(dim, {-1, entries}));
  } else {
    base.index_copy_(dim, index, rows);
  }
}

// How rows split over arms: the arm that all take, or -1 and the rows of each.
template <typename T>
int choose(const T* decision, int64_t count, size_t arms, const at::TensorOptions& options, Tensors& rows) {
  std::vector<int64_t> sizes(arms, 0);
  for (int64_t i = 0; i < count; ++i) {
    const auto arm = static_cast<size_t>(decision[i]);
    TORCH_CHECK_INDEX(arm < arms, "a decision for arm ", static_cast<int64_t>(decision[i]), " of ", arms);
    ++sizes[arm];
  }
  std::vector<int64_t*> next;
  for (size_t arm = 0; arm < arms; ++arm) {
    if (sizes[arm] == count) {
      return static_cast<int>(arm);
    }
    rows.push_back(at::empty({sizes[arm]}, options));
    next.push_back(rows.back().mutable_data_ptr<int64_t>());
  }
  for (int64_t i = 0; i < count; ++i) {
    *next[static_cast<size_t>(decision[i])]++ = i;
  }
  return -1;
}

int choice(const Tensor& decision, size_t arms, Tensors& rows) {
  const auto options = decision.options().dtype(at::kLong);
  if (decision.scalar_type() == at::kBool) {
    const Tensor dense = decision.contiguous();
    return choose(dense.const_data_ptr<bool>(), dense.numel(), arms, options, rows);
  }
  const Tensor dense = decision.to(at::kLong).contiguous();
  return choose(dense.const_data_ptr<int64_t>(), dense.numel(), arms, options, rows);
}

} // namespace
