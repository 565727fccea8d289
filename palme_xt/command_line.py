"""What `palme-xt` can be told: commands, options, and their defaults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import palme_xt
from palme_xt.config import PalmEConfig

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

FLAGS = ("--strict", "--streaming")  # options of `train` that may stand alone


def make_parser(argv: Sequence[str]) -> tuple[ArgumentParser, list[str]]:
    """The parser, whose defaults depend on the arguments, and these as it takes them."""
    from jsonargparse import ArgumentParser

    from palme_xt.data import Data
    from palme_xt.drift import TOLERANCE
    from palme_xt.training import Training

    argv = _spelled_out(list(argv))
    train = ArgumentParser(
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
    train.add_argument("--run", type=str, default=None, help="new run folder (default: runs/NAME-DATE-TIME)")
    train.add_argument(
        "--resume",
        metavar="RUN",
        type=str,
        default=None,
        help="go on with this run, from its last checkpoint, as if it had never stopped; --data goes with it where the "
        "data have moved, and no other option",
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
    caption.add_argument("--top_p", type=float, help="sample from the likeliest tokens that sum to this probability")
    caption.add_argument("--seed", type=int, help="of the sampling (default: another each time)")
    caption.add_argument("--stream", action="store_true", help="print each caption as it is decoded")
    caption.add_argument(
        "--attention", metavar="OUT.png", type=str, help="draw where on one IMAGE the decoder looked for each word"
    )
    caption.add_argument(
        "--layer", type=int, help="which cross-attention, in the order in which they run (default: -1, the last)"
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
    commands = parser.add_subcommands(dest="command", prog="palme-xt")
    commands.add_subcommand("train", train, help="train a captioner on your pictures, or on scenes of digits")
    commands.add_subcommand("caption", caption, help="caption image files with a trained run")
    commands.add_subcommand("source", source, help="print the model as an x-transformers program")
    commands.add_subcommand("parity", parity, help="tell whether another x-transformers computes the same")
    return parser, argv


def _spelled_out(argv: list[str]) -> list[str]:
    """Options as the parser knows them: with underscores, and flags of `train` with their value."""
    spelled = []
    for argument, following in zip(argv, [*argv[1:], "--"], strict=True):
        option, equals, value = argument.partition("=")
        if argument.startswith("--"):
            option = "--" + option[2:].replace("-", "_")
            if argv[0] == "train" and option in FLAGS and not equals and following.startswith("--"):
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
    if not found.tokenizer or {"-h", "--help"} & set(argv):
        return model.to_dict()
    tokenizer = load_tokenizer(found.tokenizer, found.bos_token, found.eos_token)
    return model.to_dict() | {"num_tokens": tokenizer.num_tokens}
