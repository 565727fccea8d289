"""What `--data` names, opened by whatever part of the `datasets` library reads it."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from palme_xt.captioner.data.batches import DataError

BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SAVED = ("dataset_dict.json", "state.json")
SHARD_IMAGES = ("jpg", "jpeg", "png", "webp")


def open_splits(name: str, streaming: bool) -> Mapping[str, Any]:
    """The splits of a data set, each a `datasets.Dataset`, or a `datasets.IterableDataset` if it is streamed.

    Args:
        name: as `palme_xt.captioner.data.rows.Data.data`.
        streaming: do not prepare all rows first.

    Raises:
        DataError: it is not there, or cannot be loaded, or has no captions or no rows.
    """
    saved = name and any((Path(name) / file).is_file() for file in SAVED)
    with reading(f"data={name} cannot be loaded"):
        loaded = _saved(name, streaming) if saved else _loaded(name, streaming)
    for split, rows in loaded.items():
        if not streaming and not len(rows):
            raise DataError(f"data={name} has no rows in its split {split}: leave it out, or fill it")
    return loaded


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Around what `datasets` does: whatever it raises, and all that it reads with, becomes one line.

    Raises:
        DataError: `what`, and why.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        reason = (str(cause).strip().splitlines() or ["no reason given"])[0]
        raise DataError(f"{what}: {type(cause).__name__}: {reason}") from error


def columns_of(rows: Any, name: str) -> dict[str, Any]:
    """The columns of a split of the data `name` and their types, or of a stream that does not tell, its first row.

    Raises:
        DataError: that row cannot be read.
    """
    with reading(f"data={name} cannot be read"):
        return dict(rows.features or next(iter(rows.take(1)), {}))


def _saved(folder: str, streaming: bool) -> Mapping[str, Any]:
    """What `save_to_disk` wrote."""
    from datasets import Dataset, load_from_disk

    loaded = load_from_disk(folder)
    splits = {"train": loaded} if isinstance(loaded, Dataset) else loaded
    return {split: rows.to_iterable_dataset() if streaming else rows for split, rows in splits.items()}


def _loaded(name: str, streaming: bool) -> Mapping[str, Any]:
    from datasets import load_dataset

    arguments, keywords = _arguments(name)
    undescribed = arguments == (name,)
    if arguments == ("webdataset",) or (undescribed and any(Path(name).rglob("*.tar"))):
        keywords["features"] = _features_of_shards(*arguments, **keywords)
    loaded: Mapping[str, Any] = load_dataset(*arguments, **keywords, streaming=streaming)
    if undescribed and any(rows.info.builder_name == "imagefolder" for rows in loaded.values()):
        raise DataError(
            f"data={name} holds images without captions, must have a metadata.jsonl or metadata.csv with the columns "
            "file_name and text: add one"
        )
    return loaded


def _arguments(name: str) -> tuple[tuple[str | None, ...], dict[str, Any]]:
    """What `load_dataset` is given; it takes paths for patterns, so that brackets have to be escaped."""
    path = Path(name)
    if name.startswith("hf:"):
        repository, _, configuration = name[3:].partition(":")
        if not repository:
            raise DataError(f"data={name} names no data set: give hf:NAME or hf:NAME:CONFIG")
        return (repository, configuration or None), {}
    if name and path.is_dir():
        keywords: dict[str, Any] = {"data_dir": glob.escape(name)}
        if any((path / file).is_file() for file in METADATA):
            # All in one split: of a picture named test.png, `datasets` would make another.
            return ("imagefolder",), keywords | {"data_files": {"train": "**"}}
        described = any(file.name in METADATA for file in path.rglob("metadata.*"))
        return (("imagefolder",), keywords) if described else ((name,), {})
    files = [name] if path.is_file() else sorted(glob.glob(name, recursive=True))
    if not files:
        raise DataError(
            f"data={name or repr(name)} is not there: give a folder, a file, a quoted pattern, or hf:NAME of the hub"
        )
    if path.suffix not in BUILDERS:
        raise DataError(f"data={name} must end in {' or '.join(BUILDERS)}, or be a folder of images")
    return (BUILDERS[path.suffix],), {"data_files": {"train": list(map(glob.escape, files))}}


def _features_of_shards(*arguments: str | None, **keywords: Any) -> Any:
    """The columns of webdataset shards, and all usual ones of images: `datasets` takes those of the first rows for all.

    None if the data are no such shards.
    """
    from datasets import Features, Image, Value, load_dataset

    try:
        features = next(iter(load_dataset(*arguments, **keywords, streaming=True).values())).features
    except ValueError:  # one of the first rows has what another has not
        features = {"txt": Value("string"), "__key__": Value("string"), "png": Image()}
    if not features or "__key__" not in features or not set(SHARD_IMAGES) & set(features):
        return None
    return Features({**features, **{name: Image() for name in SHARD_IMAGES}})
