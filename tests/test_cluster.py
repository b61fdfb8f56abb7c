"A cluster that fails in parts: the rest goes on, the row says why, the next start goes on"
import shutil
from types import SimpleNamespace

import pytest
import toys
from dask.distributed import Client
from distributed.scheduler import KilledWorker

from tocoad.data.errors import BadInput
from tocoad.paper import reproduce, sheets
from tocoad.run import cluster, compare
from tocoad.run.config import config
from tocoad.run.store import Store

TINY = dict(size=32, resize=32, width=32, batch=8, epochs1=1, epochs2=1, dataset="own", category="cog")

@pytest.fixture
def here(tmp_path, monkeypatch):
    "Images, a store, and two runs: one that trains and one that does not"
    monkeypatch.setenv("TOCOAD_CACHE", str(tmp_path / "cache"))
    cfg = config("smoke", **TINY)
    at = compare.at(cfg, toys.toy(tmp_path / "set"))
    data = compare.load_at(*at)
    ends = [compare.tasks(cfg.replace(method=m), data)["metrics"] for m in ("contrastive", "frozen")]
    return at, data, ends, Store(tmp_path / "store")


def threads():
    "A cluster within this process, which sees what a test replaces"
    return Client(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None)


def spread(here, client, told=lambda *a: None):
    "What comes of the runs on a cluster, as `sheets.compute` has it"
    at, data, ends, store = here
    failed = sheets._spread(ends, at, store, "cpu", client, told)
    return cluster.carry_out_all(ends, data, store, failed=failed)


def done(here):
    "Both runs without a cluster"
    at, data, ends, store = here
    return cluster.carry_out_all(ends, data, store)


ON_WORKER = cluster._on_worker


def dies(t, *args, **kw):
    "What the scheduler gives for a stage whose workers have all died"
    if t.stage == "contrastive":
        raise KilledWorker(t.stage, SimpleNamespace(address="tcp://there"), 3)
    return ON_WORKER(t, *args, **kw)


def test_a_stage_that_kills_every_worker_is_a_row(here, monkeypatch):
    monkeypatch.setattr(cluster, "_on_worker", dies)
    with threads() as client:
        out = spread(here, client)
    trained, frozen = here[2]
    assert "those workers died" in out[trained] and isinstance(out[frozen], dict)
    monkeypatch.undo()
    assert isinstance(done(here)[trained], dict), "the next start goes on"


@pytest.mark.parametrize("stage", ["contrastive", "memory", "metrics"])
def test_a_store_that_disappears_stops_nothing(stage, here, monkeypatch):
    store, real, told = here[3], compare.carry_out, []
    def gone(t, *args, **kw):
        "Carry out, and lose the store when a stage is over"
        r = real(t, *args, **kw)
        if t.stage == stage:
            shutil.rmtree(store.root)
        return r
    monkeypatch.setattr(cluster, "carry_out", gone)
    with threads() as client:
        out = spread(here, client, lambda t, r, new: told.append(r["seconds"]))
    rows = [r for r in out.values() if isinstance(r, str)]
    assert all("computed, but not found in the store at" in r or "No such file" in r for r in rows)
    assert rows or stage != "metrics"
    monkeypatch.undo()
    assert all(isinstance(r, dict) for r in done(here).values()), "the next start goes on"


def test_a_store_that_cannot_be_written_is_a_row(here, monkeypatch):
    store = here[3]
    def full(*a, **k):
        raise OSError(30, "Read-only file system", str(store.root))
    monkeypatch.setattr(Store, "put", full)
    with threads() as client:
        out = spread(here, client)
    assert all("Read-only file system" in r for r in out.values())
    monkeypatch.undo()
    assert all(isinstance(r, dict) for r in done(here).values()), "the next start goes on"


def test_a_scheduler_that_goes_away_is_a_row(here, monkeypatch):
    real, them = compare.carry_out, []
    def closing(t, *args, **kw):
        "Cancel everything that waits once the first stage is done"
        r = real(t, *args, **kw)
        them[0].cancel([f for _, f in futures.values()], force=True)
        return r
    futures, submit = {}, cluster.submit
    monkeypatch.setattr(cluster, "submit", lambda *a: futures.update(submit(*a)) or futures)
    monkeypatch.setattr(cluster, "carry_out", closing)
    with threads() as client:
        them.append(client)
        failed = sheets._spread(here[2], here[0], here[3], "cpu", client, lambda *a: None)
    assert failed and all(why for why in failed.values())
    monkeypatch.undo()
    assert all(isinstance(r, dict) for r in done(here).values()), "the next start goes on"


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "127.0.0.1:9", "nonsense://x"])
def test_a_scheduler_that_is_not_there_is_a_sentence(address):
    with pytest.raises(BadInput, match=f"--workers {address}: no scheduler answers there"), \
            reproduce.client(address):
        pass
