"""Caption image files with a trained run, one line each, or draw where in an image the model looked."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palme_xt.captioner import attention, drawing
from palme_xt.captioner import caption as captioning
from palme_xt.captioner.images import ImageError, image_files
from palme_xt.cli import complain
from palme_xt.cli.given import Parser, add_decoding_options, device_of, how_to_decode
from palme_xt.tokens import printable


def parse(argv: list[str]) -> dict[str, Any]:
    """Return the options in `argv`."""
    usage = "palme-xt caption RUN IMAGE|FOLDER [IMAGE|FOLDER ...] [OPTION ...]"
    parser = Parser(prog="palme-xt caption", usage=usage, description=__doc__, allow_abbrev=False)
    add_decoding_options(parser)
    parser.add_argument("image", metavar="IMAGE", nargs="+", help="image files, or folders of them")
    parser.add_argument("--beams", type=int, default=1, help="width of a beam search (default: 1, no search)")
    parser.add_argument("--stream", action="store_true", help="print each caption as it is decoded")
    parser.add_argument("--json", action="store_true", help='print {"file": ..., "caption": ...} on each line')
    shown = "draw where in one IMAGE the decoder looked for each word"
    parser.add_argument("--attention", metavar="OUT.png", help=shown)
    layer = "index of the cross-attention to draw, in the order of execution (default: -1, the last)"
    parser.add_argument("--layer", type=int, help=layer)
    return dict(parser.parse_args(argv).as_dict())


def run(options: dict[str, Any]) -> int:
    """Caption the images that can be read, and return the exit status."""
    captioner = captioning.Captioner.from_pretrained(options["run"], device_of(options["device"]))
    device = next(captioner.model.parameters()).device
    how = how_to_decode(options)
    if options["json"] and (options["stream"] or options["attention"] is not None):
        raise ValueError("--json prints whole captions only: leave --stream and --attention out")
    if options["attention"] is not None:
        return _draw_attention(options, captioner, how)
    if options["layer"] is not None:
        raise ValueError(f"--layer={options['layer']} has no effect without --attention: leave it out")
    unreadable, files = 0, _files(options["image"])
    for start in range(0, len(files), captioning.CAPTIONED_AT_ONCE):
        images: list[tuple[str, Tensor]] = []
        for path in files[start : start + captioning.CAPTIONED_AT_ONCE]:
            try:
                images.append((path, captioner.preprocessing.read(path).to(device)))
            except ImageError as error:  # caption the other images
                complain(f"error: {error}")
                unreadable += 1
        if options["stream"]:
            for path, img in images:
                print(f"{path}: ", end="", flush=True)
                for text in captioning.stream_caption(captioner.model, img, captioner.tokenizer, **how):
                    print(printable(text), end="", flush=True)
                print()
        elif images:
            img = torch.stack([img for _, img in images])
            texts = captioning.caption(captioner.model, img, captioner.tokenizer, **how)
            for (path, _), text in zip(images, texts, strict=True):
                values = {"file": path, "caption": text}
                print(json.dumps(values) if options["json"] else f"{path}: {printable(text)}", flush=True)
    return 2 if unreadable else 0


def _files(paths: list[str]) -> list[str]:
    """Return the paths of images, with those in each folder, and in the folders below it, in place of the folder."""
    found = list[str]()
    for path in paths:
        below = image_files(Path(path))
        if Path(path).is_dir() and not below:
            raise ValueError(f"{path} must be an image or a folder of images: it has none")
        found += below or [path]
    return found


def _draw_attention(options: dict[str, Any], captioner: captioning.Captioner, how: dict[str, Any]) -> int:
    model, tokenizer = captioner.model, captioner.tokenizer
    out, paths = Path(options["attention"]), options["image"]
    if len(paths) != 1 or options["stream"]:
        raise ValueError(f"--attention={out} needs exactly one image and no --stream: found {len(paths)} images")
    if out.suffix.lower() != ".png" or (out.exists() and out.samefile(paths[0])):
        raise ValueError(f"--attention={out} must be a PNG file, and not the image itself: choose another")
    pixels = captioner.preprocessing.read_pixels(paths[0])
    img = captioner.preprocessing.normalise(pixels)[None].to(next(model.parameters()).device)
    (ids,) = captioning.caption_ids(model, img, tokenizer, **how).tolist()
    ids = ids[: ids.index(tokenizer.eos)] if tokenizer.eos in ids else ids
    piece = tokenizer.pieces()
    pieces = [piece(token) for token in ids]
    words = attention.words([*pieces[:-1], pieces[-1] + piece(tokenizer.eos)] if pieces else [])
    text = torch.tensor([[tokenizer.bos, *(ids or [tokenizer.eos])]], device=img.device)
    layer = -1 if options["layer"] is None else options["layer"]
    maps = attention.word_maps(attention.cross_attention_maps(model, img, text, layer)[0], words)
    drawing.draw_attention(pixels, [printable(word) for word, _ in words], maps, out)
    print(f"{paths[0]}: {printable(tokenizer.decode(ids))}")
    print(f"{out} written")
    return 0
