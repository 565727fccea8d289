"""PalmE, a vision-language model over x-transformers.

usage: palme-xt [--help] [--version] COMMAND ...

commands:
  train     train a captioner on your images, or on scenes of digits
  caption   caption image files with a trained run
  ask       ask a trained run questions about images
  source    print the model as an x-transformers program
  parity    check whether another x-transformers computes the same numbers

`palme-xt COMMAND --help` lists the options of a command.
"""

import difflib
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import palme_xt

# Each is a module here, and is imported when it is needed: `palme-xt --version` does not wait for the import of torch.
COMMANDS = ("train", "caption", "ask", "source", "parity")
INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C: 128 + SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run `palme-xt` with the given arguments, which default to those of the process.

    Returns:
        The exit status: that of the command, 130 after an interrupt, or 2 after an error that the user can correct,
        which is explained in one line on stderr.
    """
    try:
        with warnings.catch_warnings():
            # x-transformers up to 2.31.10 uses torch.jit.script, which torch 2.15 warns about.
            warnings.filterwarnings("ignore", message=".*torch.jit.script")
            warnings.filterwarnings("default", message="the tokenizer does not reproduce", category=UserWarning)
            warnings.showwarning = lambda message, *where: complain(f"warning: {message}", met=True)
            command, options = parse(sys.argv[1:] if argv is None else argv)
            status: int = _module(command).run(options)
            return status
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("palme_xt"):
            raise
        complain(f"error: {error.name} is not installed: pip install -e '.[train]'")
    except (ValueError, TypeError, OSError) as error:
        # Errors of this package explain themselves. Any other error is a defect, and shows its traceback.
        if not isinstance(error, OSError) and not _raised_here(error):
            raise
        complain(f"error: {error}", met=getattr(error, "met", False))
    except KeyboardInterrupt:
        complain("interrupted", met=True)
        return INTERRUPTED
    return 2


def parse(argv: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the command in `argv`, and its options.

    Raises:
        SystemExit: After `--help`, `--version`, `--print_config` or no argument at all.
        ValueError: If the command or an option is unknown, or options cannot be combined.
    """
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help", "--version"):
        print(f"palme-xt {palme_xt.__version__}" if command == "--version" else __doc__)
        sys.exit(0)
    if command not in COMMANDS:
        hint = did_you_mean(command, COMMANDS)
        raise ValueError(f"{command!r} must be one of the commands {', '.join(COMMANDS)}{hint}")
    return command, _module(command).parse([_with_underscores(argument) for argument in argv[1:]])


def _with_underscores(argument: str) -> str:
    option, equals, value = argument.partition("=")
    return option.replace("-", "_").replace("__", "--", 1) + equals + value if option.startswith("--") else argument


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a question that names the known word closest to this one, or nothing if none is close."""
    return "".join(f": did you mean {closest}?" for closest in difflib.get_close_matches(word, known, n=1))


def complain(message: str, *, met: bool = False) -> None:
    """Print one line on stderr.

    With several processes, only the first one prints the line if all have `met`, otherwise the first of each machine.
    """
    rank, first_here = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0") == "0"
    if rank == "0" or (first_here and not met):
        print(f"palme-xt: {message}" + (f" (process {rank})" if rank != "0" else ""), file=sys.stderr)


def _module(command: str) -> Any:
    return importlib.import_module(f"palme_xt.cli.{command}")


def _raised_here(error: Exception) -> bool:
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("palme_xt.")
