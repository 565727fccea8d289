"""A training run that fails outside the package: `python -m tests.captioner.training.failing train ...`."""

from __future__ import annotations

import multiprocessing
import sys
from typing import Any

import torch

from palme_xt.cli import main

if __name__ == "__main__":
    step = torch.optim.AdamW.step

    def fail_at_step_3(optimizer: torch.optim.AdamW, *arguments: Any) -> Any:
        if all(state["step"] == 2 for state in optimizer.state.values()) and optimizer.state:
            print(*(reader.pid for reader in multiprocessing.active_children()))  # noqa: T201
            raise RuntimeError("raised outside the package")
        return step(optimizer, *arguments)

    torch.optim.AdamW.step = fail_at_step_3  # type: ignore[assignment, method-assign]
    sys.exit(main(sys.argv[1:]))
