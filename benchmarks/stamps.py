"""Train on real pictures, the stamps of Tux Paint with their English descriptions, as an imagefolder.

`python -m benchmarks stamps` trains on them; `python -m benchmarks.stamps DIR` only writes them to DIR. The pictures
are those of the Debian package `tuxpaint-stamps-default` (GPL-2), which apt downloads. On other systems, unpack the
package from packages.debian.org/tuxpaint-stamps-default, and pass the path of its folder usr/share/tuxpaint/stamps:
`python -m benchmarks.stamps DIR --stamps FOLDER`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.report import FOLDER, Report
from palme_xt.captioner.options import PICTURES_MODEL, Data, Training
from palme_xt.captioner.tokenizer import ByteTokenizer
from palme_xt.captioner.training.loop import train
from palme_xt.captioner.training.run import Run

COLUMNS = ("training", "weights", "held-out loss", "chrF", "exactly right")
PACKAGE = "tuxpaint-stamps-default"


def download(folder: Path) -> Path:
    """Download the package with apt, unpack it into `folder`, and return the folder of the stamps."""
    subprocess.run(["apt-get", "download", "--quiet", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (package,) = folder.glob("*.deb")
    subprocess.run(["dpkg", "-x", package, folder], check=True)
    return folder / "usr/share/tuxpaint/stamps"


def prepare(folder: Path, stamps: Path | None = None) -> int:
    """Write the stamps, which are downloaded unless `stamps` has them, and `metadata.jsonl` into a new `folder`.

    Returns:
        Number of images.
    """
    folder.mkdir(parents=True)
    lines = []
    with tempfile.TemporaryDirectory() as temporary:
        stamps = stamps or download(Path(temporary))
        for path in sorted(stamps.rglob("*.png")):
            # The first line is the English description; translations follow. Parts of other stamps have no text.
            if path.with_suffix(".txt").is_file():
                name = "-".join(path.relative_to(stamps).parts)
                shutil.copy(path, folder / name)
                text = path.with_suffix(".txt").read_text().splitlines()[0].strip()
                lines.append(json.dumps({"file_name": name, "text": text}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return len(lines)


def main() -> None:
    report = Report("stamps", "Captioning stamps", COLUMNS, ["accelerate", "datasets", "pillow", "sacrebleu"])
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "stamps"
        prepare(data)
        for title, augment in ("without augmentation", False), ("`--augment`", True):
            run = Run(FOLDER / f"stamps-{'augment-' * augment}{time.strftime('%Y%m%d-%H%M%S')}")
            training = Training(steps=300, eval_every=50, augment=augment)
            outcome = train(PICTURES_MODEL, training, Data(str(data)), ByteTokenizer(), run)
            best, last = outcome.evaluation, run.metrics()[-1]
            for which, scores in (f"last (step {last['step']})", last), (f"best (step {best.step})", best.scores):
                loss, chrf = f"{scores['held_out_loss']:.2f}", f"{scores['held_out_chrf']:.1f}"
                report.row(title, which, loss, chrf, f"{scores['held_out_exact_match']:.1%}")
    report.end()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stamps", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="new folder")
    parser.add_argument("--stamps", type=Path, metavar="FOLDER", help="folder of the unpacked stamps")
    options = parser.parse_args()
    print(f"{prepare(options.folder, options.stamps)} images")
