"""VT-ADL: its parts against closed forms and against torch's own, its stages as a system."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from filled import picture
from kornia.metrics import ssim
from scipy.ndimage import gaussian_filter
from scipy.stats import multivariate_normal
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from tocoad.data.errors import BadInput
from tocoad.data.load import load
from tocoad.method.guard import Diverged
from tocoad.method.pretrain import stream
from tocoad.systems import vtadl
from tocoad.systems.settings import Shared
from tocoad.systems.system import SYSTEMS, departures


def settings(**changes):
    "What the stages are given: narrow, small, and quick"
    small = dict(profile="test", precision="fp32", resize=64, size=64, width=1 / 8, depth=1, components=3)
    return vtadl.Settings(**small | dict(epochs=2, batch=4, lr=1e-3) | changes)


@pytest.fixture(scope="module")
def washer():
    "Few small images"
    data = load(None, "mini", "washer", size=64)
    return replace(data, train=data.train[:10], test=data.test[::7])


@pytest.fixture(scope="module")
def fitted(washer):
    return vtadl.fit(settings(), washer, [], {}, "cpu", False)


def scored(c, data, fitted):
    return vtadl.scores(c, data, [fitted], {}, "cpu", False)[1]


def same(a, b):
    return all(np.array_equal(a[k], b[k]) for k in a)


def mixture(n=4, d=3, k=5):
    "Numbers, logarithms of weights, means, logarithms of variances"
    log_pi = (picture(n, k, start=5) + .1).log().log_softmax(1)
    return picture(n, d) * 4 - 2, log_pi, picture(n, k, d, start=9) * 4 - 2, picture(n, k, d)


def test_the_mixtures_density_is_torchs_and_scipys():
    x, log_pi, mu, log_var = mixture()
    gaussians = Independent(Normal(mu, (log_var / 2).exp()), 1)
    want = -MixtureSameFamily(Categorical(logits=log_pi), gaussians).log_prob(x)
    found = vtadl.surprise(x, log_pi, mu, log_var, "mixture")
    torch.testing.assert_close(found, want)
    densities = [sum(math.exp(p) * multivariate_normal.pdf(a, m, np.diag(np.exp(s))) for p, m, s in
                     zip(lp, ms, ss, strict=True)) for a, lp, ms, ss in
                 zip(x.numpy(), log_pi, mu.numpy(), log_var.numpy(), strict=True)]
    np.testing.assert_allclose(found, -np.log(densities), rtol=1e-5)


def test_the_weighted_surprise_is_an_upper_bound_that_one_gaussian_reaches():
    x, log_pi, mu, log_var = mixture()
    each = Independent(Normal(mu, (log_var / 2).exp()), 1).log_prob(x[:, None])
    weighted, proper = (vtadl.surprise(x, log_pi, mu, log_var, d) for d in ("weighted", "mixture"))
    torch.testing.assert_close(weighted, -(log_pi.exp() * each).sum(1))
    assert (weighted > proper).all()
    one = [m[:, :1] for m in (mu, log_var)]
    alone = [vtadl.surprise(x, torch.zeros(4, 1), *one, d) for d in ("weighted", "mixture")]
    torch.testing.assert_close(*alone)


def test_a_mixture_of_many_numbers_does_not_underflow():
    x, log_pi = torch.full((1, 512), 9.), torch.tensor([[.5, .5]]).log()
    found = vtadl.surprise(x, log_pi, torch.zeros(1, 2, 512), torch.zeros(1, 2, 512), "mixture")
    assert found.item() == pytest.approx(512 * (81 + math.log(2 * math.pi)) / 2, rel=1e-6)


def test_weights_sum_to_one_and_no_variance_is_below_one():
    net = vtadl.Densities(16, 4)
    log_pi, mu, log_var = net(10 * torch.randn(2, 5, 16, generator=stream(0, "codes")))
    assert mu.shape == log_var.shape == (2, 5, 4, 16)
    torch.testing.assert_close(log_pi.exp().sum(-1), torch.ones(2, 5))
    assert (log_var > 0).all()
    below = -torch.ones(1, 1, 16) # codes are read where they are positive
    assert all(torch.equal(a, b) for a, b in zip(net(below), net(3 * below), strict=True))


def test_a_layer_is_torchs_own_with_another_divisor():
    layer, own = vtadl.Layer(64), nn.TransformerEncoderLayer(64, 8, 128, 0., "gelu", batch_first=True, norm_first=True)
    theirs = own.eval().state_dict()
    renamed = {"ask.weight": "self_attn.in_proj_weight", "out": "self_attn.out_proj", "think.0": "linear1",
               "think.2": "linear2"}
    with torch.no_grad():
        own.self_attn.in_proj_bias.zero_()
        for name, p in layer.named_parameters():
            key = next((name.replace(a, b) for a, b in renamed.items() if name.startswith(a)), name)
            p.copy_(theirs[key])
        x = picture(2, 7, 64) - .5
        assert not torch.allclose(layer(x), own(x), atol=1e-5)
        own.self_attn.in_proj_weight[:64] *= (8 / 64)**.5
        torch.testing.assert_close(layer(x), own(x), rtol=1e-4, atol=1e-5)


def test_tokens_are_patches_row_by_row():
    encode = vtadl.Encoder(32, 4, 64, 0)
    with torch.no_grad():
        encode.place.zero_()
        image = torch.zeros(1, 3, 32, 32)
        image[..., 8:16, 16:24] = 1 # the second row's third patch
        moved = (encode(image) - encode(torch.zeros_like(image))).abs().sum(2)[0]
    assert moved.nonzero().flatten().tolist() == [6]


def test_routing_to_one_capsule_is_a_sum():
    "Three rounds as they are written, against the linear layer and its squash"
    decode, codes = vtadl.Decoder(64, 2, 64), picture(3, 4, 64)
    W = decode.vote.weight.unflatten(1, (32, 8)) # output, capsules, numbers of a capsule
    votes = torch.einsum("oij,bij->bio", W, codes.reshape(3, 32, 8))[:, None] # one output capsule
    b = torch.zeros(3, 1, 32)
    for _ in range(3):
        s = (b.softmax(1)[..., None] * votes).sum(2)
        n2 = s.square().sum(-1, keepdim=True)
        v = n2 * s / ((1 + n2) * n2.sqrt())
        b = b + (v[:, :, None] * votes).sum(-1)
    torch.testing.assert_close(vtadl.squash(decode.vote(codes.flatten(1))), v[:, 0])
    assert (v.norm(dim=-1) < 1).all()


def test_full_size_counts_and_shapes_without_room_for_weights():
    "The counts of the authors' networks; 5.248 million of the densities were written down as 5.2"
    millions = lambda m: sum(p.numel() for p in m.parameters()) / 1e6
    with torch.device("meta"):
        net = vtadl.VTADL(vtadl.Settings())
        codes, rebuilt, (log_pi, mu, log_var) = net(torch.empty(2, 3, 512, 512))
    assert millions(net.encode) == pytest.approx(18.9, abs=.05)
    assert millions(net.densities) == pytest.approx(5.2, abs=.05)
    assert net.decode.vote.weight.numel() == 4096 * 512 * 8 and millions(net.decode) == pytest.approx(16.9, abs=.05)
    assert codes.shape == (2, 64, 512) and rebuilt.shape == (2, 3, 512, 512)
    assert log_pi.shape == (2, 64, 10) and mu.shape == log_var.shape == (2, 64, 10, 512)


@pytest.mark.parametrize("change", [dict(width=1., depth=6, components=10), dict(size=96, resize=96, tokens=6),
                                    dict(density="mixture")], ids=str)
def test_every_weight_has_a_gradient(change):
    c = settings(**change)
    net = vtadl.make(c, "cpu")
    vtadl.loss_of(net, picture(2, 3, c.size, c.size), c, stream(0, "noise")).sum().backward()
    for p in net.parameters():
        assert p.grad is not None and p.grad.isfinite().all() and (p.ndim == 1 or p.grad.any())


def test_the_repair_loss_is_the_square_and_kornias_similarity():
    a, b = picture(3, 3, 32, 32), picture(3, 3, 32, 32, start=999)
    similar = ssim(a, b, 11).mean((1, 2, 3))
    want = 5 * (a - b).square().mean((1, 2, 3)) - .5 * similar
    torch.testing.assert_close(vtadl.repair_loss(a, b), want)
    torch.testing.assert_close(vtadl.repair_loss(b, b, 1., 1.), -torch.ones(3)) # the least that it can be


def test_noise_is_added_in_training_alone(washer, fitted):
    c, I = settings(), picture(2, 3, 64, 64)
    net = vtadl.make(c, "cpu").eval()
    with torch.no_grad():
        one, two = (vtadl.loss_of(net, I, c, stream(0, name)) for name in "ab")
        still = [vtadl.loss_of(net, I, settings(noise=0.), stream(0, name)) for name in "ab"]
    assert not torch.equal(one, two) and torch.equal(*still)
    assert same(scored(c, washer, fitted), scored(settings(noise=9.), washer, fitted))


def test_the_epoch_with_the_lowest_loss_stays(washer, monkeypatch):
    "A late rise does not spoil the result"
    c, seen, plain = settings(epochs=3), [], vtadl.loss_of

    def loss_of(net, I, c, drawn):
        seen.append(net)
        factor = -1. if len(seen) > 6 else 1. # three batches an epoch; the third epoch climbs
        return factor * plain(net, I, c, drawn) + (1e9 if factor < 0 else 0.)

    monkeypatch.setattr(vtadl, "loss_of", loss_of)
    spoilt = vtadl.fit(c, washer, [], {}, "cpu", False)
    monkeypatch.setattr(vtadl, "loss_of", plain)
    assert same(spoilt[1], vtadl.fit(settings(epochs=2), washer, [], {}, "cpu", False)[1])
    assert len(spoilt[0]["log"]) == 3


def test_the_last_stage_scores_every_image_by_itself(washer, fitted):
    c = settings()
    found = scored(c, washer, fitted)
    assert found["surprise"].shape == (len(washer.test), 8, 8) and found["unlike"].shape == (len(washer.test),)
    few = scored(c, replace(washer, test=washer.test[[3, 1]]), fitted)
    for k, v in few.items():
        np.testing.assert_allclose(v, found[k][[3, 1]], rtol=1e-4, atol=1e-4)
    image, maps = vtadl.maps_of(found, c)
    assert maps.shape == (len(image), 64, 64) and image.dtype == maps.dtype == np.float32
    np.testing.assert_allclose(image, found["surprise"].max((1, 2)) + found["unlike"], rtol=1e-6)
    sharp = vtadl.maps_of(found, settings(sigma=0.))[1]
    corners = np.s_[:, [0, 0, -1, -1], [0, -1, 0, -1]] # lie upon corners
    np.testing.assert_allclose(sharp[corners], found["surprise"][corners], rtol=1e-5)
    np.testing.assert_allclose(maps[0], gaussian_filter(sharp[0].astype(float), 4., mode="reflect"), rtol=1e-3)


@pytest.mark.parametrize("change", [
    dict(lr=1e-4), dict(batch=2), dict(decay=.1), dict(noise=0.), dict(density="mixture"), dict(components=2),
    dict(tokens=4), dict(depth=2), dict(width=1 / 4), dict(epochs=1)], ids=str)
def test_every_setting_reaches_the_training(washer, fitted, change):
    other = vtadl.fit(settings(**change), washer, [], {}, "cpu", False)[1]
    assert other.keys() != fitted[1].keys() or not all(np.array_equal(other[k], v) for k, v in fitted[1].items())


def test_a_loss_that_is_no_number_stops_with_a_sentence(washer):
    with pytest.raises(Diverged, match="try a smaller rate"):
        vtadl.fit(settings(lr=1e30, epochs=4), washer, [], {}, "cpu", False)


def test_settings_are_the_authors_and_refuse_what_cannot_work():
    s = SYSTEMS["vtadl"]
    c = s.of(vtadl.Settings(), "vtadl")
    assert departures(c) == "" and (c.size, c.epochs, c.lr, c.batch, c.components) == (512, 400, 1e-4, 8, 10)
    assert departures(s.of(Shared(), "vtadl")) == "resize 256 (550), size 224 (512)"
    smoke = departures(s.of(Shared(profile="smoke", resize=144, size=128), "vtadl"))
    assert smoke.startswith("resize 144 (550), size 128 (512), width 0.125 (1.0), ")
    for bad in (dict(tokens=7), dict(width=0.), dict(depth=0), dict(components=0), dict(density="log"), dict(batch=1)):
        with pytest.raises(BadInput, match=next(iter(bad))):
            vtadl.Settings(**bad)


def test_it_never_sees_imagenet():
    assert not {"backbone", "weights", "norm"} & {f for s in SYSTEMS["vtadl"].stages.values() for f in s.fields}
