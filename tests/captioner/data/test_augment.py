"""Training images are varied anew in each epoch, the same in every process, and never mirrored."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from palme_xt.captioner.data.augment import varied
from palme_xt.captioner.data.batches import Defect, Example, Source
from palme_xt.captioner.turns import Text
from tests.captioner.captioned import picture


class Rows(Source):
    """Three rows, the last of them unusable, epoch after epoch."""

    rows_per_epoch = 3

    def row(self, number: int) -> Example | Defect:
        img = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        rows: list[Example | Defect] = [
            Example(img[None], "0", [picture(0)[1]], [Text([1, 2], [False, True])]),
            Example(img[None].flip(-1), "1", [picture(1)[1]], [Text([1, 3], [False, True])], turn=1),
            Defect("broken image", "2 is broken", "2"),
        ]
        return rows[number % 3]


def augmented(seed: int) -> Rows:
    rows = Rows()
    rows.augment_seed = seed
    return rows


def images(source: Source, numbers: range) -> list[torch.Tensor]:
    return [row.imgs for row in source.read(numbers) if isinstance(row, Example)]


def test_a_variation_depends_only_on_the_seed_and_the_number() -> None:
    together = images(augmented(0), range(9))
    one_by_one = [img for number in range(9) for img in images(augmented(0), range(number, number + 1))]
    assert all(map(torch.equal, together, one_by_one))
    assert not any(map(torch.equal, together, images(augmented(1), range(9))))
    assert not any(map(torch.equal, together, images(Rows(), range(9))))
    assert not any(torch.equal(*pair) for pair in pairwise(together[::2]))  # the same image, epoch after epoch


def test_all_else_is_that_of_the_source() -> None:
    for row, original in zip(augmented(0).read(range(3)), Rows().read(range(3)), strict=True):
        if isinstance(row, Example):
            assert isinstance(original, Example)
            assert replace(row, imgs=original.imgs) == original
        else:
            assert row == original


@pytest.mark.parametrize("count", [0, 1, 2])
def test_each_image_of_a_row_is_varied(count: int) -> None:
    class Several(Rows):
        def row(self, number: int) -> Example | Defect:
            row = super().row(0)
            assert isinstance(row, Example)
            return replace(row, imgs=row.imgs[0].expand(count, -1, -1, -1))

    source = Several()
    source.augment_seed = 0
    (found,) = images(source, range(1))
    (alone,) = images(augmented(0), range(1))
    assert found.shape == (count, 3, 16, 16)
    assert torch.equal(found[:1], alone[:count])
    assert count < 2 or not torch.equal(found[0], found[1])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_keep_their_size_and_are_not_mirrored(channels: int) -> None:
    img = torch.zeros(channels, 32, 32, dtype=torch.uint8)
    img[:, :, :16] = 200
    img[:, :8, :16] = 90
    for seed in range(50):
        found = varied(img, random.Random(seed))
        assert (found.shape, found.dtype) == (img.shape, img.dtype)
        colours = found[:3].float()
        # The top left is darker than the bottom left, and the right is black: no other turn of the image is alike.
        assert colours[:, 20:28, 2:10].mean() > colours[:, 1:4, 2:10].mean() + 20 > 40
        assert colours[:, 20:28, 2:10].mean() > colours[:, :, 24:].mean() + 60


def test_edges_are_continued() -> None:
    white = torch.full((3, 16, 16), 200, dtype=torch.uint8)
    for seed in range(20):
        found = varied(white, random.Random(seed))
        assert found.unique().numel() == 1  # no black corners
