"""Find the releases of x-transformers that run, that compute the same numbers, and that still need the workarounds.

Each release is installed alone in a temporary folder, ahead of the installed one on the path; torch and the rest are
shared. `python -m benchmarks.versions 2.30.5 2.31.10` runs the given releases. Run it from the root of the repository.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.report import Report

COLUMNS = ("x-transformers", "runs", "numbers of the goldens", "parity and decoding tests", "workarounds needed")
OLDER = ("2.17.10", "2.20.1", "2.25.2", "2.25.5")
SUPPORTED = ("2.26.4", "2.27.4", "2.28.11", "2.29.4", "2.30.5", "2.31.10")  # the last patch of every minor release
TESTS = ("tests/parity/test_parity.py", "tests/decoding/test_decoding.py", "tests/decoding/test_beam_search.py")
WORKAROUNDS = {
    "test_upstream_still_crashes_with_alibi_rotary_and_a_cache": "cache",
    "test_upstream_flash_attention_still_does_not_pickle": "pickle",
    "test_alibi_keeps_no_state_and_upstream_still_does": "ALiBi state",
    "test_alibi_slopes_outlive_the_meta_device_and_upstreams_still_do_not": "meta device",
    "test_upstream_still_ties_a_copy_to_the_embedding_of_its_source": "tied copies",
    "test_one_head_crashes_upstream_unless_as_wide_as_the_model": "one head",
}
GOLDENS = "tests/parity/goldens"
CHECK_GOLDENS = """
import sys
import warnings
from pathlib import Path
warnings.simplefilter("ignore")
from palme_xt.parity.drift import check_folder
found = [check_folder(file.parent).difference for file in sorted(Path(sys.argv[1]).glob("*/parity.safetensors"))]
different = [difference for difference in found if difference]
print(f"{len(different)} of {len(found)} differ, first {different[0]}" if different else "equal")
"""


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the release in `folder`."""
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)


def outcomes(folder: Path, *arguments: str) -> dict[str, bool]:
    """Return whether each test passed, or an empty dict if pytest could not start."""
    report = folder / "report.xml"
    options = ["-q", "--tb=no", "-p", "no:cacheprovider", "-W", "ignore", f"--junitxml={report}"]
    python(folder, "-m", "pytest", *options, *arguments)
    cases = ElementTree.parse(report).iter("testcase") if report.exists() else []
    return {f"{case.get('name')}": case.find("failure") is None and case.find("error") is None for case in cases}


def cells(release: str) -> tuple[str, ...]:
    """Return the row of the table for one release."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", name]
        subprocess.run([*install, f"x-transformers=={release}"], check=True, capture_output=True)
        goldens = python(folder, "-c", CHECK_GOLDENS, GOLDENS)
        if goldens.returncode != 0:
            return release, "no", goldens.stderr.strip().splitlines()[-1], "-", "-"
        tests = outcomes(folder, *TESTS)
        needed = outcomes(folder, "tests/upstream/test_modules.py", "-k", " or ".join(WORKAROUNDS))
    failed = list(tests.values()).count(False)
    result = f"{failed} fail" if failed else "all pass" if tests else "-"
    still = [label for test, label in WORKAROUNDS.items() if needed.get(test)]
    return release, "yes", goldens.stdout.strip(), result, ", ".join(still) or "-"


def main(releases: Sequence[str] = OLDER + SUPPORTED) -> None:
    report = Report("versions", "x-transformers releases", COLUMNS)
    for release in releases:
        report.row(*cells(release))
    report.end()


if __name__ == "__main__":
    main(sys.argv[1:] or OLDER + SUPPORTED)
