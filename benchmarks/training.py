"""How long a training step (forward and backward) takes, eager and compiled, against the peers and the floor."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.floors import flops_floor
from benchmarks.peers import COCA, HAND_WIRED, HUGGING_FACE, ORIGINAL, OURS, losses, training_step
from benchmarks.report import Report
from benchmarks.timing import medians
from palme_xt import PalmEConfig

SHAPES = (4, 256), (2, 1024)
ROUNDS = 5
FLOOR = "floor: the step's floating-point operations at this machine's matrix product rate"


def main() -> None:
    config = PalmEConfig()
    eager = losses(config, OURS, HAND_WIRED, HUGGING_FACE, COCA, ORIGINAL)
    report = Report("training", "Training step: default configuration, float32, forward and backward", "transformers")
    report.header("batch", "tokens", "contestant", "ms", "relative to Hugging Face", "relative to hand-wired")
    peers = {name: eager[name] for name in (OURS, HUGGING_FACE) if name in eager}
    for b, n in SHAPES:
        img, text = torch.randn(b, 3, config.image_size, config.image_size), torch.randint(config.num_tokens, (b, n))
        steps = {name: training_step(module, loss, img, text) for name, (module, loss) in eager.items()}
        seconds = medians(steps, ROUNDS)
        seconds[FLOOR] = flops_floor(steps[HAND_WIRED])  # what torch computes in chunks is not counted
        torch._dynamo.reset()
        with_compiler = {
            f"{name}, compiled": training_step(module, torch.compile(loss), img, text)
            for name, (module, loss) in peers.items()
        }
        seconds |= medians(with_compiler, ROUNDS)
        for name, value in seconds.items():
            theirs = seconds.get(HUGGING_FACE if "compiled" not in name else f"{HUGGING_FACE}, compiled")
            ratio = "-" if theirs is None else f"{value / theirs:.2f}"
            report.row(b, n, name, f"{value * 1e3:.0f}", ratio, f"{value / seconds[HAND_WIRED]:.2f}")
    report.end()
    for name in OURS, HAND_WIRED:
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            training_step(*eager[name], img, text)()
        report.profile(f"Where the time goes, {name}, batch {b}, {n} tokens", profiled)
