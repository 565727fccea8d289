"""Read captioned images from anything that the `datasets` library loads: folders, parquet, webdataset, the hub."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, islice
from typing import Any

import numpy as np
import torch

from palme_xt.captioner.data.batches import DataError, Defect, Example, Source
from palme_xt.captioner.data.sources import SHARD_IMAGES, columns_of, open_splits, reading
from palme_xt.captioner.images import ImageError, MissingImageError, Preprocessing, image_errors
from palme_xt.captioner.options import Data
from palme_xt.captioner.tokenizer import Tokenizer
from palme_xt.config import PalmEConfig

IMAGE_COLUMNS = ("image", *SHARD_IMAGES)
TEXT_COLUMNS = ("text", "caption", "txt")
HELD_OUT_SHARE = 0.1
HELD_OUT_OF_A_STREAM = 500
KEPT_BYTES = 2**28


@dataclass(frozen=True)
class Reader:
    """A callable that turns a row of a data set into an example, or returns its defect.

    Args:
        image_columns: The image is in the first of these columns that is not None.
        text_column: The caption is in this column.
        preprocessing: How images are resized and cropped.
        tokenizer: The tokenizer of the captions.
        max_seq_len: Maximum number of tokens in a caption, including BOS and EOS.
    """

    image_columns: tuple[str, ...]
    text_column: str
    preprocessing: Preprocessing
    tokenizer: Tokenizer
    max_seq_len: int

    def __call__(self, row: Mapping[str, Any], number: int) -> Example | Defect:
        """Return a row as an example, or its defect.

        Raises:
            DataError: If the text column does not hold text, or the image column does not hold images.
        """
        image = next((row[column] for column in self.image_columns if row[column] is not None), None)
        path, content = (image.get("path"), image.get("bytes")) if isinstance(image, dict) else (image, None)
        name = (isinstance(path, str) and path) or row.get("__key__") or f"row {number}"
        caption = row[self.text_column]
        if not isinstance(caption, str | None):
            found = type(caption).__name__
            raise DataError(f"text_column={self.text_column} holds {found}, must hold one text: choose another column")
        if not caption or not caption.strip():
            return Defect("empty caption", f"{name} has no caption")
        ids = self.tokenizer.encode(caption)
        if len(ids) > self.max_seq_len:
            detail = f"the caption of {name} has {len(ids)} tokens, more than max_seq_len={self.max_seq_len}"
            return Defect("caption longer than the model", detail)
        try:
            img = self.preprocessing.read_pixels(self._file(content or path, name), name)
        except ImageError as error:
            return Defect("missing image" if isinstance(error, MissingImageError) else "broken image", str(error))
        return Example(img, caption, ids, name)

    def _file(self, image: Any, name: str) -> str | bytes:
        """Return an image as a path or as the content of a file."""
        if image is None:
            raise MissingImageError(f"{name} has no image")
        if not isinstance(image, str | bytes):
            columns, found = "/".join(self.image_columns), type(image).__name__
            raise DataError(f"image_column={columns} holds {found}, must hold images: choose another column")
        if isinstance(image, bytes) or "://" not in image:
            return image
        import fsspec

        with image_errors(name), fsspec.open(image, "rb") as file:
            return bytes(file.read())


class MapStyleSource(Source):
    """The rows of a `datasets.Dataset` or a list.

    With a seed, rows are reshuffled in each epoch, and up to `KEPT_BYTES` of decoded images are kept in memory.
    """

    def __init__(self, rows: Any, reader: Reader, seed: int | None = None) -> None:
        self.rows, self.reader, self.seed = rows, reader, seed
        self.rows_per_epoch = len(rows)
        self._kept: dict[int, Example | Defect] = {}
        self._room = 0 if seed is None else KEPT_BYTES

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, numbers: range) -> list[Example | Defect]:
        """Return the rows with these numbers, as `Source.read` does."""
        return [self._row(self._place(number)) for number in numbers]

    def fingerprint(self) -> str:
        """Return a digest of the number of rows and of their captions, in order."""
        column = self.reader.text_column
        digest = hashlib.sha256(f"{len(self.rows)}\n".encode())
        with reading("data cannot be read"):
            captions = [row[column] for row in self.rows] if isinstance(self.rows, list) else self.rows[column][:]
        for caption in captions:
            digest.update(json.dumps(caption, default=repr).encode() + b"\n")
        return digest.hexdigest()

    def _row(self, place: int) -> Example | Defect:
        row = self._kept.get(place)
        if row is None:
            with reading(f"data cannot be read at row {place}"):
                content = self.rows[place]
            row = self.reader(content, place)
            if isinstance(row, Example) and row.img.nbytes <= self._room:
                self._kept[place], self._room = row, self._room - row.img.nbytes
        return row

    def _place(self, number: int) -> int:
        epoch, place = divmod(number, len(self.rows))
        if self.seed is None:
            return place
        # Each pair gets its own seed: seeds of torch's generators have 64 bits, and epochs are few.
        return int(_permutation(len(self.rows), (self.seed * 2**20 + epoch) % 2**63)[place])


class StreamedSource(Source):
    """The rows of a `datasets.IterableDataset`, which are shuffled within a buffer and reshuffled in each epoch."""

    def __init__(self, stream: Any, reader: Reader) -> None:
        self.stream, self.reader = stream, reader
        self._rows: Iterator[tuple[int, Mapping[str, Any]]] | None = None
        self._number = 0

    def read(self, numbers: range) -> list[Example | Defect]:
        """Return the rows with these numbers, as `Source.read` does. Rows before them are read and discarded."""
        if self._rows is None:
            self._rows = self._endless()
        rows = islice(self._rows, numbers.start - self._number, numbers.stop - self._number)
        self._number = numbers.stop
        return [self.reader(row, place) for place, row in rows]

    def _endless(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        # datasets 5.2 keeps the epoch in memory that reader processes share, so each process sets it in its own copy.
        stream = copy.deepcopy(self.stream)
        for epoch in count():
            stream.set_epoch(epoch)
            # `iter(stream)` would give each worker of a DataLoader different rows. Here, all of them read the same
            # rows, and each keeps those with its own numbers.
            rows = stream.iter(batch_size=1)
            for place in count():
                with reading(f"data cannot be read after {place} rows of the stream"):
                    row = next(rows, None)
                if row is None:
                    break
                yield place, {name: value[0] for name, value in row.items()}
            if not place:
                raise DataError("held_out takes all rows of the stream, must leave some: pass a smaller --held_out")
            self.rows_per_epoch = place


def load_data(
    data: Data, config: PalmEConfig, preprocessing: Preprocessing, tokenizer: Tokenizer, *, seed: int, max_held_out: int
) -> tuple[Source, MapStyleSource]:
    """Return the rows to train on and the held-out rows, which are disjoint unless the data have duplicates.

    A held-out split is limited to `max_held_out` rows: a sample that is always the same, or the first rows of a stream.

    Raises:
        DataError: If the data cannot be loaded, or do not have the requested columns or splits.
    """
    train, held_out = _train_and_held_out(open_splits(data.data, data.streaming), data, max_held_out)
    images, text = _columns(data, train)
    reader = Reader(images, text, preprocessing, tokenizer, config.max_seq_len)
    train, held_out = (_undecoded(rows, images, text, data) for rows in (train, held_out))
    with reading(f"data={data.data} cannot be read"):
        evaluated = MapStyleSource(list(held_out.take(max_held_out)) if data.streaming else held_out, reader)
    if not len(evaluated):
        raise DataError(f"data={data.data} has no held-out rows: choose another split or number with --held_out")
    if data.streaming:
        train = train.shuffle(seed=seed % 2**32, buffer_size=data.shuffle_buffer)
        return StreamedSource(train, reader), evaluated
    return MapStyleSource(train, reader, seed), evaluated


def _train_and_held_out(splits: Mapping[str, Any], data: Data, max_held_out: int) -> tuple[Any, Any]:
    name = "train" if "train" in splits else next(iter(splits))
    if name != "train" and len(splits) > 1:
        raise DataError(f"data={data.data} has the splits {', '.join(splits)}, must have one named train, or only one")
    train = splits[name]
    others = [split for split in splits if split != name]
    wanted = data.held_out or next((split for split in ("validation", "test") if split in others), None)
    if wanted in others:
        held_out = splits[wanted]
        if not data.streaming and len(held_out) > max_held_out:  # the first rows may be alike
            held_out = held_out.select(_permutation(len(held_out))[:max_held_out].numpy())
    elif data.streaming:
        number = _held_out_rows(wanted or str(HELD_OUT_OF_A_STREAM), None, splits)
        held_out, train = train.take(number), train.skip(number)
    else:
        number = _held_out_rows(wanted or str(HELD_OUT_SHARE), len(train), splits)
        order = _permutation(len(train)).numpy()
        held_out, train = train.select(order[:number]), train.select(np.sort(order[number:]))
    return train, held_out


def _held_out_rows(wanted: str, rows: int | None, splits: Mapping[str, Any]) -> int:
    """Return how many of `rows` rows (None for a stream) the option `held_out` requests."""
    try:
        number = float(wanted)
    except ValueError:
        others = f"a split other than the training split ({', '.join(splits)})"
        raise DataError(f"held_out={wanted} must be {others}, a share below 1, or a number of rows") from None
    share, whole = 0 < number < 1, number >= 1 and number.is_integer()
    if rows is None and not whole:
        raise DataError(f"held_out={wanted} of a stream must be a whole number of rows, or a split")
    if rows is not None and not ((share or whole) and number < rows):
        raise DataError(f"held_out={wanted} must be more than 0 and leave some of the {rows} rows to train on")
    return int(number) if rows is None or whole else min(rows - 1, max(1, round(number * rows)))


def _columns(data: Data, rows: Any) -> tuple[tuple[str, ...], str]:
    """Return the image columns and the text column."""
    from datasets import Image

    features = columns_of(rows, data.data)
    typed = [name for name, feature in features.items() if isinstance(feature, Image)]
    usual = [name for name in IMAGE_COLUMNS if name in (typed or features)]
    images = [data.image_column] if data.image_column else usual or typed or [""]
    if len(images) > 1 and not usual:
        raise DataError(f"data={data.data} has the image columns {', '.join(typed)}: choose one with --image_column")
    text = data.text_column or next((name for name in TEXT_COLUMNS if name in features), "")
    for option, column in ("image_column", images[0]), ("text_column", text):
        if column not in features:
            raise DataError(f"{option}={column!r} must be a column ({', '.join(features)}): choose one with --{option}")
    # Rows of webdataset shards need not all have the same kind of image.
    return tuple(images if "__key__" in features else images[:1]), text


def _undecoded(rows: Any, images: tuple[str, ...], text: str, data: Data) -> Any:
    """Return only the needed columns, with images as paths or bytes, so that broken ones are found as in captioning."""
    from datasets import Image

    columns = columns_of(rows, data.data)
    if missing := {*images, text} - set(columns):
        raise DataError(f"data={data.data} has held-out rows without {', '.join(sorted(missing))}: use another split")
    rows = rows.select_columns([name for name in columns if name in {*images, text, "__key__"}])
    for name in images:
        if isinstance(columns[name], Image):
            rows = rows.cast_column(name, Image(decode=False))
    return rows


@lru_cache(maxsize=1)  # all rows of an epoch use the same permutation
def _permutation(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
