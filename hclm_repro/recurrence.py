"""Words have different lengths. How does an LSTM read thousands of them at once, without padding and fast on a CPU?"""

# %%
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from fastcore.basics import patch
from torch import nn
from torch.nn import functional as F

from hclm_repro.model import (
    Dropout, LanguageModel, ModelConfig, Plan, Predictions, draw_word, lstm_steps, of_shape, option, sum_by_word,
    symbol_nats, uniform_weights)
from hclm_repro.text import PADDING

# %%
@dataclass(frozen=True)
class Packing(Plan):
    """Where the elements of sequences that lie end to end go when they are packed: step by step, the longest
    sequence first, as torch's packed sequences."""
    batch_sizes: list                                   # sequences alive at each step
    sorted_indices: torch.Tensor = of_shape('sequences')  # sequences by falling length
    row: torch.Tensor = of_shape('rows')                # packed row of each element
    before: torch.Tensor = of_shape('later')            # row of the previous step, for rows after step 0
    last: torch.Tensor = of_shape('sequences')          # row of each sequence's last element
    empty: torch.Tensor = of_shape('sequences')         # whether a sequence has no element

def pack(lengths):
    "The `Packing` of sequences of `lengths` that lie end to end."
    lengths = np.asarray(lengths, dtype=np.int64)
    count = len(lengths)
    order = np.argsort(-lengths, kind='stable')
    starts = np.cumsum(lengths) - lengths
    sizes = count - np.cumsum(np.bincount(lengths, minlength=1))[:-1]
    first_row = np.cumsum(sizes) - sizes   # of each step

    rank = np.empty_like(order)
    rank[order] = np.arange(count)
    sequence = np.repeat(np.arange(count), lengths)
    step = np.arange(len(sequence)) - starts[sequence]
    row = first_row[step] + rank[sequence]

    before = row
    if len(sizes): before = np.arange(sizes[0], sizes.sum()) - np.repeat(sizes[:-1], sizes[1:])
    filled = lengths > 0
    last = np.zeros_like(lengths)
    last[filled] = row[(starts + lengths - 1)[filled]]
    arrays = order, row, before, last, ~filled
    return Packing(sizes.tolist(), *[torch.from_numpy(array) for array in arrays])

# %%
_HELD_NUMBERS = 1 << 17   # numbers of a hidden state that the processor's cache holds beside their gates

@dataclass
class Block:
    "Sequences that are run together, the longest first."
    first: int      # rank of the first of them
    most: int       # how many there are at most
    steps: list     # their packed rows at each step, as slices

def sequence_blocks(batch_sizes, units, device):
    "`Block`s of sequences whose states stay in the processor's cache; on a card all in one."
    whole = batch_sizes[0] if batch_sizes else 0
    most = max(32, _HELD_NUMBERS // units) if device.type == 'cpu' else max(1, whole)
    starts = list(accumulate(batch_sizes, initial=0))
    blocks = []
    for first in range(0, whole, most):
        steps = []
        for start, alive in zip(starts, batch_sizes):
            if alive <= first: break
            steps.append(slice(start + first, start + min(first + most, alive)))
        blocks.append(Block(first, most, steps))
    return blocks

# %%
def in_units(count, dtype, unit=16):
    "`count`, above `unit` in whole units in half precision, where products are compiled by shape."
    if dtype.itemsize > 2 or count <= unit: return count
    return -(-count // unit) * unit

def buffer_rows(rows, dtype):
    "Rows of a buffer that is read in whole units from any row on, and has few different sizes itself."
    return rows if dtype.itemsize > 2 else in_units(rows + 15, dtype, 256)

# %%
@dataclass
class Trace:
    "What the forward pass of `ragged_lstm` keeps; g is the LSTM's cell candidate, i, f, o its gates."
    gates: torch.Tensor      # (rows, 4 units) sigmoids of i, f, -2 g, o
    cells: torch.Tensor      # (rows, units) c
    squashed: torch.Tensor   # (rows, units) sigmoid(-2 c), so that tanh(c) = 1 - 2 sigmoid(-2 c)
    hidden: torch.Tensor     # (rows and spare rows, units), in the dtype of products

def _allocate(h0, rows, dtype):
    "An empty `Trace`, its spare rows zero."
    units = h0.shape[1]
    hidden = h0.new_empty(buffer_rows(rows, dtype), units, dtype=dtype)
    hidden[rows:] = 0
    return Trace(h0.new_empty(rows, 4 * units), h0.new_empty(rows, units), h0.new_empty(rows, units), hidden)

# %%
def run_forward(inputs, symbols, h0, c0, weight, batch_sizes, dtype):
    """The `Trace` of an LSTM over packed rows, from `h0`, `c0` `(sequences, units)`, the longest first.

    `inputs` `(rows, 4 units)` has a row for each packed row; or for each symbol, and `symbols` `(rows,)` are
    the packed rows'. Those of g, and its rows of `weight` `(4 units, units)`, come multiplied by -2."""
    inputs = inputs.to(dtype)
    recurrent = weight.t().to(dtype)
    trace = _allocate(h0, sum(batch_sizes), dtype)
    start = h0.new_empty(buffer_rows(len(h0), dtype), h0.shape[1], dtype=dtype)
    start[:len(h0)] = h0

    for block in sequence_blocks(batch_sizes, h0.shape[1], h0.device):
        before = start[block.first:]
        c = c0[block.first:block.first + block.most]
        workspace = start.new_empty(in_units(len(c), dtype), 4 * h0.shape[1]) if dtype.itemsize <= 2 else None
        for rows in block.steps:
            c = step_forward(inputs, symbols, before, c, recurrent, workspace, trace, rows)
            before = trace.hidden[rows.start:]
    return trace

# %%
def step_forward(inputs, symbols, before, c, recurrent, workspace, trace, rows):
    "One step: fill `rows` of `trace` from the hidden states `before` and the cells `c`; the next cells."
    n = rows.stop - rows.start
    padded = in_units(n, recurrent.dtype)   # rows in excess are scratch space, their results are never read
    gates = trace.gates[rows]
    sums = gates if workspace is None else workspace
    if symbols is None: sums[:n].copy_(inputs[rows])
    else: torch.index_select(inputs, 0, symbols[rows], out=sums[:n])
    sums[:padded].addmm_(before[:padded], recurrent)
    if workspace is not None: gates.copy_(sums[:n])

    i, f, g, o = gates.sigmoid_().chunk(4, 1)
    cells = trace.cells[rows]
    torch.addcmul(i, f, c[:n], out=cells).addcmul_(i, g, value=-2)   # f c + i tanh(g)
    squashed = torch.mul(cells, -2, out=trace.squashed[rows]).sigmoid_()
    torch.addcmul(o, o, squashed, value=-2, out=trace.hidden[rows])  # o tanh(c)
    return cells

# %%
_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input

def step_backward(h, c, gates, squashed, before, d_gates, spare):
    """One step back: from the gradients of `h` and, from later steps, of `c`, those of the pre-activations into
    `d_gates`, and of the cell `before` into `c`. All `(n, units)`, gates `(n, 4 units)`."""
    i, f, g, o = gates.chunk(4, 1)
    d_i, d_f, d_g, d_o = d_gates.chunk(4, 1)
    torch.mul(h, o, out=spare)
    c.add_(_sigmoid_backward(spare, squashed, grad_input=spare), alpha=4)
    torch.addcmul(c, c, g, value=-2, out=d_i)
    torch.mul(c, before, out=d_f)
    torch.mul(c, i, out=d_g).mul_(-2)
    torch.addcmul(h, h, squashed, value=-2, out=d_o)
    _sigmoid_backward(d_gates, gates, grad_input=d_gates)
    c.mul_(f)

# %%
def run_backward(grad, symbols, trace, h0, c0, weight, d_inputs, batch_sizes):
    """Gradients of the pre-activations `(rows and spare rows, 4 units)` in the dtype of products, of h0, of c0.

    `grad` `(rows, units)` is that of the hidden states. Those of the inputs go into `d_inputs`."""
    dtype = trace.hidden.dtype
    rows_in_all = len(trace.gates)
    d_all = trace.gates.new_empty(buffer_rows(rows_in_all, dtype), trace.gates.shape[1], dtype=dtype)
    d_all[rows_in_all:] = 0
    d_h0 = torch.zeros_like(h0)
    d_c0 = torch.zeros_like(c0)
    recurrent = weight.to(dtype)

    for block in sequence_blocks(batch_sizes, h0.shape[1], h0.device):
        sequences = slice(block.first, block.first + block.most)
        d_h, d_c = d_h0[sequences], d_c0[sequences]
        spare = torch.empty_like(d_h)
        workspace = trace.gates.new_empty(len(d_h), trace.gates.shape[1])
        for t in reversed(range(len(block.steps))):
            rows = block.steps[t]
            n = rows.stop - rows.start
            before = trace.cells[block.steps[t - 1]][:n] if t else c0[block.first:block.first + n]
            h = d_h[:n].add_(grad[rows])
            d_gates = workspace[:n]
            step_backward(h, d_c[:n], trace.gates[rows], trace.squashed[rows], before, d_gates, spare[:n])
            if symbols is None: d_inputs[rows] = d_gates
            else: d_inputs.index_add_(0, symbols[rows], d_gates)
            d_all[rows] = d_gates
            padded = d_all[rows.start:rows.start + in_units(n, dtype)]
            h.copy_((padded @ recurrent)[:n])
    return d_all, d_h0, d_c0

# %%
def states_before(h0, hidden, packing):
    "The hidden state before each packed row, as `hidden` `(rows and spare rows, units)`."
    first = packing.batch_sizes[0] if packing.batch_sizes else 0
    rows = len(packing.row)
    before = torch.empty_like(hidden)
    before[:first] = h0[:first]
    before[first:rows] = hidden.index_select(0, packing.before)
    before[rows:] = 0
    return before

class _Recurrence(torch.autograd.Function):
    "LSTM over packed rows; h0, c0 `(sequences, units)` sorted by length. The cells carry no gradient."
    @staticmethod
    def forward(ctx, inputs, symbols, h0, c0, weight, packing, dtype):
        trace = run_forward(inputs, symbols, h0, c0, weight, packing.batch_sizes, dtype)
        kept = trace.gates, trace.cells, trace.squashed, trace.hidden
        ctx.save_for_backward(symbols, h0, c0, weight, *kept)
        ctx.packing = packing
        ctx.inputs_shape = inputs.shape
        ctx.mark_non_differentiable(trace.cells)
        return trace.hidden[:len(trace.gates)], trace.cells

    @staticmethod
    def backward(ctx, grad, _):
        symbols, h0, c0, weight, *kept = ctx.saved_tensors
        trace = Trace(*kept)
        d_inputs = trace.gates.new_zeros(ctx.inputs_shape)
        sizes = ctx.packing.batch_sizes
        d_gates, d_h, d_c = run_backward(grad, symbols, trace, h0, c0, weight, d_inputs, sizes)
        before = states_before(h0, trace.hidden, ctx.packing)
        d_weight = (d_gates.t() @ before).to(weight.dtype)
        return d_inputs, None, d_h, d_c, d_weight, None, None

# %%
def project(lstm, inputs):
    "The input product of an `nn.LSTM`, `(rows, 4 units)`."
    return F.linear(inputs, lstm.weight_ih_l0, lstm.bias_ih_l0 + lstm.bias_hh_l0)

def ragged_lstm(lstm, inputs, packing, h0, c0, symbols=None):
    """Run an `nn.LSTM` over packed rows of projected `inputs`.

    `inputs` `(rows, 4 units)`, or a table `(symbols, 4 units)` in which `symbols` `(rows,)` are looked up;
    `h0`, `c0` `(sequences, units)`. Returns hidden `(rows, units)` and the last hidden and cell of each
    sequence; the last cell carries no gradient."""
    kind = inputs.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h0.dtype
    sorted_h = h0.index_select(0, packing.sorted_indices)
    sorted_c = c0.index_select(0, packing.sorted_indices)
    scale = lstm.weight_hh_l0.new_tensor([1, 1, -2, 1])   # tanh(g) = 1 - 2 sigmoid(-2 g)
    scale = scale.repeat_interleave(h0.shape[1])
    weight = lstm.weight_hh_l0 * scale[:, None]
    hidden, cells = _Recurrence.apply(inputs.to(h0.dtype) * scale, symbols, sorted_h, sorted_c, weight,
                                      packing, dtype)
    if not packing.batch_sizes: return hidden, h0, c0
    empty = packing.empty[:, None]
    last_h = hidden.index_select(0, packing.last).to(h0.dtype)
    last_c = cells.index_select(0, packing.last)
    return hidden, torch.where(empty, h0, last_h), torch.where(empty, c0, last_c)

# %%
@dataclass(frozen=True)
class CharLSTMConfig(ModelConfig):
    "Choices of the character LSTM."
    units: int = option(256, at_least=1, doc='width of the LSTM')
    embedding: int = option(64, at_least=1, doc='width of the character vectors')
    init_range: float | None = option(None, above=0, doc='weights start uniform in ± this (K17 §4: 0.08); '
                                      'None: as torch starts them')

@dataclass(frozen=True)
class CharLSTMPlan(Plan):
    "A segment for the character LSTM. A lane is one sequence, or several where the state starts over."
    lanes: int
    words: int
    pieces: int                                     # sequences of each lane
    cold: bool                                      # whether the first of them starts over
    packing: Packing                                # of lanes * pieces sequences
    previous: torch.Tensor = of_shape('rows')       # the symbol that is read
    targets: torch.Tensor = of_shape('rows')        # the symbol that follows it, -100 where that has no loss
    word_start: torch.Tensor = of_shape('rows')     # whether a word starts with the target
    word: torch.Tensor = of_shape('rows')           # the word of the target, numbered lane by lane

# %%
class CharLSTM(LanguageModel):
    "Characters only: the No-Hierarchy baseline."
    Config = CharLSTMConfig
    resets = dict(h='state_reset', c='state_reset', last='state_reset')

    def __init__(self, config: CharLSTMConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(self.alphabet.symbols, config.embedding)
        self.lstm = nn.LSTM(config.embedding, config.units)
        self.output = nn.Linear(config.units, self.alphabet.outputs)
        self.dropout = Dropout(config.dropout)
        uniform_weights(self, config.init_range)

    def begin(self, lanes):
        zero = self.output.weight.new_zeros(lanes, self.config.units)
        ledger = dict(position=0, last=[self.alphabet.start] * lanes)   # the last symbol of each lane
        return dict(h=zero, c=zero), ledger

# %%
def previous_symbols(symbols, pieces, carried, start):
    """The symbol read before each of `symbols` `(symbols,)`, which lie lane by lane and piece by piece.

    `pieces` `(lanes, pieces)`: symbols of each; `carried`: what the first piece of each lane continues;
    all other pieces begin with `start`."""
    previous = np.roll(symbols, 1)
    ends = np.cumsum(pieces).reshape(pieces.shape)
    begins = ends - pieces
    for lane in range(len(pieces)):
        for piece in range(pieces.shape[1]):
            if pieces[lane, piece] == 0: continue
            previous[begins[lane, piece]] = carried[lane] if piece == 0 else start
    return previous

def last_symbols(symbols, pieces, carried):
    "The last symbol of each lane, or what it `carried` where it has none."
    ends = np.cumsum(pieces.sum(1))
    return [int(symbols[end - 1]) if length else before
            for end, length, before in zip(ends, pieces.sum(1), carried)]

# %%
@patch
def prepare(self:CharLSTM, segment, ledger, following=None):
    "The `CharLSTMPlan` of a segment, and the next ledger."
    lanes, count = len(segment), len(segment[0])
    alphabet = self.alphabet
    tokens = [token for lane in segment for token in lane]
    real = [token != PADDING for token in tokens]
    lengths = np.zeros(lanes * count, np.int64)
    symbols, lengths[real] = alphabet.encode([t for t in tokens if t != PADDING], terminated=True)

    resets = self.restart_points('state_reset', ledger, count)
    cold = 0 in resets
    cuts = resets if cold else [0, *resets]
    pieces = np.add.reduceat(lengths.reshape(lanes, count), cuts, axis=1)
    carried = [alphabet.start] * lanes if cold else ledger['last']
    previous = previous_symbols(symbols, pieces, carried, alphabet.start)
    packing = pack(pieces.ravel())

    before_a_word = [alphabet.terminator, alphabet.line_end, alphabet.unknown, alphabet.start]
    targets = np.where(symbols == alphabet.unknown, -100, symbols)
    word = np.repeat(np.arange(len(tokens)), lengths)
    order = torch.argsort(packing.row).numpy()
    arrays = previous, targets, np.isin(previous, before_a_word), word
    rows = [torch.from_numpy(array[order]) for array in arrays]
    plan = CharLSTMPlan(lanes, count, pieces.shape[1], cold, packing, *rows)
    last = last_symbols(symbols, pieces, ledger['last'])
    return plan, dict(ledger, position=ledger['position'] + count, last=last)

# %%
@patch
def _starts(self:CharLSTM, carried, plan):
    "States `(lanes * pieces, units)` of all sequences from those `carried` `(lanes, units)`: the first piece's."
    first = torch.zeros_like(carried) if plan.cold else carried
    others = carried.new_zeros(plan.lanes, plan.pieces - 1, self.config.units)
    return torch.cat([first[:, None], others], 1).flatten(0, 1)

@patch
def forward(self:CharLSTM, plan, state, reuse=False):
    "`Predictions` of a segment and the next state."
    table = project(self.lstm, self.dropout(self.embedding.weight))
    h0 = self._starts(state['h'], plan)
    c0 = self._starts(state['c'], plan)
    hidden, h, c = ragged_lstm(self.lstm, table, plan.packing, h0, c0, plan.previous)
    logits = self.output(self.dropout(hidden))
    nats = symbol_nats(logits, plan.targets, plan.word_start)

    def last(states): return states.view(plan.lanes, plan.pieces, -1)[:, -1].detach()
    words = sum_by_word(nats, plan.word, (plan.lanes, plan.words))
    return Predictions(words), dict(h=last(h), c=last(c))

# %%
@patch
def training_flops(self:CharLSTM, plan):
    "Floating-point operations of the matrix products of one update on `plan`."
    units = self.config.units
    rows = len(plan.targets)
    lstm_gates = 4 * units
    table = self.alphabet.symbols * self.config.embedding * lstm_gates
    return 6 * (rows * units * lstm_gates + table + rows * units * self.alphabet.outputs)

# %%
@patch
def sample(self:CharLSTM, state, ledger, sampler):
    "One word drawn symbol by symbol."
    h, c = state['h'], state['c']
    symbol = ledger['last'][0]
    if self.restart_points('state_reset', ledger):
        h, c = torch.zeros_like(h), torch.zeros_like(c)
        symbol = self.alphabet.start
    step = lstm_steps(self.embedding, self.lstm, self.output, (h[None], c[None]))
    return draw_word(self.alphabet, step, sampler, symbol)
