"""The command line: `palme-xt train`, `caption`, `source` and `parity`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import palme_xt
from palme_xt.config import PalmEConfig

if TYPE_CHECKING:
    from palme_xt.training import Outcome

INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C: 128 + SIGINT
SHOWN = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Run `palme-xt` with the given arguments, or those of the process.

    Returns:
        0; 130 after an interrupt; 2 for anything the user can put right, explained in one line on stderr.
    """
    try:
        return _run(argv)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("palme_xt"):
            raise
        print(f"palme-xt: error: {error.name} is not installed: pip install 'palme-xt[train]'", file=sys.stderr)
    except (ValueError, TypeError) as error:
        # Errors of this package explain themselves; one from elsewhere is a defect and shows where it is from.
        if not _raised_here(error):
            raise
        print(f"palme-xt: error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"palme-xt: error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("palme-xt: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 2


def _raised_here(error: Exception) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("palme_xt.")


def _run(argv: Sequence[str] | None) -> int:
    from jsonargparse import ArgumentParser

    from palme_xt.drift import TOLERANCE
    from palme_xt.training import DIGITS_MODEL, Training

    train = ArgumentParser(
        prog="palme-xt train",
        usage="palme-xt train [--run RUN] [OPTION VALUE ...]",
        description="Train a captioner on scenes of handwritten digits and show what it has learned. Every argument of "
        "PalmE is an option; overrides are given one by one, as in --decoder_kwargs.ff_glu true.",
        allow_abbrev=False,
    )
    train.add_argument("--run", type=str, default=None, help="new run folder (default: runs/digits-DATE-TIME)")
    train.add_class_arguments(Training)
    train.add_class_arguments(PalmEConfig)
    train.set_defaults(DIGITS_MODEL.to_dict())

    caption = ArgumentParser(
        prog="palme-xt caption",
        usage="palme-xt caption RUN IMAGE [IMAGE ...] [OPTION ...]",
        description="Caption image files with a trained run, one line each.",
        allow_abbrev=False,
    )
    caption.add_argument("run", metavar="RUN", type=str, help="folder that `palme-xt train` made")
    caption.add_argument("image", metavar="IMAGE", type=str, nargs="+", help="image files that Pillow can read")
    caption.add_argument("--beams", type=int, default=1, help="search with so many beams (default: 1, no search)")
    caption.add_argument("--temperature", type=float, help="sample; the higher, the wilder (default: 0, do not)")
    caption.add_argument("--top-p", type=float, help="sample from the likeliest tokens that sum to this probability")
    caption.add_argument("--seed", type=int, help="of the sampling (default: another each time)")
    caption.add_argument("--stream", action="store_true", help="print each caption as it is decoded")

    source = ArgumentParser(
        prog="palme-xt source",
        usage="palme-xt source [RUN] [OPTION VALUE ...]",
        description="Print the model as a self-contained x-transformers program: that of a run, with its weights, or "
        "that of the given arguments.",
        allow_abbrev=False,
    )
    source.add_argument("run", metavar="RUN", type=str, nargs="?", help="folder that `palme-xt train` made")
    source.add_class_arguments(PalmEConfig)

    parity = ArgumentParser(
        prog="palme-xt parity",
        usage="palme-xt parity {record,check} RUN [--tolerance TOLERANCE]",
        description="Tell whether a trained model computes the same under another x-transformers: `record` writes a "
        "reference beside its weights, `check` exits with 0 if what is installed gives the same, and else with 1, "
        "naming the first layer that differs.",
        allow_abbrev=False,
    )
    parity.add_argument("action", choices=["record", "check"], help="write the reference, or compare with it")
    parity.add_argument("run", metavar="RUN", type=str, help="folder that `palme-xt train` made")
    parity.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="of check: largest difference, as a share of the largest value",
    )

    parser = ArgumentParser(
        prog="palme-xt",
        usage="palme-xt [--version] {train,caption,source,parity} ...",
        description="PalmE, a vision-language model over x-transformers.",
        version=palme_xt.__version__,
        allow_abbrev=False,
    )
    commands = parser.add_subcommands(dest="command")
    commands.add_subcommand("train", train, help="train a captioner on images of handwritten digits")
    commands.add_subcommand("caption", caption, help="caption image files with a trained run")

    commands.add_subcommand("source", source, help="print the model as an x-transformers program")
    commands.add_subcommand("parity", parity, help="tell whether another x-transformers computes the same")

    options = parser.parse_args(argv).as_dict()
    command = options["command"]
    run = {"train": _train, "caption": _caption, "source": _source, "parity": _parity}[command]
    return run(options[command])


def _train(options: dict[str, Any]) -> int:
    from dataclasses import fields

    from palme_xt.run import Run
    from palme_xt.training import Training, train

    training = Training(**{option.name: options[option.name] for option in fields(Training)})
    config = PalmEConfig(**{argument.name: options[argument.name] for argument in fields(PalmEConfig)})
    run = Run(options["run"] or f"runs/digits-{datetime.now():%Y%m%d-%H%M%S}")
    outcome = train(config, training, run)
    _print_outcome(outcome)
    print(f"run folder: {run.folder}")
    print(f"caption its held-out images: palme-xt caption {run.folder} {run.folder}/held_out/*.png")
    return INTERRUPTED if outcome.interrupted else 0


def _print_outcome(outcome: Outcome) -> None:
    from palme_xt.tokens import printable

    rows = [(printable(predicted), true) for predicted, true in zip(outcome.predicted, outcome.true, strict=True)]
    rows = rows[:SHOWN]
    width = max(len("predicted"), *(len(predicted) for predicted, _ in rows))
    print(f"{'':5}  {'predicted':{width}}  true")
    for predicted, true in rows:
        print(f"{'right' if predicted == true else 'wrong'}  {predicted:{width}}  {true}")
    print(f"held-out exact match: {outcome.exact_match:.1%} of {len(outcome.true)} images")


def _caption(options: dict[str, Any]) -> int:
    import torch

    from palme_xt.captioning import caption, read_image, stream_caption
    from palme_xt.run import Run
    from palme_xt.tokens import printable

    model = Run(options["run"]).load()
    img = torch.stack([read_image(path, model.config) for path in options["image"]])
    how = _how_to_decode(options)
    if options["stream"]:
        for path, one in zip(options["image"], img, strict=True):
            print(f"{path}: ", end="", flush=True)
            for text in stream_caption(model, one, **how):
                print(printable(text), end="", flush=True)
            print()
    else:
        for path, text in zip(options["image"], caption(model, img, **how), strict=True):
            print(f"{path}: {printable(text)}")
    return 0


def _source(options: dict[str, Any]) -> int:
    from dataclasses import fields

    from palme_xt.run import WEIGHTS, Run

    given = PalmEConfig(**{argument.name: options[argument.name] for argument in fields(PalmEConfig)})
    if options["run"] is None:
        print(given.to_source(), end="")
        return 0
    if given != PalmEConfig():
        raise ValueError(f"{options['run']} has arguments of its own: pass a run, or arguments, not both")
    run = Run(options["run"])
    print(run.config().to_source(str(run.folder / WEIGHTS)), end="")
    return 0


def _parity(options: dict[str, Any]) -> int:
    from palme_xt.drift import check, record
    from palme_xt.run import PARITY, Run

    run = Run(options["run"])
    if options["action"] == "record":
        record(run)
        print(f"{run.folder / PARITY} written")
        return 0
    verdict = check(run, options["tolerance"])
    for name, installed in verdict.installed.items():
        print(f"{name}: recorded with {verdict.recorded[name]}, installed is {installed}")
    print(f"differs: {verdict.difference}" if verdict.difference else f"the same within {options['tolerance']:g}")
    return 1 if verdict.difference else 0


def _how_to_decode(options: dict[str, Any]) -> dict[str, Any]:
    import torch

    beams, temperature, top_p, seed = (options[name] for name in ("beams", "temperature", "top_p", "seed"))
    if beams != 1 and (options["stream"] or temperature or top_p is not None or seed is not None):
        raise ValueError(f"--beams={beams} goes with no other option: which beam is best shows at the end, unsampled")
    how: dict[str, Any] = {} if beams == 1 else {"beams": beams}
    if temperature is not None:
        how["temperature"] = temperature
    if top_p is not None:
        if temperature == 0:
            raise ValueError(
                f"--top-p={top_p} has no effect with --temperature=0, which does not sample: leave one out"
            )
        if not 0 < top_p <= 1:
            raise ValueError(f"--top-p={top_p} must be greater than 0 and at most 1")
        how |= {"temperature": 1.0} | how | {"filter_logits_fn": "top_p", "filter_kwargs": {"thres": top_p}}
    if seed is not None:
        if not 0 <= seed < 2**63:
            raise ValueError(f"--seed={seed} must be within 0..2**63-1")
        torch.manual_seed(seed)
    return how
