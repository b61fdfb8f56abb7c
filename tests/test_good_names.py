"What a folder of good parts may be called, and how a mask: read alike, or asked"
import shutil
import unicodedata

import pytest
from toys import noise, save, toy

from tocoad.data.errors import BadInput
from tocoad.data.layouts import GOOD
from tocoad.data.load import load


def read(root): return load(root, category="cog", size=32, cache=False)


def labels(c): return c.test.labels.tolist(), c.test.defects, c.fingerprint


NAMES = ["OK", "Good", "GOOD", "Normal", "free", "Pass", "0", "defect_free"]


@pytest.mark.parametrize("name", NAMES)
def test_a_known_name_is_good(tmp_path, name):
    want = labels(read(toy(tmp_path / "as published")))
    root = toy(tmp_path / "other")
    shutil.move(root / "cog/test/good", root / "cog/test/aside")
    (root / "cog/test/aside").rename(root / "cog/test" / name)
    got = labels(read(root))
    assert sorted(got[0]) == sorted(want[0]) and sorted(got[1]) == sorted(want[1]) and name.lower() in GOOD
    (root / "cog/train/good").rename(root / "cog/train/aside")
    (root / "cog/train/aside").rename(root / "cog/train/Good")
    assert labels(read(root)) == got


@pytest.mark.parametrize("name", [n for n in NAMES if n.lower() != "good"])
def test_two_are_a_question_before_training(tmp_path, name):
    root = toy(tmp_path)
    shutil.copytree(root / "cog/test/good", root / "cog/test" / name)
    with pytest.raises(BadInput, match="which are the good parts") as e:
        read(root)
    assert name in str(e.value) and "good" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["OK", "Normal", "0"])
def test_a_plain_folder_by_such_a_name(tmp_path, name):
    root = toy(tmp_path / "a")
    (root / "cog/train/good").rename(root / "cog" / name)
    (root / "cog/test/dent").rename(root / "cog/dent")
    for gone in ("train", "test"):
        shutil.rmtree(root / "cog" / gone)
    c = read(root)
    assert c.dataset == "own" and len(c.train) == 2 and sorted(c.test.defects) == ["dent", "dent", "good"]


def test_a_defect_of_another_name_stays_one(tmp_path):
    root = toy(tmp_path)
    (root / "cog/test/dent").rename(root / "cog/test/okra")
    (root / "cog/ground_truth/dent").rename(root / "cog/ground_truth/okra")
    assert set(read(root).test.defects) == {"good", "okra"}


@pytest.mark.parametrize("name", ["0_gt", "mask_0", "0-mask"])
def test_a_masks_name_that_is_none_names_those_that_are(tmp_path, name):
    root = toy(tmp_path)
    (root / "cog/ground_truth/dent/0_mask.png").rename(root / f"cog/ground_truth/dent/{name}.png")
    with pytest.raises(BadInput, match="alone or with _mask or _label at the end"):
        read(root)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_mask_stored_by_another_system(tmp_path, forms):
    root, (a, b) = toy(tmp_path), (unicodedata.normalize(f, "Größe é") for f in forms)
    want = read(root).test.masks.sum()
    (root / "cog/test/dent/0.png").rename(root / f"cog/test/dent/{a}.png")
    (root / "cog/ground_truth/dent/0_mask.png").rename(root / f"cog/ground_truth/dent/{b}_mask.png")
    assert read(root).test.masks.sum() == want
    save(root / f"cog/test/dent/{b}.png", noise(77))
    with pytest.raises(BadInput, match="one of 2 images named"):
        read(root)
