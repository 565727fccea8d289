"""Compare two models: parameters, the output of every layer, logits, loss, gradients and cached decoding.

from palme_xt.parity import compare

assert compare(PalmE(), my_hand_wired_model)
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from x_transformers import AutoregressiveWrapper, ViTransformerWrapper

from palme_xt.adoption import describe, different_shape
from palme_xt.decoding.loop import evaluating
from palme_xt.model import PalmE

CHECKS = ("parameters", "layers", "logits", "loss", "gradients", "cached decoding")

Pair = tuple[nn.Module, nn.Module]
Outputs = dict[str, Tensor]


class Wired(nn.Module):
    """An encoder and a decoder, named as in `PalmE`. The functions below take either class."""

    encoder: Any
    decoder: Any

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder


@dataclass(frozen=True)
class Report:
    """The result of `compare`, which is true if the models agree in everything that was checked. It prints as a table.

    Attributes:
        differences: For each check, in order, a description of the first difference, or None if there is none.
        tolerance: Largest absolute difference that was accepted; 0 is bitwise.
    """

    differences: dict[str, str | None]
    tolerance: float

    def __bool__(self) -> bool:
        return not any(self.differences.values())

    def __str__(self) -> str:
        within = "bitwise" if self.tolerance == 0 else f"within {self.tolerance:g}"
        width = max(map(len, self.differences))
        rows = [f"{name:{width}}  {found or f'agree {within}'}" for name, found in self.differences.items()]
        return "\n".join([f"x-transformers {version('x-transformers')}, torch {torch.__version__}", *rows])

    __repr__ = __str__  # pytest prints it when `assert compare(...)` fails


def compare(
    first: nn.Module | Pair,
    second: nn.Module | Pair,
    img: Tensor | None = None,
    text: Tensor | None = None,
    *,
    tolerance: float = 0.0,
    checks: Iterable[str] = CHECKS,
) -> Report:
    """Compare two models on the same inputs and with the weights of the first.

    The models run in eval mode. Afterwards, both have their own weights and modes again, and no gradients are kept.

    Args:
        first: A `PalmE`, another module that holds a `ViTransformerWrapper` and an `AutoregressiveWrapper`, or a pair
            of these two.
        second: A model in one of the same forms.
        img: `(b, c, h, w)`. Defaults to random images that fit `first`.
        text: `(b, n)`. Defaults to random tokens that fit `first`.
        tolerance: Largest accepted absolute difference between two numbers. The default, 0, is bitwise.
        checks: The `CHECKS` to run. If parameters differ in name or shape, nothing else is compared.

    Raises:
        TypeError: If `first` or `second` is not such a model.
        ValueError: If a check is unknown, or the tolerance is negative.
    """
    checks = tuple(checks)
    if unknown := [check for check in checks if check not in CHECKS]:
        raise ValueError(f"checks has {unknown[0]!r}, must be some of {', '.join(CHECKS)}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance} must be 0 (bitwise) or more")
    ours, theirs = _wired(first), _wired(second)
    if different := different_shape(ours, theirs):
        name, here, there = different
        return Report({"parameters": f"{name} is {here} in the first, {there} in the second"}, tolerance)
    if img is None or text is None:
        drawn_img, drawn_text = draw_inputs(ours)
        img, text = drawn_img if img is None else img, drawn_text if text is None else text
    differences: dict[str, str | None] = {"parameters": None} if "parameters" in checks else {}
    with _same_weights(ours, theirs), evaluating(ours, theirs):
        for check, outputs in _COMPARED.items():
            if check in checks:
                differences[check] = _differ(outputs, ours, theirs, img, text, tolerance)
    return Report(differences, tolerance)


def draw_inputs(model: Wired | PalmE, b: int = 2, n: int = 12) -> tuple[Tensor, Tensor]:
    """Return random images and texts that fit a model. They are the same in every call."""
    config = describe(model.encoder, model.decoder)
    generator = torch.Generator().manual_seed(0)
    weight = model.encoder.pos_embedding
    img = torch.randn(b, config.channels, config.image_size, config.image_size, generator=generator)
    text = torch.randint(config.num_tokens, (b, max(2, min(n, config.max_seq_len))), generator=generator)
    return img.to(weight), text.to(weight.device)


def forward(model: Wired | PalmE, img: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and the logits as a hand-wired model computes them."""
    loss, (logits, _) = model.decoder(text, context=_context(model, img), return_outputs=True)
    return loss, logits


def layer_outputs(model: Wired | PalmE, img: Tensor, text: Tensor) -> Outputs:
    """Return the output of each module, in the order in which they finish, innermost first.

    Names are those in a state dict of `PalmE`, followed by the number of the call if a module is called repeatedly.
    """
    names = {module: name for name, module in model.named_modules()}
    outputs: Outputs = {}
    calls: Counter[str] = Counter()

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        tensor = _first_tensor(output)
        if module in names and tensor is not None:
            name = names[module]
            calls[name] += 1
            outputs[name if calls[name] == 1 else f"{name}#{calls[name]}"] = tensor.clone()

    with register_module_forward_hook(keep):
        forward(model, img, text)
    return outputs


def cached_logits(model: Wired | PalmE, img: Tensor, text: Tensor) -> Outputs:
    """Return the logits after each token. Each step reads one more token, with the cache of the previous steps."""
    decoder, cache, outputs = model.decoder, None, {}
    text = text.masked_fill(text == decoder.ignore_index, decoder.pad_value)
    context = _context(model, img)
    for n in range(1, text.shape[1] + 1):
        step = text[:, :n] if cache is None else text[:, n - 1 : n]
        logits, new = decoder.net(
            step, context=context, cache=cache, input_not_include_cache=cache is not None, return_intermediates=True
        )
        cache = new if decoder.net.can_cache_kv else None
        outputs[f"token {n}"] = logits[:, -1]
    return outputs


def first_difference(ours: Outputs, theirs: Outputs, tolerance: float) -> str | None:
    """Describe the first output that differs by more than `tolerance`, or return None if there is none.

    A name that only one side has is skipped: the other side computes the output of that module without calling it.
    """
    for name, expected in ours.items():
        if name not in theirs:
            continue
        value = theirs[name]
        if value.shape != expected.shape:
            return f"{name} is {tuple(expected.shape)} and {tuple(value.shape)}"
        if torch.equal(value, expected):
            continue
        difference = (value.double() - expected.double()).abs().max().item()
        if not difference <= tolerance:
            largest = expected.double().abs().max().item()
            return f"{name} differs by up to {difference:.3g} (values up to {largest:.3g})"
    return None


def describe_crash(error: Exception) -> str:
    """Return the type of an error and the first line of its message, if it has one."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def _wired(model: nn.Module | Pair) -> Wired:
    """Return the encoder and the decoder of a model, which must hold exactly one of each."""
    kinds = ViTransformerWrapper, AutoregressiveWrapper
    if isinstance(model, tuple | list):
        if len(model) == 2 and all(map(isinstance, model, kinds)):
            return Wired(*model)
        given = ", ".join(type(module).__name__ for module in model)
        raise TypeError(f"a pair ({given}) must be (encoder, decoder): ViTransformerWrapper, AutoregressiveWrapper")
    if not isinstance(model, nn.Module):
        raise TypeError(f"{model!r} must be a module, or the pair (encoder, decoder)")
    encoders, decoders = ([module for module in model.modules() if isinstance(module, kind)] for kind in kinds)
    if len(encoders) != 1 or len(decoders) != 1:
        raise TypeError(
            f"{type(model).__name__} holds {len(encoders)} ViTransformerWrapper and {len(decoders)} "
            "AutoregressiveWrapper, must hold one of each: pass the pair (encoder, decoder) instead"
        )
    return Wired(encoders[0], decoders[0])


def _context(model: Wired | PalmE, img: Tensor) -> Tensor | None:
    """Return the patch embeddings if the decoder cross-attends."""
    if not model.decoder.net.attn_layers.cross_attend:
        return None
    images = img if img.ndim == 4 else img.flatten(0, 1)
    embeddings: Tensor = model.encoder(images, return_embeddings=True)
    return embeddings.reshape(len(img), -1, embeddings.shape[-1])


def _differ(
    outputs: Callable[..., Outputs], ours: Wired, theirs: Wired, img: Tensor, text: Tensor, tolerance: float
) -> str | None:
    results: list[Outputs] = []
    for which, model in ("first", ours), ("second", theirs):
        try:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                results.append(outputs(model, img, text))
        except Exception as error:  # any error of upstream is a result
            return f"{which} crashes: {describe_crash(error)}"
    return first_difference(results[0], results[1], tolerance)


def _gradients(model: Wired, img: Tensor, text: Tensor) -> Outputs:
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not named:
        return {}
    with torch.enable_grad():
        gradients = torch.autograd.grad(forward(model, img, text)[0], list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, gradients, strict=True) if gradient is not None}


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, tuple | list):
        return next((tensor for tensor in map(_first_tensor, output) if tensor is not None), None)
    return output if isinstance(output, Tensor) else None


_COMPARED: dict[str, Callable[..., Outputs]] = {
    "layers": layer_outputs,
    "logits": lambda *inputs: {"logits": forward(*inputs)[1]},
    "loss": lambda *inputs: {"loss": forward(*inputs)[0]},
    "gradients": _gradients,
    "cached decoding": cached_logits,
}


@contextmanager
def _same_weights(first: nn.Module, second: nn.Module) -> Iterator[None]:
    """Give the second model the weights of the first, and restore its own afterwards."""
    own = copy.deepcopy(second.state_dict())
    try:
        second.load_state_dict(first.state_dict())
        yield
    finally:
        second.load_state_dict(own)
