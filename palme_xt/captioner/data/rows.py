"""Captioned pictures from whatever the `datasets` library loads: folders, parquet, webdataset shards, the hub."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from palme_xt.captioner.data.batches import DataError, Defect, Example, Source
from palme_xt.captioner.data.sources import SHARD_IMAGES, columns_of, open_splits, reading
from palme_xt.captioner.images import ImageError, MissingImageError, Preprocessing
from palme_xt.captioner.options import Data
from palme_xt.captioner.tokenizer import Tokenizer
from palme_xt.config import PalmEConfig

IMAGE_COLUMNS = ("image", *SHARD_IMAGES)
TEXT_COLUMNS = ("text", "caption", "txt")
HELD_OUT_SHARE = 0.1
HELD_OUT_OF_A_STREAM = 500
KEPT_BYTES = 2**28

MISSING, BROKEN, EMPTY, TOO_LONG = "missing image", "broken image", "empty caption", "caption longer than the model"


@dataclass(frozen=True)
class Reader:
    """Rows of a data set to examples, or to what is wrong with them.

    Args:
        image_columns: of the rows; the image is in the first of them that is not None.
        text_column: of the rows.
        preprocessing: of the images.
        tokenizer: of the captions.
        max_seq_len: tokens that a caption may have, BOS and EOS included.
    """

    image_columns: tuple[str, ...]
    text_column: str
    preprocessing: Preprocessing
    tokenizer: Tokenizer
    max_seq_len: int

    def __call__(self, row: Mapping[str, Any], number: int) -> Example | Defect:
        """A row as an example.

        Raises:
            DataError: its caption is no text, or its image no image: the columns are not what they should be.
        """
        image = next((row[column] for column in self.image_columns if row[column] is not None), None)
        caption = row[self.text_column]
        name = _name(image, row) or f"row {number}"
        if not isinstance(caption, str | None):
            rule = "text: one caption a row; name" if isinstance(caption, list) else "text: name"
            found = type(caption).__name__
            raise DataError(f"text_column={self.text_column} holds {found}, must hold {rule} another column")
        if not caption or not caption.strip():
            return Defect(EMPTY, f"{name} has no caption", name)
        ids = self.tokenizer.encode(caption)
        if len(ids) > self.max_seq_len:
            detail = f"the caption of {name} has {len(ids)} tokens, max_seq_len={self.max_seq_len}"
            return Defect(TOO_LONG, detail, name)
        try:
            img = self.preprocessing.read_pixels(self._content(image, name), name)
        except MissingImageError as error:
            return Defect(MISSING, str(error), name)
        except ImageError as error:
            return Defect(BROKEN, str(error), name)
        return Example(img, caption, ids, name)

    def _content(self, image: Any, name: str) -> str | bytes:
        if isinstance(image, bytes):
            return image
        path, content = (image.get("path"), image.get("bytes")) if isinstance(image, dict) else (image, None)
        if content:
            return bytes(content)
        if path is None:
            raise MissingImageError(f"{name} has no image")
        if not isinstance(path, str):
            column, found = "/".join(self.image_columns), type(image).__name__
            raise DataError(f"image_column={column} holds {found}, must hold images: name another column")
        if "://" not in path:
            return path
        import fsspec

        try:
            with fsspec.open(path, "rb") as file:
                return bytes(file.read())
        except FileNotFoundError as error:
            raise MissingImageError(f"{name} cannot be read: {error}") from error
        except Exception as error:  # of whatever network or archive it is in
            raise ImageError(f"{name} cannot be read: {error}") from error


class Rows:
    """Rows of a `datasets.Dataset` or a list, shuffled anew in each epoch; or in their own order, without a seed.

    In shuffled order, pictures are kept once they are decoded, up to `KEPT_BYTES`.
    """

    def __init__(self, rows: Any, reader: Reader, seed: int | None = None) -> None:
        self.rows, self.reader, self.seed = rows, reader, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)
        self._kept: dict[int, Example | Defect] = {}
        self._room = 0 if seed is None else KEPT_BYTES

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, numbers: range) -> list[Example | Defect]:
        """As `Source.read`."""
        return [self._row(place) for place in map(self._place, numbers)]

    def _row(self, place: int) -> Example | Defect:
        row = self._kept.get(place)
        if row is None:
            with reading(f"data cannot be read at row {place}"):
                content = self.rows[place]
            row = self.reader(content, place)
            if isinstance(row, Example) and row.img.nbytes <= self._room:
                self._kept[place], self._room = row, self._room - row.img.nbytes
        return row

    def first_epoch(self, numbers: range) -> int:
        """As `Source.first_epoch`."""
        return max(0, min(len(numbers), len(self.rows) - numbers.start))

    def fingerprint(self) -> str:
        """As `Source.fingerprint`: of how many rows there are, and of their captions in order."""
        column = self.reader.text_column
        digest = hashlib.sha256(f"{len(self.rows)}\n".encode())
        with reading("data cannot be read"):
            texts: Any = [self.rows] if isinstance(self.rows, list) else self.rows.select_columns([column]).iter(1000)
            for part in texts:
                captions = part[column] if isinstance(part, dict) else [row[column] for row in part]
                digest.update("".join(json.dumps(caption, default=repr) + "\n" for caption in captions).encode())
        return digest.hexdigest()

    def _place(self, number: int) -> int:
        epoch, place = divmod(number, len(self.rows))
        if self.seed is None:
            return place
        if epoch != self._epoch:
            # Distinct for each pair: the seeds of torch's generators are 64 bits wide, and epochs are few.
            shuffling = torch.Generator().manual_seed((self.seed * 2**20 + epoch) % 2**63)
            self._epoch, self._order = epoch, torch.randperm(len(self.rows), generator=shuffling)
        return int(self._order[place])


class Stream:
    """Rows of a `datasets.IterableDataset`, shuffled within a buffer and anew in each epoch."""

    def __init__(self, stream: Any, reader: Reader) -> None:
        self.stream, self.reader = stream, reader
        self._rows: Iterator[tuple[int, Mapping[str, Any]]] | None = None
        self._number, self._epoch_starts = 0, [0]

    def read(self, numbers: range) -> list[Example | Defect]:
        """As `Source.read`; what lies before `numbers` is read and thrown away."""
        if self._rows is None:
            self._rows = self._endless()
        rows: list[Example | Defect] = []
        while self._number < numbers.stop:
            place, row = next(self._rows)
            if self._number >= numbers.start:
                rows.append(self.reader(row, place))
            self._number += 1
        return rows

    def first_epoch(self, numbers: range) -> int:
        """As `Source.first_epoch`, for `numbers` that were read."""
        end = self._epoch_starts[1] if len(self._epoch_starts) > 1 else math.inf
        return sum(number < end for number in numbers)

    def fingerprint(self) -> str:
        """As `Source.fingerprint`: not known."""
        return ""

    def _endless(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        while True:
            epoch, read = len(self._epoch_starts) - 1, 0
            self.stream.set_epoch(epoch)
            # Not `iter(stream)`, which gives each worker of a DataLoader other rows: all read the same here, and keep
            # those of their own numbers.
            rows = self.stream.iter(batch_size=1)
            while True:
                with reading(f"data cannot be read after {read} rows of the stream"):
                    row = next(rows, None)
                if row is None:
                    break
                read += 1
                yield read - 1, {name: value[0] for name, value in row.items()}
            if not read:
                raise DataError("held_out takes all rows of the stream, must leave some: give a smaller --held_out")
            self._epoch_starts.append(self._number)


def load_data(
    data: Data, config: PalmEConfig, preprocessing: Preprocessing, tokenizer: Tokenizer, *, seed: int, held_out: int
) -> tuple[Source, Rows]:
    """Rows to train on, and rows to evaluate on. None is in both, if none is in the data twice.

    Of a split to evaluate on, at most `held_out` rows are taken: a sample, always the same, or the first of a stream.

    Raises:
        DataError: the data cannot be loaded, or have not the columns or splits that were asked for.
    """
    splits = open_splits(data.data, data.streaming)
    name = "train" if "train" in splits else next(iter(splits))
    if name != "train" and len(splits) > 1:
        raise DataError(f"data={data.data} has the splits {', '.join(splits)}, must have one named train, or only one")
    train = splits[name]
    own = next((split for split in ("validation", "test") if split in splits and split != name), None)
    wanted = data.held_out or own
    if wanted is not None and wanted in splits and wanted != name:
        evaluated = splits[wanted]
        if not data.streaming and len(evaluated) > held_out:  # where rows are sorted, the first are all of a kind
            evaluated = evaluated.select(_shuffled(len(evaluated))[:held_out].numpy())
    elif data.streaming:
        count = _held_out_rows(wanted or str(HELD_OUT_OF_A_STREAM), None, splits)
        evaluated, train = train.take(count), train.skip(count)
    else:
        count = _held_out_rows(wanted or str(HELD_OUT_SHARE), len(train), splits)
        order = _shuffled(len(train))
        evaluated, train = train.select(order[:count].numpy()), train.select(order[count:].sort().values.numpy())
    images, text = _columns(data, train)
    reader = Reader(images, text, preprocessing, tokenizer, config.max_seq_len)
    train, evaluated = (_undecoded(rows, images, text, data) for rows in (train, evaluated))
    with reading(f"data={data.data} cannot be read"):
        rows = Rows(list(evaluated.take(held_out)) if data.streaming else evaluated, reader)
    if not len(rows):
        raise DataError(f"data={data.data} has no held-out rows: name another split or number with --held_out")
    if not data.streaming:
        return Rows(train, reader, seed), rows
    return Stream(train.shuffle(seed=seed % 2**32, buffer_size=data.shuffle_buffer), reader), rows


def _held_out_rows(wanted: str, rows: int | None, splits: Mapping[str, Any]) -> int:
    try:
        number = float(wanted)
    except ValueError:
        raise DataError(
            f"held_out={wanted} must be a split other than the trained one ({', '.join(splits)}), a share below 1, or "
            "a number of rows"
        ) from None
    whole = number >= 1 and number.is_integer()
    if rows is None:
        if not whole:
            raise DataError(f"held_out={wanted} of a stream must be a whole number of rows, or a split")
        return int(number)
    share = 0 < number < 1
    if not (share or whole) or number >= rows:
        raise DataError(f"held_out={wanted} must leave some of the {rows} rows to train on, and be more than 0")
    return min(rows - 1, max(1, round(number * rows))) if share else int(number)


def _columns(data: Data, rows: Any) -> tuple[tuple[str, ...], str]:
    from datasets import Image

    features = columns_of(rows, data.data)
    pictures = [name for name, feature in features.items() if isinstance(feature, Image)]
    usual = [name for name in IMAGE_COLUMNS if name in (pictures or features)]
    if not (data.image_column or usual) and len(pictures) > 1:
        raise DataError(f"data={data.data} has the image columns {', '.join(pictures)}: name one with --image_column")
    images = [data.image_column] if data.image_column else usual or pictures
    text = data.text_column or next((name for name in TEXT_COLUMNS if name in features), None)
    for option, column in ("image_column", images[0] if images else None), ("text_column", text):
        if column not in features:
            found = "which is not a column" if column else "no usual name is"
            raise DataError(
                f"{option}={column}, {found} of {data.data}, which has {', '.join(features)}: name one with --{option}"
            )
    # Rows of webdataset shards need not all have the same kind of image.
    return tuple(images if "__key__" in features else images[:1]), str(text)


def _undecoded(rows: Any, images: tuple[str, ...], text: str, data: Data) -> Any:
    """Only what is needed, and images as paths or bytes: what is broken is found out as captioning finds it out."""
    from datasets import Image

    columns = columns_of(rows, data.data)
    needed = [*images, text]
    if missing := set(needed) - set(columns):
        raise DataError(f"data={data.data} has held-out rows without {', '.join(sorted(missing))}: name another split")
    rows = rows.select_columns([*needed, *({"__key__"} & set(columns) - set(needed))])
    for name in images:
        if isinstance(columns[name], Image):
            rows = rows.cast_column(name, Image(decode=False))
    return rows


def _shuffled(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def _name(image: Any, row: Mapping[str, Any]) -> str | None:
    path = image.get("path") if isinstance(image, dict) else image if isinstance(image, str) else None
    return path or row.get("__key__")
