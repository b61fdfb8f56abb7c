"The panel on folders of one's choice, a budget of time, results as a file"

import json
from pathlib import Path

import pytest

from tocoad.cli import main
from tocoad.data.trees import write_layout
from tocoad.paper import from_files, panel, plan, rows, sheets
from tocoad.paper.report import Results
from tocoad.run import exchange
from tocoad.run.store import Store

RESULTS = Path(__file__).parents[1] / "nbs/paper/results/systems"
TINY = ["size=32", "resize=32", "epochs1=1", "epochs2=10", "width=32", "batch=32", "bn2=train", "curve=5"]


@pytest.fixture(scope="module")
def there(shared):
    "Two folders and a store that knows the panel's decisive rows on them"

    def asked(root):
        folders = [str(root / "btad_like" / "01"), str(root / "mine" / "parts" / "washer")]
        return plan.options("smoke", folders=folders, settings=TINY, store=str(root / "store"))

    def make(root):
        write_layout(root / "btad_like", "btad", ["01"], size=64)
        write_layout(root / "mine" / "parts", "mvtec", ["washer"], size=64)
        sheets.compute(["panel"], asked(root))

    root = shared("panel", make)
    return root, asked(root), sheets.compute(["panel"], asked(root))["panel"]


def test_the_panel_names_its_sets_after_their_folders_and_says_whose_split_it_is(there):
    root, o, sheet = there
    sets = panel.sets(Results(sheet))
    assert sheet["failed"] == [] and sheet["left"] == 0
    assert sets["from"].to_dict() == {"01": "btad_like", "washer": "parts"}
    assert sets.split.to_dict() == {
        "01": "own",
        "washer": "of the folder",
    }  # BTAD's counts are known, and these are others
    assert "Mini" not in Results(sheet).title() and "BTAD:" not in Results(sheet).title()


def test_every_trained_row_stands_beside_frozen_and_its_control(there):
    _, o, sheet = there
    r = Results(sheet, plan=o.rows("panel"))
    found = {
        (d["row"], d["base"]) for d in sheet["differences"] if d["category"] == "washer" and d["metric"] == "aupro"
    }
    for row in o.rows("panel"):
        if row.changes["method"] in ("two_stage", "contrastive"):
            assert {(row.name, "frozen F"), (row.name, rows.control(row).name)} <= found
    assert ("ToCoAD + Perlin", "C alone, weight 0.5") in found
    assert set(panel.table(r).columns.get_level_values(1)) >= {
        "value",
        "Δ frozen F",
        "Δ its control",
        "Δ C, half weight",
    }


def test_the_row_says_what_became_of_its_training(there):
    _, o, sheet = there
    words = {(x["row"], x["category"]): x.get("training") for x in sheet["runs"]}
    assert all(w is None for (row, _), w in words.items() if row == "frozen F")
    assert {w for (row, _), w in words.items() if row.startswith("rate 0")} == {"rate 0"}
    trained = {w for (row, _), w in words.items() if row != "frozen F" and not row.startswith("rate 0")}
    assert trained <= {"learned", "C did not learn", "did not learn", "collapsed", "too long", "too short"}
    assert all("oracle_image_auroc" in x["values"] for x in sheet["runs"] if x["row"] != "frozen F")


@pytest.mark.slow
def test_a_command_with_a_budget_goes_on_and_comes_to_the_same(there, tmp_path, capsys):
    root, o, whole = there
    words = [
        "reproduce",
        "panel",
        "--folders",
        *o.folders[1:],
        "--profile",
        "smoke",
        "--set",
        *TINY,
        "--store",
        str(tmp_path / "store"),
        "--out",
        str(tmp_path / "out"),
        "--quiet",
    ]
    assert main([*words, "--budget", "0.001s"]) == 0
    first = next((tmp_path / "store" / "sheets").glob("panel-*.json"))
    assert json.loads(first.read_text())["left"] == len(o.rows("panel")) and not json.loads(first.read_text())["runs"]
    assert main([*words, "--budget", "1h"]) == 0
    sheet = json.loads(first.read_text())
    mine = [x for x in whole["runs"] if x["category"] == "washer"]
    assert sheet["left"] == 0 and {(x["row"], str(x["values"])) for x in sheet["runs"]} == {
        (x["row"], str(x["values"])) for x in mine
    }
    assert "10 runs there, 0 left, 0 failed" in (tmp_path / "out" / "reproduce.log").read_text()
    assert (tmp_path / "out" / "tables" / "panel.html").exists()


def test_a_part_says_so_in_its_title(there, tmp_path):
    _, o, _ = there
    seeds = plan.options("smoke", folders=o.folders, settings=TINY, store=o.store, seeds=[0, 1])
    sheet = sheets.compute(["panel"], seeds, stored=True)["panel"]
    assert (
        sheet["left"] == len(o.rows("panel")) * 2
        and f"so far {len(sheet['runs'])} of {2 * len(sheet['runs'])} runs" in Results(sheet).title()
    )
    assert len(sheet["differences"]) > 0  # over the seed that is there


def test_exported_and_taken_in_elsewhere(there, tmp_path, capsys):
    root, o, sheet = there
    file = tmp_path / "results.jsonl"
    assert main(["runs", "export", str(file), "--for", "panel", "--store", o.store]) == 0
    assert str(root) not in file.read_text() and file.stat().st_size < 1e6
    assert main(["runs", "import", str(file), "--store", str(tmp_path / "other")]) == 0
    assert "licence" in capsys.readouterr().out
    [copy] = exchange.imported(Store(tmp_path / "other"))
    head, records = exchange.read(copy)
    values = {r["key"]: r["values"] for r in records if r["stage"] == "metrics"}
    assert len(values) == len(sheet["runs"]) and {round(100 * v["image_auroc"], 9) for v in values.values()} == {
        round(x["values"]["image_auroc"], 9) for x in sheet["runs"]
    }
    again = from_files.results("panel", [copy]).sheet
    assert {(d["category"], d["row"], d["base"], d["metric"]) for d in again["differences"]} == {
        (d["category"], d["row"], d["base"], d["metric"]) for d in sheet["differences"]
    }
    assert {s["target"] for s in head["tables"]} == {"panel"} and len(head["sets"]) == 2


def test_a_table_from_a_file_alone(there, tmp_path, capsys):
    _, o, sheet = there
    file, out = tmp_path / "results.jsonl", tmp_path / "out"
    assert main(["runs", "export", str(file), "--for", "panel", "--store", o.store]) == 0
    assert main(["reproduce", "panel", "--from", str(file), "--out", str(out), "--quiet"]) == 0
    drawn = (out / "tables" / "panel.csv").read_text()
    assert all(x["row"] in drawn for x in sheet["runs"])
    assert "results.jsonl" in (out / "tables" / "panel.md").read_text()
    capsys.readouterr()
    for words, says in (
        (["figure1", "--from", str(file)], "figure1 shows images"),
        (["table1", "--from", str(file), "--root", "."], "leave --root"),
        (["table1", "--from", str(tmp_path / "none.jsonl")], "none.jsonl cannot be read"),
        (["table1", "--from", str(out)], "there are no files of results"),
    ):
        assert main(["reproduce", *words, "--out", str(tmp_path / "other")]) in (1, 2)
        assert says in capsys.readouterr().err


def test_a_metric_that_a_system_lacks_is_in_no_table_and_no_forest():
    r = sheets.results("panel", files=[str(RESULTS)])
    assert "PyramidFlow" in r.rows and not panel.differences(r, "PyramidFlow", "image_auroc")
    assert panel.differences(r, "PyramidFlow", "pixel_auroc") and panel.differences(r, "MMR", "image_auroc")
    t = panel.table(r)
    cells = t[[k for k in t if "image AUROC" in str(k)]].loc[(slice(None), "PyramidFlow"), :]
    assert {*cells.to_numpy().ravel()} <= {"-", ""}


def test_some_of_it_computed_again(there, tmp_path, capsys):
    root, o, sheet = there
    file = tmp_path / "results.jsonl"
    assert main(["runs", "export", str(file), "--for", "panel", "--store", o.store]) == 0
    folders = ["--folders", *map(str, o.folders)]
    assert main(["runs", "check", str(file), "--sample", "2", "--device", "cpu", *folders]) == 0
    assert capsys.readouterr().out.count("True") >= 2
    assert main(["runs", "check", str(file)]) == 1
    assert "the images of" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, says",
    [
        (["--folders", "nowhere"], "--folders nowhere: there is no such folder"),
        ([], "name them with --folders"),
        (["--folders", ".", "--budget", "tomorrow"], "such as 40h"),
        (["--folders", ".", "--set", "lam_alone=0.3"], "which fixes lam_alone"),
    ],
)
def test_a_wrong_wish_is_one_sentence(words, says, capsys):
    assert main(["reproduce", "panel", *words]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_a_file_that_was_edited_is_refused(there, tmp_path, capsys):
    file = tmp_path / "results.jsonl"
    main(["runs", "export", str(file), "--store", there[1].store])
    file.write_text(file.read_text().replace('"seed":0', '"seed":1', 1))
    capsys.readouterr()
    assert main(["runs", "import", str(file), "--store", str(tmp_path / "other")]) == 1
    assert "not as it was written" in capsys.readouterr().err and not (tmp_path / "other" / "imported").exists()
