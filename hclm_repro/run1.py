"""What exactly does HCLM + Cache compute, and why is the program that says so literally too slow to train?"""

# %%
from collections import OrderedDict
from dataclasses import dataclass

import torch
from fastcore.basics import patch
from torch import nn
from torch.nn import functional as F

from hclm_repro.model import (
    CacheConfig, Dropout, LanguageModel, ModelConfig, Plan, Predictions, Source, draw_word, lstm_steps, mix,
    option, symbol_nats, uniform_weights)
from hclm_repro.text import PADDING, UNKNOWN

# %%
@dataclass(frozen=True)
class HCLMConfig(CacheConfig, ModelConfig):
    "Choices of HCLM + Cache. With `cache_slots=0` it is No-Cache."
    units: int = option(256, at_least=1, doc='width of the three LSTMs, of contexts and keys (Run 1: 256)')
    embedding: int = option(64, at_least=1, doc='width of the character vectors')
    init_range: float | None = option(None, above=0, doc='weights start uniform in ± this (K17 §4: 0.08); '
                                      'None: as torch starts them')

# %%
@dataclass(frozen=True)
class LoopPlan(Plan):
    "What the loops need of a segment."
    lanes: int
    words: int
    tokens: list            # of each lane a list of words, rare characters replaced
    state_resets: list      # words before which h and c start over
    cache_resets: list      # words before which the caches are emptied

# %%
class LoopHCLM(LanguageModel):
    "HCLM + Cache by the nested loops of Algorithm 1 of Wang (2025)."
    Config = HCLMConfig
    resets = dict(h='state_reset', c='state_reset', caches='cache_reset')

    def __init__(self, config: HCLMConfig):
        super().__init__(config)
        units = config.units
        self.embedding = nn.Embedding(self.alphabet.symbols, config.embedding)
        self.encoder = nn.LSTM(config.embedding, units)     # characters of a word -> its vector
        self.word_lstm = nn.LSTM(units, units)              # vectors of the words so far -> context
        self.decoder = nn.LSTM(config.embedding, units)     # context -> characters of the next word
        self.output = nn.Linear(units, self.alphabet.outputs)
        self.dropout = Dropout(config.dropout)
        self.cache = self.pointer_weights(config) if config.cache_slots != 0 else None
        uniform_weights(self, config.init_range)

# %%
@patch(cls_method=True)
def pointer_weights(cls:LoopHCLM, config):
    "The layers that read a cache: gate, query, and for additive scores key and energy (K17 §2.3)."
    units = config.units
    layers = nn.ModuleDict()
    layers['gate'] = nn.Sequential(nn.Linear(units, units), nn.Tanh(),
                                   nn.Linear(units, units), nn.Tanh(), nn.Linear(units, 1))
    layers['query'] = nn.Linear(units, units)
    if config.score == 'additive':
        layers['key'] = nn.Linear(units, units, bias=False)
        layers['energy'] = nn.Linear(units, 1, bias=False)
    return layers

# %%
@patch
def encode_word(self:LoopHCLM, word):
    "The vector of a word, `(units,)`."
    encoded, _ = self.alphabet.encode([word])
    symbols = torch.from_numpy(encoded).to(self.device)
    vectors = self.dropout(self.embedding.weight)[symbols]
    _, (h, _) = self.encoder(vectors[:, None])
    return h[0, 0]

# %%
@patch
def read_words(self:LoopHCLM, plan, state):
    """Contexts `(lanes, words, units)`, each of which has read the words before it only,
    and the next `h` and `c` `(lanes, units)`, detached."""
    contexts = []
    last_h = []
    last_c = []
    for b in range(plan.lanes):
        h, c = state['h'][b], state['c'][b]
        for t, word in enumerate(plan.tokens[b]):
            if t in plan.state_resets: h, c = torch.zeros_like(h), torch.zeros_like(c)
            contexts.append(h)
            vector = torch.zeros_like(h) if word == PADDING else self.dropout(self.encode_word(word))
            _, (h, c) = self.word_lstm(vector[None, None], (h[None, None], c[None, None]))
            h, c = h[0, 0], c[0, 0]
        last_h.append(h.detach())
        last_c.append(c.detach())
    contexts = torch.stack(contexts).view(plan.lanes, plan.words, -1)
    return contexts, torch.stack(last_h), torch.stack(last_c)

# %%
@patch
def begin(self:LoopHCLM, lanes):
    zero = self.output.weight.new_zeros(lanes, self.config.units)
    caches = [OrderedDict() for _ in range(lanes)]   # word -> key, the least recently used first
    return dict(h=zero, c=zero, caches=caches), dict(position=0)

@patch
def prepare(self:LoopHCLM, segment, ledger, following=None):
    "The `LoopPlan` of a segment, and the next ledger."
    words = len(segment[0])
    plan = LoopPlan(lanes=len(segment), words=words,
                    tokens=[self.alphabet.replace_rare(lane) for lane in segment],
                    state_resets=self.restart_points('state_reset', ledger, words),
                    cache_resets=self.restart_points('cache_reset', ledger, words))
    return plan, dict(ledger, position=ledger['position'] + words)

# %%
@patch
def spell(self:LoopHCLM, h, word):
    "Nats of spelling `word` from context `h` `(units,)`, terminator included (K17 §2.1)."
    encoded, _ = self.alphabet.encode([word], terminated=True)
    targets = torch.from_numpy(encoded).to(self.device)
    inputs = F.pad(targets[:-1], (1, 0), value=self.alphabet.start)
    start = self.dropout(h)[None, None]
    embedded = self.dropout(self.embedding.weight)[inputs][:, None]
    hidden, _ = self.decoder(embedded, (start, torch.zeros_like(start)))
    word_start = torch.arange(len(targets), device=self.device) == 0
    logits = self.output(self.dropout(hidden[:, 0]))
    return symbol_nats(logits, targets, word_start).sum()

# %%
@patch
def slot_scores(self:LoopHCLM, h, keys):
    "Scores `(slots,)` of `keys` `(slots, units)` for context `h` `(units,)` (additive: K17 §2.3)."
    query = self.cache['query'](h[None])
    if self.config.score == 'dot': return (query @ keys.t())[0]
    hidden = torch.tanh(torch.tanh(query) + self.cache['key'](keys))
    return self.cache['energy'](hidden)[:, 0]

# %%
@patch
def write(self:LoopHCLM, slots, h, word):
    "Store `word` under `h`; on reuse average (or replace) its key; drop the least recently used word."
    if word in slots and self.config.key_update == 'average': h = (slots[word] + h) / 2
    slots[word] = h
    slots.move_to_end(word)
    most = self.config.cache_slots
    if most is not None and len(slots) > most: slots.popitem(last=False)

# %%
@patch
def point(self:LoopHCLM, slots, h, word):
    "The cache as a `Source` of `word`: `slots` are its words and keys, `h` `(units,)` the context."
    log_p = h.new_zeros(())
    if word in slots:
        keys = torch.stack(list(slots.values()))
        position = list(slots).index(word)
        log_p = F.log_softmax(self.slot_scores(h, keys), -1)[position]
    logit = -self.cache['gate'](h)[0]   # of copying; the gate's own is of spelling
    says = torch.full((), word in slots, device=h.device)
    available = torch.full((), len(slots) > 0, device=h.device)
    return Source('copy', logit, log_p, says, available)

# %%
@patch
def predict_word(self:LoopHCLM, word, h, slots):
    "The `Predictions` of one `word` after context `h` `(units,)`; then write it to `slots`."
    if word in (PADDING, UNKNOWN):
        zero = h.new_zeros(())
        return Predictions(zero, zero + 1, dict(copy=zero) if self.cache else {})
    log_spelled = -self.spell(h, word)
    if self.cache is None: return mix(log_spelled, [])
    predictions = mix(log_spelled, [self.point(slots, h, word)])
    self.write(slots, h, word)
    return predictions

# %%
@patch
def forward(self:LoopHCLM, plan, state, reuse=False):
    "`Predictions` of a segment and the next state; `state` stays as it is, whatever `reuse` says."
    contexts, h, c = self.read_words(plan, state)
    copies = {id(slots): OrderedDict(slots) for slots in state['caches']}   # lanes may share a cache
    caches = [copies[id(slots)] for slots in state['caches']]

    rows = []
    for t in range(plan.words):
        if t in plan.cache_resets:
            for slots in caches: slots.clear()
        for b in range(plan.lanes):
            rows.append(self.predict_word(plan.tokens[b][t], contexts[b, t], caches[b]))

    for slots in copies.values():
        for word, key in slots.items(): slots[word] = key.detach()
    return join_rows(rows, plan), dict(h=h, c=c, caches=caches)

def join_rows(rows, plan):
    "`Predictions` `(lanes, words)` from those of single words, step by step and lane by lane."
    def grid(values): return torch.stack(values).view(plan.words, plan.lanes).t()
    posteriors = {}
    for name in rows[0].posteriors: posteriors[name] = grid([row.posteriors[name] for row in rows])
    return Predictions(grid([row.nats for row in rows]), grid([row.gate for row in rows]), posteriors)

# %%
@patch
def sample(self:LoopHCLM, state, ledger, sampler):
    "One word: the gate decides, then a slot is drawn or the word is spelled."
    h = state['h'][0]
    if self.restart_points('state_reset', ledger): h = torch.zeros_like(h)
    carry = h[None, None], torch.zeros_like(h)[None, None]
    step = lstm_steps(self.embedding, self.decoder, self.output, carry)
    slots = state['caches'][0] if self.cache else {}
    if not slots or self.restart_points('cache_reset', ledger): return draw_word(self.alphabet, step, sampler)

    logit = -self.cache['gate'](h)[0]
    if sampler.choose([logit]) == 0: return draw_word(self.alphabet, step, sampler)
    keys = torch.stack(list(slots.values()))
    return list(slots)[sampler.draw(self.slot_scores(h, keys))]

# %%
def hit_rate(tokens, slots, reset=None):
    "Share of `tokens` found in an LRU cache of `slots` words (None: unbounded), emptied every `reset`."
    held = OrderedDict()
    hits = 0
    for i, token in enumerate(tokens):
        if reset and i % reset == 0: held.clear()
        hits += token in held
        held[token] = None
        held.move_to_end(token)
        if slots is not None and len(held) > slots: held.popitem(last=False)
    return hits / max(1, len(tokens))
