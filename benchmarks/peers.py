"""The models that palme_xt is measured against, of the same dimensions. Those not installed are skipped by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.hand_wired import HandWired
from palme_xt import PalmE, PalmEConfig

OURS = "palme_xt"
HAND_WIRED = "x-transformers, wired by hand"
HUGGING_FACE = "transformers `VisionEncoderDecoderModel`"
COCA = "coca-pytorch `CoCa` (3 + 3 layers, encoder frozen)"
ORIGINAL = "zetascale `PalmE`"
Loss = Callable[[Tensor, Tensor], Tensor]


def hugging_face(config: Any) -> Any:
    """ViT and GPT-2 of the same dimensions."""
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
        resid_pdrop=0.0,  # PalmE has no dropout unless asked
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
    """CoCa around the same encoder: it freezes the encoder, and learns a contrastive loss besides."""
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


def losses(config: PalmEConfig, *names: str) -> dict[str, tuple[nn.Module, Loss]]:
    """Those of the named contestants that are installed, each a module and its loss of `img` and `text`."""
    torch.manual_seed(0)
    found: dict[str, tuple[nn.Module, Loss]] = {}
    for name in names:
        package, build = CONTESTANTS[name]
        if find_spec(package):
            found[name] = build(config)
        else:
            print(f"Skipped, {package} is not installed: {name}.\n")
    return found


def _palme(config: PalmEConfig) -> tuple[nn.Module, Loss]:
    model = PalmE.from_config(config)
    return model, model


def _hand_wired(config: PalmEConfig) -> tuple[nn.Module, Loss]:
    model = HandWired(config)
    return model, model


def _hugging_face(config: PalmEConfig) -> tuple[nn.Module, Loss]:
    model = hugging_face(config).train()
    return model, lambda img, text: model(img, decoder_input_ids=text, labels=text).loss


def _coca(config: PalmEConfig) -> tuple[nn.Module, Loss]:
    model = coca(config)
    return model, lambda img, text: model(text, img, return_loss=True)


def _original(config: PalmEConfig) -> tuple[nn.Module, Loss]:
    model: Any = importlib.import_module("zeta.models").PalmE()
    return model, lambda img, text: model(img, text)[1]


CONTESTANTS: dict[str, tuple[str, Callable[[PalmEConfig], tuple[nn.Module, Loss]]]] = {
    OURS: ("palme_xt", _palme),
    HAND_WIRED: ("x_transformers", _hand_wired),
    HUGGING_FACE: ("transformers", _hugging_face),
    COCA: ("coca_pytorch", _coca),
    ORIGINAL: ("zeta", _original),
}


def training_step(module: nn.Module, loss: Loss, img: Tensor, text: Tensor) -> Callable[[], None]:
    """Forward and backward."""

    def step() -> None:
        module.zero_grad(set_to_none=True)
        loss(img, text).backward()

    return step
