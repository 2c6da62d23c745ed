import os, subprocess, sys
from pathlib import Path

import nbformat

root = Path(__file__).resolve().parent.parent
notebooks = sorted((root/'nbs').glob('[!_.]*.ipynb'))


def read(path): return nbformat.read(path, as_version=4)

def is_parameters(cell): return 'parameters' in cell.metadata.get('tags', [])

def has_parameters(path): return any(is_parameters(c) for c in read(path).cells)

def run(*command, cwd, timeout=3600, **env):
    "Run a command of the tests' own environment. The time limit is for what hangs, not for what is slow."
    bin = Path(sys.executable).parent
    return subprocess.run([bin/command[0], *command[1:]], cwd=cwd, timeout=timeout, env={**os.environ, **env},
                          capture_output=True, text=True)
