"PatchCore: its image score against the literal formula and anomalib, and where it is the zero line."
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sklearn.neighbors import NearestNeighbors
from toys import noise

from tocoad.method.memory import Memory, patch_features, score_plain
from tocoad.run.config import config
from tocoad.systems import tocoad
from tocoad.systems.patchcore import Settings, image_score, maps_of, scores
from tocoad.systems.settings import shared
from tocoad.systems.system import SYSTEMS

REFERENCE = Path(__file__).parent / "reference" / "patchcore.safetensors"


def points(*shape, s=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(s))


def literal(bank, patches, b):
    "The formula in double precision"
    bank, patches = bank.double().numpy(), patches.double().numpy()
    d, idx = NearestNeighbors(n_neighbors=1).fit(bank).kneighbors(patches)
    worst = d[:, 0].argmax()
    s, star = d[worst, 0], idx[worst, 0]
    N_b = bank[np.linalg.norm(bank - bank[star], axis=1).argsort()[:b]]
    return (1 - math.exp(s) / sum(math.exp(np.linalg.norm(patches[worst] - m)) for m in N_b)) * s


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 40), st.integers(1, 12), st.integers(2, 12), st.integers(1, 6))
def test_the_score_is_the_formulas(m, p, b, d):
    bank, Q = points(m, d), points(3, p, d, s=1)
    M = Memory(bank)
    found = image_score(M, Q, score_plain(M, Q), b)
    np.testing.assert_allclose(found, [literal(bank, patches, b) for patches in Q], rtol=1e-4, atol=1e-6)


def test_one_neighbour_means_no_weight():
    M, Q = Memory(points(20, 3)), points(4, 9, 3, s=1)
    s = score_plain(M, Q)
    assert torch.equal(image_score(M, Q, s), s.amax(1))
    weighted = image_score(M, Q, s, 5)
    one = Memory(points(1, 3))
    assert torch.equal(image_score(one, Q, score_plain(one, Q), 9), score_plain(one, Q).amax(1)) # nothing to weigh with
    assert (.8 * s.amax(1) - 1e-6 <= weighted).all() and (weighted < s.amax(1)).all()


def test_large_distances_stay_finite(): # exp(89) is no single-precision number
    M, Q = Memory(100 * points(20, 3)), 1000 * points(4, 9, 3, s=1)
    assert image_score(M, Q, score_plain(M, Q), 9).isfinite().all()


def test_anomalibs_scores():
    r = load_file(REFERENCE)
    Q, M = patch_features([r["layer2"], r["layer3"]], None, "mean"), Memory(r["bank"])
    torch.testing.assert_close(Q.flatten(0, 1), r["embedding"], rtol=1e-5, atol=1e-5)
    s = score_plain(M, Q)
    torch.testing.assert_close(s, r["patch_scores"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(image_score(M, Q, s, 9), r["image"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(image_score(M, Q, s, 1), r["image"], rtol=1e-2)


@pytest.fixture(scope="module")
def drawn_set():
    images = lambda first, n: torch.from_numpy(np.stack([noise(first + k, 72) for k in range(n)])).permute(0, 3, 1, 2)
    return SimpleNamespace(train=SimpleNamespace(images=images(0, 7)), test=SimpleNamespace(images=images(50, 5)))


def given_of(stage, c): return SimpleNamespace(**{k: getattr(c, k) for k in SYSTEMS["patchcore"].stages[stage].fields})


def setting(**changes):
    base = dict(backbone="tf_efficientnet_lite0", precision="fp32", resize=72, size=64, dims=64)
    return Settings(**base | changes)


def run(data, **changes):
    "Image scores, maps and arrays, each stage with the settings that it names and no others"
    c = setting(**changes)
    bank = tocoad.memory(given_of("memory", c), data, [], {}, "cpu", False)
    found = scores(given_of("patchcore_scores", c), data, [bank], {}, "cpu", False)[1]
    return *maps_of(found, c), found | bank[1]


def test_stages(drawn_set):
    image, maps, arrays = run(drawn_set)
    assert (image.shape, maps.shape, arrays["patch_scores"].shape) == ((5,), (5, 64, 64), (5, 8, 8))
    assert len(arrays["bank"]) == int(.1 * 7 * 64) and image.dtype == maps.dtype == np.float32
    again, other = run(drawn_set), run(drawn_set, seed=1)
    assert np.array_equal(again[0], image) and np.array_equal(again[1], maps)
    assert not np.array_equal(other[2]["idx"], arrays["idx"])
    weighted = run(drawn_set, b=9)
    assert np.array_equal(weighted[1], maps) and (weighted[0] < image).all() # the weight is the image's alone


def test_with_the_zero_lines_settings_it_is_the_zero_line(drawn_set):
    cfg = config("smoke", method="frozen").replace(resize=72, size=64)
    same = ("patches", "dims", "coreset", "project", "starts", "sigma")
    c = Settings(**shared(cfg), **{k: getattr(cfg, k) for k in same})
    bank = tocoad.memory(cfg, drawn_set, [], {}, "cpu", False)
    zero = tocoad.maps_of(tocoad.scores(cfg, drawn_set, [bank], {}, "cpu", False)[1], cfg)
    ours = maps_of(scores(c, drawn_set, [bank], {}, "cpu", False)[1], c)
    assert all(np.array_equal(a, b) for a, b in zip(zero, ours, strict=True))


def test_only_the_choice_of_the_memory_parts_them_in_profile_paper():
    paper, ours = config("paper"), Settings()
    fields = "patches", "dims", "coreset", "project", "starts", "sigma"
    assert [k for k in fields if getattr(paper, k) != getattr(ours, k)] == ["project", "starts"]
    assert SYSTEMS["patchcore"].stages["memory"] is SYSTEMS["frozen"].stages["memory"]
