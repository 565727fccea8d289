"""Images to captions, with a model that was trained on bytes."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from palme_xt import tokens
from palme_xt.config import PalmEConfig
from palme_xt.model import PalmE

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names for images of so many channels


class ImageError(ValueError):
    """A file that cannot be read as an image."""


def read_image(path: str | Path, config: PalmEConfig) -> Tensor:
    """An image file as `(c, h, w)`, float32 in 0..1, converted and resized to what the model takes.

    Raises:
        ImageError: the file is missing, unreadable or no image, or the model takes images that no file holds.
    """
    if config.channels not in MODES:
        raise ImageError(f"{path}: the model takes {config.channels} channels, image files have {list(MODES)}")
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ImageError(f"{path} has pixels of mode {image.mode}, must have 8 bits a channel: convert it")
            upright = ImageOps.exif_transpose(image).convert(MODES[config.channels])
            resized = upright.resize((config.image_size, config.image_size))
    except UnidentifiedImageError as error:
        raise ImageError(f"{path} is not an image that Pillow can read") from error
    except ImageError:
        raise
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # Pillow's plugins raise what they like
        raise ImageError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    pixels = torch.from_numpy(np.array(resized)).float() / 255
    return pixels.reshape(config.image_size, config.image_size, config.channels).movedim(-1, 0)


def stream_caption(model: PalmE, img: Tensor, **how: Any) -> Iterator[str]:
    """The text that `caption` returns for one image `(c, h, w)`, character by character as it is decoded."""
    bytes_to_text = codecs.getincrementaldecoder("utf-8")(errors="replace")
    start = torch.tensor([tokens.BOS], device=img.device)
    how = {"temperature": 0.0} | how
    for (token,) in model.stream(img[None], start, model.config.max_seq_len - 1, eos_token=tokens.EOS, **how):
        if token < 256 and (text := bytes_to_text.decode(bytes([int(token)]))):
            yield text
    if text := bytes_to_text.decode(b"", final=True):
        yield text


def caption(model: PalmE, img: Tensor, **how: Any) -> list[str]:
    """Captions of images `(b, c, h, w)`, greedily decoded, or as the keywords of `PalmE.generate` say."""
    how = {"temperature": 0.0} | how
    start = torch.full((len(img), 1), tokens.BOS, device=img.device)
    ids = model.generate(img, start, model.config.max_seq_len - 1, eos_token=tokens.EOS, **how)
    return [tokens.decode(row) for row in ids.tolist()]
