"PaDiM: its Gaussians and distances against NumPy, SciPy and anomalib, and what a score may depend on."
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.spatial.distance import mahalanobis as by_scipy
from scipy.stats import multivariate_normal
from toys import noise

from tocoad.data.errors import BadInput
from tocoad.systems.padim import Settings, drawn, embedding, fit, gaussians, mahalanobis, packed, scores, unpacked
from tocoad.systems.system import SYSTEMS
from tocoad.systems.tocoad import maps_of

REFERENCE = Path(__file__).parent / "reference" / "padim.safetensors"


def points(*shape, s=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(s))


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 12), st.integers(1, 6), st.integers(1, 12), st.floats(1e-3, 10))
def test_gaussians_are_numpys(n, d, batch, ridge):
    x = 5 + points(n, d, 2, 3)
    mean, S = gaussians(x.split(batch), ridge)
    for p, (i, j) in enumerate(np.ndindex(2, 3)):
        here = x[:, :, i, j].double().numpy()
        np.testing.assert_allclose(mean[p], here.mean(0), atol=1e-5)
        by_numpy = np.cov(here, rowvar=False).reshape(d, d) + ridge * np.eye(d)
        np.testing.assert_allclose(S[p], by_numpy, rtol=1e-4, atol=1e-5)


def test_a_large_mean_costs_no_digits():
    x = points(20, 4, 2, 2)
    S, far = gaussians(x.split(5))[1], gaussians((x.double() + 1000).float().split(5))[1]
    np.testing.assert_allclose(far, S, atol=1e-3)


def test_one_image_gives_the_distance_to_it():
    x, new = points(1, 4, 2, 2), points(3, 4, 2, 2, s=1)
    mean, S = gaussians([x], ridge=.01)
    L = unpacked(packed(S), 4)
    np.testing.assert_allclose(mahalanobis(new, mean, L), 10 * (new - x).norm(dim=1), rtol=1e-5)


@pytest.mark.parametrize("n, d", [(30, 5), (6, 12)]) # in the second the ridge alone makes the covariance whole
def test_the_distance_is_scipys(n, d):
    x, new = points(n, d, 2, 2), points(4, d, 2, 2, s=1)
    mean, S = gaussians(x.split(7))
    M = mahalanobis(new, mean, unpacked(packed(S), d)).double()
    for k, (i, j) in enumerate(np.ndindex(2, 2)):
        mu, Sigma, z = mean[k].double().numpy(), S[k].double().numpy(), new[:, :, i, j].double().numpy()
        here = M[:, i, j].numpy()
        np.testing.assert_allclose(here, [by_scipy(v, mu, np.linalg.inv(Sigma)) for v in z], rtol=1e-4)
        log = multivariate_normal(mu, Sigma).logpdf(z)
        square = -2 * log - d * np.log(2 * np.pi) - np.linalg.slogdet(Sigma)[1]
        np.testing.assert_allclose(here**2, square, rtol=1e-3)


def test_a_ridge_too_small_is_told():
    S = gaussians([points(1, 4, 2, 2)], ridge=1e-8)[1] - 1e-8 * torch.eye(4)
    with pytest.raises(BadInput, match="raise ridge"):
        packed(S)


def test_places_do_not_know_of_each_other():
    x, new = points(9, 3, 2, 2), points(1, 3, 2, 2, s=1)
    other = x.clone()
    other[:, :, 0, 0] *= 7
    a, b = (mahalanobis(new, mean, unpacked(packed(S), 3)) for mean, S in (gaussians([x]), gaussians([other])))
    assert a[0, 0, 0] != b[0, 0, 0] and torch.equal(a.flatten()[1:], b.flatten()[1:])


def test_the_embedding_repeats_coarse_places():
    maps = [points(2, 3, 8, 8), points(2, 4, 4, 4, s=1), points(2, 5, 2, 2, s=2)]
    x = embedding(maps, torch.arange(12))
    for c, m, times in zip(x.split([3, 4, 5], 1), maps, (1, 2, 4), strict=True):
        assert torch.equal(c, m.repeat_interleave(times, 2).repeat_interleave(times, 3))
    assert torch.equal(embedding(maps, torch.tensor([1, 6, 11])), x[:, [1, 6, 11]])


def test_channels_are_drawn_once_and_without_preference():
    assert drawn(176, 550, 3).tolist() == list(range(176))
    first = drawn(40, 10, 0)
    assert first.tolist() == sorted({*first.tolist()}) == drawn(40, 10, 0).tolist() != drawn(40, 10, 1).tolist()
    counts = torch.bincount(torch.cat([drawn(40, 10, s) for s in range(400)]), minlength=40)
    assert 60 < counts.min() and counts.max() < 140 # 100 expected, deviation 9


def test_anomalibs_distances():
    r = load_file(REFERENCE)
    train, test = ([r[f"{split}{k}"] for k in (1, 2, 3)] for split in ("train", "test"))
    mean, S = gaussians(embedding(train, r["idx"]).split(5), ridge=.01 + 1e-5) # anomalib's own 1e-5
    M = mahalanobis(embedding(test, r["idx"]), mean, unpacked(packed(S), len(r["idx"])))
    torch.testing.assert_close(M, r["distances"], rtol=1e-4, atol=1e-4)
    far = mahalanobis(embedding(test, r["idx"]), mean, unpacked(packed(S - .009 * torch.eye(len(S[0]))), len(S[0])))
    assert not torch.allclose(far, r["distances"], rtol=1e-3)


@pytest.fixture(scope="module")
def drawn_set():
    images = lambda first, n: torch.from_numpy(np.stack([noise(first + k, 72) for k in range(n)])).permute(0, 3, 1, 2)
    return SimpleNamespace(train=SimpleNamespace(images=images(0, 7)), test=SimpleNamespace(images=images(50, 5)))


def run(data, **changes):
    "Image scores and maps, each stage with the settings that it names and no others"
    c = Settings(backbone="tf_efficientnet_lite0", precision="fp32", resize=72, size=64, **changes)
    got = []
    for stage, does in zip((fit, scores), SYSTEMS["padim"].stages.values(), strict=True):
        got = [stage(SimpleNamespace(**{k: getattr(c, k) for k in does.fields}), data, got, {}, "cpu", False)]
    return *maps_of(got[0][1], c), got[0][1]["patch_scores"]


def test_stages(drawn_set):
    image, maps, distances = run(drawn_set, channels=20)
    assert (image.shape, maps.shape, distances.shape) == ((5,), (5, 64, 64), (5, 16, 16))
    assert np.isfinite(maps).all() and np.array_equal(image, maps.max((1, 2)))
    again = run(drawn_set, channels=20)
    assert all(np.array_equal(a, b) for a, b in zip(again, (image, maps, distances), strict=True))
    assert not np.allclose(run(drawn_set, channels=20, seed=1)[2], distances, rtol=.01)
    assert np.array_equal(run(drawn_set)[2], run(drawn_set, seed=1)[2]) # all of 176: no draw is left
    assert np.array_equal(run(drawn_set, channels=20, image_score="patches")[0], distances.max((1, 2)))


def test_a_trained_image_is_nearer_than_a_new_one(drawn_set):
    both = torch.cat([drawn_set.train.images[:2], drawn_set.test.images])
    known = run(SimpleNamespace(train=drawn_set.train, test=SimpleNamespace(images=both)), channels=50)[0]
    assert known[:2].max() < known[2:].min()
