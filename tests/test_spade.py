"SPADE: its neighbours against scikit-learn's, its gallery against a plain search, and what a score may depend on."
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional as nnf
from toys import noise

from tocoad.systems.maps import extractor, layer_maps
from tocoad.systems.spade import Settings, correspondence, fit, maps_of, nearest, scores
from tocoad.systems.system import SYSTEMS


def points(*shape, s=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(s))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(1, 90), st.integers(1, 12), st.floats(-50, 50))
def test_nearest_is_scikit_learns(p, m, d, mean):
    q, g = mean + points(p, d), mean + points(m, d, s=1)
    found = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(g.double()).kneighbors(q.double())[0][:, 0]
    np.testing.assert_allclose(nearest(q, g), found, rtol=1e-4, atol=1e-3)


def test_every_piece_of_a_gallery_counts(): # 350 rows at a time; a last piece of few rows is easily dropped
    q, g, axes = points(3000, 8), points(1100, 8, s=1), torch.eye(8)
    far = [0, 349, 350, 1049, 1099]
    q[far] = 30 * axes[:5] # each far from all but its partner
    g[far] = 30 * axes[:5] + 2 * axes[7]
    found = nearest(q, g)
    np.testing.assert_allclose(found[far], 2, atol=.01)
    np.testing.assert_allclose(found, pairwise_distances(q.double(), g.double()).min(1), rtol=1e-3)


def test_any_place_answers_for_any_other():
    m, gallery = points(5, 4, 4), points(3, 5, 4, 4, s=1)
    before = correspondence(m, gallery)
    assert before.shape == (4, 4)
    torch.testing.assert_close(correspondence(m, gallery.flip(-1).roll(1, 2)), before, rtol=1e-4, atol=1e-5)
    turned = correspondence(m.flip(-1), gallery)
    torch.testing.assert_close(turned, before.flip(-1), rtol=1e-4, atol=1e-5)
    assert correspondence(gallery[1].roll((1, 2), (1, 2)), gallery).max() < 1e-2


@pytest.fixture(scope="module")
def drawn_set():
    images = lambda first, n: torch.from_numpy(np.stack([noise(first + k, 72) for k in range(n)])).permute(0, 3, 1, 2)
    return SimpleNamespace(train=SimpleNamespace(images=images(0, 7)), test=SimpleNamespace(images=images(50, 5)))


def setting(**changes):
    return Settings(backbone="tf_efficientnet_lite0", precision="fp32", resize=72, size=64, **changes)


def run(data, **changes):
    "Image scores, maps and arrays, each stage with the settings that it names and no others"
    c, got = setting(**changes), []
    for stage, does in zip((fit, scores), SYSTEMS["spade"].stages.values(), strict=True):
        got = [stage(SimpleNamespace(**{k: getattr(c, k) for k in does.fields}), data, got, {}, "cpu", False)]
    return *maps_of(got[0][1], c), got[0][1]


def test_scores_are_those_of_scikit_learns_neighbours(drawn_set):
    image, maps, arrays = run(drawn_set, gallery=3, neighbours=2)
    c, F = setting(), extractor(setting())
    *train, top = layer_maps(F, drawn_set.train.images, c, (1, 2, 3, 4))
    *test, new = layer_maps(F, drawn_set.test.images, c, (1, 2, 3, 4))
    distances, near = NearestNeighbors(n_neighbors=7).fit(top.mean((2, 3))).kneighbors(new.mean((2, 3)))
    np.testing.assert_allclose(arrays["distances"], distances, rtol=1e-4)
    np.testing.assert_allclose(image, distances[:, :2].mean(1), rtol=1e-4)
    places, up = lambda m: m.flatten(-2).mT.reshape(-1, m.shape[-3]).double(), []
    for k, (a, b) in enumerate(zip(train, test, strict=True), 1):
        for n in range(5):
            by_hand = pairwise_distances(places(b[n]), places(a[near[n, :3]])).min(1)
            np.testing.assert_allclose(arrays[f"layer{k}"][n].ravel(), by_hand, rtol=1e-3)
        grid = torch.from_numpy(arrays[f"layer{k}"])[:, None]
        up.append(nnf.interpolate(grid, (64, 64), mode="bilinear", align_corners=False)[:, 0])
    rough = run(drawn_set, gallery=3, sigma=0)[1]
    np.testing.assert_allclose(rough, sum(up) / 3, rtol=1e-4)


def test_stages(drawn_set):
    image, maps, arrays = run(drawn_set)
    assert image.shape == (5,) and maps.shape == (5, 64, 64) and arrays["distances"].shape == (5, 7)
    assert image.dtype == maps.dtype == np.float32
    np.testing.assert_array_equal(image, arrays["distances"].mean(1)) # fewer than 50 training images: all
    assert (run(drawn_set, neighbours=1)[0] < image).all()
    narrow = run(drawn_set, gallery=1)[2]
    assert all((narrow[f"layer{k}"] >= arrays[f"layer{k}"] - 1e-2).all() for k in (1, 2, 3)) # a part of the same places
    assert (narrow["layer1"] > arrays["layer1"] + .1).any()


def test_neighbours_are_read_not_computed():
    does = SYSTEMS["spade"].stages["spade_scores"]
    assert "neighbours" in does.reads and "neighbours" not in does.fields


def test_a_known_image_is_found_again(drawn_set):
    both = torch.cat([drawn_set.train.images[2:3], drawn_set.test.images])
    image, maps, _ = run(SimpleNamespace(train=drawn_set.train, test=SimpleNamespace(images=both)), neighbours=1)
    assert image[0] < 1e-3 < image[1:].min() and maps[0].max() < .05 * maps[1:].max()
