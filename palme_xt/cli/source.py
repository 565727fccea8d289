"""Print a model as an x-transformers program: that of a run, with its weights, or that of the given arguments."""

from pathlib import Path
from typing import Any

from palme_xt.cli.given import Parser, from_options, given, reject_others
from palme_xt.config import PalmEConfig
from palme_xt.source import to_source
from palme_xt.storage.folder import WEIGHTS, read_config


def parse(argv: list[str]) -> dict[str, Any]:
    """Return the options in `argv`.

    Raises:
        ValueError: If there are other options in addition to a run.
    """
    usage = "palme-xt source [RUN] [OPTION VALUE ...]"
    parser = Parser(prog="palme-xt source", usage=usage, description=__doc__, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", type=str, nargs="?", help="folder that `palme-xt train` wrote")
    parser.add_class_arguments(PalmEConfig)
    options: dict[str, Any] = parser.parse_args(argv).as_dict()
    if options["run"] is not None:
        reject_others(options["run"], given(parser, argv), ["run"])
    return options


def run(options: dict[str, Any]) -> int:
    """Print the program, and return the exit status."""
    weights = None
    if options["run"] is not None:
        config, weights = read_config(options["run"]), str(Path(options["run"]) / WEIGHTS)
    else:
        config = from_options(PalmEConfig, options)
    print(to_source(config, weights), end="")
    return 0
