"""Check images, context, text and prompts before any of them reaches x-transformers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from palme_xt.config import PalmEConfig


def check_img(img: Any, config: PalmEConfig) -> None:
    """Reject anything but floating-point images `(b, c, h, w)` or `(b, m, c, h, w)`, of the size of the config's ViT.

    With another encoder, the numbers of channels and pixels are up to it. Values are not checked: their range, and any
    NaN, is up to the caller.

    Raises:
        TypeError: If `img` is not a tensor, or not floating point.
        ValueError: If it has the wrong number of dimensions, channels or pixels, or is empty.
    """
    if not isinstance(img, Tensor):
        raise TypeError(f"img is a {type(img).__name__}, must be a torch.Tensor (b, c, h, w): convert it first")
    shape = tuple(img.shape)
    if img.ndim not in (4, 5):
        remedy = "add the batch dimension with img[None]" if img.ndim == 3 else "reshape it"
        raise ValueError(f"img has shape {shape}, must be (b, c, h, w), or (b, m, c, h, w) for m images each: {remedy}")
    if not img.is_floating_point():
        remedy = "preprocess it as the model's training images were, for example with img / 255"
        remedy = remedy if img.dtype == torch.uint8 else "convert it with img.float()"
        raise TypeError(f"img has dtype {img.dtype}, must be floating point: {remedy}")
    if 0 in shape:
        raise ValueError(f"img has shape {shape}, must not be empty: every dimension must be at least 1")
    if config.external_encoder is not None:
        return
    if img.shape[-3] != config.channels:
        last = ": it looks channels-last, move them with img.movedim(-1, -3)" if shape[-1] == config.channels else ""
        remedy = last or f": convert the images, or build the model with vit_kwargs={{'channels': {shape[-3]}}}"
        raise ValueError(f"img has shape {shape} with {shape[-3]} channels, must have {config.channels}{remedy}")
    if shape[-2:] != (config.image_size, config.image_size):
        found, size = f"img has shape {shape} with {shape[-2]}x{shape[-1]} pixels", f"{config.image_size}"
        raise ValueError(f"{found}, must be {size}x{size}, the model's image_size: resize or crop the images")


def needs_context(img: Any, context: Any, context_mask: Any, config: PalmEConfig) -> bool:
    """Return whether the decoder attends to images, or to the context that `encode` returned for some.

    Raises:
        ValueError: If both or neither of `img` and `context` are given, or a model that does not cross-attend gets a
            context.
    """
    if not config.cross_attend:
        for name, value in {"context": context, "context_mask": context_mask}.items():
            if value is not None:
                raise ValueError(f"{name} is only for models that cross-attend: leave it out with cross_attend=False")
    elif (img is None) == (context is None):
        found = "neither img nor context is" if img is None else "both img and context are"
        raise ValueError(f"{found} given: a model that cross-attends needs img, or context=model.encode(img)")
    return config.cross_attend


def check_context(context: Any, mask: Any, config: PalmEConfig, *, encoded: bool) -> None:
    """Reject anything but a context `(b, p, d)`, floating point, and a mask for it, `(b, p)`, bool, or None.

    Args:
        context: The context.
        mask: The mask.
        config: The config of the model, for `encoder_dim`.
        encoded: Whether it is what `encode` returned, for the error message.

    Raises:
        TypeError: If one has the wrong type or dtype.
        ValueError: If one has the wrong shape.
    """
    name, remedy = ("what encode returned", "correct it") if encoded else ("context", "pass what encode returns")
    if not isinstance(context, Tensor) or not context.is_floating_point():
        found = context.dtype if isinstance(context, Tensor) else type(context).__name__
        raise TypeError(f"{name} is {found}, must be a floating-point tensor (b, p, d): {remedy}")
    shape = tuple(context.shape)
    if context.ndim != 3 or shape[2] != config.encoder_dim or 0 in shape:
        rule = f"must be (b, p, encoder_dim={config.encoder_dim}) and not empty"
        raise ValueError(f"{name} has shape {shape}, {rule}: {remedy}")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"context_mask is {found}, must be a bool tensor (b, p), True where the context counts")
    if mask is not None and tuple(mask.shape) != shape[:2]:
        rule = f"must be (b, p) = ({shape[0]}, {shape[1]}): one entry for each patch embedding"
        raise ValueError(f"context_mask has shape {tuple(mask.shape)}, {rule}")


def check_text(text: Any, config: PalmEConfig, lens: Tensor | None = None) -> None:
    """Reject anything but token ids `(b, n)` that upstream's wrapper can learn from.

    On the CPU, values are checked immediately. On CUDA, and inside `torch.compile`, they are checked by
    `torch._assert_async`, which does not wait for the device and raises RuntimeError. Under `torch.func.vmap`, the
    values of all samples are checked together. In `torch.jit.trace`, and in a compiled `vmap`, they are not checked.

    Args:
        text: Token ids of any integer dtype. `ignore_index` marks positions that are not targets.
        config: The config of the model, for `num_tokens`, `ignore_index` and `max_seq_len`.
        lens: `(b,)`, the length of each text, as in upstream's wrapper. Tokens beyond it are not checked.

    Raises:
        TypeError: If `text` is not a tensor of an integer dtype.
        ValueError: If `text` is not 2-d, is empty, is shorter than 2 tokens or too long for absolute positions, or has
            an id out of range or no target at all.
    """
    text = token_ids(text, config, "text")
    shape = tuple(text.shape)
    if shape[1] < 2:
        raise ValueError(f"text has shape {shape}, must have at least 2 tokens: each is predicted from those before it")
    target = first_tokens(text, lens, "lens") & (text != config.ignore_index)
    _check_range(text, target, config, "text", f", or ignore_index={config.ignore_index}")
    require(
        target[:, 1:].any(),
        lambda: f"text has shape {shape} and only ignore_index={config.ignore_index} after its first token; ",
        "text must have at least one target, or the loss is nan: drop such batches",
    )


def check_prompts(
    prompts: Any, prompt_lens: Any, batch: int | None, config: PalmEConfig, device: Any = None, name: str = "prompts"
) -> tuple[Tensor, Tensor | None]:
    """Check prompts, and return them in the form that upstream's wrapper takes.

    Args:
        prompts: `(b, t)`, a list of b tensors `(t,)`, or `(t,)` for all of `batch`. None is the config's BOS.
        prompt_lens: `(b,)`, how many tokens of each row of `prompts (b, t)` count, from the left, or None.
        batch: Number of images, or None if the model does not look at any.
        config: The config of the model, for `num_tokens`, `pad_value` and `max_seq_len`.
        device: Where to put prompts that are not given.
        name: What errors call the prompts.

    Returns:
        `(b, t)`, int64, and the lengths `(b,)`, or None if all prompts have length t.

    Raises:
        TypeError, ValueError: As in `check_text`, with the name `prompts` or `prompt_lens`.
    """
    if prompts is None and config.bos_token is None:
        raise ValueError("prompts is None, and the model has no bos_token: pass prompts, or build it with a bos_token")
    prompts = torch.tensor([config.bos_token], device=device) if prompts is None else prompts
    if isinstance(prompts, list | tuple):
        if prompt_lens is not None:
            raise ValueError("prompt_lens is only for prompts (b, t): a list has its own lengths, so leave it out")
        prompts, prompt_lens = _stack_prompts(prompts, config)
    elif isinstance(prompts, Tensor) and prompts.ndim == 1:
        prompts = prompts.expand(batch or 1, -1)
    prompts = token_ids(prompts, config, name)
    if batch is not None and len(prompts) != batch:
        remedy = "pass one prompt (t,) for all images, or one for each image"
        raise ValueError(f"prompts has batch size {len(prompts)}, must have {batch}, the number of images: {remedy}")
    within = first_tokens(prompts, prompt_lens, "prompt_lens")
    _check_range(prompts, within, config, name)
    return prompts.masked_fill(~within, config.pad_value), None if bool(within.all()) else prompt_lens


def _stack_prompts(prompts: Any, config: PalmEConfig) -> tuple[Tensor, Tensor]:
    if not prompts:
        raise ValueError("prompts is an empty list, must hold a 1-d tensor for each image: start from BOS")
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, Tensor) or prompt.ndim != 1:
            found = tuple(prompt.shape) if isinstance(prompt, Tensor) else type(prompt).__name__
            raise ValueError(f"prompts[{number}] is {found}, must be a 1-d tensor (t,) of token ids")
        token_ids(prompt[None], config, f"prompts[{number}]")
    if len(devices := sorted({str(prompt.device) for prompt in prompts})) > 1:
        raise ValueError(f"prompts are on {', '.join(devices)}, must be on one device: move them first")
    lens = torch.tensor([len(prompt) for prompt in prompts], device=prompts[0].device)
    return pad_sequence([prompt.long() for prompt in prompts], batch_first=True, padding_value=config.pad_value), lens


def check_batches(context: Tensor, text: Tensor, img: Any = None) -> None:
    """Reject a context, and a text, of different batch sizes, which upstream would broadcast if one is 1.

    Args:
        context: `(b, p, d)`.
        text: `(b, n)`.
        img: The images that the context was encoded from, which the error message then names.

    Raises:
        ValueError: If the batch sizes differ.
    """
    images, texts = context.shape[0], text.shape[0]  # not len(), which would fix the batch size of an exported graph
    if images != texts:
        name, source = ("context", context) if img is None else ("img", img)
        transposed = text.shape[1] == images
        remedy = "text is (batch, sequence), so transpose it: text.T" if transposed else "pass one text for each image"
        found = f"text has shape {tuple(text.shape)} and {name} {tuple(getattr(source, 'shape', context.shape))}"
        raise ValueError(f"{found}, must have the same batch size, not {texts} and {images}: {remedy}")


def token_ids(text: Any, config: PalmEConfig, name: str) -> Tensor:
    """Return token ids `(b, n)` as int64, whose values are not checked yet."""
    if not isinstance(text, Tensor):
        raise TypeError(f"{name} is a {type(text).__name__}, must be a torch.Tensor (b, n) of token ids: convert it")
    shape = tuple(text.shape)
    if not _is_int_tensor(text):
        raise TypeError(f"{name} has dtype {text.dtype}, must be an integer dtype: convert it with {name}.long()")
    if text.ndim != 2:
        remedy = f"add the batch dimension with {name}[None]" if text.ndim == 1 else "reshape it"
        raise ValueError(f"{name} has shape {shape}, must be (b, n), batch and sequence: {remedy}")
    if 0 in shape:
        raise ValueError(f"{name} has shape {shape}, must not be empty: both dimensions must be at least 1")
    if config.use_abs_pos_emb and shape[1] > config.max_seq_len:
        rule = f"must have at most max_seq_len={config.max_seq_len} with use_abs_pos_emb=True"
        raise ValueError(f"{name} has {shape[1]} tokens, {rule}: shorten it, or raise max_seq_len")
    # In a narrow dtype, num_tokens and ignore_index would wrap around.
    return text.long()


def first_tokens(text: Tensor, lens: Tensor | None, name: str) -> Tensor:
    """Return `(b, n)`, bool, True for the first `lens (b,)` tokens of `text (b, n)`, or everywhere without `lens`."""
    if lens is None:
        return torch.ones_like(text, dtype=torch.bool)
    count, n = text.shape
    if not _is_int_tensor(lens):
        raise TypeError(f"{name}={lens!r} must be a tensor of ints (b,), the number of tokens in each text")
    if tuple(lens.shape) != (count,):
        raise ValueError(f"{name} has shape {tuple(lens.shape)}, must be ({count},), one length for each text")
    # A graph whose message has the number of tokens would be a graph for this number.
    require(
        ((lens >= 1) & (lens <= n)).all(),
        lambda: f"{name}={lens.tolist()}; ",
        f"{name} must be within 1..{'n' if torch.compiler.is_compiling() else n}, the number of tokens in each text",
    )
    return torch.arange(n, device=text.device) < lens[:, None]


def _check_range(text: Tensor, within: Tensor, config: PalmEConfig, name: str, others: str = "") -> None:
    last = config.num_tokens - 1
    require(
        ~(within & ((text < 0) | (text > last))).any(),
        lambda: f"{name} has ids from {int(text[within].min())} to {int(text[within].max())}; ",
        f"{name} must have ids within 0..num_tokens-1={last}{others}: check the tokenizer, or raise num_tokens",
    )


def _is_int_tensor(ids: Any) -> bool:
    return isinstance(ids, Tensor) and not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)


def require(condition: Tensor, found: Callable[[], str], rule: str) -> None:
    """Raise a ValueError with `found()` and `rule`, or do as `check_text` says, unless `condition` holds."""
    compiling = torch.compiler.is_compiling()
    # A trace would record a check as a constant, and `torch._assert_async` cannot be vmapped.
    if condition.is_meta or torch.jit.is_tracing() or (compiling and torch._C._are_functorch_transforms_active()):  # type: ignore[attr-defined]
        return
    if not compiling and (values := torch.func.debug_unwrap(condition)) is not condition:
        # Under `torch.func.vmap`, control flow can depend on all samples together, but not on one of them.
        condition, found = values.all(), lambda: ""
    if condition.is_cuda or compiling:
        torch._assert_async(condition, rule)
    elif not condition:
        raise ValueError(found() + rule)
