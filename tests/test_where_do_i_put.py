"""One of each kind that nbs/where_do_i_put.ipynb names, added to a copy of the package with a file and a line: the
command offers it, runs and tables show it, the forecast counts it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    "method/stripes.py": """
from dataclasses import dataclass
import torch

@dataclass
class Stripes:
    "A grey row in each image"
    grey: float = .5
    def __call__(self, images, generator=None):
        at = torch.randint(images.shape[-2], (len(images),), generator=generator)
        M = torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool)
        M[torch.arange(len(images)), at] = True
        return torch.where(M[:, None], self.grey, images), M
""",
    "method/dice.py": """
def dice_loss(logits, y):
    "One minus the overlap of D's probability and the mask"
    p = logits.softmax(1)[:, 1]
    return 1 - 2*(p*y).sum()/(p.sum() + y.sum() + 1)
""",
    "systems/pixels.py": """
from ..data.images import crop

def judge(c, data, got, parts, device, progress):
    "How far each pixel lies from the training images' mean"
    grey = lambda split: crop(split.images, c.size).float().mean(1)
    maps = (grey(data.test) - grey(data.train).mean(0)).abs().numpy()
    return {}, dict(image=maps.max((1, 2)), maps=maps)
""",
    "data/flat.py": """
from .layouts import Item, image_files

def read_flat(root, category):
    "<category>/fine and <category>/faulty, every other fine image for testing"
    fine, faulty = (image_files(root/category/k) for k in ("fine", "faulty"))
    items = [Item(p, False, "good", None, ("train", "test")[n % 2]) for n, p in enumerate(fine)]
    return items + [Item(p, True, "faulty", None, "test") for p in faulty]
""",
}
LINES = {  # kind -> file, text before which a line goes, the line
    "generator": [
        ("systems/tocoad.py", "GENERATORS = {", "from ..method.stripes import Stripes\n"),
        ("systems/tocoad.py", '"perlin": Perlin', '"stripes": Stripes, '),
        ("systems/settings.py", '"perlin", "cutpaste", "nsa"]', '"stripes", '),
    ],
    "loss": [
        ("method/discriminator.py", "LOSSES = {", "from .dice import dice_loss\n"),
        ("method/discriminator.py", '"focal": focal_loss', '"dice": dice_loss, '),
        ("systems/settings.py", '"focal", "ce"]', '"dice", '),
        ("systems/settings.py", '"focal", "ce", "same"]', '"dice", '),
    ],
    "backbone": [("method/weights.py", '    "resnet50":', '    "resnet34": ("resnet34.pth", "b627", *IMAGENET),\n')],
    "metric": [("measure/metrics.py", "ap=_ap", "half=lambda *t: .5, ")],
    "data set": [
        (
            "data/layouts.py",
            "LAYOUTS = {",
            """
def read_flat(*place):
    from .flat import read_flat
    return read_flat(*place)

""",
        ),
        (
            "data/layouts.py",
            '    "visa": Layout',
            '    "flat": Layout(holding("fine"), read_flat, "<category>/fine, faulty"),\n',
        ),
        ("data/sets.py", '    "mvtec_ad": DataSet(', '    "flat": DataSet("bolts", ("flat",)),\n'),
    ],
    "profile": [
        (
            "run/config.py",
            '    "laptop": Config(',
            '    "quick": Config(profile="quick", **_LITE).replace(epochs1=1, epochs2=1),\n',
        ),
        ("command.py", '"laptop", "smoke", "lab"]', '"quick", '),
    ],
    "system": [
        (
            "systems/system.py",
            '    "frozen": System(',
            '    "pixels": System("Mean of pixels", {"pixels": Stage("systems.pixels.judge", ("size",))}, '
            'tables=(1,)),\n',
        )
    ],
    "row of a table": [
        (
            "paper/rows.py",
            "OURS = dict(",
            'STRIPES = Row("stripes", (), changes({}) | dict(generator="stripes"), own=("generator",))\n',
        ),
        ("paper/rows.py", "table5=(HALF,)", "table7=(STRIPES,), "),
    ],
}
ASK = """
import contextlib, io, json, sys
from pathlib import Path
import numpy as np
from PIL import Image
from tocoad.cli import main
from tocoad.data.load import load
from tocoad.paper import columns, plan, regenerate, report, sheets
from tocoad.run import compare
from tocoad.run.config import config, settings

def said(*words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), contextlib.suppress(SystemExit):
        main(list(words))
    return out.getvalue()

rng, place = np.random.default_rng(0), Path("sets")
for kind, n in (("fine", 8), ("faulty", 3)):
    (place/"bolt"/kind).mkdir(parents=True)
    for k in range(n):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(place/"bolt"/kind/f"{k}.png")
tiny = ["size=32", "resize=32", "epochs1=1", "epochs2=1", "width=16", "batch=4"]
facts = dict(help=said("run", "--help"), generator=said("run", "--set", "generator=none"),
             loss=said("run", "--set", "loss=none"), backbone=said("run", "--set", "backbone=none", "--quiet"),
             data=said("run", "--root", "sets", "--category", "bolt", "--dataset", "flatt"))
data = load(place, None, "bolt", 32)
more = settings([*tiny, "generator=stripes", "loss=dice", "loss1=same", "backbone=resnet34", "weights=random"])
r = compare.compare(config("quick", dataset="flat", category="bolt", **more), data=data, device="cpu",
                    methods=("frozen", "two_stage"), progress=False)
facts |= dict(dataset=data.dataset, rows=r.rows.to_dict("records"), quick=config("quick").epochs2)
o = plan.options("smoke", categories=["washer"], settings=tiny)
facts["forecast"] = [int(regenerate.forecast(["table7"], o).runs.sum())]
sheet = report.Results(sheets.compute(["table7"], o)["table7"], None, o.rows("table7"))
facts |= dict(table=report.ablation(sheet).to_csv(), left=int(regenerate.forecast(["table7"], o)["compute"].sum()))
o = plan.options("smoke", categories=["washer"], settings=tiny, systems=["tocoad", "pixels"])
sheet = report.Results(sheets.compute(["table1"], o)["table1"], None, o.rows("table1"))
facts |= dict(column=columns.comparison(sheet).to_csv(), gains=columns.gains(sheet).to_csv())
facts["systems"] = said("run", "--systems", "none")
facts["forecast1"] = regenerate.forecast(["table1"], o)[["runs", "compute"]].values.tolist()
panel = plan.options("quick", folders=["sets/bolt"], settings=tiny)
facts["forecast"].append(regenerate.forecast(["panel"], panel).to_dict("records"))
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    "What a copy of the package with one of each says"
    top = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "tocoad", top / "tocoad", ignore=shutil.ignore_patterns("__pycache__"))
    for path, text in FILES.items():
        (top / "tocoad" / path).write_text(text)
    for path, before, line in (x for lines in LINES.values() for x in lines):
        text = (top / "tocoad" / path).read_text(encoding="utf-8")
        assert text.count(before) == 1, f"{path} has no single place {before!r}"
        (top / "tocoad" / path).write_text(text.replace(before, line + before), encoding="utf-8")
    env = os.environ | dict(PYTHONPATH=str(top), PYTHONDONTWRITEBYTECODE="1", TOCOAD_STORE=str(top / "store"))
    run = subprocess.run([sys.executable, "-c", ASK], cwd=top, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_the_command_offers_them(facts):
    assert "quick" in facts["help"] and "stripes" in facts["generator"] and "dice" in facts["loss"]
    assert "take flat" in facts["data"] and "resnet34" in facts["backbone"]


def test_a_run_uses_them(facts):
    "The generator, the loss, the backbone, the profile and the data set compute, and every row has the metric"
    assert facts["dataset"] == "flat" and facts["quick"] == 1
    assert {x["method"] for x in facts["rows"]} == {"frozen", "two_stage"}
    assert all(x["image_half"] == 0.5 and 0 <= x["image_auroc"] <= 1 for x in facts["rows"])


def test_a_table_shows_its_new_row(facts):
    assert "stripes" in facts["table"] and facts["left"] == 0


def test_a_system_is_a_column_with_its_difference(facts):
    "Beside the frozen F and two rows of ToCoAD; all of its runs are stored now"
    assert "Mean of pixels" in facts["column"] and "Mean of pixels" in facts["gains"] and "pixels" in facts["systems"]
    assert facts["forecast1"] == [[4, 0]]


def test_the_forecast_counts_them(facts):
    "One run more than Table 7's four; the new data set's category among the panel's"
    table7, panel = facts["forecast"]
    assert table7 == 5
    assert [(x["category"], x["runs"] > 4) for x in panel] == [("bolt", True)]


@pytest.mark.parametrize("kind", LINES)
def test_the_page_shows_each(kind):
    page = json.loads((ROOT / "nbs" / "where_do_i_put.ipynb").read_text(encoding="utf-8"))["cells"]
    assert any("".join(c["source"]).lower().startswith(f"## a {kind}") for c in page), kind
