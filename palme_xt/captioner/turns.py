"""Write captions, and questions with their answers, as token ids.

A text is BOS and its turns. A turn is a question, a line break, the answer and EOS; a caption is an answer without a
question, and without the line break. Only answers and their EOS are learned.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from palme_xt.captioner.tokenizer import Tokenizer

IMAGE = "<image>"  # stands for an image in questions, as in the data sets of LLaVA and in transformers


class Turn(NamedTuple):
    """A question and its answer. `<image>` stands for an image in the question, and alone for the one of a caption."""

    question: str
    answer: str


class Text(NamedTuple):
    """Token ids, and which of them are learned."""

    ids: list[int]
    learned: list[bool]


def written(turns: Sequence[Turn], tokenizer: Tokenizer, image_token: int | None) -> Text:
    """Return a text with all its turns."""
    ids, learned = [tokenizer.bos], [False]
    for turn in turns:
        question = question_ids(turn.question, tokenizer, image_token)
        answer = tokenizer.encode(turn.answer)[1:]
        ids += question + answer
        learned += [False] * len(question) + [True] * len(answer)
    return Text(ids, learned)


def question_ids(question: str, tokenizer: Tokenizer, image_token: int | None) -> list[int]:
    """Return the token ids of a question and its line break, with the `image_token`, if any, for each `<image>`."""
    ids, asks = list[int](), question.replace(IMAGE, "") != ""
    *before, last = question.split(IMAGE)
    for piece in before:
        ids += [*tokenizer.encode(piece)[1:-1], *([] if image_token is None else [image_token])]
    return ids + tokenizer.encode(f"{last}\n" if asks else "")[1:-1]


def question_text(prompt: Sequence[int], tokenizer: Tokenizer, image_token: int | None) -> str:
    """Return the last question of a text that its answer follows, given as token ids: the inverse of `question_ids`."""
    ids = list(prompt[1:])
    while tokenizer.eos in ids:
        ids = ids[ids.index(tokenizer.eos) + 1 :]
    parts = groupby(ids, lambda token: token == image_token)
    return "".join(IMAGE * len([*part]) if shown else tokenizer.decode(part) for shown, part in parts).strip()


def with_images(questions: Sequence[str], images: int) -> list[str]:
    """Return questions with an `<image>` for each image: where they have them, otherwise before the first question.

    Raises:
        ValueError: If some questions have `<image>`, but not as many as there are images.
    """
    found = sum(question.count(IMAGE) for question in questions)
    if found == images:
        return [*questions]
    if found:
        raise ValueError(f"the questions have {found} {IMAGE}, must have one for each of the {images} images, or none")
    first, *others = questions
    return [IMAGE * images + first, *others]
