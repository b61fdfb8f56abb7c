"""The generators: every setting does what makes it different."""
import colorsys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from scipy.ndimage import label as components
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tocoad.data.images import BadInput, crop, textures, to_float
from tocoad.data.load import load
from tocoad.method import cutpaste, nsa, perlin
from tocoad.method.categories import gradients_for, rotation_for
from tocoad.method.cutpaste import CutPaste
from tocoad.method.foreground import foreground
from tocoad.method.nsa import NSA, poisson_blend, solve_poisson
from tocoad.method.perlin import Anomaly, Perlin, changed, check_generator


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pictures():
    return {c: to_float(crop(load(category=c).train.images[:8])) for c in ("washer", "brick")}


@pytest.fixture(scope="module")
def washer(pictures):
    return pictures["washer"]


@pytest.fixture(scope="module")
def small(washer):
    return torch.nn.functional.interpolate(washer, (48, 48), mode="area")


@pytest.fixture(scope="module")
def T():
    return textures()


GENERATORS = {"perlin": Perlin, "cutpaste": CutPaste, "nsa": NSA}


def make(name, T, **settings):
    return Perlin(textures=T, **settings) if name == "perlin" else GENERATORS[name](**settings)


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("settings", [{}, dict(label="full"), dict(clean=.5), dict(rotate="both"),
                                      dict(foreground=True, count=2)],
    ids=lambda s: ",".join(f"{k}={v}" for k, v in s.items()) or "default")
def test_every_generator_keeps_the_rules(washer, T, name, settings):
    assert 0 < check_generator(make(name, T, **settings), washer[:4]) < .4


@pytest.mark.parametrize("name", GENERATORS)
def test_clean_images_stay_as_they_are_and_move_no_other_draw(small, T, name):
    images = small.repeat(25, 1, 1, 1)
    (a, y), (b, z) = (make(name, T, clean=c, rotate="none")(images, seeded(1)) for c in (0., .6))
    clean = (b == images).flatten(1).all(1)
    assert .5 < clean.float().mean() < .75 and not z[clean].any()
    assert torch.equal(a[~clean], b[~clean]) and torch.equal(y[~clean], z[~clean])
    c, none = make(name, T, clean=1.)(images[:8], seeded(1))
    assert not none.any()


@pytest.mark.parametrize("name", GENERATORS)
def test_label_full_is_the_touched_region_and_changed_the_changed_part_of_it(pictures, T, name):
    x = pictures["brick"]
    (a, y), (b, z) = (make(name, T, label=k, rotate="none")(x, seeded(2)) for k in ("full", "changed"))
    assert torch.equal(a, b) and torch.equal(z, y & changed(a, x)) and y.sum() > z.sum()
    assert torch.equal(y, make(name, T, rotate="none").draw(x, seeded(2))[1]) # turning nothing draws nothing


def test_label_full_is_checked_by_its_own_rule(washer):
    class Nothing(Anomaly):
        def draw(self, I, generator, fg=None):
            M = (torch.rand(I[:, 0].shape, generator=generator) > .5)
            return torch.where(M[:, None] & (torch.arange(I.shape[-1]) > 99), 1 - I, I), M
    assert check_generator(Nothing(label="full"), washer[:2]) > .4
    def too_small(images, generator):
        M = torch.rand(images[:, 0].shape, generator=generator) > .5
        return torch.where(M[:, None], 1 - images, images), torch.zeros_like(M)
    too_small.label = "full"
    with pytest.raises(AssertionError, match="changed but are not called anomalous"):
        check_generator(too_small, washer[:2])
    def too_large(images, generator):
        return too_small(images, generator)[0], torch.ones_like(images[:, 0], dtype=torch.bool)
    with pytest.raises(AssertionError, match="called anomalous but did not change"):
        check_generator(too_large, washer[:2])


def test_rotate_follows_destseg_for_mvtec_and_turns_everything_else():
    none, slight = {"capsule", "metal_nut", "pill", "toothbrush", "transistor"}, {"wood", "zipper", "cable"}
    both = {"bottle", "grid", "hazelnut", "leather", "tile", "carpet", "screw", "pcb1", "01", "washer"}
    for how, categories in dict(none=none, slight=slight, both=both).items():
        assert {rotation_for(c) for c in categories} == {how}


def test_rotate_turns_as_it_says(washer, T):
    images = washer.repeat(8, 1, 1, 1)
    degrees = {how: perlin.rotate(images[..., :8, :8], how, 5., 0., seeded(1))[1] for how in perlin.ROTATIONS}
    off = {how: (d + 45) % 90 - 45 for how, d in degrees.items()}
    assert not degrees["none"].any() and not off["right"].any() and set(degrees["right"].tolist()) == {0, 90, 180, 270}
    assert 4 < degrees["slight"].abs().max() <= 5 and off["both"].abs().max() <= 5.001 and degrees["both"].max() > 260
    assert torch.equal(Perlin(textures=T, rotate="none").base(washer)[0], washer)
    half = perlin.rotate(images[..., :6], "right", generator=seeded(1))
    assert set((half[1] % 360).tolist()) == {0, 180} and half[0].shape[-2:] == images[..., :6].shape[-2:]
    upside = half[1] % 360 == 180
    torch.testing.assert_close(half[0][upside], images[..., :6].flip(-1, -2)[upside], atol=1e-5, rtol=0)
    torch.testing.assert_close(half[0][~upside], images[..., :6][~upside], atol=1e-5, rtol=0)
    assert Perlin(textures=T)(washer[..., :100], seeded())[0].shape == (8, 3, 224, 100)


def test_angle_and_fill_reach_the_base_image(washer, T):
    turned = {a: Perlin(textures=T, rotate="slight", angle=a).base(washer, seeded(1))[0] for a in (0., 5., 30.)}
    moved = [(x - washer).abs().mean() for x in turned.values()]
    assert moved[0] < 1e-5 < moved[1] < moved[2]
    wide = dict(textures=T, rotate="slight", angle=30.)
    corner = [Perlin(fill=f, **wide).base(washer, seeded(1))[0][..., 0, 0] for f in (0., 1.)]
    assert any((a == 0).all() and (b == 1).all() for a, b in zip(*corner, strict=True))


@pytest.mark.parametrize("name", GENERATORS)
def test_foreground_keeps_anomalies_on_the_object(washer, T, name):
    G = make(name, T, foreground=True, rotate="slight")
    I_R, fg = G.base(washer, seeded(5))
    I_G, y = G(washer, seeded(5))
    assert .1 < fg.float().mean() < .5 and y.any() and not (y & ~fg).any()
    assert torch.equal(torch.where(fg[:, None], I_R, I_G), I_R)
    assert (make(name, T, rotate="slight")(washer, seeded(5))[1] & ~fg).any()


@pytest.mark.parametrize("G", [CutPaste(variant="scar", foreground=True),
                               NSA(patches=1, half=(.03, .05), foreground=True)], ids=["scar", "nsa"])
def test_foreground_puts_the_centre_on_the_object(washer, G):
    assert G(washer.repeat(2, 1, 1, 1), seeded(5))[1].flatten(1).any(1).all()


def test_foreground_is_all_of_a_texture_and_of_an_empty_image(pictures):
    assert foreground(pictures["brick"]).all() and foreground(torch.full((2, 3, 64, 64), .3)).all()


@pytest.mark.parametrize("name", GENERATORS)
def test_count_draws_more(washer, T, name):
    one, three = (make(name, T, count=c, rotate="none")(washer, seeded(1))[1].float().mean() for c in (1, 3))
    assert three > 1.7 * one
    with pytest.raises(BadInput, match="at least one"):
        make(name, T, count=0)


def test_scales_set_how_fine_the_pieces_are(T):
    masks = [perlin.perlin_mask(20, (224, 224), seeded(), s).numpy() for s in ((0, 2), (2, 4), (4, 6))]
    pieces = [sum(components(m)[1] for m in M) for M in masks]
    assert pieces[0] * 3 < pieces[1] and pieces[1] * 3 < pieces[2]


def test_threshold_sets_how_much_is_covered():
    cover = [perlin.perlin_mask(50, (96, 96), seeded(), threshold=t).float().mean() for t in (.2, .5, .8)]
    assert cover[0] > 3 * cover[1] and cover[1] > 20 * cover[2]


def test_beta_sets_how_much_shines_through(washer, T):
    red = torch.zeros(1, 3, 256, 256, dtype=torch.uint8)
    red[:, 0] = 255
    x = washer * .5
    for b in (0., .4):
        I_G, y = Perlin(textures=red, beta=(b, b), rotate="none")(x, seeded(1))
        wanted = (1 - b) * red[:, :, :224, :224] / 255 + b * x
        assert torch.allclose(I_G.movedim(1, -1)[y], wanted.movedim(1, -1)[y], atol=1e-6)
    assert torch.equal(Perlin(textures=red, beta=(1, 1), rotate="none")(x, seeded(1))[0], x)


def test_perlin_needs_textures(washer, T):
    for nothing in (lambda: Perlin(), lambda: Perlin(textures=None), lambda: Perlin(textures="dtd/images")):
        with pytest.raises(BadInput, match=r"pass textures\(\) from tocoad.data.images"):
            nothing()
    few = Perlin(textures=T[:2, :, :100, :100])(washer, seeded(1))     # smaller than the images: enlarged
    assert few[1].any()


def test_variants_of_cutpaste(small):
    images = small.repeat(25, 1, 1, 1)
    y = {v: CutPaste(variant=v, label="full")(images, seeded(1))[1].sum((1, 2)) for v in ("patch", "scar", "union")}
    side = 48 * 48
    assert .015 * side < y["patch"].min() and y["patch"].max() < .16 * side
    assert 15 < y["scar"].min() and y["scar"].max() <= 26 * 17
    wide = torch.zeros(400, 3, 160, 160)
    large = CutPaste(variant="union", label="full").draw(wide, seeded(1))[1].sum((1, 2)) > 26 * 17
    assert .4 < large.float().mean() < .6
    with pytest.raises(BadInput, match="variant='hole' is unknown"):
        CutPaste(variant="hole")


def test_jitter_changes_colours_by_at_most_so_much():
    P = torch.rand(3, 5, 6, generator=seeded()) * .5 + .2
    for hue in (-.1, .07):
        colours = [colorsys.rgb_to_hsv(*p) for p in P.flatten(1).T.tolist()]
        wanted = [colorsys.hsv_to_rgb((h + hue) % 1, s, v) for h, s, v in colours]
        assert np.abs(cutpaste.recolour(P, 1., 1., 1., hue).flatten(1).T.numpy() - wanted).max() < 1e-4
    flat = torch.full((1, 3, 64, 64), .5)                               # a grey image: only brightness can move it
    for amount in (0., .1, .4):
        moved = max((CutPaste(jitter=amount)(flat, seeded(s))[0] - flat).abs().max().item() for s in range(20))
        assert amount * .5 * .6 - 1e-6 <= moved <= amount * .5 + 1e-5


def test_jitter_moves_the_hue():
    red = torch.zeros(1, 3, 64, 64)
    red[:, 0] = .5                                                      # without hue, green and blue stay equal
    def apart(jitter):
        made = [CutPaste(jitter=jitter)(red, seeded(s))[0] for s in range(9)]
        return max((G[:, 1] - G[:, 2]).abs().max().item() for G in made)
    assert apart(0.) < 1e-6 and .05 < apart(.1) < .4


def test_gradients_follow_the_category():
    textured = {"carpet", "grid", "leather", "tile", "wood", "brick", "grass", "gravel"}
    objects = {"bottle", "screw", "washer", "plug", "01", "pcb1"}
    assert {c for c in textured | objects if gradients_for(c) == "mixed"} == textured
    with pytest.raises(BadInput, match="gradients='strong' is unknown"):
        NSA(gradients="strong")


def test_mixed_gradients_keep_the_lines_of_a_texture(pictures):
    x = pictures["brick"]
    strength = lambda z: torch.hypot(*nsa.gradient(z.flatten(0, 1))).view_as(z)
    kept = {}
    for mode in ("source", "mixed"):
        I_G, M = NSA(gradients=mode, label="full")(x, seeded(6))
        lines = (strength(x) > .15) & M[:, None]                        # mortar inside the boxes
        kept[mode] = (strength(I_G)[lines] > .1).float().mean().item()
    assert kept["mixed"] > .9 > .6 > kept["source"], kept


@pytest.mark.parametrize("h, w, margin", [(5, 9, 0), (12, 7, 1), (30, 41, 3), (5, 60, 3)])
@pytest.mark.parametrize("gradients", ["source", "mixed"])
def test_poisson_blending_is_the_dense_solution(h, w, margin, gradients):
    dst, src = torch.rand(2, h, w, generator=seeded(h), dtype=torch.float64)
    step = lambda z, axis: torch.nn.functional.pad(z.diff(dim=axis), (0, 1) if axis == 1 else (0, 0, 0, 1))
    inside = torch.zeros(h, w, dtype=torch.bool)
    inside[margin:h - margin, margin:w - margin] = True
    if gradients == "mixed":
        inside &= torch.hypot(step(src, 0), step(src, 1)) > torch.hypot(step(dst, 0), step(dst, 1))
    v = [torch.where(inside, step(src, k), step(dst, k)) for k in (0, 1)]
    n = [[y * (w - 2) + x for x in range(w - 2)] for y in range(h - 2)]
    unknowns = (h - 2) * (w - 2)
    A, b = torch.zeros(unknowns, unknowns, dtype=torch.float64), torch.zeros(unknowns, dtype=torch.float64)
    for y in range(h - 2):
        for x in range(w - 2):
            i, Y, X = n[y][x], y + 1, x + 1
            A[i, i], b[i] = -4, v[0][Y, X] - v[0][Y - 1, X] + v[1][Y, X] - v[1][Y, X - 1]
            for p, q in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if 0 <= p < h - 2 and 0 <= q < w - 2:
                    A[i, n[p][q]] = 1
                else:
                    b[i] -= dst[p + 1, q + 1]
    u = dst.clone()
    u[1:-1, 1:-1] = torch.linalg.solve(A, b).view(h - 2, w - 2)
    mine = poisson_blend(dst[None].float(), src[None].float(), gradients, margin)[0]
    assert (mine - u).abs().max() < 2e-5


def test_the_poisson_solution_stays_exact_on_large_boxes():
    e = torch.rand(1, 178, 90, generator=seeded(), dtype=torch.float64)
    p = torch.nn.functional.pad(e, (1, 1, 1, 1))
    f = p[:, 2:, 1:-1] + p[:, :-2, 1:-1] + p[:, 1:-1, 2:] + p[:, 1:-1, :-2] - 4 * e
    assert (solve_poisson(f.float()) - e).abs().max() < 1e-4


def test_patches_half_and_margin_of_nsa(washer):
    cover = {k: NSA(label="full", **s)(washer, seeded(1))[1].float().mean().item()
        for k, s in dict(one=dict(patches=1), three={}, small=dict(half=(.03, .05))).items()}
    assert cover["small"] < .5 * cover["three"] and cover["one"] < .6 * cover["three"]
    sides = NSA(margin=10).sides(500, 100, seeded())
    assert sides.min() == 23 and NSA().sides(500, 100, seeded()).min() == 9


@pytest.mark.parametrize("name", GENERATORS)
def test_results_are_float32_under_autocast_and_leave_no_gradient(washer, T, name):
    G = make(name, T)
    plain = G(washer, seeded(2))
    with torch.autocast("cpu", torch.bfloat16):
        inside = G(washer.clone().requires_grad_(), seeded(2))
    assert torch.equal(plain[0], inside[0]) and torch.equal(plain[1], inside[1])
    assert inside[0].dtype == torch.float32 and not inside[0].requires_grad


class Waits(TorchDispatchMode):
    "Calls after which a GPU would have finished all its work: copies between devices that are not told otherwise"
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        between = len({t.device for t in tensors if t.dim()}) > 1           # an index, say, is copied by the way
        moved = (kwargs or {}).get("device") not in (None, *(t.device for t in tensors))
        if between or f is torch.ops.aten._to_copy.default and moved and not kwargs.get("non_blocking"):
            self.found.append(f)
        return f(*args, **kwargs or {})


@pytest.mark.parametrize("name, settings", [(n, {}) for n in GENERATORS] + [("cutpaste", dict(variant="scar"))])
def test_draws_ask_the_images_device_for_nothing(washer, T, monkeypatch, name, settings):
    "meta has no numbers: whoever asks gets an error; and nobody waits for it"
    monkeypatch.setattr(perlin, "arithmetic", lambda *_: nullcontext())      # autocast knows no meta
    G, x = make(name, T.to("meta"), rotate="both", **settings), washer.to("meta")
    with Waits() as waits:
        I_G, y_G = G(x, seeded())
    assert I_G.shape == x.shape and y_G.shape == (8, 224, 224) and waits.found == []
    with waits:
        torch.zeros(3).to("meta")
    assert waits.found == [torch.ops.aten._to_copy.default]


@pytest.mark.parametrize("images, words", [(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "uint8"),
                                           (torch.zeros(3, 8, 8), r"\(3, 8, 8\)"),
                                           (torch.zeros(2, 1, 8, 8), r"\(2, 1, 8, 8\)")])
def test_wrong_images_are_refused_in_one_sentence(T, images, words):
    with pytest.raises(BadInput, match=words):
        Perlin(textures=T)(images)
