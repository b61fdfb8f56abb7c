"The grid: what is shared, what an edit touches, what a kill leaves, what two processes and a cluster do to one store."

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch
from forked import FORK

from tocoad.cli import main
from tocoad.data import load
from tocoad.data.images import textures
from tocoad.data.mini import write_mini
from tocoad.data.trees import write_layout
from tocoad.method import perlin
from tocoad.paper import columns, plan, published, regenerate, report, rows, sheets
from tocoad.paper.report import Results
from tocoad.run import compare, config, keys
from tocoad.run.store import Store
from tocoad.systems import tocoad as tocoad_room

ROOT = Path(__file__).parents[1]
TINY = ["size=64", "resize=64", "epochs1=1", "epochs2=1", "width=32", "batch=16"]


def grid(store, target="table5", seeds=(0,)):
    "Compute a tiny grid; run in a child"
    torch.set_num_threads(1)
    sheets.compute([target], options(store, seeds))


def options(store, seeds=(0,), **kw):
    return plan.options(
        **dict(profile="smoke", categories=["washer"], settings=TINY, store=str(store), seeds=seeds,
               systems=["tocoad"]) | kw
    )


def child(*args):
    p = FORK.Process(target=grid, args=args)
    p.start()
    return p


def journal(store):
    return [l.split()[1:3] for l in (Path(store) / "journal.txt").read_text().splitlines()]


def numbers(store, target="table5", seeds=(0,)):
    s = json.loads(sheets.sheet_path(target, options(store, seeds), Store(store)).read_text())
    assert not s["failed"]
    return s["runs"], s["differences"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    store = tmp_path_factory.mktemp("grid") / "store"
    p = child(store)
    p.join()
    assert p.exitcode == 0
    return store


# kill, share, distribute


def test_killed_in_each_stage_it_goes_on_and_ends_the_same(tmp_path, unbroken):
    for stage in ("stage1", "stage2", "memory", "scores", "metrics", "redraws", "difference"):
        p = child(tmp_path / "store")
        while p.is_alive() and not list((tmp_path / "store" / stage).glob("*.lock")):
            time.sleep(0.001)
        p.kill()
        p.join()
    p = child(tmp_path / "store")
    p.join()
    assert p.exitcode == 0 and numbers(tmp_path / "store") == numbers(unbroken)
    twice = [k for k, n in Counter(map(tuple, journal(tmp_path / "store"))).items() if n > 1]
    assert not twice, "a finished stage was computed again"


def test_two_processes_share_a_store(tmp_path, unbroken):
    both = [child(tmp_path / "store") for _ in range(2)]
    for p in both:
        p.join()
    assert [p.exitcode for p in both] == [0, 0] and numbers(tmp_path / "store") == numbers(unbroken)
    assert sorted(journal(tmp_path / "store")) == sorted(journal(unbroken)), "each stage once"


def test_cluster_with_a_worker_killed_gives_the_same(tmp_path, unbroken, monkeypatch):
    from dask.distributed import Client, LocalCluster

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    store = tmp_path / "two"
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, memory_limit=0, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        import threading

        killed = []

        def kill():
            "The first worker that is seen in stage II"
            pids = client.run(os.getpid)
            while not list((store / "stage2").glob("*.lock")) if (store / "stage2").exists() else True:
                time.sleep(0.002)
            killed.append(next(iter(pids.values())))
            os.kill(killed[0], signal.SIGKILL)

        t = threading.Thread(target=kill, daemon=True)
        t.start()
        sheets.compute(["table5"], options(store), workers=client)
        t.join(5)
    assert killed and numbers(store) == numbers(unbroken)
    assert sorted(journal(store)) == sorted(journal(unbroken)), "each stage once"


# a student's walk

WALK = """
import json, sys, tocoad
from tocoad.data.load import load
from tocoad.run.compare import compare
from tocoad.run.config import config, settings
from tocoad.run.store import Store
assert tocoad.__file__.startswith(sys.argv[1])
cfg = config("smoke", **settings(sys.argv[3:]))
r = compare(cfg, data=load(None, "mini", "washer", size=64), progress=False, store=Store(sys.argv[2]))
computed = r.stages[r.stages.computed][["method", "stage"]].values.tolist()
print(json.dumps(dict(computed=computed, rows=r.rows.to_dict("records"))), flush=True)
"""
FRESH = f"""
import os, sys
import pandas, sklearn.metrics, timm, torch, torchvision.transforms.v2
for _ in sys.stdin:
    if child := os.fork():
        if os.waitpid(child, 0)[1]:
            sys.exit(1)
    else:
        exec({WALK!r})
        os._exit(0)
"""


def test_a_students_walk(tmp_path):
    "Copy the repository, change one component in its notebook, export, compare: nothing else needs an edit"
    repo = tmp_path / "repo"
    shutil.copytree(
        ROOT / "nbs", repo / "nbs", ignore=shutil.ignore_patterns("reports", "runs", ".ipynb_checkpoints")
    )
    shutil.copytree(ROOT / "tocoad", repo / "tocoad", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, repo)
    env = os.environ | dict(PYTHONPATH=str(repo), PYTHONDONTWRITEBYTECODE="1")

    def walk():
        "What a process that loads the package now computes, and its rows"
        fresh.stdin.write("now\n")
        fresh.stdin.flush()
        line = fresh.stdout.readline()
        assert line, fresh.stderr.read()[-2000:]
        out = json.loads(line)
        return {tuple(x) for x in out["computed"]}, {
            r["method"]: {k: v for k, v in r.items() if k not in ("method", "seed")} for r in out["rows"]
        }

    def edit(nb, kind, old, new, *only):
        "Replace a text in the cells of one kind, and export as a student would"
        path = repo / "nbs" / nb
        book = json.loads(path.read_text())
        for c in book["cells"]:
            if c["cell_type"] == kind:
                c["source"] = "".join(c["source"]).replace(old, new).splitlines(keepends=True)
        assert json.dumps(book) != json.dumps(json.loads(path.read_text())), "the edit found nothing"
        path.write_text(json.dumps(book))
        export = [Path(sys.executable).parent / "nbdev-export", *only]
        subprocess.run(export, cwd=repo, env=env, check=True, capture_output=True)

    words = [sys.executable, "-c", FRESH, str(repo), str(tmp_path / "store"), *TINY]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(words, cwd=tmp_path, env=env, text=True, **pipes) as fresh:
        computed, first = walk()
        assert {m for m, _ in computed} == {"frozen", "contrastive", "two_stage"}

        edit("method/5_contrast.ipynb", "markdown", "The", "This")
        computed, again = walk()
        assert not computed and again == first

        edit("method/1_perlin.ipynb", "code", "for x in (A, M, beta))), M", "for x in (A, M, .5 * beta))), M")
        computed, changed = walk()
        assert computed == {("two_stage", s) for s in ("stage1", "stage2", "memory", "scores", "metrics")}
        assert (
            changed["two_stage"] != first["two_stage"]
            and changed["frozen"] == first["frozen"]
            and changed["contrastive"] == first["contrastive"]
        )

        contrast = "method/5_contrast.ipynb"
        edit(contrast, "code", "flip: float = .5", "flip: float = .1", "--path", f"nbs/{contrast}")
        computed, third = walk()
        assert computed == {
            (m, s)
            for m, t in (("contrastive", "contrastive"), ("two_stage", "stage2"))
            for s in (t, "memory", "scores", "metrics")
        }
        assert third["contrastive"] != changed["contrastive"]

        metrics = "measure/1_metrics.ipynb"
        edit(metrics, "code", "aupro=float(pro))", "aupro=float(pro), extra=1.)", "--path", f"nbs/{metrics}")
        computed, fourth = walk()
        assert (
            computed == {(m, "metrics") for m in fourth}
            and fourth["frozen"]["extra"] == 1
            and fourth["frozen"]["pixel_auroc"] == third["frozen"]["pixel_auroc"]
        )


class Tinted(torch.nn.Module):
    "Views with a parameter, which stage II must not leak"

    def __init__(self):
        super().__init__()
        self.tint = torch.nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, images):
        return (images * self.tint)[..., :64, :64].clamp(0, 1)


def test_components_are_part_of_the_key_and_stay_as_they_are(tmp_path):
    cfg, data, store, views = (
        config.config("smoke", **config.settings(TINY)),
        load.load(None, "mini", "washer", size=64),
        Store(tmp_path / "store"),
        Tinted(),
    )
    variants = dict(
        frozen=dict(method="frozen"), unchanged={}, tinted=dict(parts=dict(views=views)), sharp=dict(sigma=1.0)
    )
    first = compare.compare(cfg, methods=variants, data=data, progress=False, store=store)
    assert set(first.stages.query("method == 'tinted' and computed").stage) == {
        "stage2",
        "memory",
        "scores",
        "metrics",
    }
    assert set(first.stages.query("method == 'sharp' and computed").stage) == {"metrics"}
    assert (
        views.tint.detach().eq(1).all()
        and not compare.compare(cfg, methods=variants, data=data, progress=False, store=store).stages.computed.any()
    )
    again = tocoad_room.judge(data, first.image["sharp"][0], first.maps["sharp"][0])
    assert again["pixel_auroc"] == first.rows.query("method == 'sharp'").pixel_auroc.item(), (
        "the maps are those of the method"
    )
    assert {tuple(r["custom"]) for r in store.records()} == {(), ("views",)}
    opaque = compare.tasks(cfg, data, dict(generator=perlin.Perlin(textures=textures(limit=4), beta=(0, 0.1))))[
        "stage1"
    ]
    assert opaque.custom == ("generator",) and opaque.key != compare.tasks(cfg, data)["stage1"].key


# the command


@pytest.fixture
def say(capsys):
    def say(*words):
        status = main(list(map(str, words)))
        out = capsys.readouterr()
        assert "Traceback" not in out.err
        return status, out.out, out.err

    return say


@pytest.fixture(scope="module")
def partly(tmp_path_factory):
    "A root with one of MVTec AD's fifteen categories"
    root = tmp_path_factory.mktemp("root")
    write_mini(root / "made", size=64, categories=("washer",))
    (root / "mvtec_ad").mkdir()
    (root / "made" / "washer").rename(root / "mvtec_ad" / "bottle")
    (root / "made").rmdir()
    return root


def test_reproduce_writes_tables_and_reads_them_back(say, tmp_path, partly, monkeypatch):
    "Table 1 with one of the other systems; tests/test_every_target.py has all"
    monkeypatch.setattr(sheets, "unlike", lambda data: "")  # as if the mini data were MVTec AD's bottle
    where = ["--store", tmp_path / "store", "--out", tmp_path / "out", "--quiet"]
    how = ["--root", partly, "--profile", "smoke", "--set", *TINY, *where]
    for words in (["table1", "--systems", "tocoad", "rd4ad"], ["table7", "audit", "figure7"]):
        status, out, err = say("reproduce", *words, *how)
        assert status == 0, err
    for t in ("table1", "table7", "audit"):
        assert {p.suffix for p in (tmp_path / "out" / "tables").glob(f"{t}.*")} >= {".csv", ".md", ".html", ".tex"}
    assert {p.suffix for p in (tmp_path / "out" / "figures").glob("figure7.*")} >= {".png", ".pdf"}
    page = (tmp_path / "out" / "index.html").read_text()
    assert all(f'id="{t}"' in page for t in ("table1", "table7", "audit", "figure7"))
    text = (tmp_path / "out" / "tables" / "table1.md").read_text()
    assert (
        "profile smoke (smoke: shows that it runs, is no result)" in text
        and "not there" in text
        and "(1 of 15)" in text
        and "RD4AD with epochs 5 (200)" in text
    )
    ours = pd.read_csv(tmp_path / "out" / "tables" / "table1.csv").query("metric == 'pixel_auroc'")
    assert "RD4AD" in set(ours.row) and "PaDiM" not in set(ours.row)
    before = journal(tmp_path / "store")
    assert say("reproduce", "table1", "--systems", "tocoad", "rd4ad", *how)[0] == 0
    assert journal(tmp_path / "store") == before, "the second time everything comes from the store"
    assert (tmp_path / "out" / "tables" / "table1.md").read_text() == text
    assert "drawn" in (tmp_path / "out" / "reproduce.log").read_text()


def test_reading_from_the_store_imports_no_torch(unbroken):
    code = f"""import sys
from tocoad.paper import sheets
r = sheets.results('table5', profile='smoke', categories=['washer'], settings={TINY}, store={str(unbroken)!r})
print(len(r.runs), 'torch' in sys.modules)"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["5", "False"]


def test_a_failed_cell_is_a_row_and_is_tried_again(tmp_path):
    o = options(tmp_path / "store", settings=[*TINY, "lr2=1e30"])
    for _ in range(2):
        r = Results(sheets.compute(["table5"], o)["table5"])
        assert (
            r.rows == ["frozen F", "NCL ×, DNP ×"]
            and len(r.failed) == 3
            and all("The loss became" in f for f in r.failed)
        )
    tried = [s for s, _ in journal(tmp_path / "store")]
    assert tried.count("stage1") == 1 and "stage2" not in tried


def test_a_data_set_that_cannot_be_read_is_a_row(tmp_path):
    (tmp_path / "visa" / "candle").mkdir(parents=True)
    r = Results(
        sheets.compute(["table2"], options(tmp_path / "store", root=str(tmp_path), categories=None))["table2"]
    )
    assert (
        not r.rows
        and len(r.failed) == 3
        and "candle" in r.failed[0]
        and any("VisA: Capsules" in m for m in r.missing)
    )


def test_a_split_of_one_s_own_fills_no_cell_of_the_paper_s_tables(tmp_path):
    write_layout(tmp_path / "visa", "visa", ["candle"])
    r = Results(
        sheets.compute(["table2"], options(tmp_path / "store", root=str(tmp_path), categories=None))["table2"]
    )
    assert not r.rows and len(r.failed) == 3
    assert all("train normal 6 instead of 900" in f and "tocoad reproduce panel --folders" in f for f in r.failed)
    assert "ours" not in columns.comparison(r).columns.get_level_values(1)


def test_visa_and_btad_fill_tables_2_and_3(tmp_path, monkeypatch):
    "On the mini data laid out as these sets: every row is computed, Table 3 has an image level too"
    monkeypatch.setattr(sheets, "unlike", lambda data: "")  # as if the counts were the published ones
    for d, names in dict(visa=["candle"], btad=["01", "03"]).items():
        write_layout(tmp_path / d, d, names, traps=True)
    o = options(tmp_path / "store", root=str(tmp_path), categories=None)
    both = {t: Results(s) for t, s in sheets.compute(["table2", "table3"], o).items()}
    for t, d, names in (("table2", "VisA", ["Candle", "Total avg."]), ("table3", "BTAD", ["01", "03", "Total avg."])):
        r = both[t]
        assert not r.failed and any(d in m for m in r.missing)
        assert list(columns.gains(r).index) == names
    extra = columns.gains(both["table3"], beyond="image_auroc")
    assert list(extra.index) == ["01", "03", "Total avg."] and "(2 of 3" in extra.iloc[2, 0]
    assert (extra.xs("ours", axis=1, level=1) != "-").all().all()
    assert set(both["table3"].runs.dataset) == {"btad"}


def test_failures_end_with_status_1(say, tmp_path):
    status, out, err = say(
        "reproduce",
        "table8",
        "--categories",
        "washer",
        "--set",
        *TINY,
        "lr2=1e30",
        "--store",
        tmp_path / "s",
        "--out",
        tmp_path / "out",
        "--quiet",
    )
    assert (
        status == 1
        and "table8: Concatenation ✓, washer, seed 0: stage2: The loss became" in err
        and "start again to retry" in out
    )
    assert "Failed: Concatenation ✓" in (tmp_path / "out" / "tables" / "table8.md").read_text()


def test_dry_run_counts_what_is_shared(say, tmp_path):
    status, out, err = say("reproduce", "all", "--dry-run", "--store", tmp_path / "none")
    others = {r.system for t in ("table1", "table2", "table3") for r in rows.rows(t) if r.system}
    assert (
        status == 0
        and f"{len(published.configurations()) + 2 + len(others)} configurations on 5 categories" in out
        and "of it for other systems" in out
        and "0 stages stored" in out
    )
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "words,status,sentence",
    [
        (["reproduce", "tabel1"], 2, "a table or figure cannot be 'tabel1': take table1"),
        (["reproduce", "table1", "--set", "epoch2=1"], 2, "did you mean 'epochs2'"),
        (["reproduce", "table1", "--set", "seed=1"], 2, "fixed by the tables"),
        (["reproduce", "table1", "--param", "nosuch=1"], 2, "no notebook of table1 has a parameter 'nosuch'"),
        (["reproduce", "table1", "--param", "nosuch"], 2, "write it as name=value"),
        (["reproduce", "table1", "--param", "seeds=1"], 2, "use the option --seeds"),
        (["reproduce", "table1", "--root", "nowhere"], 2, "there is no folder nowhere"),
        (["reproduce", "table1", "--categories", "botle"], 2, "a category cannot be 'botle'"),
        (["reproduce", "table1", "--workers", "local:none"], 2, "write local:2"),
        (
            ["reproduce", "table1", "--workers", "tcp://127.0.0.1:1", "--out", "{tmp}/o", "--store", "{tmp}/s"],
            1,
            "no scheduler answers there",
        ),
        (["reproduce", "table1", "--store", "{old}", "--out", "{tmp}/o"], 1, "is a store of format 99"),
        (
            ["reproduce", "table1", "--store", "{file}/store", "--out", "{tmp}/o"],
            1,
            "choose another folder with --store",
        ),
        (["reproduce", "table1", "--store", "{full}", "--out", "{tmp}/o"], 1, "holds other files"),
        (["reproduce", "table1", "--out", "{file}/out", "--store", "{tmp}/s"], 1, "choose another folder with --out"),
        (
            ["reproduce", "table1", "--device", "cuda:99", "--out", "{tmp}/o", "--store", "{tmp}/s"],
            1,
            "There is no device 'cuda:99'",
        ),
        (
            ["reproduce", "table7", "--set", "generator=nsa"],
            2,
            "table7 has a row 'Generator CutPaste', which fixes generator",
        ),
        (["reproduce", "table6", "--set", "lam=0.9"], 2, "table6 has a row 'λ 0.1, Loss CE', which fixes lam"),
        (["reproduce", "verdict", "--set", "layers=4"], 2, "which fixes layers"),
        (["reproduce", "table5", "--profile", "paper"], 2, "name the folder as textures=FOLDER"),
        (["reproduce", "table5", "--profile", "smoke", "literal"], 2, "textures=embedded"),
        (["run", "--profile", "literal"], 2, "name the folder as textures=FOLDER"),
        (
            ["fit", "--good", "{tmp}", "--model", "{tmp}/m", "--profile", "paper", "--system", "tocoad"],
            2,
            "name the folder as textures=FOLDER",
        ),
        (
            ["fit", "--good", "{tmp}", "--model", "{tmp}/m", "--set", "mask=cast"],
            2,
            "own parts have no data set",
        ),
        (["run", "--set", "lr_head=-1"], 2, "lr_head must be a number from 0 to 1e+30"),
        (["run", "--set", "colour=nan"], 2, "colour must be a number from 0 to 1"),
        (["runs", "list", "--store", "{tmp}/none"], 1, "there is no store at"),
        (["run", "--set", "method=frozen"], 2, "every method is run"),
    ],
)
def test_bad_input_is_one_sentence(say, tmp_path, words, status, sentence):
    for name in ("old", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "old" / "store.json").write_text('{"format": 99}')
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    found, out, err = say(
        *(w.format(tmp=tmp_path, **{n: tmp_path / n for n in ("old", "full", "file")}) for w in words),
        *(["--quiet"] if words[0] == "reproduce" else []),
    )
    assert (found, err.count("\n")) == (status, 1) and sentence in err and err.startswith("tocoad: ")
    assert not list((tmp_path / "full").glob("store*"))


LITE = ["backbone=tf_efficientnet_lite0", "patches=mean", "dims=none", "textures=embedded", *TINY]


@pytest.mark.slow
def test_two_profiles_stand_side_by_side(say, tmp_path):
    "What `paper` changes is seen in one table; controls stand where batch norm takes new statistics"
    status, _, err = say(
        "reproduce",
        "table5",
        "--profile",
        "literal",
        "paper",
        "--categories",
        "washer",
        "--set",
        *LITE,
        "--store",
        tmp_path / "s",
        "--out",
        tmp_path / "o",
        "--quiet",
    )
    assert status == 0, err
    text = (tmp_path / "o" / "tables" / "table5.md").read_text()
    assert "profiles literal and paper" in text and "textures=embedded" in text.splitlines()[0]
    head, rows = (
        next(l for l in text.splitlines() if l.startswith("| NCL")),
        [l for l in text.splitlines() if l.startswith("| ")],
    )
    assert (
        all(f"{p} I-AUROC (%) ours" in head for p in ("literal", "paper"))
        and head.count("I-AUROC (%) published") == 1
    )
    assert any(l.startswith("| rate 0, both stages, Perlin") for l in rows) and any(
        l.startswith("| C alone, weight 0.5") for l in rows
    )
    both = sheets.results(
        "table5", ["literal", "paper"], categories=["washer"], settings=LITE, store=str(tmp_path / "s")
    )
    literal, paper = both, both.beside[0]
    frozen = lambda r, c: r.runs[r.runs.row == "frozen F"][c].item()
    assert frozen(literal, "pixel_auroc") != frozen(paper, "pixel_auroc"), "Eq. 9's scores against plain distances"
    assert "rate 0, C alone" in literal.rows and "rate 0, C alone" not in paper.rows
    d = literal.differences
    assert set(d[d.base == "rate 0, both stages, Perlin"].row) == {"NCL ✓, DNP ✓"}
    assert set(paper.differences[paper.differences.base == "C alone, weight 0.5"].row) == {"NCL ✓, DNP ✓"}


def test_every_two_stage_row_says_the_share_of_ds_pull(unbroken):
    r = sheets.results("table5", profile="smoke", categories=["washer"], settings=TINY, store=str(unbroken))
    pull = r.runs.set_index("row").pull
    assert 0 < pull["NCL ✓, DNP ✓"] < 100 and pull.drop("NCL ✓, DNP ✓").isna().all()
    assert "D's pull, %" in report.ablation(r).columns.get_level_values(0)


def test_best_epoch_by_test_labels_is_a_column_of_its_own(tmp_path):
    o = options(tmp_path / "s", settings=[*TINY, "epochs2=2", "curve=1"])
    r = Results(sheets.compute(["table8"], o)["table8"], None, o.rows("table8"))
    trained = r.runs[r.runs.row != "frozen F"]
    assert (trained.oracle_pixel_auroc >= trained.pixel_auroc).all() and r.runs[
        r.runs.row == "frozen F"
    ].oracle_pixel_auroc.isna().all()
    assert "best epoch by test labels" in report.ablation(r).columns.get_level_values(1)
    assert any("oracle" in n for n in report.notes(r))


def test_a_result_of_another_arithmetic_or_version_has_another_key(monkeypatch):
    cfg, data = config.config("smoke"), load.load(None, "mini", "washer", size=64)
    key = lambda cfg=cfg, device="cpu": {s: t.key for s, t in compare.tasks(cfg, data, device=device).items()}
    first = key()
    for other in (key(device="cuda"), key(cfg.replace(precision="bf16"))):
        assert not set(first.values()) & set(other.values())
    assert key(cfg.replace(precision="tf32")) == first, "a CPU knows no TF32"
    assert not set(key(cfg.replace(precision="tf32"), "cuda").values()) & set(key(device="cuda").values())
    now = keys.versions()
    for package in keys.COMPUTING:
        monkeypatch.setattr(keys, "versions", lambda p=package, v=now: v | {p: "0"})
        assert not set(first.values()) & set(key().values()), package
        monkeypatch.undo()


def test_rows_of_table_6_share_one_discriminator():
    data = load.load(None, "mini", "washer", size=64)
    o = plan.options("smoke")
    one = {
        row.name: compare.tasks(o.config("mini", "washer", 0, row), data)["stage1"].key
        for row in o.rows("table6")
        if row.changes["method"] == "two_stage"
    }
    other = one.pop("λ 0.5, Loss CE, D by CE too")
    assert len(one) == 10 and len(set(one.values())) == 1 and other not in one.values()


def test_runs_list_show_prune(say, tmp_path, unbroken):
    store = tmp_path / "store"
    shutil.copytree(unbroken, store)
    status, out, _ = say("runs", "list", "--store", store)
    assert status == 0 and out.count("mini/washer") == 4 and "stage1: 1 records" in out
    key = out.split()[0]
    assert json.loads(say("runs", "show", key, "--store", store)[1])["stage"] == "metrics"
    assert "0 records begin with 'zzz'" in say("runs", "show", "zzz", "--store", store)[2]
    (store / "memory" / "half.safetensors").write_bytes(b"x")
    assert "would drop 0 records, 1 leftovers" in say("runs", "prune", "--dry-run", "--store", store)[1]
    for p in (store / "sheets").glob("*.json"):
        p.unlink()
    before = sorted(store.rglob("*"))
    status, out, err = say("runs", "prune", "--store", store)
    assert status == 1 and "nothing was dropped: say --yes" in err and sorted(store.rglob("*")) == before
    status, out, _ = say("runs", "prune", "--yes", "--store", store)
    assert status == 0 and not list(store.glob("*/*.safetensors")) and not Store(store).records()


def test_tensors_may_be_dropped_and_numbers_stay(tmp_path, unbroken):
    store = tmp_path / "store"
    shutil.copytree(unbroken, store)
    o = options(store)
    sheets.compute(["table5"], o, keep="scores")
    assert not list((store / "stage2").glob("*.safetensors")) and list((store / "scores").glob("*.safetensors"))
    assert numbers(store) == numbers(unbroken) and journal(store) == journal(unbroken)


def test_every_target_has_its_notebook_with_the_same_parameters():
    import papermill

    for t in rows.TARGETS:
        drawn = t == "audit" or t.startswith("figure")
        less = ({"files"} if drawn else set()) | (set() if t == "panel" else {"folders"})
        less |= set() if t in ("panel", "table1", "table2", "table3") else {"systems"}
        taken = [p for p in regenerate.PARAMETERS if p not in less]
        assert sorted(papermill.inspect_notebook(str(regenerate.notebook_of(t)))) == sorted(taken), t
        assert (
            5
            <= sum(c["cell_type"] == "code" for c in json.loads(regenerate.notebook_of(t).read_text())["cells"])
            <= 15
        ), t
