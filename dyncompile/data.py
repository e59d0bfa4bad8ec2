"""Data for training and calibration: batches of (inputs, targets), checked where they enter; devices."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    default_collate,
)

from dyncompile.errors import ArgumentError, DataError
from dyncompile.values import whole

Inputs: TypeAlias = Tensor | tuple[Any, ...] | dict[str, Any]
Batch: TypeAlias = tuple[Inputs, Tensor]
T = TypeVar("T")

IGNORE_INDEX = -100
"""Label of a position that no loss, metric or risk counts, as in torch's `cross_entropy`."""


def call(function: Callable[..., T], inputs: Inputs) -> T:
    """Call a model, or a method such as `dyn.trace`, on the inputs of a batch.

    Args:
        function: What to call.
        inputs: A dict becomes keyword arguments, a tuple positional ones, anything else the only
            argument.

    Example:
        >>> call(torch.add, (torch.tensor(1), torch.tensor(2)))
        tensor(3)
    """
    if isinstance(inputs, Mapping):
        return function(**inputs)
    if isinstance(inputs, tuple):
        return function(*inputs)
    return function(inputs)


def find_device(name: torch.device | str) -> torch.device:
    """The device of that name.

    Raises:
        ArgumentError: There is none on this machine.

    >>> find_device("cpu")
    device(type='cpu')
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, TypeError) as error:
        found = f"{str(name)!r} ({str(error).splitlines()[0]})"
        expected = "cpu, or a device of this machine"
        raise ArgumentError("device", found=found, expected=expected) from error


def as_loader(
    data: Any,
    *,
    batch_size: int = 64,
    shuffle: bool = False,
    seed: int = 0,
    classes: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    batch_dims: Mapping[str, int | None] | None = None,
    replicas: int = 1,
    rank: int = 0,
    argument: str = "data",
) -> DataLoader[Batch]:
    """Turn what a user has into a loader of checked `(inputs, targets)` batches.

    Inputs are a tensor, a tuple or a dict of tensors (see `call`); integer and boolean targets come
    as int64. Arrays are checked at once, everything else batch by batch as it comes.

    Args:
        data: One of
            a `DataLoader`, whose batch size and order stay as they are;
            a map-style dataset whose items are `(input, target)`, `(input, ..., target)` or a dict
            with the key `labels` or `label`, as in Hugging Face's `datasets`;
            a pair of arrays (numpy or torch), the first possibly a tuple or dict of arrays, all of
            length N. numpy's float64 becomes torch's default dtype.
        batch_size: Samples per batch. When shuffling, a last batch of one sample is left out,
            because batch norm cannot be trained on it.
        shuffle: Give a new order at each pass, a function of `seed` and the number of the pass.
        seed: Seed of the order.
        classes: Number of classes K: targets must be integers in [0, K), or `ignore_index`.
            None: not checked.
        ignore_index: The label that stands for "no label".
        batch_dims: Batch dim of the model's inputs by name. Only a `DataLoader` may have others than
            0: everything else is put into batches along dim 0.
        replicas: Number of processes that share the data.
        rank: Which of them this is.
        argument: How error messages name `data`.

    Raises:
        DataError: `data` is of another kind, empty or batched along another dim, lengths differ,
            inputs or targets hold NaN or infinite values, labels are not integers or out of range.
            Where a loader has worker processes, torch raises it as RuntimeError with the same
            message.
        ArgumentError: `batch_size` is below 1.
    """
    whole("batch_size", batch_size, least=1)
    check = _Check(classes=classes, ignore_index=ignore_index, argument=argument)
    if isinstance(data, DataLoader):
        return _checked(data, check)
    if other := {name: dim for name, dim in (batch_dims or {}).items() if dim != 0}:
        raise check.error(
            f"a {type(data).__name__}, which is put into batches along dim 0",
            f"a DataLoader of batches as the model takes them, with the batch dims {other}",
        )
    collate: Callable[[Any], Any]
    if isinstance(data, (tuple, list, _Arrays)):
        dataset: Any = _Arrays.of(data, check)
        collate = _same
    elif _is_map_style(data):
        dataset = data
        collate = _Collate(default_collate, check)
    else:
        raise check.error(
            f"a {type(data).__name__}",
            "a DataLoader, a map-style dataset or a pair of arrays (inputs, targets); "
            "put an iterable dataset into a DataLoader",
        )
    if len(dataset) == 0:
        raise check.error("no samples", "at least one")
    sampler = _Order(dataset, num_replicas=replicas, rank=rank, shuffle=shuffle, seed=seed)
    lonely = shuffle and len(sampler) > batch_size and len(sampler) % batch_size == 1
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, drop_last=lonely, collate_fn=collate)


def _is_map_style(data: Any) -> bool:
    if isinstance(data, (IterableDataset, Mapping, Tensor, np.ndarray, str, bytes)):
        return False
    return hasattr(data, "__getitem__") and hasattr(data, "__len__")


class _Order(DistributedSampler[Any]):
    """An order that depends on seed and epoch alone, not on the replicas; a pass is an epoch."""

    def __iter__(self) -> Iterator[Any]:
        order = super().__iter__()
        self.epoch += 1
        return order


@dataclass(frozen=True, kw_only=True)
class _Check:
    """What must hold for every batch."""

    classes: int | None
    ignore_index: int
    argument: str

    def error(self, found: str, expected: str) -> DataError:
        return DataError(self.argument, found=found, expected=expected)

    def __call__(self, inputs: Inputs, targets: Tensor) -> Batch:
        leaves = tree_leaves(inputs)
        for leaf in (*leaves, targets):
            if not isinstance(leaf, Tensor):
                raise self.error(f"a {type(leaf).__name__} in the batch", "tensors of numbers")
        for name, leaf in (*(("inputs", leaf) for leaf in leaves), ("targets", targets)):
            if leaf.is_floating_point() and not bool(leaf.isfinite().all()):
                raise self.error(f"NaN or infinite values in the {name}", "finite numbers")
        if targets.is_floating_point():
            if self.classes is not None:
                raise self.error(f"targets of {targets.dtype}", f"integer labels in [0, {self.classes})")
            return inputs, targets
        targets = targets.long()
        if self.classes is not None:
            labels = targets[targets != self.ignore_index]
            if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= self.classes):
                raise self.error(
                    f"labels from {int(labels.min())} to {int(labels.max())}",
                    f"integers in [0, {self.classes})",
                )
        return inputs, targets

    def split(self, batch: Any) -> Batch:
        """Take a collated batch apart into inputs and targets, and check it."""
        if isinstance(batch, Mapping):
            fields = dict(batch)
            label = next((key for key in ("labels", "label") if key in fields), None)
            if label is None:
                raise self.error(
                    f"a dict with the keys {', '.join(map(str, fields))}",
                    "the key `labels` or `label`",
                )
            targets = fields.pop(label)
            return self(fields, targets)
        if isinstance(batch, (tuple, list)) and len(batch) > 1:
            *several, targets = batch
            inputs = several[0] if len(several) == 1 else tuple(several)
            if isinstance(inputs, list):
                inputs = tuple(inputs)
            return self(dict(inputs) if isinstance(inputs, Mapping) else inputs, targets)
        raise self.error(
            f"batches that are a {type(batch).__name__}",
            "(inputs, targets), or a dict with `labels`",
        )


@dataclass(frozen=True)
class _Collate:
    """Collate samples, then split and check the batch."""

    collate: Callable[[Any], Any]
    check: _Check

    def __call__(self, samples: Any) -> Batch:
        if self.collate is default_collate and isinstance(samples[0], Mapping):
            samples = [
                {key: torch.as_tensor(v) if isinstance(v, list) else v for key, v in sample.items()}
                for sample in samples
            ]
        return self.check.split(self.collate(samples))


def _checked(loader: DataLoader[Any], check: _Check) -> DataLoader[Batch]:
    """The same loader, with the same sampler and workers, whose batches are split and checked."""
    if not isinstance(loader.dataset, IterableDataset) and len(loader) == 0:
        raise check.error("a loader without batches", "at least one")
    collate = loader.collate_fn.collate if isinstance(loader.collate_fn, _Collate) else loader.collate_fn
    copied = copy.copy(loader)
    if isinstance(loader.dataset, _Arrays):
        _Arrays.of(loader.dataset, check)
    else:
        copied.collate_fn = _Collate(collate, check)
    # The workers of a persistent iterator belong to the loader copied from.
    copied._iterator = None
    return copied


def _same(batch: Any) -> Any:
    return batch


class _Arrays(Dataset[Batch]):
    """Arrays in memory; DataLoader takes whole batches out of them at once, already collated."""

    def __init__(self, inputs: Inputs, targets: Tensor) -> None:
        self.inputs = inputs
        self.targets = targets

    @classmethod
    def of(cls, data: Any, check: _Check) -> "_Arrays":
        if isinstance(data, _Arrays):
            return cls(*check(data.inputs, data.targets))
        if len(data) != 2:
            raise check.error(f"a {type(data).__name__} of {len(data)}", "a pair of arrays (inputs, targets)")
        inputs, targets = data
        inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
        inputs = tree_map(lambda leaf: _tensor(leaf, check), inputs, is_leaf=lambda leaf: isinstance(leaf, list))
        targets = _tensor(targets, check)
        lengths = [len(leaf) if leaf.ndim else 0 for leaf in (*tree_leaves(inputs), targets)]
        if len(set(lengths)) > 1:
            raise check.error(
                f"inputs and targets of the lengths {', '.join(map(str, lengths))}",
                "one length for all",
            )
        return cls(*check(inputs, targets))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: Any) -> Batch:
        return tree_map(lambda leaf: leaf[index], self.inputs), self.targets[index]

    def __getitems__(self, indices: list[int]) -> Batch:
        return self[torch.tensor(indices)]


def _tensor(array: Any, check: _Check) -> Tensor:
    if isinstance(array, Tensor):
        return array
    try:
        found = np.asarray(array)
    except ValueError as error:
        raise check.error("a ragged array", "arrays of numbers") from error
    if found.dtype.kind not in "biuf":
        raise check.error(f"an array of {found.dtype}", "arrays of numbers")
    if not (found.flags.writeable and found.flags.c_contiguous):
        found = found.copy()
    tensor = torch.from_numpy(found)
    return tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor
