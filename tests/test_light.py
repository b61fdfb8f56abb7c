"""The scripts of the first minutes on a GPU, on a CPU: what travels is the same, what is found is kept."""
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tocoad.data.load import load
from tocoad.data.trees import write_layout

LIGHT = Path(__file__).parents[1] / "nbs" / "bench" / "light"


@pytest.fixture(scope="module")
def light():
    "The scripts as modules"
    sys.path.insert(0, str(LIGHT))
    import epochs
    import prepare
    yield {"epochs": epochs, "prepare": prepare}
    sys.path.remove(str(LIGHT))


@pytest.fixture(scope="module")
def data(tmp_path_factory, light):
    "Toothbrushes, drawn, as they arrive"
    there, here = (tmp_path_factory.mktemp(n) for n in ("there", "here"))
    write_layout(here / "own", "mvtec", {"toothbrush": "washer"}, 300, (8, 3, 1))
    light["prepare"].pack(here / "own" / "toothbrush", "toothbrush/toothbrush", here / "toothbrush.tar")
    with tarfile.open(here / "toothbrush.tar") as t:
        t.extractall(there / "data", filter="data")
    one, other = (load(f, None, "toothbrush", 256) for f in (here / "own", there / "data" / "toothbrush"))
    assert one.fingerprint == other.fingerprint and len(one.train) == 8 and one.test.counts() == other.test.counts()
    return there / "data"


def carried_out(script, *words):
    "A script run as a command"
    command = [sys.executable, LIGHT / f"{script}.py", *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_the_most_wanted_runs_come_first(light):
    jobs = light["epochs"].jobs(dict(toothbrush=48, bottle=209), 2, ["literal", "paper"], [])
    assert len(jobs) == len({(p, c, s, r.name) for p, c, s, r in jobs}) == 4 * (10 + 6)
    place = {(p, c, s, r.name): i for i, (p, c, s, r) in enumerate(jobs)}
    first = [i for (_, _, s, n), i in place.items() if s == 0 and n in ("frozen F", "Generator Perlin")]
    assert max(first) < min(i for (_, _, s, _), i in place.items() if s == 1)
    assert place["paper", "toothbrush", 1, "Generator NSA"] < place["paper", "bottle", 0, "Generator NSA"]


def test_runs_end_in_time_and_leave_what_they_found(data, tmp_path):
    settings = "backbone=tf_efficientnet_lite0 patches=mean dims=none epochs1=1 epochs2=1 size=64 resize=64 width=64"
    words = "--device cpu --workers 1 --seeds 1 --profiles paper --seconds 120 --set".split() + settings.split()
    textures = data / "textures"
    textures.mkdir()
    for f in (data / "toothbrush" / "toothbrush" / "train" / "good").iterdir():
        (textures / f.name).write_bytes(f.read_bytes())
    run = carried_out("epochs", data, tmp_path / "out", *words)
    assert run.returncode == 0 and "failed" not in run.stdout, run.stdout + run.stderr
    with tarfile.open(tmp_path / "out" / "store-0.tar") as t:
        t.extractall(tmp_path / "store", filter="data")
    records = [json.loads(f.read_text()) for f in (tmp_path / "store" / "metrics").iterdir()]
    assert f"{len(records)} runs in" in run.stdout and "frozen F" in run.stdout and records
    assert {r["profile"] for r in records} == {"paper"} and {r["config"]["epochs2"] for r in records} == {1}
    assert all(0 <= r["values"]["image_auroc"] <= 1 for r in records)
    assert len(list((tmp_path / "store" / "scores").glob("*.safetensors"))) == len(records)


def test_a_change_is_measured_and_kept(tmp_path):
    words = ["--device", "cpu", "--profile", "smoke", "--stage", "stage1", "--images", "4", "--epochs", "1"]
    run = carried_out("change", tmp_path, *words, "--before", "size=64", "--after", "size=64", "batch=2")
    assert run.returncode == 0 and "times as fast" in run.stdout, run.stderr
    assert [r["when"] for r in json.loads((tmp_path / "change.json").read_text())["results"]] == ["before", "after"]
