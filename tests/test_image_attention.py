"""Full attention among the embeddings of an image: the model equals a reference that builds the mask itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

from palme_xt import PalmE, PalmEConfig, in_sentence
from palme_xt.parity import drift
from palme_xt.source import to_source
from palme_xt.storage.folder import load, save
from palme_xt.strategies import sentences
from tests.models import SMALL
from tests.test_conversation import GREEDY, TURNS, at_once, read_at_once, talk
from tests.test_in_sentence import (
    IMAGE,
    IMAGES,
    PROMPTS,
    VARIANTS,
    P,
    alone,
    close,
    gradients,
    images,
    of,
    sentence,
    texts,
    variants,
    without_hook,
)


def full(**arguments: Any) -> PalmE:
    return of(image_attention="full", **arguments)


def network(model: PalmE, img: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits `(N, v)` of a text `(n,)`, of attention that is written out, and its ids, -1 for images."""
    embeddings, read = sentence(model, img, ids)
    mask = torch.ones(len(read), len(read)).tril().bool()
    place = 0
    for token in ids.tolist():
        size = P if token == IMAGE else 1
        mask[place : place + size, place : place + size] |= size == P
        place += size
    net = model.decoder.net
    assert not net.attn_layers.layers[0][1].attend.flash
    x = embeddings + net.pos_emb(torch.zeros(1, len(read), dtype=torch.long))
    x, frac = net.post_emb_norm(x), net.emb_frac_gradient
    x = net.project_emb(x * frac + x.detach() * (1 - frac))
    return net.to_logits(net.attn_layers(x, attn_mask=mask, causal=False))[0], read


@variants
@settings(max_examples=6)
@given(data=st.data())
def test_it_equals_the_reference(variant: str, data: st.DataObject) -> None:
    model = full(**VARIANTS[variant])
    twin = full(**VARIANTS[variant] | {"attn_flash": False})
    twin.load_state_dict(model.state_dict())
    img, text, lens, prompts = data.draw(sentences(model.config))
    loss, (logits, _) = model(img, text, lens=lens, prompt_lens=prompts, return_outputs=True)
    losses = list[Tensor]()
    for row, (own, length, prompt) in enumerate(zip(img, lens.tolist(), prompts.tolist(), strict=True)):
        expected, read = network(twin, own, text[row, :length])
        assert close(logits[row, : len(read) - 1], expected[:-1])
        start = len(sentence(twin, own, text[row, :prompt])[1])
        learned = [place for place in range(max(1, start), len(read)) if read[place] >= 0]
        losses += [F.cross_entropy(expected[place - 1], read[place]) for place in learned]
    reference = torch.stack(losses).mean()
    assert close(loss, reference)
    theirs = gradients(twin, reference)
    for name, gradient in gradients(model, model(img, text, lens=lens, prompt_lens=prompts)).items():
        assert close(gradient, theirs.get(name, torch.zeros_like(gradient))), name


def test_it_differs_from_causal_attention_in_images_alone() -> None:
    text = texts([1, 3, IMAGE, IMAGE, 4, 5])
    (_, (found, _)), (_, (causal, _)) = (m(images(1, 2), text, return_outputs=True) for m in (full(), of()))
    assert close(found[:, :2], causal[:, :2])
    assert all(not close(found[:, place], causal[:, place]) for place in range(2, found.shape[1]) if place != 5)
    # The last of the embeddings of the first image sees what it saw, but others have changed before it.
    (_, (found, _)), (_, (causal, _)) = (m(None, texts([1, 3, 4]), return_outputs=True) for m in (full(), of()))
    assert close(found, causal)


@variants
def test_decoding(variant: str) -> None:
    model = full(**VARIANTS[variant])
    greedy = model.generate(IMAGES, PROMPTS, 5, **GREEDY)
    assert torch.equal(greedy, torch.cat(alone(model, "generate", **GREEDY)))
    assert torch.equal(model.generate(IMAGES, PROMPTS, 5, cache_kv=False, **GREEDY), greedy)
    assert torch.equal(torch.stack([*model.stream(IMAGES, PROMPTS, 5, **GREEDY)], dim=1), greedy)
    assert torch.equal(model.generate(IMAGES, PROMPTS, 5, num_return_sequences=2, **GREEDY)[::2], greedy)
    beams, scores = model.beam_search(IMAGES, PROMPTS, 4, beams=2, eos_token=[])
    each = model.score(IMAGES, PROMPTS, beams[0], eos_token=[])
    torch.testing.assert_close(each.sum(dim=1), scores[0])
    causal = of(**VARIANTS[variant])
    causal.load_state_dict(model.state_dict())
    assert not torch.allclose(causal.score(IMAGES, PROMPTS, beams[0], eos_token=[]), each)


def test_without_upstreams_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = full(), texts([1, IMAGE, 3, IMAGE, 4])
    expected = model(images(1, 2), text)
    without_hook(monkeypatch)
    assert close(model(images(1, 2), text), expected)


def test_conversations() -> None:
    model = full()
    with read_at_once(model) as read:
        conversation, seen = talk(model, [*TURNS])
    assert read == [3 + 2 * P, 1, 1, 9 + 3 * P, 1, 1]  # with new images, the whole text is read again
    assert close(torch.stack(seen), at_once(model, TURNS, conversation.ids))
    turns = [TURNS[0], (torch.tensor([5, 6]), None)]
    with read_at_once(model) as read:
        conversation, seen = talk(model, turns)
    assert read == [3 + 2 * P, 1, 1, 3, 1, 1]
    assert close(torch.stack(seen), at_once(model, turns, conversation.ids))


def test_a_window_slides_over_images() -> None:
    model = full(**VARIANTS["absolute positions"], max_seq_len=12)
    how = GREEDY | {"restrict_to_max_seq_len": False}
    found = model.generate(IMAGES[:3], PROMPTS[:3], 6, **how)
    each = [model.generate([img], prompt, 6, **how) for img, prompt in zip(IMAGES[:3], PROMPTS, strict=False)]
    assert torch.equal(found, torch.cat(each))


@pytest.mark.skipif(not in_sentence.HOOK, reason="the program needs x-transformers 2.30.2")
@pytest.mark.parametrize("flash", [True, False])
def test_saved_printed_and_checked(flash: bool, tmp_path: Path) -> None:
    model, text = full(attn_flash=flash).eval(), texts([1, IMAGE, IMAGE, 3, 4], [IMAGE, 8, 3, IMAGE, 4])
    save(model, tmp_path)
    assert torch.equal(load(tmp_path)(images(2, 2), text), model(images(2, 2), text))
    drift.record_folder(tmp_path)
    assert drift.check_folder(tmp_path).difference is None
    program: dict[str, Any] = {}
    exec(to_source(model.config, str(tmp_path / "model.safetensors")), program)
    assert close(program["forward"](images(2, 2), text), model(images(2, 2), text))
    assert not close(program["forward"](images(2, 2), text), of(attn_flash=flash)(images(2, 2), text))


def test_errors() -> None:
    for arguments in {"image_attention": "full"}, {"image_token": IMAGE, "image_attention": "both"}:
        with pytest.raises(ValueError, match="must be 'causal', or 'full' with image_token"):
            PalmEConfig(**SMALL, **arguments)
    for part, name in (
        ("decoder", "attn_num_mem_kv"),
        ("decoder", "attn_l2_distance"),
        ("transformer", "num_memory_tokens"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{part}_kwargs['{name}']=1 needs image_attention='causal'")):
            full(**{f"{part}_kwargs": {name: 1}})
    with pytest.raises(ValueError, match="causal is given, but images and prompts are read by means of it"):
        full()(images(1), texts([1, IMAGE, 3]), causal=True)
    layers = Decoder(dim=32, depth=2, heads=4, attn_dim_head=8, attn_flash=True, rotary_pos_emb=True, verbose=False)
    plain = AutoregressiveWrapper(TransformerWrapper(num_tokens=32, max_seq_len=48, attn_layers=layers))
    with pytest.raises(ValueError, match="image_attention='full' needs palme_xt's decoder"):
        PalmE.from_modules(full().encoder, plain, image_token=IMAGE, image_attention="full")
    own = full(attn_flash=False)
    again = PalmE.from_modules(own.encoder, own.decoder, image_token=IMAGE, image_attention="full", bos_token=1)
    assert again.config.image_attention == "full"


def test_upstream_still_does_not_combine_masks_with_memories_and_caches() -> None:
    ids = torch.arange(6)[None]
    mask = torch.ones(6, 6).tril().bool().index_put((torch.tensor([1]), torch.tensor([2])), torch.tensor(True))
    how = {"attn_mask": mask[None, None], "causal": False}

    def net(memories: int = 0, **keywords: Any) -> Any:
        torch.manual_seed(0)
        layers = Decoder(dim=16, depth=2, heads=2, attn_dim_head=8, **keywords)
        return TransformerWrapper(num_tokens=8, max_seq_len=8, num_memory_tokens=memories, attn_layers=layers).eval()

    plain = net()
    with torch.no_grad():
        assert not close(plain(ids, **how), plain(ids))  # the mask alone works
        for memories in net(1), net(attn_num_mem_kv=1):
            with pytest.raises(RuntimeError, match="size of tensor a"):
                memories(ids, **how)
        for keyword in "attn_add_zero_kv", "attn_l2_distance":
            flash = net(attn_flash=True, **{keyword: True})
            assert torch.equal(flash(ids, **how), flash(ids))  # still causal
        _, cache = plain(ids[:, :3], return_intermediates=True)
        with pytest.raises(AssertionError):
            plain(ids, cache=cache, **how)
        assert plain(ids[:, 3:], cache=cache, input_not_include_cache=True).shape[1] == 1  # reads one of three
        assert plain(ids[:, 3:], cache=cache, input_not_include_cache=True, cache_age=0).shape[1] == 3


@pytest.mark.slow
def test_training_compiles_at_most_thrice() -> None:
    torch._dynamo.reset()
    counters.clear()
    model = full()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for n in (3, 5, 9, 4, 17, 6):
        text = torch.randint(8, 32, (2, n), generator=torch.Generator().manual_seed(n))
        text[0, n // 2] = text[1, 0] = IMAGE
        expected = gradients(model, model(images(2), text))
        found = gradients(model, compiled(images(2), text))
        assert all(close(found[name], each) for name, each in expected.items())
    assert 1 <= counters["stats"]["unique_graphs"] <= 3
    assert torch.equal(
        model.generate(IMAGES, PROMPTS, 5, compile=True, **GREEDY), model.generate(IMAGES, PROMPTS, 5, **GREEDY)
    )
