"""Does a trained model still compute the same numbers under the x-transformers that is installed now?"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import version

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from palme_xt.captioner.training.run import PARITY, WEIGHTS, Run, RunError
from palme_xt.decoding.loop import evaluating
from palme_xt.model import PalmE
from palme_xt.parity.comparison import cached_logits, draw_inputs, first_difference, forward, in_one_line, layer_outputs

TOLERANCE = 1e-4  # of the largest value; other kernels for the same arithmetic differ by about 1e-6


@dataclass(frozen=True)
class Verdict:
    """What `check` found: the versions then and now, and the first difference in words, or None."""

    recorded: dict[str, str]
    installed: dict[str, str]
    difference: str | None


def record(run: Run) -> None:
    """Write beside the weights what the model computes now: inputs, fingerprints of its layers, logits, versions.

    Raises:
        RunError: not a run folder.
    """
    model = run.load()
    img, text = draw_inputs((model.encoder, model.decoder), b=1)
    reference = {"img": img, "text": text} | numbers(model, img, text)
    if bad := [name for name, tensor in reference.items() if not tensor.isfinite().all()]:
        raise RunError(f"{run.folder} computes nan or inf from {bad[0]} on: nothing can be compared with that")
    order = {f"order.{place:06}": name for place, name in enumerate(reference)}
    tensors = {name: tensor.contiguous() for name, tensor in reference.items()}
    metadata = installed_versions() | order | {"weights": _digest(run)}
    run.write(PARITY, safetensors.torch.save(tensors, metadata=metadata))


def check(run: Run, tolerance: float = TOLERANCE) -> Verdict:
    """Compute again what `record` has written, from the same weights and inputs.

    Args:
        run: a run folder with a recorded reference.
        tolerance: the largest difference that counts as none, as a share of the largest value of its tensor.

    Raises:
        RunError: not a run folder, or nothing was recorded there.
        ValueError: a negative tolerance.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance} must be 0 or more")
    path = run.folder / PARITY
    if not path.is_file():
        raise RunError(f"{run.folder} has no {PARITY}: write one with `palme-xt parity record {run.folder}`")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata()
            names = [metadata[key] for key in sorted(metadata) if key.startswith("order.")]
            reference = {name: file.get_tensor(name) for name in names}
        img, text = reference.pop("img"), reference.pop("text")
        recorded = {name: metadata[name] for name in installed_versions()}
        weights = metadata["weights"]
    except (safetensors.SafetensorError, KeyError, TypeError) as error:
        raise RunError(f"{path} is no reference that `palme-xt parity record` wrote: {error}") from error
    model = run.load()
    if weights != _digest(run):
        raise RunError(f"{run.folder / WEIGHTS} has changed since `palme-xt parity record`: record it again")
    try:
        found = numbers(model, img, text)
    except Exception as error:  # whatever upstream raises is what there is to report
        difference: str | None = f"the model crashes: {in_one_line(error)}"
    else:
        shares = [
            {name: value / _largest(reference[name]) for name, value in side.items() if name in reference}
            for side in (reference, found)
        ]
        difference = first_difference(shares[0], shares[1], tolerance)
    return Verdict(recorded, installed_versions(), difference)


def numbers(model: PalmE, img: Tensor, text: Tensor) -> dict[str, Tensor]:
    """Fingerprints of all layers in the order in which they finish, then logits, loss and cached logits."""
    pair = model.encoder, model.decoder
    with evaluating(model):
        outputs = {name: fingerprint(output) for name, output in layer_outputs(pair, img, text).items()}
        loss, logits = forward(pair, img, text)
        cached = torch.stack(list(cached_logits(pair, img, text).values()), dim=1)
    return outputs | {"logits": logits, "loss": loss[None], "cached logits": cached}


def fingerprint(output: Tensor) -> Tensor:
    """Eight sums of a tensor, each with other weights: hardly a change leaves all of them as they are."""
    values = output.double().flatten()
    place = torch.arange(len(values), dtype=torch.float64)
    waves = torch.stack([torch.cos(place * step + step) for step in (0.0, 0.1, 0.37, 0.73, 1.13, 1.71, 2.23, 2.9)])
    sums: Tensor = waves @ values / max(1, len(values)) ** 0.5
    return sums


def installed_versions() -> dict[str, str]:
    """The versions that decide the numbers."""
    return {name: version(name) for name in ("x-transformers", "torch", "palme-xt")}


def _digest(run: Run) -> str:
    return hashlib.sha256((run.folder / WEIGHTS).read_bytes()).hexdigest()


def _largest(tensor: Tensor) -> Tensor:
    largest = tensor.abs().max()
    return torch.where(largest > 0, largest, torch.ones_like(largest))
