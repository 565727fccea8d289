"""Read captioned images from anything that the `datasets` library loads: folders, parquet, webdataset, the hub."""

import copy
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from palme_xt.captioner.data.batches import DataError, Defect, Example, Source, positions
from palme_xt.captioner.data.sources import SHARD_IMAGES, checked, columns_of, open_splits, reading
from palme_xt.captioner.images import ImageError, Preprocessing, image_errors
from palme_xt.captioner.options import Data
from palme_xt.captioner.tokenizer import Tokenizer
from palme_xt.captioner.turns import IMAGE, Text, Turn, written
from palme_xt.config import PalmEConfig

IMAGE_COLUMNS = ("image", *SHARD_IMAGES)
TEXT_COLUMNS = ("text", "caption", "captions", "txt")
HELD_OUT_SHARE = 0.1
HELD_OUT_OF_A_STREAM = 500
FIRST_ROWS = 1000
KEPT_BYTES = 2**28


@dataclass(frozen=True)
class Reader:
    """A callable that turns a row of a data set into an example, or returns its defect.

    Args:
        image_columns: The image is in the first of these columns that is not None.
        text_column: The caption, or a list of captions, is in this column.
        preprocessing: How images are resized and cropped.
        tokenizer: The tokenizer of the captions.
        config: The config of the model, which limits the number of tokens in a text, positions of images included.
        folder: The resolved folder of the data, which links must not leave, or None if the data are not in a folder.
    """

    image_columns: tuple[str, ...]
    text_column: str
    preprocessing: Preprocessing
    tokenizer: Tokenizer
    config: PalmEConfig
    folder: Path | None = None

    def __call__(self, row: Mapping[str, Any], number: int, turn: int = 0) -> Example | Defect:
        """Return a row as an example, or its defect.

        Args:
            row: The row.
            number: The number of the row, its name if it has no other.
            turn: Which of its captions to use, as in `Example`.

        Raises:
            DataError: If the text column does not hold text, or the image column does not hold images.
        """
        path, image = self._image(row)
        name = path or row.get("__key__") or f"row {number}"
        captions = self.captions(row)
        if not captions:
            return Defect("empty caption", f"{name} has no caption", name)
        texts, lengths = self.texts(captions)
        usable = [text for text, length in zip(texts, lengths, strict=True) if length <= self.config.max_seq_len]
        if not usable:
            shortest = min(lengths)
            detail = f"the caption of {name} has {shortest} tokens, more than max_seq_len={self.config.max_seq_len}"
            return Defect("caption longer than the model", detail, name)
        try:
            imgs = self.preprocessing.read_pixels(self._file(image, name), name)[None]
        except ImageError as error:
            return Defect(error.reason, str(error), name)
        return Example(imgs, name, captions, usable, turn)

    def texts(self, captions: Sequence[str]) -> tuple[list[Text], list[int]]:
        """Return captions as token ids, and how many positions each of them takes."""
        texts = [written([Turn(IMAGE, caption)], self.tokenizer, self.config.image_token) for caption in captions]
        return texts, [positions(text.ids, self.config) for text in texts]

    def captions(self, row: Mapping[str, Any]) -> list[str]:
        """Return those captions of a row that are not empty.

        Raises:
            DataError: If the text column does not hold text.
        """
        value = row[self.text_column]
        texts = value if isinstance(value, list) else [value]
        if others := [type(text).__name__ for text in texts if not isinstance(text, str | None)]:
            rule = "must hold a text or a list of texts: choose another column"
            raise DataError(f"text_column={self.text_column} holds {others[0]}, {rule}")
        return [text for text in texts if text and text.strip()]

    def identity(self, row: Mapping[str, Any]) -> object:
        """Return what the rows of one image have in common: the content of an embedded image, otherwise the path."""
        path, image = self._image(row)
        return sha256(image).digest() if isinstance(image, bytes) else path or object()

    def merged(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the rows of one image as one row with all their captions."""
        return {**rows[0], self.text_column: [caption for row in rows for caption in self.captions(row)]}

    def _image(self, row: Mapping[str, Any]) -> tuple[str | None, Any]:
        """Return the path of an image, if it has one, and its content, or else the path once more."""
        image = next((row[column] for column in self.image_columns if row[column] is not None), None)
        if isinstance(image, dict):
            return image.get("path"), image.get("bytes") or image.get("path")
        return image if isinstance(image, str) else None, image

    def _file(self, image: Any, name: str) -> str | bytes:
        """Return an image as a path or as the content of a file."""
        if image is None:
            raise ImageError(f"{name} has no image", "missing image")
        if not isinstance(image, str | bytes):
            columns, found = "/".join(self.image_columns), type(image).__name__
            raise DataError(f"image_column={columns} holds {found}, must hold images: choose another column")
        if isinstance(image, str) and "://" in image:
            import fsspec

            with image_errors(name), fsspec.open(image, "rb") as file:
                return bytes(file.read())
        if isinstance(image, str) and self.folder and Path(image).is_relative_to(self.folder):
            target = Path(image).resolve()
            if not target.is_relative_to(self.folder):
                raise ImageError(f"{name} is a link to {target}, must not leave {self.folder}: copy the file there")
        return image  # type: ignore[no-any-return]


class MapStyleSource(Source):
    """The rows of a `datasets.Dataset` or a list.

    With a seed, rows are reshuffled in each epoch, in which each has the next of its usable captions, and up to
    `KEPT_BYTES` of decoded images are kept in memory. Without a seed, each row has its first usable caption.
    """

    def __init__(self, rows: Any, reader: Reader, seed: int | None = None) -> None:
        self.rows, self.reader, self.seed = rows, reader, seed
        self.rows_per_epoch = len(rows)
        self._kept: dict[int, Example | Defect] = {}
        self._room = 0 if seed is None else KEPT_BYTES

    def fingerprint(self) -> str:
        """Return a digest of the number of rows and of their captions, in order."""
        column = self.reader.text_column
        digest = sha256(f"{len(self.rows)}\n".encode())
        with reading("data cannot be read"):
            captions = [row[column] for row in self.rows] if isinstance(self.rows, list) else self.rows[column][:]
        for caption in captions:
            digest.update(json.dumps(caption, default=repr).encode() + b"\n")
        return digest.hexdigest()

    def row(self, number: int) -> Example | Defect:
        """Return the row with this number, as `Source.row` does."""
        epoch, place = divmod(number, len(self.rows))
        if self.seed is not None:
            # Each pair gets its own seed: seeds of torch's generators have 64 bits, and epochs are few.
            place = int(_permutation(len(self.rows), (self.seed * 2**20 + epoch) % 2**63)[place])
        row = self._kept.get(place)
        if row is None:
            with reading(f"data cannot be read at row {place}"):
                content = self.rows[place]
            row = self.reader(content, place)
            if isinstance(row, Example) and row.imgs.nbytes <= self._room:
                self._kept[place], self._room = row, self._room - row.imgs.nbytes
        return row if isinstance(row, Defect) or self.seed is None else replace(row, turn=epoch + place)


class StreamedSource(Source):
    """The rows of a `datasets.IterableDataset`, which are shuffled within a buffer and reshuffled in each epoch.

    Args:
        stream: The rows.
        reader: The reader of the rows.
        held_out: The identities of images whose rows are left out, as `Reader.identity` returns them.
    """

    def __init__(self, stream: Any, reader: Reader, held_out: Collection[object] = ()) -> None:
        self.stream, self.reader, self.held_out = stream, reader, held_out
        self._rows: Iterator[tuple[int, int, Mapping[str, Any]]] | None = None
        self._number = 0

    def row(self, number: int) -> Example | Defect:
        """Return the row with this number, as `Source.row` does. Rows before it are read and discarded."""
        if self._rows is None:
            self._rows = self._endless()
        epoch, place, row = next(islice(self._rows, number - self._number, None))
        self._number = number + 1
        return self.reader(row, place, epoch + place)

    def _endless(self) -> Iterator[tuple[int, int, Mapping[str, Any]]]:
        # datasets 5.2 keeps the epoch in memory that reader processes share, so each process sets it in its own copy.
        stream = copy.deepcopy(self.stream)
        for epoch in count():
            stream.set_epoch(epoch)
            place = 0
            # `iter(stream)` would give each worker of a DataLoader different rows. Here, all of them read the same
            # rows, and each keeps those with its own numbers.
            for values in checked(stream.iter(batch_size=1), "data cannot be read after {} rows of the stream"):
                row = {name: value[0] for name, value in values.items()}
                if not self.held_out or self.reader.identity(row) not in self.held_out:
                    yield epoch, place, row
                    place += 1
            if not place:
                raise DataError("held_out takes all rows of the stream, must leave some: pass a smaller --held_out")
            self.rows_per_epoch = place


def load_data(
    data: Data, config: PalmEConfig, preprocessing: Preprocessing, tokenizer: Tokenizer, *, seed: int, max_held_out: int
) -> tuple[Source, MapStyleSource]:
    """Return the rows to train on, and the held-out images, each as one row with all its captions.

    No image is in both, unless it has two names or the data's own splits share it. At most `max_held_out` images are
    held out: a sample that is always the same, or the first ones of a stream.

    Raises:
        DataError: If the data cannot be loaded, do not have the requested columns or splits, or if none of the first
            rows is usable.
    """
    splits = open_splits(data.data, data.streaming)
    name = "train" if "train" in splits else next(iter(splits))
    if name != "train" and len(splits) > 1:
        raise DataError(f"data={data.data} has the splits {', '.join(splits)}, must have one named train, or only one")
    others = [split for split in splits if split != name]
    wanted = data.held_out or next((split for split in ("validation", "test") if split in others), None)
    other = wanted if wanted in others else None
    folder = Path(data.data).resolve() if Path(data.data).is_dir() else None
    reader = Reader(*_columns(data, splits[name]), preprocessing, tokenizer, config, folder)
    train, whole = (_undecoded(splits[split], reader, data) for split in (name, other or name))
    identities: Collection[object] = ()
    with reading(f"data={data.data} cannot be read"):
        if data.streaming:
            number = max_held_out if other else _held_out_count(wanted or f"{HELD_OUT_OF_A_STREAM}", None, splits)
            images = _by_image(((row, row) for row in whole.take(number)), reader, max_held_out)
            held_out, identities = [reader.merged(same) for same in images.values() if same], images.keys()
            train = train if other else train.skip(number)
        else:
            places = [*_by_image(enumerate(whole.select_columns([*reader.image_columns])), reader).values()]
            number = len(places) if other else _held_out_count(wanted or f"{HELD_OUT_SHARE}", len(places), splits)
            if number < len(places) or number > max_held_out:  # the first images may be alike
                places = [places[image] for image in _permutation(len(places)).tolist()]
            chosen = places[: min(number, max_held_out)]
            held_out = [reader.merged([whole[place] for place in same]) for same in chosen]
            train = train if other else train.select(np.sort([*chain(*places[number:])]))
    if not held_out:
        raise DataError(f"data={data.data} has no held-out rows: choose another split or number with --held_out")
    _check_usable(train, reader, data)
    if not data.streaming:
        return MapStyleSource(train, reader, seed), MapStyleSource(held_out, reader)
    train = train.shuffle(seed=seed % 2**32, buffer_size=data.shuffle_buffer)
    return StreamedSource(train, reader, () if other else identities), MapStyleSource(held_out, reader)


def _by_image(rows: Iterable[tuple[Any, Any]], reader: Reader, most: float = math.inf) -> dict[object, list[Any]]:
    """Return what comes with the rows of each image, by identity, in order; nothing for images beyond the first `most`.

    Args:
        rows: Pairs of what to return for a row, and the row.
        reader: The reader of the rows.
        most: Number of images.
    """
    images: dict[object, list[Any]] = {}
    for kept, row in rows:
        same = images.setdefault(reader.identity(row), [])
        if same or len(images) <= most:
            same.append(kept)
    return images


def _check_usable(rows: Iterable[Any], reader: Reader, data: Data) -> None:
    """Reject data of which none of the first rows is usable.

    Raises:
        DataError: If there is no such row. If captions are too long, it says how long the model's texts must be.
    """
    defects, lengths = [], list[int]()
    for number, row in enumerate(islice(checked(rows, "data cannot be read after {} rows"), FIRST_ROWS)):
        found = reader(row, number)
        if isinstance(found, Example):
            return
        defects.append(found)
        lengths += reader.texts(reader.captions(row))[1]
    if defects:
        reasons = [defect.reason for defect in defects]
        detail = max(defects, key=lambda defect: reasons.count(defect.reason)).detail
        most = int(np.quantile(lengths, 0.99, method="higher")) if lengths else 0
        remedy = f"; 99% of the captions need --max_seq_len={most}" if most > reader.config.max_seq_len else ""
        raise DataError(f"data={data.data} has no usable row among its first {len(defects)}: {detail}{remedy}")


def _held_out_count(wanted: str, images: int | None, splits: Mapping[str, Any]) -> int:
    """Return how many of the images, or of a stream's rows if `images` is None, the option `held_out` requests."""
    try:
        number = float(wanted)
    except ValueError:
        number = math.nan
    most = math.inf if images is None else images - 1
    if number >= 1 and number.is_integer() and number <= most:
        return int(number)
    if images is not None and 0 < number < 1 <= most:
        return min(images - 1, max(1, round(number * images)))
    size = "a whole number of rows" if images is None else f"a share below 1, or a number of images below {images}"
    raise DataError(f"held_out={wanted} must be {size}, or a split other than the training split ({', '.join(splits)})")


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


def _undecoded(rows: Any, reader: Reader, data: Data) -> Any:
    """Return only the needed columns, with images as paths or bytes, so that broken ones are found as in captioning."""
    from datasets import Image

    columns, needed = columns_of(rows, data.data), {*reader.image_columns, reader.text_column}
    if missing := needed - set(columns):
        raise DataError(f"data={data.data} has held-out rows without {', '.join(sorted(missing))}: use another split")
    rows = rows.select_columns([name for name in columns if name in {*needed, "__key__"}])
    for name in reader.image_columns:
        if isinstance(columns[name], Image):
            rows = rows.cast_column(name, Image(decode=False))
    return rows


@lru_cache(maxsize=1)  # all rows of an epoch use the same permutation
def _permutation(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
