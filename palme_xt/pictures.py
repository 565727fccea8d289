"""Training at a glance: held-out images with their captions, and the loss curve."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from palme_xt.tokens import printable

COLUMNS = 4
ROWS = 4


def save_images(img: Tensor, folder: Path) -> None:
    """Write images `(b, c, h, w)` in 0..1 as `folder/00.png`, `folder/01.png`, ..."""
    folder.mkdir(exist_ok=True)
    for number, pixels in enumerate(img):
        Image.fromarray(_shown(pixels).mul(255).round().byte().numpy()).save(folder / f"{number:02}.png")


def _shown(pixels: Tensor) -> Tensor:
    """`(c, h, w)` as a grey `(h, w)` or a coloured `(h, w, 3)` picture."""
    return (pixels[:3].movedim(0, -1) if len(pixels) >= 3 else pixels[0]).clamp(0, 1)


def draw_samples(img: Tensor, predicted: Sequence[str], true: Sequence[str], path: Path) -> None:
    """Draw the first images `(b, c, h, w)` above their predicted captions; where one is wrong, with the true one."""
    figure = Figure(figsize=(3.4 * COLUMNS, 3.2 * ROWS), layout="constrained")
    for axes in (grid := figure.subplots(ROWS, COLUMNS)).flat:
        axes.axis("off")
    for axes, pixels, guess, truth in zip(grid.flat, img, predicted, true, strict=False):
        axes.imshow(_shown(pixels).numpy(), cmap="gray", vmin=0, vmax=1)
        right = guess == truth
        text = printable(guess) if right else f"{printable(guess)}\n(true: {truth})"
        color = "darkgreen" if right else "firebrick"
        axes.set_title(text.replace(", ", ",\n"), color=color, fontsize=9, parse_math=False)
    matches = sum(map(str.__eq__, predicted, true))
    figure.suptitle(f"Held-out images and their generated captions: {matches} of {len(true)} exactly right")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # an untrained model writes in every script
        figure.savefig(path, dpi=100)


def draw_loss(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the training loss (nats a byte, logarithmic) and the held-out exact match over the steps."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    losses = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    if losses:
        axes.plot(*zip(*losses, strict=True), color="tab:blue", linewidth=1)
    axes.set(xlabel="step", ylabel="training loss (nats a byte)", yscale="log")
    axes.yaxis.label.set_color("tab:blue")
    matches = [(line["step"], line["held_out_exact_match"]) for line in metrics if "held_out_exact_match" in line]
    right = axes.twinx()
    right.plot(*zip(*matches, strict=True), color="tab:orange", marker="o")
    right.set(ylabel="held-out exact match", ylim=(0, 1.02))
    right.yaxis.label.set_color("tab:orange")
    figure.savefig(path, dpi=100)
