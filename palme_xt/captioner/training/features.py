"""Compute the embeddings of each image once if the encoder is frozen, and keep them."""

import hashlib

import torch
from torch import Tensor

from palme_xt.decoding.loop import evaluating
from palme_xt.model import PalmE

MOST_BYTES = 4 << 30  # of embeddings in memory; those of further images are computed anew


class Features:
    """The `encode` of a model whose encoder is frozen, which remembers its embeddings by the images' content.

    Each image is encoded alone, so that its embeddings do not depend on the batch: a resumed run gets the same.
    """

    def __init__(self, model: PalmE) -> None:
        self.model, self.kept, self.bytes = model, dict[bytes, Tensor](), 0

    @torch.no_grad()
    def __call__(self, img: Tensor) -> Tensor:
        """Return the embeddings `(b, p, d)` of images `(b, c, h, w)`."""
        return torch.stack([self._embeddings(pixels) for pixels in img])

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
