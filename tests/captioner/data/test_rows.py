"""The user's own images: every format, every defect, and each row exactly once, however reading is divided."""

from __future__ import annotations

import csv
import io
import json
import re
import tarfile
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, Features, Image, IterableDataset, Value, load_dataset

from palme_xt import PalmEConfig, tokens
from palme_xt.captioner.data.batches import Batch, DataError, Example, Share, Source, load_batches
from palme_xt.captioner.data.rows import load_data
from palme_xt.captioner.images import Preprocessing
from palme_xt.captioner.options import Data
from palme_xt.captioner.tokenizer import ByteTokenizer
from tests.captioner.captioned import content, picture, spoil, write_folder, write_rows

CONFIG = PalmEConfig(16, 8, 16, 2, 4, 258, 80, 16, 2, 4)
COUNT = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "pictures", COUNT)


def load(data: Data, *, seed: int = 0, held_out: int = 100) -> tuple[Source, Source, int]:
    source, rows = load_data(
        data, CONFIG, Preprocessing.like_clip(CONFIG), ByteTokenizer(), seed=seed, max_held_out=held_out
    )
    return source, rows, len(rows.rows)


def captions(source: Source, numbers: range) -> list[str]:
    return [tokens.decode(row.text.ids[1:]) if isinstance(row, Example) else row.reason for row in source.read(numbers)]


def captions_of(batch: Batch) -> list[str]:
    return [tokens.decode(ids[1:]) for ids in batch.text[: len(batch.names)].tolist()]


def everything() -> list[str]:
    return sorted(picture(number)[1] for number in range(COUNT))


def as_csv(folder: Path, to: Path) -> str:
    to.mkdir()
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        (to / row["file_name"]).write_bytes((folder / row["file_name"]).read_bytes())
    with open(to / "metadata.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "text"])
        writer.writeheader()
        writer.writerows(rows)
    return str(to)


def as_parquet(folder: Path, to: Path) -> str:
    to.mkdir()
    images = [{"bytes": content(number), "path": f"{number}.png"} for number in range(COUNT)]
    texts = [picture(number)[1] for number in range(COUNT)]
    for part in range(3):
        table = pa.table({"image": images[part::3], "caption": texts[part::3]})
        pa.parquet.write_table(table, to / f"part-{part}.parquet")
    return f"{to}/part-*.parquet"


def write_shard(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def as_webdataset(folder: Path, to: Path) -> str:
    to.mkdir()
    for part in range(2):
        numbers = range(part, COUNT, 2)
        pairs = [((f"{n}.png", content(n)), (f"{n}.txt", picture(n)[1].encode())) for n in numbers]
        write_shard(to / f"{part}.tar", [member for pair in pairs for member in pair])
    return f"{to}/*.tar"


def as_saved(folder: Path, to: Path) -> str:
    load_dataset("imagefolder", data_dir=str(folder))["train"].save_to_disk(to)
    return str(to)


def as_saved_splits(folder: Path, to: Path) -> str:
    load_dataset("imagefolder", data_dir=str(folder)).save_to_disk(to)
    return str(to)


SAVES = [as_saved, as_saved_splits]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("write", [lambda folder, to: str(folder), as_csv, as_parquet, as_webdataset, *SAVES])
def test_every_format_gives_every_row_once(write: Any, streaming: bool, folder: Path, tmp_path: Path) -> None:
    data = Data(write(folder, tmp_path / "other"), held_out="6", streaming=streaming)
    source, held_out, count = load(data)
    evaluated = captions(held_out, range(count))
    assert len(evaluated) == 6
    trained = captions(source, range(COUNT - 6))
    assert sorted(trained + evaluated) == everything()
    assert trained != sorted(trained)  # shuffled
    again = captions(source, range(COUNT - 6, 2 * (COUNT - 6)))
    assert sorted(again) == sorted(trained)
    assert again != trained  # reshuffled in each epoch
    assert captions(load(data)[0], range(COUNT - 6)) == trained
    assert captions(load(data, seed=1)[0], range(COUNT - 6)) != trained
    assert captions(load(data, seed=1)[1], range(count)) == evaluated


def test_pixels_are_those_of_the_file(folder: Path) -> None:
    source, _, _ = load(Data(str(folder), held_out="6"))
    preprocessing = Preprocessing.like_clip(CONFIG)
    for row in source.read(range(5)):
        assert isinstance(row, Example)
        (caption,) = row.answers
        number = int(caption.rpartition(" ")[2])
        assert torch.equal(row.imgs[0], preprocessing.pixels(picture(number)[0]))
        assert not torch.equal(row.imgs[0], preprocessing.pixels(picture(number + 3)[0]))
        assert row.text.ids == ByteTokenizer().encode(caption)
        assert row.name.endswith(f"{number:03}.png")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("processes", "count", "workers"), [(1, 1, 0), (2, 1, 0), (2, 2, 1), (3, 2, 2)])
def test_processes_and_workers_share_the_rows_without_overlap_or_loss(
    streaming: bool, processes: int, count: int, workers: int, folder: Path
) -> None:
    data = Data(str(folder), held_out="6", streaming=streaming, shuffle_buffer=10)
    steps, batch_size = 4, 12  # two epochs
    alone = captions(load(data)[0], range(steps * batch_size))
    assert len(set(alone[:24])) == 24
    parts: dict[int, list[str]] = {step: [] for step in range(steps)}
    for process in range(processes):
        share = Share(batch_size, count, process, processes)
        batches = load_batches(load(data)[0], range(steps * count), share, CONFIG, workers)
        for index, batch in enumerate(batches):
            assert len(captions_of(batch)) == batch_size // processes // count
            parts[index // count] += captions_of(batch)
    assert [parts[step] for step in range(steps)] == [
        alone[step * batch_size : (step + 1) * batch_size] for step in range(steps)
    ]


def test_another_reader_of_a_stream_does_not_change_its_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Data(str(folder), held_out="6", streaming=True, shuffle_buffer=10)
    (source, *_), (other, *_), (later, *_) = (load(data) for _ in range(3))
    expected = captions(source, range(24))
    open_rows = IterableDataset.iter

    def open_after_another_reader(stream: IterableDataset, batch_size: int) -> Any:
        other.stream.set_epoch(7)  # type: ignore[attr-defined]
        return open_rows(stream, batch_size)

    monkeypatch.setattr(IterableDataset, "iter", open_after_another_reader)
    assert captions(other, range(24)) == expected
    assert captions(later, range(24, 48)) != expected  # each epoch has its own order


@pytest.mark.parametrize("streaming", [False, True])
def test_reading_goes_on_where_it_was(streaming: bool, folder: Path) -> None:
    data = Data(str(folder), held_out="6", streaming=streaming, shuffle_buffer=5)
    share = Share(8)

    def read(first: int, workers: int) -> list[Batch]:
        return list(load_batches(load(data)[0], range(first, 7), share, CONFIG, workers))

    whole, rest = read(0, 0), read(4, 1)
    assert len(rest) == 3
    for batch, same in zip(whole[4:], rest, strict=True):
        assert captions_of(batch) == captions_of(same)
        assert torch.equal(batch.img, same.img)
        assert torch.equal(batch.text, same.text)
    assert captions_of(whole[0]) != captions_of(rest[0])
    assert [batch.rows for batch in whole] == [8, 8, 8, 0, 0, 0, 0]  # rows of the second epoch are not new


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_that_cannot_be_learned_from_are_left_out_and_counted(streaming: bool, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pictures", COUNT)
    wrong = spoil(folder)
    held_out = write_folder(tmp_path / "more", 5)
    for split, files in ("train", folder), ("validation", held_out):
        files.rename(tmp_path / split)
    source, rows, count = load(Data(str(tmp_path), streaming=streaming, shuffle_buffer=7))
    assert count == 5
    assert len(captions(rows, range(5))) == 5
    batches = list(load_batches(source, range(8), Share(10), CONFIG, 0))
    found: dict[str, int] = {}
    for batch in batches[:3]:
        assert batch.rows == 10
        assert batch.new_defects == len(batch.defects) == 10 - len(captions_of(batch))
        assert batch.img.shape == (len(captions_of(batch)), 3, 16, 16)
        for defect in batch.defects:
            found[defect.reason] = found.get(defect.reason, 0) + 1
    assert found == wrong
    assert sum(len(batch.defects) for batch in batches[3:6]) == 5
    assert [batch.new_defects for batch in batches[3:]] == [0] * 5
    details = sorted(defect.detail.rpartition("/")[2] for batch in batches[:3] for defect in batch.defects)
    assert details[0] == "000.png cannot be read: No such file or directory"
    assert details[2:] == [
        "002.png is not an image that Pillow can read",
        "003.png has no caption",
        "004.png has 128 tokens, more than max_seq_len=80",
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_other_columns_are_not_decoded(streaming: bool, tmp_path: Path) -> None:
    images = [{"bytes": content(number), "path": f"{number}.png"} for number in range(5)]
    masks = [{"bytes": b"no picture", "path": "mask.png"}] * 5
    features = Features({"image": Image(), "mask": Image(), "text": Value("string")})
    rows = {"image": images, "mask": masks, "text": [picture(number)[1] for number in range(5)]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "x.parquet")
    data = Data(str(tmp_path / "x.parquet"), held_out="1", image_column="image", streaming=streaming)
    source, _, _ = load(data)
    assert sorted(captions(source, range(4)))[0].startswith("blue")


def test_a_batch_without_a_usable_row_counts_for_nothing(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pictures", 8)
    source, _, _ = load(Data(str(folder), held_out="2"))
    for path in folder.glob("*.png"):
        path.unlink()
    (batch,) = load_batches(source, range(1), Share(4), CONFIG, 0)
    assert batch.targets == 0
    assert captions_of(batch) == []
    assert batch.references == []
    assert batch.img.shape == (1, 3, 16, 16)
    assert batch.text.shape == (1, 2)
    assert len(batch.defects) == 4


def test_data_without_a_usable_row_are_refused_before_training(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pictures", 20)
    texts = [f"{'long ' * 20}{'x' * number}" for number in range(20)]
    write_rows(folder, [{"file_name": f"{number:03}.png", "text": text} for number, text in enumerate(texts)])
    for streaming in False, True:
        with pytest.raises(DataError) as error:
            load(Data(str(folder), held_out="2", streaming=streaming))
        message = (
            r"data=\S+ has no usable row among its first 18: the caption of \S+ has \d+ tokens, more than max_seq_len"
        )
        needed = re.fullmatch(rf"{message}=80; 99% of the captions need --max_seq_len=(\d+)", str(error.value))
        assert needed is not None, error.value
        longest = int(needed[1])
        assert longest == max(len(ByteTokenizer().encode(row)) for row in (texts[2:] if streaming else texts))
    write_rows(folder, [{"file_name": f"{number:03}.png", "text": "short"} for number in range(20)])
    for path in folder.glob("*.png"):
        path.write_text("no image")
    with pytest.raises(DataError, match=r"no usable row among its first 18: \S+ is not an image that Pillow can read$"):
        load(Data(str(folder), held_out="2"))
    (folder / "019.png").write_bytes(content(19))
    (folder / "001.png").write_bytes(content(1))
    assert len(captions(load(Data(str(folder), held_out="1"))[0], range(19))) == 19  # one usable row is enough


def test_targets_are_those_that_the_loss_is_a_mean_of(folder: Path) -> None:
    source, _, _ = load(Data(str(folder)))
    batch = next(iter(load_batches(source, range(1), Share(6), CONFIG, 0)))
    assert batch.targets == int((batch.text[:, 1:] != CONFIG.ignore_index).sum())
    assert len({len(caption) for caption in captions_of(batch)}) > 1


def test_held_out_rows(folder: Path) -> None:
    shares = {None: 3, "0.5": 15, "7": 7, "0.001": 1}
    for held_out, expected in shares.items():
        source, rows, count = load(Data(str(folder), held_out=held_out))
        assert count == expected
        trained = captions(source, range(COUNT - count))
        assert sorted(trained + captions(rows, range(count))) == everything()


def test_columns_can_be_named(tmp_path: Path) -> None:
    images = [content(number) for number in range(9)]  # bytes without an image type
    texts = [picture(number)[1] for number in range(9)]
    table = pa.table({"photo": images, "alt": texts, "text": texts[::-1], "size": list(range(9))})
    pa.parquet.write_table(table, tmp_path / "x.parquet")
    data = Data(str(tmp_path / "x.parquet"), held_out="1", image_column="photo", text_column="alt")
    source, _, _ = load(data)
    rows = source.read(range(8))
    preprocessing = Preprocessing.like_clip(CONFIG)
    for row in rows:
        assert isinstance(row, Example)
        assert torch.equal(row.imgs[0], preprocessing.pixels(picture(int(row.answers[0].rpartition(" ")[2]))[0]))
    for column, message in (
        ("size", "image_column=size holds int, must hold images: choose another column"),
        ("alt", "no usable row among its first 8: .* cannot be read: No such file or directory"),
    ):
        with pytest.raises(DataError, match=message):
            load(Data(data.data, held_out="1", image_column=column, text_column="alt"))
    with pytest.raises(
        DataError, match="text_column=size holds int, must hold a text or a list of texts: choose another column"
    ):
        load(Data(data.data, held_out="1", image_column="photo", text_column="size"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"data": "{folder}/none"},
            r"data='\S+/none' does not exist: pass a folder, a file, a quoted pattern, or hf:NAME",
        ),
        ({"data": "{folder}/000.png"}, r"data=\S+/000.png must end in .parquet or .tar, or be a folder of images"),
        ({"data": ""}, r"data='' does not exist: pass a folder, a file, a quoted pattern, or hf:NAME on the hub"),
        ({"data": "hf:"}, "data=hf: must name a data set: pass hf:NAME or hf:NAME:CONFIG"),
        ({"data": "hf::small"}, "data=hf::small must name a data set: pass hf:NAME or hf:NAME:CONFIG"),
        (
            {"image_column": "photo"},
            r"image_column='photo' must be a column \(image, text\): choose one with --image_column$",
        ),
        (
            {"text_column": "alt"},
            r"text_column='alt' must be a column \(image, text\): choose one with --text_column$",
        ),
        ({"held_out": "half"}, r"held_out=half must be .*, or a split other than the training split \(train\)$"),
        ({"held_out": "30"}, "held_out=30 must be a share below 1, or a number of images below 30, or a split"),
        ({"held_out": "0"}, "held_out=0 must be a share below 1, or a number of images below 30, or a split"),
        ({"held_out": "-3"}, "held_out=-3 must be a share below 1, or a number of images below 30, or a split"),
        ({"held_out": "2.5"}, "held_out=2.5 must be a share below 1, or a number of images below 30, or a split"),
        ({"held_out": "nan"}, "held_out=nan must be a share below 1, or a number of images below 30, or a split"),
        ({"held_out": "train"}, "held_out=train must be .*, or a split other than the training split"),
        ({"held_out": "0.5", "streaming": True}, "held_out=0.5 must be a whole number of rows, or a split"),
        ({"held_out": "inf", "streaming": True}, "held_out=inf must be a whole number of rows, or a split"),
    ],
)
def test_data_that_cannot_be_used(options: dict[str, Any], message: str, folder: Path) -> None:
    data = options.pop("data", "{folder}").format(folder=folder)
    with pytest.raises(DataError, match=message):
        load(Data(data, **options))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("name", "arguments"), [("hf:me/x", ("me/x", None)), ("hf:me/x:small", ("me/x", "small"))])
def test_names_of_the_hub(
    name: str, arguments: tuple[str, str | None], streaming: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = load_dataset("imagefolder", data_dir=str(folder), streaming=streaming)
    asked: list[Any] = []

    def stand_in(*given: Any, **keywords: Any) -> Any:
        asked.append((given, keywords))
        return found

    monkeypatch.setattr("datasets.load_dataset", stand_in)
    source, _, _ = load(Data(name, held_out="6", streaming=streaming))
    assert asked == [((), {"path": arguments[0], "name": arguments[1], "streaming": streaming})]
    assert len(set(captions(source, range(24)))) == 24


def test_what_the_hub_does_not_have() -> None:
    with pytest.raises(DataError, match=r"data=hf:palme-xt/none cannot be loaded: .+"):
        load(Data("hf:palme-xt/none"))


def test_folders_that_hold_no_captions(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"data=\S+empty cannot be loaded: .*"):
        load(Data(str(tmp_path / "empty")))
    folder = write_folder(tmp_path / "pictures", 4)
    (folder / "metadata.jsonl").write_text('{"file_name": "000.png", "text": "x"}\n{"file_name": ')
    with pytest.raises(DataError, match=r"data=\S+pictures cannot be loaded: .*"):
        load(Data(str(folder)))
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.json").write_text("[]")  # `datasets` ignores this file
    for streaming in False, True:
        message = r"data=\S+pictures must have captions: add a metadata.jsonl with .*, or a text file for each image$"
        with pytest.raises(DataError, match=message):
            load(Data(str(folder), streaming=streaming))


NAMES = ["train.png", "test-tube.png", "val.png", "train/0.png", "test/a/1.png", "[2] x.png"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_names_of_images_are_no_splits(suffix: str, streaming: bool, tmp_path: Path) -> None:
    folder = tmp_path / "pictures [all]"
    rows = {"file_name": NAMES, "text": [picture(number)[1] for number in range(len(NAMES))]}
    for number, name in enumerate(NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content(number))
    getattr(Dataset.from_dict(rows), {"jsonl": "to_json"}.get(suffix, f"to_{suffix}"))(folder / f"metadata.{suffix}")
    source, held_out, _ = load(Data(str(folder), held_out="1", streaming=streaming))
    found = captions(source, range(len(NAMES) - 1)) + captions(held_out, range(1))
    assert sorted(found) == sorted(rows["text"])


@pytest.mark.parametrize("streaming", [False, True])
def test_files_named_metadata_make_no_image_folder(streaming: bool, folder: Path, tmp_path: Path) -> None:
    as_parquet(folder, tmp_path / "parquet")
    (tmp_path / "parquet" / "metadata.json").write_text("{}")
    source, held_out, _ = load(Data(str(tmp_path / "parquet"), held_out="6", streaming=streaming))
    assert sorted(captions(source, range(COUNT - 6)) + captions(held_out, range(6))) == everything()


@pytest.mark.parametrize("streaming", [False, True])
def test_files_are_found_by_name_before_pattern_and_in_sub_folders(
    streaming: bool, folder: Path, tmp_path: Path
) -> None:
    as_webdataset(folder, tmp_path / "a")
    (tmp_path / "a" / "1.tar").rename(tmp_path / "x[1].tar")
    (tmp_path / "a" / "b").mkdir()
    (tmp_path / "a" / "0.tar").rename(tmp_path / "a" / "b" / "x1.tar")
    for name, first in ("x[1].tar", 1), ("**/x1.tar", 0):
        source, held_out, _ = load(Data(f"{tmp_path}/{name}", held_out="1", streaming=streaming))
        found = captions(source, range(14)) + captions(held_out, range(1))
        assert sorted(found) == sorted(picture(number)[1] for number in range(first, COUNT, 2))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize("kinds", [["png", "jpg"] * 5, ["png"] * 7 + ["jpg"] * 3])
def test_shards_may_mix_kinds_of_images(kinds: list[str], as_folder: bool, streaming: bool, tmp_path: Path) -> None:
    members = []
    for number, kind in enumerate(kinds):
        members += [(f"{number}.{kind}", content(number)), (f"{number}.txt", picture(number)[1].encode())]
    write_shard(tmp_path / "x.tar", members)
    data = Data(str(tmp_path if as_folder else tmp_path / "x.tar"), held_out="1", streaming=streaming)
    source, held_out, _ = load(data)
    found = captions(source, range(9)) + captions(held_out, range(1))
    assert sorted(found) == sorted(picture(number)[1] for number in range(10))


def test_one_of_several_image_columns(tmp_path: Path) -> None:
    columns = {"mask": [5, 6, 7], "photo": [8, 9, 10], "png": [0, 1, 2]}
    images = {name: [{"bytes": content(n), "path": None} for n in numbers] for name, numbers in columns.items()}
    texts = [picture(number)[1] for number in range(3)]
    for names in ["mask", "photo"], list(columns):
        features = Features({name: Image() for name in names} | {"text": Value("string")})
        rows = {name: images[name] for name in names} | {"text": texts}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{len(names)}.parquet")
    with pytest.raises(DataError, match=r"data=\S+ has the image columns mask, photo: choose one with --image_column"):
        load(Data(str(tmp_path / "2.parquet"), held_out="1"))
    (row,) = load(Data(str(tmp_path / "3.parquet"), held_out="1"))[0].read(range(1))
    assert isinstance(row, Example)
    number = texts.index(row.answers[0])
    assert torch.equal(row.imgs[0], Preprocessing.like_clip(CONFIG).pixels(picture(number)[0]))


LISTS = [[f"{name} {way}" for way in ("one", "two", "three")] for name in ("cat", "dog", "emu", "fox")]


def write_lists(path: Path, lists: list[Any], images: list[bytes] | None = None) -> str:
    images = images or [content(number) for number in range(len(lists))]
    Dataset.from_dict({"image": images, "caption": lists}).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_each_epoch_draws_a_caption_of_a_list(streaming: bool, tmp_path: Path) -> None:
    data = Data(write_lists(tmp_path / "x.parquet", LISTS), held_out="1", streaming=streaming)
    source, rows, _ = load(data)
    (held_out,) = rows.read(range(1))
    assert isinstance(held_out, Example)
    assert held_out.answers in LISTS
    assert tokens.decode(held_out.text.ids[1:]) == held_out.answers[0]
    drawn = [captions(source, range(3 * epoch, 3 * epoch + 3)) for epoch in range(12)]
    assert {caption for epoch in drawn for caption in epoch} == {*chain(*LISTS)} - {*held_out.answers}
    for epoch in drawn:
        assert len({caption.split()[0] for caption in epoch}) == 3  # one caption of each image
    if not streaming:
        by_name = [sorted(epoch) for epoch in drawn]
        assert by_name[0] != by_name[1] != by_name[2]
        assert sorted(by_name[0] + by_name[1] + by_name[2]) == sorted({caption for epoch in drawn for caption in epoch})
    again = load(data)[0]
    assert [captions(again, range(3 * epoch, 3 * epoch + 3)) for epoch in range(5, 12)] == drawn[5:]
    (batch,) = load_batches(load(data)[0], range(1), Share(3), CONFIG, 0)
    assert all(caption in every for caption, every in zip(captions_of(batch), batch.references, strict=True))
    assert [len(every) for every in batch.references] == [3, 3, 3]


def test_captions_of_a_list_that_cannot_be_learned(tmp_path: Path) -> None:
    lists = [["", "a", None], ["long " * 30, "b"], ["  "], [], ["long " * 30], None]
    source, _, _ = load(Data(write_lists(tmp_path / "x.parquet", [*lists, *[["c"]] * 9]), held_out="1"))
    found = captions(source, range(28))
    assert set(found) == {"a", "b", "c", "empty caption", "caption longer than the model"}
    assert found.count("empty caption") == 6
    Dataset.from_dict({"image": [*map(content, range(3))], "text": [[1, 2]] * 3}).to_parquet(tmp_path / "y.parquet")
    for streaming in False, True:
        message = r"text_column=text holds int, must hold a text or a list of texts: choose another column$"
        with pytest.raises(DataError, match=message):
            load(Data(str(tmp_path / "y.parquet"), held_out="1", streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("embedded", [False, True])
def test_images_are_held_out_with_all_their_rows(embedded: bool, streaming: bool, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pictures", 12)
    # As in COCO and Flickr: several rows for each image, not next to each other.
    rows = [(number, f"{number} {way}") for way in ("a", "b", "c", "d", "e") for number in range(12)]
    write_rows(folder, [{"file_name": f"{number:03}.png", "text": text} for number, text in rows])
    data = str(folder)
    if embedded:
        data = write_lists(tmp_path / "x.parquet", [text for _, text in rows], [content(number) for number, _ in rows])
    source, held_out, count = load(Data(data, held_out="4", streaming=streaming))
    assert count == 4
    evaluated = held_out.read(range(4))
    references = {}
    for row in evaluated:
        assert isinstance(row, Example)
        (number,) = {int(caption.split()[0]) for caption in row.answers}
        assert torch.equal(row.imgs[0], Preprocessing.like_clip(CONFIG).pixels(picture(number)[0]))
        references[number] = row.answers
    assert len(references) == 4
    if not streaming:  # of a stream, only the first rows are known
        assert references == {number: [f"{number} {way}" for way in "abcde"] for number in references}
    assert source.rows_per_epoch == (torch.inf if streaming else 40)
    trained = captions(source, range(40))
    assert len(set(trained)) == 40
    assert {int(caption.split()[0]) for caption in trained} == set(range(12)) - set(references)
    assert set(captions(source, range(40, 80))) == set(trained)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_own_split_is_evaluated_by_image(streaming: bool, tmp_path: Path) -> None:
    for split, count in ("train", 6), ("validation", 5):
        write_folder(tmp_path / split, count)
    rows = [{"file_name": f"{number:03}.png", "text": f"{number} {way}"} for number in range(5) for way in "ab"]
    write_rows(tmp_path / "validation", rows)
    _, held_out, count = load(Data(str(tmp_path), streaming=streaming))
    assert count == 5
    found = [row.answers for row in held_out.read(range(5)) if isinstance(row, Example)]
    assert found == [[f"{number} a", f"{number} b"] for number in range(5)]


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_an_image_are_not_one_image(streaming: bool, tmp_path: Path) -> None:
    images = [{"bytes": content(n), "path": None} if n < 6 else None for n in range(10)]
    features = Features({"image": Image(), "text": Value("string")})
    texts = [picture(number)[1] for number in range(10)]
    Dataset.from_dict({"image": images, "text": texts}, features=features).to_parquet(tmp_path / "x.parquet")
    source, held_out, count = load(Data(str(tmp_path / "x.parquet"), held_out="2", streaming=streaming))
    found = captions(source, range(8)) + captions(held_out, range(count))
    assert sorted(found) == sorted([*texts[:6], *["missing image"] * 4])


@pytest.mark.parametrize("streaming", [False, True])
def test_captions_may_be_in_text_files(streaming: bool, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    for number in range(9):
        place = folder / ("more" if number % 2 else ".")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"test-{number}.png").write_bytes(content(number))
        (place / f"test-{number}.txt").write_bytes(
            b"\xef\xbb\xbf" * (number == 3) + f"{picture(number)[1]} ü\n".encode()
        )
    (folder / "none.jpg").write_bytes(content(20))
    (folder / "notes.txt").write_text("no caption")
    source, held_out, count = load(Data(str(folder), held_out="1", streaming=streaming))
    found = captions(source, range(9)) + captions(held_out, range(count))
    assert sorted(found) == sorted([*(f"{picture(number)[1]} ü" for number in range(9)), "empty caption"])

    for split in "validation", "train":
        (tmp_path / "splits" / split).mkdir(parents=True)
        for number in range(2):
            (tmp_path / "splits" / split / f"{number}.png").write_bytes(content(number))
            (tmp_path / "splits" / split / f"{number}.txt").write_text(f"{split} {number}")
    source, held_out, count = load(Data(str(tmp_path / "splits"), streaming=streaming))
    assert captions(held_out, range(count)) == ["validation 0", "validation 1"]
    assert sorted(captions(source, range(2))) == ["train 0", "train 1"]
    (tmp_path / "splits" / "train" / "1.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"data=\S+splits cannot be loaded: UnicodeDecodeError: "):
        load(Data(str(tmp_path / "splits"), streaming=streaming))


@pytest.mark.parametrize("text", ["", "\n"])
def test_an_empty_list_of_captions(text: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pictures", 3)
    (folder / "metadata.jsonl").write_text(text)
    for streaming in False, True:
        with pytest.raises(DataError, match=r"^\S+metadata.jsonl is empty, must hold a line for each image: write one"):
            load(Data(str(folder), streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_links_must_not_leave_the_folder(streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "pictures", 8)
    (tmp_path / "private.png").write_bytes(content(30))
    (folder / "001.png").unlink()
    (folder / "001.png").symlink_to(tmp_path / "private.png")
    (folder / "002.png").unlink()
    (folder / "002.png").symlink_to(folder / "003.png")  # stays within
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    for name in str(folder), "pictures", "link":
        source, held_out, count = load(Data(name, held_out="1", streaming=streaming))
        rows = source.read(range(7)) + held_out.read(range(count))
        (defect,) = (row for row in rows if not isinstance(row, Example))
        assert defect.reason == "unusable image"
        assert re.fullmatch(
            rf"\S+001.png is a link to {tmp_path}/private.png, must not leave {folder}: copy the file there",
            defect.detail,
        )


def damaged(kind: str, folder: Path) -> str:
    """Data whose first rows are intact and whose last rows are not."""
    members = []
    for number in range(20):
        text = b"\xff" if kind == "text" and number == 19 else picture(number)[1].encode()
        members += [(f"{number:02}.png", content(number)), (f"{number:02}.txt", text)]
    if kind == "parquet":
        table = pa.table({"image": [content(n) for n in range(20)], "text": [picture(n)[1] for n in range(20)]})
        pa.parquet.write_table(table, folder / "x.parquet", row_group_size=2, use_dictionary=False)
        place = pyarrow.parquet.read_metadata(folder / "x.parquet").row_group(9).column(0).data_page_offset
        with open(folder / "x.parquet", "r+b") as file:
            file.seek(place)
            file.write(b"\xff" * 60)
        return str(folder / "x.parquet")
    write_shard(folder / "x.tar", members)
    if kind == "tar":
        (folder / "x.tar").write_bytes((folder / "x.tar").read_bytes()[:-14000])
    return str(folder / "x.tar")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("kind", "cause"), [("text", "UnicodeDecodeError"), ("tar", "ReadError"), ("parquet", "OSError")]
)
def test_streams_that_break_off(kind: str, cause: str, workers: int, tmp_path: Path) -> None:
    data = Data(damaged(kind, tmp_path), held_out="1", streaming=True, shuffle_buffer=2)
    source, _, _ = load(data)
    with pytest.raises(DataError, match=rf"data cannot be read after \d+ rows of the stream: {cause}: .+") as error:
        list(load_batches(source, range(9), Share(4), CONFIG, workers))
    assert "\n" not in str(error.value)
    assert (error.value.__cause__ is None) == bool(workers)
    with pytest.raises(DataError, match=rf"data=\S+ cannot be read: {cause}: .+"):
        load(Data(data.data, held_out="20", streaming=True))
    with pytest.raises(DataError, match=rf"data=\S+ cannot be loaded: {cause}: .+"):
        load(Data(data.data, held_out="1"))


def test_errors_of_our_own_are_no_data_errors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("a mistake")

    sources = [load(Data(str(folder), held_out="6", streaming=streaming))[0] for streaming in (False, True)]
    monkeypatch.setattr("palme_xt.captioner.data.rows.Reader.__call__", fail)
    for source in sources:
        with pytest.raises(KeyError, match="a mistake"):
            source.read(range(1))
    with pytest.raises(KeyError, match="a mistake"):
        load(Data(str(folder), held_out="6"))


def test_rows_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _, _ = load(Data(str(folder), held_out="6"))

    def fail(*_: Any) -> None:
        raise OSError("the disk\nis gone")

    monkeypatch.setattr(Dataset, "__getitem__", fail)
    with pytest.raises(DataError, match=r"data cannot be read at row \d+: OSError: the disk$"):
        source.read(range(1))


def test_the_sample_of_a_split_is_seeded(folder: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "train", 5)
    write_folder(tmp_path / "validation", COUNT)
    _, rows, count = load(Data(str(tmp_path)), held_out=8)
    assert count == 8
    sample = captions(rows, range(8))
    assert len(set(sample)) == 8
    assert set(sample) <= set(everything())
    assert set(sample) != {picture(number)[1] for number in range(8)}
    assert captions(load(Data(str(tmp_path)), seed=1, held_out=8)[1], range(8)) == sample
    _, rows, count = load(Data(str(tmp_path)), held_out=COUNT)
    assert captions(rows, range(count)) == [picture(number)[1] for number in range(COUNT)]
    _, rows, count = load(Data(str(tmp_path), streaming=True), held_out=8)
    assert captions(rows, range(count)) == [picture(number)[1] for number in range(8)]


@pytest.mark.parametrize("streaming", [False, True])
def test_fingerprints_are_those_of_the_captions(streaming: bool, tmp_path: Path) -> None:
    def prints(texts: list[str | None]) -> tuple[str, str]:
        images = [content(0) + bytes([number % 256, number // 256]) for number in range(len(texts))]  # all different
        table = pa.table({"image": images, "text": pa.array(texts, pa.string())})
        pa.parquet.write_table(table, tmp_path / "x.parquet")
        source, rows, _ = load(Data(str(tmp_path / "x.parquet"), held_out="3", streaming=streaming))
        return source.fingerprint(), rows.fingerprint()

    texts: list[str | None] = [f"caption {number}" for number in range(1200)]
    found = prints(texts)
    assert found == prints(texts)
    assert all(len(print_) == 64 for print_ in found[streaming:])
    assert (found[0] == "") == streaming
    others: list[list[str | None]] = [[*texts, "more"], texts[:-1], [*texts[:-1], "other"], [None, *texts[1:]]]
    others += [["None", *texts[1:]], texts[1::-1] + texts[2:], [f"{texts[0]}{texts[1]}", "", *texts[2:]]]
    seen = {found, *map(prints, others)}
    # The held-out rows of a stream are its first rows, the only ones that are known.
    assert len(seen) == (5 if streaming else 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": "5"}, "held_out=5 has no effect with data=digits, whose scenes are composed: leave it out"),
        ({"image_column": "x"}, "image_column=x has no effect with data=digits, whose .*"),
        ({"text_column": "x"}, "text_column=x has no effect with data=digits, whose .*"),
        ({"streaming": True}, "streaming=True has no effect with data=digits, whose .*"),
        ({"strict": True}, "strict=True has no effect with data=digits, whose .*"),
        ({"fit": "pad"}, "fit=pad has no effect with data=digits, whose .*"),
        ({"shuffle_buffer": "x"}, "shuffle_buffer='x' must be of type int"),
        ({"num_workers": True}, "num_workers=True must be of type int"),
        ({"num_workers": 1.0}, "num_workers=1.0 must be of type int"),
        ({"data": None}, "data=None must be of type str"),
        ({"data": "x", "held_out": 5}, r"held_out=5 must be of type str \| None"),
        ({"data": "x", "strict": 1}, "strict=1 must be of type bool"),
        ({"data": "x", "streaming": "true"}, "streaming='true' must be of type bool"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Data(**options)
    assert Data(num_workers=0, shuffle_buffer=9).data == "digits"


def test_rows_are_selected_by_arrays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A list of as many numbers takes `datasets` 20 seconds for a million rows.
    select, selected = Dataset.select, []

    def remember(rows: Dataset, indices: Any, **how: Any) -> Any:
        selected.append(indices)
        return select(rows, indices, **how)

    monkeypatch.setattr(Dataset, "select", remember)
    load(Data(str(folder), held_out="6"))
    assert [len(indices) for indices in selected] == [COUNT - 6]
    assert all(isinstance(indices, np.ndarray) for indices in selected)
