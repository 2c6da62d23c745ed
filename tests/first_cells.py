"""Runs the first cells of chapters, up to the check of their parameters, with a misspelt one: python first_cells.py CHAPTER ...

Prints {name of a chapter: the last line of its error, or None}. What takes long, loading the package, happens once; each
chapter then has a process of its own, so that none sees what another has defined."""
import contextlib, json, multiprocessing, os, sys
from pathlib import Path

import matplotlib
import hclm_repro, pandas
from IPython.display import display
from common import code_cells, is_parameters

matplotlib.use('agg')


def first_error(path):
    "The last line of the error that the chapter `path` ends with, when `sead` is set among its parameters."
    space = {'__name__': '__main__', 'display': display}   # which a kernel has without an import
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        for cell in code_cells(path):
            try: exec(compile(cell.source, str(path), 'exec'), space)
            except Exception as error: return f'{type(error).__name__}: {error}'
            if is_parameters(cell): space['sead'] = 7


if __name__ == '__main__':
    with multiprocessing.get_context('fork').Pool(1, maxtasksperchild=1) as pool:
        paths = [Path(name) for name in sys.argv[1:]]
        print(json.dumps(dict(zip([path.stem for path in paths], pool.map(first_error, paths, chunksize=1)))))
