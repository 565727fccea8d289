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

from palme_xt.config import PalmEConfig
from palme_xt.decoding import loop
from palme_xt.decoding.request import GenerationRequest, Request, SamplingRequest, SearchRequest, takes_arguments_of
from palme_xt.inputs import check_batches, check_img, check_source, check_text
from palme_xt.wiring import DECODER, ENCODER, build


class PalmE(nn.Module):
    """A vision-language model from 17 arguments. `PalmEConfig` documents them and the five override dicts.

    Letters in shapes: b batch, m images per sample, c channels, h and w pixels, n tokens, t tokens of a prompt,
    p patches of an image, d encoder_dim, v num_tokens.

    Attributes:
        config: The `PalmEConfig` that it was built from.
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
            # A parameter that needs a gradient and never gets one makes DistributedDataParallel wait for it.
            self.encoder.requires_grad_(False)

    @classmethod
    def from_config(cls, config: PalmEConfig) -> PalmE:
        """Return the model that `config` describes, newly initialised."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="use_abs_pos_emb")  # the config has said so already
            return cls(**{argument.name: getattr(config, argument.name) for argument in fields(config)})

    @classmethod
    def from_modules(cls, encoder: nn.Module, decoder: nn.Module) -> PalmE:
        """Return a model of an encoder and a decoder that were wired by hand, as they are.

        `model.config` is read off the modules: the 17 arguments always, and overrides where they show in parameters. A
        warning says so if the config would build other parameters. Overrides without parameters are not seen:
        `palme_xt.parity.compare(PalmE.from_config(model.config), model)` finds them. A plain `x_transformers.Decoder`
        stays one, and `generate` reads the whole text at each step, because upstream's cache may crash. To decode with
        the cache, load the modules' state dicts into `PalmE.from_config(model.config)`.

        Raises:
            TypeError: If they are not an `x_transformers.ViTransformerWrapper` and an `AutoregressiveWrapper` around a
                Decoder.
            ValueError: If they do not fit together.
        """
        from palme_xt.adoption import describe, warn_unless_described  # here, because few models need it

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
            `(b, p, d)`, or `(b, m * p, d)`: the m images' embeddings one after another.

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

        Text may be longer than `max_seq_len` unless `use_abs_pos_emb` is on: ALiBi and xPos exist to extrapolate.

        Args:
            img: As in `encode`. May be None with `context=`, and for a model that does not cross-attend.
            text: `(b, n)` token ids of an integer dtype, n >= 2. Positions that hold `ignore_index` (-100) are not
                targets; as inputs they are read as `pad_value`.
            **kwargs: Whatever `x_transformers.AutoregressiveWrapper.forward` takes: `return_outputs`, `lens`,
                `context_mask`, ..., and `context`, which `encode` has returned before.

        Returns:
            What upstream returns: the scalar loss, in nats per token, or `(loss, (logits, cache))` with
            `return_outputs=True`, logits `(b, n - 1, num_tokens)`. The loss alone takes less time and memory, and may
            differ from the other by rounding. Second derivatives need `return_outputs=True`.

        Raises:
            TypeError: If `img` or `text` is not a tensor of the right dtype.
            ValueError: If `img` or `text` has the wrong shape or values, or their batch sizes differ.
        """
        check_text(text, self.config, kwargs.get("lens"))
        source = check_source(img, kwargs.pop("context", None), kwargs.get("context_mask"), self.config)
        if source is not None:
            check_batches(source, text)
            kwargs["context"] = self._context(source)
        return self.decoder(text.long(), **kwargs)

    @takes_arguments_of(GenerationRequest)
    def generate(self, request: GenerationRequest) -> Tensor:
        """Continue prompts about images. Names and meanings are upstream's, where upstream has them.

        Greedy and beam search give each sample the tokens that it gets alone, whatever else is in the batch. Sampling
        draws for the whole batch from one stream of random numbers: the same seed gives the same tokens for the same
        batch, but not for a sample in another batch.

        Args:
            img: As in `encode`. None with `context=`, and for a model that does not cross-attend.
            prompts: Token ids `(b, t)`, a list of b tensors `(t_i,)`, or `(t,)`, shared by all images.
            seq_len: How many new tokens to decode at most.
            eos_token: The id that ends a text. It counts only in what is generated. None decodes `seq_len` tokens.
            temperature: Divides the logits before sampling. 0 takes the most likely token (greedy).
            filter_logits_fn: Which tokens may be sampled: upstream's `top_k`, `top_p`, `min_p` or `top_a` by name, or a
                function of logits `(b, v)` that sets others to -inf. Upstream's default `top_k` keeps a tenth of the
                vocabulary.
            filter_kwargs: Keywords for `filter_logits_fn`, such as `{"thres": 0.9}` for `top_p`.
            prompt_lens: `(b,)`, how many tokens of each row of `prompts (b, t)` count, from the left.
            restrict_to_max_seq_len: Refuse to go beyond `max_seq_len`. False continues, without a sliding window, in
                models that have no absolute positions.
            cache_kv: Keep keys and values, so that a step reads one token. False reads the whole text at each step, for
                the same tokens. So does True with the overrides that upstream's cache is wrong for
                (`palme_xt.decoding.loop.WRONG_WITH_CACHE`).
            compile: Compile the step that reads one token, with `torch.compile`, when it is first made. The graph
                serves all lengths and later calls. It takes about a minute, so it pays for many tokens.
            context: What `encode` returned, instead of `img`, to encode once for several calls.
            context_mask: `(b, p)` bool, False where the context does not count.
            generator: Source of the randomness, on the model's device.
            beams: With more than 1, a beam search of that width, which never samples. Its best text is returned.
                `beam_search` returns all of them.
            length_penalty: As in `beam_search`.

        Returns:
            The new tokens alone, `(b, seq_len)`, int64, with the wrapper's `pad_value` after EOS.

        Raises:
            TypeError, ValueError: If an argument is not as above, or `t + seq_len` exceeds `max_seq_len`. The model is
                left as it was, after any error.
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

        Between steps, and once it is abandoned, the model is in the mode that it was in before. There are no beams
        here: which of them is best is only known at the end.

        Yields:
            The tokens `(b,)` of each step, at most `seq_len` times, until all texts have ended.

        Raises:
            TypeError, ValueError: As `generate`, at once and not at the first step.
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
            beams: Width of the search, and how many texts of each sample are returned.
            length_penalty: Texts compare by their log probability, divided by their length (EOS included) to this
                power. 0 compares the bare log probabilities, which favours short texts.
            img, prompts, seq_len, eos_token, prompt_lens, restrict_to_max_seq_len, cache_kv, compile, context,
                context_mask: As in `generate`.

        Returns:
            As upstream's wrapper returns beams: the new tokens `(beams, b, seq_len)`, best first, with the wrapper's
            `pad_value` after EOS; and the scores `(beams, b)`, float32, in nats. Where a sample has fewer texts than
            `beams`, the rest scores -inf.

        Raises:
            TypeError, ValueError: As `generate`.
        """
        start = self._start(request)
        with loop.evaluating(self):
            return loop.beam_search(start(), request, self.config.pad_value)

    def _start(self, request: Request) -> Callable[[], loop.Texts]:
        """Check what is asked for. The function that is returned encodes the images."""
        net = self.decoder.net
        source = check_source(request.img, request.context, request.context_mask, self.config)
        request.check(self.config, None if source is None else len(source), loop.can_cache(net, self.config))
        return lambda: loop.Texts(
            net, request, None if source is None else self._context(source), self.config.pad_value
        )

    def _context(self, source: Tensor) -> Tensor:
        """Return the embeddings of images; those that are given already, `(b, p, d)`, in the encoder's dtype."""
        return source.to(self.encoder.pos_embedding.dtype) if source.ndim == 3 else self.encode(source)
