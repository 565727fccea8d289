"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

UNFINISHED = "unfinished"


def replace_files(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Write files into `folder`, each of which takes its name once all of them are complete and on the disk.

    A full disk or a power cut before that leaves the folder as it was. Killed between two renames, it has new files
    beside old ones, in the order of `writers`, and the rest in the folder `unfinished`, which the next call removes.

    Args:
        folder: an existing folder.
        writers: by file name, a function that writes the content to the path that it is given.

    Raises:
        OSError, or whatever a writer raises: nothing was renamed.
    """
    # A folder, because safetensors writes to a file of its own choice beside the one that it is told.
    aside = folder / UNFINISHED
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        for name, write in writers.items():
            write(aside / name)
            (aside / name).chmod(0o666 & ~_umask())  # safetensors 0.8 lets the owner alone read what it writes
            sync(aside / name)
        for name in writers:
            (aside / name).replace(folder / name)
        with contextlib.suppress(OSError):  # Windows opens no folders, and some file systems sync none
            sync(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """Return the mode bits that this process denies; setting them is the only way to read them."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask
