"""How much of the result is the cache, and how much the hierarchy?"""

# %%
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd

from hclm_repro.corpus import Lanes
from hclm_repro.experiment import preset as preset_of
from hclm_repro.recurrence import CharLSTM
from hclm_repro.run2 import HCLM

# %%
def match_units(cls, config, alphabet:str, target:float, measure=None):
    """`config` of `cls` with the width for which `measure(model)` comes closest to `target`.

    `measure` grows with the width; None: the number of parameters."""
    def size(units):
        model = cls(replace(config, alphabet=alphabet, units=units))
        return measure(model) if measure else model.parameter_count

    low, high = 1, 8
    while size(high) < target:
        low = high
        high = 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if size(middle) < target: low = middle
        else: high = middle
    closest = min((low, high), key=lambda units: abs(size(units) - target))
    return replace(config, units=closest)

# %%
def operations_per_word(model, tokens, lanes:int, segments:int=20) -> float:
    """Floating-point operations of the matrix products of training on `tokens`, for each word.

    The mean over the first `segments` in `lanes`, each with a full cache: in a long run it nearly always is."""
    text = Lanes(tokens, lanes, model.config.segment_words)
    _, ledger = model.begin(lanes)
    slots = getattr(model.config, 'cache_slots', 0) or 0
    if slots:
        invented = {f'{i} ': i for i in range(slots)}   # with a space, as no word of a text
        ledger['held'] = [invented] * lanes

    operations, words = 0, 0
    for i in range(min(segments, len(text))):
        segment = text[i]
        plan, ledger = model.prepare(segment, ledger)
        operations += model.training_flops(plan)
        words += lanes * len(segment[0])
    return operations / words

# %%
def ablation_models(preset:str, corpus, min_count:int=25) -> dict:
    """The rows of Table 2: name -> (class, config).

    No-Hierarchy is there twice: with as many parameters as HCLM + Cache, and with as many operations a word."""
    whole, training = preset_of(HCLM, preset)
    flat, _ = preset_of(CharLSTM, preset)
    tokens = corpus.words('train')
    fitted = HCLM.config_for(whole, corpus, min_count)
    full = HCLM(fitted)

    def work(model): return operations_per_word(model, tokens, training.lanes)
    same_size = match_units(CharLSTM, flat, fitted.alphabet, full.parameter_count)
    same_work = match_units(CharLSTM, flat, fitted.alphabet, work(full), work)
    return {'HCLM + Cache': (HCLM, whole),
            'No-Cache': (HCLM, replace(whole, cache_slots=0)),
            'No-Hierarchy': (CharLSTM, same_size),
            'No-Hierarchy, equal operations': (CharLSTM, same_work)}

# %%
def _mean(group, key): return np.mean([record[key] for record in group])

def _row(group, operations):
    "One row of Table 2 from the records of one model, a record per seed."
    first = group[0]
    bpc = [record['valid']['bpc'] for record in group]
    characters = first['characters_per_second'] / first['words_per_second']   # of a word
    horizon = first['identity']['model']['segment_words'] * characters
    row = {'valid bpc': f'{np.mean(bpc):.3f}',
           'range': f'{min(bpc):.3f}–{max(bpc):.3f}',
           'char-PPL': f'{2 ** np.mean(bpc):.2f}',
           'words/s': f'{_mean(group, "words_per_second"):,.0f}',
           'characters/s': f'{_mean(group, "characters_per_second"):,.0f}',
           'parameters': f'{first["parameters"]:,}'}
    if operations is not None: row['MFLOP a word'] = f'{operations / 1e6:.2f}'
    return dict(row, **{'horizon, characters': f'{horizon:.0f}', 'seeds': len(group)})

# %%
def ablation_table(records:dict, operations:dict=None):
    """Table 2 from `records` {(name, seed): record}: means over seeds, range of bpc.

    `operations` {name: operations a word}: a column of them, where they are given."""
    groups = {}
    for (name, _), record in records.items(): groups.setdefault(name, []).append(record)
    rows = {}
    for name, group in groups.items():
        work = operations.get(name, np.nan) if operations else None
        rows[name] = _row(group, work)
    return pd.DataFrame(rows).T

# %%
def paired_bootstrap(first, second, draws:int=10_000, seed:int=0):
    """Difference in bpc between two lists of records on the same documents, first minus second.

    Bits are averaged over seeds. The value, and its 95 % interval over documents."""
    characters = np.array([length for length, _ in first[0]['valid']['documents']])

    def bits(group):
        documents = [[total for _, total in record['valid']['documents']] for record in group]
        return np.mean(documents, axis=0)

    difference = bits(first) - bits(second)
    random = np.random.default_rng(seed)
    chosen = random.integers(0, len(characters), (draws, len(characters)))
    drawn = difference[chosen].sum(1) / characters[chosen].sum(1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return difference.sum() / characters.sum(), low, high

# %%
def shared_seeds(records:dict) -> list:
    "The seeds that all models of `records` {(name, seed): record} have."
    names = {name for name, _ in records}
    seeds = sorted({seed for _, seed in records})
    return [seed for seed in seeds if all((name, seed) in records for name in names)]

def compare_models(records:dict):
    """Paired bootstrap of each pair of models in `records` {(name, seed): record}: `bpc`, `from`, `to`.

    Over the seeds that all of them have."""
    seeds = shared_seeds(records)
    groups = {}
    for name, _ in records: groups[name] = [records[name, seed] for seed in seeds]
    rows = {}
    if seeds:
        for a, b in combinations(groups, 2):
            rows[f'{b} minus {a}'] = paired_bootstrap(groups[b], groups[a])
    return pd.DataFrame(rows, index=['bpc', 'from', 'to']).T.round(3)

# %%
def worth(bpc:dict) -> dict:
    """Relative gain in percent of two parts, from {model: bpc}.

    The cache over No-Cache; the hierarchy (No-Cache) over No-Hierarchy, and over that of equal operations if
    it is there."""
    def gain(model, without): return 100 * (1 - bpc[model] / bpc[without])
    gains = {'cache': gain('HCLM + Cache', 'No-Cache'),
             'hierarchy without cache': gain('No-Cache', 'No-Hierarchy')}
    other = 'No-Hierarchy, equal operations'
    if other in bpc: gains['hierarchy at equal operations'] = gain('No-Cache', other)
    return gains
