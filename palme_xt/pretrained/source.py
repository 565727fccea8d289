"""Where weights come from: a folder, a repository on the hub, or a transformers model in memory."""

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from palme_xt.pretrained.tensors import Readers
from palme_xt.storage.files import explained

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


class Source(NamedTuple):
    """A checkpoint whose tensors are not read yet.

    Attributes:
        name: What the user called it.
        config: The content of `config.json`.
        open: Finds the weights, and returns for the name of each tensor a function that reads it.
    """

    name: str
    config: Mapping[str, Any]
    open: Callable[[], Readers]


def open_source(source: Any) -> Source:
    """Return the checkpoint in a folder, on the hub, or in memory. Its `open` raises the same errors.

    Args:
        source: A folder with `config.json` and safetensors, "user/name" on the hub, or a model of transformers.

    Raises:
        ModuleNotFoundError: If safetensors or huggingface_hub is needed, but not installed.
        TypeError: If `source` is something else.
        ValueError: If there is no such folder or repository, or files are missing or damaged.
    """
    if hasattr(source, "state_dict") and hasattr(getattr(source, "config", None), "to_dict"):
        name = getattr(source.config, "_name_or_path", "") or type(source).__name__
        return Source(name, source.config.to_dict(), lambda: {k: t.detach for k, t in source.state_dict().items()})
    if not isinstance(source, str | os.PathLike):
        kind = type(source).__name__
        raise TypeError(f"source must be a folder, a name on the hub, or a model of transformers, not {kind}")
    name = os.fspath(source)
    path = find_file(name, "config.json")
    with explained(f"{name} has a damaged config.json", remedy="; download or save it again"):
        return Source(name, {**json.loads(path.read_text())}, partial(_open, name))


def _open(name: str) -> Readers:
    safetensors = _import("safetensors")
    path = find_file(name, _INDEX, _WEIGHTS, download="model*.safetensors*")
    with explained(f"{name} has weights that cannot be read from {path.name}", remedy="; download or save them again"):
        shards = {*json.loads(path.read_text())["weight_map"].values()} if path.name == _INDEX else {_WEIGHTS}
        files = [safetensors.safe_open(path.with_name(shard), "pt") for shard in sorted(shards)]
    return {key: partial(file.get_tensor, key) for file in files for key in file.keys()}  # noqa: SIM118  # no mapping


def find_file(name: str, *wanted: str, download: str = "config.json") -> Path:
    """Return the path of the first of `wanted` that is in a folder, or in a repository, which is downloaded."""
    folder = Path(name)
    if not folder.is_dir():
        hub = _import("huggingface_hub")
        with explained(f"{name} is neither a folder nor a repository on the hub that can be read"):
            folder = Path(hub.snapshot_download(name, allow_patterns=download))
    for file in wanted:
        if (folder / file).exists():
            return folder / file
    kind = ", with safetensors" if wanted[-1] == _WEIGHTS else ""
    raise ValueError(f"{name} has no {wanted[-1]}: use a folder of save_pretrained{kind}")


def _import(package: str) -> Any:
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        message = f"{package} is not installed: pip install -e '.[train]'"
        raise ModuleNotFoundError(message, name=package) from error
