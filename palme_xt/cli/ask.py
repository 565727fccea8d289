"""Ask a trained run about images: one question, or one after another, a line of the input each, until an empty line.

The last argument is the question unless it is a file, or ends as the name of an image does. In the question, `<image>`
stands for each image, in order; without it, the images come first.
"""

import json
import os
import sys
from typing import Any

from PIL import Image

from palme_xt.captioner.caption import Captioner
from palme_xt.cli.given import Parser, add_decoding_options, device_of, how_to_decode
from palme_xt.tokens import printable


def parse(argv: list[str]) -> dict[str, Any]:
    """Return the options in `argv`."""
    usage = 'palme-xt ask RUN [IMAGE ...] ["QUESTION"] [OPTION ...]'
    parser = Parser(prog="palme-xt ask", usage=usage, description=__doc__, allow_abbrev=False)
    add_decoding_options(parser)
    parser.add_argument("words", metavar="IMAGE|QUESTION", nargs="*", help="image files, and the question, if any")
    parser.add_argument("--json", action="store_true", help='print {"question": ..., "answer": ...} on each line')
    return dict(parser.parse_args(argv).as_dict())


def run(options: dict[str, Any]) -> int:
    """Print the answers as they are decoded, and return the exit status."""
    images, questions = options["words"], iter(_line, "")
    if images and not (
        os.path.exists(images[-1]) or os.path.splitext(images[-1])[1].lower() in Image.registered_extensions()
    ):
        questions = iter([images.pop()])
    captioner = Captioner.from_pretrained(options["run"], device_of(options["device"]))
    how, ask = how_to_decode(options), captioner.converse(images)
    for question in questions:
        answer = ask(question, **how)
        if options["json"]:
            answer = iter([json.dumps({"question": question, "answer": "".join(answer)})])
        for text in answer:
            print(printable(text), end="", flush=True)
        print()
    return 0


def _line() -> str:
    """Return the next line of the input, with a prompt on a terminal, or nothing at its end."""
    print(end="> " if sys.stdin.isatty() else "", flush=True)
    return sys.stdin.readline().strip()
