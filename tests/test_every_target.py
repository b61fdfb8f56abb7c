"Every table and figure is drawn by its notebook, from a tiny grid on one category."
import json
import os
import sys
from pathlib import Path

import nbdev.test
import pandas as pd
import papermill
from forked import FORK
from papermill.parameterize import parameterize_notebook

from tocoad.cli import main
from tocoad.paper import regenerate
from tocoad.paper.rows import TARGETS
from tocoad.systems.system import SYSTEMS

TINY = ["size=64", "resize=64", "epochs1=1", "epochs2=1", "width=32", "batch=32"]


def carry_out(source, done, parameters, environment):
    "Run a notebook with parameters, in a child"
    os.environ.update(environment)
    os.chdir(source.parent)
    nb = papermill.iorw.load_notebook_node(str(source))
    papermill.iorw.write_ipynb(parameterize_notebook(nb, parameters), str(done))
    sys.exit(not nbdev.test.test_nb(done, save=True)[0])


def forked(target, out, parameters):
    "As `run_notebook`, but the notebook's process has loaded torch before; tests/test_reproduce.py starts kernels"
    done = Path(out) / "notebooks" / f"{target}.ipynb"
    done.parent.mkdir(parents=True, exist_ok=True)
    child = FORK.Process(target=carry_out, args=(regenerate.notebook_of(target), done, parameters, dict(os.environ)))
    child.start()
    child.join()
    return f"ended with {child.exitcode}" if child.exitcode else None


def test_all_is_computed_and_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(regenerate, "run_notebook", forked)
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
    drawn = pd.read_csv(tmp_path / "out" / "tables" / "table1.csv").query("metric == 'pixel_auroc'")
    assert {s.name for s in SYSTEMS.values() if 1 in s.tables} - {"ToCoAD"} <= set(drawn.row)
