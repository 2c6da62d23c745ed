"""What does a position of a transformer see, and how does it read a text without end?"""

# %%
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from fastcore.basics import patch
from torch import nn
from torch.nn import functional as F

from hclm_repro.model import Dropout, ModelConfig, Plan, of_shape, option

# %%
def attention(q, k, v, **options):
    "`(rows, queries, heads, head)` from `q` of that shape and `k`, `v` `(rows, keys, heads, head)`."
    grouped = q.shape[2] != k.shape[2]
    q, k, v = [x.transpose(1, 2) for x in (q, k, v)]
    mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **options)
    return mixed.transpose(1, 2)

# %%
def turns(positions, head, dtype):
    """Cosine and sine of the rotary angles of `positions`, each `(positions, 1, head)`.

    Su et al. 2021, with base 10,000; `head` is the width of a head."""
    dtype = torch.promote_types(dtype, torch.float32)
    pairs = torch.arange(0, head, 2, device=positions.device, dtype=dtype)
    rates = 10000.0 ** -(pairs / head)
    angles = positions.to(dtype)[:, None] * rates
    both = angles.repeat(1, 2)[:, None]
    return both.cos(), both.sin()

def rotate(x, turn):
    "`x` `(..., positions, heads, head)`, each pair of numbers turned by the angle of its position."
    cosine, sine = turn
    a, b = x.chunk(2, -1)
    turned = x * cosine + torch.cat([-b, a], -1) * sine
    return turned.to(x.dtype)

# %%
def hidden_units(units, multiple=8):
    "The usual width of a feed-forward layer: 8/3 of `units`, rounded up to a multiple (Shazeer 2020)."
    return -(-8 * units // (3 * multiple)) * multiple

class Block(nn.Module):
    "A pre-norm layer as Llama's: attention with rotary positions, then SwiGLU. No biases."
    def __init__(self, units, heads, hidden=None, kv_heads=None, dropout=0.0):
        super().__init__()
        hidden = hidden or hidden_units(units)
        self.heads = heads
        self.kv_heads = kv_heads or heads
        self.head = units // heads
        projected = (heads + 2 * self.kv_heads) * self.head
        self.attention_norm = nn.RMSNorm(units, eps=1e-6)
        self.norm = nn.RMSNorm(units, eps=1e-6)
        self.qkv = nn.Linear(units, projected, bias=False)
        self.out = nn.Linear(units, units, bias=False)
        self.gate_up = nn.Linear(units, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, units, bias=False)
        self.dropout = Dropout(dropout)

# %%
@patch
def forward(self:Block, x, attend):
    "`x` `(..., units)`; `attend` maps q, k, v `(..., heads, head)` to `(..., heads, head)`."
    projected = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, self.head))
    q, k, v = projected.split([self.heads, self.kv_heads, self.kv_heads], -2)
    mixed = attend(q, k, v)
    x = x + self.dropout(self.out(mixed.flatten(-2)))

    gate, up = self.gate_up(self.norm(x)).chunk(2, -1)
    return x + self.dropout(self.down(F.silu(gate) * up))

# %%
class Transformer(nn.Module):
    "A stack of blocks and a last norm."
    def __init__(self, units, layers, heads, hidden=None, kv_heads=None, dropout=0.0, last_norm=True):
        super().__init__()
        blocks = [Block(units, heads, hidden, kv_heads, dropout) for _ in range(layers)]
        self.blocks = nn.ModuleList(blocks)
        self.units = units
        self.head = units // heads
        self.kv_heads = kv_heads or heads
        self.norm = nn.RMSNorm(units, eps=1e-6) if last_norm else nn.Identity()

    def forward(self, x, attend, rows=None, guides=None):
        """Outputs shaped like `x` `(..., units)`, or of `rows` alone; `attend(layer, q, k, v)` as in a block.

        `guides`: for each layer what is added to its input, shaped like `x`."""
        for layer, block in enumerate(self.blocks):
            if guides is not None: x = x + guides[layer]
            x = block(x, partial(attend, layer))
        if rows is not None: x = x.index_select(0, rows)
        return self.norm(x)

# %%
@patch
def initialise(self:Transformer, std):
    "Normal weights; those that add to the residual stream smaller by the root of the number of additions."
    additions = 2 * len(self.blocks)
    for name, p in self.named_parameters():
        if p.dim() < 2: continue
        adds = name.endswith(('out.weight', 'down.weight'))
        nn.init.normal_(p, std=std / additions ** 0.5 if adds else std)

# %%
def check_heads(config, units='units', heads='heads'):
    "Raise `ValueError` unless rotary heads fit: twice the number of `heads` must divide the width `units`."
    width = getattr(config, units)
    count = getattr(config, heads)
    if width % (2 * count) == 0: return
    raise ValueError(f'{type(config).__name__}: {heads} is {count}; allowed: an integer of which twice '
                     f'divides {units} ({width})')

@dataclass(frozen=True)
class TransformerConfig(ModelConfig):
    "What the configs of all transformers share."
    units: int = option(256, at_least=2, doc='width of the residual stream')
    layers: int = option(4, at_least=1, doc='blocks of the stack')
    heads: int = option(4, at_least=1, doc='heads of attention; twice their number must divide units')
    hidden: int | None = option(None, at_least=1, doc='width of the feed-forward layers; None: 8/3 of units')
    segment_words: int = option(64, at_least=1, doc='words of a lane between two updates')
    init_std: float = option(0.06, above=0, doc='standard deviation of the weights at the start')

    def __post_init__(self):
        super().__post_init__()
        check_heads(self)

# %%
@dataclass(frozen=True)
class Grouping(Plan):
    "Sequences laid end to end from the shortest to the longest, so that equal lengths lie together."
    groups: list                                    # (sequences, length) of each run of equal lengths
    positions: torch.Tensor = of_shape('rows')      # of each row in its sequence
    order: torch.Tensor = of_shape('sequences')     # the sequences as they are laid
    starts: torch.Tensor = of_shape('sequences')    # first row of each sequence, in the order given

def group_lengths(lengths):
    "The `Grouping` of sequences of `lengths`."
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(lengths, kind='stable')
    laid = lengths[order]
    first = np.cumsum(laid) - laid
    positions = np.arange(laid.sum()) - np.repeat(first, laid)
    starts = np.empty_like(lengths)
    starts[order] = first

    sizes, counts = np.unique(lengths, return_counts=True)
    groups = list(zip(counts.tolist(), sizes.tolist()))
    return Grouping(groups, *[torch.from_numpy(array) for array in (positions, order, starts)])

# %%
def packed_attention(grouping, head, dtype, causal):
    """Attention within each sequence of a `Grouping`: the `attend` of a `Transformer` over rows
    `(rows, heads, head)`. There is a loop over lengths, none over sequences."""
    turn = turns(grouping.positions, head, dtype)
    rows = [count * length for count, length in grouping.groups]

    def attend(_, q, k, v):
        if not rows: return q
        q = rotate(q, turn)
        k = rotate(k, turn)
        parts = []
        for group, *qkv in zip(grouping.groups, q.split(rows), k.split(rows), v.split(rows)):
            rectangles = [part.unflatten(0, group) for part in qkv]   # (sequences, length, heads, head)
            mixed = attention(*rectangles, is_causal=causal)
            parts.append(mixed.flatten(0, 1))
        return torch.cat(parts)

    return attend

# %%
def plan_window(count, starts, valid, context):
    """First column that each of `count` inputs sees, `(count,)`, and how many carried ones are valid after.

    Columns: `context - 1` carried inputs, of which the last `valid` count, then the inputs themselves.
    `starts`: inputs that see nothing before them."""
    since = np.full(count, -valid)   # the first input that each may see; the carried ones are negative
    for start in starts: since[start:] = start
    first = np.maximum(np.arange(count), since + context - 1)
    if count: valid = min(context - 1, count - int(since[-1]))
    return first, valid

# %%
@dataclass(frozen=True)
class WindowPlan(Plan):
    "What each input sees of the columns: carried inputs, then the inputs themselves."
    first: torch.Tensor = of_shape('windows', 'inputs')   # first column seen; one window if lanes are alike
    keep: torch.Tensor = of_shape('lanes', 'carried')     # columns that are carried on; None: the last ones

def plan_windows(count, starts, valid, context):
    """The `WindowPlan` of `count` inputs in lanes with `valid` carried ones each, and the next `valid`.

    All lanes start over at the same inputs `starts`."""
    plans = {v: plan_window(count, starts, v, context) for v in set(valid)}
    different = valid if len(plans) > 1 else valid[:1]
    first = np.stack([plans[v][0] for v in different])
    after = [plans[v][1] for v in valid]
    return WindowPlan(torch.from_numpy(first)), after

# %%
def blocks(count, size=256):
    "Ranges (first, end) that cut `count` queries into blocks of at most `size`."
    return [(first, min(first + size, count)) for first in range(0, count, size)]

def window_masks(first, carried):
    """For each block of queries its range and its mask `(windows, 1, queries, columns)`.

    The columns of a block are those that some of its queries may see: from `start` to `carried + end`."""
    masks = []
    for start, end in blocks(first.shape[1]):
        column = torch.arange(start, carried + end, device=first.device)
        own = column[carried:, None]   # the column of each query
        seen = (first[:, start:end, None] <= column) & (column <= own)
        masks.append((start, end, seen[:, None]))
    return masks

# %%
def carry_columns(columns, carried, keep=None):
    "The keys or values to carry on `(lanes, carried, heads, head)`, out of all `columns`, detached."
    columns = columns.detach()
    if keep is None: return columns[:, columns.shape[1] - carried:]
    index = keep[:, :, None, None].expand(-1, -1, *columns.shape[2:])
    return columns.gather(1, index)

# %%
def slide(transformer, x, past, plan):
    """Outputs `(lanes, inputs, units)` of inputs `x` of that shape, and the next `past`.

    `past` `(layers, 2, lanes, carried, heads, head)`: keys and values of the last inputs before, without a
    gradient and not rotated: positions count from the segment's start. `plan`: a `WindowPlan`."""
    carried = past.shape[3]
    positions = torch.arange(-carried, x.shape[1], device=x.device)
    turn = turns(positions, transformer.head, x.dtype)
    own_turn = [part[carried:] for part in turn]
    masks = window_masks(plan.first, carried)
    kept = []

    def attend(layer, q, k, v):
        old_k, old_v = past[layer]
        k = torch.cat([old_k.to(k.dtype), k], 1)
        v = torch.cat([old_v.to(v.dtype), v], 1)
        kept.append(torch.stack([carry_columns(columns, carried, plan.keep) for columns in (k, v)]))
        q = rotate(q, own_turn)
        k = rotate(k, turn)
        parts = []
        for start, end, seen in masks:
            columns = slice(start, carried + end)
            parts.append(attention(q[:, start:end], k[:, columns], v[:, columns], attn_mask=seen))
        return torch.cat(parts, 1)

    outputs = transformer(x, attend)
    return outputs, torch.stack(kept)

# %%
def empty_past(transformer, lanes, context, like):
    "Keys and values before anything was read, `(layers, 2, lanes, context - 1, heads, head)`, as `like`."
    layers = len(transformer.blocks)
    return like.new_zeros(layers, 2, lanes, context - 1, transformer.kv_heads, transformer.head)

# %%
def stack_flops(stack, rows, pairs):
    "Operations of a forward pass of `rows` through a stack, with attention over `pairs` of query and key."
    weights = sum(p.numel() for p in stack.parameters() if p.dim() > 1)
    return 2 * rows * weights + 4 * pairs * len(stack.blocks) * stack.units

def packed_pairs(grouping):
    "Pairs of query and key that `packed_attention` computes."
    return sum(count * length ** 2 for count, length in grouping.groups)

def window_pairs(lanes, inputs, carried):
    "Pairs of query and key that `slide` computes, those included that the masks of its blocks hide."
    pairs = [(end - start) * (carried + end - start) for start, end in blocks(inputs)]
    return lanes * sum(pairs)
