"""Compare two modules: parameters, buffers, the output of every layer, outputs, gradients, and cached decoding.

from palme_xt.parity import compare

assert compare(PalmE(), my_hand_wired_model)
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from x_transformers import AutoregressiveWrapper, ViTransformerWrapper

from palme_xt.parity.numbers import Numbers, describe_crash, describe_value, first_difference
from palme_xt.parity.observation import a_weight, cached_logits, gradients, observe, running
from palme_xt.parts import Inputs, Wired, draw_inputs, find_parts, part_name

CHECKS = ("parameters", "buffers", "layers", "outputs", "logits", "cached decoding", "gradients")
STATIC = ("parameters", "buffers")  # the checks that call no forward

Pair = tuple[nn.Module, nn.Module]
Rename = Callable[[str], str]
_Found = Numbers | str  # what a check compares, or the error that the model raises


class Outcome(NamedTuple):
    """The outcome of one check, with the difference, or the reason why it could not be checked."""

    result: Literal["agrees", "differs", "could not be checked"]
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """The result of `compare`. It prints as a table.

    A report is true if no check differs and at least one agrees: one of those that call forward, unless only parameters
    and buffers were to be checked. A check that could not be made does not count: the reason may be that both models
    crash in it, and a model agrees with itself even then.

    Attributes:
        outcomes: The outcome of each check, in order.
        tolerance: Largest absolute difference that was accepted: 0 is bitwise, None is what rounding explains.
    """

    outcomes: dict[str, Outcome]
    tolerance: float | None

    @property
    def differences(self) -> dict[str, str]:
        """The checks that differ, each with its first difference."""
        return {name: reason for name, (result, reason) in self.outcomes.items() if result == "differs"}

    def __bool__(self) -> bool:
        telling = [outcome for name, outcome in self.outcomes.items() if name not in STATIC] or self.outcomes.values()
        return not self.differences and any(outcome.result == "agrees" for outcome in telling)

    def __str__(self) -> str:
        within = {None: " within rounding", 0.0: " bitwise"}.get(self.tolerance, f" within {self.tolerance}")
        width = max(map(len, self.outcomes))
        rows = [f"x-transformers {version('x-transformers')}, torch {torch.__version__}"]
        for name, (result, reason) in self.outcomes.items():
            rows.append(f"{name:{width}}  {result}{f': {reason}' if reason else within}")
        return "\n".join(rows)

    __repr__ = __str__  # pytest prints it when `assert compare(...)` fails


def compare(
    first: nn.Module | Pair,
    second: nn.Module | Pair,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    tolerance: float | None = 0.0,
    checks: Iterable[str] = CHECKS,
) -> Report:
    """Compare two modules on the same inputs and with the weights of the first.

    Each module's own forward is called, in eval mode, and in training mode for the gradients, always with the same
    random numbers. Afterwards, both modules have their own weights, buffers and modes again, and no gradients are kept.

    If the names of the parameters differ, but each module holds one ViT and one decoder, these are compared under the
    names that they have in `PalmE`. A `PalmE` is run inside `exactly()`: otherwise, its loss, its layer norms and its
    causal attention with ALiBi differ from upstream's by rounding.

    The checks are these:

    - parameters: names, shapes, and dtypes if bitwise, of everything in the state dict. If they differ, nothing else is
      compared.
    - buffers: their values before the second module gets those of the first. Buffers outside the state dict may be
      caches, and are compared if both modules have one of the same name and shape.
    - layers: the first tensor that each module inside returns, as far as both have a module of that name.
    - outputs: everything in the output, in tuples, lists, mappings and dataclasses.
    - gradients: of the first output if it is a floating-point scalar, such as a loss, otherwise of a fixed random
      projection of the outputs, for each parameter that gets one.
    - logits, cached decoding: what the first call of a `TransformerWrapper` of a Decoder in forward returns, and what
      the module returns for the same ids and context, one token at a time, with its key-value cache. If only one side
      crashes with its cache, as x-transformers does with ALiBi and rotary positions, that could not be checked.

    Args:
        first: Any module, or the pair (encoder, decoder) of a `ViTransformerWrapper` and an `AutoregressiveWrapper`.
        second: As `first`.
        *inputs: The positional arguments of forward, which may be nested. Each side gets copies on the device of its
            parameters, and in their dtype if they are floating point. Without `inputs` and `kwargs`, inputs are drawn
            for modules of x-transformers and models of these; see `palme_xt.parts.draw_inputs`.
        kwargs: The keyword arguments of forward.
        tolerance: Largest accepted absolute difference between two numbers. The default, 0, is bitwise. None accepts
            what rounding explains, to compare across dtypes and devices: differences up to the square root of the
            epsilon of the less precise dtype, as a share of the largest value of the tensor. This is half of the
            digits: 3e-4 for float32, 0.09 for bfloat16. For gradients, in which the rounding of forward and backward
            adds up, it is four times as much.
        checks: The `CHECKS` to make.

    Raises:
        TypeError: If `first` or `second` is not as above, or if inputs cannot be drawn.
        ValueError: If a check is unknown, there is none, or the tolerance is negative.
    """
    checks = tuple(checks)
    if not checks or not set(checks) <= set(CHECKS):
        raise ValueError(f"checks={checks} must be at least one of {', '.join(CHECKS)}")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance} must be 0 (bitwise) or more, or None for what rounding explains")
    models = _module(first), _module(second)
    given = (inputs, kwargs or {}) if inputs or kwargs is not None else _draw(*models)
    sides = list(zip(models, _renames(*models), strict=True))
    found = [_static(model, rename, bitwise=tolerance == 0) for model, rename in sides]
    judge = partial(_judge, absolute=tolerance or 0.0, share=_rounding(models) if tolerance is None else 0.0)
    parameters = judge("parameters", *found)
    if parameters.result == "differs":
        return Report({"parameters": parameters}, tolerance)
    with running(models[1]):
        weights, copies = (_renamed(_state(model), rename) for model, rename in sides)
        for name, value in copies.items():
            value.copy_(weights[name])
        for side, (model, rename) in zip(found, sides, strict=True):
            side |= _computed(model, given, rename, set(checks) - set(STATIC))
    return Report({check: judge(check, *found) for check in CHECKS if check in checks}, tolerance)


def _module(model: nn.Module | Pair) -> nn.Module:
    """Return a module, or the module that a pair of an encoder and a decoder makes."""
    if isinstance(model, tuple | list):
        if len(model) == 2 and all(map(isinstance, model, (ViTransformerWrapper, AutoregressiveWrapper))):
            return Wired(*model)
        given = ", ".join(type(module).__name__ for module in model)
        raise TypeError(f"a pair ({given}) must be (encoder, decoder): ViTransformerWrapper, AutoregressiveWrapper")
    if not isinstance(model, nn.Module):
        raise TypeError(f"{model!r} must be a module, or the pair (encoder, decoder)")
    return model


def _draw(*models: nn.Module) -> Inputs:
    """Return inputs that fit the first model, if the forward of each can be called with them."""
    args, kwargs = draw_inputs(models[0])
    for model in models:
        signature = inspect.signature(model.forward)
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            found = f"{type(model).__name__}.forward{signature} does not take the inputs drawn for the first model"
            raise TypeError(f"{found}: pass inputs that both take, compare(first, second, *inputs)") from error
    return args, kwargs


def _renames(first: nn.Module, second: nn.Module) -> tuple[Rename, Rename]:
    """Return functions from the names in each module to common names: those of `PalmE` if more of them are equal."""
    ours, theirs = (partial(part_name, parts=find_parts(model)) for model in (first, second))
    kept = _state(first).keys() ^ _state(second).keys()
    renamed = _renamed(_state(first), ours).keys() ^ _renamed(_state(second), theirs).keys()
    return (ours, theirs) if len(renamed) < len(kept) else (str, str)


def _renamed(values: Numbers, rename: Rename) -> Numbers:
    return {rename(name): value for name, value in values.items()}


def _state(model: nn.Module) -> Numbers:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _static(model: nn.Module, rename: Rename, *, bitwise: bool) -> dict[str, _Found]:
    """Return what can be compared without calling forward: shapes, and buffers by name and shape."""
    state = {rename(name): describe_value(value, dtype=bitwise) for name, value in _state(model).items()}
    buffers = {f"{rename(name)} {tuple(value.shape)}": value.clone() for name, value in model.named_buffers()}
    return {"parameters": state, "buffers": buffers}


def _rounding(models: Iterable[nn.Module]) -> float:
    dtypes = [a_weight(model, default=torch.zeros(())).dtype for model in models]
    return float(max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5)


def _computed(model: nn.Module, inputs: Inputs, rename: Rename, checks: Collection[str]) -> dict[str, _Found]:
    """Return what a model computes for some of the checks that call forward, or the error that it raises."""
    if not checks:
        return {}
    with running(model):
        seen = _attempt(lambda: observe(model, inputs))
        if isinstance(seen, str):
            return dict.fromkeys(checks, seen)
        call = seen.call
        numbers: dict[str, Callable[[], Numbers]] = {
            "layers": lambda: _renamed(seen.layers, rename),
            "outputs": lambda: seen.outputs,
            "logits": lambda: {"logits": call.logits} if call else {},
            "cached decoding": lambda: cached_logits(call) if call else {},
            "gradients": lambda: _renamed(gradients(model, inputs), rename),  # last, because it leaves eval mode
        }
        return {check: _attempt(function) for check, function in numbers.items() if check in checks}


def _attempt(function: Callable[[], Any]) -> Any:
    """Return the result of a function, or a description of the error that it raises."""
    try:
        return function()
    except Exception as error:  # any error of a model is a result
        return describe_crash(error)


def _judge(
    check: str, first: Mapping[str, _Found], second: Mapping[str, _Found], absolute: float, share: float
) -> Outcome:
    """Return the outcome of a check, from what was found in each model."""
    ours, theirs = first[check], second[check]
    if isinstance(ours, str) or isinstance(theirs, str):
        if ours == theirs:
            return Outcome("could not be checked", f"both raise {ours}")
        sides = {"first": ours, "second": theirs}
        raised = [f"the {which} raises {error}" for which, error in sides.items() if isinstance(error, str)]
        # Upstream's cache fails with options with which that of `PalmE` works.
        return Outcome("could not be checked" if check == "cached decoding" else "differs", "; ".join(raised))
    difference = first_difference(ours, theirs, absolute, 4 * share if check == "gradients" else share)
    alone = [name for name in [*ours, *theirs] if name not in ours or name not in theirs]
    if difference is None and alone and check in ("parameters", "outputs", "gradients"):
        difference = f"{alone[0]} is only in the {'first' if alone[0] in ours else 'second'}"
    if difference is not None:
        return Outcome("differs", difference)
    if len(alone) == len(ours) + len(theirs):
        return Outcome("could not be checked", "there is nothing to compare")
    for name, value in ours.items():
        if isinstance(value, Tensor) and value.isnan().any():
            return Outcome("could not be checked", f"{name} has nan in both")
    return Outcome("agrees")
