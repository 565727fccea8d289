"""The model card: metadata that the hub reads, and tables of arguments, training and metrics."""

from __future__ import annotations

import re
from typing import Any

import pytest
from huggingface_hub import ModelCard

from palme_xt import PalmEConfig
from palme_xt.storage.card import model_card
from tests.models import SMALL
from tests.storage.folders import TRAINING


def metadata(card: ModelCard) -> Any:
    """Return the card's metadata, untyped, because the library's types do not have its fields."""
    return card.data


def rows(card: ModelCard, title: str) -> dict[str, str]:
    """Return the rows of the table below a title."""
    section = card.text.split(f"## {title}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| (.+) \| (.*) \|$", section, re.MULTILINE)[1:])


def test_a_card_with_all_details() -> None:
    config = PalmEConfig(**SMALL)
    metrics = {"step": 3, "held_out_exact_match": 0.972, "held_out_loss": 0.03, "perplexity": float("inf")}
    card = ModelCard(model_card(config, TRAINING, metrics, parameters=1234567))
    assert metadata(card).library_name == "palme_xt"
    assert metadata(card).pipeline_tag == "image-to-text"
    assert "image-captioning" in metadata(card).tags
    results = {result.metric_type: result.metric_value for result in metadata(card).eval_results}
    assert results == {"held_out_exact_match": 0.972, "held_out_loss": 0.03}
    assert {(result.dataset_type, result.dataset_name) for result in metadata(card).eval_results} == {
        ("custom", "digits")
    }
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    assert rows(card, "Arguments") == {name: str(value) for name, value in config.to_dict().items()}
    assert rows(card, "Training") == {name: str(value) for name, value in TRAINING.items()}
    assert rows(card, "Metrics") == {name: str(value) for name, value in metrics.items()}
    assert "1,234,567 parameters" in card.text
    assert 'captioner = Captioner.from_pretrained("FOLDER")' in card.text
    assert "available" not in card.text


def test_a_card_says_what_is_not_available() -> None:
    card = ModelCard(model_card(PalmEConfig(**SMALL)))
    assert metadata(card).eval_results is None
    assert "No training details are available." in card.text
    assert "No evaluation results are available." in card.text
    assert "parameters" not in card.text
    assert metadata(ModelCard(model_card(PalmEConfig(**SMALL), metrics={"loss": 0.5}))).eval_results is None


def test_a_card_of_a_text_only_model() -> None:
    card = ModelCard(model_card(PalmEConfig(**SMALL | {"cross_attend": False}), TRAINING, {"loss": 0.5}))
    assert metadata(card).pipeline_tag == metadata(card).eval_results[0].task_type == "text-generation"
    assert "image-captioning" not in metadata(card).tags
    assert "Captioner" not in card.text


@pytest.mark.parametrize(
    ("data", "kind", "shown"),
    [
        ("hf:user/pictures-1.0", "user/pictures-1.0", "hf:user/pictures-1.0"),
        ("hf:user/pictures-1.0:small set/2", "user/pictures-1.0", "hf:user/pictures-1.0:small set/2"),
        ("hf:beans", "beans", "hf:beans"),
        ("hf:a/b/c", "custom", "hf:a/b/c"),
        ("hf:", "custom", "hf:"),
        ("user/pictures", "custom", "user/pictures"),
        ("pictures", "custom", "pictures"),
        ("a|b/*.tar", "custom", r"a\|b/\*.tar"),
        ("{x}\n---\n# <b>", "custom", r"{x} --- # \<b>"),
        ("a: [1, &x", "custom", r"a: \[1, &x"),
    ],
)
def test_a_card_of_any_data(data: str, kind: str, shown: str) -> None:
    card = ModelCard(model_card(PalmEConfig(**SMALL), {"data": data}, {"loss": 0.5}))
    (result,) = metadata(card).eval_results
    assert (result.dataset_type, result.dataset_name) == (kind, " ".join(data.split()))
    assert rows(card, "Training") == {"data": shown}
