"""Train captioners from scratch and from pretrained parts, on the same images, for about the same CPU time.

`python -m benchmarks parts` prints a table and draws curves over the minutes, in about 90 minutes. The pretrained
parts are those of `python -m benchmarks.pretrained DIR`; `python -m benchmarks.parts --models DIR` reads them there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from sacrebleu.metrics.chrf import CHRF

from benchmarks import emoji, pretrained, stamps
from benchmarks.report import FOLDER, Report

COLUMNS = ("images", "captioner", "steps", "minutes", "best step", "held-out loss", "kind", "count", "exact", "chrF")
NORMALISATION = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}  # ImageNet's, as DINOv2's
DINOV2 = ["--encoder={models}/dinov2", "--image_size=112", "--freeze=encoder"]
SMOLLM2 = ["--decoder={models}/smollm2", "--max_seq_len=32", "--batch_size=16", "--lr=5e-4"]
# Options, and steps on the stamps and on the emoji, which take about ten minutes of one core.
CONTESTANTS: dict[str, tuple[list[str], dict[str, int]]] = {
    "from scratch": ([], {"stamps": 1600, "emoji": 1450}),
    "frozen DINOv2-S, new decoder": ([*DINOV2, "--decoder_dim=256"], {"stamps": 670, "emoji": 450}),
    "frozen DINOv2-S, frozen SmolLM2": (
        [*DINOV2[:2], "--freeze=encoder,decoder", *SMOLLM2],
        {"stamps": 200, "emoji": 150},
    ),
    "frozen DINOv2-S, SmolLM2": ([*DINOV2, *SMOLLM2, "--lr_decoder=5e-5"], {"stamps": 85, "emoji": 68}),
}
EVALUATIONS = {"stamps": 3, "emoji": 2}


def train(data: Path, run: Path, steps: int, options: list[str], evaluations: int) -> float:
    """Train in a process of its own, on one thread, and return the minutes that the CPU worked."""
    every = -(-steps // evaluations)
    command = [sys.executable, "-m", "palme_xt", "train", f"--data={data}", f"--run={run}", f"--steps={steps}"]
    command += [f"--eval_every={every}", f"--save_every={steps}", "--num_workers=0", *options]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60


def scores(true: list[list[str]], predicted: list[str]) -> tuple[str, str]:
    """Return the share that is exactly right, and chrF."""
    right = sum(said in captions for said, captions in zip(predicted, true, strict=True))
    return f"{right / len(predicted):.1%}", f"{CHRF().corpus_score(predicted, list(zip_longest(*true))).score:.1f}"


def by_kind(data: Path, evaluation: Mapping[str, Any]) -> dict[str, tuple[list[list[str]], list[str]]]:
    """Return the true and the predicted captions of all held-out images, and of the two kinds of emoji."""
    true, predicted = evaluation["references"], evaluation["predicted"]
    kinds = {"all": (true, predicted)}
    if data.name == "emoji":
        held_out = {captions[0] for captions in true}
        texts = [json.loads(line)["text"] for line in (data / "metadata.jsonl").read_text().splitlines()]
        trained = {text.split(": ")[0] for text in texts if text not in held_out}
        for captions, said in zip(true, predicted, strict=True):
            references, found = kinds.setdefault(emoji.kind_of(captions[0], trained), ([], []))
            references.append(captions)
            found.append(said)
    return kinds


def draw(curves: Mapping[str, list[tuple[float, float]]], name: str) -> None:
    """Draw chrF over the minutes."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for contestant, points in curves.items():
        axes.plot(*zip(*points, strict=True), "o-", label=contestant)
    axes.set(title=f"Captions of held-out {name}", xlabel="minutes of training (one core)", ylabel="chrF")
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(FOLDER / f"parts-{name}.png", dpi=120)


def compare(models: Path, folder: Path) -> None:
    report = Report("parts", "Pretrained parts", COLUMNS, ["accelerate", "datasets", "sacrebleu"])
    (models / "dinov2" / "preprocessor_config.json").write_text(json.dumps(NORMALISATION))
    stamps.prepare(folder / "stamps")
    emoji.prepare(folder / "emoji")
    for name, evaluations in EVALUATIONS.items():
        curves: dict[str, list[tuple[float, float]]] = {}
        for number, (contestant, (options, steps)) in enumerate(CONTESTANTS.items()):
            run = folder / f"{name}-{number}"
            filled = [option.format(models=models) for option in options]
            minutes = train(folder / name, run, steps[name], filled, evaluations)
            evaluation = json.loads((run / "evaluation.json").read_text())
            for kind, (true, predicted) in by_kind(folder / name, evaluation).items():
                shown = [name, contestant, steps[name], f"{minutes:.1f}", evaluation["step"]]
                report.row(*shown, f"{evaluation['loss']:.2f}", kind, len(true), *scores(true, predicted))
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            scored = [line for line in lines if "held_out_chrf" in line]
            curves[contestant] = [(minutes * line["step"] / steps[name], line["held_out_chrf"]) for line in scored]
        FOLDER.mkdir(exist_ok=True)
        draw(curves, name)
    report.end()


def main(models: Path | None = None) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        if models is None:
            models = Path(temporary) / "models"
            pretrained.prepare(models)
        compare(models, Path(temporary))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parts", description=__doc__)
    parser.add_argument("--models", type=Path, metavar="DIR", help="what `python -m benchmarks.pretrained DIR` wrote")
    main(parser.parse_args().models)
