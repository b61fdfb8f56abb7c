"What a stored result depends on, and what it survives"
import ast
import os
import re
import shutil

import pytest

from tocoad.run import config, keys
from tocoad.run.keys import STAGES, chain, code_of_stage
from tocoad.run.source import REGISTRIES, fingerprint, sources
from tocoad.systems.settings import Config
from tocoad.systems.system import TOCOAD

NOW = sources()
EVERY = set(STAGES)
SCORED = {"memory", "scores", "curve", "tour"}
JUDGED = {"metrics", "redraws", "difference", "gallery"}


def changed(text):
    "A module each of whose functions and classes does something more"
    tree = ast.parse(text)
    for n in ast.walk(tree):
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)):
            n.body.append(ast.Expr(ast.Constant(0)))
    return ast.unparse(tree)


def touched(edited, chosen=None):
    "The stages whose code is another after an edit"
    code = lambda stage, texts: fingerprint(stage.function, texts, chosen)
    return {s for s, stage in STAGES.items() if code(stage, edited) != code(stage, NOW)}


@pytest.mark.parametrize("room,stages", [
    ("method.perlin", {"stage1", "stage2", "tour"}), ("method.cutpaste", {"stage1", "stage2", "tour"}),
    ("method.nsa", {"stage1", "stage2", "tour"}), ("method.contrast", {"stage2", "contrastive", "tour"}),
    ("method.finetune", {"stage2", "contrastive"}), ("method.features", EVERY - JUDGED),
    ("method.memory", SCORED), ("method.coreset", SCORED - {"tour"}), ("method.weights", EVERY - JUDGED),
    ("measure.metrics", {"metrics", "redraws", "curve"}),
    ("measure.intervals", {"redraws", "difference"}),
    ("data.layouts", set()), ("data.archives", set()), ("data.mini", set()), ("data.load", set()),
    ("paper.published", set()), ("paper.gaps", set()), ("paper.report", set()), ("paper.drawing", set()),
    ("paper.sheets", set()), ("cli", set()), ("run.config", set()), ("run.store", set()), ("run.compare", set()),
    ("run.report", set())])
def test_an_edit_touches_what_it_can_change(room, stages):
    assert touched(NOW | {room: changed(NOW[room])}) == stages


def test_comments_docstrings_and_what_nobody_calls_touch_nothing():
    docstring = lambda text: re.sub(r'^("""|")(?=[A-Za-z])', r"\1Edited. ", text, count=1, flags=re.M)
    more = "\ndef nobody():\n    return 1\nNOTHING = 2\n"
    edited = {room: "# a remark\n" + docstring(text) + more for room, text in NOW.items()}
    assert touched(edited) == set()


def test_what_runs_when_a_room_is_imported_counts():
    edited = NOW | {"method.contrast": NOW["method.contrast"] + "\nprint()\n"}
    assert touched(edited) == {"stage2", "contrastive", "tour"}


SMOKE = {v for v in vars(config.config("smoke")).values() if isinstance(v, str)}


@pytest.mark.parametrize("name", sorted(REGISTRIES))
def test_a_new_entry_of_a_registry_moves_no_stored_result(name):
    "In a file of its own, with its line in the registry"
    room, _, registry = name.rpartition(".")
    line = "from .mine import Mine\n" if room.startswith("method") else "from ..method.mine import Mine\n"
    first = NOW[room].index("\nfrom ")
    text = NOW[room][:first + 1] + line + NOW[room][first + 1:]
    new = re.sub(rf"^({registry} = {{)", r'\1"mine": Mine, ', text, count=1, flags=re.M)
    assert new != text
    edited = NOW | {room: new, "method.mine": "class Mine:\n    pass\n"}
    assert touched(edited, SMOKE) == set()
    assert touched(edited) != set(), "without knowing the settings every entry counts"


def test_a_run_counts_the_components_that_it_has_and_no_others():
    nsa, cutpaste = ({"generator": g} for g in ("nsa", "cutpaste"))
    edited = NOW | {"method.nsa": changed(NOW["method.nsa"])}
    for change, moved in ((nsa, {"stage1", "stage2"}), (cutpaste, set())):
        cfg = config.config("smoke", **change)
        chosen = {v for v in vars(cfg).values() if isinstance(v, str)}
        assert touched(edited, chosen) - {"tour"} == moved
    a, b = (code_of_stage(TOCOAD["stage1"], config.config("smoke", **g)) for g in (nsa, cutpaste))
    assert a != b


def test_a_stage_reads_only_what_its_key_names():
    "Every setting that a stage is given changes its key, and no other does"
    base = config.config("smoke")
    other = dict(
        backbone="resnet18", norm="imagenet", precision="bf16", compile=True, size=64, seed=1, generator="nsa",
        rotate="none", angle=1., fill=0, scales=(1, 3), threshold=.4, beta=.5, foreground=True, count=2, clean=.5,
        label="full", cutpaste="scar", jitter=.2, gradients="mixed", loss="ce", loss1="ce", gamma=1., alpha=.5,
        contrast="byol", ema=.9, layers=(2, 3), concat=True, pool=2, predictor="mlp", width=64, printed=True,
        view_of="crop", scale=.5, colour=0., lam=.1, lam_alone=.5, bn1="train", bn2="train", freeze=1, train_d=True,
        batch=4, epochs1=3, lr1=.1, epochs2=3, lr2=.1, lr_head=None, curve=1, patches="patchcore", dims=8, coreset=.2,
        project=8, starts=2, scorer="paper", b=3, sigma=1., image_score="map")
    named = {"profile", "dataset", "category", "method", "weights", "textures", "resize", "shorter", "mask"}
    assert set(Config.__dataclass_fields__) - set(other) == named
    for name, stage in STAGES.items():
        key = lambda cfg, data="data", name=name: keys.task(name, cfg, data, "weights").key
        moved = {k for k, v in other.items() if key(base.replace(**{k: v})) != key(base)}
        assert moved == {*stage.fields, "precision"} - {"weights", "textures"}
        assert key(base) != key(base, "other data")


def test_what_judges_counts_how_scores_and_maps_are_read():
    key = lambda **change: {s: t.key for s, t in chain(config.config("smoke", **change), "data", "weights").items()}
    same = lambda **change: {s for s, k in key(**change).items() if key().get(s) == k}
    assert same(sigma=1.) == same(image_score="map") == {"stage1", "stage2", "memory", "scores"}
    assert same() == {"stage1", "stage2", "memory", "scores", "metrics"}


def test_a_registry_that_no_setting_names_counts_whole():
    "Something else chooses then, such as a default"
    edited = NOW | {"method.nsa": changed(NOW["method.nsa"])}
    assert touched(edited, {"no", "such", "entry"}) == {"stage1", "stage2", "tour"}


def test_a_copy_of_the_textures_elsewhere_has_the_same_keys_and_others_of_their_size_and_date_have_not(tmp_path):
    def stage1(folder):
        return chain(config.config("smoke").replace(textures=str(folder)), "d", "w")["stage1"].key
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    for name in ("a.png", "b.png"):
        (first / name).write_bytes(name.encode())
    shutil.copytree(first, second)
    os.utime(second / "a.png", (1, 1))
    assert stage1(first) == stage1(second)
    before = (second / "a.png").stat()
    (tmp_path / "other").write_bytes(b"c.png")
    os.utime(tmp_path / "other", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(tmp_path / "other", second / "a.png")
    assert stage1(first) != stage1(second)
