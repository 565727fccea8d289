"""Measure what the READMEs report: `python -m benchmarks [SUBSET ...]` prints their tables as Markdown."""
