"""Captioned pictures from whatever the `datasets` library loads: folders, parquet, webdataset shards, the hub."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from palme_xt.batches import DataError, Defect, Example, Source
from palme_xt.config import PalmEConfig
from palme_xt.preprocessing import ImageError, MissingImageError, Preprocessing
from palme_xt.tokenizer import Tokenizer

DIGITS = "digits"
BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
TEXT_COLUMNS = ("text", "caption", "txt")
HELD_OUT_SHARE = 0.1
HELD_OUT_OF_A_STREAM = 500
KEPT_BYTES = 2**28

MISSING, BROKEN, EMPTY, TOO_LONG = "missing image", "broken image", "empty caption", "caption longer than the model"


@dataclass(frozen=True)
class Data:
    """Which captioned pictures to learn from.

    Args:
        data: `digits`: scenes of handwritten digits, drawn on the fly. DIR: a folder of images with `metadata.jsonl` or
            `metadata.csv` (columns `file_name` and `text`), or of parquet files, or of webdataset shards. A file or a
            quoted pattern such as `'shards/*.tar'`. `hf:NAME` or `hf:NAME:CONFIG`: a data set on the hub.
        held_out: what to evaluate on: a split of the data (`validation`), a share of its rows (0.1) or a number of rows
            (500). Default: the data's own `validation` or `test`, else a share of 0.1; of a stream, the first 500 rows.
        image_column: column of the images (default: the one of image type, or `image`, `jpg`, `png` or `webp`).
        text_column: column of the captions (default: `text`, `caption` or `txt`).
        streaming: read the data as they are needed instead of preparing all of them first. Every process reads the
            whole stream, and decodes its own share.
        shuffle_buffer: rows among which a stream is shuffled; other data are shuffled as a whole.
        num_workers: processes that read ahead, for each training process; 0: none. Each keeps up to 256 MiB of decoded
            pictures in memory, unless they are streamed.
        strict: stop at the first row that cannot be learned from, instead of skipping and counting such rows.

    Raises:
        ValueError: a number out of its range.
    """

    data: str = DIGITS
    held_out: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    streaming: bool = False
    shuffle_buffer: int = 1000
    num_workers: int = 1
    strict: bool = False

    def __post_init__(self) -> None:
        for name, least in ("shuffle_buffer", 1), ("num_workers", 0):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be {least} or more")


@dataclass(frozen=True)
class Reader:
    """Rows of a data set to examples, or to what is wrong with them.

    Args:
        image_column, text_column: of the rows.
        preprocessing: of the images.
        tokenizer: of the captions.
        max_seq_len: tokens that a caption may have, BOS and EOS included.
    """

    image_column: str
    text_column: str
    preprocessing: Preprocessing
    tokenizer: Tokenizer
    max_seq_len: int

    def __call__(self, row: Mapping[str, Any], number: int) -> Example | Defect:
        """A row as an example.

        Raises:
            DataError: its caption is no text, or its image no image: the columns are not what they should be.
        """
        image, caption = row[self.image_column], row[self.text_column]
        name = _name(image, row) or f"row {number}"
        if not isinstance(caption, str | None):
            raise DataError(
                f"text_column={self.text_column} holds {type(caption).__name__}, must hold text: name another column"
            )
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
            raise DataError(
                f"image_column={self.image_column} holds {type(image).__name__}, must hold images: name another column"
            )
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
    """Rows that can be read in any order, shuffled anew in each epoch; or in their own order, without a seed.

    In shuffled order, pictures are kept once they are decoded, up to `KEPT_BYTES`.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], reader: Reader, seed: int | None = None) -> None:
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
            row = self.reader(self.rows[place], place)
            if isinstance(row, Example) and row.img.nbytes <= self._room:
                self._kept[place], self._room = row, self._room - row.img.nbytes
        return row

    def first_epoch(self, numbers: range) -> int:
        """As `Source.first_epoch`."""
        return max(0, min(len(numbers), len(self.rows) - numbers.start))

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

    def _endless(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        while True:
            epoch, read = len(self._epoch_starts) - 1, 0
            self.stream.set_epoch(epoch)
            # Not `iter(stream)`, which gives each worker of a DataLoader other rows: all read the same here, and keep
            # those of their own numbers.
            for place, row in enumerate(self.stream.iter(batch_size=1)):
                read += 1
                yield place, {name: value[0] for name, value in row.items()}
            if not read:
                raise DataError("held_out takes all rows of the stream, must leave some: give a smaller --held_out")
            self._epoch_starts.append(self._number)


def load_data(
    data: Data, config: PalmEConfig, preprocessing: Preprocessing, tokenizer: Tokenizer, *, seed: int, held_out: int
) -> tuple[Source, Rows]:
    """Rows to train on, and at most `held_out` rows to evaluate on. None is in both, if none is in the data twice.

    Raises:
        DataError: the data cannot be loaded, or have not the columns or splits that were asked for.
    """
    splits = _load(data)
    name = "train" if "train" in splits else next(iter(splits))
    if name != "train" and len(splits) > 1:
        raise DataError(f"data={data.data} has the splits {', '.join(splits)}, must have one named train, or only one")
    train = splits[name]
    own = next((split for split in ("validation", "test") if split in splits and split != name), None)
    wanted = data.held_out or own
    if wanted is not None and wanted in splits and wanted != name:
        evaluated = splits[wanted]
        if data.streaming:
            evaluated = evaluated.take(held_out)
    elif data.streaming:
        count = _held_out_rows(wanted or str(HELD_OUT_OF_A_STREAM), None, splits)
        evaluated, train = train.take(count), train.skip(count)
    else:
        count = _held_out_rows(wanted or str(HELD_OUT_SHARE), len(train), splits)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        evaluated, train = train.select(order[:count].numpy()), train.select(order[count:].sort().values.numpy())
    image, text = _columns(data, train)
    reader = Reader(image, text, preprocessing, tokenizer, config.max_seq_len)
    train, evaluated = (_undecoded(rows, image, text, data) for rows in (train, evaluated))
    rows = Rows(list(evaluated.take(held_out)) if data.streaming else evaluated, reader)
    if not len(rows):
        raise DataError(f"data={data.data} has no held-out rows: name another split or number with --held_out")
    if not data.streaming:
        return Rows(train, reader, seed), rows
    return Stream(train.shuffle(seed=seed % 2**32, buffer_size=data.shuffle_buffer), reader), rows


def _load(data: Data) -> Mapping[str, Any]:
    from datasets import load_dataset

    name = data.data
    arguments: tuple[str | None, ...]
    keywords: dict[str, Any] = {}
    if name.startswith("hf:"):
        repository, _, configuration = name[3:].partition(":")
        arguments = repository, configuration or None
    elif Path(name).is_dir():
        described = any(path.stem == "metadata" for path in Path(name).rglob("metadata.*"))
        arguments = ("imagefolder",) if described else (name,)
        keywords = {"data_dir": name} if described else {}
    else:
        files = sorted(glob.glob(name))
        builder = BUILDERS.get(Path(name).suffix)
        if not files:
            raise DataError(f"data={name} is not there: give a folder, a file, a quoted pattern, or hf:NAME of the hub")
        if builder is None:
            raise DataError(f"data={name} must end in {' or '.join(BUILDERS)}, or be a folder of images")
        arguments, keywords = (builder,), {"data_files": {"train": files}}
    loaded: Mapping[str, Any]
    try:
        loaded = load_dataset(*arguments, **keywords, streaming=data.streaming)
    except Exception as error:  # the library, and what it reads with, raise what they like
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise DataError(f"data={name} cannot be loaded: {reason}") from error
    for split, rows in loaded.items():
        if not data.streaming and not len(rows):
            raise DataError(f"data={name} has no rows in its split {split}: leave it out, or fill it")
    return loaded


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


def _columns(data: Data, rows: Any) -> tuple[str, str]:
    from datasets import Image

    features = dict(rows.features or next(iter(rows.take(1)), {}))
    pictures = [name for name, feature in features.items() if isinstance(feature, Image)]
    image = data.image_column or next((name for name in [*pictures, *IMAGE_COLUMNS] if name in features), None)
    text = data.text_column or next((name for name in TEXT_COLUMNS if name in features), None)
    for option, column in ("image_column", image), ("text_column", text):
        if column not in features:
            found = "which is not a column" if column else "no usual name is"
            raise DataError(
                f"{option}={column}, {found} of {data.data}, which has {', '.join(features)}: name one with --{option}"
            )
    return str(image), str(text)


def _undecoded(rows: Any, image_column: str, text_column: str, data: Data) -> Any:
    """Only what is needed, and images as paths or bytes: what is broken is found out as captioning finds it out."""
    from datasets import Image

    columns = list(rows.features or next(iter(rows.take(1)), {}))
    if missing := {image_column, text_column} - set(columns):
        raise DataError(f"data={data.data} has held-out rows without {', '.join(sorted(missing))}: name another split")
    rows = rows.select_columns([name for name in (image_column, text_column, "__key__") if name in columns])
    if isinstance((rows.features or {}).get(image_column), Image):
        rows = rows.cast_column(image_column, Image(decode=False))
    return rows


def _name(image: Any, row: Mapping[str, Any]) -> str | None:
    path = image.get("path") if isinstance(image, dict) else image if isinstance(image, str) else None
    return path or row.get("__key__")
