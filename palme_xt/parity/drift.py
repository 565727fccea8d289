"""Check whether a trained model still computes the same numbers with the installed x-transformers."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from palme_xt.decoding.loop import evaluating
from palme_xt.model import PalmE
from palme_xt.parity import comparison
from palme_xt.storage.folder import WEIGHTS, FolderError, load, one_line, write_files

PARITY = "parity.safetensors"
TOLERANCE = 1e-4  # of the largest value; different kernels for the same arithmetic differ by about 1e-6


@dataclass(frozen=True)
class Verdict:
    """The result of `check`.

    Attributes:
        recorded: The versions with which the reference was recorded, by package.
        installed: The versions that are installed now.
        difference: A description of the first difference, or None if there is none.
    """

    recorded: dict[str, str]
    installed: dict[str, str]
    difference: str | None


def record(folder: str | os.PathLike[str]) -> None:
    """Write `parity.safetensors` to a model folder: inputs, what the model computes from them now, and versions.

    Raises:
        FolderError: If `folder` is not a model folder or cannot be written, or if its model computes nan or inf.
    """
    model = load(folder)
    img, text = comparison.draw_inputs(model, b=1)
    reference = {"img": img, "text": text} | numbers(model, img, text)
    if bad := [name for name, tensor in reference.items() if not tensor.isfinite().all()]:
        raise FolderError(f"{folder} computes nan or inf from {bad[0]} on: these cannot be compared")
    tensors = {name: tensor.contiguous() for name, tensor in reference.items()}
    order = {f"order.{place:06}": name for place, name in enumerate(tensors)}  # safetensors sorts names
    metadata = installed_versions() | order | {"weights": _digest(folder)}
    write_files(folder, {PARITY: lambda path: save_file(tensors, path, metadata)})


def check(folder: str | os.PathLike[str], tolerance: float = TOLERANCE) -> Verdict:
    """Compute again what `record` wrote, from the same weights and inputs, and compare.

    Args:
        folder: A model folder with a recorded reference.
        tolerance: Largest accepted difference, as a share of the largest value of the tensor.

    Raises:
        FolderError: If `folder` is not a model folder, has no reference, or has other weights now.
        ValueError: If the tolerance is negative.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance} must be 0 or more")
    img, text, reference, recorded = _read_reference(Path(folder) / PARITY)
    model = load(folder)
    if recorded.pop("weights") != _digest(folder):
        raise FolderError(f"{Path(folder) / WEIGHTS} has changed since `palme-xt parity record`: record it again")
    try:
        found = numbers(model, img, text)
    except Exception as error:  # any error of upstream is a result
        difference: str | None = f"the model crashes: {comparison.describe_crash(error)}"
    else:
        largest = {name: tensor.abs().max().item() or 1.0 for name, tensor in reference.items()}
        expected, shares = (
            {name: tensor / largest[name] for name, tensor in side.items() if name in largest}
            for side in (reference, found)
        )
        difference = comparison.first_difference(expected, shares, tolerance)
    return Verdict(recorded, installed_versions(), difference)


def numbers(model: PalmE, img: Tensor, text: Tensor) -> dict[str, Tensor]:
    """Return fingerprints of all layers, in the order in which they finish, then logits, loss and cached logits."""
    with evaluating(model):
        layers = {name: fingerprint(layer) for name, layer in comparison.layer_outputs(model, img, text).items()}
        loss, logits = comparison.forward(model, img, text)
        cached = torch.stack(list(comparison.cached_logits(model, img, text).values()), dim=1)
    return layers | {"logits": logits, "loss": loss[None], "cached logits": cached}


def fingerprint(output: Tensor) -> Tensor:
    """Return eight differently weighted sums of a tensor. Almost any change to it changes some of them."""
    values = output.double().flatten()
    place = torch.arange(len(values), dtype=torch.float64)
    waves = torch.stack([torch.cos(place * step + step) for step in (0.0, 0.1, 0.37, 0.73, 1.13, 1.71, 2.23, 2.9)])
    sums: Tensor = waves @ values / max(1, len(values)) ** 0.5
    return sums


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that determine the numbers."""
    return {name: version(name) for name in ("x-transformers", "torch", "palme-xt")}


def _read_reference(path: Path) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, str]]:
    """Return what `record` wrote: img, text, the other tensors in order, the versions, and the weights' digest."""
    if not path.is_file():
        raise FolderError(f"{path.parent} has no {PARITY}: write one with `palme-xt parity record {path.parent}`")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            names = [metadata[key] for key in sorted(metadata) if key.startswith("order.")]
            reference = {name: file.get_tensor(name) for name in names}
        recorded = {name: metadata[name] for name in (*installed_versions(), "weights")}
        return reference.pop("img"), reference.pop("text"), reference, recorded
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise FolderError(
            f"{path} is not a reference that `palme-xt parity record` wrote: {one_line(error)}"
        ) from error


def _digest(folder: str | os.PathLike[str]) -> str:
    with open(Path(folder) / WEIGHTS, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
