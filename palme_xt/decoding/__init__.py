"""Decoding from the key-value cache: greedy, sampled, streamed and beam search."""

from palme_xt.decoding.loop import eval_mode, evaluating

__all__ = ["eval_mode", "evaluating"]
