"""What must a language model offer so that any two can be trained, compared, resumed and shipped in the same way?"""

# %%
import contextlib
import io
import json
import math
import typing
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice, product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastcore.basics import patch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from torch.nn import functional as F

from hclm_repro.text import (
    Alphabet, DUMMY, LINE_END, PADDING, UNKNOWN, characters, join_words, split_words, stream_words)

# %%
def option(default, *choices, at_least=None, above=None, at_most=None, doc=''):
    "A config field: its default, its allowed values, and `doc`: its meaning, unit and source."
    rule = dict(choices=choices, at_least=at_least, above=above, at_most=at_most, doc=doc)
    return field(default=default, metadata=rule)

def _type_fits(value, kind):
    "Whether `value` has a type of `kind`: an integer counts as a number, True and False do not."
    kinds = typing.get_args(kind) or (kind,)
    if value is None: return type(None) in kinds
    if isinstance(value, bool): return bool in kinds
    if isinstance(value, int) and float in kinds: return True
    return isinstance(value, kinds)

def _range_fits(value, rule):
    "Whether `value` is one of the choices of `rule` and within its bounds."
    if value is None: return True
    if rule.get('choices') and value not in rule['choices']: return False
    if rule.get('at_least') is not None and value < rule['at_least']: return False
    if rule.get('above') is not None and value <= rule['above']: return False
    return rule.get('at_most') is None or value <= rule['at_most']

# %%
def _allowed(kind, rule):
    "What a field accepts, in words."
    if rule.get('choices'): return 'one of ' + ', '.join(map(str, rule['choices']))
    names = {int: 'an integer', float: 'a number', str: 'a string', bool: 'True or False', type(None): 'None'}
    kinds = ' or '.join(names[k] for k in typing.get_args(kind) or (kind,))

    bounds = []
    for key, phrase in (('at_least', 'at least'), ('above', 'above'), ('at_most', 'at most')):
        if rule.get(key) is not None: bounds.append(f'{phrase} {rule[key]}')
    return f'{kinds}, {" and ".join(bounds)}' if bounds else kinds

@dataclass(frozen=True)
class Config:
    "A frozen dataclass that checks types and ranges of its fields. Raises `ValueError` with one sentence."
    def __post_init__(self):
        kinds = typing.get_type_hints(type(self))
        for f in fields(self):
            value = getattr(self, f.name)
            kind = kinds[f.name]
            if _type_fits(value, kind) and _range_fits(value, f.metadata): continue
            allowed = _allowed(kind, f.metadata)
            raise ValueError(f'{type(self).__name__}: {f.name} is {value!r}; allowed: {allowed}')

# %%
def describe(config):
    "The fields of a config or config class as a table: default or value, allowed values, meaning."
    kinds = typing.get_type_hints(config if isinstance(config, type) else type(config))
    rows = {}
    for f in fields(config):
        value = f.default if isinstance(config, type) else getattr(config, f.name)
        allowed = _allowed(kinds[f.name], f.metadata)
        rows[f.name] = dict(value=repr(value), allowed=allowed, meaning=f.metadata.get('doc', ''))
    return pd.DataFrame(rows).T

# %%
RESETS = ('segment', 'epoch', 'never')

@dataclass(frozen=True)
class ModelConfig(Config):
    "What the config of every model has."
    alphabet: str = option('', doc='characters that the model tells apart; taken from the training text')
    segment_words: int = option(35, at_least=1, doc='words of a lane between two updates')
    state_reset: str = option('epoch', *RESETS, doc='when the recurrent state starts over in training; '
                              'scoring starts over for each text, and at each segment with `segment`')
    dropout: float = option(0.0, at_least=0, at_most=0.95, doc='probability that dropout sets an entry to zero')

@dataclass(frozen=True)
class CacheConfig(Config):
    "What the config of a model with a cache of recent words has."
    cache_slots: int | None = option(800, at_least=0, doc='words that the cache holds; 0: no cache, None: no bound')
    score: str = option('dot', 'dot', 'additive', doc='how a slot is scored; K17 §2.3: additive')
    key_update: str = option('average', 'average', 'latest', doc='key of a word used again: the mean of the old '
                             'key and its context (K17 §2.3), or its context')
    cache_reset: str = option('epoch', *RESETS, doc='when the cache is emptied in training; as state_reset')

# %%
def of_shape(*shape):
    "A field of a plan that holds a tensor of `shape`: names of sizes, sums of them, or numbers."
    return field(default=None, metadata=dict(shape=shape))

@dataclass(frozen=True)
class Plan:
    "Integers that say how to compute a segment. They are made on the host, so that no step waits for a card."
    def to(self, device):
        "The same plan with its tensors on `device`."
        moved = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, (torch.Tensor, Plan)): value = value.to(device)
            elif isinstance(value, list) and value and isinstance(value[0], Plan):
                value = [plan.to(device) for plan in value]
            moved[f.name] = value
        return replace(self, **moved)

# %%
def _axes(plan):
    "(field name, size name, size) of each axis of the tensors of `plan`, plain size names first."
    found = []
    for f in fields(plan):
        tensor = getattr(plan, f.name)
        if not torch.is_tensor(tensor): continue
        names = f.metadata['shape']
        if len(names) != tensor.dim():
            raise ValueError(f'{type(plan).__name__}.{f.name} has shape {tuple(tensor.shape)}; allowed: {names}')
        found += [(f.name, str(name), size) for name, size in zip(names, tensor.shape)]
    return sorted(found, key=lambda axis: '+' in axis[1])

@patch
def check(self:Plan):
    """Sizes of the plan by name, after a check that all its tensors, and plans within it, agree on them.

    Raises `ValueError` that names a field whose tensor has another shape than it says."""
    values = {f.name: getattr(self, f.name) for f in fields(self)}
    sizes = {name: value for name, value in values.items() if isinstance(value, int)}
    for name, label, size in _axes(self):
        if '+' not in label and not label.isdigit(): sizes.setdefault(label, size)
        parts = [int(part) if part.isdigit() else sizes[part] for part in label.split(' + ')]
        if sum(parts) == size: continue
        raise ValueError(f'{type(self).__name__}.{name} has size {size} for {label}; allowed: {sum(parts)}')

    for value in values.values():
        inner = value if isinstance(value, list) else [value]
        for plan in inner:
            if isinstance(plan, Plan): plan.check()
    return sizes

# %%
@dataclass
class Predictions:
    "What a model says of a segment; each tensor is `(lanes, words)`."
    nats: torch.Tensor                                      # -log p of each word, 0 for words without a loss
    gate: torch.Tensor = None                               # probability of spelling, before the word is known
    posteriors: dict = field(default_factory=dict)          # source -> probability that it said the word
    terminator: torch.Tensor = None                         # nats of the word's end, where they are told apart

@dataclass(frozen=True)
class Source:
    "A way to say a word beside spelling it; each tensor is `(lanes, words)`, or of any one shape."
    name: str                    # names its column in `score`
    logit: torch.Tensor          # of choosing it, where spelling has 0
    log_p: torch.Tensor          # log probability that it says the word; any finite value where it cannot
    says: torch.Tensor           # whether it can say the word
    available: torch.Tensor      # whether it can say any word here

# %%
def log_shares(sources):
    """Logarithms of the gate's shares, of spelling and then of each of `sources`, and the share of spelling.

    The gate is a softmax over the sources that are available. Spelling always is."""
    if len(sources) == 1:
        logit = sources[0].logit
        available = sources[0].available
        spelling = torch.where(available, F.logsigmoid(-logit), 0.0)
        return [spelling, F.logsigmoid(logit)], torch.where(available, (-logit).sigmoid(), 1.0)

    logits = torch.stack([torch.zeros_like(sources[0].logit)] + [source.logit for source in sources], -1)
    available = torch.stack([torch.ones_like(sources[0].available)] + [s.available for s in sources], -1)
    masked = logits.masked_fill(~available, torch.finfo(logits.dtype).min)
    shares = masked.log_softmax(-1).unbind(-1)
    return list(shares), shares[0].exp()

# %%
def mix(log_spelled, sources):
    """`Predictions` of words that can be spelled or said by `sources`: the exact sum over all ways.

    `log_spelled`: log probability that the speller gives each word, of any shape."""
    if not sources: return Predictions(-log_spelled, torch.ones_like(log_spelled))
    shares, gate = log_shares(sources)
    log_p = shares[0] + log_spelled
    said = [share + source.log_p for share, source in zip(shares[1:], sources)]
    for source, log_said in zip(sources, said):
        log_p = torch.where(source.says, torch.logaddexp(log_p, log_said), log_p)

    posteriors = {}
    for source, log_said in zip(sources, said):
        posteriors[source.name] = torch.where(source.says, (log_said - log_p).exp(), 0.0)
    return Predictions(-log_p, gate, posteriors)

# %%
MODELS = {}   # name -> class, of all models that can be built

class LanguageModel(nn.Module, PyTorchModelHubMixin):
    """Base of all models. A subclass names its `Config` and gives `begin`, `prepare`, `forward` and `sample`.

    `resets` says which config field decides whether an entry of the state or the ledger lives longer than
    an epoch; entries that it does not name start over."""
    Config = None
    resets = dict(h='state_reset', c='state_reset', keys='cache_reset', held='cache_reset')

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.Config is None: return   # a base of other models
        MODELS[cls.__name__] = cls
        parameter = cls._hub_mixin_init_parameters['config']
        cls._hub_mixin_init_parameters['config'] = parameter.replace(annotation=cls.Config)

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.alphabet = Alphabet(config.alphabet)

    @property
    def device(self): return next(self.parameters()).device

    @property
    def parameter_count(self): return sum(p.numel() for p in self.parameters())

# %%
@patch
def begin(self:LanguageModel, lanes):
    """State and ledger before anything was read.

    The state is a dict of tensors on the device, `h` `(lanes, ...)` among them; the ledger is a dict of what
    the host keeps, `position` (words read in each lane) among it."""
    raise NotImplementedError(f'{type(self).__name__} has no begin')

@patch
def prepare(self:LanguageModel, segment, ledger, following=None):
    """The plan of a segment, lanes of tokens of one length, and the next ledger; nothing given is changed.

    `following`: the token after each lane, None at the end of a text; not given where it is not known."""
    raise NotImplementedError(f'{type(self).__name__} has no prepare')

@patch
def sample(self:LanguageModel, state, ledger, sampler):
    "One word drawn after what lane 0 has read."
    raise NotImplementedError(f'{type(self).__name__} has no sample')

# %%
@patch(cls_method=True)
def config_for(cls:LanguageModel, config, corpus, min_count=25):
    "`config` with what is taken from the training text: here, the characters that occur `min_count` times."
    alphabet = Alphabet.of(corpus.words('train'), min_count)
    return replace(config, alphabet=alphabet.characters)

@patch
def new_epoch(self:LanguageModel, state, ledger):
    "State and ledger for another epoch: what the config keeps goes on, all else is as in `begin`."
    fresh_state, fresh_ledger = self.begin(len(state['h']))
    def kept(old, fresh):
        chosen = {}
        for name, value in fresh.items():
            reset = getattr(self.config, self.resets.get(name, ''), None)
            chosen[name] = old[name] if reset == 'never' else value
        return chosen
    return kept(state, fresh_state), kept(ledger, fresh_ledger)

# %%
def restarts(position, words, every):
    "Which of the next `words` words begin a segment of `every` words, when `position` words were read."
    return list(range(-position % every, words, every))

@patch
def restart_points(self:LanguageModel, choice, ledger, words=1):
    """Which of the next `words` words begin a segment at which something starts over.

    `choice` is 'state_reset' or 'cache_reset'; none if that says anything but 'segment'."""
    if getattr(self.config, choice, None) != 'segment': return []
    return restarts(ledger['position'], words, self.config.segment_words)

# %%
@contextlib.contextmanager
def evaluating(model):
    "Evaluation mode and no gradients inside the `with`; the mode from before after it, also after an error."
    training = model.training
    model.eval()
    try:
        with torch.no_grad(): yield model
    finally: model.train(training)

# %%
@patch
def _table(self:LanguageModel, tokens, following, predictions, lane):
    "The rows of `score` for the `tokens` of a lane, of which `following` comes next."
    def column(tensor): return tensor[lane, :len(tokens)].double().cpu().numpy()

    surcharge = self.alphabet.rare(tokens) * self.alphabet.surcharge
    table = dict(word=['<unk>' if token == UNKNOWN else token for token in tokens])
    table['characters'] = characters(tokens, following)
    table['bits'] = column(predictions.nats) / math.log(2) + surcharge
    table['surcharge'] = surcharge
    if predictions.terminator is not None: table['terminator'] = column(predictions.terminator) / math.log(2)
    if predictions.gate is not None: table['gate'] = column(predictions.gate)
    for name, posterior in predictions.posteriors.items(): table[name] = column(posterior)
    return pd.DataFrame(table)

# %%
@patch
def score_tokens(self:LanguageModel, streams, segment=None):
    """Yield, segment by segment, one table for each of `streams` (iterators of tokens), from a cold start.

    One token of look-ahead tells whether a space follows. Raises `ValueError` for a segment below 1."""
    if segment is None: segment = max(1, 2048 // len(streams))
    if not isinstance(segment, int) or segment < 1:
        raise ValueError(f'segment is {segment!r}; allowed: an integer, at least 1')

    state, ledger = self.begin(len(streams))
    ahead = [next(stream, None) for stream in streams]
    while any(token is not None for token in ahead):
        rows = []
        for i, stream in enumerate(streams):
            row = [] if ahead[i] is None else [ahead[i], *islice(stream, segment)]
            ahead[i] = row.pop() if len(row) > segment else None
            rows.append(row)
        longest = max(map(len, rows))
        filled = [row + [PADDING] * (longest - len(row)) for row in rows]
        plan, ledger = self.prepare(filled, ledger, ahead)
        with evaluating(self): predictions, state = self(plan.to(self.device), state, reuse=True)
        yield [self._table(row, ahead[i], predictions, i) for i, row in enumerate(rows)]

# %%
_EMPTY = dict(word=object, characters=int, bits=float, surcharge=float)

@patch
def score(self:LanguageModel, text, segment=None):
    """A table with one row per word of `canonical(text)`; for a list of texts, a list of tables.

    Line ends are words. Columns: `word`, `characters`, `bits`, of which `surcharge` names rare characters,
    and where the model has them `gate` and the posterior of each source. `segment`: words computed at once,
    without effect on the bits. Raises `ValueError` for a segment below 1 and for text that UTF-8 cannot
    encode."""
    if isinstance(text, str): return self.score([text], segment)[0]
    if not text: return []
    parts = list(self.score_tokens([iter(split_words(t)) for t in text], segment))
    tables = []
    for i in range(len(text)):
        own = [part[i] for part in parts if len(part[i])]
        empty = pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in _EMPTY.items()})
        tables.append(pd.concat(own, ignore_index=True) if own else empty)
    return tables

@patch
def score_file(self:LanguageModel, path, segment=None):
    "Yield tables like `score` of a UTF-8 file (`.xz` or plain), `segment` words at a time."
    for tables in self.score_tokens([stream_words(path)], segment): yield tables[0]

# %%
class Sampler:
    """Draws from rows of logits at a temperature (0: the largest), among the likeliest outcomes that first
    reach `top_p` of the probability together (nucleus sampling; Holtzman et al. 2020).

    Raises `ValueError` for a negative temperature and for `top_p` outside of (0, 1]."""
    def __init__(self, temperature=1.0, seed=0, top_p=1.0):
        if temperature < 0: raise ValueError(f'temperature is {temperature}; allowed: a number of at least 0')
        if not 0 < top_p <= 1: raise ValueError(f'top_p is {top_p}; allowed: above 0, at most 1')
        self.temperature = temperature
        self.top_p = top_p
        self.random = torch.Generator().manual_seed(seed)

    def draw(self, logits):
        "An index of `logits` `(outcomes,)`."
        if self.temperature == 0: return int(logits.argmax())
        p = F.softmax(logits.double().cpu() / self.temperature, -1)
        if self.top_p < 1:
            ranked, order = p.sort(descending=True)
            before = ranked.cumsum(0) - ranked
            p[order[before >= self.top_p]] = 0
        return int(torch.multinomial(p, 1, generator=self.random))

    def toss(self, p):
        "True with probability `p`, whatever the temperature."
        return torch.rand(1, generator=self.random).item() <= float(p)

# %%
@patch
def choose(self:Sampler, logits):
    """Which source says the next word: 0 is spelling, i the one whose logit is `logits[i - 1]`.

    `logits`: a list, of the sources that are available. The temperature plays no part."""
    if not logits: return 0
    if len(logits) == 1: return 0 if self.toss((-logits[0]).sigmoid()) else 1
    stacked = torch.stack([torch.zeros_like(logits[0]), *logits])
    shares = F.softmax(stacked.double().cpu(), 0)
    return int(torch.multinomial(shares, 1, generator=self.random))

# %%
@patch
def generate(self:LanguageModel, prompt='', words=50, temperature=1.0, seed=0, top_p=1.0, stop=None):
    """Continue `prompt` by `words` words (line ends count), or up to the word `stop`; of a list, each prompt.

    The prompt's last word counts as complete. `temperature` 0 takes the likeliest symbol; see `Sampler`."""
    sampler = Sampler(temperature, seed, top_p)
    if not isinstance(prompt, str):
        return [self.generate(p, words, temperature, seed, top_p, stop) for p in prompt]

    state, ledger = self.begin(1)
    unread = split_words(prompt)
    written = []
    with evaluating(self):
        while len(written) < words:
            if unread:
                plan, ledger = self.prepare([unread], ledger)
                _, state = self(plan.to(self.device), state, reuse=True)
            word = self.sample(state, ledger, sampler)
            if word == stop: break
            written.append(word)
            unread = [word]
    return join_words(written).replace(DUMMY, '\u25ca')

# %%
def sum_by_word(values, word, lanes):
    """Sums `(lanes, words)` of `values` `(rows,)`, of which row i belongs to word `word[i]`.

    `lanes`: a pair, lanes and words; words are numbered lane by lane."""
    total = values.new_zeros(lanes[0] * lanes[1]).index_add(0, word, values)
    return total.view(lanes)

def float32_at_least(tensor):
    "`tensor` in float32, or in float64 if it has that already: logarithms of probabilities need it."
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

def symbol_nats(logits, targets, word_start):
    """Nats of each target symbol `(rows,)` from logits `(rows, outputs)`; a target of -100 costs nothing.

    A word cannot be empty, and a line end is a word of its own: where a word starts (`word_start` `(rows,)`)
    the terminator is impossible, elsewhere the line end."""
    forbidden = torch.where(word_start, Alphabet.terminator, Alphabet.line_end)
    masked = float32_at_least(logits).scatter(1, forbidden[:, None], -torch.inf)
    return F.cross_entropy(masked, targets, reduction='none')

# %%
def lstm_steps(embedding, lstm, output, carry):
    "A function that reads a symbol and gives the logits `(outputs,)` of the next; `lstm` starts from `carry`."
    def step(symbol):
        nonlocal carry
        embedded = embedding(torch.tensor([[symbol]], device=output.weight.device))
        hidden, carry = lstm(embedded, carry)
        return output(hidden[0, 0])
    return step

def draw_word(alphabet, step, sampler, symbol=None, longest=1000):
    """A word drawn symbol by symbol: `step(symbol)` gives the logits of the next; cut at `longest` characters.

    `symbol`: what is read first, the start symbol if None."""
    if symbol is None: symbol = alphabet.start
    spelled = []
    while len(spelled) < longest:
        logits = step(symbol)
        logits[alphabet.line_end if spelled else alphabet.terminator] = -torch.inf
        symbol = sampler.draw(logits)
        if symbol == alphabet.terminator: break
        spelled.append(symbol)
        if symbol == alphabet.line_end: break
    return alphabet.decode(spelled)

# %%
class Dropout(nn.Dropout):
    "`nn.Dropout`; on a CPU with 16 random bits an entry, so that p is rounded to a multiple of 1/65,536."
    def forward(self, x):
        if x.device.type != 'cpu' or not self.training or self.p in (0, 1): return super().forward(x)
        drawn = torch.randint(-1 << 63, (1 << 63) - 1, (x.numel() // 4 + 1,)).view(torch.int16)
        kept = drawn[:x.numel()].view(x.shape) >= round(self.p * (1 << 16)) - (1 << 15)
        return x * kept.to(x.dtype).mul_(1 / (1 - self.p))   # filling where a mask is random is slower

def uniform_weights(model, bound):
    "Draw all weights of `model` uniformly from ±`bound`, unless that is None (K17 §4: 0.08)."
    if bound is None: return
    for p in model.parameters(): nn.init.uniform_(p, -bound, bound)

# %%
@patch
def save_pretrained(self:LanguageModel, folder, **options):
    "Write weights (safetensors) and `config.json`, with the name of the class, to `folder`."
    described = dict(asdict(self.config), class_name=type(self).__name__)
    return super(LanguageModel, self).save_pretrained(folder, config=described, **options)

def load_pretrained(name_or_folder):
    """The model in a folder written by `save_pretrained`, or in a repository of the Hub, whatever its class.

    Raises `FileNotFoundError` if there is none, `ValueError` if its class is not known here."""
    path = Path(name_or_folder) / 'config.json'
    if not path.exists():
        from huggingface_hub import hf_hub_download
        try: path = Path(hf_hub_download(str(name_or_folder), 'config.json'))
        except Exception as error:
            raise FileNotFoundError(f'{name_or_folder} holds no model; allowed: a folder written by '
                                    'save_pretrained, or a repository of the Hub') from error
    name = json.loads(path.read_text()).get('class_name')
    if name not in MODELS:
        raise ValueError(f'{name_or_folder} holds a model of class {name}; allowed: {", ".join(MODELS)}, '
                         'or a class of your own that is defined before')
    with contextlib.redirect_stdout(io.StringIO()):   # the mixin prints where it loads from
        return MODELS[name].from_pretrained(name_or_folder)

# %%
def randomise(model, seed=0, scale=1.5):
    "All weights of `model` drawn anew, none of them near zero by design: for tests."
    torch.manual_seed(seed)
    for p in model.parameters():
        std = scale / math.sqrt(p.shape[-1]) if p.dim() > 1 else 0.5
        nn.init.normal_(p, std=std)
    return model

def total_probability(model, history, letters, longest=4):
    "Sum of p(word | history) over all words of up to `longest` of `letters` or a dummy, and the line end."
    kept = [*letters, '☃']   # a snowman stands for the dummy
    candidates = []
    for length in range(1, longest + 1):
        candidates += [''.join(word) for word in product(kept, repeat=length)]
    texts = [f'{history} {word}' for word in candidates] + [history + LINE_END]
    last = [table.iloc[-1] for table in model.score(texts)]
    return sum(2 ** -(row.bits - row.surcharge) for row in last)
