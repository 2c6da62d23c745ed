"""Can a model read and write bytes and think in words, without any vocabulary?"""

# %%
from dataclasses import dataclass, replace

import numpy as np
import torch
from fastcore.basics import patch
from torch import nn
from torch.nn import functional as F

from hclm_repro.cache import CachePlan, PointerCache
from hclm_repro.model import (
    CacheConfig, Dropout, LanguageModel, Plan, float32_at_least, mix, of_shape, option, sum_by_word)
from hclm_repro.text import Alphabet, LINE_END, PADDING, UNKNOWN
from hclm_repro.transformer import (
    Grouping, Transformer, TransformerConfig, WindowPlan, attention, check_heads, empty_past, group_lengths,
    packed_attention, packed_pairs, plan_windows, slide, stack_flops, window_pairs)

# %%
UNKNOWN_BYTE, WORD_BYTE = 0xFD, 0xFE   # UTF-8 never uses them: <unk>, and the paper's [W]
SPACE, NEWLINE = 0x20, 0x0A
SPECIAL = {PADDING: b'', UNKNOWN: bytes([UNKNOWN_BYTE]), LINE_END: b'\n'}

def byte_chunk(token, spaced=False):
    "The bytes of `token`, with a space if it is `spaced`."
    if token in SPECIAL: return SPECIAL[token]
    return token.encode() + b' ' if spaced else token.encode()

# %%
A_WORD = object()   # a following token of which no more is known than that it is a word

def followed_by_space(tokens, following=A_WORD):
    "Whether a space comes after each of `tokens`; `following`: the token after them, None at the end of a text."
    spaced = []
    for token, after in zip(tokens, [*tokens[1:], following]):
        ends = after is None or after in (LINE_END, PADDING)
        spaced.append(token not in SPECIAL and not ends)
    return spaced

def byte_chunks(segment, following=None):
    """The chunks of a segment, lane by lane in one list: bytes of each token with its space; b'' for padding.

    `following`: the token after each lane, None at the end of a text. Where it is not given, a space is
    assumed."""
    if following is None: following = [A_WORD] * len(segment)
    chunks = []
    for lane, after in zip(segment, following):
        spaced = followed_by_space(lane, after)
        chunks += map(byte_chunk, lane, spaced)
    return chunks

# %%
FREE, SPACED, BARE, INSIDE, DONE, TAIL, TAIL_E0, TAIL_ED, TAIL_F0, TAIL_F4 = range(10)

def allowed_bytes(terminated=True):
    """Which byte may come next in each of ten places, `(10, 256)`.

    `FREE`: a chunk starts after a line end; `SPACED`: after a word and a space; `BARE`: after a word without
    one, where a line end must follow; `INSIDE` a word; `DONE`: after a separator; `TAIL`...: inside a
    character. Without terminators (`terminated=False`) a line end may follow a word at once."""
    table = torch.zeros(10, 256, dtype=torch.bool)
    for place in (FREE, SPACED, INSIDE):
        table[place, :0x80] = True         # characters of one byte
        table[place, 0xC2:0xF5] = True     # first bytes of the others
    table[[FREE, SPACED], SPACE] = False
    table[SPACED, NEWLINE] = False
    table[INSIDE, NEWLINE] = not terminated
    table[BARE, NEWLINE] = True
    table[[INSIDE, DONE], WORD_BYTE] = terminated

    table[TAIL, 0x80:0xC0] = True
    table[TAIL_E0, 0xA0:0xC0] = True       # no overlong forms
    table[TAIL_ED, 0x80:0xA0] = True       # no surrogates
    table[TAIL_F0, 0x90:0xC0] = True       # no overlong forms
    table[TAIL_F4, 0x80:0x90] = True       # nothing beyond the last character
    return table

# %%
def _between(symbols, low, high): return (low <= symbols) & (symbols <= high)

def byte_places(symbols, starts):
    """The place of what follows each of `symbols` `(rows,)`: chunks laid end to end, each after a `WORD_BYTE`.

    `starts` `(chunks,)`: the places where the chunks start. Both are integer arrays; so is the result."""
    before = np.roll(symbols, 1)
    earlier = np.roll(symbols, 2)
    first = _between(symbols, 0xC2, 0xF4)     # of two bytes or more
    tail = _between(symbols, 0x80, 0xBF)
    second = tail & _between(before, 0xE0, 0xF4)     # of three bytes or four
    third = tail & _between(before, 0x80, 0xBF) & _between(earlier, 0xF0, 0xF4)     # of four
    places = np.where(first | second | third, TAIL, INSIDE)
    places[symbols == 0xE0] = TAIL_E0
    places[symbols == 0xED] = TAIL_ED
    places[symbols == 0xF0] = TAIL_F0
    places[symbols == 0xF4] = TAIL_F4
    places[(symbols == SPACE) | (symbols == NEWLINE)] = DONE
    places[symbols == WORD_BYTE] = starts
    return places

# %%
def lay(chunks):
    "The symbols `(rows,)` of `chunks` end to end, each after a `WORD_BYTE`."
    start = bytes([WORD_BYTE])
    laid = b''.join(start + chunk for chunk in chunks)
    return np.frombuffer(laid, np.uint8).astype(np.int64)

def place_within(chunk, start):
    "The place after the bytes `chunk` of a chunk that starts at the place `start`."
    places = byte_places(lay([chunk]), np.array([start]))
    return int(places[-1])

def place_after(token, spaced):
    "Where the chunk after `token` starts."
    if token in SPECIAL: return FREE
    return SPACED if spaced else BARE

# %%
@dataclass(frozen=True)
class SegmentBytes:
    "The tokens of a segment and what byte models must know of them, lane by lane in one list each."
    tokens: list
    spaced: list    # whether a space comes after the token
    chunks: list    # its bytes, with that space
    places: list    # the place where its chunk starts
    after: list     # the place where the next segment starts, of each lane

def segment_bytes(segment, before, following=None):
    "The `SegmentBytes` of a segment whose lanes start at the places `before`; `following` as in `byte_chunks`."
    tokens, spaced, places, after = [], [], [], []
    for i, lane in enumerate(segment):
        next_token = A_WORD if following is None else following[i]
        own = followed_by_space(lane, next_token)
        ends = [place_after(token, space) for token, space in zip(lane, own)]
        tokens += lane
        spaced += own
        places += [before[i], *ends[:-1]]
        after.append(FREE if following is None else ends[-1])   # after an assumed space, anything
    chunks = list(map(byte_chunk, tokens, spaced))
    return SegmentBytes(tokens, spaced, chunks, places, after)

# %%
@dataclass(frozen=True)
class PackedChunks(Plan):
    "Chunks, each after a `WORD_BYTE`, as packed rows."
    grouping: Grouping
    symbols: torch.Tensor = of_shape('rows')

def pack_chunks(chunks):
    "`PackedChunks` of a list of byte strings."
    grouping = group_lengths([len(chunk) + 1 for chunk in chunks])
    symbols = lay(chunks[i] for i in grouping.order.tolist())
    return PackedChunks(grouping, torch.from_numpy(symbols))

# %%
class ByteAlphabet(Alphabet):
    "Bytes spell every character: none is rare."
    def rare(self, tokens): return np.zeros(len(tokens), np.int64)

class ByteLevel(LanguageModel):
    """What models over chunks share: they need no alphabet, they must know the token after a segment, and a
    stream starts over with a vector or symbol of its own."""
    resets = dict(LanguageModel.resets, past='state_reset', valid='state_reset', fresh='state_reset')

    def __init__(self, config):
        super().__init__(config)
        self.alphabet = ByteAlphabet(config.alphabet)

    @classmethod
    def config_for(cls, config, corpus, min_count=25): return config

    def begin_ledger(self, lanes):
        "Before anything was read: nothing carried is `valid`, and a chunk may start as `after` a line end."
        return dict(position=0, fresh=True, valid=[0] * lanes, before=[FREE] * lanes)

    def stream_starts(self, ledger, words):
        "Which of the next `words` words come first in a stream, so that nothing before them is seen."
        if self.config.state_reset == 'segment': return self.restart_points('state_reset', ledger, words)
        return [0] if ledger['fresh'] else []

# %%
@dataclass(frozen=True)
class HATConfig(CacheConfig, TransformerConfig):
    """Choices of HAT: `units`, `layers` and so on are those of the backbone, `byte_units` and so on those of
    encoder and decoder each."""
    byte_units: int = option(128, at_least=2, doc='width of encoder and decoder')
    byte_layers: int = option(2, at_least=1, doc='blocks of encoder and decoder each')
    byte_heads: int = option(4, at_least=1, doc='heads of encoder and decoder each')
    byte_hidden: int | None = option(None, at_least=1, doc='their feed-forward width; None: 8/3 of byte_units')
    context_words: int = option(256, at_least=1, doc='words that the backbone sees, the present one included')
    cache_slots: int | None = option(0, at_least=0, doc='words that the cache holds; 0: no cache, None: no bound')
    decoder_layers: int | None = option(None, at_least=1, doc='blocks of the decoder, if not as the encoder')
    kv_heads: int | None = option(None, at_least=1, doc='heads of keys and values in the backbone; None: heads')
    pooling: str = option('symbol', 'symbol', 'query', doc='vector of a word: its [W] (paper), or what a '
                          'learned query reads (released models)')
    guide: str = option('prefix', 'prefix', 'layers', doc='where the decoder reads the context: as its first '
                        'position (paper), or in all layers (released models)')

    def __post_init__(self):
        super().__post_init__()
        check_heads(self, 'byte_units', 'byte_heads')
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f'HATConfig: kv_heads is {self.kv_heads}; allowed: a divisor of heads, '
                             f'which is {self.heads}')

# %%
class Pool(nn.Module):
    "A learned query that reads the rows of each chunk, `(chunks, units)` (released models)."
    def __init__(self, width, units, heads):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(units))
        self.ask = nn.Linear(units, units, bias=False)
        self.out = nn.Linear(units, units, bias=False)
        self.keys = nn.Linear(width, units, bias=False)
        self.values = nn.Linear(width, units, bias=False)

    def forward(self, x, grouping):
        "`x` `(rows, width)`, laid out as `grouping` says."
        if not grouping.groups: return x.new_zeros(0, len(self.query))
        rows = [count * length for count, length in grouping.groups]
        query = self.ask(self.query).view(1, 1, self.heads, -1)
        keys = self.keys(x).unflatten(-1, (self.heads, -1)).split(rows)
        values = self.values(x).unflatten(-1, (self.heads, -1)).split(rows)
        parts = []
        for group, k, v in zip(grouping.groups, keys, values):
            asked = query.expand(group[0], -1, -1, -1)
            parts.append(attention(asked, k.unflatten(0, group), v.unflatten(0, group)))
        pooled = torch.cat(parts).flatten(1)   # (chunks, units), as they are laid
        return self.out(pooled.index_select(0, grouping.order.argsort()))

# %%
class Guide(nn.Module):
    "What contexts `(chunks, units)` add in a layer of the decoder, `(chunks, width)` (released models)."
    def __init__(self, units, width):
        super().__init__()
        self.norm = nn.RMSNorm(units, eps=1e-6)
        self.value = nn.Linear(units, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, contexts): return self.out(self.value(self.norm(contexts)))

# %%
class HAT(ByteLevel):
    "Bytes of a word to a vector, vectors of words to a context, a context to bytes (HAT paper, §2)."
    Config = HATConfig
    Cache = PointerCache   # a subclass may take another

    def __init__(self, config: HATConfig):
        super().__init__(config)
        units, width = config.units, config.byte_units
        pooled = config.pooling == 'query'
        self.guided = config.guide == 'layers'   # a guide has a norm of its own
        depth = config.decoder_layers or config.byte_layers
        byte_sizes = dict(heads=config.byte_heads, hidden=config.byte_hidden, dropout=config.dropout)
        word_sizes = dict(heads=config.heads, hidden=config.hidden, kv_heads=config.kv_heads,
                          dropout=config.dropout)
        self.embedding = nn.Embedding(256, width)
        self.encoder = Transformer(width, config.byte_layers, **byte_sizes, last_norm=not pooled)
        self.decoder = Transformer(width, depth, **byte_sizes)
        self.to_word = Pool(width, units, config.heads) if pooled else nn.Linear(width, units, bias=False)
        self.first = nn.Parameter(torch.zeros(units))   # read where a stream starts
        self.backbone = Transformer(units, config.layers, **word_sizes, last_norm=not self.guided)
        self.to_bytes = self.guides(depth) if self.guided else nn.Linear(units, width, bias=False)
        self.output = nn.Linear(width, 256, bias=False)
        self.dropout = Dropout(config.dropout)
        self.cache = self.Cache.of(config)
        self.register_buffer('allowed', allowed_bytes(), persistent=False)
        self.initialise()

# %%
@patch
def guides(self:HAT, depth):
    "A `Guide` for each of `depth` layers of the decoder."
    config = self.config
    return nn.ModuleList([Guide(config.units, config.byte_units) for _ in range(depth)])

@patch
def initialise(self:HAT):
    "Normal weights but for norms and cache."
    std = self.config.init_std
    for stack in (self.encoder, self.backbone, self.decoder): stack.initialise(std)
    nn.init.normal_(self.first, std=std)
    for module in (self.embedding, self.to_word, self.to_bytes, self.output):
        for p in module.parameters():
            if p.dim() > 1: nn.init.normal_(p, std=std)

# %%
@patch
def begin(self:HAT, lanes):
    """State and ledger before anything was read.

    `h` `(lanes, units)` is the context of the next word, `past` what the backbone carries."""
    like = self.output.weight
    past = empty_past(self.backbone, lanes, self.config.context_words, like)
    state = dict(h=like.new_zeros(lanes, self.config.units), past=past)
    ledger = self.begin_ledger(lanes)
    if self.cache: state['keys'], ledger['held'] = self.cache.begin(lanes)
    return state, ledger

# %%
@dataclass(frozen=True)
class WritePlan(Plan):
    "Chunks that the decoder writes, as packed rows: those with a loss."
    grouping: Grouping
    symbols: torch.Tensor = of_shape('rows')     # what each row reads
    targets: torch.Tensor = of_shape('rows')     # what it must write
    places: torch.Tensor = of_shape('rows')      # the place of that, as of `allowed_bytes`
    chunk: torch.Tensor = of_shape('rows')       # the packed chunk that the row belongs to
    coded: torch.Tensor = of_shape('chunks')     # place in the segment of each packed chunk's word
    first: torch.Tensor = of_shape('chunks')     # its first row, which reads the context
    last: torch.Tensor = of_shape('chunks')      # its last row, which writes [W]
    words: torch.Tensor = of_shape('words')      # place in the segment of each word, line ends left out
    separator: torch.Tensor = of_shape('words')  # the row that writes its space, or [W] if it has none
    bare: torch.Tensor = of_shape('words')       # 1 if it has none

# %%
def plan_writing(read):
    "The `WritePlan` of `SegmentBytes`. Padding, `<unk>` and certain line ends have no loss."
    coded = []
    for i, token in enumerate(read.tokens):
        certain = read.places[i] == BARE   # a line end after a word without a space
        if token not in (PADDING, UNKNOWN) and not certain: coded.append(i)
    packed = pack_chunks([read.chunks[i] for i in coded])
    order = [coded[i] for i in packed.grouping.order.tolist()]
    lengths = np.array([len(read.chunks[i]) + 1 for i in order], dtype=np.int64)
    chunk = np.repeat(np.arange(len(order)), lengths)
    last = np.cumsum(lengths) - 1
    starts = np.array([read.places[i] for i in order], dtype=np.int64)
    places = byte_places(packed.symbols.numpy(), starts)
    targets = packed.symbols.roll(-1)   # the row after a chunk's last byte starts with [W]

    is_word = np.array([read.tokens[i] != LINE_END for i in order], dtype=bool)
    bare = np.array([not read.spaced[i] for i in order], dtype=np.int64)
    order = np.array(order, dtype=np.int64)
    separator = last - 1 + bare
    arrays = places, chunk, order, last + 1 - lengths, last, order[is_word], separator[is_word], bare[is_word]
    tensors = [torch.from_numpy(array) for array in arrays]
    return WritePlan(packed.grouping, packed.symbols, targets, *tensors)

# %%
@dataclass(frozen=True)
class HATPlan(Plan):
    "A segment for `HAT`: distinct chunks are read, the backbone looks them up, and all words are written."
    lanes: int
    words: int
    chunks: list          # distinct byte strings of the segment
    read: PackedChunks    # these, for the encoder
    window: WindowPlan    # for the backbone
    write: WritePlan      # for the decoder
    cache: CachePlan = None
    which: torch.Tensor = of_shape('lanes', 'inputs')   # the distinct chunk at each input of the backbone
    at: torch.Tensor = of_shape('words')                # the input of each word

# %%
def plan_inputs(read, lanes, starts):
    """Distinct chunks of `SegmentBytes`; which of them each input of the backbone is `(lanes, inputs)`; and
    the input of each word `(words,)`.

    Before the words `starts` there is one input more, of the vector that starts a stream: its number is that
    of the distinct chunks."""
    distinct = [chunk for chunk in dict.fromkeys(read.chunks) if chunk]
    number = {chunk: i for i, chunk in enumerate(distinct)}
    numbers = np.array([number.get(chunk, 0) for chunk in read.chunks])   # what padding reads plays no part
    numbers = numbers.reshape(lanes, -1)
    words = np.arange(numbers.shape[1])
    at = words + np.searchsorted(starts, words, side='right')
    which = np.full((lanes, len(words) + len(starts)), len(distinct))
    which[:, at] = numbers
    return distinct, which, at

# %%
@patch
def prepare(self:HAT, segment, ledger, following=None):
    "The `HATPlan` of a segment, and the next ledger. Where `following` is not given, a space is assumed."
    lanes, count = len(segment), len(segment[0])
    read = segment_bytes(segment, ledger['before'], following)
    starts = self.stream_starts(ledger, count)
    distinct, which, at = plan_inputs(read, lanes, starts)
    context = self.config.context_words
    window, valid = plan_windows(which.shape[1], at[starts] - 1, ledger['valid'], context)
    after = dict(ledger, position=ledger['position'] + count, fresh=False, valid=valid, before=read.after)

    cache = None
    if self.cache:   # a line end is impossible after a space and certain without: not to be held
        rows = [[PADDING if token == LINE_END else token for token in lane] for lane in segment]
        resets = self.restart_points('cache_reset', ledger, count)
        cache, after['held'] = self.cache.plan(rows, ledger['held'], resets)
    which = torch.from_numpy(which)
    at = torch.from_numpy(at)
    write = plan_writing(read)
    return HATPlan(lanes, count, distinct, pack_chunks(distinct), window, write, cache, which, at), after

# %%
@patch
def encode(self:HAT, plan):
    "Vectors `(chunks, units)` of `PackedChunks`, in the order given."
    x = self.dropout(self.embedding(plan.symbols))
    attend = packed_attention(plan.grouping, self.encoder.head, x.dtype, causal=False)
    if self.config.pooling == 'query': return self.to_word(self.encoder(x, attend), plan.grouping)
    return self.to_word(self.encoder(x, attend, plan.grouping.starts))

@patch
def read_words(self:HAT, plan, state, vectors=None):
    """Contexts `(lanes, words, units)`, each of which has read the words before it only, and what the backbone
    carries on. `vectors` `(distinct chunks, units)` where they are known."""
    if vectors is None: vectors = self.encode(plan.read)
    table = torch.cat([vectors.to(self.first.dtype), self.first[None]])
    inputs = self.dropout(F.embedding(plan.which, table))
    outputs, past = slide(self.backbone, inputs, state['past'], plan.window)
    shifted = torch.cat([state['h'][:, None].to(outputs.dtype), outputs], 1)   # one input later
    contexts = shifted.index_select(1, plan.at)
    return contexts, dict(h=shifted[:, -1].detach(), past=past)

# %%
@patch
def byte_logits(self:HAT, write, contexts):
    "Logits `(rows, 256)` of the rows of a `WritePlan`, minus infinity for forbidden bytes."
    contexts = contexts.flatten(0, 1).index_select(0, write.coded)
    x = self.embedding(write.symbols)
    guides = None
    if self.guided: guides = [guide(contexts).index_select(0, write.chunk) for guide in self.to_bytes]
    else: x = x.index_copy(0, write.first, self.to_bytes(contexts).to(x.dtype))
    attend = packed_attention(write.grouping, self.decoder.head, x.dtype, causal=True)
    outputs = self.decoder(self.dropout(x), attend, guides=guides)
    logits = float32_at_least(self.output(outputs))
    allowed = self.allowed.index_select(0, write.places)
    return logits.masked_fill(~allowed, -torch.inf)

# %%
@patch
def spell(self:HAT, plan, contexts):
    """Of each word `(lanes, words)`: nats of spelling it; its [W]'s part of them; and nats of its separator,
    space or none, once its letters are there. 0 for words without a loss."""
    write = plan.write
    logits = self.byte_logits(write, contexts)
    nats = F.cross_entropy(logits, write.targets, reduction='none')
    ending = logits.index_select(0, write.separator)
    space_or_none = torch.stack([ending[:, SPACE], ending[:, WORD_BYTE]], 1)
    separators = F.cross_entropy(space_or_none, write.bare, reduction='none')

    size = plan.lanes, plan.words
    spelled = sum_by_word(nats, write.coded.index_select(0, write.chunk), size)
    terminator = sum_by_word(nats.index_select(0, write.last), write.coded, size)
    return spelled, terminator, sum_by_word(separators, write.words, size)

# %%
@patch
def forward(self:HAT, plan, state, reuse=False):
    """`Predictions` of a segment, with the speller's `terminator` nats, and the next state.

    A copied word must still say whether a space follows. With `reuse` the tensors of `state` may be written
    into; without, the same call gives the same numbers."""
    contexts, after = self.read_words(plan, state)
    nats, terminator, separator = self.spell(plan, contexts)
    sources = []
    if self.cache:
        copying, after['keys'] = self.cache(contexts, state['keys'], plan.cache, detail=-separator, reuse=reuse)
        sources.append(copying)
    predictions = mix(-nats, sources)
    coded = torch.zeros_like(nats, dtype=torch.bool).view(-1).index_fill(0, plan.write.coded, True)
    nats = torch.where(coded.view_as(nats), predictions.nats, 0.0)
    return replace(predictions, nats=nats, terminator=terminator), after

# %%
@patch
def words_right(self:HAT, plan, state):
    """Of the words with a loss: whether every byte is the likeliest given those before it, and their places in
    the segment, `(chunks,)` each. And the next state, without the cache's keys."""
    contexts, after = self.read_words(plan, state)
    write = plan.write
    likeliest = self.byte_logits(write, contexts).argmax(-1)
    wrong = (likeliest != write.targets).long()
    count = wrong.new_zeros(len(write.coded)).index_add(0, write.chunk, wrong)
    return count == 0, write.coded, after

# %%
@patch
def _between_modules(self:HAT, plan):
    "Operations of a forward pass from encoder to backbone and from backbone to decoder."
    units = self.config.units
    width = self.config.byte_units
    distinct = len(plan.chunks)
    coded = len(plan.write.coded)
    into = 2 * distinct * width * units
    if self.config.pooling == 'query':   # keys, values and attention of each row, the query once
        into = 4 * len(plan.read.symbols) * (width + 1) * units + 2 * (distinct + 1) * units ** 2
    out = 2 * coded * units * width
    if self.guided: out = 2 * coded * (units + width) * width * len(self.to_bytes)
    return into + out

# %%
@patch
def training_flops(self:HAT, plan):
    "Operations of the matrix products of one update on `plan`, attention in full."
    lanes, inputs = plan.which.shape
    written = len(plan.write.symbols)
    pairs = window_pairs(lanes, inputs, self.config.context_words - 1)
    forward = stack_flops(self.encoder, len(plan.read.symbols), packed_pairs(plan.read.grouping))
    forward += stack_flops(self.backbone, lanes * inputs, pairs)
    forward += stack_flops(self.decoder, written, packed_pairs(plan.write.grouping))
    forward += self._between_modules(plan)
    forward += 2 * written * self.config.byte_units * 256
    total = 3 * forward   # outputs, gradients of the inputs, gradients of the weights
    if self.cache: total += self.cache.training_flops(plan.cache)
    return total

# %%
TABLE_2 = {'1B': dict(baseline=16, backbone=18, byte_heads=6, byte_layers=3),
           '3B': dict(baseline=24, backbone=28, byte_heads=6, byte_layers=3),
           '7B': dict(baseline=32, backbone=36, byte_heads=8, byte_layers=4)}

def count_parameters(*parts):
    "How many numbers modules or tensors hold together."
    total = 0
    for part in parts: total += part.numel() if torch.is_tensor(part) else sum(p.numel() for p in part.parameters())
    return total

def paper_sizes(size, head=128, vocabulary=64_000):
    """Parameters of the paper's models of a size of its Table 2: the baseline, and HAT's three modules.

    `head`: width of a head; `vocabulary`: rows of the baseline's two tables of tokens, which are not tied."""
    row = TABLE_2[size]
    heads = row['backbone']   # as many as layers
    layers = row['baseline']
    config = HATConfig(units=head * heads, layers=heads, heads=heads, byte_units=head * row['byte_heads'],
                       byte_layers=row['byte_layers'], byte_heads=row['byte_heads'])
    with torch.device('meta'):   # shapes without contents
        hat = HAT(config)
        flat = Transformer(head * layers, layers, layers)
    return dict(baseline=count_parameters(flat) + 2 * vocabulary * flat.units,
                backbone=count_parameters(hat.backbone, hat.first),
                encoder=count_parameters(hat.encoder, hat.embedding, hat.to_word),
                decoder=count_parameters(hat.decoder, hat.to_bytes, hat.output))

# %%
RELEASED = dict(units=4096, layers=32, heads=32, kv_heads=8, hidden=14336, byte_units=1024, byte_layers=6,
                decoder_layers=4, byte_heads=8, byte_hidden=2816, pooling='query', guide='layers')

def released_parameters():
    "Parameters of the released 8B conversion: of `HAT(RELEASED)`, and those of its guides that do nothing."
    config = HATConfig(**RELEASED)
    with torch.device('meta'): hat = HAT(config)
    width = config.byte_units
    query = width * width
    key = config.units * width
    norm = width   # of the query. None of the three plays a part: a softmax over one key is 1
    return hat.parameter_count + len(hat.to_bytes) * (query + key + norm)
