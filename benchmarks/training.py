"""Time a training step (forward and backward), eager and compiled, and compare with the peers and the floor."""

from __future__ import annotations

import torch

from benchmarks.floors import flops_floor
from benchmarks.peers import COCA, HAND_WIRED, HUGGING_FACE, ORIGINAL, OURS, build, draw_batch, training_steps
from benchmarks.report import Report, ratio
from benchmarks.timing import medians
from palme_xt import PalmEConfig

COLUMNS = ("batch", "tokens", "contestant", "ms", "relative to Hugging Face", "relative to hand-wired")
SHAPES = (4, 256), (2, 1024)
ROUNDS = 5
COMPILED = (OURS, HUGGING_FACE)
FLOOR = "floor: the step's floating-point operations at this machine's matrix product rate"


def main() -> None:
    config = PalmEConfig()
    models = build(config, OURS, HAND_WIRED, HUGGING_FACE, COCA, ORIGINAL)
    title = "Training step: default configuration, float32, forward and backward"
    report = Report("training", title, COLUMNS, ["transformers"])
    for b, n in SHAPES:
        img, text = draw_batch(config, b, n)
        steps = training_steps(models, img, text)
        seconds = medians(steps, ROUNDS)
        seconds[FLOOR] = flops_floor(steps[HAND_WIRED])  # FlopCounterMode does not count what torch computes in chunks
        torch._dynamo.reset()
        compiled = training_steps({name: models[name] for name in COMPILED if name in models}, img, text, compile=True)
        seconds |= {f"{name}, compiled": value for name, value in medians(compiled, ROUNDS).items()}
        for name, value in seconds.items():
            theirs = seconds.get(f"{HUGGING_FACE}, compiled" if name.endswith(", compiled") else HUGGING_FACE)
            report.row(b, n, name, f"{value * 1e3:.0f}", ratio(value, theirs), ratio(value, seconds[HAND_WIRED]))
    report.end()
    for name in OURS, HAND_WIRED:
        report.profile(f"Where the time goes, {name}, batch {b}, {n} tokens", steps[name])
