"""Decoding with the key-value cache: greedy, sampled, streamed and by beam search."""

from palme_xt.decoding.loop import evaluating as evaluating
