"""A GPU computes what a CPU computes: `pytest -m cuda` runs these on one; the same bodies run on the CPU."""
import copy
import logging
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch

from tocoad.data.images import crop, textures, to_float
from tocoad.data.load import load
from tocoad.measure import metrics
from tocoad.method import halving
from tocoad.method.arithmetic import PRECISIONS, arithmetic
from tocoad.method.coreset import coreset, radius
from tocoad.method.cutpaste import CutPaste
from tocoad.method.finetune import finetune, ncl_step, sgd
from tocoad.method.memory import Memory, anomaly_maps, coreset_plain, image_scores, score_paper, score_plain
from tocoad.method.nsa import NSA
from tocoad.method.perlin import Perlin
from tocoad.method.pretrain import check_discriminator, pretrain, train_step
from tocoad.paper import tour
from tocoad.run import compare, config
from tocoad.run import store as store_room
from tocoad.systems import tocoad as tocoad_room

ON_A_GPU = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")]
SIZE = 96


def on_a_gpu(*values): return pytest.param(*values, marks=ON_A_GPU)


DEVICES = pytest.mark.parametrize("device", ["cpu", on_a_gpu("cuda")])
# A CPU's TF32 is its float32, and its float32 is what all is compared with: bfloat16 is left.
WAYS = pytest.mark.parametrize("device, precision", [("cpu", "bf16"), *(on_a_gpu("cuda", p) for p in PRECISIONS)])

# Relative distances |x - y|/|y| of F's maps. Measured on a CPU, the largest of four layers: float32 beside float64
# 1.6e-6; operands rounded to TF32's 11 digits 7.8e-3; bfloat16 5.6e-2, all of EfficientNet-Lite0.
MAPS = dict(fp32=3e-5, tf32=3e-2, bf16=.15)
# Losses of the second of two epochs, L_dis and L_neg relative to their size: two threads on a CPU in place of one,
# another order of the same sums, moved L_dis by 2e-3, TF32's digits L_neg by 9e-4, bfloat16 L_dis by 1e-2.
LOSSES = dict(fp32=1e-2, tf32=2e-2, bf16=5e-2)


@pytest.fixture(scope="module")
def images():
    return load(None, "mini", "washer", 144).train.images[:8]


@pytest.fixture(scope="module")
def washer():
    return to_float(crop(load(category="washer").train.images[:6]))


@pytest.fixture(scope="module")
def bank():
    "Patches that lie in a few directions, as real ones do, the last of them not near any other"
    g = torch.Generator().manual_seed(0)
    return torch.randn(3000, 6, generator=g) @ torch.randn(6, 48, generator=g) + .3 * torch.randn(3000, 48, generator=g)


def new(seed=0): return torch.Generator().manual_seed(seed)
def far(x, y): return ((x.cpu().double() - y.cpu().double()).norm() / y.cpu().double().norm()).item()


def parts(device, **changes):
    "Settings of the smoke profile, F, D, G and C on a device"
    c = config.config("smoke", **changes).resolved()
    F, D = tocoad_room.make_networks(c, device)
    return c, F, D, tocoad_room.make_generator(c, device=device), tocoad_room.make_contrast(c, F)


@DEVICES
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_arithmetic_is_the_one_asked_for(device, precision):
    "Digits of a product and of a convolution, and that they come back to what they were"
    A, B = torch.randn(256, 512, generator=new()), torch.randn(512, 256, generator=new(1))
    x, w = torch.randn(2, 64, 16, 16, generator=new()), torch.randn(32, 64, 3, 3, generator=new(1))
    conv = torch.nn.functional.conv2d
    with arithmetic(precision, device):
        got = A.to(device) @ B.to(device), conv(x.to(device), w.to(device), padding=1)
    after = A.to(device) @ B.to(device)
    true = A.double() @ B.double(), conv(x.double(), w.double(), padding=1)
    low, high = dict(fp32=(0, 1e-5), tf32=(5e-5, 1e-3), bf16=(1e-3, 1e-2))[
        "fp32" if (device, precision) == ("cpu", "tf32") else precision]      # roundings to 24, 11 and 8 digits
    assert low <= far(got[0], true[0]) < high and far(got[1], true[1]) < high # a small convolution may keep float32
    assert far(after, true[0]) < 1e-5


GENERATORS = {
    "perlin": lambda T: Perlin(textures=T),
    "perlin on the object": lambda T: Perlin(textures=T, foreground=True, count=2, rotate="slight", clean=.3),
    "patches": lambda T: CutPaste(),
    "scars": lambda T: CutPaste(variant="scar", count=2, rotate="both"),
    "union on the object": lambda T: CutPaste(variant="union", foreground=True, label="full"),
    "nsa": lambda T: NSA(),
    "nsa, mixed, on the object": lambda T: NSA(gradients="mixed", foreground=True, rotate="right"),
}


@DEVICES
@pytest.mark.parametrize("name", GENERATORS)
def test_generators_make_the_same_of_the_same_draws(device, washer, name):
    "Both draw on the CPU. One pixel in 10,000 may lie on a threshold; the rest is within a tenth of a grey level"
    T = textures(limit=24)
    G, G_cpu = GENERATORS[name](T.to(device)), GENERATORS[name](T)
    for seed in (3, 4):
        (a, y), (b, z) = G(washer.to(device), new(seed)), G_cpu(washer, new(seed))
        again = G(washer.to(device), new(seed))
        assert a.device.type == y.device.type == device and z.any()
        assert torch.equal(a, again[0]) and torch.equal(y, again[1]), "the same seed twice"
        off = (y.cpu() != z) | ((a.cpu() - b).abs().amax(1) > .1 / 255)
        assert off.sum() <= off.numel() / 10_000


NETWORKS = {"tf_efficientnet_lite0": "imagenet", "wide_resnet50_2": "random"}


@pytest.mark.parametrize("device, precision, backbone", [("cpu", "bf16", "tf_efficientnet_lite0"),
    *(on_a_gpu("cuda", p, b) for p in PRECISIONS for b in NETWORKS)])
def test_features(device, images, backbone, precision):
    _, F, _, _, _ = parts(device, backbone=backbone, weights=NETWORKS[backbone])
    x = to_float(crop(images[:2], SIZE))
    on_cpu = copy.deepcopy(F).cpu()
    with torch.no_grad():
        with arithmetic("fp32"):
            expected = on_cpu(x)
        with arithmetic(precision, device):
            found, again = F(x.to(device)), F(x.to(device))
    assert all(m.dtype == torch.float32 and m.device.type == device for m in found)
    assert max(map(far, found, expected)) < MAPS[precision]
    assert all(map(torch.equal, found, again)), "the same twice"


def trained1(device, images, precision, generator="perlin"):
    "L_dis of two epochs of two steps, what D is worth, D's weights"
    c, F, D, G, _ = parts(device, generator=generator)
    with arithmetic(precision, device):
        log = pretrain(F, D, G, images.to(device), 2, 4, 8e-3, size=SIZE, progress=False)
        auroc = check_discriminator(F, D, G, images.to(device), 8, SIZE)
    return [e["L_dis"] for e in log], auroc, D.state_dict()


def trained2(device, images, precision, contrast="simsiam", bn="train", generator="perlin"):
    "The log of two epochs of two steps, F's weights"
    c, F, D, G, C = parts(device, contrast=contrast, generator=generator)
    with arithmetic(precision, device):
        log = finetune(F, C, images.to(device), D, G, 2, 4, 1e-3, .05, bn=bn, size=SIZE, progress=False)
    return log, F.state_dict()


_known = {}
def expected(train, images, *how):
    "What the CPU computes in float32, once"
    if (train, how) not in _known:
        _known[train, how] = train("cpu", images, "fp32", *how)
    return _known[train, how]


@WAYS
@pytest.mark.parametrize("generator", ["perlin", "nsa"])
def test_stage_1(device, images, generator, precision):
    losses, auroc, _ = trained1(device, images, precision, generator)
    known, known_auroc, _ = expected(trained1, images, generator)
    assert losses[1] < losses[0]
    np.testing.assert_allclose(losses, known, rtol=LOSSES[precision])
    assert abs(auroc - known_auroc) < LOSSES[precision]


@WAYS
@pytest.mark.parametrize("contrast, bn", [("simsiam", "train"), ("byol", "eval")])
def test_stage_2(device, images, contrast, bn, precision):
    "L_sym begins at 0 with random heads: it is compared in its own range, [-1, 1], and its gradient in float32 only"
    log, _ = trained2(device, images, precision, contrast, bn)
    known, _ = expected(trained2, images, contrast, bn)
    for e, k in zip(log, known, strict=True):
        np.testing.assert_allclose([e["L_neg"], e["g_neg"]], [k["L_neg"], k["g_neg"]], rtol=LOSSES[precision])
        np.testing.assert_allclose([e["L_sym"], e["spread"]], [k["L_sym"], k["spread"]], atol=LOSSES[precision])
    if precision == "fp32":
        np.testing.assert_allclose(log[0]["g_sym"], known[0]["g_sym"], rtol=LOSSES["fp32"])


@DEVICES
@pytest.mark.parametrize("train", [trained1, trained2])
def test_the_same_seed_twice(device, images, train, monkeypatch):
    "Bit for bit where cuDNN is told to add in a fixed order; else within the tolerance, and how far apart is printed"
    def apart():
        one, two = (train(device, images, "fp32")[-1] for _ in range(2))
        return max(far(one[k].float(), two[k].float()) for k in one if one[k].float().norm() > 0)
    if device == "cuda":
        free = apart()
        print(f"{train.__name__} on {device}, the same seed twice: {free:.1e} apart")
        assert free < LOSSES["fp32"]
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    assert apart() == 0


@DEVICES
def test_the_coreset_picks_the_same_patches(device, bank):
    log, known = [], coreset_plain(bank.double(), 300, 5)
    picks = coreset(bank.to(device), n=300, start=5, log=log)
    assert picks.device.type == device and picks.tolist() == known.tolist()
    assert torch.equal(picks, coreset(bank.to(device), n=300, start=5)), "the same twice"
    true = torch.cdist(bank.double(), bank[known].double()).amin(1).amax()
    assert radius(bank.to(device), picks) == pytest.approx(true.item(), rel=1e-5)    # float32 of a sum of 48 squares
    for how in (dict(project=16), dict(starts=10), dict()):
        one, other = (coreset(x, .05, generator=new(), **how).tolist() for x in (bank.to(device), bank))
        assert one == other


def by_hand(bank, Q, b):
    "Eq. 8 and 9 in float64, all distances in one matrix"
    d, own = torch.cdist(Q.double(), bank.double()), torch.cdist(bank.double(), bank.double())
    s, nearest = d.min(1)
    near = own[nearest].argsort(1)[:, :b]
    E = d.gather(1, near).exp()
    return s, (1 - s.exp() / E.sum(1)) * s


@DEVICES
def test_search_scorers_and_maps(device, bank):
    "float32 beside float64: sums of 48 squares, differences and a logarithm, maps as two products with 49 terms"
    Q = bank[:2 * 49].roll(1, 0) * 1.1
    M = Memory(bank[200:].to(device))
    d, idx = M.search(Q.to(device), 5)
    true = torch.cdist(Q.double(), bank[200:].double()).sort(1)
    assert idx.device.type == d.device.type == device
    assert torch.equal(idx.cpu(), true.indices[:, :5]) and far(d, true.values[:, :5]) < 1e-6
    plain, paper = by_hand(bank[200:], Q, 9)
    found = {f: f(M, Q.view(2, 49, -1).to(device), 9) for f in (score_plain, score_paper)}
    assert far(found[score_plain].flatten(), plain) < 1e-6 and far(found[score_paper].flatten(), paper) < 1e-5
    maps, expected = (anomaly_maps(s, (7, 7), 56) for s in (found[score_plain], plain.view(2, 49)))
    assert maps.device.type == device and far(maps, expected) < 1e-5
    assert torch.equal(image_scores(found[score_plain], maps, "map").cpu(), maps.cpu().amax((1, 2)))
    assert all(torch.equal(s, f(M, Q.view(2, 49, -1).to(device), 9)) for f, s in found.items()), "the same twice"


@DEVICES
def test_pixel_metrics(device):
    "They count on the CPU whatever they are given; maps that differ in the last digit change the order of few pixels"
    masks = torch.zeros(6, 56, 56, dtype=torch.bool)
    masks[3:, 10:30, 20:40] = True
    touched = torch.nn.functional.adaptive_max_pool2d(masks.float(), 7).flatten(1)
    scores = torch.rand(6, 49, generator=new()) + 2 * touched
    def judged(device):
        s = scores.to(device)
        maps = anomaly_maps(s, (7, 7), 56)
        return metrics.evaluate(masks.any(1).any(1).to(device), masks.to(device), image_scores(s), maps)
    found, known = judged(device), judged("cpu")
    assert found.keys() == known.keys() and .5 < known["pixel_auroc"] < 1
    assert max(abs(found[k] - known[k]) for k in known) < 1e-5


@DEVICES
def test_one_category_from_end_to_end(device, tmp_path):
    "Both stages, memory, scores, metrics and the tour of Figures 1-5. Patches moved by 1e-6 moved the scores by 4e-7"
    cfg = config.config("smoke", size=64, resize=64, width=64, epochs1=1, epochs2=1, batch=16)
    data = load(None, "mini", "washer", 64)
    store, run = store_room.Store(tmp_path / "store"), partial(compare.compare, cfg, data=data, progress=False)
    found = run(device=device, methods=("frozen", "two_stage"), store=store)
    known = run(device="cpu", methods=("frozen",))
    assert np.isfinite(found.rows.drop(columns=["method", "seed"]).to_numpy(float)).all() and len(found.rows) == 2
    for one, other in ((found.image, known.image), (found.maps, known.maps)):
        assert far(torch.as_tensor(one["frozen"]), torch.as_tensor(other["frozen"])) < 1e-4
    r = compare.carry_out(tour.tour_task(cfg, data, device=device), data, store, device=device)
    assert r["hardware"]["device"] == (torch.cuda.get_device_name() if device == "cuda" else "cpu")
    assert r["made_from"]["by"]["device"] == device and r["values"]["kept"] > 0


@contextmanager
def strict(device):
    "Any wait of the host for the GPU is an error"
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Allowed(torch.nn.Module):
    "A module that may wait"
    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        before = torch.cuda.get_sync_debug_mode() if x.is_cuda else 0
        if x.is_cuda:
            torch.cuda.set_sync_debug_mode("default")
        try:
            return self.inside(x)
        finally:
            if x.is_cuda:
                torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("device", [on_a_gpu("cuda")])
def test_waiting_is_an_error(device):
    "The switch that the next tests rely on works: a number asked for is an error"
    x = torch.ones(4, device=device)
    with strict(device), pytest.raises(RuntimeError, match="synchroniz"):
        x.sum().item()
    assert x.sum().item() == 4


@DEVICES
@pytest.mark.parametrize("generator", ["perlin", "cutpaste", "nsa"])
def test_no_wait_in_a_step_of_stage_1(device, images, generator):
    c, F, D, G, _ = parts(device, generator=generator)
    I, loss = to_float(crop(images[:4], SIZE)).to(device), tocoad_room._loss(c.loss1, c, {})
    step = partial(train_step, F.requires_grad_(False), D, G, I, new(), loss, torch.optim.Adam(D.train().parameters()))
    step()                                                                   # the first one makes Adam's state
    with strict(device):
        losses = torch.stack([step() for _ in range(2)])
    assert losses.isfinite().all()


@DEVICES
@pytest.mark.parametrize("contrast, bn", [("simsiam", "views"), ("byol", "train")])
def test_no_wait_in_a_step_of_stage_2_but_for_the_views(device, images, contrast, bn):
    "kornia copies what it draws to the images' device, and waits for it, about 14 small copies a view"
    c, F, D, G, C = parts(device, contrast=contrast)
    optimiser, I = sgd(F, C, D, 1e-3, .05), to_float(images[:4]).to(device)
    C.views = Allowed(C.views)
    def step():
        optimiser.zero_grad()
        said = ncl_step(F, C, I, D, G, bn=bn, size=SIZE, generator=new())
        optimiser.step()
        C.update(F)
        return said["L_neg"]
    step()
    with strict(device):
        losses = torch.stack([step() for _ in range(2)])
    assert losses.isfinite().all()


@contextmanager
def room(device, f, megabytes, rows):
    "A function that has so much more GPU memory; on a CPU one that fails above so many rows"
    def hungry(x):
        if len(x) > rows:
            raise torch.OutOfMemoryError("out of memory")
        return f(x)
    if device != "cuda":
        yield hungry
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + megabytes * 2**20) / total)
    try:
        yield f
    finally:
        torch.cuda.set_per_process_memory_fraction(1.)
        torch.cuda.empty_cache()


@DEVICES
def test_little_memory_halves_the_images(device, monkeypatch, caplog):
    "Maps of 64 images at 256 take about 900 MB on their way through F; 300 are there"
    c, F, _, _, _ = parts(device, size=256, resize=256)
    x = load(None, "mini", "washer", 256).train.images[:32].repeat(2, 1, 1, 1)
    if device == "cpu":
        x = x[:12]
    expected = tocoad_room.embed_batch(F, x[:2], c).cpu()
    with room(device, lambda i: tocoad_room.embed_batch(F, i, c).cpu(), 300, 6) as f, caplog.at_level(logging.WARNING):
        found, fits = halving.halving(f, x, len(x))
    assert fits < len(x) and len(found) == len(x) and "memory ran out" in caplog.text
    assert far(found[:2], expected) < MAPS["fp32"]


@DEVICES
def test_little_memory_halves_the_search(device, bank, caplog):
    "Distances of 4,096 patches at once to 30,000 take 490 MB; 400 are there"
    stored = bank.repeat(10 if device == "cuda" else 1, 1)
    M, Q = Memory(stored.to(device)), bank.repeat(2, 1)[:4096].to(device) * 1.1
    expected = M.search(Q[:50])[0]
    with room(device, lambda q: M._find(q, 1), 400, 1000) as f, caplog.at_level(logging.WARNING):
        idx = halving.halving(f, Q - M.bank.mean(0), len(Q))[0]
    assert "memory ran out" in caplog.text and far(M.distances(Q[:50], idx[:50]), expected) < 1e-6
