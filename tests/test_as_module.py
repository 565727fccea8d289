"""The model survives what every torch.nn.Module is expected to survive."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch

from palme_xt import PalmE
from tests.models import batch, logits, small

VARIANTS: dict[str, dict[str, Any]] = {
    "default flags": {},
    "no flash": {"attn_flash": False},
    "flash encoder": {"encoder_kwargs": {"attn_flash": True}},
    "absolute positions": {"use_abs_pos_emb": True, "rotary_xpos": False},
    "text only": {"cross_attend": False},
    "tied embeddings": {"transformer_kwargs": {"tie_embedding": True}},
    "five ALiBi heads": {"decoder_heads": 6, "alibi_num_heads": 5},  # not a power of two, which gives other slopes
}
variants = pytest.mark.parametrize("arguments", VARIANTS.values(), ids=VARIANTS)


def same(ours: PalmE, theirs: PalmE) -> bool:
    img, text = batch(theirs)
    return torch.equal(logits(ours, img, text), logits(theirs, img, text))


@variants
def test_deepcopy(arguments: dict[str, Any]) -> None:
    model = small(**arguments)
    model(*batch(model))
    copied = copy.deepcopy(model)
    assert same(copied, model)
    assert copied.config == model.config
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert same(copied, small(**arguments))  # the copy shares nothing with the original
    assert not same(copied, model)


@variants
def test_pickle(arguments: dict[str, Any]) -> None:
    model = small(**arguments)
    model(*batch(model))
    pickled = pickle.dumps(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert same(pickle.loads(pickled), small(**arguments))


def test_torch_save_of_the_whole_module() -> None:
    model, file = small(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert same(torch.load(file, weights_only=False), model)


@variants
def test_state_dict_round_trip_is_strict_also_after_forward(arguments: dict[str, Any]) -> None:
    model, other = small(**arguments), small(seed=9, **arguments)
    before = list(model.state_dict())
    model(*batch(model, n=14))
    assert list(model.state_dict()) == before
    assert not same(other, model)
    other.load_state_dict(model.state_dict())
    assert same(other, model)
    other(*batch(other, n=6))
    model.load_state_dict(other.state_dict())


@variants
def test_construction_on_the_meta_device(arguments: dict[str, Any]) -> None:
    model = small(**arguments)
    with torch.device("meta"):
        empty = PalmE.from_config(model.config)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}

    # `to_empty` leaves arbitrary values in memory. This is the worst case.
    filled = copy.deepcopy(empty).to_empty(device="cpu")
    filled._apply(lambda t: torch.full_like(t, 7))
    filled.load_state_dict(model.state_dict())
    assert same(filled, model)

    empty.load_state_dict(model.state_dict(), assign=True)
    assert same(empty, model)


def test_forward_on_the_meta_device_gives_shapes() -> None:
    # Without rotary positions: upstream's disable_autocast (2.26.0 to 2.31.10) does not support the meta device.
    model = small(rotary_xpos=False).to("meta")
    img, text = batch(model)
    assert logits(model, img.to("meta"), text.to("meta")).shape == (2, 9, 32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@variants
def test_to_dtype(arguments: dict[str, Any], dtype: torch.dtype) -> None:
    model = small(**arguments)
    img, text = batch(model)
    expected = logits(model, img, text)
    cast = logits(copy.deepcopy(model).to(dtype), img, text)
    assert cast.dtype == dtype
    # bfloat16 has 8 bits of precision: a relative error of 2 ** -8 in each of several dozen operations
    tolerance = 1e-4 if dtype == torch.float64 else 0.1
    assert (cast.double() - expected.double()).norm() < tolerance * expected.double().norm()


def test_to_device_moves_everything() -> None:
    model = small().to("meta")
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_autocast_to_bfloat16() -> None:
    model = small()
    img, text = batch(model)
    expected = logits(model, img, text)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, (values, _) = model(img, text, return_outputs=True)
    assert values.dtype == torch.bfloat16
    assert (values.float() - expected).norm() < 0.1 * expected.norm()
    loss.backward()
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {torch.float32}


@pytest.mark.slow
def test_compile_in_one_graph() -> None:
    model = small()
    compiled = torch.compile(model, fullgraph=True)
    for n in 10, 7:
        img, text = batch(model, n=n)
        model.zero_grad()
        expected = model(img, text)
        expected.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad()
        loss = compiled(img, text)
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            assert parameter.grad is not None
            assert (parameter.grad - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6
    # Inside the graph, the check cannot raise a ValueError, but it still runs.
    with pytest.raises(RuntimeError, match=r"text must have ids within 0\.\.num_tokens-1=31"):
        compiled(img, text + 31)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="must have the same batch size"):
        compiled(img, text.T)


@pytest.mark.slow
def test_compile_in_one_graph_with_tied_embeddings_and_text_only() -> None:
    for arguments in VARIANTS["tied embeddings"], VARIANTS["text only"]:
        model = small(**arguments)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*batch(model)), model(*batch(model)), rtol=1e-5, atol=0)
