"""The tensors of a Hugging Face checkpoint, under the names and in the order of x-transformers' modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from x_transformers.x_transformers import RotaryEmbedding

# Name here: names in checkpoints, which depend on the family and on the release of transformers.
_NAMES = {
    "cls": r"embeddings\.(?:cls_token|class_embedding)",
    "registers": r"embeddings\.register_tokens",
    "positions": r"embeddings\.position_embeddings|embeddings\.position_embedding\.weight|wpe\.weight",
    "patch": r"embeddings\.(?:patch_embeddings\.projection|patch_embedding)",
    "norm0": r"pre_layrnorm",
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
_OF_CLIP, _TIED = r"|(?:vision_model\.)?post_layernorm\..*", r"|lm_head\.weight"


class Checkpoint:
    """The tensors of a checkpoint, by the names here.

    Args:
        names: Names of the tensors.
        read: Returns a tensor, given its name.
    """

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self._read, self._rest, self._last = read, set(names), ""
        self._names: dict[tuple[str, ...], str] = {}
        for name in self._rest:
            for part, pattern in _PATTERNS.items():
                if found := pattern.fullmatch(name):
                    self._names[(part, *map(str, found.groups()))] = name

    def has(self, part: str, layer: object = None, suffix: str | None = "weight") -> bool:
        """Return whether there is such a tensor."""
        return (part, str(layer), str(suffix)) in self._names

    def __call__(self, part: str, layer: object = None, suffix: str | None = "weight") -> Tensor:
        """Return a tensor in float32 at least.

        Raises:
            ValueError: If it is missing or quantised.
        """
        if not self.has(part, layer, suffix):
            place = "" if layer is None else f"layer {layer}: "
            names = _NAMES[part].replace("\\", "").replace("?:", "").replace("|", " or ")
            raise ValueError(f"a tensor is missing, {place}{names}" + (f", {suffix}" if suffix else ""))
        self._last = name = self._names[part, str(layer), str(suffix)]
        self._rest.discard(name)
        tensor = self._read(name)
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(
                f"tensor {name!r} has dtype {tensor.dtype}, which is not supported: use floats, 16 bit or more"
            )
        tensor = tensor.detach().cpu().to(torch.promote_types(tensor.dtype, torch.float32))
        return tensor.T if re.search(r"\.c_\w+\.weight$", name) else tensor  # GPT-2's are (in, out)

    def translate(
        self, wanted: Mapping[str, Tensor], tensor: Callable[[str], Tensor], unused: str
    ) -> dict[str, Tensor]:
        """Return what `tensor` returns for each name in `wanted`.

        Raises:
            ValueError: If a shape is another, or a tensor was not read, and `unused` does not match its name.
        """
        found = {}
        for name, like in wanted.items():
            try:
                found[name] = tensor(name)
                shape: Any = tuple(found[name].shape)
            except (RuntimeError, IndexError) as error:  # of operations that expect other shapes
                shape = f"not what its config says ({error})"
            if shape != tuple(like.shape):
                raise ValueError(f"the shape of {self._last!r} is {shape}: {name!r} must be {tuple(like.shape)}")
        if left := sorted(name for name in self._rest if not re.fullmatch(unused, name)):
            raise ValueError(f"{len(left)} tensors are not supported, such as {left[0]!r}")
        return found


def encoder_tensors(
    wanted: Mapping[str, Tensor], checkpoint: Checkpoint, arguments: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the tensors of a `ViTransformerWrapper`.

    Args:
        wanted: The state dict of the module, for its names and shapes.
        checkpoint: Where the tensors are read.
        arguments: Those that `encoder_arguments` returns.

    Raises:
        ValueError: If a tensor is missing, or one is left that embeddings may depend on.
    """
    eps, clip = arguments["torch_layers"]["encoder"]["eps"], "post_emb_norm" in arguments["vit_kwargs"]
    has_cls, grid = checkpoint.has("cls", suffix=None), arguments["image_size"] // arguments["patch_size"]

    def tensor(name: str) -> Tensor:
        match name.split("."):
            case ["pos_embedding"]:
                return _interpolate(_positions(checkpoint)[has_cls:], grid)
            case ["register_tokens"]:
                first = checkpoint("cls", suffix=None).reshape(1, -1) + _positions(checkpoint)[:1]
                if clip:  # upstream normalises the patches alone
                    first = F.layer_norm(
                        first, first.shape[1:], checkpoint("norm0"), checkpoint("norm0", suffix="bias"), eps
                    )
                more = [checkpoint("registers", suffix=None)[0]] if checkpoint.has("registers", suffix=None) else []
                return torch.cat([first, *more])
            case ["patch_to_embedding", _, "weight"]:
                return checkpoint("patch").permute(0, 2, 3, 1).flatten(1)
            case ["patch_to_embedding", _, "bias"] if clip:
                return torch.zeros(arguments["encoder_dim"])
            case ["patch_to_embedding", _, suffix]:
                return checkpoint("patch", suffix=suffix)
            case ["post_emb_norm", suffix]:
                return checkpoint("norm0", suffix=suffix)
        return _layer_tensor(name, checkpoint, arguments["encoder_heads"], arguments["encoder_kwargs"])

    return checkpoint.translate(wanted, tensor, _UNUSED + _OF_CLIP * clip)


def decoder_tensors(
    wanted: Mapping[str, Tensor], checkpoint: Checkpoint, arguments: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the tensors of an `AutoregressiveWrapper`. The arguments and errors are those of `encoder_tensors`."""
    layers = arguments["decoder_kwargs"]

    def tensor(name: str) -> Tensor:
        match name.removeprefix("net.").split("."):
            case ["token_emb" | "to_logits" as part, *_]:
                return checkpoint(part)
            case ["pos_emb", *_]:  # upstream divides by this root
                return checkpoint("positions", suffix=None) * arguments["decoder_dim"] ** 0.5
            case [*_, "inv_freq"]:  # a buffer
                factor = layers["rotary_base_rescale_factor"]
                return RotaryEmbedding(layers["rotary_emb_dim"], base_rescale_factor=factor).inv_freq
        return _layer_tensor(name.removeprefix("net."), checkpoint, arguments["decoder_heads"], layers)

    return checkpoint.translate(wanted, tensor, _UNUSED + _TIED * ("net.to_logits.weight" not in wanted))


def _layer_tensor(name: str, checkpoint: Checkpoint, heads: int, layers: Mapping[str, Any]) -> Tensor:
    dim_head, kv_heads = layers["attn_dim_head"], layers.get("attn_kv_heads", heads)
    rotary = layers.get("rotary_pos_emb", False)
    _, kind, *path = name.replace(".fn.", ".").split(".")
    if kind == "final_norm":
        return checkpoint("final_norm", suffix=path[0])
    layer, place = divmod(int(path[0]), 2)  # attention, feedforward, attention, ...
    match path[1:]:
        case ["0", "0", suffix]:
            return checkpoint(f"norm{place + 1}", layer, suffix)
        case ["1", "gamma"]:
            return checkpoint(f"scale{place + 1}", layer, None)
        case ["1", "q_rmsnorm" | "k_rmsnorm" as part, "gamma"]:  # upstream has one for each head, and adds 1
            gain = _interleave(checkpoint(part, layer), dim_head) - 1
            return gain.expand(heads if part == "q_rmsnorm" else kv_heads, 1, dim_head)
        case ["1", "to_q" | "to_k" | "to_v" as part, suffix] if checkpoint.has("to_qkv", layer, suffix):
            return checkpoint("to_qkv", layer, suffix).chunk(3)[("to_q", "to_k", "to_v").index(part)]
        case ["1", "to_q" | "to_k" | "to_v" as part, suffix]:
            found = checkpoint(part, layer, suffix)
            found = _interleave(found, dim_head) if rotary and part != "to_v" else found
            return _regroup(found, kv_heads, dim_head) if part == "to_q" else found
        case ["1", "to_out", suffix]:
            found = checkpoint("to_out", layer, suffix)
            return _regroup(found.T, kv_heads, dim_head).T if suffix == "weight" else found
        case ["1", "ff", "0", "proj", suffix]:  # upstream's gate has a bias, whatever the keywords say
            if suffix == "bias" and layers["ff_no_bias"]:
                return torch.zeros(2 * len(checkpoint("up", layer)))
            return torch.cat([checkpoint("up", layer, suffix), checkpoint("gate", layer, suffix)])
        case ["1", "ff", number, *_, suffix]:
            return checkpoint("up" if number == "0" else "down", layer, suffix)
    raise ValueError(f"the module has a tensor {name!r}, which no checkpoint has")


def _interleave(tensor: Tensor, dim_head: int) -> Tensor:
    """Put the two dimensions that rotary positions rotate together side by side, in each head."""
    return tensor.unflatten(0, (-1, 2, dim_head // 2)).transpose(1, 2).flatten(0, 2)


def _regroup(tensor: Tensor, kv_heads: int, dim_head: int) -> Tensor:
    """Reorder heads, of which those with the same keys are neighbours, so that they are `kv_heads` apart."""
    return tensor.unflatten(0, (kv_heads, -1, dim_head)).transpose(0, 1).flatten(0, 2)


def _positions(checkpoint: Checkpoint) -> Tensor:
    positions = checkpoint("positions", suffix=None)
    return positions.reshape(-1, positions.shape[-1])


def _interpolate(positions: Tensor, grid: int) -> Tensor:
    """Return positions `(1, grid * grid, d)`, interpolated as transformers does it, for `(n * n, d)`."""
    own = round(len(positions) ** 0.5)
    if own == grid or own**2 != len(positions):
        return positions[None]
    square = positions.unflatten(0, (own, own)).permute(2, 0, 1)[None]
    return F.interpolate(square, (grid, grid), mode="bicubic").flatten(2).transpose(1, 2)
