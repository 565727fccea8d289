"""Print a table as Markdown, as the READMEs show it, and write it to a JSON file, with plots and profiles beside it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch.profiler import profile

from benchmarks.device import CPU, Device
from benchmarks.machine import describe

FOLDER = Path("benchmark-results")


class Report:
    """A table whose rows are printed as they are added.

    Args:
        name: Name of the subset, and of the files in `FOLDER`.
        title: Heading above the table.
        columns: Names of the columns.
        packages: Packages whose releases matter, in addition to torch and x-transformers.
        device: Where it was measured.
    """

    def __init__(
        self, name: str, title: str, columns: Sequence[str], packages: Sequence[str] = (), device: Device = CPU
    ) -> None:
        self.name = name if device.kind == "cpu" else f"{name}-{device.kind}"
        self.columns, self.packages, self.device = columns, packages, device
        self.rows: list[dict[str, object]] = []
        options = "" if device.kind == "cpu" else f" --device {device.kind}"
        print(f"## {title}\n\n<!-- python -m benchmarks {name}{options} -->")
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")

    def row(self, *cells: object) -> None:
        """Print a row."""
        self.rows.append(dict(zip(self.columns, cells, strict=True)))
        print(f"| {' | '.join(map(str, cells))} |", flush=True)

    def end(self) -> None:
        """Print the machine line under the table, and write the JSON file."""
        machine = describe(self.device.describe(), *self.packages)
        print(f"\n{machine}\n")
        FOLDER.mkdir(exist_ok=True)
        content = {"machine": machine, "rows": self.rows}
        (FOLDER / f"{self.name}.json").write_text(json.dumps(content, indent=1) + "\n")

    def profile(self, title: str, action: Callable[[], object]) -> None:
        """Run `action` and print what took the most time in it."""
        with profile(activities=self.device.activities) as profiled:
            action()
        table = profiled.key_averages().table(sort_by=self.device.total, row_limit=15, max_name_column_width=40)
        print(f"{title}:\n\n```text\n{table}\n```\n")

    def plot(self, title: str, label: str, x: Sequence[int], lines: Mapping[str, Sequence[float]], unit: str) -> None:
        """Draw `lines` in `unit` against `x`, both on logarithmic axes, and write a PNG file."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4))
        axes = figure.subplots()
        for name, values in lines.items():
            axes.loglog(x[: len(values)], values, "o-", label=name)
        axes.set(title=title, xlabel=label, ylabel=f"{unit} per training step")
        axes.set_xticks(list(x), list(map(str, x)))
        axes.minorticks_off()
        axes.legend()
        axes.grid(alpha=0.3)
        FOLDER.mkdir(exist_ok=True)
        figure.savefig(FOLDER / f"{self.name}-{label.replace(' ', '-')}-{unit}.png", dpi=120, bbox_inches="tight")


def middle(runs: Sequence[Mapping[str, float]], name: str) -> float:
    """Return the median of a value over runs."""
    return statistics.median(run[name] for run in runs)


def ratio(runs: Sequence[Mapping[str, float]], name: str, reference: str) -> str:
    """Return the median over runs of a value relative to another, with the range if there are several runs.

    If there is no such other value, that is a dash.
    """
    if reference not in runs[0]:
        return "-"
    found = [run[name] / run[reference] for run in runs]
    spread = f" ({min(found):.2f} to {max(found):.2f})" if len(found) > 1 and name != reference else ""
    return f"{statistics.median(found):.2f}{spread}"


def short(value: float) -> str:
    """Return a number with three digits, or more in front of the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
