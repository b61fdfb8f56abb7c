"What a store gives back is what was put in, whoever works on it and whatever befalls its files"
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tocoad.data.errors import BadInput
from tocoad.data.load import load
from tocoad.data.mini import MINI
from tocoad.data.trees import write_layout
from tocoad.run import cluster, compare, exchange
from tocoad.run.config import config
from tocoad.run.keys import chain, content
from tocoad.run.source import PACKAGE
from tocoad.run.store import Store, read_sealed, write_sealed

TINY = dict(resize=64, size=64, epochs1=1, epochs2=1, width=32, batch=8, coreset=.2)
FROZEN = {"frozen": dict(method="frozen")}


@pytest.fixture(scope="module")
def washer():
    return load(None, "mini", "washer", size=64)


@pytest.fixture
def task():
    return chain(config("smoke"), "data", "weights")["metrics"]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def run(washer, store, methods=FROZEN):
    "A comparison of the smallest kind"
    return compare.compare(config("smoke", **TINY), methods=methods, data=washer, store=store, device="cpu",
                           progress=False)


def computed(result):
    "The stages that were computed"
    return set(result.stages.query("computed").stage)


def say(n, code, folder, *words):
    "Start n processes of some code, let them end, and give what they print"
    every = [subprocess.Popen([sys.executable, "-c", code, str(folder), *words], stdout=subprocess.PIPE, text=True)
             for _ in range(n)]
    out = [p.communicate(timeout=120)[0] for p in every]
    assert not any(p.returncode for p in every)
    return out


class Opaque:
    "Patches of a kind that nobody can tell from others"
    def __init__(self):
        self.steps = (i for i in range(3))

    def __deepcopy__(self, memo):
        return self

    def __call__(self, *a, **k):
        return compare.PATCHES["mean"](*a, **k)


def test_a_component_that_cannot_be_told_is_computed_each_time_and_not_stored(washer, store):
    usual = run(washer, store)
    methods = {"frozen": dict(method="frozen", parts=dict(patches=Opaque()))}
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"Opaque cannot be told from others like it .* not stored"):
            again = run(washer, store, methods)
        assert computed(again) == {"memory", "scores", "metrics"}
        assert again.image["frozen"].shape == usual.image["frozen"].shape
    assert len(store.records()) == 3 and not any(r["custom"] for r in store.records())


@pytest.mark.parametrize("layout", ["mvtec", "visa", "btad", "folder"])
def test_the_loader_notes_what_is_in_memory(tmp_path, layout):
    write_layout(tmp_path / "set", layout, size=64, n=(3, 2, 2))
    first = next(iter(sorted(p.name for p in (tmp_path / "set").iterdir() if p.is_dir() and p.name in MINI)), None)
    data = load(tmp_path / "set", None, first or load_names(tmp_path / "set"), size=64)
    assert content(data) == data.fingerprint


def load_names(root):
    "The first category of a folder"
    from tocoad.data.layouts import recognise
    return recognise(root, None).categories[0]


def changes(data):
    "The same category, each time another in one thing"
    train, test = data.train, data.test
    yield replace(data, train=train[:len(train) // 2])
    yield replace(data, test=replace(test, masks=~test.masks & test.labels[:, None, None]))
    yield replace(data, test=replace(test, labels=~test.labels))
    yield replace(data, test=replace(test, images=255 - test.images))
    yield replace(data, validation=train[:2])


def test_other_images_in_memory_are_other_data(washer, store):
    first = run(washer, store)
    assert not computed(run(washer, store))
    assert len({content(d) for d in [washer, *changes(washer)]}) == 6
    for data in list(changes(washer))[:2]:
        other = run(data, store)
        assert computed(other) == {"memory", "scores", "metrics"} and other.data.fingerprint != washer.fingerprint
    assert not computed(again := run(washer, store))
    assert again.rows.equals(first.rows)


def test_images_changed_where_they_lie_are_other_data(store):
    data = load(None, "mini", "washer", size=64)
    data = replace(data, train=replace(data.train, images=data.train.images.clone()))
    run(data, store)
    data.train.images.numpy()[0] = 0
    assert computed(run(data, store)) == {"memory", "scores", "metrics"}


def test_a_stage_is_not_computed_from_other_images_than_its_key_names(washer, store):
    end = compare.tasks(config("smoke", **TINY).replace(method="frozen"), washer)["metrics"]
    half = replace(washer, train=washer.train[:8])
    with pytest.raises(BadInput, match="have changed since they were loaded"):
        compare.carry_out(end, half, store)
    assert "load them again" in cluster.carry_out_all([end], half, store)[end]
    assert not store.records()


STALE = """
import sys, time
from pathlib import Path
from tocoad.data.load import load
from tocoad.run import compare, source
from tocoad.run.config import config
from tocoad.run.store import Store
assert source.PACKAGE.parent == Path(sys.argv[2])
cfg, data, store = config("smoke", resize=64, size=64), load(None, "mini", "washer", size=64), Store(sys.argv[1])
def run(**change):
    r = compare.compare(cfg.replace(**change), methods={"frozen": dict(method="frozen")}, data=data, store=store,
                        device="cpu", progress=False)
    return bool(r.stages.computed.any())
print(run(), run())
start = time.perf_counter()
run()
print(time.perf_counter() - start < 2)
def edit(room, old, new):
    path = Path(sys.argv[2], "tocoad", f"{room}.py")
    path.write_text(path.read_text().replace(old, new, 1))
edit("method/nsa", "import torch", "import torch # a remark")
print(run())
edit("method/memory", "def ", "print()\\ndef ")
for change in ({}, dict(sigma=1.)):
    try:
        print(run(**change))
    except source.Stale as e:
        print(e)
"""


def test_after_an_export_a_running_kernel_shows_nothing_that_is_stored(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "tocoad")
    path = ":".join([str(tmp_path), *filter(None, sys.path)])
    found = subprocess.run([sys.executable, "-c", STALE, tmp_path / "s", tmp_path], capture_output=True,
                           text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path})
    lines = found.stdout.splitlines()
    assert lines[:3] == ["True False", "True", "False"], found.stderr
    assert len(lines) == 5
    assert all("method/memory.py has changed since it was imported: restart" in x for x in lines[3:])


# damage

def digit(text):
    "One digit of the values is another"
    i = text.index("0.", text.index('"values"')) + 2
    return text[:i] + str((int(text[i]) + 1) % 10) + text[i + 1:]


def member(change):
    "The document after a change of what it holds"
    def damage(text):
        found = json.loads(text)
        change(found)
        return json.dumps(found)
    return damage


DAMAGE = {
    "a digit": digit, "a list": lambda t: "[1, 2]", "a number": lambda t: "3", "nothing": lambda t: "", "no": lambda t:
    "null", "half": lambda t: t[:len(t) // 2], "no values": member(lambda r: r.pop("values")),
    "another key": member(lambda r: r.update(key="0" * 24)), "values of text": member(lambda r: r.update(values="x")),
    "an older hash": member(lambda r: r.update(sha256="0" * 64)), "a number for a hash": member(
        lambda r: r.update(sha256=1)), "deep": lambda t: "[" * 99999}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_record_is_dropped_with_a_line_and_computed_anew(store, task, how):
    store.put(task, dict(aupro=.25, log=[.5]), dict(x=np.arange(3.)), seconds=1.)
    path = store.path(task)
    path.write_text(DAMAGE[how](path.read_text()))
    with pytest.warns(UserWarning, match="not as it was written|without hashes") as said:
        assert store.record(task) is None
    assert len(said) == 1 and "\n" not in str(said[0].message)
    assert store.records() == []
    store.put(task, dict(aupro=.25), dict(x=np.arange(3.)), seconds=1.)
    assert store.record(task, True, True)["values"] == dict(aupro=.25)


def test_a_damaged_metrics_record_changes_no_table(washer, store):
    first = run(washer, store)
    [path] = (store.root / "metrics").glob("*.json")
    path.write_text(digit(path.read_text()))
    with pytest.warns(UserWarning, match="dropped and computed anew"):
        again = run(washer, store)
    assert computed(again) == {"metrics"} and again.rows.equals(first.rows)


def test_two_records_that_changed_places_are_not_read(store):
    a, b = (chain(config("smoke", seed=s), "data", "weights")["metrics"] for s in (0, 1))
    for t, v in ((a, .25), (b, .75)):
        store.put(t, dict(aupro=v))
    os.rename(store.path(a), store.root / "c")
    os.rename(store.path(b), store.path(a))
    os.rename(store.root / "c", store.path(b))
    with pytest.warns(UserWarning, match="dropped"):
        assert store.record(a) is store.record(b) is None


def test_a_flipped_bit_in_stored_tensors_is_found_and_computed_anew(washer, store):
    first = run(washer, store)
    for stage in ("scores", "memory"):
        [path] = (store.root / stage).glob("*.safetensors")
        bits = bytearray(path.read_bytes())
        bits[-5] ^= 4
        path.write_bytes(bits)
    with pytest.warns(UserWarning, match="not as it was written"):
        again = run(washer, store)
    assert computed(again) == {"memory", "scores"}
    assert np.array_equal(again.image["frozen"], first.image["frozen"]) and again.rows.equals(first.rows)


def test_tensors_that_changed_after_they_were_looked_for_are_refused(store, task):
    store.put(task, {}, dict(x=np.arange(3.)))
    path = store.path(task, ".safetensors")
    path.write_bytes(path.read_bytes().replace(b"x", b"y"))
    assert store.record(task, tensors=True)
    with pytest.raises(BadInput, match="not as it was written"):
        store.load(task.stage, task.key)
    with pytest.raises(BadInput, match="start again"):
        store.tensors(task)


def test_records_without_hashes_are_told_of_once_and_left(tmp_path, task):
    store = Store(tmp_path / "store")
    path = store.path(task)
    store.put(task, dict(aupro=.25))
    old = {k: v for k, v in read_sealed(path).items() if k not in ("sha256", "tensors")}
    path.write_text(json.dumps(old))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        assert [store.record(task) for _ in range(3)] == [None] * 3
    assert ["as earlier versions wrote them" in str(w.message) for w in said] == [True]
    assert path.exists()


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_bytes_in_a_record_s_place_are_not_stored(tmp_path_factory, data):
    "None, never a traceback, never other values"
    store = Store(tmp_path_factory.getbasetemp() / "fuzzed")
    t = chain(config("smoke"), "data", "weights")["metrics"]
    store.put(t, dict(aupro=.25), seconds=1.)
    path, good = store.path(t), store.path(t).read_bytes()
    whole = json.loads(good)
    value = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                         lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3))
    cut = st.integers(0, len(good) - 1)
    spliced = st.builds(lambda i, b, n: good[:i] + b + good[i + n:], cut, st.binary(max_size=4), st.integers(0, 4))
    member = st.builds(lambda k, v: json.dumps(whole | {k: v}).encode(), st.sampled_from(sorted(whole)), value)
    path.write_bytes(data.draw(st.binary(max_size=60) | value.map(lambda v: json.dumps(v).encode()) | spliced | member))
    with warnings.catch_warnings(action="ignore"):
        found, every = store.record(t, True, True), store.records()
    same = lambda r: {k: v for k, v in r.items() if k != "sha256"} == {k: v for k, v in whole.items() if k != "sha256"}
    assert (found is None or same(found)) and all(map(same, every))


@pytest.mark.parametrize("key", ["../../x", "../" * 8 + "tmp/x", "", "0" * 23, "g" * 24, "0" * 24 + "\n", None, 3])
def test_what_is_no_key_names_no_file(store, key):
    with pytest.raises(BadInput, match="is no stage and key"):
        store.drop(dict(stage="metrics", key=key))
    for stage in ("..", "a/b", ".busy"):
        with pytest.raises(BadInput, match="is no stage and key"):
            store.load(stage, "0" * 24)


def test_a_sealed_record_of_a_key_that_is_none_is_not_listed(store, task):
    store.put(task, {})
    r = read_sealed(store.path(task))
    write_sealed(r | dict(key="../../x"), store.root / "metrics" / f"{'1' * 24}.json")
    write_sealed(r | dict(key="x"), store.root / "metrics" / "x.json")
    assert [x["key"] for x in store.records()] == [task.key]


# rivals and interruptions

HOLD = """
import os, sys, time
from types import SimpleNamespace
from pathlib import Path
from tocoad.run.store import Store
store, t = Store(sys.argv[1]), SimpleNamespace(stage="metrics", key="0" * 24, kept=True)
inside, twice = Path(sys.argv[1], "inside"), 0
for _ in range(150):
    with store.lock(t):
        try:
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            twice += 1
        inside.unlink(missing_ok=True)
print(twice)
"""


def test_a_lock_has_one_holder(tmp_path):
    Store(tmp_path / "store")
    assert [int(x) for x in say(4, HOLD, tmp_path / "store")] == [0] * 4


OPEN = """
import sys, time
from pathlib import Path
from tocoad.run.store import Store
end = time.time() + 4
for i in range(300):
    root = Path(sys.argv[1], str(i))
    Store(root)
    (root / "metrics").mkdir(exist_ok=True)
"""


def test_a_store_opened_by_several_at_once_is_refused_to_none(tmp_path):
    say(4, OPEN, tmp_path)


def test_a_rival_s_mark_is_seen_though_it_comes_between_two_looks(tmp_path, monkeypatch):
    "The rival makes the store after the first look at it"
    from pathlib import Path
    root, looked, was = tmp_path / "store", [], Path.iterdir
    root.mkdir()
    def rival(self):
        found = list(was(self))
        if self == root and not looked:
            looked.append(1)
            Store(root)
            (root / "metrics").mkdir()
        return iter(found)
    monkeypatch.setattr(Path, "iterdir", rival)
    exists = Path.exists
    def late(self):
        if self == root / "store.json" and not looked:
            found = exists(self)
            list(self.parent.iterdir())
            return found
        return exists(self)
    monkeypatch.setattr(Path, "exists", late)
    Store(root)


def test_a_killed_process_keeps_nobody_from_the_store(tmp_path, task):
    store = Store(tmp_path / "store")
    code = HOLD.partition("inside")[0] + "with store.lock(t):\n    print('in', flush=True)\n    time.sleep(60)\n"
    p = subprocess.Popen([sys.executable, "-c", code, str(store.root)], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "in\n"
    with pytest.raises(BadInput, match="a run is at work"), store.alone():
        pass
    p.send_signal(signal.SIGKILL)
    p.wait()
    start = time.monotonic()
    with store.alone():
        pass
    with store.lock(task):
        assert time.monotonic() - start < 30
    assert torch.is_tensor(torch.zeros(1)) and not list((store.root / ".busy").glob("*.lock"))


# pruning

@pytest.fixture
def prune(store, capsys):
    "`tocoad runs prune` on the store: status and what it says"
    from tocoad.cli import main
    def prune(*words):
        status = main(["runs", "prune", "--store", str(store.root), *words])
        said = capsys.readouterr()
        return status, said.out, said.err
    return prune


def table(store, name, keys, sets=(("mvtec_ad", "bottle", "f"),), **more):
    "A table of the store, in a file of its own"
    s = dict(target="table1", profile="smoke", settings=[], seeds=[0], mini=False, keys=keys) | more
    s["sets"] = [dict(zip(("dataset", "category", "fingerprint"), x, strict=True)) for x in sets]
    return exchange.keep(store, s, store.root / "sheets" / f"{name}.json")


def filled(store, n):
    "Stages of n seeds: their keys"
    ts = [chain(config("smoke", seed=s), "data", "weights")["metrics"] for s in range(n)]
    for t in ts:
        store.put(t, dict(aupro=.25), dict(x=np.arange(3.)))
    return [t.key for t in ts]


OTHER = dict(categories=dict(sets=[("mvtec_ad", "screw", "f")]), images=dict(sets=[("mvtec_ad", "bottle", "g")]),
             more=dict(sets=[("mvtec_ad", "bottle", "f"), ("mvtec_ad", "screw", "f")]), seeds=dict(seeds=[1]),
             settings=dict(settings=["sigma=1"]), profile=dict(profile="laptop"), data=dict(mini=True))


@pytest.mark.parametrize("other", OTHER)
def test_a_table_is_kept_for_each_choice(store, prune, other):
    a, b, c = filled(store, 3)
    table(store, "first", [a])
    table(store, "second", [b], **OTHER[other])
    status, out, _ = prune("--yes")
    assert status == 0 and "dropped 1 records (metrics 1)" in out and "by 2 tables" in out
    assert [r["key"] for r in store.records()] == sorted([a, b], key=lambda k: (store.records()[0]["written"], k))


def test_the_newer_table_of_a_choice_is_kept_whatever_the_clock_says(store, prune):
    a, b = filled(store, 2)
    table(store, "z", [a])
    newer = table(store, "a", [b])
    os.utime(newer, (1, 1))
    assert prune("--yes")[0] == 0
    assert [r["key"] for r in store.records()] == [b]


def test_nothing_goes_unasked(store, prune, monkeypatch):
    filled(store, 2)
    files = lambda: sorted(p for p in store.root.rglob("*") if ".busy" not in p.parts)
    before = files()
    status, out, err = prune()
    assert status == 1 and "would drop 2 records (metrics 2)" in out and "--yes" in err
    assert prune("--dry-run", "--yes")[0] == 0
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    for answer in ("", "n", "no", "what"):
        monkeypatch.setattr("builtins.input", lambda said, answer=answer: answer)
        assert prune()[0] == 1
    assert files() == before
    monkeypatch.setattr("builtins.input", lambda said: "y")
    assert prune()[0] == 0 and not store.records()


def test_a_table_that_cannot_be_read_stops_the_pruning(store, prune):
    a, _ = filled(store, 2)
    path = table(store, "first", [a])
    for text in (path.read_text().replace(a, "0" * 24), "[]", "{", '{"keys": 3}', "null"):
        path.write_text(text)
        status, _, err = prune("--yes")
        assert status == 1 and "first.json is not as it was written" in err and err.count("\n") == 1
    assert len(store.records()) == 2


def test_a_record_whose_key_leads_out_of_the_store_drops_nothing_there(store, prune, tmp_path):
    filled(store, 1)
    r = store.records()[0]
    for name in ("x.json", "x.safetensors"):
        (tmp_path / name).write_text("mine")
    for i, name in enumerate(("2" * 24, "odd")):
        write_sealed(r | dict(key="../../x", number=i), store.root / "metrics" / f"{name}.json")
    assert prune("--yes")[0] == 0
    assert [(tmp_path / n).read_text() for n in ("x.json", "x.safetensors")] == ["mine", "mine"]


AT_WORK = """
import sys, time
from types import SimpleNamespace
from tocoad.run.store import Store
store, t = Store(sys.argv[1]), SimpleNamespace(stage="metrics", key="0" * 24, kept=True)
with store.lock(t):
    store.path(t, ".safetensors").write_bytes(b"half")
    print("in", flush=True)
    sys.stdin.readline()
"""


def test_nothing_is_pruned_under_a_run(store, prune):
    filled(store, 1)
    p = subprocess.Popen([sys.executable, "-c", AT_WORK, str(store.root)], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "in\n"
    half = store.root / "metrics" / f"{'0' * 24}.safetensors"
    status, _, err = prune("--yes")
    assert status == 1 and "a run is at work" in err and half.exists() and len(store.records()) == 1
    p.communicate("\n", timeout=60)
    assert prune("--yes")[0] == 0 and not half.exists() and not store.records()
