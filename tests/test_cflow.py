"CFLOW-AD: its parts against closed forms and anomalib's numbers, its stages as a system."
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.special import expit
from scipy.stats import norm
from torch.nn import functional as nnf

from tocoad.data.errors import BadInput
from tocoad.data.load import load
from tocoad.method.guard import Diverged
from tocoad.method.pretrain import stream
from tocoad.systems import cflow
from tocoad.systems.maps import extractor, layer_maps
from tocoad.systems.system import SYSTEMS, departures

REFERENCE = Path(__file__).parent / "reference" / "cflow.safetensors"
SHAPES = (8, 8, 8), (7, 4, 4), (6, 2, 2) # of layers 2 to 4


def settings(**changes):
    "What the stages are given: small, and quick"
    small = dict(profile="test", backbone="tf_efficientnet_lite0", precision="fp32", resize=64, size=64)
    return cflow.Settings(**small | dict(epochs=2, batch=4, blocks=2, condition=8, fibre=64, angle=0.) | changes)


@pytest.fixture(scope="module")
def washer():
    "Few small images"
    data = load(None, "mini", "washer", size=64)
    return replace(data, train=data.train[:10], test=data.test[::4])


@pytest.fixture(scope="module")
def fitted(washer):
    return cflow.fit(settings(), washer, [], {}, "cpu", False)


def scored(c, data, fitted): return cflow.scores(c, data, [fitted], {}, "cpu", False)[1]
def same(a, b): return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def maps(n=3, s=0):
    g = torch.Generator().manual_seed(s)
    return [torch.randn(n, *shape, generator=g) for shape in SHAPES]


def freia_to_ours(flow, stored):
    "Weights of a flow of anomalib's, by the names of FrEIA's blocks, put into ours"
    state = {}
    for k in range(len(flow)):
        part = {n.partition(f"{k}.")[2]: v for n, v in stored.items() if n.startswith(f"{k}.")}
        state |= {f"{k}.{n}": v for n, v in part.items() if n.startswith("subnet")}
        state |= {f"{k}.g": part["global_scale"].flatten(), f"{k}.b": part["global_offset"].flatten(),
                  f"{k}.mix": part["w_perm"]}
    flow.load_state_dict(state)
    return flow


def test_the_numbers_are_anomalibs():
    "tests/test_anomalib_cflow.py holds the same tensors against anomalib itself"
    r, c, found = load_file(REFERENCE), settings(), []
    for k, shape in enumerate(SHAPES):
        stored = {n.partition(f"{k}.")[2]: v for n, v in r.items() if n.startswith(f"{k}.")}
        flow = freia_to_ours(cflow.flow_for(shape[0], c), stored)
        x, code = cflow.places(stored["x"], c.condition)
        torch.testing.assert_close(code[:len(code) // len(stored["x"])], stored["code"], rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            log_p = cflow.per_channel(flow, x, code)
        torch.testing.assert_close(log_p, stored["log_p"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(cflow.loss_of(log_p), stored["loss"], rtol=1e-4, atol=1e-4)
        found.append(log_p.view(-1, *shape[1:]))
    M = cflow.anomaly_map([p - p.max() for p in found], 32) # the batch's maximum, as there
    torch.testing.assert_close(M - M.min(), r["map"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("h, w, D", [(3, 5, 8), (7, 2, 128), (1, 1, 4)])
def test_the_code_of_a_place(h, w, D):
    code = cflow.position_code(h, w, D).double().numpy()
    assert code.shape == (D, h, w)
    for y, x in np.ndindex(h, w):
        for first, v in ((0, x), (D // 2, y)):
            for k in range(D // 4):
                angle = v / 10000**(4 * k / D)
                pair = code[first + 2 * k, y, x], code[first + 2 * k + 1, y, x]
                assert pair == pytest.approx((math.sin(angle), math.cos(angle)), abs=1e-5)


def test_places_are_rows():
    m = torch.rand(3, 5, 4, 2)
    x, code = cflow.places(m, 12)
    told = cflow.position_code(4, 2, 12)
    for n, (b, i, j) in enumerate(np.ndindex(3, 4, 2)):
        assert torch.equal(x[n], m[b, :, i, j]) and torch.equal(code[n], told[:, i, j])


def test_the_loss_is_that_of_a_sigmoid():
    with torch.no_grad():
        flow, c = cflow.flow_for(6, settings()), torch.randn(20, 8)
        x = torch.randn(20, 6)
        z, stretch = flow(x, c)
        log_p = (norm.logpdf(z.double().numpy()).sum(1) + stretch.numpy()) / 6
        found = cflow.per_channel(flow, x, c)
    np.testing.assert_allclose(found, log_p, rtol=1e-5, atol=1e-5)
    loss = cflow.loss_of(found).item()
    assert loss == pytest.approx(-np.log(expit(log_p)).mean(), rel=1e-5)
    assert math.isfinite(cflow.loss_of(torch.tensor([-1e6])).item())


def test_the_rate_rises_and_falls():
    rates = np.array([cflow.rate(t) for t in np.arange(0, 1, 1 / 200)]) # of 200 epochs, at their beginning
    assert rates[0] == pytest.approx(.1) and (np.diff(rates[:16]) > 0).all() and (np.diff(rates[16:]) <= 1e-12).all()
    assert len(set(rates[16:].round(9))) == 23 # a value a meta epoch
    for meta in range(2, 25):
        assert rates[8 * meta] == pytest.approx(.001 + .999 * (1 + math.cos(math.pi * meta / 25)) / 2)


def test_fibres_are_whole_and_no_place_comes_twice():
    seen = []
    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = cflow.flow_for(4, settings())
        def forward(self, x, code):
            seen.append(x[:, 0].tolist())
            return self.flow(x, code)
    m, spy = torch.arange(4 * 4 * 50.).view(1, 200, 4).mT.reshape(1, 4, 10, 20) / 100, Spy()
    cflow.steps(spy, m, torch.optim.Adam(spy.parameters()), settings(), torch.Generator().manual_seed(0))
    assert [len(v) for v in seen] == [64] * 3
    drawn = sum(seen, [])
    assert len(set(drawn)) == 192 and drawn != sorted(drawn)


def test_an_incomplete_batch_is_left_out_but_for_the_only_one():
    def looked(n, batch):
        sizes = []
        def look(idx):
            sizes.append(len(idx))
            return [m[:len(idx)] for m in maps(batch)]
        c = settings(batch=batch, epochs=1)
        cflow.train(cflow.flows_for([s[0] for s in SHAPES], c), look, n, c, torch.Generator(), False)
        return sizes
    assert looked(10, 4) == [4, 4] and looked(8, 4) == [4, 4] and looked(3, 4) == [3]


def test_levels_learn_by_themselves():
    "A step of one layer's flow leaves the others as they are"
    c = settings()
    flows = cflow.flows_for([s[0] for s in SHAPES], c)
    adam, before = torch.optim.Adam(flows.parameters(), fused=True), [f[0].g.clone() for f in flows]
    for m, flow in zip(maps(4), flows, strict=True):
        cflow.steps(flow, m, adam, c, torch.Generator())
    moved = [f[0].g.clone() for f in flows]
    cflow.steps(flows[1], maps(4)[1], adam, c, torch.Generator())
    assert all(not torch.equal(a, b) for a, b in zip(before, moved, strict=True))
    assert [torch.equal(m, f[0].g) for m, f in zip(moved, flows, strict=True)] == [True, False, True]


def test_turned_images_are_looked_at_anew(washer):
    F, images, idx = extractor(settings()), washer.train.images, torch.tensor([3, 5])
    plain = layer_maps(F, images[idx], settings(), (2, 3, 4))
    for angle, equal in ((0., True), (5., False)):
        look = cflow.looks(F, images, settings(angle=angle), stream(0, "turns"))
        one, two = look(idx), look(idx)
        assert all(torch.equal(a, b) == equal for a, b in zip(one, two, strict=True))
        assert all(torch.allclose(a, p, atol=1e-4) == equal for a, p in zip(one, plain, strict=True))
    small = cflow.looks(F, images, settings(angle=1e-9), stream(0, "turns"))(idx) # hardly a turn
    assert all(torch.allclose(a, p, atol=1e-4) for a, p in zip(small, plain, strict=True))


def test_the_map_is_what_likelihoods_lack():
    relative = [-4 * torch.rand(2, n, n) for n in (8, 4, 2)]
    corners = dict(size=(32, 32), mode="bilinear", align_corners=True)
    whole = 3 - sum(nnf.interpolate(r.exp()[:, None], **corners)[:, 0] for r in relative)
    torch.testing.assert_close(cflow.anomaly_map(relative, 32), whole)


def test_training_makes_places_likelier_where_nothing_is_wrong():
    data = load(None, "mini", "brick", size=64)
    data = replace(data, train=data.train[:16], test=data.test[::2])
    c = settings(epochs=30, lr=3e-3)
    _, M = cflow.maps_of(scored(c, data, cflow.fit(c, data, [], {}, "cpu", False)), c)
    truth = data.test.masks.numpy()
    assert M[truth].mean() > M[~truth].mean() + .05


def test_the_top_is_the_training_sets(washer, fitted):
    known = scored(settings(), replace(washer, test=washer.train), fitted)
    assert [m.max() for m in known.values()] == pytest.approx([0, 0, 0], abs=1e-5)


@pytest.mark.parametrize("change", [dict(lr=1e-3), dict(batch=2), dict(clamp=.1), dict(condition=4), dict(fibre=16),
                                    dict(blocks=1), dict(epochs=1), dict(angle=5.)], ids=str)
def test_every_setting_reaches_the_training(washer, fitted, change):
    changed = cflow.fit(settings(**change), washer, [], {}, "cpu", False)
    assert changed[1].keys() != fitted[1].keys() or any(
        a.shape != fitted[1][k].shape or not np.array_equal(a, fitted[1][k]) for k, a in changed[1].items())


def test_a_loss_that_is_no_number_stops_with_a_sentence(washer):
    with pytest.raises(Diverged, match="try a smaller rate"):
        cflow.fit(settings(lr=1e30), washer, [], {}, "cpu", False)


def test_settings_are_the_papers_and_refuse_what_cannot_work():
    paper = SYSTEMS["cflow"].of(cflow.Settings(), "cflow")
    assert departures(paper) == "" and (paper.epochs, paper.lr, paper.fibre, paper.angle) == (200, 2e-4, 256, 5)
    assert "angle 0.0 (5.0)" in departures(SYSTEMS["cflow"].of(cflow.Settings(profile="laptop"), "cflow"))
    for bad in (dict(epochs=0), dict(condition=6), dict(fibre=0), dict(angle=-1.), dict(clamp=0.)):
        with pytest.raises(BadInput, match=next(iter(bad))):
            cflow.Settings(**bad)
