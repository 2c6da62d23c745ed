"""What must HAT beat? The same block over one flat row, of bytes or of subwords."""

# %%
import json
from dataclasses import dataclass, replace

import numpy as np
import torch
from fastcore.basics import patch
from torch import nn
from torch.nn import functional as F

from hclm_repro.hat import (
    BARE, INSIDE, UNKNOWN_BYTE, WORD_BYTE, ByteLevel, allowed_bytes, byte_chunks, byte_places, lay, segment_bytes)
from hclm_repro.model import Dropout, Plan, Predictions, float32_at_least, of_shape, option, sum_by_word
from hclm_repro.transformer import (
    Transformer, TransformerConfig, WindowPlan, empty_past, plan_window, slide, stack_flops, window_pairs)

# %%
class FlatTransformer(ByteLevel):
    """What the two rivals share. A subclass says into which `symbols` a chunk is cut, has the numbers of the
    symbols `start` and `unknown`, and gives `spelled`, the bytes of a symbol."""
    def __init__(self, config, outputs, inputs):
        super().__init__(config)
        self.embedding = nn.Embedding(inputs, config.units)
        self.output = nn.Linear(config.units, outputs, bias=False)
        self.backbone = Transformer(config.units, config.layers, config.heads, config.hidden,
                                    dropout=config.dropout)
        self.dropout = Dropout(config.dropout)
        self.initialise()

    def initialise(self):
        "Normal weights but for norms."
        std = self.config.init_std
        self.backbone.initialise(std)
        nn.init.normal_(self.embedding.weight, std=std)
        nn.init.normal_(self.output.weight, std=std)

    def begin(self, lanes):
        "State and ledger before anything was read; `h` `(lanes, units)` predicts the next symbol."
        like = self.output.weight
        past = empty_past(self.backbone, lanes, self.config.context_symbols, like)
        return dict(h=like.new_zeros(lanes, self.config.units), past=past), self.begin_ledger(lanes)

# %%
@dataclass(frozen=True)
class ByteTransformerConfig(TransformerConfig):
    "Choices of the byte transformer."
    context_symbols: int = option(512, at_least=1, doc='bytes that it sees, the present one included')

class ByteTransformer(FlatTransformer):
    "Bytes in one row. No terminator: a word ends with its space, or where a line end follows."
    Config = ByteTransformerConfig
    start = WORD_BYTE        # this and the next are read, never written
    unknown = UNKNOWN_BYTE

    def __init__(self, config: ByteTransformerConfig):
        super().__init__(config, outputs=256, inputs=256)
        self.register_buffer('allowed', allowed_bytes(terminated=False), persistent=False)

    def symbols(self, chunk): return chunk
    def spelled(self, symbol): return bytes([symbol])

# %%
@patch
def places(self:ByteTransformer, read):
    "The place of each byte with a loss of `SegmentBytes`, `(bytes,)`."
    chunks, starts = [], []
    for chunk, place in zip(read.chunks, read.places):
        if chunk == b'' or chunk == bytes([UNKNOWN_BYTE]): continue
        chunks.append(chunk)
        starts.append(INSIDE if place == BARE else place)   # nothing marks where a word without a space ends
    symbols = lay(chunks)
    places = byte_places(symbols, np.array(starts, dtype=np.int64))
    last = np.roll(symbols, -1) == WORD_BYTE   # what follows the last byte of a chunk is the next chunk's
    return torch.from_numpy(places[~last])

# %%
def whole_chunks():
    "The rule of the tokenizer: a chunk is spelled in bytes, each shown as a character, and never cut."
    from tokenizers import pre_tokenizers
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

def learn_merges(tokens, vocabulary):
    "Byte pairs that are merged, one a line, learned from `tokens`; no pair crosses a chunk."
    from tokenizers import Tokenizer, models, trainers
    rule = whole_chunks()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = rule
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=rule.alphabet(), show_progress=False)
    known = (chunk.decode() for chunk in byte_chunks([tokens]) if chunk != bytes([UNKNOWN_BYTE]))
    tokenizer.train_from_iterator(known, trainer)

    lines = []
    for pair in json.loads(tokenizer.to_str())['model']['merges']:
        lines.append(pair if isinstance(pair, str) else ' '.join(pair))   # older versions write strings
    return '\n'.join(lines)

# %%
def tokenizer_of(merges):
    "The tokenizer of `merges`, and the names of its symbols: the 256 bytes first, one character each."
    from tokenizers import Tokenizer, models
    rule = whole_chunks()
    pairs = [tuple(line.split(' ')) for line in merges.split('\n') if line]
    names = sorted(rule.alphabet()) + [a + b for a, b in pairs]
    numbers = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(numbers, pairs))
    tokenizer.pre_tokenizer = rule
    return tokenizer, names

def byte_characters():
    "The byte of each character by which the tokenizer shows bytes (GPT-2's `bytes_to_unicode`)."
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]   # these as themselves
    others = [b for b in range(256) if b not in shown]
    table = {chr(b): b for b in shown}
    table.update({chr(256 + i): b for i, b in enumerate(others)})
    return table

# %%
@dataclass(frozen=True)
class SubwordTransformerConfig(TransformerConfig):
    "Choices of the subword transformer."
    context_symbols: int = option(512, at_least=1, doc='subwords that it sees, the present one included')
    vocabulary: int = option(4096, at_least=256, doc='subwords that are learned, the 256 bytes among them')
    merges: str = option('', doc='byte pairs that the tokenizer joins, one a line; learned from training text')

class SubwordTransformer(FlatTransformer):
    """Subwords in one row: byte pairs, none across words. A text can be cut in many ways and one is counted:
    its bits are an upper bound."""
    Config = SubwordTransformerConfig

    def __init__(self, config: SubwordTransformerConfig):
        tokenizer, names = tokenizer_of(config.merges)
        super().__init__(config, outputs=len(names), inputs=len(names) + 2)
        self.tokenizer = tokenizer
        self.names = names
        self.byte_of = byte_characters()
        self.unknown = len(names)
        self.start = len(names) + 1
        self.known = {}   # chunk -> its symbols

    @classmethod
    def config_for(cls, config, corpus, min_count=25):
        "`config` with byte pairs learned from the training text."
        return replace(config, merges=learn_merges(corpus.words('train'), config.vocabulary))

# %%
@patch
def symbols(self:SubwordTransformer, chunk):
    "The numbers of the subwords of a chunk."
    if chunk in self.known: return self.known[chunk]
    if len(self.known) > 1 << 18: self.known.clear()
    self.known[chunk] = self.tokenizer.encode(chunk.decode()).ids
    return self.known[chunk]

@patch
def spelled(self:SubwordTransformer, symbol):
    "The bytes of a subword."
    return bytes(self.byte_of[character] for character in self.names[symbol])

@patch
def places(self:SubwordTransformer, read): return None   # subwords that cannot follow are not masked

# %%
@dataclass(frozen=True)
class Line:
    "What one lane reads of a segment."
    symbols: list    # numbers, with a start symbol wherever a stream starts over
    begins: list     # where those start symbols are

def lay_line(pieces, starts, start):
    "The `Line` of words cut into `pieces`, with the symbol `start` before each of the words `starts`."
    symbols, begins = [], []
    for t, piece in enumerate(pieces):
        if t in starts:
            begins.append(len(symbols))
            symbols.append(start)
        symbols += piece
    return Line(symbols, begins)

# %%
def plan_ragged(lines, valid, context):
    """Inputs `(lanes, longest)` of `Line`s of different lengths, these lengths, their `WindowPlan`, and how
    many carried inputs of each lane are valid after, where `valid` were before."""
    lengths = np.array([len(line.symbols) for line in lines])
    longest = lengths.max()
    inputs = np.zeros((len(lines), longest), np.int64)
    alone = np.arange(longest) + context - 1   # what fills a lane up sees itself
    first = np.tile(alone, (len(lines), 1))
    after = []
    for i, line in enumerate(lines):
        count = lengths[i]
        inputs[i, :count] = line.symbols
        first[i, :count], left = plan_window(count, line.begins, valid[i], context)
        after.append(left)
    keep = lengths[:, None] + np.arange(context - 1)
    return inputs, lengths, WindowPlan(torch.from_numpy(first), torch.from_numpy(keep)), after

# %%
@dataclass(frozen=True)
class FlatPlan(Plan):
    "A segment for a `FlatTransformer`. Outputs are counted lane by lane, that of the segment before included."
    lanes: int
    words: int
    window: WindowPlan
    inputs: torch.Tensor = of_shape('lanes', 'longest')
    rows: torch.Tensor = of_shape('targets')       # the output that predicts each target
    targets: torch.Tensor = of_shape('targets')    # symbols with a loss
    word: torch.Tensor = of_shape('targets')       # place in the segment of its word
    last: torch.Tensor = of_shape('lanes')         # the last output of each lane
    places: torch.Tensor = of_shape('targets')     # as of `allowed_bytes`, where known

# %%
@patch
def cut(self:FlatTransformer, chunks):
    "The symbols of each of `chunks`."
    pieces = {b'': [], bytes([UNKNOWN_BYTE]): [self.unknown]}
    for chunk in chunks:
        if chunk not in pieces: pieces[chunk] = self.symbols(chunk)
    return [pieces[chunk] for chunk in chunks]

# %%
@patch
def prepare(self:FlatTransformer, segment, ledger, following=None):
    "The `FlatPlan` of a segment, and the next ledger. Where `following` is not given, a space is assumed."
    lanes, count = len(segment), len(segment[0])
    read = segment_bytes(segment, ledger['before'], following)
    pieces = self.cut(read.chunks)
    starts = self.stream_starts(ledger, count)
    lines = []
    for first in range(0, lanes * count, count):
        lines.append(lay_line(pieces[first:first + count], starts, self.start))
    inputs, lengths, window, valid = plan_ragged(lines, ledger['valid'], self.config.context_symbols)

    real = np.arange(inputs.shape[1]) < lengths[:, None]
    scored = real & (inputs != self.start) & (inputs != self.unknown)
    lane, column = scored.nonzero()
    width = inputs.shape[1] + 1
    sizes = [0 if piece == [self.unknown] else len(piece) for piece in pieces]
    word = np.repeat(np.arange(len(sizes)), sizes)
    last = lengths + width * np.arange(lanes)
    arrays = inputs, lane * width + column, inputs[scored], word, last
    tensors = [torch.from_numpy(array) for array in arrays]
    after = dict(ledger, position=ledger['position'] + count, fresh=False, valid=valid, before=read.after)
    return FlatPlan(lanes, count, window, *tensors, self.places(read)), after

# %%
@patch
def logits(self:FlatTransformer, outputs, places=None):
    "Logits `(rows, symbols)` in float32 at least, minus infinity where `places` `(rows,)` forbid a byte."
    logits = float32_at_least(self.output(outputs))
    if places is None: return logits
    allowed = self.allowed.index_select(0, places)
    return logits.masked_fill(~allowed, -torch.inf)

@patch
def read_row(self:FlatTransformer, plan, state):
    "Logits `(targets, symbols)` of each symbol with a loss, and the next state."
    inputs = self.dropout(self.embedding(plan.inputs))
    outputs, past = slide(self.backbone, inputs, state['past'], plan.window)
    shifted = torch.cat([state['h'][:, None].to(outputs.dtype), outputs], 1)   # one input later
    flat = shifted.flatten(0, 1)
    after = dict(h=flat.index_select(0, plan.last).detach(), past=past)
    return self.logits(flat.index_select(0, plan.rows), plan.places), after

@patch
def forward(self:FlatTransformer, plan, state, reuse=False):
    "`Predictions` of a segment and the next state. Nothing of `state` is written into, whatever `reuse`."
    logits, after = self.read_row(plan, state)
    nats = F.cross_entropy(logits, plan.targets, reduction='none')
    return Predictions(sum_by_word(nats, plan.word, (plan.lanes, plan.words))), after

# %%
@patch
def words_right(self:FlatTransformer, plan, state):
    """Of the words with a loss: whether every symbol is the likeliest given those before it, and their places
    in the segment, `(chunks,)` each. And the next state."""
    logits, after = self.read_row(plan, state)
    wrong = (logits.argmax(-1) != plan.targets).long()
    count = wrong.new_zeros(plan.lanes * plan.words).index_add(0, plan.word, wrong)
    coded = plan.word.unique()
    return count[coded] == 0, coded, after

@patch
def training_flops(self:FlatTransformer, plan):
    "Operations of the matrix products of one update on `plan`, attention in full."
    lanes, count = plan.inputs.shape
    pairs = window_pairs(lanes, count, self.config.context_symbols - 1)
    outputs = 2 * len(plan.targets) * self.output.weight.numel()
    return 3 * (stack_flops(self.backbone, lanes * count, pairs) + outputs)
