"""Any module is an encoder: what it returns becomes the context, and everything else works as with the ViT."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper, ViTransformerWrapper
from x_transformers import Encoder as UpstreamEncoder

from palme_xt import PalmE, PalmEConfig, hub
from palme_xt.captioner.attention import cross_attention_maps
from palme_xt.parity import compare
from palme_xt.source import to_source
from palme_xt.storage.card import model_card
from palme_xt.storage.folder import CONFIG, FolderError, load, save
from tests.models import SMALL, logits

D = SMALL["encoder_dim"]
HERE = "tests.test_any_encoder"
TEXT = torch.randint(32, (2, 10), generator=torch.Generator().manual_seed(0))
PROMPT = TEXT[:, :2]


class Cnn(nn.Module):
    """One channel to a map `(b, d, h / 4, w / 4)`; `output` says what is made of it."""

    def __init__(self, output: Callable[[Tensor], Any] = lambda found: found) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 8, 4, 2, 1), nn.GELU(), nn.Conv2d(8, D, 4, 2, 1))
        self.output = output

    def forward(self, img: Tensor) -> Any:
        return self.output(self.layers(img))


class Object(Cnn):
    """Returns an object that is no mapping."""

    def forward(self, img: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=super().forward(img).flatten(2).mT)


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "b d h w": lambda found: found,
    "b h w d": lambda found: found.movedim(1, 3),
    "b p d": lambda found: found.flatten(2).mT,
    "tuple": lambda found: (found.flatten(2).mT, found.mean()),
    "list": lambda found: [found],
    "dict": lambda found: {"pooler_output": found.mean((2, 3)), "last_hidden_state": found},
}


def of(encoder: Any, seed: int = 0, **arguments: Any) -> PalmE:
    """Return a small model with this encoder and large weights in the decoder."""
    torch.manual_seed(seed)
    model = PalmE(**SMALL | arguments, encoder=encoder)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.normal_(std=0.3)
    return model


def images(h: int = 8, w: int = 20, *before: int, channels: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*(before or (2,)), channels, h, w, generator=generator)


def works_like_its_embeddings(model: PalmE, img: Tensor, embeddings: Tensor, folder: Path, new: nn.Module) -> None:
    """Check a model against one without an encoder that is given the embeddings, and its saved folder."""
    blind = of(None, encoder_dim=model.config.encoder_dim)
    blind.decoder.load_state_dict(model.decoder.state_dict())
    model.eval()
    assert torch.equal(model.encode(img), embeddings)
    assert torch.equal(model(img, TEXT), blind(None, TEXT, context=embeddings))
    assert not torch.equal(model(img.flip(-1) * 2, TEXT), blind(None, TEXT, context=embeddings))
    model(img, TEXT).backward()
    assert all(weight.grad is not None for weight in model.decoder.parameters())
    assert any(weight.grad is not None for weight in model.encoder.parameters())
    greedy = model.generate(img, PROMPT, 4, temperature=0.0)
    assert torch.equal(greedy, blind.generate(None, PROMPT, 4, context=embeddings, temperature=0.0))
    assert torch.equal(model.score(img, PROMPT, greedy), blind.score(None, PROMPT, greedy, context=embeddings))

    kind = f"{type(new).__module__}.{type(new).__qualname__}"
    assert model.config.external_encoder == kind
    save(model, folder)
    assert json.loads((folder / CONFIG).read_text())["external_encoder"] == kind
    with pytest.raises(FolderError, match=re.escape(f"must be what external_encoder='{kind}' says: pass encoder=modu")):
        load(folder)
    again = load(folder, encoder=new)
    assert again.encoder is new
    assert torch.equal(again(img, TEXT), model(img, TEXT))


FIRST, *REST = OUTPUTS


@pytest.mark.parametrize("output", [FIRST, *(pytest.param(each, marks=pytest.mark.slow) for each in REST)])
def test_a_cnn(output: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder, img = Cnn(OUTPUTS[output]), images()
    expected = encoder.layers(img).flatten(2).mT
    assert expected.shape == (2, 10, D)
    works_like_its_embeddings(of(encoder), img, expected, tmp_path, Cnn(OUTPUTS[output]))


def test_an_object_with_last_hidden_state(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder, img = Object(), images()
    works_like_its_embeddings(of(encoder), img, encoder.layers(img).flatten(2).mT, tmp_path, Object())


def test_an_upstream_vit_that_the_arguments_do_not_describe(tmp_path: Path) -> None:
    def vit() -> ViTransformerWrapper:
        layers = UpstreamEncoder(dim=D, depth=2, heads=2, attn_dim_head=8, verbose=False)
        return ViTransformerWrapper(image_size=16, patch_size=4, channels=1, attn_layers=layers)

    torch.manual_seed(0)
    encoder, img = vit(), images(16, 16)
    works_like_its_embeddings(of(encoder), img, encoder(img, return_embeddings=True), tmp_path, vit())


def test_a_vision_model_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="it is in the dev extra")
    sizes = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1)
    torch.manual_seed(0)
    encoder, img = transformers.ViTModel(config, add_pooling_layer=False).eval(), images(8, 8)
    expected = encoder(img).last_hidden_state
    assert expected.shape == (2, 5, D)
    works_like_its_embeddings(
        of(encoder), img, expected, tmp_path, transformers.ViTModel(config, add_pooling_layer=False)
    )


TIMM: dict[str, tuple[str, int, dict[str, Any], tuple[int, int]]] = {
    "ViT": (
        "vit_tiny_patch16_224",
        24,
        {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8, "dynamic_img_size": True},
        (16, 24),
    ),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        32,
        {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "img_size": (16, 32), "window_size": 2},
        (16, 32),
    ),
    "ResNet": ("resnet10t", 512, {}, (64, 96)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_a_timm_model(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="it is in the test extra")
    model_name, width, arguments, size = TIMM[name]

    def create() -> Any:
        return timm.create_model(model_name, num_classes=0, global_pool="", **arguments).eval()

    torch.manual_seed(0)
    encoder, img = create(), images(*size, channels=3)
    expected = encoder.forward_features(img)
    assert expected.shape[-1 if name == "Swin" else 1 if name == "ResNet" else 2] == width
    if name == "Swin":
        expected = expected.flatten(1, 2)
    if name == "ResNet":
        expected = expected.flatten(2).mT
    works_like_its_embeddings(of(encoder, encoder_dim=width), img, expected, tmp_path, create())
    with pytest.raises(TypeError, match=re.escape("encoder is a method, must be a torch.nn.Module or None")):
        of(encoder.forward_features, encoder_dim=width)


def test_several_images_and_images_of_variable_sizes() -> None:
    torch.manual_seed(0)
    model = of(Cnn()).eval()
    both = images(8, 20, 2, 3)
    context = model.encode(both)
    torch.testing.assert_close(context, torch.cat([model.encode(both[:, m]) for m in range(3)], dim=1))
    narrow, wide = images(8, 12, 1), images(16, 20, 1)
    parts = [model.encode(img)[0] for img in (narrow, wide)]
    padded = nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=9.0)
    mask = torch.arange(padded.shape[1]) < torch.tensor([[len(part)] for part in parts])
    together = logits(model, None, TEXT, context=padded, context_mask=mask)
    for row, img in enumerate((narrow, wide)):
        torch.testing.assert_close(together[row : row + 1], logits(model, img, TEXT[row : row + 1]), rtol=0, atol=1e-4)
    assert not torch.allclose(together[:1], logits(model, wide, TEXT[:1]), rtol=0, atol=1e-2)
    tokens = model.generate(None, PROMPT, 3, context=padded, context_mask=mask, temperature=0.0)
    alone = [model.generate(img, PROMPT[r : r + 1], 3, temperature=0.0) for r, img in enumerate((narrow, wide))]
    assert torch.equal(tokens, torch.cat(alone))


class Subclass(PalmE):
    def encode(self, img: Any) -> Tensor:
        return torch.stack(img).flatten(2).mT.repeat(1, 1, D)  # any `img`, here a list of images `(1, h, w)`


@pytest.mark.parametrize("encoder", ["config", None])
def test_a_subclass_that_overrides_encode_only(encoder: Any) -> None:
    torch.manual_seed(0)
    model, plain = Subclass(**SMALL, encoder=encoder), of(None)
    plain.decoder.load_state_dict(model.decoder.state_dict())
    img: Any = list(images())
    context = model.encode(img)
    assert torch.equal(model(img, TEXT), plain(None, TEXT, context=context))
    assert not torch.equal(model(img[::-1], TEXT), plain(None, TEXT, context=context))
    greedy = model.generate(img, PROMPT, 3, temperature=0.0)
    assert torch.equal(greedy, plain.generate(None, PROMPT, 3, context=context, temperature=0.0))
    assert torch.equal(torch.stack(list(model.stream(img, PROMPT, 3, temperature=0.0)), dim=1), greedy)
    for ours, theirs in zip(
        model.beam_search(img, PROMPT, 3), plain.beam_search(None, PROMPT, 3, context=context), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert torch.equal(model.score(img, PROMPT, greedy), plain.score(None, PROMPT, greedy, context=context))
    with pytest.raises(ValueError, match=re.escape("text has shape (2, 10) and img (1, 160, 24), must have the same")):
        model(img[:1], TEXT)


class Wrong(PalmE):
    result: Any = None

    def encode(self, img: Any) -> Tensor:
        return self.result  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (None, TypeError, "what encode returned is NoneType, must be a floating-point tensor (b, p, d): correct it"),
        (TEXT, TypeError, "what encode returned is torch.int64, must be a floating-point tensor"),
        (
            torch.ones(2, 4, 7),
            ValueError,
            "what encode returned has shape (2, 4, 7), must be (b, p, encoder_dim=24) and",
        ),
    ],
)
def test_what_encode_returns_is_checked(result: Any, error: type[Exception], message: str) -> None:
    model = Wrong(**SMALL, encoder=None)
    model.result = result
    for method in (lambda: model(0, TEXT), lambda: model.stream(0, PROMPT, 3), lambda: model.score(0, PROMPT, TEXT)):  # type: ignore[call-overload, arg-type]
        with pytest.raises(error, match=re.escape(message)):
            method()


def test_no_encoder() -> None:
    model, context = of(None), torch.randn(2, 5, D)
    assert model.encoder is None
    assert not [name for name in model.state_dict() if name.startswith("encoder")]
    assert PalmE.from_config(model.config).encoder is None
    assert torch.isfinite(model(None, TEXT, context=context))
    assert compare(model, copy.deepcopy(model))
    with pytest.raises(ValueError, match=re.escape("img is given, but the model has no encoder (encoder=None): pass")):
        model(images(), TEXT)
    with pytest.raises(ValueError, match="the model has no encoder"):
        model.stream(images(), PROMPT, 3)
    renamed = {f"module.{name}": value for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=re.escape("model.load_state_dict({name: state_dict['module.' + name]")):
        model.load_state_dict(renamed)
    assert of(None, cross_attend=False)(None, TEXT).isfinite()


BAD_OUTPUTS: list[tuple[Any, str]] = [
    (
        torch.ones(2, D),
        "encoder returned a tensor (2, 24), must return (b, p, d), (b, h, w, d) or (b, d, h, w) with b=2",
    ),
    (
        torch.ones(2, 5, 7),
        "a tensor (2, 5, 7), must return (b, p, d), (b, h, w, d) or (b, d, h, w) with b=2 and d=encode",
    ),
    (torch.ones(1, 5, D), "a tensor (1, 5, 24), must return (b, p, d)"),
    (torch.ones(2, D, 3, D), "a tensor (2, 24, 3, 24), must return (b, p, d)"),
    (torch.ones(2, 7, 3, 5), "and no other axis of width d: set encoder_dim, or wrap the encoder in a module that"),
    (None, "encoder returned a NoneType, must return (b, p, d)"),
    ((), "encoder returned a tuple, must return (b, p, d)"),
    ({"logits": torch.ones(2, 5, D)}, "encoder returned a dict, must return (b, p, d)"),
]


@pytest.mark.parametrize(("output", "message"), BAD_OUTPUTS)
def test_other_outputs_are_refused(output: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        of(Cnn(lambda found: output)).encode(images())


def test_a_context_mask_is_checked_against_what_came_out() -> None:
    model, mask = of(Cnn()), torch.ones(2, 10, dtype=torch.bool)
    torch.testing.assert_close(model(images(), TEXT, context_mask=mask), model(images(), TEXT))
    for call in (
        lambda: model(images(), TEXT, context_mask=mask[:, :4]),
        lambda: model.stream(images(), PROMPT, 3, context_mask=mask[:, :4]),
    ):
        with pytest.raises(ValueError, match=re.escape("context_mask has shape (2, 4), must be (b, p) = (2, 10): one")):
            call()


@pytest.mark.parametrize(
    ("img", "error", "message"),
    [
        (
            images()[0],
            ValueError,
            "img has shape (1, 8, 20), must be (b, c, h, w), or (b, m, c, h, w) for m images each",
        ),
        (images().long(), TypeError, "img has dtype torch.int64, must be floating point"),
        (images()[:0], ValueError, "img has shape (0, 1, 8, 20), must not be empty"),
    ],
)
def test_images_are_refused(img: Tensor, error: type[Exception], message: str) -> None:
    model = of(Cnn())
    for method in (model.encode, lambda img: model(img, TEXT), lambda img: model.stream(img, PROMPT, 3)):
        with pytest.raises(error, match=re.escape(message)):
            method(img)


def test_images_and_embeddings_are_cast() -> None:
    torch.manual_seed(0)
    model = of(Cnn().double())
    assert model.encode(images()).dtype == torch.float64
    assert model(images(), TEXT).dtype == torch.float32
    assert torch.equal(model(images().double(), TEXT), model(images(), TEXT))
    assert of(nn.Identity(), encoder_dim=20).encode(images().half()[:, 0, None]).dtype == torch.float16


def test_what_is_no_module_is_refused() -> None:
    message = re.escape('pass the model itself; for timm, timm.create_model(..., num_classes=0, global_pool="")')
    others: list[Any] = [Cnn().forward, "swin", Cnn]
    for encoder in others:
        with pytest.raises(TypeError, match=message):
            PalmE(**SMALL, encoder=encoder)
        with pytest.raises(TypeError, match=message):
            PalmE.from_modules(encoder, of(None).decoder)


def test_the_config_says_what_the_encoder_was_and_nothing_else_is_accepted() -> None:
    config = of(Cnn()).config
    assert config.external_encoder == f"{HERE}.Cnn"
    assert PalmEConfig.from_dict(config.to_dict()) == config == PalmEConfig(**SMALL, external_encoder=f"{HERE}.Cnn")
    assert of(None).config.external_encoder == "none"
    assert of("config").config.external_encoder is None
    module = Cnn()
    assert PalmE.from_config(config, encoder=module).encoder is module
    assert PalmE.from_config(of("config").config, encoder=module).config == config
    says = re.escape(f"must be what external_encoder='{HERE}.Cnn' says: pass encoder=module")
    for other, found in (("config", "not given"), (None, "none"), (Object(), f"{HERE}.Object")):
        with pytest.raises(ValueError, match=f"encoder is {re.escape(found)}, {says}"):
            PalmE.from_config(config, encoder=other)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="encoder is not given"):
        PalmE(**SMALL, external_encoder=f"{HERE}.Cnn")
    with pytest.raises(
        ValueError, match=re.escape(f"encoder is {HERE}.Cnn, must be what external_encoder='none' says")
    ):
        PalmE.from_config(of(None).config, encoder=module)
    with pytest.raises(TypeError, match="external_encoder=3 must be the name of a class, 'none' or None"):
        PalmEConfig(external_encoder=3)  # type: ignore[arg-type]
    # A size that no ViT could have.
    assert PalmE(**SMALL | {"image_size": 30}, encoder=module).config.image_size == 30


def test_the_hub_takes_the_encoder_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = hub.PalmE(**SMALL, encoder=Cnn()).eval()
    model.save_pretrained(tmp_path)
    again = hub.PalmE.from_pretrained(tmp_path, encoder=Cnn())
    assert torch.equal(again(images(), TEXT), model(images(), TEXT))
    with pytest.raises(FolderError, match=r"config\.json does not describe the encoder: encoder is not given"):
        hub.PalmE.from_pretrained(tmp_path)
    card = model_card(model.config)
    assert f"its encoder, `{HERE}.Cnn`, turns an image into embeddings" in card
    assert "encoder=module" in card
    assert "a ViT encoder turns an image of 8 x 8 pixels" in model_card(of("config").config)


def test_modules_wired_by_hand(tmp_path: Path) -> None:
    layers = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8, "verbose": False}
    torch.manual_seed(0)
    decoder = AutoregressiveWrapper(
        TransformerWrapper(
            num_tokens=32, max_seq_len=16, attn_layers=Decoder(**layers, cross_attend=True, cross_attn_dim_context=D)
        )
    )
    for encoder in Cnn(), None:
        model = PalmE.from_modules(encoder, decoder)
        assert (model.encoder, model.decoder) == (encoder, decoder)
        assert model.config.external_encoder == (f"{HERE}.Cnn" if encoder else "none")
        assert (model.config.encoder_dim, model.config.decoder_depth) == (D, 2)
        save(model, tmp_path)
    assert model.generate(None, PROMPT, 3, context=torch.randn(2, 5, D), temperature=0.0).shape == (2, 3)
    decoder.net.attn_layers.layers[0][1].attend.scale = 0.5
    with pytest.warns(UserWarning, match="does not describe the modules that the model was made of"):
        changed = PalmE.from_modules(Cnn(), decoder)
    with pytest.raises(ValueError, match="State what cannot be read from them"):
        save(changed, tmp_path)


def test_modules_wired_by_hand_without_cross_attention() -> None:
    assert PalmE.from_modules(Cnn(), of(None, cross_attend=False).decoder).config.cross_attend is False


def test_what_needs_the_vit_of_the_config_says_so() -> None:
    model = of(Cnn())
    with pytest.raises(ValueError, match=re.escape(f"external_encoder='{HERE}.Cnn' cannot be printed")):
        to_source(model.config)
    assert "ViTransformerWrapper(" in to_source(replace(model.config, external_encoder=None))
    with pytest.raises(ValueError, match=re.escape("embeddings, must be 2x2, one per patch: pass one image per text")):
        cross_attention_maps(model, images(8, 8), TEXT)
    with pytest.raises(TypeError, match=re.escape("no inputs can be drawn for PalmE")):
        compare(model, model)
    report = compare(model, copy.deepcopy(model), images(), TEXT)
    assert report.outcomes["outputs"].result == report.outcomes["cached decoding"].result == "agrees"
    other = copy.deepcopy(model)
    other.encoder.output = lambda found: 2 * found
    assert not compare(model, other, images(), TEXT)
