"Memory that runs out, on a GPU or a CPU: fewer rows at a time where that helps, one sentence with settings where not"
import pytest
import torch
import toys

from tocoad import cli
from tocoad.data.errors import BadInput
from tocoad.data.load import load
from tocoad.run import cluster, compare
from tocoad.run.config import config
from tocoad.run.store import Store
from tocoad.systems import tocoad as room

TINY = dict(size=32, resize=32, width=32, batch=8, epochs1=1, epochs2=1)
CPU = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
ERRORS = [MemoryError(), RuntimeError(CPU), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")]


def short(error, calls=None):
    "A function that runs out of memory; calls: a list that counts"
    def run(*a, **k):
        (calls if calls is not None else []).append(1)
        raise error
    return run


@pytest.fixture(scope="module")
def cog(tmp_path_factory):
    return load(toys.toy(tmp_path_factory.mktemp("set")), "own", "cog", size=32)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("place, says", [
    ("stage1", "memory ran out; lower batch=8 or size=32 with --set"),
    ("stage2", "memory ran out; lower batch=8 or size=32 or width=32 with --set"),
    ("coreset", "memory ran out; lower size=32 or coreset=0.1 with --set"),
    ("evaluate", "memory ran out; end other programs, or take another device.")])
def test_a_stage_that_cannot_be_halved_names_its_settings(error, place, says, cog, monkeypatch):
    monkeypatch.setattr(room, place, short(error))
    cfg = config("smoke", dataset="own", category="cog", **TINY)
    with pytest.raises(BadInput, match="^" + says.replace("(", r"\(")):
        compare.compare(cfg, methods=("two_stage",), data=cog, progress=False, device="cpu")


def test_the_rest_of_the_grid_goes_on(cog, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(room, "stage1", short(RuntimeError(CPU), calls))
    cfg = config("smoke", dataset="own", category="cog", **TINY)
    ends = [compare.tasks(cfg.replace(method=m), cog)["metrics"] for m in ("two_stage", "contrastive", "frozen")]
    out = cluster.carry_out_all(ends, cog, Store(tmp_path / "store"))
    assert out[ends[0]].startswith("stage1: memory ran out; lower batch=8") and len(calls) == 1
    assert [type(out[t]) for t in ends[1:]] == [dict, dict]
    monkeypatch.undo()
    again = cluster.carry_out_all(ends, cog, Store(tmp_path / "store"))
    assert all(isinstance(r, dict) for r in again.values())


@pytest.mark.parametrize("place", ["tocoad.data.load._decode", "tocoad.systems.tocoad.coreset"])
def test_the_command_ends_in_a_sentence(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TOCOAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(place, short(MemoryError()))
    words = ["run", "--root", toys.toy(tmp_path / "set"), "--category", "cog", "--profile", "smoke", "--quiet", "--out",
             tmp_path / "out", "--store", tmp_path / "store", "--set", "size=32", "resize=32"]
    assert cli.main([*map(str, words)]) == 1
    said = capsys.readouterr().err
    assert "memory ran out; lower" in said and "=32 " in said and said.count("\n") == 1


def test_own_parts_end_in_a_sentence_too(tmp_path, monkeypatch, capsys):
    for k in range(6):
        toys.save(tmp_path / f"good/{k}.png", toys.noise(k))
    monkeypatch.setattr("tocoad.systems.tocoad.coreset", short(RuntimeError(CPU)))
    words = ["fit", "--good", tmp_path / "good", "--model", tmp_path / "m.safetensors", "--quiet", "--set", "size=32"]
    assert cli.main([*map(str, words)]) == 1
    assert capsys.readouterr().err.startswith("tocoad: memory ran out; lower batch, size or coreset with --set")


def test_other_errors_stay_as_they_are(cog, monkeypatch):
    monkeypatch.setattr(room, "coreset", short(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        compare.compare(config("smoke", dataset="own", category="cog", **TINY), methods=("frozen",), data=cog,
                        progress=False, device="cpu")
