"""The tensors of a Hugging Face checkpoint, under the names and in the order of x-transformers' modules."""

import re

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from x_transformers.x_transformers import RotaryEmbedding

from palme_xt.config import PalmEConfig
from palme_xt.pretrained.families import FAMILIES
from palme_xt.pretrained.tensors import Readers, Tensors

_MODEL = r"(?:(?:model|transformer|vit|dinov2|dinov2_with_registers|vision_model)\.)?"
_LAYER = r"(?:(?:encoder\.)?(?:layers?|h)\.(\d+)\.)?"
_OURS = re.compile(r"(?:net\.)?(?:attn_layers\.)?(?:layers\.(\d+)\.)?(.+?)(?:\.(weight|bias))?")
_PATTERNS = {
    part: re.compile(rf"{_MODEL}{_LAYER}(?:{'|'.join(map(re.escape, names))})(?:\.(weight|bias))?")
    for part, names in FAMILIES["tensors"].items()
}


class Checkpoint(Tensors):
    """The tensors of a checkpoint of Hugging Face, which are found by the names of parts in `families.json`.

    Args:
        readers: For the name of each tensor, a function that returns it.
        max_seq_len: How many positions of a text are kept. None keeps all.
    """

    unused = "|".join(FAMILIES["unused"])

    def __init__(self, readers: Readers, max_seq_len: int | None = None) -> None:
        super().__init__(readers)
        self._max_seq_len = max_seq_len
        found = {(name, part): pattern.fullmatch(name) for name in readers for part, pattern in _PATTERNS.items()}
        self._names = {(part, match[2], match[1]): name for (name, part), match in found.items() if match}

    def has(self, part: str, suffix: str | None = None, layer: str | None = None) -> bool:
        """Return whether there is a tensor."""
        return (part, suffix, layer) in self._names

    def __call__(self, part: str, suffix: str | None = None, layer: str | None = None) -> Tensor:
        """Return a tensor, such as `("to_q", "weight", "0")` of the first layer.

        Raises:
            ValueError: If it is missing or quantised.
        """
        where, names = f"layer {layer}, " if layer else "", " or ".join(FAMILIES["tensors"][part])
        name = self._names.get((part, suffix, layer), where + ".".join(filter(None, (names, suffix))))
        return self.read(name).T if re.search(r"\.c_\w+\.weight$", name) else self.read(name)  # GPT-2's are (in, out)

    def translate(self, name: str, config: PalmEConfig) -> Tensor:
        """Return the tensor for a name in the state dict of an encoder or a decoder.

        Raises:
            ValueError: If it is missing or quantised.
        """
        number, path, suffix = _OURS.fullmatch(name.replace(".fn.", ".")).groups()  # type: ignore[union-attr]
        layer, kind = (str(int(number) // 2), f"{'af'[int(number) % 2]}.") if number else (None, "")
        if (part := FAMILIES["modules"].get(kind + path)) is None:
            raise ValueError(f"the module has a tensor {name!r}, which no checkpoint has")
        side = "decoder" if name.startswith("net.") else "encoder"
        layers, heads = getattr(config, f"{side}_kwargs"), getattr(config, f"{side}_heads")
        dim_head, kv_heads = layers["attn_dim_head"], layers.get("attn_kv_heads", heads)
        tied = side == "decoder" and config.transformer_kwargs.get("tie_embedding") and self.has("to_logits", "weight")
        if part == "token_emb" and tied and not torch.equal(self("token_emb", "weight"), self("to_logits", "weight")):
            rule = "tie_word_embeddings=True, but the embeddings and the logits have different weights"
            raise ValueError(f"{rule}: set it to false in config.json")
        match part, suffix:
            case "positions", None:
                positions = self("positions").flatten(0, -2)[self.has("cls") :]
                grid = config.image_size // config.patch_size
                square = rearrange(positions, "(h w) d -> 1 d h w", h=round(len(positions) ** 0.5))
                if len(positions) != grid**2:  # as transformers does it
                    square = F.interpolate(square, (grid, grid), mode="bicubic", antialias=self.has("registers"))
                return rearrange(square, "1 d h w -> 1 (h w) d")
            case "positions", _:  # of a text; upstream divides by this root
                return torch.mul(self("positions")[: self._max_seq_len], config.decoder_dim**0.5)
            case "registers", _:
                first = self("cls").reshape(1, -1) + self("positions").flatten(0, -2)[:1]
                if self.has("post_emb_norm", "weight"):  # upstream normalises the patches alone
                    norm = self("post_emb_norm", "weight"), self("post_emb_norm", "bias")
                    first = F.layer_norm(first, first.shape[-1:], *norm, config.torch_layers["encoder"]["eps"])
                return torch.cat([first, self("registers")[0]]) if self.has("registers") else first
            case "patch", "weight":
                return rearrange(self("patch", "weight"), "d c p1 p2 -> d (p1 p2 c)")
            case "patch", _ if self.has("post_emb_norm", "weight"):  # CLIP has none
                return torch.zeros(config.encoder_dim)
            case "rotary", _:  # a buffer
                factor = layers["rotary_base_rescale_factor"]
                return torch.as_tensor(RotaryEmbedding(dim_head, base_rescale_factor=factor).inv_freq)
            case "q_rmsnorm" | "k_rmsnorm", _:  # upstream has one for each head, and adds 1
                gain = _interleave(self(part, "weight", layer), dim_head) - 1
                return gain.expand(heads if part == "q_rmsnorm" else kv_heads, 1, dim_head)
            case "to_q" | "to_k" | "to_v", _ if self.has("to_qkv", suffix, layer):
                return self("to_qkv", suffix, layer).chunk(3)["qkv".index(part[-1])]
            case "to_q" | "to_k", _ if layers.get("rotary_pos_emb"):
                found = _interleave(self(part, suffix, layer), dim_head)
                return _regroup(found, kv_heads, dim_head) if part == "to_q" else found
            case "to_out", "weight":
                return _regroup(self(part, suffix, layer).T, kv_heads, dim_head).T
            case "gate", "bias" if layers["ff_no_bias"]:  # upstream's gate has one, whatever the keywords say
                return torch.zeros(2 * len(self("up", "weight", layer)))
            case "gate", _:
                return torch.cat([self("up", suffix, layer), self("gate", suffix, layer)])
        return self(part, suffix, layer)


def _interleave(tensor: Tensor, dim_head: int) -> Tensor:
    """Put the two dimensions that rotary positions rotate together side by side, in each head."""
    return rearrange(tensor, "(h two d) ... -> (h d two) ...", two=2, d=dim_head // 2)


def _regroup(tensor: Tensor, kv_heads: int, dim_head: int) -> Tensor:
    """Reorder heads, of which those with the same keys are neighbours, so that they are `kv_heads` apart."""
    return rearrange(tensor, "(kv_h r d) ... -> (r kv_h d) ...", kv_h=kv_heads, d=dim_head)
