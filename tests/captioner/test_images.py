"""Images are preprocessed as other programs do it, and each that cannot be read gives a one-line error."""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from palme_xt import PalmEConfig
from palme_xt.captioner.images import (
    CLIP_MEAN,
    CLIP_STD,
    FITS,
    PREPROCESSING,
    ImageError,
    Preprocessing,
    read_preprocessing,
    save_images,
    unit_range,
)
from palme_xt.captioner.training.run import Run
from palme_xt.cli import main
from palme_xt.storage.folder import WEIGHTS, as_safetensors
from tests.models import small

RGB = PalmEConfig(16, 8, 16, 2, 4, 258, 80, 16, 2, 4)
GREY, RGBA, FIVE = (replace(RGB, vit_kwargs={"channels": channels}) for channels in (1, 4, 5))
SIZES = [(20, 24), (37, 11), (11, 37), (7, 5), (5, 8), (16, 16), (16, 40), (101, 33), (32, 99), (3, 1), (5, 64)]
UNKNOWN = rf"^\S+{PREPROCESSING} does not say how images of this model are preprocessed"

Make = Callable[[PalmEConfig], Preprocessing]


def noise(size: tuple[int, int], mode: str = "RGB", seed: int = 0) -> Image.Image:
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def smooth(size: tuple[int, int], channels: int) -> Image.Image:
    """Return an image of waves, different in each channel."""
    width, height = size
    y, x = np.mgrid[:height, :width] / max(size)
    waves = [127 + 100 * np.sin(5 * x * (channel + 1) + 4 * y + channel) for channel in range(channels)]
    pixels = np.stack(waves, axis=-1).round().astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def png(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return the content of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def as_tensor(image: Image.Image) -> Tensor:
    """Return the pixels of an image, `(c, h, w)`, unchanged."""
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def inputs(preprocessing: Preprocessing, image: Image.Image) -> Tensor:
    return preprocessing.normalise(preprocessing.pixels(image))


@pytest.mark.parametrize("mode", ["RGB", "P", "L", "1", "CMYK"])
@pytest.mark.parametrize("make", [Preprocessing.like_clip, Preprocessing.plain])
def test_inputs_are_bit_by_bit_those_of_transformers(make: Make, mode: str) -> None:
    transformers = pytest.importorskip("transformers")
    # This processor resizes with Pillow. It is the only one of its kind in transformers 4.
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    for image_size in 16, 24:
        preprocessing = make(replace(RGB, image_size=image_size))
        theirs = kind(**json.loads(preprocessing.to_json()))
        other = kind(**json.loads(preprocessing.to_json()) | {"resample": int(Image.Resampling.BILINEAR)})
        for size in SIZES:
            image = noise(size, mode)
            expected = theirs(image, return_tensors="pt")["pixel_values"][0]
            assert expected.shape == (3, image_size, image_size)
            assert torch.equal(inputs(preprocessing, image), expected), size
            untouched = size == (image_size,) * 2 or (preprocessing.fit == "crop" and min(size) == image_size)
            bilinear = other(image, return_tensors="pt")["pixel_values"][0]
            assert torch.equal(bilinear, expected) == untouched


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("config", [RGB, GREY])
def test_inputs_are_those_of_another_bicubic_filter(config: PalmEConfig, size: tuple[int, int]) -> None:
    image = smooth(size, config.channels)
    width, height = size
    shorter = min(size)
    to = (height * 16 // shorter, width * 16 // shorter)
    top, left = (to[0] - 16) // 2, (to[1] - 16) // 2

    def resized(to: tuple[int, int], mode: str) -> Tensor:
        pixels = as_tensor(image)[None].double() / 255
        return F.interpolate(pixels, to, mode=mode, antialias=True)[0].clamp(0, 1)

    mean, std = (CLIP_MEAN, CLIP_STD) if config is RGB else ((0.5,), (0.5,))
    column = [torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std)]
    cropped, whole = (inputs(make(config), image) for make in (Preprocessing.like_clip, Preprocessing.plain))
    assert cropped.dtype == whole.dtype == torch.float32
    tolerance = 1.6 / 255  # Pillow rounds after each of two passes
    for img, expected in (
        (cropped * column[1] + column[0], resized(to, "bicubic")[:, top : top + 16, left : left + 16]),
        (whole, resized((16, 16), "bicubic")),
    ):
        assert img.shape == expected.shape == (config.channels, 16, 16)
        torch.testing.assert_close(img.double(), expected, atol=tolerance, rtol=0)
        assert (img - expected.flip(-1, -2)).abs().max() > 5 * tolerance
    assert (((cropped * column[1] + column[0]) - whole).abs().max() > 5 * tolerance) == (len({*size}) > 1)


def test_pixels_are_the_middle_or_everything() -> None:
    image = Image.new("RGB", (48, 16), "lime")
    image.paste("red", (0, 0, 16, 16))
    image.paste("blue", (32, 0, 48, 16))
    lime = as_tensor(Image.new("RGB", (16, 16), "lime"))
    cropped = Preprocessing.like_clip(RGB).pixels(image)
    assert cropped.dtype == torch.uint8
    assert torch.equal(cropped, lime)
    whole = Preprocessing.plain(RGB).pixels(image)
    assert [whole[:, 8, column].tolist() for column in (0, 8, 15)] == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    upright = image.transpose(Image.Transpose.ROTATE_90)
    assert torch.equal(Preprocessing.like_clip(RGB).pixels(upright), lime)
    assert Preprocessing.plain(RGB).pixels(upright)[:, 0, 8].tolist() == [0, 0, 255]


STORED = {  # how an upright image is stored, by orientation
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", STORED)
def test_images_are_turned_as_their_camera_was(orientation: int) -> None:
    image = noise((24, 37))
    how = STORED[orientation]
    stored = image if how is None else image.transpose(how)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for preprocessing in Preprocessing.like_clip(RGB), Preprocessing.plain(RGB):
        read = preprocessing.read_pixels(png(stored, exif=exif))
        assert torch.equal(read, preprocessing.pixels(image))
        assert torch.equal(preprocessing.read_pixels(png(stored)), read) == (how is None)


def see_through() -> tuple[Image.Image, Tensor, Tensor]:
    """Return a 16x16 image, its colours and its opacity: none at the top, half in the middle, full below."""
    image = noise((16, 16))
    alpha = np.repeat(np.array([[0], [128], [255], [255]], dtype=np.uint8), 4, axis=0).repeat(16, axis=1)
    image.putalpha(Image.fromarray(alpha))
    return image, as_tensor(image)[:3], torch.from_numpy(alpha)


def on_white(colours: Tensor, alpha: Tensor) -> Tensor:
    share = alpha.double() / 255
    return colours * share + 255 * (1 - share)


def test_what_is_transparent_is_white() -> None:
    image, colours, alpha = see_through()
    expected = on_white(colours, alpha)
    assert (expected - colours).abs().max() > 100
    pixels = Preprocessing.like_clip(RGB).read_pixels(png(image)).double()
    assert (pixels - expected).abs().max() <= 1
    assert (pixels[:, :4] == 255).all()
    assert torch.equal(pixels[:, 8:], colours[:, 8:].double())
    opaque = Preprocessing.like_clip(RGB).read_pixels(png(image.convert("RGB")))
    assert torch.equal(opaque, colours)  # hidden, but present

    # ITU-R 601, Pillow's definition of grey
    weights = torch.tensor([299, 587, 114], dtype=torch.float64)[:, None, None] / 1000
    grey = Preprocessing.like_clip(GREY).read_pixels(png(image)).double()
    assert grey.shape == (1, 16, 16)
    assert (grey - (expected * weights).sum(0)).abs().max() <= 2
    assert (grey - (colours * weights).sum(0)).abs().max() > 100

    kept = Preprocessing.like_clip(RGBA).read_pixels(png(image))
    assert torch.equal(kept, torch.cat([colours, alpha[None]]))


@pytest.mark.parametrize("config", [RGB, GREY, RGBA])
def test_grey_images_and_palettes_may_be_transparent(config: PalmEConfig) -> None:
    image, _, alpha = see_through()
    preprocessing = Preprocessing.plain(config)
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30, 200, 100, 50])
    palette.paste(0, (0, 0, 16, 4))
    palette.paste(2, (0, 12, 16, 16))
    in_grey = image.convert("L")
    keyed = in_grey.copy()
    keyed.paste(7, (0, 0, 16, 4))
    with_alpha = in_grey.copy()
    with_alpha.putalpha(image.getchannel("A"))
    cases = [
        (png(palette, transparency=0), png(palette)),
        (png(palette, transparency=b"\x00\xff\xff"), png(palette)),
        (png(keyed, transparency=7), png(keyed)),
        (png(with_alpha), png(in_grey)),
        (png(palette, "GIF", transparency=0), png(palette, "GIF")),
    ]
    for transparent, opaque in cases:
        pixels, other = preprocessing.read_pixels(transparent), preprocessing.read_pixels(opaque)
        assert pixels.shape == other.shape == (config.channels, 16, 16)
        below = slice(12, 16)
        assert torch.equal(pixels[:, below], other[:, below])
        if config is RGBA:
            assert (pixels[3, :4] == 0).all()
            assert (pixels[3, below] == 255).all()
            assert (other[3] == 255).all()
            assert torch.equal(pixels[:3], other[:3])
        else:
            assert (pixels[:, :4] == 255).all()
            assert (other[:, :4] < 255).any()
    with_alpha_kept = preprocessing.read_pixels(png(with_alpha))
    if config is RGBA:
        assert torch.equal(with_alpha_kept[3], alpha)


@pytest.mark.parametrize("config", [RGB, GREY, RGBA])
@pytest.mark.parametrize("make", [Preprocessing.like_clip, Preprocessing.plain])
def test_images_are_normalised_with_mean_and_deviation(make: Make, config: PalmEConfig) -> None:
    preprocessing = make(config)
    images = [noise((20, 30), "RGBA", seed) for seed in (0, 1)]
    pixels = torch.stack([preprocessing.pixels(image) for image in images])
    expected = pixels.double() / 255
    img = preprocessing.normalise(pixels)
    assert torch.equal(img, torch.stack([inputs(preprocessing, image) for image in images]))
    assert torch.equal(img, preprocessing.normalise(pixels.float() / 255))  # float images, such as composed scenes
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    for found, wanted in (img, expected), (img[1], expected[1]):
        torch.testing.assert_close((found * std + mean).double(), wanted, atol=1e-6, rtol=0)
    assert (img[0] * std + mean - expected[1]).abs().max() > 0.1
    assert torch.equal(img, pixels.float() / 255) == (make == Preprocessing.plain)
    assert torch.equal(unit_range(pixels), pixels.float() / 255)
    assert torch.equal(unit_range(unit_range(pixels)), unit_range(pixels))


@pytest.mark.parametrize("config", [RGB, GREY, RGBA])
@pytest.mark.parametrize("make", [Preprocessing.like_clip, Preprocessing.plain])
def test_what_is_written_is_read(make: Make, config: PalmEConfig, tmp_path: Path) -> None:
    preprocessing = make(config)
    missing = "No such file or directory; restore the file that training wrote, or for"
    with pytest.raises(ImageError, match=f"{UNKNOWN}: {missing}"):
        read_preprocessing(tmp_path, config)
    (tmp_path / PREPROCESSING).write_text(preprocessing.to_json())
    found = read_preprocessing(tmp_path, config)
    assert found == preprocessing
    image = noise((20, 30))
    assert torch.equal(inputs(found, image), inputs(preprocessing, image))
    other = Preprocessing.plain if make == Preprocessing.like_clip else Preprocessing.like_clip
    assert found != other(config)
    assert not torch.equal(inputs(found, image), inputs(other(config), image))
    values = json.loads(preprocessing.to_json())
    assert values["crop_size"] == {"height": 16, "width": 16}
    assert values["size"] == ({"shortest_edge": 16} if preprocessing.fit == "crop" else values["crop_size"])
    assert values["do_normalize"] == values["do_center_crop"] == (preprocessing.fit == "crop")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("\xff", "codec can't decode"),
        ("[]", "list indices must be"),
        ("null", "'NoneType' object is not"),
        ("{}", "'do_center_crop' is missing"),
        ({"crop_size": 16}, "crop_size=16 must be"),
        ({"crop_size": {}}, "crop_size={} must be {'height': 16"),
        ({"image_mean": 0.5}, "'float' object is not iterable"),
        ({"image_mean": [0.5, 0.5]}, ""),
        ({"image_mean": ["a"] * 3}, ""),
        ({"image_std": [None] * 3}, ""),
        ({"image_std": [0.0] * 3}, ""),
        ({"image_std": [0.5] * 2}, ""),
        ({"crop_size": {"height": 16, "width": 8}}, ""),
    ],
)
def test_damaged_files(content: str | dict[str, Any], message: str, tmp_path: Path) -> None:
    whole = Preprocessing.like_clip(RGB).to_json()
    text = content if isinstance(content, str) else json.dumps(json.loads(whole) | content)
    (tmp_path / PREPROCESSING).write_bytes(text.encode("latin-1"))
    with pytest.raises(ImageError, match=rf"{UNKNOWN}: .*{message}.*; restore the file"):
        read_preprocessing(tmp_path, RGB)
    (tmp_path / PREPROCESSING).write_text(whole)
    assert read_preprocessing(tmp_path, RGB) == Preprocessing.like_clip(RGB)


def test_files_of_another_model(tmp_path: Path) -> None:
    (tmp_path / PREPROCESSING).write_text(Preprocessing.like_clip(RGB).to_json())
    for config, message in (
        (replace(RGB, image_size=24), "size={'shortest_edge': 16} must be {'shortest_edge': 24}"),
        (GREY, "image_mean and image_std must have 1 numbers, none of image_std 0"),
        (FIVE, r"channels=5 must be one of \[1, 3, 4\], as image files have: set vit_kwargs"),
    ):
        message = f"{message}; restore the file that training wrote, or for"
        with pytest.raises(ImageError, match=f"{UNKNOWN}: {message}"):
            read_preprocessing(tmp_path, config)
    assert read_preprocessing(tmp_path, RGB) == Preprocessing.like_clip(RGB)


@pytest.mark.parametrize("make", [Preprocessing.like_clip, Preprocessing.plain])
def test_models_of_channels_that_no_image_has(make: Make) -> None:
    with pytest.raises(
        ImageError, match=r"^channels=5 must be one of \[1, 3, 4\], as image files have: set vit_kwargs$"
    ):
        make(FIVE)
    for config in RGB, GREY, RGBA:
        assert inputs(make(config), noise((20, 30))).shape == (config.channels, 16, 16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_values_of_16_bits_are_scaled(kind: str) -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (16, 16)).astype(np.uint16)
    values[0, :3] = 0, 200, 2**16 - 1
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    exif = Image.Exif()
    exif[0x0112] = 3
    for config in GREY, RGB:
        pixels = Preprocessing.plain(config).read_pixels(png(image, kind))
        expected = torch.from_numpy((values / 65535 * 255).round().astype(np.uint8))
        assert torch.equal(pixels, expected.expand(config.channels, 16, 16))
        assert not torch.equal(pixels, torch.from_numpy(values.clip(max=255).astype(np.uint8)).expand_as(pixels))
        turned = Preprocessing.plain(config).read_pixels(png(image, kind, exif=exif))
        assert torch.equal(turned, pixels.flip(-1, -2))


def test_pixels_of_more_than_16_bits() -> None:
    preprocessing = Preprocessing.like_clip(GREY)
    for mode in "I", "F":
        content = png(Image.new(mode, (20, 20), 200), "TIFF")
        message = f"has pixels of mode {mode}, must have 8 or 16 bits per channel: convert it"
        for name in "some.file", None:
            with pytest.raises(ImageError, match=rf"^{name or 'image'} {message}$") as error:
                preprocessing.read_pixels(content, name)
            assert error.value.reason == "unusable image"
    assert (preprocessing.read_pixels(png(Image.new("L", (20, 20), 200), "TIFF")) == 200).all()


@pytest.mark.parametrize("mode", ["RGB", "P", "L"])
def test_padded_inputs_are_bit_by_bit_those_of_llava(mode: str) -> None:
    llava = getattr(pytest.importorskip("transformers"), "LlavaImageProcessorPil", None)
    if llava is None:
        pytest.skip("transformers before 5 pads with torch")
    preprocessing = Preprocessing.like_clip(RGB, "pad")
    values = json.loads(preprocessing.to_json())
    assert values["image_processor_type"] == "LlavaImageProcessor"
    theirs, cropping = llava(**values), llava(**values | {"do_pad": False})
    for size in SIZES:
        image = noise(size, mode)
        found = inputs(preprocessing, image)
        assert torch.equal(found, theirs(image, return_tensors="pt")["pixel_values"][0]), size
        assert torch.equal(found, cropping(image, return_tensors="pt")["pixel_values"][0]) == (size == (16, 16))


@pytest.mark.parametrize("config", [RGB, GREY, RGBA])
def test_three_ways_to_fit_an_image(config: PalmEConfig, tmp_path: Path) -> None:
    image = Image.new("RGB", (48, 16), "white")
    image.paste("black", (0, 0, 16, 16))
    pixels = {fit: Preprocessing.like_clip(config, fit).pixels(image)[0] for fit in FITS}
    assert pixels["crop"].unique().tolist() == [255]  # the left third is cut off
    assert [pixels["squash"][8, column].item() for column in (0, 8, 15)] == [0, 255, 255]
    mean = int(255 * Preprocessing.like_clip(config).mean[0])
    # Where the border is transparent, Pillow rounds twice.
    assert [pixels["pad"][row, 8].item() for row in (0, 8, 15)] == pytest.approx([mean, 255, mean], abs=1)
    assert pixels["pad"][8, 0] == 0
    for fit in FITS:
        (tmp_path / PREPROCESSING).write_text(Preprocessing.like_clip(config, fit).to_json())
        assert read_preprocessing(tmp_path, config).fit == fit
    with pytest.raises(ImageError, match=r"^fit=stretch must be one of crop, pad, squash$"):
        Preprocessing.like_clip(config, "stretch")


def test_only_damaged_files_are_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preprocessing, content = Preprocessing.like_clip(RGB), png(noise((30, 30)))
    narrow = png(Image.new("RGB", (2000, 3)))
    for file, reason in (
        (content[:-200], "broken image"),
        (content[:60] + bytes(40) + content[100:], "broken image"),
        (b"no image", "unusable image"),
        (narrow, "unusable image"),
        (tmp_path, "unusable image"),
        (tmp_path / "none.png", "missing image"),
    ):
        with pytest.raises(ImageError) as error:
            preprocessing.read_pixels(file)
        assert error.value.reason == reason, error.value
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(ImageError, match="DecompressionBombError") as error:
        preprocessing.read_pixels(content)
    assert error.value.reason == "unusable image"


@pytest.mark.parametrize(
    ("name", "value"),
    [("do_normalize", False), ("do_rescale", False), ("rescale_factor", 1.0), ("resample", 2), ("size", {})],
)
def test_settings_that_would_be_ignored(name: str, value: object, tmp_path: Path) -> None:
    values = json.loads(Preprocessing.like_clip(RGB).to_json())
    (tmp_path / PREPROCESSING).write_text(json.dumps({"processor_class": "CLIPProcessor", **values}))
    assert read_preprocessing(tmp_path, RGB) == Preprocessing.like_clip(RGB)
    (tmp_path / PREPROCESSING).write_text(json.dumps(values | {name: value}))
    with pytest.raises(ImageError, match=rf"{UNKNOWN}: {name}=.* must be .*"):
        read_preprocessing(tmp_path, RGB)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_truncated_images(kind: str, tmp_path: Path) -> None:
    preprocessing, content = Preprocessing.like_clip(RGB), png(noise((37, 30)), kind)
    for size in len(content) // 2, len(content) * 9 // 10:
        (tmp_path / "cut").write_bytes(content[:size])
        with pytest.raises(ImageError, match=r"^\S+cut cannot be read: \S+") as error:
            preprocessing.read(tmp_path / "cut")
        assert len(str(error.value).splitlines()) == 1
        assert error.value.reason == "broken image"
    for size in 0, 3:
        with pytest.raises(ImageError, match=r"^image is not an image that Pillow can read$"):
            preprocessing.read_pixels(content[:size])
    (tmp_path / "cut").write_bytes(content)
    img = preprocessing.read(tmp_path / "cut")
    assert torch.equal(img, preprocessing.normalise(preprocessing.read_pixels(content)))
    assert torch.equal(img, inputs(preprocessing, Image.open(io.BytesIO(content))))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    preprocessing = Preprocessing.like_clip(RGB)
    for read in preprocessing.read, preprocessing.read_pixels:
        with pytest.raises(ImageError, match=r"^\S+none\.png cannot be read: No such file or directory$") as error:
            read(tmp_path / "none.png")
        assert error.value.reason == "missing image"
        with pytest.raises(ImageError, match=r"^\S+ cannot be read: Is a directory$") as error:
            read(tmp_path)
        assert error.value.reason == "unusable image"
    with pytest.raises(ImageError, match=r"^row 3 cannot be read: No such file"):
        preprocessing.read_pixels(str(tmp_path / "none.png"), "row 3")
    (tmp_path / "none.png").write_bytes(png(noise((20, 30))))
    assert torch.equal(preprocessing.read(tmp_path / "none.png"), inputs(preprocessing, noise((20, 30))))


def test_saved_images_are_what_was_given(tmp_path: Path) -> None:
    for channels in 1, 3, 4:
        img = torch.randint(256, (2, channels, 8, 8), dtype=torch.uint8)
        for given in img, img / 255:
            save_images(given, tmp_path / "images")
            save_images(given, tmp_path / "images")
            for number in (0, 1):
                with Image.open(tmp_path / "images" / f"{number:02}.png") as image:
                    assert torch.equal(as_tensor(image), img[number])


def write_run(folder: Path) -> Path:
    model = small(image_size=16, patch_size=8, num_tokens=258)
    run = Run(folder)
    run.create(model.config, {}, {PREPROCESSING: Preprocessing.like_clip(model.config).to_json().encode()})
    run.write({WEIGHTS: as_safetensors(model.state_dict())})
    return folder


def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    preprocessing, content = Preprocessing.like_clip(RGB), png(noise((24, 30)))
    run, path = write_run(tmp_path / "run"), tmp_path / "bomb.png"
    path.write_bytes(content)
    assert main(["caption", str(run), str(path)]) == 0
    assert capsys.readouterr().out.startswith(f"{path}: ")

    # More than twice Pillow's limit is an error.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 30 // 2 - 1)
    message = r"cannot be read: DecompressionBombError: Image size \(720 pixels\) exceeds limit of 718 pixels, .*"
    with pytest.raises(ImageError, match=f"^row 7 {message}$"):
        preprocessing.read_pixels(content, "row 7")
    assert main(["caption", str(run), str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(rf"palme-xt: error: {re.escape(str(path))} {message}\n", captured.err)

    # Above the limit, Pillow warns and reads the image, which is an error if warnings are errors.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 30 - 1)
    with pytest.warns(Image.DecompressionBombWarning, match=r"Image size \(720 pixels\) exceeds limit of 719 pixels"):
        assert torch.equal(preprocessing.read(path), inputs(preprocessing, noise((24, 30))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=r"^row 7 cannot be read: DecompressionBombWarning: Image size"):
            preprocessing.read_pixels(content, "row 7")
        assert main(["caption", str(run), str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"palme-xt: error: \S+ cannot be read: DecompressionBombWarning: Image size .*\n", captured.err)

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 30)
    assert torch.equal(preprocessing.read(path), inputs(preprocessing, noise((24, 30))))
