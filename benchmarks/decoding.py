"""Time each decoded token, and compare with upstream's own loop, no cache, Hugging Face and the floor."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.alone import Values, alone
from benchmarks.device import CPU, Device
from benchmarks.floors import bandwidth, step_floor
from benchmarks.peers import HUGGING_FACE, OURS, build, installed
from benchmarks.report import Report, middle, ratio, short
from benchmarks.timing import Contestant, medians
from palme_xt import PalmEConfig
from palme_xt.decoding import compiled as step_compiler

COLUMNS = ("batch", "contestant", "ms per token", "relative to Hugging Face")
SEQ_LEN = 128
ROUNDS = 3
COMPILED = "palme_xt, `compile=True`"
PLAIN = "palme_xt, `compile=True`, products with one row by MKL"
UPSTREAM = "x-transformers' `generate`, run by `palme_xt`'s `Decoder`"
UNCACHED = "palme_xt, `cache_kv=False`"


def contestants(models: dict[str, Any], img: Tensor, start: Tensor) -> dict[str, Contestant]:
    """Return functions that decode `SEQ_LEN` tokens greedily for each image."""
    model = models[OURS]
    ours = partial(model.generate, img, start, SEQ_LEN, temperature=0.0)

    def upstream() -> Any:
        with torch.no_grad():
            return model.decoder.generate(start, SEQ_LEN, context=model.encode(img), temperature=0.0)

    found: dict[str, Contestant] = {OURS: ours, COMPILED: partial(ours, compile=True), UPSTREAM: upstream}
    if HUGGING_FACE in models:
        found[HUGGING_FACE] = partial(
            models[HUGGING_FACE].generate,
            img,
            decoder_input_ids=start,
            decoder_start_token_id=0,
            max_new_tokens=SEQ_LEN,
            min_new_tokens=SEQ_LEN,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            eos_token_id=None,
        )
    return found


def with_mkl(compiled: Contestant) -> Any:
    """Decode with the graph that batches have, which is without this project's pass for one row."""
    step = step_compiler._compiled("cpu", one_row=False)
    with mock.patch.object(step_compiler, "_compiled", return_value=step):
        return compiled()


def check(found: dict[str, Contestant], batch: int, device: Device) -> None:
    """Check that all contestants decode the same number of tokens, and that all of ours decode the same tokens.

    In bfloat16, the best two logits are often equal, or differ by rounding alone.
    """
    tokens: dict[str, Any] = {name: contestant() for name, contestant in found.items()}
    for name in COMPILED, UPSTREAM:
        assert tokens[name].shape == tokens[OURS].shape == (batch, SEQ_LEN), name
        assert device.dtype != torch.float32 or torch.equal(tokens[name], tokens[OURS]), name
    assert HUGGING_FACE not in tokens or tokens[HUGGING_FACE].shape == (batch, 1 + SEQ_LEN)


def prepare(device: Device, batch: int, *names: str) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Return the models, images, and the first token of each text."""
    models = {name: model.eval() for name, model in build(PalmEConfig(), *names, device=device).items()}
    start = torch.zeros(batch, 1, dtype=torch.long)
    return models, device.place(torch.randn(batch, 3, 256, 256)), device.place(start)


def measure(device: Device, batch: int) -> Values:
    """Return the seconds for each token."""
    models, img, start = prepare(device, batch, OURS, HUGGING_FACE)
    found = contestants(models, img, start)
    check(found, batch, device)
    if batch == 1 and device.kind == "cpu":
        found[PLAIN] = partial(with_mkl, found[COMPILED])
    seconds = medians(found, ROUNDS, device)
    if batch == 1:  # takes minutes at 16
        uncached = partial(models[OURS].generate, img, start, SEQ_LEN, temperature=0.0, cache_kv=False)
        seconds |= medians({UNCACHED: uncached}, 1, device)
    floor = "floor: reading the decoder's weights" if batch == 1 else "floor: the matrix products of a step"
    seconds[floor] = step_floor(models[OURS].decoder.net, batch, device) * SEQ_LEN
    return {name: value / SEQ_LEN for name, value in seconds.items()}


def main(device: Device = CPU, runs: int = 1) -> None:
    installed(OURS, HUGGING_FACE)
    title = f"Decoding: default configuration, {device.dtype_name}, greedy, {SEQ_LEN} new tokens"
    report = Report("decoding", title, COLUMNS, ["transformers"], device)
    for batch in 1, 16:
        found = [alone("decoding", device, batch) for _ in range(runs)]
        for name in found[0]:
            report.row(batch, name, short(middle(found, name) * 1e3), ratio(found, name, HUGGING_FACE))
    report.end()
    print(f"Memory bandwidth: {bandwidth(device) / 1e9:.1f} GB/s.\n")
    ours = contestants(*prepare(device, 1, OURS))[OURS]
    ours()
    report.profile("Where the time goes at batch 1", ours)
