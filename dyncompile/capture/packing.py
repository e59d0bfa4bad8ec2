"""While a model is captured, packed sequences stay padded: the functions that pack and pad them are taken over.

How long a packed sequence is hangs on the data, so no graph has a shape for it. In a capture a `Packed` goes its way:
the padded tensor and the lengths. A model may have imported the functions by name, so their code is swapped, and put
back when the last capture ends; other threads are served by torch's own code all the while.
"""

import dataclasses
import functools
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import rnn

from dyncompile.capture.recurrent import Packing, in_order
from dyncompile.errors import CaptureError


class Packed(rnn.PackedSequence):
    """Stands for a packed sequence while a model is exported.

    Attributes:
        padded: `[N, T, ...]`, or `[T, N, ...]`.
        lengths: `[N]`.
        packing: Which of the two, and what T is.
        zeros: Whether `padded` holds zeros behind each sample's last step, as what a layer gives does.
    """

    padded: Tensor
    lengths: Tensor
    packing: Packing
    zeros: bool

    def __new__(cls, padded: Tensor, lengths: Tensor, packing: Packing, *, zeros: bool) -> Self:
        """From the attributes."""
        new = tuple.__new__(cls, (None,) * 4)
        vars(new).update(padded=padded, lengths=lengths, packing=packing, zeros=zeros)
        return new

    def with_output(self, padded: Tensor) -> "Packed":
        """What a recurrent layer makes of it."""
        return Packed(padded, self.lengths, self.packing, zeros=True)

    def _refuse(self, what: str, *_: Any) -> NoReturn:
        raise CaptureError(
            f"the model reads {what} of a packed sequence, whose size depends on the data; only nn.LSTM, nn.GRU and "
            "nn.RNN may read it: for all else pad it first, with pad_packed_sequence"
        )

    data = property(functools.partial(_refuse, what="`data`"))
    batch_sizes = property(functools.partial(_refuse, what="`batch_sizes`"))
    sorted_indices = property(functools.partial(_refuse, what="`sorted_indices`"))
    unsorted_indices = property(functools.partial(_refuse, what="`unsorted_indices`"))

    def __iter__(self) -> NoReturn:
        """Refused."""
        self._refuse("the parts")

    def __getitem__(self, index: Any) -> NoReturn:
        """Refused."""
        self._refuse("the parts")


@dataclasses.dataclass
class TakenOver:
    """What the functions do in a capture.

    Attributes:
        tracing: Whether the model is exported; else it runs on real tensors, in torch's own way but for this: where a
            model asks for samples in order of length, they may come in any.
        packed: The lengths of each call of `pack_padded_sequence` on real tensors, and T.
        open_ended: Whether sequences were padded to the longest of the batch, and not to a `total_length`.
    """

    tracing: bool = False
    packed: list[tuple[Tensor, int]] = dataclasses.field(default_factory=list)
    open_ended: bool = False

    @contextmanager
    def traced(self) -> Iterator[None]:
        """The model is exported while this is open."""
        self.tracing = True
        try:
            yield
        finally:
            self.tracing = False

    def pack_padded_sequence(self, x: Tensor, lengths: Any, batch_first: bool, enforce_sorted: bool) -> Any:
        """See torch's."""
        if not isinstance(lengths, Tensor):
            raise CaptureError(
                f"pack_padded_sequence gets its lengths as a {type(lengths).__name__}, which a graph would keep as in "
                "the example; give it the tensor: `lengths.cpu()` in place of `lengths.tolist()`"
            )
        if self.tracing:
            steps = x.shape[1 if batch_first else 0]
            packing = Packing(steps=steps, batch_first=batch_first, enforce_sorted=enforce_sorted)
            return Packed(x, lengths, packing, zeros=False)
        self.packed.append((lengths.detach().clone(), x.shape[1 if batch_first else 0]))
        return _ORIGINALS["pack_padded_sequence"](x, lengths, batch_first, enforce_sorted and in_order(lengths))

    def pad_packed_sequence(
        self, sequence: Any, batch_first: bool, padding_value: float, total_length: int | None
    ) -> Any:
        """See torch's."""
        if not isinstance(sequence, Packed):
            self.open_ended |= total_length is None
            return _ORIGINALS["pad_packed_sequence"](sequence, batch_first, padding_value, total_length)
        packing, x = sequence.packing, sequence.padded
        x = x if packing.batch_first == batch_first else x.transpose(0, 1)
        if padding_value or not sequence.zeros:
            steps = torch.arange(packing.steps, device=x.device)
            behind = steps >= sequence.lengths.to(x.device).unsqueeze(1)
            behind = behind if batch_first else behind.t()
            x = x.masked_fill(behind.view(*behind.shape, *(1 for _ in x.shape[2:])), padding_value)
        if total_length is not None:
            # Where that is shorter than the samples are, torch stops.
            more = total_length - packing.steps
            time = 2 * (x.dim() - 1 - int(batch_first))
            x = F.pad(x, (*(0 for _ in range(time)), 0, more), value=padding_value) if more else x
        return x, sequence.lengths.to(torch.int64)

    def pack_sequence(self, *_: Any) -> NoReturn:
        """Refused: a list has no batch dim."""
        raise CaptureError(
            "pack_sequence takes a list with one tensor a sample, and a graph wants a batch; pad the samples outside "
            "of the model and use pack_padded_sequence(x, lengths, enforce_sorted=False)"
        )

    def unpack_sequence(self, *_: Any) -> NoReturn:
        """Refused: how long each part is hangs on the data."""
        raise CaptureError(
            "unpack_sequence returns tensors whose sizes depend on the data; use pad_packed_sequence with a "
            "`total_length`, and a mask where the padding is in the way"
        )


def short_rows(taken: TakenOver, batch: int) -> list[int]:
    """For each call that packed, a sample whose sequence is shorter than T.

    Args:
        taken: What was noted.
        batch: Samples in the calls.

    Raises:
        CaptureError: All samples of a call are of full length.
    """
    found = []
    for lengths, steps in taken.packed:
        shortest = int(lengths.argmin())
        if int(lengths[shortest]) >= steps:
            raise CaptureError(
                "pad_packed_sequence without `total_length` pads to the longest sample of a batch, and what the model "
                "makes of that cannot be checked, since every sample of example_inputs is of full length: pass samples "
                "of several lengths, or total_length"
            )
        found.append(shortest * batch // len(lengths))
    return sorted(set(found))


def open_ended_error() -> CaptureError:
    """The model hangs on how long the longest sample of a batch is."""
    return CaptureError(
        "pad_packed_sequence without `total_length` pads to the longest sample of a batch, and the model's output for "
        "one sample changes with that; pass it the length of the padded input: total_length=x.shape[1] (batch first)"
    )


# --- in place of torch's own -----------------------------------------------------------------------
# The bodies run with the globals of torch's module, so each imports what it needs.


def _pack_padded_sequence(input: Any, lengths: Any, batch_first: bool = False, enforce_sorted: bool = True) -> Any:  # noqa: A002
    from dyncompile.capture.packing import _call

    return _call("pack_padded_sequence", input, lengths, batch_first, enforce_sorted)


def _pad_packed_sequence(
    sequence: Any, batch_first: bool = False, padding_value: float = 0.0, total_length: int | None = None
) -> Any:
    from dyncompile.capture.packing import _call

    return _call("pad_packed_sequence", sequence, batch_first, padding_value, total_length)


def _pack_sequence(sequences: Any, enforce_sorted: bool = True) -> Any:
    from dyncompile.capture.packing import _call

    return _call("pack_sequence", sequences, enforce_sorted)


def _unpack_sequence(packed_sequences: Any) -> Any:
    from dyncompile.capture.packing import _call

    return _call("unpack_sequence", packed_sequences)


_STAND_INS: dict[str, Callable[..., Any]] = {
    "pack_padded_sequence": _pack_padded_sequence,
    "pad_packed_sequence": _pad_packed_sequence,
    "pack_sequence": _pack_sequence,
    "unpack_sequence": _unpack_sequence,
}
_FUNCTIONS: dict[str, Any] = {name: getattr(rnn, name) for name in _STAND_INS}
_ORIGINALS: dict[str, Callable[..., Any]] = {
    name: types.FunctionType(f.__code__, f.__globals__, name, f.__defaults__) for name, f in _FUNCTIONS.items()
}
_lock = threading.Lock()
_open = 0
_here = threading.local()


def _call(name: str, *args: Any) -> Any:
    taken: TakenOver | None = getattr(_here, "taken", None)
    return _ORIGINALS[name](*args) if taken is None else getattr(taken, name)(*args)


@contextmanager
def taking_over() -> Iterator[TakenOver]:
    """Take torch's functions over in this thread, while the context is open."""
    global _open  # noqa: PLW0603 - of the process, as the functions are
    with _lock:
        _open += 1
        for name, function in _FUNCTIONS.items():
            function.__code__ = _STAND_INS[name].__code__
    before, _here.taken = getattr(_here, "taken", None), TakenOver()
    try:
        yield _here.taken
    finally:
        _here.taken = before
        with _lock:
            _open -= 1
            if not _open:
                for name, function in _FUNCTIONS.items():
                    function.__code__ = _ORIGINALS[name].__code__
