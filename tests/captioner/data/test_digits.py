"""The digits: real scans, none of them both trained on and held out, and captions and answers that are right."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits

from palme_xt import tokens
from palme_xt.captioner.data.batches import Example, positions
from palme_xt.captioner.data.digits import EMPTY, NAMES, QUARTERS, Scans, Scenes, ask, compose, describe, load_scans
from palme_xt.captioner.options import DIGITS_MODEL, QUESTIONS_MODEL, Data
from palme_xt.captioner.tokenizer import ByteTokenizer
from palme_xt.captioner.turns import IMAGE
from palme_xt.config import PalmEConfig

ASKED = replace(QUESTIONS_MODEL, image_size=16, patch_size=8, bos_token=tokens.BOS, eos_token=tokens.EOS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labels(scans: Scans, pixels: torch.Tensor) -> list[int]:
    """Return the label of the nearest scan to each quarter of a scene of 16x16 pixels, as far as it is not empty."""
    found = []
    for row, column in (0, 0), (0, 8), (8, 0), (8, 8):
        scan = pixels[row : row + 8, column : column + 8]
        nearest = (scans.pixels - scan).flatten(1).norm(dim=1).argmin()
        found.append(int(scans.labels[nearest]) if scan.any() else EMPTY)
    return found


def answer(question: str, scenes: Sequence[Sequence[int]]) -> str:
    """Answer a question by looking at the digits."""
    counts = [sum(digit != EMPTY for digit in scene) for scene in scenes]
    if question.startswith("which has more digits"):
        return "neither" if counts[0] == counts[1] else "first" if counts[0] > counts[1] else "second"
    assert len(scenes) == 1 or ("the first" in question) != ("the second" in question)
    which = int("the second" in question)
    if question.startswith("how many digits are in "):
        return ("one", "two", "three")[counts[which] - 1]
    if question.startswith("what is in "):
        places = zip(QUARTERS, scenes[which], strict=True)
        return ", ".join(f"{quarter} {NAMES[digit]}" for quarter, digit in places if digit != EMPTY)
    (quarter,) = re.match(r"what is (\w+ \w+) in ", question).groups()  # type: ignore[union-attr]
    return (*NAMES, "nothing")[scenes[which][QUARTERS.index(quarter)]]


def questions(scans: Scans, config: PalmEConfig = ASKED, **how: Any) -> Scenes:
    return Scenes(scans, config, ByteTokenizer(), **{"block": 60, "seed": 0, "asked": True} | how)


def test_every_scan_is_on_exactly_one_side() -> None:
    train, held_out = load_scans()
    pixels = torch.cat([train.pixels, held_out.pixels]).flatten(1)
    assert pixels.shape == (1797, 64)
    assert len(held_out.labels) == 359
    assert len(pixels.unique(dim=0)) == 1797  # no scan occurs twice, so none is on both sides
    everything = torch.from_numpy(load_digits().images).float().flatten(1) / 16
    assert torch.equal(pixels.unique(dim=0), everything.unique(dim=0))
    again, _ = load_scans()
    assert torch.equal(again.pixels, train.pixels)


def test_the_caption_tells_what_is_where() -> None:
    scans, _ = load_scans()
    img, digits = compose(scans, 200, image_size=32, generator=seeded())
    captions = map(describe, digits.tolist())
    assert img.shape == (200, 1, 32, 32)
    assert 0 <= img.min() < img.max() <= 1
    counts = set()
    for pixels, caption in zip(img[:, 0], captions, strict=True):
        quarters = dict(zip(QUARTERS, (pixels[r : r + 16, c : c + 16] for r in (0, 16) for c in (0, 16)), strict=True))
        parts = [part.split(" ", 1) for part in caption.split(", ")]
        shown = [quarter for quarter in QUARTERS if quarters[quarter].any()]
        assert [quarter for _, quarter in parts] == shown  # in reading order
        assert all(name in NAMES for name, _ in parts)
        counts.add(len(parts))
    assert counts == {1, 2, 3}


def test_the_name_is_the_scan_s_label() -> None:
    _, scans = load_scans()
    img, digits = compose(scans, 50, image_size=16, generator=seeded())  # 8x8 quarters: the scans themselves
    for pixels, row in zip(img[:, 0], digits.tolist(), strict=True):
        seen = labels(scans, pixels)
        assert seen == row
        assert describe(row) == ", ".join(f"{NAMES[seen[n]]} {QUARTERS[n]}" for n in range(4) if seen[n] != EMPTY)


def test_the_generator_decides_everything() -> None:
    scans, _ = load_scans()
    first, second, other = (compose(scans, 5, image_size=32, jitter=0.1, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[1], other[1])


def test_jitter_moves_the_digits() -> None:
    scans, _ = load_scans()
    still, moved = (compose(scans, 5, image_size=32, jitter=jitter, generator=seeded()) for jitter in (0.0, 0.1))
    assert torch.equal(still[1], moved[1])
    assert not torch.equal(still[0], moved[0])


@pytest.mark.parametrize(("image_size", "channels"), [(33, 1), (64, 3), (8, 4)])
def test_scenes_of_any_size_and_channels(image_size: int, channels: int) -> None:
    scans, _ = load_scans()
    img, _ = compose(scans, 3, image_size=image_size, channels=channels, generator=seeded())
    assert img.shape == (3, channels, image_size, image_size)
    assert torch.equal(img[:, 0], img[:, -1])


@pytest.mark.parametrize("text", ["", "six top left", "Größe: 3 €", "日本語"])
def test_bytes_there_and_back(text: str) -> None:
    ids = tokens.encode([text, "a longer text than the other"])
    assert ids[0, 0] == tokens.BOS
    assert ids.max() < tokens.NUM_TOKENS
    assert tokens.decode(ids[0].tolist()) == text


def test_padding_is_ignored_and_rubbish_is_readable() -> None:
    ids = tokens.encode(["ab", "abcd"], ignore_index=-7)
    assert ids.tolist() == [[256, 97, 98, 257, -7, -7], [256, 97, 98, 99, 100, 257]]
    assert tokens.decode([97, 256, 300, -1, 255, 98, 257, 99]) == "a\ufffdb"


@pytest.mark.parametrize("count", [1, 2])
def test_answers_are_right(count: int) -> None:
    scans, _ = load_scans()
    _, digits = compose(scans, 400, image_size=8, generator=seeded())
    draw, kinds, changed = random.Random(0), set(), 0
    for start in range(0, 400, count):
        scenes = digits[start : start + count].tolist()
        turn = ask(scenes, draw)
        assert turn.question.count(IMAGE) == count
        assert turn.answer == answer(turn.question, scenes)
        kinds.add((" ".join(turn.question.split(" ")[: 3 if "what is in" in turn.question else 1]), turn.answer))
        changed += "digits" in turn.question and answer(turn.question, scenes[::-1]) != turn.answer
    assert {answer for kind, answer in kinds if kind == "what"} == {*NAMES, "nothing"}
    assert len({answer for kind, answer in kinds if kind == "what is in"}) > 20
    assert {answer for kind, answer in kinds if kind == "how"} == {"one", "two", "three"}
    assert {answer for kind, answer in kinds if kind == "which"} == (
        {"first", "second", "neither"} if count == 2 else set()
    )
    assert changed > 10 if count == 2 else changed == 0  # the order of the scenes matters


def shown(row: Any) -> list[str]:
    """Return the question and the answer of a row."""
    special = {tokens.BOS: "", tokens.EOS: "", ASKED.image_token: IMAGE}
    return "".join(special.get(token, chr(token)) for token in row.text.ids).splitlines()


@pytest.mark.parametrize("held_out", [False, True])
def test_questions_are_about_the_images_in_their_order(held_out: bool) -> None:
    train_scans, held_out_scans = load_scans()
    scans, others = (held_out_scans, train_scans) if held_out else (train_scans, held_out_scans)
    source, sizes = questions(scans), []
    for row in map(source.row, range(80)):  # more than a block
        scenes = [labels(scans, img[0]) for img in row.imgs]
        question, said = shown(row)
        assert said == answer(question, scenes)
        assert [said] == row.answers
        sizes.append(len(scenes))
        quarters = row.imgs[:, 0].unfold(1, 8, 8).unfold(2, 8, 8).reshape(-1, 1, 64)
        found = quarters[quarters.any(dim=-1)[:, 0]] - scans.pixels.flatten(1)
        assert (found.abs().amax(dim=-1).amin(dim=-1) < 1e-6).all()
        found = quarters[quarters.any(dim=-1)[:, 0]] - others.pixels.flatten(1)
        assert (found.abs().amax(dim=-1).amin(dim=-1) > 1e-3).all()  # no scan of the other side
    assert {*sizes} == {1, 2}


def test_a_row_depends_only_on_seed_block_and_number() -> None:
    scans, _ = load_scans()
    rows = questions(scans).read(range(130))
    for number, alone in ((3, questions(scans)), (129, questions(scans))):
        row, again = rows[number], alone.row(number)
        assert isinstance(row, Example)
        assert torch.equal(again.imgs, row.imgs)
        assert (again.text, again.answers, again.name) == (row.text, row.answers, row.name)
    for other in questions(scans, seed=1), questions(scans, block=61):
        assert [row.text for row in map(other.row, range(100, 110))] != [
            row.text for row in map(questions(scans).row, range(100, 110))
        ]


def test_lessons_begin_with_the_easy_questions() -> None:
    scans, _ = load_scans()
    source = questions(scans, block=20, lessons=(2, 4))
    asked = [[shown(row)[0] for row in source.read(range(start, start + 40))] for start in (0, 40, 80)]
    assert {*asked[0]} == {f"what is in {IMAGE}?"}
    assert {question.count(IMAGE) for question in asked[1]} == {1}
    assert len({*asked[1]}) > 3
    assert {question.count(IMAGE) for question in asked[2]} == {1, 2}


@pytest.mark.parametrize("asked", [False, True])
def test_the_longest_text_fits(asked: bool) -> None:
    scans, _ = load_scans()
    model = ASKED if asked else replace(DIGITS_MODEL, bos_token=tokens.BOS, eos_token=tokens.EOS)
    name = "longest question" if asked else "longest caption"
    with pytest.raises(ValueError, match=rf"^max_seq_len=20 must be at least (\d+) for the {name}$") as error:
        questions(scans, replace(model, max_seq_len=20), asked=asked)
    (least,) = map(int, re.findall(r"least (\d+)", str(error.value)))
    source = questions(scans, replace(model, max_seq_len=least), asked=asked, block=1000)
    longest = max(positions(row.text.ids, model) for row in source.read(range(1000)) if isinstance(row, Example))
    assert least - 10 < longest <= least


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "riddles"}, "task=riddles must be captions or questions"),
        ({"data": "cats", "task": "questions"}, "task=questions has no effect with data=cats, only with digits: .*"),
        ({"task": "questions", "strict": True}, "strict=True has no effect with data=digits.*"),
    ],
)
def test_tasks_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Data(**options)
