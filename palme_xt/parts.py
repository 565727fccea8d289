"""Find the encoder and the decoder in a model, draw inputs that fit, and run it without leaving a trace."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from x_transformers import AutoregressiveWrapper, TransformerWrapper, ViTransformerWrapper, XTransformer
from x_transformers.x_transformers import Attention

from palme_xt.upstream.exact import Exact

Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]  # positional and keyword arguments of forward


class Wired(nn.Module):
    """An encoder, or None, and a decoder, named and composed as in `PalmE`."""

    encoder: Any
    decoder: Any

    def __init__(self, encoder: nn.Module | None, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, img: Tensor | None, text: Tensor, **kwargs: Any) -> Any:
        """Return what the decoder returns for `text (b, n)`, for `img (b, c, h, w)` or `(b, m, c, h, w)`.

        Without images, keywords may have the context.
        """
        if img is None:
            return self.decoder(text, **kwargs)
        context = self.encoder(img.flatten(0, -4), return_embeddings=True).unflatten(0, (len(img), -1)).flatten(1, 2)
        return self.decoder(text, context=context if self.decoder.net.attn_layers.cross_attend else None, **kwargs)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the modes and buffers of a model, and the random number generators, back on exit."""
    before = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    state = random.getstate()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(state)
        for module, training, buffers in before:
            module.training = training
            module._buffers.update(buffers)  # upstream's ALiBi bias replaces one in forward


@contextmanager
def exactly() -> Iterator[None]:
    """Inside, let all models of this process compute as upstream does, bit for bit, which is slower.

    Otherwise, the loss alone, layer norms, and causal flash attention with ALiBi, differ from upstream's by rounding.
    """
    Exact.exact += 1  # a count, because threads may overlap
    try:
        yield
    finally:
        Exact.exact -= 1


def is_causal(module: nn.Module) -> bool:
    """Return whether a module is a `TransformerWrapper` of a Decoder."""
    return isinstance(module, TransformerWrapper) and bool(module.attn_layers.causal)


def find_parts(model: nn.Module) -> dict[str, tuple[str, Any]]:
    """Return the path and the module of each part that a model has exactly once, by the name of the part in `PalmE`."""
    kinds = {"encoder": ViTransformerWrapper, "decoder": AutoregressiveWrapper}
    found = {part: [item for item in model.named_modules() if isinstance(item[1], kinds[part])] for part in kinds}
    found["decoder.net"] = [item for item in model.named_modules() if is_causal(item[1])]
    return {part: items[0] for part, items in found.items() if len(items) == 1}


def part_name(name: str, parts: Mapping[str, tuple[str, Any]]) -> str:
    """Return the name that a parameter or module of a model has in `PalmE`, if it belongs to one of the parts."""
    paths = {f"{path}." if path else "": part for part, (path, _) in parts.items()}
    for path in sorted(paths, key=len, reverse=True):
        if f"{name}.".startswith(path):
            return f"{paths[path]}.{f'{name}.'.removeprefix(path)}".removesuffix(".")
    return name


def image_shape(vit: Any) -> tuple[int, int, int]:
    """Return the channels, height and width of the images that a `ViTransformerWrapper` takes."""
    size = round(vit.pos_embedding.shape[1] ** 0.5) * vit.patch_size
    return vit.patch_to_embedding[1].in_features // vit.patch_size**2, size, size


def draw_inputs(model: nn.Module, b: int = 2, n: int = 12) -> Inputs:
    """Return random inputs of a model's forward, positional and keyword. They are the same in every call.

    A text for an `AutoregressiveWrapper` has one `ignore_index`, so that it depends on `pad_value`. One for a `PalmE`
    with an `image_token` begins with it.

    Args:
        model: A `ViTransformerWrapper`, `TransformerWrapper`, `AutoregressiveWrapper` or `XTransformer`, or a module
            that holds one ViT, or None as its `encoder`, and one decoder, and whose forward takes `(img, text)`.
        b: Batch size.
        n: Number of tokens, unless `max_seq_len` is smaller.

    Raises:
        TypeError: If the model is none of these.
    """
    generator = torch.Generator().manual_seed(0)
    parts = {name: module for name, (_, module) in find_parts(model).items()}
    image_token = getattr(getattr(model, "config", None), "image_token", None)

    def images(vit: Any) -> Tensor:
        return torch.randn(b, *image_shape(vit), generator=generator)

    def texts(net: Any, wrapper: Any = None) -> Tensor:
        text = torch.randint(net.num_tokens, (b, max(2, min(n, net.max_seq_len))), generator=generator)
        if image_token is not None:
            text[text == image_token] = (image_token + 1) % net.num_tokens
            text[:, 0] = image_token
        if wrapper is not None:
            text[0, 3:4] = wrapper.ignore_index  # shorter texts would have no other target
        return text

    if isinstance(model, XTransformer):
        return (texts(model.encoder), texts(model.decoder.net, model.decoder)), {}
    if isinstance(model, ViTransformerWrapper):
        return (images(model),), {}
    if "decoder" in parts and getattr(model, "encoder", model) is None:
        args, kwargs = draw_inputs(parts["decoder"], b, n)
        return (None, *args), kwargs
    if isinstance(model, TransformerWrapper | AutoregressiveWrapper):
        net = getattr(model, "net", model)
        text = texts(net, parts.get("decoder"))
        if not net.attn_layers.cross_attend:
            return (text,), {}
        widths = {module.to_k.in_features for module in net.modules() if isinstance(module, Attention)}
        (width,) = widths - {net.attn_layers.dim} or {net.attn_layers.dim}
        return (text,), {"context": torch.randn(b, 5, width, generator=generator)}
    if {"encoder", "decoder.net"} <= parts.keys():
        return (images(parts["encoder"]), texts(parts["decoder.net"], parts.get("decoder"))), {}
    rule = "it must be a module of x-transformers, or hold one ViTransformerWrapper and one decoder"
    raise TypeError(f"no inputs can be drawn for {type(model).__name__}, {rule}: compare(first, second, *inputs)")
