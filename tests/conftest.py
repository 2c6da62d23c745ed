import os, shutil
from pathlib import Path

import pytest
from common import root

os.environ.setdefault('OMP_NUM_THREADS', '1')   # tests run side by side; what they start takes it from here


@pytest.fixture
def copy(tmp_path):
    "A copy of the working tree, for tests that rebuild parts of it."
    ignored = shutil.ignore_patterns('.git', '.venv', 'runs', 'build', 'dist', '*.egg-info', '__pycache__', '.*cache*')
    return Path(shutil.copytree(root, tmp_path/'copy', ignore=ignored))
