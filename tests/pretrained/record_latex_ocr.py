"""Record what decoders of LaTeX-OCR compute under x-transformers 0.15, in `goldens/latex_ocr.safetensors`.

Run it in an environment of its own, because it needs old releases:

    python -m venv old && old/bin/pip install pix2tex==0.1.4 safetensors
    old/bin/python tests/pretrained/record_latex_ocr.py

The file was recorded with pix2tex 0.1.4, x-transformers 0.15.0 and torch 2.15.0.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from pix2tex.models.transformer import get_decoder
from pix2tex.models.utils import Model
from safetensors.torch import save_file

FILE = Path(__file__).parent / "goldens" / "latex_ocr.safetensors"
SIZES = {"dim": 16, "num_layers": 2, "heads": 2, "num_tokens": 20, "max_seq_len": 16, "bos_token": 1, "pad_token": 0}
# The options of pix2tex's config.yaml
OF_PIX2TEX = {"attn_on_attn": True, "cross_attend": True, "ff_glu": True, "rel_pos_bias": False, "use_scalenorm": False}
REL_POS = {"rel_pos_bias": True, "rel_pos_num_buckets": 8, "rel_pos_max_distance": 12}
CASES: dict[str, dict[str, Any]] = {
    "config": {"decoder_args": {**OF_PIX2TEX, "attn_dim_head": 8, "ff_mult": 2}},
    # One head as wide as the model, whose square root is not exact.
    "plain": {"dim": 12, "heads": 1, "decoder_args": {"cross_attend": True, "attn_dim_head": 12, "pre_norm": True}},
    "rel_pos": {"decoder_args": {**REL_POS, "cross_attend": True, "attn_dim_head": 8, "ff_dropout": 0.1}},
}


def record(case: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the weights, inputs and outputs of a decoder with random weights, and its arguments."""
    args = {**SIZES, **case}
    model = Model(torch.nn.Identity(), get_decoder(argparse.Namespace(**args)), argparse.Namespace(**args)).eval()
    for parameter in model.parameters():
        parameter.data += (0.5 if parameter.ndim > 1 else 0.2) * torch.randn_like(parameter)
    text = torch.randint(args["num_tokens"], (3, 12))
    context = torch.randn(3, 5, args["dim"])
    greedy = torch.full((3, 1), args["bos_token"])
    with torch.no_grad():
        while greedy.shape[1] < args["max_seq_len"]:
            logits = model.decoder.net(greedy, context=context)
            greedy = torch.cat((greedy, logits[:, -1:].argmax(dim=-1)), dim=1)
        tensors = {
            "text": text,
            "context": context,
            "logits": model.decoder.net(text, context=context),
            "loss": model(context, text),
            "greedy": greedy[:, 1:].contiguous(),
        }
    # A token that is decoded, so that a text ends early.
    return tensors | {f"weights.{k}": v for k, v in model.state_dict().items()}, args | {"eos_token": int(greedy[0, 6])}


def main() -> None:
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, str] = {}
    for name, case in CASES.items():
        recorded, args = record(case)
        tensors |= {f"{name}.{key}": tensor for key, tensor in recorded.items()}
        metadata[name] = json.dumps(args)
    FILE.parent.mkdir(exist_ok=True)
    save_file(tensors, FILE, metadata)


if __name__ == "__main__":
    main()
