"""How long a token takes: against upstream's own loop, without a cache, against Hugging Face, against the floor."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.floors import bandwidth, step_floor
from benchmarks.peers import HUGGING_FACE, OURS, hugging_face
from benchmarks.report import Report
from benchmarks.timing import medians
from palme_xt import PalmE

SEQ_LEN = 128
ROUNDS = 3
COMPILED = "palme_xt, `compile=True`"
UPSTREAM = "x-transformers' `generate`, run by `palme_xt`'s `Decoder`"
UNCACHED = "palme_xt, `cache_kv=False`"


def main() -> None:
    torch.manual_seed(0)
    model = PalmE().eval()
    peer = hugging_face(model.config).eval()
    report = Report("decoding", f"Decoding: default configuration, greedy, {SEQ_LEN} new tokens", "transformers")
    report.header("batch", "contestant", "ms a token", "relative to Hugging Face")
    for batch in 1, 16:
        img = torch.randn(batch, 3, 256, 256)
        start = torch.zeros(batch, 1, dtype=torch.long)

        def ours(cache_kv: bool = True, img: Any = img, start: Any = start) -> Any:
            return model.generate(img, start, SEQ_LEN, temperature=0.0, cache_kv=cache_kv)

        def upstream(img: Any = img, start: Any = start) -> Any:
            with torch.no_grad():
                return model.decoder.generate(start, SEQ_LEN, context=model.encode(img), temperature=0.0)

        def theirs(img: Any = img, start: Any = start) -> Any:
            return peer.generate(
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

        def compiled(img: Any = img, start: Any = start) -> Any:
            return model.generate(img, start, SEQ_LEN, temperature=0.0, compile=True)

        assert theirs().shape == (batch, 1 + SEQ_LEN)
        assert torch.equal(ours(), upstream())
        assert torch.equal(ours(), compiled())
        seconds = medians({OURS: ours, COMPILED: compiled, UPSTREAM: upstream, HUGGING_FACE: theirs}, ROUNDS)
        if batch == 1:  # at 16, minutes
            seconds |= medians({UNCACHED: partial(ours, cache_kv=False)}, 1)
        floor = "floor: reading the decoder's weights" if batch == 1 else "floor: the matrix products of a step"
        seconds[floor] = step_floor(model.decoder.net, batch) * SEQ_LEN
        for name, value in seconds.items():
            report.row(batch, name, f"{value / SEQ_LEN * 1e3:.1f}", f"{value / seconds[HUGGING_FACE]:.2f}")
    report.end()
    print(f"Memory bandwidth: {bandwidth() / 1e9:.1f} GB/s.\n")
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        model.generate(torch.randn(1, 3, 256, 256), torch.zeros(1, 1, dtype=torch.long), 64, temperature=0.0)
    report.profile("Where the time goes at batch 1, 64 tokens", profiled)
