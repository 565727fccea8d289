"""Caption images with a trained model."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self, cast, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from palme_xt.captioner.images import Preprocessing, read_preprocessing
from palme_xt.captioner.tokenizer import ByteTokenizer, Tokenizer, read_tokenizer
from palme_xt.model import PalmE
from palme_xt.storage import folder as model_folder

BYTES = ByteTokenizer()
CAPTIONED_AT_ONCE = 64

Picture = str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any]


class Captioner:
    """A trained model with its preprocessing and its tokenizer, which captions images of any size.

        captioner = Captioner.from_pretrained("runs/a")
        captioner("x.png")  # a caption
        captioner(["x.png", "y.png"], beams=3)  # a list of captions
        for piece in captioner.stream("x.png"): ...

    An image is the path of a file, a Pillow image, or a uint8 array `(h, w)` or `(h, w, 3)` (grey or RGB, 0..255).

    Args:
        model: The model.
        preprocessing: How images become its inputs.
        tokenizer: How its captions are written.
    """

    def __init__(self, model: PalmE, preprocessing: Preprocessing, tokenizer: Tokenizer = BYTES) -> None:
        self.model, self.preprocessing, self.tokenizer = model, preprocessing, tokenizer

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> Self:
        """Return the captioner in the folder of a training run, or in a download of one.

        Raises:
            FolderError: If the folder does not hold a model, or its files are damaged or do not belong together.
            ImageError: If it does not say how images are preprocessed.
            TokenizerError: If the files of its tokenizer are damaged.
        """
        model, path = model_folder.load(folder, device), Path(folder)
        return cls(model, read_preprocessing(path, model.config), read_tokenizer(path))

    @overload
    def __call__(self, images: Picture, **how: Any) -> str: ...

    @overload
    def __call__(self, images: Sequence[Picture], **how: Any) -> list[str]: ...

    def __call__(self, images: Picture | Sequence[Picture], **how: Any) -> str | list[str]:
        """Return the caption of an image, or the list of captions of a list of images.

        Args:
            images: An image, or a list or tuple of images.
            **how: Keywords of `PalmE.generate`. By default, captions are decoded greedily.

        Raises:
            ImageError: If an image cannot be read.
            TypeError: If an image is of another type, or an array is not uint8.
        """
        if not isinstance(images, list | tuple):
            return self([cast(Picture, images)], **how)[0]
        captions: list[str] = []
        for start in range(0, len(images), CAPTIONED_AT_ONCE):
            img = self.inputs(images[start : start + CAPTIONED_AT_ONCE])
            captions += caption(self.model, img, self.tokenizer, **how)
        return captions

    def stream(self, image: Picture, **how: Any) -> Iterator[str]:
        """Yield the caption of one image, the same as from a call, piece by piece as it is decoded."""
        return stream_caption(self.model, self.inputs([image])[0], self.tokenizer, **how)

    def inputs(self, images: Sequence[Picture]) -> Tensor:
        """Return images as model inputs `(b, c, h, w)`, float32, normalised, on the device of the model."""
        img = torch.stack([self._pixels(image) for image in images])
        return self.preprocessing.normalise(img.to(next(self.model.parameters()).device))

    def _pixels(self, image: Picture) -> Tensor:
        if isinstance(image, str | os.PathLike):
            return self.preprocessing.read_pixels(Path(image))
        if isinstance(image, np.ndarray) and image.dtype == np.uint8:
            image = Image.fromarray(image)
        if not isinstance(image, Image.Image):
            found = f"{image.dtype} array" if isinstance(image, np.ndarray) else type(image).__name__
            raise TypeError(f"images holds a {found}, must hold paths, Pillow images or uint8 arrays (h, w, c)")
        return self.preprocessing.pixels(image)


def stream_caption(model: PalmE, img: Tensor, tokenizer: Tokenizer = BYTES, **how: Any) -> Iterator[str]:
    """Yield the caption of one image `(c, h, w)`, the same as from `caption`, piece by piece as it is decoded."""
    piece = tokenizer.pieces()
    how = {"temperature": 0.0} | how
    for (token,) in model.stream(img[None], _start(model, img[None], tokenizer), eos_token=tokenizer.eos, **how):
        if text := piece(int(token)):
            yield text
    if text := piece(tokenizer.eos):
        yield text


def caption_ids(model: PalmE, img: Tensor, tokenizer: Tokenizer = BYTES, **how: Any) -> Tensor:
    """Return the token ids `(b, n)` of captions of images `(b, c, h, w)`, without BOS, with `pad_value` after EOS."""
    how = {"temperature": 0.0} | how
    return model.generate(img, _start(model, img, tokenizer), eos_token=tokenizer.eos, **how)


def caption(model: PalmE, img: Tensor, tokenizer: Tokenizer = BYTES, **how: Any) -> list[str]:
    """Return captions of images `(b, c, h, w)`, decoded greedily unless keywords of `PalmE.generate` say otherwise."""
    return [tokenizer.decode(row) for row in caption_ids(model, img, tokenizer, **how).tolist()]


def _start(model: PalmE, img: Tensor, tokenizer: Tokenizer) -> Tensor:
    """Return the ids `(b, t)` that captions of images `(b, c, h, w)` begin with."""
    inside = model.config.image_token
    ids = [tokenizer.bos] if inside is None else [tokenizer.bos, inside]
    return torch.tensor(ids, device=img.device).expand(len(img), -1)
