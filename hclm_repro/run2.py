"""No loop over lanes, words or slots is left: is it the same model, and what did the loops cost?"""

# %%
from dataclasses import dataclass, replace

import numpy as np
import torch
from fastcore.basics import patch
from torch import nn
from torch.nn import functional as F

from hclm_repro.cache import CachePlan, PointerCache
from hclm_repro.model import (
    Dropout, LanguageModel, Plan, draw_word, lstm_steps, mix, of_shape, sum_by_word, symbol_nats,
    uniform_weights)
from hclm_repro.recurrence import Packing, pack, project, ragged_lstm
from hclm_repro.run1 import HCLMConfig
from hclm_repro.text import PADDING, UNKNOWN

# %%
class HCLM(LanguageModel):
    """HCLM + Cache without loops; `cache_slots=0` is No-Cache.
    The same weights give the same numbers as in `LoopHCLM`."""
    Config = HCLMConfig
    Cache = PointerCache   # a subclass may take another

    def __init__(self, config: HCLMConfig):
        super().__init__(config)
        units = config.units
        self.embedding = nn.Embedding(self.alphabet.symbols, config.embedding)
        self.encoder = nn.LSTM(config.embedding, units)     # characters of a word -> its vector
        self.word_lstm = nn.LSTM(units, units)              # vectors of the words so far -> context
        self.decoder = nn.LSTM(config.embedding, units)     # context -> characters of the next word
        self.output = nn.Linear(units, self.alphabet.outputs)
        self.dropout = Dropout(config.dropout)
        self.cache = self.Cache.of(config)
        uniform_weights(self, config.init_range)

    def begin(self, lanes):
        zero = self.output.weight.new_zeros(lanes, self.config.units)
        state = dict(h=zero, c=zero)
        ledger = dict(position=0)
        if self.cache: state['keys'], ledger['held'] = self.cache.begin(lanes)
        return state, ledger

# %%
@dataclass(frozen=True)
class PackedWords(Plan):
    "Words as packed sequences of symbols."
    packing: Packing
    symbols: torch.Tensor = of_shape('rows')    # by packed row
    sequence: torch.Tensor = of_shape('rows')   # the word of each packed row

def pack_words(symbols, lengths):
    "`PackedWords` from the symbols of words laid end to end `(symbols,)` and their `lengths` `(words,)`."
    packing = pack(lengths)
    packed = np.empty_like(symbols)
    packed[packing.row.numpy()] = symbols
    sequence = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
    order = torch.argsort(packing.row)
    return PackedWords(packing, torch.from_numpy(packed), sequence[order])

# %%
@dataclass(frozen=True)
class Stretch(Plan):
    "Words of a segment between two resets of the state."
    start: int          # the first of them
    end: int            # the word after the last
    restarts: bool      # whether the state starts over before them
    packing: Packing    # of the lanes, all of one length

def stretches(lanes, count, resets):
    "The `Stretch`es of a segment of `count` words in `lanes` lanes, with resets before the words `resets`."
    cuts = sorted({0, *resets, count})
    found = []
    for start, end in zip(cuts, cuts[1:]):
        found.append(Stretch(start, end, start in resets, pack([end - start] * lanes)))
    return found

# %%
@dataclass(frozen=True)
class HCLMPlan(Plan):
    "A segment for `HCLM`: words that are read (each distinct one once) and words that are written."
    lanes: int
    words: int
    read: PackedWords                           # distinct words of the segment
    write: PackedWords                          # words with a loss, terminators included
    stretches: list                             # of words between two resets of the state
    cache: CachePlan = None
    which: torch.Tensor = of_shape('places')    # the distinct word at each place, lane by lane
    coded: torch.Tensor = of_shape('coded')     # the place of each word with a loss
    inputs: torch.Tensor = of_shape('written')  # what the decoder reads for each packed row of `write`

# %%
@patch
def prepare(self:HCLM, segment, ledger, following=None):
    "The `HCLMPlan` of a segment, and the next ledger."
    lanes, count = len(segment), len(segment[0])
    alphabet = self.alphabet
    tokens = alphabet.replace_rare([token for lane in segment for token in lane])
    number = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    which = torch.tensor([number[token] for token in tokens])
    coded = [i for i, token in enumerate(tokens) if token != PADDING and token != UNKNOWN]

    read = pack_words(*alphabet.encode(list(number)))
    write = pack_words(*alphabet.encode([tokens[i] for i in coded], terminated=True))
    # The decoder reads a start symbol for each word, then what was written at the step before.
    inputs = F.pad(write.symbols[write.packing.before], (len(coded), 0), value=alphabet.start)
    parts = stretches(lanes, count, self.restart_points('state_reset', ledger, count))

    cache = None
    after = dict(ledger, position=ledger['position'] + count)
    if self.cache:
        rows = [tokens[i:i + count] for i in range(0, len(tokens), count)]
        resets = self.restart_points('cache_reset', ledger, count)
        cache, after['held'] = self.cache.plan(rows, ledger['held'], resets)
    coded = torch.tensor(coded, dtype=torch.long)
    return HCLMPlan(lanes, count, read, write, parts, cache, which, coded, inputs), after

# %%
@patch
def word_vectors(self:HCLM, plan):
    "The vector of each distinct word of the segment, `(distinct words, units)`."
    zero = self.output.weight.new_zeros(len(plan.read.packing.sorted_indices), self.config.units)
    table = project(self.encoder, self.dropout(self.embedding.weight))
    _, vectors, _ = ragged_lstm(self.encoder, table, plan.read.packing, zero, zero, plan.read.symbols)
    return vectors

@patch
def read_words(self:HCLM, plan, state):
    """Contexts `(lanes, words, units)`, each of which has read the words before it only,
    and the next `h` and `c` `(lanes, units)`, detached."""
    vectors = self.word_vectors(plan)
    inputs = project(self.word_lstm, self.dropout(F.embedding(plan.which, vectors)))
    inputs = inputs.view(plan.lanes, plan.words, -1)
    h, c = state['h'], state['c']
    contexts = []
    for stretch in plan.stretches:
        if stretch.restarts: h, c = torch.zeros_like(h), torch.zeros_like(c)
        steps = inputs[:, stretch.start:stretch.end].transpose(0, 1).flatten(0, 1)
        hidden, last, c = ragged_lstm(self.word_lstm, steps, stretch.packing, h, c)
        after = hidden.view(-1, *h.shape).transpose(0, 1)   # (lanes, words, units), each word read
        contexts += [h[:, None], after[:, :-1]]
        h = last
    return torch.cat(contexts, 1), h.detach(), c.detach()

# %%
@patch
def spell(self:HCLM, plan, contexts):
    "Log p_lm of each word `(lanes, words)`, 0 for words without a loss."
    write = plan.write
    start = self.dropout(F.embedding(plan.coded, contexts.flatten(0, 1)))
    table = project(self.decoder, self.dropout(self.embedding.weight))
    zero = torch.zeros_like(start)
    hidden, _, _ = ragged_lstm(self.decoder, table, write.packing, start, zero, plan.inputs)
    word_start = torch.arange(len(hidden), device=hidden.device) < len(plan.coded)
    logits = self.output(self.dropout(hidden))
    nats = symbol_nats(logits, write.symbols, word_start)
    return -sum_by_word(nats, plan.coded[write.sequence], (plan.lanes, plan.words))

# %%
@patch
def forward(self:HCLM, plan, state, reuse=False):
    """`Predictions` of a segment and the next state.

    With `reuse` the tensors of `state` may be written into; without, the same call gives the same numbers."""
    contexts, h, c = self.read_words(plan, state)
    log_spelled = self.spell(plan, contexts)
    after = dict(h=h, c=c)
    sources = []
    if self.cache:
        copying, after['keys'] = self.cache(contexts, state['keys'], plan.cache, reuse=reuse)
        sources.append(copying)
    predictions = mix(log_spelled, sources)
    coded = torch.zeros_like(log_spelled, dtype=torch.bool).view(-1).index_fill(0, plan.coded, True)
    nats = torch.where(coded.view_as(log_spelled), predictions.nats, 0.0)
    return replace(predictions, nats=nats), after

# %%
@patch
def sample(self:HCLM, state, ledger, sampler):
    "One word: the gate decides, then a slot is drawn or the word is spelled."
    h = state['h'][0]
    if self.restart_points('state_reset', ledger): h = torch.zeros_like(h)
    carry = h[None, None], torch.zeros_like(h)[None, None]
    step = lstm_steps(self.embedding, self.decoder, self.output, carry)
    held = ledger['held'][0] if self.cache else {}
    if not held or self.restart_points('cache_reset', ledger): return draw_word(self.alphabet, step, sampler)

    logit = -self.cache.gate(h)[0]
    if sampler.choose([logit]) == 0: return draw_word(self.alphabet, step, sampler)
    return self.cache.draw(h, state['keys'][0], held, sampler)

# %%
@patch
def training_flops(self:HCLM, plan):
    "Floating-point operations of the matrix products of one update on `plan`."
    config = self.config
    lstm_gates = 4 * config.units
    words = plan.lanes * plan.words
    read = len(plan.read.symbols)
    written = len(plan.write.symbols)
    steps = (read + written + 2 * words) * config.units * lstm_gates
    outputs = written * config.units * self.alphabet.outputs
    tables = 2 * self.alphabet.symbols * config.embedding * lstm_gates
    total = 6 * (steps + outputs + tables)
    if self.cache: total += self.cache.training_flops(plan.cache)
    return total

# %%
def gradient_difference(models, losses):
    "Largest difference between two models' gradients, relative to each tensor's largest entry (or NaN)."
    gradients = []
    for model, loss in zip(models, losses):
        options = dict(allow_unused=True, materialize_grads=True)
        gradients.append(torch.autograd.grad(loss, model.parameters(), **options))

    worst = [0.0]
    for a, b in zip(*gradients):
        if not a.any() and not b.any(): continue
        largest = max(a.abs().max().item(), 1e-30)
        worst.append((a - b).abs().max().item() / largest)
    return float(np.max(worst))

# %%
def agree(loops, fast, tokens, lanes, segment):
    """Largest difference between two models on the same weights, over segments of `tokens` in `lanes`:
    of log probabilities, of gradients (relative to each tensor's largest entry)."""
    fast.load_state_dict(loops.state_dict())
    models = loops, fast
    each = len(tokens) // lanes
    lines = [tokens[b * each:(b + 1) * each] for b in range(lanes)]
    states, ledgers = zip(*[model.begin(lanes) for model in models])
    states = list(states)
    ledgers = list(ledgers)
    losses = [0, 0]
    worst = [0.0]
    for i in range(0, each, segment):
        rows = [line[i:i + segment] for line in lines]
        nats = []
        for m, model in enumerate(models):
            plan, ledgers[m] = model.prepare(rows, ledgers[m])
            predictions, states[m] = model(plan, states[m])
            nats.append(predictions.nats)
            weights = torch.linspace(0.5, 1.5, nats[m].numel(), dtype=nats[m].dtype).view_as(nats[m])
            losses[m] = losses[m] + (weights * nats[m]).sum()
        difference = (nats[0] - nats[1]).abs() / nats[0].abs().clamp(min=1)
        worst.append(difference.max().item())
    return float(np.max(worst)), gradient_difference(models, losses)

# %%
def with_choices(model, **choices):
    "A copy of `model`, same weights, with other choices of its config (resets, slots)."
    other = type(model)(replace(model.config, **choices))
    other = other.to(model.device, next(model.parameters()).dtype)
    other.load_state_dict(model.state_dict())
    return other
