"""Vary training images a little, so that a model cannot learn them by heart."""

import random
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from palme_xt.captioner.data.batches import Defect, Example, Source

SMALLEST_SIDE = 0.8
DEGREES = 10
STRENGTHS = (0.7, 1.3)


class Augmented(Source):
    """The rows of another source, whose images are varied.

    The variation of an image depends only on the seed and the number of the row, which counts over all epochs. It is
    therefore a new one in each epoch, and the same for any number of processes and workers and in a resumed run.
    """

    def __init__(self, source: Source, seed: int) -> None:
        self.source, self.seed = source, seed

    @property
    def rows_per_epoch(self) -> float:  # type: ignore[override]  # known only after the first epoch of a stream
        """Number of rows in an epoch of the source."""
        return self.source.rows_per_epoch

    def fingerprint(self) -> str:
        """Return the digest of the source."""
        return self.source.fingerprint()

    def row(self, number: int) -> Example | Defect:
        """Return the row with this number, as `Source.row` does."""
        row, draw = self.source.row(number), random.Random(f"{self.seed} {number}")
        return row if isinstance(row, Defect) else replace(row, img=varied(row.img, draw))


def varied(img: Tensor, draw: random.Random) -> Tensor:
    """Return an image `(c, h, w)`, uint8, h = w, rotated, cropped and with other colours, in the same size.

    It is rotated by up to 10 degrees and cropped to 0.8 to 1 of its side; its brightness, contrast and saturation are
    multiplied by 0.7 to 1.3. It is never mirrored, because captions speak of left and right. Pillow computes in
    one thread, so that the result does not depend on the number of threads.
    """
    size, margin = img.shape[-1], -(-img.shape[-1] // 4)  # a rotated crop reaches beyond the image
    edges = np.pad(img.movedim(0, -1).numpy(), ((margin, margin), (margin, margin), (0, 0)), "edge")
    image = Image.fromarray(edges.squeeze(-1) if len(img) == 1 else edges)
    image = image.rotate(draw.uniform(-DEGREES, DEGREES), Image.Resampling.BILINEAR)
    side = size * draw.uniform(SMALLEST_SIDE, 1)
    left, top = (margin + draw.uniform(0, size - side) for _ in range(2))
    image = image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    for enhance in ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color:
        image = enhance(image).enhance(draw.uniform(*STRENGTHS))
    return torch.from_numpy(np.array(image)).reshape(size, size, len(img)).movedim(-1, 0)
