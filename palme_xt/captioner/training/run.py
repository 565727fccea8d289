"""A run folder, as training writes it, captioning reads it, and the hub stores it.

config.json               the model's arguments, and how it was trained, under "training"
model.safetensors         the weights with the lowest held-out loss, or of the checkpoint before the first evaluation
evaluation.json           the evaluation of these weights: their step, and all held-out captions
preprocessor_config.json  how images are resized, cropped and normalised
tokenizer.json            the vocabulary, with tokenizer_config.json; both are missing if the model reads bytes
README.md                 a model card
checkpoint.safetensors    everything that resuming needs
metrics.jsonl             a line for each step and each evaluation, read by `Run.metrics`
skipped.jsonl             a line for each unusable row, held-out rows first; missing if all rows are usable
samples.png               held-out images with their generated captions
loss.png                  the loss curve
parity.safetensors        the reference that `palme-xt parity record` writes
held_out/*.png            some of the held-out images, to caption
logs/                     the files of trackers
training.lock             present during training
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from palme_xt.config import PalmEConfig
from palme_xt.storage.files import Content, explained, replace_files
from palme_xt.storage.folder import CONFIG, TRAINING, FolderError, as_json, read_json

EVALUATION = "evaluation.json"
METRICS = "metrics.jsonl"
SKIPPED = "skipped.jsonl"
LOCK = "training.lock"


class Run:
    """The files of one training run, in `folder`."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._lock = contextlib.ExitStack()

    def create(self, config: PalmEConfig, training: Mapping[str, Any], companions: Mapping[str, bytes]) -> None:
        """Create the folder and write `companions`, then `config.json`, which makes it a run.

        Raises:
            FolderError: If the folder is not empty, or cannot be created.
        """
        with explained(f"{self.folder} cannot be a run folder", FolderError):
            self.folder.mkdir(parents=True, exist_ok=True)
            empty = not any(self.folder.iterdir())
        if not empty:
            raise FolderError(f"{self.folder} is not empty: choose another folder, or resume its run with --resume")
        self.write({**companions, CONFIG: as_json(config.to_dict() | {TRAINING: dict(training)})})

    def change(self, **training: Any) -> None:
        """Replace options in `config.json`, for a resumed run that has other ones."""
        values, before = read_json(self.folder), self.training()
        if before | training != before:
            self.write({CONFIG: as_json(values | {TRAINING: before | training})})

    def lock(self) -> None:
        """Keep other processes from training this run until `unlock`, or until this process ends in any way.

        Raises:
            FolderError: If another process is training it, or the folder cannot be written.
        """
        path = self.folder / LOCK
        with self._writing(LOCK):
            file = self._lock.enter_context(open(path, "wb"))  # noqa: SIM115  # until `unlock`
        try:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which forked readers would keep
        except (BlockingIOError, PermissionError) as error:
            raise FolderError(f"{self.folder} is being trained by another process: wait until it ends") from error
        except (ImportError, OSError):  # Windows, or a file system without locks
            pass
        self._lock.callback(path.unlink)

    def unlock(self) -> None:
        """Release the lock, if this process holds it."""
        with contextlib.suppress(OSError):  # the file may stay in a folder that has become read-only
            self._lock.close()

    def log(self, **metrics: Any) -> None:
        """Append a line to `metrics.jsonl`, beginning with `step`. Numbers that are not finite are written as strings.

        Raises:
            FolderError: If the line cannot be written.
        """
        line = json.dumps({name: _finite_or_string(value) for name, value in metrics.items()}) + "\n"
        with self._writing(METRICS), open(self.folder / METRICS, "a") as file:
            file.write(line)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of `metrics.jsonl`, each step once, although a resumed run repeats steps."""
        path = self.folder / METRICS
        kept: list[dict[str, Any]] = []
        content = path.read_text() if path.exists() else ""
        # After a crash in the middle of a line, the next line was appended to it.
        for text in content.replace('{"step"', '\n{"step"').splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # cut short, or empty
                continue
            while kept and _position(kept[-1]) >= _position(line):
                kept.pop()
            kept.append(line)
        return kept

    def log_skipped(self, rows: Iterable[Mapping[str, str]]) -> None:
        """Add rows that were skipped to `skipped.jsonl`, except those that are in it: a resumed run repeats some.

        Raises:
            FolderError: If the file cannot be written.
        """
        path = self.folder / SKIPPED
        before = path.read_text().splitlines() if path.exists() else []
        lines = dict.fromkeys([*before, *(json.dumps(row) for row in rows)])
        if len(lines) > len(before):
            self.write({SKIPPED: "".join(f"{line}\n" for line in lines).encode()})

    def training(self) -> dict[str, Any]:
        """Return how the model was trained, as passed to `create`.

        Raises:
            FolderError: If this is not a run folder, or its `config.json` is damaged.
        """
        return dict(read_json(self.folder).get(TRAINING, {}))

    def write(self, contents: Mapping[str, Content]) -> None:
        """Write files atomically: a reader sees the previous file or the new one, never a part.

        Raises:
            FolderError: If a file cannot be written. It names the first of them. Saved files are unchanged.
        """
        with self._writing(next(iter(contents))):
            replace_files(self.folder, contents)

    def _writing(self, name: str) -> contextlib.AbstractContextManager[None]:
        return explained(f"{self.folder / name} cannot be written", FolderError, "; saved files are unchanged")


def _finite_or_string(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _position(line: Mapping[str, Any]) -> tuple[float, bool]:
    """Return the position of a line in the order of steps, each of which is followed by its evaluation, if any.

    The evaluation after an interrupt comes last, so that the next line replaces it: an uninterrupted run has none.
    """
    return math.inf if line.get("interrupted") else line["step"], "loss" not in line
