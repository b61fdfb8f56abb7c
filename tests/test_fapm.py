"FAPM: its parts, memories and score against plain loops, and what a score may depend on."
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional as nnf
from toys import noise

from tocoad.method.memory import Memory, coreset_plain
from tocoad.systems.fapm import Settings, choose, cover, distances, fit, image_score, maps_of, parts_of, patches, scores
from tocoad.systems.maps import extractor, layer_maps
from tocoad.systems.system import SYSTEMS


def points(*shape, s=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(s))
def seed(s): return torch.Generator().manual_seed(s)


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 12))
def test_parts_are_blocks_of_about_equal_size(h, w, n):
    part = parts_of((h, w), n).view(h, w)
    rows, columns = part[:, 0] // n, part[0] % n
    assert torch.equal(part, rows[:, None] * n + columns) and part.max() < n * n
    for k, line in ((h, rows), (w, columns)):
        assert (line.diff() >= 0).all() and line[0] == 0
        sizes = line.bincount()[line.unique()]
        assert sizes.max() - sizes.min() <= 1 and len(sizes) == min(k, n)


@pytest.mark.parametrize("side", [7, 14, 28])
def test_both_layers_cut_the_image_alike(side):
    coarse = parts_of((side, side)).view(side, side)
    assert torch.equal(parts_of((2 * side, 2 * side)), coarse.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten())


def test_a_patch_is_the_mean_of_nine_places():
    m = points(2, 3, 4, 5)
    p = patches(m).unflatten(1, (4, 5))
    torch.testing.assert_close(p[1, 2, 3], m[1, :, 1:4, 2:5].mean((1, 2)))
    torch.testing.assert_close(p[0, 0, 0], m[0, :, :2, :2].sum((1, 2)) / 9)


def test_far_parts_keep_more():
    parts = [spread * points(60, 3, s=k) for k, spread in enumerate((1, 9, 2, 8, 3))]
    usual, more = choose(parts, .1, 1., seed(0)), choose(parts, .1, 2., seed(0))
    assert [len(k) for k in usual] == [6] * 5
    covers = [NearestNeighbors(n_neighbors=1).fit(k).kneighbors(X)[0].mean() for X, k in zip(parts, usual, strict=True)]
    np.testing.assert_allclose([cover(X, k) for X, k in zip(parts, usual, strict=True)], covers, rtol=1e-4)
    assert [len(k) for k in more] == [12 if c > np.median(covers) else 6 for c in covers] == [6, 12, 6, 12, 6]
    assert all(torch.equal(a[:6], b) for a, b in zip(more, usual, strict=True)) # the same choice, gone on with
    assert [len(k) for k in choose(parts, .6, 3., seed(0))] == [36, 60, 36, 60, 36] # never more than there are


def test_what_is_kept_is_the_greedy_choice():
    X = points(50, 4)
    kept = choose([X], .2, 1., seed(3))[0]
    start = int((X == kept[0]).all(1).nonzero())
    assert torch.equal(kept, X[coreset_plain(X, 10, start)])


def test_alike_parts_are_none_of_them_far():
    same = [points(1, 3).repeat(40, 1)] * 3
    assert [len(k) for k in choose(same, .1, 2., seed(0))] == [4, 4, 4]
    assert [len(k) for k in choose([points(1, 3)] * 3, .1, 2., seed(0))] == [1, 1, 1]


def test_each_part_is_searched_in_its_own_memory():
    Q, part, banks = points(2, 6, 3), torch.tensor([0, 1, 0, 2, 2, 1]), [points(n, 3, s=n) for n in (9, 5, 2)]
    D = distances(Q, [Memory(b) for b in banks], part, 4)
    for place in range(6):
        bank = banks[part[place]]
        k = min(4, len(bank))
        found = NearestNeighbors(n_neighbors=k).fit(bank).kneighbors(Q[:, place])[0]
        np.testing.assert_allclose(D[:, place, :k], found, rtol=1e-4)
        assert (D[:, place, k:] == D[:, place, k - 1:k]).all()


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(2, 6), st.floats(.1, 200))
def test_the_weight(places, k, scale):
    D = (scale * points(3, places, k).abs()).sort(-1).values
    worst = D[np.arange(3), D[..., 0].argmax(1)].double().numpy()
    by_hand = worst[:, 0] * (1 - softmax(worst, 1).max(1))
    np.testing.assert_allclose(image_score(D), by_hand, rtol=1e-3, atol=1e-4 * scale)
    assert torch.equal(image_score(D[..., :1]), D[..., 0].amax(1))


@pytest.fixture(scope="module")
def drawn_set():
    images = lambda first, n: torch.from_numpy(np.stack([noise(first + k, 72) for k in range(n)])).permute(0, 3, 1, 2)
    return SimpleNamespace(train=SimpleNamespace(images=images(0, 7)), test=SimpleNamespace(images=images(50, 5)))


def setting(**changes):
    return Settings(backbone="tf_efficientnet_lite0", precision="fp32", resize=72, size=64, **changes)


def run(data, **changes):
    "Image scores, maps and arrays, each stage with the settings that it names and no others"
    c, got, left = setting(**changes), [], {}
    for stage, does in zip((fit, scores), SYSTEMS["fapm"].stages.values(), strict=True):
        got = [stage(SimpleNamespace(**{k: getattr(c, k) for k in does.fields}), data, got, {}, "cpu", False)]
        left |= got[0][1]
    return *maps_of(got[0][1], c), left


def test_scores_are_those_of_a_plain_search(drawn_set):
    arrays, c, grids = run(drawn_set, cut=2, neighbours=3, coreset=.3)[2], setting(), []
    for layer, m in zip((2, 3), layer_maps(extractor(c), drawn_set.test.images, c, (2, 3)), strict=True):
        Q, part, side = patches(m), parts_of(m.shape[2:], 2), m.shape[-1]
        D = np.empty((*Q.shape[:2], 3))
        for p in range(4):
            bank, here = arrays[f"bank{layer}"][arrays[f"part{layer}"] == p], part.numpy() == p
            d = NearestNeighbors(n_neighbors=3).fit(bank).kneighbors(Q[:, here].flatten(0, 1))[0]
            D[:, here] = d.reshape(len(Q), -1, 3)
        grids.append(D.reshape(len(Q), side, side, 3))
    total = grids[0] + grids[1].repeat(2, 1).repeat(2, 2)
    np.testing.assert_allclose(arrays["patch_scores"], total[..., 0], rtol=1e-4)
    flat = total.reshape(5, -1, 3)
    worst = flat[np.arange(5), flat[..., 0].argmax(1)]
    np.testing.assert_allclose(arrays["image"], worst[:, 0] * (1 - softmax(worst, 1).max(1)), rtol=1e-3, atol=1e-4)


def test_memories_hold_patches_of_their_part(drawn_set):
    arrays, c = run(drawn_set)[2], setting()
    for layer, m in zip((2, 3), layer_maps(extractor(c), drawn_set.train.images, c, (2, 3)), strict=True):
        X, part = patches(m), parts_of(m.shape[2:])
        bank, of = arrays[f"bank{layer}"], torch.from_numpy(arrays[f"part{layer}"])
        assert torch.equal(of.unique(), part.unique())
        for p in of.unique():
            own, n = X[:, part == p].flatten(0, 1), int((of == p).sum())
            assert torch.cdist(torch.from_numpy(bank[of == p]), own).amin(1).max() < 1e-3
            assert n in (max(1, len(own) // 10), max(1, len(own) // 5))


@pytest.mark.parametrize("size", [32, 64]) # at 32 pixels layer 3 has 2 x 2 places, fewer than parts
def test_stages(drawn_set, size):
    c = setting().replace(size=size)
    got = fit(c, drawn_set, [], {}, "cpu", False)
    found = scores(c, drawn_set, [got], {}, "cpu", False)[1]
    image, maps = maps_of(found, c)
    assert (image.shape, maps.shape, found["patch_scores"].shape) == ((5,), (5, size, size), (5, size // 8, size // 8))
    assert image.dtype == maps.dtype == np.float32 and np.isfinite(maps).all()
    again, other = fit(c, drawn_set, [], {}, "cpu", False), fit(c.replace(seed=1), drawn_set, [], {}, "cpu", False)
    assert all(np.array_equal(again[1][k], v) for k, v in got[1].items())
    assert not np.array_equal(other[1]["bank2"], got[1]["bank2"])


def test_enlarging(drawn_set):
    _, maps, arrays = run(drawn_set, sigma=0)
    grid = torch.from_numpy(arrays["patch_scores"])[:, None]
    up = nnf.interpolate(grid, (64, 64), mode="bilinear", align_corners=False)[:, 0]
    np.testing.assert_allclose(maps, up, rtol=1e-5)
