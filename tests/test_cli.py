"""`palme-xt train` and `palme-xt caption`, as a user runs them, and their errors."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image

from palme_xt import PalmEConfig, tokens
from palme_xt.captioner.attention import cross_attention_maps
from palme_xt.captioner.caption import caption
from palme_xt.captioner.images import Preprocessing
from palme_xt.captioner.options import DIGITS_MODEL, Data, Training
from palme_xt.captioner.training.checkpoint import warm_up_and_decay
from palme_xt.captioner.training.run import Run
from palme_xt.cli import main
from palme_xt.source import to_source
from palme_xt.storage.folder import FolderError, load, read_config
from palme_xt.tokens import printable
from tests.captioner.captioned import KINDS_OF_DEFECTS, TINY, picture, spoil, write_folder

QUICK = [
    *("--batch_size=4", "--eval_every=2", "--eval_images=10"),
    *("--encoder_dim=16", "--decoder_dim=16", "--encoder_depth=1", "--decoder_depth=2"),
]

DIGITS = Preprocessing.plain(DIGITS_MODEL)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of a few steps."""
    folder = tmp_path_factory.mktemp("runs") / "quick"
    assert main(["train", "--steps=4", *QUICK, f"--run={folder}"]) == 0
    return folder


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    """Assert exit status 2, and this one line on stderr."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert re.fullmatch(f"palme-xt: error: {message}", last), last
    assert "Traceback" not in captured.err


def test_a_run_folder_holds_what_it_promises(run: Path) -> None:
    held_out = [f"held_out/{number:02}.png" for number in range(8)]
    files = [
        "config.json",
        "evaluation.json",
        "held_out",
        *held_out,
        "loss.png",
        "metrics.jsonl",
        "model.safetensors",
        "samples.png",
    ]
    files += ["README.md", "checkpoint.safetensors", "preprocessor_config.json"]
    assert sorted(str(path.relative_to(run)) for path in run.rglob("*")) == sorted(files)
    for name in "loss.png", "samples.png":
        with Image.open(run / name) as picture:
            assert len(picture.convert("RGB").getcolors(10**6) or []) > 10

    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2, 3, 4]
    assert [(line["step"], line["skipped_rows"]) for line in metrics if "held_out_exact_match" in line] == [
        (2, 0),
        (4, 0),
    ]
    assert all(line["images_per_second"] > 0 for line in metrics if "loss" in line)

    values = json.loads((run / "config.json").read_text())
    given = {"steps": 4, "batch_size": 4, "eval_every": 2, "eval_images": 10, "mixed_precision": "no"}
    fingerprints = {"rows_fingerprint": "", "held_out_fingerprint": ""}
    expected = asdict(Data()) | asdict(Training()) | given | fingerprints
    del expected["augment"]  # which has no effect on digits
    assert values.pop("training") == expected
    config = PalmEConfig.from_dict(values)
    assert (config.encoder_dim, config.bos_token, config.eos_token) == (16, 256, 257)  # of the tokenizer


def test_one_unreadable_image_does_not_keep_the_others_from_captions(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("palme_xt.captioner.caption.CAPTIONED_AT_ONCE", 3)
    images = sorted(map(str, (run / "held_out").glob("*.png")))
    expected = captions(capsys, run, images=images)
    (tmp_path / "bad.png").touch()
    given = [*images[:4], str(tmp_path / "bad.png"), *images[4:], images[0]]
    assert main(["caption", str(run), *given]) == 2
    captured = capsys.readouterr()
    pairs = [*zip(images, expected, strict=True), (images[0], expected[0])]
    assert captured.out.splitlines() == [f"{path}: {text}" for path, text in pairs]
    assert re.fullmatch(r"palme-xt: error: \S+bad.png is not an image that Pillow can read\n", captured.err)


def test_long_captions_are_cut_in_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = ["--max_seq_len=200", "--steps=1", *QUICK, f"--run={tmp_path / 'a run'}"]
    assert main(["train", *long]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^wrong  .{59}…  \w+", out, flags=re.MULTILINE)
    folder = f"'{tmp_path / 'a run'}'"
    assert f"palme-xt caption {folder} {folder}/held_out/*.png\n" in out


def test_training_learns_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--steps=40", "--eval_images=20", f"--run={tmp_path / 'run'}"]) == 0
    losses = [line["loss"] for line in Run(tmp_path / "run").metrics() if "loss" in line]
    assert losses[0] > 5  # about ln 258: nothing learned yet
    assert losses[-1] < 0.5
    out, err = capsys.readouterr()
    assert re.search(r"predicted +true\n(?:(?:right|wrong)  .*\n){8}held-out exact match: [\d.]+% of 20 images", out)
    assert re.search(r"loss=[\d.]+, exact match=-, chrF=-, images/s=\d+", err)


@pytest.mark.slow
def test_the_same_seed_trains_the_same_model(tmp_path: Path) -> None:
    weights = []
    for name, seed in ("a", 3), ("b", 3), ("c", 4):
        assert main(["train", "--steps=2", f"--seed={seed}", *QUICK, f"--run={tmp_path / name}"]) == 0
        weights.append(load(tmp_path / name).state_dict()["encoder.pos_embedding"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_every_argument_and_override_is_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--help"])
    assert exit_.value.code == 0
    described = capsys.readouterr().out
    for option in [*fields(PalmEConfig), *fields(Training), *fields(Data)]:
        name = "from" if option.name == "start" else option.name
        assert re.search(rf"--{name} \S+\n? +\S+", described), name

    overrides = [
        "--decoder_kwargs.attn_kv_heads=2",
        "--decoder_kwargs.ff_glu=true",
        "--autoregressive_kwargs.pad_value=3",
    ]
    flags = ["--qk_norm=false", "--rotary_xpos=false", "--use_abs_pos_emb=true", '--vit_kwargs={"channels": 3}']
    assert main(["train", "--steps=1", *QUICK, *overrides, *flags, f"--run={tmp_path / 'run'}"]) == 0
    config = load(tmp_path / "run").config
    assert config.decoder_kwargs == DIGITS_MODEL.decoder_kwargs | {"attn_kv_heads": 2, "ff_glu": True}
    assert (config.qk_norm, config.rotary_xpos, config.use_abs_pos_emb) == (False, False, True)
    assert (config.channels, config.pad_value) == (3, 3)


def test_a_text_only_captioner_trains_too(tmp_path: Path) -> None:
    assert main(["train", "--steps=2", *QUICK, "--cross_attend=false", f"--run={tmp_path / 'run'}"]) == 0


@pytest.mark.parametrize("arguments", [["--help"], ["caption", "--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    assert "caption image files with a trained run" in capsys.readouterr().out.lower()


def test_caption_prints_a_line_for_each_image(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = sorted(map(str, (run / "held_out").glob("*.png")))
    assert main(["caption", str(run), *images]) == 0
    lines = capsys.readouterr().out.splitlines()
    model = load(run)
    img = torch.stack([Preprocessing.plain(model.config).read(path) for path in images])
    assert lines == [f"{path}: {printable(text)}" for path, text in zip(images, caption(model, img), strict=True)]


def captions(
    capsys: pytest.CaptureFixture[str], run: Path, *options: str, images: list[str] | None = None
) -> list[str]:
    images = images or sorted(map(str, (run / "held_out").glob("*.png")))[:3]
    capsys.readouterr()
    assert main(["caption", str(run), *images, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ", 1)[0] for line in lines] == images
    return [line.split(": ", 1)[1] for line in lines]


def test_captions_can_be_streamed_searched_and_sampled(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    greedy = captions(capsys, run)
    assert captions(capsys, run, "--stream") == greedy
    assert captions(capsys, run, "--temperature=0") == greedy

    model = load(run)
    img = torch.stack(
        [Preprocessing.plain(model.config).read(path) for path in sorted((run / "held_out").glob("*.png"))[:3]]
    )
    assert captions(capsys, run, "--beams=3") == [printable(text) for text in caption(model, img, beams=3)]

    one, again, other = (captions(capsys, run, "--temperature=1.5", f"--seed={seed}") for seed in (1, 1, 2))
    assert one == again != other
    nucleus = captions(capsys, run, "--top-p=0.5", "--seed=1")
    assert nucleus != captions(capsys, run, "--top-p=0.9", "--seed=1")
    assert captions(capsys, run, "--top-p=0.000001", "--temperature=2") == greedy  # only the most likely token is left
    assert len(captions(capsys, run, "--stream", "--temperature=2", "--top-p=0.9")) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--beams=0"], "beams=0 must be a positive int: 1 decodes without a search"),
        (["--beams=2", "--stream"], "--beams=2 neither samples nor streams: .*"),
        (["--beams=2", "--top-p=0.5"], "--beams=2 neither samples nor streams: .*"),
        (["--temperature=-1"], r"temperature=-1.0 must be 0 \(greedy\) or more, and finite"),
        (["--beams=2", "--seed=1"], "--beams=2 neither samples nor streams: .*"),
        (["--top-p=0.5", "--temperature=0"], "--top_p=0.5 has no effect with --temperature=0, .*"),
        (["--seed=-1"], r"--seed=-1 must be within 0..2\*\*63-1"),
        (["--seed=3"], "--seed=3 has no effect without --temperature or --top_p: leave it out"),
        (["--seed=3", "--temperature=0"], "--seed=3 has no effect without --temperature or --top_p: leave it out"),
        (["--layer=0"], "--layer=0 has no effect without --attention: leave it out"),
        (["--top-p=0"], "--top_p=0.0 must be greater than 0 and at most 1"),
    ],
)
def test_ways_to_decode_that_are_none(
    options: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails(capsys, ["caption", str(run), str(run / "held_out" / "00.png"), *options], message)


def test_images_of_any_size_and_mode_are_read(run: Path, tmp_path: Path) -> None:
    Image.new("RGB", (70, 50), "white").save(tmp_path / "white.jpg")
    pixels = DIGITS.read(tmp_path / "white.jpg")
    assert pixels.shape == (1, 32, 32)
    assert pixels.min() == 1
    with Image.open(run / "held_out" / "00.png") as image:
        saved = torch.tensor(list(image.tobytes())).reshape(32, 32) / 255
    assert torch.equal(DIGITS.read(run / "held_out" / "00.png")[0], saved)


def test_images_that_would_be_misread(tmp_path: Path) -> None:
    image = Image.new("L", (32, 32), 0)
    image.paste(255, (0, 0, 32, 16))  # bright at the top, and marked as upside down
    exif = Image.Exif()
    exif[0x0112] = 3
    image.save(tmp_path / "turned.png", exif=exif)
    pixels = DIGITS.read(tmp_path / "turned.png")
    assert [float(pixels[0, row, 0]) for row in (0, 31)] == [0.0, 1.0]


def own_pictures(tmp_path: Path) -> tuple[Path, list[str]]:
    """Return a folder with five unusable rows in every split, and the options to train on it."""
    for split in "train", "validation":
        spoil(write_folder(tmp_path / split, 20))
    (tmp_path / "data").mkdir()
    for split in "train", "validation":
        (tmp_path / split).rename(tmp_path / "data" / split)
    return tmp_path / "data", ["train", f"--data={tmp_path / 'data'}", "--steps=3", "--batch-size=10", *TINY]


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_rows_that_are_skipped_are_counted(
    streaming: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, train = own_pictures(tmp_path)
    assert main([*train, *streaming, "--eval_images=20", f"--run={tmp_path / 'run'}"]) == 0
    out = capsys.readouterr().out
    metrics = Run(tmp_path / "run").metrics()
    assert [line["skipped_rows"] for line in metrics if "skipped_rows" in line] == [5]
    kinds = ", ".join(f"1 with {kind}" for kind in KINDS_OF_DEFECTS)
    assert f"3 steps; 20 training rows read; skipped: {kinds}\n" in out
    assert f"15 held-out images; skipped: {kinds}\n" in out
    assert f"{tmp_path / 'run' / 'skipped.jsonl'} names the skipped rows\n" in out
    lines = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    for split, named in ("validation", lines[:5]), ("train", lines[5:]):  # held-out rows first
        assert sorted(line["reason"] for line in named) == list(KINDS_OF_DEFECTS)
        files = sorted(line["name"] for line in named)
        assert files == [str(data / split / f"{number:03}.png") for number in range(5)]
        assert all(line["name"] in line["detail"] for line in named)
    strict = [*train, *streaming, "--strict", f"--run={tmp_path / 'strict'}"]
    fails(capsys, strict, "[a-z ]+: .*; without --strict, such rows are skipped and counted")
    assert main(["caption", str(tmp_path / "run"), str(data / "train" / "010.png")]) == 0


def test_a_batch_of_bad_rows_is_no_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "data", 9)
    spoil(folder)
    train = ["train", f"--data={folder}", "--held_out=1", "--steps=8", "--batch_size=1", *TINY]
    assert main([*train, f"--run={tmp_path / 'run'}"]) == 0
    assert "8 steps; 8 training rows read; skipped: 1 with broken image" in capsys.readouterr().out
    losses = [line["loss"] for line in Run(tmp_path / "run").metrics() if "loss" in line]
    assert losses.count("nan") == 5  # nothing was learned in these steps


def test_errors_of_reading_processes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "data", 9)
    rows = [{"file_name": f"{n:03}.png", "text": f"picture {n}", "size": n} for n in range(9)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = ["train", f"--data={folder}", "--steps=3", "--batch_size=2", *TINY, "--num_workers=1"]
    message = "text_column=size holds int, must hold a text or a list of texts: choose another column"
    fails(capsys, [*train, "--text_column=size", f"--run={tmp_path / 'run'}"], message)
    message = "held_out takes all rows of the stream, must leave some: pass a smaller --held_out"
    fails(capsys, [*train, "--streaming", f"--run={tmp_path / 'stream'}"], message)


def test_strict_holds_for_held_out_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "whole", 20)
    broken = write_folder(tmp_path / "broken", 20)
    spoil(broken)
    (tmp_path / "data").mkdir()
    folder.rename(tmp_path / "data" / "train")
    broken.rename(tmp_path / "data" / "test")
    train = ["train", f"--data={tmp_path / 'data'}", "--steps=1", *TINY, "--batch_size=4"]
    assert main([*train, f"--run={tmp_path / 'run'}"]) == 0
    assert "1 steps; 4 training rows read; skipped: none" in capsys.readouterr().out
    message = rf"({'|'.join(KINDS_OF_DEFECTS)}): .*/data/test/00[0-4]\.png .*"
    fails(capsys, [*train, "--strict", f"--run={tmp_path / 'strict'}"], message)


def test_nothing_to_learn_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "data", 12)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line | {"text": "字" * 42}) + "\n" for line in lines))
    train = ["train", f"--data={folder}", "--steps=2", "--batch_size=4", *TINY, f"--run={tmp_path / 'run'}"]
    message = r"data=\S+ has no usable row among its first 11: .* has 128 tokens, more than max_seq_len=80"
    fails(capsys, train, f"{message}; 99% of the captions need --max_seq_len=128")
    assert not (tmp_path / "run").exists()
    assert main([*train, "--max_seq_len=128"]) == 0
    assert "skipped: none" in capsys.readouterr().out


def test_nothing_to_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    write_folder(tmp_path / "data" / "train", 12)
    folder = write_folder(tmp_path / "data" / "test", 3)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line | {"text": "long " * 30}) + "\n" for line in lines))
    train = ["train", f"--data={tmp_path / 'data'}", "--steps=2", "--batch_size=4", *TINY, f"--run={tmp_path / 'run'}"]
    message = "no held-out row is usable: the caption of .* has 152 tokens, .*; choose another split or .*"
    fails(capsys, train, message)
    assert not (tmp_path / "run").exists()


def test_a_thousand_unusable_rows_in_succession_end_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(write_folder(tmp_path / "images", 1) / "000.png")
    (tmp_path / "data").mkdir()
    for split, count in ("train", 3000), ("validation", 1):
        rows = [{"image": f"none-{number}.png" if number else image, "text": "x"} for number in range(count)]
        Dataset.from_list(rows).to_parquet(tmp_path / "data" / f"{split}.parquet")
    train = ["train", f"--data={tmp_path / 'data'}", "--steps=90", "--batch_size=100", *TINY, "--eval_every=100"]
    message = r"data=\S+ has 1000 unusable rows in succession: none-\d+.png cannot be read: No such file or directory"
    fails(capsys, [*train, f"--run={tmp_path / 'run'}"], message)


def test_training_learns_one_s_own_pictures_and_captions_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "data", 18)
    train = ["train", f"--data={folder}", "--held_out=1", "--steps=150", "--batch_size=17", "--lr=3e-3", *TINY]
    assert main([*train, "--encoder_dim=32", "--decoder_dim=32", f"--run={tmp_path / 'run'}"]) == 0
    losses = [line["loss"] for line in Run(tmp_path / "run").metrics() if "loss" in line]
    assert losses[0] > 5
    assert losses[-1] < 0.5
    images = sorted(map(str, folder.glob("*.png")))
    capsys.readouterr()
    assert main(["caption", str(tmp_path / "run"), *images]) == 0
    said = [line.split(": ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    colours = [text.split(" ")[0] for text in said]
    assert sum(colour == picture(n)[1].split(" ")[0] for n, colour in enumerate(colours)) >= 14


def test_attention_is_that_of_each_word(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("palme_xt.captioner.drawing.draw_attention", lambda *arguments: drawn.append(arguments))
    ids = [*b"six top", tokens.EOS]
    monkeypatch.setattr("palme_xt.captioner.caption.caption_ids", lambda *_, **how: torch.tensor([ids]))
    image = run / "held_out" / "00.png"
    assert main(["caption", str(run), str(image), f"--attention={tmp_path / 'x.png'}", "--layer=0"]) == 0
    ((img, words, maps, _),) = drawn
    model, read = load(run), DIGITS.read(image)
    assert torch.equal(img, DIGITS.read_pixels(image))
    each = cross_attention_maps(model, read[None], torch.tensor([[tokens.BOS, *ids]]), layer=0)[0]
    assert words == ["six", "top"]
    assert torch.allclose(maps, torch.stack([each[:3].mean(0), each[4:7].mean(0)]), atol=1e-6)
    assert not torch.allclose(maps, torch.stack([each[1:4].mean(0), each[5:8].mean(0)]), atol=1e-6)


def test_attention_of_a_caption_as_long_as_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absolute = ["--use_abs_pos_emb=true", "--rotary_xpos=false", "--alibi_pos_bias=false"]
    assert main(["train", "--steps=1", *QUICK, *absolute, f"--run={tmp_path / 'run'}"]) == 0
    monkeypatch.setattr("palme_xt.captioner.caption.caption_ids", lambda *_, **how: torch.full((1, 63), ord("a")))
    image = str(tmp_path / "run" / "held_out" / "00.png")
    assert main(["caption", str(tmp_path / "run"), image, f"--attention={tmp_path / 'x.png'}"]) == 0


def test_attention_is_drawn(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = str(run / "held_out" / "00.png")
    (said,) = captions(capsys, run, images=[image])
    pictures = []
    for layer in "0", "1", "-1":
        out = tmp_path / f"{layer}.png"
        assert main(["caption", f"--attention={out}", f"--layer={layer}", str(run), image]) == 0
        assert capsys.readouterr().out == f"{image}: {said}\n{out} written\n"
        with Image.open(out) as picture:
            pictures.append(picture.convert("RGB").tobytes())
    assert pictures[1] == pictures[2] != pictures[0]
    out = tmp_path / "x.png"
    attention = ["caption", str(run), image, f"--attention={out}"]
    fails(
        capsys,
        ["caption", str(run), image, image, f"--attention={out}"],
        r"--attention=\S+ needs exactly one image and no --stream: found 2 images",
    )
    fails(capsys, [*attention, "--stream"], r"--attention=\S+ needs exactly one image and no --stream: found 1 images")
    for other in tmp_path / "x.jpg", image, ".":
        message = r"--attention=\S+ must be a PNG file, and not the image itself: choose another"
        fails(capsys, ["caption", str(run), image, f"--attention={other}"], message)
    fails(capsys, [*attention, "--layer=2"], r"layer=2 must be an int within -2\.\.1, one per cross-attention")
    fails(capsys, ["caption", str(run), image, "--attention=/nowhere/x.png"], ".*No such file or directory.*")


def test_a_run_folder_is_what_the_hub_stores(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from palme_xt.hub import PalmE

    model = PalmE.from_pretrained(run)
    model.save_pretrained(tmp_path / "copy")
    ours = load(run).state_dict()
    for name, weight in load(tmp_path / "copy").state_dict().items():
        assert torch.equal(weight, ours[name])
    assert Run(tmp_path / "copy").training() == Run(run).training()
    images = [str(path) for path in sorted((run / "held_out").glob("*.png"))]
    assert captions(capsys, tmp_path / "copy", images=images) == captions(capsys, run, images=images)
    card = (tmp_path / "copy" / "README.md").read_text()
    for stated in "held_out_exact_match", "| data | digits |", "| encoder_dim | 16 |":
        assert stated in card


def test_trackers_log_what_metrics_hold(tmp_path: Path) -> None:
    EventAccumulator = importlib.import_module(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator
    assert main(["train", "--steps=4", *QUICK, "--log-with=tensorboard", f"--run={tmp_path / 'run'}"]) == 0
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "palme_xt")).Reload()
    metrics = Run(tmp_path / "run").metrics()
    for name in "loss", "held_out_exact_match", "held_out_loss":
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(line["step"], pytest.approx(line[name])) for line in metrics if name in line]
        assert logged == expected
    assert [event.step for event in events.Scalars("lr")] == [1, 2, 3, 4]


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11])
def test_any_number_of_steps(steps: int, tmp_path: Path) -> None:
    assert main(["train", f"--steps={steps}", *QUICK, f"--run={tmp_path / 'run'}"]) == 0
    rates = [warm_up_and_decay(step, steps) for step in range(steps)]
    assert max(rates) == 1.0
    assert all(rate > 0 for rate in rates)


def test_a_diverged_training_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = r"lr=1e\+30 led to a loss of (nan|inf) at step 2, batch scene 32, .* and 24 more: lower it; \S+ keeps .*"
    fails(
        capsys, ["train", "--steps=9", "--lr=1e30", *QUICK[1:], "--eval_every=9", f"--run={tmp_path / 'run'}"], message
    )


def test_a_full_disk_is_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("palme_xt.storage.folder.replace_files", full)
    fails(capsys, ["parity", "record", str(run)], r"\S+ cannot be written: No space left on device")


def test_captioning_leaves_the_model_in_its_mode(run: Path) -> None:
    model = load(run).train()
    caption(model, torch.rand(1, 1, 32, 32))
    assert all(module.training for module in model.modules())


def test_what_is_no_image_or_no_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.png").write_text("no image")
    fails(
        capsys, ["caption", str(run), str(tmp_path / "text.png")], r"\S+text.png is not an image that Pillow can read"
    )
    fails(capsys, ["caption", str(run), str(tmp_path / "none.png")], r"\S+none.png cannot be read: No such file.*")
    fails(
        capsys,
        ["caption", str(tmp_path), "x.png"],
        r"\S+ is not a run folder: it has no config.json; .*train. makes one",
    )
    fails(capsys, ["caption", str(tmp_path / "none"), "x.png"], r"\S+ is not a run folder: there is no such folder; .*")


def test_damaged_runs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = str(run / "held_out" / "00.png")
    config, weights = (run / "config.json").read_text(), (run / "model.safetensors").read_bytes()
    for name, text, data, message in [
        ("json", config[:-9], weights, r"\S+config.json does not hold a model's arguments: .*"),
        (
            "key",
            config.replace("image_size", "imagesize"),
            weights,
            ".*'imagesize' is not an argument of PalmEConfig.*",
        ),
        (
            "value",
            config.replace('"image_size": 32', '"image_size": 33'),
            weights,
            ".*image_size=33 must be divisible.*",
        ),
        ("weights", config, weights[:-9], r"\S+model.safetensors holds no safetensors weights that can be read: .*"),
        ("shape", config.replace('"decoder_dim": 16', '"decoder_dim": 24'), weights, ".*does not hold this model's.*"),
    ]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
        (tmp_path / name / "model.safetensors").write_bytes(data)
        fails(capsys, ["caption", str(tmp_path / name), image], message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--decoder_kwargs.atn_kv_heads=3"], ".*'atn_kv_heads'.*did you mean 'attn_kv_heads'.*"),
        (["--image_size=33"], "image_size=33 must be divisible by patch_size=8: .*"),
        (["--decoder_heads=0"], "decoder_heads=0 must be a positive int: use 1 or more"),
        (["--num_tokens=200"], "num_tokens=200 must be at least 258 to train on bytes: 256, BOS and EOS"),
        (["--max_seq_len=20"], "max_seq_len=20 must be at least 56 for the longest caption"),
        (["--task=questions", "--max_seq_len=20"], "max_seq_len=20 must be at least 91 for the longest question"),
        (["--task=riddles"], "task=riddles must be captions or questions"),
        (["--task=questions", "--data=cats"], "task=questions has no effect with data=cats, only with digits: .*"),
        (["--image_size=4", "--patch_size=2"], "image_size=4 must be at least 8 pixels to show digits"),
        (["--steps=0"], "steps=0 must be greater than 0"),
        (["--seed=-1"], "seed=-1 must be 0 or more"),
        (["--seed=2147483648"], r"seed=2147483648 must be below 2\*\*31"),
        (["--mixed-precision=fp16"], "mixed_precision=fp16 must be no or bf16: fp16 would need loss scaling"),
        (["--num_workers=-1"], "num_workers=-1 must be 0 or more"),
        (["--shuffle_buffer=0"], "shuffle_buffer=0 must be greater than 0"),
        (["--gradient_accumulation_steps=3"], r"batch_size=32 must be divisible by 1 processes times .*=3: .*"),
        (["--log-with=papyrus"], "accelerate rejects the options: Unsupported logging capability: papyrus.*"),
        (["--log-with=clearml"], "log_with=clearml is not installed: pip install clearml"),
        (["--bos_token=x"], "bos_token='x', eos_token=None need a tokenizer: bytes have both"),
        (
            ["--tokenizer=/nowhere"],
            "tokenizer=/nowhere must be a file of the tokenizers library or a name on the hub: .*",
        ),
    ],
)
def test_options_that_cannot_work(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails(capsys, ["train", *arguments, f"--run={tmp_path / 'run'}"], message)
    assert not (tmp_path / "run").exists()


def test_not_a_number_is_no_learning_rate() -> None:
    with pytest.raises(ValueError, match="lr=nan must be greater than 0"):
        Training(lr=float("nan"))


def test_without_a_command_it_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in [], ["--help"]:
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0
        out, err = capsys.readouterr()
        assert all(command in out for command in ("train", "caption", "ask", "source", "parity"))
        assert err == ""
    rule = "must be one of the commands train, caption, ask, source, parity"
    fails(capsys, ["trian"], f"'trian' {rule}: did you mean train\\?")
    fails(capsys, ["zzz"], f"'zzz' {rule}")


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_version_and_help_need_no_dependency(option: str) -> None:
    nothing = ["torch", "x_transformers", "einops", "numpy", "jsonargparse"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({nothing})); from palme_xt.cli import main; main([{option!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "palme-xt" in done.stdout


def test_nothing_is_printed_before_what_was_asked_for() -> None:
    done = subprocess.run([sys.executable, "-m", "palme_xt", "source"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout == to_source(PalmEConfig())


SLOW_IMPORTS = ("torch.nn", "numpy", "x_transformers", "accelerate")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for a child")
@pytest.mark.parametrize(
    "module",
    ["argparse", "torch", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_IMPORTS)],
)
def test_an_interrupt_while_modules_are_imported_is_one_line(module: str, tmp_path: Path) -> None:
    # A module finder sends the signal, so that it arrives during the import, however fast the machine is.
    code = f"""
import os, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
from palme_xt.cli import main
sys.meta_path.insert(0, Interrupt())
sys.modules.pop({module!r}, None)
sys.exit(main(["train", "--run", {str(tmp_path / "run")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "palme-xt: interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--decoder_dept=3"], r"unrecognized arguments: --decoder_dept=3: did you mean --decoder_depth\?"),
        (["train", "--held-ot", "3"], r"unrecognized arguments: --held_ot 3: did you mean --held_out\?"),
        (["train", "--zzzzz=3"], "unrecognized arguments: --zzzzz=3"),
        (["train", "--steps=many"], '.*"steps".*many.*'),
        (["train", "--config={folder}/none.yaml"], ".*File does not exist: '.*none.yaml'"),
        (["train", "--config={folder}/x.yaml"], r"Option 'stesp' is not accepted: did you mean (--)?steps\?"),
        (["train", "--steps=x"], "Parser key \"steps\": Expected a <class 'int'>. Got value: x"),
        (["caption", "run", "x.png", "--beam=3"], r"unrecognized arguments: --beam=3: did you mean --beams\?"),
        (["source", "--image_sise=64"], r"unrecognized arguments: --image_sise=64: did you mean --image_size\?"),
        (
            ["parity", "check", "run", "--tolerence=3"],
            r"unrecognized arguments: --tolerence=3: did you mean --tolerance\?",
        ),
    ],
)
def test_options_that_are_none_are_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.yaml").write_text("stesp: 3\n")
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    fails(capsys, arguments, f"{message}; `palme-xt {arguments[0]} --help` lists the options")


def test_options_may_be_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--steps=1", *QUICK, "--decoder_kwargs.ff_glu=true", f"--run={tmp_path / 'run'}"]
    with pytest.raises(SystemExit) as exit_:
        main(["train", *given, "--print-config"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert "steps: 1\n" in printed
    assert "image_size: 32\n" in printed  # the defaults of the digits
    (tmp_path / "all.yaml").write_text(printed)
    (tmp_path / "some.yaml").write_text("batch_size: 8\n")
    assert (
        main(["train", "--config", str(tmp_path / "all.yaml"), f"--config={tmp_path / 'some.yaml'}", "--seed=1"]) == 0
    )
    values = Run(tmp_path / "run").training()
    assert (values["steps"], values["batch_size"], values["eval_every"], values["seed"]) == (1, 8, 2, 1)
    kwargs = DIGITS_MODEL.decoder_kwargs | {"ff_glu": True}
    assert read_config(tmp_path / "run").decoder_kwargs == kwargs
    capsys.readouterr()
    resume = ["train", f"--resume={tmp_path / 'run'}", f"--config={tmp_path / 'some.yaml'}"]
    fails(capsys, resume, r"--resume=\S+ allows no other options except .*, found --batch_size: leave out .*")


@pytest.mark.slow
def test_questions_are_learned_and_stay_the_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train = ["train", "--task=questions", "--steps=60", "--batch_size=16", "--eval_images=20", f"--run={run}"]
    assert main(train) == 0
    losses = [line["loss"] for line in Run(run).metrics() if "loss" in line]
    assert losses[0] > 5
    assert losses[-1] < 1
    assert (Run(run).training()["task"], read_config(run).image_token) == ("questions", 258)
    assert re.search(r"held-out exact match: [\d.]+% of 20 ", capsys.readouterr().out)
    assert main(["train", f"--resume={run}", "--steps=61"]) == 0
    capsys.readouterr()
    fails(capsys, ["train", f"--resume={run}", "--task=captions"], r"--resume=\S+ allows no other options.*--task.*")


@pytest.mark.parametrize("task", ["captions", "questions"])
def test_defaults_depend_on_the_task(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = task == "questions"
    with pytest.raises(SystemExit):
        main(["train", f"--task={task}", "--print_config"])
    printed = capsys.readouterr().out
    for option, (captions, questions) in {
        "image_token": ("null", "258"),
        "num_tokens": ("258", "259"),
        "max_seq_len": ("64", "96"),
        "steps": ("500", "1600"),
    }.items():
        assert f"\n{option}: {questions if asked else captions}\n" in printed
    with pytest.raises(SystemExit):
        main(["train", f"--task={task}", "--steps=3", "--print_config"])
    assert "\nsteps: 3\n" in capsys.readouterr().out


def test_folders_of_images_are_captioned(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = sorted(map(str, (run / "held_out").glob("*.png")))
    expected = captions(capsys, run, images=images)
    (tmp_path / "empty" / "below").mkdir(parents=True)
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    fails(
        capsys, ["caption", str(run), str(tmp_path / "empty")], r"\S+empty must be an image or a folder of images: .*"
    )
    (tmp_path / "empty" / "below" / "x.PNG").write_bytes(Path(images[3]).read_bytes())
    assert main(["caption", str(run), str(run / "held_out"), str(tmp_path / "empty"), images[1]]) == 0
    lines = [f"{path}: {text}" for path, text in zip(images, expected, strict=True)]
    assert capsys.readouterr().out.splitlines() == [
        *lines,
        f"{tmp_path}/empty/below/x.PNG: {expected[3]}",
        lines[1],
    ]
    texts = ["a \n 'b'", 'ü "c"']
    monkeypatch.setattr("palme_xt.captioner.caption.caption", lambda *_, **how: texts)
    assert main(["caption", str(run), *images[:2], "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found == [{"file": path, "caption": text} for path, text in zip(images, texts, strict=False)]
    for options in ["--stream"], [f"--attention={tmp_path / 'x.png'}"]:
        message = "--json prints whole captions only: leave --stream and --attention out"
        fails(capsys, ["caption", str(run), images[0], "--json", *options], message)


def test_devices(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = str(run / "held_out" / "00.png")
    assert captions(capsys, run, "--device=cpu", images=[image]) == captions(capsys, run, images=[image])
    train = ["train", "--steps=1", *QUICK, f"--run={tmp_path / 'run'}"]
    for command in ["caption", str(run), image], train:
        message = "--device=tpu9 must be a device of this machine, such as cpu or cuda:0: .*"
        fails(capsys, [*command, "--device=tpu9"], message)
    for name in "ACCELERATE_TORCH_DEVICE", "ACCELERATE_USE_CPU":
        monkeypatch.setenv(name, "")
    assert main([*train, "--device=cpu"]) == 0
    assert (os.environ["ACCELERATE_TORCH_DEVICE"], os.environ["ACCELERATE_USE_CPU"]) == ("cpu", "True")
    assert main(["train", f"--resume={tmp_path / 'run'}", "--device=cpu"]) == 0
    capsys.readouterr()
    monkeypatch.setenv("WORLD_SIZE", "2")
    fails(capsys, [*train, "--device=cpu"], "--device=cpu is for one process: accelerate launch has its own options")


def test_a_run_without_its_preprocessing_captions_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "config.json", "model.safetensors":
        (tmp_path / name).write_bytes((run / name).read_bytes())
    command = ["caption", str(tmp_path), str(run / "held_out" / "00.png")]
    message = r"\S+preprocessor_config.json does not say how images of this model are preprocessed: No such file.*"
    for options in [], ["--stream"], [f"--attention={tmp_path / 'x.png'}"]:
        fails(capsys, [*command, *options], message)
    (tmp_path / "preprocessor_config.json").write_bytes((run / "preprocessor_config.json").read_bytes())
    assert main(command) == 0


def test_options_of_digits_are_not_kept_for_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, run = write_folder(tmp_path / "data", 12), tmp_path / "run"
    train = ["train", f"--data={folder}", "--steps=1", "--batch_size=4", *TINY, "--fit=pad", f"--run={run}"]
    assert main(train) == 0
    assert "jitter" not in (run / "README.md").read_text()
    assert "| fit | pad |" in (run / "README.md").read_text()
    assert "jitter" not in Run(run).training()
    assert json.loads((run / "preprocessor_config.json").read_text())["do_pad"] is True
    assert main(["train", f"--resume={run}"]) == 0


def test_hyphens_do_as_well_as_underscores(capsys: pytest.CaptureFixture[str]) -> None:
    programs = []
    for option in "--encoder-dim", "--encoder_dim":
        assert main(["source", f"{option}=48", "--encoder_heads=2", "--decoder-kwargs.ff-glu=true"]) == 0
        programs.append(capsys.readouterr().out)
    assert programs[0] == programs[1]
    assert "dim=48" in programs[0]


def test_options_have_one_spelling() -> None:
    root = Path(__file__).parent.parent
    documents = [root / "README.md", *(root / "palme_xt").rglob("*.md"), *(root / "benchmarks").rglob("*.md")]
    lines = [line for path in documents for line in path.read_text().splitlines() if "palme-xt " in line]
    sources = [path.read_text() for path in (root / "palme_xt").rglob("*.py")]
    for text in [*lines, *sources]:
        assert re.findall(r"--[a-z]+-[a-z-]+", text) == []
    assert any("--held_out" in line for line in lines)


def test_a_run_is_never_overwritten(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(
        capsys,
        ["train", *QUICK, f"--run={run}"],
        r"\S+ is not empty: choose another folder, or resume its run with --resume",
    )
    (tmp_path / "file").touch()
    fails(capsys, ["train", *QUICK, f"--run={tmp_path / 'file' / 'run'}"], r"\S+ cannot be a run folder: .*")


@pytest.mark.parametrize(
    "extra",
    ["accelerate", *(pytest.param(name, marks=pytest.mark.slow) for name in ("jsonargparse", "matplotlib", "sklearn"))],
)
def test_missing_extras_are_named(extra: str) -> None:
    code = f"import sys; sys.modules[{extra!r}] = None; from palme_xt.cli import main; sys.exit(main(['train']))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(rf"palme-xt: error: {extra}\S* is not installed: pip install -e '\.\[train\]'\n", done.stderr)


def test_the_core_imports_none_of_the_extras() -> None:
    extras = [
        "jsonargparse",
        "matplotlib",
        "sklearn",
        "PIL",
        "safetensors",
        "tqdm",
        "numpy",
        "hypothesis",
        "accelerate",
    ]
    code = (
        "import sys, x_transformers; before = set(sys.modules); from palme_xt import PalmE; "
        f"print(*set({extras}) & set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_defects_are_not_hidden(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    def defect(preprocessing: Preprocessing, path: str) -> torch.Tensor:
        raise ValueError("raised outside the package")

    monkeypatch.setattr("palme_xt.captioner.images.Preprocessing.read", defect)
    with pytest.raises(ValueError, match="raised outside the package"):
        main(["caption", str(run), "x.png"])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for a child")
def test_an_interrupt_leaves_a_usable_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "palme_xt",
        "train",
        "--steps=100000",
        *QUICK[:3],
        "--eval_every=90000",
        f"--run={folder}",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not Run(folder).metrics():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "held-out exact match" in out
    for name in "config.json", "metrics.jsonl", "model.safetensors", "samples.png", "loss.png":
        assert (folder / name).stat().st_size > 0
    assert main(["caption", str(folder), str(folder / "held_out" / "00.png")]) == 0


def test_a_run_that_is_no_run() -> None:
    with pytest.raises(FolderError, match="is not a run folder"):
        load("nowhere")
