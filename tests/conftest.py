"Every test computes on one thread, and all share one store and one cache that are not the user's own."
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

if "PYTEST_XDIST_WORKER" not in os.environ: # the workers inherit what the first process says
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    PLACE = tempfile.TemporaryDirectory(prefix="tocoad-tests-")
    os.environ |= dict(TOCOAD_STORE=f"{PLACE.name}/store", TOCOAD_CACHE=f"{PLACE.name}/cache")

collect_ignore = ["test_bad_input.py", "test_reproduce.py"] if os.name == "nt" else [] # limits and kills of POSIX
REAL = Path(os.environ.get("TOCOAD_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def real():
    "Folder with real images for development; tests that need it are skipped without it"
    if not (REAL / "mvtec_ad" / "bottle").is_dir():
        pytest.skip("no real images here; set TOCOAD_DATA to a folder that holds mvtec_ad/bottle")
    return REAL


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id):
    "(name, make) -> a folder that make(folder) fills once, whichever worker comes first"
    top = tmp_path_factory.getbasetemp()
    top = top if worker_id == "master" else top.parent
    def shared(name, make):
        folder, done = top / name, top / f"{name}.done"
        with FileLock(top / f"{name}.lock"):
            if not done.exists():
                folder.mkdir()
                make(folder)
                done.touch()
        return folder
    return shared


@pytest.fixture
def browser():
    "This machine's own Chromium, without a window; tests that look at pages are skipped where there is none"
    names = os.environ.get("TOCOAD_BROWSER", "chromium"), "chromium-browser", "google-chrome"
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no browser here; install Chromium, or set TOCOAD_BROWSER to one")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play: # for one test alone: its event loop would stand in a notebook's way
        browser = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


def pytest_addoption(parser):
    parser.addoption("--base", default="2adeeba", help="an earlier commit, for test_same_numbers.py")
