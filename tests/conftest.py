import os
import tempfile
from pathlib import Path

import pytest

STORE = tempfile.TemporaryDirectory()
os.environ["TOCOAD_STORE"] = f"{STORE.name}/store" # tests neither read nor fill the user's own

REAL = Path(os.environ.get("TOCOAD_DATA", Path(__file__).parents[2]/"shared"/"data"))


@pytest.fixture(scope="session")
def real():
    "Folder with real images for development; tests that need it are skipped without it"
    if not (REAL/"mvtec_ad"/"bottle").is_dir(): pytest.skip("no real images here; set TOCOAD_DATA to a folder that holds mvtec_ad/bottle")
    return REAL
