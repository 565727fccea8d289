"""Processes that are forked from one that has imported everything, which takes longer than what they do."""

from __future__ import annotations

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.captioner.training.process"])
