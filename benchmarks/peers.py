"""Build the models that palme_xt is compared with, in the same dimensions. Missing ones are skipped, and named."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.device import CPU, Device
from benchmarks.hand_wired import HandWired
from benchmarks.timing import Contestant
from palme_xt import PalmE, PalmEConfig

OURS = "palme_xt"
HAND_WIRED = "x-transformers, wired by hand"
HUGGING_FACE = "transformers `VisionEncoderDecoderModel`"
COCA = "coca-pytorch `CoCa` (3 + 3 layers, encoder frozen)"
ORIGINAL = "zetascale `PalmE`"


class Peer(NamedTuple):
    """A model to compare with: how to build it, and how to compute its loss from the model, `img` and `text`."""

    package: str
    build: Callable[[PalmEConfig], nn.Module]
    loss: Callable[[Any, Tensor, Tensor], Tensor]


def hugging_face(config: Any) -> Any:
    """Build a ViT and a GPT-2 of the same dimensions."""
    from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    encoder = ViTConfig(
        hidden_size=config.encoder_dim,
        num_hidden_layers=config.encoder_depth,
        num_attention_heads=config.encoder_heads,
        intermediate_size=4 * config.encoder_dim,
        image_size=config.image_size,
        patch_size=config.patch_size,
    )
    decoder = GPT2Config(
        vocab_size=config.num_tokens,
        n_positions=config.max_seq_len,
        resid_pdrop=0.0,  # PalmE has no dropout by default
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        n_embd=config.decoder_dim,
        n_layer=config.decoder_depth,
        n_head=config.decoder_heads,
        add_cross_attention=True,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    both = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return VisionEncoderDecoderModel(config=both)


def coca(config: PalmEConfig) -> Any:
    """Build CoCa around the same encoder, which it freezes. It also has a contrastive loss."""
    CoCa: Any = importlib.import_module("coca_pytorch.coca_pytorch").CoCa

    class Embeddings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.palme = PalmE.from_config(config)

        def forward(self, img: Tensor) -> Tensor:
            return self.palme.encode(img)

    return CoCa(
        dim=config.decoder_dim,
        num_tokens=config.num_tokens,
        unimodal_depth=config.decoder_depth // 2,
        multimodal_depth=config.decoder_depth // 2,
        image_dim=config.encoder_dim,
        heads=config.decoder_heads,
        img_encoder=Embeddings(),
        pad_id=-100,
    )


def original(config: PalmEConfig) -> Any:
    """Build the model of zetascale, which has the same defaults as ours."""
    return importlib.import_module("zeta.models").PalmE()


PEERS = {
    OURS: Peer("palme_xt", PalmE.from_config, lambda model, img, text: model(img, text)),
    HAND_WIRED: Peer("x_transformers", HandWired, lambda model, img, text: model(img, text)),
    HUGGING_FACE: Peer(
        "transformers", hugging_face, lambda model, img, text: model(img, decoder_input_ids=text, labels=text).loss
    ),
    COCA: Peer("coca_pytorch", coca, lambda model, img, text: model(text, img, return_loss=True)),
    ORIGINAL: Peer("zeta", original, lambda model, img, text: model(img, text)[1]),
}


def installed(*names: str) -> list[str]:
    """Return the named models whose packages are installed, and print the others."""
    missing = [name for name in names if not find_spec(PEERS[name].package)]
    for name in missing:
        print(f"Skipped, {PEERS[name].package} is not installed: {name}.\n")
    return [name for name in names if name not in missing]


def build(config: PalmEConfig, *names: str, device: Device = CPU) -> dict[str, Any]:
    """Build the named models that are installed, in training mode."""
    torch.manual_seed(0)
    return {name: device.place(PEERS[name].build(config)).train() for name in installed(*names)}


def draw_batch(config: PalmEConfig, b: int, n: int, device: Device = CPU) -> tuple[Tensor, Tensor]:
    """Return `b` random images and texts of `n` tokens."""
    img = torch.randn(b, 3, config.image_size, config.image_size)
    return device.place(img), device.place(torch.randint(config.num_tokens, (b, n)))


def training_steps(
    models: Mapping[str, nn.Module], img: Tensor, text: Tensor, *, compile: bool = False
) -> dict[str, Contestant]:
    """Return the training step (forward and backward) of each model on the same batch."""
    return {name: _training_step(name, model, img, text, compile) for name, model in models.items()}


def _training_step(name: str, model: nn.Module, img: Tensor, text: Tensor, compile: bool) -> Contestant:
    loss: Callable[[Tensor, Tensor], Tensor] = partial(PEERS[name].loss, model)
    if compile:
        loss = torch.compile(loss)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss(img, text).backward()

    return step
