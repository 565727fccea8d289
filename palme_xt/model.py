"""PalmE: a vision transformer whose patch embeddings a causal text decoder cross-attends to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from palme_xt.adoption import describe, warn_unless_described
from palme_xt.config import PalmEConfig
from palme_xt.decoding.loop import FilterLogits, Rows, beam_search, evaluating, sample, wrong_with_cache
from palme_xt.decoding.request import (
    check_beams,
    check_compile,
    check_eos_token,
    check_left_padding,
    check_lengths,
    check_sampling,
)
from palme_xt.inputs import check_batches, check_context, check_context_mask, check_img, check_prompts, check_text
from palme_xt.signature import with_arguments_of
from palme_xt.upstream.cached_decoder import Decoder as CachedDecoder
from palme_xt.wiring import build_decoder, build_encoder


class PalmE(nn.Module):
    """A vision-language model from 17 arguments; `PalmEConfig` documents them and the five override dicts.

    Letters in shapes: b batch, m images a sample, c channels, h and w pixels, n tokens, t tokens of a prompt,
    p patches of an image, d encoder_dim, v num_tokens.

    Attributes:
        config: the `PalmEConfig` it was built from.
        encoder: an `x_transformers.ViTransformerWrapper`.
        decoder: an `x_transformers.AutoregressiveWrapper` around the `TransformerWrapper` at `decoder.net`, whose
            layers at `decoder.net.attn_layers` are an `x_transformers.Decoder`. State dicts of the same modules wired
            by hand load below `encoder.` and `decoder.` as they are.
    """

    config: PalmEConfig
    encoder: Any
    decoder: Any

    @with_arguments_of(PalmEConfig)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.config = PalmEConfig(*args, **kwargs)
        self.encoder = build_encoder(self.config)
        self.decoder = build_decoder(self.config)
        if not self.config.cross_attend:
            # A parameter that needs a gradient and never gets one makes DistributedDataParallel wait for it.
            self.encoder.requires_grad_(False)

    @classmethod
    def from_config(cls, config: PalmEConfig) -> PalmE:
        """The model that `config` describes, newly initialised."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="use_abs_pos_emb")  # the config has said so already
            return cls(**{argument.name: getattr(config, argument.name) for argument in fields(config)})

    @classmethod
    def from_modules(cls, encoder: nn.Module, decoder: nn.Module) -> PalmE:
        """Adopt an encoder and a decoder that were wired by hand, as they are.

        `model.config` is read off them: the 17 arguments always, overrides where they show in parameters; a warning
        says if it would build other parameters. What has none is not seen: `compare(PalmE.from_config(model.config),
        model)` of `palme_xt.parity` tells. A plain `x_transformers.Decoder` stays one, and `generate` reads the whole
        text at each step, because upstream's cache may crash. To decode with the cache, load the modules' state dicts
        into `PalmE.from_config(model.config)`.

        Raises:
            TypeError: not an `x_transformers.ViTransformerWrapper`, or not an `AutoregressiveWrapper` around a Decoder.
            ValueError: they do not fit together.
        """
        config = describe(encoder, decoder)
        warn_unless_described(config, encoder, decoder)
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model.config, model.encoder, model.decoder = config, encoder, decoder
        return model

    def encode(self, img: Tensor) -> Tensor:
        """Patch embeddings of images, the context that the decoder cross-attends to.

        Args:
            img: `(b, c, h, w)`, or `(b, m, c, h, w)` for m images a sample; floating point, in whatever range the model
                was trained on; cast to the encoder's dtype.

        Returns:
            `(b, p, d)`, or `(b, m * p, d)`: the m images' embeddings one after another.

        Raises:
            TypeError: `img` is not a floating-point tensor.
            ValueError: `img` has the wrong shape.
        """
        check_img(img, self.config)
        img = img.to(self.encoder.pos_embedding.dtype)
        images = img if img.ndim == 4 else rearrange(img, "b m c h w -> (b m) c h w")
        embeddings: Tensor = self.encoder(images, return_embeddings=True)
        return rearrange(embeddings, "(b m) p d -> b (m p) d", b=img.shape[0])

    def forward(self, img: Tensor | None, text: Tensor, **kwargs: Any) -> Any:
        """The loss of predicting each token of `text` from the tokens before it and the image.

        Text may be longer than `max_seq_len` unless `use_abs_pos_emb` is on: ALiBi and xPos exist to extrapolate.

        Args:
            img: as in `encode`. Not looked at, and may be None, with `cross_attend=False`; None as well where
                `context=` passes embeddings that `encode` has made before.
            text: `(b, n)` token ids, of an integer dtype, n >= 2. Positions that hold `ignore_index` (-100) are no
                targets; as inputs they are read as `pad_value`.
            **kwargs: whatever `x_transformers.AutoregressiveWrapper.forward` takes: `return_outputs`, `lens`,
                `context_mask`, ...

        Returns:
            What upstream returns: the scalar loss, in nats a token, or `(loss, (logits, cache))` with
            `return_outputs=True`, logits `(b, n - 1, num_tokens)`. The loss alone takes less time and memory, and may
            differ from the other by rounding; second derivatives need the other.

        Raises:
            TypeError: `img` or `text` is not a tensor of the right dtype.
            ValueError: `img` or `text` has the wrong shape or values, or their batch sizes differ.
        """
        check_text(text, self.config, kwargs.get("lens"))
        context = kwargs.pop("context", None)
        source = self._check_source(img, context, kwargs.get("context_mask"))
        if source is not None:
            check_batches(source, text, "img" if context is None else "context")
            kwargs["context"] = self.encode(source) if context is None else source
        return self.decoder(text.long(), **kwargs)

    def generate(
        self,
        img: Tensor | None,
        prompts: Tensor | list[Tensor],
        seq_len: int,
        *,
        eos_token: int | None = None,
        temperature: float = 1.0,
        filter_logits_fn: str | FilterLogits = "top_k",
        filter_kwargs: dict[str, Any] | None = None,
        prompt_lens: Tensor | None = None,
        restrict_to_max_seq_len: bool = True,
        cache_kv: bool = True,
        compile: bool = False,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        beams: int = 1,
        length_penalty: float = 0.0,
    ) -> Tensor:
        """Continue prompts about images. Names and meanings are upstream's, where upstream has them.

        Greedy and beam search give each sample the tokens that it gets alone, whatever else is in the batch. Sampling
        draws for the whole batch from one stream of random numbers: the same seed gives the same tokens for the same
        batch, not for a sample in another batch.

        Args:
            img: as in `encode`; None with `context=`, and for a model that does not cross-attend.
            prompts: token ids `(b, t)`; a list of b tensors `(t_i,)`; or `(t,)`, shared by all images.
            seq_len: how many new tokens at most.
            eos_token: the id that ends a text, counted in what is generated only; None: none does.
            temperature: divides the logits before sampling; 0 takes the most likely token (greedy).
            filter_logits_fn: which tokens may be sampled: upstream's `top_k`, `top_p`, `min_p` or `top_a` by name, or a
                function of logits `(b, v)` that sets others to -inf. Upstream's default `top_k` keeps a tenth of the
                vocabulary.
            filter_kwargs: keywords for it, `{"thres": 0.9}` for `top_p`, say.
            prompt_lens: `(b,)`: how many tokens of each row of `prompts (b, t)` count, from the left.
            restrict_to_max_seq_len: refuse to go beyond `max_seq_len`. False goes on, without a sliding window, in
                models that have no absolute positions.
            cache_kv: keep keys and values, so that a step reads one token. False reads the whole text at each step, for
                the same tokens; so does True with the overrides that upstream's cache is wrong for
                (`palme_xt.decoding.loop.wrong_with_cache`).
            compile: compile the step that reads one token, with `torch.compile`, when it is first made; the graph
                serves all lengths and later calls. Worth its minute for many tokens.
            context: what `encode` returned, instead of `img`, to encode once for several calls.
            context_mask: `(b, p)` bool, False where the context does not count.
            generator: source of the randomness, on the model's device.
            beams: more than 1: beam search of that width, which never samples, and of which the best text is returned;
                `beam_search` returns all.
            length_penalty: as in `beam_search`.

        Returns:
            The new tokens alone, `(b, seq_len)`, int64, after EOS the wrapper's `pad_value`.

        Raises:
            TypeError, ValueError: an argument is not as above, or `t + seq_len` exceeds `max_seq_len`. The model is
                left as it was, after any error.
        """
        start = self._start(
            img,
            prompts,
            seq_len,
            prompt_lens,
            eos_token,
            restrict_to_max_seq_len,
            cache_kv,
            compile,
            context,
            context_mask,
        )
        sampling = check_sampling(temperature, filter_logits_fn, filter_kwargs, generator)
        if not check_beams(beams, length_penalty, sampling):
            with evaluating(self):
                steps = list(sample(start(), seq_len, sampling, eos_token=eos_token, pad_value=self.config.pad_value))
                return F.pad(torch.stack(steps, dim=1), (0, seq_len - len(steps)), value=self.config.pad_value)
        tokens, _ = self._beam_search(start, seq_len, beams, eos_token, length_penalty)
        return tokens[0]

    def beam_search(
        self,
        img: Tensor | None,
        prompts: Tensor | list[Tensor],
        seq_len: int,
        *,
        beams: int = 4,
        eos_token: int | None = None,
        length_penalty: float = 0.0,
        prompt_lens: Tensor | None = None,
        restrict_to_max_seq_len: bool = True,
        cache_kv: bool = True,
        compile: bool = False,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The most likely texts that a beam search finds, with their scores.

        Args:
            beams: width of the search, and how many texts of each sample are returned.
            length_penalty: texts compare by their log probability over their length (EOS included) to this power; 0
                compares the bare log probabilities, which favours short texts.
            img, prompts, seq_len, eos_token, prompt_lens, restrict_to_max_seq_len, cache_kv, compile, context,
                context_mask: as in `generate`.

        Returns:
            As upstream's wrapper returns beams: the new tokens `(beams, b, seq_len)`, best first, after EOS the
            wrapper's `pad_value`; and the scores `(beams, b)`, float32, in nats. Where a sample has fewer texts than
            `beams`, the rest scores -inf.

        Raises:
            TypeError, ValueError: as `generate`.
        """
        start = self._start(
            img,
            prompts,
            seq_len,
            prompt_lens,
            eos_token,
            restrict_to_max_seq_len,
            cache_kv,
            compile,
            context,
            context_mask,
        )
        check_beams(beams, length_penalty)
        return self._beam_search(start, seq_len, beams, eos_token, length_penalty)

    def _beam_search(
        self, start: Callable[[], Rows], seq_len: int, beams: int, eos_token: int | None, length_penalty: float
    ) -> tuple[Tensor, Tensor]:
        with evaluating(self):
            tokens, scores = beam_search(
                start(),
                seq_len,
                beams,
                eos_token=eos_token,
                pad_value=self.config.pad_value,
                length_penalty=length_penalty,
            )
        return rearrange(tokens, "b k n -> k b n"), rearrange(scores, "b k -> k b")

    def stream(
        self,
        img: Tensor | None,
        prompts: Tensor | list[Tensor],
        seq_len: int,
        *,
        eos_token: int | None = None,
        temperature: float = 1.0,
        filter_logits_fn: str | FilterLogits = "top_k",
        filter_kwargs: dict[str, Any] | None = None,
        prompt_lens: Tensor | None = None,
        restrict_to_max_seq_len: bool = True,
        cache_kv: bool = True,
        compile: bool = False,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """What `generate` returns for the same arguments, step by step, as it is decoded.

        Between steps, and once it is abandoned, the model is in the mode that it was in before. There are no beams
        here: which of them is best is known at the end only.

        Yields:
            The tokens `(b,)` of each step, at most `seq_len` times, until all texts have ended.

        Raises:
            TypeError, ValueError: as `generate`, at once and not at the first step.
        """
        start = self._start(
            img,
            prompts,
            seq_len,
            prompt_lens,
            eos_token,
            restrict_to_max_seq_len,
            cache_kv,
            compile,
            context,
            context_mask,
        )
        sampling = check_sampling(temperature, filter_logits_fn, filter_kwargs, generator)

        def steps() -> Iterator[Tensor]:
            with evaluating(self):
                tokens = sample(start(), seq_len, sampling, eos_token=eos_token, pad_value=self.config.pad_value)
            while True:
                with evaluating(self):
                    step = next(tokens, None)
                if step is None:
                    return
                yield step

        return steps()

    def _start(
        self,
        img: Tensor | None,
        prompts: Tensor | list[Tensor],
        seq_len: int,
        prompt_lens: Tensor | None,
        eos_token: int | None,
        restrict_to_max_seq_len: bool,
        cache_kv: bool,
        compile: bool,
        context: Tensor | None,
        context_mask: Tensor | None,
    ) -> Callable[[], Rows]:
        """Check what is to be decoded; when called, encode the images."""
        source = self._check_source(img, context, context_mask)
        batch = None if source is None else len(source)
        prompts, prompt_lens = check_prompts(prompts, prompt_lens, batch, self.config)
        check_lengths(prompts.shape[1], seq_len, restrict_to_max_seq_len, self.config)
        check_eos_token(eos_token, self.config)

        if prompt_lens is not None:
            check_left_padding(self.config)
        # A decoder adopted from upstream may crash with its cache, and may have overrides that nobody knows of.
        adopted = not isinstance(self.decoder.net.attn_layers, CachedDecoder)
        can_cache = not (adopted or self.decoder.net.looped or wrong_with_cache(self.config))
        check_compile(compile, cache_kv, can_cache and self.decoder.net.can_cache_kv)

        def start() -> Rows:
            return Rows(
                self.decoder.net,
                prompts,
                prompt_lens,
                pad_value=self.config.pad_value,
                cache_kv=cache_kv and can_cache,
                context=source if context is not None or source is None else self.encode(source),
                context_mask=context_mask,
                compile=compile,
            )

        return start

    def _check_source(self, img: Tensor | None, context: Tensor | None, context_mask: Tensor | None) -> Tensor | None:
        """The images or the context to use, checked; None for a model that does not cross-attend."""
        if not self.config.cross_attend:
            for name, value in {"context": context, "context_mask": context_mask}.items():
                if value is not None:
                    raise ValueError(f"{name} is for models that cross-attend: leave it out with cross_attend=False")
            return None
        if (img is None) == (context is None):
            found = "neither img nor context is" if img is None else "both img and context are"
            raise ValueError(
                f"{found} given: a model with cross_attend=True needs either img, or context=model.encode(img)"
            )
        if context is not None:
            check_context(context, self.config)
        else:
            check_img(img, self.config)
        source = img if context is None else context.to(self.encoder.pos_embedding.dtype)
        if source is not None and context_mask is not None:
            check_context_mask(context_mask, source, self.config)
        return source
