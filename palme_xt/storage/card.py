"""A model card: the README.md of a model folder, which the hub shows and finds the model by."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from palme_xt.config import PalmEConfig

TEMPLATE = """---
{front_matter}
---

# PalmE

{what}

## Use

```python
from palme_xt.hub import PalmE

model = PalmE.from_pretrained("{name}")  # of this repository, or of a folder that holds its files
```

{caption}

## Arguments

{arguments}

## Training

{training}

## Metrics

{metrics}
"""

IMAGES = """A vision-language model: a ViT encoder turns an image of {size} x {size} pixels into patch embeddings, and a
causal text decoder cross-attends to them."""
TEXT = "A text-only decoder: with `cross_attend=False` it does not look at images."
CAPTION = """Captions of image files, with those files in FOLDER:

```bash
palme-xt caption FOLDER IMAGE
```"""


def model_card(
    config: PalmEConfig,
    training: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    *,
    parameters: int | None = None,
    repo_id: str | None = None,
) -> str:
    """A model card in Markdown, its metadata in front as YAML.

    Args:
        config: the model's arguments, shown as a table.
        training: how it was trained, as `config.json` has it: `{"data": ..., "steps": ..., ...}`.
        metrics: of its evaluation. Finite floats go into the metadata too, where the data are known; ints are counts.
        parameters: how many the model has.
        repo_id: "user/name" of the repository that the card is for, where it is known.

    Raises:
        TypeError: an override in `config` that has no JSON form.
    """
    data = ModelCardData(
        library_name="palme_xt",
        pipeline_tag="image-to-text" if config.cross_attend else "text-generation",
        tags=["palme", "x-transformers", *(["image-captioning"] if config.cross_attend else [])],
        model_name="PalmE",
        eval_results=_results(config, (training or {}).get("data"), metrics or {}) or None,
    )
    if data.eval_results is None:
        data.pop("model_name")
    what = IMAGES.format(size=config.image_size) if config.cross_attend else TEXT
    count = "" if parameters is None else f" It has {parameters:,} parameters."
    return TEMPLATE.format(
        front_matter=data.to_yaml(),
        name=repo_id or "NAME",
        what=f"{what}{count}\nBuilt with `palme_xt` over [x-transformers](https://github.com/lucidrains/x-transformers).",
        caption=CAPTION if config.cross_attend else "It captions no images.",
        arguments=_table("argument", config.to_dict()),
        training=_table("option", training) if training else "How it was trained is not known.",
        metrics=_table("metric", metrics) if metrics else "It comes without an evaluation.",
    )


def _results(config: PalmEConfig, data: object, metrics: Mapping[str, Any]) -> list[EvalResult]:
    """For the metadata, which wants a data set beside each metric."""
    if data is None:
        return []
    name = _one_line(data)
    # The hub makes a link of the type, and checks that it could be the name of a data set there. Folders could be too.
    on_the_hub = re.fullmatch(r"hf:((?:[\w-][\w.-]*/)?[\w-][\w.-]*)(?::.*)?", name, re.ASCII)
    return [
        EvalResult(
            task_type="image-to-text" if config.cross_attend else "text-generation",
            dataset_type=on_the_hub[1] if on_the_hub else "custom",
            dataset_name=name,
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in metrics.items()
        if isinstance(value, float) and math.isfinite(value)
    ]


def _table(title: str, values: Mapping[str, Any]) -> str:
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in values.items()]
    return "\n".join([f"| {title} | value |", "|---|---|", *rows])


def _cell(value: object) -> str:
    """On one line, and without what Markdown would take for its own."""
    return re.sub(r"([\\`*|<\[])", r"\\\1", _one_line(value))


def _one_line(value: object) -> str:
    return " ".join(str(value).split())
