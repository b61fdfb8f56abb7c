"Files that a disk shows unchanged: remembered without --rehash, read anew with it"
import json
from pathlib import Path

import pytest
import toys

from tocoad import cli, files
from tocoad.data import images
from tocoad.paper import plan, sheets
from tocoad.paper.rows import FROZEN
from tocoad.run import config
from tocoad.run.keys import chain
from tocoad.run.store import Store

TINY = ["size=32", "resize=32", "width=32", "batch=8", "epochs1=1", "epochs2=1"]


@pytest.fixture
def still(tmp_path, monkeypatch):
    "A cache of its own, and a disk on which every file keeps the state that it first had"
    monkeypatch.setenv("TOCOAD_CACHE", str(tmp_path / "cache"))
    seen, real = {}, files.state_of
    state = lambda p: seen.setdefault(str(Path(p).resolve()), real(p)) if "cache" not in str(p) else real(p)
    for room in ("tocoad.files", "tocoad.data.load", "tocoad.data.images", "tocoad.paper.sheets", "tocoad.run.compare"):
        monkeypatch.setattr(f"{room}.state_of", state)
    return tmp_path


def replaced(p, k):
    "Another picture in a file's place"
    toys.save(p, toys.noise(k))


def test_run_reads_images_anew(still, capsys):
    root = toys.toy(still / "set")
    words = ["run", "--root", str(root), "--category", "cog", "--profile", "smoke", "--systems", "frozen", "--out",
             str(still / "out"), "--store", str(still / "store"), "--json", "--quiet", "--set", *TINY]
    def made(*more):
        "Of which images a run is"
        assert cli.main(words + [*more]) == 0
        return json.loads(capsys.readouterr().out)["data"]["fingerprint"]
    first = made()
    replaced(root / "cog/train/good/0.png", 99)
    assert made() == first
    second = made("--rehash")
    assert second != first and made() == second, "what was read anew is remembered from then on"


def test_run_reads_textures_anew(still):
    for k in range(2):
        replaced(still / f"dtd/{k}.png", k)
    key = lambda: chain(config.config("smoke").replace(textures=str(still / "dtd")), "d", "w")["stage1"].key
    first, shown = key(), images.textures(still / "dtd", 32)
    replaced(still / "dtd/0.png", 9)
    assert key() == first and (images.textures(still / "dtd", 32) == shown).all()
    files.rehash()
    images._decoded.cache_clear() # another process
    assert key() != first and not (images.textures(still / "dtd", 32) == shown).all()


def test_reproduce_shows_no_sheet_and_no_note_of_the_files_before(still, capsys):
    folder = toys.toy(still / "mvtec_ad")
    (folder / "cog").rename(folder / "bottle")
    o = plan.options("smoke", str(still), (0,), ["bottle"], TINY, str(still / "store"), None, ())
    def places():
        "Where the sheet of a table and the note of its images lie"
        store = Store(o.store)
        c = o.config("mvtec_ad", "bottle", 0, FROZEN)
        return sheets.sheet_path("table5", o, store), sheets._note(store, folder, c)
    first = places()
    replaced(folder / "bottle/test/good/0.png", 99)
    assert places() == first
    words = ["reproduce", "table5", "--profile", "smoke", "--root", str(still), "--categories", "bottle", "--dry-run"]
    assert cli.main([*words, "--store", str(still / "store"), "--rehash", "--set", *TINY]) == 0
    assert all(a != b for a, b in zip(first, places(), strict=True))


def test_a_cache_that_cannot_be_written_is_said(still, capsys, monkeypatch):
    (still / "file").write_text("")
    monkeypatch.setenv("TOCOAD_CACHE", str(still / "file"))
    toys.toy(still / "set")
    assert cli.main(["run", "--root", str(still / "set"), "--category", "cog", "--rehash", "--quiet"]) == 1
    assert capsys.readouterr().err.startswith(f"tocoad: {still / 'file'}: File exists; give another place")
