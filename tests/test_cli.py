"""The command as a user meets it: its answers, its record, and one sentence for each mistake."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from tocoad import cli
from tocoad.cli import main
from tocoad.data.layouts import recognise
from tocoad.data.mini import write_mini
from tocoad.data.trees import write_layout
from tocoad.run import config

QUICK = ["--quiet", "--set", "epochs1=1", "epochs2=1", "width=32", "resize=64", "size=64"]
WASHER = ["--category", "washer"]


@pytest.fixture(scope="session")
def mini_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("mini") / "set"
    write_mini(root, size=64)
    return root


@pytest.fixture
def root(mini_root, tmp_path):
    "A copy of one category that a test may damage"
    shutil.copytree(mini_root / "washer", tmp_path / "set" / "washer")
    return tmp_path / "set"


def run(capsys, *words):
    status = main([str(w) for w in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def smoke(capsys, root, out, *more, category="washer", quick=QUICK):
    return run(capsys, "run", "--root", root, "--category", category, "--profile", "smoke", "--out", out, *quick, *more)


def fails(capsys, status, *words, says):
    got, out, err = run(capsys, "run", *words)
    assert got == status and out == "" and "Traceback" not in err
    assert err.startswith("tocoad: ") and err.count("\n") == 1, err
    for s in says:
        assert str(s) in err, err


def test_record(capsys, root, tmp_path):
    status, out, err = smoke(capsys, root, tmp_path / "out", "--json", "--seeds", 0, 1)
    assert status == 0, err
    r = json.loads(out)
    assert {"profile", "dataset", "category", "seeds", "hardware", "config", "methods"} <= set(r)
    assert (r["profile"], r["category"], r["seeds"]) == ("smoke", "washer", [0, 1])
    assert list(r["methods"]) == ["frozen", "contrastive", "two_stage"]
    for name, m in r["methods"].items():
        for k in ("image_auroc", "pixel_auroc", "aupro"):
            assert 0 <= m[k]["mean"] <= 100 and m[k]["std"] >= 0
            if name != "frozen":
                d = m["difference"][k]
                assert d["low"] <= d["mean"] <= d["high"]
                assert d["mean"] == pytest.approx(m[k]["mean"] - r["methods"]["frozen"][k]["mean"], abs=1e-3)
    assert "difference" not in r["methods"]["frozen"]
    endings = (".json", "_curves.png", "_maps.png")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"own_washer_smoke{e}" for e in endings]
    assert json.loads((tmp_path / "out" / "own_washer_smoke.json").read_text())["methods"] == r["methods"]


def test_table(capsys, root, tmp_path):
    status, out, _ = smoke(capsys, root, tmp_path / "out")
    assert status == 0 and "smoke: shows that it runs, is no result" in out
    for word in ("frozen F", "contrastive only", "two-stage", "image AUROC", "AUPRO", "Δ pixel AUROC"):
        assert word in out


@pytest.mark.parametrize("layout", ("visa", "btad", "mvtec_ad_2", "kolektor_sdd", "magnetic_tile", "folder"))
def test_other_layouts(capsys, tmp_path, layout):
    "Recognised, said, named in the record; MVTec AD 2 is not cropped"
    name = recognise(write_layout(tmp_path / "set", layout, traps=True)).categories[0]
    whole = layout == "mvtec_ad_2"
    quick = [*QUICK[:-2], *(["resize=160"] if whole else ["resize=64", "size=32"])]
    more = "--json", "--systems", "frozen"
    status, out, err = smoke(capsys, tmp_path / "set", tmp_path / "out", *more, category=name, quick=quick)
    assert status == 0, err
    r = json.loads(out)
    assert r["dataset"] == dict(folder="own").get(layout, layout) and r["config"]["size"] == (160 if whole else 32)
    assert r["data"]["notes"][0].startswith("recognised as ") and "pixel_auroc" in r["methods"]["frozen"]


def test_same_seed_same_record(capsys, root, tmp_path):
    apart = (["--json", "--store", tmp_path / store] for store in "ab") # nothing of the first is there for the second
    a, b = (json.loads(smoke(capsys, root, tmp_path / "out", *more)[1]) for more in apart)
    assert a["methods"] == b["methods"] and a["data"] == b["data"]


@pytest.mark.parametrize("status,words,says", [
    (1, ["--root", "{tmp}/nowhere", *WASHER], ["nowhere"]),
    (1, ["--root", "{root}", "--category", "wascher"], ["wascher", "washer"]),
    (2, ["--root", "{root}"], ["--category"]),
    (1, ["--root", "{root}", "--dataset", "mvtec", *WASHER], ["mvtec", "mvtec_ad"]),
    (2, ["--set", "epoch2=3"], ["epoch2", "'epochs2'"]),
    (2, ["--set", "epochs2=many"], ["epochs2", "many"]),
    (2, ["--set", "generator=perlim"], ["perlim", "cutpaste"]),
    (2, ["--set", "size=100"], ["size", "32"]),
    (2, ["--set", "lr2=-1"], ["lr2"]),
    (1, ["--quiet", "--set", "backbone=vgg16"], ["vgg16", "resnet18"]),
    (1, ["--quiet", "--set", "weights=none.pth"], ["none.pth"]),
    (1, ["--quiet", "--set", "textures={tmp}/dtd"], ["dtd"]),
    (1, ["--device", "cuda:7", "--quiet"], ["cuda:7"]),
    (1, ["--root", "{root}", *WASHER, "--profile", "smoke", *QUICK, "lr2=1e30"], ["smaller rate"]),
    (2, ["--quiet", "--set", "lr2=1e31"], ["lr2", "1e+30"])])
def test_mistakes(capsys, root, tmp_path, status, words, says):
    words = [w.format(root=root, tmp=tmp_path) for w in words]
    fails(capsys, status, "--out", tmp_path / "out", *words, says=says)


@pytest.mark.parametrize("words,says", [
    (["walk"], "walk"), (["run", "--seeds", "x"], "--seeds"), (["score", "--model", "m"], "--images, --out"),
    (["score", "--model", "m", "--images", "i", "--out", "o", "--maps", "one"], "invalid int value"),
    (["data"], "ACTION"), (["fit", "--good", "g", "--model", "m", "--export", "tflite"], "'onnx'")])
def test_wrong_words(capsys, words, says):
    "What the parser finds is one sentence too"
    with pytest.raises(SystemExit) as e:
        main(words)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("tocoad: ") and err.count("\n") == 1 and says in err


def test_settings_add_up(capsys):
    "Where an option is given twice, and where it replaces a default"
    from tocoad.command import parser
    words = "run --set lr2=1e-3 bn2=train --set epochs2=3 --seeds 1 2 --json".split()
    given = vars(parser(cli.COMMANDS, cli.GROUPS).parse_args(words))
    assert given == dict(call=cli.run, set_=["lr2=1e-3", "bn2=train", "epochs2=3"], seeds=[1, 2], json_=True)


def test_empty_train(capsys, root, tmp_path):
    for p in (root / "washer" / "train" / "good").iterdir():
        p.unlink()
    fails(capsys, 1, "--root", root, *WASHER, "--out", tmp_path / "out", says=["train", "good"])


def test_corrupt_image(capsys, root, tmp_path):
    bad = sorted((root / "washer" / "train" / "good").iterdir())[3]
    bad.write_bytes(bad.read_bytes()[:200])
    fails(capsys, 1, "--root", root, *WASHER, "--out", tmp_path / "out", says=[bad.name])


def test_mask_of_another_size(capsys, root, tmp_path):
    mask = sorted((root / "washer" / "ground_truth").rglob("*.png"))[0]
    Image.fromarray(np.zeros((10, 12), np.uint8)).save(mask)
    says = [mask.name, "12 x 10", "64 x 64"]
    fails(capsys, 1, "--root", root, *WASHER, "--out", tmp_path / "out", says=says)


def test_no_masks(capsys, root, tmp_path):
    shutil.rmtree(root / "washer" / "ground_truth")
    status, out, err = smoke(capsys, root, tmp_path / "out")
    assert status == 0 and "mask" in out.split("Note:", 1)[1], err
    tuned = json.loads(smoke(capsys, root, tmp_path / "out", "--json")[1])["methods"]["two_stage"]
    assert tuned["image_auroc"]["mean"] is not None and "pixel_auroc" not in tuned
    assert list(tuned["difference"]) == ["image_auroc"]


def test_output_folder_is_a_file(capsys, tmp_path):
    (tmp_path / "out").write_text("")
    fails(capsys, 1, "--out", tmp_path / "out", says=["out", "--out"])


ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.mark.skipif(ROOT and not shutil.which("chattr"), reason="root may write anywhere")
def test_read_only_output(capsys, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    if not ROOT:
        out.chmod(0o500)
    elif subprocess.run(["chattr", "+i", out], capture_output=True).returncode:
        pytest.skip("this file system cannot protect a folder from root")
    try:
        fails(capsys, 1, "--out", out, says=["out", "choose another folder"])
    finally:
        subprocess.run(["chattr", "-i", out], capture_output=True)
        out.chmod(0o700)


def test_as_a_process(tmp_path):
    "Through the installed command: status, streams, and nothing but the sentence"
    command = [str(Path(sys.executable).parent / "tocoad"), "run", "--root", str(tmp_path / "no"), "--category", "x"]
    p = subprocess.run([*command, "--out", str(tmp_path / "o")], capture_output=True, text=True)
    assert p.returncode == 1 and p.stdout == "" and p.stderr.startswith("tocoad: ") and p.stderr.count("\n") == 1


def test_the_command_knows_the_profiles_there_are():
    assert get_args(cli.Profile) == tuple(config.PROFILES)


def test_one_system_alone_trains_and_draws_nothing_of_training(tmp_path, capsys):
    words = "run --systems frozen --set size=64 resize=64 --quiet".split()
    assert main([*words, "--out", str(tmp_path / "out"), "--store", str(tmp_path / "store")]) == 0
    record = json.loads((tmp_path / "out" / "mini_washer_smoke.json").read_text())
    assert list(record["methods"]) == ["frozen"] and record["training"] == []
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"mini_washer_smoke.json", "mini_washer_smoke_maps.png"}
    assert {p.name for p in (tmp_path / "store").iterdir() if p.is_dir() and p.name != ".busy"} == {
        "memory", "scores", "metrics"}
    assert "_curves.png" not in capsys.readouterr().out
    assert main(["run", "--systems", "frozn"]) == 2
    assert "--systems cannot be 'frozn': take frozen, " in capsys.readouterr().err


NOBODY = """import os, pwd, sys
def nobody(*a): raise KeyError("uid not found")
pwd.getpwuid = nobody
from tocoad.cli import main
sys.exit(main(sys.argv[1:]))"""


def _alone(code, *words, **how):
    "The command in a process without a home folder"
    away = {"HOME", "TOCOAD_CACHE", "TOCOAD_STORE", "XDG_CACHE_HOME"}
    env = {k: v for k, v in os.environ.items() if k not in away}
    return subprocess.run([sys.executable, "-c", code, *words], env=env, capture_output=True, text=True, **how)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no passwd")
@pytest.mark.parametrize("words", (["runs", "list"], ["run", "--systems", "frozen", "--quiet"]), ids=" ".join)
def test_without_a_home_one_sentence_says_what_to_set(tmp_path, words):
    done = _alone(NOBODY, *words, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "set TOCOAD_CACHE" in done.stderr
    assert list(tmp_path.glob("~*")) == []


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_a_reader_that_stops_is_no_error(tmp_path):
    code = "import sys; from tocoad.cli import main; sys.exit(main(['data', 'list']))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
