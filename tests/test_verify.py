"Whether a data set is what was published: damage, counts, manifests, other layouts"

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tocoad.data.archives import parts
from tocoad.data.errors import BadInput
from tocoad.data.mini import write_mini
from tocoad.data.trees import write_layout
from tocoad.data.verify import verify


@pytest.fixture(scope="session")
def mini(tmp_path_factory):
    return write_mini(tmp_path_factory.mktemp("mini") / "mini", size=32, categories=("washer", "plug"), n=(3, 2, 1))


def tree(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None
        for p in sorted(Path(folder).rglob("*"))
    }


def refused(f, *says):
    "What a failure says: one sentence with all of these"
    with pytest.raises(BadInput) as e:
        f()
    text = str(e.value)
    assert "\n" not in text and "Traceback" not in text
    for s in says:
        assert s in text, text


@pytest.fixture
def copy(mini, tmp_path):
    return shutil.copytree(mini, tmp_path / "copy")


def test_a_sound_set(copy):
    before = tree(copy)
    r = verify(copy, progress=False)
    assert (
        r.ok
        and not r.problems
        and not r.remarks
        and r.read == len(list(copy.rglob("*.png")))
        and "complete and sound" in r.text()
    )
    assert tree(copy) == before  # nothing is written
    assert sorted(map(tuple, r.rows)) == sorted(
        (c, *x, None)
        for c in ("plug", "washer")
        for x in (("train", "normal", 3), ("test", "normal", 2), ("test", "anomalous", 5))
    )


IMG = "washer/test/hole/000.png"
MASK = "washer/ground_truth/hole/000_mask.png"


def marked(w, h, value=255):
    "A mask whose third of the width is marked"
    a = np.zeros((h, w), np.uint8)
    a[:, : w // 3] = value
    return Image.fromarray(a)


def cut(p):
    p.write_bytes(p.read_bytes()[: len(p.read_bytes()) // 2])


DAMAGE = {
    "a picture cut short": (lambda d: cut(d / "plug/train/good/001.png"), "plug/train/good/001.png cannot be read"),
    "a mask cut short": (lambda d: cut(d / MASK), f"{MASK} cannot be read"),
    "an empty file": (lambda d: (d / IMG).write_bytes(b""), f"{IMG} cannot be read"),
    "text named png": (lambda d: (d / IMG).write_text("hello"), f"{IMG} cannot be read"),
    "a mask gone": (lambda d: (d / MASK).unlink(), f"{IMG} is anomalous and has no mask"),
    "a picture gone": (lambda d: (d / IMG).unlink(), MASK),
    "a mask of another size": (
        lambda d: marked(8, 9).save(d / MASK),
        f"{MASK} has 8 x 9 pixels but its image {IMG} 32 x 32",
    ),
    "no training images": (lambda d: shutil.rmtree(d / "plug/train/good"), "plug"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(copy, what):
    do, says = DAMAGE[what]
    do(copy)
    r = verify(copy)
    assert not r.ok and any(says in p for p in r.problems), r.text()
    assert "NOT complete and sound" in r.text()


def test_all_damage_is_told_and_the_other_categories_go_on(copy):
    shutil.rmtree(copy / "plug/train/good")
    cut(copy / "plug/test/good/000.png")
    cut(copy / "washer/train/good/000.png")
    (copy / MASK).unlink()
    r = verify(copy)
    for says in ("plug", "plug/test/good/000.png", "washer/train/good/000.png", IMG):
        assert any(says in p for p in r.problems)
    assert len(r.problems) == 4 and {row[0] for row in r.rows} == {"washer"}


def test_remarks_are_no_problems(copy):
    Image.new("L", (32, 32)).save(copy / MASK)
    (copy / "washer/Thumbs.db").write_bytes(b"x")
    (copy / "readme.txt").write_text("hello")
    r = verify(copy)
    assert r.ok and len(r.remarks) == 2
    assert (
        "1 of 5 masks of anomalous images are empty" in r.remarks[0]
        and "files that belong to nothing: 1 (washer/Thumbs.db)" in r.remarks[1]
    )


def test_many_problems_are_counted(copy):
    for p in copy.rglob("*.png"):
        p.write_bytes(b"")
    r = verify(copy)
    assert len(r.problems) == 30 and "and 10 more" in r.text() and r.text().count("cannot be read") == 20


def test_a_turned_photograph_and_its_mask(copy):
    im = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    im.getexif()[0x0112] = 6
    (copy / IMG).unlink()
    im.save((copy / IMG).with_suffix(".jpg"), exif=im.getexif())
    marked(20, 30).save(copy / MASK)  # as the upright picture
    assert verify(copy).ok
    marked(30, 20).save(copy / MASK)
    assert "has 30 x 20 pixels but its image washer/test/hole/000.jpg 20 x 30" in verify(copy).problems[0]


def test_counts_missing_categories_and_resized_copies(mini, tmp_path):
    shutil.copytree(mini / "washer", tmp_path / "d" / "bottle")
    shutil.copytree(mini / "plug", tmp_path / "d" / "screw")
    r = verify(tmp_path / "d")
    assert "MVTec AD" in r.title and ("bottle", "train", "normal", 3, 209) in r.rows
    assert any(p.startswith("13 of 15 folders are missing: cable") for p in r.problems)
    assert "bottle: 3 normal images in train instead of 209" in r.problems
    assert any("bottle: the images are resized copies (32 x 32 pixels instead of 900 x 900)" in x for x in r.remarks)
    assert re.search(r"bottle +train +normal +3 +209 +<", r.text())


def test_a_manifest(copy, tmp_path):
    m = tmp_path / "m.sha256"
    assert verify(copy, manifest=m).ok and len(m.read_text().splitlines()) == 30
    r = verify(copy, manifest=m)
    assert r.ok and "compared with" in r.remarks[0]
    shutil.copy(copy / "plug/train/good/000.png", copy / "plug/train/good/001.png")
    (copy / "plug/train/good/002.png").unlink()
    (copy / "washer/new.txt").write_text("x")
    r = verify(copy, manifest=m)
    assert r.problems == [
        f"plug/train/good/00{k}.png {w} since m.sha256 was written" for k, w in ((1, "has changed"), (2, "is gone"))
    ] + ["washer/new.txt is new since m.sha256 was written"]
    assert len(m.read_text().splitlines()) == 30  # not written again
    m.write_text("not a manifest\n")
    refused(lambda: verify(copy, manifest=m), "line 1 of")

    with pytest.raises(FileNotFoundError, match="no/m"):
        verify(copy, manifest=tmp_path / "no" / "m")


def test_a_folder_linked_twice_and_a_circle(copy):
    (copy / "again").symlink_to(copy / "washer")
    (copy / "plug" / "loop").symlink_to(copy)
    r = verify(copy)
    assert r.ok and {row[0] for row in r.rows} == {"again", "plug", "washer"}


def test_textures(tmp_path):
    rng = np.random.default_rng(0)
    for t in parts("dtd")[:3]:
        (tmp_path / "dtd" / t).mkdir(parents=True)
        for k in range(2):
            Image.fromarray(rng.integers(0, 255, (9, 12, 3), np.uint8)).save(tmp_path / "dtd" / t / f"{k}.jpg")
    r = verify(tmp_path / "dtd")
    assert r.rows == [("dtd", "all", "texture", 6, 5640)] and any(
        "44 of 47 folders are missing" in p for p in r.problems
    )
    assert "images/banded: 2 images instead of 120" in r.problems


LAYOUTS = {
    "btad": {"01/train/ok/0.bmp": 0, "01/test/ok/1.bmp": 0, "01/test/ko/2.bmp": 0, "01/ground_truth/ko/2.png": 255},
    "kolektor_sdd": {f"kos01/Part{k}.jpg": 0 for k in range(6)}
    | {f"kos01/Part{k}_label.bmp": 255 * (k == 5) for k in range(6)},
    "magnetic_tile": {f"MT_Free/Imgs/{k}.{s}": 0 for k in range(5) for s in ("jpg", "png")}
    | {"MT_Break/Imgs/a.jpg": 0, "MT_Break/Imgs/a.png": 255},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_other_layouts(name, tmp_path):
    rng = np.random.default_rng(0)
    for file, value in LAYOUTS[name].items():
        (p := tmp_path / "d" / file).parent.mkdir(parents=True, exist_ok=True)
        seen = "_label" in file or "ground_truth" in file or file.endswith("png") and name == "magnetic_tile"
        (marked(8, 8, value) if seen else Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8))).save(p)
    r = verify(tmp_path / "d")
    assert r.read == len(LAYOUTS[name]) and not any("nothing" in x for x in r.remarks), (
        r.text()
    )  # a good image's label picture belongs to it
    assert any("are missing" in p for p in r.problems) and not any("cannot" in p or "mask" in p for p in r.problems)


def test_folders_that_are_nothing(tmp_path, mini):
    refused(lambda: verify(tmp_path / "no"), "there is no folder")
    (tmp_path / "empty").mkdir()
    refused(lambda: verify(tmp_path / "empty"), "holds no category")
    refused(lambda: verify(mini, dataset="mvtek"), "mvtec_ad")
    refused(lambda: verify(mini / "washer"), "is itself a category")


def test_real_images(real):
    r = verify(real / "mvtec_ad", progress=False)
    assert ("bottle", "train", "normal", 209, 209) in r.rows and all(n == w for *_, n, w in r.rows)
    if len({row[0] for row in r.rows}) < 15:
        assert not r.ok and "folders are missing" in r.problems[0]


def test_a_manifest_does_not_make_hidden_files_pictures(tmp_path):
    "With hashes or without, a `._000.png` is no image of the set"
    root = write_layout(tmp_path / "set", "mvtec", ["washer"], traps=True)
    plain, hashed = verify(root, progress=False), verify(root, manifest=tmp_path / "sums", progress=False)
    assert plain.problems == hashed.problems == [] and (root / "washer/train/good/._000.png").exists()
    assert verify(root, manifest=tmp_path / "sums", progress=False).ok
