"""What a batch must be: every check of `img` and `text`, before any of it reaches x-transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from palme_xt.config import PalmEConfig


def check_img(img: Any, config: PalmEConfig) -> None:
    """Refuse what is not a batch of floating-point images `(b, c, h, w)`, or `(b, m, c, h, w)`, of the model's size.

    Values are not looked at: any range, and NaN, is the caller's data.

    Raises:
        TypeError: not a tensor, or not floating point.
        ValueError: the wrong number of dimensions, channels or pixels, or empty.
    """
    if not isinstance(img, Tensor):
        raise TypeError(f"img is a {type(img).__name__}, must be a torch.Tensor (b, c, h, w): convert it first")
    shape = tuple(img.shape)
    if img.ndim not in (4, 5):
        remedy = "add the batch dimension with img[None]" if img.ndim == 3 else "reshape it"
        raise ValueError(f"img has shape {shape}, must be (b, c, h, w), or (b, m, c, h, w) for m images each: {remedy}")
    if not img.is_floating_point():
        remedy = "scale it to 0..1 with img / 255" if img.dtype == torch.uint8 else "convert it with img.float()"
        raise TypeError(f"img has dtype {img.dtype}, must be floating point: {remedy}")
    if 0 in shape:
        raise ValueError(f"img has shape {shape}, must not be empty: every dimension must be at least 1")
    if img.shape[-3] != config.channels:
        last = ": it looks channels-last, move them with img.movedim(-1, -3)" if shape[-1] == config.channels else ""
        remedy = last or f": convert the images, or build the model with vit_kwargs={{'channels': {shape[-3]}}}"
        raise ValueError(f"img has shape {shape} with {shape[-3]} channels, must have {config.channels}{remedy}")
    if shape[-2:] != (config.image_size, config.image_size):
        raise ValueError(
            f"img has shape {shape} with {shape[-2]}x{shape[-1]} pixels, must be "
            f"{config.image_size}x{config.image_size}, the model's image_size: resize or crop the images"
        )


def check_text(text: Any, config: PalmEConfig, lens: Tensor | None = None) -> None:
    """Refuse what is not a batch of token ids `(b, n)` that upstream's wrapper can learn from.

    Values are read on the CPU at once; on CUDA, and inside `torch.compile`, by `torch._assert_async`, which does not
    wait for the device and raises RuntimeError.

    Args:
        text: token ids, any integer dtype; `ignore_index` marks what is no target.
        config: gives `num_tokens`, `ignore_index` and `max_seq_len`.
        lens: `(b,)` the length of each text, as in upstream's wrapper; what lies beyond is not looked at.

    Raises:
        TypeError: not a tensor, or not of an integer dtype.
        ValueError: not 2-d, empty, shorter than 2 tokens, too long for absolute positions, an id out of range, or no
            target at all.
    """
    check_token_ids(text, config, "text")
    text = text.long()  # in a narrow dtype, num_tokens and ignore_index would wrap around
    shape = tuple(text.shape)
    if shape[1] < 2:
        raise ValueError(f"text has shape {shape}, must have at least 2 tokens: each is predicted from those before it")
    position = torch.arange(shape[1], device=text.device)
    if lens is not None:
        if not isinstance(lens, Tensor) or lens.dtype.is_floating_point or lens.dtype == torch.bool:
            raise TypeError(f"lens={lens!r} must be a tensor of ints (b,), the number of tokens in each text")
        if tuple(lens.shape) != shape[:1]:
            raise ValueError(f"lens has shape {tuple(lens.shape)}, must be ({shape[0]},), one length for each text")
        _require(
            ((lens >= 1) & (lens <= shape[1])).all(),
            lambda: f"lens={lens.tolist()}; ",
            f"lens must be within 1..{shape[1]}, the number of tokens in each text",
        )
        within = position < lens[:, None]
    else:
        within = torch.ones_like(text, dtype=torch.bool)
    target = within & (text != config.ignore_index)
    _require(
        ~(target & ((text < 0) | (text >= config.num_tokens))).any(),
        lambda: f"text has ids from {int(text[target].min())} to {int(text[target].max())}; ",
        f"text must have ids within 0..num_tokens-1={config.num_tokens - 1}, or ignore_index={config.ignore_index}: "
        "check the tokenizer, or raise num_tokens",
    )
    _require(
        target[:, 1:].any(),
        lambda: f"text has shape {shape} and only ignore_index={config.ignore_index} after its first token; ",
        "text must have at least one target, or the loss is nan: drop such batches",
    )


def check_token_ids(text: Any, config: PalmEConfig, name: str) -> None:
    """The part of `check_text` that asks for no targets: a tensor of token ids, `(b, n)`, not longer than it may be."""
    if not isinstance(text, Tensor):
        raise TypeError(f"{name} is a {type(text).__name__}, must be a torch.Tensor (b, n) of token ids: convert it")
    shape = tuple(text.shape)
    if text.dtype.is_floating_point or text.dtype.is_complex or text.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {text.dtype}, must be an integer dtype: token ids are whole, use torch.long")
    if text.ndim != 2:
        remedy = f"add the batch dimension with {name}[None]" if text.ndim == 1 else "reshape it"
        raise ValueError(f"{name} has shape {shape}, must be (b, n), batch and sequence: {remedy}")
    if 0 in shape:
        raise ValueError(f"{name} has shape {shape}, must not be empty: both dimensions must be at least 1")
    if config.use_abs_pos_emb and shape[1] > config.max_seq_len:
        raise ValueError(
            f"{name} has {shape[1]} tokens, must have at most max_seq_len={config.max_seq_len} with "
            "use_abs_pos_emb=True: shorten it, raise max_seq_len, or use the relative positions alone"
        )


def check_prompts(
    prompts: Any, prompt_lens: Any, batch: int | None, config: PalmEConfig
) -> tuple[Tensor, Tensor | None]:
    """Bring prompts into the form that upstream's wrapper takes.

    Args:
        prompts: `(b, t)`, a list of b 1-d tensors, or `(t,)` for all of `batch`.
        prompt_lens: `(b,)` how many tokens of each row of `prompts (b, t)` count, from the left; or None.
        batch: how many images there are; None if none are looked at.
        config: gives `num_tokens`, `pad_value` and `max_seq_len`.

    Returns:
        `(b, t)`, int64, and `(b,)` lengths, or None where all are of length t.

    Raises:
        TypeError, ValueError: as `check_text`, with the name `prompts` or `prompt_lens`.
    """
    if isinstance(prompts, list | tuple):
        if not prompts:
            raise ValueError("prompts is an empty list, must hold a 1-d tensor for each image: start from BOS")
        if prompt_lens is not None:
            raise ValueError("prompt_lens goes with prompts (b, t): the lengths of a list of prompts are its own")
        for number, prompt in enumerate(prompts):
            if not isinstance(prompt, Tensor) or prompt.ndim != 1:
                found = tuple(prompt.shape) if isinstance(prompt, Tensor) else type(prompt).__name__
                raise ValueError(f"prompts[{number}] is {found}, must be a 1-d tensor (t,) of token ids")
            check_token_ids(prompt[None], config, f"prompts[{number}]")
        devices = {str(prompt.device) for prompt in prompts}
        if len(devices) > 1:
            raise ValueError(f"prompts are on {', '.join(sorted(devices))}, must be on one device: move them first")
        prompt_lens = torch.tensor([len(prompt) for prompt in prompts], device=prompts[0].device)
        prompts = pad_sequence([prompt.long() for prompt in prompts], batch_first=True, padding_value=config.pad_value)
    if isinstance(prompts, Tensor) and prompts.ndim == 1:
        prompts = prompts.expand(batch or 1, -1)
    check_token_ids(prompts, config, "prompts")
    prompts = prompts.long()
    count, longest = prompts.shape
    if batch is not None and count != batch:
        raise ValueError(
            f"prompts are {count}, images {batch}, must be as many: pass one prompt (t,) to share it, or one for each"
        )
    if prompt_lens is None:
        within = torch.ones_like(prompts, dtype=torch.bool)
    else:
        if not isinstance(prompt_lens, Tensor) or prompt_lens.is_floating_point() or prompt_lens.dtype == torch.bool:
            raise TypeError(f"prompt_lens={prompt_lens!r} must be a tensor of ints (b,)")
        if tuple(prompt_lens.shape) != (count,) or prompt_lens.min() < 1 or prompt_lens.max() > longest:
            raise ValueError(
                f"prompt_lens={prompt_lens.tolist()} must be {count} lengths within 1..{longest}, one for each prompt"
            )
        within = torch.arange(longest, device=prompts.device) < prompt_lens[:, None]
        if bool((prompt_lens == longest).all()):
            prompt_lens = None
    _require(
        ~(within & ((prompts < 0) | (prompts >= config.num_tokens))).any(),
        lambda: f"prompts have ids from {int(prompts[within].min())} to {int(prompts[within].max())}; ",
        f"prompts must have ids within 0..num_tokens-1={config.num_tokens - 1}: check the tokenizer",
    )
    return prompts.masked_fill(~within, config.pad_value), prompt_lens


def check_context(context: Any, config: PalmEConfig) -> None:
    """Refuse what `encode` cannot have returned.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: not `(b, p, encoder_dim)`, or empty.
    """
    if not isinstance(context, Tensor) or not context.is_floating_point():
        found = context.dtype if isinstance(context, Tensor) else type(context).__name__
        raise TypeError(f"context is {found}, must be a floating-point tensor (b, p, d): pass what encode returns")
    shape = tuple(context.shape)
    if context.ndim != 3 or shape[2] != config.encoder_dim or 0 in shape:
        raise ValueError(
            f"context has shape {shape}, must be (b, p, encoder_dim={config.encoder_dim}) and not empty: pass what "
            "encode returns"
        )


def check_context_mask(mask: Any, source: Tensor, config: PalmEConfig) -> None:
    """Refuse a mask that does not fit the images, or the context, `source`.

    Raises:
        TypeError: not a bool tensor.
        ValueError: not `(b, p)`.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"context_mask is {found}, must be a bool tensor (b, p), True where the context counts")
    patches = source.shape[1]
    if source.ndim != 3:
        images = source.shape[1] if source.ndim == 5 else 1
        patches = images * (config.image_size // config.patch_size) ** 2
    if tuple(mask.shape) != (source.shape[0], patches):
        raise ValueError(
            f"context_mask has shape {tuple(mask.shape)}, must be (b, p) = ({source.shape[0]}, {patches}), one "
            "entry for each patch embedding"
        )


def check_batches(source: Tensor, text: Tensor, source_name: str = "img") -> None:
    """Refuse images and texts of different batch sizes, which upstream would broadcast where one is 1.

    Raises:
        ValueError: the batch sizes differ.
    """
    images, texts = source.shape[0], text.shape[0]
    if images != texts:
        remedy = "pass one text for each image"
        if text.shape[1] == images:
            remedy = "text is (batch, sequence), so transpose it: text.T"
        raise ValueError(
            f"text has shape {tuple(text.shape)} and {source_name} {tuple(source.shape)}, must have the same batch "
            f"size, not {texts} and {images}: {remedy}"
        )


def _require(condition: Tensor, found: Callable[[], str], rule: str) -> None:
    if condition.is_meta:
        return
    if condition.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(condition, rule)
    elif not condition:
        raise ValueError(found() + rule)
