"""The tensors of a Hugging Face checkpoint, under the names and in the order of x-transformers' modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from x_transformers.x_transformers import RotaryEmbedding

from palme_xt.config import PalmEConfig

# Name here: names in checkpoints, which depend on the family and on the release of transformers.
_NAMES = {
    "cls": r"embeddings\.(?:cls_token|class_embedding)",
    "registers": r"embeddings\.register_tokens",
    "positions": r"embeddings\.position_embeddings|embeddings\.position_embedding\.weight|wpe\.weight",
    "patch": r"embeddings\.(?:patch_embeddings\.projection|patch_embedding)",
    "post_emb_norm": r"pre_layrnorm",
    "norm1": r"layernorm_before|layer_norm1|norm1|input_layernorm|ln_1",
    "norm2": r"layernorm_after|layer_norm2|norm2|post_attention_layernorm|ln_2",
    "final_norm": r"layernorm|post_layernorm|norm|ln_f",
    "to_q": r"attention\.attention\.query|attention\.q_proj|self_attn\.q_proj",
    "to_k": r"attention\.attention\.key|attention\.k_proj|self_attn\.k_proj",
    "to_v": r"attention\.attention\.value|attention\.v_proj|self_attn\.v_proj",
    "to_qkv": r"attn\.c_attn",
    "to_out": r"attention\.output\.dense|attention\.o_proj|self_attn\.(?:o|out)_proj|attn\.c_proj",
    "q_rmsnorm": r"self_attn\.q_norm",
    "k_rmsnorm": r"self_attn\.k_norm",
    "scale1": r"layer_scale1\.lambda1",
    "scale2": r"layer_scale2\.lambda1",
    "up": r"intermediate\.dense|mlp\.fc1|mlp\.up_proj|mlp\.c_fc",
    "gate": r"mlp\.gate_proj",
    "down": r"output\.dense|mlp\.fc2|mlp\.down_proj|mlp\.c_proj",
    "token_emb": r"embed_tokens|wte",
    "to_logits": r"lm_head",
}
_MODEL = r"(?:(?:model|transformer|vit|dinov2|dinov2_with_registers|vision_model)\.)?"
_LAYER = r"(?:(?:encoder\.)?(?:layers?|h)\.(\d+)\.)?"
_PATTERNS = {part: re.compile(rf"{_MODEL}{_LAYER}(?:{names})(?:\.(weight|bias))?") for part, names in _NAMES.items()}
# What embeddings of patches, or logits, do not depend on.
_UNUSED = r"(?:.*\.)?(?:pooler\..*|mask_token|position_ids|rotary_emb\.inv_freq|attn\.(?:masked_)?bias)|classifier\..*"
_UNUSED += r"|(?:vision_model\.)?head\..*|text_model\..*|logit_scale|logit_bias|(?:visual|text)_projection\.weight"
_UNUSED_BY_CLIP, _TIED = r"|(?:vision_model\.)?post_layernorm\..*", r"|lm_head\.weight"


class Checkpoint:
    """The tensors of a checkpoint, by names here, such as "cls", "patch.bias" or "0.to_q.weight" of the first layer.

    Args:
        names: Names of the tensors.
        read: Returns a tensor, given its name.
    """

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self._read, self._rest, self.last = read, set(names), ""
        self._names: dict[str, str] = {}
        for name in self._rest:
            for part, pattern in _PATTERNS.items():
                if found := pattern.fullmatch(name):
                    self._names[".".join(filter(None, (found[1], part, found[2])))] = name

    def __contains__(self, key: str) -> bool:
        return key in self._names

    def __call__(self, key: str) -> Tensor:
        """Return a tensor in float32 at least.

        Raises:
            ValueError: If it is missing or quantised.
        """
        if key not in self:
            layer, part, suffix = re.fullmatch(r"(\d+\.)?(\w+?)(\.\w+)?", key).groups("")  # type: ignore[union-attr]
            names = _NAMES[part].replace("\\", "").replace("?:", "").replace("|", " or ")
            raise ValueError(f"a tensor is missing: {f'layer {layer[:-1]}, ' * bool(layer)}{names}{suffix}")
        self.last = name = self._names[key]
        self._rest.discard(name)
        tensor = self._read(name)
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(
                f"tensor {name!r} has dtype {tensor.dtype}, which is not supported: use 16 to 64 bit floats"
            )
        tensor = tensor.detach().cpu().to(torch.promote_types(tensor.dtype, torch.float32))
        return tensor.T if re.search(r"\.c_\w+\.weight$", name) else tensor  # GPT-2's are (in, out)

    def check_all_used(self, unused: str) -> None:
        """Reject tensors that were not read, and whose names `unused` does not match."""
        if left := sorted(name for name in self._rest if not re.fullmatch(unused, name)):
            raise ValueError(f"{len(left)} tensors are not supported, such as {left[0]!r}")


def translate(
    wanted: Mapping[str, Tensor], checkpoint: Checkpoint, part: str, config: PalmEConfig
) -> dict[str, Tensor]:
    """Return the tensors of an encoder or a decoder.

    Args:
        wanted: The state dict of the module, for its names and shapes.
        checkpoint: Where the tensors are read.
        part: "encoder" or "decoder".
        config: What the module was built from.

    Raises:
        ValueError: If a tensor is missing or has another shape, or one is left that the outputs may depend on.
    """
    found = {}
    for name, like in wanted.items():
        path = name.removeprefix("net.").removeprefix("attn_layers.").replace(".fn.", ".").split(".")
        try:
            tensor = (
                _in_layer(path, checkpoint, part, config) if path[0] == "layers" else _outside(path, checkpoint, config)
            )
            shape: Any = tuple(tensor.shape)
        except (RuntimeError, IndexError) as error:  # of operations that expect other shapes
            shape = f"not what its config says ({error})"
        if shape != tuple(like.shape):
            raise ValueError(f"the shape of {checkpoint.last!r} is {shape}: {name!r} must be {tuple(like.shape)}")
        found[name] = tensor
    clip, tied = "post_emb_norm.weight" in wanted, "net.to_logits.weight" not in wanted
    checkpoint.check_all_used(_UNUSED + _UNUSED_BY_CLIP * clip + _TIED * (tied and part == "decoder"))
    return found


def _outside(path: list[str], checkpoint: Checkpoint, config: PalmEConfig) -> Tensor:
    """Return the tensor with a name, which is split at its dots, that is not in a layer."""
    match path:
        case ["pos_embedding"]:
            grid = config.image_size // config.patch_size
            return _interpolate(_positions(checkpoint)["cls" in checkpoint :], grid, "registers" in checkpoint)
        case ["register_tokens"]:
            first = checkpoint("cls").reshape(1, -1) + _positions(checkpoint)[:1]
            if "post_emb_norm.weight" in checkpoint:  # upstream normalises the patches alone
                gain, bias = checkpoint("post_emb_norm.weight"), checkpoint("post_emb_norm.bias")
                first = F.layer_norm(first, gain.shape, gain, bias, config.torch_layers["encoder"]["eps"])
            return torch.cat([first, checkpoint("registers")[0]]) if "registers" in checkpoint else first
        case ["patch_to_embedding", _, "weight"]:
            return rearrange(checkpoint("patch.weight"), "d c p1 p2 -> d (p1 p2 c)")
        case ["patch_to_embedding", _, "bias"] if "post_emb_norm.weight" in checkpoint:  # CLIP has none
            return torch.zeros(len(checkpoint("patch.weight")))
        case ["patch_to_embedding", _, "bias"]:
            return checkpoint("patch.bias")
        case ["pos_emb", *_]:  # upstream divides by this root
            return torch.mul(checkpoint("positions"), config.decoder_dim**0.5)
        case ["rotary_pos_emb", "inv_freq"]:  # a buffer
            size, factor = map(config.decoder_kwargs.get, ("rotary_emb_dim", "rotary_base_rescale_factor"))
            return torch.as_tensor(RotaryEmbedding(size, base_rescale_factor=factor).inv_freq)
        case [name, *_, suffix]:  # token_emb, to_logits, post_emb_norm, final_norm
            return checkpoint(f"{name}.{suffix}")
    raise ValueError(f"the module has a tensor {path[0]!r}, which no checkpoint has")


def _in_layer(path: list[str], checkpoint: Checkpoint, part: str, config: PalmEConfig) -> Tensor:
    """Return the tensor with a name, which is split at its dots, that is in a layer."""
    heads, layers = getattr(config, f"{part}_heads"), getattr(config, f"{part}_kwargs")
    dim_head, kv_heads = layers["attn_dim_head"], layers.get("attn_kv_heads", heads)
    layer, place = divmod(int(path[1]), 2)  # attention, feedforward, attention, ...
    match path[2:]:
        case ["0", "0", suffix]:
            return checkpoint(f"{layer}.norm{place + 1}.{suffix}")
        case ["1", "gamma"]:
            return checkpoint(f"{layer}.scale{place + 1}")
        case ["1", "q_rmsnorm" | "k_rmsnorm" as name, "gamma"]:  # upstream has one for each head, and adds 1
            gain = _interleave(checkpoint(f"{layer}.{name}.weight"), dim_head) - 1
            return gain.expand(heads if name == "q_rmsnorm" else kv_heads, 1, dim_head)
        case ["1", "to_q" | "to_k" | "to_v" as name, suffix] if f"{layer}.to_qkv.{suffix}" in checkpoint:
            return checkpoint(f"{layer}.to_qkv.{suffix}").chunk(3)["qkv".index(name[-1])]
        case ["1", "to_q" | "to_k" | "to_v" as name, suffix]:
            found = checkpoint(f"{layer}.{name}.{suffix}")
            if name != "to_v" and layers.get("rotary_pos_emb"):
                found = _interleave(found, dim_head)
            return _regroup(found, kv_heads, dim_head) if name == "to_q" else found
        case ["1", "to_out", suffix]:
            found = checkpoint(f"{layer}.to_out.{suffix}")
            return _regroup(found.T, kv_heads, dim_head).T if suffix == "weight" else found
        case ["1", "ff", "0", "proj", suffix]:  # upstream's gate has a bias, whatever the keywords say
            if suffix == "bias" and layers["ff_no_bias"]:
                return torch.zeros(2 * len(checkpoint(f"{layer}.up.weight")))
            return torch.cat([checkpoint(f"{layer}.up.{suffix}"), checkpoint(f"{layer}.gate.{suffix}")])
        case ["1", "ff", number, *_, suffix]:
            return checkpoint(f"{layer}.{'up' if number == '0' else 'down'}.{suffix}")
    raise ValueError(f"the module has a tensor {'.'.join(path)!r}, which no checkpoint has")


def _interleave(tensor: Tensor, dim_head: int) -> Tensor:
    """Put the two dimensions that rotary positions rotate together side by side, in each head."""
    return rearrange(tensor, "(h two d) ... -> (h d two) ...", two=2, d=dim_head // 2)


def _regroup(tensor: Tensor, kv_heads: int, dim_head: int) -> Tensor:
    """Reorder heads, of which those with the same keys are neighbours, so that they are `kv_heads` apart."""
    return rearrange(tensor, "(kv_h r d) ... -> (r kv_h d) ...", kv_h=kv_heads, d=dim_head)


def _positions(checkpoint: Checkpoint) -> Tensor:
    positions = checkpoint("positions")
    return positions.reshape(-1, positions.shape[-1])


def _interpolate(positions: Tensor, grid: int, antialias: bool) -> Tensor:
    """Return positions `(1, grid * grid, d)`, interpolated as transformers does it, for `(n * n, d)`.

    It uses `antialias` for DINOv2 with registers alone.
    """
    own = round(len(positions) ** 0.5)
    if own == grid or own**2 != len(positions):
        return positions[None]
    square = rearrange(positions, "(h w) d -> 1 d h w", h=own)
    return rearrange(F.interpolate(square, (grid, grid), mode="bicubic", antialias=antialias), "1 d h w -> 1 (h w) d")
