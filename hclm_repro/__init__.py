__version__ = "0.1.0"

import importlib, os, sys
SHIPPED = os.path.join(os.path.dirname(__file__), 'shipped', 'model')   # the model that comes with the package
if 'torch' not in sys.modules: os.environ.setdefault('OMP_WAIT_POLICY', 'passive')   # torch reads it when it is loaded

def __getattr__(name):
    "All names are loaded with the first one that is asked for."
    names = importlib.import_module('.names', __name__)
    if not hasattr(names, name): raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(names, name)

# The program `hclm` asks for them when it has understood its arguments, so that its help need not wait for torch.
if os.path.basename(sys.argv[0]) not in ('hclm', 'hclm.exe'): from .names import *
