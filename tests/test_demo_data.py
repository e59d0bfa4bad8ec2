"""The demo's data sets and static models."""

import gzip
import struct

import numpy as np
import pytest
import torch

from dyncompile.demo import datasets
from dyncompile.demo.models import ResNet
from dyncompile.demo.train import Augmented, Schedule, accuracy, train
from dyncompile.errors import ArgumentError, DataError


def write_idx(path, array):
    header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def idx_folder(tmp_path):
    """40 + 12 images of 6×5, half of the files gzipped; a pixel tells its label."""
    for split, count in (("train", 40), ("t10k", 12)):
        labels = np.arange(count) % 3
        images = np.zeros((count, 6, 5)) + 50 * labels[:, None, None]
        write_idx(tmp_path / f"{split}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte", labels)
    return tmp_path


def test_digits_are_split_without_overlap_and_by_seed(needs):
    needs("sklearn")
    first, again, other = (datasets.load("digits", seed=seed) for seed in (0, 0, 1))
    assert [len(split) for split in (first.train, first.calibration, first.test)] == [847, 500, 450]
    assert torch.equal(first.train.tensors[0], again.train.tensors[0])
    assert not torch.equal(first.test.tensors[0], other.test.tensors[0])
    rows = torch.cat([split.tensors[0] for split in (first.train, first.calibration, first.test)])
    assert len(rows.flatten(1).unique(dim=0)) == 1797
    assert abs(first.train.tensors[0].mean()) < 1e-4


def test_idx_folder(idx_folder):
    images = datasets.load(str(idx_folder))
    assert images.shape == (1, 6, 5)
    assert images.classes == ("0", "1", "2")
    assert [len(split) for split in (images.train, images.calibration, images.test)] == [30, 10, 12]
    for split in (images.train, images.calibration, images.test):
        pixels, labels = split.tensors
        assert torch.equal(pixels[:, 0, 0, 0].unique(return_inverse=True)[1], labels)


def test_idx_file_is_missing(idx_folder):
    (idx_folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"neither t10k-labels-idx1-ubyte\.gz nor"):
        datasets.load(str(idx_folder))


def test_fashion_mnist_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "FASHION_MNIST", tmp_path)
    with pytest.raises(DataError, match="Debian package dataset-fashion-mnist"):
        datasets.load("fashion-mnist")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-images-idx3-ubyte.gz", lambda content: content[:-30], "cannot be read"),
        ("train-images-idx3-ubyte.gz", lambda content: b"no gzip", "cannot be read"),
        ("train-labels-idx1-ubyte", lambda content: content[:-1], "39 bytes of data"),
        ("train-labels-idx1-ubyte", lambda content: content + b"!", "41 bytes of data"),
        ("train-labels-idx1-ubyte", lambda content: content[:6], "an IDX file of bytes"),
        ("train-labels-idx1-ubyte", lambda content: b"\1" + content[1:], "starts with 01 00 08 01"),
        ("train-labels-idx1-ubyte", lambda content: b"", "starts with nothing"),
    ],
)
def test_idx_file_is_damaged(idx_folder, name, damage, message):
    path = idx_folder / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        datasets.load(str(idx_folder))


def test_idx_labels_do_not_fit(idx_folder):
    write_idx(idx_folder / "train-labels-idx1-ubyte", np.zeros(39))
    with pytest.raises(DataError, match=r"images \(40, 6, 5\) and labels \(39,\)"):
        datasets.load(str(idx_folder))


def test_fashion_mnist():
    if not datasets.FASHION_MNIST.is_dir():
        pytest.skip("needs the Debian package dataset-fashion-mnist")
    images = datasets.load("fashion-mnist")
    assert [len(split) for split in (images.train, images.calibration, images.test)] == [
        55_000,
        5_000,
        10_000,
    ]
    assert images.shape == (1, 28, 28)
    assert images.test.tensors[1].bincount().tolist() == [1000] * 10


def test_image_folder(tmp_path, needs):
    image = needs("PIL.Image")
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for index in range(8):
            picture = np.full((9, 7, 3), 200 * label + index, np.uint8)
            image.fromarray(picture).save(tmp_path / name / f"{index}.png")
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    images = datasets.load(f"imagefolder:{tmp_path}", shape=(3, 8, 8))
    assert images.shape == (3, 8, 8)
    assert datasets.load(f"imagefolder:{tmp_path}", shape=(1, 5, 6)).shape == (1, 5, 6)
    assert images.classes == ("cat", "dog")
    assert [len(split) for split in (images.train, images.calibration, images.test)] == [8, 4, 4]
    for split in (images.train, images.calibration, images.test):
        pixels, labels = split.tensors
        assert torch.equal((pixels[:, 0, 0, 0] > 0).long(), labels)

    (tmp_path / "dog" / "0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"0\.png, which cannot be read"):
        datasets.load(f"imagefolder:{tmp_path}")


def test_image_folder_is_empty(tmp_path, needs):
    needs("PIL.Image")
    with pytest.raises(DataError, match="0 pictures in 0 class folders"):
        datasets.load(f"imagefolder:{tmp_path}")


def test_data_from_a_factory(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def images(): return 3\ndef broken(): raise KeyError('x')\n")
    with pytest.raises(ArgumentError, match="a int from"):
        datasets.load(f"{path}:images")
    with pytest.raises(ArgumentError, match="which fails .KeyError: 'x'"):
        datasets.load(f"{path}:broken")


@pytest.mark.parametrize("source", ["digit", "nowhere/at-all"])
def test_unknown_data(source):
    with pytest.raises(ArgumentError, match="expected digits, fashion-mnist, a folder"):
        datasets.load(source)


@pytest.mark.parametrize(("depth", "layers"), [(8, 8), (20, 20), (56, 56)])
def test_resnet_has_the_depth_of_the_paper(depth, layers, device):
    model = ResNet(depth, in_channels=3).to(device).eval()
    weighted = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear) and "shortcut" not in name
    ]
    assert len(weighted) == layers
    assert model(torch.zeros(2, 3, 9, 9, device=device)).shape == (2, 10)


def test_resnet20_has_the_size_of_the_paper():
    # 0.27 M parameters in table 6 of arXiv 1512.03385, plus two projection shortcuts.
    weights = sum(weight.numel() for weight in ResNet(20).parameters())
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert weights - projections == 269_722


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_resnet_refuses_other_depths(depth):
    with pytest.raises(ArgumentError, match=f"`depth`: found {depth}; expected 6n"):
        ResNet(depth)


def test_augmentation_shifts_and_mirrors(needs):
    needs("sklearn")
    images = datasets.load("digits")
    pixels, labels = images.train.tensors
    plain, mirrored = (Augmented(images.train, mirror=mirror) for mirror in (False, True))
    assert len(plain) == len(images.train)

    def shifts(image):
        padded = torch.nn.functional.pad(image, [1] * 4, mode="replicate")
        return [padded[:, y : y + 16, x : x + 16] for y in range(3) for x in range(3)]

    seen = [plain[3][0] for _ in range(50)]
    assert all(any(torch.equal(one, shift) for shift in shifts(pixels[3])) for one in seen)
    assert len(torch.stack(seen).unique(dim=0)) > 4
    flipped = [mirrored[3] for _ in range(20)]
    assert {int(label) for _, label in flipped} == {int(labels[3])}
    assert any(any(torch.equal(one, s.flip(-1)) for s in shifts(pixels[3])) for one, _ in flipped)


def test_training_learns_and_repeats(device, needs):
    needs("sklearn")
    images = datasets.load("digits")
    weights = []
    for _ in range(2):
        torch.manual_seed(1)
        model = ResNet(8, width=8, in_channels=1).to(device)
        train(model, images, Schedule(epochs=2), seed=1)
        weights.append(model.fc.weight)
    assert not model.training
    inputs, labels = (tensor.to(device) for tensor in images.test.tensors)
    assert accuracy(model, inputs, labels) > 0.3
    if device.type == "cpu":
        assert torch.equal(*weights)


def test_images_are_resized_to_a_shape(needs):
    needs("sklearn")
    assert datasets.load("digits", shape=(1, 12, 20)).shape == (1, 12, 20)
    with pytest.raises(DataError, match=r"images \[1, 16, 16\] in digits; expected \[8\]"):
        datasets.load("digits", shape=(8,))
