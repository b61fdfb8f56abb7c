"What was kept is served as it was written, or made anew"
import os
import shutil

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toys import toy

from tocoad.data import mini
from tocoad.data.load import load


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("TOCOAD_CACHE", str(tmp_path / "cache"))
    return toy(tmp_path / "set")


def read(root):
    return load(root, category="cog", size=32)


def file(root):
    [p] = (root.parent / "cache").glob("*cog*.safetensors")
    return p


def flip(p, k):
    b = bytearray(p.read_bytes())
    b[k] ^= 1
    p.write_bytes(b)


def rewrite(change):
    def harm(p):
        with safe_open(p, "pt") as f:
            said = f.metadata()
        tensors = dict(load_file(p))
        change(tensors, said)
        save_file(tensors, p, said)
    return harm


HARM = {
    "a pixel": lambda p: flip(p, -1),
    "a pixel, its time of change set back": lambda p: (
        s := p.stat(), flip(p, -1), os.utime(p, ns=(s.st_atime_ns, s.st_mtime_ns))),
    "a mask": rewrite(lambda t, m: t["test.masks"][0].logical_not_()),
    "fewer training images": rewrite(lambda t, m: t.update({"train.images": t["train.images"][:-1].clone()})),
    "fewer test images": rewrite(lambda t, m: t.update({"test.images": t["test.images"][1:].clone()})),
    "no masks": rewrite(lambda t, m: t.pop("test.masks")),
    "no training images": rewrite(lambda t, m: t.pop("train.images")),
    "one array too many": rewrite(lambda t, m: t.update({"validation.images": t["train.images"].clone()})),
    "another order": rewrite(lambda t, m: t.update({"train.images": t["train.images"].flip(0)})),
    "another note": rewrite(lambda t, m: m.update(about=m["about"].replace("notes", "note"))),
    "another fingerprint": rewrite(lambda t, m: m.update(about=m["about"].replace("a", "b"))),
    "no hash": rewrite(lambda t, m: m.pop("hash")),
    "no remarks": rewrite(lambda t, m: m.clear()),
    "cut off": lambda p: p.write_bytes(p.read_bytes()[:-9]),
    "empty": lambda p: p.write_bytes(b""),
}


@pytest.mark.parametrize("what", HARM)
def test_what_does_not_fit_is_decoded_anew(place, what):
    first = read(place)
    want = [getattr(s, k).clone() for s in (first.train, first.test) for k in ("images", "labels", "masks")]
    HARM[what](file(place))
    for again in (read(place), read(place)):
        got = [getattr(s, k) for s in (again.train, again.test) for k in ("images", "labels", "masks")]
        assert all((a.shape == b.shape) and (a == b).all() for a, b in zip(want, got, strict=True))
        assert (again.fingerprint, again.notes) == (first.fingerprint, first.notes)


def test_a_sound_file_is_read_and_not_made(place, monkeypatch):
    first = read(place)
    monkeypatch.setattr("tocoad.data.load._assemble", lambda *a: pytest.fail("decoded again"))
    assert read(place).fingerprint == first.fingerprint
    os.utime(file(place)) # another state, the same content
    assert read(place).fingerprint == first.fingerprint
    for p in file(place).parent.glob("*.txt"):
        p.unlink()
    assert read(place).fingerprint == first.fingerprint


def test_a_file_that_was_found_right_is_not_hashed_again(place, monkeypatch):
    read(place)
    monkeypatch.setattr("tocoad.data.cache._sum", lambda *a: pytest.fail("hashed again"))
    assert len(read(place).train) == 3


GONE = { # harm to a drawn set
    "an image": lambda d: (d / "brick/train/good/003.png").unlink(),
    "a mask": lambda d: (d / "brick/ground_truth/hole/000_mask.png").unlink(),
    "a kind of defect": lambda d: shutil.rmtree(d / "brick/test/stain"),
    "all": lambda d: shutil.rmtree(d / "brick"),
    "half a file": lambda d: (d / "brick/test/good/000.png").write_bytes(b"\x89PNG"),
    "the list": lambda d: mini._list(d).unlink(),
    "the list cut off": lambda d: mini._list(d).write_text(mini._list(d).read_text()[:-1]),
}


@pytest.fixture(scope="module")
def bricks(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv("TOCOAD_CACHE", str(tmp_path_factory.mktemp("bricks")))
        m.setitem(mini.SETS, "mini", (4, 2, 1))
        yield lambda: mini.mini_root("mini", ["brick"])


def content(d):
    return {p.relative_to(d).as_posix(): p.read_bytes() for p in d.rglob("*.png")}


@pytest.mark.parametrize("what", GONE)
def test_a_drawn_set_is_whole(bricks, what):
    want = content(bricks())
    assert len(want) == 4 + 2 + 2 * 3
    GONE[what](bricks())
    assert content(bricks()) == want


def test_a_whole_drawn_set_is_not_drawn_again(bricks, monkeypatch):
    root = bricks()
    monkeypatch.setattr(mini, "write_mini", lambda *a, **k: pytest.fail("drawn again"))
    assert bricks() == root
