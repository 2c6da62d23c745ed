"""What does a memory that lasts buy?"""

# %%
from dataclasses import replace

import pandas as pd

from hclm_repro.run1 import HCLMConfig

# %%
_CARRIED = {   # name of a model -> what is carried from segment to segment
    'reset': (),
    'state carried': ('state_reset',),
    'cache carried': ('cache_reset',),
    'carried': ('state_reset', 'cache_reset')}

def memory_choices(name:str) -> dict:
    "The resets of a model called 'reset', 'state carried', 'cache carried' or 'carried'."
    choices = dict(state_reset='segment', cache_reset='segment')
    for reset in _CARRIED[name]: choices[reset] = 'epoch'
    return choices

def memory_models(config:HCLMConfig, halves:bool=True) -> dict:
    "Name -> `config` with nothing carried and with everything; with `halves`, also state and cache alone."
    names = list(_CARRIED) if halves else ['reset', 'carried']
    return {name: replace(config, **memory_choices(name)) for name in names}

# %%
PAPERS = {   # as printed: bits per character, speeds in tokens/s
    # Wang (2025), Table 1
    'Run 1': dict(bpc=2.0721, char_ppl=4.20, speed=3100),
    'Run 2': dict(bpc=1.8267, char_ppl=3.54, speed=11700),
    # Wang (2025), Table 2
    'Wang (2025) (valid)': {'HCLM + Cache': 2.0721, 'No-Cache': 2.2780, 'No-Hierarchy': 2.2741},
    'Wang (2025), speed': {'HCLM + Cache': 5000, 'No-Cache': 12200, 'No-Hierarchy': 13500},
    # K17 §4.1, WikiText-2 raw
    'K17 (test)': {'HCLM + Cache': 1.500, 'No-Cache': 1.670, 'No-Hierarchy': 1.803}}

# %%
def side_by_side(first:dict, second:dict):
    "Two runs, dicts of bpc, char_ppl and speed, as a table with the improvement from the first to the second."
    gains = {}
    for key in ('bpc', 'char_ppl'):
        saved = 100 * (1 - second[key] / first[key])
        gains[key] = f'{saved:.1f} %'
    faster = second['speed'] / first['speed']
    gains['speed'] = f'{faster:.1f}×'
    columns = {'Run 1': first, 'Run 2': second, 'improvement': gains}
    return pd.DataFrame(columns, dtype=object)

# %%
def mean_bpc(record:dict):
    "Bits per character, mean over seeds, by how a model was trained and scored, from a record of this chapter."
    rows = pd.DataFrame(record['bpc'])
    return rows.groupby(['trained', 'scored']).bpc.mean()

def table_1(record:dict):
    "Table 1 of Wang (2025) from a record of this chapter: means over seeds, speeds in words/s."
    bpc = mean_bpc(record)
    speed = pd.DataFrame(record['words_per_second']).iloc[-1]   # at the most lanes
    rows = []
    for name, timed in (('reset', 'Run 1, loops'), ('carried', 'Run 2, loop-free')):
        mean = bpc[name, name]
        rows.append(dict(bpc=round(mean, 3), char_ppl=round(2 ** mean, 3), speed=round(speed[timed])))
    return side_by_side(*rows)

# %%
def memory_gains(record:dict):
    """Percent of the bits of the model without memory that each other model saves, all scored as trained.

    And `scoring alone`: that the weights trained without memory save when they are scored with it."""
    bpc = mean_bpc(record)
    without = bpc['reset', 'reset']
    gains = {}
    for name in _CARRIED:
        if name == 'reset' or (name, name) not in bpc: continue
        gains[name] = 100 * (1 - bpc[name, name] / without)
    gains['scoring alone'] = 100 * (1 - bpc['reset', 'carried'] / without)
    return pd.Series(gains, name='bits saved (%)')

# %%
_SHOWN = dict(   # what plot_runs draws: part of the record, column, label of the axis
    valid_bpc=('curve', 'valid_bpc', 'valid bits per character (curve)'),
    char_ppl=('curve', 'valid_bpc', 'valid character perplexity'),
    train_bpc=('steps', 'bpc', 'training bits per character'))

def seed_curves(records:dict, name:str, x:str='words', y:str='valid_bpc'):
    "The curves of the model `name`, a column for each seed, from `records` {(name, seed): record}."
    part, column, _ = _SHOWN[y]
    curves = {}
    for (model, seed), record in records.items():
        if model != name: continue
        curves[seed] = pd.DataFrame(record[part]).set_index(x)[column]
    table = pd.DataFrame(curves)
    if y == 'train_bpc': table = table.ewm(span=60).mean()
    if y == 'char_ppl': table = 2 ** table
    return table

# %%
def plot_runs(records:dict, x:str='words', y:str='valid_bpc', ax=None):
    """Curves of several models from `records` {(name, seed): record}: mean over seeds, their range as a band.

    `y` is 'valid_bpc', 'char_ppl' or 'train_bpc'. Dashes let a curve be seen below another."""
    import matplotlib.pyplot as plt
    if ax is None: _, ax = plt.subplots(figsize=(4.6, 3.2))
    dashes = '-', (0, (4, 2)), (0, (1, 1)), '-.'
    names = dict.fromkeys(name for name, _ in records)
    for i, name in enumerate(names):
        table = seed_curves(records, name, x, y)
        look = dict(color=f'C{i}', linestyle=dashes[i % 4], marker='' if y == 'train_bpc' else 'o', ms=4)
        ax.plot(table.index, table.mean(axis=1), label=name, **look)
        ax.fill_between(table.index, table.min(axis=1), table.max(axis=1), color=f'C{i}', alpha=.2, lw=0)
    ax.set(xlabel='words read', ylabel=_SHOWN[y][2])
    ax.xaxis.set_major_locator(plt.MaxNLocator(5))
    ax.legend(fontsize=8)
    return ax
