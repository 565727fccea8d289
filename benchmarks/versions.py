"""Which releases of x-transformers run, compute the same numbers, and still need the workarounds.

Each is installed alone in a throw-away folder, ahead of the installed one on the path: torch and the rest are shared.
`python -m benchmarks.versions 2.30.5 2.31.10` runs the given ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.machine import describe

OLDER = ("2.17.10", "2.20.1", "2.25.2", "2.25.5")
SUPPORTED = ("2.26.4", "2.27.4", "2.28.11", "2.29.4", "2.30.5", "2.31.10")  # the last patch of every minor
TESTS = ("tests/parity/test_parity.py", "tests/decoding/test_decoding.py", "tests/decoding/test_beam_search.py")
WORKAROUNDS = {
    "test_upstream_still_crashes_with_alibi_rotary_and_a_cache": "cache",
    "test_upstream_flash_attention_still_does_not_pickle": "pickle",
    "test_alibi_keeps_no_state_and_upstream_still_does": "ALiBi state",
    "test_alibi_slopes_outlive_the_meta_device_and_upstreams_still_do_not": "meta device",
    "test_upstream_still_ties_a_copy_to_the_embedding_of_its_source": "tied copies",
    "test_one_head_crashes_upstream_unless_as_wide_as_the_model": "one head",
}
CHECK_GOLDENS = """
import warnings
warnings.simplefilter("ignore")
from palme_xt.parity.drift import check
from tests.parity.goldens.make import FOLDER, GOLDENS
found = {name: check(FOLDER / name).difference for name in GOLDENS}
different = {name: difference for name, difference in found.items() if difference}
first = next(iter(different.values()), None)
print(f"{len(different)} of {len(found)} differ, first {first}" if different else "equal")
"""


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the release in `folder`."""
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)


def outcomes(folder: Path, *arguments: str) -> dict[str, bool]:
    """Whether each test passed; empty if pytest could not begin."""
    report = folder / "report.xml"
    options = ["-q", "--tb=no", "-p", "no:cacheprovider", "-W", "ignore", f"--junitxml={report}"]
    python(folder, "-m", "pytest", *options, *arguments)
    cases = ElementTree.parse(report).iter("testcase") if report.exists() else []
    return {f"{case.get('name')}": case.find("failure") is None and case.find("error") is None for case in cases}


def row(release: str) -> str:
    """The line of the table for one release."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", name]
        subprocess.run([*install, f"x-transformers=={release}"], check=True, capture_output=True)
        goldens = python(folder, "-c", CHECK_GOLDENS)
        runs = goldens.returncode == 0
        numbers = goldens.stdout.strip() if runs else goldens.stderr.strip().splitlines()[-1]
        tests = outcomes(folder, *TESTS) if runs else {}
        needed = outcomes(folder, "tests/upstream/test_modules.py", "-k", " or ".join(WORKAROUNDS)) if runs else {}
    still = [label for test, label in WORKAROUNDS.items() if needed.get(test)]
    failed = list(tests.values()).count(False)
    result = f"{failed} fail" if failed else "all pass" if tests else "-"
    return f"| {release} | {'yes' if runs else 'no'} | {numbers} | {result} | {', '.join(still) or '-'} |"


def main(releases: tuple[str, ...] = OLDER + SUPPORTED) -> None:
    print("## x-transformers releases\n")
    print(describe(), end="\n\n")
    print("| x-transformers | runs | numbers of the goldens | parity and decoding tests | workarounds needed |")
    print("|---|---|---|---|---|")
    for release in releases:
        print(row(release), flush=True)


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or OLDER + SUPPORTED)
