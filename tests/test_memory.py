"""Room 7: each setting of the memory does what it says, against plain forms in double precision."""
import itertools
import logging
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional as nnf

from tocoad.data.images import BadInput
from tocoad.method import memory
from tocoad.method.coreset import coreset, radius
from tocoad.method.memory import (
    Memory,
    anomaly_maps,
    coreset_plain,
    image_scores,
    patch_features,
    score_paper,
    score_plain,
)


def seed(s): return torch.Generator().manual_seed(s)
def points(n, d, s=0): return torch.randn(n, d, generator=seed(s))


def is_greedy(X, picks, tol=3e-5):
    "In double precision: is each pick farthest from those before it, up to rounding, and are all distinct?"
    d = torch.cdist(X.double(), X[picks[:-1]].double()).cummin(1).values
    nxt = d.gather(0, picks[None, 1:])[0]
    return len(picks.unique()) == len(picks) and bool((nxt >= d.amax(0) * (1 - tol) - tol).all())


# patch features


def groups(v, dims):
    n = len(v)
    return torch.stack([v[i * n // dims:-(-(i + 1) * n // dims)].mean(0) for i in range(dims)])


def nine(m):
    "The nine places around each place (C, 9, h, w), zeros beyond the border"
    z = nnf.pad(m, (1, 1, 1, 1))
    return torch.stack([z[:, y:y + m.shape[1], x:x + m.shape[2]] for y, x in itertools.product(range(3), repeat=2)], 1)


def up(m, size): return nnf.interpolate(m[None], size=size, mode="bilinear", align_corners=False)[0]


def patches_by_hand(maps, kind, dims):
    "One image's patches (h*w, d), the layers' neighbourhoods first"
    size, maps = maps[0].shape[-2:], [m.double() for m in maps]
    if kind == "mean":
        f = torch.cat([up(nine(m).mean(1), size) for m in maps])
        return (f if dims is None else groups(f, dims)).flatten(1).T
    big = [groups(up(nine(m).flatten(0, 1), size), dims or 1024) for m in maps]
    return groups(torch.cat(big), dims or 1024).flatten(1).T


@pytest.mark.parametrize("kind,dims,d", [("mean", None, 21), ("mean", 8, 8),
                                         ("patchcore", None, 1024), ("patchcore", 16, 16)])
def test_patches_of_each_kind_and_width(kind, dims, d):
    "Three layers on grids that are not square and not multiples of each other"
    maps = [torch.randn(2, c, h, w, generator=seed(c)) for c, h, w in ((5, 6, 9), (7, 3, 5), (9, 2, 3))]
    P = patch_features(maps, dims, kind)
    assert P.shape == (2, 54, d) and P.dtype == torch.float32
    for i in range(2):
        by_hand = patches_by_hand([m[i] for m in maps], kind, dims)
        torch.testing.assert_close(P[i].double(), by_hand, rtol=1e-5, atol=1e-5)


def test_the_mean_forgets_where_in_the_neighbourhood_a_number_stood_and_patchcore_does_not():
    m = torch.zeros(2, 1, 5, 5)
    m[0, 0, 1, 1] = m[1, 0, 3, 2] = 9.
    mean, both = (patch_features([m], dims, kind)[:, 12] for kind, dims in (("mean", None), ("patchcore", 9)))
    assert torch.equal(mean[0], mean[1]) and not torch.equal(both[0], both[1])


def test_patch_features_may_be_a_function():
    assert patch_features([torch.ones(1, 2, 3, 3)], 5, lambda maps, dims: maps[0] * dims).unique() == 5


# the coreset, Eq. 7


@pytest.mark.parametrize("s", range(12))
def test_blocks_pick_what_the_plain_form_picks(s):
    N, d = (int(i) for i in torch.randint(60, 700, (2,), generator=seed(s)))
    d = 1 + d % 40
    X, n, block = points(N, d, s) * 3 + 5, N // 3, (None, 2, 9, 50)[s % 4]
    assert torch.equal(coreset(X, n=n, start=s, block=block), coreset_plain(X, n, s))


@pytest.mark.parametrize("s", range(6))
def test_among_copies_the_same_points_are_picked_and_each_copy_once(s):
    "Which of two equal points comes first is open, so the points are compared, not their places"
    X = points(80, 6, s)
    X = X.repeat(4, 1)[torch.randperm(320, generator=seed(s))]
    fast, slow = coreset(X, n=60, start=3, block=(None, 7)[s % 2]), coreset_plain(X, 60, 3)
    torch.testing.assert_close(X[fast], X[slow])
    for choice in (coreset(X, n=320, start=3), coreset_plain(X, 320, 3)):
        assert torch.equal(choice.sort().values, torch.arange(320)) and len(X[choice[:80]].unique(dim=0)) == 80


@pytest.mark.parametrize("X", [torch.cartesian_prod(*[torch.arange(5.)] * 4), torch.ones(50, 3), points(300, 12) + 1000,
                               points(200, 8) * 1e-4, points(100, 400), points(400, 1), points(150, 3).repeat(3, 1)],
                         ids=["lattice", "constant", "far away", "tiny", "wide", "a line", "copies"])
def test_every_choice_is_greedy(X):
    picks = coreset(X, .3, generator=seed(1))
    assert is_greedy(X - X.double().mean(0), picks) and len(picks) == int(.3 * len(X) + 1e-6)


def test_picks_are_those_of_before():
    "Whole numbers whose products are exact in float32: picks found by the package as it was before the rooms moved"
    Y = torch.randint(-300, 300, (400, 6), generator=seed(0)).float()
    X = torch.cat([Y, -Y])
    assert coreset(X, n=12, generator=seed(0)).tolist() == [44, 619, 646, 638, 246, 534, 521, 134, 780, 198, 719, 741]
    assert coreset(X, n=12, generator=seed(1)).tolist() == [645, 291, 192, 534, 621, 238, 134, 776, 348, 98, 228, 282]
    assert coreset(X, .1, generator=seed(0)).sum() == 31360


def test_size_start_and_seed():
    X = points(1000, 5)
    assert [len(coreset(X, r)) for r in (.1, .0329, 1e-9, 1.)] == [100, 32, 1, 1000]
    assert len(coreset(X, .5, n=7)) == 7 and len(coreset(X, n=5000)) == 1000
    assert len(coreset(points(100, 2), ratio=.29)) == 29 and int(100 * .29) == 28 # rounding does not cost a patch
    first, second = coreset(X, .2, generator=seed(1)), coreset(X, .2, generator=seed(2))
    assert torch.equal(first, coreset(X, .2, generator=seed(1))) and first[0] != second[0]
    assert torch.equal(first[:50], coreset(X, n=50, generator=seed(1)))       # fewer are the beginning of more
    assert coreset(X, n=9, start=[7, 3, 1])[:3].tolist() == [7, 3, 1]
    assert coreset(X, n=2, start=[7, 3, 1]).tolist() == [7, 3]
    assert is_greedy(X, coreset(X, n=40, start=17)) and coreset(X, n=40, start=17)[0] == 17


def patchcore_plain(X, n, dims, starts, generator):
    "PatchCore's approximate greedy choice as published, in double precision, from the same draws"
    start = torch.randperm(len(X), generator=generator)[:starts]
    Z = X.double() if dims is None else X.double() @ torch.randn(X.shape[1], dims, generator=generator).double()
    d, picks = torch.cdist(Z, Z[start]).mean(1), []
    for _ in range(n):
        picks.append(d.argmax().item())
        d = torch.minimum(d, (Z - Z[picks[-1]]).norm(dim=1))
    return picks, start


@pytest.mark.parametrize("s", range(4))
@pytest.mark.parametrize("dims,starts,block", [(128, 10, None), (None, 10, None), (8, 10, 20),
                                               (128, 2, 5), (None, 3, 3)])
def test_patchcore_s_projection_and_starts(s, dims, starts, block):
    X = points(600, 150, s) * torch.linspace(.1, 3, 150)
    picks = coreset(X, n=60, project=dims, starts=starts, generator=seed(s), block=block)
    assert picks.tolist() == patchcore_plain(X, 60, dims, starts, seed(s))[0]


def test_starts_are_not_stored_and_change_the_choice():
    X = points(500, 20)
    picks, start = coreset(X, n=25, starts=10, generator=seed(0)), patchcore_plain(X, 1, None, 10, seed(0))[1]
    assert picks[0] == torch.cdist(X.double(), X[start].double()).mean(1).argmax()
    assert not set(picks.tolist()) & set(start.tolist())
    assert not torch.equal(picks, coreset(X, n=25, generator=seed(0)))
    assert len(coreset(X[:6], n=6, starts=10, generator=seed(0)).unique()) == 6 # more starts than points: all of them


def test_projection():
    X = points(500, 60)
    assert not torch.equal(coreset(X, n=50, start=0), coreset(X, n=50, start=0, project=8, generator=seed(0)))
    same = coreset(X, n=50, start=0, project=60) # PatchCore maps only where the width differs
    assert torch.equal(coreset(X, n=50, start=0), same)
    solid = points(500, 3) @ points(3, 60)
    exact, one = (radius(solid, coreset(solid, n=100, start=0, project=p, generator=seed(0))) for p in (None, 1))
    assert exact < .9 * one                                                     # one number a patch says too little


@pytest.mark.parametrize("starts", (1, 10))
def test_log_tells_each_pass(starts):
    X, log = points(3000, 10), []
    picks = coreset(X, .1, generator=seed(0), starts=starts, log=log)
    counts, radii = [p["picks"] for p in log], [p["radius"] for p in log]
    assert counts == sorted(set(counts)) and counts[-1] == len(picks) == 300 and len(log) < 60
    assert radii == sorted(radii, reverse=True) and log[0]["block"] == int(4 * 3000**.5)
    if starts == 1:
        assert radii[-1] == pytest.approx(radius(X, picks[:-1]), rel=1e-5)


def test_radius_is_the_value_of_eq_7():
    X = points(400, 7) + 50
    for kept in ([3], [0, 399], range(0, 400, 7)):
        kept = list(kept)
        largest = torch.cdist(X.double(), X[kept].double()).amin(1).max().item()
        assert radius(X, kept) == pytest.approx(largest, rel=1e-5)
    assert radius(X, range(400)) == 0
    def cover(kept): return max(min(math.dist(m, X[n]) for n in kept) for m in X[:9].tolist())
    best = min(map(cover, itertools.combinations(range(9), 3)))
    assert all(radius(X[:9], coreset(X[:9], n=3, start=s)) <= 2 * best * (1 + 1e-5) for s in range(9))


@pytest.mark.parametrize("ratio", (10, 0))
def test_a_share_out_of_range_is_refused(ratio):
    with pytest.raises(BadInput, match=f"ratio is {ratio}: .* above 0 and at most 1"):
        coreset(points(40, 3), ratio)


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_features_that_are_no_numbers_are_refused(value):
    X = points(40, 3)
    X[7, 1] = value
    for f in (coreset, lambda X: radius(X, [0])):
        with pytest.raises(BadInput, match="NaN or infinite values"):
            f(X)


def test_too_little_memory_halves_the_chunks_and_changes_nothing(monkeypatch, caplog):
    X, product = points(2000, 12), torch.addmm
    whole = coreset(X, n=300, start=5)
    def cramped(*args, **kw):
        if len(args[1]) > 500:
            raise MemoryError
        return product(*args, **kw)
    monkeypatch.setattr(torch, "addmm", cramped)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(coreset(X, n=300, start=5), whole)
    said = [f"memory ran out: going on with {n} patches at a time" for n in ("1,000", "500")]
    assert [r.getMessage() for r in caplog.records] == said


# arithmetic


@pytest.fixture(params=("autocast", "medium", "high"))
def lowered(request):
    "A block in which products outside are less than float32"
    if request.param == "autocast":
        yield torch.autocast("cpu", torch.bfloat16)
    else:
        torch.set_float32_matmul_precision(request.param)
        yield torch.enable_grad()
        torch.set_float32_matmul_precision("highest")


def everything(X, Q):
    "All that room 7 computes by products"
    M = Memory(X.detach()[::3])
    s = score_paper(M, Q)
    picks = coreset(X, .3, start=0), coreset(X, .3, generator=seed(0), project=256, starts=4)
    maps = anomaly_maps(s, (5, 9), (224, 200))
    return *picks, torch.tensor(radius(X, range(300))), maps, image_scores(s), memory._product(M.bank)(Q[0], 3)


@pytest.fixture(scope="module")
def wide(): return points(700, 512) * 4 + 2, points(90, 512, 1).view(2, 45, 512) * 4 + 2


@pytest.fixture(scope="module")
def exact(wide): return everything(*wide)


def test_products_stay_float32_whatever_is_switched_on_outside(wide, exact, lowered):
    X, Q = wide
    with lowered:
        got = everything(X.clone().requires_grad_(), Q)
    for a, b in zip(exact, got, strict=True):
        assert a.dtype == b.dtype and not b.requires_grad and torch.equal(a, b)


def test_features_in_half_precision_are_compared_in_single():
    X = points(900, 20).bfloat16()
    assert torch.equal(coreset(X, .2, start=0), coreset(X.float(), .2, start=0))
    M = Memory(X[::9])
    assert M.bank.dtype == torch.float32 and M.search(X[:5].half())[0].dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_and_cpu_agree():
    X, Q = points(3000, 64), points(56, 64, 1).view(2, 28, 64)
    assert torch.equal(coreset(X.cuda(), .1, start=0).cpu(), coreset(X, .1, start=0))
    a, b = (score_paper(Memory(X[::10].to(d)), Q.to(d)) for d in ("cpu", "cuda"))
    for x, y in ((a, b), (anomaly_maps(a, (4, 7)), anomaly_maps(b, (4, 7)))):
        torch.testing.assert_close(x, y.cpu(), rtol=1e-4, atol=1e-4)


# search


def test_search_agrees_with_scikit_learn():
    bank, Q = points(400, 30) * 5 + 40, points(66, 30, 1).view(3, 22, 30) * 5 + 40
    d, idx = Memory(bank).search(Q, 7)
    reference = NearestNeighbors(n_neighbors=7, algorithm="brute").fit(bank.double().numpy())
    D, I = reference.kneighbors(Q.double().flatten(0, 1).numpy())
    np.testing.assert_allclose(d.flatten(0, 1), D, rtol=1e-5)
    assert (idx.flatten(0, 1).numpy() == I).all() and d.shape == idx.shape == (3, 22, 7)
    assert torch.equal(memory._product(bank)(Q[0], 7), idx[0])


def test_a_stored_patch_is_at_distance_zero_however_far_from_the_origin():
    M = Memory(points(300, 40) + 1e4)
    d, idx = M.search(M.bank)
    assert d.max() == 0 and torch.equal(idx[:, 0], torch.arange(300))
    assert M.search(M.bank[0])[0].shape == (1,) and M.search(M.bank[:5], k=10**6)[0].shape == (5, 300)
    with pytest.raises(BadInput, match="patches of 40 numbers and was asked for 39"):
        M.search(points(5, 39))


def test_neighbours_are_those_of_faiss():
    faiss = pytest.importorskip("faiss")
    bank, Q = points(5000, 152), points(300, 152)
    index = faiss.IndexFlatL2(152)
    index.add(bank.numpy())
    for k in (1, 9):
        D, I = index.search(Q.numpy(), k)
        d, idx = Memory(bank).search(Q, k)
        np.testing.assert_allclose(d.square(), D, rtol=1e-4)
        assert (idx.numpy() == I).mean() > .999


def test_memory_stores_the_patches_themselves():
    P = points(600, 16).view(6, 100, 16)
    M = Memory.fit(P, .25, generator=seed(0), project=4, starts=10)
    assert M.bank.shape == (150, 16) and torch.equal(M.bank, P.flatten(0, 1)[M.idx])
    assert repr(M) == "Memory(150 of 600 patches x 16)"
    assert torch.equal(M.bank, Memory.fit(P.flatten(0, 1), n=150, generator=seed(0), project=4, starts=10).bank)


def test_neighbours_begin_with_the_patch_itself_even_among_copies():
    M = Memory(points(200, 10))
    near, table = M.neighbours(9), torch.cdist(M.bank.double(), M.bank.double())
    assert torch.equal(near[:, 0], torch.arange(200)) and torch.equal(near, table.topk(9, largest=False).indices)
    copies = Memory(torch.ones(7, 3)).neighbours(3)
    assert copies[:, 0].tolist() == list(range(7)) and all(len(set(row)) == 3 for row in copies.tolist())
    assert M.neighbours(10**6).shape == (200, 200)


# scores, Eq. 8 and 9


def eq9(bank, p, b):
    "Eq. 9 as printed, in Python's double precision"
    E = [math.dist(p, c) for c in bank]
    star = E.index(min(E))
    near = sorted(range(len(bank)), key=lambda i: (math.dist(bank[star], bank[i]), i != star))[:b]
    return (1 - math.exp(E[star]) / sum(math.exp(E[i]) for i in near)) * E[star]


@pytest.mark.parametrize("b", (1, 2, 3, 9, 60, 1000))
@pytest.mark.parametrize("scale", (.1, 1., 30.))
def test_score_paper_is_eq_9(b, scale):
    bank, Q = points(60, 5) * scale, points(40, 5, 1).view(4, 10, 5) * scale * 1.5
    s = score_paper(Memory(bank), Q, b)
    by_hand = torch.tensor([eq9(bank.tolist(), p, b) for p in Q.flatten(0, 1).tolist()]).view(4, 10)
    torch.testing.assert_close(s, by_hand, rtol=1e-4, atol=2e-6 * scale)
    plain = score_plain(Memory(bank), Q)
    assert (s <= plain).all() and (s >= (1 - 1 / min(b, 60)) * plain * (1 - 1e-5)).all()


def test_limits_of_the_factor():
    "b patches equally far take 1/b of the score away; one alone among far ones nothing; a memory of one patch is none"
    corners = torch.eye(9) * 3
    assert score_paper(Memory(corners), torch.zeros(1, 9), 9).item() == pytest.approx(3 * (1 - 1 / 9), rel=1e-6)
    lonely = torch.cat([torch.zeros(1, 2), 500 + torch.rand(8, 2, generator=seed(0))])
    assert score_paper(Memory(lonely), torch.tensor([[3., 4.]])).item() == pytest.approx(5, rel=1e-6)
    with pytest.raises(BadInput, match="the memory holds one patch"):
        score_paper(Memory(torch.zeros(1, 2)), torch.tensor([[3., 4.]]))


def test_distances_too_large_for_the_exponential():
    bank = torch.tensor([[0.], [10.], [30.]])
    assert math.isinf(torch.tensor(2000.).exp())
    known = 2000 * (1 - math.exp(-30) / (1 + math.exp(-20) + math.exp(-30)))
    assert score_paper(Memory(bank), torch.tensor([[-2000.]]), 3).item() == pytest.approx(known, rel=1e-6)


@pytest.mark.parametrize("scorer", (score_plain, score_paper))
def test_scores_do_not_depend_on_the_order_of_the_bank_nor_on_where_zero_is(scorer):
    bank, Q = points(120, 6), points(30, 6, 1)
    s = scorer(Memory(bank), Q)
    torch.testing.assert_close(scorer(Memory(bank[torch.randperm(120, generator=seed(2))]), Q), s, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scorer(Memory(bank + 100), Q + 100), s, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(scorer(Memory(bank), Q.view(2, 3, 5, 6)), s.view(2, 3, 5))


# maps and image scores


@pytest.mark.parametrize("grid,size", [((5, 3), (40, 24)), ((4, 4), 32), ((3, 7), (9, 50)), ((8, 8), (8, 8))])
@pytest.mark.parametrize("sigma", (0, .5, 4., 11.))
def test_maps_are_up_sampling_and_scipy_s_filter(grid, size, sigma):
    S = 20 * torch.rand(3, math.prod(grid), generator=seed(0))
    whole = (size, size) if isinstance(size, int) else size
    big = nnf.interpolate(S.view(3, 1, *grid).double(), size=whole, mode="bilinear", align_corners=False)[:, 0].numpy()
    ref = np.stack([gaussian_filter(m, sigma, mode="reflect", truncate=4) for m in big]) if sigma else big
    maps = anomaly_maps(S, grid, size, sigma)
    assert maps.shape == (3, *whole) and maps.dtype == torch.float32
    np.testing.assert_allclose(maps, ref, rtol=1e-5, atol=1e-5)


def test_smoothing_lowers_peaks_and_keeps_constants():
    S = torch.ones(2, 784)
    S[1, 300] = 10
    flat, none, much = (anomaly_maps(S, (28, 28), sigma=s) for s in (4., 0, 8.))
    torch.testing.assert_close(flat[0], torch.ones(224, 224))
    assert none[1].max() > flat[1].max() > much[1].max() > 1
    y, x = divmod(flat[1].argmax().item(), 224)
    assert (y // 8, x // 8) == divmod(300, 28)


def test_image_score_of_the_patches_and_of_the_map_rank_differently():
    "One sharp patch beats a wide region by its largest patch, and loses to it in the smoothed map"
    S = torch.zeros(2, 28, 28)
    S[0, 14, 14] = 10
    S[1, 10:16, 10:16] = 8
    S = S.flatten(1)
    maps = anomaly_maps(S, (28, 28))
    patches, smooth = image_scores(S), image_scores(S, maps, "map")
    assert patches.tolist() == [10, 8] and smooth[0] < smooth[1] and torch.equal(smooth, maps.flatten(1).max(1).values)
