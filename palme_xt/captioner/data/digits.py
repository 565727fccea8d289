"""Compose scenes of real handwritten digits, with captions or questions, the default data of `palme-xt train`.

The digits are the 1,797 scans of 8x8 pixels that scikit-learn ships (`load_digits`; E. Alpaydin and C. Kaynak,
"Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998, doi:10.24432/C50P49). A scene holds
one to three of them in the quarters of a square; its caption names them in reading order. Questions are about one scene
or about two.
"""

import random
from collections.abc import Sequence
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
ORDINALS = ("first", "second")
EMPTY = -1  # instead of a label
LONGEST_CAPTION = ", ".join(f"three {quarter}" for quarter in QUARTERS[1:])
LONGEST_TURN = Turn(f"what is in the second of {IMAGE}{IMAGE}?", LONGEST_CAPTION)
LESSONS = (250, 500)
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
) -> tuple[Tensor, Tensor]:
    """Return `count` random scenes and the digits in them.

    Args:
        scans: The digits to choose from.
        count: Number of scenes.
        image_size: Height and width in pixels.
        channels: Number of channels, which are all equal.
        jitter: Largest movement, rotation (in radians), scaling and shearing of each digit, as a share of its size.
        generator: The source of all randomness.

    Returns:
        Images `(count, channels, image_size, image_size)`, float32 in 0..1, and the digit in each quarter, or `EMPTY`,
        `(count, 4)`, int64.
    """
    wanted = torch.randint(1, 4, (count, 1), generator=generator)
    taken = torch.rand(count, len(QUARTERS), generator=generator).argsort(dim=1) < wanted
    chosen = torch.randint(len(scans.labels), (int(taken.sum()),), generator=generator)

    quarter = image_size // 2
    cells = torch.zeros(count, len(QUARTERS), quarter, quarter)
    cells[taken] = _draw(scans.pixels[chosen], quarter, jitter, generator)
    scenes = rearrange(cells, "n (r c) h w -> n (r h) (c w)", r=2)
    img = F.pad(scenes, (0, image_size % 2, 0, image_size % 2))
    digits = torch.full((count, len(QUARTERS)), EMPTY).masked_scatter(taken, scans.labels[chosen])
    return img[:, None].expand(-1, channels, -1, -1).contiguous(), digits


def describe(digits: Sequence[int]) -> str:
    """Return the caption of a scene with these digits in its quarters, such as `six top left, three bottom right`."""
    places = zip(digits, QUARTERS, strict=True)
    return ", ".join(f"{NAMES[digit]} {quarter}" for digit, quarter in places if digit != EMPTY)


def ask(scenes: Sequence[Sequence[int]], draw: random.Random, *, whole: bool = False) -> Turn:
    """Return a random question, with its answer, about one or two scenes that have these digits.

    If there are two, their order decides which of them a question is about. With `whole`, the question asks for all
    digits in a scene. Its answer names each place before the digit, unlike a caption, because questions do so too.
    """
    which, images = draw.randrange(len(scenes)), IMAGE * len(scenes)
    place = f"the {ORDINALS[which]} of {images}" if len(scenes) == 2 else images
    names = {QUARTERS[at]: NAMES[digit] for at, digit in enumerate(scenes[which]) if digit != EMPTY}
    everything = Turn(f"what is in {place}?", ", ".join(map(" ".join, names.items())))
    if whole:
        return everything
    quarter = draw.choice([*QUARTERS, *names])  # mostly one with a digit
    # Telling digits apart takes the longest to learn, so most questions are about them.
    kinds = [everything] * 3 + [Turn(f"what is {quarter} in {place}?", names.get(quarter, "nothing"))] * 6
    kinds += [Turn(f"how many digits are in {place}?", NAMES[len(names)])] * 2
    if len(scenes) == 2:
        empty = [scene.count(EMPTY) for scene in scenes]
        more = ORDINALS[empty[0] > empty[1]] if empty[0] != empty[1] else "neither"
        kinds += [Turn(f"which has more digits, {IMAGE} or {IMAGE}?", more)] * 3
    return draw.choice(kinds)


def _draw(pixels: Tensor, size: int, jitter: float, generator: torch.Generator) -> Tensor:
    noise = jitter * (2 * torch.rand(len(pixels), 2, 3, generator=generator) - 1)
    identity = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    grid = F.affine_grid(identity + noise, [len(pixels), 1, size, size], align_corners=False)
    return F.grid_sample(pixels[:, None], grid, align_corners=False)[:, 0]


class Scenes(Source):
    """An endless sequence of scenes with captions or questions. A row depends only on `seed`, `block` and its number.

    Args:
        scans: The digits to choose from.
        config: The model that learns from the scenes.
        tokenizer: The tokenizer of the texts.
        block: Number of rows composed at once.
        seed: Seed of the random choices.
        jitter: As in `compose`.
        asked: Whether a row has a question about one scene or two, instead of a scene with its caption.
        lessons: Two numbers of blocks. Before the first, all questions ask for all digits in one scene; before the
            second, all questions are about one scene.

    Raises:
        ValueError: If the model's images are too small for digits, or its texts too short for the longest one.
    """

    def __init__(
        self,
        scans: Scans,
        config: PalmEConfig,
        tokenizer: Tokenizer,
        *,
        block: int,
        seed: int,
        jitter: float = 0.0,
        asked: bool = False,
        lessons: tuple[int, int] = (0, 0),
    ) -> None:
        self._write = partial(written, tokenizer=tokenizer, image_token=config.image_token)
        name, longest = ("question", LONGEST_TURN) if asked else ("caption", Turn(IMAGE, LONGEST_CAPTION))
        if config.max_seq_len < (least := positions(self._write([longest]).ids, config)):
            raise ValueError(f"max_seq_len={config.max_seq_len} must be at least {least} for the longest {name}")
        if config.image_size < 8:
            raise ValueError(f"image_size={config.image_size} must be at least 8 pixels to show digits")
        self.block, self.seed, self.asked, self.lessons = block, seed, asked, lessons
        count, size = block * (2 if asked else 1), config.image_size
        self._compose = partial(compose, scans, count, image_size=size, channels=config.channels, jitter=jitter)
        self._drawn = -1, list[tuple[Tensor, Turn]]()

    def row(self, number: int) -> Example:
        """Return the row with this number, as `Source.row` does."""
        block, place = divmod(number, self.block)
        if self._drawn[0] != block:
            self._drawn = block, self._rows(block)
        imgs, turn = self._drawn[1][place]
        return Example(imgs, f"scene {number}", [turn.answer], [self._write([turn])])

    def _rows(self, block: int) -> list[tuple[Tensor, Turn]]:
        # Each block has its own generator: numpy mixes the two numbers into a seed that hardly any other pair has.
        seed = int(np.random.SeedSequence([self.seed, block]).generate_state(1, np.uint64)[0]) % 2**63
        img, found = self._compose(generator=torch.Generator().manual_seed(seed))
        digits, draw = found.tolist(), random.Random(seed)
        if not self.asked:
            return [(scene[None], Turn(IMAGE, describe(row))) for scene, row in zip(img, digits, strict=True)]
        whole, one = (block < lesson for lesson in self.lessons)
        sizes = [1 if one else draw.choice((1, 1, 1, 2, 2)) for _ in range(self.block)]
        shown = [slice(2 * row, 2 * row + size) for row, size in enumerate(sizes)]
        return [(img[scenes], ask(digits[scenes], draw, whole=whole)) for scenes in shown]
