"The ONNX graph is the whole detector: pictures of any size in, as the detector judges them"
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tocoad.cli import main
from tocoad.data.errors import BadInput
from tocoad.data.images import square
from tocoad.data.mini import draw
from tocoad.parts.export import ToScores, ToSquare, export_onnx, load, onnx_of, save
from tocoad.parts.fit import fit
from tocoad.run.config import config

rt = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
SIZE = 64
CFG = config("smoke", resize=SIZE, size=SIZE, sigma=2.)


def washer(k, defect="good", size=96): return draw("washer", k, defect, size)[0]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    for k in range(12):
        Image.fromarray(washer(k)).save(folder / f"{k:02}.png")
    return folder


def same(session, detector, images):
    "Scores, decisions and maps of the graph are the detector's"
    score, defect, heat = session.run(None, {"images": images})
    want = detector(images)
    np.testing.assert_allclose(score, [r.score for r in want], rtol=1e-4)
    np.testing.assert_allclose(heat, [r.map for r in want], rtol=1e-4, atol=1e-4 * score.max())
    assert [bool(d) for d in defect] == [r.decision == "defect" for r in want]


@pytest.mark.parametrize("change", [{}, pytest.param(dict(scorer="paper", b=3), marks=pytest.mark.slow),
                                    pytest.param(dict(patches="patchcore", dims=40), marks=pytest.mark.slow)])
def test_the_graph_equals_the_detector(good, tmp_path, change):
    "Pictures of three sizes, one or several, among them some that were learned from"
    d = fit(good, CFG.replace(**change), progress=False)
    path = export_onnx(d, tmp_path / "model.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    session = rt.InferenceSession(path)
    about = session.get_modelmeta().custom_metadata_map
    assert float(about["threshold"]) == d.threshold and about["input"].startswith("uint8 (N, H, W, 3), RGB")
    same(session, d, np.stack([washer(k) for k in (0, 1, 900)]))
    same(session, d, washer(3, "hole", 200)[None, :150])
    same(session, d, washer(4, size=40)[None])


def test_the_command_takes_onnx_runtime(good, tmp_path):
    "The same order and scores, and the results say which it was"
    model, say = tmp_path / "m.safetensors", lambda *words: main(["score", "--model", str(model), *map(str, words)])
    save(fit(good, CFG, progress=False), model)
    drawn = {"scratch": 3, "good": 5}
    for i, (what, k) in enumerate((w, k) for w, n in drawn.items() for k in range(n)):
        (tmp_path / "parts").mkdir(exist_ok=True)
        Image.fromarray(washer(700 + k, what)).save(tmp_path / f"parts/{i}.png")
    found = {}
    for engine in ("torch", "onnxruntime"):
        words = "--images", tmp_path / "parts", "--out", tmp_path / engine, "--quiet", "--device", "cpu", "--maps", 0
        assert say(*words, "--engine", engine) == 0
        about = json.loads((tmp_path / engine / "summary.json").read_text())
        found[engine] = [(w["path"], pytest.approx(w["score"], rel=1e-4)) for w in about["worst"]]
        assert about["engine"] == engine
    assert len(found["torch"]) == 8 and found["torch"] == [(p, s.expected) for p, s in found["onnxruntime"]]


def test_a_stored_patch_keeps_its_tiny_distance(good):
    "As the difference of two large numbers it would have no digits left"
    d = fit(good, CFG, progress=False)
    kept = torch.from_numpy(d.state["memory"][1]["bank"][:64])
    s, _ = ToScores(d)(kept[None] + torch.tensor([0., 1e-3])[:, None, None])
    assert s[0].abs().max() == 0
    torch.testing.assert_close(s[1], ((kept + 1e-3) - kept).norm(dim=1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(1, 1), (2, 500), (33, 64), (64, 64), (481, 640), (900, 200), (65, 63),
                                   (338, 200), (336, 200)])
def test_resizing_is_that_of_the_readers_to_a_bit(shape):
    pixels = np.random.default_rng(shape[0]).integers(0, 256, (*shape, 3), np.uint8)
    mine = ToSquare(SIZE)(torch.from_numpy(pixels)[None])[0].permute(1, 2, 0) * 255
    assert np.array_equal(mine.round().byte().numpy(), np.asarray(square(Image.fromarray(pixels), SIZE)))


def test_real_pictures_of_another_size(real, tmp_path):
    "Magnetic tiles: grey, not square, each of its own size; good ones stay good"
    tiles = sorted((real / "magnetic_tile/train/good").iterdir())[:24]
    d = fit(tiles[:12], config("laptop", size=96, resize=96, coreset=.02), progress=False)
    session = rt.InferenceSession(export_onnx(d, tmp_path / "tile.safetensors"))
    broken = sorted((real / "magnetic_tile/test").glob("blowhole/*"))[:2]
    for path in (*tiles[12:], *broken):
        same(session, d, np.asarray(Image.open(path).convert("RGB"))[None])


def test_names_keep_the_whole_stem_and_nothing_else_is_overwritten(good, tmp_path, capsys, monkeypatch):
    graph = cache(lambda: export(*given[0], **given[1])) # the detectors are the same, and so are their graphs
    export, given = torch.onnx.export, []
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **options: given.extend((a, options)) or graph())
    words = ["--good", good, "--profile", "smoke", "--quiet", "--export", "onnx", "--set", "size=32"]
    fit_ = lambda name: main([*map(str, ["fit", "--model", tmp_path / name, *words])])
    assert [fit_(n) for n in ("part.v1.safetensors", "part.v2.safetensors", "part.v2.safetensors")] == [0, 0, 0]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "part.v1.onnx", "part.v1.safetensors", "part.v2.onnx", "part.v2.safetensors"]
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    assert fit_("part.v1") == 2 and "part.v1.onnx was not written for part.v1: give" in capsys.readouterr().err
    (tmp_path / "thesis.onnx").write_bytes(b"years")
    assert fit_("thesis.safetensors") == 2 and not (tmp_path / "thesis.safetensors").exists()
    assert {p: p.read_bytes() for p in before} == before
    with pytest.raises(BadInput, match="was not written for"):
        onnx_of(tmp_path / "thesis")


def test_the_threshold_moves_without_a_fit(good, tmp_path, capsys):
    "As if the model had been fitted with it, outline and graph as well"
    model, moved = tmp_path / "m.safetensors", tmp_path / "n.safetensors"
    words = ["fit", "--good", good, "--profile", "smoke", "--quiet", "--set", "size=32"]
    for path, q in ((model, .95), (tmp_path / "direct", .5)):
        assert main([*map(str, [*words, "--model", path, "--quantile", q])]) == 0
    was, direct = model.read_bytes(), load(tmp_path / "direct", "cpu")
    capsys.readouterr()
    run = lambda *w: main([*map(str, ["threshold", "--model", model, *w])])
    assert run("--quantile", .5, "--to", moved, "--export", "onnx") == 0 and model.read_bytes() == was
    said = capsys.readouterr().out
    d = load(moved, "cpu")
    keys = "threshold", "limit", "low", "rank", "false_alarms", "quantile"
    assert [d.about[k] for k in keys] == [direct.about[k] for k in keys]
    assert f"{d.about['false_alarms'][0]:.1%} of good parts expected, below" in said
    graph = rt.InferenceSession(moved.with_suffix(".onnx")).get_modelmeta().custom_metadata_map
    assert float(graph["threshold"]) == d.threshold
    assert run("--false-alarms", .5) == 0 and load(model, "cpu").about == d.about | dict(
        written=load(model, "cpu").about["written"], seconds=load(model, "cpu").about["seconds"])
    for wrong in ((), ("--quantile", .9, "--false-alarms", .1), ("--quantile", 1), ("--false-alarms", 0)):
        assert run(*wrong) == 2 and capsys.readouterr().err.count("\n") == 1
    assert run("--quantile", .5) == 0 and Path(model).exists()
