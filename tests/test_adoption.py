"""`PalmE.from_modules` adopts modules that were wired by hand as they are, and proves the config that it reads."""

from __future__ import annotations

import copy
import pickle
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from benchmarks.hand_wired import HandWired
from palme_xt import PalmE, PalmEConfig, hub
from palme_xt.config import UnprovenConfig
from palme_xt.parity import exactly
from palme_xt.source import to_source
from palme_xt.storage.folder import load, save
from palme_xt.strategies import QUIET, configs
from tests.models import SMALL, batch, logits, small
from tests.overrides import overrides


@pytest.fixture(scope="module", autouse=True)
def _exactly() -> Iterator[None]:
    """Compare with modules of x-transformers itself bit for bit."""
    with exactly():
        yield


def wired(seed: int = 0, **arguments: Any) -> HandWired:
    torch.manual_seed(seed)
    return HandWired(small(**arguments).config)


def adopt(modules: Any, **arguments: Any) -> PalmE:
    """Adopt modules, without a warning if the config is unproven."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="model.config does not describe")
        return PalmE.from_modules(modules.encoder, modules.decoder, **arguments)


def numbers(model: Any, img: Tensor, text: Tensor) -> list[Tensor]:
    """Return loss, logits and all gradients, in eval and training mode."""
    found: list[Any] = []
    model.requires_grad_()
    for training in False, True:
        random.seed(0)
        torch.manual_seed(0)
        loss, (values, _) = model.train(training)(img, text, return_outputs=True)
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        found.extend([loss, values, *(gradient for gradient in gradients if gradient is not None)])
    return found


def scatter(model: nn.Module) -> None:
    """Add random numbers to all weights, because initial zeros would hide something."""
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape) * (0.3 if weight.ndim < 2 else weight.shape[-1] ** -0.5))


def equal(model: nn.Module, other: nn.Module, img: Tensor, text: Tensor) -> bool:
    """Return whether both compute the same with the same random weights, which the first one keeps."""
    scatter(model)
    other.load_state_dict(model.state_dict())
    return same(numbers(model, img, text), numbers(other, img, text))


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(here, there) for here, there in zip(ours, theirs, strict=True))


def refuses(model: PalmE, message: str, folder: Path) -> None:
    """Assert that whatever relies on the config raises an error with this message, and nothing is written."""
    saving: list[Callable[[], object]] = [
        lambda: save(model, folder),
        lambda: PalmE.from_config(model.config),
        lambda: type(model).from_config(model.config),
        lambda: to_source(model.config),
        lambda: to_source(replace(model.config, qk_norm=False)),
        lambda: model.config.to_dict(),
        lambda: model.config.keywords("vit"),
    ]
    if isinstance(model, hub.PalmE):
        saving += [lambda: model.save_pretrained(folder), lambda: model.push_to_hub("user/name")]
    way_out = (
        r"\. State what cannot be read from them: PalmE\.from_modules\(encoder, decoder, decoder_kwargs={\.\.\.}\)"
    )
    for relying in saving:
        with pytest.raises(ValueError, match=f"^model.config does not describe the modules .*: {message}{way_out}"):
            relying()
    assert not folder.exists()


@settings(max_examples=20)
@given(configs())
def test_the_17_arguments_are_read_off_the_modules(config: PalmEConfig) -> None:
    hand_wired = HandWired(config)
    model = adopt(hand_wired)
    assert model.encoder is hand_wired.encoder
    assert model.decoder is hand_wired.decoder
    dropped = config.rotary_xpos and "disable_abs_pos_emb" not in config.decoder_kwargs
    expected = replace(
        config,
        alibi_num_heads=config.alibi_num_heads if config.alibi_pos_bias else min(4, config.decoder_heads),
        use_abs_pos_emb=config.use_abs_pos_emb and not dropped,
    )
    for name in PalmEConfig.__dataclass_fields__:
        if not name.endswith("_kwargs") and name != "_":
            assert getattr(model.config, name) == getattr(expected, name), name
    img, text = batch(model)
    assert torch.equal(model(img, text), hand_wired(img, text))


@settings(max_examples=10)
@given(configs())
def test_a_config_is_proven_if_what_cannot_be_read_is_stated(config: PalmEConfig) -> None:
    stated = {name: getattr(config, name) for name in ("vit_kwargs", "encoder_kwargs", "transformer_kwargs")}
    stated |= {name: getattr(config, name) for name in ("decoder_kwargs", "autoregressive_kwargs")}
    hand_wired = HandWired(config)
    model = PalmE.from_modules(hand_wired.encoder, hand_wired.decoder, **stated)
    assert type(model.config) is PalmEConfig
    assert equal(hand_wired, PalmE.from_config(model.config), *batch(model))


SHOWN: list[dict[str, Any]] = [
    {},
    {"vit_kwargs": {"channels": 1, "num_register_tokens": 3}},
    {"encoder_kwargs": {"attn_flash": True, "attn_qk_norm": True, "attn_kv_heads": 1}},
    {"decoder_kwargs": {"attn_kv_heads": 2, "attn_qk_norm_scale": 5, "attn_dropout": 0.1, "cross_attn_dropout": 0.2}},
    {"transformer_kwargs": {"tie_embedding": True, "emb_frac_gradient": 0.5, "num_memory_tokens": 2}},
    {"rotary_xpos": False, "decoder_kwargs": {"rotary_pos_emb": True}},
    {"decoder_kwargs": {"cross_attn_qk_norm": False}},
    {"autoregressive_kwargs": {"pad_value": 5, "ignore_index": -1, "mask_prob": 0.1}},
    {"use_abs_pos_emb": True, "decoder_kwargs": {"disable_abs_pos_emb": False}},
]


@pytest.mark.parametrize("arguments", SHOWN, ids=str)
def test_overrides_that_show_are_read(arguments: dict[str, Any]) -> None:
    source = small(**arguments).config
    hand_wired = HandWired(source)
    model = PalmE.from_modules(hand_wired.encoder, hand_wired.decoder)
    quiet = {name: getattr(model.config, name) | QUIET for name in ("encoder_kwargs", "decoder_kwargs")}
    assert replace(model.config, **quiet) == source


class Detached(nn.GELU):
    """An activation whose outputs are upstream's, and whose gradients are not."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


# An override, and the first difference that shows it: in a parameter, a buffer, an attribute, or only in the numbers.
DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "parameter": (
        {"decoder_kwargs": {"ff_glu": True}},
        r"decoder\.net\.attn_layers\.layers\.2\.1\.ff\.0\.proj\.weight is \(256, 32\) in the modules, but missing in a "
        "model built from it",
    ),
    "buffer": (
        {"decoder_kwargs": {"rotary_base_rescale_factor": 2.0}},
        r"decoder\.net\.attn_layers\.rotary_pos_emb\.inv_freq has other values in the modules than in a model built "
        "from it",
    ),
    "attribute": (
        {"decoder_kwargs": {"ff_dropout": 0.1}},
        r"decoder\.net\.attn_layers\.layers\.2\.1\.ff\.1\.p is 0\.1 in the modules, but 0\.0 in a model built from it",
    ),
    "embeddings": (
        {"encoder_kwargs": {"ff_relu_squared": True}},
        "embeddings in eval mode differ between the modules and a model built from it",
    ),
    "logits": (
        {"decoder_kwargs": {"ff_swish": True}},
        "logits in eval mode differ between the modules and a model built from it",
    ),
    "training": (
        {"decoder_kwargs": {"ff_sublayer_dropout": 0.1}},
        "logits in training mode differ between the modules and a model built from it",
    ),
    "gradients": (
        {"decoder_kwargs": {"ff_custom_activation": Detached()}},
        "gradients in eval mode differ between the modules and a model built from it",
    ),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_what_relies_on_a_config_that_does_not_describe_the_modules_refuses(case: str, tmp_path: Path) -> None:
    arguments, message = DIFFERENT[case]
    hand_wired = wired(**arguments)
    with pytest.warns(UserWarning, match=f"model.config does not describe the modules .*: {message}. State what"):
        model = hub.PalmE.from_modules(hand_wired.encoder, hand_wired.decoder)
    refuses(model, message, tmp_path / "model")
    img, text = batch(model)
    assert torch.equal(logits(model.eval(), img, text), logits(hand_wired.eval(), img, text))
    assert model.generate(img, text, 3).shape == (2, 3)
    for copied in copy.deepcopy(model), pickle.loads(pickle.dumps(model.config)):
        assert getattr(copied, "config", copied) == model.config

    stated = {name: value for name, value in arguments.items() if name.endswith("_kwargs")}
    model = hub.PalmE.from_modules(hand_wired.encoder, hand_wired.decoder, **stated)
    assert equal(hand_wired, hub.PalmE.from_config(model.config), img, text)
    if case != "gradients":  # a module has no JSON form
        model.save_pretrained(tmp_path / "model")
        assert torch.equal(logits(load(tmp_path / "model"), img, text), logits(hand_wired.eval(), img, text))


BASES: list[dict[str, Any]] = [
    {"attn_flash": False},
    {"attn_flash": False, "alibi_pos_bias": False, "rotary_xpos": False, "use_abs_pos_emb": True},
    {"attn_flash": True},
]


def wired_with(part: str, added: dict[str, Any]) -> tuple[HandWired, tuple[Tensor, Tensor], list[Tensor]] | None:
    """Return a model with these overrides of a part that can run, inputs and its `numbers`, if there is one."""
    for base in BASES:
        arguments = {**SMALL, **base, f"{part}_kwargs": SMALL.get(f"{part}_kwargs", {}) | added}
        try:
            torch.manual_seed(0)
            hand_wired = HandWired(PalmEConfig(**arguments))
            scatter(hand_wired)
            inputs = torch.randn(2, added.get("channels", 3), 8, 8), torch.randint(32, (2, 12))
            return hand_wired, inputs, numbers(hand_wired, *inputs)
        except Exception:  # upstream's errors are of any type
            continue
    return None


def outcome(part: str, keyword: str, value: Any, needs: dict[str, Any], folder: Path) -> str | None:
    """Adopt a model with one override, and return whether it was read, refused, or made no difference."""
    found = wired_with(part, needs | {keyword: value})
    if found is None:
        return None
    hand_wired, inputs, expected = found
    kwargs = f"{part}_kwargs"
    stated = adopt(hand_wired, **{kwargs: needs | {keyword: value}})
    assert not isinstance(stated.config, UnprovenConfig), stated.config.difference
    rebuilt = PalmE.from_config(stated.config)
    rebuilt.load_state_dict(hand_wired.state_dict())
    assert same(numbers(rebuilt, *inputs), expected)
    if not callable(value):
        save(stated, folder / keyword)
        assert same(numbers(load(folder / keyword), *inputs), expected)
    try:
        model = adopt(hand_wired, **{kwargs: needs})
    except ValueError as error:
        if "rejects" not in str(error):  # what it needs has no meaning alone
            raise
        return "refused"
    if isinstance(model.config, UnprovenConfig):
        refuses(model, re.escape(model.config.difference), folder / "refused")
        return "refused"
    if model.config != stated.config:  # that one has been rebuilt
        rebuilt = PalmE.from_config(model.config)
        rebuilt.load_state_dict(hand_wired.state_dict())
        assert same(numbers(rebuilt, *inputs), expected)
    return "read" if keyword in getattr(model.config, kwargs) else "equal"


OVERRIDES = {f"{part}-{keyword}": (part, keyword, value, needs) for part, keyword, value, needs in overrides()}


@pytest.mark.parametrize("case", list(OVERRIDES)[::40])
def test_an_override_is_read_or_refused_or_makes_no_difference(case: str, tmp_path: Path) -> None:
    outcome(*OVERRIDES[case], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("quarter", range(4))
def test_every_override_is_read_or_refused_or_makes_no_difference(quarter: int, tmp_path: Path) -> None:
    counts = Counter(outcome(*OVERRIDES[case], tmp_path / case) for case in list(OVERRIDES)[quarter::4])
    assert sum(counts[found] for found in ("read", "refused", "equal")) > 95, counts
    assert counts["read"] > 20, counts
    assert counts["refused"] > 30, counts


def test_an_adopted_model_also_decodes_where_upstreams_cache_crashes() -> None:
    source = small()
    hand_wired = HandWired(source.config)
    hand_wired.load_state_dict(source.state_dict())
    model = PalmE.from_modules(hand_wired.encoder, hand_wired.decoder)
    img, text = batch(model, n=3)
    expected = source.generate(img, text, 6, temperature=0.0)
    assert torch.equal(model.generate(img, text, 6, temperature=0.0), expected)


def test_modules_that_do_not_fit_are_rejected() -> None:
    model = small()
    with pytest.raises(TypeError, match=r"decoder is a TransformerWrapper, must be an x_transformers\.Autoreg"):
        PalmE.from_modules(model.encoder, model.decoder.net)
    message = "decoder takes a context of width 40, must be 24, the width of the encoder"
    with pytest.raises(ValueError, match=re.escape(message)):
        PalmE.from_modules(model.encoder, small(encoder_dim=40).decoder)


def state(module: nn.Module) -> list[Any]:
    """Return everything that a comparison could leave behind in a module."""
    return [
        (
            name,
            part.training,
            {key: id(value) for key, value in (vars(part) | part._buffers | part._parameters).items()},
        )
        for name, part in module.named_modules()
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_modules_and_the_random_numbers_are_left_as_they_were(dtype: torch.dtype) -> None:
    # Without rotary positions, upstream's ALiBi bias replaces one of its buffers in forward.
    hand_wired = wired(rotary_xpos=False, decoder_kwargs={"attn_dropout": 0.5, "layer_dropout": 0.5}).to(dtype)
    hand_wired.decoder.eval()
    before, weights = state(hand_wired), copy.deepcopy(hand_wired.state_dict())
    drawn = torch.get_rng_state(), random.getstate()
    adopt(hand_wired)
    PalmE.from_modules(hand_wired.encoder, hand_wired.decoder, decoder_kwargs={"layer_dropout": 0.5})
    assert state(hand_wired) == before
    assert all(torch.equal(weights[name], tensor) for name, tensor in hand_wired.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1]


def test_parameters_on_the_meta_device_are_proven_and_buffers_are_not() -> None:
    with torch.device("meta"):
        empty = HandWired(PalmEConfig(**SMALL))
    message = "cannot be compared with a model built from it .*Cannot copy out of meta tensor"
    with pytest.warns(UserWarning, match=message):
        model = PalmE.from_modules(empty.encoder, empty.decoder)
    assert isinstance(model.config, UnprovenConfig)
    hand_wired = wired()
    for module in hand_wired.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.to("meta")))
    assert adopt(hand_wired).config == adopt(wired()).config


def test_weights_that_a_user_tied_are_not_described() -> None:
    hand_wired = wired()
    hand_wired.decoder.net.to_logits.weight = hand_wired.decoder.net.token_emb.emb.weight
    model = adopt(hand_wired)
    assert isinstance(model.config, UnprovenConfig)
    assert "which are tied" in model.config.difference


def test_zeros_at_the_start_hide_nothing() -> None:
    hand_wired = wired(decoder_kwargs={"ff_swish": True, "ff_zero_init_output": True})
    last = [weight for name, weight in hand_wired.decoder.named_parameters() if name.endswith("ff.2.weight")]
    assert not torch.stack(last).any()
    model = adopt(hand_wired, decoder_kwargs={"ff_zero_init_output": True})
    assert isinstance(model.config, UnprovenConfig)
    assert model.config.difference.startswith("logits in eval mode differ")


def test_blocks_with_the_same_weights_count_each_time() -> None:
    overrides: dict[str, Any] = {f"{part}_kwargs": {"weight_tie_layers": True} for part in ("encoder", "decoder")}
    hand_wired = wired(**overrides)
    model = PalmE.from_modules(hand_wired.encoder, hand_wired.decoder, **overrides)
    assert (model.config.encoder_depth, model.config.decoder_depth) == (2, 2)


def test_a_stated_override_that_the_modules_do_not_have_is_noticed() -> None:
    model = adopt(wired(), decoder_kwargs={"ff_dropout": 0.5}, rotary_xpos=False)
    assert isinstance(model.config, UnprovenConfig)
    with pytest.raises(ValueError, match=r"decoder_kwargs\['ff_glue'\]=True is not a keyword"):
        adopt(wired(), decoder_kwargs={"ff_glue": True})


def test_cached_decoding_needs_a_proven_config() -> None:
    source = small(decoder_kwargs={"shift_tokens": 1})
    model = adopt(source)
    assert isinstance(model.config, UnprovenConfig)
    img, text = batch(model, n=3)
    assert torch.equal(model.generate(img, text, 6, temperature=0.0), source.generate(img, text, 6, temperature=0.0))


class Scoring(PalmE):
    def __init__(self, *args: Any, classes: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.head = nn.Linear(self.config.decoder_dim, classes)
        self.encoder.requires_grad_(False)
        self.teacher = PalmE(**SMALL)


def test_the_constructor_of_a_subclass_runs() -> None:
    hand_wired = wired()
    model = Scoring.from_modules(hand_wired.encoder, hand_wired.decoder, classes=3)
    assert type(model) is Scoring
    assert model.head.weight.shape == (3, 32)
    assert not model.head.weight.is_meta
    assert model.encoder is hand_wired.encoder
    assert model.teacher.encoder is not hand_wired.encoder
    assert not any(weight.requires_grad for weight in hand_wired.encoder.parameters())
    assert "_adopted" not in vars(model)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'classes'"):
        Scoring.from_modules(hand_wired.encoder, hand_wired.decoder)
    with pytest.raises(TypeError, match="unexpected keyword argument 'colours'"):
        PalmE.from_modules(hand_wired.encoder, hand_wired.decoder, colours=3)


def test_an_adopted_encoder_that_is_not_used_stays_trainable() -> None:
    hand_wired = wired(cross_attend=False)
    PalmE.from_modules(hand_wired.encoder, hand_wired.decoder)
    assert all(weight.requires_grad for weight in hand_wired.encoder.parameters())


@pytest.mark.parametrize("modules", [True, False])
@pytest.mark.parametrize("size", [40, 20])
def test_a_vocabulary_that_was_resized_in_place(size: int, modules: bool, tmp_path: Path) -> None:
    hand_wired = wired()
    net = hand_wired.decoder.net
    if modules:
        net.token_emb.emb, net.to_logits = nn.Embedding(size, 32), nn.Linear(32, size, bias=False)
    else:
        net.token_emb.emb.weight, net.to_logits.weight = (nn.Parameter(torch.randn(size, 32)) for _ in range(2))
    model = PalmE.from_modules(hand_wired.encoder, hand_wired.decoder)
    assert model.config == replace(adopt(wired()).config, num_tokens=size)
    save(model, tmp_path)
    img, text = batch(model)
    assert torch.equal(logits(load(tmp_path), img, text), logits(model.eval(), img, text))


# Prefixes of names and what stands for them in a checkpoint, and the beginning of a line that loads it.
RENAMED: dict[str, tuple[dict[str, str], str]] = {
    "DDP": (
        {"": "module."},
        "model.load_state_dict({name: state_dict['module.' + name] for name in model.state_dict()})",
    ),
    "compiled DDP": (
        {"": "_orig_mod.module."},
        "model.load_state_dict({name: state_dict['_orig_mod.module.' + name] for name in",
    ),
    "Lightning": ({"": "model."}, "model.load_state_dict({name: state_dict['model.' + name] for name in"),
    "compiled decoder": (
        {"decoder.": "decoder._orig_mod."},
        "model.decoder.net.load_state_dict({name: state_dict['decoder._orig_mod.net.' + name] for name in",
    ),
    "no wrapper": (
        {"decoder.net.": "decoder."},
        "model.decoder.net.load_state_dict({name: state_dict['decoder.' + name] for name in model.decoder.net.state_d",
    ),
    "other names": (
        {"encoder.": "vit.", "decoder.net.": "lm."},
        "model.encoder.load_state_dict({name: state_dict['vit.' + name] for name in model.encoder.state_dict()})",
    ),
    "no name of the encoder": (
        {"encoder.": ""},
        "model.encoder.load_state_dict({name: state_dict['' + name] for name in model.encoder.state_dict()})",
    ),
    "no names": (
        {"encoder.": "", "decoder.": ""},
        "model.decoder.net.load_state_dict({name: state_dict['net.' + name] for name in",
    ),
}


def rename(weights: dict[str, Tensor], prefixes: dict[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in weights.items():
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        renamed[name if old is None else prefixes[old] + name.removeprefix(old)] = tensor
    return renamed


def check_renaming(state_dict: dict[str, Tensor], expected: str) -> PalmE:
    """Load with the lines of Python in the error, and return the model."""
    model = small()
    with pytest.raises(RuntimeError, match=r"Error.s. in loading state_dict for PalmE") as error:
        model.load_state_dict(state_dict)
    before, lines = str(error.value).split("\nThe weights fit under other names. Load them with:\n")
    assert "Missing key(s)" in before
    assert expected in lines
    loaded = small()
    exec(lines, {"model": loaded, "state_dict": state_dict})
    return loaded


@pytest.mark.parametrize("case", RENAMED)
def test_an_error_about_names_says_how_to_load_the_weights(case: str) -> None:
    prefixes, expected = RENAMED[case]
    weights = small(seed=1).state_dict()
    loaded = check_renaming(rename(weights, prefixes), expected).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    assert not any(torch.equal(tensor, weights[name]) for name, tensor in small().named_parameters())


def test_an_error_about_the_names_of_a_part_says_how_to_load_it() -> None:
    source = small(seed=1)
    loaded = check_renaming(source.encoder.state_dict(), "model.encoder.load_state_dict({name: state_dict['' + name]")
    assert all(
        torch.equal(loaded.encoder.state_dict()[name], tensor) for name, tensor in source.encoder.named_parameters()
    )
    for part, prefix in (source.decoder, "net."), (source.decoder.net, ""):
        expected = f"model.decoder.net.load_state_dict({{name: state_dict[{prefix!r} + name]"
        found = check_renaming(part.state_dict(), expected).decoder.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in source.decoder.named_parameters())


def test_weights_of_another_model_are_rejected_as_by_torch() -> None:
    model = small()
    wrong: list[dict[str, Any]] = [
        rename(small(decoder_dim=40).state_dict(), {"": "module."}),
        small(decoder_kwargs={"ff_glu": True}).state_dict(),
        {f"module.{name}": tensor for name, tensor in model.state_dict().items()} | {"module.head": torch.zeros(1)},
        {"step": 3},
        {},
    ]
    for state_dict in wrong:
        with pytest.raises(RuntimeError) as error:
            model.load_state_dict(state_dict)
        assert "other names" not in str(error.value)
    prefixed = rename(model.state_dict(), {"": "module."})
    keys = model.load_state_dict(prefixed, strict=False)
    assert len(keys.missing_keys) == len(keys.unexpected_keys) == len(prefixed)
    assert str(model.load_state_dict(small(seed=1).state_dict(), assign=True)) == "<All keys matched successfully>"
