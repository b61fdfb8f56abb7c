"The reading site: whole, alone, readable on a phone; and notebooks that open without the rest."
import contextlib
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import venv
from pathlib import Path
from zipfile import ZipFile

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from tocoad.site import build as room
from tocoad.site.alone import alone, opening
from tocoad.site.book import LEFT_OUT, PATH, PICTURES, START, contents, notebooks
from tocoad.site.interactive import INTERACTIVE
from tocoad.site.whole import problems

ROOT = Path(__file__).parents[1]
NBS = ROOT / "nbs"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links are POSIX paths")


@pytest.fixture(scope="session")
def site(shared):
    "The whole site under a sub-path, built once"
    def make(folder):
        found = room.build(folder / "sub" / "site")
        (folder / "problems.json").write_text(json.dumps(found))
    return shared("site", make) / "sub" / "site"


@pytest.fixture(scope="session")
def address(site):
    "Where a server shows it, below a path of its own"
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
        def copyfile(self, source, to):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError): # the browser has moved on
                super().copyfile(source, to)
    serve = functools.partial(Quiet, directory=site.parents[1])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/sub/site"
        server.shutdown()


def test_it_is_whole(site):
    "Links lead somewhere, nothing is fetched from elsewhere, pictures have words, sizes are kept; Sphinx is content"
    assert json.loads((site.parents[1] / "problems.json").read_text()) == []


def test_what_is_wrong_is_found(site, tmp_path):
    "The same check on a copy with a page that was spoilt in four ways"
    wrong = {'href="2_features.html"': ('href="2_feature.html"', "2_feature.html leads nowhere"),
             'id="def-Perlin"': ('id="def-Pearlin"', "../method/1_perlin.html#def-Perlin leads nowhere"),
             "</head>": ('<script src="https://cdn.org/x.js"></script></head>', "x.js is fetched from elsewhere"),
             ' alt="': (' title="', "pictures have no words")}
    page = shutil.copytree(site, tmp_path / "site") / "method" / "1_perlin.html"
    spoilt = page.read_text()
    for old, (new, _) in wrong.items():
        assert old in spoilt
        spoilt = spoilt.replace(old, new)
    page.write_text(spoilt)
    found = "\n".join(problems(tmp_path / "site"))
    assert not [said for _, said in wrong.values() if said not in found]


def test_signs_without_a_colour_of_their_own_cost_nothing(site):
    "A span for each name and comma would be a quarter of the site"
    css = (site / "_static" / "pygments.css").read_text()
    colours = {k: set(re.findall(rf"{k}\s*\{{[^}}]*?(?<!-)color:\s*(#\w+)", css)) for k in (
        r"\.highlight", r"\.highlight \.n", r"\.highlight \.p", r"\.highlight \.w")}
    first, *others = colours.values()
    assert len(first) == 2 and all(c <= first for c in others), colours # by day and by night
    page = (site / "method" / "1_perlin.html").read_text()
    assert '<span class="k">' in page and not re.search('<span class="[npw]">', page)


def test_every_notebook_has_its_page(site):
    names = {p.relative_to(NBS).with_suffix("").as_posix() for p in NBS.rglob("*.ipynb")
             if not {".ipynb_checkpoints", "reports", "runs"} & set(p.parts)}
    held = sum(contents(NBS).values(), [])
    assert names == (set(held) | {START, *LEFT_OUT, PICTURES} & names) - {"bench/notes", "releasing"}
    assert not [n for n in held if not (site / f"{n}.html").exists()]


def test_the_path_comes_first_with_its_minutes(site):
    text = (site / "index.html").read_text()
    entries = [text.index(f">{name} · ") for name in PATH.values()]
    assert entries == sorted(entries) and entries[-1] < text.index(">Lab<") < text.index(">The machinery<")
    assert re.search(r"The path, 1\d\d minutes", text)


def test_nothing_of_the_machinery_of_notebooks_is_left(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        body = re.sub(r"<(pre|code|script)\b.*?</\1>", "", text, flags=re.S)
        assert "#| " not in body and not re.search(r"\$\$|(?<![\w>])\$[\\a-zA-Z]", body), page
        assert "<merror" not in text and '.ipynb"' not in re.sub(r'"[./]*notebooks/[^"]*"', "", body), page
    marked = [p for p in (site / "method").rglob("*.html") if re.search(r"#\| (export|hide|fig-alt)", p.read_text())]
    assert not marked


def test_every_equation_is_drawn(site):
    "As many as the notebook writes, in MathML, with the paper's number"
    for n in (1, 3, 5, 6, 7):
        [path] = (NBS / "method").glob(f"{n}_*.ipynb")
        prose = "\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown")
        prose = re.sub(r"```.*?```|`[^`\n]+`", "", prose, flags=re.S)
        written = len(re.findall(r"\$\$.+?\$\$|\$[^$\n]+\$", prose, re.S))
        assert (site / "method" / f"{path.stem}.html").read_text().count("<math ") == written > 5
    shown = "".join(p.read_text() for p in (site / "method").glob("*.html"))
    assert {f'<span class="eqno">({n})</span>' in shown for n in range(1, 10)} == {True}


def test_gaps_lead_to_the_cells_that_decide(site):
    text = (site / "book" / "gaps.html").read_text()
    rows = re.findall(r'<tr id="gap-(\d+)">(.*?)</tr>', text, re.S)
    assert [int(n) for n, _ in rows] == list(range(1, 70))
    assert not [n for n, row in rows if not re.search(r"#(at-gap-|def-)", row)]


def test_names_say_what_the_code_says(site):
    text = (site / "api" / "method.html").read_text()
    [entry] = re.findall(r'<section class="api" id="method.perlin.turn">.*?</section>', text, re.S)
    assert "counter-clockwise" in entry and 'href="../method/1_perlin.html#def-turn"' in entry


def test_without_its_packages_or_notebooks_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    with pytest.raises(room.BadInput, match=r"needs sphinx, .*latex2mathml: install the extra"):
        room.build(tmp_path)
    monkeypatch.setattr("tocoad.site.book.files", lambda name: tmp_path / "site-packages" / name)
    with pytest.raises(room.BadInput, match="in a clone"):
        notebooks()


@pytest.mark.parametrize("scheme", ("file", "http"))
def test_in_a_browser(browser, site, address, scheme, tmp_path):
    "No request to the outside, no error; search finds a name; pages are not wider than a phone"
    root = site.as_uri() if scheme == "file" else address
    look = Path(os.environ.get("TOCOAD_LOOK", tmp_path))
    page = browser.new_page(viewport=dict(width=1280, height=900))
    outside, wrong = [], []
    page.on("request", lambda r: outside.append(r.url) if not r.url.startswith((root, "data:", "blob:")) else None)
    gone = "net::ERR_ABORTED" # by the next page
    page.on("requestfailed", lambda r: wrong.append(r.url) if r.failure != gone else None)
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
    for name in ("index", "method/1_perlin", "paper/tables/table5", "book/gaps", "api/method"):
        for width in (1280, 390):
            page.set_viewport_size(dict(width=width, height=900))
            page.goto(f"{root}/{name}.html")
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (name, width)
            if scheme == "file":
                page.screenshot(path=look / f"{name.replace('/', '_')}_{width}.png")
    page.goto(f"{root}/search.html?q=coreset")
    page.wait_for_selector("ul.search li a")
    found = page.locator("ul.search li a").evaluate_all("x => x.map(a => a.href)")
    assert any("method/appendix/coreset.html" in x for x in found) and (outside, wrong) == ([], [])
    page.close()


def test_by_hand_in_a_browser(browser, site):
    "Gaps are filtered; folds open; dark and light; what is wide is scrolled by keyboard; formulas have a height"
    page = browser.new_page(viewport=dict(width=390, height=800), color_scheme="dark")
    page.goto(f"{site.as_uri()}/book/gaps.html")
    page.fill("#filter", "rotate")
    rows = page.locator("table.gaps tr[id]:visible")
    assert 0 < rows.count() < 20
    assert page.locator("#gap-26").is_visible() and page.locator("#left").inner_text() == str(rows.count())
    page.goto(f"{site.as_uri()}/method/1_perlin.html")
    fold = page.locator("details.hide").first
    assert not fold.locator("pre").is_visible()
    fold.locator("summary").click()
    assert fold.locator("pre").is_visible()
    assert page.locator("div.math[tabindex]").count() > 3 and page.locator("math").first.bounding_box()["height"] > 8
    paper = "getComputedStyle(document.body).backgroundColor"
    grey = lambda: [int(x) for x in re.findall(r"\d+", page.evaluate(paper))]
    assert max(grey()[:3]) < 60
    page.emulate_media(color_scheme="light")
    page.reload()
    assert min(grey()[:3]) > 200
    page.close()


def test_figures_answer_at_the_ends_of_their_chapters(browser, site):
    "A slider moves the picture, on the site as in its own test"
    for name in INTERACTIVE:
        assert (site / f"{name}.html").read_text().count('class="look"') == INTERACTIVE[name]().count('class="look"')
    page = browser.new_page()
    page.goto((site / "method" / "1_perlin.html").as_uri())
    look = "[...document.querySelectorAll('#look-perlin canvas')].map(c => c.toDataURL()).join()"
    page.wait_for_function(f"{look} && document.querySelector('#look-perlin output').textContent")
    before, slider = page.evaluate(look), page.locator("#look-perlin input[type=range]").first
    slider.focus()
    for _ in range(8):
        slider.press("ArrowRight")
    page.wait_for_function("([look, before]) => eval(look) !== before", arg=[look, before])


@pytest.fixture(scope="session")
def empty(shared):
    "An environment without packages, and a wheel of this package"
    def make(folder):
        shutil.copytree(ROOT / "tocoad", folder / "src" / "tocoad", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("setup.py", "pyproject.toml", "settings.ini", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder / "src")
        wheel = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", folder / "wheels", folder / "src"]
        subprocess.run(wheel, check=True, capture_output=True)
        venv.create(folder / "venv", with_pip=True)
    return shared("empty", make)


def run(code, folder, cwd, **env):
    "A cell in the environment of a folder"
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PIP_INDEX_URL")} | env
    python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    return subprocess.run([python, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)


def test_a_chapter_opens_in_an_empty_environment(empty, tmp_path):
    "Its first cell installs the package where it is absent, writes the files that it reads, and then does nothing more"
    cells = nbformat.reads(alone(NBS, "method/6_finetune"), 4).cells
    index = dict(PIP_NO_INDEX="1", PIP_NO_DEPS="1", PIP_FIND_LINKS=str(empty / "wheels"))
    first = run(cells[0].source, empty, tmp_path, **index)
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "6_finetune_run.json").read_bytes() == (NBS / "method/6_finetune_run.json").read_bytes()
    assert run("import tocoad", empty, tmp_path).returncode == 0
    (tmp_path / "6_finetune_run.json").write_text("mine")
    again = run(cells[0].source, empty, tmp_path, PIP_NO_INDEX="1", PIP_FIND_LINKS="/nowhere") # pip would fail
    assert again.returncode == 0 and (tmp_path / "6_finetune_run.json").read_text() == "mine"


def test_the_first_cell_asks_for_the_committed_versions(tmp_path):
    code = opening(ROOT)
    versions = (ROOT / "constraints.txt").read_text()
    assert versions in code and '"-c", versions' in code and "tocoad==" in code


def test_chapters_can_be_taken_away(site):
    there = list((site / "notebooks").rglob("*.ipynb"))
    taken = {p.relative_to(site / "notebooks").with_suffix("").as_posix() for p in there}
    assert {*PATH, "lab/change_one_thing", "systems/padim", "parts/own_parts", "paper/figures/figure5"} <= taken
    for path in there:
        nb = nbformat.read(path, 4)
        nbformat.validate(nb)
        assert "importlib.util.find_spec" in nb.cells[0].source and not any(c.get("outputs") for c in nb.cells)


def test_tables_are_taken_away_with_the_results_that_they_read(site, tmp_path):
    "Out of the archive, in a folder of its own, a table says what it says on the site"
    with ZipFile(site / "notebooks" / "with_results.zip") as z:
        z.extractall(tmp_path)
    tables = {p.stem for p in (NBS / "paper" / "tables").glob("*.ipynb")} - {"audit"}
    assert {p.stem for p in tmp_path.rglob("*.ipynb")} == tables | {"compared"}
    page = (site / "paper" / "tables" / "panel.html").read_text()
    assert 'href="../../notebooks/with_results.zip" download' in page
    nb = nbformat.read(tmp_path / "paper" / "tables" / "panel.ipynb", 4)
    made = NotebookClient(nb, timeout=300, resources=dict(metadata=dict(path=tmp_path / "paper" / "tables"))).execute()
    said = lambda nb: [o["data"]["text/markdown"] for c in nb.cells for o in c.get("outputs", ())
                       if "text/markdown" in o.get("data", {})]
    assert said(made) == said(nbformat.read(NBS / "paper" / "tables" / "panel.ipynb", 4)) != []


def test_a_workflow_publishes_it():
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "docs.yml").read_text())
    steps = [s["run"] for s in flow["jobs"]["docs"]["steps"] if "run" in s]
    assert steps[0].endswith('".[docs]" -c constraints.txt') and steps[1].startswith("tocoad docs --out _site")
    assert "gh-pages" in steps[2] and flow["permissions"] == dict(contents="write")
