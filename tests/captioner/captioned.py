"""Captioned images in a folder, as a user has them, some of them broken."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220)}
SHAPES = ("square", "wide stripe", "tall stripe, all the way from the top to the bottom")
KINDS_OF_DEFECTS = (
    *("broken image", "caption longer than the model", "empty caption", "missing image", "unusable image"),
)
TINY = [
    *("--image_size=16", "--patch_size=8", "--max_seq_len=80", "--eval_images=6", "--num_workers=0"),
    *("--encoder_dim=16", "--decoder_dim=16", "--encoder_depth=2", "--decoder_depth=2"),
]


def picture(number: int) -> tuple[Image.Image, str]:
    """Return a coloured shape on noise, and its caption. Captions have very different lengths."""
    noise = np.random.default_rng(number)
    pixels = noise.integers(0, 60, (20, 24, 3), dtype=np.uint8)
    colour, shape = list(COLOURS)[number % 3], SHAPES[number // 3 % 3]
    top, left = noise.integers(1, 8, 2)
    bottom = 20 if shape.startswith("tall") else top + 8
    pixels[top:bottom, left : 24 if shape.startswith("wide") else left + 8] = COLOURS[colour]
    return Image.fromarray(pixels), f"{colour} {shape} {number}"


def content(number: int) -> bytes:
    """Return an image as a PNG file."""
    file = io.BytesIO()
    picture(number)[0].save(file, "PNG")
    return file.getvalue()


def write_folder(folder: Path, count: int) -> Path:
    """Write a new folder in the imagefolder format."""
    folder.mkdir()
    rows = []
    for number in range(count):
        (folder / f"{number:03}.png").write_bytes(content(number))
        rows.append({"file_name": f"{number:03}.png", "text": picture(number)[1]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_rows(folder: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write these rows as the captions of a folder of images."""
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def spoil(folder: Path) -> dict[str, int]:
    """Break five rows of a folder, and return how many of each kind."""
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    (folder / rows[0]["file_name"]).unlink()
    (folder / rows[1]["file_name"]).write_bytes(content(1)[:-200])
    (folder / rows[2]["file_name"]).write_text("no picture")
    rows[3]["text"] = "  "
    rows[4]["text"] = "much too long " * 9
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return dict.fromkeys(KINDS_OF_DEFECTS, 1)
