"""PyramidFlow: pyramid, flow and loss against closed forms and autograd, its template, its stages as a system."""
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tocoad.data.errors import BadInput
from tocoad.data.load import load
from tocoad.method.guard import Diverged
from tocoad.method.pretrain import stream
from tocoad.systems import pyramidflow as pf
from tocoad.systems.pyramid import Flow, Mix, VolumeNorm, blur, compose, decompose
from tocoad.systems.system import SYSTEMS, departures


def settings(**changes):
    "What the stages are given: a small encoder, few and small steps"
    small = dict(profile="test", category="washer", precision="fp32", backbone="tf_efficientnet_lite0", encoder="F",
                 resize=64, size=64, kernel=3, stacks=1, epochs=2)
    return pf.Settings(**small | changes).resolved()


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=stream(seed, "drawn"), dtype=torch.float64)


def restless(channels=2, side=16, **changes):
    "A flow in double precision whose networks say something, as a trained one's"
    c = SimpleNamespace(**dict(levels=4, stacks=2, kernel=3, volume="channels") | changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = Flow(c, channels, side).double()
        for step in flow:
            nn.init.normal_(step.net[-1].weight, 0., .2)
            nn.init.normal_(step.mix.log, 0., .5)
            nn.init.normal_(step.norm.mean, 0., .2)
    return flow


@pytest.fixture(scope="module")
def washer():
    "Few small images"
    data = load(None, "mini", "washer", size=64)
    return replace(data, train=data.train[:7], test=data.test[::7])


@pytest.fixture(scope="module")
def fitted(washer):
    return pf.fit(settings(), washer, [], {}, "cpu", False)


def scored(c, data, fitted):
    arrays = pf.scores(c, data, [fitted], {}, "cpu", False)[1]
    return pf.maps_of(arrays, c)


def same(a, b):
    return all(np.array_equal(a[k], b[k]) for k in a)


def test_full_size_counts_and_operations_without_room_for_weights():
    "22.6 million weights, and 960 GFLOP of flow and encoder on an image of 1024"
    c = pf.Settings(category="tile", size=1024, resize=1024).resolved()
    with torch.device("meta"), FlopCounterMode(display=False) as flops:
        encoder = pf.Encoder(c)
        flow = Flow(c, encoder.channels, 256)
        latent, _ = flow(decompose(encoder(torch.empty(1, 3, 1024, 1024)), c.levels))
    assert sum(p.numel() for p in flow.parameters()) / 1e6 == pytest.approx(22.6, abs=.05)
    assert flops.get_total_flops() / 1e9 == pytest.approx(960, rel=.03)
    assert [tuple(z.shape) for z in latent] == [(1, 64, 256 >> k, 256 >> k) for k in range(4)]


def test_every_weight_of_the_full_flow_has_a_gradient():
    c = pf.Settings(category="tile").resolved()
    flow = Flow(c, 64, 8)
    for step in flow:
        nn.init.normal_(step.net[-1].weight, 0., .01)
    pf.loss_of(flow(decompose(drawn(2, 64, 8, 8).float(), 4))[0]).backward()
    used = {name: p.grad for name, p in flow.named_parameters()}
    assert all(g is not None and g.isfinite().all() and g.any() for g in used.values())


@pytest.mark.parametrize("shape,levels", [((1, 1, 8, 8), 1), ((2, 3, 16, 24), 4), ((1, 2, 7, 9), 3)])
def test_a_composed_pyramid_is_the_map(shape, levels):
    x = drawn(*shape)
    pyramid = decompose(x, levels)
    assert len(pyramid) == levels
    torch.testing.assert_close(compose(pyramid), x)


def test_the_blur_is_scipys():
    w = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
    x = drawn(1, 2, 9, 12)
    want = np.stack([convolve(m, w, mode="constant") for m in x[0].numpy()])
    np.testing.assert_allclose(blur(x)[0], want, atol=1e-12)


@pytest.mark.parametrize("levels", [2, 3, 4, 5])
@pytest.mark.parametrize("volume", ["channels", "space"])
def test_a_flow_is_undone(levels, volume):
    flow, pyramid = restless(levels=levels, volume=volume).eval(), decompose(drawn(3, 2, 16, 16), levels)
    latent, _ = flow(pyramid)
    assert all(not torch.allclose(z, d) for z, d in zip(latent, pyramid, strict=True)) # every level is moved
    for back, d in zip(flow.inverse(latent), pyramid, strict=True):
        torch.testing.assert_close(back, d, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("volume", ["channels", "space"])
@pytest.mark.parametrize("training", [True, False])
def test_the_stretch_is_the_determinant_of_autograds_jacobian(volume, training):
    flow, sizes = restless(2, 4, levels=3, volume=volume).train(training), (32, 8, 2)
    split = lambda v: [m.view(1, 2, s, s) for m, s in zip(v.split(sizes), (4, 2, 1), strict=True)]
    through = lambda v: torch.cat([z.flatten() for z in flow(split(v))[0]])
    flat = drawn(42)
    J = torch.autograd.functional.jacobian(through, flat)
    said = flow(split(flat))[1].item()
    assert torch.linalg.slogdet(J).logabsdet.item() == pytest.approx(said, abs=1e-8)
    assert (abs(said) < 1e-9) == (training and volume == "channels") # thinned means over places are not 0


def test_a_batchs_volume_is_kept_in_training():
    _, stretch = restless().train()(decompose(drawn(3, 2, 16, 16), 4))
    assert abs(stretch.sum().item()) < 1e-9 and stretch.abs().max() > 1e-3


@pytest.mark.parametrize("over,dims", [("channels", (0, 1)), ("space", (0, 2, 3))])
def test_the_running_mean_is_what_batches_had(over, dims):
    norm, want = VolumeNorm(over, 3, 4), 0.
    for k in range(4):
        a = drawn(2, 3, 4, 4, seed=k).float()
        torch.testing.assert_close(norm(a), a - a.mean(dims, keepdim=True))
        want = .9 * want + .1 * a.mean(dims, keepdim=True)
    torch.testing.assert_close(norm.eval()(a), a - want)
    assert torch.equal(norm.mean, norm.mean.clone()) and norm.mean.shape == want.shape


def test_a_fresh_mix_is_a_rotation_and_any_keeps_the_volume():
    mix = Mix(5).double()
    torch.testing.assert_close(mix.weight() @ mix.weight().T, torch.eye(5, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    for p in mix.parameters():
        nn.init.normal_(p)
    assert torch.linalg.det(mix.weight()).abs().item() == pytest.approx(1, rel=1e-5)


def test_the_loss_is_the_mean_over_pairs_of_numpys_fourier_transform():
    latent = decompose(drawn(4, 3, 8, 16), 3)
    want = [np.abs(np.fft.fft2(compose([(z[i] - z[j])[None]**2 for z in latent])[0].mean(0).numpy())).mean()
            for i, j in combinations(range(4), 2)]
    assert pf.loss_of(latent).item() == pytest.approx(np.mean(want))


def test_the_template_is_the_mean_latent_of_the_training_images(washer, fitted):
    "In whichever order, in whichever batches, and of nothing else"
    c, arrays = settings(), fitted[1]
    encoder, images = pf.encoder_of(c), washer.train.images
    flow = pf.make(c, encoder).eval()
    flow.load_state_dict({k[5:]: torch.from_numpy(v) for k, v in arrays.items() if k.startswith("flow.")})
    for k in range(c.levels):
        alone = [next(pf.latents(flow, encoder, one, c))[k] for one in images.flip(0).split(1)]
        np.testing.assert_allclose(arrays[f"template.{k}"], torch.cat(alone).mean(0, keepdim=True), atol=2e-4)
    other = replace(washer, test=washer.test[:1])
    assert same(arrays, pf.fit(c, other, [], {}, "cpu", False)[1])


def test_the_encoder_is_never_trained(fitted):
    encoder = pf.encoder_of(settings()).state_dict()
    assert all(np.array_equal(fitted[1][f"encoder.{k}"], v) for k, v in encoder.items())


def test_pairs_of_every_epoch_are_others_and_a_single_one_is_left(washer, monkeypatch):
    seen, real = [], pf.step
    def watched(flow, pyramid, *rest):
        seen.append(compose(pyramid))
        return real(flow, pyramid, *rest)
    monkeypatch.setattr(pf, "step", watched)
    pf.fit(settings(), washer, [], {}, "cpu", False)
    assert len(seen) == 2 * 3 and {len(s) for s in seen} == {2}
    assert not torch.allclose(torch.cat(seen[:3]), torch.cat(seen[3:]))


def test_the_last_stage_gives_a_score_and_a_map_of_every_image(washer, fitted):
    image, maps = scored(settings(), washer, fitted)
    assert maps.shape == (len(washer.test), 64, 64) and image.shape == (len(washer.test),)
    assert image.dtype == maps.dtype == np.float32 and maps.min() >= 0
    np.testing.assert_array_equal(image, maps.max((1, 2)))


@pytest.mark.parametrize("encoder,channels,side", [("F", 24, 16), ("colours", 5, 64), ("resnet18", 64, 16)])
def test_every_encoder_runs(washer, encoder, channels, side):
    c = settings(encoder=encoder, channels=5, weights="random", epochs=1)
    arrays = pf.fit(c, replace(washer, train=washer.train[:2]), [], {}, "cpu", False)[1]
    assert arrays["template.0"].shape == (1, channels, side, side)


@pytest.mark.parametrize("change", [
    dict(lr=1e-2), dict(batch=3), dict(decay=.5), dict(clip=1e-6), dict(kernel=5), dict(stacks=2), dict(levels=2),
    dict(volume="space"), dict(turns="yes"), dict(encoder="colours"), dict(seed=1)], ids=str)
def test_every_setting_reaches_the_training(washer, fitted, change):
    found = pf.fit(settings(**change), washer, [], {}, "cpu", False)[1]
    assert found.keys() != fitted[1].keys() or not same(fitted[1], found)


def test_a_loss_that_is_no_number_stops_with_a_sentence(washer):
    with pytest.raises(Diverged, match="try a smaller rate"):
        pf.fit(settings(lr=1e30, epochs=4), washer, [], {}, "cpu", False)


def test_one_image_has_no_pair(washer):
    with pytest.raises(BadInput, match="give at least 2"):
        pf.fit(settings(), replace(washer, train=washer.train[:1]), [], {}, "cpu", False)


def test_settings_are_the_authors_and_refuse_what_cannot_work():
    paper = SYSTEMS["pyramidflow"].of(pf.Settings(), "pyramidflow")
    assert departures(paper) == "" and (paper.epochs, paper.lr, paper.batch, paper.kernel) == (15, 2e-4, 2, 7)
    smoke = departures(SYSTEMS["pyramidflow"].of(pf.Settings(profile="smoke", size=64), "pyramidflow"))
    assert smoke.startswith("encoder F (resnet18)") and "kernel 3 (7)" in smoke
    for bad in (dict(levels=5), dict(levels=1), dict(batch=1), dict(kernel=4), dict(encoder="vgg"), dict(volume="no")):
        with pytest.raises(BadInput, match=next(iter(bad))):
            pf.Settings(**bad)


def test_the_forecast_counts_the_nets_own_operations():
    from tocoad.paper.hours import _work
    does = SYSTEMS["pyramidflow"].stages["pyramidflow"]
    assert _work(does, pf.Settings(), 10) == pytest.approx(10 * does.work * 15)
    small = settings(epochs=1, stacks=2, kernel=3) # EfficientNet-Lite0's layer 1 has 24 channels
    assert _work(does, small, 10) == pytest.approx(10 * does.work / 2 * (3 / 7 * 24 / 64)**2)
    assert _work(does, pf.Settings(encoder="colours"), 10) == pytest.approx(10 * does.work * 15)
    assert does.gflop == pytest.approx(960 * (224 / 1024)**2, rel=.01)
