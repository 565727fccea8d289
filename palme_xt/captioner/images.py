"""Image files to what the model takes: resized, cropped and normalised, the same in training and in captioning."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from palme_xt.config import PalmEConfig

PREPROCESSING = "preprocessor_config.json"

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names for images of so many channels

# of the pictures that CLIP was trained on (Radford et al. 2021, arXiv:2103.00020; github.com/openai/CLIP, clip/clip.py)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

LONGEST = 100  # times its shorter side: resized, the longer one could fill the memory


class ImageError(ValueError):
    """A file that cannot be read as an image."""


class MissingImageError(ImageError):
    """A file that is not there."""


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes an input, kept in the form of Hugging Face's `preprocessor_config.json`.

    Args:
        image_size: height and width of the result.
        channels: 1 grey, 3 RGB, 4 RGBA. Transparent pictures are put on white, unless the model takes RGBA.
        crop: resize the shorter side to `image_size` and cut out the middle, as CLIP does; False: resize both sides.
        mean: taken from each channel, of values in 0..1, before
        std: divides it.

    Raises:
        ImageError: no image file has so many channels.
    """

    image_size: int
    channels: int
    crop: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.channels not in MODES:
            raise ImageError(f"the model takes {self.channels} channels, image files have {list(MODES)}")

    @classmethod
    def for_pictures(cls, config: PalmEConfig) -> Preprocessing:
        """As CLIP, with its mean and deviation; where there are not 3 channels, with 0.5 and 0.5."""
        rgb = config.channels == 3
        mean, std = (CLIP_MEAN, CLIP_STD) if rgb else ((0.5,) * config.channels,) * 2
        return cls(config.image_size, config.channels, True, mean, std)

    @classmethod
    def plain(cls, config: PalmEConfig) -> Preprocessing:
        """Both sides resized, values in 0..1: what scenes of digits are made for."""
        return cls(config.image_size, config.channels, False, (0.0,) * config.channels, (1.0,) * config.channels)

    def pixels(self, image: Image.Image) -> Tensor:
        """A picture as `(c, h, w)`, uint8: resized and cropped, not normalised.

        Raises:
            ImageError: it has more than 8 bits a channel.
        """
        if image.mode.startswith(("I", "F")):
            raise ImageError(f"has pixels of mode {image.mode}, must have 8 bits a channel: convert it")
        image = _converted(ImageOps.exif_transpose(image), MODES[self.channels])
        pixels = torch.from_numpy(np.array(self._resized(image)))
        return pixels.reshape(self.image_size, self.image_size, self.channels).movedim(-1, 0)

    def normalise(self, img: Tensor) -> Tensor:
        """What the model takes, float32, of pictures `(..., c, h, w)`, uint8, or floating point in 0..1."""
        return (unit_range(img) - self._column(self.mean, img)).div_(self._column(self.std, img))

    def __call__(self, image: Image.Image) -> Tensor:
        """A picture as `(c, h, w)`, float32, normalised.

        Raises:
            ImageError: it has more than 8 bits a channel.
        """
        return self.normalise(self.pixels(image))

    def _resized(self, image: Image.Image) -> Image.Image:
        size = self.image_size
        if not self.crop:
            return image.resize((size, size), Image.Resampling.BICUBIC)
        # Sizes and offsets are rounded as transformers' CLIPImageProcessor rounds them.
        width, height = image.size
        shorter = min(width, height)
        if max(width, height) > LONGEST * shorter:
            raise ImageError(f"has {width} x {height} pixels, must be at most {LONGEST} times as long as wide: cut it")
        width, height = (size if side == shorter else int(size * side / shorter) for side in (width, height))
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        return image.crop((left, top, left + size, top + size))

    def read(self, path: str | Path) -> Tensor:
        """An image file as `(c, h, w)`, float32, normalised.

        Raises:
            ImageError: the file is missing, unreadable or no image.
        """
        return self.normalise(self.read_pixels(path))

    def read_pixels(self, file: str | Path | bytes, name: str | None = None) -> Tensor:
        """An image file, by its path or its content, as `(c, h, w)`, uint8, not normalised.

        Args:
            file: the path, or the content.
            name: what errors call it; by default the path.

        Raises:
            MissingImageError: the file is not there.
            ImageError: it is unreadable or no image.
        """
        name = name or ("image" if isinstance(file, bytes) else str(file))
        try:
            content = file if isinstance(file, bytes) else Path(file).read_bytes()
            with Image.open(io.BytesIO(content)) as image:
                return self.pixels(image)
        except UnidentifiedImageError as error:
            raise ImageError(f"{name} is not an image that Pillow can read") from error
        except ImageError as error:
            raise ImageError(f"{name} {error}") from error
        except FileNotFoundError as error:
            raise MissingImageError(f"{name} cannot be read: {error.strerror or error}") from error
        except OSError as error:
            raise ImageError(f"{name} cannot be read: {error.strerror or error}") from error
        except Exception as error:  # Pillow's plugins raise what they like
            raise ImageError(f"{name} cannot be read: {type(error).__name__}: {error}") from error

    def shown(self, img: Tensor) -> Tensor:
        """The inverse of the normalisation: `(..., c, h, w)` in 0..1."""
        return (img * self._column(self.std, img) + self._column(self.mean, img)).clamp(0, 1)

    @staticmethod
    def _column(values: tuple[float, ...], img: Tensor) -> Tensor:
        return torch.tensor(values, device=img.device)[:, None, None]

    def to_json(self) -> str:
        """The content of `preprocessor_config.json`, which `transformers.CLIPImageProcessor` reads as well."""
        size = {"height": self.image_size, "width": self.image_size}
        return json.dumps(
            {
                "image_processor_type": "CLIPImageProcessor",
                "do_convert_rgb": self.channels == 3,
                "do_resize": True,
                "size": {"shortest_edge": self.image_size} if self.crop else size,
                "resample": int(Image.Resampling.BICUBIC),
                "do_center_crop": self.crop,
                "crop_size": size,
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": any(self.mean) or set(self.std) != {1.0},
                "image_mean": list(self.mean),
                "image_std": list(self.std),
            },
            indent=2,
        )


def unit_range(img: Tensor) -> Tensor:
    """Return images, uint8 or floating point in 0..1, as float32 in 0..1."""
    return img.float() / 255 if img.dtype == torch.uint8 else img.float()


def save_images(img: Tensor, folder: Path) -> None:
    """Write images `(b, c, h, w)`, uint8 or floating point in 0..1, as `folder/00.png`, `folder/01.png`, ..."""
    folder.mkdir(exist_ok=True)
    for number, pixels in enumerate(unit_range(img).mul(255).round().byte().movedim(1, -1)):
        Image.fromarray(pixels.squeeze(-1).numpy()).save(folder / f"{number:02}.png")


def read_preprocessing(folder: Path, config: PalmEConfig) -> Preprocessing:
    """What a model folder says of preprocessing; `plain` where it says nothing, as runs of 0.1.0 do.

    Raises:
        ImageError: the file is damaged, or is not for this model.
    """
    path = folder / PREPROCESSING
    if not path.is_file():
        return Preprocessing.plain(config)
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        size, width = (values["crop_size"][side] for side in ("height", "width"))
        mean, std = (tuple(map(float, values[name])) for name in ("image_mean", "image_std"))
        if width != size or len(mean) != len(std) or not all(std):
            raise ValueError("crop_size is no square, or image_std has a zero or another length than image_mean")
        found = Preprocessing(size, len(mean), bool(values["do_center_crop"]), mean, std)
    except (ValueError, KeyError, TypeError) as error:
        raise ImageError(f"{path} does not say how pictures are preprocessed: {error!r}") from error
    if (found.image_size, found.channels) != (config.image_size, config.channels):
        raise ImageError(
            f"{path} is for {found.channels} channels of {found.image_size} pixels, the model takes {config.channels} "
            f"of {config.image_size}: they do not belong together"
        )
    return found


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if mode != "RGBA" and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
