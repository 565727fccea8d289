"""The READMEs are true: their code runs and prints what they say, and their tables match the code."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import shlex
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from benchmarks.__main__ import SUBSETS, WITH_OPTIONS
from benchmarks.__main__ import parse as parse_benchmarks
from palme_xt import PalmE
from palme_xt.captioner.images import PREPROCESSING, Preprocessing
from palme_xt.captioner.options import DIGITS_MODEL
from palme_xt.captioner.training.run import Run
from palme_xt.cli import parse
from palme_xt.mapping import MAPPING
from palme_xt.storage.folder import WEIGHTS, as_safetensors
from tests.test_config import CONTRACT

ROOT = Path(__file__).parent.parent
PATHS = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "palme_xt").rglob("README.md"))]
READMES = {str(path.relative_to(ROOT)): path.read_text() for path in PATHS}
README = READMES["README.md"]
EVERYTHING = "\n".join(READMES.values())
UPSTREAM = {
    "vit": "ViTransformerWrapper",
    "encoder": "Encoder",
    "transformer": "TransformerWrapper",
    "decoder": "Decoder",
    "autoregressive": "AutoregressiveWrapper",
}
MACHINE = re.compile(
    r"\d{4}-\d\d-\d\d: Python [\d.]+, torch \S+, x-transformers [\d.]+, (.+ [\d.]+, )*\d+ threads, .+\."
)
RELATIVE = {"relative to Hugging Face", "relative to hand-wired"}

each_readme = pytest.mark.parametrize("name", READMES)


def blocks(language: str, text: str = EVERYTHING) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def table_after(marker: str) -> tuple[list[str], list[list[str]], str]:
    """Return the columns, the rows and the next paragraph of the only table that follows `marker`."""
    (after,) = EVERYTHING.split(f"<!-- {marker} -->\n")[1:]
    table, machine, *_ = after.split("\n\n")
    header, _, *rows = table.splitlines()
    return cells(header), [cells(row) for row in rows], machine


def write_run() -> None:
    """Write what the READMEs use: a run folder, and an image to caption."""
    run, config = Run("runs/gated"), replace(DIGITS_MODEL, max_seq_len=8)
    run.create(config, {}, {PREPROCESSING: Preprocessing.plain(config).to_json().encode()})
    run.write({WEIGHTS: as_safetensors(PalmE.from_config(config).state_dict())})
    Image.new("L", (32, 32)).save("x.png")


def anchors(text: str) -> set[str]:
    """Return the URL fragments of the headings, as GitHub generates them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_there_is_a_readme_for_each_part_that_has_much_to_say() -> None:
    folders = "palme_xt/captioner", "palme_xt/decoding", "palme_xt/parity", "palme_xt/pretrained"
    assert list(READMES) == ["README.md", "benchmarks/README.md", *(f"{folder}/README.md" for folder in folders)]
    linked = re.findall(r"\]\(([^)]+)\)", README)
    assert [name for name in READMES if name != "README.md" and name not in linked] == []


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 250


@each_readme
def test_lines_are_of_a_length_that_can_be_read(name: str) -> None:
    prose = re.sub(r"```(?:bash|text)\n.*?```", "", READMES[name], flags=re.DOTALL)
    long = [line for line in prose.splitlines() if len(line) > 120]
    assert [line for line in long if not line.startswith(("|", "![")) and not MACHINE.fullmatch(line)] == []


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.strip().splitlines()[-1][:40])
def test_the_code_runs_and_prints_what_it_says(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "from transformers" in code:  # in the extra `dev` alone
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    write_run()
    promised = re.findall(r"^ *print\(.*\)(?:  |\n)# (.*)$", code, flags=re.MULTILINE)
    assert len(promised) == code.count("print(")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue().splitlines() == promised


def test_all_code_is_in_languages_that_are_checked() -> None:
    assert set(re.findall(r"^```(\w*)$", EVERYTHING, flags=re.MULTILINE)) == {"python", "bash", "json", ""}
    assert EVERYTHING.count("```") == 2 * sum(len(blocks(language)) for language in ("python", "bash", "json"))


def test_every_line_of_json_is_an_object() -> None:
    lines = "".join(blocks("json")).splitlines()
    assert lines
    assert all(isinstance(json.loads(line), dict) for line in lines)


def test_the_extras_that_a_readme_installs_are_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"pip install (?:-e )?'[\w.-]+\[(\w+)\]'", EVERYTHING)
    assert len(named) >= 4
    assert set(named) <= set(extras)


def test_the_table_of_arguments_is_the_code_s() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \| .+ \|$", README, flags=re.MULTILINE)
    landings: dict[str, list[str]] = {name: [] for name in CONTRACT}
    for part, arguments in MAPPING.items():
        for keyword, name in arguments.items():
            landings[name].append(f"`{UPSTREAM[part]}({keyword})`")
    assert rows == [(name, str(default), ", ".join(landings[name])) for name, default in CONTRACT.items()]


def test_every_test_that_a_readme_names_exists() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", EVERYTHING)
    assert len(named) > 30
    assert [name for name in named if f"def {name}(" not in tests] == []


def test_every_file_that_a_readme_names_exists() -> None:
    named = re.findall(r"`((?:palme_xt|tests|benchmarks)/[^`\s]*)`", EVERYTHING)
    assert len(named) > 10
    assert [path for path in named if not (ROOT / path).exists()] == []


def write_parts(folder: Path) -> None:
    """Write the `config.json` of two models of Hugging Face."""
    llama = {"vocab_size": 3, "intermediate_size": 8, "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    for name, config in ("dinov2", {"model_type": "dinov2"}), ("smollm2", {"model_type": "llama"} | llama):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config | sizes))


COMMANDS = [
    re.split(r"(?:palme-xt|-m palme_xt) ", line, maxsplit=1)[1].split("#")[0]
    for block in blocks("bash")
    for line in block.splitlines()
    if re.search(r"(palme-xt|-m palme_xt) (train|caption|ask|source|parity)", line) and not line.startswith("pip ")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_of_each_command_are_there(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vocabulary = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    vocabulary.save("tokenizer.json")
    write_run()
    write_parts(tmp_path / "models")
    assert parse(shlex.split(command))[0] == command.split()[0]


def test_commands_with_unknown_options_are_noticed() -> None:
    assert len(COMMANDS) > 20
    with pytest.raises(ValueError, match="unrecognized arguments: --dat images"):
        parse(["train", "--dat", "images"])


def test_every_line_of_bash_is_a_command_that_is_checked() -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line and not line.startswith("#")]
    checked = re.compile(
        r"pip install -e |(\w+=\w+ )?(accelerate launch .* )?(palme-xt|-m palme_xt) |python -m benchmarks"
    )
    assert [line for line in lines if not checked.match(line)] == []


def test_the_benchmarks_that_a_readme_runs_are_there() -> None:
    commands = re.findall(r"python -m benchmarks((?: [\w-]+)*) ?(?:`|-->|\n)", EVERYTHING)
    assert len(commands) > 10
    for command in commands:
        named = command.split(" --")[0].split()
        assert parse_benchmarks(command.split()).subset == (named or list(WITH_OPTIONS if "--" in command else SUBSETS))
    with pytest.raises(SystemExit):
        parse_benchmarks(["drawing"])
    modules = re.findall(r"python -m (benchmarks\.\w+)", EVERYTHING)
    assert [name for name in modules if not (ROOT / f"{name.replace('.', '/')}.py").is_file()] == []


@pytest.mark.parametrize("subset", SUBSETS)
def test_the_table_of_each_benchmark_is_as_it_prints_it(subset: str) -> None:
    columns, rows, machine = table_after(f"python -m benchmarks {subset}")
    assert columns == list(importlib.import_module(f"benchmarks.{subset}").COLUMNS)
    assert rows
    assert {len(row) for row in rows} == {len(columns)}
    assert MACHINE.fullmatch(machine)


def test_the_table_of_peers_repeats_what_the_benchmarks_printed() -> None:
    columns, rows, machine = table_after("rows of: python -m benchmarks training memory decoding")
    measured = {
        "training step": "training",
        "peak memory of a training step": "memory",
        "decoding one token": "decoding",
    }
    assert {row[0].split(",")[0] for row in rows} == set(measured)
    for row in rows:
        what, how = re.fullmatch(r"([^,]+)(?:, (.+))?", row[0]).groups()  # type: ignore[union-attr]
        shown = dict(zip(columns, row, strict=True))
        theirs, printed, printed_on = table_after(f"python -m benchmarks {measured[what]}")
        contestant = f"palme_xt, {how}" if how else "palme_xt"
        found = [dict(zip(theirs, line, strict=True)) for line in printed]
        (same,) = [
            line
            for line in found
            if line["contestant"] == contestant
            and line["batch"] == shown["batch"]
            and line.get("tokens", "-") == shown["tokens"]
        ]
        value, unit = shown["palme_xt"].split()
        assert {f"{unit} per token", unit} & {name for name in same if same[name] == value}
        assert [shown[name] for name in RELATIVE] == [same.get(name, "crashes") for name in RELATIVE]
        assert printed_on == machine


@each_readme
def test_every_link_and_every_image_is_there(name: str) -> None:
    text = re.sub(r"```.*?```", "", READMES[name], flags=re.DOTALL)
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file.read_text()), target


def test_there_are_links_and_images() -> None:
    assert len(re.findall(r"\]\((?!http)", EVERYTHING)) > 15
    assert len(re.findall(r"^!\[.+\]\(.+\.png\)$", EVERYTHING, flags=re.MULTILINE)) >= 2


def test_accelerate_takes_its_options() -> None:
    lines = [line for line in EVERYTHING.splitlines() if "accelerate launch -" in line and not line.startswith("`")]
    assert len(lines) == 4
    for line in lines:
        words = shlex.split(line.partition("accelerate launch ")[2].partition("-m palme_xt")[0])
        launch_command_parser().parse_args([*words, "-m", "palme_xt", "train"])
    with pytest.raises(SystemExit):
        launch_command_parser().parse_args(["--num_process_es", "2", "-m", "palme_xt"])


def test_the_two_commands_come_first() -> None:
    block = blocks("bash", README)[0]
    assert [line.split("#")[0].strip() for line in block.strip().splitlines()] == [
        "pip install -e '.[train]' && palme-xt train",
        "pip install -e '.[test]'  && pytest",
    ]
    # The first lines of .ci/run that install the package run each of them verbatim.
    assert (ROOT / ".ci" / "run").read_text().count("command=$(readme_command ") == 2


def test_benchmarks_import_nothing_from_the_tests() -> None:
    imports = re.compile(r"^\s*(from|import) tests\b", flags=re.MULTILINE)
    assert [path.name for path in (ROOT / "benchmarks").glob("*.py") if imports.search(path.read_text())] == []


def test_the_changelog_has_the_version() -> None:
    import palme_xt

    assert f"## [{palme_xt.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
