"""Measure the peak memory of a training step, with each contestant in its own process."""

from __future__ import annotations

from typing import Any

from benchmarks.alone import Values, alone
from benchmarks.device import CPU, Device
from benchmarks.kept import describe, kept
from benchmarks.peers import HAND_WIRED, HUGGING_FACE, OURS, build, draw_batch, installed, training_steps
from benchmarks.report import Report, middle, ratio, short
from palme_xt import PalmE, PalmEConfig

COLUMNS = ("batch", "tokens", "contestant", "MB", "relative to Hugging Face", "relative to hand-wired")
SHAPES = (4, 256), (2, 1024)
FLOOR = "floor: weights and gradients"
TINY: dict[str, Any] = {"image_size": 32, "encoder_depth": 1, "decoder_depth": 1, "num_tokens": 8}


def measure(device: Device, name: str, b: int, n: int, arguments: dict[str, Any]) -> Values:
    """Return the peak memory of a model and its second training step, in MB, by its name."""

    def steps(config: PalmEConfig, b: int, n: int) -> None:
        models = build(config, name, device=device)
        (step,) = training_steps(models, *draw_batch(config, b, n, device)).values()
        for _ in range(2):
            step()

    steps(PalmEConfig(**TINY), 1, 8)  # imports and the workspaces of libraries are not counted
    return {name: device.peak(lambda: steps(PalmEConfig(**arguments), b, n))}


def measure_each(device: Device, names: list[str], b: int, n: int, arguments: dict[str, Any]) -> Values:
    """Return the peak memory of each model in its own process, in MB, by name."""
    found = [alone("memory", device, name, b, n, arguments) for name in names]
    return {name: value for values in found for name, value in values.items()}


def main(device: Device = CPU, runs: int = 1) -> None:
    names = installed(OURS, HAND_WIRED, HUGGING_FACE)
    weights = 2 * sum(parameter.nbytes for parameter in device.place(PalmE()).parameters()) / 1e6
    report = Report("memory", "Peak memory of a training step", COLUMNS, ["transformers"], device)
    for b, n in SHAPES:
        found = [measure_each(device, names, b, n, {}) | {FLOOR: weights} for _ in range(runs)]
        for name in found[0]:
            against = ratio(found, name, HUGGING_FACE), ratio(found, name, HAND_WIRED)
            report.row(b, n, name, short(middle(found, name)), *against)
    report.end()
    models = build(PalmEConfig(), *names, device=device)
    for name, step in training_steps(models, *draw_batch(PalmEConfig(), b, n, device)).items():
        print(f"What {name} keeps for its backward pass, batch {b}, {n} tokens:\n")
        print(f"```text\n{describe(kept(models[name], step))}\n```\n")
