"""The loss alone has upstream's value and gradients, with less work."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from benchmarks.hand_wired import HandWired
from palme_xt import PalmE
from palme_xt.upstream import loss
from tests.models import batch, small
from tests.upstream.storages import Storages

needs_chunks = pytest.mark.skipif(
    not hasattr(nn.functional, "linear_cross_entropy"), reason="torch computes the loss in chunks since 2.13"
)


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let these small models also compute their loss in chunks."""
    monkeypatch.setattr(loss, "LOGITS_IN_CACHE", 0)
    monkeypatch.setattr(loss, "CHUNK", 4)


def wired(model: PalmE) -> HandWired:
    other = HandWired(model.config)
    other.load_state_dict(model.state_dict())
    return other


def numbers(model: nn.Module, img: Tensor, text: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """Return the loss, and the gradient of every parameter that has one."""
    model.zero_grad()
    value = model(img, text, **kwargs)
    value.backward()
    return {"loss": value} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Assert equality within 1e-6 of the loss, and within 1e-5 of the largest value of each gradient."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        tolerance = 1e-6 if name == "loss" else 1e-5
        assert (ours[name] - value).abs().max() <= tolerance * value.abs().max(), name


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "tied embeddings": ({"transformer_kwargs": {"tie_embedding": True}}, {}),
    "another ignore_index": ({"autoregressive_kwargs": {"ignore_index": 7, "pad_value": 3}}, {}),
    "lens": ({}, {"lens": torch.tensor([10, 6])}),
    "mixture of softmaxes": ({"transformer_kwargs": {"mixture_of_softmax": True}}, {}),
    "z loss": ({"attn_flash": False, "autoregressive_kwargs": {"add_attn_z_loss": True}}, {}),
}


@pytest.mark.parametrize("chunked", [False, pytest.param(True, marks=needs_chunks)])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_upstreams(case: str, chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, kwargs = CASES[case]
    model = small(**arguments)
    model.decoder.net.attn_layers.exact = True  # so that only the loss differs
    monkeypatch.setattr(loss, "LOGITS_IN_CACHE", 0 if chunked else 10**9)
    monkeypatch.setattr(loss, "CHUNK", 4)
    img, text = batch(model)
    if not kwargs:
        text[1, 7:] = model.config.ignore_index
    theirs = numbers(wired(model), img, text, **kwargs)
    assert_same(numbers(model, img, text, **kwargs), theirs)
    other = text.clone()
    other[0, 3] = (other[0, 3] + 1) % 7
    with pytest.raises(AssertionError, match="loss"):
        assert_same(numbers(model, img, other, **kwargs), theirs)


@needs_chunks
@pytest.mark.usefixtures("chunks")
def test_chunks_are_used_only_where_they_give_the_same() -> None:
    def uses_chunks(model: PalmE) -> bool:
        with mock.patch.object(
            nn.functional, "linear_cross_entropy", wraps=nn.functional.linear_cross_entropy
        ) as computed:
            model(*batch(model))
        return bool(computed.called)

    assert uses_chunks(small())
    assert not uses_chunks(small(transformer_kwargs={"tie_embedding": True}))
    assert not uses_chunks(small(transformer_kwargs={"sigsoftmax_logits": True}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not uses_chunks(small())
    model = small()
    model.decoder.net.to_logits.register_forward_hook(lambda *args: None)
    assert not uses_chunks(model)
    model, shapes = small(), []
    model.decoder.net.register_forward_hook(lambda net, inputs, outputs: shapes.append(outputs[0].shape[-1]))
    assert not uses_chunks(model)
    assert shapes == [model.config.num_tokens]  # the hook sees logits
    with mock.patch.object(loss, "LOGITS_IN_CACHE", 2 * 10 * 32):
        assert not uses_chunks(small())


@needs_chunks
@pytest.mark.usefixtures("chunks")
def test_a_loss_in_chunks_is_as_differentiable_as_others() -> None:
    model = small()
    img, text = batch(model)
    once = numbers(model, img, text)
    model.zero_grad()
    value = model(img, text)
    value.backward(retain_graph=True)
    value.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name], msg=name)

    parameters = dict(model.named_parameters())
    functional = torch.func.grad(lambda values: torch.func.functional_call(model, values, (img, text)))(parameters)
    torch.testing.assert_close(functional["encoder.pos_embedding"], once["encoder.pos_embedding"], rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(
    tuple(map(int, version("x-transformers").split(".")[:2])) < (2, 29),
    reason="x-transformers goes over the logits several times since 2.29",
)
def test_upstream_still_goes_over_the_logits_several_times() -> None:
    model = small(num_tokens=4096, max_seq_len=64)
    img, text = batch(model, n=40)  # so that the logits are larger than their weight
    counts = []
    for contestant in model, wired(model):
        with Storages() as storages:
            contestant(img, text)
        counts.append(sum(size >= 2 * 39 * 4096 for size in storages.sizes()) - 1)  # without the tokens' logits
    assert counts[0] == 1  # their log softmax
    assert counts[1] > counts[0]


@needs_chunks
@pytest.mark.slow
def test_chunks_are_compiled_in_one_graph_for_one_length_and_left_out_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "LOGITS_IN_CACHE", 400)  # fewer than the logits of any of these texts
    torch._dynamo.reset()
    model = small()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append("linear_cross_entropy" in str(graph.graph))
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for n in 10, 7, 9:
        img, text = batch(model, n=n)
        torch.testing.assert_close(compiled(img, text), model(img, text), rtol=1e-5, atol=0)
    assert graphs == [True, False]
