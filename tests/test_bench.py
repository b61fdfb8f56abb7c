"The benchmark as a command: it runs, its results agree with the peers', and its files say what was measured."
import json, re
from pathlib import Path

import pytest

from tocoad import bench
from tocoad.cli import main

ROOT = Path(__file__).parents[1]


def say(capsys, *words):
    status = main([str(w) for w in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def source(name): return "\n".join("".join(c["source"]) for c in json.loads(bench.notebook_of(name).read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code")


def test_bench_runs_and_writes(capsys, tmp_path):
    status, out, err = say(capsys, "bench", "memory", "metrics", "training", "--quick", "--device", "cpu", "--out", tmp_path, "--quiet")
    assert (status, err) == (0, "")
    assert {p.name for p in (tmp_path/"bench").iterdir()} == {"memory.json", "metrics.json", "training.json", "bench.json", "bench.png"}
    b = json.loads((tmp_path/"bench"/"bench.json").read_text())
    assert {"hardware", "versions", "results"} <= set(b) and b["quick"] and b["hardware"]["cores"] >= 1 and b["versions"]["torch"]
    assert {"coreset.bottle", "neighbours.bottle", "metrics.5m", "auroc.29m", "stage1.smoke", "stage2.smoke"} <= {r["name"] for r in b["results"]}
    for r in b["results"]:
        assert {"name", "peer", "ours_s", "peer_s", "ratio", "low", "high", "peak_mb"} <= set(r)
        assert min(r["ours_s"], r["peer_s"]) > 0 and 0 < r["low"] <= r["ratio"] <= r["high"] and r["name"] in out
    measured = {r["peer"].split()[0] for r in b["results"]}
    assert ("anomalib" in measured) != ("anomalib" in {m["peer"].split()[0] for m in b["missing"]}), "measured, or said to be missing"
    assert "quick" in out and "goals reached" not in out, "small sizes have no goals"


@pytest.mark.parametrize("name", ("memory", "metrics", "generators", "training", "start"))
def test_results_are_compared_before_they_are_timed(name):
    "Each notebook asserts that ours and the peers compute the same; the first race comes after the first such check"
    text = source(name)
    check, race = (re.search(p, text) for p in (r"\bassert|assert_close", r"\brace\("))
    assert check and race and check.start() < race.start()


@pytest.mark.parametrize("name", bench.BENCHES)
def test_notebooks_take_the_same_parameters(name):
    import papermill
    found = papermill.inspect_notebook(str(bench.notebook_of(name)))
    assert list(found) == ["device", "out", "root", "repeats", "quick"] and found["quick"]["default"] == "False"
    assert 5 <= sum(c["cell_type"] == "code" for c in json.loads(bench.notebook_of(name).read_text(encoding="utf-8"))["cells"]) <= 18


def test_every_goal_has_its_measurement():
    every = "".join(map(source, bench.BENCHES))
    for g in bench.GOALS: assert all(part in every for part in re.split(r"[.*]+", g.name)) and g.field in every + "ratio ours_s excess", g


def test_measured_rates_give_the_hours_of_a_plan(capsys, tmp_path):
    "A rate twice as high halves the hours; a file without rates is one sentence"
    from tocoad.run.keys import STAGES, computed_by
    from tocoad.run.config import config
    c, hours = config("paper"), []
    arithmetic = computed_by(c.precision, "cuda")["arithmetic"]
    (tmp_path/"bottle").mkdir()
    for seconds in (1e-2, 5e-3):
        (tmp_path/"bench.json").write_text(json.dumps(dict(rates=[[s, c.backbone, arithmetic, c.size, "cuda", seconds] for s in STAGES])))
        status, out, err = say(capsys, "reproduce", "table1", "--profile", "paper", "--root", tmp_path, "--set", "textures=embedded", "--device", "cuda", "--dry-run", "--rates", tmp_path/"bench.json")
        assert (status, err) == (0, "")
        found = re.search(r"with all categories of the paper: about ([\d.]+) hours", out)
        hours.append(float(found[1]))
        assert "(from measured rates)" in out
    assert abs(hours[0]/hours[1] - 2) < .05, hours
    status, out, err = say(capsys, "reproduce", "table1", "--dry-run", "--rates", tmp_path/"nothing.json")
    assert status == 1 and out == "" and err.count("\n") == 1 and "nothing.json holds no rates: measure them with `tocoad bench gpu`" in err


def test_rates_are_those_of_the_arithmetic_that_computes():
    "tf32 is float32 on a CPU; the notebook of the GPU measures all three, that of precision compares them"
    from tocoad.method.features import PRECISIONS
    from tocoad.run.config import config
    from tocoad.paper.plan import _rate_of
    c = config("paper")
    assert c.precision == "tf32" and [_rate_of("stage1", c, k)[2] for k in ("cpu", "cuda")] == ["fp32", "tf32"]
    for name in ("gpu", "precision"): assert all(f'"{p}"' in source(name) for p in PRECISIONS) or "for p in PRECISIONS" in source(name), name
    assert 'torch.equal(maps["tf32"], maps["fp32"])' in source("precision"), "bit for bit on a CPU"


def test_the_notebook_of_precision_finds_its_categories():
    "Without real images it takes two of the mini set"
    from tocoad.data.mini import MINI
    line = next(l for l in source("precision").splitlines() if l.startswith("categories ="))
    assert set(re.findall(r'"(\w+)"', line.split("if real else")[1])) <= set(MINI)


def test_a_generator_has_to_be_small_beside_the_step():
    "Its goals: a tenth of what F and D take, and what the loop over images asks for"
    of = lambda name, peer, ratio: dict(bench.goals(bench.result(name, peer, 1., ratio)))
    for name, loop, least in (("perlin", "NumPy, image by image", 3), ("cutpaste", "NumPy, image by image", 1), ("nsa", "OpenCV seamlessClone, image by image", 1)):
        assert list(of(f"{name}.16", "F and D alone", 11).values()) == [True] and list(of(f"{name}.16", "F and D alone", 9).values()) == [False]
        assert list(of(f"{name}.16", loop, least).values()) == [True] and list(of(f"{name}.16", loop, .9*least).values()) == [False]
        assert f'"{name}.16"' in source("generators")
    assert '"F and D alone": step' in source("generators") and not of("views.16", "torchvision, image by image", .1)


@pytest.mark.parametrize("words,sentence", [(["memry"], "a benchmark cannot be 'memry': take memory"), (["memory", "--root", "nowhere"], "there is no folder nowhere")])
def test_bad_input_is_one_sentence(capsys, tmp_path, words, sentence):
    status, out, err = say(capsys, "bench", *words, "--out", tmp_path/"out")
    assert (status, out, err.count("\n")) == (2, "", 1) and sentence in err and not (tmp_path/"out").exists()


def test_a_failing_notebook_is_named(capsys, tmp_path, monkeypatch):
    bad = json.loads(bench.notebook_of("memory").read_text(encoding="utf-8"))
    for c in bad["cells"]:
        if "Bench(" in "".join(c["source"]): c["source"] = "raise RuntimeError('no such luck')"
    (tmp_path/"memory.ipynb").write_text(json.dumps(bad))
    monkeypatch.setattr(bench, "notebook_of", lambda n: tmp_path/f"{n}.ipynb")
    status, out, err = say(capsys, "bench", "memory", "--quick", "--out", tmp_path/"out", "--quiet")
    assert status == 1 and out == "" and err.startswith("tocoad: memory: memory.ipynb failed in cell") and "no such luck" in err and err.count("\n") == 1
    assert not (tmp_path/"out"/"bench"/"bench.json").exists()
