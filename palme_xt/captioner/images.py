"""Turn image files into model inputs: resized, cropped and normalised, the same in training and in captioning."""

import contextlib
import io
import json
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from palme_xt.config import PalmEConfig
from palme_xt.storage.files import explained, one_line

PREPROCESSING = "preprocessor_config.json"
FITS = ("crop", "pad", "squash")
NORMALISING = ("do_rescale", "rescale_factor", "do_normalize")

# Pillow's modes by number of channels.
MODES = {1: "L", 3: "RGB", 4: "RGBA"}

# Mean and deviation of CLIP's data (Radford et al. 2021, arXiv:2103.00020; github.com/openai/CLIP, clip/clip.py).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

MAX_ASPECT = 100  # resized by its shorter side or padded to a square, a narrower image could fill the memory


class ImageError(ValueError):
    """Raised if an image cannot be read, or the preprocessing is unknown.

    Attributes:
        reason: "missing image", "broken image", or "unusable image" for anything else.
    """

    def __init__(self, message: str, reason: str = "unusable image") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes an input, stored as Hugging Face's `preprocessor_config.json`.

    Args:
        image_size: Height and width of the result.
        channels: 1 for grey, 3 for RGB, 4 for RGBA. Transparent images are put on white, except for RGBA.
        fit: How an image becomes a square. `crop` resizes the shorter side and crops the centre, as CLIP does. `pad`
            extends the shorter side with the mean colour, as LLaVA does. `squash` resizes both sides.
        mean: Mean of each channel, for values in 0..1.
        std: Standard deviation of each channel.

    Raises:
        ImageError: If image files cannot have that number of channels, or the fit is unknown.
    """

    image_size: int
    channels: int
    fit: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.channels not in MODES:
            rule = f"must be one of {list(MODES)}, as image files have: set vit_kwargs"
            raise ImageError(f"channels={self.channels} {rule}")
        if self.fit not in FITS:
            raise ImageError(f"fit={self.fit} must be one of {', '.join(FITS)}")

    @classmethod
    def like_clip(cls, config: PalmEConfig, fit: str = "crop") -> Self:
        """Normalise as CLIP does, with a mean and deviation of 0.5 unless there are 3 channels."""
        mean, std = (CLIP_MEAN, CLIP_STD) if config.channels == 3 else ((0.5,) * config.channels,) * 2
        return cls(config.image_size, config.channels, fit, mean, std)

    @classmethod
    def plain(cls, config: PalmEConfig) -> Self:
        """Resize both sides and keep values in 0..1, for scenes of digits."""
        return cls(config.image_size, config.channels, "squash", (0.0,) * config.channels, (1.0,) * config.channels)

    def normalised_like(self, source: str) -> Self:
        """Return this preprocessing with the mean and the deviation that a folder, or a name on the hub, says.

        Raises:
            ImageError: If it has no `preprocessor_config.json` that says them.
        """
        from palme_xt.pretrained.source import find_file

        rule = f"must have a {PREPROCESSING} that says how images were normalised in its training"
        with explained(f"encoder={source} {rule}", ImageError, "; write image_mean and image_std into it"):
            values = json.loads(find_file(source, PREPROCESSING, download=PREPROCESSING).read_text())
            return self._normalised(values, NORMALISING)

    def _normalised(self, values: dict[str, Any], checked: Collection[str]) -> Self:
        """Return this preprocessing with the mean and the deviation in `values`, which must agree on what is checked.

        Args:
            values: The content of a `preprocessor_config.json`.
            checked: Names in it. What it leaves out agrees.

        Raises:
            ValueError: If there is no mean or deviation for each channel, or other values differ.
        """
        mean, std = (tuple(map(float, values[name])) for name in ("image_mean", "image_std"))
        if not (len(mean) == len(std) == self.channels and all(std)):
            raise ValueError(f"image_mean and image_std must have {self.channels} numbers, none of image_std 0")
        normalised = replace(self, mean=mean, std=std)
        for name, expected in json.loads(normalised.to_json()).items():
            value = values.get(name, expected)
            same = math.isclose(value, expected, rel_tol=1e-4) if isinstance(expected, float) else value == expected
            no_matter = name == "do_normalize" and not expected  # normalising with 0 and 1 changes nothing
            if name in checked and not (same or no_matter):
                raise ValueError(f"{name}={value} must be {expected}")
        return normalised

    def pixels(self, image: Image.Image) -> Tensor:
        """Return an image as `(c, h, w)`, uint8, resized to a square but not normalised.

        Values of 16 bits are scaled from 0..65535 to 0..255.

        Raises:
            ImageError: If the image has more than 16 bits per channel, or is too long and narrow.
        """
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ImageError(f"has pixels of mode {image.mode}, must have 8 or 16 bits per channel: convert it")
        if self.channels != 4 and image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = torch.from_numpy(np.array(self._resized(image.convert(MODES[self.channels]))))
        return pixels.reshape(self.image_size, self.image_size, self.channels).movedim(-1, 0)

    def normalise(self, img: Tensor) -> Tensor:
        """Return model inputs, float32, from images `(..., c, h, w)`, uint8 or floating point in 0..1."""
        mean, std = torch.tensor([self.mean, self.std], device=img.device)[:, :, None, None]
        # In place, because every batch passes here.
        img = img.float().div_(255).sub_(mean) if img.dtype == torch.uint8 else img.float() - mean
        return img.div_(std)

    def _resized(self, image: Image.Image) -> Image.Image:
        size = self.image_size
        # Sizes, offsets and colours are rounded as transformers' CLIPImageProcessor and LlavaImageProcessor round them.
        width, height = image.size
        shorter, longer = sorted(image.size)
        if self.fit != "squash" and longer > MAX_ASPECT * shorter:
            rule = f"must be at most {MAX_ASPECT} times as long as wide: crop it"
            raise ImageError(f"has {width}x{height} pixels, {rule}")
        if self.fit == "pad":
            square = Image.new(image.mode, (longer, longer), tuple(int(255 * mean) for mean in self.mean))
            square.paste(image, ((longer - width) // 2, (longer - height) // 2))
            image = square
        if self.fit != "crop":
            return image.resize((size, size), Image.Resampling.BICUBIC)
        width, height = (size if side == shorter else int(size * side / shorter) for side in (width, height))
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        return image.crop((left, top, left + size, top + size))

    def read(self, path: str | Path) -> Tensor:
        """Return an image file as `(c, h, w)`, float32, normalised.

        Raises:
            ImageError: As in `read_pixels`.
        """
        return self.normalise(self.read_pixels(path))

    def read_pixels(self, file: str | Path | bytes, name: str | None = None) -> Tensor:
        """Return an image file, given its path or its content, as `(c, h, w)`, uint8, not normalised.

        Args:
            file: The path, or the content.
            name: The name of the image in errors. Defaults to the path.

        Raises:
            ImageError: If the file does not exist, cannot be read or is damaged, is not an image, or is one of a kind
                that is not supported.
        """
        name = name or ("image" if isinstance(file, bytes) else str(file))
        with image_errors(name):
            content = file if isinstance(file, bytes) else Path(file).read_bytes()
        with image_errors(name, "broken image"), Image.open(io.BytesIO(content)) as image:
            return self.pixels(image)

    def to_json(self) -> str:
        """Return the content of `preprocessor_config.json`, which transformers' image processors read as well."""
        size = {"height": self.image_size, "width": self.image_size}
        values = {
            "image_processor_type": "LlavaImageProcessor" if self.fit == "pad" else "CLIPImageProcessor",
            "do_convert_rgb": self.channels == 3,
            "do_resize": True,
            "size": {"shortest_edge": self.image_size} if self.fit == "crop" else size,
            "resample": int(Image.Resampling.BICUBIC),
            "do_center_crop": self.fit == "crop",
            "do_pad": self.fit == "pad",
            "crop_size": size,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": any(self.mean) or set(self.std) != {1.0},
            "image_mean": self.mean,
            "image_std": self.std,
        }
        return json.dumps(values, indent=2)


@contextlib.contextmanager
def image_errors(name: str, reason: str = "unusable image") -> Iterator[None]:
    """Turn any error while an image is read into a one-line error that begins with `name`.

    Raises:
        ImageError: If any error was raised. It has the given `reason` if nothing else is known of its cause.
    """
    try:
        yield
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image that Pillow can read") from error
    except ImageError as error:
        raise ImageError(f"{name} {error}") from error
    except Exception as error:  # Pillow's plugins raise errors of many types
        if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError)):
            reason = "unusable image"
        reason = "missing image" if isinstance(error, FileNotFoundError) else reason
        cause = one_line(error) if isinstance(error, OSError) else f"{type(error).__name__}: {one_line(error)}"
        raise ImageError(f"{name} cannot be read: {cause}", reason) from error


def unit_range(img: Tensor) -> Tensor:
    """Return images, uint8 or floating point in 0..1, as float32 in 0..1."""
    return img.float() / 255 if img.dtype == torch.uint8 else img.float()


def image_files(folder: Path) -> list[str]:
    """Return the paths of all files in a folder, and in the folders below it, that are named like images, in order."""
    endings = Image.registered_extensions()
    return sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in endings)


def save_images(img: Tensor, folder: Path) -> None:
    """Write images `(b, c, h, w)`, uint8 or floating point in 0..1, as `folder/00.png`, `folder/01.png`, ..."""
    folder.mkdir(exist_ok=True)
    for number, pixels in enumerate(unit_range(img).mul(255).round().byte().movedim(1, -1)):
        Image.fromarray(pixels.squeeze(-1).numpy()).save(folder / f"{number:02}.png")


def read_preprocessing(folder: Path, config: PalmEConfig) -> Preprocessing:
    """Return the preprocessing of a model folder.

    Raises:
        ImageError: If its `preprocessor_config.json` is missing, damaged, or not for this model.
    """
    path = folder / PREPROCESSING
    remedy = (
        "; restore the file that training wrote, or for a run of version 0.1, Preprocessing.plain(config).to_json()"
    )
    with explained(f"{path} does not say how images of this model are preprocessed", ImageError, remedy):
        values = json.loads(path.read_text())
        fit = "crop" if values["do_center_crop"] else "pad" if values.get("do_pad") else "squash"
        return Preprocessing.like_clip(config, fit)._normalised(values, values)
