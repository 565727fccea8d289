"""Drawings are written, show the right content in the right place, and accept any text."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from palme_xt.captioner.drawing import (
    BLUE,
    DPI,
    GAP,
    GREEN,
    GREY,
    MARGIN,
    ORANGE,
    RIGHT,
    SIDE,
    TITLE,
    VIOLET,
    WIDTH,
    WRONG,
    _smooth,
    _wrap,
    draw_attention,
    draw_loss,
    draw_samples,
)

ANY_TEXT = ["", "$x^2", "$$", "\\frac", "表情 \U0001f600", "\x00\n\t", "W" * 200, "a, " * 60]


def read(path: Path) -> np.ndarray[Any, Any]:
    """Return a PNG file as `(h, w, 3)`, 0..255, and assert that it is alone in its folder."""
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.array(image.convert("RGB")).astype(int)


def count(drawing: np.ndarray[Any, Any], color: str) -> int:
    """Return the number of pixels of this colour."""
    rgb = [int(color[place : place + 2], 16) for place in (1, 3, 5)]
    return int((np.abs(drawing - rgb).max(axis=-1) <= 3).sum())


def panel(drawing: np.ndarray[Any, Any], column: int, *, above: float = 0, gap: float = GAP) -> np.ndarray[Any, Any]:
    """Return the pixels of a panel in the first row, without its frame."""
    left, top, side = (round(DPI * inches) for inches in (MARGIN + column * (SIDE + gap), TITLE + above, SIDE))
    return drawing[top + 2 : top + side - 2, left + 2 : left + side - 2]


def test_right_and_wrong_captions_differ_in_colour(tmp_path: Path) -> None:
    img = torch.rand(2, 1, 32, 32)
    inks = {}
    for name, predicted in {"both": ["one", "2"], "one": ["one", "six"], "none": ["six", "six"]}.items():
        (tmp_path / name).mkdir()
        draw_samples(img, predicted, [["one"], ["two", "2"]], tmp_path / name / "samples.png")
        inks[name] = [count(read(tmp_path / name / "samples.png"), color) for color in (RIGHT, WRONG, GREY)]
    assert inks["both"][0] > inks["one"][0] > inks["none"][0] == 0
    assert inks["both"][1] == 0 < inks["one"][1] < inks["none"][1]
    assert inks["both"][2] == 0 < inks["one"][2] < inks["none"][2]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_small_images_are_shown_pixel_by_pixel(channels: int, tmp_path: Path) -> None:
    img = torch.rand(2, channels, 4, 4, requires_grad=True)
    draw_samples(img, ["", ""], [[""], [""]], tmp_path / "samples.png")
    drawing = read(tmp_path / "samples.png")
    for number in (0, 1):
        shown = panel(drawing, number, gap=4 * GAP)[30::64, 30::64]
        expected = (img[number, :3] if channels >= 3 else img[number, :1].expand(3, -1, -1)).movedim(0, -1)
        assert np.abs(shown - 255 * expected.detach().numpy()).max() < 3
        assert np.abs(shown - 255 * img[1 - number, :1].detach().movedim(0, -1).numpy()).max() > 30


@pytest.mark.parametrize(("images", "rows"), [(0, 0), (1, 1), (4, 1), (5, 2), (16, 4), (20, 4)])
def test_as_many_rows_as_needed(images: int, rows: int, tmp_path: Path) -> None:
    names = ["one"] * images
    draw_samples(torch.rand(images, 1, 8, 8), names, [[name] for name in names], tmp_path / "samples.png")
    height, width, _ = read(tmp_path / "samples.png").shape
    assert width == DPI * (2 * MARGIN + 4 * SIDE + 12 * GAP)
    assert DPI * rows * SIDE < height < DPI * (0.6 + rows * (SIDE + 0.6))


def test_any_text_is_drawn(tmp_path: Path) -> None:
    draw_samples(torch.rand(8, 3, 8, 8), ANY_TEXT, [[text] for text in ANY_TEXT[::-1]], tmp_path / "samples.png")
    assert count(read(tmp_path / "samples.png"), WRONG) > 100


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", []),
        ("one", ["one"]),
        ("one top left, two top right", ["one top left,", "two top right"]),
        ("PERSON RAISING ONE HAND, medium-dark skin tone", ["PERSON RAISING ONE HAND,", "medium-dark skin tone"]),
        ("a, b, c, d", ["a, b, c, d"]),
    ],
)
def test_captions_break_at_clauses_if_they_fit(text: str, lines: list[str]) -> None:
    assert _wrap(text, WIDTH) == lines


def test_long_captions_are_cut() -> None:
    text = " ".join(f"word{number}" for number in range(60))
    lines = _wrap(text, 20)
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert text.startswith(" ".join(lines).removesuffix("…"))
    assert all(len(line) <= 20 for line in lines)
    assert _wrap("W" * 200, 20) == ["W" * 20, "W" * 20, "W" * 19 + "…"]
    assert _wrap("extraordinarily-long-word", 12, most=1) == ["extraordina…"]


def evaluated(steps: int, **values: Any) -> list[dict[str, Any]]:
    return [{"step": step, **values} for step in range(100, steps + 1, 100)]


def trained(steps: int) -> list[dict[str, Any]]:
    return [
        {"step": step, "loss": 5 * math.exp(-step / steps), "images_per_second": 9.0} for step in range(1, steps + 1)
    ]


@pytest.mark.parametrize(
    ("metrics", "colors"),
    [
        ([], set()),
        ([{"step": 1, "loss": 5.6}], {BLUE}),
        ([{"step": 0, "held_out_exact_match": 0.0}], {ORANGE}),
        (trained(5), {BLUE}),
        (trained(5000), {BLUE}),
        (evaluated(300, held_out_loss=0.2), {VIOLET}),
        (trained(300) + evaluated(300, held_out_exact_match=0.4), {BLUE, ORANGE}),
        (trained(300) + evaluated(300, held_out_loss=3.0, held_out_exact_match=0.9), {BLUE, VIOLET, ORANGE}),
        (evaluated(300, held_out_chrf=40.0), {GREEN}),
        (trained(300) + evaluated(300, held_out_loss="nan", held_out_exact_match=None), {BLUE}),
        ([{"step": 1, "loss": value} for value in ("nan", "inf", None, math.nan, math.inf, 0.0)], set()),
        ([{"step": step, "loss": 1.0} for step in (1, 2)], {BLUE}),
        ([{"step": 1, "loss": 1e30}, {"step": 2, "loss": 1e-30}], {BLUE}),
    ],
)
def test_the_curves_that_there_are(metrics: list[dict[str, Any]], colors: set[str], tmp_path: Path) -> None:
    draw_loss(json.loads(json.dumps(metrics)), tmp_path / "loss.png")
    drawing = read(tmp_path / "loss.png")
    assert drawing.shape == (720, 1280, 3)
    assert {color for color in (BLUE, VIOLET, ORANGE, GREEN) if count(drawing, color) > 50} == colors


def test_the_saved_step_is_marked_where_it_is(tmp_path: Path) -> None:
    shares = []
    for saved in None, 50, 250:
        (tmp_path / f"{saved}").mkdir()
        draw_loss(trained(300), tmp_path / f"{saved}" / "loss.png", saved)
        drawing = read(tmp_path / f"{saved}" / "loss.png")
        grey = [count(drawing[100:600, column : column + 1], GREY) for column in range(150, 1130)]
        shares.append((max(grey) > 200, grey.index(max(grey)) / len(grey)))
    assert [marked for marked, _ in shares] == [False, True, True]
    assert shares[2][1] - shares[1][1] == pytest.approx(200 / 330, abs=0.1)


def test_values_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    metrics = trained(300)
    strange = [dict(line) for line in metrics]
    for place, value in zip((10, 100, 200), ("nan", None, math.inf), strict=True):
        strange.insert(place, {"step": place, "loss": value})
    drawings = []
    for name, lines in {"metrics": metrics, "strange": strange, "other": metrics[:-100]}.items():
        (tmp_path / name).mkdir()
        draw_loss(lines, tmp_path / name / "loss.png")
        drawings.append(read(tmp_path / name / "loss.png"))
    assert np.array_equal(drawings[0], drawings[1])
    assert not np.array_equal(drawings[0], drawings[2])


def test_smoothing() -> None:
    assert _smooth([], 1) == []
    np.testing.assert_allclose(_smooth([4.0, 1.0, 2.0], 1), [4, 1, 2])
    np.testing.assert_allclose(_smooth([1.0, 8.0, 1.0, 8.0, 1.0, 8.0], 3), [1, 2, 4, 2, 4, 8**0.5])


def test_heat_is_where_the_map_is_hot(tmp_path: Path) -> None:
    maps = torch.full((2, 4, 4), 0.01)
    maps[0, 1, 2] = maps[1, 3, 0] = 0.85
    draw_attention(torch.full((3, 32, 32), 0.5), ["one", "two"], maps, tmp_path / "attention.png")
    drawing = read(tmp_path / "attention.png")
    itself, *panels = (panel(drawing, column, above=0.25) for column in range(3))
    assert np.abs(itself - 127.5).max() < 2
    for shown, cell in zip(panels, [(1, 2), (3, 0)], strict=True):
        cells = shown[:252, :252].reshape(4, 63, 4, 63, 3).mean(axis=(1, 3))
        brightness = cells.sum(axis=-1)
        assert np.unravel_index(brightness.argmax(), (4, 4)) == cell
        others = np.delete(brightness, brightness.argmax())
        assert brightness.max() > 1.5 * np.median(others)
        red, _, blue = cells[cell]
        assert red > 2 * blue  # the heat is coloured, and the image under it is grey


def test_the_image_shows_through(tmp_path: Path) -> None:
    img = torch.zeros(1, 8, 8)
    img[:, :, 4:] = 1
    draw_attention(img, ["word"], torch.full((1, 2, 2), 0.25), tmp_path / "attention.png")
    shown = panel(read(tmp_path / "attention.png"), 1, above=0.25)
    assert shown[:, 150:].mean() > shown[:, :100].mean() + 20


@pytest.mark.parametrize("number", [0, 1, 3, 11, 12, 40])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_number_of_words(number: int, channels: int, tmp_path: Path) -> None:
    words = [ANY_TEXT[place % len(ANY_TEXT)] for place in range(number)]
    draw_attention(torch.rand(channels, 64, 64), words, torch.rand(number, 4, 4), tmp_path / "attention.png")
    height, width, _ = read(tmp_path / "attention.png").shape
    assert 0.6 * width < height * (3 if number > 1 else 2) < 4 * width
    assert max(height, width) <= 2400


def test_maps_of_zeros_and_rectangular_maps(tmp_path: Path) -> None:
    draw_attention(torch.rand(3, 300, 300), ["word"], torch.zeros(1, 2, 3), tmp_path / "attention.png")
    assert panel(read(tmp_path / "attention.png"), 1, above=0.25).max() < 160


@pytest.mark.parametrize("shape", [(2, 4, 4), (1, 16), (4, 4)])
def test_maps_that_do_not_fit_the_words(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"maps has shape \(.*\), must be \(number of words, rows, columns\) for 1 word"
    ):
        draw_attention(torch.rand(1, 8, 8), ["word"], torch.rand(shape), tmp_path / "attention.png")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    for path, error in {
        tmp_path / "none" / "loss.png": FileNotFoundError,
        tmp_path / "file" / "loss.png": NotADirectoryError,
        tmp_path / "folder": IsADirectoryError,
    }.items():
        with pytest.raises(error, match=f"{path}'$"):
            draw_loss([], path)
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["file", "folder"]
    draw_loss([], tmp_path / "file")
    assert (tmp_path / "file").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", ["", ".", "..", "/"])
def test_a_path_without_a_name(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(IsADirectoryError, match=rf"Is a directory: '{re.escape(path or '.')}'$"):
        draw_loss([], Path(path))
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(figure: Figure, path: Path, **how: Any) -> None:
        path.write_bytes(b"\x89PNG")
        raise OSError(28, "No space left on device")

    (tmp_path / "loss.png").write_text("old")
    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match=r"No space left on device: .*loss\.png'$"):
        draw_loss([], tmp_path / "loss.png")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("loss.png", "old")]
