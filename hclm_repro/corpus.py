"""Where does text come from, how is it read in training, and how hard is it to predict?"""

__all__ = ['SPLITS', 'CORPORA', 'Corpus', 'Lanes', 'segment_characters', 'compressor_bits', 'compressor_quotients', 'synthetic',
           'reuse_distance', 'read_text', 'document_starts', 'online', 'load_corpus']

# %%
import bz2, hashlib, lzma, os, re, socket, threading
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from fastcore.basics import patch

from hclm_repro.text import LINE_END, PADDING, UNKNOWN, characters, join_words, opener, quotients, split_words

# %%
SPLITS = ('train', 'valid', 'test')

@dataclass
class Corpus:
    """Three texts, with what must be known to count them.

    `unknown`: the string that marks a missing word in `train`; `starts`: the positions (in characters) at
    which the documents of a split begin; `ideal`: code lengths in bits under a known source."""
    name: str
    train: str = None
    valid: str = None
    test: str = None
    licence: str = 'not stated'
    unknown: str = None
    starts: dict = field(default_factory=dict)
    ideal: dict = field(default_factory=dict)

    @cached_property
    def sha256(self) -> dict:
        "Fingerprints of the loaded splits."
        texts = {split: getattr(self, split) for split in SPLITS}
        return {split: hashlib.sha256(text.encode()).hexdigest()
                for split, text in texts.items() if text is not None}

# %%
@patch
def text(self:Corpus, split) -> str:
    "The text of one split. Raises `ValueError` if there is no such split or it was not loaded."
    if split not in SPLITS:
        raise ValueError(f'{split!r} is not a split; allowed: {", ".join(SPLITS)}')
    text = getattr(self, split)
    if text is None:
        fault = f'corpus {self.name} was loaded without its {split} split'
        raise ValueError(f'{fault}; allowed: name it in splits=')
    return text

# %%
@patch
def words(self:Corpus, split):
    "Tokens of one split; the unknown string is `UNKNOWN` in `train` alone."
    unknown = self.unknown if split == 'train' else None
    return split_words(self.text(split), unknown)

@patch
def counts(self:Corpus, split) -> dict:
    """Denominators of one split.

    `characters` (rule B), `file_characters` (rule A), `bytes`, `words` (line ends are words, too)."""
    text = self.text(split)
    tokens = self.words(split)
    unknown = tokens.count(UNKNOWN)
    return dict(characters=int(characters(tokens).sum()),
                file_characters=len(text),
                bytes=len(text.encode()),
                words=len(tokens) - unknown,
                line_ends=tokens.count(LINE_END),
                unknown=unknown)

# %%
@patch
def documents(self:Corpus, split):
    "The texts of the documents of one split, in order; joined they are the split."
    text = self.text(split)
    starts = self.starts.get(split) or [0]
    ends = [*starts[1:], len(text)]
    return [text[start:end] for start, end in zip(starts, ends)]

# %%
def _joined(texts):
    "One text from many, each closed by a line end, and where each begins."
    closed = [t if t.endswith(LINE_END) else t + LINE_END for t in texts]
    lengths = [len(t) for t in closed]
    starts = np.cumsum([0, *lengths[:-1]])
    return ''.join(closed), starts.tolist()

def _pydoc():
    "The Python language reference; of every ten documents, sorted by name, one is valid and one test."
    from pydoc_data.topics import topics
    documents = [topics[name] for name in sorted(topics)]
    corpus = Corpus('pydoc', licence='Python Software Foundation License 2')
    deal = dict(train=range(8), valid=[8], test=[9])
    for split, places in deal.items():
        chosen = [document for i, document in enumerate(documents) if i % 10 in places]
        text, starts = _joined(chosen)
        setattr(corpus, split, text)
        corpus.starts[split] = starts
    return corpus

# %%
class Lanes:
    """`tokens` in `lanes` contiguous lanes, read side by side.

    Item `i` is segment `i`: a list of lanes, each a list of at most `segment_words` tokens. Fewer than
    `lanes` tokens at the end are left out. Raises `ValueError` if there are more lanes than tokens."""
    def __init__(self, tokens, lanes:int, segment_words:int):
        if len(tokens) < lanes:
            fault = f'{len(tokens)} words do not fill {lanes} lanes'
            raise ValueError(f'{fault}; allowed: at most as many lanes as words')
        self.tokens = tokens
        self.lanes = lanes
        self.segment_words = segment_words
        self.length = len(tokens) // lanes

    def __len__(self): return -(-self.length // self.segment_words)

    def __getitem__(self, i):
        if not 0 <= i < len(self): raise IndexError(i)
        start = i * self.segment_words
        end = min(start + self.segment_words, self.length)
        first_words = [lane * self.length for lane in range(self.lanes)]
        return [self.tokens[first + start:first + end] for first in first_words]

# %%
def segment_characters(segment) -> int:
    "Characters that a segment stands for, a word at the end of a lane counted with the space after it."
    return int(sum(characters(lane, PADDING).sum() for lane in segment))

# %%
def _typed(word, letter_bits, stop):
    "Probability that the monkey types `word`: its letters, going on after each but the last, stopping."
    letters = sum(letter_bits[c] for c in word)
    going_on = (len(word) - 1) * np.log2(1 - stop)
    bits = letters - going_on - np.log2(stop)
    return 2 ** -bits

# %%
def _zipf(letters):
    "Probabilities of `letters`, proportional to 1/rank."
    chance = 1 / np.arange(1, len(letters) + 1)
    return chance / chance.sum()

def _monkey(size, rng, letters, stop, reuse, memory, line):
    "`size` tokens, and their code lengths in bits with and without memory, `(2,)`."
    chance = _zipf(letters)
    letter_bits = dict(zip(letters, -np.log2(chance)))
    recent, counts = deque(), Counter()   # the last `memory` words, and how often each is among them
    tokens, bits = [], np.zeros(2)
    dice = rng.random(size), rng.random(size), rng.geometric(stop, size), rng.random(size)
    for ends, copies, length, pick in zip(*dice):
        if ends < 1 / line:
            tokens.append(LINE_END)
            bits += np.log2(line)
            continue
        if copies < reuse and recent: word = recent[int(pick * len(recent))]
        else: word = ''.join(rng.choice(list(letters), length, p=chance))

        typed = mixed = _typed(word, letter_bits, stop)
        if recent: mixed = reuse * counts[word] / len(recent) + (1 - reuse) * typed
        bits -= np.log2((1 - 1 / line) * np.array([mixed, typed]))

        tokens.append(word)
        recent.append(word)
        counts[word] += 1
        if len(recent) > memory: counts[recent.popleft()] -= 1
    return tokens, bits

# %%
def synthetic(sizes=(120_000, 12_000, 12_000), seed:int=0, letters='etaoinsh', stop=0.3, reuse=0.5,
              memory=100, line=12) -> Corpus:
    """A bursty, Zipfian, open-vocabulary text with known entropy, `sizes` words in train, valid and test.

    `stop`: probability that a typed word ends after a letter; `reuse`: that a word is one of the last
    `memory` words; 1/`line`: that the line ends. `corpus.ideal[split]` holds the code lengths in bits
    `with_memory` (of the true source) and `without_memory` (of the best model of single words)."""
    rng = np.random.default_rng(seed)
    corpus = Corpus('synthetic', licence='made from a seed')
    for split, size in zip(SPLITS, sizes):
        tokens, bits = _monkey(size, rng, letters, stop, reuse, memory, line)
        with_memory, without_memory = bits.tolist()
        setattr(corpus, split, join_words(tokens))
        corpus.ideal[split] = dict(with_memory=with_memory, without_memory=without_memory)
    return corpus

# %%
def compressor_bits(text:str) -> dict:
    "Code length in bits of `text` by general compressors, with nothing but the text itself."
    data = text.encode()
    bzip2 = bz2.compress(data, 9)
    xz = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
    return {'bzip2 -9': 8 * len(bzip2), 'xz -9e': 8 * len(xz)}

# %%
def compressor_quotients(corpus:Corpus, split='valid') -> dict:
    "Quotients of compressors on a split: the text alone, and with train seen (both together less train)."
    text = corpus.text(split)
    counts = corpus.counts(split)
    bits = compressor_bits(text)
    train = compressor_bits(corpus.train)
    together = compressor_bits(corpus.train + text)
    for name in train:
        bits[f'{name}, train seen'] = together[name] - train[name]
    return {name: quotients(total, counts) for name, total in bits.items()}

# %%
def reuse_distance(tokens):
    """For each token, how many distinct tokens were used since its last occurrence, `(tokens,)`.

    The token itself is counted (1: it was the last one); 0 if it is new."""
    latest_first = []
    distances = np.zeros(len(tokens), dtype=np.int64)
    for i, token in enumerate(tokens):
        if token in latest_first:
            distances[i] = latest_first.index(token) + 1
            latest_first.remove(token)
        latest_first.insert(0, token)
    return distances

# %%
def read_text(path) -> str:
    "The text of a UTF-8 file, `.xz` or plain. Raises `ValueError` if it is empty or not UTF-8."
    with opener(path)(path, 'rb') as file: data = file.read()
    try: text = data.decode('utf-8')
    except UnicodeDecodeError as error:
        fault = f'{path} is not UTF-8 text (byte {error.start})'
        raise ValueError(f'{fault}; allowed: a UTF-8 file, plain or .xz') from None
    if not text: raise ValueError(f'{path} is empty; allowed: a UTF-8 file with at least one word')
    return text

# %%
_HEADING = re.compile(r'(?m)^ ?\n(?= ?= [^=\n].* = ?\n ?\n)')

def document_starts(text:str) -> list:
    "Character positions at which documents begin, by their headings ` = Title = ` between empty lines."
    starts = {match.start() for match in _HEADING.finditer(text)}
    return sorted(starts | {0})

# %%
def _from_folder(folder):
    "The corpus of a folder with train*, valid* and test* files. Each file of several is a document."
    corpus = Corpus(folder.name)
    for split in SPLITS:
        files = sorted(folder.glob(f'{split}*'))
        if not files:
            allowed = 'a folder with train*, valid* and test* files'
            raise ValueError(f'folder {folder} has no file {split}*; allowed: {allowed}')
        texts = [read_text(file) for file in files]
        text, starts = _joined(texts)
        if len(texts) == 1:
            text = texts[0]
            starts = document_starts(text)
        setattr(corpus, split, text)
        corpus.starts[split] = starts
    return corpus

# %%
def _from_file(path):
    "The corpus of one file: its last tenth of lines is halved into valid and test."
    *lines, last = read_text(path).split(LINE_END)
    lines = [line + LINE_END for line in lines]
    if last: lines.append(last)
    tenth = len(lines) // 10
    if tenth < 2:
        allowed = '20 lines or more, or a folder with train*, valid* and test*'
        raise ValueError(f'{path} has {len(lines)} lines, too few to cut; allowed: {allowed}')
    valid = len(lines) - tenth
    test = len(lines) - tenth // 2
    corpus = Corpus(path.stem)
    corpus.train = ''.join(lines[:valid])
    corpus.valid = ''.join(lines[valid:test])
    corpus.test = ''.join(lines[test:])
    corpus.starts = {split: document_starts(corpus.text(split)) for split in SPLITS}
    return corpus

# %%
def online(seconds:float=2.0) -> bool:
    "Whether the Hub answers a connection within `seconds`, even if name look-up hangs."
    from urllib.parse import urlsplit
    from huggingface_hub import constants
    if constants.HF_HUB_OFFLINE: return False
    hub = urlsplit(constants.ENDPOINT)
    address = hub.hostname, hub.port or 443
    answered = threading.Event()

    def knock():
        try: socket.create_connection(address, timeout=seconds).close()
        except OSError: return
        answered.set()

    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()

# %%
def _from_hub(splits):
    "Texts of WikiText-2 raw from the Hub or its cache, blank lines put back: split -> text."
    here = online()
    if not here: os.environ['HF_HUB_OFFLINE'] = '1'   # read when datasets is imported
    import datasets, huggingface_hub
    if not here:   # they may have been imported before
        datasets.config.HF_HUB_OFFLINE = True
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.disable_progress_bars()
    rows = datasets.load_dataset('Salesforce/wikitext', 'wikitext-2-raw-v1')
    hub_names = dict(train='train', valid='validation', test='test')
    lines = {split: rows[hub_names[split]]['text'] for split in splits}
    return {split: ''.join(line or ' \n' for line in lines[split]) for split in splits}

# %%
_WIKIPEDIA = 'CC BY-SA 3.0 and GFDL, text of Wikipedia contributors'
_NOVELS = 'public domain (ELTeC collection)'
_RAW = {split: f'wikitext-2-raw/wiki.{split}.raw' for split in SPLITS}
_FILES = {'wikitext-2': {**_RAW, 'train': 'wikitext-2/wiki.train.tokens'}, 'wikitext-2-raw': _RAW}
for _language in ('eng', 'deu', 'cze'):
    _FILES[f'eltec-{_language}'] = {split: f'eltec-{_language}/{split}.txt' for split in SPLITS}

CORPORA = ('pydoc', 'synthetic', *_FILES)

def _find(relative, root):
    "The file `relative` below `root`, with or without its folder, plain or `.xz`; None if there is none."
    if not root: return None
    path = Path(root) / relative
    for folder in (path.parent, Path(root)):
        for name in (path.name, f'{path.name}.xz'):
            if (folder / name).is_file(): return folder / name

# %%
def _nowhere(name, root, missing):
    "The sentence for a corpus whose `missing` files cannot be had."
    fault = f'corpus {name} lacks {", ".join(missing)}'
    fault += f' in {root}' if root else ' since HCLM_DATA is not set'
    allowed = ('set HCLM_DATA to a folder that has these files, '
               'connect to the network (wikitext-2-raw only), or take corpus pydoc')
    if name == 'wikitext-2-raw':
        fault += ' and the Hub could not be reached'
        allowed += '; corpus wikitext-2 needs no raw train split'
    return f'{fault}; allowed: {allowed}'

# %%
def _from_files(name, root, splits):
    "Texts of corpus `name` from the files below `root`, or from the Hub: split -> text."
    wanted = {split: _FILES[name][split] for split in SPLITS if split in splits}
    found = {split: _find(relative, root) for split, relative in wanted.items()}
    missing = [wanted[split] for split in wanted if found[split] is None]
    if not missing: return {split: read_text(path) for split, path in found.items()}

    fault = FileNotFoundError(_nowhere(name, root, missing))
    if name != 'wikitext-2-raw': raise fault
    try: return _from_hub(wanted)
    except Exception as error: raise fault from error

# %%
def load_corpus(name:str, data_dir:str=None, splits=SPLITS) -> Corpus:
    """The corpus called `name` (one of `CORPORA`, or the path of a file or folder).

    Files are looked for in `data_dir`, else in the folder that the variable `HCLM_DATA` names. Raises
    `ValueError` for an unknown name, `FileNotFoundError` if the text cannot be had."""
    if name == 'pydoc': return _pydoc()
    if name == 'synthetic': return synthetic()
    if name not in _FILES:
        path = Path(name)
        if path.is_dir(): return _from_folder(path)
        if path.exists(): return _from_file(path)
        allowed = f'{", ".join(CORPORA)}, or the path of a UTF-8 file or folder'
        raise ValueError(f'{name!r} is not a corpus; allowed: {allowed}')

    root = data_dir or os.environ.get('HCLM_DATA')
    texts = _from_files(name, root, splits)
    licence = _NOVELS if name.startswith('eltec') else _WIKIPEDIA
    corpus = Corpus(name, **texts, licence=licence)
    if name == 'wikitext-2': corpus.unknown = '<unk>'
    corpus.starts = {split: document_starts(text) for split, text in texts.items()}
    return corpus

# %%
from hclm_repro.text import DUMMY, TERMINATOR, Alphabet, canonical, stream_words   # for the old modules, until they are rewritten
words = split_words
