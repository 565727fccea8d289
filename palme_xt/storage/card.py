"""Write a model card: the README.md of a model folder, which the hub displays and indexes."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from palme_xt.config import PalmEConfig
from palme_xt.storage.files import one_line

_TEMPLATE = Path(__file__).with_name("card.md")  # in the language of Jinja


def model_card(
    config: PalmEConfig,
    training: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    *,
    parameters: int | None = None,
    repo_id: str | None = None,
) -> str:
    """Return a model card in Markdown that begins with its metadata in YAML.

    Args:
        config: The model's arguments, shown as a table.
        training: How the model was trained, as in `config.json`: `{"data": ..., "steps": ..., ...}`.
        metrics: Results of an evaluation. If the data set is known, finite floats also go into the metadata; ints do
            not, because they are counts.
        parameters: Number of parameters, shown if given.
        repo_id: The repository that the card is written for, "user/name", if known.

    Raises:
        TypeError: If an override in `config` has no JSON form.
    """
    task = "image-to-text" if config.cross_attend or config.image_token is not None else "text-generation"
    results = _results(task, (training or {}).get("data"), metrics or {})
    metadata = ModelCardData(
        library_name="palme_xt",
        pipeline_tag=task,
        tags=["palme", "x-transformers", *(["image-captioning"] if config.cross_attend else [])],
        model_name="PalmE" if results else None,
        eval_results=results or None,
    )
    shown: dict[str, Any] = {"config": config, "training": training, "metrics": metrics, "cell": _escaped}
    card = ModelCard.from_template(metadata, str(_TEMPLATE), **shown, parameters=parameters, repo_id=repo_id)
    return f"{card}\n"


def _results(task: str, data: object, metrics: Mapping[str, Any]) -> list[EvalResult]:
    """Return the metrics for the metadata, which requires a data set for each of them."""
    name = one_line(data)
    # The hub turns the type into a link, and rejects a type that cannot be the name of a data set there.
    on_the_hub = re.fullmatch(r"hf:((?:[\w-][\w.-]*/)?[\w-][\w.-]*)(?::.*)?", name, re.ASCII)
    return [
        EvalResult(task, on_the_hub[1] if on_the_hub else "custom", name, metric, value)
        for metric, value in metrics.items()
        if data is not None and isinstance(value, float) and math.isfinite(value)
    ]


def _escaped(value: object) -> str:
    """Return a value as text for a table: on one line, with Markdown's special characters escaped."""
    return re.sub(r"([\\`*|<\[])", r"\\\1", one_line(value))
