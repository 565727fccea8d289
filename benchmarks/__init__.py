"""What the README's numbers come from: `python -m benchmarks [SUBSET ...]` prints them as Markdown tables."""
