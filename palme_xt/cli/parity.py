"""Check whether a model computes the same numbers with another release of x-transformers.

`record` writes a reference: beside the weights of a run folder, or to FILE for a function without arguments that
returns any module and its inputs, a tuple or a dict of tensors. `check` exits with 0 if the installed release computes
the same numbers. If not, it exits with 1 and names the first layer that differs.
"""

import pkgutil
import sys
from pathlib import Path
from typing import Any

from palme_xt.cli.given import Parser
from palme_xt.parity import drift


def parse(argv: list[str]) -> dict[str, Any]:
    """Return the options in `argv`."""
    usage = "palme-xt parity {record,check} (RUN | PACKAGE.MODULE:FUNCTION FILE) [--tolerance TOLERANCE]"
    parser = Parser(prog="palme-xt parity", usage=usage, description=__doc__, allow_abbrev=False)
    parser.add_argument("action", choices=["record", "check"], help="write the reference, or compare with it")
    parser.add_argument("target", metavar="RUN", help="folder that `palme-xt train` wrote, or PACKAGE.MODULE:FUNCTION")
    parser.add_argument("file", metavar="FILE", nargs="?", help="the reference of a function")
    tolerance = "largest difference that `check` accepts, as a share of the largest value (default: %(default)s)"
    parser.add_argument("--tolerance", type=float, default=drift.TOLERANCE, help=tolerance)
    return dict(parser.parse_args(argv).as_dict())


def run(options: dict[str, Any]) -> int:
    """Write the reference or compare with it, and return the exit status."""
    target, file, tolerance = options["target"], options["file"], options["tolerance"]
    if options["action"] == "record":
        drift.record_folder(target) if file is None else drift.record(*_call(target), file)
        print(f"{file or Path(target) / drift.PARITY} written")
        return 0
    verdict = drift.check_folder(target, tolerance) if file is None else drift.check(_call(target)[0], file, tolerance)
    for name, current in verdict.current.items():
        recorded = verdict.recorded.get(name, "an unknown one")
        print(f"{name}: {current}" if recorded == current else f"{name}: recorded with {recorded}, now {current}")
    print(f"differs: {verdict.difference}" if verdict.difference else f"the same within {tolerance:g}")
    return 1 if verdict.difference else 0


def _call(target: str) -> tuple[Any, Any]:
    """Import a function, from the current folder too, and return the module and the inputs that it returns."""
    sys.path.insert(0, "")
    try:
        function = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{target} must be PACKAGE.MODULE:FUNCTION, which can be imported: {error}") from error
    returned = function() if callable(function) else function
    if not (callable(function) and isinstance(returned, tuple) and len(returned) == 2):
        rule = "must be a function that returns a tuple of a module and its inputs"
        raise TypeError(f"{target} gives a {type(returned).__name__}, {rule}")
    return returned
