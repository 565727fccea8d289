"""Train on real images, the emoji of an npm package with their official names, as an imagefolder.

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

COLUMNS = ("held-out images", "how many", "exactly right")
PACKAGE = "emoji-datasource-google@16.0.0"  # Noto Color Emoji, 64 pixels; names from Unicode 16
TRAINING = Training(steps=3000, lr=1e-3, eval_every=500)
TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}


def prepare(folder: Path) -> list[str]:
    """Download the package with npm, and write its images and `metadata.jsonl` into a new `folder`.

    Returns:
        The caption of each image.
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
    return [text for _, text in rows]


def captions(emoji: list[dict[str, object]]) -> Iterator[tuple[str, str]]:
    """Yield file names and captions, such as `waving hand sign`, and `waving hand sign: dark skin tone`."""
    for each in emoji:
        variations = each.get("skin_variations") or {}
        assert isinstance(variations, dict)
        for tones, shown in (("", each), *variations.items()):
            if shown["has_img_google"]:
                caption = str(each["name"]).lower()
                if tones:
                    caption += ": " + ", ".join(TONES[tone] for tone in tones.split("-"))
                yield str(shown["image"]), caption


def kind_of(caption: str, trained: set[str]) -> str:
    """Return the kind of a held-out emoji: whether its name, without the skin tone, was trained on."""
    return "another skin tone was trained on" if caption.split(": ")[0] in trained else "none was"


def by_kind(true: list[str], predicted: list[str], trained: set[str]) -> dict[str, list[bool]]:
    """Return which held-out captions are exactly right, overall and by whether the emoji's name was trained on."""
    right: dict[str, list[bool]] = {"all": [], "another skin tone was trained on": [], "none was": []}
    for expected, found in zip(true, predicted, strict=True):
        kind = kind_of(expected, trained)
        for which in "all", kind:
            right[which].append(expected == found)
    return right


def main() -> None:
    report = Report("emoji", "Captioning emoji", COLUMNS, ["accelerate", "datasets", "pillow"])
    run = Run(FOLDER / f"emoji-{time.strftime('%Y%m%d-%H%M%S')}")
    with tempfile.TemporaryDirectory() as folder:
        texts = prepare(Path(folder) / "emoji")
        started = time.perf_counter()
        outcome = train(PICTURES_MODEL, TRAINING, Data(str(Path(folder) / "emoji")), ByteTokenizer(), run)
        minutes = (time.perf_counter() - started) / 60
    true = [references[0] for references in outcome.evaluation.references]
    trained = {text.split(": ")[0] for text in texts if text not in true}
    for kind, matches in by_kind(true, outcome.evaluation.predicted, trained).items():
        report.row(kind, len(matches), f"{sum(matches) / len(matches):.1%}")
    report.end()
    print(f"{len(texts)} images, {TRAINING.steps} steps, {minutes:.0f} minutes, run folder {run.folder}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.emoji", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="new folder")
    print(f"{len(prepare(parser.parse_args().folder))} images")
