"""SPR: its score and its restoration against closed forms, its averaged weights, its stages as a system."""
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.ndimage import uniform_filter
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tocoad.data.errors import BadInput
from tocoad.data.load import load
from tocoad.method.guard import Diverged
from tocoad.method.pretrain import stream
from tocoad.systems import spr
from tocoad.systems.system import SYSTEMS, departures


def settings(**changes):
    "What the stages are given: narrow, small, and quick"
    small = dict(profile="test", precision="fp32", resize=64, size=64, width=1 / 16, shrink=2, latest=.05)
    return spr.Settings(**small | dict(epochs=2, batch=4, lr=1e-3) | changes)


@pytest.fixture(scope="module")
def washer():
    "Few small images"
    data = load(None, "mini", "washer", size=64)
    return replace(data, train=data.train[:8], test=data.test[::7])


@pytest.fixture(scope="module")
def fitted(washer):
    return spr.fit(settings(), washer, [], {}, "cpu", False)


def scored(c, data, fitted):
    arrays = spr.scores(c, data, [fitted], {}, "cpu", False)[1]
    return spr.maps_of(arrays, c)


def same(a, b):
    return all(np.array_equal(a[k], b[k]) for k in a)


def test_full_size_counts_and_shapes_without_room_for_weights():
    with torch.device("meta"), FlopCounterMode(display=False) as flops:
        net = spr.UNet()
        out = net(torch.empty(1, 3, 192, 192), torch.empty(1))
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(17.8, abs=.05)
    assert flops.get_total_flops() / 1e9 == pytest.approx(45, abs=.1)
    assert out.shape == (1, 3, 192, 192)
    assert [u.body[3].out_channels for u in net.up] == [256, 128, 64, 64]
    assert {m.num_groups for m in net.modules() if isinstance(m, nn.GroupNorm)} == {32}


def test_every_weight_of_the_full_network_has_a_gradient():
    net = spr.make(SimpleNamespace(width=1., spread=25., seed=0, compile=False), "cpu")
    x, t = torch.rand(1, 3, 32, 32, generator=stream(0, "x")), torch.tensor([.4])
    spr.loss_of(net, x, t, torch.randn(x.shape, generator=stream(0, "z"))).backward()
    for p in net.parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any()
    assert not net.time.frequencies.requires_grad


@pytest.mark.parametrize("spread", [2., 25., 300.])
def test_the_noise_is_the_integral_of_its_growth(spread):
    for t in (1e-5, 1e-3, .2, 1.):
        want = math.sqrt(quad(lambda u: spread**(2 * u), 0, t)[0])
        assert spr.deviation(torch.tensor(t, dtype=torch.float64), spread).item() == pytest.approx(want, rel=1e-9)
    assert spr.deviation(torch.tensor(1e-5), spread).item() == pytest.approx(math.sqrt(1e-5), rel=1e-3) # in float32 too


def gaussian(mean, cov):
    "The exact score of noisy points of a Gaussian of any covariance, as a net of one pixel's channels"
    def score(x, t):
        noisy = cov + spr.deviation(t)[:, None, None]**2 * torch.eye(len(mean), dtype=x.dtype)
        return -torch.linalg.solve(noisy, (x[..., 0, 0] - mean)[..., None])[..., 0][..., None, None]
    return score


def test_one_step_restores_a_gaussian_to_its_expected_clean_point():
    "The expectation of x given what is seen, by conditioning the joint Gaussian of both"
    draw = stream(0, "gaussian")
    A = torch.randn(3, 3, generator=draw, dtype=torch.float64)
    mean, cov = torch.tensor([.1, -.3, .2], dtype=torch.float64), A @ A.T / 9 + .01 * torch.eye(3)
    x = mean + torch.randn(5, 3, generator=draw, dtype=torch.float64)
    z = torch.randn(2, 4, 3, 1, 1, generator=draw, dtype=torch.float64)
    found = spr.restoration(gaussian(mean, cov), x[..., None, None], (1e-3, .1), z)
    want = 0.
    for t, draws in zip((1e-3, .1), z[..., 0, 0], strict=True):
        s = spr.deviation(torch.tensor(t, dtype=torch.float64)).item()
        for noise in draws:
            seen = x + s * noise
            clean = mean + (seen - mean) @ torch.linalg.inv(cov + s**2 * torch.eye(3)) @ cov
            want = want + (clean - x).square().mean(1) / 8
    torch.testing.assert_close(found[:, 0, 0], want, rtol=1e-6, atol=1e-12)


def test_the_loss_is_least_at_the_score():
    "Its gradient with respect to the score's own slope vanishes but for the draw, and not elsewhere"
    v, t = .09, torch.full((200000,), .1)
    draw = stream(0, "least")
    x, z = (torch.randn(len(t), 1, generator=draw, dtype=torch.float64) for _ in range(2))
    s2 = spr.deviation(t[0].double()).item()**2
    def slope_of(a):
        a = torch.tensor(a, dtype=torch.float64, requires_grad=True)
        spr.loss_of(lambda y, _: a * y, math.sqrt(v) * x, t.double(), z).backward()
        return a.grad.item()
    best = -1 / (v + s2)
    assert abs(slope_of(best)) < .01 * abs(slope_of(1.5 * best)) and slope_of(.5 * best) > 0 > slope_of(1.5 * best)


def test_noise_levels_and_draws_are_averaged():
    net = spr.make(settings(), "cpu").eval()
    x = torch.rand(2, 3, 32, 32, generator=stream(0, "x"))
    z = torch.randn(2, 3, 3, 32, 32, generator=stream(0, "z"))
    with torch.no_grad():
        both = spr.restoration(net, x, (1e-3, .02), z)
        each = [spr.restoration(net, x, (t,), z[k:k + 1, r:r + 1])
                for k, t in enumerate((1e-3, .02)) for r in range(3)]
    torch.testing.assert_close(both, torch.stack(each).mean(0))


def test_averaged_weights_are_kept_and_score(washer, fitted, monkeypatch):
    "The raw ones are other weights, and score otherwise"
    c, raws, means = settings(), [], []
    real = spr.follow
    def watched(mean, net, share):
        real(mean, net, share)
        raws[:], means[:] = [net], [mean]
    monkeypatch.setattr(spr, "follow", watched)
    _, kept = spr.fit(c, washer, [], {}, "cpu", False)
    state = lambda net: {k: v.detach().numpy() for k, v in net.state_dict().items()}
    assert same(kept, state(means[0])) and same(kept, fitted[1])
    trained = {k for k, _ in raws[0].named_parameters()}
    assert not any(np.array_equal(kept[k], state(raws[0])[k]) for k in trained)
    assert not np.array_equal(scored(c, washer, fitted)[0], scored(c, washer, ({}, state(raws[0])))[0])


def test_the_average_is_that_of_all_steps(washer, monkeypatch):
    "Worked out from the raw weights of every step; with nothing kept it is the raw weights"
    c, steps, real = settings(average=.5), [], spr.follow
    def watched(mean, net, share):
        steps.append((net.out.bias.detach().clone(), share))
        real(mean, net, share)
    monkeypatch.setattr(spr, "follow", watched)
    _, state = spr.fit(c, washer, [], {}, "cpu", False)
    want = spr.make(c, "cpu").out.bias.detach()
    for n, (raw, share) in enumerate(steps, 1):
        assert share == min(.5, (1 + n) / (10 + n))
        want = share * want + (1 - share) * raw
    assert len(steps) == 4
    np.testing.assert_allclose(state["out.bias"], want, rtol=1e-5, atol=1e-7)
    _, bare = spr.fit(settings(average=0.), washer, [], {}, "cpu", False)
    np.testing.assert_allclose(bare["out.bias"], steps[-1][0], rtol=1e-6)


def test_the_rate_falls_after_each_third(washer):
    log = spr.fit(settings(epochs=6, width=1 / 64, shrink=4), washer, [], {}, "cpu", False)[0]["log"]
    assert [e["lr"] for e in log] == pytest.approx([1e-3] * 2 + [1e-4] * 2 + [1e-5] * 2)


def test_the_map_is_the_mean_of_a_window():
    way = torch.rand(3, 32, 32, generator=stream(0, "way")).numpy()
    for pool in (1, 5, 31):
        image, maps = spr.maps_of(dict(way=way), SimpleNamespace(size=32, pool=pool))
        want = np.stack([uniform_filter(w.astype(float), pool, mode="constant") for w in way])
        np.testing.assert_allclose(maps, want, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(image, want.max((1, 2)), rtol=1e-4)


def test_the_last_stage_gives_a_score_and_a_map_of_every_image(washer, fitted):
    image, maps = scored(settings(), washer, fitted)
    assert maps.shape == (len(washer.test), 64, 64) and image.shape == (len(washer.test),)
    assert image.dtype == maps.dtype == np.float32 and maps.min() >= 0


def test_training_helps_on_noise_it_has_not_seen(washer):
    c, x = settings(epochs=25, batch=2, lr=3e-3, width=1 / 8), spr.pixels(washer.train.images, settings())
    _, mean = spr.train(spr.make(c, "cpu"), x, c, False)
    seen, t = spr.pixels(washer.test.images, c), torch.full((len(washer.test),), 2e-2)
    z = torch.randn(seen.shape, generator=stream(1, "fresh"))
    with torch.no_grad():
        first, last = (spr.loss_of(net, seen, t, z).item() for net in (spr.make(c, "cpu"), mean))
    assert last < .8 * first and last < .8 * z[0].numel()


@pytest.mark.parametrize("change", [
    dict(lr=1e-2), dict(batch=2), dict(decay=.9), dict(average=0.), dict(spread=9.), dict(latest=1.), dict(shrink=1),
    dict(seed=1)], ids=str)
def test_every_setting_reaches_the_training(washer, fitted, change):
    assert not same(fitted[1], spr.fit(settings(**change), washer, [], {}, "cpu", False)[1])


@pytest.mark.parametrize("change", [dict(times=(1e-2,)), dict(draws=1), dict(pool=5), dict(seed=1)], ids=str)
def test_every_setting_of_the_test_reaches_the_scores(washer, fitted, change):
    assert not np.allclose(scored(settings(), washer, fitted)[0], scored(settings(**change), washer, fitted)[0], 1e-4)


def test_a_loss_that_is_no_number_stops_with_a_sentence(washer):
    with pytest.raises(Diverged, match="try a smaller rate"):
        spr.fit(settings(lr=1e30, epochs=4), washer, [], {}, "cpu", False)


def test_settings_are_the_authors_and_refuse_what_cannot_work():
    paper = SYSTEMS["spr"].of(spr.Settings(), "spr")
    assert departures(paper) == "" and (paper.epochs, paper.lr, paper.batch, paper.draws) == (3000, 1e-4, 16, 3)
    smoke = departures(SYSTEMS["spr"].of(spr.Settings(profile="smoke", size=64), "spr"))
    assert smoke.startswith("width 0.") and "epochs " in smoke and "(3000)" in smoke
    for bad in (dict(shrink=3), dict(pool=20), dict(width=0.), dict(times=(0.,)), dict(times=()), dict(spread=1.)):
        with pytest.raises(BadInput, match=next(iter(bad))):
            spr.Settings(**bad)


def test_it_never_sees_imagenet():
    assert not {"backbone", "weights", "norm"} & {f for s in SYSTEMS["spr"].stages.values() for f in s.fields}


def test_the_forecast_counts_the_nets_own_operations():
    from tocoad.paper.hours import _work
    does, c = SYSTEMS["spr"].stages["spr"], settings(epochs=5, width=1 / 4, shrink=2)
    assert _work(does, c, 10) == pytest.approx(10 * does.work * 5 / 16 / 4)
    assert does.gflop == pytest.approx(45 * (224 / 192)**2)
