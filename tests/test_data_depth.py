"How many bits an image uses is found for a whole category, told, and refused where it gives a label away"
import numpy as np
import pytest
from PIL import Image
from toys import noise, save, toy

from tocoad.data.errors import BadInput
from tocoad.data.load import load
from tocoad.data.verify import verify
from tocoad.parts.export import load as load_model
from tocoad.parts.export import save as save_model
from tocoad.parts.fit import fit, read_good
from tocoad.parts.score import score
from tocoad.run.config import config


def read(root):
    return load(root, category="cog", size=32, cache=False)


def grey(k):
    "A picture that reaches 255"
    a = noise(k)[..., 0].copy()
    a[0, 0] = 255
    return a


def store(path, a, bits, kind=np.uint16):
    save(path, (a.astype(np.float64) * (2 ** bits - 1) / 255).round().astype(kind))


def deep_toy(root, train, good, bad, kind=np.uint16, end=".png"):
    "A toy whose images have so many bits; 8: plain files"
    toy(root)
    for j, (place, bits, n) in enumerate((("train/good", train, 3), ("test/good", good, 2), ("test/dent", bad, 2))):
        for k in range(n):
            p = root / f"cog/{place}/{k}.png"
            p.unlink()
            a = grey(k + 100 * j)
            save(p, a) if bits == 8 and kind == np.uint16 else store(p.with_suffix(end), a, bits, kind)
    return root


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("kind,end", [(np.uint16, ".png"), (np.int32, ".tif"), (np.uint16, ".tif")])
def test_every_depth_is_read_alike(tmp_path, bits, kind, end):
    got = read(deep_toy(tmp_path, bits, bits, bits, kind, end))
    want = np.stack([grey(k) for k in range(3)])
    assert np.abs(got.train.images[:, 0].numpy().astype(int) - want).max() <= (bits > 8)
    said = [n for n in got.notes if "bits" in n]
    files = "8" if bits == 8 and kind == np.uint16 else bits
    assert said == ([] if bits == 16 or files == "8" else [f"images have {bits} bits: {2 ** bits - 1} becomes 255"])
    assert verify(tmp_path).ok and [r.removeprefix("cog: ") for r in verify(tmp_path).remarks] == said


@pytest.mark.parametrize("train,test", [(8, 16), (16, 8), (8, 12), (12, 16), (12, 8), (10, 16)])
def test_another_depth_is_refused(tmp_path, train, test):
    root = deep_toy(tmp_path, train, test, test)
    with pytest.raises(BadInput, match=f"have {train} bits and others {test}"):
        read(root)
    assert any("store all of them alike" in p for p in verify(root).problems)


@pytest.mark.parametrize("good,bad", [(8, 16), (16, 8), (12, 8)])
def test_a_depth_that_only_defects_have_is_refused(tmp_path, good, bad):
    root = deep_toy(tmp_path, good, good, bad)
    with pytest.raises(BadInput, match="store all of them alike"):
        read(root)
    assert not verify(root).ok


def test_a_mixture_is_told(tmp_path):
    root = toy(tmp_path)
    for k, place in enumerate(("train/good", "test/good", "test/dent")):
        store(root / f"cog/{place}/0.png", grey(k), 16)
    assert "3 of 7 images have 16 bits, the others 8: 65535 becomes 255" in read(root).notes and verify(root).ok


@pytest.mark.parametrize("values", [(-5, 200), (0, 70_000)])
def test_numbers_without_a_range_are_asked(tmp_path, values):
    root = toy(tmp_path)
    Image.fromarray(np.array([values] * 32, np.int32).repeat(16, 1)).save(root / "cog/train/good/x.tif")
    with pytest.raises(BadInput, match="x.tif cannot be read as an image .pixels from"):
        read(root)
    assert not verify(root).ok


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_good_parts_of_any_depth(tmp_path, bits):
    for k in range(8):
        save(tmp_path / f"{k}.png", grey(k)) if bits == 8 else store(tmp_path / f"{k}.png", grey(k), bits)
    images, names, _, notes = read_good(tmp_path, 32)
    want = np.stack([grey(int(n[0])) for n in names])
    assert np.abs(images[:, 0].numpy().astype(int) - want).max() <= 1
    said = [n for n in notes if "bits" in n]
    assert said == [f"images have {bits} bits: {2 ** bits - 1} becomes 255"] * (8 < bits < 16)


def test_a_detector_refuses_another_depth(tmp_path):
    for k in range(8):
        store(tmp_path / f"good/{k}.png", grey(k), 12)
    cfg = config("smoke", resize=64, size=64, coreset=1)
    d = fit(tmp_path / "good", cfg, device="cpu", progress=False)
    d = load_model(save_model(d, tmp_path / "m.safetensors"), "cpu")
    store(tmp_path / "parts/alike.png", grey(2), 12)
    store(tmp_path / "parts/deeper.png", grey(2), 16)
    save(tmp_path / "parts/plain.png", grey(2))
    got = {n: (s, why) for n, s, why in score(d, tmp_path / "parts", tmp_path / "out", progress=False).scores}
    assert got["alike.png"][0] is not None
    for n in ("deeper.png", "plain.png"):
        assert got[n][0] is None and "more or fewer bits" in got[n][1]
