"""Train a captioner on your own captioned images, or on scenes of handwritten digits, and show what it has learned.

`accelerate launch -m palme_xt train ...` trains in several processes. Every argument of PalmE is an option. Overrides
are given one by one and added to the defaults, as in --decoder_kwargs.ff_glu true, or as a whole dict, which replaces
them. The defaults depend on the data, the task, the tokenizer and pretrained parts: see `palme-xt train --data DATA
--help`. Options may be spelled with hyphens or underscores. `--print_config` prints all of them as YAML, to keep in a
file for `--config`.
"""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState

from palme_xt.captioner import parts
from palme_xt.captioner.options import ADDED, PARTS, RESUMABLE, STEPS, Data, RunOptions, Training, default_model
from palme_xt.captioner.tokenizer import TOKENIZER, Tokenizer, load_tokenizer, read_tokenizer
from palme_xt.captioner.training.loop import Outcome, train
from palme_xt.captioner.training.run import SKIPPED, Run
from palme_xt.captioner.turns import IMAGE
from palme_xt.cli import INTERRUPTED, complain
from palme_xt.cli.given import Parser, device_of, from_options, given, reject_others
from palme_xt.config import PalmEConfig
from palme_xt.pretrained.source import find_file
from palme_xt.storage.folder import read_config
from palme_xt.tokens import printable

USAGE = """palme-xt train [--data DATA] [--run RUN] [OPTION VALUE ...]
       palme-xt train --from RUN [--data DATA] [--run RUN] [OPTION VALUE ...]
       palme-xt train --resume RUN [--data DATA] [--steps STEPS] [--patience PATIENCE]"""
FLAGS = ("--strict", "--streaming", "--augment")  # options that may stand alone
NAMES_OF_TOKENS = {"bos_token": None, "eos_token": None}  # names here, ids in a config: `open_task` sets those
SHOW = ("-h", "--help", "--print_config")  # options that print something instead of training
SHOWN = 8
FEW = 30  # of so few images, the share that is right says little about all images
WIDEST = 60


def parse(argv: list[str]) -> dict[str, Any]:
    """Return the options in `argv`; the defaults of the model depend on them.

    Raises:
        ValueError: If there are other options in addition to `--resume`, or the tokenizer cannot be read.
    """
    parser = Parser(prog="palme-xt train", usage=USAGE, description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", action="config", metavar="FILE", help="YAML file of options; later ones win")
    for options in RunOptions, Data, Training:
        parser.add_class_arguments(options, skip={"start"})
    parser.add_class_arguments(PalmEConfig, skip={*NAMES_OF_TOKENS})
    begin = "Begin a new run with the weights, the arguments and the tokenizer of this one."
    parser.add_argument("--from", type=str | None, metavar="RUN", help=begin)

    argv = [_with_value(argument, following) for argument, following in zip(argv, [*argv[1:], "--"], strict=False)]
    named = given(parser, [argument for argument in argv if argument not in SHOW])
    named.pop("config", None)
    if "resume" in named:
        reject_others(f"--resume={named['resume']}", named, ["resume", *RESUMABLE])
    steps = {"steps": STEPS.get(named.get("task", Data.task), Training.steps)}
    parser.set_defaults(steps | _model_defaults(named, described=any(option in argv for option in SHOW[:2])))
    changed = {name: named[name] for name in RESUMABLE if name in named}
    return dict(parser.parse_args(argv).as_dict()) | {"changed": changed}


def _with_value(argument: str, following: str) -> str:
    return f"{argument}=true" if argument in FLAGS and following.startswith("--") else argument


def _model_defaults(named: Mapping[str, Any], described: bool) -> dict[str, Any]:
    if "from" in named:
        if pretrained := [name for name in PARTS if name in named]:
            raise ValueError(f"--from={named['from']} has all weights: leave --{pretrained[0]} out")
        return read_config(named["from"]).to_dict() | NAMES_OF_TOKENS
    model = default_model(named.get("data", Data.data), named.get("task", Data.task)).to_dict()
    sizes = {"max_seq_len": model["max_seq_len"]}
    arguments = {name: value for name, value in named.items() if name not in NAMES_OF_TOKENS}
    unknown = {"image_token": None} if "decoder" in named else {}  # which id of its vocabulary is free
    model |= {**parts.described({**sizes, **arguments}), **NAMES_OF_TOKENS, **unknown}
    if "tokenizer" not in named or "decoder" in named or described:
        return model
    tokenizer = load_tokenizer(named["tokenizer"], named.get("bos_token"), named.get("eos_token"))
    inside = {} if model["image_token"] is None else {"image_token": tokenizer.num_tokens}
    return model | {"num_tokens": tokenizer.num_tokens + len(inside)} | inside


def run(options: dict[str, Any]) -> int:
    """Train, print what was learned, and return the exit status."""
    if options["device"] is not None:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(f"--device={options['device']} is for one process: accelerate launch has its own options")
        device = device_of(options["device"])
        os.environ |= {"ACCELERATE_TORCH_DEVICE": str(device), "ACCELERATE_USE_CPU": str(device.type == "cpu")}
    if options["resume"] is not None:
        folder = Run(options["resume"])
        config, values, tokenizer = read_config(folder.folder), folder.training(), read_tokenizer(folder.folder)
        values = ADDED | values | options["changed"]
    else:
        values = options | {"start": options["from"]}
        given_tokenizer = [options[name] for name in ("tokenizer", "bos_token", "eos_token")]
        if options["from"] is not None and any(given_tokenizer):
            raise ValueError(f"--from={options['from']} keeps the tokenizer of its run: leave --tokenizer out")
        tokenizer = _tokenizer(options, given_tokenizer)
        config = from_options(PalmEConfig, options | NAMES_OF_TOKENS)
        name = re.sub(r"[^\w.-]+", "-", Path(options["data"].rpartition(":")[2]).stem).strip("-.") or "data"
        folder = Run(options["run"] or f"runs/{name}-{datetime.now():%Y%m%d-%H%M%S}")
    try:
        training, data = from_options(Training, values), from_options(Data, values)
    except KeyError as error:
        message = f"{folder.folder} does not say how it was trained: {error} is missing in config.json"
        raise ValueError(message) from error
    if not config.cross_attend and config.image_token is None and PartialState().is_main_process:
        complain("note: with cross_attend=False, the model learns the captions without looking at the images")
    outcome = train(config, training, data, tokenizer, folder, resume=options["resume"] is not None)
    if PartialState().is_main_process:
        _print_outcome(outcome, folder.folder, training.steps)
    return INTERRUPTED if outcome.interrupted else 0


def _tokenizer(options: Mapping[str, Any], given_tokenizer: Sequence[str | None]) -> Tokenizer:
    if options["from"]:
        return read_tokenizer(Path(options["from"]))
    name, *ends = given_tokenizer
    if name or not options["decoder"]:
        return load_tokenizer(name, *ends)
    file = find_file(options["decoder"], TOKENIZER, download="tokenizer*.json")
    return load_tokenizer(str(file), *ends) if any(ends) else read_tokenizer(file.parent)


def _print_outcome(outcome: Outcome, folder: Path, steps: int) -> None:
    evaluation, progress = outcome.evaluation, outcome.progress
    scores, count, weights = evaluation.scores, len(evaluation.right), f"the weights of step {evaluation.step}"
    rows = zip(evaluation.right, evaluation.predicted, evaluation.references, strict=True)
    shown = [(right, _cut(printable(said)), _cut(printable(true[0]))) for right, said, true in islice(rows, SHOWN)]
    width = max(len("predicted"), *(len(predicted) for _, predicted, _ in shown))
    print(f"{'':6} {'predicted':{width}}  true")
    questions = [printable(question) if question.replace(IMAGE, "") else "" for question in evaluation.questions]
    for (right, predicted, true), question in zip(
        shown, [*questions, *[""] * SHOWN], strict=False
    ):  # older runs have none
        print(f"{'right' if right else 'wrong':6} {predicted:{width}}  {true}  {question}".rstrip())
    matches = f"held-out exact match: {scores['held_out_exact_match']:.1%} of {count} images"
    print(f"{matches}; chrF {scores['held_out_chrf']:.1f}; loss {evaluation.loss:.3f} nats per token")
    if count < FEW:
        print(f"{count} held-out images are too few to judge the model by: hold out more with --held_out")
    print(f"these are the results of {weights}, which have the lowest held-out loss and are saved")
    if progress.step < steps and not outcome.interrupted:
        print(f"stopped before step {steps}: the last evaluations (--patience) did not lower the held-out loss")
    print(f"{progress.step} steps; {progress.rows} training rows read; skipped: {_counted(progress.skipped)}")
    print(f"{count} held-out images; skipped: {_counted(evaluation.skipped)}")
    if progress.skipped or evaluation.skipped:
        print(f"{folder / SKIPPED} names the skipped rows")
    quoted = shlex.quote(str(folder))
    print(f"run folder: {folder}")
    if any(questions):
        print(f"ask about a held-out image: palme-xt ask {quoted} {quoted}/held_out/00.png")
    else:
        print(f"caption its held-out images: palme-xt caption {quoted} {quoted}/held_out/*.png")
    if outcome.interrupted:
        print(f"resume it: palme-xt train --resume {quoted}")


def _cut(text: str) -> str:
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"


def _counted(skipped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} with {reason}" for reason, count in sorted(skipped.items())) or "none"
