"""Train a captioner on scenes of handwritten digits, and show what it has learned."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, fields

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from palme_xt import digits, pictures, tokens
from palme_xt.captioning import caption
from palme_xt.config import PalmEConfig
from palme_xt.model import PalmE
from palme_xt.run import Run

DIGITS_MODEL = PalmEConfig(
    image_size=32,
    patch_size=8,
    encoder_dim=128,
    encoder_depth=3,
    encoder_heads=4,
    num_tokens=tokens.NUM_TOKENS,
    max_seq_len=64,
    decoder_dim=128,
    decoder_depth=3,
    decoder_heads=4,
    vit_kwargs={"channels": 1},
    encoder_kwargs={"attn_dim_head": 32},
    # not verbose: upstream would warn that rotary positions of 16 dimensions are few, and captions are 64 bytes at most
    decoder_kwargs={"attn_dim_head": 32, "verbose": False},
)


SAVED_IMAGES = 8


@dataclass(frozen=True)
class Training:
    """How to train.

    Args:
        steps: optimizer steps.
        batch_size: scenes a step.
        lr: peak learning rate of AdamW; it rises over the first tenth of the steps and falls along a cosine to zero.
        weight_decay: of AdamW.
        grad_clip: largest norm of the gradient.
        jitter: random affine distortion of each training digit, as a share of its size; held-out digits have none.
        eval_every: steps between evaluations on held-out scenes.
        eval_scenes: scenes of each evaluation.
        seed: of the weights and of the training scenes; held-out scenes are always the same.

    Raises:
        ValueError: a number out of its range.
    """

    steps: int = 500
    batch_size: int = 32
    lr: float = 2e-3
    weight_decay: float = 0.05
    grad_clip: float = 1.0
    jitter: float = 0.12
    eval_every: int = 100
    eval_scenes: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        may_be_zero = {"seed", "weight_decay", "jitter"}
        for option in fields(self):
            value = getattr(self, option.name)
            if not (value > 0 or (value == 0 and option.name in may_be_zero)):
                rule = "0 or more" if option.name in may_be_zero else "greater than 0"
                raise ValueError(f"{option.name}={value} must be {rule}")
        if self.seed >= 2**63:
            raise ValueError(f"seed={self.seed} must be below 2**63")


@dataclass(frozen=True)
class Outcome:
    """What training came to: the captions of held-out images, and those that the model generated."""

    true: list[str]
    predicted: list[str]
    interrupted: bool

    @property
    def exact_match(self) -> float:
        """Share of held-out images whose caption is right to the last byte."""
        return sum(map(str.__eq__, self.predicted, self.true)) / len(self.true)


def warm_up_and_decay(step: int, steps: int) -> float:
    """The share of the peak learning rate at `step` of `steps`: linear up in the first tenth, then half a cosine."""
    warm_up = steps // 10
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def check_fits(config: PalmEConfig) -> None:
    """Refuse models that cannot learn this data set.

    Raises:
        ValueError: too few tokens for bytes, too short for the longest caption, or an image without pixels to draw on.
    """
    if config.num_tokens < tokens.NUM_TOKENS:
        raise ValueError(
            f"num_tokens={config.num_tokens} must be at least {tokens.NUM_TOKENS} to train on bytes: 256, BOS and EOS"
        )
    longest = 2 + len(", ".join(f"three {quarter}" for quarter in ("top right", "bottom left", "bottom right")))
    if config.max_seq_len < longest:
        raise ValueError(f"max_seq_len={config.max_seq_len} must be at least {longest}: so long are captions, in bytes")
    if config.image_size < 8:
        raise ValueError(f"image_size={config.image_size} must be at least 8 pixels to show digits")


def train(config: PalmEConfig, training: Training, run: Run) -> Outcome:
    """Train a new model, keeping `run` usable all the while.

    An interrupt (Ctrl-C) ends the training, not the run: what has been learned is evaluated, saved and shown.

    Raises:
        ValueError: the model cannot learn this data set.
        RunError: the run folder cannot be written.
    """
    check_fits(config)
    torch.manual_seed(training.seed)
    model = PalmE.from_config(config)
    run.create(config, {"data": "digits"} | asdict(training))

    train_scans, held_out_scans = digits.load_scans()
    look = {"image_size": config.image_size, "channels": config.channels}
    held_out, true = digits.compose(
        held_out_scans, training.eval_scenes, generator=torch.Generator().manual_seed(0), **look
    )
    scenes = torch.Generator().manual_seed(training.seed)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=training.lr,
        betas=(0.9, 0.98),
        weight_decay=training.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_up_and_decay(step, training.steps))

    def evaluate(step: int, interrupted: bool = False) -> Outcome:
        run.save(model)
        outcome = Outcome(true, caption(model, held_out), interrupted)
        run.log(step=step, held_out_exact_match=outcome.exact_match)
        return outcome

    interrupted = False
    step = 0
    with tqdm(total=training.steps, desc="training", unit="step") as bar:
        shown = {"held-out exact match": "-"}
        try:
            started = time.perf_counter()
            for step in range(1, training.steps + 1):
                img, captions = digits.compose(
                    train_scans, training.batch_size, jitter=training.jitter, generator=scenes, **look
                )
                loss = model(img, tokens.encode(captions, ignore_index=config.ignore_index))
                if not loss.isfinite():
                    raise ValueError(
                        f"lr={training.lr} led to a loss of {loss.item()} at step {step}: lower it; {run.folder} has "
                        "the weights of the last evaluation, if there was one"
                    )
                optimizer.zero_grad()
                loss.backward()
                clip_grad_norm_(model.parameters(), training.grad_clip)
                optimizer.step()
                schedule.step()

                speed = training.batch_size / (time.perf_counter() - started)
                run.log(step=step, loss=loss.item(), images_per_second=speed)
                bar.set_postfix({"loss": f"{loss.item():.3f}", **shown, "images/s": f"{speed:.0f}"}, refresh=False)
                bar.update()
                if step % training.eval_every == 0 and step < training.steps:
                    shown["held-out exact match"] = f"{evaluate(step).exact_match:.1%}"
                started = time.perf_counter()
        except KeyboardInterrupt:
            interrupted = True
        outcome = evaluate(step, interrupted)
        shown["held-out exact match"] = f"{outcome.exact_match:.1%}"
        bar.set_postfix(shown)

    pictures.save_images(held_out[:SAVED_IMAGES], run.folder / "held_out")
    pictures.draw_samples(held_out, outcome.predicted, true, run.folder / "samples.png")
    pictures.draw_loss(run.metrics(), run.folder / "loss.png")
    return outcome
