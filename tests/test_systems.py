"What every system promises, whoever wrote it: a new entry of `SYSTEMS` is tested here without a line"
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tocoad.data.load import load
from tocoad.run.config import config
from tocoad.run.keys import chain, scored
from tocoad.systems.settings import kinds
from tocoad.systems.system import SYSTEMS, find

QUICK = dict(epochs=2, steps1=2, steps2=2, batch=4, blocks=2, condition=8, fibre=64, angle=0., width=1 / 16, lr=1e-3,
             channels=20, gallery=3, coreset=.2, textures="embedded") # of those that a system has
OTHERS = [k for k in SYSTEMS if k not in ("frozen", "tocoad")]
DRAWS = set(OTHERS) - {"spade"} # SPADE has nothing to draw


@pytest.fixture(scope="module")
def washer():
    "Few small images"
    data = load(None, "mini", "washer", size=64)
    return replace(data, train=data.train[:10], test=data.test[::4])


def made(key, data, first=None, **changes):
    "The settings, what each stage gave, image scores and maps; a stage is given what its entry names, and no more"
    s, base = SYSTEMS[key], config("smoke", resize=64, size=64, seed=changes.pop("seed", 0))
    c = s.of(base, key, **{k: v for k, v in QUICK.items() if k in kinds(s.kind)} | changes)
    got, ts = dict(first or {}), chain(c, "images", "weights", parts={})
    for name in (n for n in s.stages_of(c) if n not in got):
        needs = [got[t.stage] for t in ts[name].needs]
        got[name] = find(ts[name].does.function)(ts[name].given, data, needs, {}, "cpu", False)
    end = scored(ts)
    arrays = got[end.stage][1]
    if end.does.reader:
        given = SimpleNamespace(**{k: getattr(c, k) for k in end.does.reads})
        return got, *find(end.does.reader)(arrays, given)
    return got, arrays["image"], arrays["maps"]


@pytest.fixture(scope="module", params=OTHERS)
def run(request, washer):
    return request.param, *made(request.param, washer)


def test_a_score_and_a_map_of_every_image(run, washer):
    _, _, image, maps = run
    assert image.shape == (len(washer.test),) and maps.shape == (len(washer.test), 64, 64)
    assert image.dtype == maps.dtype == np.float32 and np.isfinite(image).all() and np.isfinite(maps).all()
    assert np.ptp(maps) > 0


def test_a_score_does_not_depend_on_the_other_test_images(run, washer):
    key, got, image, maps = run
    before = dict(list(got.items())[:-1]) # what was fitted
    for i in ([0], [len(washer.test) - 1, 1]):
        _, alone, drawn = made(key, replace(washer, test=washer.test[i]), before)
        np.testing.assert_allclose(alone, image[i], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(drawn, maps[i], rtol=1e-3, atol=1e-3)


def test_a_seed_gives_the_same_bits_and_disturbs_nobody(run, washer):
    key, got, image, maps = run
    state = torch.get_rng_state()
    _, again, drawn = made(key, washer)
    assert np.array_equal(again, image) and np.array_equal(drawn, maps)
    assert torch.equal(state, torch.get_rng_state())


def test_another_seed_gives_another_result_where_something_is_drawn(run, washer):
    key, _, _, maps = run
    _, _, other = made(key, washer, seed=1)
    assert np.array_equal(other, maps) == (key not in DRAWS)
