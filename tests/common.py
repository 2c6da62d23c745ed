import os, subprocess, sys
from pathlib import Path

import nbformat

root = Path(__file__).resolve().parent.parent
notebooks = sorted((root/'nbs').glob('[!_.]*.ipynb'))
thorough = os.environ.get('HCLM_TESTS') == 'long'


def many(short, long):
    "How many cases of a kind: `short` of them in `make test`, `long` in `make test-long`."
    return long if thorough else short


def check_sentence(error, *words):
    "An error that a user can read: a `ValueError` or `OSError` of one sentence that says what is allowed and has all `words`."
    text = str(error)
    assert isinstance(error, (ValueError, OSError, ArithmeticError)), f'{type(error).__name__}: {text}'
    assert text.count('; allowed: ') == 1 and '\n' not in text and len(text) < 1000, text
    assert not [word for word in words if str(word) not in text], text


def files(folder):
    "What lies in a folder: the content of each file; None for what is no file."
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob('*')}


def read(path): return nbformat.read(path, as_version=4)

def code_cells(path): return [c for c in read(path).cells if c.cell_type == 'code' and c.source.strip()]

def is_parameters(cell): return 'parameters' in cell.metadata.get('tags', [])

def has_parameters(path): return any(is_parameters(c) for c in read(path).cells)

def run(*command, cwd, timeout=3600, **env):
    "Run a command of the tests' own environment. The time limit is for what hangs, not for what is slow."
    bin = Path(sys.executable).parent
    return subprocess.run([bin/command[0], *command[1:]], cwd=cwd, timeout=timeout, env={**os.environ, **env},
                          capture_output=True, text=True)
