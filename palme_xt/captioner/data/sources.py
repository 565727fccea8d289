"""Open the data of `--data` with the part of the `datasets` library that reads them."""

import glob
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from palme_xt.captioner.data.batches import DataError
from palme_xt.captioner.images import image_files

BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SAVED = ("dataset_dict.json", "state.json")
SHARD_IMAGES = ("jpg", "jpeg", "png", "webp")
SPLITS = ("train", "validation", "test")


def open_splits(name: str, streaming: bool) -> Mapping[str, Any]:
    """Return the splits of a data set, each a `datasets.Dataset`, or a `datasets.IterableDataset` if streamed.

    Args:
        name: The value of `palme_xt.captioner.options.Data.data`.
        streaming: Whether to read the rows one by one, instead of preparing all of them first.

    Raises:
        DataError: If the data do not exist, cannot be loaded, or have no captions or no rows.
    """
    with reading(f"data={name} cannot be loaded"):
        splits = _prepared(name)
        if streaming:
            splits = {split: rows.to_iterable_dataset() for split, rows in splits.items()}
        splits = splits or _load(name, streaming)
    for split, rows in splits.items():
        if not streaming and not len(rows):
            raise DataError(f"data={name} has no rows in its split {split}: remove the split, or add rows")
    return splits


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn any error while `datasets` reads into a one-line error that begins with `what`.

    Raises:
        DataError: If any error was raised.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        reason = next(iter(str(cause).strip().splitlines()), "no reason given")  # one_line would omit the file's name
        raise DataError(f"{what}: {type(cause).__name__}: {reason}") from error


def checked(rows: Iterable[Any], what: str) -> Iterator[Any]:
    """Yield rows, with errors as in `reading`. In `what`, `{}` stands for the number of rows before the error."""
    rows = iter(rows)
    for number in count():
        with reading(what.format(number)):
            row = next(rows, None)
        if row is None:
            return
        yield row


def columns_of(rows: Any, name: str) -> dict[str, Any]:
    """Return the columns of a split of the data `name` with their types, or the first row of a stream without types.

    Raises:
        DataError: If that row cannot be read.
    """
    with reading(f"data={name} cannot be read"):
        return dict(rows.features or next(iter(rows.take(1)), {}))


def _prepared(name: str) -> Mapping[str, Any]:
    """Return the splits that `save_to_disk` wrote, or those of images beside text files, or nothing."""
    from datasets import Dataset, load_from_disk

    if name and any((Path(name) / file).is_file() for file in SAVED):
        loaded = load_from_disk(name)
        return {"train": loaded} if isinstance(loaded, Dataset) else loaded
    return _captioned_by_files(Path(name)) if _arguments(name) == {"path": name} else {}


def _load(name: str, streaming: bool) -> Mapping[str, Any]:
    from datasets import load_dataset

    arguments = _arguments(name)
    undescribed = arguments == {"path": name}
    if arguments["path"] == "webdataset" or (undescribed and any(Path(name).rglob("*.tar"))):
        arguments["features"] = _features_of_shards(arguments)
    splits: Mapping[str, Any] = load_dataset(**arguments, streaming=streaming)
    if undescribed and any(rows.info.builder_name == "imagefolder" for rows in splits.values()):
        remedy = "add a metadata.jsonl with the columns file_name and text, or a text file for each image"
        raise DataError(f"data={name} must have captions: {remedy}")
    return splits


def _arguments(name: str) -> dict[str, Any]:
    """Return the arguments of `load_dataset` for data of this name, with escaped brackets in paths."""
    path = Path(name)
    if name.startswith("hf:"):
        repository, _, configuration = name[3:].partition(":")
        if not repository:
            raise DataError(f"data={name} must name a data set: pass hf:NAME or hf:NAME:CONFIG")
        return {"path": repository, "name": configuration or None}
    if name and path.is_dir():
        folder = {"path": "imagefolder", "data_dir": glob.escape(name)}
        metadata = [file for file in path.rglob("metadata.*") if file.name in METADATA]
        for file in metadata:
            if not file.read_bytes().strip():
                raise DataError(f"{file} is empty, must hold a line for each image: write one, or remove the file")
        if any(file.parent == path for file in metadata):
            # Load all files as one split: `datasets` would make another split from an image named test.png.
            return folder | {"data_files": {"train": "**"}}
        return folder if metadata else {"path": name}
    files = [name] if path.is_file() else sorted(glob.glob(name, recursive=True))
    if not files:
        raise DataError(f"data={name!r} does not exist: pass a folder, a file, a quoted pattern, or hf:NAME on the hub")
    if path.suffix not in BUILDERS:
        raise DataError(f"data={name} must end in {' or '.join(BUILDERS)}, or be a folder of images")
    return {"path": BUILDERS[path.suffix], "data_files": {"train": [glob.escape(file) for file in files]}}


def _captioned_by_files(folder: Path) -> dict[str, Any]:
    """Return the splits of a folder whose captions are in text files beside the images, or nothing if it has none."""
    from datasets import Dataset

    splits = {}
    folders = {split: folder / split for split in SPLITS if (folder / split).is_dir()}
    for split, below in (folders if SPLITS[0] in folders else {SPLITS[0]: folder}).items():
        images = image_files(below)
        beside = [Path(image).with_suffix(".txt") for image in images]
        texts = [file.read_text("utf-8-sig").strip() if file.is_file() else None for file in beside]
        splits[split] = Dataset.from_dict({"image": images, "text": texts})
    return splits if any(any(rows["text"]) for rows in splits.values()) else {}


def _features_of_shards(arguments: Mapping[str, Any]) -> Any:
    """Return the columns of webdataset shards and all usual image columns, or None if these are not such shards.

    Otherwise, `datasets` would give all rows the columns of the first ones.
    """
    from datasets import Features, Image, Value, load_dataset

    try:
        features = next(iter(load_dataset(**arguments, streaming=True).values())).features
    except ValueError:  # the first rows do not all have the same columns
        features = {"txt": Value("string"), "__key__": Value("string"), "png": Image()}
    if not features or "__key__" not in features or not set(SHARD_IMAGES) & set(features):
        return None
    return Features({**features, **{name: Image() for name in SHARD_IMAGES}})
