"""PalmE: a vision transformer whose patch embeddings a causal text decoder cross-attends to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from palme_xt.config import PalmEConfig
from palme_xt.decoding import loop
from palme_xt.decoding import request as requests
from palme_xt.decoding.request import takes_arguments_of
from palme_xt.inputs import check_batches, check_img, check_prompts, check_source, check_text
from palme_xt.wiring import DECODER, ENCODER, build


class PalmE(nn.Module):
    """A vision-language model built from 17 arguments. `PalmEConfig` documents them and the five override dicts.

    Letters in shapes: b batch, m images per sample, c channels, h and w pixels, n tokens, t tokens of a prompt,
    p patches of an image, d encoder_dim, v num_tokens.

    Attributes:
        config: The `PalmEConfig` that the model was built from.
        encoder: An `x_transformers.ViTransformerWrapper`.
        decoder: An `x_transformers.AutoregressiveWrapper` around the `TransformerWrapper` at `decoder.net`, whose
            layers at `decoder.net.attn_layers` are an `x_transformers.Decoder`. State dicts of the same modules wired
            by hand load below `encoder.` and `decoder.` as they are.
    """

    config: PalmEConfig
    encoder: Any
    decoder: Any

    @takes_arguments_of(PalmEConfig)
    def __init__(self, config: PalmEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = build(ENCODER, config)
        self.decoder = build(DECODER, config)
        if not config.cross_attend:
            # DistributedDataParallel would wait for the gradients of these parameters, which never come.
            self.encoder.requires_grad_(False)

    @classmethod
    def from_config(cls, config: PalmEConfig) -> PalmE:
        """Return the model that `config` describes, newly initialised."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="use_abs_pos_emb")  # the config has already warned
            return cls(**{argument.name: getattr(config, argument.name) for argument in fields(config)})

    @classmethod
    def from_modules(cls, encoder: nn.Module, decoder: nn.Module) -> PalmE:
        """Return a model that consists of an encoder and a decoder that were wired by hand, unchanged.

        `model.config` is read from the modules: the 17 arguments always, and overrides if they show in the modules'
        attributes. A warning is issued if a model built from the config would have different parameters. Other
        overrides go unnoticed; `palme_xt.parity.compare(PalmE.from_config(model.config), model)` finds them. A plain
        `x_transformers.Decoder` is kept, and `generate` then reads the whole text at each step, because decoding with
        upstream's cache may crash. To use the cache, load the modules' state dicts into
        `PalmE.from_config(model.config)`.

        Raises:
            TypeError: If the modules are not an `x_transformers.ViTransformerWrapper` and an `AutoregressiveWrapper`
                around a Decoder.
            ValueError: If the modules do not fit together.
        """
        from palme_xt.adoption import describe, warn_unless_described  # imported here, because few models need it

        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model.config, model.encoder, model.decoder = describe(encoder, decoder), encoder, decoder
        warn_unless_described(model.config, encoder, decoder)
        return model

    def encode(self, img: Tensor) -> Tensor:
        """Return the patch embeddings of images, the context that the decoder cross-attends to.

        Args:
            img: `(b, c, h, w)`, or `(b, m, c, h, w)` for m images per sample. Floating point, in whatever range the
                model was trained on. It is cast to the encoder's dtype.

        Returns:
            `(b, p, d)`, or `(b, m * p, d)`, the embeddings of the m images one after another.

        Raises:
            TypeError: If `img` is not a floating-point tensor.
            ValueError: If `img` has the wrong shape.
        """
        check_img(img, self.config)
        img = img.to(self.encoder.pos_embedding.dtype)
        images = img if img.ndim == 4 else rearrange(img, "b m c h w -> (b m) c h w")
        embeddings: Tensor = self.encoder(images, return_embeddings=True)
        return rearrange(embeddings, "(b m) p d -> b (m p) d", b=img.shape[0])

    def forward(self, img: Tensor | None, text: Tensor, **kwargs: Any) -> Any:
        """Return the loss of predicting each token of `text` from the tokens before it and the image.

        Text may be longer than `max_seq_len` unless `use_abs_pos_emb` is on: ALiBi and xPos can extrapolate.

        Args:
            img: As in `encode`. May be None with `context=`, and for a model that does not cross-attend.
            text: Token ids `(b, n)` of an integer dtype, n >= 2. Positions that hold `ignore_index` (-100) are not
                targets; as inputs they are read as `pad_value`.
            **kwargs: Any keyword of `x_transformers.AutoregressiveWrapper.forward`, such as `return_outputs`, `lens` or
                `context_mask`, and `context`, which `encode` returned.

        Returns:
            The scalar loss, in nats per token, or `(loss, (logits, cache))` with `return_outputs=True`, logits
            `(b, n - 1, num_tokens)`, as in upstream. The loss alone takes less time and memory, and may differ from the
            loss with outputs by rounding. Second derivatives need `return_outputs=True`.

        Raises:
            TypeError: If `img` or `text` is not a tensor of the right dtype.
            ValueError: If `img` or `text` has the wrong shape or values, or their batch sizes differ.
        """
        check_text(text, self.config, kwargs.get("lens"))
        return self.decoder(text.long(), **self._with_context(img, text, kwargs))

    @takes_arguments_of(requests.GenerationRequest)
    def generate(self, request: requests.GenerationRequest, **kwargs: Any) -> Tensor:
        """Continue prompts about images. Arguments have upstream's names and meanings where upstream has them.

        With greedy decoding and beam search, each sample gets the same tokens as it would alone, whatever else is in
        the batch. Sampling draws for the whole batch from one stream of random numbers: the same seed gives the same
        tokens for the same batch, but not for a sample in another batch.

        Args:
            img: As in `encode`. None with `context=`, and for a model that does not cross-attend.
            prompts: Token ids `(b, t)`, a list of b tensors `(t_i,)`, or `(t,)`, shared by all images. None starts from
                the config's `bos_token`.
            seq_len: Maximum number of new tokens to decode. None decodes up to `max_seq_len`, prompt included.
            eos_token: The id that ends a text, or a list of such ids. They count only in the generated tokens. None is
                the config's `eos_token`; without one, or with an empty list, all texts get `seq_len` tokens.
            temperature: Divides the logits before sampling. 0 takes the most likely token (greedy).
            filter_logits_fn: Which tokens may be sampled: upstream's `top_k`, `top_p`, `min_p` or `top_a` by name, or a
                function of logits `(b, v)` that sets the other tokens to -inf. Upstream's default `top_k` keeps a tenth
                of the vocabulary.
            filter_kwargs: Keywords for `filter_logits_fn`, such as `{"thres": 0.9}` for `top_p`.
            num_return_sequences: Number of texts for each sample, one after another in the result: samples, or the best
                beams. The image is encoded, and the prompt read, once.
            logits_processor: A function of the texts so far, ids `(b, t)`, and the next tokens' logits `(b, v)` that
                returns the logits to decode from, such as a `LogitsProcessorList` of transformers. It is called before
                the temperature and the filter, also in greedy decoding. Ids begin with the prompt; shorter prompts are
                padded on the left. A beam search calls it with log probabilities, as transformers does.
            prompt_lens: `(b,)`, how many tokens of each row of `prompts (b, t)` count, from the left.
            restrict_to_max_seq_len: Raise an error if the texts would become longer than `max_seq_len`. False allows
                it: with `use_abs_pos_emb`, each step then reads the last `max_seq_len` tokens, without the cache;
                without it, the whole text is read, in which positions are extrapolated.
            cache_kv: Cache keys and values, so that a step reads one token. False reads the whole text at each step,
                and decodes the same tokens. True does so as well with the overrides for which upstream's cache is
                wrong (`palme_xt.decoding.loop.WRONG_WITH_CACHE`).
            compile: Compile the step that reads one token, with `torch.compile`, on its first use. The graph serves all
                lengths and later calls. Compiling takes about a minute, so it is worth it only for many tokens.
            context: The embeddings that `encode` returned, instead of `img`, to encode once for several calls.
            context_mask: `(b, p)`, bool, False where the context does not count.
            generator: Source of the randomness, on the model's device.
            beams: Width of a beam search if greater than 1. A beam search never samples. Only the best texts are
                returned; `beam_search` returns all of them.
            length_penalty, early_stopping: As in `beam_search`.
            **kwargs: Other inputs of the network, such as `condition`, `embed_ids` or `recycle_steps`
                (`palme_xt.decoding.request.Request.PASSED_ON` lists them). Tensors whose first dimension is b hold an
                entry for each sample. Those with an entry for each token must have size 1 there, and so hold for all
                tokens. Type checkers, which do not know these names, accept them from a `dict[str, Any]`.

        Returns:
            The new tokens alone, `(b * num_return_sequences, seq_len)`, int64, with the wrapper's `pad_value` after
            EOS.

        Raises:
            TypeError, ValueError: If an argument is not as above, or `t + seq_len` exceeds `max_seq_len`. After any
                error, the model is unchanged.
        """
        start = self._start(request, kwargs)
        with loop.evaluating(self):
            if request.beams > 1:
                best, _ = loop.beam_search(start(), request, self.config.pad_value)
                return rearrange(best[: request.num_return_sequences], "k b n -> (b k) n")
            steps = list(loop.sample(start, request, self.config.pad_value))
        return F.pad(torch.stack(steps, dim=1), (0, request.seq_len - len(steps)), value=self.config.pad_value)

    @takes_arguments_of(requests.SamplingRequest)
    def stream(self, request: requests.SamplingRequest, **kwargs: Any) -> Iterator[Tensor]:
        """Yield what `generate` returns for the same arguments, step by step, as it is decoded.

        Between steps, and when the iterator is abandoned, the model is in the mode that it was in before. Beams cannot
        be streamed, because the best of them is only known at the end.

        Yields:
            The tokens `(b * num_return_sequences,)` of each step, at most `seq_len` times, until all texts have ended.

        Raises:
            TypeError, ValueError: As in `generate`, immediately rather than at the first step.
        """
        start = self._start(request, kwargs)

        tokens = loop.sample(start, request, self.config.pad_value)
        advance = loop.evaluating(self)(partial(next, tokens, None))
        return iter(advance, None)

    @takes_arguments_of(requests.SearchRequest)
    def beam_search(self, request: requests.SearchRequest, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the most likely texts that a beam search finds, with their scores.

        It is the beam search of transformers, with the same arguments and results. At each step, a beam counts as
        finished if it ends with EOS, or at `seq_len`, and is one of the `beams` best candidates.

        Args:
            beams: Width of the search, and the number of texts that are returned for each sample.
            length_penalty: Texts are ranked by their log probability divided by their length (EOS included) to this
                power. 0 ranks them by log probability alone, which favours short texts.
            early_stopping: When the search for a sample ends. True: with `beams` finished texts. "never": when no
                unfinished text can become better than the worst of these. False, the default of transformers: when
                none would be better if it ended at its present length, which misses longer texts if `length_penalty` is
                positive, and is the same as "never" if not.
            img, prompts, seq_len, eos_token, logits_processor, prompt_lens, restrict_to_max_seq_len, cache_kv, compile,
                context, context_mask, **kwargs: As in `generate`.

        Returns:
            The new tokens `(beams, b, seq_len)`, best first, with the wrapper's `pad_value` after EOS, and the scores
            `(beams, b)`, float32, in nats, in the layout of upstream's wrapper. If a sample has fewer texts than
            `beams`, the rest has the score -inf.

        Raises:
            TypeError, ValueError: As in `generate`.
        """
        start = self._start(request, kwargs)
        with loop.evaluating(self):
            return loop.beam_search(start(), request, self.config.pad_value)

    def score(
        self, img: Tensor | None, prompts: Any, tokens: Tensor, *, eos_token: Any = None, **kwargs: Any
    ) -> Tensor:
        """Return the log probability of each new token of texts, such as those that `generate` returned.

        The probabilities are the model's own: before `temperature`, `filter_logits_fn` and `logits_processor`. As in
        `forward`, the model stays in its mode, and gradients flow unless they are disabled.

        Args:
            img, prompts, eos_token: As in `generate`.
            tokens: `(b, n)`, of an integer dtype.
            **kwargs: `prompt_lens`, `context` and `context_mask`, as in `generate`, and any keyword of
                `x_transformers.TransformerWrapper.forward`.

        Returns:
            `(b, n)`, float32, in nats, 0 after the first EOS. The sum over n is the log probability of the text, its
            score in a `beam_search` with `length_penalty=0`.

        Raises:
            TypeError, ValueError: As in `forward`, with the names of `generate`.
        """
        tokens, _ = check_prompts(tokens, None, None, self.config, name="tokens")
        prompts, lens = check_prompts(prompts, kwargs.pop("prompt_lens", None), len(tokens), self.config, tokens.device)
        lens = torch.full_like(tokens[:, 0], prompts.shape[1]) if lens is None else lens
        # Tokens follow their prompts at once. What follows them has no effect, because the network is causal.
        places = lens[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        text = F.pad(prompts, (0, tokens.shape[1])).scatter(1, places, tokens)
        check_text(text, self.config)
        kwargs = self._with_context(img, text, kwargs)
        logits = self.decoder.net(text[:, :-1], **kwargs).take_along_dim(places[..., None] - 1, dim=1)
        log_probs = logits.float().log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
        loop.refuse_nan(log_probs)
        ends = torch.isin(tokens, self.config.check_eos_token(eos_token).to(tokens.device)).int()
        return log_probs.masked_fill(ends.cumsum(dim=1) > ends, 0)  # type: ignore[no-any-return]

    def _start(self, request: requests.Request, kwargs: dict[str, Any]) -> Callable[[], loop.Texts]:
        """Check a request, and return a function that encodes its images and returns the texts to decode."""
        net = self.decoder.net
        source = check_source(request.img, request.context, request.context_mask, self.config)
        requests.check_network_inputs(kwargs)
        batch, device = None if source is None else len(source), next(net.parameters()).device
        request.check(self.config, batch, device, loop.can_cache(net, self.config))

        return lambda: loop.Texts(net, request, {"context": self._context(source), **kwargs}, self.config)

    def _with_context(self, img: Tensor | None, text: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return keywords for the decoder with the context of `text (b, n)`, if the model cross-attends."""
        source = check_source(img, kwargs.pop("context", None), kwargs.get("context_mask"), self.config)
        if source is not None:
            check_batches(source, text)
        return kwargs | {"context": self._context(source)}

    def _context(self, source: Tensor | None) -> Tensor | None:
        """Return the embeddings of images, or embeddings `(b, p, d)` that are given already, in the encoder's dtype."""
        if source is None:
            return None
        return source.to(self.encoder.pos_embedding.dtype) if source.ndim == 3 else self.encode(source)
