"""threads.py limits how long OpenMP's threads spin, before torch reads the limit."""
import os
import subprocess
import sys

import pytest
from test_house import SCRIPTS
from tiny import REPO

PRINT = "import os, nanotune.threads; print(os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize("given, expected", [
    ({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")])
def test_spinning_is_limited_unless_the_user_has_set_it(given, expected):
    env = {key: value for key, value in os.environ.items()
           if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | given
    done = subprocess.run([sys.executable, "-c", PRINT], cwd=REPO, env=env, check=True,
                          capture_output=True, text=True)
    assert done.stdout.strip() == expected


@pytest.mark.parametrize("script", sorted(SCRIPTS - {"runs"}))
def test_each_script_that_computes_imports_threads_before_torch(script):
    """torch and everything that may import it come after threads in the file."""
    lines = (REPO / f"{script}.py").read_text(encoding="utf-8").splitlines()
    at = lines.index("import nanotune.threads  # noqa: F401")
    assert not [line for line in lines[:at] if line.startswith(("import torch", "from torch",
                "from nanotune", "from configurator", "from model", "from t5", "import numpy"))]
