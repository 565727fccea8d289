"""Compiled and exported models need few graphs for many lengths, and compute the same as the eager model."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.export import Dim

from palme_xt import PalmE
from palme_xt.decoding import compiled as compiled_step
from tests.devices import GPU
from tests.models import batch, small

REUSES = "max_reuse_entries" in inspect.signature(torch.compiler.nested_compile_region).parameters  # not in torch 2.9
LENGTHS = (2, 5, 9, 4, 3, 17, 30, 6, 4, 12)  # shorter and longer than the 4 patches


def loss_and_gradients(model: Any, module: PalmE, img: Tensor, text: Tensor) -> list[Tensor]:
    module.zero_grad()
    loss = model(img, text)
    loss.backward()
    return [loss.detach()] + [p.grad for p in module.parameters() if p.grad is not None]


@contextlib.contextmanager
def traced_steps(*, constant_floats: bool = True, backend: Any = "aot_eager") -> Iterator[None]:
    """Trace the steps of decoding as they are for the compiler, without generating code, and count from zero."""
    torch._dynamo.reset()
    counters.clear()
    step = torch.compile(compiled_step._step, fullgraph=True, dynamic=True, backend=backend)
    step = torch._dynamo.config.patch(specialize_float=constant_floats)(step)
    with mock.patch.object(compiled_step, "_compiled", return_value=step):
        yield


@pytest.mark.slow
def test_training_compiles_at_most_thrice_for_ten_lengths() -> None:
    torch._dynamo.reset()
    counters.clear()
    model = small()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for n in LENGTHS:
        img, text = batch(model, n=n)
        expected = loss_and_gradients(model, model, img, text)
        found = loss_and_gradients(compiled, model, img, text)
        assert len(found) == len(expected)
        for value, eager in zip(found, expected, strict=True):
            assert (value - eager).norm() <= 1e-5 * eager.norm() + 1e-6
    assert 1 <= counters["stats"]["unique_graphs"] <= 3


@pytest.mark.slow
def test_decoding_compiles_at_most_thrice_for_ten_lengths() -> None:
    model = small()
    with traced_steps():
        for b in 3, 1:
            for n in LENGTHS:
                img, prompts = batch(model, b=b, n=n)
                kwargs: dict[str, Any] = {"temperature": 0.0, "restrict_to_max_seq_len": False}
                eager = model.generate(img, prompts, 5, **kwargs)
                assert torch.equal(model.generate(img, prompts, 5, compile=True, **kwargs), eager)
    assert 1 <= counters["stats"]["unique_graphs"] <= 3


@pytest.mark.slow
def test_torch_still_traces_twice_unless_floats_are_constants() -> None:
    model = small(cross_attend=False)
    _, prompts = batch(model, b=2, n=4)
    captured = {}
    for constant in True, False:  # with regions, torch fails if floats are no constants
        with (
            traced_steps(constant_floats=constant),
            mock.patch.object(compiled_step, "in_regions", lambda net: net),
        ):
            model.generate(None, prompts, 3, compile=True)
        captured[constant] = counters["stats"]["calls_captured"]
    assert 0 < 1.9 * captured[True] < captured[False]


@pytest.mark.slow
@pytest.mark.skipif(not REUSES, reason="this release of torch finds fewer of them")
def test_blocks_that_are_alike_are_compiled_once() -> None:
    regions: dict[int, int] = {}
    captured: dict[int, int] = {}

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        regions[depth] = sum(isinstance(module, torch.fx.GraphModule) for module in graph.modules()) - 1
        return graph.forward

    for depth in 2, 3:
        model = small(decoder_depth=depth)
        img, prompts = batch(model, b=2, n=4)
        with traced_steps(backend=count):
            eager = model.generate(img, prompts, 5, temperature=0.0)
            assert torch.equal(model.generate(img, prompts, 5, temperature=0.0, compile=True), eager)
        captured[depth] = counters["stats"]["calls_captured"]
    assert regions == {2: 3, 3: 3}  # self-attention, cross-attention and feedforward
    assert captured[3] - captured[2] < captured[2] / 3, captured  # what is between the blocks of the third layer


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_more_than_eight_blocks_that_differ() -> None:
    blocks, x = nn.ModuleList(Scaled(number + 0.5) for number in range(9)), torch.arange(3.0)
    region = compiled_step._feed_forward

    def compiled() -> Any:
        torch._dynamo.reset()
        step = torch.compile(lambda x: torch.stack([region(block, (x,), {}) for block in blocks]), backend="eager")
        return torch._dynamo.config.patch(specialize_float=True)(step)(x)

    assert torch.equal(compiled(), torch.arange(0.5, 9)[:, None] * x)
    if REUSES:
        region = torch.compiler.nested_compile_region(region.__marked_compile_region_fn__)  # type: ignore[attr-defined]
        with pytest.raises(RuntimeError, match="max_reuse_entries"):
            compiled()


def test_the_vector_instructions_are_found_while_the_step_is_traced() -> None:
    assert torch._inductor.config.cpp.vec_isa_ok is None  # torch still compiles a program for this
    found = threading.Event()
    with mock.patch("torch._inductor.cpu_vec_isa.pick_vec_isa", side_effect=found.set):
        compiled_step._compiled.__wrapped__("cuda", True)
        assert not found.wait(0.1)
        compiled_step._compiled.__wrapped__("cpu", True)
        assert found.wait(60)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), GPU])
@pytest.mark.parametrize("b", [1, 2])
def test_compiled_decoding_gives_the_same_tokens(b: int, device: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    model = small(max_seq_len=64).to(device)
    img, prompts = (tensor.to(device) for tensor in batch(model, b=b, n=3))
    eager = model.generate(img, prompts, 40, temperature=0.0)
    with torch._inductor.config.patch(fx_graph_cache=False):  # the counters know nothing of what is on disk
        assert torch.equal(model.generate(img, prompts, 40, temperature=0.0, compile=True), eager)
    assert (not counters["aten_mm_info"]) == (b == 1 and device == "cpu")  # a row is not multiplied by MKL
    assert len(eager.unique()) > 2
    with torch.no_grad():  # the graph reads the weights as they are now
        model.decoder.net.to_logits.weight.neg_()
    changed = model.generate(img, prompts, 40, temperature=0.0)
    assert torch.equal(model.generate(img, prompts, 40, temperature=0.0, compile=True), changed)
    assert not torch.equal(changed, eager)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"cross_attend": False},
        {"decoder_kwargs": {"attn_num_mem_kv": 2}, "rotary_xpos": False},
        {"decoder_kwargs": {"attn_kv_heads": 2}},
        {"transformer_kwargs": {"tie_embedding": True}, "attn_flash": False},
        {"decoder_kwargs": {"add_value_residual": True, "learned_value_residual_mix": True}},
        {"decoder_kwargs": {"residual_attn": True, "cross_residual_attn": True}, "attn_flash": False},
    ],
)
def test_the_step_that_is_compiled_is_the_eager_one(arguments: dict[str, Any]) -> None:
    model = small(**arguments)
    img, prompts = batch(model, b=3, n=4)
    source = img if model.config.cross_attend else None
    step = mock.Mock(wraps=compiled_step._step)
    with mock.patch.object(compiled_step, "_compiled", return_value=step):
        eager = model.generate(source, prompts, 8, temperature=0.0)
        assert torch.equal(model.generate(source, prompts, 8, temperature=0.0, compile=True), eager)
        assert step.call_count == 7
        eos = int(eager[0, 2])
        cases: list[dict[str, Any]] = [{"eos_token": eos}, {"beams": 3}, {"beams": 2, "eos_token": eos}]
        for kwargs in cases:
            eager = model.generate(source, prompts, 8, temperature=0.0, **kwargs)
            assert torch.equal(model.generate(source, prompts, 8, temperature=0.0, compile=True, **kwargs), eager)
        if not arguments:
            lens = torch.tensor([4, 1, 2])
            eager = model.generate(source, prompts, 8, temperature=0.0, prompt_lens=lens)
            found = list(model.stream(source, prompts, 8, temperature=0.0, prompt_lens=lens, compile=True))
            assert torch.equal(torch.stack(found, dim=1), eager)


def test_what_cannot_be_compiled() -> None:
    model = small()
    img, prompts = batch(model)
    with pytest.raises(ValueError, match=r"compile=True needs the key-value cache: leave out cache_kv=False"):
        model.generate(img, prompts, 2, compile=True, cache_kv=False)
    with pytest.raises(TypeError, match=r"compile='yes' must be True or False"):
        model.generate(img, prompts, 2, compile="yes")  # type: ignore[arg-type]
    shifted = small(decoder_kwargs={"shift_tokens": 1})
    with pytest.raises(
        ValueError, match=r"compile=True needs the key-value cache: leave out compile, this model cannot"
    ):
        shifted.beam_search(img, prompts, 2, compile=True)


class Logits(nn.Module):
    """The part of a model that is exported for decoding elsewhere."""

    def __init__(self, model: PalmE) -> None:
        super().__init__()
        self.model = model

    def forward(self, img: Tensor, text: Tensor) -> Any:
        return self.model.decoder.net(text, context=self.model.encode(img))


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [Logits, lambda model: model])
def test_export_with_dynamic_batch_and_length(wrap: Any) -> None:
    model = small().eval()
    module, b, n = wrap(model), Dim("b", min=2, max=64), Dim("n", min=3, max=4096)
    before = {name: value.clone() for name, value in model.named_buffers()}
    exported = torch.export.export(module, batch(model, b=3, n=7), dynamic_shapes=({0: b}, {0: b, 1: n}))
    for sizes in (2, 3), (5, 4), (4, 30):
        inputs = batch(model, *sizes)
        torch.testing.assert_close(exported.module()(*inputs), module(*inputs), rtol=1e-5, atol=1e-5)
    assert {name: type(value) for name, value in model.named_buffers()} == dict.fromkeys(before, Tensor)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx_with_dynamic_batch_and_length(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = small().eval()
    module = Logits(model)
    shapes = ({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC})
    program = torch.onnx.export(
        module, batch(model, b=3, n=7), dynamo=True, dynamic_shapes=shapes, verbose=False, input_names=["img", "text"]
    )
    assert program is not None
    program.save(tmp_path / "palme.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "palme.onnx")
    for sizes in (1, 2), (2, 3), (5, 4), (4, 30):
        img, text = batch(model, *sizes)
        (found,) = session.run(None, {"img": img.numpy(), "text": text.numpy()})
        expected = module(img, text)
        assert (torch.from_numpy(found) - expected).abs().max() <= 1e-5 * expected.abs().max()
