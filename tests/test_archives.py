"Data sets fetched, unpacked and verified: what lines, servers, packers and disks do wrong"
import hashlib
import io
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tocoad import archives
from tocoad.archives import KNOWN, SUMS, Known, download, get, list_sets, lies, sets_text, unpack, verify
from tocoad.data.images import write_mini
from tocoad.fixtures import write_layout
from tocoad.published import BadInput


class Server:
    "An HTTP server on this machine with faults that can be switched on"
    def __init__(self, body):
        self.body, self.tag, self.asked, self.sent, self.faults = body, '"v1"', [], 0, {}
        outer = self
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *a): pass
            def do_GET(self):
                try: outer.answer(self)
                except (BrokenPipeError, ConnectionResetError): pass
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/set.zip"
        threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()

    def answer(self, r):
        f, body = self.faults, self.body
        asked = r.headers.get("Range")
        self.asked.append((r.path, asked, r.headers.get("If-Range")))
        if f.get("errors"): # (code, how often)
            code, n = f["errors"]; f["errors"] = (code, n - 1) if n > 1 else None
            r.send_error(code); return
        if "redirect" in f and r.path != "/target":
            r.send_response(302); r.send_header("Location", f["redirect"]); r.send_header("Content-Length", "0"); r.end_headers(); return
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and not f.get("no ranges") else 0
        if start and r.headers.get("If-Range") != self.tag: start = 0
        if start and start >= len(body):
            r.send_response(416); r.send_header("Content-Range", f"bytes */{len(body)}"); r.send_header("Content-Length", "0"); r.end_headers(); return
        r.send_response(206 if start else 200)
        if not f.get("no tag"): r.send_header("ETag", self.tag)
        if start: r.send_header("Content-Range", f.pop("range", f"bytes {start}-{len(body) - 1}/{len(body)}"))
        if not f.get("no length"): r.send_header("Content-Length", str(len(body) - start + f.get("lie", 0)))
        r.end_headers()
        piece = body[start:]
        if (n := f.get("drop")): piece = piece[:n]
        if f.get("then"): f.pop("then")(self)
        r.wfile.write(piece); self.sent += len(piece)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(archives, "PAUSE", 0)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def mini(tmp_path_factory):
    return write_mini(tmp_path_factory.mktemp("mini")/"mini", size=32, categories=("washer", "plug"), n=(3, 2, 1))


def packed(mini, file, inner="wrapped"):
    "The mini data set in an archive, with a folder around it"
    if file.suffix == ".zip":
        with zipfile.ZipFile(file, "w") as z:
            for p in sorted(mini.rglob("*.png")): z.write(p, f"{inner}/{p.relative_to(mini).as_posix()}")
    else:
        with tarfile.open(file, {".tar": "w", ".gz": "w:gz", ".xz": "w:xz"}[file.suffix]) as t: t.add(mini, inner)
    return file


@pytest.fixture
def server(mini, tmp_path):
    (tmp_path/"srv").mkdir()
    s = Server(packed(mini, tmp_path/"srv"/"set.zip").read_bytes())
    shutil.rmtree(tmp_path/"srv")
    yield s
    s.http.shutdown(); s.http.server_close()


@pytest.fixture
def fake(server, monkeypatch):
    k = Known("Set", "CC BY 4.0", "Ours.", "http://licence", server.url, "set.zip", hashlib.sha256(server.body).hexdigest(), inner="wrapped")
    monkeypatch.setitem(KNOWN, "fake", k)
    return k


def tree(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in sorted(Path(folder).rglob("*"))}

def refused(f, *says):
    "What a failure says: one sentence with all of these"
    with pytest.raises(BadInput) as e: f()
    text = str(e.value)
    assert "\n" not in text and "Traceback" not in text
    for s in says: assert s in text, text
    return text

def whole(mini, folder):
    for p in mini.rglob("*.png"): assert (folder/p.relative_to(mini)).read_bytes() == p.read_bytes()
    assert len((folder/SUMS).read_text().splitlines()) == len(list(mini.rglob("*.png")))


# Getting

def test_a_set_comes_from_the_web(fake, server, mini, tmp_path, capsys):
    assert get("fake", to=tmp_path/"d", accept=True) == tmp_path/"d"/"fake"
    whole(mini, tmp_path/"d"/"fake")
    assert [p.name for p in (tmp_path/"d").iterdir()] == ["fake"] # neither archive nor part
    assert server.sent == len(server.body) and "Set: licence CC BY 4.0" in capsys.readouterr().out
    if shutil.which("sha256sum"): subprocess.run(["sha256sum", "-c", "--quiet", SUMS], cwd=tmp_path/"d"/"fake", check=True)
    get("fake", to=tmp_path/"d") # it is there: no licence, no line
    assert len(server.asked) == 1 and "is there already; nothing is done" in capsys.readouterr().out


def test_the_licence_must_be_accepted(fake, server, tmp_path, monkeypatch):
    refused(lambda: get("fake", to=tmp_path/"d"), "--accept-licence", "CC BY 4.0", "http://licence")
    refused(lambda: get("fake", to=tmp_path/"d", ask=lambda t: True), "--accept-licence") # nobody sits at a terminal
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    refused(lambda: get("fake", to=tmp_path/"d", ask=lambda t: False), "--accept-licence")
    assert not server.asked and not (tmp_path/"d").exists()
    seen = []
    get("fake", to=tmp_path/"d", ask=lambda t: seen.append(t) or True)
    assert "CC BY 4.0" in seen[0] and (tmp_path/"d"/"fake").is_dir()


def test_an_archive_that_is_here_comes_first(fake, server, mini, tmp_path):
    mine = tmp_path/"elsewhere.bin"; mine.write_bytes(server.body)
    whole(mini, get("fake", archive=mine, to=tmp_path/"a", accept=True))
    (tmp_path/"b").mkdir(); shutil.copy(mine, tmp_path/"b"/"set.zip")
    whole(mini, get("fake", to=tmp_path/"b", accept=True))
    shutil.copy(mine, tmp_path/"set.zip") # the current folder
    whole(mini, get("fake", to=tmp_path/"c", accept=True))
    assert not server.asked
    assert mine.exists() and (tmp_path/"b"/"set.zip").exists() and (tmp_path/"set.zip").exists() # a user's file is never deleted
    refused(lambda: get("fake", archive=tmp_path/"no.zip", to=tmp_path/"d", accept=True), "there is no archive", "no.zip")


def test_another_address_must_give_the_same_archive(fake, server, mini, tmp_path, monkeypatch):
    monkeypatch.setitem(KNOWN, "fake", fake._replace(url="http://127.0.0.1:9/set.zip"))
    whole(mini, get("fake", url=server.url, to=tmp_path/"d", accept=True))
    server.body = server.body[:-1] + b"x"
    refused(lambda: get("fake", url=server.url, to=tmp_path/"e", accept=True), "is not the published set.zip", fake.sha256)


def test_a_wrong_hash_unpacks_nothing(fake, server, tmp_path):
    server.body += b"x"
    refused(lambda: get("fake", to=tmp_path/"d", accept=True), "set.zip is not the published", "fetch it anew")
    assert tree(tmp_path/"d") == {} # the fetched file is gone
    mine = tmp_path/"mine.zip"; mine.write_bytes(server.body)
    refused(lambda: get("fake", archive=mine, to=tmp_path/"d", accept=True), "mine.zip is not the published")
    assert mine.read_bytes() == server.body and tree(tmp_path/"d") == {}


def test_md5_alone_is_checked_and_no_value_is_told(fake, server, mini, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(KNOWN, "fake", fake._replace(sha256=None, md5=hashlib.md5(server.body).hexdigest()))
    whole(mini, get("fake", to=tmp_path/"a", accept=True))
    monkeypatch.setitem(KNOWN, "fake", fake._replace(sha256=None, md5="0" * 32))
    refused(lambda: get("fake", to=tmp_path/"b", accept=True), "md5", "0" * 32)
    monkeypatch.setitem(KNOWN, "fake", fake._replace(sha256=None))
    capsys.readouterr(); get("fake", to=tmp_path/"c", accept=True)
    assert f"sha256 {fake.sha256}, with no known value" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["folder", "file", "partly"])
def test_what_stands_there_is_not_touched(fake, what, tmp_path, monkeypatch):
    monkeypatch.setitem(archives.PARTS, "fake", ("plug", "washer"))
    at = tmp_path/"d"/"fake"; at.parent.mkdir()
    if what == "file": at.write_text("mine")
    else: (at/("plug" if what == "partly" else "other")).mkdir(parents=True)
    before = tree(tmp_path)
    refused(lambda: get("fake", to=tmp_path/"d", accept=True), "is there already", {"partly": "lacks washer", "file": "a file", "folder": "without any"}[what])
    assert tree(tmp_path) == before


def test_an_unknown_name_and_the_archive_of_another_set(fake, mini, tmp_path, monkeypatch):
    refused(lambda: get("mvtec", to=tmp_path/"d", accept=True), "mvtec_ad")
    monkeypatch.setitem(archives.PARTS, "fake", ("bottle", "cable"))
    before = tree(tmp_path)
    refused(lambda: get("fake", archive=write(tmp_path/"x.zip", KNOWN["fake"], mini, monkeypatch), to=tmp_path/"d", accept=True), "bottle, cable", "another data set")
    assert set(tree(tmp_path)) - set(before) == {"x.zip", "d"}

def write(file, k, mini, monkeypatch):
    packed(mini, file); monkeypatch.setitem(KNOWN, "fake", k._replace(sha256=hashlib.sha256(file.read_bytes()).hexdigest()))
    return file


# Downloads

def test_a_dropped_line_goes_on_where_it_was(server, tmp_path):
    server.faults["drop"] = n = len(server.body) // 3 - 10
    download(server.url, tmp_path/"x.zip", progress=False)
    assert (tmp_path/"x.zip").read_bytes() == server.body
    assert [a[1:] for a in server.asked] == [(None, None), *((f"bytes={k * n}-", '"v1"') for k in (1, 2, 3))]
    assert server.sent == len(server.body) # no byte twice
    assert tree(tmp_path) == {"x.zip": server.body}


def test_a_later_call_goes_on(server, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "TRIES", 1)
    server.faults["drop"] = 1000
    refused(lambda: download(server.url, tmp_path/"x.zip", "do this"), server.url, "broke off after 1,000 of", "do this")
    assert (tmp_path/"x.zip.part").stat().st_size == 1000 and not (tmp_path/"x.zip").exists()
    server.faults.clear()
    download(server.url, tmp_path/"x.zip")
    assert server.asked[1][1] == "bytes=1000-" and server.sent == len(server.body) and tree(tmp_path) == {"x.zip": server.body}


def test_an_interrupt_keeps_the_part(server, tmp_path, monkeypatch):
    fill = archives._fill
    def _stop(r, f, bar): f.write(r.read1(700)); raise KeyboardInterrupt
    monkeypatch.setattr(archives, "_fill", _stop)
    with pytest.raises(KeyboardInterrupt): download(server.url, tmp_path/"x.zip")
    have = (tmp_path/"x.zip.part").stat().st_size
    monkeypatch.setattr(archives, "_fill", fill)
    download(server.url, tmp_path/"x.zip")
    assert have and server.asked[1][1] == f"bytes={have}-" and (tmp_path/"x.zip").read_bytes() == server.body


def test_another_version_is_begun_anew(server, tmp_path):
    def _changed(s): s.tag, s.body, s.faults = '"v2"', s.body[::-1], {}
    server.faults.update(drop=1000, then=_changed)
    old = server.body
    download(server.url, tmp_path/"x.zip")
    assert server.asked[1][1:] == ("bytes=1000-", '"v1"') and (tmp_path/"x.zip").read_bytes() == old[::-1]


@pytest.mark.parametrize("fault", ["no ranges", "no tag", "range"])
def test_a_server_that_cannot_go_on(server, tmp_path, fault):
    n = len(server.body)
    server.faults.update({"drop": 1000, "range": f"bytes 0-{n - 1}/{n}"} if fault == "range" else {"drop": 1000, fault: True})
    server.faults["then"] = lambda s: s.faults.update(then=lambda s: s.faults.pop("drop", None)) # the second or third answer is whole
    download(server.url, tmp_path/"x.zip")
    assert tree(tmp_path) == {"x.zip": server.body}


def test_all_was_there_but_the_name(server, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): download(server.url, tmp_path/"x.zip")
    download(server.url, tmp_path/"x.zip") # 416: nothing is left to send
    assert server.sent == len(server.body) and tree(tmp_path) == {"x.zip": server.body}


def test_a_length_that_lies(fake, server, tmp_path):
    server.faults["lie"] = 50 # promises more than comes; asked for the rest, the server says that there is none
    get("fake", to=tmp_path/"c", accept=True)
    assert len(server.asked) == 2
    server.faults["no ranges"] = server.asked.clear() is None
    refused(lambda: get("fake", to=tmp_path/"d", accept=True), "broke off after", server.url, "--archive set.zip", fake.sha256)
    assert len(server.asked) == archives.TRIES
    for p in (tmp_path/"d").iterdir(): p.unlink()
    server.faults["lie"] = -50 # promises less
    refused(lambda: get("fake", to=tmp_path/"d", accept=True), "is not the published")
    assert tree(tmp_path/"d") == {}


def test_no_length_at_all(server, tmp_path):
    server.faults["no length"] = True
    assert download(server.url, tmp_path/"x.zip").read_bytes() == server.body


@pytest.mark.parametrize("code", [404, 403, 410])
def test_an_error_that_stays(fake, server, code, tmp_path):
    server.faults["errors"] = (code, 9)
    refused(lambda: get("fake", to=tmp_path/"d", accept=True), f"answers {code}", server.url, "set.zip", fake.sha256, "tocoad data get fake --archive set.zip")
    assert len(server.asked) == 1 and tree(tmp_path/"d") == {}


def test_an_error_that_passes(server, tmp_path):
    server.faults["errors"] = (500, 2)
    assert download(server.url, tmp_path/"x.zip").read_bytes() == server.body
    server.faults["errors"] = (503, 99)
    refused(lambda: download(server.url, tmp_path/"y.zip"), "answers 503")
    assert len(server.asked) == 3 + archives.TRIES


def test_redirects(server, tmp_path):
    server.faults["redirect"] = "/target"
    assert download(server.url, tmp_path/"x.zip").read_bytes() == server.body
    (tmp_path/"secret").write_text("secret")
    for bad in (f"file://{tmp_path}/secret", "ftp://127.0.0.1/x", "data:,x"):
        server.faults["redirect"] = bad
        before = tree(tmp_path)
        refused(lambda: download(server.url, tmp_path/"y.zip"), "not allowed" if bad[:3] != "ftp" else "no http or https")
        assert tree(tmp_path) == before
    server.faults["redirect"] = server.url # in a circle
    refused(lambda: download(server.url, tmp_path/"y.zip"), "answers 302")
    for url in (f"file://{tmp_path}/secret", "ftp://h/x", "nonsense"): refused(lambda: download(url, tmp_path/"y"), "no http or https address")


def test_nobody_there(fake, tmp_path, monkeypatch):
    monkeypatch.setitem(KNOWN, "fake", fake._replace(url="http://127.0.0.1:9/set.zip", page="http://authors"))
    refused(lambda: get("fake", to=tmp_path/"d", accept=True), "http://127.0.0.1:9/set.zip cannot be reached", fake.sha256, "tocoad data get fake --archive set.zip", "http://authors")
    assert tree(tmp_path/"d") == {}


@pytest.mark.parametrize("url", ["http://[::1", "http://127.0.0.1:port/x", "http://a b/x", f"http://{'a' * 70}.invalid/x"])
def test_addresses_that_are_none(url, tmp_path): refused(lambda: download(url, tmp_path/"x"), url[:12])


def test_a_silent_server_times_out(tmp_path, monkeypatch):
    import socket
    monkeypatch.setattr(archives, "TIMEOUT", 0.2); monkeypatch.setattr(archives, "TRIES", 2)
    with socket.create_server(("127.0.0.1", 0)) as s:
        refused(lambda: download(f"http://127.0.0.1:{s.getsockname()[1]}/x", tmp_path/"x"), "cannot be reached (timed out)")


# Disks

def test_space_is_asked_for_first(fake, server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9, 5000))
    refused(lambda: get("fake", to=tmp_path/"d", accept=True), "needs", "5 kB are free", "--to")
    assert tree(tmp_path/"d") == {}
    mine = tmp_path/"mine.zip"; mine.write_bytes(server.body)
    refused(lambda: get("fake", archive=mine, to=tmp_path/"e", accept=True), "unpacked, needs", "5 kB are free")
    assert tree(tmp_path/"e") == {}


def full(*a, **k): raise OSError(28, "No space left on device")

def test_a_full_disk_while_fetching(fake, server, tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, b): return super().write(b[:100]) if self.tell() < 1000 else full()
    monkeypatch.setattr(archives, "open", lambda p, m="r", **k: Full(p, m) if str(p).endswith(".part") else open(p, m, **k), raising=False)
    refused(lambda: get("fake", to=tmp_path/"d", accept=True), "No space left on device", "free some space", "--to")
    assert len(server.asked) == 1 and set(tree(tmp_path/"d")) == {"set.zip.part", "set.zip.part.json"}
    monkeypatch.undo(); monkeypatch.setitem(KNOWN, "fake", fake); monkeypatch.setenv("no_proxy", "*")
    get("fake", to=tmp_path/"d", accept=True) # goes on
    assert server.asked[-1][1] == "bytes=1000-" and set(p.name for p in (tmp_path/"d").iterdir()) == {"fake"}


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tar.xz"])
def test_a_full_disk_while_unpacking(mini, tmp_path, suffix, monkeypatch):
    a = packed(mini, tmp_path/f"a{suffix}"); before = tree(tmp_path); n = []
    copy = archives._copy
    monkeypatch.setattr(archives, "_copy", lambda *x: full() if len(n) > 4 else n.append(1) or copy(*x))
    refused(lambda: unpack(a, tmp_path/"out"), "No space left on device", "free some space")
    assert tree(tmp_path) == before


def test_a_disk_that_is_really_full(mini, tmp_path):
    small = tmp_path/"small"; small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True).returncode: pytest.skip("no tmpfs can be mounted here")
    try:
        a = packed(mini, tmp_path/"a.tar.xz")
        with pytest.MonkeyPatch.context() as m:
            m.setattr(archives, "room", lambda *a: None)
            refused(lambda: unpack(a, small/"out"), "No space left on device")
        assert tree(small) == {}
    finally: subprocess.run(["umount", small])


def test_a_fault_of_the_disk_keeps_the_fetched_archive(fake, server, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_copy", full)
    refused(lambda: get("fake", to=tmp_path/"d", accept=True), "No space left")
    assert set(tree(tmp_path/"d")) == {"set.zip"} # five gigabytes need not come twice


def test_an_interrupt_while_unpacking_leaves_nothing(mini, tmp_path, monkeypatch):
    a = packed(mini, tmp_path/"a.zip"); before = tree(tmp_path)
    monkeypatch.setattr(archives, "_copy", lambda *x: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): unpack(a, tmp_path/"out")
    assert tree(tmp_path) == before


# Archives

@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tar.xz"])
@pytest.mark.parametrize("inner", ["wrapped", "*"])
def test_archives_of_every_kind(mini, tmp_path, suffix, inner):
    whole(mini, unpack(packed(mini, tmp_path/f"a{suffix}"), tmp_path/"out", inner))
    refused(lambda: unpack(tmp_path/f"a{suffix}", tmp_path/"out"), "is there already")
    (tmp_path/"empty").mkdir(); whole(mini, unpack(tmp_path/f"a{suffix}", tmp_path/"empty", want=("washer",)))


def test_what_a_mac_packs_beside_is_left_out(mini, tmp_path):
    a = packed(mini, tmp_path/"a.zip")
    with zipfile.ZipFile(a, "a") as z: z.writestr("__MACOSX/wrapped/._x.png", b"x")
    whole(mini, unpack(a, tmp_path/"out", "*", ("plug", "washer")))


def tar_with(file, *members, mode="w:gz"):
    "A tar archive of (name, type, link target or content)"
    with tarfile.open(file, mode) as t:
        for name, kind, what in members:
            i = tarfile.TarInfo(name); i.type = kind
            if kind == tarfile.REGTYPE: i.size = len(what); t.addfile(i, io.BytesIO(what))
            else: i.linkname = what or ""; i.devmajor = i.devminor = 1; t.addfile(i)
    return file

OK = ("a/ok.txt", tarfile.REGTYPE, b"fine")
BAD = {"slip": (("../evil", tarfile.REGTYPE, b"x"), "leads out"), "deep slip": (("a/../../evil", tarfile.REGTYPE, b"x"), "leads out"),
       "absolute": (("/no-such-place/evil", tarfile.REGTYPE, b"x"), "leads out"), "drive": (("C:/evil", tarfile.REGTYPE, b"x"), "leads out"),
       "backslash": (("a\\..\\evil", tarfile.REGTYPE, b"x"), "no plain name"), "newline": (("a\nb", tarfile.REGTYPE, b"x"), "no plain name"),
       "symlink out": (("a/l", tarfile.SYMTYPE, "../.."), "a link"), "symlink in": (("a/l", tarfile.SYMTYPE, "ok.txt"), "a link"),
       "hard link": (("a/l", tarfile.LNKTYPE, "/etc/passwd"), "a link"), "device": (("a/d", tarfile.CHRTYPE, None), "neither a file nor a folder"),
       "block device": (("a/d", tarfile.BLKTYPE, None), "neither"), "fifo": (("a/f", tarfile.FIFOTYPE, None), "neither"),
       "twice": (("a/ok.txt", tarfile.REGTYPE, b"other"), "twice"), "file as folder": (("a/ok.txt/x", tarfile.REGTYPE, b"x"), "twice"), "folder as file": (("a", tarfile.REGTYPE, b"x"), "twice")}

@pytest.mark.parametrize("mode", ["w", "w:xz"])
@pytest.mark.parametrize("case", BAD)
def test_a_malicious_tar_is_refused(case, mode, tmp_path):
    member, why = BAD[case]
    (tmp_path/"in").mkdir(); a = tar_with(tmp_path/"in"/"a.tar", OK, member, mode=mode)
    before = tree(tmp_path)
    refused(lambda: unpack(a, tmp_path/"in"/"out"), why, "a.tar")
    assert tree(tmp_path) == before and not Path("/no-such-place/evil").exists()


def test_a_link_and_a_file_through_it(tmp_path):
    (tmp_path/"target").mkdir()
    a = tar_with(tmp_path/"a.tar", ("l", tarfile.SYMTYPE, str(tmp_path/"target")), ("l/evil", tarfile.REGTYPE, b"x"))
    refused(lambda: unpack(a, tmp_path/"out"), "a link")
    assert tree(tmp_path/"target") == {} and not (tmp_path/"out").exists()


@pytest.mark.parametrize("name,why", [("../evil", "leads out"), ("/evil", "leads out"), ("a\\b", "no plain name"), ("C:evil", "leads out"), ("a/ok", "twice")])
def test_a_malicious_zip_is_refused(name, why, tmp_path):
    with zipfile.ZipFile(tmp_path/"a.zip", "w") as z:
        z.writestr("a/ok", b"x")
        with pytest.warns(UserWarning) if name == "a/ok" else open(os.devnull): z.writestr(name, b"x")
    before = tree(tmp_path)
    refused(lambda: unpack(tmp_path/"a.zip", tmp_path/"out"), why)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind,why", [(stat.S_IFLNK, "a link"), (stat.S_IFIFO, "neither"), (stat.S_IFCHR, "neither")])
def test_a_zip_with_more_than_files(kind, why, tmp_path):
    i = zipfile.ZipInfo("a/l"); i.create_system, i.external_attr = 3, (kind | 0o777) << 16
    with zipfile.ZipFile(tmp_path/"a.zip", "w") as z: z.writestr(i, "/etc/passwd")
    refused(lambda: unpack(tmp_path/"a.zip", tmp_path/"out"), why)
    assert not (tmp_path/"out").exists()


@pytest.mark.parametrize("suffix", ["zip", "tar.gz", "tar.xz"])
def test_a_bomb(suffix, tmp_path):
    zeros = bytes(30_000_000)
    if suffix == "zip":
        with zipfile.ZipFile(tmp_path/"b.zip", "w", zipfile.ZIP_DEFLATED) as z: z.writestr("a", zeros)
    else: tar_with(tmp_path/f"b.{suffix}", ("a", tarfile.REGTYPE, zeros), mode=f"w:{suffix[4:]}")
    before = tree(tmp_path)
    refused(lambda: unpack(tmp_path/f"b.{suffix}", tmp_path/"out"), "would unpack to more than 10 MB")
    assert tree(tmp_path) == before


def patch_sizes(file, size):
    "Both headers of a zip's only file claim another size"
    b = bytearray(file.read_bytes())
    for mark, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        k = b.index(mark) + at; b[k:k + 4] = size.to_bytes(4, "little")
    file.write_bytes(bytes(b))

@pytest.mark.parametrize("size", [10, 5000])
def test_a_zip_that_lies_about_sizes(size, tmp_path):
    with zipfile.ZipFile(tmp_path/"a.zip", "w", zipfile.ZIP_DEFLATED) as z: z.writestr("a", os.urandom(1000))
    patch_sizes(tmp_path/"a.zip", size); before = tree(tmp_path)
    refused(lambda: unpack(tmp_path/"a.zip", tmp_path/"out"), "a.zip")
    assert tree(tmp_path) == before


def test_too_many_members(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MEMBERS", 10)
    a = tar_with(tmp_path/"a.tar", *((f"f{k}", tarfile.REGTYPE, b"") for k in range(11)))
    refused(lambda: unpack(a, tmp_path/"out"), "more than 10 files")
    assert not (tmp_path/"out").exists()


def test_an_encrypted_zip(tmp_path):
    with zipfile.ZipFile(tmp_path/"a.zip", "w") as z: z.writestr("a", b"secret")
    b = bytearray((tmp_path/"a.zip").read_bytes())
    b[6] |= 1; b[b.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path/"a.zip").write_bytes(bytes(b))
    refused(lambda: unpack(tmp_path/"a.zip", tmp_path/"out"), "encrypted")


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tar.xz"])
@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "a page"])
def test_a_damaged_archive(mini, suffix, how, tmp_path):
    a = packed(mini, tmp_path/f"a{suffix}"); b = bytearray(a.read_bytes())
    if how == "flipped" and suffix == ".tar": pytest.skip("a plain tar has no sum of its content")
    if how == "cut": b = b[:len(b) // 2]
    elif how == "flipped":
        for k in range(len(b) // 2, len(b) // 2 + 200): b[k] ^= 255
    else: b = b"" if how == "empty" else b"<html>Please log in</html>"
    a.write_bytes(bytes(b)); before = tree(tmp_path)
    refused(lambda: unpack(a, tmp_path/"out"), a.name)
    assert tree(tmp_path) == before


def test_a_damaged_archive_that_was_fetched_is_removed(fake, server, tmp_path, monkeypatch):
    server.body = server.body[:len(server.body) // 2]
    monkeypatch.setitem(KNOWN, "fake", fake._replace(sha256=None))
    refused(lambda: get("fake", to=tmp_path/"d", accept=True), "damaged", "fetch it anew")
    assert tree(tmp_path/"d") == {}


# The list

def test_the_list(tmp_path, monkeypatch):
    for c in archives.parts("mvtec_ad")[:2]: (tmp_path/"d"/"mvtec_ad"/c).mkdir(parents=True)
    (tmp_path/"d"/"visa"/"junk").mkdir(parents=True)
    f = list_sets(tmp_path/"d").set_index("name")
    assert set(f.index) >= {"mvtec_ad", "visa", "btad", "dtd", "mvtec_ad_2", "kolektor_sdd", "magnetic_tile"}
    assert f.there["mvtec_ad"] == "partly" and len(f.missing["mvtec_ad"]) == 13 and f.there["visa"] == "other" and f.there["btad"] == "no"
    text = sets_text(list_sets(tmp_path/"d"))
    assert "partly: lacks" in text and max(map(len, text.splitlines())) <= 100
    for k in KNOWN.values(): assert k.note in text
    monkeypatch.setenv("TOCOAD_DATA", str(tmp_path/"d"))
    assert lies("mvtec_ad") == lies("mvtec_ad", tmp_path/"d")


def test_the_list_needs_no_torch():
    code = "import sys; from tocoad.archives import list_sets, sets_text; sets_text(list_sets()); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Verifying

@pytest.fixture
def copy(mini, tmp_path): return shutil.copytree(mini, tmp_path/"copy")

def test_a_sound_set(copy):
    before = tree(copy); r = verify(copy, progress=False)
    assert r.ok and not r.problems and not r.remarks and r.read == len(list(copy.rglob("*.png"))) and "complete and sound" in r.text()
    assert tree(copy) == before # nothing is written
    assert sorted(map(tuple, r.rows)) == sorted((c, *x, None) for c in ("plug", "washer") for x in
                                                (("train", "normal", 3), ("test", "normal", 2), ("test", "anomalous", 5)))


IMG = "washer/test/hole/000.png"; MASK = "washer/ground_truth/hole/000_mask.png"
def cut(p): p.write_bytes(p.read_bytes()[:len(p.read_bytes()) // 2])
DAMAGE = {"a picture cut short": (lambda d: cut(d/"plug/train/good/001.png"), "plug/train/good/001.png cannot be read"),
          "a mask cut short": (lambda d: cut(d/MASK), f"{MASK} cannot be read"),
          "an empty file": (lambda d: (d/IMG).write_bytes(b""), f"{IMG} cannot be read"),
          "text named png": (lambda d: (d/IMG).write_text("hello"), f"{IMG} cannot be read"),
          "a mask gone": (lambda d: (d/MASK).unlink(), f"{IMG} is anomalous and has no mask"),
          "a picture gone": (lambda d: (d/IMG).unlink(), MASK),
          "a mask of another size": (lambda d: Image.new("L", (8, 9), 255).save(d/MASK), f"{MASK} has 8 x 9 pixels but its image {IMG} 32 x 32"),
          "no training images": (lambda d: shutil.rmtree(d/"plug/train/good"), "plug")}

@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(copy, what):
    do, says = DAMAGE[what]; do(copy)
    r = verify(copy)
    assert not r.ok and any(says in p for p in r.problems), r.text()
    assert "NOT complete and sound" in r.text()


def test_all_damage_is_told_and_the_other_categories_go_on(copy):
    shutil.rmtree(copy/"plug/train/good"); cut(copy/"plug/test/good/000.png"); cut(copy/"washer/train/good/000.png"); (copy/MASK).unlink()
    r = verify(copy)
    for says in ("plug", "plug/test/good/000.png", "washer/train/good/000.png", IMG): assert any(says in p for p in r.problems)
    assert len(r.problems) == 4 and {row[0] for row in r.rows} == {"washer"}


def test_remarks_are_no_problems(copy):
    Image.new("L", (32, 32)).save(copy/MASK); (copy/"washer/Thumbs.db").write_bytes(b"x"); (copy/"readme.txt").write_text("hello")
    r = verify(copy)
    assert r.ok and len(r.remarks) == 2
    assert "1 of 5 masks of anomalous images are empty" in r.remarks[0] and "1 file belongs to nothing (washer/Thumbs.db)" in r.remarks[1]


def test_many_problems_are_counted(copy):
    for p in copy.rglob("*.png"): p.write_bytes(b"")
    r = verify(copy)
    assert len(r.problems) == 30 and "and 10 more" in r.text() and r.text().count("cannot be read") == 20


def test_a_turned_photograph_and_its_mask(copy):
    im = Image.fromarray(np.zeros((20, 30, 3), np.uint8)); im.getexif()[0x0112] = 6
    (copy/IMG).unlink(); im.save((copy/IMG).with_suffix(".jpg"), exif=im.getexif())
    Image.new("L", (20, 30), 255).save(copy/MASK) # as the upright picture
    assert verify(copy).ok
    Image.new("L", (30, 20), 255).save(copy/MASK)
    assert "has 30 x 20 pixels but its image washer/test/hole/000.jpg 20 x 30" in verify(copy).problems[0]


def test_counts_missing_categories_and_resized_copies(mini, tmp_path):
    shutil.copytree(mini/"washer", tmp_path/"d"/"bottle"); shutil.copytree(mini/"plug", tmp_path/"d"/"screw")
    r = verify(tmp_path/"d")
    assert "MVTec AD" in r.title and ("bottle", "train", "normal", 3, 209) in r.rows
    assert any(p.startswith("13 of 15 categories are missing: cable") for p in r.problems)
    assert "bottle: 3 normal images in train instead of 209" in r.problems
    assert any("bottle: the images are resized copies (32 x 32 pixels instead of 900 x 900)" in x for x in r.remarks)
    assert re.search(r"bottle +train +normal +3 +209 +<", r.text())


def test_a_manifest(copy, tmp_path):
    m = tmp_path/"m.sha256"
    assert verify(copy, manifest=m).ok and len(m.read_text().splitlines()) == 30
    r = verify(copy, manifest=m); assert r.ok and "compared with" in r.remarks[0]
    shutil.copy(copy/"plug/train/good/000.png", copy/"plug/train/good/001.png"); (copy/"plug/train/good/002.png").unlink(); (copy/"washer/new.txt").write_text("x")
    r = verify(copy, manifest=m)
    assert r.problems == [f"plug/train/good/00{k}.png {w} since m.sha256 was written" for k, w in ((1, "has changed"), (2, "is gone"))] + ["washer/new.txt is new since m.sha256 was written"]
    assert len(m.read_text().splitlines()) == 30 # not written again
    m.write_text("not a manifest\n"); refused(lambda: verify(copy, manifest=m), "line 1 of")
    refused(lambda: verify(copy, manifest=tmp_path/"no"/"m"), "cannot be written")


def test_the_sums_that_get_wrote(fake, tmp_path):
    d = get("fake", to=tmp_path/"d", accept=True, progress=False)
    r = verify(d); assert r.ok and SUMS in r.remarks[-1]
    p = d/"washer/train/good/000.png"; p.write_bytes(p.read_bytes() + b"x")
    assert verify(d).problems == [f"washer/train/good/000.png has changed since {SUMS} was written"]


def test_a_folder_linked_twice_and_a_circle(copy):
    (copy/"again").symlink_to(copy/"washer"); (copy/"plug"/"loop").symlink_to(copy)
    r = verify(copy)
    assert r.ok and {row[0] for row in r.rows} == {"again", "plug", "washer"}


def test_textures(tmp_path):
    rng = np.random.default_rng(0)
    for t in archives.parts("dtd")[:3]:
        (tmp_path/"dtd"/t).mkdir(parents=True)
        for k in range(2): Image.fromarray(rng.integers(0, 255, (9, 12, 3), np.uint8)).save(tmp_path/"dtd"/t/f"{k}.jpg")
    r = verify(tmp_path/"dtd")
    assert r.rows == [("dtd", "all", "texture", 6, 5640)] and any("44 of 47 textures are missing" in p for p in r.problems)
    assert "images/banded: 2 images instead of 120" in r.problems


LAYOUTS = {"btad": {"01/train/ok/0.bmp": 0, "01/test/ok/1.bmp": 0, "01/test/ko/2.bmp": 0, "01/ground_truth/ko/2.png": 255},
           "kolektor_sdd": {f"kos01/Part{k}.jpg": 0 for k in range(6)} | {f"kos01/Part{k}_label.bmp": 255 * (k == 5) for k in range(6)},
           "magnetic_tile": {f"MT_Free/Imgs/{k}.{s}": 0 for k in range(5) for s in ("jpg", "png")} | {"MT_Break/Imgs/a.jpg": 0, "MT_Break/Imgs/a.png": 255}}

@pytest.mark.parametrize("name", LAYOUTS)
def test_other_layouts(name, tmp_path):
    for file, value in LAYOUTS[name].items():
        (p := tmp_path/"d"/file).parent.mkdir(parents=True, exist_ok=True); Image.new("L", (8, 8), value).save(p)
    r = verify(tmp_path/"d")
    assert r.read == len(LAYOUTS[name]) and not any("nothing" in x for x in r.remarks), r.text() # a good image's label picture belongs to it
    assert any("are missing" in p for p in r.problems) and not any("cannot" in p or "mask" in p for p in r.problems)


def test_folders_that_are_nothing(tmp_path, mini):
    refused(lambda: verify(tmp_path/"no"), "there is no folder")
    (tmp_path/"empty").mkdir(); refused(lambda: verify(tmp_path/"empty"), "holds no category")
    refused(lambda: verify(mini, dataset="mvtek"), "mvtec_ad")
    refused(lambda: verify(mini/"washer"), "is itself a category")


def test_real_images(real):
    r = verify(real/"mvtec_ad", progress=False)
    assert ("bottle", "train", "normal", 209, 209) in r.rows and all(n == w for *_, n, w in r.rows)
    if len({row[0] for row in r.rows}) < 15: assert not r.ok and "categories are missing" in r.problems[0]


def test_a_manifest_does_not_make_hidden_files_pictures(tmp_path):
    "With hashes or without, a `._000.png` is no image of the set"
    root = write_layout(tmp_path/"set", "mvtec", ["washer"], traps=True)
    plain, hashed = verify(root, progress=False), verify(root, manifest=tmp_path/"sums", progress=False)
    assert plain.problems == hashed.problems == [] and (root/"washer/train/good/._000.png").exists()
    assert verify(root, manifest=tmp_path/"sums", progress=False).ok
