"""Compare images that the text cross-attends to with images inside the sentence, for about the same CPU time.

`python -m benchmarks inside` prints a table in about 60 minutes. All models learn the same scenes of digits, written
as images. The pretrained parts are those of `python -m benchmarks.pretrained DIR`; `python -m benchmarks.inside
--models DIR` reads them there, and `--task captions` or `--task questions` runs half of the table.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

import torch

from benchmarks import parts, pretrained
from benchmarks.report import Report
from palme_xt.captioner import Captioner
from palme_xt.captioner.data.digits import Scans, ask, compose, describe, load_scans
from palme_xt.captioner.options import Training
from palme_xt.captioner.parts import freeze

COLUMNS = ("task", "images", "parts", "steps", "exact", "chrF", "CPU minutes", "trained parameters")
TASKS = ("captions", "questions")
ROWS = {"train": 8000, "validation": 200}
SCRATCH = ["--image_size=32", "--patch_size=16", "--alibi_pos_bias=false"]
FROZEN = ["--encoder={models}/dinov2", "--decoder={models}/smollm2", "--freeze=encoder,decoder", "--image_size=56"]
FROZEN += ["--batch_size=8", "--lr=1e-3", "--max_seq_len=80"]
INSIDE, UNUSED = ["--image_token=258", "--num_tokens=259"], ["--image_token=3"]  # a token for the names of repositories
# Options, and steps on captions and on questions, which take about seven minutes of one core.
CONTESTANTS: dict[tuple[str, str], tuple[list[str], dict[str, int]]] = {
    ("cross-attention", "from scratch"): (SCRATCH, {"captions": 1600, "questions": 1600}),
    ("in the sentence", "from scratch"): ([*SCRATCH, *INSIDE], {"captions": 1600, "questions": 1600}),
    ("cross-attention", "frozen DINOv2-S and SmolLM2"): (FROZEN, {"captions": 220, "questions": 150}),
    ("in the sentence", "frozen DINOv2-S and SmolLM2"): ([*FROZEN, *UNUSED], {"captions": 130, "questions": 85}),
}


def write(folder: Path, task: str) -> None:
    """Write scenes with captions, or with one question a row about one scene or two, as `datasets` saves them."""
    from datasets import DatasetDict

    splits = zip(ROWS.items(), load_scans(), (Training.jitter, 0.0), strict=True)
    DatasetDict({name: rows(scans, count, jitter, task) for (name, count), scans, jitter in splits}).save_to_disk(
        folder
    )


def rows(scans: Scans, count: int, jitter: float, task: str) -> object:
    """Return a split of the data."""
    from datasets import Dataset, Features, Image, List, Value
    from PIL.Image import fromarray

    generator, draw = torch.Generator().manual_seed(0), random.Random(0)
    img, found = compose(scans, 2 * count, image_size=56, jitter=jitter, generator=generator)
    pictures = [fromarray(pixels.numpy()) for pixels in (255 * img[:, 0]).round().byte()]
    digits: list[list[int]] = found.tolist()
    if task == "captions":
        columns = {"image": pictures[:count], "text": [*map(describe, digits[:count])]}
        return Dataset.from_dict(columns, Features({"image": Image(), "text": Value("string")}))
    shown = [slice(start, start + draw.choice((1, 2))) for start in range(0, 2 * count, 2)]
    turns = [ask(digits[scenes], draw) for scenes in shown]
    columns = {"images": [pictures[scenes] for scenes in shown], "question": [turn.question for turn in turns]}
    columns |= {"answer": [turn.answer for turn in turns]}
    kinds = {"images": List(Image()), "question": Value("string"), "answer": Value("string")}
    return Dataset.from_dict(columns, Features(kinds))


def trained(run: Path, options: list[str]) -> str:
    """Return the number of trained parameters of a run, in millions."""
    model = Captioner.from_pretrained(run).model
    if "--freeze=encoder,decoder" in options:
        freeze(model, Training(encoder="", decoder="", start="x", freeze="encoder,decoder"))
    return f"{sum(each.numel() for each in model.parameters() if each.requires_grad) / 1e6:.2f} M"


def compare(models: Path, folder: Path, tasks: tuple[str, ...]) -> None:
    """Train all contestants on the tasks, and print the table."""
    report = Report("inside", "Images in the sentence", COLUMNS, ["accelerate", "datasets", "sacrebleu"])
    (models / "dinov2" / "preprocessor_config.json").write_text(json.dumps(parts.NORMALISATION))
    for task in tasks:
        write(folder / task, task)
        for number, ((images, which), (options, steps)) in enumerate(CONTESTANTS.items()):
            run = folder / f"{task}-{number}"
            filled = [option.format(models=models) for option in options]
            minutes = parts.train(folder / task, run, steps[task], filled, evaluations=1)
            evaluation = json.loads((run / "evaluation.json").read_text())
            scores = parts.scores(evaluation["references"], evaluation["predicted"])
            report.row(task, images, which, steps[task], *scores, f"{minutes:.1f}", trained(run, options))
    report.end()


def main(models: Path | None = None, tasks: tuple[str, ...] = TASKS) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        if models is None:
            models = Path(temporary) / "models"
            pretrained.prepare(models)
        compare(models, Path(temporary), tasks)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inside", description=__doc__)
    parser.add_argument("--models", type=Path, metavar="DIR", help="what `python -m benchmarks.pretrained DIR` wrote")
    parser.add_argument("--task", choices=TASKS, help="which half of the table (default: both)")
    given = parser.parse_args()
    main(given.models, TASKS if given.task is None else (given.task,))
