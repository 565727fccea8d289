"""Answers are learned and evaluated, from any number of images, in the sentence and across it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, Features, Image, List, Value

from palme_xt import PalmE, PalmEConfig
from palme_xt.captioner import parts
from palme_xt.captioner.data.batches import Batch, load_batches
from palme_xt.captioner.images import Preprocessing
from palme_xt.captioner.options import Data, Training
from palme_xt.captioner.tokenizer import ByteTokenizer
from palme_xt.captioner.training.evaluate import answers, evaluate
from palme_xt.captioner.training.run import EVALUATION
from palme_xt.captioner.training.task import Task
from palme_xt.captioner.turns import Turn, written
from palme_xt.cli import main
from tests.captioner.captioned import TINY, content
from tests.captioner.data.test_questions import CONFIG, CROSS, Rows, example
from tests.captioner.training.test_distributed import TOLERANCE, differ, losses, train

TOKENIZER = ByteTokenizer()
CONFIG, CROSS = (replace(config, max_seq_len=40) for config in (CONFIG, CROSS))
CONFIGS = [CONFIG, CROSS, replace(CONFIG, use_abs_pos_emb=True, rotary_xpos=False, alibi_pos_bias=False)]
CPU = torch.device("cpu")


def task_of(config: PalmEConfig, source: Any = None) -> Task:
    rows = source or Rows(config=config)
    config = replace(config, bos_token=TOKENIZER.bos, eos_token=TOKENIZER.eos)
    return Task(config, Training(), Data(), TOKENIZER, Preprocessing.plain(config), rows, rows, 3)


def model_of(task: Task, seed: int = 0) -> PalmE:
    """Return a model whose answers depend on what it reads."""
    torch.manual_seed(seed)
    model = PalmE.from_config(task.config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    return model


def batch_of(task: Task) -> Batch:
    (found,) = load_batches(task.rows, range(1), lambda _: range(3), task.config, 0)
    return found


def alone(task: Task, number: int) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the images of a row as a model reads them, and its prompt, text and target mask, `(1, n)`."""
    row = example(task.rows, number)
    ids, learned = map(torch.tensor, row.text)
    images = row.imgs[None]
    if task.config.image_token is not None:
        shown: dict[str, Any] = {"img": [row.imgs]}
    elif len(row.imgs):
        shown = {"img": images}
    else:
        shown = {"img": None, "context": torch.zeros(1, 4, 16), "context_mask": torch.zeros(1, 4, dtype=torch.bool)}
    return shown, row.prompt[None], ids[None], learned[None]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_loss_is_that_of_the_answers_of_each_row(config: PalmEConfig) -> None:
    task = task_of(config)
    model, batch = model_of(task), batch_of(task)
    shown, learned = task.inputs(batch, CPU)
    found = model(**shown, **learned) * batch.targets
    losses = []
    for number in range(3):
        own, _, text, mask = alone(task, number)
        losses.append(model(**own, text=text, target_mask=mask) * mask.sum())
    torch.testing.assert_close(found, sum(losses), rtol=1e-4, atol=1e-4)
    everything = model(**shown, text=learned["text"])
    assert not torch.allclose(found / batch.targets, everything, rtol=1e-3)
    gradients = torch.autograd.grad(found, [*model.parameters()])  # of all parameters, or it raises an error
    expected = torch.autograd.grad(sum(losses), [*model.parameters()], allow_unused=True, materialize_grads=True)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", CONFIGS)
def test_predicted_answers_are_what_each_row_alone_gives(config: PalmEConfig) -> None:
    task = task_of(config)
    model = model_of(task)
    evaluation = evaluate(task, Accelerator(cpu=True), model, 0, 3)
    predicted, expected = evaluation.predicted, []
    for number in range(3):
        shown, prompt, _, _ = alone(task, number)
        expected.append(TOKENIZER.decode(model.generate(prompts=prompt, temperature=0, **shown)[0].tolist()))
    assert predicted == expected
    assert evaluation.questions == ["and?"] * 3  # the last ones, whose answers are generated
    assert len({*predicted}) == 3
    assert max(map(len, predicted)) > 5
    other = evaluate(task_of(config, Rows("where?", task.config)), Accelerator(cpu=True), model, 0, 3).predicted
    assert other != predicted  # questions count


def test_a_long_prompt_takes_no_room_from_others() -> None:
    model = model_of(task_of(CONFIG))
    long, short = (torch.tensor(written([Turn("?" * n, "")], TOKENIZER, None).ids[:-1]) for n in (30, 2))
    together = answers(model, [long, short], TOKENIZER, {"img": [None, None]})
    separately = [answers(model, [prompt], TOKENIZER, {"img": [None]})[0] for prompt in (long, short)]
    assert together == separately


@pytest.mark.parametrize("counts", [[1, 1, 1], [1, 2, 1]])
def test_several_images_are_one_longer_context(counts: list[int]) -> None:
    class Shown(Rows):
        def row(self, number: int) -> Any:
            images = torch.rand(counts[number], 3, 16, 16, generator=torch.Generator().manual_seed(number))
            return replace(Rows.row(self, 2), imgs=images)

    task = task_of(CROSS, Shown(config=CROSS))
    batch, model = batch_of(task), model_of(task)
    shown, learned = task.inputs(batch, CPU)
    assert shown["img"].shape == ((3, 3, 16, 16) if max(counts) == 1 else (3, 2, 3, 16, 16))
    assert ("context_mask" in shown) == (max(counts) > 1)  # rows of one image cost nothing more
    contexts = [model.encode(example(task.rows, number).imgs).flatten(0, 1) for number in range(3)]
    mask = torch.arange(4 * max(counts)) < 4 * torch.tensor(counts)[:, None]
    padded = torch.nn.utils.rnn.pad_sequence(contexts, batch_first=True)
    expected = model(None, context=padded, context_mask=mask, **learned)
    torch.testing.assert_close(model(**shown, **learned), expected)
    changed = shown["img"].clone()
    (changed[1, -1] if max(counts) > 1 else changed[1]).fill_(0.5)  # the last image of the second row counts
    assert not torch.allclose(model(**shown | {"img": changed}, **learned), expected)


@pytest.mark.parametrize("config", CONFIGS[:2])
def test_images_have_an_order_in_the_sentence_alone(config: PalmEConfig) -> None:
    task = task_of(config)
    model, batch = model_of(task), batch_of(task)
    found, swapped = (
        model(**shown, **learned)
        for each in (batch, replace(batch, img=batch.img[[1, 0, 2]]))
        for shown, learned in [task.inputs(each, CPU)]
    )
    assert torch.allclose(found, swapped, rtol=1e-4) == (config.image_token is None)


def test_captions_are_learned_as_they_always_were() -> None:
    class Captions(Rows):
        def row(self, number: int) -> Any:
            text = written([Turn("<image>", "one")], TOKENIZER, self.config.image_token)
            return replace(Rows.row(self, 2), usable=[text])

    shown, learned = task_of(CROSS, Captions(config=CROSS)).inputs(
        batch_of(task_of(CROSS, Captions(config=CROSS))), CPU
    )
    assert shown.keys() | learned.keys() == {"img", "text"}
    assert shown["img"].shape == (3, 3, 16, 16)
    assert "target_mask" in task_of(CROSS).inputs(batch_of(task_of(CROSS)), CPU)[1]


@pytest.mark.parametrize("config", CONFIGS[:2])
def test_embeddings_are_kept_for_each_image(config: PalmEConfig) -> None:
    task = task_of(config)
    model = model_of(task).eval()
    shown, learned = task.inputs(batch_of(task), CPU)
    expected = model(**shown, **learned)
    kept = parts.Features(model)
    model.encode = kept  # type: ignore[method-assign]
    torch.testing.assert_close(model(**shown, **learned), expected)
    count = len(kept.kept)
    assert count == (3 if config.image_token else 4)  # of the three images, and a blank one
    model(**shown, **learned)
    assert len(kept.kept) == count


def write_data(folder: Path) -> Path:
    rows = [
        {
            "images": [{"bytes": content(n), "path": f"{n}.png"} for n in range(first, first + first % 3)],
            "question": "how many?",
            "answer": f"{first % 3}",
        }
        for first in range(0, 40, 4)
    ]
    columns = Features({"images": List(Image()), "question": Value("string"), "answer": Value("string")})
    Dataset.from_list(rows, features=columns).save_to_disk(folder)
    return folder


@pytest.mark.slow
def test_two_processes_learn_the_questions_that_one_learns(tmp_path: Path) -> None:
    options = [f"--data={write_data(tmp_path / 'data')}", "--batch_size=2", "--held_out=4", "--steps=6", *TINY]
    options += ["--image_token=258", "--num_tokens=259"]
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert main(["train", *options, f"--run={alone}"]) == 0
    train("ddp", *options, f"--run={together}")  # one of them has batches of text alone
    assert (losses(together) - losses(alone)).abs().max() < TOLERANCE
    assert differ(together, alone) < TOLERANCE
    found, other = (json.loads((run / EVALUATION).read_text()) for run in (alone, together))
    assert found["predicted"] == other["predicted"]
    assert len(found["predicted"]) == len(found["references"]) == 4
    assert {reference for (reference,) in found["references"]} <= {"0", "1", "2"}
    assert (alone / "samples.png").is_file()
    assert main(["train", f"--resume={alone}", "--steps=7"]) == 0
    assert len(losses(alone)) == len(losses(together)) + 2
