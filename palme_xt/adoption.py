"""Describe modules that were wired by hand as a config, and prove it, for `PalmE.from_modules`."""

import random
import warnings
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper, ViTransformerWrapper
from x_transformers import x_transformers as upstream

from palme_xt.config import PalmEConfig, UnprovenConfig
from palme_xt.external import name_encoder
from palme_xt.insertion import insert_cross_attention
from palme_xt.mapping import MAPPING, argument_behind, upstream_keywords
from palme_xt.parts import Inputs, Wired, draw_inputs, exactly, image_shape, undisturbed
from palme_xt.wiring import DECODER, ENCODER, PATHS, build

ARGUMENTS = "palme_arguments"  # an attribute of modules that come with arguments of `PalmEConfig`
TEXT = 32  # tokens of the text that a proof runs; attributes show what counts only in longer ones
ROUNDING = 2**-8  # relative, of bfloat16
# The mode, and what stays behind if a vocabulary is resized in place.
_NOT_COMPARED = ("training", "num_tokens", "num_embeddings", "out_features")
# The whole model, or its parts, and a parameter that tells where it begins in a state dict.
_MARKS = {"": "decoder.net.token_emb.emb.weight"}, {"encoder": "pos_embedding", "decoder.net": "token_emb.emb.weight"}
_PARTS = {path: part for part, path in PATHS.items()}


def adopt(encoder: Any, decoder: Any, **given: Any) -> tuple[PalmEConfig, Any]:
    """Return the config that `describe` reads, if it is proven, and the decoder.

    Otherwise, a model built from it differs from the modules: return an `UnprovenConfig`, and warn.

    Arguments in the attribute `ARGUMENTS` of the modules count as given. With `cross_attend=True`, cross-attention is
    inserted into a copy of a decoder without it (`palme_xt.insertion`).

    Raises:
        TypeError, ValueError: As in `describe`, and if cross-attention cannot be inserted.
    """
    given = merge_arguments(getattr(encoder, ARGUMENTS, {}), getattr(decoder, ARGUMENTS, {}), given)
    layers = getattr(getattr(decoder, "net", None), "attn_layers", None)
    if given.get("image_token") is not None:
        given["cross_attend"] = False
        if getattr(layers, "cross_attend", False):
            found = f"image_token={given['image_token']}"
            raise ValueError(f"{found} is for a decoder without cross-attention: leave it out")
    if given.get("image_attention") == "full" and not hasattr(layers, "alibi"):
        # x-transformers 2.26.0 to 2.31.10: flash attention is always causal.
        raise ValueError("image_attention='full' needs palme_xt's decoder: load weights into PalmE.from_config(...)")
    wanted = given.get("cross_attend") and isinstance(layers, Decoder) and not layers.cross_attend
    config = describe(encoder, decoder, **given | ({"cross_attend": False} if wanted else {}))
    difference = find_difference(config, encoder, decoder)
    if wanted and difference is not None:
        found = f"cross_attend=True for a decoder without cross-attention, which cannot be rebuilt: {difference}"
        raise ValueError(f"{found}. State what cannot be read from it, for example decoder_kwargs={{...}}")
    if wanted:
        arguments = getattr(decoder, ARGUMENTS, {})
        config, decoder = insert_cross_attention(config, decoder)
        setattr(decoder, ARGUMENTS, arguments)  # so that it can be adopted again
    if difference is None:
        return config, decoder
    unproven = UnprovenConfig(**vars(config), difference=difference)
    warnings.warn(unproven.refusal, stacklevel=3)
    return unproven, decoder


def describe(encoder: Any, decoder: Any, **given: Any) -> PalmEConfig:
    """Return a config that is read from the attributes of an encoder and a decoder. They may have more overrides.

    An override is read if upstream keeps its value in an attribute of the same name. Channels, register tokens, tied
    embeddings and rotary positions without xPos are read as well.

    Args:
        encoder: An `x_transformers.ViTransformerWrapper`, or another module or None, as in `PalmE(encoder=...)`.
        decoder: An `x_transformers.AutoregressiveWrapper` around a `TransformerWrapper` with a `Decoder`.
        **given: Arguments of `PalmEConfig`, which replace what is read. Override dicts are merged with what is read.

    Raises:
        TypeError: If the modules are of other classes.
        ValueError: If the decoder cross-attends to a context whose width is not that of the encoder, or `given` is
            invalid.
    """
    if not isinstance(encoder, ViTransformerWrapper):
        given["external_encoder"] = name_encoder(encoder, given.get("external_encoder"))
    _check_kind("decoder", decoder, AutoregressiveWrapper)
    _check_kind("decoder.net", decoder.net, TransformerWrapper)
    _check_kind("decoder.net.attn_layers", decoder.net.attn_layers, Decoder)
    encoder = None if given.get("external_encoder") else encoder
    read = _arguments(encoder, decoder)
    named = _named_overrides(Wired(encoder, decoder), _build(merge_arguments(read, given), "meta"))
    return PalmEConfig(**merge_arguments(read, named, given))


def find_difference(config: PalmEConfig, encoder: nn.Module, decoder: nn.Module) -> str | None:
    """Describe the first difference between the modules and a model built from `config`, or return None.

    Parameters, buffers and attributes are compared, and what both sides compute from the same random weights, on one
    image and a short text: embeddings, logits, loss and gradients, bitwise, in eval and training mode. With an encoder
    other than the config's ViT, only the decoders are compared, on a random context. This runs on the CPU in float32,
    wherever the modules are, and takes memory for one copy of the weights. The modules and the state of the random
    number generators are unchanged.
    """
    found = Wired(None if config.external_encoder else encoder, decoder)
    with undisturbed(found), exactly(), torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        try:
            built = _build(vars(config), "cpu").float()
            for place, here, there in chain(_different_shapes(found, built), _different_attributes(found, built)):
                return f"{place} is {here} in the modules, but {there} in a model built from it"
            return _different_numbers(found, built)
        except Exception as error:  # of whatever the modules consist of
            return f"they cannot be compared with a model built from it ({type(error).__name__}: {error})"


def _check_kind(name: str, module: Any, kind: type) -> None:
    if not isinstance(module, kind):
        raise TypeError(f"{name} is a {type(module).__name__}, must be an x_transformers.{kind.__name__}")


def merge_arguments(*arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments, the last one of each name, with dicts merged."""
    merged: dict[str, Any] = {}
    for name, value in chain.from_iterable(some.items() for some in arguments):
        merged[name] = {**merged.get(name, {}), **value} if isinstance(value, Mapping) else value
    return merged


def _build(arguments: Mapping[str, Any], device: str) -> Wired:
    """Return a newly initialised model, without warnings."""
    with warnings.catch_warnings(), torch.device(device):
        warnings.simplefilter("ignore")
        quiet = {f"{part}_kwargs": {"verbose": False} for part in ("encoder", "decoder")}
        config = PalmEConfig(**merge_arguments(arguments, quiet))
        return Wired(None if config.external_encoder else build(ENCODER, config), build(DECODER, config))


def _arguments(encoder: Any, decoder: Any) -> dict[str, Any]:
    """Return the 17 arguments, and the overrides that upstream keeps in no attribute of the same name."""
    net, layers, width = decoder.net, decoder.net.attn_layers, encoder and encoder.attn_layers.dim
    attentions = [module for module in layers.modules() if isinstance(module, upstream.Attention)]
    for attention in attentions:
        context = getattr(attention.to_latent_kv, "in_features", attention.to_k.in_features)
        if not attention.causal and context != (width := width or context):
            rule = f"decoder takes a context of width {context}, must be {width}, the width of the encoder"
            raise ValueError(f"{rule}: build the Decoder with cross_attn_dim_context={width}")
    own = max(attentions, key=lambda attention: attention.causal)  # a self-attention, if there is one
    rel_pos = getattr(layers, "alibi", None) or layers.rel_pos
    alibi = isinstance(rel_pos, upstream.AlibiPositionalBias)
    rotary = layers.rotary_pos_emb
    images = _arguments_of_vit(encoder) if encoder else {"encoder_dim": width or layers.dim}
    return images | {
        **_sizes("decoder", layers),
        "num_tokens": net.token_emb.emb.weight.shape[0],
        "max_seq_len": net.max_seq_len,
        "alibi_num_heads": rel_pos.heads if alibi else min(4, layers.attn_heads),
        "use_abs_pos_emb": not isinstance(net.pos_emb, upstream.always),
        "cross_attend": layers.cross_attend,
        "alibi_pos_bias": alibi,
        "rotary_xpos": rotary is not None and rotary.scale is not None,
        "attn_flash": own.attend.flash,
        "qk_norm": own.qk_norm,
        "transformer_kwargs": _changed("transformer", tie_embedding=not isinstance(net.to_logits, nn.Module)),
        "decoder_kwargs": _changed("decoder", rotary_pos_emb=rotary is not None and rotary.scale is None),
    }


def _arguments_of_vit(encoder: Any) -> dict[str, Any]:
    channels, image_size, _ = image_shape(encoder)
    registers = len(encoder.register_tokens) if encoder.has_register_tokens else 0
    vit_kwargs = _changed("vit", channels=channels, num_register_tokens=registers)
    own = {"image_size": image_size, "patch_size": encoder.patch_size, "vit_kwargs": vit_kwargs}
    return own | _sizes("encoder", encoder.attn_layers)


def _sizes(part: str, layers: Any) -> dict[str, int]:
    """Return the width and the numbers of blocks and heads. Tied blocks count each time that they run."""
    depth = layers.depth * max(1, len(layers.layers_execute_order) // len(layers.layer_types))
    return {f"{part}_dim": layers.dim, f"{part}_depth": depth, f"{part}_heads": layers.attn_heads}


def _changed(part: str, **overrides: Any) -> dict[str, Any]:
    return {name: value for name, value in overrides.items() if value != upstream_keywords(part)[name]}


def _named_overrides(found: Wired, plain: Wired) -> dict[str, dict[str, Any]]:
    """Return the overrides in attributes of the same name, where they differ from those of a model without them."""
    overrides: dict[str, dict[str, Any]] = {f"{part}_kwargs": {} for part in MAPPING}
    for place, value, _ in _different_attributes(found, plain):
        path, _, name = place.rpartition(".")
        part, prefix, module = _PARTS.get(path, "vit"), "", found.get_submodule(path)
        if isinstance(module, upstream.Attention | upstream.Attend):
            part, _, _ = path.partition(".")
            prefix = "attn_" if module.causal or part == "encoder" else "cross_attn_"
        keyword, read = prefix + name, overrides[f"{part}_kwargs"]
        inherited = prefix == "cross_attn_" and read.get(f"attn_{name}") == value
        known = keyword in upstream_keywords(part) and argument_behind(part, keyword) is None
        if known and not inherited and keyword != "layers_execute_order":  # the order shows in the depth
            read[keyword] = value
    return overrides


def _different_shapes(found: nn.Module, built: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Yield the names in the state dicts whose shapes differ, and both shapes, "missing" for one that a side lacks."""
    ours, theirs = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (found, built))
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            yield name, ours.get(name, "missing"), theirs.get(name, "missing")


def _different_attributes(found: nn.Module, built: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Yield the attributes that modules of the same name have with different values, and both values."""
    others = {path: vars(module) for path, module in built.named_modules()}
    for path, module in found.named_modules():
        for name, value in vars(module).items():
            other = others.get(path, {}).get(name, value)
            plain = all(item is None or isinstance(item, bool | int | float | str | tuple) for item in (value, other))
            if plain and value != other and not (name.startswith("_") or name in _NOT_COMPARED):
                yield f"{path}.{name}", value, other


def _different_numbers(found: Wired, built: Wired) -> str | None:
    """Describe the first difference between what both sides compute from the same weights, or return None."""
    saved, weights = built.state_dict(), dict(built.named_parameters())
    for weight in weights.values():  # initial zeros would hide something
        weight.data += torch.randn(weight.shape) * (0.3 if weight.ndim < 2 else weight.shape[-1] ** -0.5)
    own = {name: buffer.cpu() for name, buffer in found.named_buffers()}
    own |= {name: buffer.float() for name, buffer in own.items() if buffer.is_floating_point()}
    same = {name: buffer for name, buffer in own.items() if name in saved}
    for name, buffer in same.items():
        if not torch.allclose(buffer, saved[name], rtol=ROUNDING, atol=0):
            return f"{name} has other values in the modules than in a model built from it"
    inputs = draw_inputs(built, b=1, n=TEXT)
    for mode in "eval", "training":
        pairs = (found, weights | own), (built, weights | same)
        ours, theirs = (_compute(model.train(mode == "training"), tensors, inputs) for model, tensors in pairs)
        for name, here in ours.items():
            if not torch.equal(here, theirs[name]):
                return f"{name} in {mode} mode differ between the modules and a model built from it"
    return None


def _compute(model: Wired, tensors: dict[str, Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """Return what a model computes from given parameters and buffers, with gradients of the first parameters."""
    seen: dict[str, Tensor] = {}
    random.seed(0)  # upstream's `layer_dropout` uses it
    torch.manual_seed(0)
    with (model.encoder or nn.Identity()).register_forward_hook(lambda *call: seen.update(embeddings=call[2])):
        loss, (logits, _) = functional_call(model, tensors, inputs[0], {**inputs[1], "return_outputs": True})
    first = [tensors[name] for name in map(".".join, _MARKS[1].items()) if name in tensors]
    gradients = torch.autograd.grad(loss, first, materialize_grads=True)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    return seen | {"logits": logits, "loss": loss, "gradients": flat}


def find_renaming(model: nn.Module, given: Mapping[str, Any]) -> str:
    """Return lines of Python that load weights under other names into a model, or "" if not only the names differ.

    Args:
        model: A `PalmE`.
        given: A state dict, for example of a model in a wrapper, of one wired by hand, or of a part of one.
    """
    for marks in _MARKS:
        lines, fitting = [], 0
        for path, mark in ((path, mark) for path, mark in marks.items() if path in dict(model.named_modules())):
            part = f"model.{path}".removesuffix(".")
            shapes = {name: tensor.shape for name, tensor in model.get_submodule(path).state_dict().items()}
            for prefix in [name.removesuffix(mark) for name in given if f".{name}".endswith(f".{mark}")]:
                if all(getattr(given.get(prefix + name), "shape", None) == shape for name, shape in shapes.items()):
                    renamed = f"{{name: state_dict[{prefix!r} + name] for name in {part}.state_dict()}}"
                    lines.append(f"{part}.load_state_dict({renamed})")
                    fitting += len(shapes)
        if fitting == len(given):
            return "\n".join(lines)
    return ""
