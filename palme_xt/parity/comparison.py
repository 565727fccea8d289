"""Do two models compute the same? Parameters, loss, logits, gradients, cached decoding; and where outputs first part.

from palme_xt.parity.comparison import compare

assert compare(PalmE(), my_hand_wired_model)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from x_transformers import AutoregressiveWrapper, ViTransformerWrapper

from palme_xt.adoption import describe
from palme_xt.decoding import evaluating

Pair = tuple[Any, Any]
CHECKS = ("parameters", "layers", "logits", "loss", "gradients", "cached decoding")


@dataclass(frozen=True)
class Report:
    """What `compare` found. True where the models agree in all that was checked; prints as a table.

    Attributes:
        differences: for each check, in order, the first difference in words, or None where there is none.
        tolerance: the largest absolute difference that counts as none; 0 is bitwise.
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

    __repr__ = __str__  # what pytest prints of a failed `assert compare(...)`


def compare(
    first: nn.Module | Pair,
    second: nn.Module | Pair,
    img: Tensor | None = None,
    text: Tensor | None = None,
    *,
    tolerance: float = 0.0,
    checks: Iterable[str] = CHECKS,
) -> Report:
    """Compare two models on the same inputs, the second with the weights of the first.

    Both are in eval mode meanwhile, and have their own weights and modes again afterwards; gradients are not kept.

    Args:
        first: a `PalmE`, a module that holds a `ViTransformerWrapper` and an `AutoregressiveWrapper`, or a pair of
            these.
        second: the same.
        img: `(b, c, h, w)`; random images that fit `first` if None.
        text: `(b, n)`; random tokens that fit `first` if None.
        tolerance: the largest absolute difference of two numbers that counts as none; 0, the default, is bitwise.
        checks: which of `CHECKS` to make. Where parameters differ in name or shape, nothing else is compared.

    Raises:
        TypeError: not such models.
        ValueError: an unknown check, or a negative tolerance.
    """
    checks = tuple(checks)
    if unknown := [check for check in checks if check not in CHECKS]:
        raise ValueError(f"checks has {unknown[0]!r}, must be some of {', '.join(CHECKS)}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance} must be 0 (bitwise) or more")
    ours, theirs = as_pair(first), as_pair(second)
    if found := _different_parameters(ours, theirs):
        return Report({"parameters": found}, tolerance)
    if img is None or text is None:
        drawn_img, drawn_text = draw_inputs(ours)
        img, text = drawn_img if img is None else img, drawn_text if text is None else text
    found_by: dict[str, str | None] = {}
    with _same_weights(ours, theirs), evaluating(*ours, *theirs):
        for check in CHECKS:
            if check == "parameters" and check in checks:
                found_by[check] = None
            elif check in checks:
                found_by[check] = _differ(COMPARED[check], ours, theirs, img, text, tolerance)
    return Report(found_by, tolerance)


def as_pair(model: nn.Module | Pair) -> Pair:
    """The encoder and the decoder of a model.

    Raises:
        TypeError: there is none, or more than one.
    """
    kinds = ViTransformerWrapper, AutoregressiveWrapper
    if isinstance(model, tuple | list):
        if len(model) == 2 and all(isinstance(module, kind) for module, kind in zip(model, kinds, strict=True)):
            return model[0], model[1]
        given = ", ".join(type(module).__name__ for module in model)
        raise TypeError(f"a pair ({given}) must be (encoder, decoder): ViTransformerWrapper, AutoregressiveWrapper")
    if not isinstance(model, nn.Module):
        raise TypeError(f"{model!r} must be a module, or the pair (encoder, decoder)")
    found = [[module for module in model.modules() if isinstance(module, kind)] for kind in kinds]
    if [len(modules) for modules in found] != [1, 1]:
        raise TypeError(
            f"{type(model).__name__} holds {len(found[0])} ViTransformerWrapper and {len(found[1])} "
            "AutoregressiveWrapper, must hold one of each: pass the pair (encoder, decoder) instead"
        )
    return found[0][0], found[1][0]


def draw_inputs(pair: Pair, b: int = 2, n: int = 12) -> tuple[Tensor, Tensor]:
    """Random images and texts for a pair, always the same."""
    config = describe(*pair)
    generator = torch.Generator().manual_seed(0)
    weight = pair[0].pos_embedding
    img = torch.randn(b, config.channels, config.image_size, config.image_size, generator=generator)
    text = torch.randint(config.num_tokens, (b, max(2, min(n, config.max_seq_len))), generator=generator)
    return img.to(weight), text.to(weight.device)


def forward(pair: Pair, img: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and logits, as a hand-wired model computes them."""
    loss, (logits, _) = pair[1](text, context=context_of(pair, img), return_outputs=True)
    return loss, logits


def context_of(pair: Pair, img: Tensor) -> Tensor | None:
    """The patch embeddings, if the decoder cross-attends."""
    encoder, decoder = pair
    if not decoder.net.attn_layers.cross_attend:
        return None
    images = img if img.ndim == 4 else img.flatten(0, 1)
    embeddings: Tensor = encoder(images, return_embeddings=True)
    return embeddings.reshape(len(img), -1, embeddings.shape[-1])


def layer_outputs(pair: Pair, img: Tensor, text: Tensor) -> dict[str, Tensor]:
    """What each module gives, in the order in which they finish: the innermost first.

    Named as in a state dict of `PalmE`, with the count of the call behind those that run several times.
    """
    outputs: dict[str, Tensor] = {}
    handles = []

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensors = _flat(output)
            if tensors:
                calls = sum(known.split("#")[0] == name for known in outputs)
                outputs[name + (f"#{calls + 1}" if calls else "")] = tensors[0].clone()

        return hook

    for prefix, root in zip(("encoder", "decoder"), pair, strict=True):
        for name, module in root.named_modules(prefix=prefix):
            handles.append(module.register_forward_hook(keep(name)))
    try:
        with torch.no_grad():
            forward(pair, img, text)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _flat(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [tensor for item in output for tensor in _flat(item)] if isinstance(output, tuple | list) else []


def _logits(pair: Pair, img: Tensor, text: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"logits": forward(pair, img, text)[1]}


def _loss(pair: Pair, img: Tensor, text: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"loss": forward(pair, img, text)[0]}


def _gradients(pair: Pair, img: Tensor, text: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in _named_parameters(pair) if p.requires_grad}
    if not named:
        return {}
    with torch.enable_grad():
        gradients = torch.autograd.grad(forward(pair, img, text)[0], list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, gradients, strict=True) if gradient is not None}


def cached_logits(pair: Pair, img: Tensor, text: Tensor) -> dict[str, Tensor]:
    """The logits of each token but the first, each step reading one more token with the cache of those before."""
    net, cache, outputs = pair[1].net, None, {}
    text = text.masked_fill(text == pair[1].ignore_index, pair[1].pad_value)
    with torch.no_grad():
        context = context_of(pair, img)
        for n in range(1, text.shape[1] + 1):
            step = text[:, :n] if cache is None else text[:, n - 1 : n]
            logits, new = net(
                step, context=context, cache=cache, input_not_include_cache=cache is not None, return_intermediates=True
            )
            cache = new if net.can_cache_kv else None
            outputs[f"token {n}"] = logits[:, -1]
    return outputs


COMPARED: dict[str, Callable[[Pair, Tensor, Tensor], dict[str, Tensor]]] = {
    "layers": layer_outputs,
    "logits": _logits,
    "loss": _loss,
    "gradients": _gradients,
    "cached decoding": cached_logits,
}


def _differ(
    outputs: Callable[[Pair, Tensor, Tensor], dict[str, Tensor]],
    ours: Pair,
    theirs: Pair,
    img: Tensor,
    text: Tensor,
    tolerance: float,
) -> str | None:
    results: list[dict[str, Tensor]] = []
    for which, pair in ("first", ours), ("second", theirs):
        try:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                results.append(outputs(pair, img, text))
        except Exception as error:  # whatever upstream raises is what there is to report
            return f"{which} crashes: {in_one_line(error)}"
    return first_difference(results[0], results[1], tolerance)


def in_one_line(error: Exception) -> str:
    """The kind of an error and the first line of its message, if it has one."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def first_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> str | None:
    """The first name whose tensors differ by more than `tolerance`, and by how much; None if there is none.

    Names on one side only do not count: they are modules that the other side computes without calling.
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


def _named_parameters(pair: Pair) -> Iterator[tuple[str, nn.Parameter]]:
    for prefix, root in zip(("encoder", "decoder"), pair, strict=True):
        yield from root.named_parameters(prefix=prefix)


def _different_parameters(ours: Pair, theirs: Pair) -> str | None:
    for prefix, first, second in zip(("encoder", "decoder"), ours, theirs, strict=True):
        expected, found = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (first, second))
        for name in [*expected, *found]:
            if expected.get(name) != found.get(name):
                here, there = (shapes.get(name, "missing") for shapes in (expected, found))
                return f"{prefix}.{name} is {here} in the first, {there} in the second"
    return None


@contextmanager
def _same_weights(ours: Pair, theirs: Pair) -> Iterator[None]:
    """The second pair has the weights of the first, and its own again afterwards."""
    own = [{name: tensor.clone() for name, tensor in module.state_dict().items()} for module in theirs]
    try:
        for source, module in zip(ours, theirs, strict=True):
            module.load_state_dict({name: tensor.clone() for name, tensor in source.state_dict().items()})
        yield
    finally:
        for module, state in zip(theirs, own, strict=True):
            module.load_state_dict(state)
