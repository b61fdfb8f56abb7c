"Data sets listed, fetched, checked and unpacked: what servers, packers and disks do wrong"

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tocoad.data import archives
from tocoad.data.archives import KNOWN, SUMS, Known, fetch, get, lies, list_sets, sets_text, unpack
from tocoad.data.errors import BadInput
from tocoad.data.mini import write_mini
from tocoad.data.verify import verify


class Handler(SimpleHTTPRequestHandler):
    "Sends the files of a folder, or fails as it is told to"

    def log_message(self, *a):
        pass

    def do_GET(self):
        self.server.asked += 1
        if self.server.how.isdigit():
            return self.send_error(int(self.server.how))
        if self.server.how == "redirect":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
            self.end_headers()
            return None
        return super().do_GET()

    def copyfile(self, source, output):
        body = source.read()
        output.write(body[: len(body) // 2] if self.server.how == "drop" else body)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def mini(tmp_path_factory):
    return write_mini(tmp_path_factory.mktemp("mini") / "mini", size=32, categories=("washer", "plug"), n=(3, 2, 1))


def packed(mini, file, inner="wrapped"):
    "The mini data set in an archive, with a folder around it"
    if file.suffix == ".zip":
        with zipfile.ZipFile(file, "w") as z:
            for p in sorted(mini.rglob("*.png")):
                z.write(p, f"{inner}/{p.relative_to(mini).as_posix()}")
    else:
        with tarfile.open(file, {".tar": "w", ".gz": "w:gz", ".xz": "w:xz"}[file.suffix]) as t:
            t.add(mini, inner)
    return file


@pytest.fixture
def server(mini, tmp_path_factory):
    "A server on this machine with one archive, which counts how often it is asked"
    root = tmp_path_factory.mktemp("web")
    s = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=root))
    s.how, s.asked, s.file = "", 0, packed(mini, root / "set.zip")
    s.url = f"http://127.0.0.1:{s.server_port}/set.zip"
    threading.Thread(target=s.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
    yield s
    s.shutdown()
    s.server_close()


WANT = ("plug", "washer")


@pytest.fixture
def fake(server, monkeypatch):
    known = f"sha256:{hashlib.sha256(server.file.read_bytes()).hexdigest()}"
    k = Known(
        "CC BY 4.0", "Ours.", "http://licence", "set.zip", known, 10_000, server.url, "http://authors", folders=WANT
    )
    monkeypatch.setitem(KNOWN, "fake", k)
    return k


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


def whole(mini, folder):
    for p in mini.rglob("*.png"):
        assert (folder / p.relative_to(mini)).read_bytes() == p.read_bytes()
    assert len((folder / SUMS).read_text().splitlines()) == len(list(mini.rglob("*.png")))


# Getting


def test_a_set_comes_from_the_web(fake, server, mini, tmp_path, capsys):
    assert get("fake", to=tmp_path / "d", accept=True) == tmp_path / "d" / "fake"
    whole(mini, tmp_path / "d" / "fake")
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["fake"]  # neither archive nor part
    assert "Fake: licence CC BY 4.0" in capsys.readouterr().out
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "--quiet", SUMS], cwd=tmp_path / "d" / "fake", check=True)
    get("fake", to=tmp_path / "d")  # it is there: no licence, no line
    assert server.asked == 1 and "is there already; nothing is done" in capsys.readouterr().out


def test_the_licence_must_be_accepted(fake, server, tmp_path, monkeypatch):
    refused(
        lambda: get("fake", to=tmp_path / "d"), "--accept-licence", "CC BY 4.0", "http://licence"
    )  # nobody sits at a terminal
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda text: "")
    refused(lambda: get("fake", to=tmp_path / "d"), "--accept-licence")
    assert not server.asked and not (tmp_path / "d").exists()
    monkeypatch.setattr("builtins.input", lambda text: "y")
    get("fake", to=tmp_path / "d")
    assert (tmp_path / "d" / "fake").is_dir()


def test_an_archive_that_is_here_comes_first(fake, server, mini, tmp_path):
    mine = Path(shutil.copy(server.file, tmp_path / "elsewhere.bin"))
    whole(mini, get("fake", archive=mine, to=tmp_path / "a", accept=True))
    (tmp_path / "b").mkdir()
    shutil.copy(mine, tmp_path / "b" / "set.zip")
    whole(mini, get("fake", to=tmp_path / "b", accept=True))
    shutil.copy(mine, tmp_path / "set.zip")  # the current folder
    whole(mini, get("fake", to=tmp_path / "c", accept=True))
    assert not server.asked
    assert (
        mine.exists() and (tmp_path / "b" / "set.zip").exists() and (tmp_path / "set.zip").exists()
    )  # a user's file is never deleted
    refused(
        lambda: get("fake", archive=tmp_path / "no.zip", to=tmp_path / "d", accept=True),
        "there is no archive",
        "no.zip",
    )


def test_another_address_must_give_the_same_archive(fake, server, mini, tmp_path, monkeypatch):
    monkeypatch.setitem(KNOWN, "fake", fake._replace(url="http://127.0.0.1:9/set.zip"))
    whole(mini, get("fake", url=server.url, to=tmp_path / "d", accept=True))
    server.file.write_bytes(server.file.read_bytes()[:-1] + b"x")
    refused(
        lambda: get("fake", url=server.url, to=tmp_path / "e", accept=True),
        server.url,
        "does not match the known hash",
        fake.hash[7:],
    )
    assert tree(tmp_path / "e") == {}


def test_a_wrong_hash_unpacks_nothing(fake, server, tmp_path):
    mine = tmp_path / "mine.zip"
    mine.write_bytes(server.file.read_bytes() + b"x")
    refused(
        lambda: get("fake", archive=mine, to=tmp_path / "d", accept=True),
        "mine.zip is not the published set.zip",
        "fetch it anew",
    )
    assert mine.exists() and tree(tmp_path / "d") == {}


def test_md5_is_checked_too(fake, server, mini, tmp_path, monkeypatch):
    monkeypatch.setitem(KNOWN, "fake", fake._replace(hash=f"md5:{hashlib.md5(server.file.read_bytes()).hexdigest()}"))
    whole(mini, get("fake", to=tmp_path / "a", accept=True))
    monkeypatch.setitem(KNOWN, "fake", fake._replace(hash=f"md5:{'0' * 32}"))
    refused(lambda: get("fake", to=tmp_path / "b", accept=True), "MD5", "0" * 32)


@pytest.mark.parametrize("what", ["folder", "file", "partly"])
def test_what_stands_there_is_not_touched(fake, what, tmp_path):
    at = tmp_path / "d" / "fake"
    at.parent.mkdir()
    if what == "file":
        at.write_text("mine")
    else:
        (at / ("plug" if what == "partly" else "other")).mkdir(parents=True)
    before = tree(tmp_path)
    says = "lacks washer" if what == "partly" else "lacks plug, washer"
    refused(lambda: get("fake", to=tmp_path / "d", accept=True), "is there already", says)
    assert tree(tmp_path) == before


def test_an_unknown_name(tmp_path):
    refused(lambda: get("mvtec", to=tmp_path / "d", accept=True), "mvtec_ad")


def test_the_sums_that_get_wrote(fake, tmp_path):
    d = get("fake", to=tmp_path / "d", accept=True, progress=False)
    r = verify(d)
    assert r.ok and SUMS in r.remarks[-1]
    p = d / "washer/train/good/000.png"
    p.write_bytes(p.read_bytes() + b"x")
    assert verify(d).problems == [f"washer/train/good/000.png has changed since {SUMS} was written"]


# Lines that break


@pytest.mark.parametrize(
    "how,says", [("drop", "IncompleteRead"), ("404", "404"), ("503", "503"), ("redirect", "file:")]
)
def test_a_server_that_fails(fake, server, how, says, tmp_path):
    server.how = how
    refused(
        lambda: get("fake", to=tmp_path / "d", accept=True),
        server.url,
        says,
        f"curl -L -C - -o set.zip {server.url}",
        fake.hash,
        "http://authors",
        "tocoad data get fake --archive set.zip",
    )
    assert tree(tmp_path / "d") == {}


def test_nobody_there(fake, tmp_path, monkeypatch):
    monkeypatch.setitem(KNOWN, "fake", fake._replace(url="http://127.0.0.1:9/set.zip"))
    refused(
        lambda: get("fake", to=tmp_path / "d", accept=True),
        "http://127.0.0.1:9/set.zip cannot be fetched (Connection refused)",
    )
    assert tree(tmp_path / "d") == {}


@pytest.mark.parametrize("url", ["http://[::1", "http://127.0.0.1:port/x", f"http://{'a' * 70}.invalid/x"])
def test_addresses_that_are_none(url, tmp_path):
    refused(lambda: fetch(url, tmp_path / "x", "md5:0"), url[:12])


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://h/x", "nonsense"])
def test_other_kinds_of_address(url, tmp_path):
    refused(lambda: fetch(url, tmp_path / "x", "md5:0"), "no http or https address")


# Disks


def test_space_is_asked_for_first(fake, server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9, 10_000))
    refused(lambda: get("fake", to=tmp_path / "d", accept=True), "it needs 25.0kB", "free some space", "--to")
    refused(lambda: get("fake", archive=server.file, to=tmp_path / "d", accept=True), "it needs", "free some space")
    assert not server.asked and tree(tmp_path / "d") == {}


def full(*a, **k):
    raise OSError(28, "No space left on device")


def test_a_full_disk_while_fetching(fake, server, tmp_path, monkeypatch):
    monkeypatch.setattr(archives.pooch, "HTTPDownloader", lambda *a, **k: full)
    refused(lambda: get("fake", to=tmp_path / "d", accept=True), "No space left on device", "free some space", "--to")
    assert tree(tmp_path / "d") == {}


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tar.xz"])
def test_a_full_disk_while_unpacking(mini, tmp_path, suffix, monkeypatch):
    a = packed(mini, tmp_path / f"a{suffix}")
    before, copy, n = tree(tmp_path), shutil.copyfileobj, []
    some = lambda *x, **k: full() if len(n) > 4 else n.append(1) or copy(*x, **k)
    monkeypatch.setattr(shutil, "copyfileobj", some)
    monkeypatch.setattr(tarfile, "copyfileobj", lambda s, d, *x, **k: some(s, d))
    with pytest.raises(OSError, match="No space left on device: .*out"):
        unpack(a, tmp_path / "out", WANT)
    assert n and tree(tmp_path) == before


def test_a_disk_that_is_really_full(mini, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        with pytest.raises(OSError, match="No space left on device"):
            unpack(packed(mini, tmp_path / "a.tar.xz"), small / "out", WANT)
        assert tree(small) == {}
    finally:
        subprocess.run(["umount", small])


def test_a_fault_of_the_disk_keeps_the_fetched_archive(fake, server, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "unpack", full)
    refused(lambda: get("fake", to=tmp_path / "d", accept=True), "No space left", "free some space")
    assert set(tree(tmp_path / "d")) == {"set.zip"}  # five gigabytes need not come twice


def test_an_interrupt_leaves_nothing(fake, mini, tmp_path, monkeypatch):
    def stop(*a, **k):
        raise KeyboardInterrupt

    a = packed(mini, tmp_path / "a.zip")
    before = tree(tmp_path)
    monkeypatch.setattr(archives, "write_sums", stop)
    with pytest.raises(KeyboardInterrupt):
        unpack(a, tmp_path / "out", WANT)
    assert tree(tmp_path) == before
    monkeypatch.setattr(archives.pooch, "HTTPDownloader", lambda *a, **k: stop)
    with pytest.raises(KeyboardInterrupt):
        get("fake", to=tmp_path / "d", accept=True)
    assert tree(tmp_path / "d") == {}


# Archives


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tar.xz"])
@pytest.mark.parametrize("inner", ["wrapped", "."])
def test_archives_of_every_kind(mini, tmp_path, suffix, inner):
    a = packed(mini, tmp_path / f"a{suffix}", inner)
    whole(mini, unpack(a, tmp_path / "out", WANT))
    (tmp_path / "empty").mkdir()
    whole(mini, unpack(a, tmp_path / "empty", ("washer",)))


def test_what_a_mac_packs_beside_is_left_out(mini, tmp_path):
    a = packed(mini, tmp_path / "a.zip")
    with zipfile.ZipFile(a, "a") as z:
        z.writestr("__MACOSX/wrapped/._x.png", b"x")
    whole(mini, unpack(a, tmp_path / "out", WANT))


# The list


def test_the_list(tmp_path, monkeypatch):
    for c in archives.parts("mvtec_ad")[:2]:
        (tmp_path / "d" / "mvtec_ad" / c).mkdir(parents=True)
    (tmp_path / "d" / "visa" / "junk").mkdir(parents=True)
    f = list_sets(tmp_path / "d").set_index("name")
    assert set(f.index) >= {"mvtec_ad", "visa", "btad", "dtd", "mvtec_ad_2", "kolektor_sdd", "magnetic_tile"}
    assert (
        f.there["mvtec_ad"] == "partly"
        and len(f.missing["mvtec_ad"]) == 13
        and f.there["visa"] == "other"
        and f.there["btad"] == "no"
    )
    text = sets_text(list_sets(tmp_path / "d"))
    assert "partly: lacks" in text and max(map(len, text.splitlines())) <= 100
    for k in KNOWN.values():
        assert k.note in text
    monkeypatch.setenv("TOCOAD_DATA", str(tmp_path / "d"))
    assert lies("mvtec_ad") == lies("mvtec_ad", tmp_path / "d")


def test_the_list_needs_no_torch():
    code = """import sys
from tocoad.data.archives import list_sets, sets_text
sets_text(list_sets())
assert 'torch' not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True)


# Archives and folders that would keep a reader busy


def nested(folder, suffix, depth=1500):
    "An archive of one file below so many folders, and a sound one beside it"
    name = "a/" * depth + "x.png"
    if suffix == ".zip":
        with zipfile.ZipFile(folder / "n.zip", "w") as z:
            z.writestr("washer/x.png", b"x")
            z.writestr(name, b"x")
    else:
        with tarfile.open(folder / f"n{suffix}", "w:" + suffix[5:]) as t:
            for n in ("washer/x.png", name):
                t.addfile(tarfile.TarInfo(n))
    return folder / f"n{suffix}"


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tar.xz"])
def test_folders_a_thousand_deep_are_not_unpacked(suffix, tmp_path):
    a = nested(tmp_path, suffix)
    refused(lambda: unpack(a, tmp_path / "out", WANT), "more than 50 folders below each other", "a/a/a/")
    assert set(tree(tmp_path)) == {a.name}
    (tmp_path / "few").mkdir()
    assert (unpack(nested(tmp_path / "few", suffix, 49), tmp_path / "out", WANT) / ("a/" * 49) / "x.png").exists()


HEADERS = dict(pax=tarfile.XHDTYPE, all=tarfile.XGLTYPE, name=tarfile.GNUTYPE_LONGNAME, link=tarfile.GNUTYPE_LONGLINK,
               solaris=tarfile.SOLARIS_XHDTYPE)


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_claims_300_mb_is_not_read(kind, tmp_path):
    header = tarfile.TarInfo("x")
    header.type, header.size = HEADERS[kind], 300_000_000
    first = tarfile.TarInfo("washer/x.png")
    (tmp_path / "h.tar").write_bytes(first.tobuf() + header.tobuf() + b"\0" * 1024)
    refused(lambda: unpack(tmp_path / "h.tar", tmp_path / "out", WANT), "a header of 300MB is not unpacked")
    assert set(tree(tmp_path)) == {"h.tar"}


def test_a_header_within_the_limit_is_read(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "h.tar", "w", format=tarfile.PAX_FORMAT) as t:
        one = tarfile.TarInfo("washer/" + "x" * 200)
        one.pax_headers = {"comment": "y" * 5000}
        t.addfile(one)
    unpack(tmp_path / "h.tar", tmp_path / "out", WANT)
    monkeypatch.setattr(archives, "HEADER", 4000)
    refused(lambda: unpack(tmp_path / "h.tar", tmp_path / "none", WANT), "is not unpacked")


def test_a_folder_a_thousand_deep_is_told_and_not_entered(mini, tmp_path, monkeypatch):
    shutil.copytree(mini / "washer", tmp_path / "set" / "washer")
    monkeypatch.chdir(tmp_path / "set" / "washer")
    for _ in range(1500):
        os.mkdir("a")
        os.chdir("a")
    monkeypatch.undo()
    try:
        r = verify(tmp_path / "set")
        assert not r.ok and "too many folders lie below each other" in r.problems[0]
    finally: # what clears temporary folders is no deeper than Python's calls
        subprocess.run(["rm", "-rf", tmp_path / "set" / "washer" / "a"], check=True)
