"""What the benchmarks measure with, on a CPU and, as far as a CPU can tell, on a GPU."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from benchmarks import alone, decoding, floors, growth, memory, report, startup, training
from benchmarks.__main__ import SUBSETS, WITH_OPTIONS, main, parse
from benchmarks.device import CPU, Cuda, Device
from benchmarks.peers import HAND_WIRED, HUGGING_FACE, OURS, build, draw_batch, training_steps
from benchmarks.timing import medians
from palme_xt import PalmE, PalmEConfig
from tests.devices import GPU

MODULES: dict[str, Any] = {
    "training": training,
    "memory": memory,
    "growth": growth,
    "decoding": decoding,
    "startup": startup,
}
BFLOAT16 = Device("bfloat16")


class FakeGpu:
    """The functions of `torch.cuda` that are called, which take one second and 3 MB for each action."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.clock = itertools.count()

    def Event(self, *, enable_timing: bool) -> Any:
        assert enable_timing
        event = mock.Mock()

        def record() -> None:
            self.calls.append("record")
            event.at = next(self.clock)

        event.record = record
        event.elapsed_time.side_effect = lambda end: 1e3 * (end.at - event.at)
        return event

    def __getattr__(self, name: str) -> Callable[[], Any]:
        known = {"memory_allocated": 2_000_000, "max_memory_allocated": 5_000_000, "get_device_name": "NVIDIA H100"}

        def called() -> Any:
            self.calls.append(name)
            return known.get(name)

        return called


def test_a_gpu_is_waited_for_and_counts_its_own_time_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu()
    monkeypatch.setattr("benchmarks.device.torch.cuda", gpu)
    assert Cuda().seconds(lambda: gpu.calls.append("action")) == 1
    assert gpu.calls == ["synchronize", "record", "action", "record", "synchronize"]
    gpu.calls.clear()
    assert Cuda().peak(lambda: gpu.calls.append("action")) == 3
    before = ["synchronize", "reset_peak_memory_stats", "memory_allocated"]
    assert gpu.calls == [*before, "action", "synchronize", "max_memory_allocated"]
    assert Cuda().describe().startswith("NVIDIA H100 with CUDA ")
    assert " in bfloat16, " in Cuda().describe()
    assert " in float16, " in Cuda("float16").describe()


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_modules_and_tensors_are_placed_and_cast(device: str) -> None:
    there: Device = {"cpu": BFLOAT16, "cuda": Cuda()}[device]
    tensors = [*there.place(nn.Linear(2, 2)).parameters(), *draw_batch(PalmEConfig(), 1, 3, there)]
    assert [tensor.dtype for tensor in tensors] == [torch.bfloat16] * 3 + [torch.int64]
    assert {tensor.device.type for tensor in tensors} == {device}
    assert {tensor.dtype for tensor in build(PalmEConfig(**memory.TINY), OURS)[OURS].parameters()} == {torch.float32}


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_time_is_measured(device: str) -> None:
    there: Device = {"cpu": BFLOAT16, "cuda": Cuda()}[device]
    models = build(PalmEConfig(**memory.TINY), OURS, HAND_WIRED, device=there)
    steps = training_steps(models, *draw_batch(PalmEConfig(**memory.TINY), 2, 5, there))
    assert min(medians(steps, 1, there).values()) > 0
    with mock.patch.object(type(there), "matrices", (64, 64, 64)):
        assert floors.flops_floor(steps[OURS], there) > 0
    with torch.no_grad():
        assert floors.step_floor(models[OURS].decoder.net, 2, there) > 0


def test_rounds_that_warm_up_are_not_counted() -> None:
    device = mock.Mock(warm_up=2, seconds=mock.Mock(side_effect=[100, 100, 100, 100, 3, 4, 1, 6, 2, 5]))
    assert medians({"one": int, "other": int}, 3, device) == {"one": 2, "other": 5}


def test_the_median_and_the_range_of_ratios() -> None:
    runs = [{"ours": 1.0, "theirs": 2.0}, {"ours": 3.0, "theirs": 3.0}, {"ours": 9.0, "theirs": 10.0}]
    assert report.middle(runs, "ours") == 3
    assert report.ratio(runs, "ours", "theirs") == "0.90 (0.50 to 1.00)"
    assert report.ratio(runs[:1], "ours", "theirs") == "0.50"
    assert report.ratio(runs, "theirs", "theirs") == "1.00"
    assert report.ratio(runs, "ours", "nobody") == "-"
    assert [report.short(value) for value in (0.012345, 1.2345, 12.345, 1234.5)] == ["0.0123", "1.23", "12.3", "1234"]


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_exponent_is_that_of_what_grows(exponent: float) -> None:
    for fixed in 0.0, 100.0:
        values = [fixed + 0.01 * size**exponent for size in growth.TOKENS]
        assert growth.exponent(growth.TOKENS, values) == pytest.approx(exponent)
        assert growth.exponent(growth.TOKENS, values[:6]) == pytest.approx(exponent)


def test_another_process_measures_what_this_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **kwargs: Any) -> Any:
        assert kwargs["env"]["TORCHINDUCTOR_CACHE_DIR"] == "cache"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            alone.main(command[-1])
        return mock.Mock(stdout=f"Skipped\n{printed.getvalue()}")

    monkeypatch.setattr("benchmarks.alone.subprocess.run", run)
    with mock.patch.object(Device, "peak", lambda self, action: action() or float(self.dtype == torch.bfloat16)):
        found = alone.alone("memory", BFLOAT16, OURS, 1, 4, memory.TINY, env={"TORCHINDUCTOR_CACHE_DIR": "cache"})
    assert found == {OURS: 1}


@pytest.mark.slow
def test_a_new_process_really_measures() -> None:
    small, large = (memory.measure_each(CPU, [OURS], 1, n, memory.TINY)[OURS] for n in (8, 1024))
    assert small < large
    assert alone.alone("growth", CPU, [OURS], 1, 8, 1)[OURS] > 0


def values(module: str, device: Device, *arguments: Any, env: Any = None) -> dict[str, float]:
    """Return what a process that measures might, where a run takes longer than the one before."""
    slower = 1 + next(RUN) / 100
    if module == "startup":
        return {OURS: 20 * slower}
    if module == "memory":
        return {arguments[0]: 90.0 + arguments[2] / 100}
    names = arguments[0] if module == "growth" else [OURS, HAND_WIRED, HUGGING_FACE, f"{OURS}, compiled"]
    return {name: slower if name == OURS else 2.0 for name in names}


RUN = itertools.count()


@pytest.mark.parametrize("name", WITH_OPTIONS)
@pytest.mark.parametrize("device", [pytest.param(CPU, marks=pytest.mark.slow), Cuda()], ids=["cpu", "cuda"])
def test_each_table_is_printed_for_any_device(
    name: str, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, tiny = MODULES[name], PalmEConfig(**memory.TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Cuda, "describe", lambda self: "a GPU")
    monkeypatch.setattr(Cuda, "place", lambda self, value: value)
    monkeypatch.setattr(report.Report, "profile", lambda self, title, action: action())
    monkeypatch.setattr(torch, "compile", lambda loss: loss)
    monkeypatch.setattr(growth, "profile", lambda report, config, b, n, device: None)
    for patched in module, memory:
        monkeypatch.setattr(patched, "alone", values, raising=False)
    for patch, value in {
        "PalmEConfig": lambda **arguments: tiny,
        "PalmE": mock.Mock(side_effect=lambda: PalmE.from_config(tiny), from_config=PalmE.from_config),
        "installed": lambda *names: list(names),
        "SHAPES": ((1, 8),),
        "SEQ_LEN": 2,
        "ROUNDS": 1,
        "bandwidth": lambda device: 1e9,
        "import_seconds": lambda package: 1.0,
        "prepare": lambda device, batch, *names: (build(tiny, OURS), *draw_batch(tiny, 1, 1)),
    }.items():
        monkeypatch.setattr(module, patch, value, raising=False)
    module.main(device, 3)
    printed = capsys.readouterr().out.splitlines()
    option = "" if device is CPU else " --device cuda"
    assert f"<!-- python -m benchmarks {name}{option} -->" in printed
    assert f"| {' | '.join(module.COLUMNS)} |" in printed
    (file,) = tmp_path.glob("benchmark-results/*.json")
    assert file.name == f"{name}{'' if device is CPU else '-cuda'}.json"
    content = json.loads(file.read_text())
    assert content["machine"].endswith("." if device is CPU else "threads, a GPU.")
    rows = [tuple(row.values()) for row in content["rows"]]
    assert {tuple(row) for row in content["rows"]} == {module.COLUMNS}
    if name == "growth":
        *_, last = rows
        assert last[:2] == ("relative to Hugging Face, 5 runs", 4096)
        assert " to " in last[2]
        assert last[4:] == ("1.00", "1.00", "1.00", "1.00")
        assert next(row for row in rows if row[1] == "exponent")[5:7] == ("1.00", "1.00")
        assert [row[3] for row in rows if row[1] == 8192] == ["-"]
    elif name in ("training", "decoding"):
        assert " to " in next(row for row in rows if OURS in row)[-1 if name == "decoding" else -2]
    elif name == "startup":
        assert len(rows) == (6 if device is CPU else 2)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_profile_is_sorted_by_what_the_device_spends(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    there: Device = {"cpu": CPU, "cuda": Cuda()}[device]
    weight = there.place(torch.ones(64, 64))
    report.Report("training", "Training", ["ms"], device=there).profile("Where", lambda: weight @ weight)
    assert "aten::mm" in capsys.readouterr().out


def test_options() -> None:
    assert parse([]).subset == list(SUBSETS)
    for argv in ["--device", "cuda"], ["--runs", "5"], ["--dtype", "float16"]:
        assert parse(argv).subset == list(WITH_OPTIONS)
    assert parse(["memory", "--device", "cuda"]).subset == ["memory"]
    assert (Cuda().dtype, Cuda("float32").dtype, CPU.dtype) == (torch.bfloat16, torch.float32, torch.float32)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["emoji", "--device", "cuda"], "emoji takes no options: leave them out"),
        (["--runs", "0"], "--runs 0 must be 1 or more"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_bad_options(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(argv)
    assert message in capsys.readouterr().err


def test_without_a_gpu_nothing_runs_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", "training", "--device", "cuda"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cuda needs a GPU, and torch finds none here"):
        main()
