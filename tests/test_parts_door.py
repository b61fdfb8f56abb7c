"What comes in at the door of own parts: read by one rule, or refused in a sentence"
import csv
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toys import noise

import tocoad
from tocoad.data.errors import BadInput
from tocoad.data.mini import draw
from tocoad.parts import pictures
from tocoad.parts.export import save
from tocoad.parts.fit import fit
from tocoad.parts.pictures import IN_FLIGHT, InFlight, find_images, read
from tocoad.parts.score import score
from tocoad.run.config import config

SIZE = 64
CFG = config("smoke", resize=SIZE, size=SIZE, sigma=2.)


def store(path, array, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **kw)
    return path


def washer(k, defect="good", size=SIZE): return draw("washer", k, defect, size)[0]


def rows(out):
    with open(out / "scores.csv", newline="", encoding="utf-8") as f:
        return {r["path"]: r for r in csv.DictReader(f)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "A category in MVTec AD's layout"
    cog = tmp_path_factory.mktemp("door") / "cog"
    for k in range(12):
        store(cog / f"train/good/{k:02}.png", washer(k))
    for k in range(3):
        store(cog / f"test/good/{k}.png", washer(100 + k))
        store(cog / f"test/hole/{k}.png", washer(200 + k, "hole"))
        store(cog / f"ground_truth/hole/{k}_mask.png", 255 * np.ones((SIZE, SIZE), np.uint8))
    return cog


@pytest.fixture(scope="module")
def detector(root): return fit(root / "train/good", CFG, progress=False)


# ---- which folder

@pytest.mark.parametrize("other", ["test", "ground_truth", "GT", "masks", "Defect", "NG", "bad", "anomalous", "ko",
                                   "test_public"])
def test_a_folder_of_something_else_is_a_question(tmp_path, other):
    for k in range(6):
        store(tmp_path / f"good/{k}.png", noise(k))
    store(tmp_path / f"{other}/deeper/0.png", noise(9))
    with pytest.raises(BadInput, match="may be no good part") as e:
        fit(tmp_path, CFG, progress=False)
    assert f"give {tmp_path / 'good'}, or say --all-below" in str(e.value) and "\n" not in str(e.value)
    assert fit(tmp_path, CFG, all_below=True, progress=False).about["images"]["found"] == 7


@pytest.mark.parametrize("names,likely", [
    (["train/good/0", "test/good/0", "test/dent/0"], "train/good"), (["train/ok/0", "test/ok/0"], "train/ok"),
    (["Normal/0", "scratch/0"], "Normal"), (["MT_Free/Imgs/0", "MT_Crack/Imgs/0"], None), (["0", "0_mask"], None),
    (["kos01/Part0", "kos01/Part0_label"], None),
    (["Data/Images/Normal/0", "Data/Images/Anomaly/0"], "Data/Images/Normal"),
    (["bottle/train/good/0", "cable/train/good/0"], "bottle/train/good")])
def test_a_known_layout_is_a_question(tmp_path, names, likely):
    for n in names:
        store(tmp_path / f"{n}.png", noise(0))
    with pytest.raises(BadInput, match=", or say --all-below") as e:
        fit(tmp_path, CFG, progress=False)
    assert f"give {tmp_path / likely if likely else 'the folder that holds good parts'}" in str(e.value)


@pytest.mark.parametrize("names", [["0", "1"], ["left/0", "right/1"], ["good/0", "good/1"], ["2024/a/0", "2024/b/1"],
                                   ["label_0", "testing/1"]])
def test_a_plain_folder_is_none(tmp_path, names):
    for k, n in enumerate(names):
        store(tmp_path / f"{n}.png", noise(k))
    with pytest.raises(BadInput, match="at least 5 good parts"):
        fit(tmp_path, CFG, progress=False)


# ---- what the tool wrote

def test_own_output_is_neither_scored_nor_learned_from(detector, root, tmp_path):
    parts = Path(shutil.copytree(root / "test", tmp_path / "parts"))
    first = score(detector, parts, tmp_path / "elsewhere", progress=False)
    score(detector, parts, parts / "hole/out", progress=False)
    shutil.copy(next((parts / "hole/out/maps").iterdir()), parts / "renamed.png")
    again = score(detector, parts, tmp_path / "new", progress=False)
    assert (first.images, again.images) == (6, 6) and again.scores == first.scores
    assert "8 pictures that tocoad wrote left out" in again.warnings # six maps, their page, a copy
    good = Path(shutil.copytree(root / "train/good", tmp_path / "good"))
    shutil.copytree(parts / "hole/out/maps", good / "maps of last week")
    d = fit(good, CFG, progress=False)
    assert "note: 6 pictures that tocoad wrote left out" in d.text() and torch.equal(d.held, detector.held)


# ---- one entrance

def kinds(path):
    "One picture in every form that is taken"
    im = Image.open(path)
    a = np.asarray(im)
    return dict(path=path, text=str(path), pillow=im, hwc=a, chw=a.transpose(2, 0, 1).copy(),
                turned=a.transpose(2, 0, 1), float64=a / 255,
                float32=(a / 255).astype(np.float32), tensor=torch.from_numpy(a.copy()),
                tensor_chw=torch.from_numpy(a.copy()).permute(2, 0, 1),
                to_tensor=torch.from_numpy(a.copy()).permute(2, 0, 1).float().div(255),
                gradient=torch.from_numpy(a / 255).requires_grad_(), rgba=im.convert("RGBA"))


def test_a_folder_of_own_output_alone_holds_no_image(detector, root, tmp_path):
    score(detector, root / "test/hole", tmp_path / "out", maps=3, progress=False)
    with pytest.raises(BadInput, match=r"holds 3 images \(0 different, 3 pictures that tocoad wrote left out\): give"):
        fit(tmp_path / "out/maps", CFG, progress=False)


def test_every_form_has_the_score_of_the_command_to_the_bit(detector, root, tmp_path):
    store(tmp_path / "in/large.png", washer(7, "hole", 300)[:, 40:])
    shutil.copy(root / "test/hole/0.png", tmp_path / "in/same.png")
    model = save(detector, tmp_path / "m.safetensors")
    words = ["score", "--model", model, "--images", tmp_path / "in", "--out", tmp_path / "out", "--quiet"]
    from tocoad.cli import main
    assert main([*map(str, words)]) == 0
    d = tocoad.Detector.load(model, "cpu")
    for name, r in rows(tmp_path / "out").items():
        for form, x in kinds(tmp_path / "in" / name).items():
            got = d(x)
            assert (f"{got.score:.6g}", got.decision) == (r["score"], r["decision"]), form
            assert got.map.shape == (SIZE, SIZE) and got.map.dtype == np.float32
    table = rows(tmp_path / "out")
    several = d([tmp_path / "in/large.png", np.asarray(Image.open(tmp_path / "in/same.png"))])
    assert [f"{x.score:.6g}" for x in several] == [table[n]["score"] for n in ("large.png", "same.png")]
    batch = torch.stack([torch.from_numpy(washer(k)).permute(2, 0, 1) for k in (1, 300)])
    assert [x.score for x in d(batch)] == [d(x).score for x in batch] and d([]) == []


def test_grey_in_every_form(detector, tmp_path):
    grey = np.asarray(Image.fromarray(washer(3)).convert("L"))
    want = detector(store(tmp_path / "g.png", grey)).score
    for x in (grey, grey[..., None], grey[None], torch.from_numpy(grey.copy()), grey / 255, Image.fromarray(grey)):
        assert detector(x).score == want


WRONG = {"floating-point pixels go from [0-9]+ to 255": washer(0).astype(np.float32),
         "floating-point pixels go from -": torch.randn(3, 64, 64), "go from nan to nan": np.full((8, 8), np.nan),
         "pixels are int64": np.zeros((8, 8, 3), int), "pixels are bool": np.ones((8, 8), bool),
         r"shape \(3, 64, 3\)": np.zeros((3, 64, 3), np.uint8), r"shape \(0, 8, 3\)": np.zeros((0, 8, 3), np.uint8),
         r"shape \(64,\)": np.zeros(64, np.uint8), r"shape \(8, 8, 2\)": np.zeros((8, 8, 2), np.uint8),
         "pixels are complex": np.zeros((8, 8), complex), "pixels are object": np.full((8, 8), None),
         "NoneType is no picture": None, "int is no picture": 7, "dict is no picture": {},
         "cannot be read as an image": "/nowhere.png", "no agreed range": Image.new("F", (8, 8)),
         "more or fewer bits": np.full((8, 8), 4000, np.uint16)}


@pytest.mark.parametrize("says", WRONG)
def test_everything_else_is_a_sentence(detector, says):
    with pytest.raises(BadInput, match=says) as e:
        detector(WRONG[says])
    assert "\n" not in str(e.value)


def test_fit_takes_pictures_of_any_form(root, detector):
    forms = [[*kinds(root / f"train/good/{k:02}.png").values()][k] for k in range(12)]
    listed = tocoad.Detector.fit(forms, CFG, progress=False)
    plain = tocoad.Detector.fit([root / f"train/good/{k:02}.png" for k in range(12)], CFG, progress=False)
    assert listed.threshold == plain.threshold and listed.about["images"]["found"] == 12
    with pytest.raises(BadInput, match="1 of 7 good images cannot be read, first this: .*is no picture"):
        tocoad.Detector.fit([*forms[:6], 3], CFG, progress=False)


def test_the_name_costs_no_torch():
    code = "import sys, tocoad; assert 'torch' not in sys.modules; tocoad.Detector; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'Detecter'"):
        tocoad.Detecter # noqa: B018


# ---- depth

@pytest.mark.parametrize("bits", [10, 12, 14])
def test_depth_is_found_once_and_kept(tmp_path, detector, bits):
    "The same parts of more bits have the same scores, and a part beyond them is a row with its reason"
    top = 2**bits - 1
    grey = lambda k: np.asarray(Image.fromarray(washer(k)).convert("L"))
    deep = lambda k, f=1.: (grey(k) / 255. * top * f).round().astype(np.uint16)
    for k in range(12):
        store(tmp_path / f"good/{k:02}.png", deep(k))
        store(tmp_path / f"eight/{k:02}.png", grey(k))
    for k in range(2):
        store(tmp_path / f"parts/{k}.png", deep(50 + k))
    store(tmp_path / "parts/brighter.png", deep(50, 2.5).clip(0, 65535))
    d, plain = (fit(tmp_path / n, CFG, progress=False) for n in ("good", "eight"))
    assert f"note: images have {bits} bits" in d.text() and d.threshold == pytest.approx(plain.threshold, rel=.02)
    back = tocoad.Detector.load(save(d, tmp_path / "m"), "cpu")
    score(back, tmp_path / "parts", tmp_path / "out", progress=False)
    got = rows(tmp_path / "out")
    assert got["brighter.png"]["decision"] == "unreadable" and "bits a channel" in got["brighter.png"]["note"]
    for k in range(2):
        assert f"{back(deep(50 + k)).score:.6g}" == got[f"{k}.png"]["score"]


# ---- large pictures

def test_pixels_under_way_are_bounded(tmp_path, monkeypatch):
    "However many threads there are"
    flight, most, lock, now = InFlight(3 * 90 * 100), [0], threading.Lock(), [0]
    for k in range(12):
        store(tmp_path / f"{k}.png", noise(k, 100)[:90])
    def slow(*a, **k):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        threading.Event().wait(.01)
        with lock:
            now[0] -= 1
        return squared(*a, **k)
    squared = pictures.squared
    monkeypatch.setattr(pictures, "IN_FLIGHT", flight)
    monkeypatch.setattr(pictures, "squared", slow)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    got = dict(pictures.decoded([f"{k}.png" for k in range(12)], lambda n: read(tmp_path / n, 32)))
    assert most[0] == 3 and flight.now == 0 and IN_FLIGHT.now == 0
    assert all(np.array_equal(got[f"{k}.png"].pixels, read(tmp_path / f"{k}.png", 32).pixels) for k in range(12))


def test_a_large_jpeg_is_reduced_while_it_is_decoded(tmp_path, detector):
    im = Image.fromarray(washer(5, size=512)).resize((6000, 4800))
    im.save(tmp_path / "a.jpg", quality=92)
    opened = pictures._reduced(tmp_path / "a.jpg", SIZE)
    part, whole = (read(tmp_path / "a.jpg", SIZE, draft=d).pixels.astype(int) for d in (True, False))
    assert opened.size == (750, 600) and 0 < np.abs(part - whole).max() < 6
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:50_000])
    with pytest.raises(BadInput, match="cannot be read as an image"):
        read(tmp_path / "cut.jpg", SIZE)
    about = detector.about["images"]
    assert about["draft"] and detector(tmp_path / "a.jpg").score == pytest.approx(detector(im).score, rel=.02)


def test_names_are_found_as_every_data_set_finds_them(tmp_path):
    store(tmp_path / "a/b.PNG", noise(0))
    os.symlink(tmp_path, tmp_path / "a/up")
    store(tmp_path / "out/maps/c.png", noise(0))
    store(tmp_path / "outer/d.png", noise(0))
    assert sorted(find_images(tmp_path, [tmp_path / "out"])) == ["a/b.PNG", "outer/d.png"]
    assert [*find_images(tmp_path / "out/maps", [tmp_path / "out"])] == []
