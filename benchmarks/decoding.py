"""How long a token takes: against upstream's own loop, without a cache, against Hugging Face, against the floor."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.floors import bandwidth, step_floor
from benchmarks.machine import describe
from benchmarks.timing import medians
from palme_xt import PalmE

SEQ_LEN = 256
ROUNDS = 5
OURS = "palme_xt"
UPSTREAM = "x-transformers' `generate`, run by `palme_xt`'s `Decoder`"
UNCACHED = "palme_xt, `cache_kv=False`"
HUGGING_FACE = "transformers `VisionEncoderDecoderModel`"


def hugging_face(config: Any) -> Any:
    """ViT and GPT-2 of the same dimensions."""
    from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    encoder = ViTConfig(
        hidden_size=config.encoder_dim,
        num_hidden_layers=config.encoder_depth,
        num_attention_heads=config.encoder_heads,
        intermediate_size=4 * config.encoder_dim,
        image_size=config.image_size,
        patch_size=config.patch_size,
    )
    decoder = GPT2Config(
        vocab_size=config.num_tokens,
        n_positions=config.max_seq_len,
        resid_pdrop=0.0,  # PalmE has no dropout unless asked
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        n_embd=config.decoder_dim,
        n_layer=config.decoder_depth,
        n_head=config.decoder_heads,
        add_cross_attention=True,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    both = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return VisionEncoderDecoderModel(config=both).eval()


def main() -> None:
    torch.manual_seed(0)
    model = PalmE().eval()
    peer = hugging_face(model.config)
    print(f"## Decoding: default configuration, greedy, {SEQ_LEN} new tokens\n")
    print(describe("transformers"), end="\n\n")
    print("| batch | contestant | ms a token | relative to palme_xt |\n|---|---|---|---|")
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

        assert theirs().shape == (batch, 1 + SEQ_LEN)
        assert torch.equal(ours(), upstream())
        seconds = medians({OURS: ours, UPSTREAM: upstream, HUGGING_FACE: theirs}, ROUNDS)
        if batch == 1:  # at 16, minutes
            seconds |= medians({UNCACHED: partial(ours, cache_kv=False)}, 1)
        floor = "floor: reading the decoder's weights" if batch == 1 else "floor: the matrix products of a step"
        seconds[floor] = step_floor(model.decoder.net, batch) * SEQ_LEN
        for name, value in seconds.items():
            print(f"| {batch} | {name} | {value / SEQ_LEN * 1e3:.1f} | {value / seconds[OURS]:.2f} |", flush=True)
    print(f"\nMemory bandwidth: {bandwidth() / 1e9:.1f} GB/s.\n")

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        model.generate(torch.randn(1, 3, 256, 256), torch.zeros(1, 1, dtype=torch.long), 64, temperature=0.0)
    table = profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40)
    print(f"Where the time goes at batch 1, 64 tokens:\n\n```text\n{table}\n```")
