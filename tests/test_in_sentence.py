"""Images inside the sentence: the model equals a reference that concatenates embeddings and masks the loss."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from torch.export import Dim
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper, ViTransformerWrapper
from x_transformers import Encoder as UpstreamEncoder

from palme_xt import PalmE, PalmEConfig, in_sentence
from palme_xt.parity import drift
from palme_xt.source import to_source
from palme_xt.storage.card import model_card
from palme_xt.storage.folder import CONFIG, load, save
from palme_xt.strategies import sentences
from tests.decoding.test_compile import traced_steps
from tests.forks import FORKS
from tests.models import SMALL, small

IMAGE = 7
P = 4  # embeddings of an image
VARIANTS: dict[str, dict[str, Any]] = {
    "default flags": {},
    "no flash": {"attn_flash": False},
    "absolute positions": {"use_abs_pos_emb": True, "rotary_xpos": False, "alibi_pos_bias": False},
    "tied embeddings": {"transformer_kwargs": {"tie_embedding": True, "l2norm_embed": True}},
    "narrow embeddings": {"transformer_kwargs": {"emb_dim": 20, "post_emb_norm": True, "emb_frac_gradient": 0.5}},
}
FIRST, *REST = VARIANTS
variants = pytest.mark.parametrize("variant", [FIRST, *(pytest.param(each, marks=pytest.mark.slow) for each in REST)])


def of(**arguments: Any) -> PalmE:
    return small(**{"image_token": IMAGE, "bos_token": 1, "eos_token": 2, "max_seq_len": 48} | arguments)


def texts(*rows: list[int]) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def sentence(model: PalmE, img: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the embeddings `(1, N, e)` of one text, and its ids `(N,)`, -1 for images: what the paper describes."""
    net, found = model.decoder.net, iter(img)
    embeddings, read = [], []
    for token in ids:
        if token == IMAGE:
            embeddings.append(model.projection(model.encoder(next(found)[None], return_embeddings=True)[0]))
            read += [-1] * P
        else:
            embeddings.append(net.token_emb(token[None]))
            read.append(int(token))
    return torch.cat(embeddings)[None], torch.tensor(read)


def network(model: PalmE, embeddings: Tensor) -> Tensor:
    """Return the logits `(1, N, v)` of a sentence, written without the hooks that the model uses."""
    net = model.decoder.net
    x = embeddings + net.pos_emb(torch.zeros(embeddings.shape[:2], dtype=torch.long))
    x, frac = net.post_emb_norm(x), net.emb_frac_gradient
    x = net.project_emb(x * frac + x.detach() * (1 - frac))
    logits: Tensor = net.to_logits(net.attn_layers(x))
    return logits


def reference(
    model: PalmE, img: list[Tensor], text: Tensor, lens: Tensor, prompts: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss, and the logits of each text."""
    losses, outputs = [], []
    for own, ids, length, prompt in zip(img, text, lens.tolist(), prompts.tolist(), strict=True):
        embeddings, read = sentence(model, own, ids[:length])
        logits = network(model, embeddings)[0]
        start = len(sentence(model, own, ids[:prompt])[1])
        learned = [place for place in range(max(1, start), len(read)) if read[place] >= 0]
        losses += [F.cross_entropy(logits[place - 1], read[place]) for place in learned]
        outputs.append(logits[:-1])
    return torch.stack(losses).mean(), outputs


def gradients(model: PalmE, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def close(found: Tensor, expected: Tensor) -> bool:
    expected = expected.detach()
    return bool((found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max())))


@variants
@settings(max_examples=8)
@given(data=st.data())
def test_it_equals_the_reference(variant: str, data: st.DataObject) -> None:
    model = of(**VARIANTS[variant])
    img, text, lens, prompts = data.draw(sentences(model.config))
    expected, outputs = reference(model, img, text, lens, prompts)
    loss, (logits, _) = model(img, text, lens=lens, prompt_lens=prompts, return_outputs=True)
    for found, output in zip(logits, outputs, strict=True):
        assert close(found[: len(output)], output)
    assert close(loss, expected)
    ours = gradients(model, model(img, text, lens=lens, prompt_lens=prompts))
    theirs = gradients(model, expected)
    assert [name for name, _ in model.named_parameters() if name not in ours] == []
    for name, gradient in ours.items():
        assert close(gradient, theirs.get(name, torch.zeros_like(gradient))), name
    shown = torch.arange(text.shape[1]) < lens[:, None]
    asked = torch.arange(text.shape[1]) < prompts[:, None]
    assert torch.equal(
        model(img, text, lens=lens, target_mask=~asked), model(img, text, lens=lens, prompt_lens=prompts)
    )
    padded = text.masked_fill(~shown, model.config.ignore_index)
    assert torch.equal(model(img, padded, target_mask=~asked), model(img, text, lens=lens, prompt_lens=prompts))


def test_a_masked_prompt_is_read_and_not_as_padding() -> None:
    model, img = of(), images(1, 1)
    text, asked = texts([1, 7, 5, 6, 3, 4]), torch.tensor([4])
    loss = model(img, text, prompt_lens=asked)
    assert not torch.allclose(loss, model(img, texts([1, 7, 9, 6, 3, 4]), prompt_lens=asked))
    ignored = text.masked_fill((torch.arange(6) < 4) & (text != IMAGE), -100)
    assert not torch.allclose(loss, model(img, ignored))
    assert not torch.allclose(loss, model(img, text))


def test_masks_work_with_cross_attention_too() -> None:
    model = small()
    img, text = images(2), texts([1, 3, 5, 6, 4], [1, 9, 4, 8, 6])
    _, (logits, _) = model(img, text, return_outputs=True)
    each = F.cross_entropy(logits.mT, text[:, 1:], reduction="none")
    mask = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 0, 0, 1]]).bool()
    for outputs in False, True:
        found = model(img, text, target_mask=mask, return_outputs=outputs)
        torch.testing.assert_close(found[0] if outputs else found, each[mask[:, 1:]].mean())
    torch.testing.assert_close(
        model(img, text, prompt_lens=torch.tensor([2, 4])), each[[0, 0, 0, 1], [1, 2, 3, 3]].mean()
    )
    assert not torch.allclose(model(img, text, target_mask=mask), model(img, text))


def test_the_place_and_the_order_of_images_count() -> None:
    model, img = of(), images(1, 2)
    mask = torch.tensor([[0, 0, 0, 0, 1]]).bool()
    losses = [model(img, texts(row), target_mask=mask) for row in ([1, 7, 3, 7, 4], [1, 3, 7, 7, 4], [7, 1, 3, 7, 4])]
    losses.append(model(img.flip(1), texts([1, 7, 3, 7, 4]), target_mask=mask))
    assert len({round(loss.item(), 4) for loss in losses}) == 4


def test_the_forms_of_images_are_equal() -> None:
    model, text = of(), texts([1, 7, 3, 7, 4], [7, 7, 1, 3, 4])
    img = images(2, 2)
    expected = model(img, text)
    embeds = [model.encode(own) for own in img]
    for same in list(img), [[*img[0]], [*img[1]]]:
        assert close(model(same, text), expected)
    for encoded in embeds, torch.stack(embeds):
        assert close(model(None, text, image_embeds=encoded), expected)
    one = texts([1, 7, 3, 4], [1, 2, 7, 4])
    assert close(model(img[:, 0], one), model(img[:, :1], one))
    assert torch.equal(model(None, one, image_embeds=model.encode(img[:, 0])), model(img[:, 0], one))
    assert not close(model(img[:, 1], one), model(img[:, 0], one))


# Prompts with 2, 0, 1 and 3 images.
PROMPTS = [torch.tensor(row) for row in ([1, 7, 3, 7, 4], [1, 5], [7, 8, 9, 3], [7, 7, 1, 7])]
IMAGES = [images(2), images(0), images(1, seed=1), images(3, seed=2)]


def alone(model: PalmE, decode: str, **kwargs: Any) -> list[Any]:
    return [
        getattr(model, decode)([img], prompt[None], 5, **kwargs) for img, prompt in zip(IMAGES, PROMPTS, strict=True)
    ]


@variants
def test_decoding_is_the_same_cached_alone_and_by_the_reference(variant: str) -> None:
    model = of(**VARIANTS[variant])
    how: dict[str, Any] = {"temperature": 0.0, "eos_token": []}
    greedy = model.generate(IMAGES, PROMPTS, 5, **how)
    assert torch.equal(greedy, torch.cat(alone(model, "generate", **how)))
    assert torch.equal(model.generate(IMAGES, PROMPTS, 5, cache_kv=False, **how), greedy)
    assert torch.equal(torch.stack(list(model.stream(IMAGES, PROMPTS, 5, **how)), dim=1), greedy)
    embeds = [model.encode(img) if len(img) else torch.zeros(0, P, 24) for img in IMAGES]
    assert torch.equal(model.generate(None, PROMPTS, 5, image_embeds=embeds, **how), greedy)
    twice = model.generate(IMAGES, PROMPTS, 5, num_return_sequences=2, **how)
    assert torch.equal(twice, greedy.repeat_interleave(2, dim=0))
    assert not torch.equal(model.generate([img.flip(-1) for img in IMAGES], PROMPTS, 5, **how), greedy)
    for img, prompt, tokens in zip(IMAGES, PROMPTS, greedy, strict=True):
        ids = prompt
        for token in tokens:
            logits = network(model, sentence(model, img, ids)[0])[0, -1].detach()
            logits[IMAGE] = -torch.inf
            assert token == logits.argmax()
            ids = torch.cat([ids, token[None]])


def test_beam_search_and_score() -> None:
    model = of()
    how: dict[str, Any] = {"beams": 3, "eos_token": [5]}
    beams, scores = model.beam_search(IMAGES, PROMPTS, 4, **how)
    assert not (beams == IMAGE).any()
    for row, (img, prompt) in enumerate(zip(IMAGES, PROMPTS, strict=True)):
        own, own_scores = model.beam_search([img], prompt, 4, **how)
        assert torch.equal(own[:, 0], beams[:, row])
        torch.testing.assert_close(own_scores[:, 0], scores[:, row])
        found = model.score([img] * 3, prompt.expand(3, -1), beams[:, row], eos_token=[5])
        torch.testing.assert_close(found.sum(dim=1), scores[:, row])
    best = model.generate(IMAGES, PROMPTS, 4, **how)
    assert torch.equal(best, beams[0])
    found = model.score(IMAGES, PROMPTS, best, eos_token=[])
    for img, prompt, tokens, each in zip(IMAGES, PROMPTS, best, found, strict=True):
        text = torch.cat([prompt, tokens])[None]
        loss = model([img], text, prompt_lens=torch.tensor([len(prompt)]))
        torch.testing.assert_close(each.mean(), -loss)
    embeds = model.encode(IMAGES[0])[None]
    again = model.score(None, PROMPTS[0], best[:1], eos_token=[], image_embeds=embeds)
    torch.testing.assert_close(again, found[:1])


def test_a_placeholder_is_never_decoded() -> None:
    model = of()
    seen: list[Tensor] = []

    def prefer(ids: Tensor, logits: Tensor) -> Tensor:
        seen.append(ids)
        return logits.index_fill(-1, torch.tensor(IMAGE), 100.0)

    for how in {"temperature": 5.0, "filter_logits_fn": "top_p"}, {"beams": 2}:
        assert not (model.generate(IMAGES, PROMPTS, 8, eos_token=[], logits_processor=prefer, **how) == IMAGE).any()
    assert seen[0].shape == (4, 1 + 3 * P)
    assert [int((row == IMAGE).sum()) for row in seen[0]] == [2 * P, 0, P, 3 * P]
    with pytest.raises(ValueError, match=r"logits_processor must return logits \(4, 32\)"):
        model.generate(IMAGES, PROMPTS, 2, logits_processor=lambda ids, logits: logits[:, :2])


def test_each_text_alone_where_padding_would_be_read() -> None:
    model = of(decoder_kwargs={"shift_tokens": 1})
    greedy = model.generate(IMAGES, PROMPTS, 5, temperature=0.0, eos_token=[])
    assert torch.equal(greedy, torch.cat(alone(model, "generate", temperature=0.0, eos_token=[])))


@pytest.mark.parametrize("hook", [True, False])
def test_a_window_slides_over_images(hook: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hook:
        without_hook(monkeypatch)
    model = of(**VARIANTS["absolute positions"], max_seq_len=12)
    how: dict[str, Any] = {"temperature": 0.0, "eos_token": [], "restrict_to_max_seq_len": False}
    found = model.generate(IMAGES[:3], PROMPTS[:3], 9, **how)
    each = [model.generate([img], prompt, 9, **how) for img, prompt in zip(IMAGES[:3], PROMPTS, strict=False)]
    assert torch.equal(found, torch.cat(each))
    ids = PROMPTS[0]
    for token in found[0]:
        window = sentence(model, IMAGES[0], ids)[0][:, -12:]
        logits = network(model, window)[0, -1].detach()
        logits[IMAGE] = -torch.inf
        assert token == logits.argmax()
        ids = torch.cat([ids, token[None]])


def without_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do as with x-transformers 2.26.0 to 2.30.1."""
    monkeypatch.setattr(in_sentence, "HOOK", False)
    monkeypatch.setattr(in_sentence, "KEYWORD", "sum_embeds")


def test_without_upstreams_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    model = of()
    text, lens, prompts = (
        texts([1, 7, 3, 7, 4], [1, 5, 9], [7, 8, 9, 3]),
        torch.tensor([5, 3, 4]),
        torch.tensor([3, 1, 2]),
    )
    expected = model(IMAGES[:3], text, lens=lens, prompt_lens=prompts)
    gradient = gradients(model, expected)
    greedy = model.generate(IMAGES, PROMPTS, 5, temperature=0.0)
    without_hook(monkeypatch)
    found = model(IMAGES[:3], text, lens=lens, prompt_lens=prompts)
    assert close(found, expected)
    assert all(close(each, gradient[name]) for name, each in gradients(model, found).items())
    assert torch.equal(model.generate(IMAGES, PROMPTS, 5, temperature=0.0), greedy)


def test_without_images_every_parameter_gets_a_gradient() -> None:
    model, text = of(), texts([1, 3, 4], [1, 5, 6])
    none: list[Any] = [None, [[], []], [images(0), images(0)]]
    for img in none:
        loss = model(img, text)
        expected = network(model, model.decoder.net.token_emb(text))[:, :-1]
        assert close(loss, F.cross_entropy(expected.mT, text[:, 1:]))
        found = gradients(model, loss)
        assert set(found) == {name for name, _ in model.named_parameters()}
        assert all(not found[name].any() for name in found if not name.startswith("decoder"))
        assert all(each.isfinite().all() for each in found.values())
    blind = PalmE(**SMALL, image_token=IMAGE, encoder=None)
    gradients(blind, blind(None, text))
    assert all(weight.grad is not None for weight in blind.parameters())
    model.generate(None, text[0], 3)


TEXT = texts([1, 7, 3, 4], [1, 2, 7, 4])
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "too few": (
        {"img": images(2, 2)},
        "sample 0 has 1 placeholders and 2 images; text must have one placeholder, image_token=7, for each image",
    ),
    "ragged": ({"img": [images(1), images(0)]}, "sample 1 has 1 placeholders and 0 images; text must have one"),
    "no images": ({"img": None}, "sample 0 has 1 placeholders and 0 images; "),
    "samples": ({"img": images(3)}, "img has 3 samples, and text has 2: pass images for each"),
    "both": ({"img": images(2), "image_embeds": images(2)}, "both img and image_embeds are given: pass one of them"),
    "sizes": (
        {"img": [[images()], [torch.randn(3, 8, 4)]]},
        "must hold (m, c, h, w) or a list of (c, h, w) for each sample, all alike",
    ),
    "types": ({"img": [["a.png"], ["b.png"]]}, "img holds {('str',)}, must hold (m, c, h, w) or a list"),
    "flat list": ({"img": [images(), images()]}, "img holds {(8, 8)}, must hold (m, c, h, w) or a list of (c, h, w)"),
    "width": (
        {"img": None, "image_embeds": torch.randn(2, 4, 23)},
        "image_embeds has the shapes [(2, 4, 23)], must be what encode returns for images: (b, p, d), (b, m, p, d), or",
    ),
    "sizes of embeddings": (
        {"img": None, "image_embeds": [torch.randn(1, 4, 24), torch.randn(1, 3, 24)]},
        "image_embeds has the shapes [(1, 4, 24), (1, 3, 24)], must be what encode returns",
    ),
    "context": ({"img": images(2), "context": torch.randn(2, 4, 24)}, "context is only for models that cross-attend"),
    "mask": (
        {"img": images(2), "target_mask": torch.ones(2, 3)},
        "target_mask is torch.float32 (2, 3), must be bool (2, 4), True at what is to be learned",
    ),
    "no target": (
        {"img": images(2), "target_mask": torch.zeros(2, 4, dtype=torch.bool)},
        "text must have a target after its first token, which is no image_token and which neither prompt_lens nor",
    ),
    "prompts": (
        {"img": images(2), "prompt_lens": torch.tensor([1, 5])},
        "prompt_lens=[1, 5]; prompt_lens must be within 1..4, the number of tokens in each text",
    ),
    "clash": (
        {"img": images(2), in_sentence.KEYWORD: torch.zeros(2, 1, 32)},
        f"{in_sentence.KEYWORD} is given, but images and prompts are read by means of it: leave it out",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors(case: str) -> None:
    kwargs, message = WRONG[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        of()(text=TEXT, **kwargs)


def test_a_sample_without_images_may_be_none_or_empty() -> None:
    model = of()
    text = torch.tensor([[1, IMAGE, 4], [1, 3, 4]])
    expected = model([images(1), images(1)[:0]], text)
    assert torch.equal(model([images(1), None], text), expected)
    assert torch.equal(model([images(1), []], text), expected)
    assert not torch.allclose(model([images(1).flip(-1), None], text), expected)


def test_errors_of_decoding_and_of_other_models() -> None:
    model = of()
    with pytest.raises(ValueError, match="sample 1 has 0 placeholders and 1 images; text must have one placeholder"):
        model.generate(images(2), texts([1, 7], [1, 3]), 2)
    with pytest.raises(ValueError, match="prompts has batch size 2, must have 3, the number of images"):
        model.generate(images(3), TEXT, 2)
    with pytest.raises(ValueError, match="sample 0 has 2 placeholders and 1 images"):
        model.score(images(2), TEXT, TEXT[:, 1:3])
    with pytest.raises(
        ValueError, match=r"image_embeds is only for models with an image_token: pass context=model\.enc"
    ):
        small()(images(2), TEXT, image_embeds=torch.randn(2, 4, 24))
    with pytest.raises(ValueError, match="image_embeds is only for models with an image_token: pass context=model"):
        small().generate(images(2), TEXT, image_embeds=torch.randn(2, 4, 24))
    deep = of(transformer_kwargs={"ff_deep_embed": True})
    with pytest.raises(
        ValueError, match=re.escape("transformer_kwargs['ff_deep_embed'] reads token ids, which images")
    ):
        deep(images(2), TEXT)
    absolute = of(**VARIANTS["absolute positions"], max_seq_len=6)
    with pytest.raises(
        ValueError, match="text has 7 tokens, must have at most max_seq_len=6 with use_abs_pos_emb=True"
    ):
        absolute(images(2), TEXT)


def test_the_config() -> None:
    model = of()
    assert not model.config.cross_attend
    assert all(weight.requires_grad for weight in model.parameters())
    again = PalmEConfig.from_dict(json.loads(json.dumps(model.config.to_dict())))
    assert again == model.config != replace(again, image_token=8)
    assert {*small().state_dict()} & {*model.projection.state_dict(prefix="projection.")} == set()
    assert of(transformer_kwargs={"emb_dim": 20}).projection.weight.shape == (20, 24)
    for token in 32, -1:
        with pytest.raises(
            ValueError, match=f"image_token={token} must be a token id within 0..num_tokens-1=31: or pas"
        ):
            PalmEConfig(**SMALL, image_token=token)
    for others in {"bos_token": 3}, {"eos_token": [2, 3]}, {"autoregressive_kwargs": {"pad_value": 3}}:
        with pytest.raises(ValueError, match="image_token=3 is pad_value, bos_token or eos_token: use another id"):
            PalmEConfig(**SMALL, image_token=3, **others)


@pytest.mark.skipif(not in_sentence.HOOK, reason="the program needs x-transformers 2.30.2")
def test_the_printed_program(tmp_path: Path) -> None:
    model = of(attn_flash=False)
    save(model, tmp_path)
    program: dict[str, Any] = {}
    exec(to_source(model.config, str(tmp_path / "model.safetensors")), program)
    text = texts([1, 7, 3, 7, 4], [7, 7, 1, 3, 4])
    text[0, 2] = -100
    assert close(program["forward"](images(2, 2), text), model(images(2, 2), text))
    assert close(program["forward"](images(2), TEXT), model(images(2), TEXT))
    assert not close(program["forward"](images(2), TEXT.flip(0)), model(images(2), TEXT))


def test_a_saved_model_computes_the_same(tmp_path: Path) -> None:
    model = of().eval()
    save(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["image_token"] == IMAGE
    again = load(tmp_path)
    assert torch.equal(again(images(2), TEXT), model(images(2), TEXT))
    card = model_card(model.config)
    assert "pipeline_tag: image-to-text" in card
    assert "the place\nof each id 7" in card
    drift.record_folder(tmp_path)
    assert drift.check_folder(tmp_path).difference is None
    with torch.no_grad():
        again.projection.bias += 0.1
    save(again, tmp_path / "other")
    drift.record_folder(tmp_path / "other")
    with pytest.raises(ValueError, match="the parameters of the PalmE are not those recorded"):
        drift.check(again, tmp_path / "parity.safetensors")
    _, reference, _ = drift._read(tmp_path / "parity.safetensors")
    _, other, _ = drift._read(tmp_path / "other" / "parity.safetensors")
    assert not torch.equal(reference["projection"], other["projection"])
    assert not torch.equal(reference["decoder.net"], other["decoder.net"])


def test_modules_wired_by_hand(tmp_path: Path) -> None:
    layers = UpstreamEncoder(dim=24, depth=2, heads=2, attn_dim_head=8, verbose=False)
    encoder = ViTransformerWrapper(image_size=8, patch_size=4, attn_layers=layers)

    def decoder(**kwargs: Any) -> AutoregressiveWrapper:
        layers = Decoder(dim=32, depth=2, heads=4, attn_dim_head=8, rotary_pos_emb=True, verbose=False, **kwargs)
        return AutoregressiveWrapper(
            TransformerWrapper(num_tokens=32, max_seq_len=48, use_abs_pos_emb=False, attn_layers=layers)
        )

    plain = decoder().to(torch.float64)
    model = PalmE.from_modules(encoder.to(torch.float64), plain, image_token=IMAGE)
    assert model.decoder is plain
    assert model.projection.weight.dtype == torch.float64
    loss = model(images(2).double(), TEXT)
    save(model, tmp_path)
    assert close(load(tmp_path).double()(images(2).double(), TEXT), loss)
    with pytest.raises(ValueError, match="image_token=7 is for a decoder without cross-attention: leave it out"):
        PalmE.from_modules(encoder, decoder(cross_attend=True, cross_attn_dim_context=24), image_token=IMAGE)


@pytest.mark.slow
def test_the_papers_recipe_with_pretrained_parts(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="it is in the dev extra")
    from palme_xt.pretrained import load_decoder, load_encoder

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    vision = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=8, patch_size=4), add_pooling_layer=False)
    language = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, vocab_size=32, max_position_embeddings=48, num_key_value_heads=2)
    ).eval()
    model = PalmE.from_modules(load_encoder(vision), load_decoder(language), image_token=IMAGE)
    text, img = texts([1, 7, 3, 7, 4]), images(1, 2)
    loss = model(img, text)
    embeddings = model.projection(vision(img[0]).last_hidden_state[:, 1:])
    words = language.get_input_embeddings()(text)[0]
    read = torch.cat([words[:1], embeddings[0], words[2:3], embeddings[1], words[4:]])[None]
    logits = language(inputs_embeds=read).logits[0]
    expected = F.cross_entropy(logits[[P, 2 * P + 1]], text[0, [2, 4]])
    assert close(loss, expected)
    save(model, tmp_path)
    assert close(load(tmp_path)(img, text), loss)

    # What the paper trains: all, all but the language model, or the projection alone.
    for frozen in [], ["decoder"], ["encoder", "decoder"]:
        model.requires_grad_(True)
        for part in frozen:
            getattr(model, part).requires_grad_(False)
        found = {name.partition(".")[0] for name in gradients(model, model(img, text))}
        assert found == {"encoder", "decoder", "projection"} - {*frozen}


LENGTHS = (3, 5, 9, 4, 3, 17, 30, 6, 4, 12)  # shorter and longer than the 4 embeddings


@pytest.mark.slow
@pytest.mark.parametrize("form", ["(b, c, h, w)", "a list"])
def test_training_compiles_at_most_thrice_for_ten_lengths(form: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    model = of()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for n in LENGTHS:
        text = torch.randint(8, 32, (2, n), generator=torch.Generator().manual_seed(n))
        text[0, n // 2] = text[1, 0] = IMAGE
        img: Any = images(2) if form != "a list" else list(images(2, 1))
        prompts = torch.tensor([1, 2])
        expected = gradients(model, model(img, text, prompt_lens=prompts))
        found = gradients(model, compiled(img, text, prompt_lens=prompts))
        assert all(close(found[name], each) for name, each in expected.items())
    assert 1 <= counters["stats"]["unique_graphs"] <= 3
    with pytest.raises(
        RuntimeError, match="text must have one placeholder, image_token=7, for each image of its sample"
    ):
        compiled(img, text.masked_fill(text == IMAGE, 8), prompt_lens=prompts)


@pytest.mark.slow
def test_decoding_compiles_at_most_thrice() -> None:
    model = of()
    how: dict[str, Any] = {"temperature": 0.0, "eos_token": []}
    with traced_steps():
        for img, prompts in (IMAGES, PROMPTS), (IMAGES[:2], PROMPTS[:2]), (IMAGES[:1], PROMPTS[:1]):
            eager = model.generate(img, prompts, 6, **how)
            assert torch.equal(model.generate(img, prompts, 6, compile=True, **how), eager)
    assert 1 <= counters["stats"]["unique_graphs"] <= 3


@pytest.mark.slow
@pytest.mark.parametrize("several", [(), (2,)])
def test_export_with_dynamic_batch_and_length(several: tuple[int, ...]) -> None:
    model, b, n = of().eval(), Dim("b", min=2, max=64), Dim("n", min=4, max=4096)

    def batch(size: int, length: int) -> tuple[Tensor, Tensor]:
        text = torch.randint(8, 32, (size, length), generator=torch.Generator().manual_seed(length))
        for place in range(max(1, len(several) and several[0])):
            text[:, place + 1] = IMAGE
        return images(size, *several), text

    exported = torch.export.export(model, batch(3, 7), dynamic_shapes=({0: b}, {0: b, 1: n}))
    for sizes in (2, 4), (5, 5), (4, 30):
        inputs = batch(*sizes)
        assert close(exported.module()(*inputs), model(*inputs))
        assert not close(exported.module()(inputs[0].flip(-1), inputs[1]), model(*inputs))


def train_with_ddp(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = of()
    whole = of()
    parallel = DistributedDataParallel(model)
    text = texts([1, 7, 3, 7, 4], [1, 5, 9, 2, 3], [1, 8, 9, 4, 3], [1, 6, 9, 2, 3])
    img = [images(2), images(0), images(0), images(0)]
    for _ in range(2):  # the process of rank 1 has no image at all
        own = slice(2 * rank, 2 * rank + 2)
        found = gradients(model, parallel(img[own], text[own]))
        losses = whole(img[:2], text[:2]), whole(img[2:], text[2:])
        expected = gradients(whole, torch.stack(losses).mean())
        assert found.keys() == expected.keys()
        assert all(close(each, expected[name]) for name, each in found.items())
    dist.destroy_process_group()


@pytest.mark.slow
def test_data_parallel_with_text_only_samples_and_batches(tmp_path: Path) -> None:
    start_processes(train_with_ddp, args=(str(tmp_path / "store"),), nprocs=2, start_method=FORKS.get_start_method())
