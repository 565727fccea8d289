"""`python -m benchmarks [SUBSET ...]`: run the named benchmarks, or all of them."""

from __future__ import annotations

import argparse
import importlib

SUBSETS = {
    "decoding": "time a token: upstream, Hugging Face, uncached, floor (10 minutes; needs transformers)",
    "versions": "install releases of x-transformers in turn, and run the parity and decoding tests (10 minutes)",
    "digits": "train the shipped digits captioner from five seeds (10 minutes)",
}


def main() -> None:
    described = "\n".join(f"  {name:10} {purpose}" for name, purpose in SUBSETS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"Print the README's numbers as Markdown tables.\n\n{described}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("subset", nargs="*", choices=[*SUBSETS, []], metavar="SUBSET", help="which (default: all)")
    for subset in parser.parse_args().subset or SUBSETS:
        importlib.import_module(f"benchmarks.{subset}").main()


if __name__ == "__main__":
    main()
