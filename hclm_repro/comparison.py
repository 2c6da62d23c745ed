"""Which model is best if all may compute equally much?"""

# %%
from bisect import bisect_left
from dataclasses import replace
from itertools import islice

import numpy as np
import pandas as pd
import torch

from hclm_repro.corpus import Lanes
from hclm_repro.experiment import register_presets
from hclm_repro.hat import byte_chunks
from hclm_repro.model import evaluating
from hclm_repro.text import LINE_END

# %%
def fill_caches(ledger, slots):
    "The ledger with `slots` invented words in each lane's cache; as it is where there is no cache."
    if 'held' not in ledger: return ledger
    invented = {f'{i} ': i for i in range(slots)}   # no word of a text ends with a space
    return dict(ledger, held=[dict(invented) for _ in ledger['held']])

def flops_per_byte(model, tokens, lanes, segments=4):
    """Operations of training on a byte of `tokens`, over the first `segments` of `lanes` lanes, caches full.

    An unbounded cache counts as empty at the start."""
    _, ledger = model.begin(lanes)
    ledger = fill_caches(ledger, getattr(model.config, 'cache_slots', 0) or 0)
    operations = 0
    size = 0
    for segment in islice(Lanes(tokens, lanes, model.config.segment_words), segments):
        plan, ledger = model.prepare(segment, ledger)
        operations += model.training_flops(plan)
        size += sum(map(len, byte_chunks(segment)))
    return operations / size

# %%
def match(config, field, target, cost):
    """`config` with the width at which `cost(config)` comes closest to `target`.

    `field`: the name of that width; `cost` must grow with it."""
    def sized(width): return replace(config, **{field: width})
    def cost_of(width): return cost(sized(width))

    above = bisect_left(range(1 << 12), target, lo=8, key=cost_of)
    def distance(width): return abs(cost_of(width) - target)
    return sized(min(above - 1, above, key=distance))

# %%
def word_accuracy(model, tokens, lanes=8):
    """Share of the words of `tokens` that are right in every byte (HAT paper, §4.1); line ends are left out.

    Read in `lanes` lanes, each from a cold start."""
    lanes = min(lanes, len(tokens))
    segments = list(Lanes(tokens, lanes, model.config.segment_words))
    state, ledger = model.begin(lanes)
    right = 0
    total = 0
    for i, segment in enumerate(segments):
        following = [lane[0] for lane in segments[i + 1]] if i + 1 < len(segments) else [None] * lanes
        plan, ledger = model.prepare(segment, ledger, following)
        with evaluating(model): hits, coded, state = model.words_right(plan.to(model.device), state)
        is_word = [token != LINE_END for lane in segment for token in lane]
        words = torch.tensor(is_word, device=model.device)[coded]
        right += int((hits & words).sum())
        total += int(words.sum())
    return right / total

# %%
_TINY = dict(word_budget=1_600, segment_words=16, lanes=4)
_SMOKE = dict(word_budget=205_000, segment_words=64, lanes=8, lr=3e-3, dropout=0.0)
_QUICK = dict(word_budget=1_000_000, segment_words=64, lanes=8, lr=2e-3, dropout=0.0, precision='bf16')
_WT2 = dict(segment_words=64, lanes=8, lr=1e-3)

SIZES = {   # model -> preset -> choices
    'HAT': dict(
        tiny=dict(_TINY, units=32, layers=1, heads=2, byte_units=16, byte_layers=1, byte_heads=2,
                  context_words=8),
        smoke=dict(_SMOKE, units=128, layers=3, heads=4, byte_units=64, byte_layers=2, byte_heads=4,
                   context_words=64),
        quick=dict(_QUICK, units=256, layers=4, heads=4, byte_units=128, byte_layers=2, byte_heads=4,
                   context_words=128),
        wt2=dict(_WT2, units=512, layers=6, heads=8, byte_units=192, byte_layers=3, byte_heads=6,
                 context_words=256)),
    'ByteTransformer': dict(
        tiny=dict(_TINY, units=16, layers=1, heads=1),
        smoke=dict(_SMOKE, units=64, layers=2, heads=4),
        quick=dict(_QUICK, units=128, layers=3, heads=4),
        wt2=dict(_WT2, units=256, layers=4, heads=4)),
    'SubwordTransformer': dict(
        tiny=dict(_TINY, units=24, layers=1, heads=2, vocabulary=300),
        smoke=dict(_SMOKE, units=128, layers=3, heads=4, vocabulary=2000),
        quick=dict(_QUICK, units=256, layers=4, heads=4, vocabulary=4000),
        wt2=dict(_WT2, units=512, layers=6, heads=8, vocabulary=8000))}

for _model, _choices in SIZES.items(): register_presets(_model, _choices)

# %%
def comparison_table(records, accuracy):
    """A row for each model of `records`, {(model, seed): record}, means over seeds.

    Bits per character without and with (`exact`) the surcharge, their range with it, bits of [W] where the
    speller tells them apart, bits a byte, the word `accuracy` of models that have one {model: share}."""
    rows = []
    for (name, _), record in records.items():
        valid = record['valid']
        ends = valid.get('terminators') or np.nan
        rows.append(dict(model=name, bpc=valid['bpc'], exact=valid['bpc_exact'],
                         ends=ends / valid['characters'], byte=valid['bits'] / valid['bytes'],
                         speed=record['words_per_second']))
    groups = pd.DataFrame(rows).groupby('model', sort=False)
    means = groups.mean()
    lowest, highest = groups.exact.min(), groups.exact.max()
    table = means[['bpc', 'exact']].round(3)
    table['range'] = [f'{low:.3f}–{high:.3f}' for low, high in zip(lowest, highest)]
    table['bits of [W]'] = means.ends.round(3)
    table['bits a byte'] = means.byte.round(3)
    table['word accuracy'] = pd.Series(accuracy).reindex(means.index).round(3)
    table['words/s'] = means.speed.round().astype(int)
    table['seeds'] = groups.size()
    return table.rename(columns=dict(bpc='valid bpc'))
