"""Measure how time and memory of a training step grow with the text length and the batch, with fitted exponents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.alone import Values, alone
from benchmarks.device import CPU, Device
from benchmarks.memory import measure_each
from benchmarks.peers import HAND_WIRED, HUGGING_FACE, OURS, build, draw_batch, installed, training_steps
from benchmarks.report import Report, ratio, short
from benchmarks.timing import medians
from benchmarks.training import profile
from palme_xt import PalmEConfig

CONTESTANTS = {OURS: "palme_xt", HAND_WIRED: "hand-wired", HUGGING_FACE: "Hugging Face"}
COLUMNS = ("of", "size", *(f"{name}, {unit}" for unit in ("s", "MB") for name in CONTESTANTS.values()))
# Two layers and a small vocabulary, so that the longest text and the largest batch fit in memory.
ARGUMENTS: dict[str, Any] = {"encoder_depth": 2, "decoder_depth": 2, "num_tokens": 2000}
TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
BATCHES = (1, 2, 4, 8, 16, 32)
LONGEST = {HAND_WIRED: 4096}  # its memory is quadratic
LONG = 4096  # tokens of the step that is repeated, in so many new processes at least, with so many rounds in each
RUNS, ROUNDS = 5, 3


def measure(device: Device, names: list[str], b: int, n: int, rounds: int) -> Values:
    """Return the seconds of a step of each model, which take turns."""
    config = PalmEConfig(**ARGUMENTS, max_seq_len=n)
    models = build(config, *names, device=device)
    return medians(training_steps(models, *draw_batch(config, b, n, device)), rounds, device)


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Return the p for which `a + b * size**p` fits the values best: a is what does not grow, such as weights."""
    n, y = np.array(sizes[: len(values)], dtype=float), np.array(values)

    def error(p: float) -> float:
        columns = np.stack([np.ones(len(n)), n**p], axis=1) / y[:, None]  # so that errors are relative
        return float(np.square(columns @ np.linalg.lstsq(columns, np.ones(len(n)))[0] - 1).sum())

    return float(min(np.arange(0.1, 3, 0.01), key=error))


def main(device: Device = CPU, runs: int = 1) -> None:
    names = installed(*CONTESTANTS)
    report = Report(
        "growth", "Growth of a training step: 2 + 2 layers, 2,000 tokens", COLUMNS, ["transformers"], device
    )

    def row(label: str, size: object, *found: dict[str, str]) -> None:
        report.row(label, size, *(each.get(name, "-") for each in found for name in CONTESTANTS))

    long: list[Values] = []  # the peaks of the step that is repeated
    for label, sizes in ("text length", TOKENS), ("batch", BATCHES):
        lines: dict[str, dict[str, list[float]]] = {unit: {name: [] for name in names} for unit in ("seconds", "MB")}
        for size in sizes:
            b, n = (1, size) if label == "text length" else (size, TOKENS[0])
            there = [name for name in names if n <= LONGEST.get(name, n)]
            arguments = ARGUMENTS | {"max_seq_len": n}
            found = alone("growth", device, there, b, n, 1), measure_each(device, there, b, n, arguments)
            long += [found[1]] if n == LONG else []
            for line, values in zip(lines.values(), found, strict=True):
                for name, value in values.items():
                    line[name].append(value)
            row(label, size, *({name: short(value) for name, value in values.items()} for values in found))
        shown = [{name: f"{exponent(sizes, line[name]):.2f}" for name in names} for line in lines.values()]
        row(label, "exponent", *shown)
        for unit, line in lines.items():
            report.plot(f"Training step over {label}", label, sizes, line, unit)
    runs = max(runs, RUNS)
    times = [alone("growth", device, names, 1, LONG, ROUNDS) for _ in range(runs)]
    against = [{name: ratio(found, name, HUGGING_FACE) for name in names} for found in (times, long)]
    row(f"relative to Hugging Face, {runs} runs", LONG, *against)
    report.end()
    profile(report, PalmEConfig(**ARGUMENTS, max_seq_len=LONG), 1, LONG, device)
