"Parts that are not square, through every system and every door"
import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_fit_systems import QUICK, SEES, washers

from tocoad import Detector, cli
from tocoad.data.images import crop, read_image
from tocoad.data.load import load
from tocoad.data.mini import draw
from tocoad.data.shape import sides
from tocoad.method.contrast import Views
from tocoad.parts.export import export_onnx, save
from tocoad.parts.fit import fit
from tocoad.parts.pictures import own_shape
from tocoad.run.config import config
from tocoad.systems.fyd import moved, pose
from tocoad.systems.settings import Config, kinds
from tocoad.systems.system import SYSTEMS

SHAPES = {"lies": "128x64", "stands": "64x128"} # width x height
BASE = config("smoke", size=64, resize=64, sigma=2., epochs1=1, epochs2=1, batch=4, coreset=.2)


def pair(size, one, two):
    "Two squares as one long picture"
    return torch.cat([one, two], -1 if sides(size)[1] > sides(size)[0] else -2)


def settings(key, size):
    s = SYSTEMS[key]
    base = BASE.replace(size=size, resize=size)
    if s.kind is Config:
        return base.replace(method=dict(frozen="frozen", tocoad="two_stage")[key])
    return s.of(base, key, **{k: v for k, v in QUICK.items() if k in kinds(s.kind)})


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES)
def size(request): return request.param


@pytest.fixture(scope="module")
def folder(size, tmp_path_factory):
    "Fourteen good pairs of washers"
    folder = tmp_path_factory.mktemp("long") / "good"
    folder.mkdir()
    for k, x in enumerate(pair(size, washers(14, 0), washers(14, 50))):
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(folder / f"{k:02}.png")
    return folder


@pytest.mark.parametrize("key", SYSTEMS)
def test_every_system_keeps_the_shape_and_says_where(key, size, folder):
    "Maps have the picture's shape, and glow where something lies on one of the two washers"
    d = fit(folder, settings(key, size), key, device="cpu", progress=False)
    assert d.cfg.size == d.cfg.resize == size
    for row, column in ((16, 40), (20, 88)) if size == SHAPES["lies"] else ((40, 16), (88, 20)):
        parts = pair(size, washers(3, 500), washers(3, 550))
        parts[..., row:row + 16, column:column + 16] = torch.tensor([250, 20, 20], dtype=torch.uint8)[:, None, None]
        scores, maps = d.judge(parts)
        assert maps.shape == (3, *sides(size)) and maps.isfinite().all() and scores.isfinite().all()
        if key in SEES:
            i, j = np.unravel_index(maps.flatten(1).argmax(1), sides(size))
            assert (abs(i - row - 8) < 16).all() and (abs(j - column - 8) < 16).all(), (row, column, i, j)


def test_the_exported_graph_keeps_the_shape(size, folder, tmp_path):
    "Pictures of another size, resized in the graph as we resize them"
    onnxruntime = pytest.importorskip("onnxruntime")
    d = fit(folder, settings("frozen", size), "frozen", device="cpu", progress=False)
    graph = onnxruntime.InferenceSession(export_onnx(d, save(d, tmp_path / "m.safetensors")))
    h, w = sides(size)
    for wide, high in ((3 * w, 3 * h), (2 * w + 7, h), (w, h)):
        im = Image.open(folder / "03.png").resize((wide, high), Image.Resampling.BICUBIC)
        score, defect, heat = graph.run(None, dict(images=np.asarray(im)[None]))
        ours = d(im)
        assert heat.shape == (1, h, w) and defect[0] == (ours.decision == "defect")
        np.testing.assert_allclose(heat[0], ours.map, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(score[0], ours.score, rtol=1e-3)


def test_the_command_takes_the_parts_own_shape(size, folder, tmp_path, capsys):
    "fit, and score of a picture whose pixels are those of the model"
    model = tmp_path / "m.safetensors"
    quick = ["--set", "size=auto", "--set", "coreset=.2", "--profile", "smoke", "--quiet"]
    assert not cli.main(["fit", "--good", str(folder), "--model", str(model), *quick, "--set", "sigma=2"])
    d = Detector.load(model)
    w, h = (192, 96) if size == "128x64" else (96, 192)
    assert d.cfg.size == f"{w}x{h}" and f"{w} x {h} pixels" in capsys.readouterr().out
    assert not any("squeezed" in n for n in d.about["notes"])
    assert d(folder / "00.png").map.shape == (h, w)
    where = ["--images", str(folder), "--out", str(tmp_path / "out")]
    assert not cli.main(["score", "--model", str(model), *where, "--quiet"])
    assert (tmp_path / "out" / "report.html").exists()


@pytest.fixture(scope="module")
def category(tmp_path_factory):
    "A category of pairs of washers, the second of which lacks a part in the defective ones"
    root = tmp_path_factory.mktemp("sets") / "pairs"
    for split, kinds_, n in (("train", ["good"], 10), ("test", ["good", "missing_part"], 6)):
        for kind in kinds_:
            (root / split / kind).mkdir(parents=True)
            for k in range(n):
                start = k + 100 * (split == "test") + 50 * (kind != "good")
                (one, _), (two, mask) = draw("washer", start, "good", 64), draw("washer", start + 20, kind, 64)
                Image.fromarray(np.hstack([one, two])).save(root / split / kind / f"{k}.png")
                if kind != "good":
                    (root / "ground_truth" / kind).mkdir(parents=True, exist_ok=True)
                    drawn = np.hstack([np.zeros_like(mask), mask]).astype(np.uint8) * 255
                    Image.fromarray(drawn).save(root / "ground_truth" / kind / f"{k}_mask.png")
    return root


def test_masks_lie_where_their_images_have_them(category):
    data = load(category.parent, category="pairs", size="128x64", cache=False)
    bad = data.test.labels
    assert data.train.images.shape[1:] == (3, 64, 128) and data.test.masks.shape[1:] == (64, 128)
    assert data.test.masks[bad][..., 64:].any((1, 2)).all() and not data.test.masks[..., :64].any()
    assert not any("squeezed" in n for n in data.notes) and any("squeezed" in n for n in load(
        category.parent, category="pairs", size=64, cache=False).notes)
    first = category / data.test.paths[0]
    assert np.array_equal(data.test.images[0].numpy(), np.moveaxis(np.asarray(Image.open(first)), -1, 0))
    middle = read_image(first, "64x64", shorter=True).pixels
    assert np.array_equal(middle, crop(data.test.images[:1], 64)[0].numpy()), "the middle, nothing resized"


def test_run_takes_the_images_own_shape_in_all_it_writes(category, tmp_path, capsys):
    where = ["--root", str(category.parent), "--category", "pairs", "--profile", "smoke", "--set", "size=auto"]
    quick = ["--set", "epochs1=1", "--set", "epochs2=1", "--set", "sigma=2", "--quiet"]
    systems = ["--systems", "frozen", "tocoad", "padim"]
    to = ["--out", str(tmp_path / "out"), "--store", str(tmp_path / "store")]
    assert not cli.main(["run", *where, *quick, *systems, *to])
    record = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert record["config"]["size"] == record["config"]["resize"] == "192x96"
    said = capsys.readouterr().out
    assert "squeezed" not in said and "192 x 96" in said
    for name in ("maps", "curves"):
        assert next((tmp_path / "out").glob(f"*_{name}.png")).stat().st_size > 5000


def test_the_drawn_set_and_a_missing_category_are_asked_in_order(category, capsys):
    "size=auto is answered for the set that is meant, and other mistakes are still said"
    twice = ["run", "--set", "size=auto", "--seeds", "0", "0"]
    assert cli.main(twice) == 2 and "give each seed once" in capsys.readouterr().err
    assert cli.main([*twice, "--root", str(category.parent)]) == 2
    assert "--category is missing" in capsys.readouterr().err


def test_views_keep_the_aspect_of_what_they_show():
    "On average a crop is as wide for its height as the picture is, whatever its shape"
    ramp = torch.stack(torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 192), indexing="ij"))
    x = torch.cat([ramp, ramp[:1]])[None].expand(64, -1, -1, -1)
    torch.manual_seed(0)
    v = Views("192x64", (.3, .3), 0, 0, 0, (1e-3, 1e-3), 0)(x)
    down, across = (v[:, 0].diff(dim=1).mean((1, 2)) * 63, v[:, 1].diff(dim=2).mean((1, 2)) * 191)
    assert v.shape == (64, 3, 64, 192)
    stretch = (across / down).log() # of each view's crop against the picture's shape
    assert stretch.abs().max() < np.log(4 / 3) + .05 and abs(stretch.mean()) < .1


def test_fyd_turns_long_pictures_without_shearing_them():
    "A quarter turn about the middle is that of the middle square"
    x, quarter, none = torch.rand(2, 3, 32, 96), torch.full((2,), torch.pi / 2), torch.zeros(2)
    y = moved(x, pose(quarter, none, none, none))
    torch.testing.assert_close(crop(y, 32), crop(x, 32).rot90(1, (2, 3)), atol=1e-4, rtol=0)
    shifted = moved(x, pose(none, none, none + .5, none)) # half of the longer side's half
    torch.testing.assert_close(shifted[..., :72], x[..., 24:], atol=1e-4, rtol=0)


def test_pictures_of_one_shape_are_one_setting():
    assert own_shape([np.zeros((64, 64), np.uint8)] * 3, 96) == 96
    assert Config(size="224x224") == Config(size=224)
