"""The README states only what is so: its code runs and prints what it says, its tables are those of the code."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from benchmarks.__main__ import SUBSETS
from palme_xt.cli import parse
from palme_xt.mapping import MAPPING
from tests.test_config import CONTRACT

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
UPSTREAM = {
    "vit": "ViTransformerWrapper",
    "encoder": "Encoder",
    "transformer": "TransformerWrapper",
    "decoder": "Decoder",
    "autoregressive": "AutoregressiveWrapper",
}


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.strip().splitlines()[-1][:40])
def test_the_code_runs_and_prints_what_it_says(code: str) -> None:
    promised = re.findall(r"^ *print\(.*\)(?:  |\n)# (.*)$", code, flags=re.MULTILINE)
    assert len(promised) == code.count("print(")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue().splitlines() == promised


def test_the_table_of_arguments_is_the_code_s() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \| .+ \|$", README, flags=re.MULTILINE)
    landings: dict[str, list[str]] = {name: [] for name in CONTRACT}
    for part, arguments in MAPPING.items():
        for keyword, name in arguments.items():
            landings[name].append(f"`{UPSTREAM[part]}({keyword})`")
    assert rows == [(name, str(default), ", ".join(landings[name])) for name, default in CONTRACT.items()]


def test_every_test_that_the_readme_names_exists() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", README)
    assert len(named) > 10
    assert [name for name in named if f"def {name}(" not in tests] == []


COMMANDS = [
    re.split(r"(?:palme-xt|-m palme_xt) ", line, maxsplit=1)[1].split("#")[0]
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
    if re.search(r"(palme-xt|-m palme_xt) (train|caption|source|parity)", line) and not line.startswith("pip ")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_of_each_command_are_there(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vocabulary = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    vocabulary.save("tokenizer.json")
    assert parse(shlex.split(command))[0] == command.split()[0]


def test_commands_with_unknown_options_are_noticed() -> None:
    assert len(COMMANDS) > 10
    with pytest.raises(SystemExit):
        parse(["train", "--dat", "pictures"])


def test_every_table_and_every_picture_is_there() -> None:
    measured = re.findall(r"<!-- python -m benchmarks (\w+) -->\n(.)", README)
    assert len(measured) > 5
    assert [subset for subset, first in measured if subset not in SUBSETS or first != "|"] == []
    linked = re.findall(r"\]\((?!http|#)([^)]+)\)", README)
    assert len(linked) >= 3
    assert [path for path in linked if not (ROOT / path).is_file()] == []


def test_accelerate_takes_its_options() -> None:
    lines = [line for line in README.splitlines() if "accelerate launch -" in line and not line.startswith("`")]
    assert len(lines) == 4
    for line in lines:
        words = shlex.split(line.partition("accelerate launch ")[2].partition("-m palme_xt")[0])
        launch_command_parser().parse_args([*words, "-m", "palme_xt", "train"])
    with pytest.raises(SystemExit):
        launch_command_parser().parse_args(["--num_process_es", "2", "-m", "palme_xt"])


def test_the_two_commands_come_first() -> None:
    block = README.split("```bash\n")[1].split("```")[0]
    assert [line.split("#")[0].strip() for line in block.strip().splitlines()] == [
        "pip install -e '.[train]' && palme-xt train",
        "pip install -e '.[test]'  && pytest",
    ]
    # Each is run as it stands there, by the only lines of .ci/run that install the package first.
    assert (ROOT / ".ci" / "run").read_text().count('bash -euo pipefail -c "$(readme_command ') == 2


def test_the_changelog_has_the_version() -> None:
    import palme_xt

    assert f"## [{palme_xt.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
