"""Stage II, variant by variant: modes, parameters that move, random numbers, values at the first step."""
import copy

import pytest
import torch
from fingerprint import state_hash
from torch import nn
from torch.func import functional_call

from tocoad.data.images import BadInput, to_float
from tocoad.data.load import load
from tocoad.method.arithmetic import arithmetic
from tocoad.method.contrast import BYOL, SimSiam, Views, tensors
from tocoad.method.discriminator import Discriminator, ce_loss, focal_loss
from tocoad.method.features import Features, set_bn
from tocoad.method.finetune import finetune, ncl_step, sgd
from tocoad.method.pretrain import pretrain, seeded, stream

F_0 = Features()
IMAGES = load(category="washer", size=72).train.images[:8]


class Rectangles:
    "A quick generator: a rectangle of each image inverted; it remembers its masks"
    def __init__(self): self.masks = []

    def __call__(self, I, generator=None):
        y = torch.zeros(len(I), *I.shape[-2:], dtype=torch.bool)
        for k, (a, b) in enumerate(torch.randint(0, 40, (len(I), 2), generator=generator).tolist()):
            y[k, a:a + 20, b:b + 20] = True
        self.masks.append(y)
        return torch.where(y[:, None], 1 - I, I), y


class Recorded(nn.Module):
    "Views that remember what came in and what went out"
    def __init__(self):
        super().__init__()
        self.views, self.seen = Views(64), []

    def forward(self, images):
        self.seen.append((images, self.views(images)))
        return self.seen[-1][1]


def parts(kind=SimSiam, **how):
    "F, C, D, always the same"
    with seeded(0, "C"):
        C = kind(F_0, d=16, views=Recorded(), **how)
    with seeded(0, "D"):
        D = Discriminator(F_0.channels)
    return copy.deepcopy(F_0), C, D


def tune(F, C, D=None, G=None, **how):
    default = dict(epochs=1, batch=4, lr=.01, size=64, progress=False)
    return finetune(F, C, IMAGES, D, (G or Rectangles()) if D is not None else None, **default | how)


def step(F, C, D=None, G=None, **how):
    "One step's gradients of F by name, and its log"
    F.requires_grad_(True)
    F.zero_grad()
    G = (G or Rectangles()) if D is not None else None
    with seeded(0, "views"):
        log = ncl_step(F, C, to_float(IMAGES), D, G, size=64, generator=stream(0, "a"), **how)
    return {k: p.grad.clone() for k, p in F.named_parameters() if p.grad is not None}, log


def passes(F):
    "(F in train mode, its statistics kept up) of every pass of F from now on"
    seen, bn = [], next(m for m in F.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    F.register_forward_pre_hook(lambda *_: seen.append((bn.training, bn.track_running_stats)))
    return seen


def moved(F, of="named_parameters"):
    return {k for (k, a), (_, b) in zip(getattr(F, of)(), getattr(F_0, of)(), strict=True) if not torch.equal(a, b)}


def statistics(F): return {k: b for k, b in F.named_buffers() if "running" in k}


# batch normalisation (gaps 2, 3)

@pytest.mark.parametrize("bn, per_step, stored", [
    ("train", [(True, True)] * 3, 3), ("views", [(True, True)] * 2 + [(True, False)], 2),
    ("eval", [(False, True)] * 3, 0)])
def test_batch_norm_of_f_in_each_pass(bn, per_step, stored):
    F, C, D = parts()
    seen = passes(F)
    tune(F, C, D, bn=bn) # two steps: two views and one batch of pseudo-anomalies each
    assert seen == per_step * 2
    assert F.get_buffer("net.bn1.num_batches_tracked") - F_0.get_buffer("net.bn1.num_batches_tracked") == 2 * stored
    assert bool(moved(F, "named_buffers")) == (bn != "eval")
    assert not F.training and F.net.bn1.track_running_stats


def test_clean_views_alone_fill_the_statistics():
    F_v, F_c, F_t = (parts()[0] for _ in range(3))
    tune(F_v, *parts()[1:], batch=8, bn="views")
    tune(F_c, parts()[1], batch=8, bn="train") # without D: the same views and nothing else
    tune(F_t, *parts()[1:], batch=8, bn="train")
    for k, b in statistics(F_v).items():
        assert torch.equal(b, statistics(F_c)[k])
    assert any(not torch.equal(b, statistics(F_t)[k]) for k, b in statistics(F_v).items())


def test_views_and_train_compute_the_same_gradients():
    (g1, log1), (g2, log2) = (step(*parts(), bn=bn) for bn in ("train", "views"))
    assert all(torch.equal(g1[k], g2[k]) for k in g1) and log1["L_neg"] == log2["L_neg"]
    g3, log3 = step(*parts(), bn="eval")
    assert log3["L_neg"] != log1["L_neg"] and log3["L_sym"] != log1["L_sym"]


# what moves (gaps 5, 19)

def test_all_of_f_and_c_is_trained_and_d_is_not():
    F, C, D = parts()
    C_0, D_0 = copy.deepcopy(C), state_hash(D)
    modes = []
    D.register_forward_pre_hook(lambda *_: modes.append(D.training))
    tune(F, C, D)
    assert moved(F) == {k for k, _ in F.named_parameters()}
    assert all(not torch.equal(a, b) for a, b in zip(C.parameters(), C_0.parameters(), strict=True))
    assert state_hash(D) == D_0 and modes == [False, False] and all(p.grad is None for p in D.parameters())
    assert not any(p.requires_grad for p in [*F.parameters(), *D.parameters()])


@pytest.mark.parametrize("freeze", [1, 2, 3])
def test_frozen_layers_keep_their_weights_but_not_their_statistics(freeze):
    F, C, D = parts()
    tune(F, C, D, freeze=freeze, bn="train")
    stay = set(F.below(freeze))
    assert stay and moved(F) == {k for k, _ in F.named_parameters()} - stay
    assert "net.bn1.running_mean" in moved(F, "named_buffers")


def test_freezing_everything_is_refused():
    F, C, D = parts()
    with pytest.raises(BadInput, match="leaves nothing of F to train"):
        tune(F, C, D, freeze=4)


def test_d_learns_on_with_f_s_rate():
    F, C, D = parts()
    D_0, modes = copy.deepcopy(D), []
    D.register_forward_pre_hook(lambda *_: modes.append(D.training))
    assert [g["lr"] for g in sgd(F, C, D, .01, .05, train_d=True).param_groups] == [.01, .05, .01]
    assert [g["lr"] for g in sgd(F, C, D, .01, None).param_groups] == [.01, .01]
    tune(F, C, D, train_d=True)
    assert modes == [True, True]
    assert not any(torch.equal(a, b) for a, b in zip(D.parameters(), D_0.parameters(), strict=True))
    assert not D.training and not any(p.requires_grad for p in D.parameters()) # it comes back at rest


def test_rate_0_moves_nothing_but_f_s_statistics():
    "The control: the forward passes of the trained run, without a step"
    control, trained = (parts() for _ in range(2))
    D_0, C_0 = state_hash(control[2]), copy.deepcopy(control[1])
    log_c, log_t = tune(*control, batch=8, lr=0, lr_head=0, bn="train"), tune(*trained, batch=8, bn="train")
    assert not moved(control[0]) and moved(trained[0]) and state_hash(control[2]) == D_0
    assert all(torch.equal(a, b) for a, b in zip(control[1].parameters(), C_0.parameters(), strict=True))
    assert moved(control[0], "named_buffers") == {k for k, _ in F_0.named_buffers() if "running" in k or "tracked" in k}
    for k, b in statistics(control[0]).items(): # the one step's passes came before its update
        assert torch.equal(b, statistics(trained[0])[k])
    assert log_c[0]["L_sym"] == log_t[0]["L_sym"] and log_c[0]["L_neg"] == log_t[0]["L_neg"]
    F, C, D = parts()
    tune(F, C, D, lr=0, lr_head=0, bn="eval")
    assert state_hash(F) == state_hash(F_0)


# random numbers (point 5)

def test_contrastive_only_and_two_stage_see_the_same_order_and_views():
    (F, C, D), (F_c, C_c, _) = parts(), parts()
    tune(F, C, D, epochs=2)
    tune(F_c, C_c, epochs=2, bn="eval", lam=1.)
    a, b = C.views.seen, C_c.views.seen
    assert len(a) == len(b) == 2 * 2 * 2
    for one, two in zip(a, b, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))
    assert not torch.equal(a[0][0], a[4][0]) and not torch.equal(a[0][1], a[1][1]) # another order each epoch, two views


def test_stage_two_draws_nothing_that_stage_one_drew():
    F, C, D = parts()
    first, second, again, other = (Rectangles() for _ in range(4))
    pretrain(F, D, first, IMAGES, epochs=2, batch=4, size=64, progress=False)
    tune(F, C, D, second, epochs=2)
    tune(*parts(), again, epochs=2)
    tune(*parts(), other, epochs=2, seed=1)
    assert not any(torch.equal(a, b) for a in first.masks for b in second.masks)
    assert all(torch.equal(a, b) for a, b in zip(second.masks, again.masks, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(second.masks, other.masks, strict=True))


def test_looking_at_f_after_each_epoch_changes_nothing():
    seen = []
    def look(epochs, F):
        torch.rand(7)
        seen.append((epochs, F.training, torch.is_grad_enabled(), F(torch.rand(2, 3, 64, 64))[3].shape))
    (F, C, D), (F_e, C_e, D_e) = parts(), parts()
    tune(F, C, D, epochs=2, bn="views")
    tune(F_e, C_e, D_e, epochs=2, bn="views", each=look)
    assert state_hash(F) == state_hash(F_e) and state_hash(C) == state_hash(C_e)
    assert [s[:3] for s in seen] == [(1, False, False), (2, False, False)]


# the loss (Eq. 4-6; gaps 7, 8, 13, 14, 16, 47)

@pytest.mark.parametrize("M", [2, 3])
def test_eq_5_as_printed_is_twice_the_mean(M):
    (g, log), (g_p, log_p) = (step(*parts(M=M, printed=printed)[:2]) for printed in (False, True))
    assert log_p["L_sym"] == 2 * log["L_sym"] and all(torch.equal(g_p[k], 2 * g[k]) for k in g)


def test_more_views_are_more_passes():
    F, C, _ = parts(M=3)
    seen = passes(F)
    step(F, C)
    assert len(seen) == 3


@pytest.mark.parametrize("how, width, names", [
    (dict(), [112, 320], ["3", "4"]), (dict(layers=(4,)), [320], ["4"]), (dict(layers=(2, 3)), [40, 112], ["2", "3"]),
    (dict(concat=True), [432], ["3+4"]), (dict(pool=2), [448, 1280], ["3", "4"]),
    (dict(concat=True, pool=2), [1728], ["3+4"])])
def test_which_features_c_reads(how, width, names):
    F, C, _ = parts(**how)
    assert [g[0].in_features for g in C.heads.projectors] == width
    maps = [m.detach().requires_grad_(True) for m in F_0(to_float(IMAGES)[..., :64, :64])]
    sum(z[:, 0].square().sum() for z in C.eval().heads(maps)).backward()
    assert {l for l, m in enumerate(maps, 1) if m.grad is not None} == set(how.get("layers", (3, 4)))
    same = all((m.grad == m.grad[:, :, :1, :1]).all() for m in maps if m.grad is not None and m.shape[-1] > 2)
    assert same == ("pool" not in how) # averaged over the map, all places pull alike
    _, log = step(F, C.train())
    for what, worst in (("spread", min), ("cosine", max)):
        assert [k for k in log if k.startswith(what + "_")] == [f"{what}_{n}" for n in names]
        assert log[what] == worst(log[f"{what}_{n}"] for n in names)


def own_predictor(d): return nn.Sequential(nn.Linear(d, d), nn.ReLU())


@pytest.mark.parametrize("predictor, layers", [("linear", 1), ("mlp", 4), (own_predictor, 2)])
def test_predictors(predictor, layers):
    F, C, _ = parts(predictor=predictor)
    h = C.heads.predictors[0]
    assert (len(h) if isinstance(h, nn.Sequential) else 1) == layers
    assert torch.isfinite(step(F, C)[1]["L_sym"])


def test_views_from_the_crop():
    (F, C, _), (F_i, C_i, _) = parts(), parts()
    step(F, C, view_of="crop")
    step(F_i, C_i)
    crop, image = C.views.seen[0][0], C_i.views.seen[0][0]
    assert crop.shape[-2:] == (64, 64) and image.shape[-2:] == (72, 72) and torch.equal(crop, image[..., 4:-4, 4:-4])


def test_views_do_not_depend_on_the_arithmetic_of_the_networks():
    torch.manual_seed(0)
    a = Views(64)(to_float(IMAGES))
    torch.manual_seed(0)
    with arithmetic("bf16"):
        b = Views(64)(to_float(IMAGES))
    assert torch.equal(a, b) and a.dtype == torch.float32


def test_without_d_the_weight_is_taken_as_given():
    (g1, log1), (g, log) = (step(*parts()[:2], lam=lam) for lam in (1., .5))
    assert all(torch.equal(g[k], g1[k] / 2) for k in g)
    assert log["L_sym"] == log1["L_sym"] and log["g_sym"] == log1["g_sym"] / 2
    assert log["L_neg"] == log["g_neg"] == log["share"] == 0


def test_gradients_add_up_to_eq_6_and_the_share_is_d_s():
    F, C, D = parts()
    D.eval().requires_grad_(False)
    g, log = step(F, C, D, bn="eval", lam=.3)
    g_sym, _ = step(F, C, bn="eval", lam=.3)
    I_G, y = Rectangles()(to_float(IMAGES)[..., 4:-4, 4:-4], stream(0, "a"))
    names, params = zip(*F.named_parameters(), strict=True)
    g_neg = dict(zip(names, torch.autograd.grad(.7 * focal_loss(D(F(I_G)), y), params, allow_unused=True), strict=True))
    for k in g:
        torch.testing.assert_close(g[k], g_sym[k] + (0 if g_neg[k] is None else g_neg[k]), rtol=1e-3, atol=1e-5)
    length = torch.cat([v.flatten() for v in g_neg.values() if v is not None]).norm()
    torch.testing.assert_close(log["g_neg"], length, rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(log["share"], length / (length + log["g_sym"]), rtol=1e-2, atol=1e-6)


def test_another_l_neg_changes_d_s_pull_only():
    def twice(logits, y): return 2 * ce_loss(logits, y)
    (_, a), (_, b) = (step(*parts(), loss=loss, bn="eval") for loss in (ce_loss, twice))
    assert b["L_neg"] == 2 * a["L_neg"] and b["L_sym"] == a["L_sym"] and b["g_sym"] == a["g_sym"]
    torch.testing.assert_close(b["g_neg"], 2 * a["g_neg"], rtol=1e-2, atol=1e-6)


def test_a_student_s_contrast_may_return_one_number():
    class Mine(SimSiam):
        def compare(self, zs, targets): return super().compare(zs, targets)[0], torch.tensor(.5)
    F, C, D = parts(Mine)
    log = tune(F, C, D)
    assert log[0]["spread"] == .5 and "cosine" not in log[0]


# BYOL (gap 48)

@pytest.mark.parametrize("bn", ["eval", "train", "batch"])
def test_byol_s_target_starts_as_f_in_every_mode(bn):
    F, C, _ = parts(BYOL)
    F, x = set_bn(F.requires_grad_(True), bn), to_float(IMAGES)
    C.train().target = [tensors(F), tensors(C.heads)]
    twin = copy.deepcopy(F)
    seen = passes(F)
    online, target = F(x), functional_call(F, C.target[0], x)
    assert all(torch.equal(a, b) for a, b in zip(online, target, strict=True)) and len(set(seen)) == 1
    for k, b in F.named_buffers(): # the target's own statistics saw the same pass
        assert torch.equal(b, C.target[0][k]) and (bn == "train" or torch.equal(b, twin.get_buffer(k)))


@pytest.mark.parametrize("bn, mode", [("eval", False), ("train", True), ("views", True)])
def test_byol_s_target_runs_in_f_s_mode(bn, mode):
    F, C, D = parts(BYOL)
    seen = passes(F)
    tune(F, C, D, bn=bn)
    assert len(seen) == 2 * (2 + 2 + 1) and {s[0] for s in seen} == {mode}


def test_byol_s_first_step_is_simsiam_s():
    (g, log), (g_b, log_b) = (step(*parts(kind)[:2], bn="eval") for kind in (SimSiam, BYOL))
    assert log["L_sym"] == log_b["L_sym"] and all(torch.allclose(g[k], g_b[k], rtol=1e-3, atol=1e-6) for k in g)


def test_byol_s_target_moves_by_the_average_and_gets_no_gradient():
    F, C, _ = parts(BYOL, ema=.9)
    optimiser = sgd(F, C, None, .1, None)
    step(F, C)
    before = [{k: v.clone() for k, v in t.items()} for t in C.target]
    optimiser.step()
    C.update(F)
    for old, target, online in zip(before, C.target, (F, C.heads), strict=True):
        for k, p in online.named_parameters():
            torch.testing.assert_close(target[k], .9 * old[k] + .1 * p.detach())
        for k, b in online.named_buffers():
            assert torch.equal(target[k], b)
        assert not any(v.requires_grad or v.grad is not None for v in target.values())
    trained = {id(p) for g in optimiser.param_groups for p in g["params"]}
    assert trained == {id(p) for p in [*F.parameters(), *C.heads.parameters()]}
    tune(F, C, epochs=2)
    assert any(not torch.equal(C.target[0][k], p) for k, p in F.named_parameters())


def test_rate_0_leaves_byol_s_target_where_it_is():
    F, C, D = parts(BYOL)
    tune(F, C, D, lr=0, lr_head=0, bn="eval")
    assert all(torch.allclose(C.target[0][k], p) for k, p in F_0.named_parameters())
