import os, shutil
from collections import Counter
from pathlib import Path

import pytest
from common import root

os.environ.setdefault('OMP_NUM_THREADS', '1')   # tests run side by side; what they start takes it from here


@pytest.fixture
def copy(tmp_path):
    "A copy of the working tree, for tests that rebuild parts of it."
    ignored = shutil.ignore_patterns('.git', '.venv', 'runs', 'build', 'dist', '_book', '*.egg-info', '__pycache__', '.*cache*', '.hypothesis')
    return Path(shutil.copytree(root, tmp_path/'copy', ignore=ignored))


@pytest.fixture
def counted(record_property):
    "`counted(what, number)` adds to the counts that are printed at the end."
    return lambda what, number=1: record_property('counted', (what, number))


def pytest_terminal_summary(terminalreporter):
    counts = Counter()
    for report in terminalreporter.stats.get('passed', []):
        for name, value in report.user_properties:
            if name == 'counted': counts[value[0]] += value[1]
    if not counts: return
    terminalreporter.section('counts of passed tests')
    for what, number in sorted(counts.items()): terminalreporter.line(f'{number:7,} {what}')
