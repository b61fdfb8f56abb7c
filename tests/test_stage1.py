"""F, D and stage I: what each variant does that the others do not."""
import copy
import math
from functools import partial

import pytest
import torch
from fingerprint import state_hash
from torch import nn

from tocoad.data.images import BadInput
from tocoad.data.load import load
from tocoad.method.arithmetic import PRECISIONS, arithmetic
from tocoad.method.discriminator import LOSSES, Discriminator, ce_loss, focal_loss
from tocoad.method.features import Features, set_bn
from tocoad.method.guard import Diverged, Guard
from tocoad.method.pretrain import batches, check_discriminator, pretrain, seeded, stream

b = torch.backends
SWITCHES = b.cudnn.conv, b.cuda.matmul, b.mkldnn.conv, b.mkldnn.matmul


def squares(images, generator=None):
    "A generator of pseudo-anomalies that needs no textures: one darkened square an image"
    I_G, y_G = images.clone(), torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool)
    corners = torch.randint(0, images.shape[-1] - 16, (len(images), 2), generator=generator)
    for i, (r, c) in enumerate(corners.tolist()):
        I_G[i, :, r:r + 16, c:c + 16] *= .5
        y_G[i, r:r + 16, c:c + 16] = True
    return I_G, y_G


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def F():
    return Features()


def new_D(F, seed=0):
    with seeded(seed, "D"):
        return Discriminator(F.channels)


def train(F, images, G=squares, **kw):
    "D after a short stage I, and its log"
    D = new_D(F)
    log = pretrain(F, D, G, images, **dict(epochs=1, batch=3, lr=1e-3, size=64, progress=False) | kw)
    return D, log


def statistics(F):
    return torch.cat([b.flatten().float() for k, b in F.named_buffers() if "running" in k or "tracked" in k])


# the modes of batch normalisation in stage I (gap 42)

@pytest.mark.parametrize("bn", ["eval", "train"])
def test_f_stays_as_it_is(images, bn):
    F = Features()
    before, stored = state_hash(F), statistics(F)
    train(F, images, bn=bn)
    assert state_hash(F) == before and torch.equal(statistics(F), stored)
    assert not any(p.requires_grad for p in F.parameters())


def test_eval_reads_stored_statistics_and_train_those_of_the_batch(images):
    "In eval mode an image's maps do not depend on its companions, in train mode they do; so D learns another thing"
    seen = {}
    for bn in ("eval", "train"):
        F = Features()
        seen[bn] = train(F, images, bn=bn)
        x = images[:4] / 255
        with torch.no_grad():
            together, alone = F(x)[2][:2], F(x[:2])[2]
        assert torch.allclose(together, alone, atol=1e-3) == (bn == "eval")
    (D_eval, log_eval), (D_train, log_train) = seen.values()
    assert state_hash(D_eval) != state_hash(D_train) and log_eval[0]["L_dis"] != log_train[0]["L_dis"]


def test_batch_statistics_by_hand():
    "F's first normalisation in train mode, from the convolution before it"
    F = Features("resnet18", "random")
    x, got = torch.rand(3, 3, 32, 32), []
    F.net.conv1.register_forward_hook(lambda m, i, o: got.append(o))
    F.net.bn1.register_forward_hook(lambda m, i, o: got.append(o.clone()))
    with torch.no_grad():
        set_bn(F, "batch")(x)
    conv, out = got
    mean, var = conv.mean((0, 2, 3), keepdim=True), conv.var((0, 2, 3), correction=0, keepdim=True)
    expected = (conv - mean) / (var + 1e-5).sqrt()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_an_unknown_mode_is_refused(F, images):
    with pytest.raises(BadInput, match="'frozen'; choose one of eval, train, batch"):
        train(F, images, bn="frozen")


# losses (gaps 9, 41)

LOGITS = torch.tensor([[2., -1.], [.5, .5], [-1., 1.], [3., 0.]]).T.reshape(1, 2, 2, 2)
Y = torch.tensor([[[False, False], [True, True]]])
P_T = [1 / (1 + math.exp(-3)), .5, 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(3))]


@pytest.mark.parametrize("gamma", [0., 2., 4.])
@pytest.mark.parametrize("alpha", [None, .25, .9])
def test_focal_loss_by_hand(gamma, alpha):
    weights = [1] * 4 if alpha is None else [1 - alpha, 1 - alpha, alpha, alpha]
    by_hand = sum(-a * (1 - p)**gamma * math.log(p) for a, p in zip(weights, P_T, strict=True)) / 4
    assert focal_loss(LOGITS, Y, gamma, alpha).item() == pytest.approx(by_hand, rel=1e-5)


def test_no_alpha_is_twice_one_half():
    torch.testing.assert_close(focal_loss(LOGITS, Y), 2 * focal_loss(LOGITS, Y, alpha=.5))


def test_defaults_are_gamma_2_without_alpha():
    assert torch.equal(focal_loss(LOGITS, Y), focal_loss(LOGITS, Y, gamma=2., alpha=None))


def test_cross_entropy_is_focal_with_gamma_0():
    by_hand = sum(-math.log(p) for p in P_T) / 4
    assert ce_loss(LOGITS, Y).item() == pytest.approx(by_hand, rel=1e-5)
    torch.testing.assert_close(ce_loss(LOGITS, Y), focal_loss(LOGITS, Y, gamma=0.))
    assert LOSSES == dict(focal=focal_loss, ce=ce_loss)


def test_each_loss_trains_another_d(F, images):
    losses = dict(LOSSES, gamma4=partial(focal_loss, gamma=4.), alpha=partial(focal_loss, alpha=.25))
    trained = {name: train(F, images, loss=loss) for name, loss in losses.items()}
    assert len({state_hash(D) for D, _ in trained.values()}) == len(losses)
    first = {name: log[0]["L_dis"] for name, (_, log) in trained.items()}
    assert first["gamma4"] < first["focal"] < first["ce"] and first["alpha"] < first["focal"]


def test_logits_beyond_the_exponential_have_finite_gradients():
    logits = (1e6 * LOGITS).requires_grad_()
    focal_loss(logits, Y, alpha=.25).backward()
    assert logits.grad.isfinite().all()


# arithmetic (gap 50)

@pytest.fixture
def unusual():
    "Switches that `arithmetic` never sets, so that restoring them shows"
    before = [s.fp32_precision for s in SWITCHES]
    SWITCHES[0].fp32_precision, SWITCHES[1].fp32_precision, SWITCHES[3].fp32_precision = "none", "tf32", "bf16"
    yield [s.fp32_precision for s in SWITCHES]
    for s, old in zip(SWITCHES, before, strict=True):
        s.fp32_precision = old


def switches():
    return [s.fp32_precision for s in SWITCHES]


@pytest.mark.parametrize("precision,flag,half",
                         [("fp32", "ieee", False), ("tf32", "tf32", False), ("bf16", "ieee", True)])
def test_switches_are_set_inside_and_restored(unusual, precision, flag, half):
    with arithmetic(precision):
        assert switches() == [flag, flag, "ieee", "ieee"] and torch.is_autocast_enabled("cpu") == half
        with arithmetic("fp32"):
            assert switches() == ["ieee"] * 4 and not torch.is_autocast_enabled("cpu")
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert switches() == [flag, flag, "ieee", "ieee"] and torch.is_autocast_enabled("cpu") == half
    assert switches() == unusual and not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_switches_are_restored_after_an_exception(unusual, precision):
    with pytest.raises(ZeroDivisionError), arithmetic(precision):
        raise ZeroDivisionError
    assert switches() == unusual and not torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "cuda", "cuda:1"])
def test_any_name_of_a_device_will_do(unusual, device, recwarn):
    with arithmetic("tf32", device):
        assert switches() == ["tf32", "tf32", "ieee", "ieee"]
    assert switches() == unusual


def test_an_unknown_precision_is_refused_in_one_sentence(unusual):
    with pytest.raises(BadInput) as e, arithmetic("fp16"):
        pass
    assert str(e.value) == "Unknown precision 'fp16'; choose one of fp32, tf32, bf16." and switches() == unusual


def test_maps_and_logits_are_float32_whatever_computes_them(F, images):
    D, out = new_D(F).eval(), {}
    for precision in PRECISIONS:
        with torch.no_grad(), arithmetic(precision):
            maps = F(images[:2] / 255)
            out[precision] = [*maps, D(maps)]
        assert {m.dtype for m in out[precision]} == {torch.float32}
    for exact, tf32, rough in zip(*out.values(), strict=True):
        assert torch.equal(exact, tf32)
        assert 1e-4 < (rough - exact).norm() / exact.norm() < .15


def test_precision_of_a_whole_stage(F, images):
    "tf32 is float32 on a CPU, bit for bit; bf16 is close; a backward pass is inside as well"
    trained = {}
    for precision in PRECISIONS:
        with arithmetic(precision):
            trained[precision] = train(F, images, epochs=2)
    hashes = {p: state_hash(D) for p, (D, _) in trained.items()}
    assert hashes["fp32"] == hashes["tf32"] != hashes["bf16"]
    assert trained["bf16"][1][-1]["L_dis"] == pytest.approx(trained["fp32"][1][-1]["L_dis"], rel=.1)
    assert {p.dtype for p in trained["bf16"][0].parameters()} == {torch.float32}


def test_bf16_around_a_stage_is_bf16_around_each_forward_pass(F, images):
    "Autocast's cache of rounded weights would leave D with its first weights; there is none"
    class Wrapped(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.net(x)

    D = new_D(F)
    pretrain(Wrapped(F), Wrapped(D), squares, images, epochs=2, batch=3, lr=1e-2, size=64, progress=False)
    with arithmetic("bf16"):
        whole, _ = train(F, images, epochs=2, lr=1e-2)
    x = [m.detach() for m in F(images[:2] / 255)]
    torch.testing.assert_close(whole(x), D(x), rtol=.02, atol=.02)


# streams

def draw(generator):
    return torch.randint(0, 2**31, (4,), generator=generator).tolist()


NAMES = ("F", "D", "C", "stage I order", "stage I anomalies", "stage II order", "stage II views",
         "stage II anomalies", "coreset", "check of D")


def test_every_name_and_every_seed_has_its_own_stream():
    seeds = (0, 1, -1, 2**40, 2**200, -2**200)
    draws = [tuple(draw(stream(seed, name))) for seed in seeds for name in NAMES]
    assert len(set(draws)) == len(draws)
    assert draws == [tuple(draw(stream(seed, name))) for seed in seeds for name in NAMES]


def test_streams_stay_what_they_are():
    "Stored results depend on it; from `printf '0 stage I order' | sha256sum`"
    assert stream(0, "stage I order").initial_seed() == 0x18b6a0daf069effc


def test_seeded_sets_the_global_state_and_puts_it_back():
    before = torch.get_rng_state()
    with seeded(-3, "D"):
        assert draw(None) == draw(stream(-3, "D"))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ZeroDivisionError), seeded(2**70, "D"):
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before)


def record(images, seed=0, extra=0, epochs=2, batch=3):
    "What G is given and draws in a stage I, with extra draws of its own"
    seen = []

    def G(I, generator):
        I_G, y_G = squares(I, generator)
        torch.rand(extra, generator=generator)
        seen.append((I.clone(), y_G))
        return I_G, y_G

    F = Features("resnet18", "random")
    pretrain(F, Discriminator(F.channels, "resnet18"), G, images, epochs, batch, size=64, seed=seed, progress=False)
    return [torch.cat(x) for x in zip(*seen, strict=True)]


def test_order_and_anomalies_are_drawn_independently(images):
    I, y = record(images)
    I_more, y_more = record(images, extra=5)
    assert torch.equal(I, I_more) and not torch.equal(y, y_more)
    I_fewer, y_fewer = record(images[:5], batch=5)
    assert torch.equal(y_fewer[:3], y[:3]) and not torch.equal(I_fewer[:3], I[:3])


def test_stage_1_draws_from_its_streams_and_fresh_ones_each_epoch(images):
    I, y = record(images)
    order, anomalies = stream(0, "stage I order"), stream(0, "stage I anomalies")
    expected = [torch.randperm(6, generator=order) for _ in range(2)]
    assert torch.equal(I, images[torch.cat(expected)] / 255)
    assert torch.equal(y, torch.cat([squares(I[i:i + 3], anomalies)[1] for i in range(0, 12, 3)]))
    assert not torch.equal(y[:6], y[6:])
    assert not torch.equal(y[:3], squares(I[:3], stream(0, "stage II anomalies"))[1])
    assert not torch.equal(y, record(images, seed=1)[1])


def test_stage_1_touches_no_global_state(F, images):
    before = torch.get_rng_state()
    train(F, images)
    assert torch.equal(torch.get_rng_state(), before)


def test_same_seed_same_d_and_another_seed_another(F, images):
    same = [state_hash(train(F, images, seed=s)[0]) for s in (0, 0, 1)]
    assert same[0] == same[1] != same[2]


def test_the_check_of_d_has_a_stream_of_its_own(F, images):
    D, _ = train(F, images)
    drawn = []

    def G(I, generator):
        drawn.append(generator.initial_seed())
        return squares(I, generator)

    scores = [check_discriminator(F, D, G, images, n=8, size=64, seed=s) for s in (0, 0, 1)]
    assert scores[0] == scores[1] != scores[2] and all(0 <= s <= 1 for s in scores)
    assert drawn == [stream(s, "check of D").initial_seed() for s in (0, 0, 1)]


def test_d_learns():
    "On the mini data set D finds squares that it has not seen"
    F, washers = Features(), load(category="washer").train.images[:16, :, 64:192, 64:192]
    D = new_D(F)
    before = check_discriminator(F, D.eval(), squares, washers, n=16, size=64)
    log = pretrain(F, D, squares, washers, epochs=10, batch=4, lr=5e-3, size=64, progress=False)
    assert log[-1]["L_dis"] < log[0]["L_dis"] / 2 and not D.training
    assert check_discriminator(F, D, squares, washers, n=16, size=64) > max(.85, before)


def test_log_and_schedule(F, images):
    _, log = train(F, images[:2], epochs=10, lr=1.)
    assert [e["epoch"] for e in log] == [*range(1, 11)] and set(log[0]) == {"epoch", "L_dis", "lr", "seconds"}
    assert [e["lr"] for e in log] == pytest.approx([1] * 8 + [.2, .04])


def test_batches_stay_whole():
    numbers = torch.arange(7, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 6, 6)
    assert [len(I) for I in batches(numbers, 3, size=4)] == [3, 3, 1]
    assert [len(I) for I in batches(numbers, 3, size=4, drop_last=True)] == [3, 3]
    assert [len(I) for I in batches(numbers, 16, size=4, drop_last=True)] == [7]
    assert {I.shape[1:] for I in batches(numbers, 3, size=4)} == {(3, 4, 4)}


# a run that goes wrong

def test_a_nan_loss_names_its_step_and_restores_the_last_good_epoch(F, images):
    D, states = new_D(F), []

    def G(I, generator):
        states.append(copy.deepcopy(D.state_dict()))
        return squares(I, generator)

    def loss(logits, y):
        return focal_loss(logits, y) * (math.nan if len(states) == 4 else 1)

    with pytest.raises(Diverged, match=r"became nan at step 4 \(epoch 2\).*try a smaller rate"):
        pretrain(F, D, G, images, epochs=3, batch=3, lr=1e-3, loss=loss, size=64, progress=False)
    good = states[2] # before the second epoch
    assert len(states) == 4 and all(torch.equal(v, good[k]) for k, v in D.state_dict().items())


def test_guard_restores_buffers_and_every_module():
    a, b = nn.BatchNorm1d(2), nn.Linear(1, 1)
    guard = Guard(a, None, b)
    before = state_hash(a), state_hash(b)
    a(torch.rand(4, 2))
    b.weight.data.fill_(math.inf)
    with pytest.raises(Diverged, match=r"became nan at step 7 \(epoch 2\)"): # spoilt by the last step: the next loss
        guard.check(torch.tensor([.1, .2, .3]), epoch=1)
    assert (state_hash(a), state_hash(b)) == before
    with pytest.raises(Diverged, match=r"became inf at step 2 \(epoch 1\)"):
        guard.check(torch.tensor([.1, math.inf, math.nan]), epoch=0)


def test_guard_keeps_a_good_epoch():
    layer = nn.Linear(1, 1)
    guard = Guard(layer)
    layer.weight.data.fill_(3.)
    guard.check(torch.tensor([.5]), epoch=0)
    layer.weight.data.fill_(math.nan)
    with pytest.raises(Diverged):
        guard.check(torch.tensor([.5]), epoch=1)
    assert layer.weight.item() == 3


# the lowest layers (gap 19)

@pytest.mark.parametrize("backbone", ["tf_efficientnet_lite0", "resnet18"])
def test_below_is_what_the_gradient_of_a_layer_reaches(backbone):
    "Layer k's map has a gradient in the stem and in layers 1 to k, and nowhere else"
    F = Features(backbone, weights="random")
    assert F.below(0) == []
    for k in range(1, 5):
        F.zero_grad(set_to_none=True)
        F(torch.rand(1, 3, 64, 64))[k - 1].sum().backward()
        assert F.below(k) == [n for n, p in F.named_parameters() if p.grad is not None]
    assert F.below(4) == [n for n, _ in F.named_parameters()]


def test_below_by_name():
    F = Features("resnet18", weights="random")
    assert F.below(1)[:2] == ["net.conv1.weight", "net.bn1.weight"]
    assert {n.split(".")[1] for n in F.below(2)} == {"conv1", "bn1", "layer1", "layer2"}
    lite = Features(weights="random")
    stem = {"conv_stem.weight", "bn1.weight", "bn1.bias"}
    assert {".".join(n.split(".")[1:3]) for n in lite.below(1)} == stem | {"blocks.0", "blocks.1"}


# what stored weights and records rely on

def test_names_and_sizes_of_d():
    D = Discriminator((24, 40, 112, 320))
    assert sum(p.numel() for p in D.parameters()) == 353_570
    names = [n for n, _ in D.named_parameters()]
    assert names[0] == "rises.0.up.weight" and names[-1] == "top.6.bias" and "rises.2.blocks.5.conv3.weight" in names


def test_maps_of_the_packaged_weights(F):
    assert state_hash(F) == "67989a86121dac4f" and F.weights_hash == "579344248a93e230"
