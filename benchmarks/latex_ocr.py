"""Compare LaTeX-OCR as PyPI has it, on x-transformers 0.15, with its encoder and its converted decoder in `PalmE`.

`pix2tex` and what it pins are installed in a temporary virtual environment, which shares torch with this one so that
both compute with the same kernels. Its model is built from its own `config.yaml`, with random weights, because the
trained ones are not on PyPI. Nothing in its code is changed.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import Report
from palme_xt import PalmE
from palme_xt.pretrained.latex_ocr import load_decoder

COLUMNS = (
    "images",
    "logits differ by up to (values up to)",
    "greedy tokens equal, with pix2tex's embeddings",
    "with its encoder here",
    "ms per token there",
    "ms per token here",
)
RELEASE = "0.1.4"
BATCHES = (1, 4)
SEQ_LEN = 128
RECORD = """
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pix2tex
import torch
import yaml
from munch import Munch
from pix2tex.models import get_model
from pix2tex.utils import parse_args

assert version("x-transformers") == "0.15.0"
config = Path(pix2tex.__file__).parent / "model" / "settings" / "config.yaml"
args = parse_args(Munch(yaml.safe_load(config.read_text())), no_cuda=True)
args.wandb = False
torch.manual_seed(0)
model = get_model(args).eval()
for parameter in model.decoder.parameters():  # norms and biases are ones and zeros at first, which would hide something
    parameter.data += (0.05 if parameter.ndim > 1 else 0.2) * torch.randn_like(parameter)
batches = []
with torch.no_grad():
    seq_len = int(sys.argv[2])
    for batch in map(int, sys.argv[3:]):
        img = torch.randn(batch, args.channels, args.max_height, args.max_width)
        text = torch.randint(args.num_tokens, (batch, args.max_seq_len))
        context, start = model.encoder(img), torch.full((batch, 1), args.bos_token)
        logits = model.decoder.net(text, context=context)
        started = time.perf_counter()
        # So cold that it takes the most likely token
        tokens = model.decoder.generate(start, seq_len, context=context, temperature=1e-6)
        seconds = (time.perf_counter() - started) / tokens.shape[1]
        batches.append({"img": img, "text": text, "context": context, "logits": logits, "tokens": tokens,
                        "seconds": seconds})
torch.save({"args": args.toDict(), "weights": model.state_dict(), "batches": batches}, sys.argv[1])
"""


def install(folder: Path) -> Path:
    """Install `pix2tex` in a new virtual environment, and return the folder of its packages."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())
    # Packages of this environment are found after its own: torch is, x-transformers is not.
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    wanted = [f"pix2tex=={RELEASE}", f"torch=={version('torch')}", "torchvision"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True, capture_output=True)
    return packages


def record(folder: Path) -> Any:
    """Return the arguments and weights of a model of `pix2tex`, and for each batch what goes in and comes out."""
    file = folder / "recorded.pt"
    command = [str(folder / "bin" / "python"), "-W", "ignore", "-c", RECORD, str(file), *map(str, (SEQ_LEN, *BATCHES))]
    subprocess.run(command, check=True)
    return torch.load(file)


def load_encoder(packages: Path, recorded: Any) -> Any:
    """Return the hybrid encoder of `pix2tex`, whose code runs in this process, beside today's x-transformers."""
    sys.path.append(str(packages))
    args = importlib.import_module("munch").munchify(recorded["args"])
    encoder = importlib.import_module("pix2tex.models.hybrid").get_encoder(args)
    weights = {k.removeprefix("encoder."): v for k, v in recorded["weights"].items() if k.startswith("encoder.")}
    encoder.load_state_dict(weights)
    return encoder.eval()


def main() -> None:
    report = Report(
        "latex_ocr", f"LaTeX-OCR (pix2tex {RELEASE}, x-transformers 0.15.0), {SEQ_LEN} greedy tokens", COLUMNS
    )
    with tempfile.TemporaryDirectory() as name:
        packages = install(Path(name))
        recorded = record(Path(name))
        decoder = load_decoder(recorded["weights"], recorded["args"])
        model = PalmE.from_modules(load_encoder(packages, recorded), decoder).eval()
        for batch in recorded["batches"]:
            report.row(len(batch["img"]), *compare(model, batch))
    report.end()


@torch.no_grad()
def compare(model: PalmE, batch: dict[str, Any]) -> list[str]:
    """Return the cells of a row."""
    logits: Tensor = model.decoder.net(batch["text"], context=batch["context"])
    model.generate(None, context=batch["context"], seq_len=2)  # the first call finds out whether the cache is right
    started = time.perf_counter()
    tokens = model.generate(None, context=batch["context"], seq_len=SEQ_LEN, temperature=0, eos_token=[])
    seconds = (time.perf_counter() - started) / tokens.shape[1]
    whole = model.generate(batch["img"], seq_len=SEQ_LEN, temperature=0, eos_token=[])
    equal = [f"{int((found == batch['tokens']).sum())} of {found.numel()}" for found in (tokens, whole)]
    difference = f"{(logits - batch['logits']).abs().max():.1e} ({logits.abs().max():.0f})"
    return [difference, *equal, f"{batch['seconds'] * 1e3:.1f}", f"{seconds * 1e3:.1f}"]


if __name__ == "__main__":
    main()
