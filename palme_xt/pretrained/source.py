"""Where weights come from: a folder, a repository on the hub, or a transformers model in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


class Source(NamedTuple):
    """A checkpoint whose tensors are not read yet.

    Attributes:
        name: What the user called it.
        config: The content of `config.json`.
        names: Names of the tensors.
        read: Returns a tensor, given its name.
    """

    name: str
    config: Mapping[str, Any]
    names: Collection[str]
    read: Callable[[str], Tensor]


def open_source(source: Any) -> Source:
    """Return the checkpoint in a folder, on the hub, or in memory.

    Args:
        source: A folder with `config.json` and safetensors, "user/name" on the hub, or a model of transformers.

    Raises:
        ModuleNotFoundError: If safetensors or huggingface_hub is needed, but not installed.
        TypeError: If `source` is something else.
        ValueError: If there is no such folder or repository, or files are missing or damaged.
    """
    if hasattr(source, "state_dict") and hasattr(getattr(source, "config", None), "to_dict"):
        tensors = source.state_dict()
        name = getattr(source.config, "_name_or_path", "") or type(source).__name__
        return Source(name, source.config.to_dict(), tensors, tensors.__getitem__)
    if not isinstance(source, str | os.PathLike):
        kind = type(source).__name__
        raise TypeError(f"source must be a folder, a name on the hub, or a model of transformers, not {kind}")
    name = os.fspath(source)
    folder = Path(name) if Path(name).is_dir() else _download(name)
    for wanted in _CONFIG, _WEIGHTS:
        if not (folder / wanted).exists() and not (wanted == _WEIGHTS and (folder / _INDEX).exists()):
            raise ValueError(f"{name} has no {wanted}: use a folder of save_pretrained, with safetensors")
    files = _files(folder)
    return Source(name, json.loads((folder / _CONFIG).read_text()), files, lambda key: files[key].get_tensor(key))


def _files(folder: Path) -> dict[str, Any]:
    """Return the opened file that holds each tensor."""
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise _not_installed("safetensors") from error
    index = folder / _INDEX
    shards = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {_WEIGHTS}
    try:
        opened = [safe_open(folder / shard, "pt") for shard in sorted(shards)]
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder} has weights that cannot be read: {error}") from error
    return {name: file for file in opened for name in file.keys()}  # noqa: SIM118  # no mapping


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise _not_installed("huggingface_hub") from error
    try:
        return Path(snapshot_download(name, allow_patterns=[_CONFIG, "model*.safetensors", _INDEX]))
    except Exception as error:  # the type depends on the release of huggingface_hub
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{name} is neither a folder nor a repository on the hub that can be read: {reason}"
        ) from error


def _not_installed(package: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"{package} is not installed: pip install 'palme-xt[train]'", name=package)
