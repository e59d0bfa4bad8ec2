"""Files that are written as a whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """A path beside another one, to write to; it takes that one's place when the block ends without an error.

    Whatever stops the process, `path` is what it was before, or what was written.

    Args:
        path: The file that is made or replaced. Its folder is made if it is not there; its mode is kept.

    Yields:
        A hidden path in the same folder, with the process in its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield draft
        flush(draft)
        if path.exists():
            draft.chmod(path.stat().st_mode & 0o777)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def flush(*paths: Path) -> None:
    """Wait until files, or the names in a folder, are on the disk."""
    for path in paths:
        if path.is_dir() and os.name == "nt":
            continue  # a folder cannot be opened there
        handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
