"""Checkpoints of other libraries as upstream's modules, to build a `PalmE` from."""
