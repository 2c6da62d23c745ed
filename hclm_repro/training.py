"""How does a training run survive a kill?"""

# %%
import ast
import datetime
import hashlib
import inspect
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastcore.basics import patch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from hclm_repro.corpus import Lanes, segment_characters
from hclm_repro.machine import (
    autocast, demanded_threads, hardware, keep_memory, peak_megabytes, pick_precision, pick_threads)
from hclm_repro.model import MODELS, Config, LanguageModel, evaluating, load_pretrained, option
from hclm_repro.text import quotients, split_words

# %%
@dataclass(frozen=True)
class TrainingConfig(Config):
    "Choices of a training run. Exactly one of `epochs` and `word_budget` is set."
    lanes: int = option(16, at_least=1, doc='places of the training text that are read side by side')
    epochs: int | None = option(None, at_least=1, doc='passes over the training text')
    word_budget: int | None = option(200_000, at_least=1, doc='words to read, of all lanes together')
    lr: float = option(4e-3, above=0, doc='learning rate of AdamW at its highest')
    schedule: str = option('cosine', 'cosine', 'constant', doc='learning rate over the updates: a linear rise and '
                           'half a cosine down to 0, or always lr')
    warmup: float = option(0.05, at_least=0, at_most=1, doc='share of the updates in which the rate rises (cosine)')
    weight_decay: float = option(0.01, at_least=0, doc='share of a weight, times the rate, taken off each update')
    clip: float = option(1.0, above=0, doc='largest norm of the gradient of nats per character; scaled down above')
    precision: str = option('auto', 'auto', 'fp32', 'bf16', 'fp16', doc='of matrix products; auto: bf16 on cards '
                            'that have it, else fp32')
    threads: int | None = option(None, at_least=1, doc='processor threads; None: OMP_NUM_THREADS, or chosen by the work')
    min_count: int = option(25, at_least=1, doc='occurrences in train that a character of the alphabet has (K17 §3: 25)')
    seed: int = option(0, at_least=0, doc='of the weights, of dropout and of the samples')
    evaluations: int = option(4, at_least=1, doc='points of the curve, evenly over the updates')
    curve_words: int | None = option(20_000, at_least=1, doc='first words of valid that a point reads; None: all')
    sample_words: int = option(30, at_least=0, doc='words that the model writes at each point')
    log_every: int = option(20, at_least=1, doc='updates between two looks at the losses, for which the host waits')
    save_seconds: float = option(60.0, at_least=0, doc='seconds between two checkpoints')
    score_valid: bool = option(True, doc='whether all of valid is scored at the end')

# %%
@patch
def __post_init__(self:TrainingConfig):
    Config.__post_init__(self)
    if (self.epochs is None) == (self.word_budget is None):
        raise ValueError(f'epochs is {self.epochs} and word_budget is {self.word_budget}; '
                         'allowed: exactly one of them, the other None')

def learning_rate(config:TrainingConfig, step:int, updates:int) -> float:
    "Learning rate of update `step` (from 0) of `updates`."
    if config.schedule == 'constant': return config.lr
    warm = max(1, round(config.warmup * updates))
    if step < warm: return config.lr * (step + 1) / warm
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, updates - warm)))

def build(model, config, corpus, training:TrainingConfig) -> LanguageModel:
    "A fresh model (a class or its name) for the characters of `corpus`, its weights drawn from `training.seed`."
    if model in MODELS: model = MODELS[model]
    config = model.config_for(config, corpus, training.min_count)
    torch.manual_seed(training.seed)
    return model(config)

# %%
class Updater:
    """What turns predictions into better weights: AdamW (Loshchilov & Hutter 2019), its gradients clipped.

    `precision`: of matrix products, as in `TYPES`; `processes`: how many of them average their gradients."""
    def __init__(self, model, config:TrainingConfig, precision:str='fp32', processes:int=1):
        self.model = model
        self.config = config
        self.precision = precision
        self.processes = processes
        self.optimizer = torch.optim.AdamW(model.parameters(), config.lr, fused=True,
                                           weight_decay=config.weight_decay)
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=precision == 'fp16')

    def loss(self, network, plan, state, characters, reuse=False):
        """Nats per character of a segment that stands for `characters`, and the next state.

        `network`: the model, or what wraps it; with `reuse` the tensors of `state` may be written into."""
        with autocast(self.model.device, self.precision):
            predictions, state = network(plan, state, reuse=reuse)
        return predictions.nats.sum() / max(1, characters), state

# %%
@patch
def update(self:Updater, network, plan, state, characters, lr=None):
    "One update of the weights at rate `lr` (None: the one before). Returns the loss and the next state, detached."
    loss, state = self.loss(network, plan, state, characters, reuse=True)
    self.optimizer.zero_grad(set_to_none=True)
    self.scaler.scale(loss * self.processes).backward()   # several processes average their gradients
    self.scaler.unscale_(self.optimizer)
    nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
    if lr is not None:
        for group in self.optimizer.param_groups: group['lr'] = lr
    self.scaler.step(self.optimizer)
    self.scaler.update()
    return loss.detach(), state

# %%
@torch.no_grad()
def curve_bpc(model, tokens, lanes:int=8) -> float:
    "Bits per character of `tokens` read in `lanes` lanes from a cold start, surcharge left out."
    lanes = Lanes(tokens, min(lanes, len(tokens)), max(model.config.segment_words, 64))
    state, ledger = model.begin(lanes.lanes)
    nats, count = 0.0, 0
    with evaluating(model):
        for segment in lanes:
            plan, ledger = model.prepare(segment, ledger)
            predictions, state = model(plan.to(model.device), state, reuse=True)
            nats = nats + predictions.nats.sum(dtype=torch.float64)
            count += segment_characters(segment)
    return float(nats) / count / math.log(2)

# %%
def _lengths(corpus, split, words):
    "Words of each document of `split`, or of pieces of 1,000 words where there are no documents to speak of."
    lengths = [len(split_words(document)) for document in corpus.documents(split)]
    if len(lengths) >= 5: return lengths
    return [1000] * (words // 1000) + [words % 1000]

def evaluate(model, corpus, split='valid', segment=None) -> dict:
    """Score one split in one stream.

    Returns its counts, total `bits` and `surcharge`, the quotients without the surcharge (as K17),
    `bpc_exact` with it, `documents`: characters and bits of each, and the speller's bits for `terminators`
    (None where the model does not tell them apart)."""
    started = time.perf_counter()
    counts = corpus.counts(split)
    rows, terminators = [], 0.0
    for tables in model.score_tokens([iter(corpus.words(split))], segment):
        rows.append(tables[0][['characters', 'bits', 'surcharge']].to_numpy(float))
        if 'terminator' in tables[0]: terminators += tables[0].terminator.sum()

    rows = np.concatenate(rows)   # (words, 3)
    _, bits, surcharge = rows.sum(0)
    cuts = np.cumsum(_lengths(corpus, split, len(rows)))[:-1]
    sums = [part.sum(0) for part in np.split(rows, cuts) if len(part)]
    documents = [[int(length), round(total - extra, 3)] for length, total, extra in sums]
    return dict(split=split, **counts, bits=bits, surcharge=surcharge, **quotients(bits - surcharge, counts),
                bpc_exact=bits / counts['characters'], terminators=terminators or None,
                seconds=time.perf_counter() - started, documents=documents)

# %%
def write_atomically(path, write):
    "Call `write(file)` on a neighbour of `path`, then rename it: a kill leaves the old file or the new one."
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.part')
    with open(temporary, 'wb') as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

def write_record(record:dict, folder):
    "Write `record` as `folder`/record.json, a field a line."
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f'{json.dumps(name)}: {json.dumps(value)}' for name, value in record.items()]
    text = '{\n' + ',\n'.join(lines) + '\n}\n'
    write_atomically(folder / 'record.json', lambda file: file.write(text.encode()))

# %%
def _modules_behind(names):
    "Sources {name: bytes} of the modules of the package that `names` are or import, directly or not."
    from hclm_repro import __name__ as package
    todo = [name for name in names if name.startswith(f'{package}.')]
    found = {}
    while todo:
        name = todo.pop()
        if name in found: continue
        source = Path(find_spec(name).origin).read_bytes()
        found[name] = source
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.ImportFrom) or not node.module: continue
            module = f'{package}.{node.module}' if node.level else node.module
            if module.startswith(f'{package}.'): todo.append(module)
    return found

# %%
def _own_source(cls):
    "The source of the methods of a class that is not in a file of the package, as far as there is one."
    source = ''
    for name, method in sorted(vars(cls).items()):
        if not inspect.isfunction(method): continue
        try: source += inspect.getsource(method)
        except OSError: source += name   # typed at a prompt
    return source.encode()

def code_version(model_class) -> str:
    """Version of this package and a fingerprint of the code that a run of `model_class` stands on.

    That is the modules of the class and of its bases, this one, and all that they import from the package;
    of a class of your own, its methods."""
    from hclm_repro import __version__, __name__ as package
    bases = [cls for cls in model_class.__mro__ if issubclass(cls, LanguageModel)]
    inside = [cls.__module__ for cls in bases if cls.__module__.startswith(f'{package}.')]
    modules = _modules_behind([*inside, f'{package}.training'])
    sources = [modules[name] for name in sorted(modules)]
    sources += [_own_source(cls) for cls in bases if cls.__module__ not in modules]
    return f'{__version__}+{hashlib.sha256(b"".join(sources)).hexdigest()[:8]}'

# %%
def join_processes() -> tuple:
    "(rank, number of processes) of `torchrun`, which names them in the environment; else (0, 1)."
    if not distributed.is_available(): return 0, 1
    if not distributed.is_initialized():
        if int(os.environ.get('WORLD_SIZE', 1)) == 1: return 0, 1
        distributed.init_process_group(timeout=datetime.timedelta(days=1))   # the first one evaluates alone
    return distributed.get_rank(), distributed.get_world_size()

def deal(lanes:int, rank:int, processes:int) -> slice:
    "The lanes of process `rank`. Raises `ValueError` if there are more processes than lanes."
    if processes > lanes:
        fault = f'{lanes} lanes for {processes} processes'
        raise ValueError(f'{fault}; allowed: at most as many processes as lanes')
    return slice(lanes * rank // processes, lanes * (rank + 1) // processes)

# %%
class TrainingRun:
    """A training run in `folder`: everything that a resumed run needs, and its log.

    Raises `ValueError` if the folder holds another run."""
    def __init__(self, model, corpus, config:TrainingConfig, folder):
        self.folder = Path(folder)
        self.config = config
        self.corpus = corpus
        self.model = model
        self.device = model.device
        self.rank, self.processes = join_processes()
        self.identity = self.describe()
        self.plan_updates()
        self.start_counting()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.restore()
        self.network = DistributedDataParallel(model) if self.processes > 1 else model
        if self.threads is None: self.threads = self.choose_threads()
        self.clock = self.saved = time.perf_counter()

# %%
@patch
def describe(self:TrainingRun) -> dict:
    "What makes this run this run and no other. The number of threads does not."
    training = asdict(self.config)
    training.pop('threads')
    return dict(class_name=type(self.model).__name__,
                model=asdict(self.model.config),
                training=training,
                corpus=self.corpus.name,
                sha256=self.corpus.sha256)

@patch
def plan_updates(self:TrainingRun):
    "How many updates, on which segments, and after which of them valid is looked at."
    config = self.config
    segment_words = self.model.config.segment_words
    self.lanes = Lanes(self.corpus.words('train'), config.lanes, segment_words)
    if config.epochs: self.updates = config.epochs * len(self.lanes)
    else: self.updates = max(1, round(config.word_budget / (config.lanes * segment_words)))
    parts = range(1, config.evaluations + 1)
    self.evaluate_at = {round(self.updates * part / config.evaluations) for part in parts}
    self.own = deal(config.lanes, self.rank, self.processes)

# %%
_KEPT = ('step', 'seconds', 'words_read', 'characters_read', 'steps', 'curve', 'best', 'best_weights', 'resumed')

@patch
def start_counting(self:TrainingRun):
    "What changes with each update, as it is before the first."
    self.precision = pick_precision(self.device, self.config.precision)
    self.updater = Updater(self.model, self.config, self.precision, self.processes)
    self.state, self.ledger = self.model.begin(self.own.stop - self.own.start)
    torch.manual_seed(self.config.seed + self.rank)   # other lanes, other dropout
    self.threads = demanded_threads(self.config.threads)
    self.step = self.words_read = self.characters_read = self.resumed = 0
    self.seconds = 0.0
    self.steps = dict(step=[], words=[], lr=[], bpc=[])
    self.curve = []
    self.pending = []         # losses that are still on the device
    self.best = math.inf
    self.best_weights = None
    self.record = None

# %%
def _flat(identity):
    "`identity` without nesting: 'model.units' -> its value."
    plain = json.loads(json.dumps(identity))
    return pd.json_normalize(plain).to_dict('records')[0]

@patch
def _same(self:TrainingRun, other):
    "Raises `ValueError` if `other` is not the identity of this run."
    theirs = _flat(other)
    for name, value in _flat(self.identity).items():
        if name in theirs and value == theirs[name]: continue
        held = theirs.get(name, 'nothing')
        raise ValueError(f'{self.folder} holds a run with {name} = {held!r}, not {value!r}; '
                         'allowed: the same settings, another out_dir, or delete that folder')

@patch
def wait(self:TrainingRun):
    "Until all processes are here."
    if self.processes > 1: distributed.barrier()

# %%
@patch
def set_aside(self:TrainingRun):
    "Of a finished run of other code, keep the record under another name, so that it runs again."
    finished = self.folder / 'record.json'
    if not finished.exists(): return
    record = json.loads(finished.read_text())
    self._same(record['identity'])
    if record['code'] == code_version(type(self.model)): return
    (self.folder / 'checkpoint.pt').unlink(missing_ok=True)
    finished.rename(self.folder / f'record-{record["code"]}.json')

@patch
def restore(self:TrainingRun):
    "Go on from the checkpoint, if there is one. Raises `ValueError` if it belongs to another run."
    if self.rank == 0: self.set_aside()
    self.wait()
    finished = self.folder / 'record.json'
    path = self.folder / 'checkpoint.pt'
    if finished.exists():
        self.record = json.loads(finished.read_text())
        self.steps, self.curve = self.record['steps'], self.record['curve']
    elif path.exists(): self.load(torch.load(path, map_location=self.device, weights_only=True))

# %%
@patch
def next_segment(self:TrainingRun):
    "The segment of this update, all lanes; at the start of an epoch the model resets what its config says."
    place = self.step % len(self.lanes)
    if place == 0 and self.step > 0:
        self.state, self.ledger = self.model.new_epoch(self.state, self.ledger)
    return self.lanes[place]

@patch
def fetch(self:TrainingRun):
    "Move pending losses to the log, in bits per character. Raises `FloatingPointError` if one is not finite."
    if not self.pending: return
    losses = torch.stack([row['loss'] for row in self.pending])
    if self.processes > 1: distributed.all_reduce(losses)   # each has divided by the characters of all
    for row, loss in zip(self.pending, losses.tolist()):
        if not math.isfinite(loss):
            raise FloatingPointError(f'the loss of update {row["step"]} is {loss}; allowed: a finite number '
                                     '(try a smaller lr or clip)')
        row = dict(row, bpc=loss / math.log(2))
        for name, column in self.steps.items(): column.append(row[name])
    self.pending = []

# %%
@patch
def own_part(self:TrainingRun) -> dict:
    "What of the checkpoint belongs to this process: state, ledger and random numbers."
    state = {}
    for name, value in self.state.items():
        state[name] = value.cpu() if torch.is_tensor(value) else value
    cuda = torch.cuda.get_rng_state() if self.device.type == 'cuda' else None
    return dict(state=state, ledger=self.ledger, random=torch.get_rng_state(), cuda_random=cuda)

@patch
def save(self:TrainingRun):
    "Write the checkpoint: one file, with the parts of all processes."
    self.fetch()
    parts = [self.own_part()]
    if self.processes > 1:
        gathered = [None] * self.processes
        distributed.gather_object(parts[0], gathered if self.rank == 0 else None)
        parts = gathered
    if self.rank == 0:
        checkpoint = {name: getattr(self, name) for name in _KEPT}
        checkpoint.update(identity=self.identity, threads=self.threads, parts=parts,
                          model=self.model.state_dict(),
                          optimizer=self.updater.optimizer.state_dict(),
                          scaler=self.updater.scaler.state_dict())
        write_atomically(self.folder / 'checkpoint.pt', lambda file: torch.save(checkpoint, file))
    self.saved = time.perf_counter()

# %%
@patch
def load(self:TrainingRun, checkpoint):
    "Become the run that wrote `checkpoint`. Raises `ValueError` if that is not this one."
    self._same(checkpoint['identity'])
    parts = checkpoint['parts']
    if len(parts) != self.processes:
        raise ValueError(f'{self.folder} holds a run of {len(parts)} processes, not {self.processes}; '
                         'allowed: the same number, or another out_dir')
    self.model.load_state_dict(checkpoint['model'])
    self.updater.optimizer.load_state_dict(checkpoint['optimizer'])
    self.updater.scaler.load_state_dict(checkpoint['scaler'])
    for name in _KEPT: setattr(self, name, checkpoint[name])
    self.resumed += 1
    if self.threads is None: self.threads = checkpoint['threads']

    own = parts[self.rank]
    self.state, self.ledger = own['state'], own['ledger']
    torch.set_rng_state(own['random'].cpu())
    if own['cuda_random'] is not None: torch.cuda.set_rng_state(own['cuda_random'].cpu())

# %%
@patch
def choose_threads(self:TrainingRun) -> int:
    "How many threads to compute with: by the work of an update, and by trying some where that is much."
    if self.record: return self.record['hardware']['threads']
    if self.device.type != 'cpu': return torch.get_num_threads()
    if self.processes > 1: return 1
    segment = self.lanes[self.step % len(self.lanes)]
    plan, _ = self.model.prepare(segment[self.own], self.ledger)
    characters = segment_characters(segment)
    count = getattr(self.model, 'training_flops', None)

    def update():
        loss, _ = self.updater.loss(self.model, plan, self.state, characters)
        loss.backward()

    random = torch.get_rng_state()
    training = self.model.training
    self.model.train()
    threads = pick_threads(count and count(plan), update)
    self.model.train(training)
    self.model.zero_grad(set_to_none=True)
    torch.set_rng_state(random)   # the run draws what it would have drawn
    return threads

# %%
@patch
def add_point(self:TrainingRun):
    "A point of the curve, with a sample; and the best weights so far."
    bpc = curve_bpc(self.model, self.corpus.words('valid')[:self.config.curve_words])
    sample = dict(prompt='The', seed=self.config.seed, temperature=0.8, words=self.config.sample_words)
    sample['text'] = self.model.generate(**sample)
    self.curve.append(dict(step=self.step,
                           epoch=self.step / len(self.lanes),
                           words=self.words_read,
                           seconds=self.seconds,
                           valid_bpc=bpc,
                           sample=sample))
    if bpc < self.best:
        self.best = bpc
        self.best_weights = {name: weight.detach().clone() for name, weight in self.model.state_dict().items()}

# %%
@patch
def due(self:TrainingRun) -> bool:
    "Whether it is time to save. Of several processes the first one decides, so that all do the same."
    late = time.perf_counter() - self.saved > self.config.save_seconds
    if self.processes == 1: return late
    if self.step % self.config.log_every: return False
    answer = torch.tensor(float(late), device=self.device)
    distributed.broadcast(answer, 0)
    return bool(answer)

@patch
def after(self:TrainingRun, words, characters, lr, loss, watch=None):
    "The bookkeeping after an update. Only training itself counts as training time."
    self.step += 1
    self.words_read += words
    self.characters_read += characters
    self.pending.append(dict(step=self.step, words=self.words_read, lr=lr, loss=loss))
    if len(self.pending) >= self.config.log_every: self.fetch()
    self.seconds += time.perf_counter() - self.clock

    evaluated = self.step in self.evaluate_at
    if evaluated and self.rank == 0: self.add_point()
    if evaluated or self.due():
        self.save()
        if watch and self.rank == 0: watch(self)
    self.clock = time.perf_counter()

# %%
@patch
def result(self:TrainingRun) -> dict:
    "The record of a finished run, fit for JSON; at most 2,000 logged updates."
    thin = max(1, math.ceil(len(self.steps['step']) / 2000))
    steps = pd.DataFrame(self.steps)[thin - 1::thin].round(dict(lr=7, bpc=4))
    model_class = type(self.model)
    return dict(
        label=self.folder.name, class_name=model_class.__name__, parameters=self.model.parameter_count,
        identity=self.identity, code=code_version(model_class), date=datetime.date.today().isoformat(),
        hardware=hardware(self.device), precision=self.precision, updates=self.step,
        planned_updates=self.updates, resumed=self.resumed, words_read=self.words_read,
        train_seconds=self.seconds, words_per_second=self.words_read / self.seconds,
        characters_per_second=self.characters_read / self.seconds, peak_megabytes=peak_megabytes(self.device),
        processes=self.processes, steps=steps.to_dict('list'), curve=self.curve,
        valid=evaluate(self.model, self.corpus) if self.config.score_valid else None)

# %%
@patch
def conclude(self:TrainingRun):
    "Score valid once with the best weights, save the model, write the record."
    self.model.load_state_dict(self.best_weights)
    self.model.save_pretrained(self.folder / 'model')
    self.record = self.result()
    write_record(self.record, self.folder)

@patch
def finish(self:TrainingRun, watch=None) -> dict:
    "The record, with the best weights in the model; a run that had none yet is concluded."
    new = self.record is None
    if new: self.save()
    if new and self.rank == 0: self.conclude()
    self.wait()
    if self.rank > 0 or not new:
        best = load_pretrained(self.folder / 'model')
        self.model.load_state_dict(best.state_dict())
    if self.record is None: self.record = json.loads((self.folder / 'record.json').read_text())
    self.model.eval()
    if watch and self.rank == 0: watch(self)
    return self.record

# %%
@patch
def advance(self:TrainingRun, watch=None):
    "One update on the next segment."
    segment = self.next_segment()
    plan, self.ledger = self.model.prepare(segment[self.own], self.ledger)
    lr = learning_rate(self.config, self.step, self.updates)
    characters = segment_characters(segment)
    loss, self.state = self.updater.update(self.network, plan.to(self.device), self.state, characters, lr)
    self.after(len(segment) * len(segment[0]), characters, lr, loss, watch)

def train(model, corpus, config:TrainingConfig, folder, watch=None) -> dict:
    """Train `model` on `corpus.train` in `folder`, resuming from a checkpoint there. Returns the record.

    The weights that did best on valid end up in `model`, which is left in evaluation mode, and in
    `folder/model`; `watch(run)` is called after each evaluation and checkpoint and at the end. From
    then on the process keeps its memory (`keep_memory`) and the run's number of threads. Under `torchrun` the processes share the lanes, and the folder; the first one
    evaluates, writes and watches."""
    keep_memory()
    run = TrainingRun(model, corpus, config, folder)
    todo = range(run.step, 0 if run.record else run.updates)
    quiet = run.rank > 0 or bool(os.environ.get('TQDM_DISABLE'))   # tqdm's notebook bar does not look
    model.train()
    torch.set_num_threads(run.threads)
    for _ in tqdm(todo, initial=run.step, total=run.updates, unit='update', desc=run.folder.name,
                  disable=quiet, mininterval=1):
        run.advance(watch)
    return run.finish(watch)
