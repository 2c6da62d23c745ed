"""Every write to the cache changes what the next read sees. Must it then be read one word at a time?"""

# %%
from dataclasses import dataclass

import numpy as np
import torch
from fastcore.basics import patch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hclm_repro.model import Plan, Source, float32_at_least, of_shape
from hclm_repro.text import PADDING, UNKNOWN

# %%
@dataclass
class LanePlan:
    "What an LRU cache does in one lane of a segment; no key is looked at."
    death: np.ndarray   # (columns + words,) last step at which each column is seen; -1: never
    hit: np.ndarray     # (words,) the column that holds each word, or -1
    written: dict       # slot -> the last step that writes to it

def least_recently_used(held, word, full):
    """The slot for `word` in a cache of words `held` {word: slot}, the least recently used first.

    `held` moves on: `word` becomes the last. A `full` cache gives up its first word, if `word` is new."""
    if word in held: slot = held.pop(word)
    elif full: slot = held.pop(next(iter(held)))
    else: slot = len(held)
    held[word] = slot
    return slot

# %%
def plan_lane(tokens, held, slots=None, resets=(), columns=None, take_slot=least_recently_used):
    """The `LanePlan` of `tokens`, and the words held after them.

    `held`, {word: slot}, stays as it is. Carried keys are the first `columns` columns, by slot; the version
    of word t is column `columns + t`. `resets`: the steps before which the cache is emptied."""
    count = len(tokens)
    held = dict(held)
    columns = len(held) if columns is None else columns
    small = np.min_scalar_type(-1 - count)   # the mask is built from deaths: small integers are fast
    death = np.full(columns + count, count, small)
    death[len(held):columns] = -1
    hit = np.full(count, -1)
    written = {}

    for t, word in enumerate(tokens):
        if t in resets:
            np.minimum(death[:columns + t], t - 1, out=death[:columns + t])
            held.clear()
            written.clear()
        if word == PADDING or word == UNKNOWN:
            death[columns + t] = -1
            continue
        found = word in held
        full = slots is not None and len(held) >= slots
        slot = take_slot(held, word, full)
        if found or full:
            column = columns + written[slot] if slot in written else slot
            death[column] = t
            if found: hit[t] = column
        written[slot] = t
    return LanePlan(death, hit, written), held

# %%
def room(count, slots=None):
    "Columns for `count` keys: at most an eighth to spare, and never more than `slots`."
    step = 1 << max(0, count.bit_length() - 4)
    rounded = -(-count // step) * step
    return rounded if slots is None else min(rounded, slots)

@dataclass(frozen=True)
class CachePlan(Plan):
    "What the cache does in a segment, all lanes together. A column is a carried key or a version."
    columns: int                                                # room for carried keys before the segment
    kept: int                                                   # room for carried keys after it
    death: torch.Tensor = of_shape('lanes', 'columns + words')  # last step at which a column is seen
    hit: torch.Tensor = of_shape('lanes', 'words')              # the column that holds each word, or -1
    place: torch.Tensor = of_shape('written')                   # lane * kept + slot of each key to be kept
    word: torch.Tensor = of_shape('written')                    # lane * words + step that made it

# %%
def plan_cache(lanes, held, slots=None, resets=(), take_slot=least_recently_used):
    """The `CachePlan` of a segment, `lanes` of tokens, and the words held after it, {word: slot} of each lane.

    `held`: the words held before, which stay as they are; `resets`: steps before which caches are emptied."""
    count = len(lanes[0])
    columns = room(max(map(len, held)), slots)
    plans = []
    after = []
    for tokens, words in zip(lanes, held):
        plan, words = plan_lane(tokens, words, slots, resets, columns, take_slot)
        plans.append(plan)
        after.append(words)

    kept = room(max(map(len, after)), slots)
    place = []
    word = []
    for lane, plan in enumerate(plans):
        place += [lane * kept + slot for slot in plan.written]
        word += [lane * count + step for step in plan.written.values()]
    death = torch.from_numpy(np.stack([plan.death for plan in plans]))
    hit = torch.from_numpy(np.stack([plan.hit for plan in plans]))
    place = torch.tensor(place, dtype=torch.long)
    word = torch.tensor(word, dtype=torch.long)
    return CachePlan(columns, kept, death, hit, place, word), after

# %%
def take_keys(keys, columns):
    "The keys `(lanes, slots, units)` in `columns` `(lanes, n)` of each lane, whole rows at a time."
    lanes, slots, units = keys.shape
    first = slots * torch.arange(lanes, device=keys.device)[:, None]
    rows = (first + columns).flatten()
    return keys.flatten(0, 1).index_select(0, rows).view(lanes, -1, units)

# %%
def key_versions(contexts, carried, hit, key_update='average'):
    """One version of a key for each word, `(lanes, words, units)`.

    `contexts` `(lanes, words, units)`, `carried` `(lanes, columns, units)`, `hit` `(lanes, words)`."""
    if key_update == 'latest': return contexts
    columns = carried.shape[1]
    count = hit.shape[1]
    reused = hit >= 0
    inside = hit >= columns   # reused is a version of this segment

    right = contexts * torch.where(reused, 0.5, 1.0)[..., None].to(contexts.dtype)
    if columns:
        old = take_keys(carried, hit.clamp(0, columns - 1)).to(contexts.dtype)
        right = right + old * torch.where(reused & ~inside, 0.5, 0.0)[..., None]

    half = -0.5 * inside[..., None].to(contexts.dtype)
    earlier = (hit - columns).clamp(0)[..., None]
    link = contexts.new_zeros(len(hit), count, count).scatter(2, earlier, half)
    def solve(side): return torch.linalg.solve_triangular(link, side, upper=False, unitriangular=True)
    if count >= right.shape[-1]: return solve(right)
    return solve(torch.eye(count).to(contexts)) @ right   # fewer numbers to solve for

# %%
def hidden_columns(plan, first, last):
    "Which of the columns `first` to `last` a word cannot see, `(lanes, words, columns)`."
    t = torch.arange(plan.hit.shape[1], dtype=plan.death.dtype, device=plan.death.device)[:, None]
    hidden = t > plan.death[:, None, first:last]
    own = max(0, min(last, plan.columns) - first)   # from here on, versions of this segment
    born = torch.arange(first + own, last, device=t.device) - plan.columns
    hidden[..., own:] |= t <= born
    return hidden

def read_cache(scores, plan):
    """What the cache says of each word, from `scores` `(lanes, words, columns + words)`.

    log p_ptr (0 where the word is not in the cache) and whether the cache is empty, `(lanes, words)`."""
    scores = float32_at_least(scores)
    hidden = hidden_columns(plan, 0, scores.shape[-1])
    log_p = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).log_softmax(-1)
    copied = log_p.gather(-1, plan.hit.clamp(0)[..., None])[..., 0]
    return torch.where(plan.hit >= 0, copied, 0.0), hidden.all(-1)

# %%
def carry_keys(carried, versions, plan, reuse=False):
    """Keys of the words held after the segment, `(lanes, kept, units)`, detached.

    With `reuse` they may be written into `carried` `(lanes, columns, units)`, which is then used up."""
    units = versions.shape[-1]
    keys = carried
    if carried.shape[1] != plan.kept or carried.dtype != versions.dtype:
        both = min(plan.kept, plan.columns)
        keys = versions.new_zeros(len(carried), plan.kept, units)
        keys[:, :both] = carried[:, :both]
    elif not reuse: keys = carried.clone()
    written = versions.detach().flatten(0, 1).index_select(0, plan.word)
    keys.view(-1, units).index_copy_(0, plan.place, written)
    return keys

# %%
def additive_scores(query, projected, energy, budget=1 << 24):
    """`energy . tanh(query + projected)`, `(lanes, words, slots)`; at most `budget` numbers at a time.

    `query` `(lanes, words, units)`, `projected` `(lanes, slots, units)`, `energy` `(units,)`."""
    def block(part): return torch.tanh(part[:, :, None] + projected[:, None]) @ energy
    words_at_once = max(1, budget // max(1, projected.numel()))
    scores = []
    for part in query.split(words_at_once, 1):
        scores.append(checkpoint(block, part, use_reentrant=False) if torch.is_grad_enabled() else block(part))
    return torch.cat(scores, 1)

# %%
class PointerCache(nn.Module):
    """A cache of recent words as a `Source`: gate, query, keys, plan and reading, without a loop.

    `config` has the fields of `CacheConfig` and `units`. A cache of another kind is a subclass."""
    take_slot = staticmethod(least_recently_used)

    def __init__(self, config):
        super().__init__()
        self.config = config
        units = config.units
        self.gate = nn.Sequential(nn.Linear(units, units), nn.Tanh(),
                                  nn.Linear(units, units), nn.Tanh(), nn.Linear(units, 1))
        self.query = nn.Linear(units, units)
        if config.score == 'additive':
            self.key = nn.Linear(units, units, bias=False)
            self.energy = nn.Linear(units, 1, bias=False)

    @classmethod
    def of(cls, config):
        "The cache that `config` asks for, or None."
        return None if config.cache_slots == 0 else cls(config)

# %%
@patch
def begin(self:PointerCache, lanes):
    "Keys `(lanes, 0, units)` and the words held, {word: slot} of each lane: nothing yet."
    keys = self.query.weight.new_zeros(lanes, 0, self.config.units)
    return keys, [{} for _ in range(lanes)]

@patch
def plan(self:PointerCache, lanes, held, resets=()):
    "The `CachePlan` of `lanes` of tokens, and the words held after them. See `plan_cache`."
    return plan_cache(lanes, held, self.config.cache_slots, resets, self.take_slot)

@patch
def slot_scores(self:PointerCache, contexts, keys):
    "Scores `(lanes, words, slots)` of `keys` `(lanes, slots, units)` for `contexts` `(lanes, words, units)`."
    query = self.query(contexts)
    if self.config.score == 'dot': return query @ keys.transpose(-1, -2)
    return additive_scores(torch.tanh(query), self.key(keys), self.energy.weight[0])

# %%
@patch
def read(self:PointerCache, contexts, keys, versions, plan):
    """log p_ptr of each word (0 where it is not in the cache), and whether the cache is empty, `(lanes, words)`.

    `contexts` and `versions` are `(lanes, words, units)`, carried `keys` `(lanes, columns, units)`."""
    if self.config.score == 'dot': return read_keys(self.query(contexts), keys, versions, plan)
    query = torch.tanh(self.query(contexts))
    energy = self.energy.weight[0]
    # The gradient of `key` needs the carried keys as they are now; they may be written into later.
    scores = [additive_scores(query, self.key(k), energy) for k in (keys.clone(), versions)]
    return read_cache(torch.cat(scores, -1), plan)

@patch
def advance(self:PointerCache, contexts, keys, plan, reuse=False):
    "The next keys alone, of a segment that is read and not scored."
    versions = key_versions(contexts, keys, plan.hit, self.config.key_update)
    return carry_keys(keys, versions, plan, reuse)

# %%
@patch
def forward(self:PointerCache, contexts, keys, plan, detail=None, reuse=False):
    """The cache as a `Source` of the words of a segment, and the next keys `(lanes, kept, units)`.

    `contexts` `(lanes, words, units)`, `keys` `(lanes, columns, units)`; `detail` `(lanes, words)`: log
    probability of what a copied word has still to say. Computed in float32 at least."""
    versions = key_versions(contexts, keys, plan.hit, self.config.key_update)
    log_p, empty = self.read(contexts, keys, versions, plan)
    logit = -float32_at_least(self.gate(contexts)[..., 0])   # of copying; the gate's own is of spelling
    log_p = float32_at_least(log_p)
    if detail is not None: log_p = log_p + detail
    source = Source('copy', logit, log_p, plan.hit >= 0, ~empty)
    return source, carry_keys(keys, versions, plan, reuse)

# %%
@patch
def draw(self:PointerCache, context, keys, held, sampler):
    """A word drawn from the cache of a lane: `context` `(units,)`, `keys` `(slots, units)`, `held` {word: slot}.
    """
    own = keys[list(held.values())]
    scores = self.slot_scores(context[None, None], own[None])[0, 0]
    return list(held)[sampler.draw(scores)]

# %%
@patch
def training_flops(self:PointerCache, plan):
    "Floating-point operations of the matrix products of one update: those of gate, query, keys and reading."
    lanes, words = plan.hit.shape
    units = self.config.units
    layers = 6 * lanes * words * units * (3 * units + 1)
    carried = plan.columns * lanes * words * units   # no gradient goes to carried keys
    own = words * lanes * words * units
    return layers + 4 * carried + 10 * own

# %%
def _product(a, b):
    "`a @ b`; of a single lane as a plain product, for which a CPU need not copy `b`."
    return (a[0] @ b[0])[None] if len(a) == 1 else a @ b

def _read_block(query, keys, hidden):
    "Scores of a block of columns, their softmax, and the logarithm of its sum `(lanes, words, 1)`."
    scores = float32_at_least(_product(query, keys.transpose(1, 2)))
    shares = scores.masked_fill_(hidden, torch.finfo(scores.dtype).min).softmax(-1)
    return scores, shares, scores.amax(-1, keepdim=True) - shares.amax(-1, keepdim=True).log()

def _join(total, mean, log_sum, block_mean):
    "The logarithm of both sums, and the mean of both means weighted by them."
    if total is None: return log_sum, block_mean
    both = torch.logaddexp(total, log_sum)
    return both, mean * (total - both).exp() + block_mean * (log_sum - both).exp()

# %%
def _column_blocks(plan, width):
    "Ranges (first, last) of at most `width` carried columns, then that of the segment's own versions."
    words = plan.hit.shape[1]
    blocks = []
    for first in range(0, plan.columns, width):
        blocks.append((first, min(first + width, plan.columns)))
    return blocks + [(plan.columns, plan.columns + words)]

def _read_lanes(query, carried, versions, plan, width, slopes):
    """Of some lanes: log p_ptr and the logarithm of its denominator, `(lanes, words)`, the mean key
    `(lanes, words, units)` if `slopes` are wanted, the shares of own versions `(lanes, words, words)`."""
    hit = plan.hit[:, :, None]
    copied = 0.0
    total = None
    mean = None
    for first, last in _column_blocks(plan, width):
        keys = carried[:, first:last] if first < plan.columns else versions
        scores, shares, log_sum = _read_block(query, keys, hidden_columns(plan, first, last))
        here = (first <= hit) & (hit < last)
        column = (hit - first).clamp(0, last - first - 1)
        copied = torch.where(here, scores.gather(-1, column), copied)
        block_mean = _product(shares.to(keys.dtype), keys).to(shares.dtype) if slopes else log_sum
        total, mean = _join(total, mean, log_sum, block_mean)
    own_shares = shares * (log_sum - total).exp()
    return (copied - total)[..., 0], total[..., 0], mean, own_shares

# %%
def _slopes(carried, versions, plan, mean, shares):
    "Of each word's log p_ptr: by its query `(lanes, words, units)`, by the scores of own versions."
    own = (plan.hit - plan.columns).clamp(0)
    inside = (plan.hit >= plan.columns)[..., None]
    copies = take_keys(versions, own)
    if plan.columns:
        old = take_keys(carried, plan.hit.clamp(0, plan.columns - 1))
        copies = torch.where(inside, copies, old)
    by_score = shares.neg_().scatter_add_(2, own[..., None], inside.to(shares.dtype))
    return copies - mean, by_score

# %%
class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, carried, versions, plan):
        lanes, words, _ = query.shape
        budget = 1 << (20 if query.device.type == 'cpu' else 28)   # scores at a time
        at_once = max(1, budget // (words * max(plan.columns, words)))
        slopes = any(ctx.needs_input_grad)
        parts = []
        for first in range(0, lanes, at_once):
            some = slice(first, first + at_once)
            part = CachePlan(plan.columns, plan.kept, plan.death[some], plan.hit[some])
            width = max(1, budget // part.hit.numel())
            parts.append(_read_lanes(query[some], carried[some], versions[some], part, width, slopes))
        copied, total, mean, shares = [torch.cat(tensors) for tensors in zip(*parts)]

        if slopes: ctx.save_for_backward(query, *_slopes(carried, versions, plan, mean, shares))
        empty = total < torch.finfo(total.dtype).min / 2
        ctx.mark_non_differentiable(empty)
        return copied, empty

    @staticmethod
    def backward(ctx, grad, _):
        query, slope, own = ctx.saved_tensors
        grad = grad[..., None]
        return (grad * slope).to(query.dtype), None, own.transpose(1, 2) @ (grad * query), None

# %%
def read_keys(query, carried, versions, plan):
    """What `read_cache` says of dot scores, in one pass over the keys.

    `query` `(lanes, words, units)`, `carried` `(lanes, columns, units)` (no gradient goes there), `versions`
    `(lanes, words, units)`. Products are computed in the precision of `query`."""
    carried = carried.to(query.dtype)
    versions = versions.to(query.dtype)
    copied, empty = _Read.apply(query, carried, versions, plan)
    return torch.where(plan.hit >= 0, copied, 0.0), empty
