"""Where does text come from, how is it read in training, and how hard is it to predict?"""

__all__ = ['SPLITS', 'CORPORA', 'Corpus', 'document_starts', 'Lanes', 'segment_characters', 'compressor_bits',
           'compressor_quotients', 'synthetic', 'reuse_distance', 'read_text', 'online', 'load_corpus']

# %%
import bz2, hashlib, io, lzma, os, re, socket, threading
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from fastcore.basics import patch

from hclm_repro.text import LINE_END, PADDING, UNKNOWN, characters, join_words, opener, quotients, split_words

# %%
SPLITS = ('train', 'valid', 'test')

@dataclass
class Corpus:
    "Three texts, with what must be known to count them."
    name: str
    train: str = None
    valid: str = None
    test: str = None
    licence: str = 'not stated'
    unknown: str = None                            # the string that marks a missing word in `train`
    starts: dict = field(default_factory=dict)     # split -> positions (characters) at which documents begin
    ideal: dict = field(default_factory=dict)      # split -> code lengths (bits) under a known source

    def words(self, split) -> list:
        "Tokens of one split; the unknown string is `UNKNOWN` in `train` alone."
        unknown = self.unknown if split == 'train' else None
        return split_words(self.text(split), unknown)

    @cached_property
    def sha256(self) -> dict:
        "Fingerprints of the loaded splits."
        texts = {split: getattr(self, split) for split in SPLITS}
        loaded = {split: text for split, text in texts.items() if text is not None}
        return {split: hashlib.sha256(text.encode()).hexdigest() for split, text in loaded.items()}

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

@patch
def counts(self:Corpus, split) -> dict:
    "Denominators of one split: `characters` (rule B), `file_characters` (rule A), `bytes`, `words` and line ends."
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
_HEADING = re.compile(r'(?m)^ ?\n(?= ?= [^=\n].* = ?\n ?\n)')

def document_starts(text:str) -> list:
    "Character positions at which documents begin, by their headings ` = Title = ` between empty lines."
    starts = {match.start() for match in _HEADING.finditer(text)}
    return sorted(starts | {0})

@patch
def documents(self:Corpus, split) -> list:
    "The texts of the documents of one split, in order; joined they are the split."
    text = self.text(split)
    starts = self.starts.get(split) or [0]
    ends = [*starts[1:], len(text)]
    return [text[start:end] for start, end in zip(starts, ends)]

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

def segment_characters(segment) -> int:
    "Characters that a segment stands for, a word at the end of a lane counted with the space after it."
    return int(sum(characters(lane, PADDING).sum() for lane in segment))

# %%
def compressor_bits(text:str) -> dict:
    "Code length in bits of `text` by general compressors, with nothing but the text itself."
    data = text.encode()
    bzip2 = bz2.compress(data, 9)
    xz = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
    return {'bzip2 -9': 8 * len(bzip2), 'xz -9e': 8 * len(xz)}

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
def _zipf(letters):
    "Probabilities of `letters`, proportional to 1/rank, `(letters,)`."
    chance = 1 / np.arange(1, len(letters) + 1)
    return chance / chance.sum()

def _monkey(size, rng, letters, stop, reuse, memory, line):
    "`size` tokens from a typewriter that remembers its last `memory` words."
    chance = _zipf(letters)
    recent = deque(maxlen=memory)
    tokens = []
    dice = rng.random(size), rng.random(size), rng.geometric(stop, size), rng.random(size)
    for ends, copies, length, pick in zip(*dice):
        if ends < 1 / line: word = LINE_END
        elif copies < reuse and recent: word = recent[int(pick * len(recent))]
        else: word = ''.join(rng.choice(list(letters), length, p=chance))
        tokens.append(word)
        if word != LINE_END: recent.append(word)
    return tokens

# %%
def _typed(word, letter_bits, stop):
    "Probability that the monkey types `word`: its letters, going on after each but the last, stopping."
    letters = sum(letter_bits[c] for c in word)
    going_on = (len(word) - 1) * np.log2(1 - stop)
    bits = letters - going_on - np.log2(stop)
    return 2 ** -bits

def _code_length(tokens, letters, stop, reuse, memory, line):
    "Bits of the monkey's `tokens` with its memory and without, `(2,)`."
    letter_bits = dict(zip(letters, -np.log2(_zipf(letters))))
    recent = deque()
    counts = Counter()   # how often each word is among the recent ones
    bits = np.zeros(2)
    for word in tokens:
        if word == LINE_END:
            bits += np.log2(line)
            continue
        typed = mixed = _typed(word, letter_bits, stop)
        if recent: mixed = reuse * counts[word] / len(recent) + (1 - reuse) * typed
        bits -= np.log2((1 - 1 / line) * np.array([mixed, typed]))
        recent.append(word)
        counts[word] += 1
        if len(recent) > memory: counts[recent.popleft()] -= 1
    return bits

# %%
def synthetic(sizes=(120_000, 12_000, 12_000), seed:int=0, letters='etaoinsh', stop=0.3, reuse=0.5,
              memory=100, line=12) -> Corpus:
    """A bursty, Zipfian, open-vocabulary text with known entropy, `sizes` words in train, valid and test.

    `stop`: probability that a typed word ends after a letter; `reuse`: that a word is one of the last
    `memory` words; 1/`line`: that the line ends. `corpus.ideal[split]` holds the code lengths in bits
    `with_memory` (of the true source) and `without_memory` (of the best model that remembers no word)."""
    rng = np.random.default_rng(seed)
    source = dict(letters=letters, stop=stop, reuse=reuse, memory=memory, line=line)
    corpus = Corpus('synthetic', licence='made from a seed')
    for split, size in zip(SPLITS, sizes):
        tokens = _monkey(size, rng, **source)
        bits = _code_length(tokens, **source)
        with_memory, without_memory = bits.tolist()
        setattr(corpus, split, join_words(tokens))
        corpus.ideal[split] = dict(with_memory=with_memory, without_memory=without_memory)
    return corpus

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

def _from_folder(folder):
    "The corpus of a folder with train*, valid* and test* files. Each file of several is a document."
    corpus = Corpus(folder.name)
    for split in SPLITS:
        files = sorted(folder.glob(f'{split}*'))
        if not files:
            raise ValueError(f'folder {folder} has no file {split}*; allowed: a folder with train*, valid* and test* files')
        texts = [read_text(file) for file in files]
        text, starts = _joined(texts)
        if len(texts) == 1:
            text = texts[0]
            starts = document_starts(text)
        setattr(corpus, split, text)
        corpus.starts[split] = starts
    return corpus

# %%
def _with_documents(name, texts, **known):
    "The corpus of `texts` (split -> text), whose documents are found by their headings."
    starts = {split: document_starts(text) for split, text in texts.items()}
    return Corpus(name, **texts, starts=starts, **known)

def _from_file(path):
    "The corpus of one file: its last tenth of lines is halved into valid and test."
    lines = io.StringIO(read_text(path)).readlines()
    tenth = len(lines) // 10
    if tenth < 2:
        allowed = '20 lines or more, or a folder with train*, valid* and test*'
        raise ValueError(f'{path} has {len(lines)} lines, too few to cut; allowed: {allowed}')
    valid = len(lines) - tenth
    test = len(lines) - tenth // 2
    parts = dict(train=lines[:valid], valid=lines[valid:test], test=lines[test:])
    texts = {split: ''.join(part) for split, part in parts.items()}
    return _with_documents(path.stem, texts)

def _from_path(name):
    "The corpus of a folder or of one file."
    path = Path(name)
    if path.is_dir(): return _from_folder(path)
    if path.exists(): return _from_file(path)
    allowed = f'{", ".join(CORPORA)}, or the path of a UTF-8 file or folder'
    raise ValueError(f'{name!r} is not a corpus; allowed: {allowed}')

# %%
def online(seconds:float=2.0) -> bool:
    "Whether the Hub answers a connection within `seconds`, even if name look-up hangs."
    from huggingface_hub import constants
    if constants.HF_HUB_OFFLINE: return False
    hub = urlsplit(constants.ENDPOINT)
    answered = threading.Event()
    def knock():
        try: socket.create_connection((hub.hostname, hub.port or 443), timeout=seconds).close()
        except OSError: return
        answered.set()
    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()

def _from_hub(splits):
    "Texts of WikiText-2 raw from the Hub or its cache, blank lines put back: split -> text."
    here = online()
    if not here: os.environ['HF_HUB_OFFLINE'] = '1'   # read when datasets is imported
    import datasets, huggingface_hub
    if not here: datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.disable_progress_bars()
    rows = datasets.load_dataset('Salesforce/wikitext', 'wikitext-2-raw-v1')
    names = dict(train='train', valid='validation', test='test')
    lines = {split: rows[names[split]]['text'] for split in splits}
    return {split: ''.join(line or ' \n' for line in lines[split]) for split in splits}

# %%
_WIKIPEDIA = 'CC BY-SA 3.0 and GFDL, text of Wikipedia contributors'
_NOVELS = 'public domain (ELTeC collection)'
_RAW = {split: f'wikitext-2-raw/wiki.{split}.raw' for split in SPLITS}
_FILES = {'wikitext-2': {**_RAW, 'train': 'wikitext-2/wiki.train.tokens'}, 'wikitext-2-raw': _RAW}
for _name in ('eltec-eng', 'eltec-deu', 'eltec-cze'):
    _FILES[_name] = {split: f'{_name}/{split}.txt' for split in SPLITS}
CORPORA = ('pydoc', 'synthetic', *_FILES)

def _find(relative, root):
    "The file `relative` below `root`, with or without its folder, plain or `.xz`; None if there is none."
    path = Path(root or '') / relative
    for folder in (path.parent, path.parent.parent):
        for name in (path.name, f'{path.name}.xz'):
            if root and (folder / name).is_file(): return folder / name

def _nowhere(name, root, missing):
    "The sentence for a corpus whose `missing` files cannot be had."
    fault = f'corpus {name} lacks {", ".join(missing)}'
    fault += f' in {root}' if root else ' since HCLM_DATA is not set'
    ways = ('set HCLM_DATA to a folder that has these files, '
            'connect to the network (wikitext-2-raw only), or take corpus pydoc')
    if name != 'wikitext-2-raw': return f'{fault}; allowed: {ways}'
    return f'{fault} and the Hub could not be reached; allowed: {ways}; corpus wikitext-2 needs no raw train split'

# %%
def _from_files(name, root, splits):
    "Texts of corpus `name` from the files below `root`, or from the Hub: split -> text."
    wanted = {split: path for split, path in _FILES[name].items() if split in splits}
    found = {split: _find(path, root) for split, path in wanted.items()}
    missing = [wanted[split] for split in wanted if found[split] is None]
    if not missing: return {split: read_text(path) for split, path in found.items()}
    fault = FileNotFoundError(_nowhere(name, root, missing))
    if name != 'wikitext-2-raw': raise fault
    try: return _from_hub(wanted)
    except Exception as error: raise fault from error

def load_corpus(name:str, data_dir:str=None, splits=SPLITS) -> Corpus:
    """The corpus called `name` (one of `CORPORA`, or the path of a file or folder).

    Files are looked for in `data_dir`, else in the folder that the variable `HCLM_DATA` names. Raises
    `ValueError` for an unknown name, `FileNotFoundError` if the text cannot be had."""
    if name == 'pydoc': return _pydoc()
    if name == 'synthetic': return synthetic()
    if name not in _FILES: return _from_path(name)
    root = data_dir or os.environ.get('HCLM_DATA')
    texts = _from_files(name, root, splits)
    licence = _NOVELS if name.startswith('eltec') else _WIKIPEDIA
    unknown = '<unk>' if name == 'wikitext-2' else None
    return _with_documents(name, texts, licence=licence, unknown=unknown)

# %%
from hclm_repro.text import DUMMY, TERMINATOR, Alphabet, canonical, stream_words   # for the old modules, until they are rewritten
words = split_words
