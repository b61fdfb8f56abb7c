"A folder of good parts becomes a model file, and a folder of parts becomes scores and heat maps"
import csv
import json
import os
import shutil
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tocoad.cli import main
from tocoad.data.errors import BadInput
from tocoad.data.mini import draw
from tocoad.parts import score as score_room
from tocoad.parts.export import load, save
from tocoad.parts.fit import KEPT, Detector, fit, rank
from tocoad.parts.pictures import LEAST, InFlight, decoded, hash_order
from tocoad.parts.score import MARK, Summary, results, score, scored
from tocoad.run.config import config

SIZE = 64
CFG = config("smoke", resize=SIZE, size=SIZE, sigma=2.)


def lay_out(folder, n, start=0, defect="good", category="washer"):
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        Image.fromarray(draw(category, start + k, defect, SIZE)[0].squeeze()).save(folder / f"{defect} {k:02}.png")
    return folder


def rows(out):
    with open(out / "scores.csv", newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def bank(d): return d.state["memory"][1]["bank"]


def scores(out): return {r["path"]: float(r["score"]) for r in rows(out) if r["score"]}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    root = tmp_path_factory.mktemp("shop")
    lay_out(root / "good", 24)
    lay_out(root / "parts/new", 6, 500)
    lay_out(root / "parts/new", 3, 600, "missing_part")
    lay_out(root / "parts/old", 3, 700, "hole")
    return root


@pytest.fixture(scope="module")
def detector(shop): return fit(shop / "good", CFG, progress=False)


@pytest.fixture
def parts(shop, tmp_path): return Path(shutil.copytree(shop / "parts", tmp_path / "parts"))


def test_no_held_out_part_is_called_defective(detector, shop, tmp_path):
    "The threshold lies above the largest held-out score, and training parts lie lower still"
    s = score(detector, shop / "good", tmp_path / "out", maps=0, batch=5, progress=False)
    assert (s.defect, s.good, s.unreadable) == (0, 24, 0)
    held = set(hash_order(f"good {k:02}.png" for k in range(24))[:5])
    by_name = scores(tmp_path / "out")
    assert np.allclose(sorted(by_name[n] for n in held), detector.held, rtol=1e-4)
    assert max(by_name.values()) == max(by_name[n] for n in held)


def test_missing_parts_come_first(detector, shop, tmp_path):
    s = score(detector, shop / "parts", tmp_path / "out", maps=4, progress=False)
    table = rows(tmp_path / "out")
    assert [r["rank"] for r in table] == [str(i) for i in range(1, 13)]
    print([(r["path"], r["ratio"]) for r in table])
    assert "good" not in table[0]["path"] and table[0]["decision"] == "defect"
    assert sum(r["decision"] == "defect" for r in table) == s.defect and s.problem is None
    assert [bool(r["heat_map"]) for r in table] == [True] * 4 + [False] * 8
    assert all((tmp_path / "out" / r["heat_map"]).is_file() for r in table[:4])
    assert (tmp_path / "out/worst.png").is_file()
    assert json.loads((tmp_path / "out/summary.json").read_text())["defect"] == s.defect


def test_a_fit_repeats(shop, detector):
    again = fit(shop / "good", CFG, progress=False)
    assert np.array_equal(bank(again), bank(detector)) and torch.equal(again.held, detector.held)
    same = lambda d: {k: v for k, v in d.about.items() if k not in ("seconds", "written")}
    assert same(again) == same(detector)
    other = fit(shop / "good", CFG.replace(seed=1), progress=False)
    assert set(other.about["highest"]) != set(detector.about["highest"])


def test_both_stages_and_the_file(shop, detector, tmp_path):
    "A tuned F travels in the file and gives the same scores without any weights at hand"
    both = fit(shop / "good", CFG.replace(epochs1=1, epochs2=1, batch=8), "tocoad", quantile=.5, progress=False)
    assert both.cfg.method == "two_stage" and both.about["rank"] == 3
    frozen, tuned = detector.F.state_dict(), both.F.state_dict()
    assert any(not torch.equal(frozen[k], tuned[k]) for k in tuned)
    path = save(both, tmp_path / "new/model.safetensors")
    with pytest.MonkeyPatch.context() as m:
        m.setattr("tocoad.method.weights.weights_path", lambda *a: pytest.fail("weights were asked for"))
        back = load(path)
    for d, name in ((both, "a"), (back, "b")):
        score(d, shop / "parts", tmp_path / name, maps=2, progress=False)
    assert (tmp_path / "a/scores.csv").read_bytes() == (tmp_path / "b/scores.csv").read_bytes()
    assert back.about == json.loads(json.dumps(both.about)) and "system        ToCoAD" in back.text()


def test_held_out_parts_are_neither_trained_on_nor_stored(shop, monkeypatch):
    from tocoad.parts import fit as room
    whole, seen = room.learn, []
    monkeypatch.setattr(room, "learn", lambda cfg, images, *a: seen.append(images) or whole(cfg, images, *a))
    d = fit(shop / "good", CFG.replace(coreset=1.), held_out=.5, progress=False)
    everything, names, _, _ = room.read_good(shop / "good", SIZE)
    assert torch.equal(seen[0], everything[12:]) and len(bank(d)) == 12 * 64
    assert set(d.about["highest"]) <= set(names[:12])
    inside, held = (d.judge(x)[0] for x in (everything[12:], everything[:12]))
    assert inside.max() < 1e-3 * held.min() and torch.allclose(held.sort().values, d.held, rtol=1e-4)


def test_a_score_depends_on_its_picture_alone(detector, parts, tmp_path):
    "Not on the batch, the file order, the company, or the folder"
    for batch in (1, 5, 64):
        score(detector, parts, tmp_path / f"out{batch}", maps=0, batch=batch, progress=False)
    one = scores(tmp_path / "out1")
    for batch in (5, 64):
        other = scores(tmp_path / f"out{batch}")
        assert set(other) == set(one) and np.allclose([other[n] for n in one], list(one.values()), rtol=1e-5, atol=0)
    names = sorted(one, reverse=True)
    for i, name in enumerate(names):
        (parts / name).rename(parts / f"{i:02}.png")
    score(detector, parts, tmp_path / "renamed", maps=0, batch=7, progress=False)
    renamed = scores(tmp_path / "renamed")
    new = [renamed[f"{i:02}.png"] for i in range(12)]
    assert np.allclose(new, [one[n] for n in names], rtol=1e-5, atol=0)


def bomb(side):
    "A PNG of some bytes that claims side x side pixels"
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head, body = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), zlib.compress(b"0" * 99)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_unreadable_pictures_become_rows(detector, parts, tmp_path):
    whole = (parts / "new/good 00.png").read_bytes()
    bad = {"cut.png": whole[:len(whole) // 2], "void.jpg": b"", "text.png": b"dear reader", "bomb.png": bomb(60_000)}
    for name, data in bad.items():
        (parts / name).write_bytes(data)
    second = Image.new("RGB", (SIZE, SIZE))
    Image.open(parts / "new/good 00.png").save(parts / "film.png", save_all=True, append_images=[second])
    os.symlink("nowhere.png", parts / "dead.png")
    bad |= {"film.png": 0, "dead.png": 0}
    s = score(detector, parts, tmp_path / "out", progress=False)
    table = rows(tmp_path / "out")
    assert (s.unreadable, s.images) == (6, 18) and "6 images of 18 could not be read, first bomb.png" in s.problem
    assert {r["path"] for r in table[-6:]} == set(bad)
    for r in table[-6:]:
        assert (r["decision"], r["rank"], r["score"], r["heat_map"]) == ("unreadable", "", "", "")
        assert r["note"] and str(parts) not in r["note"]
    assert all(r["note"] == "" for r in table[:-6]) and len(list((tmp_path / "out/maps").iterdir())) == 12


def test_any_kind_of_picture_and_name(detector, parts, tmp_path):
    im = Image.open(parts / "new/good 00.png").convert("RGB")
    deep = Image.fromarray(np.asarray(im.convert("L")).astype(np.uint16) * 257)
    names = {"größe 字 😀.png": im, "x" * 240 + ".png": im, "=1+1,\"q\".png": im, "new\nline.png": im, "UPPER.PNG": im,
             "wide.jpg": im.resize((1500, 90)), "one.png": im.resize((1, 1)), "grey.bmp": im.convert("L"),
             "alpha.png": im.convert("RGBA"), "palette.png": im.convert("P"), "ink.tif": im.convert("CMYK"),
             "bit.png": im.convert("1"), "deep.png": deep}
    for name, x in names.items():
        x.save(parts / name)
    with open(os.fsencode(parts) + b"/latin\xe9.png", "wb") as f:
        f.write((parts / "new/good 00.png").read_bytes())
    s = score(detector, parts, tmp_path / "out", maps=100, progress=False)
    table = rows(tmp_path / "out")
    written = ["'" * n.startswith("=") + n for n in names] # a cell that begins so is a formula
    assert (s.images, s.unreadable) == (26, 1) and {r["path"] for r in table} >= {*written, "latin\\udce9.png"}
    deep, = (r for r in table if r["path"] == "deep.png") # 16 bits, where the detector learnt from 8
    assert deep["score"] == "" and "more or fewer bits a channel than the good parts" in deep["note"]
    table.remove(deep)
    same = [float(r["score"]) for r in table if r["path"] in written[:5] + ["latin\\udce9.png", "new/good 00.png"]]
    assert len(same) == 7 and np.ptp(same) == 0
    maps = [r["heat_map"] for r in table]
    assert len(set(maps)) == 25
    assert all((tmp_path / "out" / m).is_file() and len(Path(m).name.encode()) < 200 for m in maps)
    shape = {r["path"]: Image.open(tmp_path / "out" / r["heat_map"]).size for r in table}
    assert shape["wide.jpg"] == (768, 46) and shape["one.png"] == (256, 256)
    assert any("another shape" in w for w in s.warnings)


def test_loops_and_the_results_themselves(detector, parts):
    "Links that lead in circles end, and results inside the folder of parts are not scored"
    for name, target in {"new/again": parts, "old/up": "..", "me": "me"}.items():
        os.symlink(target, parts / name)
    first = score(detector, parts, parts / "results", maps=12, progress=False)
    second = score(detector, parts, parts / "results", maps=3, progress=False)
    assert first.images == second.images == 12 and len(list((parts / "results/maps").iterdir())) == 3
    for out in (parts, parts / "new/../"):
        with pytest.raises(BadInput, match="among the images"):
            score(detector, parts, out)


def test_foreign_files_stay(detector, parts, tmp_path):
    "A later run replaces what an earlier one wrote, and nothing else"
    out = tmp_path / "out"
    (out / "maps").mkdir(parents=True)
    mine = {"maps/diary.txt": b"dear", "maps/holiday.png": b"the sea", "notes.csv": b"1,2"}
    for name, data in mine.items():
        (out / name).write_bytes(data)
    for maps in (12, 2):
        done = score(detector, parts, out, maps=maps, progress=False)
        ours = {Path(m).name for m in done.heat_maps.values()}
        assert {p.name for p in (out / "maps").iterdir()} == {"diary.txt", "holiday.png"} | ours
    assert len(done.heat_maps) == 2 and all((out / n).read_bytes() == d for n, d in mine.items())
    before = (out / "scores.csv").read_bytes()
    (out / "summary.json").write_text("{}")
    with pytest.raises(BadInput, match="scores.csv was not written by `tocoad score`"):
        score(detector, parts, out, progress=False)
    assert (out / "scores.csv").read_bytes() == before and (out / "summary.json").read_text() == "{}"


def test_an_interrupted_run_leaves_the_old_results(detector, parts, tmp_path, monkeypatch):
    out, calls = tmp_path / "out", []
    def state(): return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    def stop(self, x):
        calls.append(len(x))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return torch.zeros(len(x), 1 + SIZE * SIZE)
    def full(*a): raise OSError(28, "No space left on device")
    def interrupted():
        with monkeypatch.context() as m:
            m.setattr(Detector, "rows", stop)
            with pytest.raises(KeyboardInterrupt):
                score(detector, parts, out, batch=2, progress=False)
    interrupted()
    assert calls == [2, 2, 2] and state() == {}
    score(detector, parts, out, progress=False)
    before = state()
    calls.clear()
    interrupted()
    with monkeypatch.context() as m:
        m.setattr("tocoad.parts.score._write_scores", full)
        with pytest.raises(BadInput, match="No space left on device"):
            score(detector, parts, out, progress=False)
    assert state() == before


def test_an_interruption_at_any_step_of_the_swap_leaves_the_old_results(tmp_path, monkeypatch):
    out = tmp_path / "out"
    def state(): return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    def write(n):
        with results(out) as aside:
            for name in ("scores.csv", f"maps/{n}.png", "maps/both.png"):
                (aside / name).write_text(str(n))
            made = dict(what=MARK, heat_maps=[f"maps/{n}.png", "maps/both.png"])
            (aside / "summary.json").write_text(json.dumps(made | dict(n=n)))
    write(1)
    (out / "maps" / "2.png").write_text("mine")
    before, moved = state(), os.replace
    for after in (False, True):
        for step in range(9):
            left = [step]
            def stop(a, b, left=left, after=after):
                left[0] -= 1
                if left[0] == -1:
                    if after:
                        moved(a, b)
                    raise KeyboardInterrupt
                moved(a, b)
            with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
                m.setattr(os, "replace", stop)
                write(2)
            assert state() == before, step
    write(2)
    assert {k: v for k, v in state().items() if k != "summary.json"} == {
        "scores.csv": b"2", "maps/2.png": b"2", "maps/both.png": b"2"}


def test_two_runs_at_once(detector, parts, tmp_path, monkeypatch):
    "The later one stays, whole, and nothing of the other"
    out, room = tmp_path / "out", sys.modules["tocoad.parts.score"]
    inner, write = [], room._write_scores
    def meanwhile(*a):
        "Another run, from its first step to its last"
        monkeypatch.setattr(room, "_write_scores", write)
        inner.append(score(detector, parts, out, maps=12, progress=False))
        write(*a)
    monkeypatch.setattr(room, "_write_scores", meanwhile)
    later = score(detector, parts / "old", out, maps=2, progress=False)
    assert len(inner[0].heat_maps) == 12 and len(rows(out)) == later.images == 3
    assert {f"maps/{p.name}" for p in (out / "maps").iterdir()} == set(later.heat_maps.values())
    assert sorted(p.name for p in out.iterdir()) == ["maps", "report.html", "scores.csv", "summary.json", "worst.png"]


def test_memory_running_out_halves_the_batch(detector, parts, tmp_path, monkeypatch, caplog):
    whole, tried = Detector.rows, []
    def small(self, x):
        tried.append(len(x))
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, x)
    score(detector, parts, tmp_path / "a", maps=0, progress=False)
    monkeypatch.setattr(Detector, "rows", small)
    score(detector, parts, tmp_path / "b", maps=0, batch=8, progress=False)
    assert np.allclose(list(scores(tmp_path / "a").values()), list(scores(tmp_path / "b").values()), rtol=1e-5)
    assert tried[:3] == [8, 4, 2] and 4 not in tried[3:] and 8 not in tried[3:]
    assert caplog.text.count("memory ran out") == 2


@pytest.mark.parametrize("most", [0, 3, 100])
def test_an_image_is_judged_once(detector, parts, tmp_path, monkeypatch, most):
    "And the maps that are drawn and kept as numbers are those of the highest scores"
    judged, rows_of = [], Detector.rows
    monkeypatch.setattr(Detector, "rows", lambda self, x: judged.append(len(x)) or rows_of(self, x))
    found = score(detector, parts, tmp_path / "out", most, progress=False, arrays=True)
    known = [n for n, s, _ in found.scores if s is not None]
    assert sum(judged) == len(known) and list(found.heat_maps) == known[:most]
    if most:
        kept = np.load(tmp_path / "out" / "maps.npz")
        assert list(kept["paths"]) == known[:most]
        for name, heat in zip(kept["paths"], kept["maps"], strict=True):
            assert np.array_equal(heat, detector(parts / str(name)).map)


@pytest.mark.parametrize("room, at_once", [(1, 1), (10**9, 2)])
def test_large_pictures_are_drawn_one_after_the_other(detector, parts, tmp_path, monkeypatch, room, at_once):
    now, seen, picture = [], [], score_room._picture
    def slow(*args):
        "Note how many are in memory"
        now.append(1)
        seen.append(len(now))
        time.sleep(.02)
        now.pop()
        return picture(*args)
    monkeypatch.setattr(score_room, "IN_FLIGHT", InFlight(room))
    monkeypatch.setattr(score_room, "_picture", slow)
    score(detector, parts, tmp_path / "out", progress=False)
    assert max(seen) == 1 if at_once == 1 else max(seen) >= at_once


def rss():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_does_not_grow(shop):
    "Thousands of pictures through decoding, network and memory"
    d = fit(shop / "good", CFG.replace(resize=32, size=32), progress=False)
    pixels = [np.random.default_rng(i).integers(0, 256, (3, 32, 32), np.uint8) for i in range(16)]
    def stream(n):
        "Rows of n images"
        items = decoded((str(i) for i in range(n)), lambda i: pixels[int(i) % 16].copy())
        return scored(items, d.rows, 64)
    stream(600)
    before, start = rss(), time.process_time()
    assert len(stream(4000)) == 4000
    assert rss() - before < 12 and time.process_time() - start < 120


def test_copies_grey_and_few(shop, tmp_path):
    good = Path(shutil.copytree(shop / "good", tmp_path / "good"))
    for k in range(24):
        Image.open(good / f"good {k:02}.png").save(good / f"copy {k}.bmp")
    d = fit(good, CFG, progress=False)
    assert (d.about["images"]["copies"], d.about["images"]["train"] + d.about["images"]["held_out"]) == (24, 24)
    assert any("24 images left out as exact copies" in n for n in d.about["notes"]) and d.held.min() > 1
    lay_out(tmp_path / "grey", 5, category="gravel")
    d = fit(tmp_path / "grey", CFG, most=5, progress=False)
    assert (d.about["images"]["train"], d.about["images"]["held_out"], d.about["false_alarms"][0]) == (4, 1, .5)
    for note in ("all images are grey", "only 1 good image held out"):
        assert f"note: {note}" in d.text()
    d = fit(good, CFG, most=10, quantile=.5, progress=False)
    assert sum(d.about["images"][k] for k in ("train", "held_out", "copies")) == 10
    assert any("48 good images were found and 10 of them used" in n for n in d.about["notes"])


def test_the_promise_about_false_alarms():
    "Over many splits, the share of new good scores above the threshold is as promised, whatever the distribution"
    rng = np.random.default_rng(0)
    for n, q in ((9, .9), (30, .9), (20, .99)):
        k, s = rank(n, q), np.sort(rng.lognormal(size=(20_000, n)), 1)
        assert abs((rng.lognormal(size=20_000) > s[:, k - 1]).mean() - (n + 1 - k) / (n + 1)) < .006


def test_mistakes_are_one_sentence(detector, shop, tmp_path):
    for folder in ("four", "void"):
        (tmp_path / folder).mkdir()
    for k in range(LEAST - 1):
        shutil.copy(shop / f"good/good {k:02}.png", tmp_path / "four")
    note, good, out = tmp_path / "note.txt", shop / "good", tmp_path / "out"
    note.write_text("x")
    mistakes = {
        "there is no folder": lambda: fit(tmp_path / "none", CFG),
        "holds 4 images": lambda: fit(tmp_path / "four", CFG),
        "the system cannot be": lambda: fit(good, CFG, "one"),
        "quantile is 1.5": lambda: fit(good, CFG, quantile=1.5),
        "held_out is 0": lambda: fit(good, CFG, held_out=0),
        "no device": lambda: fit(good, CFG, device="abacus"),
        "is not there": lambda: load(tmp_path / "none"),
        "is no detector of version 1": lambda: load(note),
        "exists and is no detector": lambda: save(detector, note),
        "cannot write": lambda: save(detector, note / "model"),
        "give another": lambda: score(detector, shop / "parts", note),
        "holds no images": lambda: score(detector, tmp_path / "void", out)}
    for match, mistake in mistakes.items():
        with pytest.raises(BadInput, match=match) as e:
            mistake()
        assert "\n" not in str(e.value)
    assert note.read_text() == "x" and not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]


def test_a_damaged_file_never_loads(detector, tmp_path):
    "Cut anywhere, or with a bit turned anywhere, it is refused in a sentence"
    data, rng = save(detector, tmp_path / "m").read_bytes(), np.random.default_rng(0)
    start = 8 + int.from_bytes(data[:8], "little")
    def refused(content):
        (tmp_path / "damaged").write_bytes(content)
        with pytest.raises(BadInput, match="cut off or damaged"):
            load(tmp_path / "damaged")
    for at in (0, 7, 100, len(data) // 2, len(data) - 1):
        refused(data[:at])
    for at in (*range(3, 12), *rng.integers(0, start, 12), *rng.integers(start, len(data), 6)):
        turned = bytearray(data)
        turned[at] ^= 1 << int(rng.integers(8))
        refused(turned)


def test_summary_reads_well():
    s = Summary(2., [("a.png", 3., ""), ("b.png", 1., ""), ("c.png", 1., "")], {}, [], seconds=1.)
    assert s.text().startswith("3 images: 1 above the threshold 2, 2 below, 0 unreadable; 3.0 images a second")
    assert "1.50 x threshold  a.png" in s.text()


@pytest.mark.parametrize("quantile", [1e-10, 1e-300, .5, 1 - 1e-12])
def test_every_quantile_gives_a_threshold(shop, tmp_path, quantile):
    d = fit(shop / "good", CFG, quantile=quantile, progress=False)
    assert 1 <= d.about["rank"] <= len(d.held) and all(0 < x <= 1 for x in d.about["false_alarms"])
    assert d.threshold > d.held[d.about["rank"] - 1]
    assert len(score(d, shop / "parts", tmp_path / "out", progress=False).scores) == 12


@pytest.mark.parametrize("wrong", [
    dict(quantile=float("nan")), dict(quantile=0), dict(quantile="most"), dict(held_out=float("inf")), dict(held_out=1),
    dict(most=5.5), dict(most=float("inf")), dict(most=4), dict(most=None), dict(patches=0), dict(patches=.5)], ids=str)
def test_a_share_or_number_that_is_none_is_named(shop, wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))) as e:
        fit(shop / "good", CFG, progress=False, **wrong)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("patches", [1, 30, 10**6, None])
def test_a_memory_keeps_at_most_so_many_patches_and_never_more_than_its_share(shop, patches):
    d = fit(shop / "good", CFG, patches=patches, progress=False)
    every, share = d.about["learned"]["memory"]["patches"], len(bank(fit(shop / "good", CFG, progress=False)))
    assert len(bank(d)) == min(share, patches or share) == d.about["learned"]["memory"]["kept"]
    assert every == 19 * (SIZE // 8)**2 and f"kept {len(bank(d))}" in d.text().replace(",", "")


def test_the_help_names_the_limit(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    assert f"default: {KEPT:,}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("words, kept", [((), "most"), (("--patches", "7"), 7), (("--set", "coreset=0.5"), "half"),
                                         (("--set", "coreset=0.5", "--patches", "7"), 7)], ids=str)
def test_a_share_that_was_asked_for_is_kept(shop, tmp_path, monkeypatch, words, kept):
    monkeypatch.setattr("tocoad.parts.fit.KEPT", 11)
    words = ["fit", "--good", shop / "good", "--model", tmp_path / "m", "--profile", "smoke", "--quiet", *words]
    at = words.index("--set") + 1 if "--set" in words else len(words)
    words[at:at] = [f"size={SIZE}"] if "--set" in words else ["--set", f"size={SIZE}"]
    assert main([*map(str, words)]) == 0
    said = load(tmp_path / "m").about["learned"]["memory"]
    assert said["kept"] == dict(most=11, half=said["patches"] // 2).get(kept, kept)


@pytest.mark.parametrize("score_of_all", [0., float("nan"), float("inf")])
def test_a_threshold_without_meaning_is_refused(shop, tmp_path, monkeypatch, score_of_all):
    "Scores of constant images may all be 0; nothing can be so many times 0"
    row = torch.full((1, 1 + SIZE * SIZE), score_of_all)
    monkeypatch.setattr(Detector, "rows", lambda self, images: row.expand(len(images), -1))
    with pytest.raises(BadInput, match="the threshold of 5 .* would be .*: give good images that differ"):
        fit(shop / "good", CFG, progress=False)


@pytest.mark.parametrize("threshold", [0., -1., float("nan"), float("inf")])
def test_a_model_file_with_such_a_threshold_is_refused(shop, tmp_path, threshold):
    d = fit(shop / "good", CFG, progress=False)
    d.about["threshold"] = threshold
    with pytest.raises(BadInput, match="is no detector of version 1"):
        load(save(d, tmp_path / "model"))


@pytest.mark.parametrize("name", ["n" * 240, "ö" * 120, "\udcfcber"], ids=ascii)
def test_parts_may_lie_in_any_folder(shop, tmp_path, name):
    "Its name becomes that of the detector, as far as it can"
    folder = shutil.copytree(shop / "good", tmp_path / name)
    d = load(save(fit(folder, CFG, progress=False), tmp_path / "model"))
    assert 1 <= len(d.cfg.category.encode()) <= 150


def test_constant_images_are_fitted_or_refused(tmp_path):
    for k in range(8):
        Image.fromarray(np.full((SIZE, SIZE, 3), 100 + k, np.uint8)).save(tmp_path / f"{k}.png")
    assert fit(tmp_path, CFG, progress=False).threshold > 0
    with pytest.raises(BadInput, match="the memory holds one patch"):
        fit(tmp_path, CFG.replace(scorer="paper", coreset=1e-6), progress=False)
    with pytest.raises(BadInput, match="G called 0 of [0-9]+ pixels anomalous"):
        fit(tmp_path, CFG.replace(generator="cutpaste", jitter=0., epochs1=1), "tocoad", progress=False)
