"""Invalid batches are rejected before they reach x-transformers, with a helpful message."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from palme_xt import PalmE
from tests.models import batch, logits, small

MODEL = small()
IMG, TEXT = batch(MODEL, b=3, n=10)

BAD_IMAGES: list[tuple[Any, type[Exception], str]] = [
    (IMG[0], ValueError, "img has shape (3, 8, 8), must be (b, c, h, w), or (b, m, c, h, w) for m images each: add"),
    (IMG[0, 0], ValueError, "img has shape (8, 8), must be (b, c, h, w)"),
    (
        (IMG * 255).to(torch.uint8),
        TypeError,
        "img has dtype torch.uint8, must be floating point: preprocess it as the model's training images were, for",
    ),
    (IMG.long(), TypeError, "img has dtype torch.int64, must be floating point: convert it with img.float()"),
    (IMG.tolist(), TypeError, "img is a list, must be a torch.Tensor (b, c, h, w)"),
    (
        IMG[:, :1],
        ValueError,
        "img has shape (3, 1, 8, 8) with 1 channels, must have 3: convert the images, or build the model with "
        "vit_kwargs={'channels': 1}",
    ),
    (IMG.movedim(1, -1), ValueError, "must have 3: it looks channels-last, move them with img.movedim(-1, -3)"),
    (
        IMG[..., :4, :4],
        ValueError,
        "img has shape (3, 3, 4, 4) with 4x4 pixels, must be 8x8, the model's image_size: resize or crop the images",
    ),
    (IMG.reshape(3, 3, 4, 16), ValueError, "with 4x16 pixels, must be 8x8"),
    (IMG[:0], ValueError, "img has shape (0, 3, 8, 8), must not be empty"),
    (IMG[:, None][:, :0], ValueError, "img has shape (3, 0, 3, 8, 8), must not be empty"),
]

BAD_TEXTS: list[tuple[Any, type[Exception], str]] = [
    (TEXT[0], ValueError, "text has shape (10,), must be (b, n), batch and sequence: add the batch dimension with"),
    (TEXT[None], ValueError, "text has shape (1, 3, 10), must be (b, n), batch and sequence"),
    (TEXT.float(), TypeError, "text has dtype torch.float32, must be an integer dtype"),
    (TEXT.bool(), TypeError, "text has dtype torch.bool, must be an integer dtype"),
    (TEXT.tolist(), TypeError, "text is a list, must be a torch.Tensor (b, n) of token ids"),
    (TEXT[:, :1], ValueError, "text has shape (3, 1), must have at least 2 tokens"),
    (TEXT[:, :0], ValueError, "text has shape (3, 0), must not be empty"),
    (TEXT[:0], ValueError, "text has shape (0, 10), must not be empty"),
    (
        TEXT.clone().fill_(5).index_fill(1, torch.tensor(3), 32),
        ValueError,
        "text has ids from 5 to 32; text must have ids within 0..num_tokens-1=31, or ignore_index=-100: check the "
        "tokenizer, or raise num_tokens",
    ),
    (TEXT.clone().fill_(5).index_fill(1, torch.tensor(3), -1), ValueError, "text has ids from -1 to 5; text must"),
    (
        TEXT.clone().fill_(-100).index_fill(1, torch.tensor(0), 3),
        ValueError,
        "text has shape (3, 10) and only ignore_index=-100 after its first token; text must have at least one target, "
        "or the loss is nan: drop such batches",
    ),
]

OTHER_BATCHES: list[tuple[Any, str]] = [
    (
        TEXT[:1],
        "text has shape (1, 10) and img (3, 3, 8, 8), must have the same batch size, not 1 and 3: pass one text for "
        "each image",
    ),
    (
        TEXT.T,
        "text has shape (10, 3) and img (3, 3, 8, 8), must have the same batch size, not 10 and 3: text is (batch, "
        "sequence), so transpose it: text.T",
    ),
]


def refuses(call: Callable[[], Any], error: type[Exception], message: str, *, encodes: bool = False) -> None:
    """Assert that the call raises this error, and does not call x-transformers, except perhaps to encode images."""
    upstream = mock.Mock(side_effect=AssertionError("this reached x-transformers"))
    with (
        mock.patch.object(MODEL.encoder, "forward", MODEL.encoder.forward if encodes else upstream),
        mock.patch.object(MODEL.decoder, "forward", upstream),
        pytest.raises(error, match=re.escape(message)),
    ):
        call()


@pytest.mark.parametrize(("img", "error", "message"), BAD_IMAGES)
def test_images_are_refused(img: Any, error: type[Exception], message: str) -> None:
    refuses(lambda: MODEL(img, TEXT), error, message)
    refuses(lambda: MODEL.encode(img), error, message)


@pytest.mark.parametrize(("text", "error", "message"), BAD_TEXTS)
def test_texts_are_refused(text: Any, error: type[Exception], message: str) -> None:
    refuses(lambda: MODEL(IMG, text), error, message)


@pytest.mark.parametrize(("text", "message"), OTHER_BATCHES)
def test_other_batch_sizes_are_refused(text: Tensor, message: str) -> None:
    refuses(lambda: MODEL(IMG, text), ValueError, message, encodes=True)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"lens": [1, 2, 3]}, TypeError, "lens=[1, 2, 3] must be a tensor of ints (b,)"),
        ({"lens": torch.tensor([2, 3])}, ValueError, "lens has shape (2,), must be (3,), one length for each text"),
        ({"lens": torch.tensor([0, 2, 3])}, ValueError, "lens=[0, 2, 3]; lens must be within 1..10, the number of"),
        ({"lens": torch.tensor([1, 2, 11])}, ValueError, "lens=[1, 2, 11]; lens must be within 1..10"),
        ({"context_mask": torch.ones(3, 4)}, TypeError, "context_mask is torch.float32, must be a bool tensor (b, p)"),
        (
            {"context_mask": torch.ones(1, 4).bool()},
            ValueError,
            "context_mask has shape (1, 4), must be (b, p) = (3, 4)",
        ),
        (
            {"context_mask": torch.ones(3, 5).bool()},
            ValueError,
            "context_mask has shape (3, 5), must be (b, p) = (3",
        ),
        ({"lens": torch.tensor([1, 1, 1])}, ValueError, "text must have at least one target"),
    ],
)
def test_lens_are_refused(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    refuses(lambda: MODEL(IMG, TEXT, **kwargs), error, message, encodes="context_mask" in kwargs)


@pytest.mark.parametrize(
    ("img", "context", "error", "message"),
    [
        (None, None, ValueError, "neither img nor context is given: a model that cross-attends needs img"),
        (IMG, torch.randn(3, 4, 24), ValueError, "both img and context are given"),
        (None, torch.randn(3, 4, 7), ValueError, "context has shape (3, 4, 7), must be (b, p, encoder_dim=24)"),
        (None, torch.randn(3, 24), ValueError, "context has shape (3, 24), must be (b, p, encoder_dim=24)"),
        (None, torch.ones(3, 4, 24).long(), TypeError, "context is torch.int64, must be a floating-point tensor"),
        (None, torch.randn(2, 4, 24), ValueError, "text has shape (3, 10) and context (2, 4, 24), must have the same"),
    ],
)
def test_contexts_are_refused(img: Any, context: Any, error: type[Exception], message: str) -> None:
    refuses(lambda: MODEL(img, TEXT, context=context), error, message)


def test_a_text_only_model_refuses_a_context() -> None:
    model = small(cross_attend=False)
    arguments: dict[str, Any] = {"context": torch.randn(3, 4, 24), "context_mask": torch.ones(3, 4).bool()}
    for name, value in arguments.items():
        with pytest.raises(ValueError, match=f"{name} is only for models that cross-attend: leave it out"):
            model(None, TEXT, **{name: value})


@pytest.mark.parametrize("num_tokens", [32, 258, 40000])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16])
def test_every_integer_dtype_is_text(dtype: torch.dtype, num_tokens: int) -> None:
    model = small(num_tokens=num_tokens)
    text = TEXT + 90 if num_tokens > 32 else TEXT
    expected = model(IMG, text)
    assert torch.equal(model(IMG, text.to(dtype)), expected)
    greedy = model.generate(IMG, text, 3, temperature=0.0)
    assert torch.equal(model.generate(IMG, text.to(dtype), 3, temperature=0.0), greedy)
    mixed = [text[0].to(dtype), *text[1:]]
    assert torch.equal(model.generate(IMG, mixed, 3, temperature=0.0), greedy)


def test_a_context_of_another_dtype_is_cast_like_an_image() -> None:
    context = MODEL.encode(IMG)
    assert torch.equal(MODEL(None, TEXT, context=context.double()), MODEL(IMG, TEXT))
    assert torch.equal(
        MODEL.generate(None, TEXT, 3, context=context.double(), temperature=0.0),
        MODEL.generate(IMG, TEXT, 3, temperature=0.0),
    )


def test_a_context_mask_of_several_images_covers_all_their_patches() -> None:
    both = torch.stack([IMG, IMG], dim=1)
    mask = torch.ones(3, 8, dtype=torch.bool)
    torch.testing.assert_close(MODEL(both, TEXT, context_mask=mask), MODEL(both, TEXT))
    with pytest.raises(ValueError, match=re.escape("must be (b, p) = (3, 8)")):
        MODEL(both, TEXT, context_mask=mask[:, :4])


def test_the_ends_of_the_range_are_text() -> None:
    assert torch.isfinite(MODEL(IMG, torch.tensor([[0, 31], [31, 0], [31, 31]])))


def test_what_lies_beyond_lens_is_not_looked_at() -> None:
    lens = torch.tensor([3, 10, 5])
    rubbish = torch.where(torch.arange(10) < lens[:, None], TEXT, 10**9)
    assert torch.equal(MODEL(IMG, rubbish, lens=lens), MODEL(IMG, TEXT, lens=lens))
    assert not torch.equal(MODEL(IMG, TEXT, lens=lens), MODEL(IMG, TEXT))


def test_nan_in_an_image_is_the_users_data() -> None:
    assert torch.isnan(MODEL(IMG.masked_fill(IMG > 0, torch.nan), TEXT))


def test_a_text_longer_than_max_seq_len_is_an_error_with_absolute_positions_only() -> None:
    img, text = batch(MODEL, n=17)
    assert torch.isfinite(MODEL(img, text))
    model = small(use_abs_pos_emb=True, rotary_xpos=False)
    message = "text has 17 tokens, must have at most max_seq_len=16 with use_abs_pos_emb=True"
    with pytest.raises(ValueError, match=re.escape(message)):
        model(img, text)
    assert torch.isfinite(model(img, text[:, :16]))


def test_an_image_is_cast_to_the_weights() -> None:
    assert torch.equal(logits(MODEL, IMG.double(), TEXT), logits(MODEL, IMG, TEXT))


def test_on_a_gpu_ids_are_checked_without_waiting_for_it() -> None:
    class OnGpu(Tensor):
        """A condition that claims to be on a GPU, and fails the test if it is read."""

        is_cuda = True

        def __bool__(self) -> bool:
            raise AssertionError("read: on a GPU that waits for the device")

    from palme_xt.inputs import require

    with mock.patch("torch._assert_async") as assert_async:
        condition = torch.tensor(False).as_subclass(OnGpu)
        require(condition, lambda: "", "the rule")
    assert_async.assert_called_once_with(condition, "the rule")


def test_the_original_second_example_is_told_what_to_do() -> None:
    # zeta.models.PalmE documents 16 images with a text of shape (50, 16), which never ran.
    model = PalmE(image_size=32, patch_size=16, encoder_depth=1, decoder_depth=1)
    img, text = torch.randn(16, 3, 32, 32), torch.randint(0, 20000, (50, 16))
    with pytest.raises(ValueError, match=re.escape("text is (batch, sequence), so transpose it: text.T")):
        model(img, text)
    assert torch.isfinite(model(img, text.T))
