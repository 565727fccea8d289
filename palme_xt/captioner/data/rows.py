"""Read images with captions or questions from all that `datasets` loads: folders, parquet, webdataset, the hub."""

import contextlib
import copy
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from itertools import chain, count, groupby, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from palme_xt.captioner.data.batches import DataError, Defect, Example, Source, positions
from palme_xt.captioner.data.sources import SHARD_IMAGES, checked, columns_of, open_splits, reading
from palme_xt.captioner.images import ImageError, Preprocessing, image_errors
from palme_xt.captioner.options import Data
from palme_xt.captioner.tokenizer import Tokenizer
from palme_xt.captioner.turns import IMAGE, Text, Turn, with_images, written
from palme_xt.config import PalmEConfig

IMAGE_COLUMNS = ("image", "images", *SHARD_IMAGES)
MESSAGES = "messages"
TEXT_COLUMNS = ("text", "caption", "captions", "txt", MESSAGES)
HELD_OUT_SHARE = 0.1
HELD_OUT_OF_A_STREAM = 500
FIRST_ROWS = 1000
KEPT_BYTES = 2**28


@dataclass(frozen=True)
class Reader:
    """A callable that turns a row of a data set into an example, or returns its defect.

    Args:
        image_columns: The image, or a list of images, is in the first of these columns that is not None.
        text_columns: The caption, or a list of captions, is in the one column; or a question and its answer, or a list
            of right answers, are in two; or a conversation is in `messages`.
        preprocessing: How images are resized and cropped.
        tokenizer: The tokenizer of the texts.
        config: The config of the model, which limits the number of tokens in a text, positions of images included.
        folder: The resolved folder of the data, which links must not leave, or None if the data are not in a folder.
    """

    image_columns: tuple[str, ...]
    text_columns: tuple[str, ...]
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
            DataError: If a text column does not hold text, or the image column does not hold images.
        """
        images, conversations = self.images(row), self.conversations(row)
        name = next((path for path, _ in images if path), None) or row.get("__key__") or f"row {number}"
        answer, whole = ("answer", "conversation") if self.asks else ("caption", "caption")
        if not conversations:
            return Defect(f"empty {answer}", f"{name} has no {answer}", name)
        try:
            texts, lengths = self.texts(conversations, len(images))
        except ValueError as error:
            return Defect("unmatched image", f"{name}: {error}", name)
        usable = [text for text, length in zip(texts, lengths, strict=True) if length <= self.config.max_seq_len]
        if not usable:
            shortest = min(lengths)
            detail = f"the {whole} of {name} has {shortest} tokens, more than max_seq_len={self.config.max_seq_len}"
            return Defect(f"{whole} longer than the model", detail, name)
        none = torch.empty(0, self.preprocessing.channels, *[self.preprocessing.image_size] * 2, dtype=torch.uint8)
        try:
            imgs = [self.preprocessing.read_pixels(self._file(image, name), name)[None] for _, image in images]
        except ImageError as error:
            return Defect(error.reason, str(error), name)
        return Example(torch.cat([none, *imgs]), name, [turns[-1].answer for turns in conversations], usable, turn)

    @property
    def asks(self) -> bool:
        """Whether rows have questions. Otherwise, they have captions."""
        return len(self.text_columns) > 1 or self.text_columns == (MESSAGES,)

    def texts(self, conversations: Iterable[Sequence[Turn]], images: int) -> tuple[list[Text], list[int]]:
        """Return conversations about a number of images as token ids, and how many positions each of them takes.

        Raises:
            ValueError: If questions have `<image>`, but not as many as there are images.
        """
        texts = list[Text]()
        for turns in conversations:
            questions = with_images([turn.question for turn in turns], images)
            turns = [*map(Turn, questions, (turn.answer for turn in turns))]
            texts.append(written(turns, self.tokenizer, self.config.image_token))
        return texts, [positions(text.ids, self.config) for text in texts]

    def conversations(self, row: Mapping[str, Any]) -> list[list[Turn]]:
        """Return the turns of a row, once for each caption, or each answer to the question, that is not empty.

        Raises:
            DataError: If a text column does not hold text, or messages.
        """
        *asked, learned = self.text_columns
        if learned == MESSAGES:
            with reading(f"{MESSAGES} must hold a list of messages with role and content"):
                turns = _turns(row[MESSAGES] or [])
            return [turns] if turns and all(turn.answer.strip() for turn in turns) else []
        question = "\n".join(text for name in asked for text in self.column(row, name))
        return [[Turn(question, answer)] for answer in self.column(row, learned)]

    def column(self, row: Mapping[str, Any], name: str) -> list[str]:
        """Return those texts of a row, in the column of that name, that are not empty.

        Raises:
            DataError: If the column does not hold text.
        """
        value = row[name]
        texts = value if isinstance(value, list) else [value]
        if others := [type(text).__name__ for text in texts if not isinstance(text, str | None)]:
            rule = "must hold a text or a list of texts: choose another column"
            option = "question" if name != self.text_columns[-1] else "answer" if self.asks else "text"
            raise DataError(f"{option}_column={name} holds {others[0]}, {rule}")
        return [text for text in texts if text and text.strip()]

    def identity(self, row: Mapping[str, Any]) -> tuple[object, ...]:
        """Return what tells the images of a row from others: the content of an embedded one, otherwise the path."""
        found = self.images(row) or [(None, None)]
        return tuple(sha256(each).digest() if isinstance(each, bytes) else path or object() for path, each in found)

    def merged(self, rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Return the rows of the same images: as one row with all their captions, or each question as it is."""
        name = self.text_columns[-1]
        return rows if self.asks else [{**rows[0], name: [text for row in rows for text in self.column(row, name)]}]

    def images(self, row: Mapping[str, Any]) -> list[tuple[str | None, Any]]:
        """Return the path of each image, if it has one, and its content, or else the path once more."""
        without: list[Any] = [] if self.asks else [None]  # a caption needs an image
        found = next((row[column] for column in self.image_columns if row[column] not in (None, [])), without)
        return [*map(_path_and_content, found if isinstance(found, list) else [found])]

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


def _path_and_content(image: Any) -> tuple[str | None, Any]:
    if isinstance(image, dict):
        return image.get("path"), image.get("bytes") or image.get("path")
    return image if isinstance(image, str) else None, image


def _turns(messages: Any) -> list[Turn]:
    """Return messages as turns, whose questions are what comes before the messages of the assistant."""
    groups = [(False, "")]
    for answered, group in groupby(messages, key=lambda message: message["role"] == "assistant"):
        groups.append((answered, "\n".join(_plain(message["content"]) for message in group)))
    return [Turn(question, answer) for (_, question), (answered, answer) in pairwise(groups) if answered]


def _plain(content: Any) -> str:
    """Return the text of a message, a string or a list of parts, with `<image>` for each image."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    return "".join(IMAGE if part["type"] == "image" else part.get("text") or "" for part in parts)


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
        """Return a digest of the number of rows and of their texts, in order."""
        digest, rows = sha256(f"{len(self.rows)}\n".encode()), self.rows
        for column in self.reader.text_columns:
            with reading("data cannot be read"):
                texts = [row[column] for row in rows] if isinstance(rows, list) else rows[column][:]
            for text in texts:
                digest.update(json.dumps(text, default=repr).encode() + b"\n")
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

    def __init__(self, stream: Any, reader: Reader, held_out: Set[object] = frozenset()) -> None:
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
                if not (self.held_out and {*self.reader.identity(row)} & self.held_out):
                    yield epoch, place, row
                    place += 1
            if not place:
                raise DataError("held_out takes all rows of the stream, must leave some: pass a smaller --held_out")
            self.rows_per_epoch = place


def load_data(
    data: Data, config: PalmEConfig, preprocessing: Preprocessing, tokenizer: Tokenizer, *, seed: int, max_held_out: int
) -> tuple[Source, MapStyleSource]:
    """Return the rows to train on, and the held-out ones: each image with all its captions, or each question.

    Rows that share an image, directly or through others, are held out together. No image is in both, unless it has two
    names or the data's own splits share it. At most `max_held_out` images are held out, or groups of rows that share
    some: a sample that is always the same, or the first ones of a stream.

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
    identities = set[object]()
    with reading(f"data={data.data} cannot be read"):
        if data.streaming:
            number = max_held_out if other else _held_out_count(wanted or f"{HELD_OUT_OF_A_STREAM}", None, splits)
            images = _by_image(((row, row) for row in whole.take(number)), reader, max_held_out)
            identities = {*chain(*images)}
            held_out = [row for same in images.values() if same for row in reader.merged(same)]
            train = train if other else train.skip(number)
        else:
            places = _together(_by_image(enumerate(whole.select_columns([*reader.image_columns])), reader))
            number = len(places) if other else _held_out_count(wanted or f"{HELD_OUT_SHARE}", len(places), splits)
            if number < len(places) or number > max_held_out:  # the first images may be alike
                places = [places[image] for image in _permutation(len(places)).tolist()]
            chosen = places[: min(number, max_held_out)]
            held_out = [row for same in chain(*chosen) for row in reader.merged([whole[place] for place in same])]
            train = train if other else train.select(np.sort([*chain(*chain(*places[number:]))]))
    if not held_out:
        raise DataError(f"data={data.data} has no held-out rows: choose another split or number with --held_out")
    _check_usable(train, reader, data)
    if not data.streaming:
        return MapStyleSource(train, reader, seed), MapStyleSource(held_out, reader)
    train = train.shuffle(seed=seed % 2**32, buffer_size=data.shuffle_buffer)
    return StreamedSource(train, reader, frozenset() if other else identities), MapStyleSource(held_out, reader)


def _by_image(rows: Iterable[tuple[Any, Any]], reader: Reader, most: float = math.inf) -> dict[Any, list[Any]]:
    """Return what comes with the rows of the same images, by identity, in order; nothing beyond the first `most`.

    Args:
        rows: Pairs of what to return for a row, and the row.
        reader: The reader of the rows.
        most: Number of identities.
    """
    images: dict[Any, list[Any]] = {}
    for kept, row in rows:
        same = images.setdefault(reader.identity(row), [])
        if same or len(images) <= most:
            same.append(kept)
    return images


def _together(images: Mapping[Sequence[object], list[int]]) -> list[list[list[int]]]:
    """Return groups of rows that share an image, directly or through others: the places of the same images, in lists.

    Args:
        images: The places of rows, by the identities of their images.
    """
    first: dict[object, object] = {}

    def root(image: object) -> object:
        while (before := first.get(image, image)) != image:
            image = before
        return image

    for one, *others in images:
        for other in others:
            first[root(other)] = root(one)
    together: dict[object, list[list[int]]] = {}
    for (one, *_), places in images.items():
        together.setdefault(root(one), []).append(places)
    return [*together.values()]


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
        with contextlib.suppress(ValueError):
            lengths += reader.texts(reader.conversations(row), len(reader.images(row)))[1]
    if defects:
        reasons = [defect.reason for defect in defects]
        detail = max(defects, key=lambda defect: reasons.count(defect.reason)).detail
        whole = "conversations" if reader.asks else "captions"
        most = int(np.quantile(lengths, 0.99, method="higher")) if lengths else 0
        remedy = f"; 99% of the {whole} need --max_seq_len={most}" if most > reader.config.max_seq_len else ""
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
    rule = f"must be {size}, or a split other than the training split ({', '.join(splits)})"
    raise DataError(f"held_out={wanted} {rule}{'; all rows share images' if images == 1 else ''}")


def _columns(data: Data, rows: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the image columns and the text columns, as in `Reader`."""
    from datasets import Image

    features = columns_of(rows, data.data)
    typed = [name for name, feature in features.items() if isinstance(getattr(feature, "feature", feature), Image)]
    usual = [name for name in IMAGE_COLUMNS if name in (typed or features)]
    images = [data.image_column] if data.image_column else usual or typed or [""]
    if len(images) > 1 and not usual:
        raise DataError(f"data={data.data} has the image columns {', '.join(typed)}: choose one with --image_column")
    texts = {"text_column": data.text_column or next((name for name in TEXT_COLUMNS if name in features), "")}
    pair = {"question_column": data.question_column or "question", "answer_column": data.answer_column or "answer"}
    if data.question_column or data.answer_column or (not texts["text_column"] and {*pair.values()} <= {*features}):
        texts = pair
    for option, column in {"image_column": images[0], **texts}.items():
        if column not in features:
            raise DataError(f"{option}={column!r} must be a column ({', '.join(features)}): choose one with --{option}")
    # Rows of webdataset shards need not all have the same kind of image.
    return tuple(images if "__key__" in features else images[:1]), tuple(texts.values())


def _undecoded(rows: Any, reader: Reader, data: Data) -> Any:
    """Return only the needed columns, with images as paths or bytes, so that broken ones are found as in captioning."""
    from datasets import Image, List

    columns, needed = columns_of(rows, data.data), {*reader.image_columns, *reader.text_columns}
    if missing := needed - set(columns):
        raise DataError(f"data={data.data} has held-out rows without {', '.join(sorted(missing))}: use another split")
    rows = rows.select_columns([name for name in columns if name in {*needed, "__key__"}])
    for name in reader.image_columns:
        if isinstance(getattr(kind := columns[name], "feature", kind), Image):
            rows = rows.cast_column(name, Image(decode=False) if isinstance(kind, Image) else List(Image(decode=False)))
    return rows


@lru_cache(maxsize=1)  # all rows of an epoch use the same permutation
def _permutation(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
