"""Which words does the model copy, and what does that save?"""

# %%
from collections import Counter

import numpy as np
import pandas as pd

from hclm_repro.text import LINE_END

# %%
def _kind(word, counts, frequent):
    if word == LINE_END: return 'line end'
    if not any(c.isalnum() for c in word): return 'punctuation'
    if any(c.isdigit() for c in word): return 'number'
    if word.lower() in frequent: return 'function word'
    if word[0].isupper() and counts[word] >= 4 * counts[word.lower()]: return 'name'
    return 'other word'

def word_kinds(tokens, train, common:int=100) -> list:
    """The kind of each of `tokens`, as `train` (a list of words) uses it.

    'function word': its lower case is among the `common` most frequent lower-case words of `train`. 'name':
    begins with a capital and is at least four times rarer in lower case. 'number': has a digit."""
    counts = Counter(train)
    lower = Counter({word: n for word, n in counts.items() if word.isalpha() and word.islower()})
    frequent = {word for word, _ in lower.most_common(common)}
    known = {word: _kind(word, counts, frequent) for word in set(tokens)}
    return [known[word] for word in tokens]

# %%
FREQUENCIES = ('never', '1–9', '10–99', '100–999', '1,000–9,999', '10,000 and more')

def frequency_classes(tokens, train) -> list:
    "How often `train` has each token, as one of `FREQUENCIES`."
    counts = Counter(train)
    place = np.digitize([counts[word] for word in tokens], (1, 10, 100, 1_000, 10_000))
    return [FREQUENCIES[i] for i in place]

# %%
def _mean_bits(tables):
    "Bits of each word without the surcharge, mean over seeds."
    return np.mean([table.bits - table.surcharge for table in tables], axis=0)

def copying_table(cached, uncached, train):
    """Bits of two models by kind, training frequency and first occurrence, from `score` tables over seeds.

    `cached`, `uncached`: lists of tables of one text; `train`: list of words. A row a class: `words`,
    `characters`, then means over seeds of `bits` with and `bits_uncached` without the cache, and `copied`,
    the posterior of copying, summed over the words."""
    words = cached[0].word
    table = pd.DataFrame(dict(kind=word_kinds(words, train), frequency=frequency_classes(words, train)))
    table['seen'] = words.duplicated()
    table['words'] = 1
    table['characters'] = cached[0].characters
    table['bits'] = _mean_bits(cached)
    table['bits_uncached'] = _mean_bits(uncached)
    table['copied'] = np.mean([scored['copy'] for scored in cached], axis=0)
    return table.groupby(['kind', 'frequency', 'seen'], as_index=False).sum()

# %%
def posterior_table(record:dict, column:str='copied', least:int=10):
    """Mean posterior of copying words that the text has had already, by kind, in all and by training frequency.

    From a copying record; NaN where there are fewer than `least` words. Most often copied kinds first."""
    table = pd.DataFrame(record['classes'])
    seen = table[table.seen]
    def mean(groups):
        sums = groups[['words', column]].sum()
        return (sums[column] / sums.words).where(sums.words >= least)

    by_both = mean(seen.groupby(['kind', 'frequency'])).unstack()
    by_both = by_both.reindex(columns=[name for name in FREQUENCIES if name in by_both])
    by_both.insert(0, 'all', mean(seen.groupby('kind')))
    return by_both.sort_values('all', ascending=False)

# %%
def savings(record:dict):
    "Percent of all bits without the cache that it saves, by kind, on words new in the text and seen before."
    table = pd.DataFrame(record['classes'])
    table['saved'] = 100 * (table.bits_uncached - table.bits) / table.bits_uncached.sum()
    saved = table.pivot_table(index='kind', columns='seen', values='saved', aggfunc='sum', fill_value=0.0)
    return saved.reindex(columns=[False, True]).set_axis(['new in the text', 'seen before'], axis=1)

# %%
def unseen_words(record:dict):
    "Words that training never had: share of all words and of all bits, and bits each, from a copying record."
    table = pd.DataFrame(record['classes'])
    unseen = table[table.frequency == 'never']
    count = unseen.words.sum()
    rows = {}
    for name, column in (('with cache', 'bits'), ('without cache', 'bits_uncached')):
        bits = unseen[column].sum()
        rows[name] = {'words, %': 100 * count / table.words.sum(),
                      'bits, %': 100 * bits / table[column].sum(),
                      'bits each': bits / max(1, count)}
    return pd.DataFrame(rows).T.round(1)

# %%
def _places(words, width):
    "Where each word of a passage stands, (x in letters, y in lines), in lines of `width` letters."
    x = y = 0
    places = []
    for word in words:
        room = max(len(word), 3)   # for the number below it
        if x and x + room > width:
            x = 0
            y += 1
        places.append((x, y))
        x += room + 1.7
    return places

def plot_passage(record:dict, width:int=88, size:float=9):
    "The passage of a copying record: words shaded by the posterior of copying, bits below."
    import matplotlib.pyplot as plt
    passage = record['passage']
    words = ['⏎' if word == LINE_END else word for word in passage['word']]
    places = _places(words, width)
    lines = 1 + places[-1][1]
    letter = .6 * size / 72   # width of a monospaced letter in inches
    figure = plt.figure(figsize=(width * letter, .42 * lines))
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(lines - .3, -.5))
    ax.set_axis_off()
    for (x, y), word, bits, copied in zip(places, words, passage['bits'], passage['copied']):
        shade = dict(facecolor=plt.cm.Blues(.6 * copied), edgecolor='none', pad=1.5)
        ax.text(x, y, word, family='monospace', size=size, bbox=shade, parse_math=False)
        ax.text(x, y + .36, f'{bits:.1f}', size=.62 * size, color='.45')
    return ax

# %%
def _plot_frequencies(table, ax):
    "Bits a word by how often training had it, without and with the cache."
    sums = table.groupby('frequency')[['words', 'bits_uncached', 'bits']].sum()
    sums = sums.reindex(FREQUENCIES).dropna()
    each = sums[['bits_uncached', 'bits']].div(sums.words, axis=0)
    each.columns = ['without cache', 'with cache']
    each.plot.bar(ax=ax, color=['C1', 'C0'], width=.75)
    ax.set_xticklabels(each.index, rotation=35, ha='right')
    ax.set(xlabel='occurrences in the training text', ylabel='bits a word')
    ax.legend(fontsize=8)

def plot_copying(record:dict):
    "Three panels from a copying record: bits by frequency, posterior by kind, bits saved by kind."
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), width_ratios=[1, .8, 1.4], layout='constrained')
    _plot_frequencies(pd.DataFrame(record['classes']), axes[0])
    posterior = posterior_table(record)['all'].dropna()[::-1]
    posterior.plot.barh(ax=axes[1], color='C2', ylabel='', xlim=(0, 1))
    axes[1].set_xlabel('posterior of copying,\nwords seen before')
    saved = savings(record).reindex(posterior.index)
    saved.plot.barh(ax=axes[2], stacked=True, color=['C3', 'C0'], ylabel='')
    axes[2].set_xlabel('bits saved by the cache (% of all bits without it)')
    axes[2].axvline(0, color='k', lw=.8)
    axes[2].legend(fontsize=8, loc='lower right')
    return axes

# %%
def plot_posterior(record:dict, ax=None):
    "Posterior of copying words seen before, by training frequency, a line for each kind."
    import matplotlib.pyplot as plt
    if ax is None: _, ax = plt.subplots(figsize=(6.5, 3.4))
    table = posterior_table(record).drop(columns='all')
    for name, row in table.iterrows():
        if name == 'line end': continue   # a kind of one word
        ax.plot(range(len(row)), row, 'o-', ms=4, label=name)
    ax.set_xticks(range(table.shape[1]), table.columns, fontsize=8)
    ax.set(xlabel='occurrences in the training text', ylabel='posterior of copying', ylim=(0, 1))
    ax.legend(fontsize=8)
    return ax
