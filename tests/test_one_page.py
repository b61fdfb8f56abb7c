"The page that holds all of the method gives the numbers of the command, to the last bit."
import json
import pickle
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient

from tocoad.run import compare
from tocoad.run.config import config
from tocoad.run.store import Store

PAGE = Path(__file__).parents[1] / "nbs" / "method" / "0_one_page.ipynb"
CELLS = json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(c["source"]) for c in CELLS if c["cell_type"] == "code"]
SHOWN = ("scores_frozen", "maps_frozen", "frozen", "scores_two_stage", "maps_two_stage", "two_stage")
METRICS = ("image_auroc", "pixel_auroc", "aupro")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    "What the page's names hold after a run from top to bottom, in a process of its own with one thread"
    nb, out = nbformat.read(PAGE, 4), tmp_path_factory.mktemp("page") / "values.pickle"
    values = ", ".join(f"{k}={k}" for k in SHOWN)
    differences = ", ".join(f"{k}=({k}.mean, {k}.low, {k}.high)" for k in METRICS)
    save = f"import pickle; pickle.dump(dict({values}, {differences}), open({str(out)!r}, 'wb'))"
    first, last = map(nbformat.v4.new_code_cell, ("import torch\ntorch.set_num_threads(1)", save))
    nb.cells = [first, *nb.cells, last]
    NotebookClient(nb, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(PAGE.parent)}}).execute()
    return pickle.loads(out.read_bytes())


@pytest.fixture(scope="module")
def command():
    "What `tocoad run --profile smoke` computes or finds in the tests' store, with one thread"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield compare.compare(config("smoke"), methods=("frozen", "two_stage"), device="cpu", progress=False,
                          store=Store())
    torch.set_num_threads(threads)


@pytest.mark.parametrize("method", ["frozen", "two_stage"])
def test_the_page_gives_the_numbers_of_the_command(page, command, method):
    np.testing.assert_array_equal(page[f"scores_{method}"], command.image[method][0])
    np.testing.assert_array_equal(page[f"maps_{method}"], command.maps[method][0])
    row = command.rows.set_index("method").loc[method].drop("seed").to_dict()
    assert page[method] == row and set(METRICS) < set(row)


@pytest.mark.parametrize("metric", METRICS)
def test_the_page_gives_the_difference_of_the_command(page, command, metric):
    d = command.difference("two_stage", metric)
    assert page[metric] == (d.mean, d.low, d.high)


def test_the_page_is_one_page():
    assert 20 <= len(CELLS) <= 30
    assert max(len([line for line in source.splitlines() if line.strip()]) for source in CODE) <= 15


def test_the_page_knows_the_method_only():
    taken = re.findall(r"^from tocoad\.(\w+)", "\n".join(CODE), re.MULTILINE)
    assert set(taken) == {"data", "method", "measure"}
    assert not re.search(r"Config|Store|tocoad\.run|tocoad\.paper|tqdm", json.dumps(CELLS))


def test_the_loops_of_training_are_written_out():
    steps = [source for source in CODE if ".backward()" in source]
    assert len(steps) == 2 and all(re.search(r"for I in batches\(.*\.step\(\)", source, re.DOTALL) for source in steps)
