"""How does a model write for a long time without computing anything twice?"""

# %%
from collections import Counter
from dataclasses import dataclass

import torch
from fastcore.basics import patch
from torch.nn import functional as F

from hclm_repro.hat import (
    A_WORD, BARE, FREE, HAT, NEWLINE, SPACE, SPACED, WORD_BYTE, byte_chunks, pack_chunks, place_within)
from hclm_repro.model import Sampler, evaluating
from hclm_repro.rivals import ByteTransformer, FlatTransformer, SubwordTransformer
from hclm_repro.text import LINE_END, join_words, split_words
from hclm_repro.transformer import WindowPlan, attention, plan_window, rotate, slide, turns

# %%
def split_prompt(prompt):
    "Tokens that are complete, and the bytes of an incomplete last word (b'' after a space or a line end)."
    tokens = split_words(prompt)
    complete = not tokens or prompt.endswith((' ', LINE_END))
    if complete: return tokens, b''
    return tokens[:-1], tokens[-1].encode()

# %%
@patch
def read(self:HAT, plan, state, vectors=None, reuse=False):
    "The state after a segment that is read and not scored; `vectors` of its chunks, where they are known."
    contexts, after = self.read_words(plan, state, vectors)
    if self.cache: after['keys'] = self.cache.advance(contexts, state['keys'], plan.cache, reuse)
    return after

@patch
def start_stream(self:HAT, state):
    "Outputs `(lanes, units)` and `past` of the vector that starts a stream, with nothing before it."
    first = torch.full((1, 1), self.config.context_words - 1, device=self.device)
    inputs = self.first.expand(len(state['h']), 1, -1)
    outputs, past = slide(self.backbone, inputs, state['past'], WindowPlan(first))
    return outputs[:, 0], past

# %%
@patch
def read_prompt(self:HAT, prompt):
    "State and ledger after `prompt`, and the bytes of its incomplete last word."
    state, ledger = self.begin(1)
    tokens, given = split_prompt(prompt)
    if tokens:
        plan, ledger = self.prepare([tokens], ledger, [A_WORD])
        return self.read(plan.to(self.device), state), ledger, given
    h, past = self.start_stream(state)
    valid = min(1, past.shape[3])
    return dict(state, h=h, past=past), dict(ledger, fresh=False, valid=[valid]), given

def join_lanes(states, ledgers):
    "One state and ledger of many lanes from those of single ones, whatever each has read."
    state = dict(h=torch.cat([state['h'] for state in states]),
                 past=torch.cat([state['past'] for state in states], 2))
    ledger = dict(ledgers[0])
    for name in ('valid', 'before', 'held'):
        if name in ledger: ledger[name] = [ledger[name][0] for ledger in ledgers]
    if 'keys' in states[0]:
        slots = max(state['keys'].shape[1] for state in states)
        padded = [F.pad(state['keys'], (0, 0, 0, slots - state['keys'].shape[1])) for state in states]
        state['keys'] = torch.cat(padded)
    return state, ledger

# %%
@patch
def word_table(self:HAT, tokens, most=10_000):
    "The vectors of the `most` frequent chunks of `tokens`, by their bytes: they depend on nothing else."
    counted = Counter(chunk for chunk in byte_chunks([tokens]) if chunk)
    chunks = [chunk for chunk, _ in counted.most_common(most)]
    with evaluating(self): vectors = self.encode(pack_chunks(chunks).to(self.device))
    return dict(zip(chunks, vectors))

@patch
def advance(self:HAT, tokens, following, state, ledger, table, reuse=False):
    """State and ledger after one more token of each lane, which `following` come after.

    `table` gives the vectors of known chunks, and learns others."""
    plan, ledger = self.prepare([[token] for token in tokens], ledger, following)
    new = [chunk for chunk in plan.chunks if chunk not in table]
    if new:
        vectors = self.encode(pack_chunks(new).to(self.device))
        table.update(zip(new, vectors))
    vectors = torch.stack([table[chunk] for chunk in plan.chunks])
    return self.read(plan.to(self.device), state, vectors, reuse), ledger

# %%
def growing_attention(head):
    "The `attend` of a `Transformer` that is given one position `(lanes, 1, heads, head)` after another."
    past = {}   # layer -> keys and values of the positions so far

    def attend(layer, q, k, v):
        step = past[layer][0].shape[1] if layer in past else 0
        turn = turns(torch.tensor([step], device=q.device), head, q.dtype)
        k = rotate(k, turn)
        if layer in past:
            old_k, old_v = past[layer]
            k = torch.cat([old_k, k], 1)
            v = torch.cat([old_v, v], 1)
        past[layer] = k, v
        return attention(rotate(q, turn), k, v)

    return attend

# %%
@patch
def byte_steps(self:HAT, contexts):
    """A coroutine: logits `(lanes, 256)` of the first bytes after `contexts` `(lanes, units)`; then send the
    bytes of all lanes, a list, for those of the next."""
    def embed(symbols): return self.embedding(torch.tensor(symbols, device=self.device))[:, None]

    attend = growing_attention(self.decoder.head)
    guides = None
    if self.guided:
        guides = [guide(contexts)[:, None] for guide in self.to_bytes]
        x = embed([WORD_BYTE] * len(contexts))
    else: x = self.to_bytes(contexts)[:, None]
    while True:
        outputs = self.decoder(x, attend, guides=guides)
        symbols = yield self.output(outputs)[:, 0]
        x = embed(symbols)

# %%
class Word:
    """A word while it is written, beginning with the bytes `given`, from the place `start`. Of a `copied` word
    only the separator is left to draw. Cut `longest` bytes after those given, with a space."""
    def __init__(self, given, start, copied=False, longest=1000):
        self.given = given
        self.start = start
        self.copied = copied
        self.longest = longest + len(given)
        self.chunk = b''
        self.done = False

    @property
    def token(self): return self.chunk.decode().rstrip(' ')

    @property
    def spaced(self): return self.chunk.endswith(b' ')

# %%
@patch
def draw(self:Word, logits, allowed, sampler):
    "The next byte, given or drawn from `logits` `(256,)`, those of the table `allowed` only."
    written = len(self.chunk)
    if written < len(self.given): return self.given[written]
    row = allowed[place_within(self.chunk, self.start)]
    if self.copied:
        separators = torch.zeros_like(row)
        separators[[SPACE, WORD_BYTE]] = True
        row = row & separators
    return sampler.draw(logits.masked_fill(~row, -torch.inf))

@patch
def add(self:Word, byte):
    "Write `byte`. The word is done with [W], or with a separator, after which [W] is certain."
    if byte != WORD_BYTE: self.chunk += bytes([byte])
    self.done = byte in (WORD_BYTE, SPACE, NEWLINE)
    if self.done or len(self.chunk) < self.longest: return
    whole = self.chunk.decode(errors='ignore').encode()   # without half a character
    self.chunk = whole + b' '
    self.done = True

# %%
@patch
def write_words(self:HAT, contexts, words, samplers):
    "Write a `Word` in each lane, after contexts `(lanes, units)`, all of them a byte at a time."
    steps = self.byte_steps(contexts)
    logits = next(steps)
    while True:
        sent = [WORD_BYTE] * len(words)   # a lane whose word is done waits
        for lane, word in enumerate(words):
            if word.done: continue
            sent[lane] = word.draw(logits[lane], self.allowed, samplers[lane])
            word.add(sent[lane])
        if all(word.done for word in words): return
        logits = steps.send(sent)

# %%
@patch
def copied_word(self:HAT, lane, context, state, ledger, sampler):
    "A word drawn from the cache of `lane`, or None if the next word is spelled; `context` `(units,)`."
    if not self.cache or ledger['before'][lane] == BARE: return None
    held = ledger['held'][lane]
    if not held or self.restart_points('cache_reset', ledger): return None
    logit = -self.cache.gate(context)[0]
    if sampler.choose([logit]) == 0: return None
    return self.cache.draw(context, state['keys'][lane], held, sampler)

@patch
def next_contexts(self:HAT, state, ledger):
    "The contexts `(lanes, units)` of the next word of each lane."
    if self.restart_points('state_reset', ledger): return self.start_stream(state)[0]
    return state['h']

# %%
@dataclass
class Writer:
    "One of the texts that are written side by side."
    sampler: Sampler
    given: bytes             # of a word that the prompt began
    written: bytes = b''
    stopped: bool = False

@patch
def next_words(self:HAT, state, ledger, writers, longest):
    "The next `Word` of each lane: copied, or spelled from the bytes given on."
    contexts = self.next_contexts(state, ledger)
    words = []
    for lane, writer in enumerate(writers):
        copied = None
        if not writer.given: copied = self.copied_word(lane, contexts[lane], state, ledger, writer.sampler)
        given = writer.given if copied is None else copied.encode()
        words.append(Word(given, ledger['before'][lane], copied is not None, longest))
    self.write_words(contexts, words, [writer.sampler for writer in writers])
    return words

# %%
@patch
def take(self:Writer, word, stop=None):
    "Add a `Word` to the text, unless the text has come to the word `stop`."
    if word.token == stop: self.stopped = True
    if not self.stopped: self.written += word.chunk[len(self.given):]
    self.given = b''

@patch
def write_on(self:HAT, prompts, samplers, words, stop, longest, table):
    "The bytes written after each of `prompts`, all side by side."
    states, ledgers, given = zip(*map(self.read_prompt, prompts))
    state, ledger = join_lanes(states, ledgers)
    writers = list(map(Writer, samplers, given))
    for _ in range(words):
        written = self.next_words(state, ledger, writers, longest)
        for writer, word in zip(writers, written): writer.take(word, stop)
        if all(writer.stopped for writer in writers): break
        tokens = [word.token for word in written]
        following = [A_WORD if word.spaced else LINE_END for word in written]
        state, ledger = self.advance(tokens, following, state, ledger, table, reuse=True)
    return [writer.written for writer in writers]

# %%
@patch
def generate(self:HAT, prompt='', words=50, temperature=1.0, seed=0, top_p=1.0, stop=None, longest=1000,
             table=None):
    """Continue `prompt` by `words` words (line ends count), or up to the word `stop`; its last word too,
    unless a space follows it. Prompts of a list, of any lengths, are continued side by side; none changes
    another.

    Nothing is computed twice; `table` as of `word_table`. See `Sampler`; a word is cut at `longest` bytes;
    one that the prompt began is spelled. Raises `ValueError` for `longest` below 4."""
    if longest < 4: raise ValueError(f'longest is {longest}; allowed: at least 4, the bytes of one character')
    if isinstance(prompt, str):
        return self.generate([prompt], words, temperature, seed, top_p, stop, longest, table)[0]

    prompts = list(prompt)
    samplers = [Sampler(temperature, seed, top_p) for _ in prompts]
    resets = self.config.state_reset, self.config.cache_reset
    at_once = 1 if 'segment' in resets else max(1, len(prompts))   # lanes would start over at different words
    texts = []
    with evaluating(self):
        for first in range(0, len(prompts), at_once):
            some = slice(first, first + at_once)
            texts += self.write_on(prompts[some], samplers[some], words, stop, longest, dict(table or {}))
    return [text.decode().rstrip(' ') for text in texts]

# %%
@patch
def read_symbols(self:FlatTransformer, symbols, state, valid):
    "State and number of valid carried inputs after lane 0 has read `symbols`."
    begins = [i for i, symbol in enumerate(symbols) if symbol == self.start]
    first, valid = plan_window(len(symbols), begins, valid, self.config.context_symbols)
    plan = WindowPlan(torch.from_numpy(first)[None]).to(self.device)
    inputs = self.embedding(torch.tensor([symbols], device=self.device))
    outputs, past = slide(self.backbone, inputs, state['past'], plan)
    return dict(h=outputs[:, -1], past=past), valid

@patch
def next_place(self:ByteTransformer, read):
    "The place after the bytes `read`, `(1,)`."
    begun = max(read.rfind(b' '), read.rfind(b'\n')) + 1   # where the last chunk begins
    start = SPACED if read[:begun].endswith(b' ') else FREE
    return torch.tensor([place_within(read[begun:], start)], device=self.device)

@patch
def next_place(self:SubwordTransformer, read): return None   # subwords that cannot follow are not masked

# %%
@patch
def write_tokens(self:FlatTransformer, prompt, words, sampler, stop, longest):
    "Tokens written after `prompt`, and the bytes of the word that it began."
    tokens, given = split_prompt(prompt)
    chunks = byte_chunks([tokens])
    symbols = [self.start]
    for piece in self.cut([*chunks, given]): symbols += piece
    state, valid = self.read_symbols(symbols, self.begin(1)[0], 0)

    read = b''.join(chunks) + given
    begun = len(read) - len(given)   # where the word begins that is being written
    size = 0                         # how many symbols it has
    written = []
    for _ in range(words * (longest + 1)):   # a model may write separators for ever
        if len(written) >= words or stop in written: break
        logits = self.logits(state['h'], self.next_place(read))[0]
        symbol = sampler.draw(logits)
        if size >= longest: symbol = self.symbols(b' ')[0]
        state, valid = self.read_symbols([symbol], state, valid)
        read += self.spelled(symbol)
        size += 1
        if read.endswith((b' ', b'\n')):
            written += split_words(read[begun:].decode(errors='replace'))
            begun = len(read)
            size = 0
    return written[:words], given

# %%
@patch
def generate(self:FlatTransformer, prompt='', words=50, temperature=1.0, seed=0, top_p=1.0, stop=None,
             longest=1000):
    """Continue `prompt` by `words` words (line ends count), or up to the word `stop`; its last word too,
    unless a space follows it. Of a list of prompts, each.

    A word is cut at `longest` symbols. A model with `state_reset='segment'` writes on without starting over:
    it cannot know that a word has ended before it has written the line end."""
    if not isinstance(prompt, str):
        return [self.generate(p, words, temperature, seed, top_p, stop, longest) for p in prompt]
    sampler = Sampler(temperature, seed, top_p)
    with evaluating(self): written, given = self.write_tokens(prompt, words, sampler, stop, longest)
    if stop in written: written = written[:written.index(stop)]
    return join_words(written)[len(given.decode()):]
