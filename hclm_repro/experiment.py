"""How does a chapter, a shell and a cluster run the same experiment, and where are its results kept?"""

# %%
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import pandas as pd
import torch
from fastcore.basics import patch

from hclm_repro.corpus import Corpus, load_corpus
from hclm_repro.machine import demanded_threads, pick_device, usable_cores
from hclm_repro.model import MODELS, Config, option
from hclm_repro.text import LINE_END
from hclm_repro.training import TrainingConfig, build, code_version, train, write_atomically

# %%
_WANG = dict(cache_slots=800, lanes=64, epochs=5, word_budget=None, evaluations=5, lr=2e-3)
PRESETS = dict(
    tiny=dict(meaning='a chapter in under a minute: for tests', units=16, embedding=12, segment_words=8,
              cache_slots=50, lanes=4, word_budget=1_600, evaluations=2, curve_words=400, sample_words=8, log_every=5),
    smoke=dict(meaning='a chapter in under five minutes: where there is smoke there is fire', units=64, embedding=32,
               segment_words=16, cache_slots=500, dropout=0.1, lanes=8, word_budget=205_000, lr=6e-3, evaluations=4,
               curve_words=8_000),
    quick=dict(meaning='ten minutes at most for a model and seed on two cores', units=192, segment_words=35,
               cache_slots=800, dropout=0.1, lanes=32, word_budget=1_500_000, lr=4e-3, evaluations=3))

# %%
PRESETS.update(
    wt2=dict(meaning='our best size for WikiText-2', units=256, segment_words=35, cache_slots=800, dropout=0.1,
             lanes=32, epochs=3, word_budget=None, lr=4e-3, evaluations=6, curve_words=40_000, precision='bf16'),
    run1=dict(_WANG, meaning='Run 1 of Wang (2025)', units=256, segment_words=10, cache_reset='segment',
              state_reset='segment', schedule='constant'),
    run2=dict(_WANG, meaning='Run 2 of Wang (2025)', units=512, segment_words=35, cache_reset='epoch',
              state_reset='epoch', dropout=0.2),
    kawakami=dict(meaning='as K17', units=600, embedding=600, segment_words=35, cache_slots=100, score='additive',
                  key_update='average', cache_reset='epoch', state_reset='epoch', dropout=0.5, init_range=0.08,
                  lanes=10, epochs=10, word_budget=None, evaluations=10, lr=2e-3, schedule='constant',
                  weight_decay=0.0, clip=10.0))

_OWN = {}   # model -> preset -> choices that differ for this model

# %%
def _known_preset(name):
    "Raises `ValueError` if `name` is not a preset."
    if name not in PRESETS: raise ValueError(f'preset is {name!r}; allowed: one of {", ".join(PRESETS)}')

def register_presets(model_name:str, choices:dict):
    "Choices {preset: {field: value}} in which a model, and what derives from it, differs from `PRESETS`."
    for name in choices: _known_preset(name)
    _OWN[model_name] = choices

def preset(model, name:str):
    """`(model config, TrainingConfig)` of the preset `name` for a model class or its name.

    Raises `ValueError` for an unknown preset or model."""
    _known_preset(name)
    if isinstance(model, str) and model not in MODELS:
        raise ValueError(f'{model!r} is not a model; allowed: one of {", ".join(MODELS)}')
    if isinstance(model, str): model = MODELS[model]
    choices = dict(PRESETS[name])
    for cls in reversed(model.__mro__):
        choices.update(_OWN.get(cls.__name__, {}).get(name, {}))

    def pick(kind):
        names = {f.name for f in fields(kind)}
        return kind(**{key: value for key, value in choices.items() if key in names})
    return pick(model.Config), pick(TrainingConfig)

# %%
def results_folder():
    "The folder of committed records of the checkout that holds this place or the package, or None."
    from hclm_repro import __file__ as package
    for place in (Path.cwd(), *Path.cwd().parents, *Path(package).resolve().parents):
        for name in ('pyproject.toml', 'settings.ini'):
            file = place / name
            if file.is_file() and 'hclm_repro' in file.read_text(encoding='utf-8'): return place / 'results'

def keep(run, name:str=None, results=None) -> Path:
    "Copy the record of the run in folder `run` to `results`. Raises `FileNotFoundError` if it has none."
    source = Path(run) / 'record.json'
    folder = results or results_folder()
    if not source.exists():
        raise FileNotFoundError(f'{run} has no record; allowed: the folder of a run that has finished')
    if folder is None:
        raise FileNotFoundError('no results folder here; allowed: a checkout of the project, or name one')
    Path(folder).mkdir(parents=True, exist_ok=True)
    target = Path(folder) / f'{name or Path(run).name}.json'
    write_atomically(target, lambda file: file.write(source.read_bytes()))
    return target

def load_records(pattern:str='*', results=None) -> dict:
    "Kept records whose file name matches `pattern`: name -> record, by name."
    folder = results or results_folder()
    if folder is None: return {}
    return {path.stem: json.loads(path.read_text()) for path in sorted(Path(folder).glob(f'{pattern}.json'))}

# %%
def run_name(corpus:str, model:str, preset:str, seed:int) -> str:
    "Folder and record of a run, as 'wikitext-2-HCLM+Cache-wt2-0'."
    model = model.replace(' + ', '+').replace(' ', '-')
    return f'{corpus}-{model}-{preset}-{seed}'

def kept_runs(corpus:str, models, preset:str, results=None) -> dict:
    "{(model, seed): record} of the kept runs of `models`."
    found = {}
    for model in models:
        for name, record in load_records(run_name(corpus, model, preset, '*'), results).items():
            seed = name.rsplit('-', 1)[1]
            if seed.isdigit(): found[model, int(seed)] = record
    return found

# %%
@dataclass(frozen=True)
class Experiment(Config):
    "Parameters that all chapters have. Raises `ValueError` with one sentence."
    corpus: str = option('pydoc', doc='name of a corpus, or the path of a text file or folder')
    preset: str = option('smoke', doc='sizes and length of the training runs')
    seeds: str | int = option('0', doc="one seed, or several as '0,1,2'")
    device: str = option('auto', 'auto', 'cpu', 'cuda', doc='what the runs run on; auto: a card if there is one')
    out_dir: str = option('runs', doc='folder of the runs')

    def __post_init__(self):
        super().__post_init__()
        _known_preset(self.preset)
        self.seed_list

    @property
    def seed_list(self) -> list:
        try: seeds = [int(seed) for seed in str(self.seeds).split(',')]
        except ValueError: seeds = [-1]
        if min(seeds) >= 0 and len(set(seeds)) == len(seeds): return seeds
        raise ValueError(f'seeds is {self.seeds!r}; allowed: one integer of at least 0, or different ones '
                         'separated by commas')

# %%
def read_parameters(kind, before:dict, after:dict):
    """The checked parameters of a chapter, a `kind` of `Experiment`.

    `before`: a copy of `globals()` from above its parameters cell; `after`: `globals()` now. Raises
    `ValueError` for a name that `kind` does not have."""
    names = {f.name for f in fields(kind)}
    for name, value in sorted(after.items()):
        old = name in before and before[name] is value
        if old or value is before or name.startswith('_') or name in names: continue
        raise ValueError(f'{name} is not a parameter of this chapter; allowed: {", ".join(sorted(names))}')
    return kind(**{name: after[name] for name in names if name in after})

# %%
@dataclass(frozen=True)
class Job:
    "A training run to be done: what `build` and `train` need."
    model: type             # a class
    config: Config          # of the model
    corpus: str | Corpus    # a name for `load_corpus`, or the corpus itself
    training: TrainingConfig
    folder: str | Path
    device: str = 'auto'

@dataclass
class Progress:
    "What a `watch` is shown of a run in another process."
    folder: Path
    step: int
    steps: dict
    curve: list
    record: dict = None

# %%
@patch
def run(self:Job, watch=None) -> dict:
    "Train as `train` does, on one thread unless somebody has said how many. Returns the record."
    corpus = self.corpus
    if isinstance(corpus, str): corpus = load_corpus(corpus)
    training = replace(self.training, threads=demanded_threads(self.training.threads) or 1)
    model = build(self.model, self.config, corpus, training)
    return train(model.to(pick_device(self.device)), corpus, training, self.folder, watch)

@patch
def finished(self:Job) -> bool:
    "Whether the folder holds the record of a run of today's code."
    path = Path(self.folder) / 'record.json'
    return path.exists() and json.loads(path.read_text())['code'] == code_version(self.model)

@patch
def travels(self:Job) -> bool:
    "Whether another process can do it: it finds the class by its name, and there is no card to share."
    module = sys.modules[self.model.__module__]
    named = getattr(module, self.model.__name__, None) is self.model
    return named and module.__name__ != '__main__' and pick_device(self.device).type == 'cpu'

# %%
def _work():
    "A worker process: reads a job from its standard input, writes (kind, value) to its standard output."
    signal.signal(signal.SIGINT, signal.SIG_IGN)   # the parent, which gets it too, ends its workers
    pipe = os.fdopen(os.dup(1), 'wb')
    os.dup2(2, 1)                                  # what a model prints is no message
    sys.path[:] = pickle.load(sys.stdin.buffer)    # from here on the class of the job can be found
    job = Job(**pickle.load(sys.stdin.buffer))

    def tell(kind, value):
        pickle.dump((kind, value), pipe)
        pipe.flush()
    def watch(run):
        tell('progress', {f.name: getattr(run, f.name) for f in fields(Progress)})
    try: tell('record', job.run(watch))
    except Exception as error:
        try: pickle.loads(pickle.dumps(error))
        except Exception: error = RuntimeError(f'{type(error).__name__}: {error}')
        tell('error', error)

# %%
class Worker:
    "A process that does a `Job`. What it tells is put into `inbox` as (worker, kind, value), kind 'end' at last."
    def __init__(self, job, inbox):
        self.job = job
        self.inbox = inbox
        command = [sys.executable, '-c', 'from hclm_repro import experiment; experiment._work()']
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self.environment())
        threading.Thread(target=self.listen, daemon=True).start()

    def environment(self):
        "Variables of the process: it finds this package, and draws no bars."
        from hclm_repro import __file__ as package
        paths = [str(Path(package).resolve().parent.parent), os.environ.get('PYTHONPATH')]
        return dict(os.environ, TQDM_DISABLE='1', PYTHONPATH=os.pathsep.join(filter(None, paths)))

# %%
@patch
def listen(self:Worker):
    "Hand over the job, then pass on what is told until the process ends."
    try:
        with self.process.stdin as pipe:
            pickle.dump(sys.path, pipe)
            pickle.dump(vars(self.job), pipe)
        while True: self.inbox.put((self, *pickle.load(self.process.stdout)))
    except (EOFError, OSError, pickle.UnpicklingError): pass
    self.inbox.put((self, 'end', self.process.wait()))

@patch
def stop(self:Worker):
    "End the process, whatever it does."
    self.process.kill()
    self.process.wait()

# %%
def _side_by_side(jobs, processes, watch):
    "Records of `jobs` {place: job}, by place; at most `processes` of them at a time."
    inbox = queue.Queue()
    waiting = list(jobs.items())
    working, records = {}, {}
    try:
        while len(records) < len(jobs):
            while waiting and len(working) < processes:
                place, job = waiting.pop(0)
                working[Worker(job, inbox)] = place
            worker, kind, value = inbox.get()
            if kind == 'record': records[working.pop(worker)] = value
            elif kind == 'error': raise value
            elif kind == 'progress' and watch: watch(Progress(**value))
            elif kind == 'end' and worker in working:
                raise RuntimeError(f'the process of {worker.job.folder} ended with code {value} and no word; '
                                   'allowed: start it again, it resumes from its last checkpoint')
    finally:
        for worker in working: worker.stop()
    return records

# %%
def train_all(jobs, watch=None, processes:int=None) -> list:
    """The records of `jobs` (`Job`s) in their order, runs side by side in processes where there are cores.

    Each run has one thread, or what OMP_NUM_THREADS or its config say, whether it has a process of its own or
    not: its record is the same to the bit. This process keeps that number, too. A run that has finished is
    read. Runs on a card, and of classes that are defined in a notebook, are done one after another in this
    process. `watch` is called here, as by `train`. `processes`: how many at a time (None: as there are cores).
    An error in one run ends all; what is not finished resumes next time."""
    jobs = dict(enumerate(jobs))
    threads = max([demanded_threads(job.training.threads) or 1 for job in jobs.values()], default=1)
    if processes is None: processes = max(1, usable_cores() // threads)
    away = {place: job for place, job in jobs.items() if job.travels() and not job.finished()}
    if min(len(away), processes) < 2: away = {}
    torch.set_num_threads(threads)
    records = _side_by_side(away, processes, watch)
    for place, job in jobs.items():
        if place not in away: records[place] = job.run(watch)
    return [records[place] for place in jobs]

# %%
class LiveCurve:
    "As `watch`: draws training and valid bits per character of runs, at most every `every` seconds."
    def __init__(self, every:float=3.0):
        self.every = every
        self.last = -float('inf')
        self.runs = {}            # name -> what is drawn of it
        self.figure = None
        self.display = None

    def __call__(self, run):
        self.runs[run.folder.name] = pd.DataFrame(run.steps), pd.DataFrame(run.curve)
        if time.monotonic() - self.last < self.every and not run.record: return
        import matplotlib.pyplot as plt
        from IPython.display import display
        if self.figure is None:
            self.figure, self.ax = plt.subplots(figsize=(6.5, 3.4))
            plt.close(self.figure)   # displayed here, not once more at the end of the cell
        self.redraw()
        if self.display is None: self.display = display(self.figure, display_id=True)
        else: self.display.update(self.figure)
        self.last = time.monotonic()

# %%
@patch
def redraw(self:LiveCurve):
    "Thin lines: training, smoothed; dots: valid, in lanes. Seeds of a model share a colour."
    self.ax.clear()
    colours = {}
    for name, (steps, curve) in self.runs.items():
        model = name.rsplit('-', 1)[0]
        colour = colours.setdefault(model, f'C{len(colours)}')
        if len(steps): self.ax.plot(steps.words, steps.bpc.ewm(span=40).mean(), color=colour, alpha=.35)
        if len(curve): self.ax.plot(curve.words, curve.valid_bpc, 'o-', color=colour, ms=4, label=name)
    self.ax.set(xlabel='words read', ylabel='bits per character')
    self.ax.set_title('thin: training, smoothed; dots: valid, in lanes')
    if colours: self.ax.legend(fontsize=8)

# %%
def plot_bits(table, ax=None, limit:int=24):
    "Bits of the first `limit` words of a `score` table as bars."
    import matplotlib.pyplot as plt
    ax = ax or plt.subplots(figsize=(9, 2.6))[1]
    shown = table.head(limit)
    names = ['\u23ce' if word == LINE_END else word[:18] for word in shown.word]
    ax.bar(range(len(shown)), shown.bits)
    ax.set_xticks(range(len(shown)), names, rotation=60, ha='right', fontsize=8)
    ax.set_ylabel('bits')
    return ax
