"Keys of stored results know what stages use of the data's rooms, and nothing else of them"
from types import SimpleNamespace

import pytest

from tocoad.data.load import load
from tocoad.run import config
from tocoad.run.keys import STAGES
from tocoad.run.source import fingerprint, reach, sources
from tocoad.systems.system import find
from tocoad.systems.tocoad import maps_of

NOW, READ = sources(), {"data.images", "data.cache", "data.errors", "data.shape"} # textures are decoded and kept


def moved(room, old, new):
    "The stages whose keys fall when a room's text is edited"
    edited = NOW | {room: NOW[room].replace(old, new)}
    assert edited[room] != NOW[room], f"{old} is not in {room}"
    code = lambda stage, texts: fingerprint(stage.function, texts)
    return {s for s, stage in STAGES.items() if code(stage, edited) != code(stage, NOW)}


@pytest.mark.parametrize("room,old,new", [
    ("data.layouts", "LAYOUTS = {", 'LAYOUTS = {"flat": Layout(holding("flat"), read_folder, "<category>/flat"),'),
    ("data.layouts", "short = (whole := _stem(m))", "short = (whole := m.name)"),
    ("data.mini", "r - 0.56", "r - 0.57"), ("data.mini", "_bevel", "_slope"), ("data.load", "min(32,", "min(16,"),
    ("data.archives", "else 2.5", "else 3.5"), ("data.verify", "w not in (None, n)", "w != n"),
    ("data.sets", "952", "953"), ("data.images", "linewidths=1.2", "linewidths=1.5"),
    ("data.images", "Split({len", "Images({len"), ("data.masks", "c > 0.5", "c > 0")])
def test_a_reader_a_painter_and_a_drawing_move_no_key(room, old, new):
    assert moved(room, old, new) == set()


def test_cropping_moves_every_key_and_decoding_those_that_read_textures():
    assert moved("data.images", "y, x = (H - h) // 2", "y, x = (H - h) // 3") == set(STAGES) - {"difference"}
    assert moved("data.shape", "reversed(size", "iter(size") == set(STAGES) - {"difference"}
    assert moved("data.shape", "max(1, round", "max(2, round") == set(), "which shape is asked for is a setting"
    networks = set(STAGES) - {"metrics", "redraws", "difference", "gallery"}
    assert moved("data.images", "images.float() / 255", "images.float() / 256") == networks
    assert moved("data.images", "Resampling.BILINEAR, box", "Resampling.BICUBIC, box") == {"stage1", "stage2", "tour"}


def test_no_stage_reaches_a_reader():
    for stage in STAGES.values():
        assert {r for r, _ in reach(stage.function, NOW) if r.startswith("data.")} <= READ


class Fields(SimpleNamespace):
    "What a Split holds, and none of its code"
    def __len__(self):
        return len(self.labels)


def test_stages_read_fields_of_the_data_and_run_none_of_its_code():
    "Else the code of Split would have to count as well"
    cfg = config.config("smoke", resize=64, size=64, epochs1=1, epochs2=1, width=32, batch=8, curve=1)
    c = SimpleNamespace(**vars(cfg.resolved()) | dict(metric="pixel_auroc", draws=10))
    fields = ("images", "labels", "masks", "defects", "paths")
    washer = load(category="washer", size=64)
    parts = {k: Fields(**{f: getattr(getattr(washer, k), f) for f in fields}) for k in ("train", "test")}
    data, got = SimpleNamespace(dataset="mini", name="washer", **parts), {}
    def read(x):
        "Numbers, and image scores and maps, of what a last stage left"
        return x[0], dict(zip(("image", "maps"), maps_of(x[1], c), strict=True))
    def run(stage, *needs):
        "A stage after those whose names are given"
        left = [read(got[n]) if STAGES[stage].judges else got[n] for n in needs]
        return find(STAGES[stage].function)(c, data, left, {}, "cpu", False)
    for name, stage, *needs in (
            ("stage1", "stage1"), ("stage2", "stage2", "stage1"), ("alone", "contrastive"), ("M", "memory", "stage2"),
            ("s", "scores", "M", "stage2"), ("M0", "memory"), ("s0", "scores", "M0"), ("metrics", "metrics", "s"),
            ("curve", "curve", "stage2"), ("r", "redraws", "s"),
            ("r0", "redraws", "s0"), ("difference", "difference", "r0", "r"), ("gallery", "gallery", "s0", "s"),
            ("tour", "tour", "stage1", "stage2", "M", "s", "s0")):
        got[name] = run(stage, *needs)
    ran = {"stage1", "stage2", "contrastive", "memory", "scores", "metrics", "redraws", "curve", "difference",
           "gallery", "tour"}
    assert {s.function.rpartition(".")[2] for s in STAGES.values()} <= ran
    assert got["metrics"][0]["image_auroc"] >= 0
