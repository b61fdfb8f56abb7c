"""Whatever lies there, the command answers with one sentence and the right status, and leaves folders as they were."""

import contextlib
import csv
import ctypes
import functools
import hashlib
import http.server
import io
import json
import os
import pickle
import resource
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from tocoad import cli
from tocoad.data import archives, verify
from tocoad.data import trees as layouts
from tocoad.data.errors import BadInput
from tocoad.data.load import load
from tocoad.parts import score as scoring
from tocoad.parts.export import load as load_model
from tocoad.run import compare

SETS = "--set epochs1=1 epochs2=1 width=32 resize=64 size=64"
RUN = f"run --root {{in}} --category washer --profile smoke --quiet --out {{out}} {SETS}"
VERIFY = "data verify {in} --quiet"
FIT = f"fit --good {{in}}/washer/train/good --model {{out}}/m.safetensors --profile smoke --quiet {SETS}"
SCORE = "score --model {model} --images {in} --out {out} --quiet"
GET = "data get btad --archive {in}/archive --to {out} --accept-licence --quiet"
FETCH = "data get btad --from {url} --to {out} --accept-licence --quiet"
ONE = dict(
    mvtec="washer",
    folder="washer",
    visa="candle",
    btad="01",
    mvtec_ad_2="can",
    kolektor_sdd="kolektor_sdd",
    magnetic_tile="magnetic_tile",
)

KINDS, LATIN = (
    ("scratch", "hole", "stain", "bend", "missing_part"),
    os.fsdecode(b"\xfcber.png"),
)  # in Latin-1: no UTF-8
GOOD, TEST, MASK = "washer/train/good/002.png", "washer/test/hole/000.png", "washer/ground_truth/hole/000_mask.png"


# What a command may not do


def bound(f):
    "f() as of a user whom permissions bind: root calls it in a thread that has laid down the right to pass over them"
    if os.geteuid():
        return f()
    out, libc, head, caps = [], ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if not hasattr(libc, "capset"):
        pytest.skip("permissions do not bind root here")

    def thread():
        try:
            libc.capget(head, caps)
            for k in range(3):
                caps[k] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            out.append((None, libc.capset(head, caps) and pytest.skip("permissions do not bind root here") or f()))
        except BaseException as e:
            out.append((e, None))

    t = threading.Thread(target=thread)
    t.start()
    t.join()
    [(e, got)] = out
    if e:
        raise e
    return got


def photograph(top):
    "Every name below a folder with its type, permissions, size, time, content or target"
    out = {}
    for d, subs, files in os.walk(top):
        for p in (os.path.join(d, n) for n in subs + files):
            try:
                s, what = os.lstat(p), None
            except PermissionError:
                continue  # below a folder that may be listed only
            if stat.S_ISLNK(s.st_mode):
                what = os.readlink(p)
            if stat.S_ISREG(s.st_mode):
                with contextlib.suppress(PermissionError):
                    what = hashlib.sha256(Path(p).read_bytes()).hexdigest()
            out[os.path.relpath(p, top)] = (
                s.st_mode,
                what,
                *([] if stat.S_ISDIR(s.st_mode) else [s.st_size, s.st_mtime_ns]),
            )
    return out


class Place:
    "A folder to work in: in, out, cwd, temp are watched, cache is looked through for leftovers"

    def __init__(self, top, model=None):
        self.top, self.at = (
            Path(top),
            {n: f"{top}/{n}" for n in ("in", "out", "cwd", "temp")} | dict(model=str(model)),
        )
        for n in ("in", "out", "cwd", "temp", "cache"):
            (self.top / n).mkdir(exist_ok=True)
        self.root, self.out, self.env = (
            self.top / "in",
            self.top / "out",
            dict(TOCOAD_CACHE=f"{top}/cache", TOCOAD_STORE=f"{top}/cache/store", no_proxy="*"),
        )

    def photograph(self):
        return {
            k: v
            for n in ("in", "out", "cwd", "temp")
            for k, v in photograph(self.top / n).items()
            for k in [f"{n}/{k}"]
        }

    def words(self, words):
        return [w.format_map(self.at) for w in (words.split() if isinstance(words, str) else words)]

    def main(self, words):
        "Status, stdout, stderr of the command; the streams refuse and escape letters as those of a process do"
        out, err = (
            io.TextIOWrapper(io.BytesIO(), "utf-8", e, write_through=True) for e in ("strict", "backslashreplace")
        )
        with (
            pytest.MonkeyPatch.context() as m,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(),
        ):
            for kv in self.env.items():
                m.setenv(*kv)
            m.chdir(self.at["cwd"])
            m.setattr(tempfile, "tempdir", self.at["temp"])
            m.delenv("TOCOAD_DATA", raising=False)
            warnings.simplefilter("ignore")  # pytest has its own filters; see test_as_processes
            try:
                status = bound(lambda: cli.main(words))
            except SystemExit as e:
                status = e.code
        return status, *(f.buffer.getvalue().decode("utf-8") for f in (out, err))

    def call(self, words, status=1, says=(), tells=(), makes=()):
        "The command, and all that must hold; says: in its sentence, tells: on stdout, makes: what it may leave behind"
        before = self.photograph()
        got, out, err = self.main(self.words(words))
        assert got == status, (got, out, err)
        self.judge(got, out, err, says, tells, makes, before)
        return out

    def judge(self, status, out, err, says, tells, makes, before):
        assert "Traceback" not in out + err
        if status == 0 or tells and not says:
            assert err == ""
        else:
            assert (
                err.startswith("tocoad: ")
                and err.endswith("\n")
                and len(err.splitlines()) == 1
                and err[:-1].isprintable()
            ), err
        if status == 1 and err:
            assert ": " in err[8:] or "; " in err, err  # what and where: what to do
        for s in says:
            assert s in err, err
        for s in tells:
            assert s in out, out
        after = self.photograph()
        assert {k: v for k, v in after.items() if k in before} == before
        new = {k for k in after if k not in before}
        assert all(k.startswith(tuple(makes)) for k in new) if makes else not new, new
        odd = [
            p
            for p in (self.top / "cache").rglob("*")
            if p.is_file() and p.suffix not in (".safetensors", ".json", ".png", ".txt", ".lock") and p.name != "gate"
        ]
        assert not odd, odd


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    "A little of every layout"
    top = tmp_path_factory.mktemp("trees")
    return {l: layouts.write_layout(top / l, l, [c], size=32, n=(6, 2, 1)) for l, c in ONE.items()}


@pytest.fixture(scope="module")
def model(trees, tmp_path_factory):
    "A model file of the washers"
    top = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("TOCOAD_CACHE", str(top / "cache"))
        m.setenv("TOCOAD_STORE", str(top / "store"))
        assert cli.main([w.format_map({"in": trees["mvtec"], "out": top}) for w in FIT.split()]) == 0
    return top / "m.safetensors"


@pytest.fixture
def place(tmp_path, trees, model, capfd, monkeypatch):
    monkeypatch.setattr(compare, "compare", lambda *a, **k: pytest.fail("training began"))
    yield Place(tmp_path, model)
    assert capfd.readouterr() == ("", "")  # nothing past Python's streams, as decoders written in C like to do


def fill(place, trees, layout):
    shutil.rmtree(place.root)
    shutil.copytree(trees[layout], place.root)


def table(*rows):
    return pytest.mark.parametrize("row", rows, ids=lambda r: r[0].replace(" ", "-"))


# What may have happened to a tree: each takes its root


def put(path, content=b""):
    def harm(d):
        p = d / path
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_bytes(content() if callable(content) else content)

    return harm


def cut(path, share=0.5):
    return lambda d: (d / path).write_bytes((d / path).read_bytes()[: int(share * (d / path).stat().st_size)])


def gone(path):
    return lambda d: shutil.rmtree(d / path) if (d / path).is_dir() else (d / path).unlink()


def link(path, to):
    return lambda d: ((d / path).unlink(missing_ok=True), (d / path).symlink_to(to))


def mode(path, bits):
    return lambda d: (d / path).chmod(bits)


def move(a, b):
    return lambda d: ((d / b).parent.mkdir(parents=True, exist_ok=True), (d / a).rename(d / b))


def copy(a, b):
    return lambda d: ((d / b).parent.mkdir(parents=True, exist_ok=True), shutil.copy(d / a, d / b))


def edit(path, old, new, n=-1):
    return lambda d: (d / path).write_text(changed(d / path, old, new, n))


def folder(path):
    return lambda d: ((d / path).unlink() if (d / path).exists() else None, (d / path).mkdir(parents=True))


def pipe(path):
    return lambda d: ((d / path).unlink(missing_ok=True), os.mkfifo(d / path))


def also(*harms):
    return lambda d: [h(d) for h in harms]


def nothing(d):
    pass


def changed(p, old, new, n):
    text = p.read_text()
    assert old in text
    return text.replace(old, new, n)


def line(text):
    return lambda d: (d / CSV).write_text((d / CSV).read_text() + text)


def clear(d):
    shutil.rmtree(d)
    d.mkdir()


# Pictures


def picture(mode="RGB", size=(32, 32)):
    a = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(a[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(a).convert("RGBA" if mode == "PA" else mode)


def saved(kind, mode="RGB", size=(32, 32), **kw):
    f = io.BytesIO()
    if kw.pop("frames", 0):
        kw |= dict(save_all=True, append_images=[picture(mode, size).rotate(90 * k) for k in (1, 2)])
    picture(mode, size).save(f, kind, **kw)
    return f.getvalue()


def half(*a, **k):
    b = saved(*a, **k)
    return b[: len(b) // 2]


def chunk(name, b):
    return struct.pack(">I", len(b)) + name + b + struct.pack(">I", zlib.crc32(name + b))


@functools.cache
def bits(w, h, rows=None, before=b""):
    "A black PNG of one bit a pixel; rows: how many are there"
    packer = zlib.compressobj(1)
    row = b"\0" * ((w + 7) // 8 + 1)
    body = b"".join(packer.compress(row) for _ in range(h if rows is None else rows))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 1, 0, 0, 0, 0))
        + before
        + chunk(b"IDAT", body + packer.flush())
        + chunk(b"IEND", b"")
    )


def damaged():
    b = bytearray(saved("PNG"))
    b[60] ^= 255
    return bytes(b)


BROKEN = {  # what it is -> suffix, content, words of the reason
    "truncated PNG": (".png", lambda: half("PNG"), "truncated"),
    "truncated JPEG": (".jpg", lambda: half("JPEG"), "truncated"),
    "truncated BMP": (".bmp", lambda: half("BMP"), "truncated"),
    "truncated TIFF": (".tif", lambda: half("TIFF"), ""),
    "truncated compressed TIFF": (".tif", lambda: half("TIFF", compression="tiff_lzw"), ""),
    "truncated WebP": (".webp", lambda: half("WEBP"), ""),
    "only the first ten bytes": (".png", lambda: saved("PNG")[:10], ""),
    "zero bytes": (".png", lambda: b"", "empty"),
    "text named png": (".png", lambda: b"this is no picture\n", "it is none"),
    "web page named jpg": (".jpg", lambda: b"<!doctype html><title>404</title>", "it is none"),
    "noise after a signature": (".png", lambda: b"\x89PNG\r\n\x1a\n" + bytes(range(256)), ""),
    "wrong checksum": (".png", damaged, ""),
    "no width": (".png", lambda: bits(0, 32), ""),
    "decompression bomb": (".png", lambda: bits(60_000, 60_000, rows=9), "178,956,970"),
    "20000 x 20000": (".png", lambda: bits(20_000, 20_000), "178,956,970"),
    "one row too many": (".png", lambda: bits(13_377, 13_379, rows=9), "178,956,970"),
    "bomb in its text": (
        ".png",
        lambda: bits(32, 32, before=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(3 << 20)))),
        "large",
    ),
    "animated PNG": (".png", lambda: saved("PNG", frames=3), "3 pictures"),
    "animated WebP": (".webp", lambda: saved("WEBP", frames=3), "3 pictures"),
    "animated GIF named png": (".png", lambda: saved("GIF", frames=3), "unknown format"),
    "several pages": (".tiff", lambda: saved("TIFF", frames=3), "3 pictures"),
    "floating point": (".tif", lambda: saved("TIFF", "F"), "floating-point"),
    "PostScript named png": (".png", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unknown format"),
    "PDF named png": (".png", lambda: saved("PDF"), "unknown format"),
}
broken = pytest.mark.parametrize("kind", BROKEN, ids=lambda k: k.replace(" ", "-"))
NAME = "größer, schöner 1"


def spoil(place, kind, where="washer/train/good"):
    suffix, content, why = BROKEN[kind]
    put(f"{where}/{NAME}{suffix}", content)(place.root)
    return NAME + suffix, why


@broken
def test_broken_picture_run(place, trees, kind):
    fill(place, trees, "mvtec")
    start = time.process_time()
    place.call(RUN, 1, spoil(place, kind))
    assert time.process_time() - start < 5


@broken
def test_broken_picture_verify(place, trees, kind):
    fill(place, trees, "mvtec")
    place.call(VERIFY, 1, tells=[*spoil(place, kind), "NOT complete", "1 problem"])


@broken
def test_broken_picture_fit(place, trees, kind):
    fill(place, trees, "mvtec")
    place.call(FIT, 1, ["1 of 7", *spoil(place, kind)])


def test_broken_mask(place, trees):
    for kind in ("truncated PNG", "zero bytes", "20000 x 20000"):
        fill(place, trees, "mvtec")
        put(MASK, BROKEN[kind][1])(place.root)
        place.call(RUN, 1, ["hole", "000_mask.png", BROKEN[kind][2]])
        place.call(VERIFY, 1, tells=[MASK, BROKEN[kind][2]])


def rows(out):
    return list(csv.DictReader(io.StringIO((out / "scores.csv").read_bytes().decode())))


def test_score_leaves_none_out(place, trees):
    "The good ones are scored, each broken one is listed with its reason, and the status is 1"
    fill(place, trees, "mvtec")
    bad = {}
    for k, kind in enumerate(BROKEN):
        bad[f"broken/{k} {kind}{BROKEN[kind][0]}"] = BROKEN[kind][2]
        put(list(bad)[-1], BROKEN[kind][1])(place.root)
    place.call(SCORE, 1, ["24 images of 42", "scores.csv"], ["24 unreadable"], makes=["out/"])
    got = {r["path"]: r for r in rows(place.out)}
    assert {p for p, r in got.items() if r["decision"] == "unreadable"} == set(bad)
    for p, why in bad.items():
        assert why in got[p]["note"] and got[p]["note"] and not got[p]["score"], got[p]
    fine = [r for r in got.values() if r["decision"] != "unreadable"]
    assert len(fine) == 18 and all(float(r["score"]) > 0 for r in fine)
    assert json.loads((place.out / "summary.json").read_text())["unreadable"] == len(bad)
    assert not [p for p in photograph(place.out) if os.path.basename(p).startswith(".")]


# Odd, and right

ODD = {  # what it is -> suffix, content, word of the note (None: none is needed)
    "CMYK JPEG": (".jpg", lambda: saved("JPEG", "CMYK"), "CMYK"),
    "CMYK TIFF": (".tif", lambda: saved("TIFF", "CMYK"), "CMYK"),
    "LAB TIFF": (".tif", lambda: saved("TIFF", "LAB"), "LAB"),
    "grey": (".png", lambda: saved("PNG", "L"), "grey"),
    "16-bit": (".png", lambda: saved("PNG", "I;16"), "grey"),
    "one bit": (".png", lambda: saved("PNG", "1"), "grey"),
    "transparent": (".png", lambda: saved("PNG", "RGBA"), "transparent"),
    "grey and transparent": (".png", lambda: saved("PNG", "LA"), "transparent"),
    "palette": (".png", lambda: saved("PNG", "P"), None),
    "palette with a transparent colour": (".png", lambda: saved("PNG", "P", transparency=bytes(range(256))), None),
    "turned by EXIF": (".jpg", lambda: saved("JPEG", size=(32, 24), exif=turned(6)), "sizes"),
    "EXIF that says nonsense": (".jpg", lambda: saved("JPEG", exif=turned(77)), None),
    "another size": (".png", lambda: saved("PNG", size=(90, 20)), "squeezed"),
    "one pixel": (".png", lambda: saved("PNG", size=(1, 1)), "sizes"),
    "a wide line": (".png", lambda: saved("PNG", size=(5000, 1)), "squeezed"),
    "progressive JPEG": (".jpeg", lambda: saved("JPEG", progressive=True), None),
    "BMP named png": (".png", lambda: saved("BMP"), None),
    "capital suffix": (".PNG", lambda: saved("PNG"), None),
    "bytes after its end": (".png", lambda: saved("PNG") + b"and more", None),
    "two pictures of a camera": (".jpg", lambda: saved("MPO", frames=3), None),
}


def turned(how):
    e = Image.Exif()
    e[0x0112] = how
    return e


@pytest.mark.parametrize("kind", ODD, ids=lambda k: k.replace(" ", "-"))
def test_odd_picture(place, trees, kind):
    fill(place, trees, "mvtec")
    suffix, content, note = ODD[kind]
    put(f"washer/train/good/{NAME}{suffix}", content)(place.root)
    place.call(VERIFY, 0, tells=["complete and sound", "7 "])
    before = place.photograph()
    got = load(place.root, category="washer", size=32, cache=False)
    assert len(got.train) == 7 and f"train/good/{NAME}{suffix}" in got.train.paths and place.photograph() == before
    assert note is None or any(note in n for n in got.notes), got.notes


TRAIL = b"Exif\0\0II*\0\x08\0\0\0\xff\xffjunk"


@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0", b"Exif\0\0no TIFF at all", TRAIL, b"Exif\0\0II*\0\xff\xff\xff\xff"],
    ids=["none", "junk", "cut", "beyond"],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif(place, trees, kind, exif):
    "The pixels are whole: such a picture is taken"
    fill(place, trees, "mvtec")
    put(f"washer/train/good/{NAME}.{kind.lower()}", saved(kind, exif=exif if kind == "JPEG" else exif[6:]))(
        place.root
    )
    place.call(VERIFY, 0, tells=["complete and sound"])
    with pytest.MonkeyPatch.context() as m:
        m.setattr(compare, "compare", reached)
        place.call(RUN, 1, ["reading: done"])


def reached(*a, **k):
    raise BadInput("reading: done")


ODD_TREES = [  # what, harm, a word of the notes or None
    ("an image without its mask", gone(MASK), "no mask"),
    ("no masks at all", gone("washer/ground_truth"), "no mask"),
    (
        "hidden files",
        also(
            put("washer/train/good/.000.png"),
            put("washer/test/hole/._000.png"),
            put("washer/.DS_Store"),
            put(".hidden/train/good/000.png"),
        ),
        None,
    ),
    (
        "files that are none of ours",
        also(
            put("washer/train/good/Thumbs.db", b"x"),
            put("washer/train/good/notes.docx", b"x"),
            put("readme.md", b"x"),
            put("a.zip", b"x"),
        ),
        None,
    ),
    ("an empty folder of a kind", folder("washer/test/nothing"), None),
    ("no good test images", gone("washer/test/good"), "anomalous images only"),
    (
        "no anomalous test images",
        also(*(gone(f"washer/{d}/{k}") for d in ("test", "ground_truth") for k in KINDS)),
        "good images only",
    ),
    (
        "spaces and letters in a kind",
        also(
            move("washer/test/hole", "washer/test/Loch, groß 孔"),
            move("washer/ground_truth/hole", "washer/ground_truth/Loch, groß 孔"),
        ),
        None,
    ),
    ("emoji in a name", move(GOOD, "washer/train/good/🔩🙂.png"), None),
    ("newline in a name", move(GOOD, "washer/train/good/a\nb.png"), None),
    ("a name of 255 bytes", move(GOOD, f"washer/train/good/{'n' * 251}.png"), None),
    ("a name that is not UTF-8", move(GOOD, "washer/train/good/" + LATIN), None),
    ("a name like an option", move(GOOD, "washer/train/good/--out.png"), None),
    ("a name of dots and braces", move(GOOD, "washer/train/good/{x}%s..png"), None),
    (
        "a loop of folders",
        also(
            link("washer/train/good/loop", ".."), link("washer/test/hole/again", "../../.."), link("washer/self", ".")
        ),
        None,
    ),
    ("a link to an image", link(GOOD, "003.png"), None),
    (
        "a link to a folder",
        also(move("washer/train/good", "elsewhere/g"), link("washer/train/good", "../../elsewhere/g")),
        None,
    ),
    ("the same stem twice in training", copy(GOOD, "washer/train/good/002.PNG"), None),
    ("a mask named like its image", move(MASK, "washer/ground_truth/hole/000.png"), None),
    ("a mask that is empty", put(MASK, lambda: bits(32, 32)), "empty"),
]


@table(*ODD_TREES)
def test_odd_tree(place, trees, row):
    name, harm, note = row
    fill(place, trees, "mvtec")
    harm(place.root)
    if note != "no mask":
        place.call(VERIFY, 0, tells=["complete and sound"])
    before = place.photograph()
    got = load(place.root, category="washer", size=32, cache=False)
    assert len(got.train) == 6 + ("twice" in name) and place.photograph() == before
    assert note is None or any(note in n for n in got.notes), got.notes


def test_a_stranger_that_is_shut(place, trees, monkeypatch):
    "As lost+found on a disk of its own"
    monkeypatch.setattr(compare, "compare", reached)
    fill(place, trees, "mvtec")
    folder("lost+found")(place.root)
    mode("lost+found", 0)(place.root)
    place.call(RUN, 1, ["reading: done"])


def test_unknown_things_are_remarked(place, trees):
    fill(place, trees, "mvtec")
    ODD_TREES[3][1](place.root)
    place.call(VERIFY, 0, tells=["belong to nothing", "Thumbs.db"])


def test_missing_mask_is_said(place, trees):
    fill(place, trees, "mvtec")
    gone(MASK)(place.root)
    place.call(VERIFY, 1, tells=[TEST, "no mask"])


def test_all_that_is_odd_at_once(place, trees, monkeypatch):
    "One run to its end, with every note said"
    monkeypatch.undo()
    fill(place, trees, "mvtec")
    for k, (suffix, content, _) in enumerate(ODD.values()):
        put(f"washer/train/good/ä {k}{suffix}", content)(place.root)
    gone(MASK)(place.root)
    (place.root / TEST).rename(place.root / "washer/test/hole" / os.fsdecode(b"a\nb \xfcber.png"))
    out = place.call(
        RUN,
        0,
        tells=["Note: ", "have no mask", "ber.png", "CMYK", "LAB", "grey", "transparent", "squeezed", "Written: "],
        makes=["out/"],
    )
    assert all(l.startswith(("Note: ", "Written: ")) for l in out.split("\n\n")[-1].splitlines()), out
    assert len(list(place.out.iterdir())) == 3


# Trees that are wrong: the command names what and where

CSV = "split_csv/1cls.csv"
LONG = "x" * 300
MVTEC = [  # what, harm, words of the sentence[, the command]
    ("mask of another size", put(MASK, lambda: saved("PNG", "1", (12, 10))), ["000_mask.png", "12 x 10", "32 x 32"]),
    (
        "mask with its sides swapped",
        also(put(TEST, lambda: saved("PNG", size=(20, 32))), put(MASK, lambda: saved("PNG", "1", (32, 20)))),
        ["000_mask.png", "32 x 20", "20 x 32"],
    ),
    ("mask without image", gone(TEST), ["000_mask.png", "'000'"]),
    ("masks of a kind without images", gone("washer/test/hole"), ["000_mask.png", "not there"]),
    (
        "two masks of one image",
        copy(MASK, "washer/ground_truth/hole/000.png"),
        ["000_mask.png", "000.png", "keep one"],
    ),
    ("one mask of two images", copy(TEST, "washer/test/hole/000.bmp"), ["000_mask.png", "2 images", "rename"]),
    ("mask that is a folder", folder(MASK), ["000_mask.png"]),
    ("image that is a folder", folder(GOOD), ["002.png"]),
    ("image that is a dead link", link(GOOD, "nowhere.png"), ["002.png", "No such file"]),
    (
        "image in a loop of links",
        also(link(GOOD, "x.png"), link("washer/train/good/x.png", "002.png")),
        ["002.png", "symbolic links"],
    ),
    ("mask that is a dead link", link(MASK, "nowhere.png"), ["000_mask.png", "No such file"]),
    ("image that is a pipe", pipe(GOOD), ["002.png"]),
    ("mask that is a pipe", pipe(MASK), ["000_mask.png"]),
    ("unreadable image", mode(GOOD, 0), ["002.png", "Permission denied"]),
    ("unreadable mask", mode(MASK, 0), ["000_mask.png", "Permission denied"]),
    ("unreadable folder of images", mode("washer/train/good", 0), ["train/good", "Permission denied"]),
    ("folder that may be listed only", mode("washer/train/good", 0o444), ["train/good", "Permission denied"]),
    ("unreadable kind of defect", mode("washer/test/hole", 0), ["test/hole", "Permission denied"]),
    ("unreadable folder of masks", mode("washer/ground_truth/hole", 0), ["ground_truth/hole", "Permission denied"]),
    ("test that may be listed only", mode("washer/test", 0o444), ["test", "Permission denied"]),
    ("unreadable category", mode("washer", 0), ["washer", "Permission denied"]),
    ("category that may be listed only", mode("washer", 0o444), ["washer", "Permission denied"]),
    ("unreadable root", mode(".", 0), ["in", "Permission denied"]),
    ("root that may be listed only", mode(".", 0o444), ["in", "Permission denied"]),
    (
        "corrupt image with a newline in its name",
        put("washer/train/good/a\nb.png", b"x"),
        ["a", "b.png", "it is none"],
    ),
    (
        "corrupt image with a bell in its name",
        put("washer/train/good/a\x1b[31m\x07.png", b"x"),
        [".png", "it is none"],
    ),
    ("corrupt image whose name is not UTF-8", put("washer/train/good/" + LATIN, b"x"), ["ber.png", "it is none"]),
    (
        "corrupt image with a name of 255 bytes",
        put(f"washer/train/good/{'n' * 251}.png", b"x"),
        ["n" * 251, "it is none"],
    ),
    ("defects in training", folder("washer/train/scratch"), ["train", "scratch"]),
    ("no training images", also(gone("washer/train/good"), folder("washer/train/good")), ["train/good"]),
    ("no folder of training images", also(gone("washer/train/good")), ["train/good"]),
    (
        "good ones that are text only",
        also(gone("washer/train/good"), put("washer/train/good/000.txt", b"x")),
        ["train/good"],
    ),
    ("no test images", gone("washer/test"), ["test"]),
    (
        "test images without folders of kinds",
        also(*(gone(f"washer/test/{k}") for k in (*KINDS, "good")), put("washer/test/000.png", lambda: saved("PNG"))),
        ["test"],
    ),
    (
        "training that is a loop of links",
        also(gone("washer/train"), link("washer/train", "train")),
        ["in", "<category>/train/good"],
    ),
    ("unknown category", nothing, ["wascher", "washer"], RUN.replace("washer", "wascher", 1)),
    (
        "a category of another place",
        nothing,
        ["../in/washer", "washer"],
        RUN.replace("--category washer", "--category ../in/washer"),
    ),
    ("unknown data set", nothing, ["mvtec", "mvtec_ad"], RUN + " --dataset mvtec"),
    ("another data set", nothing, ["BTAD", "<category>/train/ok"], RUN + " --dataset btad"),
    ("missing root", nothing, ["in/nowhere"], RUN.replace("{in}", "{in}/nowhere")),
    ("root that is a file", put("file", b"x"), ["in/file"], RUN.replace("{in}", "{in}/file")),
    ("root that is an image", nothing, ["002.png"], RUN.replace("{in}", "{in}/" + GOOD)),
    ("root with too long a name", nothing, ["xxx"], RUN.replace("{in}", "{in}/" + LONG)),
    ("root of an unknown user", nothing, ["~nobody_of_this_name"], RUN.replace("{in}", "~nobody_of_this_name/x")),
    ("root that is a dead link", link("link", "nowhere"), ["in/link"], RUN.replace("{in}", "{in}/link")),
    ("root that is a loop of links", link("link", "link"), ["in/link"], RUN.replace("{in}", "{in}/link")),
    ("root that is a pipe", pipe("pipe"), ["in/pipe"], RUN.replace("{in}", "{in}/pipe")),
    (
        "root that is a category",
        nothing,
        ["washer", "itself a category", "category='washer'"],
        RUN.replace("{in}", "{in}/washer"),
    ),
    (
        "root below an unreadable folder",
        also(move("washer", "deep/er/washer"), mode("deep", 0)),
        ["deep/er"],
        RUN.replace("{in}", "{in}/deep/er"),
    ),
    ("empty root", clear, ["in", "<category>/train/good"]),
    ("nothing recognised", also(clear, put("a/b/c.png", lambda: saved("PNG"))), ["in", "<category>/train/good"]),
    (
        "images in the root",
        also(clear, *(put(f"{k}.png", lambda: saved("PNG")) for k in range(3))),
        ["in", "<category>/train/good"],
    ),
    (
        "two layouts in one folder",
        put("01/train/ok/000.png", lambda: saved("PNG")),
        ["mvtec", "btad", "01", "washer"],
    ),
    ("another layout with links", also(folder("MT_Free/Imgs")), ["mvtec", "magnetic_tile"]),
    ("output that is a file", also(put("o", b"x")), ["in/o", "--out"], RUN.replace("{out}", "{in}/o")),
    ("output below a file", also(put("o", b"x")), ["in/o/x", "--out"], RUN.replace("{out}", "{in}/o/x")),
    ("output that is a loop of links", also(link("o", "o")), ["in/o", "--out"], RUN.replace("{out}", "{in}/o")),
    ("output with too long a name", nothing, ["xxx", "--out"], RUN.replace("{out}", "{in}/" + LONG)),
    (
        "output that may not be written",
        also(folder("o"), mode("o", 0o500)),
        ["in/o", "Permission denied", "--out"],
        RUN.replace("{out}", "{in}/o"),
    ),
]
VISA = [
    ("no table", gone(CSV), ["1cls.csv"]),
    ("no folder of tables", gone("split_csv"), ["1cls.csv"]),
    ("only another table", move(CSV, "split_csv/2cls_fewshot.csv"), ["1cls.csv"]),
    ("table that is a folder", folder(CSV), ["1cls.csv"]),
    ("empty table", put(CSV), ["1cls.csv", "columns"]),
    ("table of a heading only", put(CSV, b"object,split,label,image,mask\n"), ["1cls.csv"]),
    ("wrong columns", edit(CSV, "label", "lable"), ["1cls.csv", "columns", "label"]),
    ("table with semicolons", edit(CSV, ",", ";"), ["1cls.csv", "columns"]),
    ("table without a heading", edit(CSV, "object,split,label,image,mask\n", ""), ["1cls.csv", "columns"]),
    ("table that is no text", put(CSV, lambda: saved("PNG")), ["1cls.csv"]),
    ("table in UTF-16", lambda d: (d / CSV).write_bytes((d / CSV).read_text().encode("utf-16")), ["1cls.csv"]),
    ("table of another category", edit(CSV, "candle,", "macaroni1,"), ["1cls.csv", "candle"]),
    ("row of a missing image", gone("candle/Data/Images/Normal/0002.JPG"), ["1cls.csv", "0002.JPG", "not there"]),
    (
        "row of a missing mask",
        gone("candle/Data/Masks/Anomaly/000.png"),
        ["1cls.csv", "Masks/Anomaly/000.png", "not there"],
    ),
    (
        "row with backslashes",
        edit(CSV, "candle/Data/Images/Normal/0002.JPG", r"candle\Data\Images\Normal\0002.JPG"),
        ["1cls.csv", "0002.JPG", "not there"],
    ),
    ("row without a path", edit(CSV, "candle/Data/Images/Normal/0002.JPG", ""), ["1cls.csv"]),
    ("row that is cut off", line("candle,train,nor"), ["1cls.csv"]),
    ("row that ends before its path", line("candle,train,normal\n"), ["1cls.csv"]),
    (
        "row with too long a name",
        edit(CSV, "candle/Data/Images/Normal/0002.JPG", f"candle/{LONG}.JPG"),
        ["1cls.csv", "xxx"],
    ),
    ("row with a NUL", edit(CSV, "Normal/0002.JPG", "Normal/0002\0.JPG"), ["1cls.csv"]),
    (
        "row with a newline in its path",
        edit(CSV, "candle/Data/Images/Normal/0002.JPG", '"candle/a\nb.JPG"'),
        ["1cls.csv"],
    ),
    ("a field of a megabyte", edit(CSV, "candle/Data/Images/Normal/0002.JPG", "y" * 10**6), ["1cls.csv"]),
    (
        "anomalies in training",
        edit(CSV, "test,anomaly", "train,anomaly", 1),
        ["1cls.csv", "training", "Anomaly/000.JPG"],
    ),
    ("unknown split", edit(CSV, "train,normal", "training,normal", 1), ["1cls.csv", "'training'"]),
    ("unknown label", edit(CSV, "train,normal", "train,good", 1), ["1cls.csv", "'good'"]),
    ("no training rows", edit(CSV, ",train,", ",test,"), ["train"]),
    (
        "no test rows",
        lambda d: (d / CSV).write_text(
            "".join(l for l in (d / CSV).read_text().splitlines(True) if ",test," not in l)
        ),
        ["test"],
    ),
    ("unreadable table", mode(CSV, 0), ["1cls.csv", "Permission denied"]),
    ("unreadable folder of tables", mode("split_csv", 0), ["split_csv", "Permission denied"]),
    ("unreadable folder of images", mode("candle/Data/Images", 0), ["cannot be read", "permissions", "Images"]),
    ("corrupt image", cut("candle/Data/Images/Anomaly/000.JPG"), ["000.JPG", "truncated"]),
]
OTHERS = [  # what, layout, harm, words
    (
        "wrong pair of image and mask",
        "btad",
        move("01/ground_truth/ko/0000.png", "01/ground_truth/ko/0100.png"),
        ["0100.png", "not there"],
    ),
    (
        "two suffixes of one mask",
        "btad",
        copy("01/ground_truth/ko/0000.png", "01/ground_truth/ko/0000.bmp"),
        ["0000.png", "0000.bmp", "keep one"],
    ),
    (
        "two suffixes of one image",
        "btad",
        copy("01/test/ko/0000.bmp", "01/test/ko/0000.png"),
        ["0000.png", "2 images", "rename"],
    ),
    (
        "mask of another size btad",
        "btad",
        put("01/ground_truth/ko/0000.png", lambda: saved("PNG", "L", (800, 600))),
        ["0000.png", "800 x 600"],
    ),
    ("no ok images", "btad", also(gone("01/train/ok"), folder("01/train/ok")), ["train/ok"]),
    ("no test", "btad", gone("01/test"), ["0000.png", "not there"]),
    ("no label picture", "kolektor_sdd", gone("kos01/Part2_label.bmp"), ["Part2.jpg", "Part2_label.bmp"]),
    ("label without a picture", "kolektor_sdd", gone("kos01/Part2.jpg"), ["Part2_label.bmp", "not there"]),
    ("no label pictures", "kolektor_sdd", lambda d: [p.unlink() for p in d.rglob("*_label.bmp")], ["in", "kos*"]),
    ("corrupt label", "kolektor_sdd", cut("kos01/Part0_label.bmp"), ["kos01/Part0_label.bmp"]),
    (
        "label of another size",
        "kolektor_sdd",
        put("kos01/Part0_label.bmp", lambda: saved("BMP", "1", (10, 12))),
        ["Part0_label.bmp", "10 x 12"],
    ),
    ("corrupt picture", "kolektor_sdd", cut("kos01/Part1.jpg"), ["kos01/Part1.jpg", "truncated"]),
    ("unreadable folder", "kolektor_sdd", mode("kos01", 0), ["kos01", "Permission denied"]),
    ("unreadable label", "kolektor_sdd", mode("kos01/Part0_label.bmp", 0), ["Part0_label.bmp", "Permission denied"]),
    (
        "mask of no tile",
        "magnetic_tile",
        lambda d: next(d.glob("MT_Crack/Imgs/*.jpg")).unlink(),
        [".png", "not there"],
    ),
    ("no free tiles", "magnetic_tile", gone("MT_Free"), ["MT_Free"]),
    ("free tiles without pictures", "magnetic_tile", also(gone("MT_Free"), folder("MT_Free/Imgs")), ["MT_Free"]),
    ("unreadable tiles", "magnetic_tile", mode("MT_Free/Imgs", 0), ["MT_Free", "Permission denied"]),
    ("no public test", "mvtec_ad_2", also(gone("can/test_public"), folder("can/test_public")), ["test_public"]),
    ("no training", "mvtec_ad_2", gone("can/train"), ["train/good"]),
    (
        "mask without image ad2",
        "mvtec_ad_2",
        lambda d: next(d.glob("can/test_public/bad/*.png")).unlink(),
        ["_mask.png", "not there"],
    ),
    (
        "mask of another size ad2",
        "mvtec_ad_2",
        lambda d: next(d.glob("can/test_public/ground_truth/bad/*.png")).write_bytes(saved("PNG", "L", (8, 9))),
        ["8 x 9"],
    ),
    (
        "corrupt validation image",
        "mvtec_ad_2",
        lambda d: next(d.glob("can/validation/good/*.png")).write_bytes(b""),
        ["validation/good", "empty"],
    ),
    ("no good ones", "folder", also(gone("washer/good"), folder("washer/good")), ["good"]),
    (
        "only good ones too few",
        "folder",
        lambda d: (
            [p.unlink() for p in sorted(d.glob("washer/good/*"))[1:]]
            + [shutil.rmtree(p) for p in d.glob("washer/*") if p.name != "good"]
        ),
        ["washer"],
    ),
    ("mask without image folder", "folder", lambda d: next(d.glob("washer/hole/*")).unlink(), ["not there"]),
    ("root that is a category folder", "folder", nothing, ["holds no category"]),
]


@table(*MVTEC)
def test_mvtec(place, trees, row):
    name, harm, says, *words = row
    fill(place, trees, "mvtec")
    harm(place.root)
    place.call((words or [RUN])[0], 1, says)


@table(*VISA)
def test_visa(place, trees, row):
    name, harm, says = row
    fill(place, trees, "visa")
    harm(place.root)
    place.call(RUN.replace("washer", "candle"), 1, says)


@table(*OTHERS)
def test_other_layouts(place, trees, row):
    name, layout, harm, says = row
    fill(place, trees, layout)
    harm(place.root)
    words = RUN.replace("washer", ONE[layout])
    place.call(words.replace("{in}", "{in}/washer") if name == "root that is a category folder" else words, 1, says)


ODD_NAMES = {
    "spaces and letters": "Teil 1 (größer) 孔",
    "emoji": "🔩",
    "newline": "a\nb",
    "not UTF-8": os.fsdecode(b"\xfcber"),
    "long": "n" * 240,
}


@pytest.mark.parametrize("name", ODD_NAMES, ids=lambda k: k.replace(" ", "-"))
@pytest.mark.parametrize("layout", ["folder", "kolektor_sdd", "magnetic_tile", "btad", "mvtec_ad_2"])
def test_odd_name_in_every_layout(place, trees, layout, name):
    fill(place, trees, layout)
    p = next(
        p
        for p in sorted(place.root.rglob("*"))
        if p.is_file() and p.parent.name in ("good", "kos01", "Imgs", "ok") and "_label" not in p.name
    )
    for q in [p, *p.parent.glob(f"{p.stem}_label.bmp"), *p.parent.glob(f"{p.stem}.png")]:  # and what belongs to it
        if q.exists():
            q.rename(q.with_name(ODD_NAMES[name] + q.name.removeprefix(p.stem)))
    place.call(VERIFY + " --dataset own", 0, tells=["complete and sound"])
    got = load(place.root, category=ONE[layout], size=32, cache=False)
    assert any(ODD_NAMES[name] in q for s in (got.train, got.test) for q in s.paths)


@pytest.mark.parametrize("name", ODD_NAMES, ids=lambda k: k.replace(" ", "-"))
def test_odd_name_of_a_category(place, trees, name):
    fill(place, trees, "mvtec")
    move("washer", ODD_NAMES[name])(place.root)
    place.call(VERIFY, 0, tells=["complete and sound"])
    assert len(load(place.root, category=ODD_NAMES[name], size=32).train) == 6


# data verify


def test_verify_never_waits(place, trees):
    "A pipe is opened by a thread only if verify asks for it"
    fill(place, trees, "mvtec")
    pipe(GOOD)(place.root)
    stuck = []

    def release():
        with contextlib.suppress(OSError):
            os.close(os.open(place.root / GOOD, os.O_WRONLY | os.O_NONBLOCK))
            stuck.append(1)

    timer = threading.Timer(5, release)
    timer.start()
    try:
        place.call(VERIFY, 1, tells=["002.png"])
    finally:
        timer.cancel()
    assert not stuck, "it waited for a pipe"


ON_VERIFY = [  # what, harm, words of the report
    ("unreadable image", mode(GOOD, 0), ["002.png cannot be read", "Permission denied"]),
    ("unreadable folder", mode("washer/test/hole", 0), ["test/hole", "Permission denied"]),
    ("unreadable stranger", also(put("washer/odd/x.png", b""), mode("washer/odd", 0)), ["washer/odd"]),
    ("dead link", link(GOOD, "nowhere.png"), ["002.png"]),
    ("loop of links", link(GOOD, "002.png"), ["002.png"]),
    ("mask of another size", MVTEC[0][1], ["000_mask.png", "12 x 10", "32 x 32"]),
    ("mask without image", gone(TEST), ["000_mask.png", "not there"]),
    ("folder named like an image", folder(GOOD), ["002.png"]),
    ("corrupt and named with a newline", put("washer/train/good/a\nb.png", b"x"), ["it is none"]),
    ("corrupt and not UTF-8", put("washer/train/good/" + LATIN, b"x"), ["ber.png"]),
]


@table(*ON_VERIFY)
def test_verify(place, trees, row):
    fill(place, trees, "mvtec")
    row[1](place.root)
    out = place.call(VERIFY, 1, tells=[*row[2], "NOT complete"])
    lines = out.split("problems:\n")[1].split("remarks:")[0].splitlines()
    n = sum(l.startswith("  ") for l in lines)
    assert f"{n} problem" in out and all(l.startswith("  ") or "files read" in l for l in lines), (
        "a problem is one line"
    )


MANIFEST = VERIFY + " --manifest {in}/sums"
ON_MANIFEST = [  # what, harm to folder and manifest, status, words of the sentence, words of the report
    ("nothing", nothing, 0, [], ["compared with"]),
    ("a changed file", put(GOOD, lambda: saved("PNG")), 1, [], ["002.png has changed"]),
    ("a lost file", gone(GOOD), 1, [], ["002.png is gone"]),
    ("a new file", copy(GOOD, "washer/train/good/new.png"), 1, [], ["new.png is new"]),
    ("a changed text", put("readme.txt", b"other"), 1, [], ["readme.txt"]),
    ("an empty manifest", put("sums"), 1, ["sums"], []),
    ("a manifest that is no text", put("sums", lambda: saved("PNG")), 1, ["sums"], []),
    ("a manifest of something else", put("sums", b"hello\n"), 1, ["line 1", "sums"], []),
    ("a manifest that is cut off", cut("sums", 0.97), 1, ["sums"], []),
    ("a manifest that is a folder", folder("sums"), 1, ["sums"], []),
    ("an unreadable manifest", mode("sums", 0), 1, ["sums", "Permission denied"], []),
]


@table(*ON_MANIFEST)
def test_manifest(place, trees, row):
    name, harm, status, says, tells = row
    fill(place, trees, "mvtec")
    put("readme.txt", b"one")(place.root)
    place.call(MANIFEST, 0, tells=["hashes were written"], makes=["in/sums"])
    harm(place.root)
    place.call(MANIFEST, status, says, tells)


def test_manifest_place(place, trees):
    fill(place, trees, "mvtec")
    mode("washer", 0o500)(place.root)
    place.call(VERIFY + " --manifest {in}/washer/sums", 1, ["sums", "Permission denied"])
    place.call(VERIFY + " --manifest {in}/nowhere/sums", 1, ["nowhere/sums", "No such file"])
    place.call(VERIFY + " --manifest {in}/" + LONG, 1, ["xxx"])


@pytest.mark.parametrize("name", [k for k in ODD_NAMES if k != "newline"], ids=lambda k: k.replace(" ", "-"))
def test_manifest_of_odd_names(place, trees, name):
    "What was written can be compared, with any name that fits on a line"
    fill(place, trees, "mvtec")
    move(GOOD, f"washer/train/good/{ODD_NAMES[name]}.png")(place.root)
    place.call(MANIFEST, 0, makes=["in/sums"], tells=["18 hashes"])
    place.call(MANIFEST, 0, tells=["complete and sound"])


@table(
    ("missing", nothing, ["nowhere"], "{in}/nowhere"),
    ("a file", put("f"), ["in/f"], "{in}/f"),
    ("empty", folder("e"), ["in/e"], "{in}/e"),
    ("unreadable", mode(".", 0), ["in", "Permission denied"], "{in}"),
    ("too long", nothing, ["xxx"], "{in}/" + LONG),
    ("of nobody", nothing, ["~nobody_of_this_name"], "~nobody_of_this_name"),
    ("unknown data set", nothing, ["mvtek", "mvtec_ad"], "{in} --dataset mvtek"),
    ("a category", nothing, ["washer", "itself a category"], "{in}/washer"),
)
def test_verify_where(place, trees, row):
    fill(place, trees, "mvtec")
    row[1](place.root)
    place.call(f"data verify {row[3]} --quiet", 1, row[2])


@table(
    ("a file", put("f"), 0, [], ["btad", "no"], "{in}/f"),
    ("missing", nothing, 0, [], ["btad", "no"], "{in}/nowhere"),
    ("unreadable", mode(".", 0), 1, ["in", "Permission denied"], [], "{in}"),
    ("an unreadable set", also(folder("btad"), mode("btad", 0)), 1, ["in/btad", "Permission denied"], [], "{in}"),
    ("too long", nothing, 1, ["xxx"], [], "{in}/" + LONG),
    ("of nobody", nothing, 1, ["~nobody_of_this_name"], [], "~nobody_of_this_name"),
)
def test_list(place, row):
    row[1](place.root)
    place.call(f"data list --to {row[5]}", *row[2:5])


# data write


@table(
    ("a full folder", put("x/a"), ["in/x", "not an empty"], "mvtec {in}/x"),
    ("a file", put("x"), ["in/x"], "mvtec {in}/x"),
    ("unknown layout", nothing, ["mvtek", "mvtec"], "mvtek {in}/x"),
    ("below a file", put("x"), ["in/x"], "mvtec {in}/x/y"),
    ("too long", nothing, ["xxx"], "visa {in}/" + LONG),
    ("not to be written", also(folder("x"), mode("x", 0o500)), ["in/x", "Permission denied"], "btad {in}/x/y"),
    ("a loop of links", link("x", "x"), ["in/x"], "mvtec {in}/x"),
    ("below a loop of links", link("x", "x"), ["in/x"], "mvtec {in}/x/y"),
    ("of nobody", nothing, ["~nobody_of_this_name"], "mvtec ~nobody_of_this_name/x"),
)
def test_write(place, monkeypatch, row):
    monkeypatch.setattr(
        layouts,
        "draw",
        lambda c, k, defect, size, seed: (np.zeros((size, size, 3), np.uint8), np.eye(size, dtype=bool)),
    )  # quicker
    row[1](place.root)
    place.call(f"data write {row[3]}", 1, row[2])


# data get

INNER = "BTech_Dataset_transformed/"
FILES = {f"{INNER}0{k}/train/ok/0000.bmp": bytes([k]) * 100 for k in (1, 2, 3)}


def zipped(*more, files=FILES, how=zipfile.ZIP_DEFLATED):
    f = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(f, "w", how) as z:
        warnings.simplefilter("ignore")
        for n, b in [*files.items(), *more]:
            z.writestr(n, b)
    return f.getvalue()


def tarred(*more, files=FILES, how="w"):
    f = io.BytesIO()
    with tarfile.open(fileobj=f, mode=how) as t:
        for n, b in [*files.items(), *more]:
            i = n if isinstance(n, tarfile.TarInfo) else tarfile.TarInfo(n)
            i.size = len(b)
            t.addfile(i, io.BytesIO(b))
    return f.getvalue()


def member(name, kind, target=""):
    i = tarfile.TarInfo(name)
    i.type, i.linkname, i.devmajor, i.devminor = kind, target, 1, 3
    return i


def cut_off(b, share):
    return b[: int(len(b) * share)]


OUTSIDE = f"{tempfile.gettempdir()}/tocoad-escaped-{os.getpid()}"
ARCHIVES = {  # what, content: none has the published hash, so none is opened
    "zip slip": lambda: zipped(("../escaped", b"x")),
    "zip with an absolute path": lambda: zipped((OUTSIDE, b"x")),
    "truncated zip": lambda: cut_off(zipped(), 0.6),
    "tar slip": lambda: tarred(("../escaped", b"x")),
    "tar with a link that leads out": lambda: tarred((member("link", tarfile.SYMTYPE, "/etc"), b"")),
    "truncated tar.gz": lambda: cut_off(tarred(how="w:gz"), 0.7),
    "zero bytes": lambda: b"",
    "web page": lambda: b"<!doctype html><title>Please log in</title>" * 50,
    "archive of another data set": lambda: zipped(files={"bottle/train/good/000.png": b"x"}),
    "another archive of the set": zipped,
}


@pytest.fixture
def any_hash(monkeypatch):
    monkeypatch.setattr(archives, "check", lambda file, k: open(file).close())


@pytest.mark.parametrize("kind", ARCHIVES, ids=lambda k: k.replace(" ", "-"))
def test_archive(place, kind):
    put("archive", ARCHIVES[kind])(place.root)
    place.call(GET, 1, ["in/archive", "not the published", "461c9387"])
    assert not os.path.lexists(OUTSIDE)


@pytest.mark.parametrize(
    "content",
    [
        zipped,
        tarred,
        lambda: tarred(how="w:gz"),
        lambda: zipped(files={k.removeprefix(INNER): v for k, v in FILES.items()}),
        lambda: zipped((f"{INNER}01/Prüfling 孔.txt", b"x"), (f"{INNER}empty/", b"")),
    ],
    ids=["zip", "tar", "tar.gz", "without-inner-folder", "letters"],
)
def test_sound_archive(place, any_hash, content):
    put("archive", content)(place.root)
    place.call(GET, 0, makes=["out/btad"])
    for n, b in FILES.items():
        assert (place.out / "btad" / n.removeprefix(INNER)).read_bytes() == b
    assert sorted(p.name for p in place.out.iterdir()) == ["btad"]
    place.call(GET, 0)  # once more: nothing is done


@table(
    ("no archive", nothing, ["in/archive"], GET),
    ("a folder", folder("archive"), ["in/archive"], GET),
    ("unreadable", also(put("archive", zipped), mode("archive", 0)), ["in/archive", "Permission denied"], GET),
    ("a loop of links", link("archive", "archive"), ["in/archive"], GET),
    ("too long", nothing, ["xxx"], GET.replace("{in}/archive", "{in}/" + LONG)),
    (
        "below an unreadable folder",
        also(folder("d"), mode("d", 0)),
        ["in/d/archive"],
        GET.replace("{in}/archive", "{in}/d/archive"),
    ),
    ("place is a file", also(put("archive", zipped), put("f")), ["in/f"], GET.replace("{out}", "{in}/f")),
    (
        "place not to be written",
        also(put("archive", zipped), folder("d"), mode("d", 0o500)),
        ["in/d", "Permission denied"],
        GET.replace("{out}", "{in}/d"),
    ),
    ("place below a file", also(put("archive", zipped), put("f")), ["in/f/g"], GET.replace("{out}", "{in}/f/g")),
    ("place too long", put("archive", zipped), ["xxx"], GET.replace("{out}", "{in}/" + LONG)),
    (
        "place unreadable",
        also(put("archive", zipped), folder("d"), mode("d", 0)),
        ["in/d"],
        GET.replace("{out}", "{in}/d"),
    ),
    (
        "a file stands there",
        also(put("archive", zipped), put("d/btad")),
        ["in/d/btad", "move it away"],
        GET.replace("{out}", "{in}/d"),
    ),
    (
        "part of it stands there",
        also(put("archive", zipped), folder("d/btad/01")),
        ["in/d/btad", "02, 03"],
        GET.replace("{out}", "{in}/d"),
    ),
    (
        "something else stands there",
        also(put("archive", zipped), put("d/btad/my thesis.txt", b"x")),
        ["in/d/btad", "move it away"],
        GET.replace("{out}", "{in}/d"),
    ),
    ("unknown data set", nothing, ["btat", "btad"], GET.replace("btad", "btat")),
    (
        "licence not accepted",
        put("archive", zipped),
        ["licence", "CC BY-SA 4.0", "--accept-licence"],
        GET.replace("--accept-licence", ""),
    ),
    ("a file address", nothing, ["file:///etc/hostname", "http"], FETCH.replace("{url}", "file:///etc/hostname")),
    ("an ftp address", nothing, ["ftp://x.invalid/a", "http"], FETCH.replace("{url}", "ftp://x.invalid/a")),
    ("no address", nothing, ["nonsense", "http"], FETCH.replace("{url}", "nonsense")),
    ("half an address", nothing, ["http://"], FETCH.replace("{url}", "http://")),
    ("an odd address", nothing, ["http://[::1"], FETCH.replace("{url}", "http://[::1")),
    ("an odd port", nothing, ["http://127.0.0.1:x/"], FETCH.replace("{url}", "http://127.0.0.1:x/")),
    (
        "an address with a space",
        nothing,
        ["http://127.0.0.1:9/a"],
        FETCH.split()[:3] + ["--from", "http://127.0.0.1:9/a b\n", "--to", "{out}", "--accept-licence", "--quiet"],
    ),
)
def test_get_where(place, any_hash, row):
    row[1](place.root)
    place.call(row[3], 1, row[2])


class Server(http.server.BaseHTTPRequestHandler):
    "Sends `body`, whole or as `how` says"

    protocol_version, body, how = "HTTP/1.1", b"", "whole"

    def log_message(self, *a):
        pass

    def do_GET(self):
        how, body = self.how, self.body
        if how.isdigit():
            self.send_error(int(how))
            return
        if how in ("to a file", "in circles"):
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname" if how == "to a file" else self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.close_connection = True
        if how != "no length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body if how in ("whole", "no length") else body[: len(body) // 3])
            self.wfile.flush()
        if how == "stalls":
            self.stalled.set()
            self.stop.wait(30)


@pytest.fixture
def server(monkeypatch):
    "A loopback server"
    handler = type(
        "Handler",
        (Server,),
        dict(
            stop=threading.Event(),
            stalled=threading.Event(),
            body=zipped(("big", np.random.default_rng(0).bytes(300_000))),
        ),
    )
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    s.daemon_threads = True
    threading.Thread(target=s.serve_forever, args=(0.02,), daemon=True).start()
    handler.url = f"http://127.0.0.1:{s.server_port}/btad.zip"
    monkeypatch.setitem(
        archives.KNOWN,
        "btad",
        archives.KNOWN["btad"]._replace(hash="sha256:" + hashlib.sha256(handler.body).hexdigest()),
    )
    yield handler
    handler.stop.set()
    s.shutdown()
    s.server_close()


def test_interrupted_download(place, server):
    "One sentence, nothing is left, and a command that goes on"
    place.at["url"] = server.url
    server.how = "breaks off"
    place.call(
        FETCH, 1, [server.url, "IncompleteRead", f"curl -L -C - -o btad.zip {server.url}", "--archive btad.zip"]
    )


@table(
    ("refused", "403", ["403"]),
    ("not found", "404", ["404"]),
    ("fails", "500", ["500"]),
    ("sends on to a file", "to a file", []),
    ("sends in circles", "in circles", ["http://127.0.0.1"]),
)
def test_server_says_no(place, server, row):
    place.at["url"], server.how = server.url, row[1]
    place.call(FETCH, 1, [*row[2], server.url, "--archive btad.zip"])


def test_no_server(place, server):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        place.at["url"] = f"http://127.0.0.1:{s.getsockname()[1]}/btad.zip"
    place.call(FETCH, 1, [place.at["url"], "Connection refused", "--archive btad.zip"])


def test_fetched_with_a_wrong_hash(place, server):
    place.at["url"], server.body = server.url, zipped()
    place.call(FETCH, 1, ["does not match the known hash"])


def test_plain_server(place, server):
    place.at["url"], server.how = server.url, "no length"
    place.call(FETCH, 0, makes=["out/btad"])
    assert sorted(p.name for p in place.out.iterdir()) == ["btad"]


# fit

FITS = [  # what, harm to {in}/washer/train/good and around, words of the sentence[, the command]
    ("no folder", nothing, ["in/nowhere"], FIT.replace("{in}/washer/train/good", "{in}/nowhere")),
    ("a file", nothing, ["002.png"], FIT.replace("{in}/washer/train/good", "{in}/" + GOOD)),
    ("too long a name", nothing, ["xxx"], FIT.replace("{in}/washer/train/good", "{in}/" + LONG)),
    ("an empty folder", lambda d: [p.unlink() for p in (d / GOOD).parent.iterdir()], ["train/good", "0 images"]),
    ("one image", lambda d: [p.unlink() for p in sorted((d / GOOD).parent.iterdir())[1:]], ["train/good", "1 image"]),
    (
        "hidden images only",
        lambda d: [p.rename(p.with_name("." + p.name)) for p in sorted((d / GOOD).parent.iterdir())],
        ["train/good", "0 images"],
    ),
    (
        "one image six times",
        lambda d: [shutil.copy(d / GOOD, p) for p in (d / GOOD).parent.iterdir() if p.name != "002.png"],
        ["train/good", "1 different"],
    ),
    (
        "all corrupt",
        lambda d: [p.write_bytes(b"x") for p in (d / GOOD).parent.iterdir()],
        ["6 of 6", ".png", "it is none"],
    ),
    ("unreadable folder", mode("washer/train/good", 0), ["train/good", "cannot be read"]),
    ("folder that may be listed only", mode("washer/train/good", 0o444), ["train/good", "cannot be read"]),
    ("unreadable image", mode(GOOD, 0), ["1 of 6", "002.png", "Permission denied"]),
    (
        "unreadable sub-folder",
        also(folder("washer/train/good/more"), mode("washer/train/good/more", 0)),
        ["train/good/more", "Permission denied"],
    ),
    ("dead link", link(GOOD, "nowhere"), ["1 of 6", "002.png", "No such file"]),
    ("loop of links", link(GOOD, "002.png"), ["1 of 6", "002.png", "symbolic links"]),
    ("corrupt image with a newline in its name", put("washer/train/good/a\nb.png", b"x"), ["1 of 7", "it is none"]),
    ("corrupt image that is not UTF-8", put("washer/train/good/" + LATIN, b"x"), ["1 of 7", "ber.png", "it is none"]),
    (
        "model that is something else",
        put("m", b"my thesis"),
        ["in/m", "no detector"],
        FIT.replace("{out}/m.safetensors", "{in}/m"),
    ),
    ("model that is a folder", folder("m"), ["in/m"], FIT.replace("{out}/m.safetensors", "{in}/m")),
    ("model that is a loop of links", link("m", "m"), ["in/m"], FIT.replace("{out}/m.safetensors", "{in}/m/m")),
    ("model below a file", put("m"), ["in/m"], FIT.replace("{out}/m.safetensors", "{in}/m/m")),
    ("model with too long a name", nothing, ["xxx"], FIT.replace("{out}/m.safetensors", "{out}/" + LONG)),
    (
        "model not to be written",
        also(folder("m"), mode("m", 0o500)),
        ["in/m", "Permission denied"],
        FIT.replace("{out}/m.safetensors", "{in}/m/m"),
    ),
    ("no such device", nothing, ["cuda:7"], FIT + " --device cuda:7"),
]


@table(*FITS)
def test_fit(place, trees, row):
    name, harm, says, *words = row
    fill(place, trees, "mvtec")
    harm(place.root)
    place.call((words or [FIT])[0], 1, says)


@table(
    ("a loop of folders", also(link("washer/train/good/loop", "."), link("washer/train/good/up", "../..")), 6),
    (
        "odd names",
        also(
            move(GOOD, "washer/train/good/a\nb.png"),
            move("washer/train/good/003.png", "washer/train/good/" + LATIN),
            move("washer/train/good/004.png", f"washer/train/good/{'n' * 251}.png"),
        ),
        6,
    ),
    ("odd pictures", also(*(put(f"washer/train/good/odd/{k}{s}", c) for k, (s, c, _) in enumerate(ODD.values()))), 6),
)
def test_fit_takes(place, trees, row):
    fill(place, trees, "mvtec")
    row[1](place.root)
    place.call(FIT, 0, tells=["Written: "], makes=["out/m.safetensors"])
    assert load_model(place.out / "m.safetensors").about["images"]["found"] >= row[2]


# score


class Evil:
    def __reduce__(self):
        return os.mkdir, (OUTSIDE,)


def pickled(x):
    f = io.BytesIO()
    torch.save(x, f)
    return f.getvalue()


def remade(model, tensors=lambda t: None, meta=lambda m: None):
    "A model file with something changed"
    with safe_open(model, "pt") as f:
        t, m = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
    tensors(t)
    meta(m)
    with tempfile.TemporaryDirectory() as d:
        save_file(t, f"{d}/m", m or None)
        return Path(f"{d}/m").read_bytes()


def plain():
    b = io.BytesIO()
    np.savez(b, x=1)
    return b.getvalue()


MODELS = [  # what, model file -> content
    ("zero bytes", lambda m: b""),
    ("text", lambda m: b"a model, I promise"),
    ("truncated", lambda m: m.read_bytes()[:-100]),
    ("truncated in its header", lambda m: m.read_bytes()[:100]),
    ("a header of exabytes", lambda m: struct.pack("<Q", 1 << 60) + m.read_bytes()[8:]),
    ("a pickle", lambda m: pickled({"bank": torch.zeros(3)})),
    ("an evil pickle", lambda m: pickle.dumps(Evil())),
    ("an evil checkpoint", lambda m: pickled(Evil())),
    ("a numpy archive", lambda m: plain()),
    ("safetensors of something else", lambda m: remade(m, meta=lambda x: x.clear())),
    ("a newer version", lambda m: remade(m, meta=lambda x: x.update(version="2"))),
    ("no facts", lambda m: remade(m, meta=lambda x: x.pop("about"))),
    ("other facts", lambda m: remade(m, meta=lambda x: x.update(about=x["about"].replace("smoke", "paper")))),
    ("a tensor renamed", lambda m: remade(m, lambda t: t.update({"memory/band": t.pop("memory/bank")}))),
    ("no tensors", lambda m: remade(m, lambda t: t.clear())),
    ("other numbers", lambda m: remade(m, lambda t: t["held"].mul_(2))),
]


@table(*MODELS)
def test_model_file(place, trees, model, row):
    name, content = row
    fill(place, trees, "mvtec")
    put("m", content(model))(place.root)
    place.call(
        SCORE.replace("{model}", "{in}/m"), 1, ["in/m", "is no detector of version 1, or was cut off or damaged"]
    )
    assert not os.path.lexists(OUTSIDE)


SCORES = [  # what, harm, words of the sentence, the command
    ("no model", nothing, ["in/m"], SCORE.replace("{model}", "{in}/m")),
    ("model that is a folder", folder("m"), ["in/m"], SCORE.replace("{model}", "{in}/m")),
    (
        "unreadable model",
        lambda d: (shutil.copy(MODEL[0], d / "m"), (d / "m").chmod(0)),
        ["in/m", "cannot be read"],
        SCORE.replace("{model}", "{in}/m"),
    ),
    ("model that is a pipe", pipe("m"), ["in/m"], SCORE.replace("{model}", "{in}/m")),
    ("model with too long a name", nothing, ["xxx"], SCORE.replace("{model}", "{in}/" + LONG)),
    (
        "model below an unreadable folder",
        also(folder("m"), mode("m", 0)),
        ["in/m/m"],
        SCORE.replace("{model}", "{in}/m/m"),
    ),
    ("no images", clear, ["in", "no images"], SCORE),
    (
        "hidden images only",
        also(clear, put(".a.png", lambda: saved("PNG")), put(".b/c.png", lambda: saved("PNG"))),
        ["in", "no images"],
        SCORE,
    ),
    ("no folder of images", nothing, ["in/nowhere"], SCORE.replace("{in}", "{in}/nowhere")),
    ("images that are a file", nothing, ["002.png"], SCORE.replace("{in}", "{in}/" + GOOD)),
    ("images with too long a name", nothing, ["xxx"], SCORE.replace("{in}", "{in}/" + LONG)),
    ("images in a loop of links", link("l", "l"), ["in/l"], SCORE.replace("{in}", "{in}/l")),
    ("images in an unreadable folder", mode(".", 0), ["in", "cannot be read"], SCORE),
    ("images in a folder that may be listed only", mode(".", 0o444), ["in", "cannot be read"], SCORE),
    ("output that is a file", put("o", b"x"), ["in/o"], SCORE.replace("{out}", "{in}/o")),
    ("output that is a loop of links", link("o", "o"), ["in/o"], SCORE.replace("{out}", "{in}/o")),
    ("output below a file", put("o", b"x"), ["in/o/x"], SCORE.replace("{out}", "{in}/o/x")),
    ("output with too long a name", nothing, ["xxx"], SCORE.replace("{out}", "{in}/" + LONG)),
    (
        "output not to be written",
        also(folder("o"), mode("o", 0o500)),
        ["in/o", "Permission denied"],
        SCORE.replace("{out}", "{in}/o"),
    ),
    ("output among the images", nothing, ["{in}", "another folder"], SCORE.replace("{out}", "{in}")),
    (
        "a table of someone else",
        put("o/scores.csv", b"name;points\n"),
        ["o/scores.csv"],
        SCORE.replace("{out}", "{in}/o"),
    ),
    ("a summary of someone else", put("o/summary.json", b"{}"), ["o/summary.json"], SCORE.replace("{out}", "{in}/o")),
    ("maps that are a file", put("o/maps", b"x"), ["in/o"], SCORE.replace("{out}", "{in}/o")),
    ("a table that is a folder", folder("o/scores.csv"), ["o/scores.csv"], SCORE.replace("{out}", "{in}/o")),
    ("no such device", nothing, ["cuda:7"], SCORE + " --device cuda:7"),
]
MODEL = []


@table(*SCORES)
def test_score(place, trees, model, row):
    name, harm, says, words = row
    MODEL[:] = [model]
    fill(place, trees, "mvtec")
    harm(place.root)
    place.call(words, 1, [s.format_map(place.at) for s in says])


UNREADABLE = [  # what, harm, the path in the table, words of the note, how many images are scored all the same
    ("a corrupt image", cut(GOOD), GOOD, "truncated", 17),
    ("an unreadable image", mode(GOOD, 0), GOOD, "Permission denied", 17),
    ("a dead link", link(GOOD, "nowhere"), GOOD, "No such file", 17),
    ("a loop of links", link(GOOD, "002.png"), GOOD, "symbolic links", 17),
    ("an unreadable folder", mode("washer/test/hole", 0), "washer/test/hole", "Permission denied", 17),
    (
        "a folder that may be listed only",
        mode("washer/test/hole", 0o444),
        "washer/test/hole/000.png",
        "Permission denied",
        17,
    ),
    ("corrupt with a newline in its name", move(GOOD, "washer/a\nb.png"), None, "", 18),
    ("corrupt with a newline", also(gone(GOOD), put("washer/a\nb.png", b"x")), "washer/a\nb.png", "it is none", 17),
    ("corrupt and not UTF-8", also(gone(GOOD), put(LATIN, b"x")), "\\udcfcber.png", "it is none", 17),
]


@table(*UNREADABLE)
def test_score_goes_on(place, trees, row):
    name, harm, path, why, n = row
    fill(place, trees, "mvtec")
    harm(place.root)
    place.call(
        SCORE,
        int(path is not None),
        ["1 image of 18", "scores.csv"] if path else (),
        [f"{int(path is not None)} unreadable"],
        ["out/"],
    )
    got = rows(place.out)
    assert len(got) == n + (path is not None) and sum(r["score"] != "" for r in got) == n
    if path:
        assert (
            got[-1]["path"] == path
            and got[-1]["decision"] == "unreadable"
            and why in got[-1]["note"]
            and "\n" not in got[-1]["note"]
        )


@table(
    (
        "a loop of folders",
        also(link("washer/train/good/loop", "."), link("washer/up", "../.."), link("again", "washer")),
    ),
    (
        "odd names",
        also(
            gone("washer/test"),
            gone("washer/ground_truth"),
            *(
                move(f"washer/train/good/00{k}.png", f"washer/train/good/{n}.png")
                for k, n in enumerate(ODD_NAMES.values())
            ),
        ),
        6,
    ),
    (
        "hidden and other files",
        also(put("washer/.x.png", b"x"), put("washer/._y.jpg", b"x"), put("Thumbs.db", b"x"), put("a.txt", b"x")),
    ),
    ("a pipe and a folder named like images", also(pipe("p.png"), folder("q.png"))),
)
def test_score_takes(place, trees, row):
    n = row[2] if len(row) > 2 else 18
    fill(place, trees, "mvtec")
    row[1](place.root)
    out = place.call(SCORE, 0, tells=[f"{n} images", "0 unreadable"], makes=["out/"])
    assert (
        len([l for l in out.splitlines() if "x threshold" in l]) == 5
        and out.splitlines()[-1].startswith("Written: ")
        and len(out.splitlines()) <= 8
    ), out
    got = rows(place.out)
    assert len(got) == n and all((place.out / r["heat_map"]).is_file() for r in got)
    written = ["maps", "report.html", "scores.csv", "summary.json", "worst.png"]
    assert sorted(p.name for p in place.out.iterdir()) == written


# The disk is full


@pytest.fixture(params=["disk", "limit"])
def full(request, tmp_path):
    "(bytes) -> a folder and a context within which no more fits: a small disk, or a limit on every file"
    done = []

    @contextlib.contextmanager
    def limited(n):
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n, old[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)

    def make(n, where="out"):
        d = tmp_path / where
        d.mkdir(exist_ok=True)
        if request.param == "limit":
            return limited(n)
        p = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={n}", "tmpfs", d], capture_output=True)
        if p.returncode:
            pytest.skip("no file system can be mounted here")
        done.append(d)
        return contextlib.nullcontext()

    make.disk = request.param == "disk"
    yield make
    for d in done:
        subprocess.run(["umount", "-l", d])


FULL = ("No space left", "File too large", "I/O error", "disk I/O", "is full")


def is_full(err):
    assert any(s in err for s in FULL), err


def test_full_write(place, full):
    with full(4096):
        is_full(said(place, "data write mvtec {out}/x", ["out/x"]))


def said(place, words, says, makes=()):
    before = place.photograph()
    status, out, err = place.main(place.words(words))
    assert status == 1, (status, out, err)
    place.judge(status, out, err, says, (), makes, before)
    return err


BIG = {
    "zip": lambda: zipped(("x", bytes(200_000))),
    "tar.gz": lambda: tarred(("x", bytes(200_000)), how="w:gz"),
    "files": lambda: zipped(*((f"{k}", bytes(4096)) for k in range(60))),
}


@pytest.mark.parametrize("kind", BIG)
def test_full_unpack(place, full, any_hash, kind):
    "It looked, there was room for what an archive of pictures holds, and this one holds more"
    put("archive", BIG[kind])(place.root)
    with full(65536 if kind != "files" or full.disk else 4000):
        is_full(said(place, GET, ["out"]))


def test_too_small_for_an_archive(place, any_hash, monkeypatch):
    "It looks before it unpacks"
    put("archive", lambda: zipped(("x", np.random.default_rng(0).bytes(100_000))))(place.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5))
    place.call(GET, 1, ["it needs 15", "out/btad"])


@pytest.mark.parametrize("how", ["whole", "no length"])
def test_full_download(place, full, server, how):
    place.at["url"], server.how = server.url, how
    with full(65536):
        is_full(said(place, FETCH, ["out"]))
    assert not list(place.out.iterdir())


def test_too_small_for_a_download(place, server, monkeypatch):
    place.at["url"] = server.url
    monkeypatch.setitem(archives.KNOWN, "btad", archives.KNOWN["btad"]._replace(bytes=10**5))
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5))
    place.call(FETCH, 1, ["it needs 250kB", "out/btad"])


def test_full_manifest(place, trees, full):
    fill(place, trees, "mvtec")
    with full(1024):
        if os.path.ismount(place.out):
            (place.out / "filler").write_bytes(bytes(os.statvfs(place.out).f_bavail * os.statvfs(place.out).f_frsize))
        is_full(said(place, VERIFY + " --manifest {out}/sums", ["out/sums"]))


def test_full_fit(place, trees, full):
    fill(place, trees, "mvtec")
    with full(65536):
        is_full(said(place, FIT, ["out/m.safetensors"]))


def test_full_fit_keeps_the_old_model(place, trees, full, model):
    fill(place, trees, "mvtec")
    with full((model.stat().st_size // 4096 + 3) * 4096):
        shutil.copy(model, place.out / "m.safetensors")
        if not os.path.ismount(place.out):
            resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        is_full(said(place, FIT, ["out/m.safetensors"]))
    load_model(place.out / "m.safetensors")


def test_full_score(place, trees, full):
    fill(place, trees, "mvtec")
    with full(16384):
        is_full(said(place, SCORE, ["out"], makes=["out/maps"]))
    assert not [p for p in place.out.rglob("*") if p.is_file()]


def test_full_score_keeps_the_old_results(place, trees, full):
    fill(place, trees, "mvtec")
    small = full(1 << 20)
    with small:
        place.call(SCORE + " --maps 3", 0, tells=["18 images"], makes=["out/"])
        if os.path.ismount(place.out):
            (place.out / "filler").write_bytes(
                bytes(max(0, os.statvfs(place.out).f_bavail * os.statvfs(place.out).f_frsize - 20_000))
            )
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        is_full(said(place, SCORE, ["out"]))


@pytest.fixture(scope="module")
def stored(trees, tmp_path_factory):
    "The store of a run that went well"
    top = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("TOCOAD_CACHE", str(top / "cache"))
        m.setenv("TOCOAD_STORE", str(top / "store"))
        assert cli.main([w.format_map({"in": trees["mvtec"], "out": top / "out"}) for w in RUN.split()]) == 0
    return top / "store"


def test_full_run(stored, place, trees, full, monkeypatch):
    "Where the results go; what was computed is stored elsewhere"
    monkeypatch.undo()
    place.env["TOCOAD_STORE"], place.at["in"] = str(stored), str(trees["mvtec"])
    with full(4096):
        is_full(said(place, RUN, ["out"]))


def test_full_store(place, trees, full, monkeypatch):
    monkeypatch.undo()
    fill(place, trees, "mvtec")
    place.env["TOCOAD_STORE"] = f"{place.top}/store"
    with full(65536, "store"):
        is_full(said(place, RUN, ["store"]))
    assert not [p for p in (place.top / "store").rglob("*.part")]


def test_full_cache(place, trees, full):
    "Decoded images are kept if there is room, and used all the same if not"
    fill(place, trees, "mvtec")
    place.env["TOCOAD_CACHE"] = f"{place.top}/small"
    with full(8192, "small"), pytest.MonkeyPatch.context() as m:
        m.setenv("TOCOAD_CACHE", f"{place.top}/small")
        assert len(load(place.root, category="washer", size=64).train) == 6
        m.setattr(compare, "compare", reached)
        place.call(RUN, 1, ["reading: done"])
    assert not list((place.top / "small").iterdir())


def test_cache_that_may_not_be_written(place, trees, monkeypatch):
    fill(place, trees, "mvtec")
    monkeypatch.setattr(compare, "compare", reached)
    (place.top / "shut").mkdir(mode=0o500)
    place.env["TOCOAD_CACHE"] = f"{place.top}/shut/cache"
    place.call(RUN, 1, ["reading: done"])
    (place.top / "file").write_bytes(b"")
    place.env["TOCOAD_CACHE"] = f"{place.top}/file"
    place.call(RUN, 1, ["reading: done"])


def test_cache_with_junk(place, trees, monkeypatch):
    "A damaged file in the cache is decoded anew"
    fill(place, trees, "mvtec")
    monkeypatch.setattr(compare, "compare", reached)
    for junk in (b"", b"junk", b"\x08\0\0\0\0\0\0\0{}      "):
        place.call(RUN, 1, ["reading: done"])
        kept = list((place.top / "cache").glob("*.safetensors"))
        assert kept
        for p in kept:
            p.write_bytes(junk)
    place.call(RUN, 1, ["reading: done"])


# Stopped in the middle


def stop_after(n, f):
    calls = []

    def g(*a, **k):
        calls.append(1)
        if len(calls) > n:
            raise KeyboardInterrupt
        return f(*a, **k)

    return g


STOPS = [
    ("write", "data write visa {out}/x", layouts, "_write", 5),
    ("unpack", GET, archives, "write_sums", 0),
    ("verify", MANIFEST, verify, "write_sums", 0),
    ("fit", FIT, os, "replace", 0),
    ("score", SCORE, scoring, "overlay", 3),
    ("score at the end", SCORE, scoring, "write_json", 0),
]


@table(*STOPS)
def test_stopped(place, trees, any_hash, monkeypatch, row):
    name, words, module, function, n = row
    fill(place, trees, "mvtec")
    put("archive", zipped)(place.root)
    monkeypatch.setattr(module, function, stop_after(n, getattr(module, function)))
    place.call(words, 130, ["stopped"])


# As a process


def powerless():
    "In a child, before the command: what root may, this one may not"
    if not os.geteuid():
        for cap in (1, 2):
            ctypes.CDLL(None).prctl(24, cap)  # PR_CAPBSET_DROP


def child():
    powerless()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job passes on that it ignores it


def start(place, words):
    env = (
        os.environ | place.env | dict(TMPDIR=place.at["temp"], PYTHONIOENCODING="utf-8:strict")
    )  # as under most locales
    words = [str(Path(sys.executable).parent / "tocoad"), *place.words(words)]
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, cwd=place.at["cwd"], preexec_fn=child
    )


def ends(place, p, status, says=(), tells=(), makes=(), before=None):
    out, err = (b.decode() for b in p.communicate(timeout=60))
    assert p.returncode == status, (p.returncode, out, err)
    place.judge(status, out, err, says, tells, makes, before)


def test_as_a_process(place, trees):
    "Through the installed command: no decoder's warning, no name that stdout cannot hold, no passing over permissions"
    fill(place, trees, "mvtec")
    for harm in (
        put("washer/train/good/a.tif", BROKEN["truncated compressed TIFF"][1]),
        put("washer/train/good/exif.jpg", lambda: saved("JPEG", exif=TRAIL)),
        put("washer/train/good/" + LATIN),
        mode(GOOD, 0),
    ):
        harm(place.root)
    before = place.photograph()
    ends(
        place,
        start(place, VERIFY),
        1,
        tells=["a.tif", "ber.png", "002.png cannot be read (Permission denied)", "3 problems"],
        before=before,
    )


def test_stopped_while_it_downloads(place, server):
    "Ctrl-C: one line, status 130, and nothing is left"
    place.at["url"], server.how = server.url, "stalls"
    before, p = place.photograph(), start(place, FETCH)
    assert server.stalled.wait(30)
    assert any(place.out.rglob("*")), "the file that is being written lies there"
    p.send_signal(signal.SIGINT)
    ends(place, p, 130, ["stopped"], before=before)


# Any tree

HARMS = [
    "cut",
    "empty",
    "junk",
    "gone",
    "shut",
    "list",
    "dead",
    "loop",
    "folder",
    "pipe",
    "odd name",
    "copy",
    "around",
    "up",
]


def hurt(d, op, k, content):
    "One harm to one of the names below a folder"
    have = sorted(
        p
        for p in d.rglob("*")
        if not p.is_symlink() and (p.is_file() or op in ("gone", "shut", "list", "odd name", "around", "up"))
    )
    if not have:
        return
    p = have[k % len(have)]
    if op == "cut":
        p.write_bytes(p.read_bytes()[: p.stat().st_size * (k % 7) // 7])
    if op == "empty":
        p.write_bytes(b"")
    if op == "junk":
        p.write_bytes(content)
    if op == "gone":
        shutil.rmtree(p) if p.is_dir() else p.unlink()
    if op == "shut":
        p.chmod(0)
    if op == "list":
        p.chmod(0o444)
    if op == "dead":
        p.unlink()
        p.symlink_to("nowhere")
    if op == "loop":
        p.unlink()
        p.symlink_to(p.name)
    if op == "folder":
        p.unlink()
        p.mkdir()
    if op == "pipe":
        p.unlink()
        os.mkfifo(p)
    if op == "odd name":
        p.rename(p.with_name([*ODD_NAMES.values()][k % 5] + p.suffix))
    if op == "copy":
        shutil.copy(p, p.with_suffix([".png", ".bmp", ".csv", ".PNG"][k % 4]))
    if op == "around":
        (p if p.is_dir() else p.parent).joinpath("around").symlink_to("..")
    if op == "up":
        p.rename(p.parent.parent / p.name)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(list(ONE)),
    st.lists(
        st.tuples(st.sampled_from(HARMS), st.integers(0, 999), st.sampled_from(list(BROKEN))), min_size=1, max_size=5
    ),
    st.sampled_from([VERIFY, VERIFY, FIT.replace("/washer/train/good", ""), SCORE]),
)
def test_any_tree(trees, model, layout, harms, own):
    "Every command on every damage: a status, one line or a report, and the tree as it was"
    with tempfile.TemporaryDirectory() as top, pytest.MonkeyPatch.context() as m:
        m.setattr(compare, "compare", reached)
        place = Place(top, model)
        fill(place, trees, layout)
        for op, k, kind in harms:
            with contextlib.suppress(OSError):
                hurt(place.root, op, k, BROKEN[kind][1]())
        for words in (RUN.replace("washer", ONE[layout]), own):
            before = place.photograph()
            status, out, err = place.main(place.words(words))
            assert status in (0, 1), (status, words, out, err)
            place.judge(
                status,
                out,
                err,
                ["tocoad"] if err else (),
                ["files read: NOT"] if status and not err else (),
                ["out/"],
                before,
            )
            shutil.rmtree(place.out)
            place.out.mkdir()
        place.root.chmod(0o700)
        for d, subs, _ in os.walk(place.root):
            for n in subs:
                if not os.path.islink(p := os.path.join(d, n)):
                    os.chmod(p, 0o700)
