"""`python -m benchmarks [SUBSET ...]`: run the named benchmarks, or all of them."""

from __future__ import annotations

import argparse
import importlib

SUBSETS = {
    "training": "time of a training step, eager and compiled, and its profile (20 minutes)",
    "memory": "peak memory of a training step, each contestant in its own process (3 minutes)",
    "growth": "time of a training step over text length and batch, with plots (15 minutes)",
    "decoding": "time a token: compiled, upstream, uncached, floor, and the profile (15 minutes)",
    "startup": "time of importing the package and of constructing a model (4 minutes)",
    "versions": "install releases of x-transformers in turn, and run the parity and decoding tests (10 minutes)",
    "loop": "what the training loop costs beside the computation, data loading included (6 minutes)",
    "emoji": "train on 3,786 emoji with their official names; downloads them with npm (15 minutes)",
    "digits": "train the shipped digits captioner from five seeds (10 minutes)",
}


def main() -> None:
    described = "\n".join(f"  {name:10} {purpose}" for name, purpose in SUBSETS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Print the README's numbers as Markdown tables, and write JSON files and plots to\n"
        f"./benchmark-results. Peers that are not installed are skipped by name.\n\n{described}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("subset", nargs="*", choices=[*SUBSETS, []], metavar="SUBSET", help="which (default: all)")
    for subset in parser.parse_args().subset or SUBSETS:
        importlib.import_module(f"benchmarks.{subset}").main()


if __name__ == "__main__":
    main()
