"""DeSTSeg: its parts against closed forms, scipy and torchvision, what moves when, its stages as a system."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from filled import picture
from scipy.spatial.distance import cosine
from torchvision.models import resnet18
from torchvision.ops import sigmoid_focal_loss

from tocoad.data.errors import BadInput
from tocoad.data.load import load
from tocoad.method.guard import Diverged
from tocoad.method.pretrain import stream
from tocoad.systems import destseg
from tocoad.systems.maps import extractor
from tocoad.systems.settings import Shared
from tocoad.systems.system import SYSTEMS, departures

LITE, R18 = (24, 40, 112, 320), (64, 128, 256, 512)


def settings(**changes):
    "What the stages are given: narrow, small, and quick"
    small = dict(profile="test", backbone="tf_efficientnet_lite0", precision="fp32", resize=64, size=64, width=1 / 16)
    return destseg.Settings(**small | dict(steps1=2, steps2=2, batch=4, rotate="both", textures="embedded") | changes)


@pytest.fixture(scope="module")
def washer():
    "Few small images"
    data = load(None, "mini", "washer", size=64)
    return replace(data, train=data.train[:10], test=data.test[::7])


@pytest.fixture(scope="module")
def student(washer):
    return destseg.fit_student(settings(), washer, [], {}, "cpu", False)


@pytest.fixture(scope="module")
def segment(washer, student):
    return destseg.fit_segment(settings(), washer, [student], {}, "cpu", False)


def scored(c, data, *got):
    return destseg.scores(c, data, got, {}, "cpu", False)[1]["p"]


def same(a, b):
    return all(np.array_equal(a[k], b[k]) for k in a)


def levels(start, n=2):
    return [picture(n, c, s, s, start=start + c) - .5 for c, s in ((5, 8), (6, 4), (7, 2))]


def test_distances_are_scipys_at_every_place():
    t, s = levels(0), levels(900)
    for a, b, D in zip(t, s, destseg.distances(destseg.products(t, s)), strict=True):
        for n, i, j in np.ndindex(D.shape):
            assert D[n, i, j].item() == pytest.approx(cosine(a[n, :, i, j], b[n, :, i, j]), abs=1e-5)


def test_products_know_directions_and_no_lengths():
    t, s = levels(0), levels(900)
    for X, Y in zip(destseg.products(t, s), destseg.products([3 * x for x in t], [.1 * x for x in s]), strict=True):
        torch.testing.assert_close(X, Y)
    assert all(D.abs().max() < 1e-5 for D in destseg.distances(destseg.products(t, t)))
    assert destseg.student_loss(destseg.products(t, [-x for x in t])).item() == pytest.approx(2 * 3 * 2, rel=1e-5)


def test_the_students_loss_is_a_sum_over_the_batch():
    t, s = levels(0), levels(900)
    one = [destseg.student_loss(destseg.products([x[i:i + 1] for x in t], [x[i:i + 1] for x in s])) for i in (0, 1)]
    whole = destseg.student_loss(destseg.products(t, s))
    torch.testing.assert_close(whole, sum(one))
    places = [D.mean() * len(D) for D in destseg.distances(destseg.products(t, s))] # levels weigh the same
    torch.testing.assert_close(whole, sum(places))


def test_full_size_counts_and_shapes_without_room_for_weights():
    "Those of the published networks; tests/test_systems.py runs narrow ones"
    millions = lambda m: sum(p.numel() for p in m.parameters()) / 1e6
    with torch.device("meta"):
        S, net = destseg.Student(R18), destseg.Segment(R18)
        maps = S(torch.empty(2, 3, 256, 256))
        z = net(maps)
    assert millions(S) == pytest.approx(24.7, abs=.05) and millions(net) == pytest.approx(7.7, abs=.05)
    assert millions(S.down) == pytest.approx(millions(resnet18()) - .513, abs=1e-3) # without the classifier
    assert [tuple(m.shape) for m in maps] == [(2, 64, 64, 64), (2, 128, 32, 32), (2, 256, 16, 16)]
    assert z.shape == (2, 64, 64) and net.blocks[0].conv1.in_channels == 448
    assert [far[0].dilation[0] for far in net.far] == [6, 12, 18]


@pytest.mark.parametrize("channels", [LITE, R18, (256, 512, 1024, 2048)], ids=["lite0", "resnet18", "wide"])
def test_any_teacher_has_a_student_whose_weights_all_have_gradients(channels):
    S, net = destseg.Student(channels, 1 / 8), destseg.Segment(channels, 1 / 8)
    maps = S(picture(2, 3, 64, 64))
    assert [(m.shape[1], 64 // m.shape[2]) for m in maps] == [*zip(channels, (4, 8, 16), strict=False)]
    X = destseg.products([picture(*m.shape, start=9) for m in maps], maps)
    (destseg.student_loss(X) + destseg.segment_loss(net(X), picture(2, 64, 64) > .5)).backward()
    for p in (*S.parameters(), *net.parameters()):
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any()


def test_every_weight_of_the_full_networks_has_a_gradient():
    S, net = destseg.Student(R18), destseg.Segment(R18)
    assert S.up[1][0].conv2.weight.std().item() == pytest.approx((2 / (9 * 256))**.5, rel=.05)
    assert {type(e) for e in S.ends} == {torch.nn.Identity}
    maps = S(picture(2, 3, 32, 32))
    X = destseg.products([picture(*m.shape) for m in maps], maps)
    destseg.segment_loss(net(X), picture(2, 32, 32) > .5).backward()
    for p in (*S.parameters(), *net.parameters()):
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any()


def test_the_segmentation_sees_every_level():
    net = destseg.Segment(LITE, 1 / 16).eval()
    X = [picture(1, c, 16 // k, 16 // k).requires_grad_() for c, k in zip(LITE, (1, 2, 4), strict=False)]
    net(X).sum().backward()
    assert all(x.grad.flatten(2).any(2).all() for x in X)


def test_the_segmentations_loss_is_torchvisions_focal_loss_and_the_mean_difference():
    z, y = 6 * picture(3, 8, 8) - 3, picture(3, 32, 32, start=7) > .5
    truth = (y.float().reshape(3, 8, 4, 8, 4).mean((2, 4)) >= .5).float()
    for gamma in (0., 2., 4.):
        want = sigmoid_focal_loss(z, truth, alpha=-1, gamma=gamma, reduction="mean")
        torch.testing.assert_close(destseg.segment_loss(z, y, gamma), want + (truth - z.sigmoid()).abs().mean())


def test_teacher_and_student_see_the_same_turned_image():
    c, I = settings(), .2 + .6 * picture(40, 3, 32, 32)
    turned, I_G, y = destseg.seen(I, destseg.generator(c), c, stream(0, "drawn"))
    assert torch.equal(turned[~y[:, None].expand_as(I)], I_G[~y[:, None].expand_as(I)])
    assert not torch.equal(turned, I) and y.flatten(1).any(1).float().mean() > .8
    still, _, _ = destseg.seen(I, destseg.generator(c), settings(rotate="none"), stream(0, "drawn"))
    assert torch.equal(still, I)


def test_steps_are_counted_and_an_incomplete_batch_is_left_out():
    seen, net = [], torch.nn.Linear(1, 1)

    def loss_of(I):
        seen.append(len(I))
        return net(I.mean()[None]).sum()

    images = torch.zeros(10, 3, 8, 8, dtype=torch.uint8)
    log = destseg.train(net, loss_of, torch.optim.SGD(net.parameters(), 0.), images, 7, batch=4, size=8, progress=False)
    assert seen == [4] * 7 and len(log) == 4 # two batches a walk, the last walk half
    seen.clear()
    destseg.train(net, loss_of, torch.optim.SGD(net.parameters(), 0.), images, 3, batch=32, size=8, progress=False)
    assert seen == [10] * 3 # fewer images than a batch


def test_each_stage_moves_its_own_network_alone(washer, monkeypatch):
    "And the segmentation's residual blocks at ten times the rate of the rest"
    c, seen = settings(), []
    F, G = extractor(c), destseg.generator(c)
    S, net = destseg.Student(F.channels, c.width), destseg.Segment(F.channels, c.width)
    plain = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *a, **k: seen.append(plain(*a, **k)) or seen[-1])
    state = lambda: [{k: v.clone() for k, v in m.state_dict().items()} for m in (F, S, net)]
    moved = lambda a, b: [[k for k in x if not torch.equal(x[k], y[k])] for x, y in zip(a, b, strict=True)]
    start = state()
    destseg.train_student(F, S, G, washer.train.images, c, progress=False)
    first = state()
    destseg.train_segment(F, S, net, G, washer.train.images, c, progress=False)
    assert [len(m) for m in moved(start, first)] == [0, len(S.state_dict()), 0]
    assert [len(m) for m in moved(first, state())] == [0, 0, len(net.state_dict())] # not even the student's batch norm
    student, segment = (o.param_groups for o in seen)
    assert {id(p) for g in student for p in g["params"]} == {id(p) for p in S.parameters()}
    assert [g["lr"] for g in (*student, *segment)] == [.4, .1, .01]
    assert {id(p) for p in segment[0]["params"]} == {id(p) for p in net.blocks.parameters()}
    assert sum(len(g["params"]) for g in segment) == len([*net.parameters()])
    assert {(g["momentum"], g["weight_decay"]) for g in (*student, *segment)} == {(.9, 1e-4)}


def test_the_image_score_is_the_mean_of_the_highest_pixels():
    maps = picture(3, 20, 20)
    for top in (1, 100, 1000):
        want = np.sort(maps.flatten(1).numpy())[:, -top:].mean(1)
        np.testing.assert_allclose(destseg.image_scores(maps, top), want, rtol=1e-5)


def test_the_last_stage_gives_probabilities_of_every_image_by_itself(washer, student, segment):
    c = settings()
    p = scored(c, washer, student, segment)
    assert p.shape == (len(washer.test), 16, 16) and p.dtype == np.float32 and 0 < p.min() < p.max() < 1
    few = scored(c, replace(washer, test=washer.test[[3, 1]]), student, segment)
    np.testing.assert_allclose(few, p[[3, 1]], rtol=1e-4, atol=1e-6)
    image, maps = destseg.maps_of(dict(p=p), settings(top=4096))
    assert maps.shape == (len(p), 64, 64) and image.dtype == maps.dtype == np.float32
    np.testing.assert_allclose(image, maps.mean((1, 2)), rtol=1e-5)


@pytest.mark.parametrize("change", [
    dict(lr1=.1), dict(batch=2), dict(momentum=0.), dict(decay=.1), dict(scales=(4, 5)), dict(threshold=.2),
    dict(beta=0.), dict(rotate="slight"), dict(angle=45.), dict(fill=0), dict(steps1=1)], ids=str)
def test_every_setting_reaches_the_student(washer, student, change):
    assert not same(student[1], destseg.fit_student(settings(**change), washer, [], {}, "cpu", False)[1])


@pytest.mark.parametrize("change", [
    dict(lr_blocks=.01), dict(lr_rest=.1), dict(gamma=0.), dict(momentum=0.), dict(rotate="none"), dict(beta=0.)],
                         ids=str)
def test_every_setting_reaches_the_segmentation(washer, student, segment, change):
    c = settings(**change)
    assert not same(segment[1], destseg.fit_segment(c, washer, [student], {}, "cpu", False)[1])


def test_a_loss_that_is_no_number_stops_with_a_sentence(washer):
    with pytest.raises(Diverged, match="try a smaller rate"):
        destseg.fit_student(settings(lr1=1e30, steps1=6), washer, [], {}, "cpu", False)


def test_settings_are_the_papers_and_refuse_what_cannot_work(washer):
    s = SYSTEMS["destseg"]
    c = s.of(destseg.Settings(), "destseg")
    assert departures(c) == "" and (c.steps1, c.steps2, c.batch, c.lr1, c.top) == (1000, 4000, 32, .4, 100)
    assert departures(s.of(Shared(), "destseg")) == "backbone wide_resnet50_2 (resnet18)" # another teacher is named
    smoke = departures(s.of(destseg.Settings(profile="smoke"), "destseg"))
    assert smoke.startswith("width 0.125 (1.0), steps1 ") and "textures embedded" in smoke
    for bad in (dict(scales=(3, 1)), dict(top=0), dict(width=0.), dict(steps1=0), dict(batch=1), dict(momentum=1.)):
        with pytest.raises(BadInput, match=next(iter(bad))):
            destseg.Settings(**bad)
    for stage, got in ((destseg.fit_student, []), (destseg.fit_segment, [({}, {})])):
        with pytest.raises(BadInput, match="textures=FOLDER"):
            stage(settings(textures=None), washer, got, {}, "cpu", False)
