"Notebooks as a student opens them: in JupyterLab, in a browser, from top to bottom, and then with a change."
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
READY = "() => window.jupyterapp.shell.currentWidget.sessionContext.ready"
RUN = """command => {
    window.done = null;
    window.jupyterapp.commands.execute("notebook:" + command).then(done => { window.done = done });
}"""
PLAIN = { # no cell is taken out of the page while it is out of sight; no news
    "notebook-extension/tracker": dict(windowingMode="none"),
    "apputils-extension/notification": dict(fetchNews="false", checkForUpdates=False),
}
QUICK = dict(profile="smoke", seeds=[0], settings=dict(size=64, resize=64, width=64, epochs1=2))


def up(address, seconds=120):
    "Wait until a server answers"
    for _ in range(seconds):
        try:
            return urlopen(f"{address}/api").close()
        except URLError:
            time.sleep(1)
    raise TimeoutError(address)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab that knows nothing of this user: its address, and the folder of its notebooks"
    place = tmp_path_factory.mktemp("lab")
    for name, values in PLAIN.items():
        file = place / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    (place / "notebooks").mkdir()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {f"JUPYTER_{k}_DIR": str(place / k) for k in ("CONFIG", "DATA", "RUNTIME")}
    env |= dict(JUPYTERLAB_SETTINGS_DIR=str(place / "settings"), PYTHONPATH=str(ROOT))
    options = f"--ip=127.0.0.1 --port={port} --no-browser --allow-root --expose-app-in-browser".split()
    options += ["--IdentityProvider.token=", f"--ServerApp.root_dir={place / 'notebooks'}"]
    with open(place / "log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyter", "lab", *options], env=env, stdout=log, stderr=log)
    try:
        up(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}", place / "notebooks"
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture
def opened(lab, browser):
    "(notebook, its parameters) -> a page on which a copy of it is open and its kernel is there"
    def open(name, **parameters):
        nb = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", 4)
        for cell in nb.cells:
            if cell.cell_type == "code":
                cell.outputs = []
            if "parameters" in cell.metadata.get("tags", ()):
                cell.source += "".join(f"\n{k} = {v!r}" for k, v in parameters.items())
        file = lab[1] / f"{Path(name).name}.ipynb"
        nbformat.write(nb, file)
        page = browser.new_page(viewport=dict(width=1280, height=1000))
        page.set_default_timeout(120_000)
        page.goto(f"{lab[0]}/lab/tree/{file.name}?reset")
        page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for()
        page.evaluate(READY)
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        return page
    return open


def run(page, command="run-all-cells"):
    "What the entry of the menu Run does; wait until the last cell is through"
    page.evaluate(RUN, command)
    page.wait_for_function("window.done !== null", timeout=1_200_000)
    assert page.evaluate("window.done"), page.locator(".jp-RenderedText[data-mime-type*=error]").all_inner_texts()


def shown(page):
    "The texts of tables and prints; fails on an error, on a red box, and on a figure that is not there"
    for kind in ("error", "stderr"):
        assert not page.locator(f".jp-OutputArea-output [data-mime-type$='jupyter.{kind}']").all_inner_texts()
    figures = page.locator(".jp-OutputArea-output img")
    sizes = figures.evaluate_all("all => all.map(i => [i.naturalWidth, i.getBoundingClientRect().width])")
    assert sizes and all(min(pair) > 100 for pair in sizes)
    assert not page.locator(".jp-Dialog").count()
    return page.locator(".jp-OutputArea-output").all_inner_texts()


def kept(page, name):
    "A screenshot to look at, if a folder for it is named"
    if folder := os.environ.get("TOCOAD_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"jupyterlab_{name}.png")


@pytest.mark.parametrize("name", ["method/0_one_page", "systems/padim"])
def test_it_runs(opened, name):
    page = opened(name)
    run(page)
    shown(page)
    page.locator(".jp-OutputArea-output img").last.scroll_into_view_if_needed()
    kept(page, Path(name).name)


def interval(page):
    "The table that the section on the interval shows"
    found = [t for t in shown(page) if "mine - unchanged" in t]
    assert len(found) == 1 and re.search(r"[+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+\]", found[0])
    return found[0]


def test_one_thing_is_changed(opened):
    "Run all, write another component into its cell, run from there on: the interval is another"
    page = opened("lab/change_one_thing", **QUICK)
    run(page)
    before = interval(page)
    source = (ROOT / "nbs" / "lab" / "change_one_thing.ipynb").read_text(encoding="utf-8")
    prose = "\n".join("".join(c["source"]) for c in json.loads(source)["cells"] if c["cell_type"] == "markdown")
    solution = re.search(r"def three\(.*?mine = dict\(scorer=three\)", prose, re.S)[0]
    cell = page.locator(".jp-CodeCell").filter(has_text="def dark_spot").locator(".cm-content")
    cell.click()
    page.keyboard.press("Control+A")
    page.keyboard.insert_text(solution)
    run(page, "run-all-below")
    after = interval(page)
    assert after != before
    page.get_by_text("mine - unchanged").last.scroll_into_view_if_needed()
    kept(page, "change_one_thing")
