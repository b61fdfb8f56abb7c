"The notebooks are the source: they run, the library and the README are made from them, and they are clean."
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import metadata
from itertools import takewhile
from pathlib import Path

import matplotlib
import nbdev.test
import nbformat
import pytest
import yaml
from nbdev.clean import clean_jupyter, nbdev_clean
from nbdev.config import get_config
from nbdev.export import nb_export
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tocoad

ROOT = Path(__file__).parents[1]
CFG = get_config(ROOT)
ALL = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not {".ipynb_checkpoints", "reports"} & set(p.parts))
ELSEWHERE = [ROOT / "nbs" / "method" / "0_one_page.ipynb"] # runs top to bottom in tests/test_one_page.py
ROOMS = [p for p in ALL if not any((f / ".notest").exists() for f in p.parents) and p not in ELSEWHERE]
name = lambda p: p.relative_to(ROOT / "nbs").with_suffix("").as_posix()


def text(p): return p.read_text(encoding="utf-8")


def module(nb):
    "What a notebook exports to, such as method/perlin.py; None if it does not"
    found = re.search(r"#\| default_exp ([\w.]+)", text(nb))
    return found and Path(*found[1].split(".")).with_suffix(".py")


def test_every_module_has_its_notebook():
    made = [m for nb in ALL if (m := module(nb))]
    there = [p.relative_to(ROOT / "tocoad") for p in (ROOT / "tocoad").rglob("*.py") if not p.stem.startswith("_")]
    assert sorted(made) == sorted(there)


def test_the_method_imports_nothing_but_itself_and_images():
    "A student calls it with three lines; it knows no settings, keys or store"
    for p in (ROOT / "tocoad" / "method").glob("*.py"):
        taken = re.findall(r"^\s*from (\.[\w.]*) import", text(p), re.M)
        assert not [t for t in taken if t.startswith("..") and t != "..data.images"], p.name
    assert sum(len(text(p).splitlines()) for p in (ROOT / "tocoad" / "method").glob("*.py")) < 1500


def test_eq_1_and_figure_3_come_first():
    cells = json.loads(text(ROOT / "nbs" / "method" / "1_perlin.ipynb"))["cells"]
    said = ["".join(c["source"]) for c in cells]
    prose = [c["cell_type"] == "markdown" for c in cells]
    first = next(i for i, t in enumerate(said) if prose[i] and re.match("#+ ", t))
    eq_1 = [r"\mathcal" in t and "G" in t and "(1)" in t or r"\tag{1}" in t for t in said[first:first + 10]]
    assert any(eq_1), "Eq. 1 within ten cells"
    pictures = ["image/" in json.dumps(c.get("outputs", [])) for c in cells[first:first + 20]]
    assert any(pictures), "Figure 3's picture within twenty"
    perlin = next(i for i, t in enumerate(said) if "class Perlin" in t)
    assert not re.search("CutPaste|NSA|Poisson", "".join(said[i] for i in range(first + 1, perlin) if prose[i]))


WAYS = multiprocessing.get_all_start_methods()
FORK = multiprocessing.get_context("forkserver" if "forkserver" in WAYS else "spawn")
FORK.set_forkserver_preload(["nbdev.test", "matplotlib.pyplot", "tocoad.run.compare", "tocoad.paper.sheets"])


def silent(nb, _):
    "Stands for the writing of a notebook that ran: nothing may stand in a red box"
    said = ["".join(o["text"]) for c in nb.cells for o in c.get("outputs", ()) if o.get("name") == "stderr"]
    assert not said, f"on stderr: {said}"


def carry_out(nb, log):
    "Run a notebook from top to bottom, in a child"
    os.environ["TQDM_DISABLE"] = "1" # bars are no warnings
    nbdev.test.write_nb = silent
    with open(log, "w", encoding="utf-8") as f:
        for stream in (1, 2):
            os.dup2(f.fileno(), stream)
    os.chdir(nb.parent)
    matplotlib.use("agg")
    sys.exit(not nbdev.test.test_nb(nb, skip_flags=["slow", "cuda"], save=True)[0])


@pytest.mark.parametrize("nb", ROOMS, ids=name)
def test_notebook_runs(nb, tmp_path):
    "Each in a process of its own, as a reader would, that has loaded torch before"
    child = FORK.Process(target=carry_out, args=(nb, tmp_path / "log"))
    child.start()
    child.join(1800)
    child.kill()
    assert child.exitcode == 0, text(tmp_path / "log")[-6000:]


def test_a_notebook_that_warns_fails(tmp_path):
    python = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    for what, code in {"warn('red')": 1, "filters": 0}.items():
        cell, nb = nbformat.v4.new_code_cell(f"import warnings\nwarnings.{what}"), tmp_path / f"{code}.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=python), nb)
        child = FORK.Process(target=carry_out, args=(nb, tmp_path / "log"))
        child.start()
        child.join(300)
        assert child.exitcode == code and ("red" in text(tmp_path / "log")) == code


def test_library_is_exported(tmp_path):
    new = tmp_path / "tocoad"
    for nb in filter(module, ALL):
        nb_export(nb, lib_path=new)
    def code(p):
        "Its lines without nbdev's marks"
        return [x for x in text(p).splitlines() if not x.startswith(("# %%", "# AUTOGENERATED"))]
    fresh = {p.relative_to(new): code(p) for p in new.rglob("*.py") if not p.name.startswith("_")}
    assert len(fresh) == sum(bool(module(nb)) for nb in ALL)
    for path, lines in fresh.items():
        assert lines == code(ROOT / "tocoad" / path), f"{path} is not what its notebook exports: run nbdev-export"


def test_notebooks_are_clean(tmp_path, monkeypatch):
    "nbdev-clean leaves nothing to commit"
    monkeypatch.chdir(ROOT)
    left = shutil.ignore_patterns(".ipynb_checkpoints", "runs", "reports")
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=left)
    nbdev_clean(str(tmp_path / "nbs"))
    for nb in ALL:
        assert text(tmp_path / nb.relative_to(ROOT)) == text(nb), f"{nb.name}: run nbdev-clean"


@pytest.mark.parametrize("nb", ALL, ids=name)
def test_saving_with_another_python_changes_nothing(nb, tmp_path, monkeypatch):
    "What JupyterLab would save, with the hook of nbdev-install-hooks, is what is committed"
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path))
    model = nbformat.read(nb, 4)
    model.metadata.kernelspec.display_name = "Python 3 (ipykernel)"
    model.metadata.language_info = nbformat.from_dict(dict(name="python", file_extension=".py", version="3.99.0"))
    for n, cell in enumerate(model.cells):
        cell.metadata |= dict(trusted=True, scrolled=False)
        if cell.cell_type == "code":
            cell.execution_count = n
    clean_jupyter(str(nb), dict(type="notebook", content=model))
    assert nbformat.writes(model) + "\n" == text(nb)


@pytest.mark.parametrize("nb", ALL, ids=name)
def test_notebook_carries_one_clean_run(nb):
    "Outputs without warnings, progress bars or machine paths, in under 1 MB"
    outputs = [o for c in json.loads(text(nb))["cells"] for o in c.get("outputs", [])]
    assert outputs and not [o for o in outputs if o.get("name") == "stderr" or o["output_type"] == "error"]
    shown = [v for o in outputs for k, v in [("text", o.get("text", "")), *o.get("data", {}).items()]
             if k.startswith("text")]
    assert not re.search(r"/(tmp|home|root|work|Users)/", "".join(map("".join, shown))), nb.name
    assert nb.stat().st_size < 1e6


@pytest.mark.parametrize("nb", ALL, ids=name)
def test_every_picture_is_told_in_words(nb):
    "At the top of the cell that draws, one line that quarto and nbdev read; no two the same in a notebook"
    told = []
    for c in json.loads(text(nb))["cells"]:
        if any(k.startswith("image/") for o in c.get("outputs", []) for k in o.get("data", {})):
            top = takewhile(lambda line: line.startswith("#|"), c["source"])
            alt = [yaml.safe_load(line[2:])["fig-alt"] for line in top if line.startswith("#| fig-alt:")]
            assert len(alt) == 1 and len(alt[0]) >= 40, f"{nb.name}, cell {c['id']}: say in `#| fig-alt:` what is seen"
            told += alt
    assert len(set(told)) == len(told), told


def test_notebooks_for_papermill_take_parameters():
    "papermill silently ignores -p where no cell is tagged"
    folders = [p for f in ("lab", "paper/tables", "paper/figures", "bench") for p in (ROOT / "nbs" / f).glob("*.ipynb")]
    for nb in (*folders, ROOT / "nbs/parts/own_parts.ipynb"):
        cells = json.loads(text(nb))["cells"]
        assert len([c for c in cells if "parameters" in c["metadata"].get("tags", [])]) == 1, nb.name


def test_metadata_agrees():
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    ini, project = settings["DEFAULT"], (ROOT / "pyproject.toml").read_text()
    assert ini["version"] == tocoad.__version__ == metadata("tocoad")["Version"]
    assert ini["lib_path"] == CFG.lib_path.name and f'requires-python = ">={ini["min_python"]}"' in project


def test_the_citation_names_the_version():
    cited = yaml.safe_load(text(ROOT / "CITATION.cff"))
    assert cited["version"] == tocoad.__version__ and "arXiv:2407.01312" in str(cited["references"])


def test_constraints_name_a_version_of_every_requirement():
    lines = [Requirement(x) for x in text(ROOT / "constraints.txt").splitlines()]
    exact = {canonicalize_name(r.name): next(iter(r.specifier)).version for r in lines}
    assert all(str(r.specifier).startswith("==") and not r.url for r in lines)
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    kinds = [k for k in settings["DEFAULT"] if k.endswith("requirements") and k[:3] not in ("gpu", "ben")]
    for r in (Requirement(x) for k in kinds for x in settings["DEFAULT"][k].split()):
        assert r.specifier.contains(exact[canonicalize_name(r.name)]), r


def test_workflow_runs_the_tests_on_three_systems():
    flow = yaml.safe_load(text(ROOT / ".github" / "workflows" / "test.yml"))
    [job] = flow["jobs"].values()
    assert {s.split("-")[0] for s in job["strategy"]["matrix"]["os"]} == {"ubuntu", "macos", "windows"}
    steps = [s["run"] for s in job["steps"] if "run" in s]
    assert steps[0].endswith("-c constraints.txt") and steps[1] == steps[0].removesuffix(" -c constraints.txt")
    assert steps[-1] == "python -m pytest" and "schedule" in flow[True] # YAML reads the key `on` as true


def test_readme_is_made_from_the_index(tmp_path):
    run = subprocess.run([sys.executable, ROOT / "nbs" / "make_readme.py", tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert text(tmp_path / "README.md") == text(ROOT / "README.md"), "run python nbs/make_readme.py"
    assert len(text(ROOT / "README.md").encode()) < 7000, "what is longer has a notebook of its own"


def test_ci_calls_the_readme_command():
    commands = re.findall(r"^python3 -m venv .*$", text(ROOT / "README.md"), re.M)
    assert len(commands) == 2 and commands[1] in text(ROOT / ".ci" / "run")


QUICK = """
import sys
from tocoad.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
loaded = {"torch", "torchvision", "timm", "sklearn", "scipy", "pandas", "matplotlib"} & set(sys.modules)
sys.exit(f"loads {loaded}" if loaded else 0)
"""


@pytest.mark.parametrize("words", (["--help"], ["run", "--help"], ["--version"]), ids=" ".join)
def test_help_is_quick(words):
    "It waits for nothing that takes long to import"
    run = subprocess.run([sys.executable, "-c", QUICK, *words], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "") and run.stdout
    tocoad = Path(sys.executable).parent / "tocoad"
    command = subprocess.run([tocoad, *words], capture_output=True, text=True, check=True)
    assert command.stdout == run.stdout


@pytest.mark.parametrize("nb", ALL, ids=name)
def test_links_lead_somewhere(nb):
    base = ROOT if nb == ROOT / "nbs" / "index.ipynb" else nb.parent # README.md lies a folder higher
    cells = json.loads(text(nb))["cells"]
    prose = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    links = re.findall(r"\]\((?![a-z]+:)([^)#\s]+)(?:#[^)]*)?\)", prose)
    assert not [x for x in links if not (base / x).exists()]


@pytest.mark.parametrize("room", sorted(p.relative_to(ROOT) for p in (ROOT / "tocoad").rglob("[!_]*.py")), ids=str)
def test_no_room_and_no_line_is_long(room):
    lines = text(ROOT / room).splitlines()
    start = lines.index("# %% auto #0") # nbdev writes and wraps `__all__`
    written = lines[:start] + lines[lines.index("", start):]
    assert len(lines) <= 350 and max(map(len, written)) <= 120


def test_ruff_finds_nothing():
    ruff = [sys.executable, "-m", "ruff", "check", "--output-format", "concise", "tocoad", "nbs", "tests"]
    run = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
