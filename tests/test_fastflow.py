"FastFlow: its parts against closed forms and anomalib's numbers, its stages as a system."
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import norm
from torch.nn import functional as nnf

from tocoad.data.errors import BadInput
from tocoad.data.load import load
from tocoad.method.guard import Diverged
from tocoad.method.pretrain import seeded
from tocoad.systems import fastflow
from tocoad.systems.system import SYSTEMS, departures

REFERENCE = Path(__file__).parent / "reference" / "fastflow.safetensors"
SHAPES = (4, 8, 8), (7, 4, 4), (6, 2, 2)


def settings(**changes):
    "What the stages are given: small, and quick"
    small = dict(profile="test", backbone="tf_efficientnet_lite0", precision="fp32", resize=64, size=64)
    return fastflow.Settings(**small | dict(epochs=2, batch=8, blocks=2) | changes)


@pytest.fixture(scope="module")
def washer():
    "Few small images"
    data = load(None, "mini", "washer", size=64)
    return replace(data, train=data.train[:10], test=data.test[::4])


@pytest.fixture(scope="module")
def fitted(washer):
    return fastflow.fit(settings(), washer, [], {}, "cpu", False)


def scored(c, data, fitted): return fastflow.scores(c, data, [fitted], {}, "cpu", False)[1]
def same(a, b): return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def maps(n=3, s=0):
    g = torch.Generator().manual_seed(s)
    return [2 + torch.randn(n, *shape, generator=g) for shape in SHAPES]


def freia_to_ours(level, stored):
    "Weights of a level of anomalib's, by the names of FrEIA's blocks, put into ours"
    state = {f"norm.{k}": stored[f"norm.{k}"] for k in ("weight", "bias")}
    for k in range(len(level.flow)):
        part = {n.partition(f"flow.{k}.")[2]: v for n, v in stored.items() if n.startswith(f"flow.{k}.")}
        state |= {f"flow.{k}.{n}": v for n, v in part.items() if n.startswith("subnet")}
        state |= {f"flow.{k}.g": part["global_scale"].flatten(), f"flow.{k}.b": part["global_offset"].flatten(),
                  f"flow.{k}.mix": part["w_perm"].flatten(1).argmax(1)}
    level.load_state_dict(state)
    return level


def test_the_numbers_are_anomalibs():
    "tests/test_anomalib_fastflow.py holds the same tensors against anomalib itself"
    r = load_file(REFERENCE)
    c, found = settings(blocks=3), []
    for k, shape in enumerate(SHAPES):
        stored = {n.partition(f"{k}.")[2]: v for n, v in r.items() if n.startswith(f"{k}.")}
        with torch.no_grad():
            found.append(freia_to_ours(fastflow.Level(shape, c), stored)(stored["x"]))
        for mine, theirs in zip(found[-1], (stored["z"], stored["stretch"]), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fastflow.loss_of(found), r["loss"], rtol=1e-4, atol=1e-4)
    M = fastflow.anomaly_map([fastflow.energy(z) for z, _ in found], 32)
    torch.testing.assert_close(M, r["map"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels, sides", [("alternating", [3, 1, 3]), ("3x3", [3, 3, 3])])
def test_kernels_and_widths_are_the_papers(kernels, sides):
    level = fastflow.Level((7, 4, 4), settings(kernels=kernels, blocks=3))
    for block, side in zip(level.flow, sides, strict=True):
        first, _, last = block.subnet
        assert first.weight.shape == (4, 4, side, side) and last.weight.shape == (6, 4, side, side)
    narrow = fastflow.Level((256, 2, 2), settings(hidden=.16)).flow[0].subnet[0]
    assert narrow.weight.shape[:2] == (int(128 * .16), 128)


@pytest.mark.parametrize("kernels, channels, trained, stored", [
    ("alternating", (256, 512, 1024), 41.3, 63.4), ("3x3", (64, 128, 256), 4.7, 6.),
    ("alternating", (64, 128, 256), 2.6, 4.)])
def test_parameters_of_full_size(kernels, channels, trained, stored):
    "41.3 millions stand in the paper; 63.4, 6.0 and 4.0 are counted where orders are stored as matrices, and twice"
    shapes = [(k, 256 // s, 256 // s) for k, s in zip(channels, (4, 8, 16), strict=True)]
    with torch.device("meta"):
        levels = fastflow.levels_for(shapes, settings(blocks=8, kernels=kernels))
    flows = sum(p.numel() for level in levels for p in level.flow.parameters())
    assert flows / 1e6 == pytest.approx(trained, abs=.05)
    assert (flows + sum(8 * 2 * k * k for k in channels)) / 1e6 == pytest.approx(stored, abs=.05)
    assert [level.norm.weight.shape for level in levels] == shapes


def test_the_loss_is_the_negative_log_density_without_its_constant():
    levels, x = fastflow.levels_for(SHAPES, settings(blocks=3)), maps()
    with torch.no_grad():
        found = [level(m) for level, m in zip(levels, x, strict=True)]
    total = 0.
    for z, stretch in found:
        log = norm.logpdf(z.double().numpy()).sum((1, 2, 3)) + stretch.numpy()
        total -= (log + z[0].numel() / 2 * math.log(2 * math.pi)).mean()
    assert fastflow.loss_of(found).item() == pytest.approx(total, rel=1e-4)


def test_each_image_of_a_batch_weighs_the_same_and_is_by_itself():
    levels, x = fastflow.levels_for(SHAPES, settings()), maps(4)
    loss = lambda rows: fastflow.loss_of(level(m[rows]) for level, m in zip(levels, x, strict=True)).item()
    assert loss([0, 1, 2, 3]) == pytest.approx(np.mean([loss([k]) for k in range(4)]), rel=1e-5)


def test_the_map_is_the_mean_of_enlarged_likelihoods():
    energies = [4 * torch.rand(2, n, n) for n in (16, 8, 4)]
    bilinear = dict(size=(64, 64), mode="bilinear", align_corners=False)
    mean = sum(nnf.interpolate(-(-e / 2).exp()[:, None], **bilinear)[:, 0] for e in energies) / 3
    M = fastflow.anomaly_map(energies, 64)
    torch.testing.assert_close(M, mean)
    assert -1 <= M.min() and M.max() <= 0
    energies[1][0, 3, 3] += 50 # less likely
    assert (fastflow.anomaly_map(energies, 64) - M)[0, 24:32, 24:32].min() > 0


def test_a_3x3_subnet_sees_its_surroundings_and_a_1x1_does_not():
    with seeded(0, "level"):
        flow = fastflow.Level(SHAPES[0], settings(hidden=4)).flow
    x, reach = maps(1)[0].requires_grad_(), []
    for block in flow:
        g, = torch.autograd.grad(block(x)[0][0, :, 4, 4].sum(), x)
        reach.append((g[0] != 0).any(0).nonzero())
    assert reach[0].min() == 2 and reach[0].max() == 6 and len(reach[0]) > 9 # two convolutions of 3 x 3
    assert reach[1].tolist() == [[4, 4]]


def test_trained_maps_are_likelier_than_others():
    data = load(None, "mini", "brick", size=64)
    data = replace(data, train=data.train[:16], test=data.test[::2])
    c = settings(epochs=12, lr=3e-3)
    _, M = fastflow.maps_of(scored(c, data, fastflow.fit(c, data, [], {}, "cpu", False)), c)
    truth = data.test.masks.numpy()
    assert M[truth].mean() > M[~truth].mean() + .02


@pytest.mark.parametrize("change", [dict(lr=1e-4), dict(decay=.1), dict(batch=4), dict(clamp=.1), dict(hidden=.5),
                                    dict(kernels="3x3"), dict(blocks=1), dict(epochs=1)], ids=str)
def test_every_setting_reaches_the_training(washer, fitted, change):
    changed = fastflow.fit(settings(**change), washer, [], {}, "cpu", False)
    assert changed[1].keys() != fitted[1].keys() or any(
        a.shape != fitted[1][k].shape or not np.array_equal(a, fitted[1][k]) for k, a in changed[1].items())


def test_a_loss_that_is_no_number_stops_with_a_sentence(washer):
    with pytest.raises(Diverged, match="try a smaller rate"):
        fastflow.fit(settings(lr=1e30, epochs=3), washer, [], {}, "cpu", False)


def test_settings_are_the_papers_and_refuse_what_cannot_work():
    paper = SYSTEMS["fastflow"].of(fastflow.Settings(), "fastflow")
    assert departures(paper) == "" and (paper.epochs, paper.lr, paper.decay, paper.batch) == (500, 1e-3, 1e-5, 32)
    assert departures(SYSTEMS["fastflow"].of(fastflow.Settings(profile="laptop"), "fastflow")).startswith("epochs ")
    for bad in (dict(epochs=0), dict(kernels="1x1"), dict(decay=-1.), dict(batch=0), dict(clamp=0.)):
        with pytest.raises(BadInput, match=next(iter(bad))):
            fastflow.Settings(**bad)
