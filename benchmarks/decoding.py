"""Time each decoded token, and compare with upstream's own loop, no cache, Hugging Face and the floor."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.floors import bandwidth, step_floor
from benchmarks.peers import HUGGING_FACE, OURS, build
from benchmarks.report import Report, ratio
from benchmarks.timing import Contestant, medians
from palme_xt import PalmEConfig

COLUMNS = ("batch", "contestant", "ms per token", "relative to Hugging Face")
SEQ_LEN = 128
ROUNDS = 3
COMPILED = "palme_xt, `compile=True`"
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


def check(found: dict[str, Contestant], batch: int) -> None:
    """Check that all contestants decode the same number of tokens, and that all of ours decode the same tokens."""
    tokens: dict[str, Any] = {name: contestant() for name, contestant in found.items()}
    for name in COMPILED, UPSTREAM:
        assert torch.equal(tokens[name], tokens[OURS]), name
    assert HUGGING_FACE not in tokens or tokens[HUGGING_FACE].shape == (batch, 1 + SEQ_LEN)


def main() -> None:
    models = {name: model.eval() for name, model in build(PalmEConfig(), OURS, HUGGING_FACE).items()}
    title = f"Decoding: default configuration, greedy, {SEQ_LEN} new tokens"
    report = Report("decoding", title, COLUMNS, ["transformers"])
    for batch in 1, 16:
        img, start = torch.randn(batch, 3, 256, 256), torch.zeros(batch, 1, dtype=torch.long)
        found = contestants(models, img, start)
        check(found, batch)
        seconds = medians(found, ROUNDS)
        if batch == 1:  # takes minutes at 16
            uncached = partial(models[OURS].generate, img, start, SEQ_LEN, temperature=0.0, cache_kv=False)
            seconds |= medians({UNCACHED: uncached}, 1)
        floor = "floor: reading the decoder's weights" if batch == 1 else "floor: the matrix products of a step"
        seconds[floor] = step_floor(models[OURS].decoder.net, batch) * SEQ_LEN
        for name, value in seconds.items():
            report.row(batch, name, f"{value / SEQ_LEN * 1e3:.1f}", ratio(value, seconds.get(HUGGING_FACE)))
    report.end()
    print(f"Memory bandwidth: {bandwidth() / 1e9:.1f} GB/s.\n")
    report.profile("Where the time goes at batch 1", contestants(models, img[:1], start[:1])[OURS])
