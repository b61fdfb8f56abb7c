"The page on whose pictures these are is of today, and no picture lies elsewhere."
import base64
import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KINDS = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".bmp", ".tif", ".tiff", ".pdf")


def shown(nb):
    "The image outputs of a notebook, as they are stored"
    cells = json.loads(nb.read_text("utf-8"))["cells"]
    data = [o.get("data", {}) for c in cells for o in c.get("outputs", [])]
    return ["".join(x) for d in data for kind, x in d.items() if kind.startswith("image/")]


def test_the_committed_page_counts_what_is_committed():
    page = (ROOT / "nbs" / "site" / "pictures.ipynb").read_text("utf-8")
    said = {name: int(n) for name, n in re.findall(r"\| \[([\w/]+)\]\([\w./]+\) \| (\d+) \|", page)}
    there = {p.relative_to(ROOT / "nbs").with_suffix("").as_posix(): len(shown(p))
             for p in (ROOT / "nbs").rglob("*.ipynb") if not {".ipynb_checkpoints", "reports"} & {*p.parts}}
    assert said == {name: n for name, n in there.items() if n}, "run nbs/site/pictures.ipynb anew"


def test_picture_files_are_those_of_the_readme():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("no git checkout")
    files = [name for name in tracked.stdout.splitlines() if name.lower().endswith(KINDS)]
    files.remove("nbs/site/assets/icon.svg") # drawn in a text of one line
    assert files and all(name.startswith("README_files/") for name in files)
    index = [base64.b64decode(x) for x in shown(ROOT / "nbs" / "index.ipynb")]
    assert all((ROOT / name).read_bytes() in index for name in files)
