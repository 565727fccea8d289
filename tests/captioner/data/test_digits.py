"""The digits: real scans, none of them both trained on and held out, and captions that describe the scenes."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

from palme_xt import tokens
from palme_xt.captioner.data.digits import NAMES, QUARTERS, compose, load_scans


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_scan_is_on_exactly_one_side() -> None:
    train, held_out = load_scans()
    pixels = torch.cat([train.pixels, held_out.pixels]).flatten(1)
    assert pixels.shape == (1797, 64)
    assert len(held_out.labels) == 359
    assert len(pixels.unique(dim=0)) == 1797  # no scan occurs twice, so none is on both sides
    everything = torch.from_numpy(load_digits().images).float().flatten(1) / 16
    assert torch.equal(pixels.unique(dim=0), everything.unique(dim=0))
    again, _ = load_scans()
    assert torch.equal(again.pixels, train.pixels)


def test_the_caption_tells_what_is_where() -> None:
    scans, _ = load_scans()
    img, captions = compose(scans, 200, image_size=32, generator=seeded())
    assert img.shape == (200, 1, 32, 32)
    assert 0 <= img.min() < img.max() <= 1
    counts = set()
    for pixels, caption in zip(img[:, 0], captions, strict=True):
        quarters = dict(zip(QUARTERS, (pixels[r : r + 16, c : c + 16] for r in (0, 16) for c in (0, 16)), strict=True))
        parts = [part.split(" ", 1) for part in caption.split(", ")]
        shown = [quarter for quarter in QUARTERS if quarters[quarter].any()]
        assert [quarter for _, quarter in parts] == shown  # in reading order
        assert all(name in NAMES for name, _ in parts)
        counts.add(len(parts))
    assert counts == {1, 2, 3}


def test_the_name_is_the_scan_s_label() -> None:
    _, scans = load_scans()
    img, captions = compose(scans, 50, image_size=16, generator=seeded())  # 8x8 quarters: the scans themselves
    for pixels, caption in zip(img[:, 0], captions, strict=True):
        for part in caption.split(", "):
            name, quarter = part.split(" ", 1)
            row, column = divmod(QUARTERS.index(quarter), 2)
            scan = pixels[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            nearest = (scans.pixels - scan).flatten(1).norm(dim=1).argmin()
            assert NAMES[int(scans.labels[nearest])] == name


def test_the_generator_decides_everything() -> None:
    scans, _ = load_scans()
    first, second, other = (compose(scans, 5, image_size=32, jitter=0.1, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]
    assert first[1] != other[1]


def test_jitter_moves_the_digits() -> None:
    scans, _ = load_scans()
    still, moved = (compose(scans, 5, image_size=32, jitter=jitter, generator=seeded()) for jitter in (0.0, 0.1))
    assert still[1] == moved[1]
    assert not torch.equal(still[0], moved[0])


@pytest.mark.parametrize(("image_size", "channels"), [(33, 1), (64, 3), (8, 4)])
def test_scenes_of_any_size_and_channels(image_size: int, channels: int) -> None:
    scans, _ = load_scans()
    img, _ = compose(scans, 3, image_size=image_size, channels=channels, generator=seeded())
    assert img.shape == (3, channels, image_size, image_size)
    assert torch.equal(img[:, 0], img[:, -1])


@pytest.mark.parametrize("text", ["", "six top left", "Größe: 3 €", "日本語"])
def test_bytes_there_and_back(text: str) -> None:
    ids = tokens.encode([text, "a longer text than the other"])
    assert ids[0, 0] == tokens.BOS
    assert ids.max() < tokens.NUM_TOKENS
    assert tokens.decode(ids[0].tolist()) == text


def test_padding_is_ignored_and_rubbish_is_readable() -> None:
    ids = tokens.encode(["ab", "abcd"], ignore_index=-7)
    assert ids.tolist() == [[256, 97, 98, 257, -7, -7], [256, 97, 98, 99, 100, 257]]
    assert tokens.decode([97, 256, 300, -1, 255, 98, 257, 99]) == "a\ufffdb"
