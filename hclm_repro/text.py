"""What does one character of text cost? Before a model can answer, we must agree on what is counted."""

__all__ = ['LINE_END', 'PADDING', 'UNKNOWN', 'DUMMY', 'TERMINATOR', 'split_words', 'join_words', 'canonical', 'characters',
           'opener', 'stream_words', 'Alphabet', 'quotients']

# %%
import lzma
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from fastcore.basics import patch

# %%
LINE_END = '\n'
PADDING = ''            # not a token of any text: fills lanes that have ended
UNKNOWN = '\ud800'      # this and the next two are lone surrogates: no UTF-8 text holds them
DUMMY = '\ud801'
TERMINATOR = '\ud802'

def split_words(text:str, unknown:str=None) -> list:
    """The tokens of `text` in order: words and line ends.

    A token that equals `unknown` becomes `UNKNOWN`. Raises `ValueError` on a lone surrogate."""
    try: text.encode('utf-8')
    except UnicodeEncodeError as error:
        fault = f'text holds a lone surrogate at position {error.start}'
        raise ValueError(f'{fault}; allowed: any text that UTF-8 can encode') from None
    tokens = []
    for i, line in enumerate(text.split(LINE_END)):
        if i > 0: tokens.append(LINE_END)
        tokens.extend(filter(None, line.split(' ')))
    if unknown is None: return tokens
    return [UNKNOWN if token == unknown else token for token in tokens]

# %%
def join_words(tokens) -> str:
    "The text of `tokens`: one space between words, none around line ends."
    text = ' '.join(tokens)
    text = text.replace(f' {LINE_END}', LINE_END)
    return text.replace(f'{LINE_END} ', LINE_END)

def canonical(text:str) -> str:
    "`text` as models code it: words joined by single spaces, lines ended by a newline."
    return join_words(split_words(text))

# %%
def characters(tokens, following:str=None):
    """Characters of canonical text that each token stands for, `(tokens,)`.

    A word stands for its letters and the space after it, a line end for one character, `UNKNOWN` for none.
    `following` is the token after the last, if there is one."""
    lengths = []
    for token, after in zip(tokens, [*tokens[1:], following]):
        if token == UNKNOWN: length = 0
        elif token == LINE_END: length = 1
        elif after is None or after == LINE_END: length = len(token)
        else: length = len(token) + 1
        lengths.append(length)
    return np.array(lengths, dtype=np.int64)

# %%
def opener(path):
    "The function that opens the file `path`: `lzma.open` if it ends in `.xz`, else `open`."
    return lzma.open if Path(path).suffix == '.xz' else open

def stream_words(path, block:int=1 << 16):
    """The tokens of a UTF-8 file (`.xz` or plain) one by one, reading `block` characters at a time.

    Raises `ValueError` if the file is not UTF-8."""
    rest = ''
    with opener(path)(path, 'rt', encoding='utf-8', newline=LINE_END) as file:
        try:
            while piece := file.read(block):
                rest += piece
                cut = max(rest.rfind(' '), rest.rfind(LINE_END)) + 1
                yield from split_words(rest[:cut])
                rest = rest[cut:]
        except UnicodeDecodeError as error:
            fault = f'{path} is not UTF-8 text ({error.reason})'
            raise ValueError(f'{fault}; allowed: a UTF-8 file, plain or .xz') from None
    yield from split_words(rest)

# %%
@dataclass(frozen=True)
class Alphabet:
    "The kept characters of a training text, and the number (symbol) of each."
    characters: str

    terminator, line_end, dummy = 0, 1, 2

    @classmethod
    def of(cls, tokens, min_count:int=25):
        "The alphabet of training `tokens`: characters that occur `min_count` times or more (K17 §3: 25)."
        counts = Counter(''.join(tokens))
        kept = {c for c, count in counts.items() if count >= min_count}
        kept -= {LINE_END, UNKNOWN}
        return cls(''.join(sorted(kept)))

    @cached_property
    def _table(self):
        "Code point -> symbol, `(0x110000,)`."
        table = np.full(0x110000, self.dummy, dtype=np.int64)
        kept = [ord(c) for c in self.characters]
        table[kept] = 3 + np.arange(len(kept))
        table[ord(LINE_END)] = self.line_end
        table[ord(UNKNOWN)] = self.unknown
        table[ord(TERMINATOR)] = self.terminator
        return table

# %%
@patch(as_prop=True)
def outputs(self:Alphabet):
    "How many symbols a model can predict: terminator, line end, dummy and the kept characters."
    return 3 + len(self.characters)

@patch(as_prop=True)
def unknown(self:Alphabet):
    "The symbol of the unknown word. It is read, never predicted."
    return self.outputs

@patch(as_prop=True)
def start(self:Alphabet):
    "The symbol that is read before the first character. It is never predicted."
    return self.outputs + 1

@patch(as_prop=True)
def symbols(self:Alphabet):
    "How many symbols there are."
    return self.outputs + 2

# %%
@patch
def encode(self:Alphabet, tokens, terminated:bool=False):
    """Symbols of all `tokens` in one row `(symbols,)`, and how many of them each token has `(tokens,)`.

    If `terminated`, each word ends with the terminator; a line end is its own terminator."""
    if terminated:
        tokens = [t if t in (LINE_END, UNKNOWN) else t + TERMINATOR for t in tokens]
    lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
    encoded = ''.join(tokens).encode('utf-32-le', 'surrogatepass')
    points = np.frombuffer(encoded, dtype='<u4')
    return self._table[points], lengths

@patch
def decode(self:Alphabet, symbols) -> str:
    "The word that output `symbols` spell, without its terminator; a dummy becomes `DUMMY`."
    written = ['', LINE_END, DUMMY, *self.characters]
    return ''.join(written[s] for s in symbols)

# %%
@patch
def rare(self:Alphabet, tokens):
    "How many characters of each token are dummies, `(tokens,)`."
    symbols, lengths = self.encode(tokens)
    owner = np.repeat(np.arange(len(tokens)), lengths)
    return np.bincount(owner[symbols == self.dummy], minlength=len(tokens))

@patch
def replace_rare(self:Alphabet, tokens):
    "`tokens` with each character outside the alphabet replaced by `DUMMY`."
    replaced = list(tokens)
    for i in np.flatnonzero(self.rare(tokens)):
        replaced[i] = ''.join(c if c in self.characters else DUMMY for c in tokens[i])
    return replaced

# %%
@patch(as_prop=True)
def surcharge(self:Alphabet) -> float:
    "Bits that say which character a dummy was: any Unicode scalar value but the kept ones, space and newline."
    others = 1_112_064 - len(self.characters) - 2
    return float(np.log2(others))

# %%
def quotients(bits:float, counts:dict) -> dict:
    """Total `bits` of a split divided by each of its `counts`.

    `bpc` (bits per character, rule B), `bpc_file` (per character of the file, rule A), `bits_per_byte`,
    `word_ppl` (2 to the bits per word) and `char_ppl` (2 to the `bpc`)."""
    bpc = bits / counts['characters']
    return dict(bpc=bpc,
                bpc_file=bits / counts['file_characters'],
                bits_per_byte=bits / counts['bytes'],
                word_ppl=2 ** (bits / counts['words']),
                char_ppl=2 ** bpc)
