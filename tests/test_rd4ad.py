"""RD4AD: its parts against closed forms and against anomalib's numbers, its stages as a system."""
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filled import filled, picture
from safetensors.torch import load_file
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cosine

from tocoad.data.errors import BadInput
from tocoad.data.images import crop
from tocoad.data.load import load
from tocoad.measure.metrics import auroc
from tocoad.method.guard import Diverged
from tocoad.systems import rd4ad
from tocoad.systems.system import SYSTEMS, departures

REFERENCE = Path(__file__).parent / "reference" / "rd4ad.safetensors"
LITE, WIDE = (24, 40, 112, 320), (256, 512, 1024, 2048)


def maps_for(channels, n=2, size=64):
    "Hashed maps of layers 1-3"
    return [picture(n, c, size // s, size // s, start=s) for c, s in zip(channels, (4, 8, 16), strict=False)]


def settings(**changes):
    "What the stages are given: small, and quick"
    small = dict(profile="test", backbone="tf_efficientnet_lite0", precision="fp32", resize=64, size=64)
    return rd4ad.Settings(**small | dict(epochs=1, batch=8) | changes)


@pytest.fixture(scope="module")
def washer():
    "Few small images"
    data = load(None, "mini", "washer", size=64)
    return replace(data, train=data.train[:10], test=data.test[::4])


@pytest.fixture(scope="module")
def fitted(washer):
    return rd4ad.fit(settings(epochs=2), washer, [], {}, "cpu", False)


def scored(c, data, fitted):
    return rd4ad.scores(c, data, [fitted], {}, "cpu", False)[1]


def same(a, b):
    return all(np.array_equal(a[k], b[k]) for k in a)


def test_the_numbers_are_anomalibs():
    "tests/test_anomalib_rd4ad.py holds the same tensors against anomalib itself"
    channels = (64, 128, 256, 512)
    S, maps, stored = rd4ad.student(channels, "resnet18"), maps_for(channels), load_file(REFERENCE)
    filled(S[0].squeeze, S[0].low, S[0].middle)
    filled(S[1])
    with torch.inference_mode():
        found = S.eval()(maps)
        for k, m in enumerate(found, 1):
            torch.testing.assert_close(m[:, ::8], stored[f"layer{k}"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rd4ad.distance(maps, found), stored["loss"], rtol=1e-4, atol=1e-4)
        whole = rd4ad.anomaly_map([rd4ad.place_distance(t, s) for t, s in zip(maps, found, strict=True)], 64)
    inside = slice(16, -16) # off the border, which anomalib mirrors without its outermost pixels
    torch.testing.assert_close(whole[:, inside, inside], stored["map"][:, inside, inside], rtol=1e-4, atol=1e-4)


def test_full_size_counts_and_shapes_without_room_for_weights():
    millions = lambda m: sum(p.numel() for p in m.parameters()) / 1e6
    with torch.device("meta"):
        S = rd4ad.student(WIDE, "wide_resnet50_2")
        maps = [torch.empty(2, c, 256 // s, 256 // s) for c, s in zip(WIDE, (4, 8, 16), strict=False)]
        assert S[0](maps).shape == (2, 2048, 8, 8)
        assert [m.shape for m in S(maps)] == [m.shape for m in maps]
    idle = (4096 * 2048 + 2 * 2048) / 1e6 # in the published module, and never used
    assert millions(S[0]) + idle == pytest.approx(39.2, abs=.05) and millions(S[1]) == pytest.approx(24.9, abs=.05)


@pytest.mark.parametrize("backbone,channels", [("tf_efficientnet_lite0", LITE), ("resnet18", (64, 128, 256, 512))])
def test_every_weight_and_every_layer_has_a_gradient(backbone, channels):
    S = rd4ad.student(channels, backbone)
    maps = [m.requires_grad_() for m in maps_for(channels)]
    rd4ad.distance([m.detach() for m in maps], S(maps)).backward()
    assert all(p.grad is not None and p.grad.any() for p in S.parameters())
    assert all(m.grad.any() for m in maps)


@pytest.mark.parametrize("kind", ["layer", "place"])
def test_the_distance_is_the_cosine_distance(kind):
    a, b = (maps_for((3, 4, 5), n=3, size=32) for _ in range(2))
    b = [m.flip(0) - .4 for m in b]
    total = 0.
    for x, y in zip(a, b, strict=True):
        vectors = lambda m: m.flatten(1) if kind == "layer" else m.permute(0, 2, 3, 1).flatten(0, 2)
        total += np.mean([cosine(p, q) for p, q in zip(vectors(x).numpy(), vectors(y).numpy(), strict=True)])
    assert rd4ad.distance(a, b, kind).item() == pytest.approx(total, rel=1e-5)


def test_the_map_is_the_sum_of_enlarged_layers_behind_scipys_gaussian():
    layers = [picture(2, n, n, start=n) for n in (16, 8, 4)]
    corners = dict(size=(64, 64), mode="bilinear", align_corners=True)
    plain = sum(torch.nn.functional.interpolate(m[:, None], **corners)[:, 0] for m in layers).numpy()
    for sigma in (0., 2., 4.):
        smooth = np.stack([gaussian_filter(m, sigma, truncate=4) if sigma else m for m in plain])
        np.testing.assert_allclose(rd4ad.anomaly_map(layers, 64, sigma), smooth, rtol=1e-4, atol=1e-5)


def test_the_student_knows_normal_images_better_than_defects(washer):
    data = load(None, "mini", "brick", size=64)
    c = settings(epochs=15, lr=5e-3)
    _, maps = rd4ad.maps_of(scored(c, data, rd4ad.fit(c, data, [], {}, "cpu", False)), c)
    truth = data.test.masks.numpy()
    assert maps[truth].mean() > 1.3 * maps[~truth].mean()


@pytest.mark.parametrize("change", [dict(lr=1e-3), dict(betas=(.9, .9)), dict(batch=4), dict(cosine="place")], ids=str)
def test_every_setting_reaches_the_training(washer, fitted, change):
    changed = rd4ad.fit(settings(epochs=2, **change), washer, [], {}, "cpu", False)
    assert not same(fitted[1], changed[1])


def test_a_loss_that_is_no_number_stops_with_a_sentence(washer):
    with pytest.raises(Diverged, match="try a smaller rate"):
        rd4ad.fit(settings(lr=1e30, epochs=3), washer, [], {}, "cpu", False)


def test_settings_are_the_papers_and_refuse_what_cannot_work():
    paper = SYSTEMS["rd4ad"].of(rd4ad.Settings(), "rd4ad")
    assert departures(paper) == "" and (paper.epochs, paper.lr, paper.betas) == (200, .005, (.5, .999))
    assert departures(SYSTEMS["rd4ad"].of(rd4ad.Settings(profile="laptop"), "rd4ad")).startswith("epochs ")
    for bad in (dict(size=32), dict(epochs=0), dict(cosine="mean"), dict(betas=(.5, 1.)), dict(batch=1)):
        with pytest.raises(BadInput, match=next(iter(bad))):
            rd4ad.Settings(**bad)


@pytest.mark.slow
def test_uneven_tiles_are_ordinary_by_direction_and_not_by_length(real):
    "Why RD4AD misses them: no student is trained here, and the cosine to the mean of normal vectors misses them too"
    tiles = load(real, None, "magnetic_tile")
    c = settings(norm="own", resize=256, size=224)
    F, of = rd4ad.extractor(c), tiles.test
    chosen = [i for kind in ("uneven", "good") for i in [i for i, d in enumerate(of.defects) if d == kind][::3]]
    normal = rd4ad.layer_maps(F, tiles.train.images[:100], c)
    shown = rd4ad.layer_maps(F, of.images[chosen], c)
    truth = crop(of.masks[chosen], 224).numpy() > 0
    good = np.array([of.defects[i] == "good" for i in chosen])

    def told(m): # (N, h, w): AUROC of uneven pixels against normal images' pixels
        m = rd4ad.anomaly_map([m], 224, 4.).numpy()
        ours, normal = m[~good][truth[~good]], m[good].ravel()
        return auroc(np.r_[np.ones(len(ours)), np.zeros(len(normal))], np.r_[ours, normal])

    means = [m.mean((0, 2, 3), keepdim=True).expand_as(s) for m, s in zip(normal, shown, strict=True)]
    direction = [told(rd4ad.place_distance(s, m)) for s, m in zip(shown, means, strict=True)]
    length = [told(s.norm(dim=1)) for s in shown]
    assert min(length) > .65 and direction[0] < .5 and direction[1] < .55
    assert all(a > b + .05 for a, b in zip(length, direction, strict=True))
