"The lab: its set answers, its solutions are right, its notebooks run."
import json
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import papermill
import pytest
import torch

from tocoad.data.load import load
from tocoad.data.mini import MINI, SETS, mini_defects
from tocoad.method.coreset import coreset
from tocoad.method.perlin import check_generator
from tocoad.run.compare import compare
from tocoad.run.config import config
from tocoad.run.store import Store
from tocoad.systems.system import PARTS

LAB = Path(__file__).parents[1] / "nbs" / "lab"
PAGE = ["".join(c["source"]) for c in json.loads((LAB / "change_one_thing.ipynb").read_text(encoding="utf-8"))["cells"]]
SOLUTIONS = re.findall(r"<details>.*?```python\n(.*?)```", "\n".join(PAGE), re.S)
TINY = dict(epochs1=1, epochs2=1, width=32, resize=64, size=64)
METRICS = ["image_auroc", "pixel_auroc"]


@pytest.fixture
def solution(tmp_path):
    "What the n-th folded solution binds to `mine`, from a file, so that keys can read its source"
    def solve(n):
        path = tmp_path / f"solution_{n}.py"
        path.write_text("import torch\nfrom tocoad.method.perlin import changed\n" + SOLUTIONS[n - 1])
        spec = spec_from_file_location(path.stem, path)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.mine
    return solve


def other_start(X, ratio, generator):
    "The greedy choice from another random point: changes nothing but chance"
    torch.randint(9, (1,), generator=generator)
    return coreset(X, ratio, generator=generator)


def blind(X, ratio, generator):
    "A random choice of as many patches: leaves out rare ones"
    return torch.randperm(len(X), generator=generator)[:int(len(X) * ratio)]


def frozen(seeds, **parts):
    "The frozen F on the lab's images, unchanged and with each change"
    cfg = config("lab")
    data = load(None, cfg.dataset, cfg.category, size=cfg.resize)
    methods = {k: dict(method="frozen", parts=p) for k, p in ({"unchanged": {}} | parts).items()}
    return compare(cfg, seeds, methods, data=data, device="cpu", store=Store(), progress=False)


def test_every_category_of_the_lab_has_enough_images():
    train, good, each = SETS["lab"]
    assert train >= 64 and all(good + each * len(mini_defects(c)) >= 200 for c in MINI)


def test_a_planted_loss_is_found_with_one_seed(solution):
    "Without the neighbourhood grass is noise; the same once more is the same"
    result = frozen((0,), same={}, single=solution(2))
    same, single = (result.difference(k, "image_auroc", base="unchanged") for k in ("same", "single"))
    assert (same.low, same.high) == (0, 0) and single.excludes_zero and single.mean < -.05
    assert .7 < result.rows.image_auroc[0] < .95, "room in both directions"


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [(0, 1, 2), (3, 4, 5)])
def test_a_planted_loss_is_found_and_chance_is_not(seeds, solution):
    result = frozen(seeds, other=dict(sampler=other_start), blind=dict(sampler=blind), three=solution(1))
    found = {k: result.difference(k, "image_auroc", base="unchanged") for k in ("other", "blind", "three")}
    assert found["blind"].excludes_zero and found["blind"].mean < 0
    assert not found["other"].excludes_zero and not found["three"].excludes_zero
    assert found["other"].high - found["other"].low < .1, "five points either way at most"


@pytest.mark.slow
def test_both_stages_of_the_lab_learn():
    cfg = config("lab")
    result = compare(cfg, (0, 1, 2), {"unchanged": {}}, device="cpu", store=Store(), progress=False)
    for log in result.logs.values():
        first, last = log["stage1"][0]["L_dis"], log["stage1"][-1]["L_dis"]
        assert last < first / 2 and log["discriminator_auroc"] > .8
        assert log["stage2"][-1]["L_sym"] < log["stage2"][0]["L_sym"] - .1


def test_the_page_is_short_and_each_exercise_is_solved(solution):
    assert len(PAGE) <= 30 and len(SOLUTIONS) == 3
    cfg = config("smoke", **TINY)
    data = load(None, "mini", "washer", size=64)
    parts = {f"solution {n}": solution(n) for n in (1, 2, 3)}
    assert all(set(p) <= set(PARTS) for p in parts.values())
    check_generator(parts["solution 3"]["generator"], data.train.images[:4].float() / 255)
    methods = {"unchanged": {}} | {k: dict(parts=p) for k, p in parts.items()}
    rows = compare(cfg, (0,), methods, data=data, device="cpu", progress=False).rows.set_index("method")[METRICS]
    assert rows.notna().all(axis=None) and not rows.duplicated().any()


@pytest.mark.parametrize("name, given", [
    ("change_one_thing", dict(profile="smoke", settings=TINY)),
    ("before_you_believe_it", dict(ideas=2, others=["grass"])),
    pytest.param("for_contributors", {}, marks=pytest.mark.slow)])
def test_notebook_runs_small(name, given, tmp_path):
    given = given | dict(seeds=[0, 1] if name.startswith("before") else [0], store=str(tmp_path / "store"))
    papermill.execute_notebook(str(LAB / f"{name}.ipynb"), str(tmp_path / "done.ipynb"), given, cwd=str(LAB),
                               kernel_name="python3", progress_bar=False)
