"A detector of own parts from every system: a new entry of `SYSTEMS` is tested here without a line"
import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from zlib import crc32

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from tocoad.data.errors import BadInput
from tocoad.data.mini import draw
from tocoad.method.features import Features
from tocoad.parts.export import ask_for_onnx, export_onnx, load, save
from tocoad.parts.fit import fit
from tocoad.parts.score import score
from tocoad.run.compare import shown
from tocoad.run.config import config
from tocoad.systems.learned import given, last_of
from tocoad.systems.settings import kinds
from tocoad.systems.system import SYSTEMS, System, find, system_of

SIZE = 64
QUICK = dict(epochs=2, epochs1=1, epochs2=1, steps1=2, steps2=2, batch=4, blocks=2, condition=8, fibre=64, angle=0.,
             width=1 / 16, lr=1e-3, channels=20, gallery=3, coreset=.2, textures="embedded") # of those it has
BASE = config("smoke", resize=SIZE, size=SIZE, sigma=2., epochs1=1, epochs2=1, batch=4, coreset=.2)
WITH_ONNX = {"frozen", "tocoad", "patchcore"}
NAMES = dict( # of the arrays in a model file: how many, and a sum of them
    frozen=(2, 2449183241), tocoad=(2, 2449183241), padim=(3, 420465713), spade=(2, 3031480201),
    patchcore=(2, 2449183241), fapm=(4, 3306842993), rd4ad=(336, 4065441565), draem=(347, 2654029576),
    fastflow=(48, 4071380053), cflow=(43, 2066494633), spr=(95, 1268497684), pyramidflow=(358, 1817248417),
    destseg=(308, 4289885034), vtadl=(78, 2753954855), mmr=(81, 2594950121), fyd=(305, 3722258219))
SEES = {"frozen", "tocoad", "padim", "patchcore", "fapm"} # the others need more images or epochs than these


def settings(key):
    "The cheapest of a system"
    s = SYSTEMS[key]
    own = {k: v for k, v in QUICK.items() if k in kinds(s.kind)}
    return BASE if s.kind is type(BASE) else s.of(BASE, key, **own)


def washers(n, start, defect="good"):
    drawn = [draw("washer", start + k, defect, SIZE)[0] for k in range(n)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop") / "good"
    folder.mkdir()
    for k, x in enumerate(washers(14, 0)):
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(folder / f"{k:02}.png")
    return folder


@pytest.fixture(scope="module")
def parts(): return torch.cat([washers(4, 500), washers(3, 600, "missing_part")])


@pytest.fixture(scope="module", params=SYSTEMS)
def made(request, good, tmp_path_factory):
    "The key of a system, its detector, and the model file"
    d = fit(good, settings(request.param), request.param, device="cpu", progress=False)
    return request.param, d, save(d, tmp_path_factory.mktemp("models") / "m.safetensors")


def test_a_model_file_gives_the_same_bits(made, parts, monkeypatch):
    "And asks for no weights"
    key, d, path = made
    monkeypatch.setattr("tocoad.method.weights.weights_path", lambda *a: pytest.fail("weights were asked for"))
    back = load(path, "cpu")
    for was, now in zip(d.judge(parts), back.judge(parts), strict=True):
        assert now.dtype == torch.float32 and now.isfinite().all() and torch.equal(was, now)
    assert (back.cfg, back.threshold, back.about) == (d.cfg, d.threshold, json.loads(json.dumps(d.about)))
    assert 0 < d.threshold and d.judge(parts)[1].shape == (7, SIZE, SIZE)
    assert system_of(back.cfg) is SYSTEMS[key] and f"system        {SYSTEMS[key].name}" in back.text()


def test_scores_are_those_of_the_stages_of_a_run(made, good, parts):
    "Each called as a run calls it, on the images that the detector learned from"
    from tocoad.parts.fit import read_good
    _, d, _ = made
    images = read_good(good, SIZE, seed=d.cfg.seed)[0]
    data = SimpleNamespace(train=SimpleNamespace(images=images[3:]), test=SimpleNamespace(images=parts))
    assert d.about["images"]["held_out"] == 3
    c, got = d.cfg.resolved(), {}
    for name, does in system_of(c).stages_of(c).items():
        before = [got[n] for n in does.needs if n in got]
        got[name] = find(does.function)(given(c, does), data, before, {}, "cpu", False)
    image, maps = shown(last_of(c), got[name][1])
    least = np.float32(last_of(c).does.least)
    assert all(np.array_equal(x, y - least) for x, y in zip(d.judge(parts), (image, maps), strict=True))
    assert image.min() >= least


def test_a_score_depends_on_its_picture_alone(made, parts):
    _, d, _ = made
    scores, maps = d.judge(parts)
    for i in ([2], [6, 0], [3, 4, 5]):
        alone, drawn = d.judge(parts[i])
        torch.testing.assert_close(alone, scores[i], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(drawn, maps[i], rtol=1e-3, atol=1e-3)


def test_onnx_runtime_carries_out_f(made, parts, tmp_path, monkeypatch):
    "Whatever a system does with it, and PyTorch does not; a file of that detector is the same as before"
    pytest.importorskip("onnxruntime")
    key, d, path = made
    if d.F is None:
        with pytest.raises(BadInput, match="makes no use of F"):
            load(path, "cpu", "onnxruntime")
        return
    fast, want = load(path, "cpu", "onnxruntime"), d.judge(parts)
    assert torch.equal(load(save(fast, tmp_path / "m"), "cpu").judge(parts)[1], want[1])
    assert callable(fast._arrays)                                      # the graph is made
    if key != "fyd":                                                   # its F lies within its own network
        monkeypatch.setattr(Features, "forward", lambda *a: pytest.fail("PyTorch carried out F"))
    for was, now in zip(want, fast.judge(parts), strict=True):
        torch.testing.assert_close(now, was, rtol=1e-3, atol=1e-4 * float(was.abs().max()))


def test_the_threshold_is_the_held_out_parts(made, good):
    "Of good parts that nothing was learned from, and of nothing else"
    from tocoad.parts.fit import read_good
    _, d, _ = made
    held = d.judge(read_good(good, SIZE, seed=d.cfg.seed)[0][:3])[0].sort().values
    torch.testing.assert_close(held, d.held, rtol=1e-4, atol=1e-6)
    assert d.threshold == pytest.approx(float(d.held[-1]), rel=1e-4) and d.threshold > float(d.held[-1])
    assert d.about["low"] < d.about["limit"]


def test_a_missing_part_scores_above_good_ones(made, parts):
    key, d, _ = made
    scores = d.judge(parts)[0]
    assert key not in SEES or scores[4:].median() > scores[:4].max()


def test_a_folder_is_scored(made, parts, tmp_path):
    "With heat maps, from a file that another process reads"
    key, d, path = made
    for k, x in enumerate(parts[2:6]):
        (tmp_path / "parts").mkdir(exist_ok=True)
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(tmp_path / f"parts/{k}.png")
    done = score(load(path, "cpu"), tmp_path / "parts", tmp_path / "out", maps=2, progress=False)
    assert (done.images, done.unreadable, len(done.heat_maps)) == (4, 0, 2)
    want = dict(zip((f"{k}.png" for k in range(4)), d.judge(parts[2:6])[0].tolist(), strict=True))
    assert {n: s for n, s, _ in done.scores} == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_arrays_keep_their_names(made):
    "Files that were saved have them under these"
    key, d, _ = made
    names = sorted(f"{stage}/{name}" for stage, (_, arrays) in d.state.items() for name in arrays)
    found = len(names), crc32(" ".join(names).encode())
    assert found == NAMES.get(key, found), "earlier files cannot be loaded any more"


@pytest.mark.slow
def test_another_process_gives_the_same_bits(made, parts, tmp_path):
    _, d, path = made
    torch.save(parts, tmp_path / "x.pt")
    code = ("import sys, torch; from tocoad.parts.export import load; torch.set_num_threads(1); "
            "torch.save(load(sys.argv[1], 'cpu').judge(torch.load(sys.argv[2])), sys.argv[3])")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    want = d.judge(parts)
    torch.set_num_threads(threads)
    subprocess.run([sys.executable, "-c", code, path, tmp_path / "x.pt", tmp_path / "y.pt"], check=True)
    for was, now in zip(want, torch.load(tmp_path / "y.pt"), strict=True):
        assert torch.equal(was, now)


def test_a_file_names_its_system_and_settings(made):
    key, d, path = made
    with safe_open(path, "pt") as f:
        meta = f.metadata()
    said = json.loads(meta["about"])["config"]
    assert (meta["format"], meta["version"]) == ("tocoad-detector", "1")
    assert (said["method"], said["size"]) == ({"tocoad": "two_stage"}.get(key, key), SIZE)


def test_no_onnx_is_a_sentence(made, tmp_path):
    key, d, _ = made
    if key in WITH_ONNX:
        pytest.skip("it has one")
    with pytest.raises(BadInput, match=f"^{SYSTEMS[key].name} as it is set has no ONNX form") as e:
        export_onnx(d, tmp_path / "m")
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


@pytest.mark.slow # that of the zero line is tested beside the other own parts
@pytest.mark.parametrize("key", sorted(WITH_ONNX - {"frozen"}))
def test_onnx_equals_the_detector(good, parts, tmp_path, key):
    rt = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    d = fit(good, settings(key), key, device="cpu", progress=False)
    session = rt.InferenceSession(export_onnx(d, tmp_path / "m"))
    score, defect, maps = session.run(None, {"images": parts.permute(0, 2, 3, 1).numpy()})
    want, drawn = d.judge(parts)
    np.testing.assert_allclose(score, want, rtol=1e-4)
    np.testing.assert_allclose(maps, drawn, rtol=1e-4, atol=1e-4 * float(want.max()))
    assert np.array_equal(defect, want > d.threshold)


@pytest.mark.parametrize("key,change", [("tocoad", dict(image_score="map")), ("patchcore", dict(b=3))])
def test_a_score_that_is_not_the_worst_patchs_has_no_onnx(key, change):
    with pytest.raises(BadInput, match="as it is set has no ONNX form"):
        ask_for_onnx(settings(key).replace(**change))


def test_a_system_of_ones_own(good, parts, tmp_path, monkeypatch):
    "It names nothing of fitting, and has all of it; without its entry a file is refused by its name"
    padim = SYSTEMS["padim"]
    last = replace(padim.stages["padim_scores"], prepared="")
    mine = System("Mine", padim.stages | dict(padim_scores=last), padim.settings)
    monkeypatch.setitem(SYSTEMS, "mine", mine)
    d = fit(good, mine.of(BASE, "mine", channels=20), "mine", device="cpu", progress=False)
    back = load(save(d, tmp_path / "m"), "cpu")
    usual = fit(good, settings("padim"), "padim", device="cpu", progress=False)
    assert torch.equal(back.judge(parts)[0], usual.judge(parts)[0]) and back.threshold == usual.threshold
    monkeypatch.delitem(SYSTEMS, "mine")
    with pytest.raises(BadInput, match="the system of .* cannot be 'mine': take ") as e:
        load(tmp_path / "m", "cpu")
    assert "\n" not in str(e.value)


def test_a_file_of_the_time_when_there_was_one_system(good, parts, tmp_path):
    "Its bank had no stage's name, nothing was said of stages, and a score was always a patch's"
    from tocoad.parts import export
    d = fit(good, BASE, device="cpu", progress=False)
    tensors = {f"F.{k}": v.contiguous() for k, v in d.F.state_dict().items()}
    tensors |= dict(bank=torch.from_numpy(d.state["memory"][1]["bank"]), held=d.held)
    about = {k: v for k, v in d.about.items() if k != "learned"} | dict(stages="none", training={})
    about["images"] = about["images"] | d.about["learned"]["memory"]
    said = json.dumps(about | dict(config=export.asdict(d.cfg.replace(image_score="map"))))
    meta = export.KIND | dict(about=said, content=export._content(said, tensors))
    (tmp_path / "old").write_bytes(export.to_bytes(tensors, meta))
    back = load(tmp_path / "old", "cpu")
    for was, now in zip(d.judge(parts), back.judge(parts), strict=True):
        assert torch.equal(was, now)
    assert (back.threshold, back.cfg) == (d.threshold, d.cfg)
    assert back.text() == d.text()


@pytest.mark.parametrize("system,pairs,says", [
    ("pad", [], "--system cannot be 'pad': take padim"),
    ("padim", ["padim.channels=0"], "channels must be a whole number from 1"),
    ("padim", ["spade.gallery=3"], "PaDiM has no such setting; its own are written padim.NAME"),
    ("padim", ["coreset=0.1"], "PaDiM has no such setting; its own are written padim.NAME"),
    ("frozen", ["padim.channels=3"], "frozen F has no such setting"),
    ("draem", ["draem.width=9"], "width must be a number from"),
    ("rd4ad", ["size=32"], "choose a size of at least 64")])
def test_settings_of_the_command(system, pairs, says):
    from tocoad.cli_parts import settle_own
    with pytest.raises(BadInput, match=says) as e:
        settle_own(system, "smoke", 0, pairs)
    assert "\n" not in str(e.value)


def test_the_command_fits_any_system(good, tmp_path, capsys):
    from tocoad.cli import main
    words = ["fit", "--good", good, "--model", tmp_path / "m", "--system", "padim", "--profile", "smoke", "--quiet",
             "--set", f"size={SIZE}", f"resize={SIZE}", "padim.channels=7"]
    assert main([*map(str, words)]) == 0
    assert "PaDiM, channels 7 (550)" in capsys.readouterr().out
    assert load(tmp_path / "m", "cpu").cfg.channels == 7
    assert main([*map(str, words), "--export", "onnx"]) == 2
    assert "PaDiM as it is set has no ONNX form" in capsys.readouterr().err
