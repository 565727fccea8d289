"""A table on the screen, as Markdown, and in a JSON file; plots and profiles beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe

FOLDER = Path("benchmark-results")


class Report:
    """One table, whose rows are printed as they come.

    Args:
        name: of the files in `FOLDER`.
        title: what stands above the table.
        packages: those whose versions matter, beside torch and x-transformers.
    """

    def __init__(self, name: str, title: str, *packages: str) -> None:
        self.name, self.machine = name, describe(*packages)
        self.columns: tuple[str, ...] = ()
        self.rows: list[dict[str, Any]] = []
        print(f"## {title}\n\n{self.machine}\n")

    def header(self, *columns: str) -> None:
        """Begin the table."""
        self.columns = columns
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")

    def row(self, *cells: object) -> None:
        """Print a row."""
        self.rows.append(dict(zip(self.columns, cells, strict=True)))
        print(f"| {' | '.join(map(str, cells))} |", flush=True)

    def end(self) -> None:
        """Write the JSON file."""
        FOLDER.mkdir(exist_ok=True)
        content = {"machine": self.machine, "rows": self.rows}
        (FOLDER / f"{self.name}.json").write_text(json.dumps(content, indent=1) + "\n")
        print()

    def profile(self, title: str, profiled: Any) -> None:
        """Print what took the most time of a profiled run."""
        table = profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40)
        print(f"{title}:\n\n```text\n{table}\n```\n")

    def plot(self, title: str, label: str, x: Sequence[int], lines: Mapping[str, Sequence[float]]) -> None:
        """Draw `lines` of seconds over `x`, both logarithmic, to a PNG file."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4))
        axes = figure.subplots()
        for name, seconds in lines.items():
            axes.loglog(x[: len(seconds)], seconds, "o-", label=name)
        axes.set(
            xlabel=label, ylabel="seconds a training step", title=title, xticks=list(x), xticklabels=list(map(str, x))
        )
        axes.minorticks_off()
        axes.legend()
        axes.grid(alpha=0.3)
        FOLDER.mkdir(exist_ok=True)
        figure.savefig(FOLDER / f"{self.name}-{label.replace(' ', '-')}.png", dpi=120, bbox_inches="tight")
