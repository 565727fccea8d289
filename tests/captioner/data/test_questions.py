"""Rows of questions with answers, of conversations, and of several images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Image, List

from palme_xt import PalmEConfig
from palme_xt.captioner.data.batches import Batch, DataError, Defect, Example, Source, load_batches
from palme_xt.captioner.data.rows import load_data
from palme_xt.captioner.images import Preprocessing
from palme_xt.captioner.options import Data
from palme_xt.captioner.tokenizer import ByteTokenizer
from palme_xt.captioner.turns import Text, Turn, question_ids, question_text, written
from tests.captioner.captioned import content, picture

IMAGE_TOKEN = 258
CONFIG = PalmEConfig(16, 8, 16, 2, 4, 259, 80, 16, 2, 4, image_token=IMAGE_TOKEN)
CROSS = replace(CONFIG, image_token=None, cross_attend=True)
TOKENIZER = ByteTokenizer()


def load(rows: Sequence[dict[str, Any]], to: Path, config: PalmEConfig = CONFIG, **options: Any) -> list[Source]:
    """Return the sources of rows, whose images are numbers of pictures. By default, one group of rows is held out."""
    several = any(isinstance(row["image"], list) for row in rows)
    data = Dataset.from_list([row | {"image": embedded(row["image"])} for row in rows])
    data.cast_column("image", List(Image()) if several else Image()).save_to_disk(to / "rows")
    named = Data(str(to / "rows"), **{"held_out": "1"} | options)
    return [*load_data(named, config, preprocessing(), TOKENIZER, **HOW)]


HOW: dict[str, int] = {"seed": 0, "max_held_out": 100}


def preprocessing() -> Preprocessing:
    return Preprocessing.like_clip(CONFIG)


def embedded(number: Any) -> Any:
    if isinstance(number, list):
        return [embedded(each) for each in number]
    return None if number is None else {"bytes": content(number), "path": f"{number}.png"}


def pixels(*numbers: int) -> torch.Tensor:
    return torch.stack([preprocessing().pixels(picture(number)[0]) for number in numbers])


def read(sources: Sequence[Source], count: int) -> list[Example | Defect]:
    """Return the first epoch of `count` rows, and all held-out rows, in the order of their names and texts."""
    train, held_out = sources
    rows = train.read(range(count - int(held_out.rows_per_epoch))) + held_out.read(range(int(held_out.rows_per_epoch)))
    return sorted(rows, key=lambda row: (row.name, str(getattr(row, "answers", ""))))


def read_text(text: Text) -> tuple[str, str]:
    """Return a text, with `#` for images, `^` for BOS and `$` for EOS, and what is learned of it."""
    signs = {IMAGE_TOKEN: "#", TOKENIZER.bos: "^", TOKENIZER.eos: "$"}
    letters = [signs.get(token) or chr(token) for token in text.ids]
    return "".join(letters), "".join(
        letter if learned else "." for letter, learned in zip(letters, text.learned, strict=True)
    )


def test_questions_are_read_and_answers_are_learned(tmp_path: Path) -> None:
    rows = [{"image": number, "question": f"what {number}?", "answer": f"is {number}"} for number in range(4)]
    for number, row in enumerate(read(load(rows, tmp_path), 4)):
        assert isinstance(row, Example)
        assert read_text(row.text) == (f"^#what {number}?\nis {number}$", f"..........is {number}$")
        assert row.answers == [f"is {number}"]
        assert row.prompt.tolist() == row.text.ids[: -len(f"is {number}$")]
        assert torch.equal(row.imgs, pixels(number))
        assert not torch.equal(row.imgs, pixels(number + 1))


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    rows = [{"image": number, "text": "a caption", "ask": "what?", "say": "this"} for number in range(3)]
    (tmp_path / "captions").mkdir()
    for row in read(load(rows, tmp_path / "captions"), 3):  # captions, if there are any, are what is learned
        assert isinstance(row, Example)
        assert read_text(row.text)[0] == "^#a caption$"
    for row in read(load(rows, tmp_path, question_column="ask", answer_column="say"), 3):
        assert isinstance(row, Example)
        assert read_text(row.text)[0] == "^#what?\nthis$"
    with pytest.raises(
        DataError, match=r"^question_column='question' must be a column .*: choose one with --question_"
    ):
        load(rows, tmp_path, answer_column="say")
    with pytest.raises(
        DataError, match=r"^answer_column='never' must be a column \(.*\): choose one with --answer_col"
    ):
        load(rows, tmp_path, question_column="ask", answer_column="never")
    with pytest.raises(ValueError, match=r"^text_column=text has no effect on data with questions: leave it out$"):
        Data("x", text_column="text", answer_column="say")


def test_any_of_several_answers_is_right(tmp_path: Path) -> None:
    rows = [{"image": number, "question": "what?", "answer": ["one", "", "two"]} for number in range(3)]
    train, held_out = load(rows, tmp_path)
    (row,) = held_out.read(range(1))
    assert isinstance(row, Example)
    assert row.answers == ["one", "two"]
    learned = [read_text(row.text)[0] for row in train.read(range(4)) if isinstance(row, Example)]
    assert sorted({*learned}) == ["^#what?\none$", "^#what?\ntwo$"]


def said(role: str, *parts: str | None) -> dict[str, Any]:
    kinds = [{"type": "image", "text": None} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": kinds}


def test_messages_are_turns(tmp_path: Path) -> None:
    conversations = [
        [said("user", None, "one? "), said("assistant", "yes"), said("user", "two? ", None), said("assistant", "no")],
        [said("system", "be kind"), said("user", "both?"), said("assistant", "both"), said("user", "and?")],
    ]
    rows = [{"image": [number, number + 1], "messages": conversations[number // 2]} for number in (0, 2)]
    first, second = read(load(rows, tmp_path), 2)
    assert isinstance(first, Example)
    assert isinstance(second, Example)
    assert read_text(first.text) == ("^#one? \nyes$two? #\nno$", "........yes$.......no$")
    assert read_text(second.text) == ("^##be kind\nboth?\nboth$", "." * 17 + "both$")
    assert torch.equal(first.imgs, pixels(0, 1))
    assert not torch.equal(first.imgs, pixels(1, 0))
    assert first.answers == ["no"]
    assert first.prompt.tolist() == first.text.ids[: -len("no$")]


def test_messages_may_be_strings(tmp_path: Path) -> None:
    messages: Any = [{"role": "user", "content": "<image> or <image>?"}, {"role": "assistant", "content": "the first"}]
    rows: list[dict[str, Any]] = [{"image": [number, 9], "messages": messages} for number in range(2)]
    rows.append({"image": [8, 8], "messages": [messages[1], *messages]})  # begins with the assistant
    *_, third = read(load(rows, tmp_path), 3)
    assert isinstance(third, Example)
    assert read_text(third.text)[0] == "^the first$# or #?\nthe first$"


@pytest.mark.parametrize("question", ["what?", "<image>", "a <image><image>b <image>?", "<image>?"])
def test_the_last_question_is_read_back(question: str) -> None:
    def prompt(image_token: int | None) -> list[int]:
        before = written([Turn("<image> first?", "yes")], TOKENIZER, image_token).ids
        return before + question_ids(question, TOKENIZER, image_token)

    assert question_text(prompt(258), TOKENIZER, 258) == question
    assert question_text(prompt(None), TOKENIZER, None) == question.replace("<image>", "")


def test_without_an_image_token_questions_are_their_text(tmp_path: Path) -> None:
    rows = [{"image": [number, 5 + number], "question": "<image>or <image>?", "answer": "yes"} for number in range(2)]
    for row in read(load(rows, tmp_path, CROSS), 2):
        assert isinstance(row, Example)
        assert read_text(row.text) == ("^or ?\nyes$", "......yes$")
        assert len(row.imgs) == 2


def test_defects_of_questions(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"image": [0, 1], "question": "<image>?", "answer": "yes"},
        {"image": [2], "question": "?", "answer": " "},
        {"image": [3], "question": "?", "answer": "much too long " * 9},
        {"image": [4], "question": "?", "answer": "yes"},
        {"image": [], "question": "?", "answer": "no"},
        {"image": [6], "question": "?", "answer": "yes"},
    ]
    found = {row.name: row for row in read(load(rows, tmp_path), 6)}
    assert [type(found[f"{number}.png"]) for number in (4, 6)] == [Example, Example]
    unmatched, empty, long = (found[f"{number}.png"] for number in (0, 2, 3))
    markers = "the questions have 1 <image>, must have one for each of the 2 images, or none"
    assert unmatched == Defect("unmatched image", f"0.png: {markers}", "0.png")
    assert empty == Defect("empty answer", "2.png has no answer", "2.png")
    detail = "the conversation of 3.png has 134 tokens, more than max_seq_len=80"
    assert long == Defect("conversation longer than the model", detail, "3.png")
    (without,) = (row for name, row in found.items() if name.startswith("row "))
    assert isinstance(without, Example)
    assert (tuple(without.imgs.shape), without.imgs.dtype) == ((0, 3, 16, 16), torch.uint8)
    assert read_text(without.text)[0] == "^?\nno$"


def test_too_long_conversations_say_how_long_texts_must_be(tmp_path: Path) -> None:
    rows = [{"image": number, "question": "?", "answer": "much too long " * 9} for number in range(3)]
    message = (
        r"no usable row .*: the conversation of \d.png has 134 tokens.*; 99% of the conversations need --max_seq_len"
    )
    with pytest.raises(DataError, match=rf"{message}=134$"):
        load(rows, tmp_path)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("question", 3, r"question_column=question holds int, must hold a text or a list of texts"),
        ("answer", 3, r"answer_column=answer holds int, must hold a text or a list of texts"),
        (
            "messages",
            [{"from": "human", "value": "?"}],
            r"messages must hold a list of messages with role and content: ",
        ),
        ("messages", "hello", r"messages must hold a list of messages with role and content: TypeError"),
    ],
)
def test_columns_of_other_types_are_errors(column: str, value: Any, message: str, tmp_path: Path) -> None:
    texts = {"messages": value} if column == "messages" else {"question": "?", "answer": "!", column: value}
    rows = [{"image": number, **texts, "other": 1} for number in range(3)]
    with pytest.raises(DataError, match=message):
        load(rows, tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_questions_about_one_image_are_held_out_together(streaming: bool, tmp_path: Path) -> None:
    images = [[number // 3, 10 + number // 6] for number in range(24)]  # six questions share an image, in two pairs
    rows: list[dict[str, Any]] = [{"image": image, "question": "?", "answer": f"{n}"} for n, image in enumerate(images)]
    number = "6" if streaming else "1"
    train, held_out = load(rows, tmp_path, streaming=streaming, held_out=number)
    evaluated = held_out.read(range(int(held_out.rows_per_epoch)))
    trained = train.read(range(18))
    answers = [[int(row.answers[0]) for row in part if isinstance(row, Example)] for part in (evaluated, trained)]
    assert len({answer // 6 for answer in answers[0]}) == 1
    assert len(answers[0]) == 6  # each question stays a row
    assert sorted(answers[0] + answers[1]) == [*range(24)]
    apart = [{"image": [n, 30 + n], "question": "?", "answer": f"{n}"} for n in range(24)]
    if not streaming:
        with pytest.raises(DataError, match=r"^held_out=1 must be .* \(train\); all rows share images$"):
            load([row | {"image": [99, *row["image"]]} for row in rows], tmp_path)
    (tmp_path / "apart").mkdir()
    assert load(apart, tmp_path / "apart", streaming=streaming, held_out=number)[1].rows_per_epoch == int(number)


def test_captions_of_several_images(tmp_path: Path) -> None:
    rows = [{"image": images, "text": f"{n}"} for n, images in enumerate([[0, 1], [1], [0, 1], [4], []])]
    sources = load(rows, tmp_path, held_out="1")
    found = {row.name: row for row in sources[0].read(range(5))} | {row.name: row for row in sources[1].read(range(2))}
    assert {row.reason for row in found.values() if isinstance(row, Defect)} <= {"missing image"}
    for row in found.values():
        if isinstance(row, Example):
            images = {"0": [0, 1], "1": [1], "2": [0, 1], "3": [4]}[row.answers[0]]
            assert read_text(row.text)[0] == f"^{'#' * len(images)}{row.answers[0]}$"
            assert torch.equal(row.imgs, pixels(*images))


@pytest.mark.parametrize("chat", [False, True])
def test_a_folder_may_have_questions_about_several_files(chat: bool, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    for number in (0, 2):
        for each in (number, number + 1):
            (tmp_path / f"{each}.png").write_bytes(content(each))
        names, question, answer = [f"{number}.png", f"{number + 1}.png"], "<image>or <image>?", f"{number}"
        turn = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        texts = {"messages": turn} if chat else {"question": question, "answer": answer}
        lines.append({"images_file_names": names} | texts)
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for source in load_data(Data(str(tmp_path), held_out="1"), CONFIG, preprocessing(), TOKENIZER, **HOW):
        row = example(source, 0)
        number = int(row.answers[0])
        assert torch.equal(row.imgs, pixels(number, number + 1))
        assert read_text(row.text)[0] == f"^#or #?\n{number}$"


class Rows(Source):
    """Rows of two, none and one image, each with a question."""

    rows_per_epoch = 3

    def __init__(self, question: str = "what?", config: PalmEConfig = CONFIG) -> None:
        self.question, self.config = question, config

    def row(self, number: int) -> Example:
        images = [2, 0, 1][number % 3]
        turns = [Turn("<image>" * images + self.question, "one"), Turn("and?", "two" * images)]
        text = written(turns, TOKENIZER, self.config.image_token)
        img = torch.rand(images, 3, 16, 16, generator=torch.Generator().manual_seed(number))
        return Example(img, f"{number}", [turns[-1].answer], [text])


def example(source: Source, number: int) -> Example:
    row = source.row(number)
    assert isinstance(row, Example)
    return row


def batch(source: Source, config: PalmEConfig = CONFIG) -> Batch:
    (found,) = load_batches(source, range(1), lambda _: range(3), config, 0)
    return found


def test_batches_have_rows_of_any_number_of_images() -> None:
    found = batch(Rows())
    rows = [Rows().row(number) for number in range(3)]
    assert found.counts == [2, 0, 1]
    assert torch.equal(found.img, torch.cat([row.imgs for row in rows]))
    assert found.targets == sum(sum(row.text.learned) for row in rows) == int(found.target_mask.sum())
    for row, text, mask, prompt in zip(rows, found.text, found.target_mask, found.prompts, strict=True):
        count = len(row.text.ids)
        assert text.tolist() == row.text.ids + [CONFIG.ignore_index] * (len(text) - count)
        assert mask.tolist() == row.text.learned + [False] * (len(text) - count)
        assert torch.equal(prompt, row.prompt)
    assert found.references == [["twotwo"], [""], ["two"]]


@pytest.mark.parametrize("config", [CONFIG, CROSS])
def test_targets_are_those_of_the_answers_alone(config: PalmEConfig) -> None:
    one, other = (batch(Rows(question, config), config) for question in ("what?", "where"))
    assert not torch.equal(one.text, other.text)
    assert torch.equal(one.target_mask, other.target_mask)
    assert torch.equal(one.text[one.target_mask], other.text[other.target_mask])
    assert TOKENIZER.decode(one.text[0][one.target_mask[0]].tolist()) == "one"
    expected = [*b"one", TOKENIZER.eos, *b"twotwo", TOKENIZER.eos]
    assert one.text[0][one.target_mask[0]].tolist() == expected
