"""Real pictures to learn from: the emoji of an npm package, with their official names, as an imagefolder.

`python -m benchmarks emoji` trains on them; `python -m benchmarks.emoji DIR` only writes them to DIR.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.report import FOLDER, Report
from palme_xt.captioner.options import PICTURES_MODEL, Data, Training
from palme_xt.captioner.tokenizer import ByteTokenizer
from palme_xt.captioner.training.loop import train
from palme_xt.captioner.training.run import Run

PACKAGE = "emoji-datasource-google@16.0.0"  # Noto Color Emoji, 64 pixels; names from Unicode 16
TRAINING = Training(steps=3000, lr=1e-3, eval_every=500)
TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}


def prepare(folder: Path) -> int:
    """Download the package with npm and write its pictures and `metadata.jsonl` into a new `folder`.

    Returns:
        How many pictures there are.
    """
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as download:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=download, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(download).glob("*.tgz")
        with tarfile.open(archive) as tar:
            tar.extractall(download, filter="data")
        package = Path(download) / "package"
        rows = list(captions(json.loads((package / "emoji.json").read_text())))
        for name, _ in rows:
            shutil.copy(package / "img" / "google" / "64" / name, folder / name)
    lines = (json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows)
    (folder / "metadata.jsonl").write_text("".join(lines))
    return len(rows)


def captions(emoji: list[dict[str, object]]) -> Iterator[tuple[str, str]]:
    """File names and captions: `waving hand sign`, and `waving hand sign: dark skin tone` of its variations."""
    for each in emoji:
        variations = each.get("skin_variations") or {}
        assert isinstance(variations, dict)
        for tones, shown in (("", each), *variations.items()):
            if shown["has_img_google"]:
                caption = str(each["name"]).lower()
                if tones:
                    caption += ": " + ", ".join(TONES[tone] for tone in tones.split("-"))
                yield str(shown["image"]), caption


def main() -> None:
    report = Report("emoji", "Captioning emoji", "accelerate", "datasets", "pillow")
    run = Run(FOLDER / f"emoji-{time.strftime('%Y%m%d-%H%M%S')}")
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder) / "emoji")
        rows = [json.loads(line) for line in (Path(folder) / "emoji" / "metadata.jsonl").read_text().splitlines()]
        started = time.perf_counter()
        outcome = train(PICTURES_MODEL, TRAINING, Data(str(Path(folder) / "emoji")), ByteTokenizer(), run)
        minutes = (time.perf_counter() - started) / 60
    held_out = list(outcome.evaluation.true)
    trained = {row["text"].split(": ")[0] for row in rows if row["text"] not in held_out}
    right: dict[str, list[bool]] = {"all": [], "another skin tone was trained on": [], "none was": []}
    for true, predicted in zip(outcome.evaluation.true, outcome.evaluation.predicted, strict=True):
        kind = list(right)[1 if true.split(": ")[0] in trained else 2]
        for which in "all", kind:
            right[which].append(true == predicted)
    report.header("held-out pictures", "how many", "exactly right")
    for which, matches in right.items():
        report.row(which, len(matches), f"{sum(matches) / len(matches):.1%}")
    report.end()
    print(f"{len(rows)} pictures, {TRAINING.steps} steps, {minutes:.0f} minutes, run folder {run.folder}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.emoji", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="new folder")
    print(f"{prepare(parser.parse_args().folder)} pictures")
