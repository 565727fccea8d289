"""Begin with pretrained parts, freeze parts, and train them at learning rates of their own."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from palme_xt.adoption import merge_arguments
from palme_xt.captioner.options import PARTS, Training
from palme_xt.decoding.loop import evaluating
from palme_xt.insertion import insert_cross_attention
from palme_xt.model import PalmE
from palme_xt.pretrained import describe_decoder, describe_encoder, load_decoder, load_encoder

MOST_BYTES = 4 << 30  # of embeddings in memory; those of further images are computed anew
_KWARGS = {"encoder": ("vit", "encoder"), "decoder": ("transformer", "decoder", "autoregressive")}
_DESCRIBED = {"encoder": ("image_size", describe_encoder), "decoder": ("max_seq_len", describe_decoder)}


def described(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that the pretrained parts in `options` determine.

    Args:
        options: Options that were given, of which `encoder`, `decoder`, `image_size` and `max_seq_len` count.

    Raises:
        ValueError: If a part cannot be loaded, or one of its arguments is among `options`.
    """
    found: dict[str, Any] = {"torch_layers": {}, "sources": {}}
    determined: dict[str, str] = {}
    for part, (own, describe) in _DESCRIBED.items():
        if (source := options.get(part)) is None:
            continue
        arguments = {f"{name}_kwargs": {} for name in _KWARGS[part]} | describe(source, options.get(own))
        found = merge_arguments(found, arguments)
        determined |= dict.fromkeys(arguments.keys() - {own}, f"--{part}={source}")
    for name, part in determined.items():
        if options.get(name, found[name]) != found[name]:  # equal ones come from `--print_config`
            raise ValueError(f"{name}={options[name]} is determined by {part}: leave --{name} out")
    return found


def load(model: PalmE, training: Training) -> None:
    """Give the pretrained parts in `training` their weights."""
    if training.encoder is not None:
        model.encoder.load_state_dict(load_encoder(training.encoder, image_size=model.config.image_size).state_dict())
    if training.decoder is not None:
        decoder = load_decoder(training.decoder, max_seq_len=model.config.max_seq_len)
        if model.config.cross_attend:
            _, decoder = insert_cross_attention(replace(model.config, cross_attend=False), decoder)
        model.decoder.load_state_dict(decoder.state_dict())


def freeze(model: PalmE, training: Training) -> None:
    """Freeze the parts that are not trained, but not the cross-attention or the projection between them.

    Raises:
        ValueError: If nothing is left to train.
    """
    for part in training.frozen:
        for parameter in _parameters(model)[part]:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freeze={training.freeze} leaves nothing to train: leave a part out")


class Features:
    """The `encode` of a model whose encoder is frozen, which remembers its embeddings by the images' content.

    Each image is encoded alone, so that its embeddings do not depend on the batch: a resumed run gets the same.
    """

    def __init__(self, model: PalmE) -> None:
        self.model, self.kept, self.bytes = model, dict[bytes, Tensor](), 0

    @torch.no_grad()
    def __call__(self, img: Tensor) -> Tensor:
        """Return the embeddings `(b, p, d)` of images `(b, c, h, w)`, or `(b, m * p, d)` of `(b, m, c, h, w)`."""
        found = torch.stack([self._embeddings(pixels) for pixels in img.flatten(0, -4)])
        return found.reshape(len(img), -1, found.shape[-1])

    def _embeddings(self, pixels: Tensor) -> Tensor:
        key = hashlib.blake2b(pixels.cpu().numpy().tobytes(), digest_size=16).digest()
        if key in self.kept:
            return self.kept[key].to(pixels.device)
        # Without autocast, as in captioning: an evaluation must not depend on the precision of the training.
        with evaluating(self.model), torch.autocast(pixels.device.type, enabled=False):
            embeddings = type(self.model).encode(self.model, pixels[None])[0]
        size = embeddings.nbytes
        if self.bytes + size <= MOST_BYTES:
            self.kept[key], self.bytes = embeddings.cpu(), self.bytes + size
        return embeddings


def groups(model: PalmE, training: Training) -> list[Any]:
    """Return the trained parameters, in groups if the parts have learning rates of their own."""
    rates = {part: getattr(training, f"lr_{part}") for part in PARTS}
    if not any(rates.values()):
        return [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [each for each in parameters if each.requires_grad], "lr": rates.get(part) or training.lr}
        for part, parameters in _parameters(model).items()
    ]


def _parameters(model: PalmE) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of the encoder, of the decoder, and of what joins them: cross-attention or projection."""
    layers = model.decoder.net.attn_layers
    inserted = [layer for layer, kind in zip(layers.layers, layers.layer_types, strict=True) if kind == "c"]
    inserted += [] if model.projection is None else [model.projection]
    joining = {id(parameter): parameter for layer in inserted for parameter in layer.parameters()}
    decoder = [parameter for parameter in model.decoder.parameters() if id(parameter) not in joining]
    return {"encoder": [*model.encoder.parameters()], "decoder": decoder, "joining": [*joining.values()]}
