"""Subclasses of x-transformers' modules, each for a defect of its releases."""
