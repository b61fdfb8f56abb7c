"Copies, contradictions, folders that are no kind of defect, images that nobody reads: said by load, run and verify"
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from toys import mark, noise, save, toy

from tocoad import cli
from tocoad.data.errors import BadInput
from tocoad.data.load import load
from tocoad.data.trees import write_layout
from tocoad.data.verify import verify


def read(root, category="cog", **kw):
    return load(root, category=category, size=32, cache=False, **kw)


def same(root, words, n=1):
    "load's notes and verify's problems say it alike"
    said = [x for x in read(root).notes if words in x]
    assert len(said) == n and [p.removeprefix("cog: ").replace("cog/", "") for p in verify(root).problems] == said
    return said


def test_a_sound_set_says_nothing(tmp_path):
    assert [n for n in read(toy(tmp_path)).notes if "recognised" not in n] == [] and verify(tmp_path).ok


@pytest.mark.parametrize("n,seen", [((6, 10, 10), True), ((6, 9, 10), False)])
def test_light_that_tells_defects(tmp_path, n, seen):
    root = toy(tmp_path, n=n)
    for p in (root / "cog/test/good").glob("*.png"):
        Image.eval(Image.open(p), lambda v: v // 2).save(p)
    notes = [x for x in read(root).notes if x.startswith("brightness alone")]
    assert len(notes) == seen and [x.removeprefix("cog: ") for x in verify(root).remarks if "brightness" in x] == notes
    assert not seen or "AUROC 100.0" in notes[0]


HOW = { # how a picture gets to another place
    "copied": lambda a, b: shutil.copy(a, b),
    "linked": lambda a, b: b.symlink_to(os.path.relpath(a, b.parent)),
    "stored in another format": lambda a, b: Image.open(a).save(b.with_suffix(".bmp")),
    "with transparency": lambda a, b: Image.open(a).convert("RGBA").save(b),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("a,b", [("train/good/0", "test/good/9"), ("test/good/0", "train/good/9"),
                                 ("test/dent/0", "train/good/9")])
def test_a_leak(tmp_path, how, a, b):
    root = toy(tmp_path)
    HOW[how](root / f"cog/{a}.png", root / f"cog/{b}.png")
    [said] = same(root, "judged as well: 1 (")
    assert a in said and b in said


def test_many_leaks_are_counted(tmp_path):
    root = toy(tmp_path, n=(6, 2, 1))
    for k in range(5):
        shutil.copy(root / f"cog/train/good/{k}.png", root / f"cog/test/good/1{k}.png")
    [said] = same(root, "judged as well: 5 (")
    assert said.count(" = ") == 3 and "; ..." in said


@pytest.mark.parametrize("how", HOW)
def test_good_and_defective(tmp_path, how):
    root = toy(tmp_path)
    HOW[how](root / "cog/test/dent/1.png", root / "cog/test/good/9.png")
    [said] = same(root, "both good and anomalous: 1 (")
    assert "test/dent/1" in said and "test/good/9" in said


def test_copies_on_one_side_do_no_harm(tmp_path):
    root = toy(tmp_path)
    for place in ("train/good", "test/good"):
        shutil.copy(root / f"cog/{place}/0.png", root / f"cog/{place}/9.png")
    assert verify(root).ok and len(read(root).notes) == 1


def test_a_run_says_it(tmp_path, monkeypatch, capsys):
    root = toy(tmp_path)
    shutil.copy(root / "cog/train/good/0.png", root / "cog/test/good/9.png")
    words = ["run", "--root", str(root), "--category", "cog", "--profile", "smoke", "--quiet", "--out", f"{root}/out",
             "--set", "epochs1=1", "epochs2=1", "width=32", "resize=32", "size=32", "coreset=1"]
    assert cli.main(words) == 0
    said = "training pictures that are judged as well: 1 (test/good/9.png = train/good/0.png)"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("how", ["copied", "linked"])
def test_a_split_that_we_make_keeps_copies_together(tmp_path, how):
    for k in range(10):
        save(tmp_path / f"nut/good/{k}.png", noise(k))
    save(tmp_path / "nut/bent/0.png", noise(30))
    before = read(tmp_path, "nut")
    for p in list((tmp_path / "nut/good").iterdir()):
        HOW[how](p, p.with_name(f"{p.stem}_again.png"))
    got = read(tmp_path, "nut")
    sides = [{bytes(x.numpy()) for x in s.images[~s.labels]} for s in (got.train, got.test)]
    assert not sides[0] & sides[1] and len(got.train) + len(got.test) == 21
    moved = 16 + 0 < len(got.train) # more than four fifths of the twenty
    assert any("were kept out of test" in n for n in got.notes) == moved
    assert not any("judged as well" in n for n in [*got.notes, *verify(tmp_path).problems])
    assert len(before.train) == 8 and not any("kept out" in n for n in before.notes)
    rows = {r[1:3]: r[3] for r in verify(tmp_path).rows}
    assert rows["train", "normal"] == len(got.train)


def test_the_cache_remembers_which_were_moved(tmp_path, monkeypatch):
    monkeypatch.setenv("TOCOAD_CACHE", str(tmp_path / "cache"))
    for k in range(10):
        for j in ("", "_again"):
            save(tmp_path / f"set/nut/good/{k}{j}.png", noise(k))
    save(tmp_path / "set/nut/bent/0.png", noise(30))
    first, again = (load(tmp_path / "set", category="nut", size=32) for _ in range(2))
    assert first.train.paths == again.train.paths and first.test.paths == again.test.paths and len(again.train) > 16
    assert len(again.train.images) == len(again.train) and first.notes == again.notes


D = "candle/Data/Images"
ROWS = { # a row more in VisA's table -> words
    "twice": (f"candle,test,normal,{D}/Normal/0006.JPG,", "Normal/0006.JPG 2 times"),
    "twice, spelt otherwise": (f"candle,test,normal,candle/../{D}/Normal/0006.JPG,", "Normal/0006.JPG 2 times"),
    "in both splits": (f"candle,train,normal,{D}/Normal/0006.JPG,", "Normal/0006.JPG 2 times"),
    "as both labels": (f"candle,test,anomaly,{D}/Normal/0006.JPG,", "Normal/0006.JPG 2 times"),
    "one mask for two": (f"candle,test,anomaly,{D}/Normal/0099.JPG,candle/Data/Masks/Anomaly/000.png",
                         "Masks/Anomaly/000.png 2 times"),
    "of another category": ("candle,test,normal,capsules/Data/Images/Normal/000.JPG,", "outside its folder"),
    "of another category, hidden": ("candle,test,normal,candle/../capsules/Data/Images/Normal/000.JPG,",
                                    "outside its folder"),
    "anomalous in training": (f"candle,train,anomaly,{D}/Anomaly/000.JPG,", "training sees normal images only"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_table_that_contradicts_itself(tmp_path, kind):
    row, words = ROWS[kind]
    root = write_layout(tmp_path / "visa", "visa", size=32, n=(6, 2, 1))
    save(root / f"{D}/Normal/0099.JPG", noise(5))
    with open(root / "split_csv/1cls.csv", "a") as f:
        f.write(row + "\n")
    with pytest.raises(BadInput, match=words):
        load(root, category="candle", size=32, cache=False)
    assert any(words in p for p in verify(root).problems)


def test_masks_are_no_kind_of_defect(tmp_path):
    "Whatever their folder is called, and wherever it lies"
    want = read(toy(tmp_path / "right")).test
    for place in ("test/ground_truth", "test/masks", "mask", "masks", "GT", "test/Mask"):
        root = toy(tmp_path / place.replace("/", "-"))
        (root / "cog/ground_truth").rename(root / f"cog/{place}")
        got = read(root).test
        assert set(got.defects) == {"good", "dent"} and (got.masks == want.masks).all(), place
        assert verify(root).ok
    root = toy(tmp_path / "beside")
    for p in (root / "cog/ground_truth/dent").iterdir():
        p.rename(root / "cog/test/dent" / p.name)
    assert (read(root).test.masks == want.masks).all() and len(read(root).test) == len(want)


@pytest.mark.parametrize("name", ["mask", "masks", "ground_truth"])
def test_masks_in_a_plain_folder(tmp_path, name):
    for k in range(5):
        save(tmp_path / f"nut/good/{k}.png", noise(k))
    save(tmp_path / "nut/bent/0.png", noise(30))
    save(tmp_path / f"nut/{name}/bent/0_mask.png", mark())
    got = read(tmp_path, "nut").test
    assert set(got.defects) == {"good", "bent"} and (got.masks[got.labels][0].numpy() == mark()).all()


ASKED = { # where a mask lies besides -> words
    "in two places": ("masks/dent/0_mask.png", "may both hold the masks"),
    "in two places, one in test": ("test/ground_truth/dent/0_mask.png", "may both hold the masks"),
    "of no defect": ("ground_truth/0_mask.png", "is the mask of nobody knows which defect"),
    "beside its image as well": ("test/dent/0_mask.png", "are both masks of '0'"),
    "among the good, and marked": ("train/good/0_mask.png", "marks a defect in an image that lies among"),
    "of a good image, and marked": ("ground_truth/good/0_mask.png", "marks a defect in an image that lies among"),
}


@pytest.mark.parametrize("kind", ASKED)
def test_masks_that_are_asked_about(tmp_path, kind):
    place, words = ASKED[kind]
    root = toy(tmp_path)
    save(root / f"cog/{place}", mark())
    with pytest.raises(BadInput, match=words):
        read(root)
    assert any(words in p for p in verify(root).problems)


def test_empty_masks_of_good_images_are_fine(tmp_path):
    root = toy(tmp_path)
    for k in range(2):
        save(root / f"cog/ground_truth/good/{k}_mask.png", np.zeros((32, 32), np.uint8))
    assert verify(root).ok and read(root).fingerprint == read(toy(tmp_path / "x")).fingerprint


LOST = { # what is left out
    "a folder deeper": "train/good/monday", "loose in test": "test", "loose in the category": "",
    "deeper in a defect": "test/dent/left",
    "masks elsewhere": "annotations/dent", "masks deeper": "ground_truth/dent/x",
    "another train folder": "training/good"}


@pytest.mark.parametrize("kind", LOST)
def test_what_is_left_out_is_counted(tmp_path, kind):
    root = toy(tmp_path)
    for k in range(6):
        save(root / "cog" / LOST[kind] / f"{40 + k}.png", noise(40 + k))
    [said] = same(root, "image files are not read")
    assert said.startswith("6 of 15 image files") and f"{LOST[kind]}/40.png".lstrip("/") in said and ", ..." in said


def test_a_folder_linked_from_elsewhere_is_counted(tmp_path):
    root = toy(tmp_path / "set")
    save(tmp_path / "more/x.png", noise(50))
    (root / "cog/train/good/more").symlink_to(tmp_path / "more")
    same(root, "1 of 10 image files are not read (train/good/more/x.png)")


def test_files_that_come_later_are_counted_from_the_cache_too(tmp_path, monkeypatch):
    monkeypatch.setenv("TOCOAD_CACHE", str(tmp_path / "cache"))
    root = toy(tmp_path / "set")
    load(root, category="cog", size=32)
    save(root / "cog/test/late.png", noise(50))
    assert any("1 of 10 image files" in n for n in load(root, category="cog", size=32).notes)
