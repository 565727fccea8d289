"""Decoding from the key-value cache: greedy, sampled, streamed and beam search."""
