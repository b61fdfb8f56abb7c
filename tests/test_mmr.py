"""MMR: which weights move, what is hidden, where weights come from, its stages as a system."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from tocoad.data.errors import BadInput
from tocoad.data.load import load
from tocoad.method.guard import Diverged
from tocoad.run.compare import compare
from tocoad.run.config import config
from tocoad.run.keys import chain
from tocoad.run.store import Store
from tocoad.systems import mmr
from tocoad.systems.maps import extractor
from tocoad.systems.system import SYSTEMS, departures


def settings(**changes):
    "What the stages are given: small and quick"
    small = dict(profile="test", backbone="tf_efficientnet_lite0", precision="fp32", resize=64, size=64, vit="random")
    return mmr.Settings(**small | dict(width=1 / 12, depth=2, epochs=1, batch=4) | changes)


@pytest.fixture(scope="module")
def washer():
    "Few small images"
    data = load(None, "mini", "washer", size=64)
    return replace(data, train=data.train[:8], test=data.test[::7])


@pytest.fixture(scope="module")
def fitted(washer):
    return mmr.fit(settings(), washer, [], {}, "cpu", False)


def scored(c, data, fitted):
    return mmr.scores(c, data, [fitted], {}, "cpu", False)[1]


def same(a, b):
    return all(np.array_equal(a[k], b[k]) for k in a)


def test_all_of_the_student_moves_but_the_places_and_nothing_of_the_teacher(washer):
    c = settings()
    F = extractor(c)
    S, teacher = mmr.student(c, F), {k: v.clone() for k, v in F.state_dict().items()}
    start = {k: v.clone() for k, v in S.state_dict().items()}
    mmr.train(S, F, washer.train.images, epochs=1, batch=4, size=64, progress=False)
    moved = {k for k, v in S.state_dict().items() if not torch.equal(v, start[k])}
    assert moved == start.keys() - {"vit.pos_embed"}
    assert all(torch.equal(v, teacher[k]) for k, v in F.state_dict().items()) and not F.training and not S.training


def test_the_hidden_vector_stands_where_tokens_are_hidden_and_nowhere_else():
    c = settings()
    S, x = mmr.student(c, extractor(c)), torch.rand(2, 3, 64, 64)
    for masked, used in ((0., False), (.4, True)):
        S.zero_grad()
        sum(m.pow(3).sum() for m in S(x, masked)).backward()
        assert bool(S.hidden.grad is not None and S.hidden.grad.abs().sum() > 0) == used
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(S(x), S(x), strict=True)), "nothing is drawn at test time"
        assert not torch.equal(S(x, .4)[0], S(x, .4)[0])


def test_the_finest_level_sees_the_whole_image():
    "Attention, not the pyramid's filters, carries what lies far away"
    c = settings(size=128, resize=128)
    S, x = mmr.student(c, extractor(c)).eval(), torch.rand(1, 3, 128, 128)
    far = x.clone()
    far[..., :16, :16] = 0
    with torch.no_grad():
        assert (S(x)[0] - S(far)[0])[..., -4:, -4:].abs().min() > 0


def test_views_are_crops_of_the_image_at_its_size_again():
    "A ramp stays a ramp, of at least sqrt(0.7 * 3 / 4) of its rise, half of the time mirrored"
    ramp = torch.linspace(0, 1, 64).expand(400, 3, 64, 64)
    torch.manual_seed(0)
    v = mmr.views(48)(ramp)
    rise = v[:, 0, 24, -4] - v[:, 0, 24, 3]
    assert v.shape == (400, 3, 48, 48) and .42 < (rise < 0).float().mean() < .58
    full = 41 / 48 # of the rise between the two columns
    assert rise.abs().min() > full * (.7 * 3 / 4)**.5 - .02 and rise.abs().max() < full + .03
    assert v.min() >= 0 and v.max() <= 1


def test_seeds(washer, fitted):
    before = torch.get_rng_state()
    again = mmr.fit(settings(), washer, [], {}, "cpu", False)
    assert torch.equal(before, torch.get_rng_state()) and same(again[1], fitted[1])
    assert not same(mmr.fit(settings(seed=1), washer, [], {}, "cpu", False)[1], fitted[1])


def test_a_score_depends_on_no_other_test_image(washer, fitted):
    every = scored(settings(), washer, fitted)
    alone = scored(settings(), replace(washer, test=washer.test[1:2]), fitted)
    assert all(np.allclose(alone[k][0], every[k][1], atol=1e-6) for k in every)
    assert {k: v.shape[1:] for k, v in every.items()} == dict(layer1=(16, 16), layer2=(8, 8), layer3=(4, 4))


def test_training_that_breaks_is_one_sentence(washer):
    with pytest.raises(Diverged):
        mmr.fit(settings(lr=1e30, epochs=3), washer, [], {}, "cpu", False)


def donor(path, seed):
    "A file as a masked auto-encoder's authors write it"
    torch.manual_seed(seed)
    torch.save(dict(model=mmr.MMR((24, 40, 112), 64, 1 / 12, 2).vit.state_dict()), path)
    return str(path)


def test_weights_from_a_file_are_where_training_starts_and_count_in_the_key(tmp_path, washer):
    a, b = donor(tmp_path / "a.pth", 0), donor(tmp_path / "b.pth", 1)
    still = lambda vit: mmr.fit(settings(vit=vit, lr=0.), washer, [], {}, "cpu", False)
    values, arrays = still(a)
    state = torch.load(a, weights_only=True)["model"]
    assert all(np.array_equal(arrays[f"vit.{k}"], v) for k, v in state.items())
    assert len(values["vit"]) == 16 and values["vit"] != still(b)[0]["vit"]
    key = lambda vit: chain(settings(vit=vit), "d", "w")["mmr"].key
    first = key(a)
    assert len({first, key(b), key("random"), key("mae")}) == 4
    (tmp_path / "copy.pth").write_bytes((tmp_path / "a.pth").read_bytes())
    assert key(str(tmp_path / "copy.pth")) == first
    donor(tmp_path / "a.pth", 2)
    assert key(a) != first, "another file under the same name"


def test_the_file_in_its_usual_place_counts_in_the_key(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    key = lambda: chain(settings(vit="mae"), "d", "w")["mmr"].key
    absent, path = key(), tmp_path / "checkpoints" / mmr.FILE
    path.parent.mkdir()
    donor(path, 0)
    first = key()
    donor(path, 1)
    assert len({absent, first, key()}) == 3 and departures(settings(vit="mae")).count("vit") == 0


@pytest.mark.parametrize("content,says", [(None, "there are none at"), (b"no weights", "does not fit"),
                                          ("wide", "does not fit MMR's transformer of 64 numbers")])
def test_weights_that_are_not_there_or_do_not_fit(tmp_path, washer, content, says, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / mmr.FILE
    path.parent.mkdir()
    if content == "wide":
        torch.save(mmr.MMR((24, 40, 112), 64, 1 / 6, 2).vit.state_dict(), path)
    elif content:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=says):
        mmr.fit(settings(vit="mae"), washer, [], {}, "cpu", False)


def test_as_a_system(washer, tmp_path):
    c = config("smoke").replace(category="washer", size=64, resize=64)
    small = SYSTEMS["mmr"].of(c, "mmr", epochs=1, depth=1, batch=4)
    told = "vit random (mae), width 0.25 (1.0), depth 4 (12), epochs 4 (200), batch 8 (16)"
    assert departures(SYSTEMS["mmr"].of(c, "mmr")) == told
    found = compare(c, [0], {"mmr": small}, washer, store=Store(tmp_path), progress=False)
    assert found.image["mmr"][0].shape == (len(washer.test),)
