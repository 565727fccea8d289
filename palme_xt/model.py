"""PalmE: a vision transformer whose patch embeddings a causal text decoder cross-attends to."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from x_transformers import ViTransformerWrapper

from palme_xt.config import PalmEConfig, UnprovenConfig
from palme_xt.decoding import loop
from palme_xt.decoding import request as requests
from palme_xt.inputs import check_batches, check_context, check_img, check_prompts, check_text, needs_context
from palme_xt.upstream.loss import AutoregressiveWrapper
from palme_xt.wiring import DECODER, ENCODER, build

Outputs = tuple[Tensor, tuple[Tensor, Any]]  # (loss, (logits, cache))
Images = requests.Images
Encoder = nn.Module | Literal["config"] | None


@dataclass(frozen=True)
class _Arguments(PalmEConfig):
    __doc__ = PalmEConfig.__doc__

    encoder: Encoder = field(default="config", kw_only=True)

    def __post_init__(self) -> None:
        """Leave it to the `PalmEConfig` of the model to check them."""


class PalmE(nn.Module):
    """A vision-language model built from 17 arguments. `PalmEConfig` documents them and the five override dicts.

    `PalmE(..., encoder=module)` takes any `torch.nn.Module` from images to embeddings of width `encoder_dim` instead of
    the ViT that the arguments describe; `encode` documents what it is given and may return. It is kept as it is, and
    `config.external_encoder` is the name of its class. With `encoder=None`, there is none, and the model is fed by
    `context=` alone. A subclass may override `encode`, and all other methods use it.

    `PalmE(..., image_token=ID)` reads images inside the sentence instead of cross-attending to them: each ID in a text
    stands for one image, and the network reads the p embeddings of the image, projected by `projection`, in its place.
    They count as p positions of the text.

    Letters in shapes: b batch, m images per sample, c channels, h and w pixels, n tokens, t tokens of a prompt,
    p embeddings (patches) of an image, d encoder_dim, v num_tokens.

    Attributes:
        config: The `PalmEConfig` that the model was built from.
        encoder: An `x_transformers.ViTransformerWrapper`, or the module that was given, or None.
        decoder: An `x_transformers.AutoregressiveWrapper` around the `TransformerWrapper` at `decoder.net`, whose
            layers at `decoder.net.attn_layers` are an `x_transformers.Decoder`. State dicts of the same modules wired
            by hand load below `encoder.` and `decoder.` as they are.
        projection: A `torch.nn.Linear` from the width of the encoder to that of the token embeddings with an
            `image_token`, otherwise None.
    """

    config: PalmEConfig

    @requests.takes_arguments_of(_Arguments)
    def __init__(self, arguments: _Arguments) -> None:
        adopted = vars(self).pop("_adopted", None)  # what `from_modules` left here
        super().__init__()
        self.config, self.encoder, self.decoder = adopted or _build(**vars(arguments))
        self.projection: Any = None
        if self.config.image_token is not None:
            weight = self.decoder.net.token_emb.emb.weight
            self.projection = nn.Linear(self.config.encoder_dim, weight.shape[1]).to(weight)
        elif not (self.config.cross_attend or self.config.external_encoder or adopted):
            # DistributedDataParallel would wait for the gradients of these parameters, which never come.
            self.encoder.requires_grad_(False)

    @classmethod
    def from_config(cls, config: PalmEConfig, encoder: Encoder = "config") -> Self:
        """Return the model that `config` describes, newly initialised.

        Args:
            config: The config.
            encoder: The encoder, as in `PalmE(encoder=...)`. "config" builds what the config describes.

        Raises:
            TypeError: If `encoder` is neither a module nor one of the other two.
            ValueError: If the config is unproven (see `from_modules`), or upstream rejects it, or
                `config.external_encoder` is a class, and `encoder` is not of this class.
        """
        if isinstance(config, UnprovenConfig):
            config.refuse()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="use_abs_pos_emb|decoder_kwargs")  # the config has already warned
            return cls(**vars(config), encoder=encoder)

    @classmethod
    def from_modules(cls, encoder: nn.Module | None, decoder: nn.Module, **arguments: Any) -> Self:
        """Return a model that consists of an encoder and a decoder that were wired by hand, unchanged.

        The exception is a decoder without cross-attention: with `cross_attend=True`, which is the default for one that
        `palme_xt.pretrained.load_decoder` returned, cross-attention is inserted into a copy of it, which at first
        computes the same (`palme_xt.insertion`).

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
            encoder: An `x_transformers.ViTransformerWrapper`, or anything that `PalmE(encoder=...)` takes. Of another
                encoder, the config has the name of its class, and the proof is that of the decoder; `encoder_dim` is
                the width of the context that the decoder takes.
            decoder: An `x_transformers.AutoregressiveWrapper` around a `TransformerWrapper` with a `Decoder`.
            **arguments: Arguments of `PalmEConfig` that cannot be read from the modules. Override dicts are merged with
                what is read. Other keywords go to the constructor of a subclass.

        Raises:
            TypeError: If the modules are of other classes, or a subclass needs other arguments.
            ValueError: If the modules do not fit together, or an argument is invalid.
        """
        from palme_xt.adoption import adopt  # imported here, because few models need it

        names = [argument.name for argument in fields(PalmEConfig)]
        config, decoder = adopt(encoder, decoder, **{name: arguments.pop(name) for name in names if name in arguments})
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
        """Return the embeddings of images, the context that the decoder cross-attends to.

        This is the only place where images are checked and the encoder is called. A subclass may override it, and take
        whatever it likes as `img`: it must return `(b, p, d)`, which all methods that call it check.

        A module that was given as `encoder` is called with images `(b * m, c, h, w)` of any size. It returns embeddings
        `(b * m, p, d)`, or a map `(b * m, h, w, d)` or `(b * m, d, h, w)`, whose places become h * w embeddings; or a
        tuple or a list that begins with them; or an object or a mapping that has them as `last_hidden_state`.

        Args:
            img: `(b, c, h, w)`, or `(b, m, c, h, w)` for m images per sample. Floating point, in whatever range the
                model was trained on. It is cast to the encoder's dtype, that of its first floating-point parameter.

        Returns:
            `(b, p, d)`, or `(b, m * p, d)`, the embeddings of the m images one after another.

        Raises:
            TypeError: If `img` is not a floating-point tensor, or the encoder returns none.
            ValueError: If `img`, or what the encoder returns, has the wrong shape, or the model has no encoder.
        """
        if self.encoder is None:
            raise ValueError("img is given, but the model has no encoder (encoder=None): pass context or image_embeds")
        check_img(img, self.config)
        images = img.flatten(0, -4).to(dtype=_dtype(self.encoder))  # (b m) c h w
        if self.config.external_encoder is None or isinstance(self.encoder, ViTransformerWrapper):
            embeddings: Tensor = self.encoder(images, return_embeddings=True)
        else:
            from palme_xt.external import read_embeddings  # imported here, because few models need it

            embeddings = read_embeddings(self.encoder(images), images.shape[0], self.config.encoder_dim)
        return rearrange(embeddings, "(b m) p d -> b (m p) d", b=img.shape[0])

    @overload
    def forward(self, img: Images, text: Tensor, *, return_outputs: Literal[False] = ..., **kwargs: Any) -> Tensor: ...

    @overload
    def forward(self, img: Images, text: Tensor, *, return_outputs: Literal[True], **kwargs: Any) -> Outputs: ...

    @overload
    def forward(self, img: Images, text: Tensor, *, return_outputs: bool, **kwargs: Any) -> Any: ...

    def forward(
        self,
        img: Images,
        text: Tensor,
        *,
        return_outputs: bool = False,
        lens: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        prompt_lens: Tensor | None = None,
        image_embeds: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Return the loss of predicting each token of `text` from the tokens before it and the image.

        Text may be longer than `max_seq_len` unless `use_abs_pos_emb` is on: ALiBi and xPos can extrapolate.

        Args:
            img: As in `encode`. May be None with `context=`, and for a model that does not cross-attend. With an
                `image_token`, it may also be a list with the images of each sample, `(m_i, c, h, w)` or a list of
                `(c, h, w)`, which may be empty or None, and None if there are no images.
            text: Token ids `(b, n)` of an integer dtype, n >= 2. Positions that hold `ignore_index` (-100) are not
                targets; as inputs they are read as `pad_value`. With an `image_token`, each text has one for each of
                its images; it is no target.
            return_outputs: Return the logits and upstream's cache too.
            lens: `(b,)`, int, the number of tokens in each text. The tokens after them are neither checked nor targets.
            context: `(b, p, d)`, the embeddings that `encode` returned, instead of `img`.
            context_mask: `(b, p)`, bool, False where the context does not count.
            target_mask: `(b, n)`, bool, False where a token is read, but not a target.
            prompt_lens: `(b,)`, int, how many tokens at the beginning of each text are read, but are not targets.
            image_embeds: What `encode` returned for images `(b, c, h, w)`, or a list with what it returned for the
                images `(m_i, c, h, w)` of each sample, or `(b, m, p, d)`. Only with an `image_token`, instead of `img`.
            **kwargs: Any other keyword of upstream's wrapper and its network, such as `prepend_embeds`.

        Returns:
            The scalar loss, in nats per token, or `(loss, (logits, cache))` with `return_outputs=True`, logits
            `(b, n - 1, num_tokens)`, as in upstream, where n counts the positions of images too. The loss alone takes
            less time and memory, and may differ from the loss with outputs by rounding. Second derivatives need
            `return_outputs=True`.

        Raises:
            TypeError: If `img` or `text` is not a tensor of the right dtype.
            ValueError: If `img` or `text` has the wrong shape or values, or their batch sizes differ, or a text has
                not as many placeholders as images.
        """
        check_text(text, self.config, lens)
        kwargs = self._with_context(img, text, kwargs | {"context": context, "context_mask": context_mask})
        given = {"target_mask": target_mask, "prompt_lens": prompt_lens, "image_embeds": image_embeds}
        if self.projection is not None or any(value is not None for value in given.values()):
            text, lens, kwargs = _inside().learn(self, img, text, lens, kwargs, **given)
        return self.decoder(text.long(), return_outputs=return_outputs, lens=lens, **kwargs)

    @requests.takes_arguments_of(requests.GenerationRequest)
    def generate(self, request: requests.GenerationRequest, **kwargs: Any) -> Tensor:
        """Continue prompts about images. Arguments have upstream's names and meanings where upstream has them.

        With greedy decoding and beam search, each sample gets the same tokens as it would alone, whatever else is in
        the batch. Sampling draws for the whole batch from one stream of random numbers: the same seed gives the same
        tokens for the same batch, but not for a sample in another batch.

        Args:
            img: As in `forward`. None with `context=`, and for a model that does not cross-attend.
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
                padded on the left, and an `image_token` is repeated at each position of its image. A beam search calls
                it with log probabilities, as transformers does.
            prompt_lens: `(b,)`, how many tokens of each row of `prompts (b, t)` count, from the left.
            restrict_to_max_seq_len: Raise an error if the texts would become longer than `max_seq_len`. False allows
                it: with `use_abs_pos_emb`, each step then reads the last `max_seq_len` tokens, without the cache;
                without it, the whole text is read, in which positions are extrapolated.
            cache_kv: Cache keys and values, so that a step reads one token. False reads the whole text at each step,
                and decodes the same tokens. True does so as well if upstream's cache is wrong for the model, which the
                first call finds out (`palme_xt.decoding.probe`).
            compile: Compile the step that reads one token, with `torch.compile`, on its first use. The graph serves all
                lengths and later calls. Compiling takes about 20 seconds, so it is worth it only for many tokens.
            context: The embeddings that `encode` returned, instead of `img`, to encode once for several calls.
            context_mask: `(b, p)`, bool, False where the context does not count.
            image_embeds: The same for a model with an `image_token`, as in `forward`.
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
                best, _ = _beam_search(start(), request, self.config.pad_value)
                return rearrange(best[: request.num_return_sequences], "k b n -> (b k) n")
            steps = list(loop.sample(start, request, self.config.pad_value))
        return F.pad(torch.stack(steps, dim=1), (0, request.seq_len - len(steps)), value=self.config.pad_value)

    @requests.takes_arguments_of(requests.SamplingRequest)
    def stream(self, request: requests.SamplingRequest, **kwargs: Any) -> Iterator[Tensor]:
        """Yield what `generate` returns for the same arguments, step by step, as it is decoded.

        Between steps, and when the iterator is abandoned, the model is in the mode that it was in before. Beams cannot
        be streamed, because the best of them is only known at the end.

        Yields:
            The tokens `(b * num_return_sequences,)` of each step, at most `seq_len` times, until all texts have ended.

        Raises:
            TypeError, ValueError: As in `generate`, immediately rather than at the first step.
        """
        tokens = loop.sample(self._start(request, kwargs), request, self.config.pad_value)
        return iter(loop.evaluating(self)(lambda: next(tokens, None)), None)

    @requests.takes_arguments_of(requests.SearchRequest)
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
                context, context_mask, image_embeds, **kwargs: As in `generate`.

        Returns:
            The new tokens `(beams, b, seq_len)`, best first, with the wrapper's `pad_value` after EOS, and the scores
            `(beams, b)`, float32, in nats, in the layout of upstream's wrapper. If a sample has fewer texts than
            `beams`, the rest has the score -inf.

        Raises:
            TypeError, ValueError: As in `generate`.
        """
        start = self._start(request, kwargs)
        with loop.evaluating(self):
            return _beam_search(start(), request, self.config.pad_value)

    def score(self, img: Images, prompts: Any, tokens: Tensor, eos_token: Any = None, **kwargs: Any) -> Tensor:
        """Return the log probability of each new token of texts, such as those that `generate` returned.

        The probabilities are the model's own: before `temperature`, `filter_logits_fn` and `logits_processor`. As in
        `forward`, the model stays in its mode, and gradients flow unless they are disabled.

        Args:
            img, prompts, eos_token: As in `generate`.
            tokens: `(b, n)`, of an integer dtype.
            **kwargs: `prompt_lens`, `context`, `context_mask` and `image_embeds`, as in `generate`, and any keyword of
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
        text = F.pad(prompts, (0, tokens.shape[1]), value=self.config.pad_value).scatter(1, places, tokens)
        kwargs = self._with_context(img, text, kwargs)
        if self.projection is not None:
            text, places, kwargs = _inside().score(self, img, text, places, kwargs)
        check_text(text, self.config)
        logits = self.decoder.net(text[:, :-1], **kwargs).take_along_dim(places[..., None] - 1, dim=1)
        log_probs = logits.float().log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
        loop.refuse_nan(log_probs)
        ends = torch.isin(tokens, self.config.check_eos_token(eos_token).to(tokens.device)).int()
        return log_probs.masked_fill(ends.cumsum(dim=1) > ends, 0)  # type: ignore[no-any-return]

    if TYPE_CHECKING:
        __call__ = forward

    def _start(self, request: requests.Request, kwargs: dict[str, Any]) -> Callable[[], loop.Texts]:
        """Check a request, encode its images, and return a function that returns the texts to decode."""
        from palme_xt.decoding.probe import is_right  # imported here, because only decoding needs it

        requests.check_network_inputs(kwargs)
        with loop.evaluating(self):
            context = self._context(request.img, request.context, request.context_mask)
            in_sentence = self.projection is not None or request.image_embeds is not None
            kind = _inside().prepare(self, request) if in_sentence else loop.Texts
        net = self.decoder.net
        batch, device = None if context is None else len(context), next(net.parameters()).device
        can_cache = request.cache_kv and net.can_cache_kv and is_right(net, self.config, cached=True, padded=False)
        request.check(self.config, batch, device, can_cache)
        network = self.decoder if isinstance(self.decoder, AutoregressiveWrapper) else net

        def start() -> loop.Texts:
            texts = kind(network, request, {"context": context, **kwargs}, self.config)
            ragged = request.prompt_lens is not None
            together = not ragged or is_right(net, self.config, cached=request.cache_kv, padded=True)
            return texts if together else loop.SeparateTexts(texts)

        return start

    def _with_context(self, img: Images, text: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return keywords for the decoder with the context of `text (b, n)`, if the model cross-attends."""
        context = self._context(img, kwargs.pop("context", None), kwargs.get("context_mask"))
        if context is not None:
            check_batches(context, text, img)
        return kwargs | {"context": context}

    def _context(self, img: Any, context: Any, mask: Any) -> Tensor | None:
        """Return the context that is given, or that of images, checked and in the decoder's dtype, or None."""
        if not needs_context(img, context, mask, self.config):
            return None
        found = self.encode(img) if context is None else context
        check_context(found, mask, self.config, encoded=context is None)
        return found.to(dtype=_dtype(self.decoder))


def _build(encoder: Encoder, **arguments: Any) -> tuple[PalmEConfig, Any, Any]:
    if encoder != "config" or arguments["external_encoder"] is not None:
        from palme_xt.external import name_encoder  # imported here, because few models need it

        arguments["external_encoder"] = name_encoder(encoder, arguments["external_encoder"])
    config = PalmEConfig(**arguments)
    if config.external_encoder is None:
        encoder = build(ENCODER, config)
    return config, None if encoder == "config" else encoder, build(DECODER, config)


def _beam_search(*args: Any) -> tuple[Tensor, Tensor]:
    from palme_xt.decoding.search import beam_search  # imported here, because few calls need it

    return beam_search(*args)


def _inside() -> Any:
    from palme_xt import in_sentence  # imported here, because few models need it

    return in_sentence


def _dtype(module: nn.Module) -> torch.dtype | None:
    return next((weight.dtype for weight in module.parameters() if weight.is_floating_point()), None)
