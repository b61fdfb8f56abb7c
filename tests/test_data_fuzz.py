"Whatever is drawn and however it is stored: it is read as drawn, or a sentence asks, or a note tells"
import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from toys import noise, save

from tocoad.data.errors import BadInput
from tocoad.data.load import load
from tocoad.data.verify import verify

SIDE = 24


def alpha(colour, invert=False):
    def ink(m):
        im = Image.new("RGB", (SIDE, SIDE), colour)
        im.putalpha(Image.fromarray((m ^ invert).astype(np.uint8) * 255))
        return im
    return ink


def one(value, kind=np.uint8, ground=0):
    return lambda m: np.where(m, value, ground).astype(kind)


def split(*values):
    "The defect's rows take turns with the values"
    return lambda m: np.where(m, np.array(values)[np.arange(SIDE) % len(values)][:, None], 0).astype(np.uint8)


def rims(m):
    "A soft border around what was drawn"
    near = np.asarray(Image.fromarray(m.astype(np.uint8) * 255).resize((SIDE // 2,) * 2).resize((SIDE,) * 2))
    return np.where(m, 255, near // 3).astype(np.uint8)


def shaded(m):
    "Classes in colours, as a palette"
    im = Image.fromarray(m.astype(np.uint8)).convert("P")
    im.putpalette([0, 0, 0, 128, 64, 0])
    return im


INKS = {
    "white": one(255), "one": one(1), "grey": one(100), "bilevel": lambda m: m, "deep": one(65535, np.uint16),
    "wide": one(7, np.uint16), "classes": split(1, 2, 3), "levels": split(60, 255), "bright": split(200, 255),
    "rims": rims, "inverted": one(0, ground=255), "ground": one(255, ground=20), "from one": one(2, ground=1),
    "brush": alpha("black"), "white brush": alpha("white"), "hole": alpha("black", True), "palette": shaded,
    "opaque": lambda m: Image.fromarray(m.astype(np.uint8) * 255).convert("LA"), "picture": lambda m: noise(99, SIDE),
    "dark picture": lambda m: noise(98, SIDE) // 12, "all": one(255, ground=255), "nothing": one(0),
}
PLACES = ["ground_truth/{}", "ground_truth/{}", "masks/{}", "test/mask/{}", "test/{}", "ground_truth", "marks/{}"]

boxes = st.tuples(st.integers(0, 16), st.integers(0, 16), st.integers(2, 14), st.integers(2, 14))
names = st.sampled_from(sorted(INKS))
inks = st.one_of(names.map(lambda k: [k]), st.lists(names, min_size=2, max_size=3))
PLAIN = dict(end=".png", place="ground_truth/{}", stem="_mask")
drawings = st.fixed_dictionaries(dict(
    inks=inks, end=st.sampled_from([".png", ".png", ".jpg", ".webp"]), place=st.sampled_from(PLACES),
    stem=st.sampled_from(["_mask", "_label", ""]), harm=st.none()))


def mark(y, x, h, w):
    m = np.zeros((SIDE, SIDE), bool)
    m[y:y + h, x:x + w] = True
    return m


def plant(root, drawn, inks, end, place, stem):
    "The category's folder, and its first mask; drawn: all masks"
    f = root / "cog"
    for k in range(6):
        save(f / f"{'train' if k < 4 else 'test'}/good/{k}.png", noise(k, SIDE))
    for k, m in enumerate(drawn):
        save(f / f"test/dent/{k}.png", noise(20 + k, SIDE))
        im = INKS[inks[k % len(inks)]](m)
        im = im if isinstance(im, Image.Image) else Image.fromarray(im)
        flat = im.convert("RGB") if end != ".png" and im.mode not in ("L", "RGB") else im
        save(f / place.format("dent") / f"{k}{stem}{end}", flat, **{} if end == ".png" else dict(quality=80))
    return f, f / place.format("dent") / f"0{stem}{end}"


def deepen(p):
    Image.fromarray(np.asarray(Image.open(p))[..., 0].astype(np.uint16) * 16).save(p)


def turned(p):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(p).save(p, exif=exif)


def move(a, b):
    b.parent.mkdir(exist_ok=True)
    a.rename(b)


HARMS = { # what is wrong besides -> what does it to the category and to its first mask
    "leak": lambda f, m: shutil.copy(f / "train/good/0.png", f / "test/good/9.png"),
    "both labels": lambda f, m: shutil.copy(f / "test/dent/0.png", f / "test/good/9.png"),
    "a folder deeper": lambda f, m: move(f / "train/good/0.png", f / "train/good/more/0.png"),
    "loose": lambda f, m: move(f / "test/good/4.png", f / "test/4.png"),
    "depth": lambda f, m: deepen(f / "test/good/4.png"),
    "turned": lambda f, m: turned(f / "test/dent/0.png"),
    "no mask": lambda f, m: m.unlink(),
    "mask of nothing": lambda f, m: shutil.copy(m, m.with_name(f"7{m.name[1:]}")),
    "image for mask": lambda f, m: Image.open(f / "test/dent/0.png").save(m),
}


harmed = st.sampled_from(sorted(HARMS)).map(lambda harm: dict(PLAIN, inks=["white"], harm=harm))


def usual(note):
    return note.startswith(("recognised", "resized"))


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(boxes, min_size=1, max_size=3), st.one_of(drawings, harmed))
def test_never_a_silent_difference(drawn, how):
    inks, end, place, stem, harm = (how[k] for k in ("inks", "end", "place", "stem", "harm"))
    drawn = [mark(*b) for b in drawn]
    if place == "test/{}" and not stem:
        stem = "_mask" # else it would lie on its image
    with tempfile.TemporaryDirectory() as top:
        f, first = plant(Path(top), drawn, inks, end, place, stem)
        HARMS.get(harm, lambda f, m: None)(f, first)
        files = {p.relative_to(f).as_posix() for p in f.rglob("*") if p.is_file()}
        try:
            c = load(top, category="cog", size=SIDE, cache=False)
        except BadInput as e:
            assert "\n" not in str(e) and ": " in str(e) and str(e).isprintable()
            assert not verify(top).ok
            return
        told = [n for n in c.notes if not usual(n)]
        assert told or verify(top).ok
        images = {p for p in files if p.startswith(("train", "test")) and p.endswith(".png") and p[-5].isdigit()}
        assert {p for p in images if "/mask/" not in p} == {*c.train.paths, *c.test.paths} or told
        if c.test.masks is None:
            assert any("no mask" in n for n in told)
            return
        for p, label, m in zip(c.test.paths, c.test.labels, c.test.masks, strict=True):
            want = drawn[int(Path(p).stem)] if label else np.zeros((SIDE, SIDE), bool)
            assert (m.numpy() == want).all() or told, (p, inks, end, place)
        assert told or not harm
