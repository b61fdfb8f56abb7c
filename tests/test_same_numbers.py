"""An earlier commit and this tree compute the same, to the last bit, on this machine with one thread.

`pytest -m slow -n 0 tests/test_same_numbers.py` compares with 2adeeba, `--base COMMIT` with another. Keys, titles and
drawings may differ. A record is known by what it was made from: its stage, the settings that this stage read, its
category, its seed, and the records it needed, as far as both trees name them alike; RENAMED says what they do not.
"""
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).parents[1]
MEASURED = {"seconds"} # a value of this name is a time
BETWEEN = {"redraws"} # stages that one tree has between two others
RENAMED = {} # names of stages, settings and values that changed: the earlier -> today's
COMMAND = "import sys; from tocoad.cli import main; sys.exit(main(sys.argv[1:]))"
WORDS = ("reproduce table5 table7 table9 figure7 --profile smoke --categories washer grass --device cpu --quiet"
         " --set curve=1").split()
EVERY = {"stage1", "stage2", "contrastive", "memory", "scores", "metrics", "curve", "difference", "gallery"}
VARIANTS = {"as it is": [], "new statistics": ["bn2=train"]}

@pytest.fixture(scope="session")
def base(request, shared):
    "A tree of the earlier commit"
    commit, git = request.config.getoption("--base"), ["git", "-C", ROOT]
    if subprocess.run([*git, "cat-file", "-e", f"{commit}^{{commit}}"], capture_output=True).returncode:
        pytest.skip(f"commit {commit} is not in this clone: fetch it, or name another with --base")

    def check_out(folder):
        files = subprocess.run([*git, "archive", commit], check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=files, check=True)
    return shared(f"base-{commit}", check_out)


def computed(tree, top, settings):
    "The records of the command, run by the package of a tree"
    env = os.environ | dict(PYTHONPATH=str(tree), TOCOAD_CACHE=str(top / "cache"), PYTHONDONTWRITEBYTECODE="1")
    words = [*WORDS, *settings, "--store", top / "store", "--out", top / "out"]
    top.mkdir()
    run = subprocess.run([sys.executable, "-c", COMMAND, *words], env=env, cwd=top, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    found = {}
    for p in (top / "store").glob("*/*.json"):
        r = json.loads(p.read_text(encoding="utf-8"))
        if "values" in r and "made_from" in r:
            found[r["key"]] = r | dict(tensors=p.with_suffix(".safetensors"))
    return found


def today(x):
    "A record's parts under today's names, without times"
    if isinstance(x, dict):
        return {RENAMED.get(k, k): today(v) for k, v in x.items() if k not in MEASURED}
    return [today(v) for v in x] if isinstance(x, list) else x


def by_origin(records, names):
    "Origin -> records; names: stage -> settings that count"
    @cache
    def origin(key):
        r = records[key]
        made, stage = r["made_from"], RENAMED.get(r["stage"], r["stage"])
        if stage in BETWEEN:
            return origin(made["needs"][0])
        read = {k: v for k, v in today(made["fields"] | made.get("extra", {})).items() if k in names[stage]}
        before = sorted(origin(k) for k in made["needs"])
        return json.dumps([stage, r["dataset"], r["category"], r["seed"], read, before], sort_keys=True)
    out = defaultdict(list)
    for key in records:
        out[origin(key)].append(records[key])
    return out


def settings_of(records):
    "Stage -> names of the settings it was given"
    out = defaultdict(set)
    for r in records.values():
        made = r["made_from"]
        out[RENAMED.get(r["stage"], r["stage"])] |= set(today(made["fields"] | made.get("extra", {})))
    return out


def tensors(r):
    "Name -> kind, shape and bytes of a record's tensors"
    arrays = load_file(r["tensors"]) if r["tensors"].exists() else {}
    return {RENAMED.get(k, k): (v.dtype.str, v.shape, np.ascontiguousarray(v).tobytes()) for k, v in arrays.items()}


def differences(old, new):
    "What an earlier record holds and today's does not hold equally"
    a, b = today(old["values"]), today(new["values"])
    lost = [f"value {k}" for k in a if k not in b or a[k] != b[k]]
    a, b = tensors(old), tensors(new)
    return lost + [f"tensor {k}" for k in a if a[k] != b.get(k)]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.replace(" ", "-"))
def test_every_stage_gives_the_same_to_the_last_bit(base, tmp_path, capsys, variant):
    old, new = (computed(t, tmp_path / n, VARIANTS[variant]) for t, n in ((base, "old"), (ROOT, "new")))
    a, b = settings_of(old), settings_of(new)
    names = {stage: a[stage] & b[stage] for stage in {*a, *b}}
    there, count, bad = by_origin(new, names), Counter(), []
    for origin, records in by_origin(old, names).items():
        for r in records:
            found = [differences(r, x) for x in there.get(origin, ())]
            stage = RENAMED.get(r["stage"], r["stage"])
            count[stage] += 1
            count["values"] += len(r["values"])
            count["tensors"] += len(tensors(r))
            if [] not in found:
                what = ", ".join(min(found, key=len)[:4]) if found else "no such record"
                bad.append(f"{stage} of {r['category']}, {r['method']}, seed {r['seed']}: {what}")
    with capsys.disabled():
        print(f"\n{variant}: {len(old) - len(bad)} of {len(old)} records equal {dict(count)}")
    assert not bad, "\n".join(bad)
    assert {RENAMED.get(s, s) for s in EVERY} <= set(count)


def test_a_changed_bit_is_found(tmp_path):
    "In a value, in a tensor, in its shape; not in a time"
    def record(name, value, tensor, seconds):
        save_file(dict(x=tensor), tmp_path / name)
        return dict(values=dict(auroc=value, log=[dict(loss=1., seconds=seconds)]), tensors=tmp_path / name)
    x = np.ones((2, 3), np.float32)
    first = record("first", .5, x, 1.)
    assert differences(first, record("same", .5, x, 2.)) == []
    assert differences(first, record("value", np.nextafter(.5, 1), x, 1.)) == ["value auroc"]
    assert differences(first, record("bit", .5, np.nextafter(x, 2), 1.)) == ["tensor x"]
    assert differences(first, record("shape", .5, x.T, 1.)) == ["tensor x"]
