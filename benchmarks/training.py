"""Time a training step (forward and backward), eager and compiled, and compare with the peers and the floor."""

from __future__ import annotations

import itertools

from benchmarks.alone import Values, alone
from benchmarks.device import CPU, Device
from benchmarks.floors import flops_floor
from benchmarks.peers import (
    COCA,
    HAND_WIRED,
    HUGGING_FACE,
    ORIGINAL,
    OURS,
    build,
    draw_batch,
    installed,
    training_steps,
)
from benchmarks.report import Report, middle, ratio, short
from benchmarks.timing import medians
from palme_xt import PalmEConfig

COLUMNS = ("batch", "tokens", "contestant", "ms", "relative to Hugging Face", "relative to hand-wired")
SHAPES = (4, 256), (2, 1024)
ROUNDS = 5
CONTESTANTS = (OURS, HAND_WIRED, HUGGING_FACE, COCA, ORIGINAL)
COMPILED = (OURS, HUGGING_FACE)
FLOOR = "floor: the step's floating-point operations at this machine's matrix product rate"


def measure(device: Device, b: int, n: int) -> Values:
    """Return the seconds of a step of each contestant."""
    config = PalmEConfig()
    models = build(config, *CONTESTANTS, device=device)
    img, text = draw_batch(config, b, n, device)
    steps = training_steps(models, img, text)
    seconds = medians(steps, ROUNDS, device)
    # FlopCounterMode does not count what torch computes in chunks.
    seconds[FLOOR] = flops_floor(steps[HAND_WIRED], device)
    compiled = training_steps({name: models[name] for name in COMPILED if name in models}, img, text, compile=True)
    return seconds | {f"{name}, compiled": value for name, value in medians(compiled, ROUNDS, device).items()}


def profile(report: Report, config: PalmEConfig, b: int, n: int, device: Device, *, compile: bool = False) -> None:
    """Print where the time goes in a step of this project's model and of Hugging Face's."""
    models = build(config, *COMPILED, device=device)
    for name, step in training_steps(models, *draw_batch(config, b, n, device), compile=compile).items():
        step()
        kind = ", compiled" if compile else ""
        report.profile(f"Where the time goes, {name}{kind}, batch {b}, {n} tokens", step)


def main(device: Device = CPU, runs: int = 1) -> None:
    installed(*CONTESTANTS)
    title = f"Training step: default configuration, {device.dtype_name}, forward and backward"
    report = Report("training", title, COLUMNS, ["transformers"], device)
    for b, n in SHAPES:
        found = [alone("training", device, b, n) for _ in range(runs)]
        for name in found[0]:
            theirs = f"{HUGGING_FACE}, compiled" if name.endswith(", compiled") else HUGGING_FACE
            against = ratio(found, name, theirs), ratio(found, name, HAND_WIRED)
            report.row(b, n, name, short(middle(found, name) * 1e3), *against)
    report.end()
    for (b, n), compile in itertools.product(SHAPES, (False, True)):
        profile(report, PalmEConfig(), b, n, device, compile=compile)
