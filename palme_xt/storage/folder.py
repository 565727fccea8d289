"""A model folder: what the hub stores, and what the folder of each training run is as well.

config.json        the model's arguments, all of them, and perhaps under "training" how it was trained
model.safetensors  the weights; pickles are refused, because reading one can run code
COMPANIONS         files that captioning or the hub reads; each may be missing
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from palme_xt.config import PalmEConfig
from palme_xt.model import PalmE

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
COMPANIONS = ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", CARD)
TRAINING = "training"
UNFINISHED = "save.new"

PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
LOOKS_LIKE = {
    b"PK": "it is a pickle in a zip file, as torch.save writes, and reading one can run code",
    b"\x80": "it is a pickle, and reading one can run code",
    b"version https://git-lfs": "it is a pointer of git-lfs: `git lfs pull` fetches the file itself",
    b"<": "it looks like a web page",
}

Model = TypeVar("Model", bound=PalmE)


class PretrainedError(ValueError):
    """A folder, or a repository of the hub, that cannot be read or written as a model."""


def load(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> PalmE:
    """The model in `folder`, in eval mode.

    Raises:
        PretrainedError: not a model folder, or one whose files are damaged or do not belong together.
    """
    return load_as(PalmE, folder, device)


def load_as(kind: type[Model], folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> Model:
    """As `load`, for a subclass of `PalmE`."""
    _check_folder(folder, CONFIG, WEIGHTS)
    config = read_config(folder)
    try:
        model = cast(Model, kind.from_config(config))
    except (ValueError, TypeError) as error:
        raise _holds_no_arguments(folder, error) from error
    model.to(device)
    load_weights(model, folder)
    return model.eval()


def load_weights(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Fill a model with the weights in `folder`, each cast to the dtype and moved to the device of the model's own.

    Raises:
        PretrainedError: there are none, or they are damaged, or another model's; the model is left as it was.
    """
    _check_folder(folder, WEIGHTS)
    path = Path(folder) / WEIGHTS
    try:
        found = load_file(path)  # maps the file into memory: the model's own copy is the only one
    except (SafetensorError, OSError) as error:
        raise _holds_no_weights(path, _looks_like(path) or _one_line(error)) from error
    expected = model.state_dict()
    missing = [name for name in expected if name not in found]
    foreign = [name for name in found if name not in expected]
    others = [name for name in expected if name in found and found[name].shape != expected[name].shape]
    wrong = []
    if missing:
        wrong.append(f"{len(missing)} of {len(expected)} tensors are missing, {missing[0]} first")
    if foreign:
        wrong.append(f"{len(foreign)} are not of this model, {foreign[0]} first")
    if others:
        name = others[0]
        shapes = f"{tuple(found[name].shape)}, must have {tuple(expected[name].shape)}"
        wrong.append(f"{len(others)} have another shape, {name} first: it has {shapes}")
    if wrong:
        raise _holds_no_weights(path, f"{'; '.join(wrong)}: {CONFIG} and {WEIGHTS} must be of the same model")
    model.load_state_dict(found)


def read_config(folder: str | os.PathLike[str]) -> PalmEConfig:
    """The arguments in `config.json`, none of which may be missing.

    Raises:
        PretrainedError: as `read_json`, and where they are not all arguments, or not all of them, or wrong.
    """
    values = read_json(folder)
    values.pop(TRAINING, None)
    names = [argument.name for argument in fields(PalmEConfig)]
    try:
        if set(values) < set(names):
            missing = [name for name in names if name not in values]
            raise ValueError(f"{', '.join(missing)} missing; a default could build another model than the saved one")
        return PalmEConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise _holds_no_arguments(folder, error) from error


def read_json(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What is in `config.json`, "training" included.

    Raises:
        PretrainedError: the folder or the file is missing, or the file does not hold a JSON object.
    """
    _check_folder(folder, CONFIG)
    try:
        values = json.loads((Path(folder) / CONFIG).read_bytes())
        if not isinstance(values, dict):
            raise TypeError(f"it holds a {type(values).__name__}, must hold an object")
        if not isinstance(values.get(TRAINING, {}), dict):
            raise TypeError(f"{TRAINING!r} holds a {type(values[TRAINING]).__name__}, must hold an object")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise _holds_no_arguments(folder, error) from error
    return values


def read_companions(folder: str | os.PathLike[str]) -> dict[str, bytes]:
    """The content of those `COMPANIONS` that are in `folder`, by name.

    Raises:
        PretrainedError: one of them cannot be read.
    """
    try:
        return {name: (Path(folder) / name).read_bytes() for name in COMPANIONS if name in _names(folder)}
    except OSError as error:
        raise PretrainedError(f"{error.filename} cannot be read: {_one_line(error)}") from error


def save(
    model: PalmE,
    folder: str | os.PathLike[str],
    training: Mapping[str, Any] | None = None,
    companions: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Write a model folder, made where it is missing.

    All files are written into the folder `save.new` within it, and take their names when all of them are complete and
    on the disk: a full disk or a power cut before leaves the folder as it was. Killed between two renames, it has new
    files beside old ones, the weights last, and in `save.new` the new ones that are left; the next save removes them.
    Other files in the folder stay.

    Args:
        model: its arguments and its weights are written. Tensors that share memory are written one by one.
        folder: where to.
        training: how it was trained, in JSON types.
        companions: content of `COMPANIONS`, by name.

    Raises:
        PretrainedError: the folder cannot be written, or `companions` has a file that is none.
        TypeError: an argument of the model, or of the training, has no JSON form.
    """
    for name in companions:
        if name not in COMPANIONS:
            raise PretrainedError(f"companions[{name!r}] is not read again: the names are {', '.join(COMPANIONS)}")
    values = model.config.to_dict() | ({} if training is None else {TRAINING: dict(training)})
    contents = {**companions, CONFIG: json.dumps(values, indent=2).encode() + b"\n"}
    folder = Path(folder)
    aside = folder / UNFINISHED
    new = {name: aside / name for name in (*contents, WEIGHTS)}
    try:
        shutil.rmtree(aside, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        for name, content in contents.items():
            new[name].write_bytes(content)
        save_file(_apart(model.state_dict()), new[WEIGHTS], {"format": "pt"})
        shutil.copymode(new[CONFIG], new[WEIGHTS])  # safetensors 0.8 lets the owner alone read what it writes
        for path in new.values():
            sync(path)
        for name, path in new.items():
            path.replace(folder / name)
        with contextlib.suppress(OSError):  # Windows opens no folders, and some file systems sync none
            sync(folder)
    except (OSError, SafetensorError) as error:
        raise PretrainedError(f"{folder} cannot be written: {_one_line(error)}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_files(where: object, names: Collection[str], required: Collection[str] = (CONFIG, WEIGHTS)) -> None:
    """Refuse a folder or a repository by the names of its files, without opening any.

    Raises:
        PretrainedError: a file of `required` is missing; weights in a pickle are no substitute.
    """
    for name in required:
        if name in names:
            continue
        pickles = sorted(other for other in names if other.endswith(PICKLES) and "/" not in other)
        if name == WEIGHTS and pickles:
            raise PretrainedError(
                f"{where} has its weights in {pickles[0]}, a pickle, and reading one can run code: only {WEIGHTS} is "
                "read; convert it where you trust it"
            )
        raise PretrainedError(f"{where} is not a run folder: it has no {name}; `palme-xt train` makes one")


def _check_folder(folder: str | os.PathLike[str], *required: str) -> None:
    try:
        check_files(folder, _names(folder), required)
    except PretrainedError as error:
        if Path(folder).is_dir():
            raise
        found = "this is a file" if Path(folder).exists() else "there is no such folder"
        raise PretrainedError(f"{error} ({found})") from None


def _names(folder: str | os.PathLike[str]) -> list[str]:
    return [path.name for path in Path(folder).iterdir() if path.is_file()] if Path(folder).is_dir() else []


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _apart(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, contiguous, of which no two share memory: safetensors refuses those."""
    apart = {}
    seen = set()
    for name, tensor in state_dict.items():
        memory = (tensor.device, tensor.untyped_storage().data_ptr())
        apart[name] = tensor.clone(memory_format=torch.contiguous_format) if memory in seen else tensor.contiguous()
        seen.add(memory)
    return apart


def _looks_like(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            start = file.read(32)
    except OSError:
        return None
    if start[8:9] == b"{":  # safetensors: the length of a header, which may look like anything, and the header
        return None
    return next((description for prefix, description in LOOKS_LIKE.items() if start.startswith(prefix)), None)


def _holds_no_arguments(folder: str | os.PathLike[str], error: Exception) -> PretrainedError:
    return PretrainedError(f"{Path(folder) / CONFIG} does not hold a model's arguments: {_one_line(error)}")


def _holds_no_weights(path: Path, why: str) -> PretrainedError:
    return PretrainedError(f"{path} does not hold this model's weights: {why}")


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
