"Fewer training images than a stated number are said with a run and a table and refused by `fit`"
import json

import pytest
from toys import noise, save, toy

from tocoad import cli
from tocoad.data.checks import LEAST
from tocoad.data.errors import BadInput
from tocoad.paper import plan, report, sheets
from tocoad.paper.report import Results
from tocoad.parts.fit import fit
from tocoad.run.config import config

SMALL = ["--set", "size=32", "resize=32", "--profile", "smoke", "--quiet"]


@pytest.mark.parametrize("n", [1, 2, LEAST - 1, LEAST])
def test_a_run_says_so(tmp_path, capsys, n):
    words = ["run", "--root", toy(tmp_path / "set", n=(n, 2, 2)), "--category", "cog", "--systems", "frozen", "--out",
             tmp_path / "out", "--store", tmp_path / "store", *SMALL]
    assert cli.main([*map(str, words)]) == 0
    said = f"{n} training image{'s' * (n > 1)}, fewer than {LEAST}: no number"
    [record] = (tmp_path / "out").glob("*.json")
    notes = [x for x in json.loads(record.read_text())["data"]["notes"] if "fewer than" in x]
    assert (said in capsys.readouterr().out) == (n < LEAST) == bool(notes) and len(notes) <= 1


@pytest.mark.parametrize("n", [2, LEAST - 1, LEAST])
def test_a_table_says_so(tmp_path, n):
    o = plan.options("smoke", folders=[toy(tmp_path / "set", n=(n, 2, 2)) / "cog"], systems=("frozen",),
                     settings=("size=32", "resize=32"), store=str(tmp_path / "store"))
    said = report.notes(Results(sheets.compute(["panel"], o)["panel"]))
    expected = f"Cog: {n} training images, fewer than {LEAST}: no number that follows can be relied on."
    assert (expected in said) == (n < LEAST) == any("fewer than" in x for x in said)


@pytest.mark.parametrize("n", [1, 2, LEAST - 1])
def test_fit_refuses_by_the_same_number(tmp_path, n):
    for k in range(n):
        save(tmp_path / f"{k}.png", noise(k))
    with pytest.raises(BadInput, match=f"at least {LEAST} good parts"):
        fit(tmp_path, config("smoke", size=32), progress=False)
