"""Compose captioned scenes of real handwritten digits, the default data of `palme-xt train`.

The digits are the 1,797 scans of 8x8 pixels that scikit-learn ships (`load_digits`; E. Alpaydin and C. Kaynak,
"Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998, doi:10.24432/C50P49). A scene holds
one to three of them in the quarters of a square; its caption names them in reading order.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from sklearn.datasets import load_digits
from torch import Tensor

from palme_xt.captioner.data.batches import Example, Source, positions
from palme_xt.captioner.tokenizer import Tokenizer
from palme_xt.captioner.turns import IMAGE, Turn, written
from palme_xt.config import PalmEConfig

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUARTERS = ("top left", "top right", "bottom left", "bottom right")
LONGEST_CAPTION = ", ".join(f"three {quarter}" for quarter in QUARTERS[1:])
HELD_OUT_SHARE = 0.2


class Scans(NamedTuple):
    """Scans of single digits: `pixels` `(n, 8, 8)`, float32 in 0..1, and `labels` `(n,)`, int64."""

    pixels: Tensor
    labels: Tensor


def load_scans() -> tuple[Scans, Scans]:
    """Return the scans to train on and the held-out scans: disjoint, and always the same."""
    digits = load_digits()
    pixels = torch.from_numpy(digits.images).float() / 16
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, train = order.tensor_split([int(HELD_OUT_SHARE * len(labels))])
    return Scans(pixels[train], labels[train]), Scans(pixels[held_out], labels[held_out])


def compose(
    scans: Scans, count: int, *, image_size: int, channels: int = 1, jitter: float = 0.0, generator: torch.Generator
) -> tuple[Tensor, list[str]]:
    """Return `count` random scenes and their captions.

    Args:
        scans: The digits to choose from.
        count: Number of scenes.
        image_size: Height and width in pixels.
        channels: Number of channels, which are all equal.
        jitter: Largest movement, rotation (in radians), scaling and shearing of each digit, as a share of its size.
        generator: The source of all randomness.

    Returns:
        Images `(count, channels, image_size, image_size)`, float32 in 0..1, and `count` captions such as
        `six top left, three bottom right`.
    """
    wanted = torch.randint(1, 4, (count, 1), generator=generator)
    taken = torch.rand(count, len(QUARTERS), generator=generator).argsort(dim=1) < wanted
    chosen = torch.randint(len(scans.labels), (int(taken.sum()),), generator=generator)

    quarter = image_size // 2
    cells = torch.zeros(count, len(QUARTERS), quarter, quarter)
    cells[taken] = _draw(scans.pixels[chosen], quarter, jitter, generator)
    scenes = rearrange(cells, "n (r c) h w -> n (r h) (c w)", r=2)
    img = F.pad(scenes, (0, image_size % 2, 0, image_size % 2))

    names: list[list[str]] = [[] for _ in range(count)]
    for (scene, cell), label in zip(taken.nonzero().tolist(), scans.labels[chosen].tolist(), strict=True):
        names[scene].append(f"{NAMES[label]} {QUARTERS[cell]}")
    return img[:, None].expand(-1, channels, -1, -1).contiguous(), [", ".join(parts) for parts in names]


def _draw(pixels: Tensor, size: int, jitter: float, generator: torch.Generator) -> Tensor:
    noise = jitter * (2 * torch.rand(len(pixels), 2, 3, generator=generator) - 1)
    identity = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    grid = F.affine_grid(identity + noise, [len(pixels), 1, size, size], align_corners=False)
    return F.grid_sample(pixels[:, None], grid, align_corners=False)[:, 0]


class Scenes(Source):
    """An endless sequence of scenes. A scene and its caption depend only on `seed`, `block` and their number.

    Args:
        scans: The digits to choose from.
        config: The model that learns from the scenes.
        tokenizer: The tokenizer of the captions.
        block: Number of scenes composed at once.
        seed: Seed of the random choices.
        jitter: As in `compose`.

    Raises:
        ValueError: If the model's images are too small for digits, or its texts too short for the longest caption.
    """

    def __init__(
        self, scans: Scans, config: PalmEConfig, tokenizer: Tokenizer, *, block: int, seed: int, jitter: float = 0.0
    ) -> None:
        self._write = partial(written, tokenizer=tokenizer, image_token=config.image_token)
        longest = positions(self._write([Turn(IMAGE, LONGEST_CAPTION)]).ids, config)
        if config.max_seq_len < longest:
            raise ValueError(f"max_seq_len={config.max_seq_len} must be at least {longest} for the longest caption")
        if config.image_size < 8:
            raise ValueError(f"image_size={config.image_size} must be at least 8 pixels to show digits")
        self.block, self.seed = block, seed
        size, channels = config.image_size, config.channels
        self._draw = partial(compose, scans, block, image_size=size, channels=channels, jitter=jitter)
        self._drawn: tuple[int, Tensor, list[str]] = (-1, torch.empty(0), [])

    def row(self, number: int) -> Example:
        """Return the scene with this number, as `Source.row` does."""
        block, place = divmod(number, self.block)
        if self._drawn[0] != block:
            # Each block has its own generator: numpy mixes the two numbers into a seed that hardly any other pair has.
            mixed = int(np.random.SeedSequence([self.seed, block]).generate_state(1, np.uint64)[0])
            self._drawn = block, *self._draw(generator=torch.Generator().manual_seed(mixed % 2**63))
        _, img, captions = self._drawn
        caption = captions[place]
        return Example(img[place, None], f"scene {number}", [caption], [self._write([Turn(IMAGE, caption)])])
