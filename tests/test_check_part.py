"Mistakes in components as a student makes them: refused before the training, in a sentence, at no cost for sound ones."
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as nnf

from tocoad.data.errors import BadInput
from tocoad.data.images import textures
from tocoad.data.load import load
from tocoad.method.contrast import CONTRASTS, PREDICTORS, Heads, SimSiam, Views
from tocoad.method.coreset import coreset
from tocoad.method.cutpaste import CutPaste
from tocoad.method.discriminator import LOSSES, focal_loss
from tocoad.method.memory import PATCHES, SCORERS
from tocoad.method.nsa import NSA
from tocoad.method.perlin import Perlin, changed
from tocoad.method.pretrain import check_discriminator
from tocoad.run import compare as room
from tocoad.run.compare import compare, tasks
from tocoad.run.config import config
from tocoad.run.store import Store
from tocoad.systems.check import CHECKS, CONTRACTS, check_numbers, check_part
from tocoad.systems.system import PARTS, Stage, System

CFG = config("smoke", epochs1=1, epochs2=1, width=32, resize=64, size=64)


@pytest.fixture(scope="module")
def washer():
    return load(None, "mini", "washer", size=64)


def spot(images, generator):
    "A dark spot: sound, and the stem of the mistakes below"
    y, x = torch.rand(2, len(images), 1, 1, generator=generator)
    H, W = images.shape[-2:]
    M = (torch.arange(H)[:, None] - y * H)**2 + (torch.arange(W) - x * W)**2 < 50
    out = torch.where(M[:, None], images * .4, images)
    return out, changed(out, images)


# A generator

def forgot_the_generator(images):
    return spot(images, torch.Generator().manual_seed(0))

def global_numbers(images, generator):
    return spot(images, None)

def numpys_numbers(images, generator):
    return spot(images, torch.Generator().manual_seed(int(np.random.randint(99))))

def pythons_numbers(images, generator):
    return spot(images, torch.Generator().manual_seed(random.randrange(99)))

def own_generator(images, generator):
    return spot(images, torch.Generator().manual_seed(0))

def numpy_output(images, generator):
    return tuple(x.numpy() for x in spot(images, generator))

def mask_of_four_dimensions(images, generator):
    out, M = spot(images, generator)
    return out, M[:, None]

def float_masks(images, generator):
    out, M = spot(images, generator)
    return out, M.float()

def only_images(images, generator):
    return spot(images, generator)[0]

def bytes_out(images, generator):
    out, M = spot(images, generator)
    return (255 * out).byte(), M

def beyond_one(images, generator):
    out, M = spot(images, generator)
    return torch.where(M[:, None], out + 1, out), M

def nan_inside(images, generator):
    out, M = spot(images, generator)
    return torch.where(M[:, None], torch.nan, out), M

def in_place(images, generator):
    out, M = spot(images, generator)
    return images.copy_(out), M

def never_anything(images, generator):
    torch.rand(1, generator=generator)
    return images.clone(), torch.zeros_like(images[:, 0], dtype=torch.bool)

def masks_of_more(images, generator):
    out, M = spot(images, generator)
    return out, torch.ones_like(M)

def masks_of_less(images, generator):
    out, M = spot(images, generator)
    return out, M & False

def smaller_images(images, generator):
    return tuple(x[..., :32, :32] for x in spot(images, generator))

def misspelt(images, generator):
    return spot(imges, generator) # noqa: F821

class Counts:
    "Another result each time"
    calls = 0
    def __call__(self, images, generator):
        self.calls += 1
        return spot(images, torch.Generator().manual_seed(self.calls))


# A loss

def per_pixel(logits, masks):
    return nnf.cross_entropy(logits, masks.long(), reduction="none")

def plain_number(logits, masks):
    return nnf.cross_entropy(logits, masks.long()).item()

def without_gradient(logits, masks):
    return nnf.cross_entropy(logits.detach(), masks.long())

def gradient_of_zero(logits, masks):
    return (0 * logits).sum()

def undefined_without_anomalies(logits, masks):
    p = logits.softmax(1)[:, 1]
    return (p * masks).sum() / masks.sum()

def one_argument(logits):
    return logits.mean()

def with_noise(logits, masks):
    return focal_loss(logits + torch.randn_like(logits), masks)

def masks_in_place(logits, masks):
    return focal_loss(logits, masks.logical_not_())


# A contrast, views, a head

class OneValue(SimSiam):
    def forward(self, F, images):
        return super().forward(F, images)[0]

class OtherInit(nn.Module):
    def __init__(self, width):
        super().__init__()

class NoUpdate(nn.Module):
    def __init__(self, F, layers, concat, width, head, views):
        super().__init__()
        self.heads, self.views = Heads(F.channels, layers, concat, width, head), views
    def forward(self, F, images):
        z = self.heads(F(self.views(images)))[0]
        return z.square().mean(), dict(size=z.detach().norm())

class FloatsForTheLog(SimSiam):
    def forward(self, F, images):
        loss, said = super().forward(F, images)
        return loss, {k: v.item() for k, v in said.items()}

class NanForTheLog(SimSiam):
    def forward(self, F, images):
        loss, said = super().forward(F, images)
        return loss, said | dict(ratio=loss.detach() * torch.nan)

class LossPerImage(SimSiam):
    def forward(self, F, images):
        z = self.heads(F(self.views(images)))[0]
        return z.square().mean(1), {}

def one_channel(images):
    return images.mean(1, keepdim=True)

def beyond_range(images):
    return 2 * images - 1

def numpys_flip(images):
    return images.flip(-1) if np.random.rand() < .5 else images.clone()

def too_small(images):
    return images[..., :16, :16]

def one_view_of_all(images):
    return images[:1]

def other_width(width):
    return nn.Linear(width, width // 2)

def no_module(width):
    return lambda z: z


# Patches, a sampler, a scorer

def maps_as_they_are(maps, dims):
    return maps[0]

def ten_places(maps, dims):
    return maps[0].flatten(2).mT[:, :10]

def by_the_batch(maps, dims):
    f = maps[0].flatten(2).mT
    return f - f.mean((0, 1))

def numpy_patches(maps, dims):
    return maps[0].flatten(2).mT.numpy()

def maps_in_place(maps, dims):
    return maps[0].relu_().flatten(2).mT

def zeros(maps, dims):
    return torch.zeros_like(maps[0]).flatten(2).mT

def rows(X, ratio, generator):
    return X[torch.randperm(len(X), generator=generator)[:9]]

def global_choice(X, ratio, generator):
    return torch.randperm(len(X))[:9]

def nothing(X, ratio, generator):
    return torch.zeros(0, dtype=torch.long)

def bool_mask(X, ratio, generator):
    return torch.rand(len(X), generator=generator) < ratio

def a_list(X, ratio, generator):
    return [0, 1, 2]

def beyond_the_end(X, ratio, generator):
    return torch.arange(9) + len(X)

def forgot_generator(X, ratio):
    return torch.arange(9)

def one_score(memory, Q, b):
    return memory.search(Q)[0].max()

def one_per_image(memory, Q, b):
    return memory.search(Q)[0].amax((-1, -2))

def similarity(memory, Q, b):
    return -memory.search(Q)[0][..., 0]

def nan_scores(memory, Q, b):
    d = memory.search(Q)[0][..., 0]
    return d / d * d

def bank_in_place(memory, Q, b):
    return memory.search(Q.mul_(2))[0][..., 0]


WRONG = [
    ("generator", forgot_the_generator, "takes 1 positional argument but 2 were given"),
    ("generator", global_numbers, "it drew global random numbers"),
    ("generator", numpys_numbers, "it drew global random numbers"),
    ("generator", pythons_numbers, "it drew global random numbers"),
    ("generator", own_generator, "two seeds gave the same result"),
    ("generator", Counts(), "the same seed gave two results"),
    ("generator", numpy_output, "not two tensors, images and masks"),
    ("generator", mask_of_four_dimensions, "masks torch.bool (3, 1, 64, 64), not 3-D bool"),
    ("generator", float_masks, "masks torch.float32 (3, 64, 64), not 3-D bool"),
    ("generator", only_images, "it gave a tensor float32 (3, 3, 64, 64), not two tensors"),
    ("generator", bytes_out, "images out are torch.uint8"),
    ("generator", beyond_one, "are not within [0, 1]"), ("generator", nan_inside, "are not within [0, 1]"),
    ("generator", in_place, "it changed what it was given in place"),
    ("generator", never_anything, "two seeds gave the same result"),
    ("generator", masks_of_more, "are called anomalous but did not change"),
    ("generator", masks_of_less, "changed but are not called anomalous"),
    ("generator", smaller_images, "images out are torch.float32 (3, 3, 32, 32)"),
    ("generator", misspelt, "NameError in `return spot(imges, generator) # noqa: F821`: name 'imges' is not defined"),
    ("generator", "perlin", "TypeError: 'str' object is not callable"),
    ("loss", per_pixel, "it gave a tensor float32 (4, 64, 64), not a tensor of one number"),
    ("loss", plain_number, "it gave a builtins float, not a tensor of one number"),
    ("loss", without_gradient, "has no gradient"), ("loss", gradient_of_zero, "its gradient is 0"),
    ("loss", undefined_without_anomalies, "holds NaN or infinity"), ("loss", one_argument, "2 were given"),
    ("loss", with_noise, "it drew global random numbers"), ("loss", masks_in_place, "in place"),
    ("loss", nn.CrossEntropyLoss(), "but got Bool"),
    ("contrast", OneValue, "it gave a tensor float32 (), not a loss and numbers"),
    ("contrast", OtherInit, "TypeError: "), ("contrast", NoUpdate, "and a method update"),
    ("contrast", FloatsForTheLog, "it gave a builtins float, not a tensor of one number"),
    ("contrast", NanForTheLog, "holds NaN"), ("contrast", LossPerImage, "it gave a tensor float32 (3,)"),
    ("views", one_channel, "not (3, 3, any, any)"), ("views", beyond_range, "are not within [0, 1]"),
    ("views", numpys_flip, "random numbers of NumPy or Python"), ("views", too_small, "at least 32 x 32 pixels"),
    ("views", one_view_of_all, "not (3, 3, any, any)"), ("views", Views, "TypeError: "),
    ("head", other_width, "it gave a tensor float32 (4, 16), not (4, 32)"), ("head", no_module, "not a module"),
    ("head", nn.Linear(32, 32), "TypeError"),
    ("patches", maps_as_they_are, "not (3, any, any)"), ("patches", ten_places, "10 places are no square grid"),
    ("patches", by_the_batch, "depends on the other images"), ("patches", numpy_patches, "a numpy ndarray, not"),
    ("patches", maps_in_place, "in place"), ("patches", zeros, "one value everywhere"),
    ("sampler", rows, "float32 (9, 16), not whole numbers"), ("sampler", global_choice, "global random numbers"),
    ("sampler", nothing, "it chose no patch at all"), ("sampler", bool_mask, "not indices"),
    ("sampler", a_list, "it gave a list of 3, not a tensor"), ("sampler", beyond_the_end, "are not all of 0 to 1023"),
    ("sampler", forgot_generator, "unexpected keyword argument 'generator'"),
    ("scorer", one_score, "it gave a tensor float32 ()"), ("scorer", one_per_image, "it gave a tensor float32 (2,)"),
    ("scorer", similarity, "not higher"), ("scorer", nan_scores, "NaN"), ("scorer", bank_in_place, "in place")]


@pytest.mark.parametrize("name, part, says", WRONG, ids=lambda x: getattr(x, "__name__", None) or str(x)[:12])
def test_a_mistake_is_refused_before_the_training(washer, tmp_path, monkeypatch, name, part, says):
    "By `compare`, in one sentence with the component, what is wrong and the contract; nothing was stored or traced"
    monkeypatch.setattr(room, "carry_out", lambda *a, **k: pytest.fail("a stage was begun"))
    with pytest.raises(BadInput) as e:
        compare(CFG, methods=dict(mine=dict(parts={name: part})), data=washer, device="cpu", progress=False)
    said = str(e.value)
    assert said.startswith(name) and says in said and CONTRACTS[name] in said and "\n" not in said
    assert e.value.__suppress_context__ and e.value.__cause__ is None


def test_each_component_is_tried():
    assert {*CHECKS} == {*CONTRACTS} == {*PARTS} == {name for name, *_ in WRONG}
    with pytest.raises(BadInput, match="a component cannot be 'lens'"):
        check_part("lens", spot)


SOUND = dict(
    generator=[spot, CutPaste(), CutPaste(variant="scar"), CutPaste(clean=.9), NSA(), NSA(label="full")],
    loss=[*LOSSES.values(), lambda logits, masks: nnf.cross_entropy(logits, masks.long(), label_smoothing=.1)],
    contrast=[*CONTRASTS.values()], views=[Views(64), lambda x: x[..., :32, :32], nn.Identity()],
    head=[*PREDICTORS.values(), lambda width: nn.Sequential(nn.Linear(width, width), nn.Dropout()),
          lambda width: nn.Identity()],
    patches=[*PATCHES.values(), lambda maps, dims: maps[1].flatten(2).mT],
    sampler=[coreset, lambda X, ratio, generator: torch.arange(len(X))],
    scorer=[*SCORERS.values(), lambda memory, Q, b: memory.search(Q, 3)[0].mean(-1)])


@pytest.mark.parametrize("name", PARTS)
def test_a_sound_component_passes_and_nothing_moves(washer, name):
    "Random numbers, images and the component stay as they are"
    for part in [*SOUND[name], *([Perlin(textures=textures("embedded", limit=8))] if name == "generator" else [])]:
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        before, images = [torch.rand(1).item(), np.random.rand(), random.random()], washer.train.images.clone()
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        check_part(name, part, CFG, washer.train.images)
        assert [torch.rand(1).item(), np.random.rand(), random.random()] == before
        assert torch.equal(images, washer.train.images)
        check_part(name, part)


def test_a_run_with_a_sound_component_is_the_same_with_the_check_and_without(washer, monkeypatch):
    run = lambda: compare(CFG, methods=dict(mine=dict(parts=dict(generator=spot))), data=washer, progress=False,
                          device="cpu").maps["mine"]
    with_check = run()
    monkeypatch.setattr(room, "check_parts", lambda *a: None)
    assert np.array_equal(with_check, run())


# Numbers that are none

def only(data, n=None, grey=None):
    "A category with the first training images alone, or with all of one grey"
    s = data.train
    images = s.images if grey is None else torch.full_like(s.images, grey)
    cut = {k: getattr(s, k)[:n] for k in ("labels", "defects", "paths")}
    return replace(data, train=replace(s, images=images[:n], **cut))


def test_a_generator_without_any_anomaly_is_named(washer):
    with pytest.raises(BadInput, match="G called 0 of [0-9]+ pixels anomalous"):
        compare(CFG.replace(generator="cutpaste", jitter=0.), methods=["two_stage"], data=only(washer, grey=0),
                device="cpu", progress=False)
    with pytest.raises(BadInput, match="generator CutPaste: two seeds gave the same result"):
        parts = dict(generator=CutPaste(jitter=0.))
        compare(CFG, methods=dict(mine=dict(parts=parts)), data=only(washer, grey=0), device="cpu", progress=False)


def test_every_pixel_anomalous_is_as_useless_as_none(washer):
    F = lambda x: x
    D = lambda x: x[:, :2]
    G = lambda x, generator: (x, torch.ones_like(x[:, 0], dtype=torch.bool))
    with pytest.raises(BadInput, match="G called 131072 of 131072 pixels anomalous"):
        check_discriminator(F, D, G, washer.train.images, size=64)


@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize("method", ["contrastive", "two_stage"])
def test_one_training_image_cannot_be_compared(washer, method):
    with pytest.raises(BadInput, match="one normal image .* at least 2"):
        compare(CFG, methods=[method], data=only(washer, 1), device="cpu", progress=False)


@pytest.mark.parametrize("grey", [0, 128])
def test_constant_images_give_numbers(washer, grey):
    result = compare(CFG, data=only(washer, grey=grey), device="cpu", progress=False)
    assert result.rows.notna().all(axis=None)


def test_one_image_is_enough_for_the_frozen_features(washer):
    result = compare(CFG, methods=["frozen"], data=only(washer, 1), device="cpu", progress=False)
    assert result.rows.notna().all(axis=None)


def test_eq_9_needs_neighbours(washer):
    cfg = CFG.replace(scorer="paper", coreset=1e-6)
    with pytest.raises(BadInput, match="Eq. 9 needs neighbours, and the memory holds one patch"):
        compare(cfg, methods=["frozen"], data=washer, device="cpu", progress=False)


@pytest.mark.parametrize("values, arrays, says", [
    (dict(auroc=float("nan")), None, "mine gave auroc = nan"),
    (dict(log=[dict(loss=1.), dict(loss=float("inf"))]), None, "mine gave log, 1, loss = inf"),
    (dict(log=(np.float32("nan"),)), None, "mine gave log, 0 = nan"),
    ({}, dict(image=np.array([0, np.nan], np.float32)), "mine gave image"),
    ({}, dict(maps=np.array([0, np.inf])), "mine gave maps")])
def test_a_stage_that_gives_no_number_is_named(washer, values, arrays, says):
    "In a system of one's own too"
    with pytest.raises(BadInput, match=says):
        check_numbers("mine", values, arrays)
    mine = System("mine", {"mine": Stage(lambda *_: (values, arrays))})
    with pytest.raises(BadInput, match=says):
        compare(CFG, methods=dict(mine=mine), data=washer, device="cpu", progress=False)


def test_numbers_that_do_not_exist_are_none(washer, tmp_path):
    "Metrics of a test set with one class, and texts, are no fault"
    check_numbers("metrics", dict(image_auroc=None, how="exact", n=3, log=[]), dict(idx=np.arange(3)))
    t = tasks(CFG.replace(method="frozen"), washer)["memory"]
    assert room.carry_out(t, washer, Store(tmp_path / "store"))["values"]["kept"] > 0
