"""The options of `palme-xt train`: the data, how to train, and the default models."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

from palme_xt import tokens
from palme_xt.config import PalmEConfig

DIGITS = "digits"
COLUMNS = ("image_column", "text_column", "question_column", "answer_column")
NOT_OF_DIGITS = ("held_out", *COLUMNS, "fit", "streaming", "strict")
MAY_BE_ZERO = ("seed", "weight_decay", "jitter", "num_workers", "augment", "streaming", "strict")  # false is 0
PRECISIONS = ("no", "bf16")
PARTS = ("encoder", "decoder")
RESUMABLE = ("data", "steps", "patience", "device")  # options that a resumed run may change

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
    # By default, upstream would warn that 16 rotary dimensions are few, but texts are short.
    decoder_kwargs={"attn_dim_head": 32, "verbose": False},
)

# The model learns questions faster if a patch is a quarter of a scene, and without ALiBi, which keeps half of the heads
# from looking back at the images.
_INSIDE = replace(DIGITS_MODEL, image_token=tokens.NUM_TOKENS, num_tokens=tokens.NUM_TOKENS + 1, max_seq_len=96)
QUESTIONS_MODEL = replace(_INSIDE, patch_size=16, decoder_depth=2, alibi_pos_bias=False)
DIGITS_MODELS = {"captions": DIGITS_MODEL, "questions": QUESTIONS_MODEL}  # by task

PICTURES_MODEL = replace(DIGITS_MODEL, image_size=64, max_seq_len=128, vit_kwargs={})


def default_model(data: str, task: str = "captions") -> PalmEConfig:
    """Return the arguments of the model that learns these data by default."""
    return DIGITS_MODELS.get(task, DIGITS_MODEL) if data == DIGITS else PICTURES_MODEL


@dataclass(frozen=True)
class RunOptions:
    """The run to write or resume, and the tokenizer of a new run.

    Args:
        run: New run folder (default: runs/NAME-DATE-TIME).
        resume: Run to resume from its last checkpoint, as if it had never stopped. No other options are allowed, except
            `data` if the data have moved, `device`, and `steps` and `patience` to train longer.
        tokenizer: A `tokenizer.json` of the tokenizers library, or a repository on the hub (default: that of `decoder`,
            or bytes).
        bos_token: Token that begins a text (default: the tokenizer's usual one).
        eos_token: Token that ends a text (default: the tokenizer's usual one).
        device: Device to train on, such as `cpu` or `cuda:1`, in one process (default: what accelerate chooses).
    """

    run: str | None = None
    resume: str | None = None
    tokenizer: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class Data:
    """The captioned images, or the questions about images, to learn from.

    Args:
        data: `digits`: scenes of handwritten digits, composed on the fly. DIR: a folder of images with `metadata.jsonl`
            or `metadata.csv` (columns `file_name` and `text`), or with a text file for each image (`cat.txt` beside
            `cat.png`); of parquet files; of webdataset shards; or written by `save_to_disk`. FILE: a parquet file or a
            shard, or a quoted pattern such as `'shards/*.tar'`. `hf:NAME` or `hf:NAME:CONFIG`: a data set on the hub.
            Paths are relative to the working directory.
        task: What to learn from `digits`: `captions`, or answers to `questions` about one scene or two.
        held_out: The images to evaluate on: a split of the data (`validation`), a share of its images (0.1) or a number
            of images (500). By default, the data's own split `validation` or `test`; without one, a share of 0.1, or
            those of the first 500 rows of a stream. Rows that share an image are held out together.
        image_column: Column of the images, each an image or a list of images. By default, `image`, `images`, `jpg`,
            `jpeg`, `png`, `webp`, or the one column of image type; in webdataset shards, the first of these that a row
            has.
        text_column: Column of the captions, each a text or a list of texts. By default, `text`, `caption`, `captions`
            or `txt`, otherwise the conversations in `messages`. Each epoch trains on another text of a list.
        question_column: Column of the questions, which are read (default: `question`, in data without captions).
            `<image>` in them stands for each image; otherwise, images come first.
        answer_column: Column of the answers, which are learned, each a text or a list of texts (default: `answer`).
        fit: How images become squares: `crop` keeps the centre, `pad` adds borders in the mean colour, `squash` changes
            the proportions.
        streaming: Read the data during training, instead of preparing all of them first. The option needs no value.
            Every process, and each of its `num_workers`, reads the whole stream from its start and decodes its own
            share; so does a resumed run.
        shuffle_buffer: Number of rows among which a stream is shuffled; other data are shuffled as a whole.
        num_workers: Number of reader processes for each training process; 0 reads in the training process itself. Each
            keeps up to 256 MiB of decoded images in memory, unless the data are streamed.
        strict: Stop at the first row that cannot be used, instead of skipping and counting such rows. The option needs
            no value.

    Raises:
        ValueError: If a value has the wrong type, is out of range, or has no effect on the data.
    """

    data: str = DIGITS
    task: str = "captions"
    held_out: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    question_column: str | None = None
    answer_column: str | None = None
    fit: str = "crop"
    streaming: bool = False
    shuffle_buffer: int = 1000
    num_workers: int = 1
    strict: bool = False

    def __post_init__(self) -> None:
        check_values(self)
        if self.task not in DIGITS_MODELS:
            raise ValueError(f"task={self.task} must be captions or questions")
        if self.task != Data.task and self.data != DIGITS:
            raise ValueError(f"task={self.task} has no effect with data={self.data}, only with {DIGITS}: leave it out")
        if self.text_column and (self.question_column or self.answer_column):
            raise ValueError(f"text_column={self.text_column} has no effect on data with questions: leave it out")
        for name in NOT_OF_DIGITS:
            if self.data == DIGITS and (value := getattr(self, name)) != getattr(Data, name):
                rule = f"has no effect with data={DIGITS}, whose scenes are composed: leave it out"
                raise ValueError(f"{name}={value} {rule}")


@dataclass(frozen=True)
class Training:
    """How to train.

    Args:
        steps: Number of optimizer steps.
        batch_size: Number of images in each step, over all processes together.
        gradient_accumulation_steps: Number of micro-batches into which each process splits its share of a batch, to
            save memory.
        lr: Peak learning rate of AdamW. It rises linearly over the first tenth of the steps, then falls to zero along a
            cosine.
        weight_decay: Weight decay of AdamW.
        grad_clip: Largest norm of the gradient; larger gradients are scaled down to it.
        mixed_precision: `no`, or `bf16` to compute in bfloat16 where that is safe. By default, the precision given to
            `accelerate launch`, or else `no`.
        jitter: Strength of the random affine distortion of each training digit, as a share of its size. Held-out digits
            and other data are not distorted.
        augment: Vary each training image anew in each epoch: rotate it by up to 10 degrees, crop it to 0.8 to 1 of its
            side, and multiply brightness, contrast and saturation by 0.7 to 1.3. Images are never mirrored. The option
            needs no value.
        eval_every: Number of steps between evaluations on held-out images.
        patience: Stop after this number of evaluations in succession without a lower held-out loss (default: train all
            steps).
        eval_images: Largest number of held-out images in each evaluation.
        save_every: Number of steps between checkpoints.
        start: Folder of the run with whose weights training begins, `--from` on the command line.
        encoder: Pretrained encoder to begin with: a folder with Hugging Face's `config.json` and safetensors, or a name
            on the hub. It determines the arguments of the encoder and how images are normalised; `image_size` may be
            another one.
        decoder: Pretrained language model to begin with, in the same form. It determines the arguments of the decoder
            except `max_seq_len`, and the tokenizer unless `tokenizer` is given. Cross-attention is inserted into it.
        freeze: The parts that are not trained: `encoder`, `decoder`, or `encoder,decoder`. Cross-attention is always
            trained. Without `augment`, the embeddings of a frozen encoder are computed once for each image, and up to
            4 GiB of them are kept in the memory of each process.
        lr_encoder: Peak learning rate of the encoder (default: `lr`).
        lr_decoder: Peak learning rate of the decoder without its cross-attention (default: `lr`).
        log_with: Tracker to log to in addition to `metrics.jsonl`: any that accelerate knows, such as `tensorboard` or
            `wandb`, or `all` for all that are installed.
        seed: Seed of the initial weights, of dropout and of the order of the data. The held-out images do not depend on
            it.

    Raises:
        ValueError: If a value has the wrong type or is out of range, or the precision is unknown.
    """

    steps: int = 500
    batch_size: int = 32
    gradient_accumulation_steps: int = 1
    lr: float = 2e-3
    weight_decay: float = 0.05
    grad_clip: float = 1.0
    mixed_precision: str | None = None
    jitter: float = 0.12
    augment: bool = False
    eval_every: int = 100
    patience: int | None = None
    eval_images: int = 500
    save_every: int = 100
    start: str | None = None
    encoder: str | None = None
    decoder: str | None = None
    freeze: str | None = None
    lr_encoder: float | None = None
    lr_decoder: float | None = None
    log_with: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_values(self)
        if self.seed >= 2**31:
            raise ValueError(f"seed={self.seed} must be below 2**31")
        if self.mixed_precision not in (None, *PRECISIONS):
            raise ValueError(f"mixed_precision={self.mixed_precision} must be no or bf16: fp16 would need loss scaling")
        if not {*self.frozen} <= {*PARTS}:
            raise ValueError(f"freeze={self.freeze} must be encoder, decoder, or encoder,decoder")
        for part in self.frozen:
            if not (getattr(self, part) or self.start):
                remedy = f"pass --{part}, or begin with --from"
                raise ValueError(f"freeze={self.freeze} would keep a random {part}: {remedy}")
            if rate := getattr(self, f"lr_{part}"):
                raise ValueError(f"lr_{part}={rate} has no effect on a frozen {part}: leave it out")

    @property
    def frozen(self) -> list[str]:
        """The parts that are not trained."""
        return self.freeze.split(",") if self.freeze else []


def check_values(options: Any) -> None:
    """Reject a dataclass with a value that does not have the declared type, or with a number that is too small.

    Raises:
        ValueError: If there is such a value.
    """
    kinds = get_type_hints(type(options))
    for option in fields(options):
        value, kind = getattr(options, option.name), kinds[option.name]
        allowed = int | float if kind is float else kind
        if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{option.name}={value!r} must be of type {option.type}")
        positive = option.name not in MAY_BE_ZERO
        if isinstance(value, int | float) and not (value > 0 if positive else value >= 0):
            raise ValueError(f"{option.name}={value} must be {'greater than 0' if positive else '0 or more'}")


STEPS = {"captions": Training.steps, "questions": 1600}  # by task

# Options that older runs do not have, with what they did.
ADDED = {"patience": None, "augment": False, "start": None, "fit": "crop", "jitter": Training.jitter, "task": Data.task}
ADDED |= dict.fromkeys(("encoder", "decoder", "freeze", "lr_encoder", "lr_decoder", *COLUMNS[2:]))
