"Every table and figure is drawn by its notebook, from a tiny grid on one category."
import json

from tocoad.cli import main
from tocoad.paper.rows import TARGETS

TINY = ["size=64", "resize=64", "epochs1=1", "epochs2=1", "width=32", "batch=8"]


def test_all_is_computed_and_drawn(tmp_path, capsys):
    words = ["reproduce", "all", "--profile", "smoke", "--categories", "washer", "--set", *TINY,
             "--store", str(tmp_path / "store"), "--out", str(tmp_path / "out"), "--quiet"]
    assert main(words) == 0, capsys.readouterr().err
    for t in TARGETS[:-1]: # the panel asks for folders: tests/test_panel.py
        kind = "figures" if t.startswith("figure") else "tables"
        suffixes = {".png", ".pdf"} if kind == "figures" else {".csv", ".md", ".html", ".tex"}
        assert {p.suffix for p in (tmp_path / "out" / kind).glob(f"{t}.*")} >= suffixes, t
        cells = json.loads((tmp_path / "out" / "notebooks" / f"{t}.ipynb").read_text(encoding="utf-8"))["cells"]
        errors = [o for c in cells for o in c.get("outputs", []) if o["output_type"] == "error"]
        assert cells and not errors, t
