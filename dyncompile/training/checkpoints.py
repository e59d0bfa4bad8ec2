"""Checkpoints that are whole or not there; `finetune` imports this late, because it loads Lightning."""

import pickle
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from dyncompile.drafts import drafted
from dyncompile.errors import ArgumentError

LAST, BEST = "last", "best"


class WholeCheckpoints(TorchCheckpointIO):
    """Written beside their final name, then renamed: a run that is killed leaves the checkpoint before.

    Lightning's own are written to the folder for temporary files, which may be on another disk; from there they are
    copied over the checkpoint before.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint to a path, atomically where it is a local file."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with drafted(Path(path)) as draft:
            torch.save(checkpoint, draft)


def starting_point(folder: Path, *, resume: bool) -> Path | None:
    """The checkpoint to go on from; without `resume` none, and those of an earlier run are removed.

    A run that is killed before its first epoch ends must not leave those of another to be resumed.

    Raises:
        ArgumentError: The checkpoint cannot be read.
    """
    last = folder / f"{LAST}.ckpt"
    for name in (LAST, BEST):
        for left in folder.glob(f".{name}.ckpt.*"):  # by runs that were killed while they wrote
            left.unlink(missing_ok=True)
    if not resume:
        for name in (LAST, BEST):
            (folder / f"{name}.ckpt").unlink(missing_ok=True)
        return None
    if not last.exists():
        return None
    try:
        made_here = "dyncompile" in torch.load(last, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, BadZipFile, pickle.UnpicklingError, TypeError) as error:
        found = f"{last}, which cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        raise ArgumentError("directory", found=found, expected="an intact checkpoint, or resume=False") from error
    if not made_here:
        raise ArgumentError("directory", found=f"{last}, not of `finetune`", expected="one of it, or resume=False")
    return last
