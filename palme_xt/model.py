"""PalmE: a vision transformer whose patch embeddings a causal text decoder cross-attends to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from palme_xt.config import PalmEConfig, UnprovenConfig
from palme_xt.decoding import loop
from palme_xt.decoding.probe import is_right
from palme_xt.decoding.request import GenerationRequest, Request, SamplingRequest, SearchRequest, takes_arguments_of
from palme_xt.inputs import check_batches, check_img, check_source, check_text
from palme_xt.upstream.loss import AutoregressiveWrapper
from palme_xt.wiring import DECODER, ENCODER, build

Outputs = tuple[Tensor, tuple[Tensor, Any]]  # (loss, (logits, cache))


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
        adopted = vars(self).pop("_adopted", None)  # what `from_modules` left here
        super().__init__()
        self.config, self.encoder, self.decoder = adopted or (config, build(ENCODER, config), build(DECODER, config))
        if not (config.cross_attend or adopted):
            # DistributedDataParallel would wait for the gradients of these parameters, which never come.
            self.encoder.requires_grad_(False)

    @classmethod
    def from_config(cls, config: PalmEConfig) -> Self:
        """Return the model that `config` describes, newly initialised.

        Raises:
            ValueError: If the config is unproven (see `from_modules`), or upstream rejects it.
        """
        if isinstance(config, UnprovenConfig):
            config.refuse()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="use_abs_pos_emb|decoder_kwargs")  # the config has already warned
            return cls(**{argument.name: getattr(config, argument.name) for argument in fields(config)})

    @classmethod
    def from_modules(cls, encoder: nn.Module, decoder: nn.Module, **arguments: Any) -> Self:
        """Return a model that consists of an encoder and a decoder that were wired by hand, unchanged.

        `model.config` is read from the modules' attributes, and proven: a model built from it has the same parameters,
        and computes bitwise the same from the same weights (`palme_xt.adoption.find_difference` says how this is
        checked; it takes about as long as building the model). If it differs, a warning names the first difference.
        The model runs all the same, but what relies on its config raises an error: `from_config`, `to_source`, saving
        and pushing. To resolve it, pass what cannot be read, for example `decoder_kwargs={"ff_glu": True}`, or build
        the model from its arguments, and load the modules' state dicts.

        A plain `x_transformers.Decoder` is kept, and `generate` then reads the whole text at each step if decoding with
        upstream's cache crashes, as it does with ALiBi and rotary positions. To use the cache, load the modules' state
        dicts into `PalmE.from_config(model.config)`.

        Args:
            encoder: An `x_transformers.ViTransformerWrapper`.
            decoder: An `x_transformers.AutoregressiveWrapper` around a `TransformerWrapper` with a `Decoder`.
            **arguments: Arguments of `PalmEConfig` that cannot be read from the modules. Override dicts are merged with
                what is read. Other keywords go to the constructor of a subclass.

        Raises:
            TypeError: If the modules are of other classes, or a subclass needs other arguments.
            ValueError: If the modules do not fit together, or an argument is invalid.
        """
        from palme_xt.adoption import adopt  # imported here, because few models need it

        names = [argument.name for argument in fields(PalmEConfig)]
        config = adopt(encoder, decoder, **{name: arguments.pop(name) for name in names if name in arguments})
        model = cls.__new__(cls)
        vars(model)["_adopted"] = config, encoder, decoder  # for `__init__`, which a subclass may extend
        cls.__init__(model, **{name: getattr(config, name) for name in names}, **arguments)
        return model

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights, as `torch.nn.Module.load_state_dict` does.

        Raises:
            RuntimeError: If the weights do not fit. If only their names differ, for example by the prefix `module.`
                that a wrapper added, the message has the lines of Python that load them.
        """
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            from palme_xt.adoption import find_renaming

            if not (strict and (lines := find_renaming(self, state_dict))):
                raise
            raise RuntimeError(f"{error}\nThe weights fit under other names. Load them with:\n{lines}") from error

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
        images = img.flatten(0, -4).to(self.encoder.pos_embedding.dtype)  # (b m) c h w
        embeddings: Tensor = self.encoder(images, return_embeddings=True)
        return rearrange(embeddings, "(b m) p d -> b (m p) d", b=img.shape[0])

    @overload
    def forward(
        self, img: Tensor | None, text: Tensor, *, return_outputs: Literal[False] = ..., **kwargs: Any
    ) -> Tensor: ...

    @overload
    def forward(self, img: Tensor | None, text: Tensor, *, return_outputs: Literal[True], **kwargs: Any) -> Outputs: ...

    @overload
    def forward(self, img: Tensor | None, text: Tensor, *, return_outputs: bool, **kwargs: Any) -> Any: ...

    def forward(
        self,
        img: Tensor | None,
        text: Tensor,
        *,
        return_outputs: bool = False,
        lens: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the loss of predicting each token of `text` from the tokens before it and the image.

        Text may be longer than `max_seq_len` unless `use_abs_pos_emb` is on: ALiBi and xPos can extrapolate.

        Args:
            img: As in `encode`. May be None with `context=`, and for a model that does not cross-attend.
            text: Token ids `(b, n)` of an integer dtype, n >= 2. Positions that hold `ignore_index` (-100) are not
                targets; as inputs they are read as `pad_value`.
            return_outputs: Return the logits and upstream's cache too.
            lens: `(b,)`, int, the number of tokens in each text. The tokens after them are neither checked nor targets.
            context: `(b, p, d)`, the embeddings that `encode` returned, instead of `img`.
            context_mask: `(b, p)`, bool, False where the context does not count.
            **kwargs: Any other keyword of upstream's wrapper and its network, such as `prepend_embeds`.

        Returns:
            The scalar loss, in nats per token, or `(loss, (logits, cache))` with `return_outputs=True`, logits
            `(b, n - 1, num_tokens)`, as in upstream. The loss alone takes less time and memory, and may differ from the
            loss with outputs by rounding. Second derivatives need `return_outputs=True`.

        Raises:
            TypeError: If `img` or `text` is not a tensor of the right dtype.
            ValueError: If `img` or `text` has the wrong shape or values, or their batch sizes differ.
        """
        check_text(text, self.config, lens)
        source = check_source(img, context, context_mask, self.config)
        if source is not None:
            check_batches(source, text)
            kwargs |= {"context": self._context(source), "context_mask": context_mask}
        return self.decoder(text.long(), return_outputs=return_outputs, lens=lens, **kwargs)

    @takes_arguments_of(GenerationRequest)
    def generate(self, request: GenerationRequest) -> Tensor:
        """Continue prompts about images. Arguments have upstream's names and meanings where upstream has them.

        With greedy decoding and beam search, each sample gets the same tokens as it would alone, whatever else is in
        the batch. Sampling draws for the whole batch from one stream of random numbers: the same seed gives the same
        tokens for the same batch, but not for a sample in another batch.

        Args:
            img: As in `encode`. None with `context=`, and for a model that does not cross-attend.
            prompts: Token ids `(b, t)`, a list of b tensors `(t_i,)`, or `(t,)`, shared by all images.
            seq_len: Maximum number of new tokens to decode.
            eos_token: The id that ends a text. It counts only in the generated tokens. None decodes `seq_len` tokens.
            temperature: Divides the logits before sampling. 0 takes the most likely token (greedy).
            filter_logits_fn: Which tokens may be sampled: upstream's `top_k`, `top_p`, `min_p` or `top_a` by name, or a
                function of logits `(b, v)` that sets the other tokens to -inf. Upstream's default `top_k` keeps a tenth
                of the vocabulary.
            filter_kwargs: Keywords for `filter_logits_fn`, such as `{"thres": 0.9}` for `top_p`.
            prompt_lens: `(b,)`, how many tokens of each row of `prompts (b, t)` count, from the left.
            restrict_to_max_seq_len: Raise an error if the texts would become longer than `max_seq_len`. False allows it
                for models without absolute positions; no sliding window is used.
            cache_kv: Cache keys and values, so that a step reads one token. False reads the whole text at each step,
                and decodes the same tokens. True does so as well if upstream's cache is wrong for the model, which the
                first call finds out (`palme_xt.decoding.probe`).
            compile: Compile the step that reads one token, with `torch.compile`, on its first use. The graph serves all
                lengths and later calls. Compiling takes about a minute, so it is worth it only for many tokens.
            context: The embeddings that `encode` returned, instead of `img`, to encode once for several calls.
            context_mask: `(b, p)`, bool, False where the context does not count.
            generator: Source of the randomness, on the model's device.
            beams: Width of a beam search if greater than 1. A beam search never samples. Only the best text is
                returned; `beam_search` returns all of them.
            length_penalty: As in `beam_search`.

        Returns:
            The new tokens alone, `(b, seq_len)`, int64, with the wrapper's `pad_value` after EOS.

        Raises:
            TypeError, ValueError: If an argument is not as above, or `t + seq_len` exceeds `max_seq_len`. After any
                error, the model is unchanged.
        """
        start = self._start(request)
        with loop.evaluating(self):
            if request.beams > 1:
                return loop.beam_search(start(), request, self.config.pad_value)[0][0]
            steps = list(loop.sample(start(), request, self.config.pad_value))
        return F.pad(torch.stack(steps, dim=1), (0, request.seq_len - len(steps)), value=self.config.pad_value)

    @takes_arguments_of(SamplingRequest)
    def stream(self, request: SamplingRequest) -> Iterator[Tensor]:
        """Yield what `generate` returns for the same arguments, step by step, as it is decoded.

        Between steps, and when the iterator is abandoned, the model is in the mode that it was in before. Beams cannot
        be streamed, because the best of them is only known at the end.

        Yields:
            The tokens `(b,)` of each step, at most `seq_len` times, until all texts have ended.

        Raises:
            TypeError, ValueError: As in `generate`, immediately rather than at the first step.
        """
        start = self._start(request)

        def steps() -> Iterator[Tensor]:
            with loop.evaluating(self):
                tokens = loop.sample(start(), request, self.config.pad_value)
                step = next(tokens, None)
            while step is not None:
                yield step
                with loop.evaluating(self):
                    step = next(tokens, None)

        return steps()

    @takes_arguments_of(SearchRequest)
    def beam_search(self, request: SearchRequest) -> tuple[Tensor, Tensor]:
        """Return the most likely texts that a beam search finds, with their scores.

        Args:
            beams: Width of the search, and the number of texts that are returned for each sample.
            length_penalty: Texts are ranked by their log probability divided by their length (EOS included) to this
                power. 0 ranks them by log probability alone, which favours short texts.
            img, prompts, seq_len, eos_token, prompt_lens, restrict_to_max_seq_len, cache_kv, compile, context,
                context_mask: As in `generate`.

        Returns:
            The new tokens `(beams, b, seq_len)`, best first, with the wrapper's `pad_value` after EOS, and the scores
            `(beams, b)`, float32, in nats, in the layout of upstream's wrapper. If a sample has fewer texts than
            `beams`, the rest has the score -inf.

        Raises:
            TypeError, ValueError: As in `generate`.
        """
        start = self._start(request)
        with loop.evaluating(self):
            return loop.beam_search(start(), request, self.config.pad_value)

    if TYPE_CHECKING:
        __call__ = forward

    def _start(self, request: Request) -> Callable[[], loop.Texts]:
        """Check a request, and return a function that encodes its images and returns the texts to decode."""
        source = check_source(request.img, request.context, request.context_mask, self.config)
        net = self.decoder.net
        can_cache = net.can_cache_kv and is_right(net, self.config, cached=True, padded=False)
        request.check(self.config, None if source is None else len(source), can_cache)
        network = self.decoder if isinstance(self.decoder, AutoregressiveWrapper) else net

        def start() -> loop.Texts:
            context = None if source is None else self._context(source)
            texts = loop.Texts(network, request, context, self.config.pad_value)
            ragged = request.prompt_lens is not None
            together = not ragged or is_right(net, self.config, cached=request.cache_kv, padded=True)
            return texts if together else loop.SeparateTexts(texts)

        return start

    def _context(self, source: Tensor) -> Tensor:
        """Return the embeddings of images, or embeddings `(b, p, d)` that are given already, in the encoder's dtype."""
        return source.to(self.encoder.pos_embedding.dtype) if source.ndim == 3 else self.encode(source)
