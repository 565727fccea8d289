"""A model folder, as the hub stores it and as each training run writes it.

config.json        all of the model's arguments, and optionally how it was trained, under "training"
model.safetensors  the weights; pickles are rejected, because reading a pickle can run code
COMPANIONS         files that captioning or the hub reads; each of them is optional
"""

import json
import os
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from palme_xt.config import PalmEConfig
from palme_xt.external import name_encoder
from palme_xt.model import Encoder, PalmE
from palme_xt.storage.files import Content, explained, replace_files

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
COMPANIONS = ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", CARD)
TRAINING = "training"

_OF_TRAINING = {"training.lock", "metrics.jsonl"}  # in the folder of a training run from its first step on

_PICKLES = "reading a pickle can run code"

PathLike = str | os.PathLike[str]
Device = str | torch.device
Model = TypeVar("Model", bound=PalmE)


class FolderError(ValueError):
    """Raised if a folder, or a repository on the hub, cannot be read or written as a model."""


def load(folder: PathLike, device: Device = "cpu", encoder: Encoder = "config") -> PalmE:
    """Return the model in `folder`, in eval mode.

    Args:
        folder: The folder.
        device: Where to put the model.
        encoder: As in `PalmE.from_config`: a module of the class that `config.json` has as `external_encoder`.

    Raises:
        FolderError: If it is not a model folder, or its files are damaged or do not belong together, or `encoder` is
            not the one that they belong to.
    """
    return load_as(PalmE, folder, device, encoder)


def load_as(kind: type[Model], folder: PathLike, device: Device = "cpu", encoder: Encoder = "config") -> Model:
    """Return the model in `folder`, as `load` does, as an instance of a subclass of `PalmE`."""
    config = read_config(folder)
    with explained(f"{Path(folder) / CONFIG} does not describe the encoder", FolderError):
        name_encoder(encoder, config.external_encoder)
    with _reading_arguments(folder):
        model = kind.from_config(config, encoder)
    load_weights(model.to(device), folder)
    return model.eval()


def load_weights(model: nn.Module, folder: PathLike) -> None:
    """Load the weights in `folder` into a model, cast to the dtypes and moved to the devices of its own tensors.

    Raises:
        FolderError: If the weights are missing, damaged, or those of another model. The model is unchanged.
    """
    path = _find(folder, WEIGHTS)
    remedy = f"; download or save it again; other formats are not read, because {_PICKLES}"
    with explained(f"{path} holds no safetensors weights that can be read", FolderError, remedy):
        found = load_file(path)  # maps the file into memory: no copy other than the model's own
    ours, theirs = (
        {name: tuple(tensor.shape) for name, tensor in each.items()} for each in (model.state_dict(), found)
    )
    if wrong := [name for name in ours | theirs if ours.get(name) != theirs.get(name)]:
        shapes = f"it is {theirs.get(wrong[0], 'missing')} in the file, {ours.get(wrong[0], 'missing')} in the model"
        why = f"{len(wrong)} of {len(ours | theirs)} tensors differ, {wrong[0]} first: {shapes}"
        remedy = f"{CONFIG} and {WEIGHTS} must belong to the same model"
        raise FolderError(f"{path} does not hold this model's weights: {why}; {remedy}")
    model.load_state_dict(found)


def read_config(folder: PathLike) -> PalmEConfig:
    """Return the arguments in `config.json`, where the 17 arguments and the override dicts must not be missing.

    Others came later, and leaving them out means the same as before.

    Raises:
        FolderError: As in `read_json`, and if an argument is missing, unknown or invalid.
    """
    values = read_json(folder)
    values.pop(TRAINING, None)
    arguments = {argument.name: not argument.kw_only for argument in fields(PalmEConfig)}
    missing = [name for name, old in arguments.items() if name not in values and (old or name.endswith("_kwargs"))]
    with _reading_arguments(folder):
        if missing and values.keys() <= arguments.keys():
            raise ValueError(f"{', '.join(missing)} missing; defaults could build a different model than the saved one")
        return PalmEConfig.from_dict(values)


def read_json(folder: PathLike) -> dict[str, Any]:
    """Return the content of `config.json`, including "training".

    Raises:
        FolderError: If the folder or the file is missing, or the file does not hold a JSON object.
    """
    path = _find(folder, CONFIG)
    with _reading_arguments(folder):
        values = json.loads(path.read_bytes())
        if not (isinstance(values, dict) and isinstance(values.get(TRAINING, {}), dict)):
            raise TypeError(f"{values!r:.60} must be an object, and so must its {TRAINING!r}, if it has one")
        return values


def read_companions(folder: PathLike) -> dict[str, bytes]:
    """Return the content of those `COMPANIONS` that are in `folder`, by name.

    Raises:
        FolderError: If one of them cannot be read.
    """
    paths = [Path(folder) / name for name in COMPANIONS]
    with explained(f"one of {', '.join(COMPANIONS)} in {folder} cannot be read", FolderError):
        return {path.name: path.read_bytes() for path in paths if path.is_file()}


def save(
    model: PalmE,
    folder: PathLike,
    training: Mapping[str, Any] | None = None,
    companions: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Write a model folder, which is created if it does not exist. Other files in the folder are kept.

    Args:
        model: The model whose arguments and weights are written. Tensors that share memory are written separately.
        folder: Where to write. After an error it is unchanged; see `palme_xt.storage.files.replace_files`.
        training: How the model was trained, as JSON types.
        companions: The content of `COMPANIONS`, by name.

    Raises:
        FolderError: If the folder cannot be written, or a name in `companions` is not one of `COMPANIONS`.
        ValueError: If the config of the model is unproven (see `PalmE.from_modules`).
        TypeError: If an argument of the model, or a value of `training`, has no JSON form.
    """
    if unknown := [name for name in companions if name not in COMPANIONS]:
        raise FolderError(f"companions[{unknown[0]!r}] must be one of {', '.join(COMPANIONS)}: no other file is read")
    values = model.config.to_dict() | ({} if training is None else {TRAINING: dict(training)})
    weights = as_safetensors(model.state_dict(), {"format": "pt"})
    write_files(folder, {**companions, CONFIG: as_json(values), WEIGHTS: weights})


def as_json(values: Mapping[str, Any]) -> bytes:
    """Return the content of a JSON file."""
    return json.dumps(values, indent=2).encode() + b"\n"


def as_safetensors(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Content:
    """Return the content of a safetensors file. Tensors that share memory are written separately."""
    written: dict[str, Tensor] = {}
    memories = set()
    for name, tensor in tensors.items():
        memory = tensor.device, tensor.untyped_storage().data_ptr()
        # safetensors rejects tensors that share memory or are not contiguous.
        written[name] = tensor.clone().contiguous() if memory in memories else tensor.contiguous()
        memories.add(memory)
    return lambda path: save_file(written, path, metadata)


def write_files(folder: PathLike, contents: Mapping[str, Content]) -> None:
    """Write files as `replace_files` does, into a folder that is created if it does not exist.

    Raises:
        FolderError: If the folder cannot be written.
    """
    with explained(f"{folder} cannot be written", FolderError):
        Path(folder).mkdir(parents=True, exist_ok=True)
        replace_files(Path(folder), contents)


def check_files(where: object, names: Collection[str], required: Collection[str] = (CONFIG, WEIGHTS)) -> None:
    """Reject a folder or a repository by the names of its files, without opening any.

    Raises:
        FolderError: If a `required` file is missing. Weights in another file do not replace `model.safetensors`.
    """
    for name in required:
        if name in names:
            continue
        if name == WEIGHTS and _OF_TRAINING & {*names}:
            raise FolderError(f"{where} has no weights yet: resume its training with `palme-xt train --resume {where}`")
        others = f"; weights in other files are not read, because {_PICKLES}" if name == WEIGHTS else ""
        raise FolderError(f"{where} is not a run folder: it has no {name}; `palme-xt train` makes one{others}")


def _find(folder: PathLike, name: str) -> Path:
    """Return the path of a file that a model folder must have."""
    path = Path(folder) / name
    if not Path(folder).is_dir():
        found = "it is a file" if Path(folder).exists() else "there is no such folder"
        raise FolderError(f"{folder} is not a run folder: {found}; `palme-xt train` makes one")
    if not path.is_file():
        check_files(folder, os.listdir(folder), [name])
    return path


def _reading_arguments(folder: PathLike) -> AbstractContextManager[None]:
    return explained(f"{Path(folder) / CONFIG} does not hold a model's arguments", FolderError)
