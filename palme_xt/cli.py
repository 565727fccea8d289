"""The command line: `palme-xt train`, `caption`, `source` and `parity`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import palme_xt
from palme_xt.config import PalmEConfig

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from torch import Tensor

    from palme_xt.model import PalmE
    from palme_xt.preprocessing import Preprocessing
    from palme_xt.tokenizer import Tokenizer
    from palme_xt.training import Outcome

FLAGS = ("--strict", "--streaming")  # options of `train` that may stand alone
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
        _complain(f"error: {error.name} is not installed: pip install 'palme-xt[train]'")
    except (ValueError, TypeError) as error:
        # Errors of this package explain themselves; one from elsewhere is a defect and shows where it is from.
        if not _raised_here(error):
            raise
        _complain(f"error: {error}")
    except OSError as error:
        _complain(f"error: {error}")
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED
    return 2


def _complain(message: str) -> None:
    """One line on stderr, from the first of many processes: they fail together."""
    if os.environ.get("RANK", "0") == "0":
        print(f"palme-xt: {message}", file=sys.stderr)


def _raised_here(error: Exception) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("palme_xt.")


def _run(argv: Sequence[str] | None) -> int:
    parser, argv = make_parser(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(argv).as_dict()
    command = options["command"]
    if command == "train" and options["train"]["resume"] is not None:
        _refuse_others(options["train"], parser.parse_args(["train"]).as_dict()["train"])
    run = {"train": _train, "caption": _caption, "source": _source, "parity": _parity}[command]
    return run(options[command])


def make_parser(argv: Sequence[str]) -> tuple[ArgumentParser, list[str]]:
    """The parser, whose defaults depend on the arguments, and these as it takes them."""
    from jsonargparse import ArgumentParser

    from palme_xt.data import Data
    from palme_xt.drift import TOLERANCE
    from palme_xt.training import Training

    argv = _spelled_out(list(argv))
    train = ArgumentParser(
        prog="palme-xt train",
        usage="palme-xt train [--data DATA] [--run RUN] [OPTION VALUE ...]\n       palme-xt train --resume RUN",
        description="Train a captioner on your own captioned pictures, or on scenes of handwritten digits, and show "
        "what it has learned. `accelerate launch -m palme_xt train ...` trains on many processes. Every argument of "
        "PalmE is an option; overrides are given one by one, as in --decoder_kwargs.ff_glu true. The model's defaults "
        "depend on the data: see `palme-xt train --data DATA --help`. Hyphens do as well as underscores.",
        allow_abbrev=False,
    )
    train.add_argument("--run", type=str, default=None, help="new run folder (default: runs/NAME-DATE-TIME)")
    train.add_argument(
        "--resume",
        metavar="RUN",
        type=str,
        default=None,
        help="go on with this run, from its last checkpoint, as if it had never stopped; no other option goes with it",
    )
    train.add_argument(
        "--tokenizer",
        metavar="FILE_OR_NAME",
        type=str,
        default=None,
        help="tokenizer.json of the tokenizers library, or the name of a repository on the hub (default: bytes)",
    )
    train.add_argument("--bos_token", type=str, default=None, help="token that begins a text (default: a usual one)")
    train.add_argument("--eos_token", type=str, default=None, help="token that ends a text (default: a usual one)")
    train.add_class_arguments(Data)
    train.add_class_arguments(Training)
    train.add_class_arguments(PalmEConfig)
    train.set_defaults(_model_defaults(argv))

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
    caption.add_argument(
        "--attention", metavar="OUT.png", type=str, help="draw where on one IMAGE the decoder looked for each word"
    )
    caption.add_argument(
        "--layer", type=int, default=-1, help="whose cross-attention is drawn, from 0, or from the end (default: -1)"
    )

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
    commands.add_subcommand("train", train, help="train a captioner on your pictures, or on scenes of digits")
    commands.add_subcommand("caption", caption, help="caption image files with a trained run")

    commands.add_subcommand("source", source, help="print the model as an x-transformers program")
    commands.add_subcommand("parity", parity, help="tell whether another x-transformers computes the same")

    return parser, argv


def _spelled_out(argv: list[str]) -> list[str]:
    """Options of `train` as the parser knows them: with underscores, and flags with their value."""
    if argv[:1] != ["train"]:
        return argv
    spelled = []
    for argument, following in zip(argv, [*argv[1:], "--"], strict=True):
        option, equals, value = argument.partition("=")
        if argument.startswith("--"):
            option = "--" + option[2:].replace("-", "_")
            if option in FLAGS and not equals and following.startswith("--"):
                equals, value = "=", "true"
        spelled.append(option + equals + value)
    return spelled


def _model_defaults(argv: list[str]) -> dict[str, Any]:
    """The model that `train` makes unless told otherwise: it depends on the data and on the tokenizer."""
    from argparse import ArgumentParser

    from palme_xt.data import DIGITS
    from palme_xt.tokenizer import load_tokenizer
    from palme_xt.training import DIGITS_MODEL, PICTURES_MODEL

    if argv[:1] != ["train"]:
        return DIGITS_MODEL.to_dict()
    first = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in "--data", "--tokenizer", "--bos_token", "--eos_token":
        first.add_argument(option, nargs="?")
    found, _ = first.parse_known_args(argv)
    model = DIGITS_MODEL if found.data in (None, DIGITS) else PICTURES_MODEL
    if not found.tokenizer or "--help" in argv:
        return model.to_dict()
    tokenizer = load_tokenizer(found.tokenizer, found.bos_token, found.eos_token)
    return model.to_dict() | {"num_tokens": tokenizer.num_tokens}


def _refuse_others(options: dict[str, Any], defaults: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if name != "resume" and value != defaults.get(name)]
    if given:
        raise ValueError(
            f"--resume={options['resume']} goes with no other option, found --{' --'.join(given)}: the run has its own"
        )


def _train(options: dict[str, Any]) -> int:
    from dataclasses import fields

    from accelerate import PartialState

    from palme_xt.data import Data
    from palme_xt.run import Run
    from palme_xt.tokenizer import load_tokenizer, read_tokenizer
    from palme_xt.training import Training, train

    if options["resume"] is not None:
        run = Run(options["resume"])
        config, values, tokenizer = run.config(), run.training(), read_tokenizer(run.folder)
    else:
        values, tokenizer = (
            options,
            load_tokenizer(*(options[name] for name in ("tokenizer", "bos_token", "eos_token"))),
        )
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
        print(f"run folder: {run.folder}")
        print(f"caption its held-out images: palme-xt caption {run.folder} {run.folder}/held_out/*.png")
        if outcome.interrupted:
            print(f"go on with it: palme-xt train --resume {run.folder}")
    return INTERRUPTED if outcome.interrupted else 0


def _print_outcome(outcome: Outcome) -> None:
    from palme_xt.tokens import printable

    rows = [(printable(predicted), true) for predicted, true in zip(outcome.predicted, outcome.true, strict=True)]
    width = max(len("predicted"), *(len(predicted) for predicted, _ in rows[:SHOWN]))
    print(f"{'':6} {'predicted':{width}}  true")
    for predicted, true in rows[:SHOWN]:
        print(f"{'right' if predicted == true else 'wrong':6} {predicted:{width}}  {true}")
    print(
        f"held-out exact match: {outcome.exact_match:.1%} of {len(rows)} images; loss {outcome.loss:.3f} nats a token"
    )
    progress = outcome.progress
    print(f"{progress.step} steps; {progress.rows} training rows read, of which skipped: {_counted(progress.skipped)}")
    print(f"{len(rows)} held-out images; skipped: {_counted(outcome.skipped)}")


def _counted(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count} with {reason}" for reason, count in sorted(skipped.items())) or "none"


def _caption(options: dict[str, Any]) -> int:
    import torch

    from palme_xt.captioning import caption, stream_caption
    from palme_xt.preprocessing import read_preprocessing
    from palme_xt.run import Run
    from palme_xt.tokenizer import read_tokenizer
    from palme_xt.tokens import printable

    run = Run(options["run"])
    model = run.load()
    preprocessing, tokenizer = read_preprocessing(run.folder, model.config), read_tokenizer(run.folder)
    img = torch.stack([preprocessing.read(path) for path in options["image"]])
    how = _how_to_decode(options)
    if options["attention"] is not None:
        return _draw_attention(options, model, img, preprocessing, tokenizer, how)
    if options["stream"]:
        for path, one in zip(options["image"], img, strict=True):
            print(f"{path}: ", end="", flush=True)
            for text in stream_caption(model, one, tokenizer, **how):
                print(printable(text), end="", flush=True)
            print()
    else:
        for path, text in zip(options["image"], caption(model, img, tokenizer, **how), strict=True):
            print(f"{path}: {printable(text)}")
    return 0


def _draw_attention(
    options: dict[str, Any],
    model: PalmE,
    img: Tensor,
    preprocessing: Preprocessing,
    tokenizer: Tokenizer,
    how: dict[str, Any],
) -> int:
    import torch

    from palme_xt.attention_maps import cross_attention_maps, word_maps, words
    from palme_xt.captioning import caption_ids
    from palme_xt.pictures import draw_attention
    from palme_xt.tokens import printable

    if len(img) != 1 or options["stream"]:
        raise ValueError(
            f"--attention={options['attention']} draws one image, without --stream: found {len(img)} images"
        )
    (ids,) = caption_ids(model, img, tokenizer, **how).tolist()
    ids = ids[: ids.index(tokenizer.eos)] if tokenizer.eos in ids else ids
    piece = tokenizer.pieces()
    pieces = [piece(token) for token in ids]
    found = words([*pieces[:-1], pieces[-1] + piece(tokenizer.eos)] if pieces else [])
    text = torch.tensor([[tokenizer.bos, *ids, tokenizer.eos]])
    maps = cross_attention_maps(model, img, text, options["layer"])[0]
    names = [printable(word) for word, _ in found]
    draw_attention(preprocessing.shown(img[0]), names, word_maps(maps, found), Path(options["attention"]))
    print(f"{options['image'][0]}: {printable(tokenizer.decode(ids))}")
    print(f"{options['attention']} written")
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
