"""Labelled images for the demo and the command line, as tensors in three splits."""

import dataclasses
import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from dyncompile.demo.factory import make
from dyncompile.errors import ArgumentError, DataError, require

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff"})


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images `[N, C, H, W]`, float32 and normalised, with labels `[N]` of `classes`.

    Attributes:
        train: What weights are fitted on.
        calibration: Held out of training; thresholds are chosen on it.
        test: Looked at once, to measure.
        classes: Name of every class.
        mirror: Whether a mirrored image keeps its label.
    """

    name: str
    train: TensorDataset
    calibration: TensorDataset
    test: TensorDataset
    classes: tuple[str, ...]
    mirror: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width of an image."""
        return tuple(self.train.tensors[0].shape[1:])


def load(source: str, *, seed: int = 0, shape: tuple[int, ...] | None = None) -> Images:
    """Read a data set by what the command line calls it.

    Args:
        source: `digits` (embedded in scikit-learn), `fashion-mnist` (the Debian package
            dataset-fashion-mnist), a folder of IDX files named as Fashion-MNIST names them,
            `imagefolder:DIR` (a sub-folder per class), or `FILE.py:FACTORY` or
            `PACKAGE.MODULE:FACTORY`, a callable that returns `Images`.
        seed: What is held out of training is drawn with it.
        shape: Channels, height and width of the images, which are resized to it. None: as they are,
            and (3, 32, 32) for an image folder.

    Raises:
        ArgumentError: The source is none of these.
        DataError: Files are missing, truncated or corrupt, or cannot be brought to the shape.
        MissingExtraError: scikit-learn or pillow is needed and absent.

    >>> data = load("digits")
    >>> data.shape, len(data.test)
    ((1, 16, 16), 450)
    """
    images = _read(source, seed=seed, shape=shape)
    return images if shape is None or shape == images.shape else _resized(images, shape)


def _read(source: str, *, seed: int, shape: tuple[int, ...] | None) -> Images:
    if source == "digits":
        return digits(seed=seed)
    if source == "fashion-mnist":
        return fashion_mnist(seed=seed)
    if source.startswith("imagefolder:"):
        return image_folder(Path(source.removeprefix("imagefolder:")), seed=seed, shape=shape or (3, 32, 32))
    if ":" in source:
        return make(source, Images, argument="data")
    if Path(source).is_dir():
        return idx_folder(Path(source), seed=seed)
    expected = "digits, fashion-mnist, a folder of IDX files, imagefolder:DIR or FILE.py:FACTORY"
    raise ArgumentError("data", found=repr(source), expected=expected)


def _resized(images: Images, shape: tuple[int, ...]) -> Images:
    if len(shape) != 3 or len(images.shape) != 3 or shape[0] != images.shape[0]:
        found = f"images {list(images.shape)} in {images.name}"
        raise DataError("data", found=found, expected=f"{list(shape)}, as the model was captured with")

    def resize(split: TensorDataset) -> TensorDataset:
        pixels, labels = split.tensors
        resized = torch.nn.functional.interpolate(pixels, shape[1:], mode="bilinear", antialias=True)
        return TensorDataset(resized, labels)

    return dataclasses.replace(
        images,
        train=resize(images.train),
        calibration=resize(images.calibration),
        test=resize(images.test),
    )


def digits(*, seed: int = 0) -> Images:
    """1,797 handwritten digits of 8×8 pixels from scikit-learn, doubled to `[N, 1, 16, 16]`."""
    images, labels = require("sklearn.datasets", extra="demo").load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16
    pixels = torch.nn.functional.interpolate(pixels, scale_factor=2, mode="bilinear", align_corners=False)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    pixels, targets = pixels[order], torch.from_numpy(labels)[order]
    rest = len(pixels) - 450
    return _split(
        "digits",
        (pixels[:rest], targets[:rest]),
        (pixels[rest:], targets[rest:]),
        held_out=500,
        seed=seed,
        classes=tuple("0123456789"),
    )


def fashion_mnist(*, seed: int = 0) -> Images:
    """70,000 articles of clothing `[N, 1, 28, 28]`, from the Debian package's files."""
    images = idx_folder(FASHION_MNIST, seed=seed)
    return dataclasses.replace(images, classes=FASHION_MNIST_CLASSES, mirror=True)


def idx_folder(folder: Path, *, seed: int = 0) -> Images:
    """Read the four IDX files of MNIST, Fashion-MNIST or their kin, gzipped or not."""
    splits = [
        read_idx(_idx_file(folder, f"{split}-{content}"))
        for split in ("train", "t10k")
        for content in ("images-idx3-ubyte", "labels-idx1-ubyte")
    ]
    for images, labels in (splits[:2], splits[2:]):
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not len(labels):
            found = f"images {tuple(images.shape)} and labels {tuple(labels.shape)} in {folder}"
            raise DataError("data", found=found, expected="images [N, H, W] and labels [N]")
    train, train_labels, test, test_labels = splits
    highest = int(max(train_labels.max(), test_labels.max()))
    return _split(
        folder.name,
        (train.unsqueeze(1).float() / 255, train_labels.long()),
        (test.unsqueeze(1).float() / 255, test_labels.long()),
        held_out=min(5000, len(train) // 4),
        seed=seed,
        classes=tuple(str(label) for label in range(highest + 1)),
    )


def _idx_file(folder: Path, name: str) -> Path:
    for candidate in (folder / f"{name}.gz", folder / name):
        if candidate.is_file():
            return candidate
    found = f"neither {name}.gz nor {name} in {folder}"
    expected = "a folder with the four IDX files of Fashion-MNIST"
    if folder == FASHION_MNIST:
        expected = "the Debian package dataset-fashion-mnist (apt-get install it), or --data DIR"
    raise DataError("data", found=found, expected=expected)


def read_idx(path: Path) -> Tensor:
    """Read an IDX file of unsigned bytes, gzipped where its name ends in `.gz`.

    Returns:
        uint8 tensor of the shape that the file's header states.

    Raises:
        DataError: The file is not gzip, not IDX, or shorter or longer than its header says.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        found = f"{path}, which cannot be read ({error})"
        raise DataError("data", found=found, expected="an intact gzip file") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        found = f"{path}, which starts with {content[:4].hex(' ') or 'nothing'}"
        raise DataError("data", found=found, expected="an IDX file of bytes (00 00 08 ..)")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], dtype=">u4").astype(int).tolist()
    if len(content) - start != math.prod(shape):
        found = f"{path} with {len(content) - start} bytes of data"
        raise DataError("data", found=found, expected=f"{math.prod(shape)} bytes for shape {shape}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def image_folder(folder: Path, *, seed: int = 0, shape: tuple[int, ...] = (3, 32, 32)) -> Images:
    """Read pictures from a folder with a sub-folder per class; a quarter each is held out twice.

    Args:
        folder: The folder.
        seed: What is held out is drawn with it.
        shape: Channels (1 or 3), height and width to read them as.

    Raises:
        DataError: Too few pictures, one cannot be read, or pictures have no such shape.
    """
    modes = {1: "L", 3: "RGB"}
    if len(shape) != 3 or shape[0] not in modes:
        found = f"pictures in {folder}"
        raise DataError("data", found=found, expected=f"{list(shape)}, as the model was captured with")
    channels, height, width = shape
    if not folder.is_dir():
        raise DataError("data", found=f"no folder {folder}", expected="one with a sub-folder of pictures per class")
    pil = require("PIL.Image", extra="demo")
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    if len(classes) < 2 or len(files) < 4 * len(classes):
        found = f"{len(files)} pictures in {len(classes)} class folders under {folder}"
        raise DataError("data", found=found, expected="two classes or more, four pictures of each")
    pixels = np.empty((len(files), height, width, channels), np.uint8)
    for row, (path, _) in enumerate(files):
        try:
            with pil.open(path) as picture:
                resized = picture.convert(modes[channels]).resize((width, height))
                pixels[row] = np.asarray(resized).reshape(height, width, channels)
        except (OSError, SyntaxError, ValueError) as error:
            found = f"{path}, which cannot be read ({error})"
            raise DataError("data", found=found, expected="an intact picture") from error
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()[order] / 255
    labels = torch.tensor([label for _, label in files])[order]
    quarter = len(files) // 4
    return _split(
        folder.name,
        (images[quarter:], labels[quarter:]),
        (images[:quarter], labels[:quarter]),
        held_out=quarter,
        seed=seed,
        classes=tuple(classes),
        mirror=True,
    )


def _split(
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    held_out: int,
    seed: int,
    classes: tuple[str, ...],
    mirror: bool = False,
) -> Images:
    pixels, labels = train
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    held, kept = order[:held_out], order[held_out:]
    mean = pixels[kept].mean(dim=(0, 2, 3), keepdim=True)
    std = pixels[kept].std(dim=(0, 2, 3), keepdim=True).clamp_min(1e-3)
    pixels = (pixels - mean) / std
    return Images(
        name=name,
        train=TensorDataset(pixels[kept], labels[kept]),
        calibration=TensorDataset(pixels[held], labels[held]),
        test=TensorDataset((test[0] - mean) / std, test[1]),
        classes=classes,
        mirror=mirror,
    )
