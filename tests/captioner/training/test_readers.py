"""The reader processes end with the training run, however it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.captioner.captioned import TINY, write_folder


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pids to ask for")
def test_a_training_that_fails_ends_with_its_readers(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", 30)
    options = [f"--data={folder}", f"--run={tmp_path / 'run'}", "--steps=2000", "--batch_size=4", "--held_out=6"]
    command = [sys.executable, "-m", "tests.captioner.training.failing", "train", *options, *TINY, "--num_workers=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode not in (0, 2, 130)
    assert "RuntimeError: raised outside the package" in done.stderr
    readers = [int(pid) for pid in done.stdout.split()]
    assert len(readers) == 2
    assert [pid for pid in readers if exists(pid)] == []
