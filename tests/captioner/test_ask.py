"""Questions about images, in Python and as `palme-xt ask`."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from palme_xt import tokens
from palme_xt.captioner import Captioner
from palme_xt.captioner.images import PREPROCESSING, Preprocessing
from palme_xt.captioner.turns import question_ids
from palme_xt.cli import main
from palme_xt.storage.folder import save
from tests.captioner.captioned import picture
from tests.models import small

INSIDE: dict[str, Any] = {"image_token": 258, "num_tokens": 259}


def write_run(folder: Path, **arguments: Any) -> tuple[str, list[str]]:
    """Return the paths of a run that was not trained, and of two images."""
    model = small(**{"num_tokens": 258, "max_seq_len": 60} | arguments)
    save(model, folder / "run")
    (folder / "run" / PREPROCESSING).write_text(Preprocessing.plain(model.config).to_json())
    for number in 0, 1:
        picture(number)[0].save(folder / f"{number}.png")
    return str(folder / "run"), [str(folder / "0.png"), str(folder / "1.png")]


def ids(question: str, image_token: int | None = 258) -> list[int]:
    return question_ids(question, Captioner.from_pretrained.__globals__["BYTES"], image_token)


def generated(run: str, paths: list[str], prompt: list[int]) -> tuple[str, list[int]]:
    captioner = Captioner.from_pretrained(run)
    img = captioner.inputs(paths) if paths else None
    how: dict[str, Any] = {"temperature": 0.0, "eos_token": tokens.EOS}
    if captioner.model.config.cross_attend:
        assert img is not None
        found = captioner.model.generate(img[None], torch.tensor([prompt]), **how)[0]
    else:
        found = captioner.model.generate(None if img is None else [img], torch.tensor([prompt]), **how)[0]
    answer = found.tolist()
    answer = answer[: answer.index(tokens.EOS) + 1] if tokens.EOS in answer else answer
    return tokens.decode(answer), answer


def test_a_question_equals_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, paths = write_run(tmp_path, **INSIDE)
    captioner = Captioner.from_pretrained(run)
    for question in "Which?", "Is <image> as <image>?":
        written = question if "<image>" in question else f"<image><image>{question}"
        expected, _ = generated(run, paths, [tokens.BOS, *ids(written)])
        assert captioner.ask(paths, question) == expected
        assert "".join(captioner.converse(paths)(question)) == expected
        assert main(["ask", run, *paths, question]) == 0
        assert capsys.readouterr().out == f"{tokens.printable(expected)}\n"
    assert captioner.ask(paths[::-1], question) != expected
    assert main(["ask", run, *paths, question, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"question": question, "answer": expected}
    assert captioner.ask([], "Hm?") == generated(run, [], [tokens.BOS, *ids("Hm?")])[0]
    sampled = [["ask", run, *paths, "Q", "--temperature=2", f"--seed={seed}"] for seed in (1, 1, 2)]
    one, again, other = (main(each) or capsys.readouterr().out for each in sampled)
    assert one == again != other


def test_a_run_that_cross_attends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, paths = write_run(tmp_path)
    expected, _ = generated(run, paths, [tokens.BOS, *ids("Which?", None)])
    for question in "Which?", "<image><image>Which?":
        assert main(["ask", run, *paths, question]) == 0
        assert capsys.readouterr().out == f"{tokens.printable(expected)}\n"
    assert generated(run, paths[:1], [tokens.BOS, *ids("Which?", None)])[0] != expected
    assert main(["ask", run, "Which?"]) == 2
    assert "a model that cross-attends needs img" in capsys.readouterr().err


def test_one_question_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.no_grad():
        model = small(**INSIDE, max_seq_len=200)
        model.decoder.net.to_logits.weight[tokens.EOS] *= 3  # it ends its answers
    run, paths = write_run(tmp_path, **INSIDE, max_seq_len=200)
    save(model, Path(run))
    first, answer = generated(run, paths, prompt := [tokens.BOS, *ids("<image><image>One?")])
    assert answer[-1] == tokens.EOS
    second, _ = generated(run, paths, [*prompt, *answer, *ids("Two?")])
    monkeypatch.setattr("sys.stdin", io.StringIO("One?\nTwo?\n\nThree?\n"))
    assert main(["ask", run, *paths]) == 0
    assert capsys.readouterr().out.splitlines() == [tokens.printable(text) for text in (first, second)]
    monkeypatch.setattr("sys.stdin", io.StringIO("One?"))
    assert main(["ask", run, *paths]) == 0
    assert capsys.readouterr().out.splitlines() == [tokens.printable(first)]


def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, paths = write_run(tmp_path, **INSIDE)
    (tmp_path / "broken.png").write_text("no image")
    wrong: list[tuple[list[str], str]] = [
        ([paths[0], "nowhere.png"], r"nowhere\.png cannot be read: No such file or directory"),
        (["nowhere.png", "Which?"], r"nowhere\.png cannot be read: No such file or directory"),
        (["first", "second"], "first cannot be read: No such file or directory"),
        ([str(tmp_path / "broken.png"), "Which?"], r"\S+broken\.png is not an image that Pillow can read"),
        ([paths[0], "a <image> b <image>"], r"the questions have 2 <image>, must have one for each of the 1 images.*"),
        ([paths[0], "long " * 20], r"prompt of \d+ tokens \+ seq_len=1 exceeds max_seq_len=60: .*"),
        ([paths[0], "Which?", "--top_p=0"], r"--top_p=0\.0 must be greater than 0 and at most 1"),
        ([paths[0], "Which?", "--beams=2"], r".*--beams.*; `palme-xt ask --help` lists the options"),
    ]
    for arguments, message in wrong:
        assert main(["ask", run, *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(f"palme-xt: error: {message}\n", err), err
    (tmp_path / "text").mkdir()
    text, _ = write_run(tmp_path / "text", cross_attend=False)
    assert main(["ask", text, paths[0], "Which?"]) == 2
    assert "only for models with an image_token" in capsys.readouterr().err
