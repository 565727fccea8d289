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
from pathlib import Path

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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stamps", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="new folder")
    parser.add_argument("--stamps", type=Path, metavar="FOLDER", help="folder of the unpacked stamps")
    options = parser.parse_args()
    print(f"{prepare(options.folder, options.stamps)} images")
