"""ALiBi as part of the keys: the numbers of upstream's bias within rounding, in memory linear in the length."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from x_transformers.attend import Attend as UpstreamAttend

from benchmarks.hand_wired import HandWired
from palme_xt import PalmE
from palme_xt.parity import exactly
from palme_xt.upstream import attend
from palme_xt.upstream.alibi import AlibiPositionalBias
from tests.devices import each_device
from tests.models import batch, logits, small
from tests.upstream.storages import Storages

DTYPES = torch.float32, torch.bfloat16, torch.float16


def errors(
    n: int, dtype: torch.dtype, *, qk_norm: bool = False, device: str = "cpu", every: int = 1
) -> tuple[float, float]:
    """Return the relative errors of attention against float64, with the bias in the keys and with upstream's bias.

    Attention is computed for each `every`-th of 16 heads.
    """
    torch.manual_seed(0)
    h, d = len(range(0, 16, every)), 16  # the slopes of 16 heads are 0.004 to 0.7, half of them not powers of two
    rows = torch.arange(n - 1, -1, -(n // 128), device=device)
    q, k, v = (torch.randn(1, h, n, d).to(device) for _ in range(3))
    q, k = (normalize(t, dim=-1) for t in (q, k)) if qk_norm else (2 * q, 2 * k)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    alibi = AlibiPositionalBias(16, 16).to(device, dtype)
    row, slopes = alibi.row(n)[::every], alibi.slopes[::every]
    layer = attend.Attend(UpstreamAttend(causal=True, flash=True, heads=h, scale=10.0 if qk_norm else None))
    layer.bias_in_keys = True
    keys, _ = layer(q, k, v, attn_bias=row, causal=True)
    distance = rows[:, None] - torch.arange(n, device=device)
    bias = (-distance * slopes).masked_fill(distance < 0, -(2.0**14))
    upstreams, _ = layer(q[:, :, rows], k, v, attn_bias=bias.to(dtype), causal=False)
    exact, _ = layer(q[:, :, rows].double(), k.double(), v.double(), attn_bias=bias.double(), causal=False)
    ours, theirs = ((found - exact).norm() / exact.norm() for found in (keys[:, :, rows], upstreams))
    return ours.item(), theirs.item()


@each_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qk_norm", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_error_against_float64_is_that_of_upstreams_bias(
    dtype: torch.dtype, qk_norm: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = errors(1024, dtype, qk_norm=qk_norm, device=device)
    assert 0 < ours <= 1.2 * theirs
    assert theirs < 4 * torch.finfo(dtype).eps
    monkeypatch.setattr(attend, "EXTRA", 2)  # one part of the bias instead of four
    ours, theirs = errors(1024, dtype, device=device)
    assert ours > 5 * theirs or dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("n", [4096, 32768])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_against_float64_does_not_grow_with_the_length(dtype: torch.dtype, n: int) -> None:
    ours, theirs = errors(n, dtype, every=5)  # slopes of 0.7 to 0.004, two of the four not powers of two
    assert ours <= 1.2 * theirs


def gradients(model: PalmE, img: Tensor, text: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(img, text, return_outputs=True)[0].backward()
    return {name: parameter.grad.double() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_gradients_have_no_larger_error_against_float64_than_upstreams() -> None:
    model = small(max_seq_len=256)
    img, text = batch(model, n=256)
    found = gradients(model, img, text)
    with exactly():
        upstreams = gradients(model, img, text)
        exact = gradients(copy.deepcopy(model).double(), img.double(), text)
    precise = gradients(copy.deepcopy(model).double(), img.double(), text)
    ours, theirs, double = (
        torch.stack([(each[name] - exact[name]).norm() / exact[name].norm() for name in exact])
        for each in (found, upstreams, precise)
    )
    assert 0 < ours.median() <= 1.5 * theirs.median()
    assert 0 < ours.max() <= 2 * theirs.max()
    assert double.max() < 1e-10


ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"qk_norm": False},
    {"rotary_xpos": False, "alibi_num_heads": 4},
    {"decoder_kwargs": {"attn_kv_heads": 2}},
    {"decoder_kwargs": {"attn_one_kv_head": True}},
    {"decoder_kwargs": {"attn_value_dim_head": 12}},
    {"decoder_kwargs": {"attn_dim_head": 12}},
    {"decoder_kwargs": {"attn_attend_sdp_kwargs": {"enable_flash": False, "enable_math": True}}},
    {"decoder_kwargs": {"rel_pos_kwargs": {"slopes": [3.0, 0.3]}}},
]


@pytest.mark.filterwarnings("ignore:decoder_kwargs")
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@torch.no_grad()
def test_logits_are_upstreams_within_rounding(arguments: dict[str, Any]) -> None:
    model = small(**arguments).eval()
    theirs = HandWired(model.config).eval()
    theirs.load_state_dict(model.state_dict())
    img, text = batch(model, n=14)
    expected = logits(theirs, img, text)
    for contestant in model, copy.deepcopy(model):
        torch.testing.assert_close(logits(contestant, img, text), expected, rtol=1e-4, atol=2e-5)
    assert not torch.equal(logits(model, img, text), expected)  # otherwise, it would be upstream's path
    with exactly():
        assert torch.equal(logits(model, img, text), expected)


@torch.no_grad()
def test_a_pickled_model_has_its_bias_and_other_slopes_give_other_logits() -> None:
    model = small()
    img, text = batch(model)
    expected = logits(model, img, text)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), img, text), expected)
    model.decoder.net.attn_layers.alibi.slopes.mul_(1.1)
    assert (logits(model, img, text) - expected).abs().max() > 1e-3


def test_no_tensor_is_as_large_as_a_bias() -> None:
    model = small()
    h, n = 4, 256
    img, text = batch(model, b=1, n=n)
    sizes = []
    for kwargs in {}, {"mask": torch.ones(1, n, dtype=torch.bool)}:
        with Storages() as storages:
            logits(model, img, text, **kwargs)
        sizes.append(max(storages.sizes()))
    assert sizes[0] < h * n * n <= sizes[1]


@pytest.mark.parametrize(
    "arguments",
    [
        {"attn_add_zero_kv": True},
        {"attn_num_mem_kv": 2},
        {"attn_max_attend_past": 3},
        {"attn_l2_distance": True},
        {"attn_num_mem_kv": (2, 0)},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:decoder_kwargs")
@torch.no_grad()
def test_what_needs_upstreams_path_takes_it(arguments: dict[str, Any]) -> None:
    model = small(decoder_kwargs=arguments)
    img, text = batch(model)
    with exactly():
        expected = logits(model, img, text)
    assert torch.equal(logits(model, img, text), expected)


@torch.no_grad()
def test_a_bias_of_the_users_is_no_part_of_the_keys() -> None:
    model = small(alibi_pos_bias=False)
    img, text = batch(model)
    row = torch.zeros(4, 1, 10).index_fill(2, torch.tensor([3]), -torch.inf)
    whole = logits(model, img, text, attn_bias=row.expand(-1, 10, -1))
    assert torch.equal(logits(model, img, text, attn_bias=row), whole)
    assert torch.isfinite(whole).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_autocast_keeps_the_precision_of_positions(dtype: torch.dtype) -> None:
    model = small(max_seq_len=1024)
    img, text = batch(model, b=1, n=1024)
    exact = logits(copy.deepcopy(model).double(), img.double(), text)
    found = []
    for switch in False, True:
        model.decoder.net.attn_layers.exact = switch
        with torch.autocast("cpu", dtype=dtype):
            found.append(((logits(model, img, text) - exact).norm() / exact.norm()).item())
    assert 0 < found[0] <= 1.5 * found[1]
    assert found[0] < 8 * torch.finfo(dtype).eps


def test_the_switch_is_for_one_module_or_all_and_off_again_after_an_error() -> None:
    first, second = small(), small()
    first.decoder.exact = True
    assert [first.decoder.exact, second.decoder.exact, first.decoder.net.attn_layers.exact] == [True, False, False]
    with exactly():
        assert second.decoder.exact
        with pytest.raises(ZeroDivisionError), exactly():
            1 / 0  # noqa: B018
        assert second.decoder.net.attn_layers.exact
    assert not second.decoder.exact


@torch.no_grad()
def test_dropout_is_applied_in_training_mode() -> None:
    model = small(decoder_kwargs={"attn_dropout": 0.5})
    img, text = batch(model)
    trained = [logits(model.train(), img, text) for _ in range(2)]
    evaluated = [logits(model.eval(), img, text) for _ in range(2)]
    same = [torch.equal(one, other) for one, other in itertools.combinations(trained + evaluated, 2)]
    assert same == [False] * 5 + [True]


def test_exactly_ends_with_the_last_of_callers_that_overlap() -> None:
    first, second = exactly(), exactly()
    model = small()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert model.decoder.net.attn_layers.exact
    second.__exit__(None, None, None)
    assert not model.decoder.net.attn_layers.exact
