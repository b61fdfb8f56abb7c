"""FYD, our reading: what moves, what is compared and aligned, its stages as a system, what titles say of it."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from tocoad.data.errors import BadInput
from tocoad.data.load import load
from tocoad.method.contrast import sym_loss
from tocoad.method.guard import Diverged
from tocoad.paper.verdict import claims
from tocoad.run.compare import compare
from tocoad.run.config import config
from tocoad.run.store import Store
from tocoad.systems import fyd, padim
from tocoad.systems.system import SYSTEMS, departures


def settings(**changes):
    "What the stages are given: small and quick"
    small = dict(profile="test", backbone="tf_efficientnet_lite0", precision="fp32", resize=64, size=64, channels=40)
    return fyd.Settings(**small | dict(epochs=1, batch=4, lr_head=.3) | changes)


@pytest.fixture(scope="module")
def washer():
    "Few small images"
    data = load(None, "mini", "washer", size=64)
    return replace(data, train=data.train[:8], test=data.test[::7])


def learned(c, data):
    got = [fyd.fit(c, data, [], {}, "cpu", False)]
    return [*got, fyd.fit_gaussians(c, data, got, {}, "cpu", False)]


@pytest.fixture(scope="module")
def got(washer):
    return learned(settings(), washer)


def scored(c, data, got):
    return fyd.scores(c, data, got, {}, "cpu", False)[1]["patch_scores"]


def same(a, b):
    return all(np.array_equal(a[k], b[k]) for k in a)


MOVES = {"none": set(), "image": {"image"}, "maps": {"maps"}, "both": {"image", "maps"}}


@pytest.mark.parametrize("align", MOVES)
def test_what_moves(washer, align):
    "F's layers 1-3, every head, the aligners that are there; not layer 4, not F's statistics"
    S = fyd.whole(settings(align=align), "cpu")
    start = {k: v.clone() for k, v in S.state_dict().items()}
    fyd.train(S, washer.train.images, epochs=2, batch=4, lr_head=.3, size=64, progress=False)
    moved = {k for k, v in S.state_dict().items() if not torch.equal(v, start[k])}
    assert {k.removeprefix("heads.").split(".")[0] for k in moved} == {"F", "projectors", "predictors"} | MOVES[align]
    inside = {f"F.{n}" for n in S.F.below(3)}
    assert {k for k in moved if k.startswith("F.")} == inside
    assert not S.training and not any(p.requires_grad for p in S.parameters())


def test_rate_0_is_padim(washer):
    c = settings(lr=0., lr_head=0.)
    theirs = padim.Settings(**{k: getattr(c, k) for k in ("profile", "backbone", "resize", "size", "channels")})
    of_padim = [padim.fit(theirs, washer, [], {}, "cpu", False)]
    expected = padim.scores(theirs, washer, of_padim, {}, "cpu", False)[1]["patch_scores"]
    assert np.allclose(scored(replace(c, align="none"), washer, learned(replace(c, align="none"), washer)), expected,
                       rtol=1e-3)
    assert np.allclose(scored(c, washer, learned(c, washer)), expected, rtol=.05), "identity, but resampled"


def test_the_comparison_is_cs_with_images_for_views_and_places_for_images():
    torch.manual_seed(0)
    p, z = torch.randn(2, 4, 9, 6, requires_grad=True)
    ours = fyd.dense_loss(p, z)
    assert torch.allclose(ours, sym_loss([*p], [*z]), atol=1e-6)
    by_p, by_z = torch.autograd.grad(ours, (p, z), allow_unused=True)
    assert by_p.abs().sum() > 0 and by_z is None, "the stop-gradient"
    other = torch.roll(z.detach(), 1, 1)
    assert not torch.allclose(fyd.dense_loss(p, other), ours), "other places are other comparisons"


def test_a_known_turn_and_shift_are_undone():
    torch.manual_seed(0)
    x = torch.nn.functional.avg_pool2d(torch.rand(1, 1, 64, 64), 15, 1, 7)
    number = lambda v: torch.tensor([v])
    A = fyd.pose(number(.4), number(.05), number(.1), number(-.05))
    back = fyd.moved(fyd.moved(x, A), A.inverse())
    middle = slice(20, 44)
    off = lambda y: (y - x)[..., middle, middle].abs().mean()
    assert off(back) < .2 * off(fyd.moved(x, A))


def test_scores_lie_where_the_image_has_them(washer, got):
    "With an aligner that shifts all images, the map of distances is shifted back"
    values, state = got[0]
    far = {k: v.copy() for k, v in state.items()}
    far["image.usual"] = far["image.usual"] - np.array([0, 0, 9, 0], np.float32) # a tenth of the side to the right
    far["maps.look.6.weight"] = np.zeros_like(far["maps.look.6.weight"])
    far["maps.look.6.bias"] = far["maps.usual"] = np.zeros(4, np.float32)
    c = settings()
    (_, A), = fyd.look(fyd.learned(c, far, "cpu"), washer.test.images[:1], c, "cpu")
    assert A[0, 0, 2] > .19
    shifted = [(values, far), fyd.fit_gaussians(c, washer, [(values, far)], {}, "cpu", False)]
    dot = washer.test.images[:1].clone()
    dot[..., 28:36, 28:36] = torch.tensor([255, 0, 255], dtype=torch.uint8)[:, None, None]
    spotted = replace(washer, test=replace(washer.test, images=dot))
    clean = replace(washer, test=replace(washer.test, images=washer.test.images[:1]))
    more = scored(c, spotted, shifted)[0] - scored(c, clean, shifted)[0]
    at = np.unravel_index(more.argmax(), more.shape)
    assert max(abs(at[0] - 7.5), abs(at[1] - 7.5)) <= 1.5, "in the middle, where the dot is"


def test_poses_are_relative_to_the_batch_in_training_and_to_the_usual_one_afterwards():
    a = fyd.Aligner(3)
    torch.nn.init.normal_(a.look[-1].weight)
    x = torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        raw = a.look(x)
        turns = torch.atan2(a(x)[:, 1, 0], a(x)[:, 0, 0])
        assert torch.allclose(turns, ((raw - raw.mean(0)).tanh() * a.limits)[:, 0], atol=1e-5)
        alone = torch.cat([a.eval()(x[i:i + 1]) for i in range(5)])
        assert torch.allclose(alone, a(x), atol=1e-5), "no other image counts at test time"


def test_seeds(washer, got):
    before = torch.get_rng_state()
    again = learned(settings(), washer)
    assert torch.equal(before, torch.get_rng_state())
    assert all(same(a[1], b[1]) for a, b in zip(again, got, strict=True))
    assert not same(fyd.fit(settings(seed=1), washer, [], {}, "cpu", False)[1], got[0][1])


def test_a_score_depends_on_no_other_test_image(washer, got):
    every = scored(settings(), washer, got)
    alone = scored(settings(), replace(washer, test=washer.test[1:2]), got)
    assert np.allclose(alone[0], every[1], atol=1e-4) and every.shape[1:] == (16, 16)


def test_training_that_breaks_or_has_one_image_is_one_sentence(washer):
    with pytest.raises(Diverged):
        fyd.fit(settings(lr=1e30, epochs=3), washer, [], {}, "cpu", False)
    with pytest.raises(BadInput, match="one normal image and FYD compares images"):
        fyd.fit(settings(), replace(washer, train=washer.train[:1]), [], {}, "cpu", False)


def test_titles_say_what_it_is_and_no_verdict_rests_on_it():
    assert departures(SYSTEMS["fyd"].of(config("paper"), "fyd")) == "our reading, not a rerun"
    assert departures(SYSTEMS["fyd"].of(config("smoke"), "fyd")).startswith("our reading, not a rerun, epochs 5 (100)")
    assert not any("FYD" in c.text for c in claims()) and any("SPR" in c.text for c in claims())


def test_as_a_system(washer, tmp_path):
    c = config("smoke").replace(category="washer", size=64, resize=64)
    small = SYSTEMS["fyd"].of(c, "fyd", epochs=1, channels=40, batch=4)
    found = compare(c, [0], {"fyd": small}, washer, store=Store(tmp_path), progress=False)
    assert found.image["fyd"][0].shape == (len(washer.test),)
    assert found.departures["fyd"].startswith("our reading")
