"""The command as a user meets it: its answers, its record, and one sentence for each mistake."""
import json, os, shutil, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tocoad.cli import main
from tocoad.data.layouts import recognise
from tocoad.data.mini import write_mini
from tocoad.data.trees import write_layout

QUICK = ["--quiet", "--set", "epochs1=1", "epochs2=1", "width=32", "resize=64", "size=64"]


@pytest.fixture(scope="session")
def mini_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("mini")/"set"
    write_mini(root, size=64)
    return root


@pytest.fixture
def root(mini_root, tmp_path):
    "A copy of one category that a test may damage"
    shutil.copytree(mini_root/"washer", tmp_path/"set"/"washer")
    return tmp_path/"set"


def run(capsys, *words):
    status = main([str(w) for w in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def fails(capsys, status, *words, says):
    got, out, err = run(capsys, "run", *words)
    assert got == status and out == "" and "Traceback" not in err
    assert err.startswith("tocoad: ") and err.count("\n") == 1, err
    for s in says: assert str(s) in err, err


def test_record(capsys, root, tmp_path):
    status, out, err = run(capsys, "run", "--root", root, "--category", "washer", "--profile", "smoke", "--json", "--seeds", 0, 1, "--out", tmp_path/"out", *QUICK)
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
    assert sorted(p.name for p in (tmp_path/"out").iterdir()) == [f"own_washer_smoke{e}" for e in (".json", "_curves.png", "_maps.png")]
    assert json.loads((tmp_path/"out"/"own_washer_smoke.json").read_text())["methods"] == r["methods"]


def test_table(capsys, root, tmp_path):
    status, out, _ = run(capsys, "run", "--root", root, "--category", "washer", "--profile", "smoke", "--out", tmp_path/"out", *QUICK)
    assert status == 0 and "smoke: shows that it runs, is no result" in out
    for word in ("frozen F", "contrastive only", "two-stage", "image AUROC", "AUPRO", "Δ pixel AUROC"): assert word in out


@pytest.mark.parametrize("layout", ("visa", "btad", "mvtec_ad_2", "kolektor_sdd", "magnetic_tile", "folder"))
def test_other_layouts(capsys, tmp_path, layout):
    "Recognised, said, named in the record; MVTec AD 2 is not cropped"
    name = recognise(write_layout(tmp_path/"set", layout, traps=True)).categories[0]
    quick = [*QUICK[:-2], *(["resize=160"] if layout == "mvtec_ad_2" else ["resize=64", "size=32"])]
    status, out, err = run(capsys, "run", "--root", tmp_path/"set", "--category", name, "--profile", "smoke", "--json", "--out", tmp_path/"out", *quick)
    assert status == 0, err
    r = json.loads(out)
    assert r["dataset"] == dict(folder="own").get(layout, layout) and r["config"]["size"] == (160 if layout == "mvtec_ad_2" else 32)
    assert r["data"]["notes"][0].startswith("recognised as ") and "pixel_auroc" in r["methods"]["two_stage"]


def test_same_seed_same_record(capsys, root, tmp_path):
    words = ["run", "--root", root, "--category", "washer", "--profile", "smoke", "--json", "--out", tmp_path/"out", *QUICK]
    a, b = (json.loads(run(capsys, *words)[1]) for _ in range(2))
    assert a["methods"] == b["methods"] and a["data"] == b["data"]


def test_missing_root(capsys, tmp_path): fails(capsys, 1, "--root", tmp_path/"nowhere", "--category", "washer", "--out", tmp_path, says=["nowhere"])
def test_unknown_category(capsys, root, tmp_path): fails(capsys, 1, "--root", root, "--category", "wascher", "--out", tmp_path, says=["wascher", "washer"])
def test_no_category(capsys, root, tmp_path): fails(capsys, 2, "--root", root, "--out", tmp_path, says=["--category"])
def test_unknown_dataset(capsys, root, tmp_path): fails(capsys, 1, "--root", root, "--dataset", "mvtec", "--category", "washer", "--out", tmp_path, says=["mvtec", "mvtec_ad"])
def test_unknown_key(capsys, tmp_path): fails(capsys, 2, "--set", "epoch2=3", "--out", tmp_path, says=["epoch2", "'epochs2'"])
def test_wrong_type(capsys, tmp_path): fails(capsys, 2, "--set", "epochs2=many", "--out", tmp_path, says=["epochs2", "many"])
def test_wrong_choice(capsys, tmp_path): fails(capsys, 2, "--set", "generator=perlim", "--out", tmp_path, says=["perlim", "cutpaste"])
def test_wrong_size(capsys, tmp_path): fails(capsys, 2, "--set", "size=100", "--out", tmp_path, says=["size", "32"])
def test_wrong_rate(capsys, tmp_path): fails(capsys, 2, "--set", "lr2=-1", "--out", tmp_path, says=["lr2"])
def test_unknown_backbone(capsys, tmp_path): fails(capsys, 1, "--quiet", "--set", "backbone=vgg16", "--out", tmp_path, says=["vgg16", "resnet18"])
def test_missing_weights(capsys, tmp_path): fails(capsys, 1, "--quiet", "--set", "weights=none.pth", "--out", tmp_path, says=["none.pth"])
def test_missing_textures(capsys, tmp_path): fails(capsys, 1, "--quiet", "--set", f"textures={tmp_path}/dtd", "--out", tmp_path, says=["dtd"])
def test_no_gpu(capsys, tmp_path): fails(capsys, 1, "--device", "cuda:7", "--quiet", "--out", tmp_path, says=["cuda:7"])


def test_diverged(capsys, root, tmp_path):
    fails(capsys, 1, "--root", root, "--category", "washer", "--profile", "smoke", "--out", tmp_path/"out", *QUICK, "lr2=1e30", says=["smaller rate"])


def test_empty_train(capsys, root, tmp_path):
    for p in (root/"washer"/"train"/"good").iterdir(): p.unlink()
    fails(capsys, 1, "--root", root, "--category", "washer", "--out", tmp_path/"out", says=["train", "good"])


def test_corrupt_image(capsys, root, tmp_path):
    bad = sorted((root/"washer"/"train"/"good").iterdir())[3]
    bad.write_bytes(bad.read_bytes()[:200])
    fails(capsys, 1, "--root", root, "--category", "washer", "--out", tmp_path/"out", says=[bad.name])


def test_mask_of_another_size(capsys, root, tmp_path):
    mask = sorted((root/"washer"/"ground_truth").rglob("*.png"))[0]
    Image.fromarray(np.zeros((10, 12), np.uint8)).save(mask)
    fails(capsys, 1, "--root", root, "--category", "washer", "--out", tmp_path/"out", says=[mask.name, "12 x 10", "64 x 64"])


def test_no_masks(capsys, root, tmp_path):
    shutil.rmtree(root/"washer"/"ground_truth")
    words = ["run", "--root", root, "--category", "washer", "--profile", "smoke", "--out", tmp_path/"out", *QUICK]
    status, out, err = run(capsys, *words)
    assert status == 0 and "mask" in out.split("Note:", 1)[1], err
    r = json.loads(run(capsys, *words, "--json")[1])
    assert r["methods"]["two_stage"]["image_auroc"]["mean"] is not None and "pixel_auroc" not in r["methods"]["two_stage"]
    assert list(r["methods"]["two_stage"]["difference"]) == ["image_auroc"]


def test_output_folder_is_a_file(capsys, tmp_path):
    (tmp_path/"out").write_text("")
    fails(capsys, 1, "--out", tmp_path/"out", says=["out", "--out"])


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0 and not shutil.which("chattr"), reason="root may write anywhere")
def test_read_only_output(capsys, tmp_path):
    out = tmp_path/"out"; out.mkdir()
    if os.geteuid() != 0: out.chmod(0o500)
    else:
        if subprocess.run(["chattr", "+i", out], capture_output=True).returncode: pytest.skip("this file system cannot protect a folder from root")
    try: fails(capsys, 1, "--out", out, says=["out", "choose another folder"])
    finally: subprocess.run(["chattr", "-i", out], capture_output=True); out.chmod(0o700)


def test_as_a_process(tmp_path):
    "Through the installed command: status, streams, and nothing but the sentence"
    p = subprocess.run([str(Path(sys.executable).parent/"tocoad"), "run", "--root", str(tmp_path/"no"), "--category", "x", "--out", str(tmp_path/"o")], capture_output=True, text=True)
    assert p.returncode == 1 and p.stdout == "" and p.stderr.startswith("tocoad: ") and p.stderr.count("\n") == 1
    p = subprocess.run([str(Path(sys.executable).parent/"tocoad"), "walk"], capture_output=True, text=True)
    assert p.returncode == 2 and "Traceback" not in p.stderr


def test_the_command_knows_the_profiles_there_are():
    from tocoad import cli
    from tocoad.run import config
    assert cli.PROFILES == tuple(config.PROFILES)
