"Waiting threads leave the cores to others, unless the user said otherwise"
import os
import subprocess
import sys

import pytest

OURS = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}


@pytest.mark.parametrize("set_by_user, expected", [({}, "PASSIVE"), (dict(OMP_WAIT_POLICY="ACTIVE"), "ACTIVE"),
                                                   (dict(GOMP_SPINCOUNT="10"), None), (dict(KMP_BLOCKTIME="1"), None)])
def test_waiting_is_passive_unless_the_user_chose(set_by_user, expected):
    env = {k: v for k, v in os.environ.items() if k not in OURS} | set_by_user
    code = "import tocoad, os, sys; print(os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out.split() == [str(expected), "False"]
