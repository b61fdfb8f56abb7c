"""DRAEM: its parts against closed forms and against anomalib's numbers, its stages as a system."""
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filled import filled, picture
from safetensors.torch import load_file
from scipy.ndimage import gaussian_filter, uniform_filter

from tocoad.data.errors import BadInput
from tocoad.data.load import load
from tocoad.method.guard import Diverged
from tocoad.method.pretrain import stream
from tocoad.systems import draem
from tocoad.systems.system import SYSTEMS, departures

REFERENCE = Path(__file__).parent / "reference" / "draem.safetensors"


def settings(**changes):
    "What the stages are given: narrow, small, and quick"
    small = dict(profile="test", precision="fp32", resize=64, size=64, width=1 / 32, textures="embedded")
    return draem.Settings(**small | dict(epochs=1, batch=4) | changes)


@pytest.fixture(scope="module")
def washer():
    "Few small images"
    data = load(None, "mini", "washer", size=64)
    return replace(data, train=data.train[:8], test=data.test[::7])


@pytest.fixture(scope="module")
def fitted(washer):
    return draem.fit(settings(), washer, [], {}, "cpu", False)


def scored(c, data, fitted):
    return draem.scores(c, data, [fitted], {}, "cpu", False)[1]


def same(a, b):
    return all(np.array_equal(a[k], b[k]) for k in a)


def test_the_numbers_are_anomalibs():
    "tests/test_anomalib_draem.py holds the same tensors against anomalib itself"
    net, stored, I = draem.Draem(1 / 32), load_file(REFERENCE), picture(2, 3, 32, 32)
    net.repair, net.segment = draem.Repair(4), draem.Segment(4)
    filled(net.repair, net.segment)
    y = torch.zeros(2, 32, 32, dtype=torch.bool)
    y[:, 5:25, 10:30] = True
    with torch.inference_mode():
        rebuilt, logits = net.eval()(torch.where(y[:, None], (I + 1) / 2, I))
    torch.testing.assert_close(rebuilt, stored["rebuilt"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, stored["logits"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sum(draem.losses(rebuilt, logits, I, y)), stored["loss"], rtol=1e-4, atol=1e-4)


def test_full_size_counts_and_shapes_without_room_for_weights():
    millions = lambda m: sum(p.numel() for p in m.parameters()) / 1e6
    with torch.device("meta"):
        net = draem.Draem()
        rebuilt, logits = net(torch.empty(2, 3, 256, 256))
        assert net.repair.down(torch.empty(2, 3, 256, 256))[-1].shape == (2, 1024, 16, 16)
    assert millions(net.repair) == pytest.approx(69.0, abs=.05)
    assert millions(net.segment) == pytest.approx(28.4, abs=.05)
    assert rebuilt.shape == (2, 3, 256, 256) and logits.shape == (2, 2, 256, 256)


def test_every_weight_of_the_full_networks_has_a_gradient():
    net, I = draem.make(SimpleNamespace(width=1., seed=0, compile=False), "cpu"), picture(2, 3, 32, 32)
    assert net.repair.down.levels[1][0].weight.std().item() == pytest.approx(.02, rel=.05)
    sum(draem.losses(*net(I), I, I[:, 0] > .5)).backward()
    for p in net.parameters():
        assert p.grad is not None and p.grad.isfinite().all() and (p.ndim == 1 or p.grad.any())


def test_the_segmentation_sees_the_picture_the_repair_and_every_level():
    net, x = filled(draem.Segment(4))[0], picture(1, 6, 64, 64).requires_grad_()
    net(x).square().sum().backward()
    assert all(x.grad[0, k].any() for k in range(6))
    maps = net.down(x.detach())
    base = net(x.detach())
    for k in range(6):
        net.down.forward = lambda _, k=k: [m + (i == k) for i, m in enumerate(maps)]
        assert not torch.allclose(net(x.detach()), base)


def test_the_repair_loss_is_the_square_and_scipys_structural_similarity():
    a, b = (picture(2, 3, 24, 24, start=s) for s in (0, 9999))
    blur = lambda x: gaussian_filter(x, (0, 0, 1.5, 1.5), radius=(0, 0, 5, 5), mode="mirror")
    x, y = a.double().numpy(), b.double().numpy()
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    ssim = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    repair, _ = draem.losses(a, torch.zeros(2, 2, 24, 24), b, torch.zeros(2, 24, 24, dtype=torch.bool))
    assert repair.item() == pytest.approx(np.mean((x - y)**2) + 1 - ssim.mean(), rel=1e-5)


def test_some_images_are_turned_and_the_others_left():
    I = .2 + .8 * picture(200, 3, 32, 32)
    out = draem.turned(I, .3, 90., stream(0, "turns"))
    moved = (out != I).flatten(1).any(1)
    assert .2 < moved.float().mean() < .4 and torch.equal(out, draem.turned(I, .3, 90., stream(0, "turns")))
    assert (out[moved][:, :, :2, :2] == 0).any() and out.max() <= 1 # corners are black
    assert torch.equal(draem.turned(I, 0., 90., stream(0, "turns")), I)
    torch.testing.assert_close(draem.turned(I, 1., 0., stream(0, "turns")), I, rtol=1e-4, atol=1e-5)


def test_half_of_the_images_stay_clean_and_masks_are_whole():
    I = torch.full((100, 3, 64, 64), .5)
    I_G, y = draem.generator(settings())(I, stream(0, "drawn"))
    assert .35 < y.flatten(1).any(1).float().mean() < .65 # some drawn noises stay below the threshold
    assert torch.equal(I_G[~y[:, None].expand_as(I)], I[~y[:, None].expand_as(I)])
    _, none = draem.generator(settings(clean=.99))(I, stream(0, "drawn"))
    _, through = draem.generator(settings(beta=1., clean=0.))(I, stream(0, "drawn"))
    assert none.float().mean() < y.float().mean() < through.float().mean()


def test_an_epoch_is_as_many_draws_with_replacement_and_the_rate_falls_twice():
    images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 3, 32, 32)
    seen = []

    def G(I, generator):
        seen.append((255 * I[:, 0, 16, 16]).round().int())
        return I, torch.zeros(len(I), 32, 32, dtype=torch.bool)

    net = draem.Draem(1 / 64)
    log = draem.train(net, G, images, epochs=10, batch=16, lr=1e-3, size=32, progress=False, turns=0.)
    assert [len(s) for s in seen[:3]] == [16, 16, 8] and len(seen) == 30
    first = torch.cat(seen[:3])
    assert 20 <= len(first.unique()) <= 33 and not torch.equal(first, torch.cat(seen[3:6])) # 25 of 40 are expected
    assert [e["lr"] for e in log] == pytest.approx([1e-3] * 8 + [2e-4, 4e-5])


def test_the_image_score_is_the_largest_mean():
    maps = picture(3, 40, 50)
    for pool in (1, 5, 21):
        means = np.stack([uniform_filter(m.double().numpy(), pool, mode="constant") for m in maps])
        np.testing.assert_allclose(draem.image_scores(maps, pool), means.max((1, 2)), rtol=1e-5)


def test_the_last_stage_gives_a_score_and_a_map_of_every_image(washer, fitted):
    found = scored(settings(), washer, fitted)
    assert found["maps"].shape == (len(washer.test), 64, 64) and found["image"].shape == (len(washer.test),)
    assert found["image"].dtype == found["maps"].dtype == np.float32
    assert 0 <= found["maps"].min() and found["maps"].max() <= 1


@pytest.mark.parametrize("change", [
    dict(lr=1e-3), dict(batch=2), dict(gamma=0.), dict(scales=(4, 5)), dict(threshold=.2), dict(beta=0.),
    dict(clean=.9), dict(turns=1.), dict(angle=5., turns=1.)], ids=str)
def test_every_setting_reaches_the_training(washer, fitted, change):
    base = draem.fit(settings(turns=1.), washer, [], {}, "cpu", False) if "angle" in change else fitted
    assert not same(base[1], draem.fit(settings(**change), washer, [], {}, "cpu", False)[1])


def test_a_loss_that_is_no_number_stops_with_a_sentence(washer):
    with pytest.raises(Diverged, match="try a smaller rate"):
        draem.fit(settings(lr=1e30, epochs=4), washer, [], {}, "cpu", False)


def test_settings_are_the_papers_and_refuse_what_cannot_work(washer):
    paper = SYSTEMS["draem"].of(draem.Settings(), "draem")
    assert departures(paper) == "" and (paper.epochs, paper.lr, paper.batch, paper.clean) == (700, 1e-4, 8, .5)
    smoke = departures(SYSTEMS["draem"].of(draem.Settings(profile="smoke"), "draem"))
    assert smoke.startswith("width 0.0625 (1.0), epochs ") and "textures embedded" in smoke
    for bad in (dict(size=32), dict(scales=(3, 1)), dict(pool=20), dict(width=0.), dict(turns=1.5), dict(batch=1)):
        with pytest.raises(BadInput, match=next(iter(bad))):
            draem.Settings(**bad)
    with pytest.raises(BadInput, match="textures=FOLDER"):
        draem.fit(settings(textures=None), washer, [], {}, "cpu", False)


def test_it_never_sees_imagenet():
    assert not {"backbone", "weights", "norm"} & {f for s in SYSTEMS["draem"].stages.values() for f in s.fields}
