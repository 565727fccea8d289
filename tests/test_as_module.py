"""The model survives what every torch.nn.Module is expected to survive."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap

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
vmapped = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's own, for attention
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


def losses(model: PalmE) -> Callable[..., Tensor]:
    """Return a function of parameters, one image and one text."""
    return lambda parameters, img, text: functional_call(model, parameters, (img[None], text[None]))


@vmapped
@variants
def test_gradients_of_each_sample(arguments: dict[str, Any]) -> None:
    model = small(**arguments)
    img, text = batch(model, b=3)
    text[1, 7:] = -100
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    gradients = vmap(grad(losses(model)), in_dims=(None, 0, 0))(parameters, img, text)
    for sample in range(3):
        model.zero_grad()
        model(img[sample : sample + 1], text[sample : sample + 1]).backward()
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            difference = (gradients[name][sample] - parameter.grad).norm()
            assert difference <= 1e-4 * parameter.grad.norm() + 1e-6, name
    embeddings = gradients["decoder.net.token_emb.emb.weight"]
    assert not torch.allclose(embeddings[0], embeddings[2])


@vmapped
def test_lens_of_each_sample() -> None:
    model = small()
    img, text = batch(model, b=3)
    lens = torch.tensor([3, 10, 5])
    loss = vmap(lambda img, text, lens: model(img[None], text[None], lens=lens[None]))(img, text, lens)
    each = [model(img[i : i + 1], text[i : i + 1], lens=lens[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(loss, torch.stack(each))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda text: text.index_fill(0, torch.tensor(1), 32), "text must have ids within 0..num_tokens-1=31"),
        (lambda text: text.index_fill(0, torch.tensor(1), -100), "text must have at least one target, or the loss is"),
    ],
)
def test_one_invalid_sample_of_a_vmap_is_refused(broken: Callable[[Tensor], Tensor], message: str) -> None:
    model = small()
    img, text = batch(model, b=3)
    per_sample = vmap(losses(model), in_dims=(None, 0, 0))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        per_sample(dict(model.named_parameters()), img, broken(text))


@vmapped
def test_jacobian_of_the_logits() -> None:
    model = small()
    img, text = batch(model, b=1, n=3)
    jacobian = jacrev(lambda img: logits(model, img, text))(img)
    assert jacobian.shape == (1, 2, 32, *img.shape)
    leaf = img.clone().requires_grad_()
    (expected,) = torch.autograd.grad(logits(model, leaf, text)[0, 1, 7], leaf)
    torch.testing.assert_close(jacobian[0, 1, 7], expected, rtol=1e-4, atol=1e-6)


@vmapped
def test_an_ensemble_of_stacked_models() -> None:
    models = [small(seed=seed) for seed in range(3)]
    parameters, buffers = stack_module_state(models)
    img, text = batch(models[0])
    loss = vmap(lambda p, b: functional_call(models[0], (p, b), (img, text)))(parameters, buffers)
    torch.testing.assert_close(loss, torch.stack([model(img, text) for model in models]))


@pytest.mark.parametrize("variant", ["default flags", "text only", "tied embeddings"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace(variant: str) -> None:
    model = small(**VARIANTS[variant])
    img, text = batch(model)
    traced = torch.jit.trace(model, (img, text))
    others = batch(model, seed=5)
    torch.testing.assert_close(traced(*others), model(*others), rtol=1e-6, atol=0)
    assert not torch.allclose(traced(*others), model(img, text))


@vmapped
@pytest.mark.slow
def test_compile_gradients_of_each_sample() -> None:
    model = small()
    img, text = batch(model, b=3)
    per_sample = vmap(grad(losses(model)), in_dims=(None, 0, 0))
    parameters = dict(model.named_parameters())
    compiled = torch.compile(per_sample, fullgraph=True, backend="eager")(parameters, img, text)
    torch.testing.assert_close(compiled, per_sample(parameters, img, text), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_compile_in_one_graph() -> None:
    model = small()
    compiled = torch.compile(model, fullgraph=True)
    for n in 10, 7:
        img, text = batch(model, n=n)
        torch._dynamo.mark_dynamic(text, 1)  # so that code is generated once; test_compile.py counts graphs
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
    model = small(**VARIANTS["tied embeddings"], **VARIANTS["text only"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*batch(model)), model(*batch(model)), rtol=1e-5, atol=0)
