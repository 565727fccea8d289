"""Write files completely or not at all, and explain on one line what went wrong with a file."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

Content = bytes | Callable[[Path], object]  # of a file, or a function that writes it to the path that it is given
UNFINISHED = ".palme_xt-unfinished"  # a name that no user would choose, because it is deleted with its contents


def replace_files(folder: Path, contents: Mapping[str, Content]) -> None:
    """Write files into `folder`, and rename each to its final name when all of them are complete and on disk.

    A full disk or a power cut before that leaves the folder unchanged. If the process is killed between two renames,
    the folder has new files, in the order of `contents`, beside old ones, and the rest in the folder `UNFINISHED`,
    which the next call removes.

    Args:
        folder: An existing folder.
        contents: The content of each file, by its name.

    Raises:
        OSError: If the files cannot be written, or whatever a function raises. Nothing has been renamed.
    """
    # Use a folder, because safetensors writes to a temporary file of its own beside the file that it is given.
    aside = folder / UNFINISHED
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        for name, content in contents.items():
            write = partial(Path.write_bytes, data=content) if isinstance(content, bytes) else content
            write(aside / name)
            (aside / name).chmod(0o666 & aside.stat().st_mode)  # safetensors 0.8 lets only the owner read its files
            sync(aside / name)
        for name in contents:
            (aside / name).replace(folder / name)
        with contextlib.suppress(OSError):  # Windows cannot open folders, and some file systems cannot sync them
            sync(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explained(what: str, kind: type[ValueError] = ValueError, remedy: str = "") -> Iterator[None]:
    """Turn any error inside into one of the given kind, on one line that begins with `what` and ends with `remedy`.

    A package that is not installed is an error of its own, which says how to install it.
    """
    try:
        yield
    except ModuleNotFoundError:
        raise
    except Exception as error:  # some libraries raise errors of many types, or bare ones
        raise kind(f"{what}: {one_line(error)}{remedy}") from error


def one_line(value: object) -> str:
    """Return a value on one line: of an error, its message, or the name of its type if it has none."""
    if isinstance(value, OSError) and value.strerror:
        return value.strerror
    if isinstance(value, KeyError):
        return f"{value} is missing"
    return " ".join(str(value).split()) or (type(value).__name__ if isinstance(value, Exception) else "")
