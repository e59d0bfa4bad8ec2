// Carries out the instructions of a lowered program (instructions.py) without Python between two segments.
//
// A segment's program is the C++ that inductor generated for it, called at its address. Values lie in registers and
// are dropped when the instructions say so. What Python is asked for: a program for a batch size that was not seen
// before, a segment that is no C++, and decisions that are forced.
//
// Compiled behind rows.cpp, as one file.

#include <algorithm>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>

namespace {

// Tensors cross to and from Python as inductor's own programs take them: as pointers that are owned.
struct Border {
  py::object out = py::module_::import("torch._C._aoti").attr("unsafe_alloc_void_ptrs_from_tensors");
  py::object in = py::module_::import("torch._C._aoti").attr("alloc_tensors_by_stealing_from_void_ptrs");

  Tensors tensors(const py::object& objects) const {
    Tensors found;
    for (py::handle pointer : out(objects)) {
      const std::unique_ptr<Tensor> owned(static_cast<Tensor*>(PyCapsule_GetPointer(pointer.ptr(), nullptr)));
      found.push_back(std::move(*owned));
    }
    return found;
  }

  Tensor tensor(const py::object& object) const {
    return tensors(py::make_tuple(object)).front();
  }

  py::list objects(const Tensors& tensors) const {
    py::list pointers(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      pointers[i] = py::reinterpret_steal<py::object>(PyCapsule_New(new Tensor(tensors[i]), nullptr, nullptr));
    }
    return in(pointers);
  }

  py::object object(const Tensor& tensor) const {
    return objects({tensor})[0];
  }
};

const Border& border() {
  static const Border* found = new Border(); // never deleted: Python may have ended before
  return *found;
}

template <typename T = int>
std::vector<T> list_of(py::handle items) {
  std::vector<T> found;
  for (py::handle item : items) {
    found.push_back(item.cast<T>());
  }
  return found;
}

int or_none(py::handle number) {
  return number.is_none() ? -1 : number.cast<int>();
}

std::optional<MemoryFormat> format_of(py::handle layout) {
  if (layout.is_none()) {
    return std::nullopt;
  }
  const auto name = py::str(layout).cast<std::string>();
  if (name == "torch.channels_last") {
    return MemoryFormat::ChannelsLast;
  }
  if (name == "torch.channels_last_3d") {
    return MemoryFormat::ChannelsLast3d;
  }
  return MemoryFormat::Contiguous;
}

// One call: how many rows ran in which region, and what forces decisions.
struct Run {
  int64_t batch;
  py::object override;
  bool fixed;                // whether it says the same in every call of a batch size
  std::vector<int64_t> rows; // by number of a name; -1: not at all

  bool forced() const {
    return !override.is_none();
  }
};

// The names that a program counts rows under.
struct Names {
  std::vector<std::string> all;

  int number(const std::string& name) {
    for (size_t i = 0; i < all.size(); ++i) {
      if (all[i] == name) {
        return static_cast<int>(i);
      }
    }
    all.push_back(name);
    return static_cast<int>(all.size()) - 1;
  }
};

struct Frame {
  Tensors& registers;
  int64_t count;
  const Tensor& index; // undefined: all rows of the batch
  Run& run;

  Tensor& operator[](int place) {
    return registers[place];
  }

  void drop(const std::vector<int>& dead) {
    for (int place : dead) {
      registers[place].reset();
    }
  }
};

struct Step {
  virtual ~Step() = default;
  virtual void run(Frame& frame) = 0;
};

struct Code {
  int name;
  size_t registers;
  std::vector<std::unique_ptr<Step>> steps;
  std::vector<int> outputs;

  Tensors run(Tensors&& values, int64_t count, const Tensor& index, Run& run) const {
    run.rows[name] = std::max<int64_t>(run.rows[name], 0) + count;
    values.resize(registers);
    Frame frame{values, count, index, run};
    for (const auto& step : steps) {
      step->run(frame);
    }
    Tensors found;
    found.reserve(outputs.size());
    for (int place : outputs) {
      found.push_back(values[place]);
    }
    return found;
  }
};

struct Drop : Step {
  std::vector<int> dead;

  explicit Drop(py::handle step) : dead(list_of(step.attr("registers"))) {}

  void run(Frame& frame) override {
    frame.drop(dead);
  }
};

using Entry = void (*)(Tensor** inputs, Tensor** outputs);

// A segment's program for one batch size.
struct Compiled {
  Entry entry;
  Tensor size;
  Tensors constants;
};

struct Argument {
  int place;
  std::optional<MemoryFormat> layout;
  bool copied;
};

struct Call : Step {
  py::object segment;
  py::object native = py::none(); // makes the program for a batch size; None: the segment is no C++
  std::unordered_map<int64_t, Compiled> programs;
  std::vector<Argument> arguments;
  std::vector<int> dead;
  std::vector<int> results;

  explicit Call(py::handle step)
      : segment(step.attr("segment")), dead(list_of(step.attr("dead"))), results(list_of(step.attr("results"))) {
    if (py::hasattr(py::type::of(segment), "native")) {
      native = segment.attr("native");
    }
    for (py::handle given : step.attr("arguments")) {
      arguments.push_back(
          {given.attr("register").cast<int>(), format_of(given.attr("layout")), given.attr("copied").cast<bool>()});
    }
  }

  void run(Frame& frame) override {
    if (native.is_none()) {
      in_python(frame);
      return;
    }
    auto found = programs.find(frame.count);
    if (found == programs.end()) {
      const auto made = native(frame.count).cast<py::tuple>();
      Compiled program{
          reinterpret_cast<Entry>(made[0].cast<uintptr_t>()), border().tensor(made[1]), border().tensors(made[2])};
      found = programs.emplace(frame.count, std::move(program)).first;
    }
    const Compiled& program = found->second;
    c10::SmallVector<Tensor, 16> values;
    for (const Argument& argument : arguments) {
      const Tensor& value = frame[argument.place];
      if (!argument.layout) {
        values.push_back(value);
      } else {
        values.push_back(argument.copied ? value.clone(argument.layout) : value.contiguous(*argument.layout));
      }
    }
    frame.drop(dead);
    // The program owns what it is given, and we what it returns.
    c10::SmallVector<Tensor*, 32> given;
    given.push_back(new Tensor(program.size));
    for (Tensor& value : values) {
      given.push_back(new Tensor(std::move(value)));
    }
    for (const Tensor& constant : program.constants) {
      given.push_back(new Tensor(constant));
    }
    c10::SmallVector<Tensor*, 8> made(results.size(), nullptr);
    program.entry(given.data(), made.data());
    if (PyErr_Occurred()) {
      throw py::error_already_set();
    }
    for (size_t i = 0; i < results.size(); ++i) {
      // Of equal outputs inductor returns one tensor several times.
      if (std::find(made.begin() + i + 1, made.end(), made[i]) != made.end()) {
        frame[results[i]] = *made[i];
      } else {
        const std::unique_ptr<Tensor> owned(made[i]);
        frame[results[i]] = std::move(*owned);
      }
    }
  }

  void in_python(Frame& frame) {
    Tensors values;
    for (const Argument& argument : arguments) {
      values.push_back(frame[argument.place]);
    }
    frame.drop(dead);
    const py::list given = border().objects(values);
    values.clear();
    Tensors made = border().tensors(segment(*given));
    TORCH_CHECK(made.size() == results.size(), "a segment returned ", made.size(), " values, not ", results.size());
    for (size_t i = 0; i < results.size(); ++i) {
      frame[results[i]] = std::move(made[i]);
    }
  }
};

// A decision, as it was made or as it is forced to be.
struct Decision {
  int place;
  py::str name;
  int64_t rows;
  int64_t finer;
  // What it was forced to for the whole batch, and by whom; undefined: to nothing.
  py::object by = py::none();
  int64_t batch = -1;
  Tensor forced;

  explicit Decision(py::handle step)
      : place(step.attr("decision").cast<int>()),
        name(step.attr("name")),
        rows(step.attr("rows").cast<int64_t>()),
        finer(step.attr("finer").cast<int64_t>()) {}

  Tensor value(Frame& frame, const Tensor& where) {
    const Tensor& made = frame[place];
    const Run& run = frame.run;
    if (!run.forced()) {
      if (!by.is_none()) {
        by = py::none();
        forced.reset();
      }
      return made;
    }
    if (!run.fixed) {
      const py::object index = where.defined() ? border().object(where) : py::none();
      return border().tensor(run.override(name, border().object(made), index, run.batch * rows));
    }
    if (!by.is(run.override) || batch != run.batch) {
      const py::object given = border().object(made);
      const py::object found = run.override(name, given, py::none(), run.batch * rows);
      Tensor next = found.is(given) ? Tensor() : border().tensor(found);
      forced = std::move(next);
      batch = run.batch;
      by = run.override;
    }
    if (!forced.defined()) {
      return made;
    }
    return where.defined() ? forced.index_select(0, where) : forced;
  }
};

struct Share : Step {
  Decision decision;
  int name;
  int real;

  Share(py::handle step, Names& names)
      : decision(step), name(names.number(step.attr("name").cast<std::string>())), real(or_none(step.attr("real"))) {}

  void run(Frame& frame) override {
    Tensor value = decision.value(frame, frame.run.forced() ? within(frame.index, decision.finer) : Tensor());
    if (frame.run.forced() && real >= 0) {
      value = value.__and__(frame[real]);
    }
    frame.run.rows[name] = value.count_nonzero().item<int64_t>();
    frame[decision.place] = std::move(value);
  }
};

struct Gather {
  int place;
  int64_t dim;
  int64_t entries;

  explicit Gather(py::handle given)
      : place(given.attr("register").cast<int>()),
        dim(or_none(given.attr("dim"))),
        entries(given.attr("entries").cast<int64_t>()) {}

  Tensor at(Frame& frame, const Tensor& index) const {
    return gather(frame[place], index, dim, entries);
  }
};

struct Part {
  int arm;
  int result;
  std::optional<Gather> rows;

  explicit Part(py::handle part) : arm(part.attr("arm").cast<int>()), result(or_none(part.attr("result"))) {
    if (const py::object given = part.attr("rows"); !given.is_none()) {
      rows.emplace(given);
    }
  }
};

struct Merge {
  int target;
  int base;
  bool copied;
  std::vector<Part> parts;
  int64_t dim;
  int64_t entries;

  explicit Merge(py::handle merge)
      : target(merge.attr("target").cast<int>()),
        base(or_none(merge.attr("base"))),
        copied(merge.attr("copied").cast<bool>()),
        dim(merge.attr("dim").cast<int64_t>()),
        entries(merge.attr("entries").cast<int64_t>()) {
    for (py::handle part : merge.attr("parts")) {
      parts.emplace_back(part);
    }
  }

  Tensor run(Frame& frame, const Tensors& rows, const std::vector<Tensors>& results, int64_t count) const {
    Tensor whole;
    if (base >= 0) {
      whole = copied ? frame[base].clone() : frame[base];
    }
    for (const Part& part : parts) {
      const Tensor& index = rows[part.arm];
      if (!index.size(0)) {
        continue;
      }
      Tensor values = part.rows ? part.rows->at(frame, index) : results[part.arm][part.result];
      const int64_t size = index.size(0) * entries;
      if (values.size(dim) != size) {
        values = values.narrow(dim, 0, size);
      }
      if (!whole.defined()) {
        const bool last = values.dim() == 4 && values.is_contiguous(MemoryFormat::ChannelsLast);
        whole = empty_rows(values, dim, count * entries, last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
      }
      scatter(whole, index, values, dim, entries);
    }
    return whole;
  }
};

std::unique_ptr<Code> code_of(py::handle code, Names& names);

struct Arm {
  std::unique_ptr<Code> code;
  std::vector<std::pair<int, int>> moved;
  std::vector<std::pair<int, bool>> given;
  std::vector<std::pair<int, int>> results;
  std::vector<Gather> gathered;

  Arm(py::handle arm, Names& names)
      : moved(list_of<std::pair<int, int>>(arm.attr("moved"))),
        given(list_of<std::pair<int, bool>>(arm.attr("given"))),
        results(list_of<std::pair<int, int>>(arm.attr("results"))) {
    if (const py::object found = arm.attr("code"); !found.is_none()) {
      code = code_of(found, names);
    }
    for (py::handle gather : arm.attr("gathered")) {
      gathered.emplace_back(gather);
    }
  }
};

struct Split : Step {
  Decision decision;
  std::vector<Arm> arms;
  std::vector<int> dead;
  std::vector<int> ungathered;
  std::vector<Merge> merged;

  Split(py::handle step, Names& names)
      : decision(step), dead(list_of(step.attr("dead"))), ungathered(list_of(step.attr("ungathered"))) {
    for (py::handle arm : step.attr("arms")) {
      arms.emplace_back(arm, names);
    }
    for (py::handle merge : step.attr("merged")) {
      merged.emplace_back(merge);
    }
  }

  void run(Frame& frame) override {
    const int64_t count = frame.count * decision.finer;
    // Which rows these are is asked by decisions that are forced, alone.
    const Tensor where = frame.run.forced() ? within(frame.index, decision.finer) : Tensor();
    Tensors rows;
    const int arm = choice(decision.value(frame, where), arms.size(), rows);
    if (arm >= 0) {
      all(frame, arms[arm], count, where);
    } else {
      some(frame, rows, count, where);
    }
  }

  // Every row takes one arm: run it on the values themselves, copy nothing.
  void all(Frame& frame, const Arm& arm, int64_t count, const Tensor& where) {
    for (const auto& [to, of] : arm.moved) {
      frame[to] = frame[of];
    }
    Tensors values;
    for (const auto& [of, copied] : arm.given) {
      values.push_back(copied ? frame[of].clone() : frame[of]);
    }
    frame.drop(dead);
    if (arm.code) {
      const Tensors made = arm.code->run(std::move(values), count, where, frame.run);
      for (const auto& [to, result] : arm.results) {
        frame[to] = made[result];
      }
    }
  }

  // Rows differ: gather those of each arm, run it, and put the results together.
  void some(Frame& frame, const Tensors& rows, int64_t count, const Tensor& where) {
    std::vector<Tensors> values(arms.size());
    for (size_t i = 0; i < arms.size(); ++i) {
      if (arms[i].code && rows[i].size(0)) {
        for (const Gather& gather : arms[i].gathered) {
          values[i].push_back(gather.at(frame, rows[i]));
        }
      }
    }
    frame.drop(ungathered);
    for (size_t i = 0; i < arms.size(); ++i) {
      if (arms[i].code && rows[i].size(0)) {
        Tensor inner;
        if (frame.run.forced()) {
          inner = where.defined() ? where.index_select(0, rows[i]) : rows[i];
        }
        values[i] = arms[i].code->run(std::move(values[i]), rows[i].size(0), inner, frame.run);
      }
    }
    for (const Merge& merge : merged) {
      frame[merge.target] = merge.run(frame, rows, values, count);
    }
    frame.drop(dead);
  }
};

std::unique_ptr<Code> code_of(py::handle code, Names& names) {
  auto found = std::make_unique<Code>();
  found->name = names.number(code.attr("name").cast<std::string>());
  found->registers = code.attr("registers").cast<size_t>();
  found->outputs = list_of(code.attr("outputs"));
  for (py::handle step : code.attr("steps")) {
    const auto kind = py::type::of(step).attr("__name__").cast<std::string>();
    if (kind == "Call") {
      found->steps.push_back(std::make_unique<Call>(step));
    } else if (kind == "Split") {
      found->steps.push_back(std::make_unique<Split>(step, names));
    } else if (kind == "Share") {
      found->steps.push_back(std::make_unique<Share>(step, names));
    } else if (kind == "Drop") {
      found->steps.push_back(std::make_unique<Drop>(step));
    } else {
      throw py::type_error("no instruction: " + kind);
    }
  }
  return found;
}

struct Program {
  Names names;
  std::unique_ptr<Code> code;

  explicit Program(py::handle root) : code(code_of(root, names)) {}

  // As the Python function does, on all rows of a batch: empties the list of values, fills in `run.rows`.
  py::list call(const py::list& given, int64_t count, const py::none& /*index*/, const py::object& run) {
    Tensors values = border().tensors(given);
    given.attr("clear")();
    const py::object override = run.attr("override");
    const bool fixed = !override.is_none() && py::getattr(override, "fixed", py::bool_(false)).cast<bool>();
    Run now{run.attr("batch").cast<int64_t>(), override, fixed, std::vector<int64_t>(names.all.size(), -1)};
    const Tensors found = code->run(std::move(values), count, Tensor(), now);
    const py::object rows = run.attr("rows");
    for (size_t i = 0; i < names.all.size(); ++i) {
      if (now.rows[i] >= 0) {
        rows[py::str(names.all[i])] = now.rows[i];
      }
    }
    return border().objects(found);
  }
};

} // namespace

PYBIND11_MODULE(dyncompile_native, module) {
  border();
  py::class_<Program>(module, "Program").def(py::init<py::handle>()).def("__call__", &Program::call);
}
