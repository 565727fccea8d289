"""Print a table as Markdown, as the READMEs show it, and write it to a JSON file, with plots and profiles beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import describe

FOLDER = Path("benchmark-results")


class Report:
    """A table whose rows are printed as they are added.

    Args:
        name: Name of the subset, and of the files in `FOLDER`.
        title: Heading above the table.
        columns: Names of the columns.
        packages: Packages whose releases matter, in addition to torch and x-transformers.
    """

    def __init__(self, name: str, title: str, columns: Sequence[str], packages: Sequence[str] = ()) -> None:
        self.name, self.columns, self.packages = name, columns, packages
        self.rows: list[dict[str, object]] = []
        print(f"## {title}\n\n<!-- python -m benchmarks {name} -->")
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")

    def row(self, *cells: object) -> None:
        """Print a row."""
        self.rows.append(dict(zip(self.columns, cells, strict=True)))
        print(f"| {' | '.join(map(str, cells))} |", flush=True)

    def end(self) -> None:
        """Print the machine line under the table, and write the JSON file."""
        machine = describe(*self.packages)
        print(f"\n{machine}\n")
        FOLDER.mkdir(exist_ok=True)
        content = {"machine": machine, "rows": self.rows}
        (FOLDER / f"{self.name}.json").write_text(json.dumps(content, indent=1) + "\n")

    def profile(self, title: str, action: Callable[[], object]) -> None:
        """Run `action` and print what took the most time in it."""
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            action()
        table = profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40)
        print(f"{title}:\n\n```text\n{table}\n```\n")

    def plot(self, title: str, label: str, x: Sequence[int], lines: Mapping[str, Sequence[float]]) -> None:
        """Draw `lines` of seconds against `x`, both on logarithmic axes, and write a PNG file."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4))
        axes = figure.subplots()
        for name, seconds in lines.items():
            axes.loglog(x[: len(seconds)], seconds, "o-", label=name)
        axes.set(title=title, xlabel=label, ylabel="seconds per training step")
        axes.set_xticks(list(x), list(map(str, x)))
        axes.minorticks_off()
        axes.legend()
        axes.grid(alpha=0.3)
        FOLDER.mkdir(exist_ok=True)
        figure.savefig(FOLDER / f"{self.name}-{label.replace(' ', '-')}.png", dpi=120, bbox_inches="tight")


def ratio(value: float, reference: float | None) -> str:
    """Return `value` relative to `reference`, or a dash if there is none."""
    return "-" if reference is None else f"{value / reference:.2f}"
