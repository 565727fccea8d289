"""The command line: `palme-xt train`, `caption`, `source` and `parity`.

Each command imports what it needs, so that `palme-xt --version` does not wait seconds for torch.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import palme_xt

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from torch import Tensor

    from palme_xt.captioner.images import Preprocessing
    from palme_xt.captioner.tokenizer import Tokenizer
    from palme_xt.captioner.training.loop import Outcome
    from palme_xt.model import PalmE

COMMANDS = {
    "train": "train a captioner on your pictures, or on scenes of digits",
    "caption": "caption image files with a trained run",
    "source": "print the model as an x-transformers program",
    "parity": "tell whether another x-transformers computes the same",
}
FLAGS = ("--strict", "--streaming")  # options of `train` that may stand alone
HELP = ("-h", "--help")
INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C: 128 + SIGINT
SHOWN = 8
WIDEST = 60
CAPTIONED_AT_ONCE = 64


def main(argv: Sequence[str] | None = None) -> int:
    """Run `palme-xt` with the given arguments, or those of the process.

    Returns:
        0; 130 after an interrupt; 2 for anything the user can put right, explained in one line on stderr.
    """
    try:
        with warnings.catch_warnings():
            # x-transformers up to 2.31.10 uses torch.jit.script, which torch 2.15 warns of.
            warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
            command, options = parse(sys.argv[1:] if argv is None else argv)
            return {"train": _train, "caption": _caption, "source": _source, "parity": _parity}[command](options)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("palme_xt"):
            raise
        _complain(f"error: {error.name} is not installed: pip install -e '.[train]'")
    except (ValueError, TypeError) as error:
        # Errors of this package explain themselves; one from elsewhere is a defect and shows where it is from.
        if not _raised_here(error):
            raise
        _complain(f"error: {error}", met=getattr(error, "met", False))
    except OSError as error:
        _complain(f"error: {error}", met=getattr(error, "met", False))
    except KeyboardInterrupt:
        _complain("interrupted", met=True)
        return INTERRUPTED
    return 2


def parse(argv: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the command that `argv` names, and its options.

    Raises:
        SystemExit: with 0 after `--help`, `--version` or no argument at all, with 2 after an error.
        ValueError: options that do not go together.
    """
    listed = "\n".join(f"  {name:9} {purpose}" for name, purpose in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="palme-xt",
        usage="palme-xt [--help] [--version] COMMAND ...",
        description="PalmE, a vision-language model over x-transformers.",
        epilog=f"commands:\n{listed}\n\n`palme-xt COMMAND --help` lists the options of each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"palme-xt {palme_xt.__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help=argparse.SUPPRESS)
    if not argv:
        parser.print_help()
        parser.exit()
    command = parser.parse_args(argv[:1]).command
    parsers = {
        "train": _parse_train,
        "caption": _parse_caption,
        "source": _parse_source,
        "parity": _parse_parity,
    }
    return command, parsers[command](_spelled_out(argv[1:], FLAGS if command == "train" else ()))


def _spelled_out(argv: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Return options as the parsers know them: with underscores, and flags with their value."""
    spelled = []
    for argument, following in zip(argv, [*argv[1:], "--"], strict=False):
        option, equals, value = argument.partition("=")
        if argument.startswith("--"):
            option = "--" + option[2:].replace("-", "_")
            if option in flags and not equals and following.startswith("--"):
                equals, value = "=", "true"
        spelled.append(option + equals + value)
    return spelled


def _parse_train(argv: list[str]) -> dict[str, Any]:
    from jsonargparse import ArgumentParser

    from palme_xt.captioner.options import Data, Training
    from palme_xt.config import PalmEConfig

    parser = ArgumentParser(
        prog="palme-xt train",
        usage="palme-xt train [--data DATA] [--run RUN] [OPTION VALUE ...]\n"
        "       palme-xt train --resume RUN [--data DATA]",
        description="Train a captioner on your own captioned pictures, or on scenes of handwritten digits, and show "
        "what it has learned. `accelerate launch -m palme_xt train ...` trains on many processes. Every argument of "
        "PalmE is an option; overrides are given one by one, as in --decoder_kwargs.ff_glu true, beside the defaults, "
        "or as a whole dict, in their place. The model's defaults depend on the data and the tokenizer: see `palme-xt "
        "train --data DATA --help`. Hyphens do as well as underscores.",
        allow_abbrev=False,
    )
    parser.add_argument("--run", type=str, default=None, help="new run folder (default: runs/NAME-DATE-TIME)")
    parser.add_argument(
        "--resume",
        metavar="RUN",
        type=str,
        default=None,
        help="go on with this run, from its last checkpoint, as if it had never stopped; --data goes with it where the "
        "data have moved, and no other option",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FILE_OR_NAME",
        type=str,
        default=None,
        help="tokenizer.json of the tokenizers library, or the name of a repository on the hub (default: bytes)",
    )
    parser.add_argument("--bos_token", type=str, default=None, help="token that begins a text (default: a usual one)")
    parser.add_argument("--eos_token", type=str, default=None, help="token that ends a text (default: a usual one)")
    parser.add_class_arguments(Data)
    parser.add_class_arguments(Training)
    parser.add_class_arguments(PalmEConfig)

    given = _given(parser, [argument for argument in argv if argument not in HELP])
    if given.get("resume") is not None:
        _refuse_others(f"--resume={given['resume']}", given, ["resume", "data"])
    parser.set_defaults(_model_defaults(given, described=bool({*argv} & {*HELP})))
    return dict(parser.parse_args(argv).as_dict()) | {"moved": given.get("data")}


def _given(parser: ArgumentParser, argv: list[str]) -> dict[str, Any]:
    """Return the options in `argv` alone, without those that have their defaults."""
    options = parser.parse_args(argv, defaults=False).as_dict()
    return {name: value for name, value in options.items() if value is not None}


def _model_defaults(given: Mapping[str, Any], described: bool) -> dict[str, Any]:
    """Return the model that `train` makes unless told otherwise: it depends on the data and on the tokenizer."""
    from palme_xt.captioner.options import DIGITS, DIGITS_MODEL, PICTURES_MODEL
    from palme_xt.captioner.tokenizer import load_tokenizer

    model = (DIGITS_MODEL if given.get("data", DIGITS) == DIGITS else PICTURES_MODEL).to_dict()
    if "tokenizer" not in given or described:
        return model
    tokenizer = load_tokenizer(given["tokenizer"], given.get("bos_token"), given.get("eos_token"))
    return model | {"num_tokens": tokenizer.num_tokens}


def _refuse_others(run: str, given: Mapping[str, Any], allowed: Sequence[str]) -> None:
    if others := [name for name in given if name not in allowed]:
        beside = f" but --{allowed[-1]}" if len(allowed) > 1 else ""
        raise ValueError(
            f"{run} goes with no other option{beside}, found --{' --'.join(others)}: leave out what the run has"
        )


def _parse_caption(argv: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog="palme-xt caption",
        usage="palme-xt caption RUN IMAGE [IMAGE ...] [OPTION ...]",
        description="Caption image files with a trained run, one line each.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="folder that `palme-xt train` made")
    parser.add_argument("image", metavar="IMAGE", nargs="+", help="image files that Pillow can read")
    parser.add_argument("--beams", type=int, default=1, help="search with so many beams (default: 1, no search)")
    parser.add_argument("--temperature", type=float, help="sample; the higher, the wilder (default: 0, do not)")
    parser.add_argument("--top_p", type=float, help="sample from the likeliest tokens that sum to this probability")
    parser.add_argument("--seed", type=int, help="of the sampling (default: another each time)")
    parser.add_argument("--stream", action="store_true", help="print each caption as it is decoded")
    parser.add_argument(
        "--attention", metavar="OUT.png", help="draw where on one IMAGE the decoder looked for each word"
    )
    parser.add_argument(
        "--layer", type=int, help="which cross-attention, in the order in which they run (default: -1, the last)"
    )
    return vars(parser.parse_args(argv))


def _parse_source(argv: list[str]) -> dict[str, Any]:
    from jsonargparse import ArgumentParser

    from palme_xt.config import PalmEConfig

    parser = ArgumentParser(
        prog="palme-xt source",
        usage="palme-xt source [RUN] [OPTION VALUE ...]",
        description="Print the model as a self-contained x-transformers program: that of a run, with its weights, or "
        "that of the given arguments.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", type=str, nargs="?", help="folder that `palme-xt train` made")
    parser.add_class_arguments(PalmEConfig)
    options: dict[str, Any] = parser.parse_args(argv).as_dict()
    if options["run"] is not None:
        _refuse_others(options["run"], _given(parser, argv), ["run"])
    return options


def _parse_parity(argv: list[str]) -> dict[str, Any]:
    from palme_xt.parity.drift import TOLERANCE

    parser = argparse.ArgumentParser(
        prog="palme-xt parity",
        usage="palme-xt parity {record,check} RUN [--tolerance TOLERANCE]",
        description="Tell whether a trained model computes the same under another x-transformers: `record` writes a "
        "reference beside its weights, `check` exits with 0 if what is installed gives the same, and else with 1, "
        "naming the first layer that differs.",
        allow_abbrev=False,
    )
    parser.add_argument("action", choices=["record", "check"], help="write the reference, or compare with it")
    parser.add_argument("run", metavar="RUN", help="folder that `palme-xt train` made")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="of check: largest difference, as a share of the largest value",
    )
    return vars(parser.parse_args(argv))


def _complain(message: str, *, met: bool = False) -> None:
    """Print one line on stderr: of many processes, from the first if all `met`, else from the first of each machine."""
    rank, first_here = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0") == "0"
    if rank == "0" or (first_here and not met):
        print(f"palme-xt: {message}" + (f" (process {rank})" if rank != "0" else ""), file=sys.stderr)


def _raised_here(error: Exception) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("palme_xt.")


def _train(options: dict[str, Any]) -> int:
    from dataclasses import fields

    from accelerate import PartialState

    from palme_xt.captioner.options import Data, Training
    from palme_xt.captioner.tokenizer import load_tokenizer, read_tokenizer
    from palme_xt.captioner.training.loop import train
    from palme_xt.captioner.training.run import Run
    from palme_xt.config import PalmEConfig

    if options["resume"] is not None:
        run = Run(options["resume"])
        config, values, tokenizer = run.config(), run.training(), read_tokenizer(run.folder)
        values |= {"data": options["moved"]} if options["moved"] is not None else {}
    else:
        values = options
        tokenizer = load_tokenizer(*(options[name] for name in ("tokenizer", "bos_token", "eos_token")))
        config = PalmEConfig(**{argument.name: options[argument.name] for argument in fields(PalmEConfig)})
        name = re.sub(r"[^\w.-]+", "-", Path(options["data"].rpartition(":")[2]).stem).strip("-.") or "data"
        run = Run(options["run"] or f"runs/{name}-{datetime.now():%Y%m%d-%H%M%S}")
    try:
        training = Training(**{option.name: values[option.name] for option in fields(Training)})
        data = Data(**{option.name: values[option.name] for option in fields(Data)})
    except KeyError as error:
        raise ValueError(f"{run.folder} does not say how it was trained: {error} is missing in config.json") from error
    outcome = train(config, training, data, tokenizer, run, resume=options["resume"] is not None)
    if PartialState().is_main_process:
        _print_outcome(outcome)
        folder = shlex.quote(str(run.folder))
        print(f"run folder: {run.folder}")
        print(f"caption its held-out images: palme-xt caption {folder} {folder}/held_out/*.png")
        if outcome.interrupted:
            print(f"go on with it: palme-xt train --resume {folder}")
    return INTERRUPTED if outcome.interrupted else 0


def _print_outcome(outcome: Outcome) -> None:
    from palme_xt.tokens import printable

    evaluation, progress = outcome.evaluation, outcome.progress
    rows = list(zip(evaluation.predicted, evaluation.true, strict=True))
    shown = [(predicted == true, _cut(printable(predicted)), _cut(true)) for predicted, true in rows[:SHOWN]]
    width = max(len("predicted"), *(len(predicted) for _, predicted, _ in shown))
    print(f"{'':6} {'predicted':{width}}  true")
    for right, predicted, true in shown:
        print(f"{'right' if right else 'wrong':6} {predicted:{width}}  {true}")
    matches = f"held-out exact match: {evaluation.exact_match:.1%} of {len(rows)} images"
    print(f"{matches}; loss {evaluation.loss:.3f} nats a token")
    print(f"{progress.step} steps; {progress.rows} training rows read, of which skipped: {_counted(progress.skipped)}")
    print(f"{len(rows)} held-out images; skipped: {_counted(evaluation.skipped)}")


def _cut(text: str) -> str:
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"


def _counted(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count} with {reason}" for reason, count in sorted(skipped.items())) or "none"


def _caption(options: dict[str, Any]) -> int:
    import torch

    from palme_xt.captioner.caption import caption, stream_caption
    from palme_xt.captioner.images import ImageError, read_preprocessing
    from palme_xt.captioner.tokenizer import read_tokenizer
    from palme_xt.captioner.training.run import Run
    from palme_xt.tokens import printable

    run = Run(options["run"])
    model = run.load()
    preprocessing, tokenizer = read_preprocessing(run.folder, model.config), read_tokenizer(run.folder)
    how = _how_to_decode(options)
    if options["attention"] is not None:
        return _draw_attention(options, model, preprocessing, tokenizer, how)
    if options["layer"] is not None:
        raise ValueError(f"--layer={options['layer']} has no effect without --attention: leave it out")
    unreadable = 0
    for start in range(0, len(options["image"]), CAPTIONED_AT_ONCE):
        images: list[tuple[str, Tensor]] = []
        for path in options["image"][start : start + CAPTIONED_AT_ONCE]:
            try:
                images.append((path, preprocessing.read(path)))
            except ImageError as error:  # the others have captions
                _complain(f"error: {error}")
                unreadable += 1
        if options["stream"]:
            for path, img in images:
                print(f"{path}: ", end="", flush=True)
                for text in stream_caption(model, img, tokenizer, **how):
                    print(printable(text), end="", flush=True)
                print()
        elif images:
            texts = caption(model, torch.stack([img for _, img in images]), tokenizer, **how)
            for (path, _), text in zip(images, texts, strict=True):
                print(f"{path}: {printable(text)}", flush=True)
    return 2 if unreadable else 0


def _draw_attention(
    options: dict[str, Any], model: PalmE, preprocessing: Preprocessing, tokenizer: Tokenizer, how: dict[str, Any]
) -> int:
    import torch

    from palme_xt.captioner.attention import cross_attention_maps, word_maps, words
    from palme_xt.captioner.caption import caption_ids
    from palme_xt.captioner.drawing import draw_attention
    from palme_xt.tokens import printable

    out, paths = Path(options["attention"]), options["image"]
    if len(paths) != 1 or options["stream"]:
        raise ValueError(f"--attention={out} draws one image, without --stream: found {len(paths)} images")
    if out.suffix.lower() != ".png" or (out.exists() and out.samefile(paths[0])):
        raise ValueError(f"--attention={out} must be a PNG file, and not the image itself: name another")
    img = preprocessing.read(paths[0])[None]
    (ids,) = caption_ids(model, img, tokenizer, **how).tolist()
    ids = ids[: ids.index(tokenizer.eos)] if tokenizer.eos in ids else ids
    piece = tokenizer.pieces()
    pieces = [piece(token) for token in ids]
    found = words([*pieces[:-1], pieces[-1] + piece(tokenizer.eos)] if pieces else [])
    text = torch.tensor([[tokenizer.bos, *(ids or [tokenizer.eos])]])
    maps = cross_attention_maps(model, img, text, -1 if options["layer"] is None else options["layer"])[0]
    names = [printable(word) for word, _ in found]
    draw_attention(preprocessing.shown(img[0]), names, word_maps(maps, found), out)
    print(f"{paths[0]}: {printable(tokenizer.decode(ids))}")
    print(f"{out} written")
    return 0


def _source(options: dict[str, Any]) -> int:
    from dataclasses import fields

    from palme_xt.captioner.training.run import WEIGHTS, Run
    from palme_xt.config import PalmEConfig
    from palme_xt.source import to_source

    if options["run"] is None:
        given = PalmEConfig(**{argument.name: options[argument.name] for argument in fields(PalmEConfig)})
        print(to_source(given), end="")
        return 0
    run = Run(options["run"])
    print(to_source(run.config(), str(run.folder / WEIGHTS)), end="")
    return 0


def _parity(options: dict[str, Any]) -> int:
    from palme_xt.parity.drift import PARITY, check, record

    folder = Path(options["run"])
    if options["action"] == "record":
        record(folder)
        print(f"{folder / PARITY} written")
        return 0
    verdict = check(folder, options["tolerance"])
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
        if not how.get("temperature"):
            raise ValueError(f"--seed={seed} has no effect without --temperature or --top-p: leave it out")
        torch.manual_seed(seed)
    return how
