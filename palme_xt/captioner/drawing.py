"""Pictures of a model: captioned images, its loss curve, and where in an image it looks."""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter
from PIL import Image
from torch import Tensor

from palme_xt.tokens import printable

COLUMNS = 4
ROWS = 4

# Inches, but for the points of the font; whole pixels, of which a side has a multiple of what small images have.
DPI, SIDE, SMALLER_SIDE = 160, 2.0, 1.6
MARGIN, TITLE, GAP, LINE, FONT_SIZE = 0.25, 0.55, 0.15, 25 / DPI, 9.0

RIGHT, WRONG, GREY, INK = "#1a7f37", "#cf222e", "#6e7781", "#24292f"
BLUE, VIOLET, ORANGE = "#0969da", "#8250df", "#bc4c00"
HEAT = colormaps["inferno"]


def save_images(img: Tensor, folder: Path) -> None:
    """Write images `(b, c, h, w)` in 0..1 as `folder/00.png`, `folder/01.png`, ..."""
    folder.mkdir(exist_ok=True)
    for number, pixels in enumerate(img):
        Image.fromarray(_shown(pixels).mul(255).round().byte().numpy()).save(folder / f"{number:02}.png")


@contextlib.contextmanager
def _any_script() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # an untrained model writes in every script
        yield


@_any_script()
def draw_samples(img: Tensor, predicted: Sequence[str], true: Sequence[str], path: Path) -> None:
    """Draw the first 16 images above their predicted captions, green if right, else red and with the true ones.

    Args:
        img: `(b, c, h, w)` in 0..1, of 1 channel or of 3 or more.
        predicted: the caption generated for each; also those without an image here count in the title.
        true: the caption that would be right.
        path: of the PNG.

    Raises:
        OSError: `path` cannot be written.
    """
    shown = list(zip(img, predicted, true, strict=False))[: COLUMNS * ROWS]
    room, captions = SIDE + 2 * GAP, []
    for _, guess, truth in shown:
        lines = [(line, RIGHT if guess == truth else WRONG) for line in _lines(guess or "(nothing)", room)]
        captions.append(lines if guess == truth else lines + [(line, GREY) for line in _lines(truth, room)])
    matches = sum(map(str.__eq__, predicted, true))
    title = f"Held-out images and their generated captions: {matches} of {len(true)} exactly right"
    below = [LINE * len(caption) + GAP for caption in captions]
    figure, panels = _panels(len(shown), COLUMNS, SIDE, gap=3 * GAP, title=title, below=below)
    for axes, (pixels, _, _), caption in zip(panels, shown, captions, strict=True):
        _show(axes, _shown(pixels))
        for number, (line, color) in enumerate(caption):
            y = -(0.08 + LINE * number) / SIDE
            axes.text(0.5, y, line, color=color, size=FONT_SIZE, ha="center", va="top", **_plain(axes))
    _save(figure, path)


def draw_loss(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the losses (nats a token, logarithmic) and the held-out exact match over the steps.

    Args:
        metrics: lines with a `step`, and any of `loss`, `held_out_loss` and `held_out_exact_match` (0..1). What is no
            finite number is left out, and so are losses that are not above 0.
        path: of the PNG.

    Raises:
        OSError: `path` cannot be written.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    drawn = []

    steps, losses = _points(metrics, "loss")
    window = max(1, len(losses) // 50)
    if window > 1:
        axes.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=0.6)
    smoothed = f" (smoothed over {window} steps)" if window > 1 else ""
    if steps:
        drawn += _plot(axes, steps, _smooth(losses, window), BLUE, f"training loss{smoothed}", dots=len(steps) == 1)
    steps, losses = _points(metrics, "held_out_loss")
    if steps:
        drawn += _plot(axes, steps, losses, VIOLET, "held-out loss", dots=len(steps) <= 50)
    if drawn:
        axes.set_yscale("log")
        lowest, highest = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if highest > 5 * lowest else MaxNLocator(6))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value.is_integer() else ""))
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("loss (nats a token)", color=INK)
    axes.grid(color="#d8dee4", linewidth=0.6)

    steps, matches = _points(metrics, "held_out_exact_match", positive=False)
    if steps:
        right = axes.twinx()
        drawn += _plot(right, steps, matches, ORANGE, "held-out exact match", dots=len(steps) <= 50)
        right.set(ylabel="held-out exact match", ylim=(-0.02, 1.02))
        right.yaxis.set_major_formatter(PercentFormatter(1))
        right.yaxis.label.set_color(ORANGE)
    for each in figure.axes:
        each.spines[:].set_visible(False)
        each.tick_params(which="both", length=0, labelcolor=GREY)
    if drawn:
        figure.legend(handles=drawn, loc="outside upper center", ncols=len(drawn), frameon=False, labelcolor=INK)
    _save(figure, path)


@_any_script()
def draw_attention(img: Tensor, words: Sequence[str], maps: Tensor, path: Path) -> None:
    """Draw an image, and again for each word, dark but where the word's attention is.

    Args:
        img: `(c, h, w)` in 0..1, of 1 channel or of 3 or more.
        words: what was generated; may be none.
        maps: `(number of words, rows, columns)`, the share of attention of each patch, as
            `palme_xt.captioner.attention.word_maps` returns them. Each panel is coloured from 0 to its own largest
            share, which is written above it.
        path: of the PNG, ending in .png.

    Raises:
        ValueError: `maps` has the wrong shape, or `path` another ending.
        OSError: `path` cannot be written.
    """
    if maps.ndim != 3 or len(maps) != len(words):
        raise ValueError(
            f"maps has shape {tuple(maps.shape)}, must be (number of words, rows, columns) for {len(words)} words: "
            "pass what word_maps returns"
        )
    if not path.name.lower().endswith(".png"):
        raise ValueError(f"path={path} must end in .png: no other format is written")
    count = 1 + len(words)
    side = SIDE if count <= 12 else SMALLER_SIDE
    columns = min(count, max(5, math.ceil(math.sqrt(1.3 * count))))
    title = "Where the model looks, word by word" if words else "Nothing was generated"
    foot = 0.5 if words else 0
    figure, panels = _panels(count, columns, side, gap=GAP, title=title, above=2 * GAP, foot=foot)
    picture = _shown(img)
    _show(panels[0], picture)
    for axes, word, heat in zip(panels[1:], words, maps.detach().float().cpu(), strict=True):
        largest = float(heat.max())
        _show(axes, _heated(picture, heat / max(largest, torch.finfo(heat.dtype).tiny)))
        y = 1 + 0.07 / side
        (line,) = _lines(word, side - 0.4, most=1) or [""]
        axes.text(0, y, line, color=INK, size=FONT_SIZE + 1, weight="bold", **_plain(axes))
        axes.text(1, y, f"{largest:.0%}", color=GREY, size=FONT_SIZE, ha="right", **_plain(axes))
    if words:
        width, height = figure.get_size_inches()
        bar = figure.add_axes((MARGIN / width, 0.3 / height, 1.2 / width, 0.1 / height))
        colors = figure.colorbar(ScalarMappable(cmap=HEAT), cax=bar, orientation="horizontal", ticks=[])
        colors.outline.set_visible(False)
        scale = "attention to a patch: from 0 to the largest of the panel, in %"
        bar.text(1.06, 0.5, scale, color=GREY, size=FONT_SIZE, va="center", **_plain(bar))
    _save(figure, path)


def _heated(picture: Tensor, heat: Tensor) -> Tensor:
    """A picture `(h, w)` or `(h, w, 3)`, darkened, under heat `(rows, columns)` in 0..1, as `(h', w', 3)`."""
    grey = picture if picture.ndim == 2 else picture @ torch.tensor([0.299, 0.587, 0.114])
    size = [side * math.ceil(320 / side) for side in grey.shape]
    grey = F.interpolate(grey[None, None], size, mode="nearest")[0, 0, ..., None]
    smooth = F.interpolate(heat[None, None], size, mode="bilinear")[0, 0, ..., None]
    color = torch.from_numpy(HEAT(smooth[..., 0].numpy())[..., :3]).float()
    return torch.lerp(0.08 + 0.5 * grey, color, 0.2 + 0.55 * smooth)


def _shown(pixels: Tensor) -> Tensor:
    """`(c, h, w)` as a grey `(h, w)` or a coloured `(h, w, 3)` picture."""
    pixels = pixels.detach().float().cpu()
    return (pixels[:3].movedim(0, -1) if len(pixels) >= 3 else pixels[0]).clamp(0, 1)


def _panels(
    count: int,
    columns: int,
    side: float,
    *,
    gap: float,
    title: str,
    above: float = 0,
    below: Sequence[float] = (),
    foot: float = 0,
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` square axes, `columns` in a row; lengths in inches, `below` each what there is to be."""
    firsts = range(0, count, columns)
    heights = [above + side + max(below[first : first + columns], default=0) + GAP for first in firsts]
    width = max(4.0, 2 * MARGIN + columns * (side + gap) - gap)
    height = TITLE + sum(heights) + foot
    figure = Figure(figsize=(width, height))
    figure.text(MARGIN / width, 1 - 0.2 / height, title, size=13, weight="bold", color=INK, va="top")
    panels = []
    for number in range(count):
        row, column = divmod(number, columns)
        left = MARGIN + column * (side + gap)
        bottom = height - TITLE - sum(heights[:row]) - above - side
        panels.append(figure.add_axes((left / width, bottom / height, side / width, side / height)))
    return figure, panels


def _show(axes: Axes, picture: Tensor) -> None:
    small = max(picture.shape[:2]) <= 128
    axes.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest" if small else "antialiased")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color="#d0d7de", linewidth=0.8)


def _plain(axes: Axes) -> dict[str, Any]:
    return {"transform": axes.transAxes, "parse_math": False}


def _lines(text: str, room: float, most: int = 3) -> list[str]:
    """The text in at most so many lines that fit in `room` inches, by clauses if they do; cut with an ellipsis."""
    text = printable(text)
    font = FontProperties(size=FONT_SIZE + 1, weight="bold") if most == 1 else FontProperties(size=FONT_SIZE)
    lines: list[str] = []
    for width in range(44, 3, -1):
        lines = [line for clause in re.split("(?<=,) ", text) for line in textwrap.wrap(clause, width)]
        if len(lines) > most:
            lines = textwrap.wrap(text, width)
        if len(lines) > most:
            lines = [*lines[: most - 1], lines[most - 1][: width - 1] + "…"]
        if all(text_to_path.get_text_width_height_descent(line, font, False)[0] <= 72 * room for line in lines):
            break
    return lines


def _points(metrics: Sequence[dict[str, Any]], name: str, positive: bool = True) -> tuple[list[float], list[float]]:
    """Steps and values of the lines that have a finite number, and with `positive` one above 0, of that name."""
    points = [
        (line["step"], line[name])
        for line in metrics
        if isinstance(line.get(name), int | float) and math.isfinite(line[name]) and not (positive and line[name] <= 0)
    ]
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """The running geometric mean; at the start, which is steep, over as few values after as before."""
    sums = np.cumsum([0.0, *np.log(values)])
    index = np.arange(len(values))
    before = np.minimum(index, window // 2)
    after = np.minimum(index[::-1], before)
    means: list[float] = np.exp((sums[index + after + 1] - sums[index - before]) / (before + after + 1)).tolist()
    return means


def _plot(axes: Axes, steps: list[float], values: list[float], color: str, label: str, *, dots: bool) -> list[Any]:
    return axes.plot(steps, values, color=color, linewidth=1.8, label=label, marker="o" if dots else None, markersize=4)


def _save(figure: Figure, path: Path) -> None:
    """Write a PNG whole or not at all."""
    if path.is_dir():  # '', '.' and '/' have no name to write beside
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=DPI)
    new = path.with_name(path.name + ".new")
    try:
        new.write_bytes(png.getvalue())
        new.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            new.unlink()
