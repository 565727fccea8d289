"""Vary training images a little, so that a model cannot learn them by heart."""

import random

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

SMALLEST_SIDE = 0.8
DEGREES = 10
STRENGTHS = (0.7, 1.3)


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
