"""Check whether a module still computes the same numbers, with another release, on another machine, after a change."""

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from palme_xt.parity.numbers import Numbers, describe_crash, first_difference
from palme_xt.parity.observation import a_weight, cached_logits, observe, running
from palme_xt.parts import draw_inputs
from palme_xt.storage.files import explained
from palme_xt.storage.folder import FolderError, as_safetensors, load, write_files

PARITY = "parity.safetensors"
TOLERANCE = 1e-4  # of the largest value; different kernels for the same arithmetic differ by about 1e-6


class Verdict(NamedTuple):
    """The result of `check`.

    Attributes:
        recorded: The environment in which the reference was recorded: the versions of the packages that determine the
            numbers and of Python, the device, the number of threads, and the module's dtype. Older files have less.
        current: The same of the check.
        difference: A description of the first difference, or None if there is none.
    """

    recorded: dict[str, str]
    current: dict[str, str]
    difference: str | None

    @property
    def changes(self) -> dict[str, tuple[str, str]]:
        """What was recorded of the environment and is different now, with both values. It explains a difference."""
        recorded = self.recorded.items()
        return {name: (value, self.current[name]) for name, value in recorded if value != self.current[name]}


def record(
    module: nn.Module, inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor], path: str | os.PathLike[str]
) -> None:
    """Write a safetensors file with inputs of a module, what it computes from them now, and the environment.

    The module's own forward is called in eval mode. The file has the outputs, sums over the output of each module
    inside, and the cached logits if forward calls a `TransformerWrapper` of a Decoder whose cache works. It has no
    weights, only a digest of them.

    Args:
        module: Any module.
        inputs: The arguments of its forward: a tensor, several in a tuple or list, or keyword arguments in a dict.
        path: The file to write.

    Raises:
        TypeError: If `inputs` holds anything but tensors.
        FolderError: If the module computes nan or inf, or the file cannot be written.
    """
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    given = dict(inputs if isinstance(inputs, Mapping) else enumerate(inputs))
    if wrong := [type(value).__name__ for value in given.values() if not isinstance(value, Tensor)]:
        found = f"inputs holds a {wrong[0]}, must be a tensor, a tuple of tensors, or a dict of tensors"
        raise TypeError(f"{found}: wrap the module in one whose forward takes tensors only")
    reference = _numbers(module, given)
    if bad := [name for name, tensor in reference.items() if not tensor.isfinite().all()]:
        raise FolderError(f"{type(module).__name__} computes nan or inf from {bad[0]} on: these cannot be compared")
    tensors = reference | {f"input {key}": value for key, value in given.items()}
    tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    order = {f"order.{place:06}": name for place, name in enumerate(tensors)}  # safetensors sorts names
    metadata = environment(module) | order | {"parameters": _digest(module), "inputs": json.dumps(list(given))}
    path = Path(path)
    write_files(path.parent, {path.name: as_safetensors(tensors, metadata)})


def check(module: nn.Module, path: str | os.PathLike[str], tolerance: float = TOLERANCE) -> Verdict:
    """Compute again what `record` wrote, from the same weights and inputs, and compare.

    Args:
        module: The module, with the parameters that it had then.
        path: The file that `record` wrote.
        tolerance: Largest accepted difference, as a share of the largest value of the tensor.

    Raises:
        FolderError: If `path` is not such a file, or the module has other parameters now.
        ValueError: If the tolerance is negative.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance} must be 0 or more")
    given, reference, metadata = _read(Path(path))
    if "parameters" in metadata and metadata["parameters"] != _digest(module):
        remedy = "load them from a file, because a seed gives others if the initialisation changes, or record again"
        raise FolderError(f"the parameters of the {type(module).__name__} are not those recorded in {path}: {remedy}")
    current = environment(module)
    recorded = {name: metadata[name] for name in current if name in metadata}
    try:
        numbers = _numbers(module, given, reference)
    except Exception as error:  # any error of upstream is a result
        return Verdict(recorded, current, f"the model crashes: {describe_crash(error)}")
    gone = [name for name in reference if name.startswith("the output") and name not in numbers]
    difference = f"{gone[0]} is missing" if gone else first_difference(reference, numbers, share=tolerance)
    return Verdict(recorded, current, difference)


def record_folder(folder: str | os.PathLike[str]) -> None:
    """Write `parity.safetensors` to a model folder, as `record` does, for inputs that are drawn.

    Raises:
        FolderError: If `folder` is not a model folder or cannot be written, or if its model computes nan or inf.
    """
    model = load(folder)
    args, _ = draw_inputs(model, b=1)
    record(model, args, Path(folder) / PARITY)


def check_folder(folder: str | os.PathLike[str], tolerance: float = TOLERANCE) -> Verdict:
    """Compare a model folder with its `parity.safetensors`, as `check` does.

    Raises:
        FolderError: If `folder` is not a model folder, has no reference, or has other weights now.
        ValueError: If the tolerance is negative.
    """
    return check(load(folder), Path(folder) / PARITY, tolerance)


def fingerprint(output: Tensor) -> Tensor:
    """Return eight differently weighted sums of a tensor. Almost any change to it changes some of them."""
    values = output.detach().cpu().double().flatten()
    place = torch.arange(len(values), dtype=torch.float64)
    waves = torch.stack([torch.cos(place * step + step) for step in (0.0, 0.1, 0.37, 0.73, 1.13, 1.71, 2.23, 2.9)])
    sums: Tensor = waves @ values / max(1, len(values)) ** 0.5
    return sums


def environment(module: nn.Module) -> dict[str, str]:
    """Return what may determine the numbers that a module computes."""
    weight = a_weight(module, default=torch.zeros(()))
    processor = f"CPU {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        **{name: version(name) for name in ("x-transformers", "torch", "palme-xt")},
        "Python": platform.python_version(),
        "device": torch.cuda.get_device_name(weight.device) if weight.is_cuda else processor,
        "threads": str(torch.get_num_threads()),
        "dtype": str(weight.dtype).removeprefix("torch."),
    }


def _numbers(module: nn.Module, given: Mapping[Any, Tensor], recorded: Numbers | None = None) -> Numbers:
    """Return fingerprints of all layers, in the order in which they finish, then the outputs and the cached logits.

    There are no cached logits if upstream crashes while they are recorded, or if none were recorded.
    """
    args = tuple(value for key, value in given.items() if isinstance(key, int))
    kwargs = {key: value for key, value in given.items() if isinstance(key, str)}
    with running(module):
        seen = observe(module, (args, kwargs))
        numbers = {name: fingerprint(layer) for name, layer in seen.layers.items()}
        numbers |= {name: value for name, value in seen.outputs.items() if isinstance(value, Tensor)}
        if seen.call is not None and (recorded is None or "cached logits" in recorded):
            with contextlib.suppress(*[Exception] if recorded is None else []):
                numbers["cached logits"] = torch.stack(list(cached_logits(seen.call).values()), dim=1)
    return numbers


def _read(path: Path) -> tuple[dict[Any, Tensor], dict[str, Tensor], dict[str, str]]:
    """Return what `record` wrote: the inputs, the other tensors in order, and the metadata."""
    if not path.is_file():
        raise FolderError(f"{path.parent} has no {path.name}: write one with `palme-xt parity record`")
    with explained(f"{path} is not a reference that `palme-xt parity record` wrote", FolderError):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            names = [metadata[key] for key in sorted(metadata) if key.startswith("order.")]
            reference = {name: file.get_tensor(name) for name in names}
        if "inputs" not in metadata:  # written by palme_xt 0.2 or earlier, which recorded no other modules than PalmE
            reference |= {f"input {name}": reference.pop(name) for name in ("img", "text")}
            reference["the output"] = reference.pop("loss")[0]
            metadata["inputs"] = '["img", "text"]'
        given = {key: reference.pop(f"input {key}") for key in json.loads(metadata["inputs"])}
    return given, reference, metadata


def _digest(module: nn.Module) -> str:
    parameters = {name: value.detach().clone().contiguous() for name, value in module.named_parameters()}
    return hashlib.sha256(save(parameters)).hexdigest()
