"""The one place where x-transformers' modules are put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, TypeVar

from x_transformers import ViTransformerWrapper

from palme_xt.config import PalmEConfig
from palme_xt.upstream.loss import AutoregressiveWrapper
from palme_xt.upstream.modules import Decoder, Encoder, TransformerWrapper

Built = TypeVar("Built")


def build_encoder(config: PalmEConfig) -> ViTransformerWrapper:
    """The vision transformer of `config`.

    Raises:
        ValueError: upstream refuses a value, or a combination, in `vit_kwargs` or `encoder_kwargs`.
    """
    return _build(
        ViTransformerWrapper,
        config.for_vit(),
        attn_layers=_build(Encoder, config.for_encoder()),
    )


def build_decoder(config: PalmEConfig) -> AutoregressiveWrapper:
    """The causal text decoder of `config`; its network is at `.net`, its layers at `.net.attn_layers`.

    Raises:
        ValueError: upstream refuses a value, or a combination, in the other override dicts.
    """
    return _build(
        AutoregressiveWrapper,
        config.for_autoregressive(),
        net=_build(
            TransformerWrapper,
            config.for_transformer(),
            attn_layers=_build(Decoder, config.for_decoder()),
        ),
    )


def _build(upstream: Callable[..., Built], keywords: Mapping[str, Any], **modules: Any) -> Built:
    try:
        return upstream(**keywords, **modules)
    except (AssertionError, TypeError, ValueError, RuntimeError) as refusal:
        given = ", ".join(f"{name}={value!r}" for name, value in keywords.items())
        raise ValueError(
            f"x-transformers {version('x-transformers')} refuses {upstream.__name__}({given}): "
            f"{str(refusal) or 'it gives no reason'}"
        ) from refusal
