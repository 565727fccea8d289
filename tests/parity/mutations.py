"""Single changes to a model, each of which makes it another function, or trains it otherwise.

A change takes a copy of `small()`, and returns the model that it makes of it. `built` makes one with other arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from palme_xt import PalmE
from tests.models import small

Change = Callable[[PalmE], nn.Module]
ATTENTION = "decoder.net.attn_layers.layers.0.1"
CROSS_ATTENTION = "decoder.net.attn_layers.layers.1.1"
FEEDFORWARD = "decoder.net.attn_layers.layers.2.1"


def built(**arguments: Any) -> Change:
    return lambda model: small(**arguments)


def decoder(**keywords: Any) -> Change:
    return built(decoder_kwargs=keywords)


def encoder(**keywords: Any) -> Change:
    return built(encoder_kwargs=keywords)


def attribute(path: str, **values: Any) -> Change:
    def change(model: PalmE) -> nn.Module:
        for name, value in values.items():
            setattr(model.get_submodule(path), name, value)
        return model

    return change


def own_forward(forward: Callable[[PalmE, Tensor, Tensor], Any]) -> Change:
    def change(model: PalmE) -> nn.Module:
        class Changed(PalmE):
            def forward(self, img: Tensor, text: Tensor) -> Any:  # type: ignore[override]
                return forward(self, img, text)

        model.__class__ = Changed
        return model

    return change


def context(change_context: Callable[[Tensor], Tensor]) -> Change:
    return own_forward(lambda self, img, text: self.decoder(text, context=change_context(self.encode(img))))


def image(change_image: Callable[[Tensor], Tensor]) -> Change:
    return own_forward(lambda self, img, text: PalmE.forward(self, change_image(img), text))


def tokens(change_text: Callable[[Tensor], Tensor]) -> Change:
    return own_forward(lambda self, img, text: PalmE.forward(self, img, change_text(text)))


def output(change_output: Callable[[Any], Any]) -> Change:
    return own_forward(lambda self, img, text: change_output(PalmE.forward(self, img, text)))


def logits_loss(loss: Callable[[Tensor, Tensor], Tensor]) -> Change:
    def forward(self: PalmE, img: Tensor, text: Tensor) -> Tensor:
        _, (logits, _) = PalmE.forward(self, img, text, return_outputs=True)
        return loss(rearrange(logits, "b n v -> b v n"), text[:, 1:])

    return own_forward(forward)


def module_output(path: str, change_output: Callable[[Any], Any]) -> Change:
    """Change what a module returns, as a hook that somebody left behind would."""

    def change(model: PalmE) -> nn.Module:
        model.get_submodule(path).register_forward_hook(lambda module, args, value: change_output(value))
        return model

    return change


def module_input(path: str, change_input: Callable[[Tensor], Tensor]) -> Change:
    def change(model: PalmE) -> nn.Module:
        module = model.get_submodule(path)
        module.register_forward_pre_hook(lambda module, args: (change_input(args[0]), *args[1:]))
        return model

    return change


def keywords_of(path: str, change_keywords: Callable[[dict[str, Any]], dict[str, Any]]) -> Change:
    def change(model: PalmE) -> nn.Module:
        module = model.get_submodule(path)
        module.register_forward_pre_hook(lambda _, args, kwargs: (args, change_keywords(kwargs)), with_kwargs=True)
        return model

    return change


def with_cache(change_logits: Callable[[Tensor], Tensor]) -> Change:
    """Change the logits that the decoder's net returns if it is given a cache."""

    def change(model: PalmE) -> nn.Module:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], value: Any) -> Any:
            return value if kwargs.get("cache") is None else (change_logits(value[0]), value[1])

        model.decoder.net.register_forward_hook(hook, with_kwargs=True)
        return model

    return change


def parameters(change_parameters: Callable[[PalmE], object]) -> Change:
    """Change which parameters and buffers there are, or how gradients reach them."""

    def change(model: PalmE) -> nn.Module:
        change_parameters(model)
        return model

    return change


def replaced(path: str, make: Callable[[Any], nn.Module]) -> Change:
    def change(model: PalmE) -> nn.Module:
        model.set_submodule(path, make(model.get_submodule(path)))
        return model

    return change


class AlwaysDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.1, training=True)


def same_projection(attention: Any) -> nn.Module:
    attention.to_q.forward = attention.to_k.forward
    return attention  # type: ignore[no-any-return]


def tie(model: PalmE) -> None:
    model.decoder.net.to_logits.weight = model.decoder.net.token_emb.emb.weight


def own_encode(model: PalmE) -> nn.Module:
    class Changed(PalmE):
        def encode(self, img: Tensor) -> Tensor:
            return super().encode(img) * 2

    model.__class__ = Changed
    return model


def only(training: bool, change: Callable[[Tensor], Tensor]) -> Change:
    return own_forward(
        lambda self, img, text: PalmE.forward(self, change(img) if self.training == training else img, text)
    )


def own_loss(model: PalmE) -> nn.Module:
    class Changed(type(model.decoder)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs) * 1.01

    model.decoder.__class__ = Changed
    return model


CHANGES: dict[str, Change] = {
    # activations and feedforwards
    "swish in the decoder": decoder(ff_swish=True),
    "swish in the encoder": encoder(ff_swish=True),
    "squared relu": decoder(ff_relu_squared=True),
    "tanh approximation of gelu": replaced(f"{FEEDFORWARD}.ff.0.1", lambda gelu: nn.GELU("tanh")),
    "gated feedforward": decoder(ff_glu=True),
    "feedforward without bias": decoder(ff_no_bias=True),
    "wider feedforward": decoder(ff_mult=2),
    "norm in the feedforward": decoder(ff_post_act_ln=True),
    # norms
    "rmsnorm": decoder(use_rmsnorm=True),
    "scalenorm": decoder(use_scalenorm=True),
    "norm without weight": decoder(use_simple_rmsnorm=True),
    "norms after the layers": decoder(pre_norm=False),
    "sandwich norms": decoder(sandwich_norm=True),
    "eps of one norm": attribute("decoder.net.attn_layers.final_norm.ln", eps=1e-4),
    "norm of the patches left out": replaced("encoder.patch_to_embedding.2", lambda norm: nn.Identity()),
    "norm after the embedding": built(transformer_kwargs={"post_emb_norm": True}),
    "norm after the patches": built(vit_kwargs={"post_emb_norm": True}),
    # attention
    "no qk-norm": built(qk_norm=False),
    "scale of qk-norm": decoder(attn_qk_norm_scale=5),
    "qk-norm in the encoder": encoder(attn_qk_norm=True),
    "no qk-norm in cross-attention": decoder(cross_attn_qk_norm=False),
    "attention scale of one layer": attribute(f"{ATTENTION}.attend", scale=0.5),
    "later tokens attended to": keywords_of(
        ATTENTION, lambda kwargs: kwargs | {"attn_bias": kwargs["attn_bias"].clamp(min=-9)}
    ),
    "more attention to each token itself": keywords_of(
        ATTENTION, lambda kwargs: kwargs | {"attn_bias": kwargs["attn_bias"] + torch.eye(12) * 9}
    ),
    "attention that rounds otherwise": built(attn_flash=False),
    "zero key": decoder(attn_add_zero_kv=True),
    "gated values": decoder(attn_gate_values=True),
    "memory keys": decoder(attn_num_mem_kv=1),
    "grouped keys": decoder(attn_kv_heads=2),
    "scaled heads": decoder(attn_head_scale=True),
    "value residual": decoder(add_value_residual=True),
    "queries from the projection of keys": replaced(ATTENTION, same_projection),
    # positions
    "no alibi": built(alibi_pos_bias=False),
    "alibi in all heads": built(alibi_num_heads=4),
    "no rotary positions": built(rotary_xpos=False),
    "rotary without xpos": built(rotary_xpos=False, decoder_kwargs={"rotary_pos_emb": True}),
    "base of rotary positions": decoder(rotary_base_rescale_factor=2.0),
    "interpolated rotary positions": decoder(rotary_interpolation_factor=2.0),
    "base of xpos": decoder(rotary_xpos_scale_base=256),
    "rotary positions in the encoder": encoder(rotary_pos_emb=True),
    "positions from 1": keywords_of("decoder.net", lambda kwargs: kwargs | {"pos": torch.arange(1, 13)}),
    "absolute positions": built(use_abs_pos_emb=True, decoder_kwargs={"disable_abs_pos_emb": False}),
    # structure
    "one layer more": built(decoder_depth=3),
    "one layer less in the encoder": built(encoder_depth=1),
    "width": built(decoder_dim=40),
    "patch size": built(patch_size=2),
    "register tokens": built(vit_kwargs={"num_register_tokens": 1}),
    "channels": built(vit_kwargs={"channels": 1}),
    "memory tokens": built(transformer_kwargs={"num_memory_tokens": 1}),
    "text only": built(cross_attend=False),
    "no self-attention": decoder(only_cross=True),
    "shifted tokens": decoder(shift_tokens=1),
    "scaled residual": decoder(scale_residual=True),
    "tied embeddings": built(transformer_kwargs={"tie_embedding": True}),
    "shared weight of embedding and logits": parameters(tie),
    "normalised embeddings": built(transformer_kwargs={"l2norm_embed": True}),
    "sigsoftmax": built(transformer_kwargs={"sigsoftmax_logits": True}),
    # one module
    "doubled projection": module_output(f"{CROSS_ATTENTION}.to_v", lambda x: 2 * x),
    "values shifted by one position": module_output(f"{ATTENTION}.to_v", lambda x: x.roll(1, dims=1)),
    "embedding scaled": module_output("decoder.net.token_emb", lambda x: x * 32**0.5),
    "logits with a temperature": module_output("decoder.net.to_logits", lambda x: x / 1.1),
    "patches transposed": module_input(
        "encoder.patch_to_embedding", lambda x: rearrange(x, "b (h w) d -> b (w h) d", h=2)
    ),
    "pixels of a patch in another order": module_input(
        "encoder.patch_to_embedding", lambda x: rearrange(x, "b n (p c) -> b n (c p)", c=3)
    ),
    "one weight rounded": module_output(f"{ATTENTION}.to_q", lambda x: x.bfloat16().float()),
    "dropout left on": replaced("encoder.dropout", lambda dropout: AlwaysDropout()),
    # what the model's own forward does
    "context flipped": context(lambda x: x.flip(1) * 3),
    "context scaled": context(lambda x: x * 1.01),
    "context without its last patch": context(lambda x: x[:, :-1]),
    "context projected": context(lambda x: F.linear(x, torch.eye(24).roll(1, 0))),
    "context detached": context(lambda x: x.detach()),
    "context of another sample": context(lambda x: x.flip(0)),
    "encode overridden": own_encode,
    "image flipped": image(lambda x: x.flip(-1)),
    "image clamped": image(lambda x: x.clamp(-1, 1)),
    "image normalised": image(lambda x: (x - 0.5) / 0.5),
    "channels swapped": image(lambda x: x.flip(1)),
    "noise on the image": image(lambda x: x + 1e-3 * torch.randn_like(x)),
    "last token dropped": tokens(lambda x: x[:, :-1]),
    "first token masked": tokens(lambda x: torch.cat([x[:, :1], x[:, 1:2] * 0 - 100, x[:, 2:]], dim=1)),
    "token replaced": tokens(lambda x: x.masked_fill(x == int(x[1, 3]), 0)),
    "padding as a target": tokens(lambda x: x.masked_fill(x == -100, 0)),
    "only in training: image flipped": only(True, lambda x: x.flip(-1)),
    "only in eval: image flipped": only(False, lambda x: x.flip(-1)),
    # the loss and the output
    "pad value": built(autoregressive_kwargs={"pad_value": 3}),
    "ignored id": built(autoregressive_kwargs={"ignore_index": -1}),
    "masked tokens": built(autoregressive_kwargs={"mask_prob": 0.3}),
    "loss scaled": output(lambda loss: 2 * loss),
    "subclass of the wrapper with another loss": own_loss,
    "label smoothing": logits_loss(lambda logits, text: F.cross_entropy(logits, text, label_smoothing=0.1)),
    "sum of the loss": logits_loss(lambda logits, text: F.cross_entropy(logits, text, reduction="sum")),
    "loss in float64": output(lambda loss: loss.double()),
    "loss in a tuple": output(lambda loss: (loss,)),
    "loss as a float": output(float),
    "loss detached": output(lambda loss: loss.detach()),
    "no output": output(lambda loss: None),
    # gradients and training
    "fraction of the gradient": built(transformer_kwargs={"emb_frac_gradient": 0.5}),
    "dropout of attention": decoder(attn_dropout=0.5),
    "dropout of feedforwards": decoder(ff_dropout=0.5),
    "dropout of embeddings": built(transformer_kwargs={"emb_dropout": 0.5}),
    "dropout of patches": built(vit_kwargs={"emb_dropout": 0.5}),
    "dropout of layers": decoder(layer_dropout=0.5),
    "frozen layer": parameters(lambda model: model.get_submodule(FEEDFORWARD).requires_grad_(False)),
    "padding row of the embedding": attribute("decoder.net.token_emb.emb", padding_idx=5),
    # parameters, buffers, dtypes
    "another parameter": parameters(lambda model: setattr(model, "extra", nn.Parameter(torch.zeros(1)))),
    "another buffer": parameters(lambda model: model.register_buffer("extra", torch.zeros(1))),
    "bias of the logits": replaced("decoder.net.to_logits", lambda old: nn.Linear(32, 32)),
    "buffer in the state dict": parameters(lambda model: model.decoder.net.attn_layers.rotary_pos_emb.inv_freq.mul_(2)),
    "buffer outside the state dict": parameters(lambda model: model.decoder.net.attn_layers.alibi.slopes.mul_(2)),
    "dtype of a buffer": parameters(
        lambda model: setattr(
            model.decoder.net.attn_layers.rotary_pos_emb,
            "inv_freq",
            model.decoder.net.attn_layers.rotary_pos_emb.inv_freq.double(),
        )
    ),
    "float64": lambda model: model.double(),
    "bfloat16": lambda model: model.bfloat16(),
    # the cache
    "other logits with a cache": with_cache(lambda logits: logits * 1.001),
    "other order with a cache": with_cache(lambda logits: logits.flip(-1)),
    "no positions with a cache": keywords_of(
        "decoder.net.attn_layers",
        lambda kwargs: kwargs if kwargs.get("cache") is None else kwargs | {"seq_pos_offset": 0},
    ),
    "no context with a cache": keywords_of(
        "decoder.net",
        lambda kwargs: (
            kwargs if kwargs.get("cache") is None else kwargs | {"context_mask": torch.zeros(2, 4, dtype=torch.bool)}
        ),
    ),
}
