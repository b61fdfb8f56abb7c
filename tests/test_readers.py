"Every published tree, plain and with its traps, is read as it was drawn; errors are one sentence; anomalib agrees."

import csv
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from planned import exact, seen
from torch.nn.functional import interpolate

from tocoad.data.errors import BadInput
from tocoad.data.images import open_image, rgb
from tocoad.data.layouts import DATASETS, LAYOUTS, categories, recognise
from tocoad.data.load import load
from tocoad.data.masks import binary
from tocoad.data.trees import NAMES, plan, write_layout

N = (5, 2, 2)
NAMED = dict(mvtec="own", folder="own")  # the data set that a tree is taken for, where it is not its layout's name
TREES = [(layout, traps) for layout in LAYOUTS for traps in (False, True)]
every = pytest.mark.parametrize("layout,traps", TREES, ids=[f"{l}{'-traps' * t}" for l, t in TREES])


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    "Tests neither read nor fill the user's own cache"
    with pytest.MonkeyPatch.context() as m:
        m.setenv("TOCOAD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    root = tmp_path_factory.mktemp("trees")
    return {(l, t): write_layout(root / f"{l}{t}", l, n=N, traps=t) for l, t in TREES}


def files(layout, traps):
    return [f for f in plan(layout, n=N, traps=traps) if f.split]


def items(root, layout, category=None):
    return [i for c in LAYOUTS[layout].find(root) if category in (None, c) for i in LAYOUTS[layout].read(root, c)]


def rel(root, p):
    return p and Path(p).relative_to(root).as_posix()


# The plan is the truth


@every
def test_items(trees, layout, traps):
    root = trees[layout, traps]
    found = {rel(root, i.path): (i.split, i.label, i.defect, rel(root, i.mask)) for i in items(root, layout)}
    assert found == {f.path: (f.split, f.label, f.defect, f.mask) for f in files(layout, traps)}
    assert len(items(root, layout)) == len(found)


@every
def test_recognised_without_being_told(trees, layout, traps):
    root = trees[layout, traps]
    assert recognise(root) == (NAMED.get(layout, layout), layout, sorted(NAMES[layout])) and categories(
        root
    ) == sorted(NAMES[layout])
    for name, d in DATASETS.items():
        if layout in (LAYOUTS if d.layouts is None else d.layouts):
            assert recognise(root, name)[:2] == (name, layout)
        else:
            with pytest.raises(BadInput):
                recognise(root, name)


@every
def test_pixels(trees, layout, traps):
    "At each file's own size: lossless files to the last bit, JPEG to a few grey values, masks to the pixel"
    root, drawn = trees[layout, traps], {f.path: f for f in files(layout, traps)}
    for i in items(root, layout):
        f = drawn[rel(root, i.path)]
        image, mask = seen(f)
        got = np.asarray(rgb(open_image(i.path)))
        assert got.shape == image.shape, f
        assert (got == image).all() if exact(f) else np.abs(got.astype(int) - image).mean() < 4, f
        if i.label:
            np.testing.assert_array_equal(binary(open_image(i.mask), i.cut), mask, str(f))


@every
def test_load(trees, layout, traps):
    root = trees[layout, traps]
    for name in NAMES[layout]:
        got = load(root, category=name, size=64, cache=False)
        assert (got.dataset, got.name) == (NAMED.get(layout, layout), name)
        for split, part in dict(train=got.train, test=got.test, validation=got.validation).items():
            drawn = {f.path: f for f in files(layout, traps) if f.category == name and f.split == split}
            if part is None:
                assert not drawn
                continue
            folder = "" if name == layout else f"{name}/"
            assert sorted(folder + p for p in part.paths) == sorted(drawn)
            for k, p in enumerate(part.paths):
                f = drawn[folder + p]
                image, mask = seen(f)
                assert (bool(part.labels[k]), part.defects[k]) == (f.label, f.defect)
                whole = interpolate(
                    torch.from_numpy(mask)[None, None].float(), (64, 64), mode="bilinear", antialias=True
                )[0, 0]
                sure = (whole - 0.5).abs() > 0.01
                assert (part.masks[k] == (whole > 0.5))[sure].all() and (f.wh != (64, 64) or sure.all()), f
                if exact(f) and f.wh == (64, 64):
                    assert (part.images[k].permute(1, 2, 0).numpy() == image).all(), f


def test_load_says_what_is_odd(trees):
    said = lambda layout, name: " | ".join(load(trees[layout, True], category=name, size=64, cache=False).notes)
    assert "1 of 10 anomalous images: the mask is empty" in said("btad", "03") and "64 x 48, and shapes are" in said(
        "btad", "03"
    )
    assert "1 of 10 anomalous images: the mask is empty" in said("magnetic_tile", "magnetic_tile")
    assert "sizes (48 x 64 to 64 x 64), and shapes" in said("visa", "candle") and "mask is empty" not in said(
        "visa", "candle"
    )
    assert "images are grey" in said("mvtec", "washer") and "all images are grey" in said("mvtec_ad_2", "vial")


# The same content in another tree


def rebuilt(source, target, place, table=False):
    "The items of an MVTec tree in another layout, each saved anew; place: (item, number) -> image and mask"
    rows = []
    for k, i in enumerate(LAYOUTS["mvtec"].read(source, "brick")):
        image, mask = place(i, k)
        for old, new in ((i.path, image), (i.mask, i.mask and mask)):
            if not new:
                continue
            (target / new).parent.mkdir(parents=True, exist_ok=True)
            Image.open(old).save(target / new)
        rows.append(("brick", i.split, "anomaly" if i.label else "normal", image, mask if i.mask else ""))
    if table:
        (target / "split_csv").mkdir()
        with open(target / "split_csv" / "1cls.csv", "w", newline="") as f:
            csv.writer(f).writerows([("object", "split", "label", "image", "mask"), *rows])
    return target


def test_fingerprint_is_of_the_content(tmp_path):
    first = write_layout(tmp_path / "mvtec", "mvtec", ["brick"], n=N)
    ok = lambda i: "ko" if i.label else "ok"
    two = lambda i: "train/good" if i.split == "train" else f"test_public/{'bad' if i.label else 'good'}"
    same = {
        "btad": rebuilt(
            first,
            tmp_path / "btad",
            lambda i, k: (f"brick/{i.split}/{ok(i)}/{k:04}.bmp", f"brick/ground_truth/ko/{k:04}.png"),
        ),
        "visa": rebuilt(
            first,
            tmp_path / "visa",
            lambda i, k: (f"brick/Data/Images/{i.defect}/{k:04}.tif", f"brick/Data/Masks/Anomaly/{k:03}.png"),
            True,
        ),
        "mvtec_ad_2": rebuilt(
            first,
            tmp_path / "ad2",
            lambda i, k: (f"brick/{two(i)}/{k:03}.png", f"brick/test_public/ground_truth/bad/{k:03}_mask.png"),
        ),
    }
    want = load(first, category="brick", size=64, cache=False).fingerprint
    for layout, root in same.items():
        assert recognise(root).layout == layout
        assert load(root, category="brick", size=64, cache=False).fingerprint == want, layout
    other = write_layout(tmp_path / "seed", "mvtec", ["brick"], n=N, seed=1)
    assert load(other, category="brick", size=64, cache=False).fingerprint != want


def test_magnetic_tile_has_one_fingerprint(tmp_path, trees):
    "As its authors lay it out, and sorted into MVTec AD's folders"
    root = trees["magnetic_tile", True]
    for i in LAYOUTS["magnetic_tile"].read(root, "magnetic_tile"):
        new = tmp_path / "magnetic_tile" / i.split / i.defect / i.path.name
        for old, p in (
            (i.path, new),
            (i.mask, tmp_path / "magnetic_tile" / "ground_truth" / i.defect / f"{i.path.stem}_mask.png"),
        ):
            if old:
                p.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(old, p)
    a, b = load(root, size=64, cache=False), load(tmp_path, "magnetic_tile", size=64, cache=False)
    assert (
        (a.test.images == b.test.images).all()
        and (a.test.masks == b.test.masks).all()
        and (a.test.labels == b.test.labels).all()
    )
    assert a.fingerprint == b.fingerprint


# Whatever lies there: it loads, or one sentence says why not

WORDS = [
    "train",
    "good",
    "test",
    "ground_truth",
    "ok",
    "ko",
    "Data",
    "Images",
    "Masks",
    "Normal",
    "Anomaly",
    "split_csv",
    "MT_Free",
    "MT_Crack",
    "Imgs",
    "kos01",
    "test_public",
    "validation",
    "bad",
    "masks",
    "hole",
    "größer, schöner",
    ".hidden",
    "CON",
    "a.png",
]
STEMS = ["000", "000_mask", "Part0", "Part0_label", "001", "._000", "1cls", "é è", "_mask"]
ENDS = [".png", ".PNG", ".jpg", ".bmp", ".tif", ".webp", ".csv", ".txt", ""]
KINDS = ["image", "mask", "wide", "junk", "nothing", "half", "table"]
LINE = "object,split,label,image,mask\n{0},train,normal,{0}/Data/Images/Normal/000.png,\n{0},test,anomaly,../x.png,\n"


def content(kind):
    a = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    im = {"mask": Image.fromarray(a[..., 0] > 99), "wide": Image.fromarray(a[:8])}.get(kind, Image.fromarray(a))
    with tempfile.SpooledTemporaryFile() as f:
        im.save(f, "PNG")
        f.seek(0)
        whole = f.read()
    return {
        "junk": b"\xff\xfe no picture \x00",
        "nothing": b"",
        "half": whole[: len(whole) // 2],
        "table": LINE.format("good").encode(),
    }.get(kind, whole)


BYTES = {k: content(k) for k in KINDS}


def photograph(root):
    "Everything about a tree that reading it could change"
    return sorted(
        (p.relative_to(root).as_posix(), p.lstat().st_mtime_ns, p.read_bytes() if p.is_file() else None)
        for p in root.rglob("*")
    )


def calm(root, cache):
    before, asked = (
        photograph(root),
        [lambda: recognise(root), lambda: categories(root), lambda: load(root, size=16, cache=cache)],
    )
    asked += [lambda d=d: recognise(root, d) for d in DATASETS if DATASETS[d].layouts != ()]
    try:
        asked += [lambda c=c: load(root, category=c, size=16, cache=cache) for c in recognise(root).categories]
    except BadInput:
        pass
    for ask in asked:
        try:
            ask()
        except BadInput as e:
            said = str(e)
            assert "\n" not in said and ": " in said and not said.endswith("."), said  # what and where: what to do
    assert photograph(root) == before


quiet = dict(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
    derandomize=True,
)


@settings(max_examples=40, **quiet)
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from(WORDS), min_size=0, max_size=4),
            st.one_of(st.none(), st.tuples(st.sampled_from(STEMS), st.sampled_from(ENDS), st.sampled_from(KINDS))),
        ),
        max_size=14,
    ),
    st.booleans(),
)
def test_any_tree(tree, cache):
    with tempfile.TemporaryDirectory() as tmp:
        for folders, file in tree:
            d = Path(tmp, *folders)
            try:
                d.mkdir(parents=True, exist_ok=True)
                if file:
                    (d / f"{file[0]}{file[1]}").write_bytes(BYTES[file[2]])
            except OSError:
                pass  # a file already stands where a folder should
        calm(Path(tmp), cache)


OPS = ["delete", "empty", "truncate", "junk", "rename", "up", "copy", "folder", "gone", "link", "wide"]


def damage(root, op, k):
    have = sorted(p for p in root.rglob("*") if p.is_file() or p.is_symlink())
    if not have:
        return
    p = have[k % len(have)]
    if op == "delete":
        p.unlink()
    if op == "empty":
        p.write_bytes(b"")
    if op == "truncate":
        p.write_bytes(p.read_bytes()[: p.stat().st_size // 2])
    if op in ("junk", "wide"):
        p.write_bytes(BYTES[op])
    if op == "rename":
        p.rename(p.with_name(f"{p.stem}_x{p.suffix}"))
    if op == "up":
        p.rename(p.parent.parent / p.name)
    if op == "copy":
        (p.parent / f"{p.stem}.bmp").write_bytes(p.read_bytes())
    if op == "folder":
        p.unlink()
        p.mkdir()
    if op == "gone":
        shutil.rmtree(p.parent)
    if op == "link":
        p.unlink()
        p.symlink_to(root / "nowhere")


@settings(max_examples=50, **quiet)
@given(
    st.sampled_from(TREES),
    st.lists(st.tuples(st.sampled_from(OPS), st.integers(0, 10_000)), min_size=1, max_size=3),
    st.booleans(),
)
def test_any_damage(small, which, harm, cache):
    with tempfile.TemporaryDirectory() as tmp:
        root = shutil.copytree(small[which], Path(tmp) / "tree")
        for op, k in harm:
            try:
                damage(root, op, k)
            except OSError:
                pass  # an earlier harm took the file away
        calm(root, cache)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    one = {l: [next(iter(NAMES[l]))] for l in LAYOUTS}
    return {(l, t): write_layout(root / f"{l}{t}", l, one[l], size=16, n=(3, 1, 1), traps=t) for l, t in TREES}


# anomalib reads the same. It moves and converts files, so it gets copies


def peer_items(table, root, back=lambda p: p):
    return {
        back(rel(root, r.image_path)): (
            r.get("split"),
            bool(r.label_index),
            back(rel(root, r.mask_path)) if r.label_index else None,
            r,
        )
        for _, r in table.iterrows()
    }


def agrees(root, layout, category, peers, home, splits=True, skip=lambda f: False, lossy=4):
    "Items, labels, masks' files and, where skip does not say that anomalib decodes otherwise, pixels"
    utils = pytest.importorskip("anomalib.data.utils")
    ours = {rel(root, i.path): i for i in items(root, layout, category)}
    assert set(ours) == set(peers)
    for p, (split, label, mask, row) in peers.items():
        i = ours[p]
        assert label == i.label and (not splits or {"val": "validation"}.get(split, split) == i.split), p
        if label and mask:
            assert mask == rel(root, i.mask), p
        theirs, mine = (
            (utils.read_image(row.image_path) * 255).round().astype(int),
            np.asarray(rgb(open_image(i.path))).astype(int),
        )
        if skip(i):
            continue
        assert theirs.shape == mine.shape and np.abs(theirs - mine).mean() < lossy, p
        if label:
            np.testing.assert_array_equal(utils.read_mask(row.mask_path) > 0, binary(open_image(i.mask), i.cut), p)
    return len(peers)


def without_litter(root, also=()):
    for p in list(root.rglob("*")):
        if p.name.startswith("._") or p.name in ("Thumbs.db", ".DS_Store") or p.relative_to(root).as_posix() in also:
            p.unlink()
    return root


@pytest.fixture
def copy(trees, tmp_path):
    def _copy(layout, traps, also=()):
        return without_litter(Path(shutil.copytree(trees[layout, traps], tmp_path / layout)), also)

    return _copy


both = pytest.mark.parametrize("traps", [False, True], ids=["plain", "traps"])


@both
def test_anomalib_mvtec(copy, traps):
    "Without the turned JPEG (anomalib takes PNG only) and the pixels of 16 bits and transparency, which it loses"
    make = pytest.importorskip("anomalib.data.datasets.image.mvtecad").make_mvtec_ad_dataset
    drawn = {f.path: f for f in files("mvtec", traps)}
    root = copy("mvtec", traps, [p for f in drawn.values() if f.how == "turned" for p in (f.path, f.mask)])
    for c in NAMES["mvtec"]:
        agrees(
            root,
            "mvtec",
            c,
            peer_items(make(root / c), root),
            root,
            skip=lambda i: drawn[rel(root, i.path)].how in ("deep", "glass"),
        )


@both
def test_anomalib_visa(copy, traps):
    data = pytest.importorskip("anomalib.data.datamodules.image.visa")
    make = pytest.importorskip("anomalib.data.datasets.image.mvtecad").make_mvtec_ad_dataset
    root = copy("visa", traps)
    module = data.Visa(root=root, category="candle")
    module.apply_cls1_split()

    def back(p):  # where the file came from
        if p is None:
            return None
        c, part, kind, name = Path(p).parts
        return (
            f"{c}/Data/Masks/Anomaly/{name}"
            if part == "ground_truth"
            else f"{c}/Data/Images/{'Normal' if kind == 'good' else 'Anomaly'}/{name}"
        )

    for c in NAMES["visa"]:
        agrees(
            root,
            "visa",
            c,
            peer_items(make(module.split_root / c, extensions=(".png", ".JPG")), module.split_root, back),
            root,
        )
        a, b = (
            load(r, "visa", c, size=64, cache=False) for r in (root, module.split_root)
        )  # anomalib's converted tree is read as well, as MVTec AD's layout
        for part in ("train", "test"):
            assert told(getattr(a, part)) == told(getattr(b, part))


def told(split):
    "What a split holds, in an order that its tree has no part in"
    return sorted(
        (im.numpy().tobytes(), bool(label), m.numpy().tobytes())
        for im, label, m in zip(split.images, split.labels, split.masks, strict=True)
    )


@both
def test_anomalib_btad(copy, traps):
    "After anomalib's conversion to PNG; with traps without soft masks, of which it takes every value above 0"
    make = pytest.importorskip("anomalib.data.datasets.image.btech").make_btech_dataset
    root = copy("btad", traps)
    for p in list(root.rglob("*.bmp")):
        Image.open(p).save(p.with_suffix(".png"))
        p.unlink()
    for c in NAMES["btad"]:
        assert agrees(root, "btad", c, peer_items(make(root / c), root), root, skip=lambda i: i.label and traps)


@both
def test_anomalib_mvtec_ad_2(copy, traps):
    make = pytest.importorskip("anomalib.data.datasets.image.mvtecad2").make_mvtec2_dataset
    root = copy("mvtec_ad_2", traps)
    for c in NAMES["mvtec_ad_2"]:
        agrees(root, "mvtec_ad_2", c, peer_items(make(root / c), root), root)


@both
def test_anomalib_kolektor(copy, traps):
    "All but the split of the good ones, which anomalib draws"
    make = pytest.importorskip("anomalib.data.datasets.image.kolektor").make_kolektor_dataset
    root = copy("kolektor_sdd", traps)
    peers = peer_items(make(root), root)
    agrees(root, "kolektor_sdd", None, peers, root, splits=False)
    assert {split for split, bad, *_ in peers.values() if bad} == {"test"}


@both
def test_anomalib_folder(copy, traps):
    "Mixed suffixes as well; the split of the good ones is anomalib's own"
    make = pytest.importorskip("anomalib.data.datasets.image.folder").make_folder_dataset
    root = copy("folder", traps)
    kinds = sorted({f.defect for f in files("folder", traps)} - {"good"})
    table = make("good", root=root / "washer", abnormal_dir=kinds, mask_dir=[f"masks/{k}" for k in kinds])
    agrees(root, "folder", "washer", peer_items(table, root), root, splits=False)
