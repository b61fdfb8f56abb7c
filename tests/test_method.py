"""The method as a whole: every variant trains, independent implementations agree, real images give known figures."""
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from fingerprint import state_hash
from sklearn.neighbors import NearestNeighbors

from tocoad.data.load import load
from tocoad.data.mini import write_mini
from tocoad.method import features
from tocoad.run import compare
from tocoad.run.config import config
from tocoad.systems import tocoad as tocoad_room


@pytest.fixture(scope="session")
def washer(tmp_path_factory):
    root = tmp_path_factory.mktemp("mini") / "set"
    write_mini(root, size=64, categories=("washer",))
    return load(root, "mvtec_ad", "washer", size=64, cache=False)


TINY = dict(resize=64, size=64, epochs1=1, epochs2=1, width=32, batch=8)


@pytest.mark.parametrize("change", [
    dict(generator="cutpaste"), dict(generator="nsa"), dict(layers=(4,)), dict(layers=(2, 3, 4)), dict(concat=True),
    dict(lam=.1, loss="ce"), dict(contrast="byol"), dict(bn1="train", bn2="train"), dict(bn2="views"),
    dict(predictor="mlp"), dict(pool=2, printed=True), dict(view_of="crop", freeze=1), dict(train_d=True),
    dict(gamma=1., alpha=.25, loss1="same"), dict(clean=.5, label="full"), dict(foreground=True, count=2),
    dict(colour=0., scale=.6)],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()))
def test_every_variant_trains_and_changes_f(washer, change):
    cfg = config("smoke", **TINY | change)
    F, log = tocoad_room.train(cfg, washer.train.images[:8], "two_stage", progress=False)
    start = features.Features()
    assert state_hash(F) != state_hash(start) and not F.training
    assert all(np.isfinite(v) for e in log["stage2"] for v in e.values()) and 0 <= log["discriminator_auroc"] <= 1


OF_D = [
    dict(loss1="ce"), dict(bn1="train"), dict(generator="nsa", label="full"), dict(clean=.9), dict(gamma=0.),
    dict(scales=(4, 5)), dict(threshold=.2), dict(beta=0.), dict(angle=0.), dict(fill=0), dict(rotate="none"),
    dict(seed=1), dict(generator="cutpaste", cutpaste="scar"), dict(generator="cutpaste", jitter=0.),
    dict(generator="nsa", gradients="mixed"), dict(foreground=True), dict(count=3)]
OF_F = [
    dict(loss="ce"), dict(view_of="crop"), dict(ema=.5, contrast="byol", epochs2=2), dict(pool=2), dict(printed=True),
    dict(train_d=True), dict(freeze=2), dict(bn2="train")]


@pytest.fixture(scope="module")
def washer96(washer):
    return replace(washer, train=load(None, "mini", "washer", size=96).train[:8])


def trained(cfg, data):
    "D after stage I and F after stage II"
    c = cfg.resolved()
    one = tocoad_room.stage1(c, data, [], {}, "cpu", False)
    return one[1], tocoad_room.stage2(c, data, [one], {}, "cpu", False)[1]


@pytest.fixture(scope="module")
def unchanged(washer96):
    "Settings without a change, and what they train; once each"
    @cache
    def unchanged(**shared):
        base = config("smoke", **TINY | dict(resize=96) | shared)
        return base, trained(base, washer96)
    return unchanged


@pytest.mark.parametrize("change,what", [(c, "D") for c in OF_D] + [(c, "F") for c in OF_F], ids=str)
def test_a_setting_reaches_what_it_names_and_nothing_before(washer96, unchanged, change, what):
    "Stage I's settings change D; stage II's leave D as it is and change F"
    shared = {k: change[k] for k in ("generator", "contrast", "epochs2") if k in change}
    base, (D, F) = unchanged(**shared)
    D_new, F_new = trained(base.replace(**change), washer96)
    same = lambda a, b: all(np.array_equal(a[k], b[k]) for k in a)
    assert same(D, D_new) == (what == "F") and not same(F, F_new)


def test_readers_settings_reach_the_images():
    cfg = config("smoke")
    plain, cast = (compare.load_at(*compare.at(c)) for c in (cfg, cfg.replace(mask="cast")))
    assert cast.test.masks.sum() < plain.test.masks.sum() and torch.equal(cast.test.images, plain.test.images)
    assert cast.fingerprint != plain.fingerprint


def test_the_image_score_may_be_the_maximum_of_the_map(washer):
    scores = np.random.default_rng(0).random((3, 8, 8)).astype(np.float32)
    cfgs = [config("smoke", **TINY | dict(image_score=k)) for k in ("patches", "map")]
    a, b = (tocoad_room.maps_of(dict(patch_scores=scores), c) for c in cfgs)
    assert np.array_equal(a[0], scores.max((1, 2))) and np.array_equal(b[0], b[1].max((1, 2)))
    assert np.array_equal(a[1], b[1])


def test_coreset_settings_reach_the_memory(washer):
    idx = {}
    for name, change in dict(plain={}, projected=dict(project=8), starts=dict(starts=5)).items():
        c = config("smoke", **TINY | change).resolved()
        idx[name] = tocoad_room.memory(c, washer, [], {}, "cpu", False)[1]["idx"].tolist()
    assert len({tuple(v) for v in idx.values()}) == 3 and len({len(v) for v in idx.values()}) == 1


@pytest.mark.parametrize("category,rotate,gradients", [("leather", "both", "mixed"), ("wood", "slight", "mixed"),
                                                       ("pill", "none", "source"), ("candle", "both", "source")])
def test_the_category_decides_where_the_settings_say_so(category, rotate, gradients):
    for profile in ("literal", "paper", "laptop"):
        c = config(profile, category=category).resolved()
        assert (c.rotate, c.gradients) == ("both" if profile == "literal" else rotate, gradients)
        assert tocoad_room.make_generator(c.replace(generator="nsa")).gradients == gradients
    G = tocoad_room.make_generator(config("laptop", category=category).resolved())
    assert G.rotate == rotate and G.label == "changed"
    assert tocoad_room.make_generator(config("literal", textures="embedded").resolved()).label == "full"


def test_bfloat16_changes_little_and_compilation_is_asked_for(washer, monkeypatch):
    cfg = config("smoke", **TINY)
    images = washer.train.images[:8]
    both = [tocoad_room.train(cfg.replace(precision=p), images, "two_stage", progress=False) for p in ("fp32", "bf16")]
    first = [[log[k][0][v] for k, v in (("stage1", "L_dis"), ("stage2", "L_neg"))] for _, log in both]
    np.testing.assert_allclose(*first, rtol=.05)
    assert first[0] != first[1] and all(p.dtype == torch.float32 for F, _ in both for p in F.parameters())
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: asked.append(type(self).__name__))
    tocoad_room.make_networks(cfg)
    tocoad_room.make_networks(cfg.replace(compile=True))
    assert asked == ["Features", "Discriminator"]


def test_too_little_memory_halves_the_batch_and_changes_nothing(washer, monkeypatch, caplog):
    cfg, F = config("smoke", **TINY), features.Features()
    whole, forward = tocoad_room.embed(F, washer.test.images, cfg), features.Features.forward
    def cramped(self, x):
        if len(x) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, x)
    monkeypatch.setattr(features.Features, "forward", cramped)
    torch.testing.assert_close(tocoad_room.embed(F, washer.test.images, cfg), whole, rtol=1e-4, atol=1e-4)
    assert [r.getMessage() for r in caplog.records][-1] == "memory ran out: going on with 4 images at a time"


def test_variants_with_the_same_seed_share_their_frozen_row(washer):
    one, other = (compare.compare(config("smoke", **TINY | c), methods=("frozen",), data=washer, progress=False)
                  for c in (dict(), dict(generator="nsa", lam=.9)))
    assert one.rows.equals(other.rows)


@pytest.mark.parametrize("scorer", ["plain", "paper"])
@pytest.mark.parametrize("patches,dims", [("mean", None), ("patchcore", 64)])
def test_scores(washer, scorer, patches, dims):
    cfg = config("smoke", **TINY | dict(scorer=scorer, patches=patches, dims=dims))
    image, maps = tocoad_room.score(features.Features(), washer, cfg)
    assert image.shape == (len(washer.test),) and maps.shape == (len(washer.test), 64, 64)
    assert np.isfinite(maps).all() and (image > 0).all()


def test_scores_agree_with_scikit_learn(washer):
    "The image score of a full memory is the largest nearest-neighbour distance that scikit-learn finds"
    cfg = config("smoke", **TINY | dict(coreset=1.))
    F = features.Features()
    image, _ = tocoad_room.score(F, washer, cfg)
    X, Q = (tocoad_room.embed(F, s.images, cfg).double().numpy() for s in (washer.train, washer.test)) # (N, P, d)
    search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(X.reshape(-1, X.shape[-1]))
    reference = search.kneighbors(Q.reshape(-1, Q.shape[-1]))[0]
    np.testing.assert_allclose(image, reference.reshape(Q.shape[:2]).max(1), rtol=1e-4)


def test_batch_size_does_not_change_scores(washer):
    cfg, F = config("smoke", **TINY), features.Features()
    a, b = (tocoad_room.embed(F, washer.test.images, cfg, batch=n) for n in (1, 32))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm,pixel", [("own", .978), pytest.param("imagenet", .982, marks=pytest.mark.slow)])
def test_bottle_frozen(real, norm, pixel):
    "Frozen EfficientNet-Lite0, plain scorer, 10 % memory, 256 cropped to 224"
    cfg = config("laptop", category="bottle", norm=norm)
    data = load(real / "mvtec_ad", "mvtec_ad", "bottle")
    assert (len(data.train), int((~data.test.labels).sum()), int(data.test.labels.sum())) == (209, 20, 63)
    F, _ = tocoad_room.train(cfg, data.train.images[:1], "frozen")
    m = tocoad_room.judge(data, *tocoad_room.score(F, data, cfg))
    assert m["image_auroc"] >= .999 and m["pixel_auroc"] >= pixel
