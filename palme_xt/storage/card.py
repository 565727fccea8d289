"""Write a model card: the README.md of a model folder, which the hub displays and indexes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from palme_xt.config import PalmEConfig

_TEMPLATE = """---
{metadata}
---

# PalmE

{description}
Built with `palme_xt` on top of [x-transformers](https://github.com/lucidrains/x-transformers).

## Use

```python
from palme_xt.hub import PalmE

model = PalmE.from_pretrained("{name}")  # this repository, or a folder with its files
```

{caption}

## Arguments

{arguments}

## Training

{training}

## Metrics

{metrics}
"""

_IMAGES = """A vision-language model: a ViT encoder turns an image of {image_size} x {image_size} pixels into patch
embeddings, and a causal text decoder cross-attends to them."""
_OTHER = """A vision-language model: its encoder, `{external_encoder}`, turns an image into embeddings, and a causal
text decoder cross-attends to them. To load it, pass the encoder: `PalmE.from_pretrained(..., encoder=module)`."""
_TEXT = "A text-only decoder, built with `cross_attend=False`, that takes no images."
_CAPTION = """To caption images, download this repository to FOLDER, or train a model into it:

```python
from palme_xt.captioner import Captioner

captioner = Captioner.from_pretrained("FOLDER")
captioner("image.png")
```

`palme-xt caption FOLDER image.png` does the same."""


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
    results = _results(config, (training or {}).get("data"), metrics or {})
    metadata = ModelCardData(
        library_name="palme_xt",
        pipeline_tag=_task(config),
        tags=["palme", "x-transformers", *(["image-captioning"] if config.cross_attend else [])],
        model_name="PalmE" if results else None,
        eval_results=results or None,
    )
    images = (_OTHER if config.external_encoder else _IMAGES).format_map(vars(config))
    count = "" if parameters is None else f" It has {parameters:,} parameters."
    return _TEMPLATE.format(
        metadata=metadata.to_yaml(),
        name=repo_id or "NAME",
        description=(images if config.cross_attend else _TEXT) + count,
        caption=_CAPTION if config.cross_attend else "The model does not caption images.",
        arguments=_table("argument", config.to_dict()),
        training=_table("option", training) if training else "No training details are available.",
        metrics=_table("metric", metrics) if metrics else "No evaluation results are available.",
    )


def _task(config: PalmEConfig) -> str:
    return "image-to-text" if config.cross_attend else "text-generation"


def _results(config: PalmEConfig, data: object, metrics: Mapping[str, Any]) -> list[EvalResult]:
    """Return the metrics for the metadata, which requires a data set for each of them."""
    name = _one_line(data)
    # The hub turns the type into a link, and rejects a type that cannot be the name of a data set there.
    on_the_hub = re.fullmatch(r"hf:((?:[\w-][\w.-]*/)?[\w-][\w.-]*)(?::.*)?", name, re.ASCII)
    return [
        EvalResult(_task(config), on_the_hub[1] if on_the_hub else "custom", name, metric, value)
        for metric, value in metrics.items()
        if data is not None and isinstance(value, float) and math.isfinite(value)
    ]


def _table(title: str, values: Mapping[str, Any]) -> str:
    rows = [f"| {_escaped(name)} | {_escaped(value)} |" for name, value in values.items()]
    return "\n".join([f"| {title} | value |", "|---|---|", *rows])


def _escaped(value: object) -> str:
    """Return a value as text for a table: on one line, with Markdown's special characters escaped."""
    return re.sub(r"([\\`*|<\[])", r"\\\1", _one_line(value))


def _one_line(value: object) -> str:
    return " ".join(str(value).split())
