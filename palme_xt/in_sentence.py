"""Images inside the sentence: their embeddings stand between those of its words (Driess et al. 2023, arXiv:2303.03378).

Letters in shapes: b batch, n tokens, m images of a sample, p embeddings of an image, d encoder_dim, e width of token
embeddings, N positions of a sentence: its tokens, of which a placeholder counts p times.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from x_transformers import TransformerWrapper

from palme_xt.decoding.loop import Texts
from palme_xt.decoding.request import Request
from palme_xt.inputs import check_prompts, first_tokens, require, token_ids

# x-transformers 2.26.0 to 2.30.1 has no function that replaces the embeddings of tokens. There, the difference is added
# to them, which is the same up to rounding.
HOOK = "transform_token_embeds" in inspect.signature(TransformerWrapper.forward).parameters
KEYWORD = "transform_token_embeds" if HOOK else "sum_embeds"


class Sentences:
    """Texts with the images that their placeholders stand for.

    Args:
        model: A `PalmE` with an `image_token`.
        text: Checked token ids `(b, n)`.
        found: What `encode_images` returned. None is no images.

    Attributes:
        ends: `(b, n)`, the number of positions up to each token, itself included.
        images: `(b, m * p + 1, e)`, the projected embeddings of the images of each sample, one after another.
        p: The number of embeddings of an image.

    Raises:
        ValueError: If the batch sizes differ, or a sample has not as many placeholders as images.
    """

    cache = None  # nothing has been read

    def __init__(self, model: Any, text: Tensor, found: Any) -> None:
        found = encode_images(model, [()] * len(text)) if found is None else found
        if isinstance(found, Tensor):
            images, (m, p), counts = found.flatten(1, 2), found.shape[1:3], torch.full_like(text[:, 0], found.shape[1])
        else:
            images = pad_sequence([each.flatten(0, 1) for each in found], batch_first=True)
            m, p = (max(each.shape[dim] for each in found) for dim in (0, 1))
            counts = torch.tensor([len(each) for each in found], device=text.device)
        if images.shape[0] != text.shape[0]:
            raise ValueError(f"img has {images.shape[0]} samples, and text has {text.shape[0]}: pass images for each")
        # The last embedding is never read: it makes sure that there is one, so that each parameter gets a gradient.
        self.images: Tensor = F.pad(model.projection(images.to(model.projection.weight)), (0, 0, 0, 1))
        places = text == model.config.image_token
        self.p, placeholders = p, places.sum(dim=1)

        def describe() -> str:
            sample = int((placeholders != counts).nonzero()[0])
            return f"sample {sample} has {placeholders[sample]} placeholders and {counts[sample]} images; "

        rule = f"text must have one placeholder, image_token={model.config.image_token}, for each image of its sample"
        require((placeholders == counts).all(), describe, rule)
        self.ends = ends = torch.where(places, p, 1).cumsum(dim=1)
        # For each position, the number of tokens that ended before it: the index of its own.
        size = text.shape[1] + m * (p - 1)
        self._tokens = ends.new_zeros(text.shape[0], size + 1).scatter(1, ends.clamp(max=size), 1).cumsum(dim=1)[:, :-1]

    def spread(self, values: Tensor, fill: int) -> Tensor:
        """Return what `values (b, n)` hold for tokens, at all positions `(b, N)`, with `fill` after the last token."""
        return F.pad(values, (0, 1), value=fill).gather(1, self._tokens)


def encode_images(model: Any, img: Any, image_embeds: Any = None) -> Any:
    """Return embeddings of images, `(b, m, p, d)` or a list of `(m_i, p, d)` for each sample. None is no images.

    Raises:
        TypeError, ValueError: If both are given, or one has the wrong type or shape (see `PalmE.forward`).
    """
    if model.projection is None:
        raise ValueError("image_embeds is only for models with an image_token: pass context=model.encode(img)")
    if img is not None and image_embeds is not None:
        raise ValueError("both img and image_embeds are given: pass one of them")
    found, d = image_embeds, model.config.encoder_dim
    if isinstance(img, list | tuple):
        found = _encode_list(model, img)
    elif isinstance(img, Tensor) and img.ndim == 5:
        found = model.encode(img.flatten(0, 1)).unflatten(0, img.shape[:2])
    elif img is not None:
        found = model.encode(img)
    if found is None:
        return None
    each = [*found] if (several := isinstance(found, list | tuple)) else [found]
    shapes = [tuple(item.shape) if isinstance(item, Tensor) and item.is_floating_point() else () for item in each]
    fitting = [len(shape) in ((3,) if several else (3, 4)) and shape[-1] == d for shape in shapes]
    if not (each and all(fitting)) or (several and len({shape[1] for shape in shapes}) > 1):
        rule = f"(b, p, d), (b, m, p, d), or a list of (m_i, p, d), floating point, with d=encoder_dim={d} and one p"
        raise ValueError(f"image_embeds has the shapes {shapes}, must be what encode returns for images: {rule}")
    return each if several else found[:, None] if found.ndim == 3 else found


def _encode_list(model: Any, img: Any) -> tuple[Tensor, ...]:
    """Return the embeddings `(m_i, p, d)` of the images of each sample."""
    img = [() if sample is None else sample for sample in img]
    images = [image for sample in img for image in sample]
    kinds = {tuple(image.shape) if isinstance(image, Tensor) else (type(image).__name__,) for image in images}
    if len(kinds) > 1 or any(len(kind) != 3 for kind in kinds):
        raise ValueError(f"img holds {kinds}, must hold (m, c, h, w) or a list of (c, h, w) for each sample, all alike")
    if images:
        found = model.encode(torch.stack(images))
    elif model.config.external_encoder is None:
        # The parameters of the encoder get gradients of zero, for which DistributedDataParallel would wait.
        blank = model.projection.weight.new_zeros(1, model.config.channels, *[model.config.image_size] * 2)
        found = model.encode(blank)[:0]
    else:
        found = model.projection.weight.new_zeros(0, 1, model.config.encoder_dim)
    return found.split([len(sample) for sample in img])  # type: ignore[no-any-return]


def learn(model: Any, img: Any, text: Tensor, lens: Any, inputs: Any, **given: Any) -> tuple[Tensor, None, Any]:
    """Return the targets `(b, N)`, no lengths, and `inputs` with the keyword with which the network reads sentences.

    Args:
        model: A `PalmE`. Without an `image_token`, a sentence is its text.
        img: As in `PalmE.forward`.
        text: Checked token ids `(b, n)`.
        lens: As in `PalmE.forward`.
        inputs: Other keywords of the network.
        **given: `target_mask`, `prompt_lens` and `image_embeds`, as in `PalmE.forward`.

    Raises:
        TypeError, ValueError: As in `PalmE.forward`.
    """
    config, text, mask, sentences = model.config, text.long(), given["target_mask"], None
    ignored = config.ignore_index
    if getattr(model.decoder.net, "ff_deep_embed", None) is not None:
        raise ValueError("transformer_kwargs['ff_deep_embed'] reads token ids, which images do not have: leave it out")
    learned = first_tokens(text, lens, "lens") & (text != ignored)
    read = text.masked_fill(~learned, config.pad_value)
    if given["prompt_lens"] is not None:
        learned = learned & ~first_tokens(text, given["prompt_lens"], "prompt_lens")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != text.shape:
            found = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"target_mask is {found}, must be bool {tuple(text.shape)}, True at what is to be learned")
        learned = learned & mask
    targets = text.masked_fill(~learned, ignored)
    if model.projection is not None or given["image_embeds"] is not None:
        sentences = Sentences(model, read, encode_images(model, img, given["image_embeds"]))
        targets = sentences.spread(targets.masked_fill(read == config.image_token, ignored), ignored)
        read = sentences.spread(read, config.pad_value)
    rule = "text must have a target after its first token, which is no image_token and which neither prompt_lens nor "
    rule += "target_mask leaves out, or the loss is nan: drop such batches"
    require((targets[:, 1:] != ignored).any(), lambda: "", rule)
    fed = targets.where(targets != ignored, config.pad_value)
    return token_ids(targets, config, "text"), None, reading(model, inputs, read, sentences, fed)


def score(model: Any, img: Any, text: Tensor, places: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Any]:
    """Return sentences `(b, N)` of texts `(b, n)`, and the places there of some of their tokens, for `PalmE.score`.

    The third item is `inputs` with the keyword with which the network reads all positions but the last.
    """
    sentences = Sentences(model, text, encode_images(model, img, inputs.pop("image_embeds", None)))
    text, places = sentences.spread(text, model.config.pad_value), sentences.ends.take_along_dim(places, dim=1) - 1
    return text, places, reading(model, inputs, text[:, :-1], sentences)


def prepare(model: Any, request: Request) -> Any:
    """Replace the prompts of a request by their sentences, and let no placeholder be decoded.

    Returns:
        What makes the `Texts` to decode.
    """
    found = encode_images(model, request.img, request.image_embeds)
    batch, weight = None if found is None else len(found), model.projection.weight
    prompts, lens = check_prompts(request.prompts, request.prompt_lens, batch, model.config, weight.device)
    sentences = Sentences(model, prompts, found)
    lens = torch.full_like(prompts[:, 0], prompts.shape[1]) if lens is None else lens
    request.prompt_lens = sentences.ends.take_along_dim(lens[:, None] - 1, dim=1)[:, 0]
    request.prompts = sentences.spread(prompts, model.config.pad_value)[:, : int(request.prompt_lens.max())]
    process, token = request.logits_processor, torch.tensor(model.config.image_token, device=weight.device)

    def allow(ids: Tensor, logits: Tensor) -> Tensor:
        found = logits if process is None else process(ids, logits)
        right = isinstance(found, Tensor) and found.shape == logits.shape  # otherwise, the request raises an error
        return found.index_fill(-1, token, -torch.inf) if right else found

    request.logits_processor = allow
    return lambda *args: ImageTexts(*args, model=model, sentences=sentences)


class ImageTexts(Texts):
    """Sentences that grow by one token per step.

    Args:
        *args: As in `Texts`.
        model: A `PalmE` with an `image_token`.
        sentences: What the texts begin with.
    """

    def __init__(self, *args: Any, model: Any, sentences: Sentences) -> None:
        super().__init__(*args)
        self.model, self.images, self.p = model, sentences.images, sentences.p

    def next_logits(self) -> Tensor:
        """Return the logits `(b, v)` of the next token of each text."""
        inputs, n, config = self.inputs, self.ids.shape[1], self.model.config
        unread = min(n, self.window) if self.cache is None or n > self.window else n - self.cache.cache_length
        # x-transformers 2.26.0 to 2.31.10 takes no `attn_mask` with a cache.
        if config.image_attention == "full" and unread > 1 and (self.ids[:, -unread:] == config.image_token).any():
            self.cache, unread = None, min(n, self.window)
        if unread > 1 or self.cache is None:
            self.inputs = reading(self.model, inputs, self.ids, self, window=unread)
        logits = super().next_logits()
        self.inputs = inputs
        return logits

    def select(self, rows: Tensor, *, same_samples: bool = False) -> None:
        """Keep the texts at the indices `rows`, in this order. A text may be kept several times."""
        super().select(rows, same_samples=same_samples)
        self.images = self.images[rows]


def reading(model: Any, inputs: Any, ids: Tensor, sentences: Any, fed: Any = None, window: int = 0) -> Any:
    """Return `inputs` with the keywords with which the network reads sentences.

    Args:
        model: A `PalmE`.
        inputs: Other keywords of the network.
        ids: The sentences `(b, N)`, with the placeholder at each position of an image.
        sentences: A `Sentences` or an `ImageTexts`, or None without an `image_token`. If it has a cache, no position of
            the window may be in an image with full attention.
        fed: Ids `(b, N)` that the network is called with instead of `ids`.
        window: How many of the last positions the network is called with. 0 is all.

    Raises:
        ValueError: If `inputs` has one of the keywords.
    """
    full = model.config.image_attention == "full" and sentences.cache is None
    for name in (KEYWORD, *(("attn_mask", "causal", "prepend_embeds", "mems") if full else ())):
        if inputs.get(name) is not None:
            raise ValueError(f"{name} is given, but images and prompts are read by means of it: leave it out")
    token_emb, places = model.decoder.net.token_emb, ids == model.config.image_token
    if full:
        # Causal, except between embeddings that have the same number of an image in the text, counted from 1.
        image = torch.where(places, (places.cumsum(dim=1) + sentences.p - 1) // sentences.p, 0)[:, -window:]
        same = (image[:, :, None] == image[:, None]) & places[:, None, -window:]
        inputs = inputs | {"attn_mask": (same | torch.ones_like(same).tril())[:, None], "causal": False}

    def replace(embeddings: Tensor) -> Tensor:
        found: Tensor = embeddings if fed is None else token_emb(ids)
        if sentences is None:
            return found
        images = sentences.images
        order = (places.cumsum(dim=1) - 1).clamp(0, images.shape[1] - 1)
        # Not `take_along_dim`, which fixes the sizes of a graph (torch 2.15).
        own = images.gather(1, order[..., None].expand(-1, -1, images.shape[-1]))
        return torch.where(places[:, -window:, None], own[:, -window:], found)

    if HOOK:
        return inputs | {KEYWORD: replace}
    embeddings = token_emb((ids if fed is None else fed)[:, -window:])
    return inputs | {KEYWORD: replace(embeddings) - embeddings}
