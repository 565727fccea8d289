"""Draw captioned images, the loss curve, and where in an image a model looks."""

import math
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from torch import Tensor

from palme_xt.captioner.images import unit_range
from palme_xt.storage.files import replace_files
from palme_xt.tokens import printable

COLUMNS, ROWS = 4, 4
WIDTH, WORD_WIDTH = 27, 13  # in characters, of the lines of a caption, and of a word above a panel

# In inches, except for DPI and FONT_SIZE. A panel is 256 pixels wide, a multiple of the widths of most small images.
DPI, SIDE, MARGIN, TITLE, GAP, LINE, FONT_SIZE = 160, 1.6, 0.25, 0.55, 0.15, 25 / 160, 9

RIGHT, WRONG, GREY, INK = "#1a7f37", "#cf222e", "#6e7781", "#24292f"
BLUE, VIOLET, ORANGE, GREEN, PALE = "#0969da", "#8250df", "#bc4c00", "#1a7f37", "#d0d7de"


def draw_samples(img: Tensor, predicted: Sequence[str], true: Sequence[Sequence[str]], path: Path) -> None:
    """Draw the first 16 images above their predicted captions: green if right, otherwise red and above a true one.

    Args:
        img: Images `(b, c, h, w)`, uint8 or floating point in 0..1, with 1 channel, or 3 or more.
        predicted: The generated captions. The title also counts those without an image in `img`.
        true: The true captions of each image, one or more. The first of them is drawn.
        path: The PNG file to write.

    Raises:
        OSError: If `path` cannot be written.
    """
    captions = []
    for guess, truth in list(zip(predicted, true, strict=True))[: min(len(img), COLUMNS * ROWS)]:
        lines = [(line, RIGHT if guess in truth else WRONG) for line in _wrap(guess or "(nothing)", WIDTH)]
        captions.append(lines if guess in truth else lines + [(line, GREY) for line in _wrap(truth[0], WIDTH)])
    matches = sum(guess in truth for guess, truth in zip(predicted, true, strict=True))
    title = f"Held-out images and their generated captions: {matches} of {len(true)} exactly right"
    below = LINE * max(map(len, captions), default=0) + 1.5 * GAP
    figure, panels = _panels(len(captions), COLUMNS, title, 4 * GAP, above=0, below=below)
    for axes, pixels, caption in zip(panels, img, captions, strict=False):
        _show(axes, _channels_last(pixels))
        for number, (line, color) in enumerate(caption):
            _write(axes, 0.5, -(0.08 + LINE * number) / SIDE, line, color, ha="center", va="top")
    _save(figure, path)


def draw_loss(metrics: Sequence[dict[str, Any]], path: Path, saved: int | None = None) -> None:
    """Draw the losses, in nats per token on a logarithmic scale, and the held-out scores over the steps.

    Args:
        metrics: Lines with a `step`, and any of `loss`, `held_out_loss`, `held_out_exact_match` (0..1) and
            `held_out_chrf` (0..100). Values that are not finite numbers are left out, and so are losses that are not
            greater than 0.
        path: The PNG file to write.
        saved: The step whose weights are saved, which is marked.

    Raises:
        OSError: If `path` cannot be written.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(yscale="log", xlabel="step", ylabel="loss (nats per token)", frame_on=False)
    steps, losses = _points(metrics, "loss")
    axes.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=0.6)
    window = max(1, len(losses) // 50)
    smoothed = f" (smoothed over {window} steps)" if window > 1 else ""
    curves = _plot(axes, steps, _smooth(losses, window), BLUE, f"training loss{smoothed}")
    curves += _plot(axes, *_points(metrics, "held_out_loss"), VIOLET, "held-out loss")
    ticks = MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])
    axes.xaxis.set(major_locator=ticks, major_formatter="{x:,.0f}")
    axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator(), major_formatter="{x:.4g}")
    axes.grid(color=PALE, linewidth=0.6)
    right = axes.twinx()
    steps, shares = _points(metrics, "held_out_exact_match", above=-1)
    curves += _plot(right, steps, [100 * share for share in shares], ORANGE, "held-out exact match (%)")
    curves += _plot(right, *_points(metrics, "held_out_chrf", above=-1), GREEN, "held-out chrF")
    if saved is not None:
        label = f"saved weights (step {saved:,})"
        curves.append(axes.axvline(saved, color=GREY, linestyle="--", zorder=1.9, label=label))
    right.set(ylabel="exact match (%), chrF", ylim=(-2, 102), frame_on=False)
    for each in axes, right:
        each.tick_params(length=0, labelcolor=GREY)
    figure.legend(handles=curves, loc="outside upper center", ncols=3, frameon=False)
    _save(figure, path)


def draw_attention(img: Tensor, words: Sequence[str], maps: Tensor, path: Path) -> None:
    """Draw an image, and once more for each word, darkened except where the word's attention is.

    Args:
        img: An image `(c, h, w)`, uint8 or floating point in 0..1, with 1 channel, or 3 or more.
        words: The generated words; there may be none.
        maps: `(number of words, rows, columns)`, the share of attention that each patch gets, as
            `palme_xt.captioner.attention.word_maps` returns them. The colours of a panel go from 0 to its own largest
            share, which is written above it.
        path: The PNG file to write.

    Raises:
        ValueError: If `maps` has the wrong shape.
        OSError: If `path` cannot be written.
    """
    if maps.ndim != 3 or len(maps) != len(words):
        rule = f"must be (number of words, rows, columns) for {len(words)} words: pass what word_maps returns"
        raise ValueError(f"maps has shape {tuple(maps.shape)}, {rule}")
    count = 1 + len(words)
    columns = min(count, max(5, math.ceil(math.sqrt(1.3 * count))))
    title = "Where the model looks, word by word" if words else "Nothing was generated"
    figure, panels = _panels(count, columns, title, GAP, above=0.25, below=0.25)
    image = _channels_last(img)
    _show(panels[0], image)
    grey = image if image.ndim == 2 else image @ torch.tensor([0.299, 0.587, 0.114])
    for axes, word, heat in zip(panels[1:], words, maps.detach().float().cpu().numpy(), strict=True):
        share = heat / (heat.max() or 1)
        _show(axes, 0.08 + 0.5 * grey)
        axes.imshow(share, "inferno", vmin=0, alpha=0.2 + 0.55 * share, interpolation="bilinear", extent=(0, 1, 0, 1))
        _write(axes, 0, 1.05, "".join(_wrap(word, WORD_WIDTH, most=1)), INK, weight="bold")
        _write(axes, 1, 1.05, f"{heat.max():.0%}", GREY, ha="right")
    if words:
        corner = panels[len(words) // columns * columns]
        bar = corner.inset_axes((0, -0.12, 0.7, 0.06), xticks=[], yticks=[], frame_on=False)
        bar.imshow([range(256)], "inferno", aspect="auto")
        _write(corner, 0.75, -0.09, "attention to a patch, from 0 to the share above the panel", GREY, va="center")
    _save(figure, path)


def _channels_last(pixels: Tensor) -> Tensor:
    """Return an image `(c, h, w)` as a grey one `(h, w)` or a coloured one `(h, w, 3)`, float32 in 0..1."""
    pixels = unit_range(pixels.detach().cpu()).clamp(0, 1)
    return pixels[:3].movedim(0, -1) if len(pixels) >= 3 else pixels[0]


def _panels(count: int, columns: int, title: str, gap: float, above: float, below: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` square axes, `columns` in a row; lengths are in inches."""
    rows = math.ceil(count / columns)
    panels = columns * (SIDE + gap) - gap
    width, height = max(5.2, panels + 2 * MARGIN), TITLE + rows * (above + SIDE + below)
    figure = Figure(figsize=(width, height))
    figure.text(MARGIN / width, 1 - 0.2 / height, title, size=13, weight="bold", color=INK, va="top")
    if count:
        left, right = MARGIN / width, (MARGIN + panels) / width
        bottom, top = below / height, 1 - (TITLE + above) / height
        figure.subplots_adjust(left, bottom, right, top, wspace=gap / SIDE, hspace=(above + below) / SIDE)
    return figure, [figure.add_subplot(rows, columns, number + 1, xticks=[], yticks=[]) for number in range(count)]


def _show(axes: Axes, image: Tensor) -> None:
    axes.imshow(image.numpy(), "gray", vmin=0, vmax=1, extent=(0, 1, 0, 1))
    axes.spines[:].set(color=PALE, linewidth=0.8)


def _write(axes: Axes, x: float, y: float, text: str, color: str, **where: Any) -> None:
    axes.text(x, y, text, color=color, size=FONT_SIZE, transform=axes.transAxes, parse_math=False, **where)


def _wrap(text: str, width: int, most: int = 3) -> list[str]:
    """Return at most `most` lines of `width` characters, one per clause if possible, cut with an ellipsis."""
    text = printable(text)
    clauses = [line for clause in text.replace(", ", ",\n").split("\n") for line in textwrap.wrap(clause, width)]
    lines = clauses if len(clauses) <= most else textwrap.wrap(text, width)
    return lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1][: width - 1] + "…"]


def _points(metrics: Sequence[dict[str, Any]], name: str, above: float = 0) -> tuple[list[float], list[float]]:
    """Return the steps and the values of the lines in which `name` is a finite number greater than `above`."""
    lines = [line for line in metrics if isinstance(line.get(name), int | float) and above < line[name] < math.inf]
    return [line["step"] for line in lines], [line[name] for line in lines]


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Return the running geometric mean. At the start, where losses fall steeply, the window is smaller and grows."""
    logs, half = torch.tensor(values, dtype=torch.float64).log(), window // 2
    return [logs[max(0, i - half) : i + min(i, half) + 1].mean().exp().item() for i in range(len(logs))]


def _plot(axes: Axes, steps: list[float], values: list[float], color: str, label: str) -> list[Any]:
    marker = "o" if len(steps) <= 50 else None
    return axes.plot(steps, values, color=color, label=label, linewidth=1.8, marker=marker, ms=4) if steps else []


def _save(figure: Figure, path: Path) -> None:
    """Write a PNG file completely or not at all."""
    try:
        with warnings.catch_warnings(action="ignore"):
            replace_files(path.parent, {path.name: lambda new: figure.savefig(new, format="png", dpi=DPI)})
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
