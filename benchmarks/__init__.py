"""Benchmarks behind the READMEs' tables. `python -m benchmarks [SUBSET ...]` prints the tables as Markdown."""
