"The benchmark: its yardsticks, and the command that runs its notebooks and says what was measured."
import ast
import json
import re
import sys
import time
from functools import partial
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import pytest
import torch

from tocoad import bench
from tocoad.cli import main
from tocoad.data.errors import BadInput
from tocoad.run.config import config

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "nbs" / "bench"))
import measuring  # noqa: E402
from measuring import goals, growth, race, result  # noqa: E402


def nap(ms): return lambda: time.sleep(ms / 1000)


def test_the_first_call_warms_up():
    "With a clock that lets a second pass at each look, and work of ten seconds at first, of two later"
    now, tens = [0], iter([10, 2, 2, 2])
    def add(n):
        now[0] += n
        return now[0]
    assert measuring.timed(lambda: add(next(tens)), repeats=3, warm=1, clock=lambda: add(1)) == [3, 3, 3]


@pytest.mark.parametrize("kernel", (True, False))
def test_peak_memory_of_a_block(kernel):
    with measuring.Watch(kernel) as held:
        x = np.ones(10_000_000)
        time.sleep(.02)
        del x
    with measuring.Watch(kernel) as idle:
        pass
    assert 78 < held.mb < 90 and idle.mb < 5, (held.mb, idle.mb)


def advancing():
    "A clock that stands still, and (n) -> a function that moves it on by n"
    now = [0.]
    def takes(n):
        def f(): now[0] += n
        return f
    return lambda: now[0], takes


def test_a_race_of_known_length():
    clock, takes = advancing()
    peers = {"long": takes(80), "part": takes(40)}
    long, part = race("nap", takes(20), peers, repeats=5, scale={"part": 10}, warm=0, clock=clock)
    assert (long["low"], long["ratio"], long["high"], part["ratio"]) == (4, 4, 4, 20)
    assert part["scaled"] == 10 and "scaled" not in long


def test_a_machine_that_becomes_slow_hits_both_runners():
    "The clock runs three times as fast in the second round; the ratio of the pairs stays"
    now, speed = [0.], iter([1, 1, 3, 3, 1, 1])
    def runner(n):
        def f(): now[0] += n * next(speed)
        return f
    drift = race("drift", runner(1), {"four": runner(4)}, repeats=3, warm=0, clock=lambda: now[0])[0]
    assert [drift[k] for k in ("low", "ratio", "high")] == [4, 4, 4]


def test_no_product_beats_the_rate_by_much():
    rate, x = measuring.matmul_rate(shape=(1024, 512, 1024), seconds=.3), torch.rand(1024, 256)
    assert rate > 1e9 and 2 * 1024**2 * 256 / min(measuring.timed(lambda: x @ x.T, 5)) < 3 * rate


def test_counted_operations():
    "A product of 3 x 4 and 4 x 5 is 60 multiplications and 60 additions"
    assert measuring.flop(lambda: torch.ones(3, 4) @ torch.ones(4, 5)) == 120


def test_real_images_are_found_below_what_is_named_or_the_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("TOCOAD_DATA", raising=False)
    (tmp_path / "mvtec_ad" / "screw").mkdir(parents=True)
    found = f"{tmp_path}/mvtec_ad"
    assert [measuring.mvtec(r, "screw") for r in (None, tmp_path, tmp_path / "other")] == [None, found, None]
    monkeypatch.setenv("TOCOAD_DATA", str(tmp_path))
    assert [measuring.mvtec(r, "screw") for r in (None, tmp_path / "other")] == [found, found]
    assert measuring.mvtec(None, "bottle") is None


def test_goals_tables_and_words(tmp_path):
    fast = result("coreset.bottle", "plain greedy, part of the picks", 10, 90)
    assert goals(fast) == [("8 times", True)] and goals(fast | dict(ratio=7.9)) == [("8 times", False)]
    assert goals(result("help", "python -c pass", .5, .02)) == [("under 1 s", True)]
    assert goals(result("walk", "run", 1, 2)) == []
    row = measuring.table([result("walk", "run", .002, 12., scaled=10, peak_mb=3.2)]).iloc[0]
    assert list(row) == ["run (x 10)", "2 ms", "12 s", "6e+03 [6e+03, 6e+03]", "3", ""]
    assert list(measuring.table([fast], judged=False)["goal"]) == [""]
    rated = result("gpu.stage1.bfloat16", "float32", .001, .002, images_s=1000., tflops=40., share=.25)
    assert measuring.rates([fast, rated]).iloc[0].tolist() == ["1,000", "40", "25%", "float32", "2.00"]
    one, two = measuring.Bench("one", tmp_path), measuring.Bench("two", tmp_path, quick=True)
    assert torch.get_num_threads() == 1
    one.keep(result("nap", "long", 1., 3.))
    one.lacks("nap", "longer")
    two.keep(fast, result("help", "python", 2., .1))
    files = [b.save() for b in (one, two)]
    with pytest.raises(BadInput, match="differ in quick"):
        measuring.load(files)
    two.head["quick"] = False
    two.save()
    with pytest.raises(BadInput, match="run `tocoad bench three`"):
        measuring.load([tmp_path / "bench" / "three.json"])
    both = measuring.load(files)
    assert [r["name"] for r in both["results"]] == ["nap", "coreset.bottle", "help"]
    said = measuring.text(both)
    assert "1 of 2 goals reached" in said and "nap, longer: not measured, needs the extra bench" in said
    ax = measuring.plot(both["results"], "three").axes[0]
    assert ax.get_xscale() == "log"
    assert [t.get_text().split("  |  ")[0] for t in ax.get_yticklabels()] == [r["name"] for r in both["results"]]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ("stage1", "stage2"))
def test_copies_side_by_side_compute_the_same(stage):
    tiny = config("smoke", size=32, resize=32, batch=4, width=16)
    alone, together = (measuring.training_rate(stage, tiny, copies=k, n=8, epochs=2, threads=1) for k in (1, 2))
    assert together[1] == alone[1] * 2 and min(alone[0], together[0]) > 0


def test_how_busy_a_device_is():
    assert measuring.covered([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4 and measuring.covered([]) == 0
    def spin():
        end = time.process_time() + .1
        while time.process_time() < end:
            pass
    idle, full = measuring.busy(nap(100)), measuring.busy(spin)
    assert idle < .2 and full > 5 * idle


def test_how_cost_grows(monkeypatch):
    assert abs(measuring.exponent([1, 2, 4, 8], [3, 12, 48, 192]) - 2) < 1e-9
    clock, takes = advancing()
    with monkeypatch.context() as m:
        m.setattr(measuring, "timed", partial(measuring.timed, clock=clock))
        naps = growth("scaling.nap", lambda n: takes(4 * n), [1, 2, 4, 8], expected=1)
        square = growth("scaling.square", lambda n: takes(2 * n * n), [2, 4, 8], expected=1)
    assert abs(naps["excess"]) < 1e-9 and goals(naps) == [("exponent as expected", True)]
    assert goals(square) == [("exponent as expected", False)]
    def filling(n): return lambda: np.ones(n * 1_000_000).sum()
    line, flat = (growth("scaling.fill", filling, [5, 10, 20], 1, m, repeats=0) for m in (1, 0))
    assert abs(line["memory_exponent"] - 1) < .1
    assert [dict(goals(r))["memory's too"] for r in (line, flat)] == [True, False]
    unseen = growth("scaling.nap", nap, [1, 2], 1, 1)
    assert (naps["memory_exponent"], unseen["memory_excess"]) == (None, None), "too little to be seen"


def say(capsys, *words):
    status = main([str(w) for w in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def code_of(name):
    cells = json.loads(bench.notebook_of(name).read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


def source(name): return "\n".join(code_of(name))


@pytest.mark.slow
def test_bench_runs_and_writes(capsys, tmp_path):
    words = ("--quick", "--device", "cpu", "--out", tmp_path, "--quiet")
    status, out, err = say(capsys, "bench", "memory", "metrics", "training", *words)
    assert (status, err) == (0, "")
    three = {"memory.json", "metrics.json", "training.json"}
    assert {p.name for p in (tmp_path / "bench").iterdir()} == three | {"bench.json", "bench.png", "bench.txt"}
    b = json.loads((tmp_path / "bench" / "bench.json").read_text())
    assert {"hardware", "versions", "results"} <= set(b) and b["quick"]
    assert b["hardware"]["cores"] >= 1 and b["versions"]["torch"]
    names = {"coreset.bottle", "neighbours.bottle", "metrics.5m", "auroc.29m", "stage1.smoke", "stage2.smoke"}
    assert names <= {r["name"] for r in b["results"]}
    for r in b["results"]:
        assert {"name", "peer", "ours_s", "peer_s", "ratio", "low", "high", "peak_mb"} <= set(r)
        assert min(r["ours_s"], r["peer_s"]) > 0 and 0 < r["low"] <= r["ratio"] <= r["high"] and r["name"] in out
    measured = {r["peer"].split()[0] for r in b["results"]}
    missing = {m["peer"].split()[0] for m in b["missing"]}
    assert ("anomalib" in measured) != ("anomalib" in missing), "measured, or said to be missing"
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
    assert 5 <= len(code_of(name)) <= 24


@pytest.mark.parametrize("name", bench.BENCHES)
def test_notebooks_ask_a_room_only_for_what_it_has(name):
    "Also in cells that small sizes leave out"
    nodes, rooms = [*ast.walk(ast.parse(source(name)))], {"bench": measuring}
    for n in nodes:
        if isinstance(n, ast.ImportFrom) and n.module.startswith("tocoad"):
            rooms |= {a.asname or a.name: resolve_name(f"{n.module}.{a.name}") for a in n.names}
    asked = [n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in rooms]
    assert asked and all(hasattr(rooms[n.value.id], n.attr) for n in asked)


def test_every_goal_has_its_measurement():
    every = "".join(map(source, bench.BENCHES))
    for g in measuring.GOALS:
        assert all(part in every for part in re.split(r"[.*]+", g.name)), g
        assert g.field in every + "ratio ours_s excess memory_excess", g


def test_measured_rates_give_the_hours_of_a_plan(capsys, tmp_path):
    "A rate twice as high halves the hours; a file without rates is one sentence"
    from tocoad.run.keys import STAGES, computed_by
    c, hours = config("paper"), []
    arithmetic = computed_by(c.precision, "cuda")["arithmetic"]
    (tmp_path / "bottle").mkdir()
    for seconds in (1e-2, 5e-3):
        rates = [[s, c.backbone, arithmetic, c.size, "cuda", seconds] for s in STAGES]
        (tmp_path / "bench.json").write_text(json.dumps(dict(rates=rates)))
        words = ("reproduce", "table1", "--profile", "paper", "--root", tmp_path, "--set", "textures=embedded",
                 "--device", "cuda", "--dry-run", "--rates", tmp_path / "bench.json", "--systems")
        status, out, err = say(capsys, *words, "tocoad")
        assert (status, err) == (0, "")
        found = re.search(r"with all categories of the paper: about ([\d.]+) hours", out)
        hours.append(float(found[1]))
        assert "(from measured rates)" in out
    assert "(partly from measured rates" in say(capsys, *words, "tocoad", "padim")[1]
    assert abs(hours[0] / hours[1] - 2) < .05, hours
    status, out, err = say(capsys, "reproduce", "table1", "--dry-run", "--rates", tmp_path / "nothing.json")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "nothing.json holds no rates: measure them with `tocoad bench gpu`" in err


def test_rates_are_those_of_the_arithmetic_that_computes():
    "tf32 is float32 on a CPU; the notebook of the GPU measures all three, that of precision compares them"
    from tocoad.method.arithmetic import PRECISIONS
    from tocoad.paper.hours import _rate_of
    c = config("paper")
    assert c.precision == "tf32" and [_rate_of("stage1", c, k)[2] for k in ("cpu", "cuda")] == ["fp32", "tf32"]
    for name in ("gpu", "precision"):
        text = source(name)
        assert all(f'"{p}"' in text for p in PRECISIONS) or "for p in PRECISIONS" in text, name
    assert 'torch.equal(maps["tf32"], maps["fp32"])' in source("precision"), "bit for bit on a CPU"


def test_the_notebook_of_precision_finds_its_categories():
    "Without real images it takes two of the mini set"
    from tocoad.data.mini import MINI
    line = next(x for x in source("precision").splitlines() if x.startswith("categories ="))
    assert set(re.findall(r'"(\w+)"', line.split("if real else")[1])) <= set(MINI)


def test_a_generator_has_to_be_small_beside_the_step():
    "Its goals: a tenth of what F and D take, and what the loop over images asks for"
    of = lambda name, peer, ratio: [reached for _, reached in goals(result(name, peer, 1., ratio))]
    numpy, cv = "NumPy, image by image", "OpenCV seamlessClone, image by image"
    for name, loop, least in (("perlin", numpy, 3), ("cutpaste", numpy, 1), ("nsa", cv, 1)):
        assert of(f"{name}.16", "F and D alone", 11) == [True] and of(f"{name}.16", "F and D alone", 9) == [False]
        assert of(f"{name}.16", loop, least) == [True] and of(f"{name}.16", loop, .9 * least) == [False]
        assert f'"{name}.16"' in source("generators")
    assert '"F and D alone": step' in source("generators") and of("views.16", "torchvision, image by image", .1) == []


@pytest.mark.parametrize("words,sentence", [
    (["memry"], "a benchmark cannot be 'memry': take memory"),
    (["memory", "--root", "nowhere"], "there is no folder nowhere")])
def test_bad_input_is_one_sentence(capsys, tmp_path, words, sentence):
    status, out, err = say(capsys, "bench", *words, "--out", tmp_path / "out")
    assert (status, out, err.count("\n")) == (2, "", 1) and sentence in err
    assert not (tmp_path / "out").exists()


def test_a_failing_notebook_is_named(capsys, tmp_path, monkeypatch):
    bad = json.loads(bench.notebook_of("memory").read_text(encoding="utf-8"))
    for c in bad["cells"]:
        if "Bench(" in "".join(c["source"]):
            c["source"] = "raise RuntimeError('no such luck')"
    (tmp_path / "memory.ipynb").write_text(json.dumps(bad))
    monkeypatch.setattr(bench, "notebook_of", lambda n: tmp_path / f"{n}.ipynb")
    status, out, err = say(capsys, "bench", "memory", "--quick", "--out", tmp_path / "out", "--quiet")
    assert (status, out, err.count("\n")) == (1, "", 1) and "no such luck" in err
    assert err.startswith("tocoad: memory: memory.ipynb failed in cell")
    assert not (tmp_path / "out" / "bench" / "bench.json").exists()
