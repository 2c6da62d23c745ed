"""What does the program run on, and how many threads does it pay to use?"""

# %%
import contextlib
import ctypes
import os
import platform
import sys
import warnings
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

# %%
def cuda_runs(capability, built) -> bool:
    """Whether kernels `built` (sm_80, compute_90, ...) run on a card of `capability` (major, minor).

    A binary (sm) runs within its major version, portable code (compute) on everything later."""
    have = 10 * capability[0] + capability[1]
    for arch in built:
        kind, _, name = arch.partition('_')
        number = int(''.join(c for c in name if c.isdigit()))
        if kind == 'compute' and number <= have: return True
        if kind == 'sm' and number <= have and number // 10 == capability[0]: return True
    return False

def _no_kernels(capability, built):
    "The sentence about a card that this torch cannot use."
    fault = (f'{torch.cuda.get_device_name()} has capability {capability[0]}.{capability[1]}, '
             f'this torch is built for {" ".join(built)}')
    allowed = ('device=cpu, another card, or a wheel that supports this one '
               '(torch==2.7.1 is the last default wheel for a P100)')
    return f'{fault}; allowed: {allowed}'

# %%
def pick_device(name:str='auto') -> torch.device:
    """A `torch.device` for 'auto', 'cpu' or 'cuda'. Under `torchrun` each process takes a card of its own.

    Raises `ValueError` for another name and `RuntimeError` if a card is asked for that torch cannot use;
    'auto' warns and takes the CPU."""
    if name not in ('auto', 'cpu', 'cuda'):
        raise ValueError(f'device is {name!r}; allowed: one of auto, cpu, cuda')
    if name == 'cpu': return torch.device('cpu')
    if not torch.cuda.is_available():
        if name == 'auto': return torch.device('cpu')
        raise RuntimeError('device is cuda, but torch sees no card; allowed: device=cpu')

    capability = torch.cuda.get_device_capability()
    built = torch.cuda.get_arch_list()
    if cuda_runs(capability, built):
        torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)))   # named by torchrun
        return torch.device('cuda')
    message = _no_kernels(capability, built)
    if name == 'cuda': raise RuntimeError(message)
    warnings.warn(message)
    return torch.device('cpu')

# %%
TYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)   # precision -> of matrix products

def pick_precision(device:torch.device, name:str='auto') -> str:
    """A name in `TYPES`; 'auto' is bf16 on a CUDA card of capability 8.0 or more, fp32 elsewhere.

    Raises `ValueError` for another name and for fp16 without a card."""
    if name == 'auto':
        fast = device.type == 'cuda' and torch.cuda.get_device_capability() >= (8, 0)
        return 'bf16' if fast else 'fp32'
    if name not in TYPES:
        raise ValueError(f'precision is {name!r}; allowed: one of auto, {", ".join(TYPES)}')
    if name == 'fp16' and device.type != 'cuda':
        raise ValueError('precision is fp16, which needs a CUDA card; allowed on a CPU: auto, fp32, bf16')
    return name

def autocast(device:torch.device, precision:str):
    "A context in which matrix products are computed in `precision`."
    if precision == 'fp32': return contextlib.nullcontext()
    return torch.autocast(device.type, TYPES[precision])

# %%
def seconds(function, threads:int=None, at_least:float=0.2) -> float:
    """Median seconds of `function()` on `threads` threads (None: as many as now), a card waited for.

    It is called again and again for `at_least` seconds, after a warm-up (`torch.utils.benchmark.Timer`)."""
    threads = threads or torch.get_num_threads()
    timer = Timer('function()', globals=dict(function=function), num_threads=threads)
    return timer.blocked_autorange(min_run_time=at_least).median

# %%
def usable_cores() -> int:
    "Processor cores that this process may use."
    if hasattr(os, 'sched_getaffinity'): return len(os.sched_getaffinity(0))   # Linux
    return os.cpu_count() or 1

@contextlib.contextmanager
def using_threads(threads:int):
    "torch computes with `threads` threads inside the `with`, with as many as before after it."
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try: yield threads
    finally: torch.set_num_threads(before)

# %%
SMALL_WORK = 1e9   # floating-point operations of an update for which one thread is best, see chapter 04
GAIN = 1.25        # how many times faster twice the threads must be

def demanded_threads(threads:int=None):
    "`threads`, else what the variable OMP_NUM_THREADS names, else None: nobody has said how many."
    named = os.environ.get('OMP_NUM_THREADS', '')
    if threads is None and named.isdigit(): return int(named)
    return threads

def pick_threads(work, update, cores:int=None) -> int:
    """How many threads to compute updates with: one for small work, else doubled as long as that pays.

    `work`: floating-point operations of an update, None if unknown; `update()` computes one and changes
    nothing; `cores`: the most threads (None: `usable_cores()`)."""
    cores = cores or usable_cores()
    if cores == 1 or (work is not None and work < SMALL_WORK): return 1
    best, least = 1, seconds(update, 1)
    while 2 * best <= cores:
        measured = seconds(update, 2 * best)
        if measured * GAIN > least: break
        best, least = 2 * best, measured
    return best

# %%
def keep_memory():
    "Let the C library keep what is freed for the next tensor. Where it has no such switch, do nothing."
    try: mallopt = ctypes.CDLL(None).mallopt   # glibc
    except (AttributeError, OSError, TypeError): return
    threshold, trim = -3, -1   # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
    mallopt(threshold, 1 << 30)
    mallopt(trim, (1 << 31) - 1)

# %%
def _proc(file, field):
    "The first value of `field` in a file of /proc, None where there is none."
    path = Path('/proc') / file
    if not path.exists(): return None   # not Linux
    for line in path.read_text().splitlines():
        name, _, value = line.partition(':')
        if name.strip() == field: return value.strip()

def peak_megabytes(device:torch.device):
    "Peak memory so far in MiB: of the card, or of this process; None where it cannot be had (Windows)."
    if device.type == 'cuda': return torch.cuda.max_memory_allocated() / 2 ** 20
    peak = _proc('self/status', 'VmHWM')   # getrusage on Linux begins with the peak of the parent process
    if peak: return int(peak.split()[0]) / 2 ** 10
    try: import resource
    except ImportError: return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2 ** 20 if sys.platform == 'darwin' else 2 ** 10)   # bytes on a Mac, KiB elsewhere

def hardware(device:torch.device) -> dict:
    "What a run ran on, for its record."
    card = torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'
    return dict(cpu=_proc('cpuinfo', 'model name') or platform.processor(),
                threads=torch.get_num_threads(),
                torch=torch.__version__,
                device=card,
                python=platform.python_version())
