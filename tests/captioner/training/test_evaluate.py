"""Held-out images are evaluated against all of their captions, and looked at before training."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from sacrebleu.metrics.chrf import CHRF
from tokenizers import Tokenizer, models, normalizers

from palme_xt.captioner.training import evaluate as module
from palme_xt.captioner.training.checkpoint import Progress
from palme_xt.captioner.training.evaluate import Evaluation
from palme_xt.captioner.training.loop import Outcome
from palme_xt.captioner.training.run import EVALUATION
from palme_xt.cli import main
from palme_xt.cli.train import _print_outcome
from tests.captioner.captioned import TINY, write_folder
from tests.test_cli import fails

REFERENCES = [["a red cat", "the cat"], ["a dog"], ["two green birds", "birds", "a pair of birds"]]


def scores(*predicted: str, references: list[list[str]] = REFERENCES) -> dict[str, float]:
    return Evaluation(3, 0.5, references, list(predicted), {}).scores


def test_any_caption_of_an_image_is_right() -> None:
    for said in "a red cat", "the cat":
        assert scores(said, "a dog", "birds") == {
            "held_out_exact_match": 1.0,
            "held_out_chrf": pytest.approx(100),
            "held_out_loss": 0.5,
        }
    found = scores("the cats", "a dog", "a dog")  # the last is the caption of another image
    assert found["held_out_exact_match"] == pytest.approx(1 / 3)
    assert 20 < found["held_out_chrf"] < 90
    assert scores("the cat", "a dog", "birds")["held_out_chrf"] > found["held_out_chrf"]
    assert scores("", "", "") == {"held_out_exact_match": 0.0, "held_out_chrf": 0.0, "held_out_loss": 0.5}


def test_chrf_is_that_of_sacrebleu() -> None:
    predicted = ["a red hat", "the dog", "three birds"]
    each = [
        max(CHRF().sentence_score(said, [reference]).score for reference in true)
        for said, true in zip(predicted, REFERENCES, strict=True)
    ]
    found = scores(*predicted)["held_out_chrf"]
    assert min(each) < found < max(each)
    assert found != scores(*predicted, references=[true[:1] for true in REFERENCES])["held_out_chrf"]
    alone = scores(predicted[0], references=REFERENCES[:1])["held_out_chrf"]
    assert alone == pytest.approx(CHRF().sentence_score(predicted[0], REFERENCES[0]).score)


def test_references_are_what_the_tokenizer_makes_of_captions(tmp_path: Path) -> None:
    vocabulary = {"<s>": 0, "</s>": 1, "[UNK]": 2} | {letter: 3 + place for place, letter in enumerate("abcdeglrsu q")}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(tmp_path / "lossy.json"))
    folder = write_folder(tmp_path / "data", 12)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    shouted = [json.dumps(line | {"text": line["text"].upper()}) + "\n" for line in lines]
    (folder / "metadata.jsonl").write_text("".join(shouted))
    train = ["train", f"--data={folder}", "--steps=1", "--batch_size=4", *TINY, f"--tokenizer={tmp_path}/lossy.json"]
    assert main([*train, "--eval_images=12", f"--run={tmp_path / 'run'}"]) == 0
    (reference,) = json.loads((tmp_path / "run" / EVALUATION).read_text())["references"][0]
    assert reference.replace("[UNK]", "") == reference.replace("[UNK]", "").lower()
    assert "[UNK]" in reference


@pytest.mark.parametrize("strict", [[], ["--strict"]])
def test_held_out_rows_are_looked_at_before_training(
    strict: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    write_folder(tmp_path / "data" / "train", 8)
    held_out = write_folder(tmp_path / "data" / "test", 3)
    for number in range(3):
        (held_out / f"{number:03}.png").write_text("no picture")
    train = ["train", f"--data={tmp_path / 'data'}", "--steps=4", "--batch_size=4", *TINY, *strict]
    message = (
        r"unusable image: .*; without --strict, .*" if strict else r"no held-out row is usable: \S+000.png is not .*"
    )
    fails(capsys, [*train, f"--run={tmp_path / 'run'}"], message)
    assert not (tmp_path / "run").exists()


def test_evaluation_has_a_bar_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[tuple[Any, ...]] = []

    def watched(batches: Any, title: str, total: int, **how: Any) -> Any:
        bars.append((title, total, how["disable"]))
        return batches

    monkeypatch.setattr(module, "tqdm", watched)
    folder = write_folder(tmp_path / "data", 12)
    train = ["train", f"--data={folder}", "--steps=4", "--batch_size=1", "--held_out=6", "--eval_every=2", *TINY]
    assert main([*train, f"--run={tmp_path / 'run'}"]) == 0
    assert bars == [("evaluating", math.ceil(6 / 4), False)] * 2


def summary(out: str) -> list[str]:
    return re.split(r"\n(?=held-out exact match)", out)[-1].splitlines()


def test_the_summary_says_how_little_few_images_say(capsys: pytest.CaptureFixture[str]) -> None:
    few = "held-out images are too few to judge the model by: hold out more with --held_out"
    for count, said in (1, True), (29, True), (30, False):
        evaluation = Evaluation(1, 1.0, [["a\nb"]] * count, ["a\nc"] * count, {})
        _print_outcome(Outcome(evaluation, Progress(1), interrupted=False), Path("runs/a"), 1)
        out = capsys.readouterr().out
        assert re.match(rf"held-out exact match: 0.0% of {count} images; chrF [\d.]+; loss ", summary(out)[0])
        assert (f"{count} {few}" in summary(out)) == said
        table = out[: out.index("held-out exact match")].splitlines()
        assert len(table) == 1 + min(count, 8)  # line breaks in captions do not break the table
        assert all(re.match(r"(right|wrong)  ", line) for line in table[1:])


def test_training_without_images_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "data", 8)
    train = ["train", f"--data={folder}", "--steps=1", "--batch_size=4", *TINY]
    note = "palme-xt: note: with cross_attend=False, the model learns the captions without looking at the images\n"
    for option in "true", "false":
        assert main([*train, f"--cross_attend={option}", f"--run={tmp_path / option}"]) == 0
        assert (note in capsys.readouterr().err) == (option == "false")
        card = (tmp_path / option / "README.md").read_text()
        assert "| jitter |" not in card
        assert "| augment | False |" in card
