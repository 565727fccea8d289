"""The command line: `palme-xt train`, `caption`, `source` and `parity`."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palme_xt.command_line import make_parser
from palme_xt.config import PalmEConfig

if TYPE_CHECKING:
    from torch import Tensor

    from palme_xt.model import PalmE
    from palme_xt.preprocessing import Preprocessing
    from palme_xt.tokenizer import Tokenizer
    from palme_xt.training import Outcome

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
        return _run(argv)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("palme_xt"):
            raise
        _complain(f"error: {error.name} is not installed: pip install 'palme-xt[train]'")
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


def _complain(message: str, *, met: bool = False) -> None:
    """One line on stderr: of many processes, from the first if they all `met`, else from the first of each machine."""
    rank, first_here = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0") == "0"
    if rank == "0" or (first_here and not met):
        print(f"palme-xt: {message}" + (f" (process {rank})" if rank != "0" else ""), file=sys.stderr)


def _raised_here(error: Exception) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("palme_xt.")


def _run(argv: Sequence[str] | None) -> int:
    parser, argv = make_parser(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(argv).as_dict()
    command = options["command"]
    given = [re.split("[=.]", argument[2:])[0] for argument in argv if argument.startswith("--")]
    if command == "train" and options["train"]["resume"] is not None:
        _refuse_others("--resume=" + options["train"]["resume"], given, ["resume", "data"])
        options["train"]["moved"] = options["train"]["data"] if "data" in given else None
    if command == "source" and options["source"]["run"] is not None:
        _refuse_others(options["source"]["run"], given, [])
    run = {"train": _train, "caption": _caption, "source": _source, "parity": _parity}[command]
    return run(options[command])


def _refuse_others(run: str, given: Sequence[str], allowed: Sequence[str]) -> None:
    if others := [name for name in given if name not in allowed]:
        beside = f" but --{allowed[-1]}" if allowed else ""
        raise ValueError(
            f"{run} goes with no other option{beside}, found --{' --'.join(others)}: leave out what the run has"
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

    from palme_xt.captioning import caption, stream_caption
    from palme_xt.preprocessing import ImageError, read_preprocessing
    from palme_xt.run import Run
    from palme_xt.tokenizer import read_tokenizer
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

    from palme_xt.attention_maps import cross_attention_maps, word_maps, words
    from palme_xt.captioning import caption_ids
    from palme_xt.pictures import draw_attention
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

    from palme_xt.run import WEIGHTS, Run

    if options["run"] is None:
        given = PalmEConfig(**{argument.name: options[argument.name] for argument in fields(PalmEConfig)})
        print(given.to_source(), end="")
        return 0
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
        if not how.get("temperature"):
            raise ValueError(f"--seed={seed} has no effect without --temperature or --top-p: leave it out")
        torch.manual_seed(seed)
    return how
