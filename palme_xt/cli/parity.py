"""Check whether a trained model computes the same numbers with another release of x-transformers.

`record` writes a reference beside the weights. `check` exits with 0 if the installed release computes the same numbers.
If not, it exits with 1 and names the first layer that differs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from palme_xt.parity.drift import PARITY, TOLERANCE, check, record


def parse(argv: list[str]) -> dict[str, Any]:
    """Return the options in `argv`."""
    parser = argparse.ArgumentParser(
        prog="palme-xt parity",
        usage="palme-xt parity {record,check} RUN [--tolerance TOLERANCE]",
        description=__doc__,
        allow_abbrev=False,
    )
    parser.add_argument("action", choices=["record", "check"], help="write the reference, or compare with it")
    parser.add_argument("run", metavar="RUN", help="folder that `palme-xt train` wrote")
    tolerance = "largest difference that `check` accepts, as a share of the largest value (default: %(default)s)"
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help=tolerance)
    return vars(parser.parse_args(argv))


def run(options: dict[str, Any]) -> int:
    """Write the reference or compare with it, and return the exit status."""
    folder = Path(options["run"])
    if options["action"] == "record":
        record(folder)
        print(f"{folder / PARITY} written")
        return 0
    verdict = check(folder, options["tolerance"])
    for name, installed in verdict.installed.items():
        print(f"{name}: recorded with {verdict.recorded[name]}, installed {installed}")
    print(f"differs: {verdict.difference}" if verdict.difference else f"the same within {options['tolerance']:g}")
    return 1 if verdict.difference else 0
