"""Claims about every text, every count, every order of words: hypothesis looks for one that breaks them.

`make test-long` looks at far more, and at other ones each time."""
import lzma, random
from collections import OrderedDict
from dataclasses import fields

import numpy as np
import pytest
import torch
from common import many
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from hclm_repro.cache import hidden_columns, plan_cache, plan_lane
from hclm_repro.corpus import Corpus, Lanes, segment_characters, synthetic
from hclm_repro.model import MODELS
from hclm_repro.perturb import EDITS, eligible, perturb
from hclm_repro.text import (
    DUMMY, LINE_END, PADDING, UNKNOWN, Alphabet, canonical, characters, join_words, quotients, split_words,
    stream_words)
from hclm_repro.training import deal


def examples(short, long):
    "So many examples, the same ones each time in `make test`; no deadline, since machines differ."
    return settings(max_examples=many(short, long), derandomize=many(True, False), deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))


awkward = ['a', 'b', 'bc', ' ', '  ', '\n', '\r', '\t', '\x00', '\x0b', '\x0c', '\x1c', '\x85', '\u00a0', '\u2028', '\u3000', 'é', 'e\u0301',
           '☃', '𝒳', '\ufeff', '\u200b', '\uffff', '<unk>']
character = st.characters(exclude_categories=['Cs'])
texts = st.lists(st.sampled_from(awkward) | character, max_size=40).map(''.join)
words = st.text(character.filter(lambda c: c not in ' \n'), min_size=1, max_size=6)
tokens = st.lists(st.just(LINE_END) | st.sampled_from(['a', 'b', 'bc', '☃']) | words, max_size=30)


# Canonical text

@examples(100, 1_500)
@given(texts)
def test_canonical_text(text):
    once = canonical(text)
    assert canonical(once) == once == join_words(split_words(text))
    assert split_words(once) == split_words(text)
    assert once.replace(' ', '') == text.replace(' ', '')            # nothing but spaces is lost
    assert '  ' not in once and ' \n' not in once and '\n ' not in once and once.strip(' ') == once


@examples(100, 1_500)
@given(tokens)
def test_tokens_come_back(tokens): assert split_words(join_words(tokens)) == tokens


@examples(30, 500)
@given(text=texts, size=st.integers(1, 9), cut=st.integers(0, 200))
def test_a_file_has_the_words_of_its_text(tmp_path_factory, text, size, cut):
    folder = tmp_path_factory.mktemp('file')
    data = text.encode()
    (folder/'plain.txt').write_bytes(data)
    (folder/'packed.txt.xz').write_bytes(lzma.compress(data[:cut]) + lzma.compress(data[cut:]))
    for name in ('plain.txt', 'packed.txt.xz'): assert list(stream_words(folder/name, size)) == split_words(text)


# Counting

@examples(100, 1_500)
@given(texts)
def test_characters_are_those_of_the_canonical_text(text):
    assert characters(split_words(text)).sum() == len(canonical(text))


@examples(100, 1_500)
@given(tokens, tokens)
def test_characters_add_up(first, second):
    following = second[0] if second else None
    parts = [*characters(first, following), *characters(second)]
    assert parts == characters(first + second).tolist()


@examples(50, 700)
@given(texts)
def test_counts_of_a_corpus(text):
    corpus = Corpus('any', train=text, valid=text, unknown='<unk>')
    if not text.strip(' \n'):
        with pytest.raises(ValueError, match='has no word; allowed: '): corpus.counts('valid')
        return
    counts, trained = corpus.counts('valid'), corpus.counts('train')
    assert counts['characters'] == len(canonical(text)) and counts['file_characters'] == len(text)
    assert counts['bytes'] == len(text.encode()) and counts['line_ends'] == text.count('\n')
    assert counts['words'] == len(split_words(text)) == trained['words'] + trained['unknown']
    assert trained['unknown'] == split_words(text).count('<unk>') and counts['unknown'] == 0


@examples(50, 700)
@given(st.floats(0, 1e9), *[st.integers(1, 10**9)] * 4)
def test_quotients_are_one_number(bits, characters, file_characters, size, words):
    counts = dict(characters=characters, file_characters=file_characters, bytes=size, words=words)
    found = quotients(bits, counts)
    back = [found['bpc'] * characters, found['bpc_file'] * file_characters, found['bits_per_byte'] * size]
    for perplexity, count in (('word_ppl', words), ('char_ppl', characters)):
        if found[perplexity] is None: assert bits / count >= 1024   # no float is as large
        else: back.append(np.log2(found[perplexity]) * count)
    np.testing.assert_allclose(back, bits, rtol=1e-9, atol=1e-6)
    assert set(found) == {'bpc', 'bpc_file', 'bits_per_byte', 'word_ppl', 'char_ppl'}


# Alphabets

@examples(50, 700)
@given(tokens, tokens, st.integers(1, 3))
def test_alphabets(learned, read, least):
    alphabet = Alphabet.of(learned, least)
    symbols, lengths = alphabet.encode(read, terminated=True)
    assert lengths.sum() == len(symbols) and (symbols < alphabet.outputs).all()
    ends = np.cumsum(lengths)
    pieces = [symbols[end - length:end] for end, length in zip(ends, lengths)]
    assert [alphabet.decode(piece) for piece in pieces] == alphabet.replace_rare(read)
    assert all((piece <= alphabet.line_end).tolist() == [False] * (len(piece) - 1) + [True] for piece in pieces)
    assert alphabet.rare(read).tolist() == [word.count(DUMMY) for word in alphabet.replace_rare(read)]
    assert alphabet.replace_rare(alphabet.replace_rare(read)) == alphabet.replace_rare(read)


# Perturbed texts

letters = st.text(st.sampled_from('abcdeXYZ019ßﬁŉǆé²١') | character, max_size=8)
spelled = st.lists(letters | st.sampled_from(['the', 'The', 'other', ' ', '\n', ', ', '_', '-']), max_size=25).map(''.join)
seeds = st.integers(0, 10**6)


@examples(150, 3_000)
@given(spelled, st.sampled_from(list(EDITS)), st.floats(0, 1), seeds, st.lists(st.sampled_from(['the', 'abc', 'X']), max_size=2))
def test_perturbed_texts(text, kind, share, seed, protected):
    spoilt, changes = perturb(text, kind, share, seed, protected)
    assert perturb(text, kind, share, random.Random(seed), protected)[0] == spoilt     # a function of the seed
    slots, touched = list(text), set()
    for change in changes.itertuples():
        width = len(change.before)
        places = range(change.position, change.position + width)
        assert ''.join(slots[i] for i in places) == change.before
        slots[change.position:change.position + width] = [change.after] if width == 1 else list(change.after)
        touched |= set(places)
    assert ''.join(slots) == spoilt
    assert [len(split_words(line)) for line in spoilt.split('\n')] == [len(split_words(line)) for line in text.split('\n')]
    assert not [i for i in touched if text[i].isspace()]
    if kind == 'uppercase': return
    free = eligible(text, protected)
    assert all(text[i - 1].isalnum() and text[i].isalnum() and text[i + 1].isalnum() for i in free) and 0 not in free
    assert changes.position.is_unique and set(changes.position) <= set(free) and len(changes) == int(share * len(free))
    assert touched <= (set(free) | {i + 1 for i in free} if kind == 'permute' else set(free))


@examples(30, 300)
@given(st.lists(st.sampled_from(['reading', 'letters', 'misspelt']), min_size=12, max_size=20).map(' '.join), seeds)
def test_perturbations_are_drawn(text, seed):
    for kind in EDITS:
        found = {perturb(text, kind, 0.5, seed + i)[0] for i in range(4)}
        assert len(found) == 1 if kind == 'uppercase' else len(found) > 1


# Lanes

@examples(100, 1_500)
@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 9))
def test_lanes_read_every_word_once_and_in_order(count, lanes, segment_words):
    assume(lanes <= count)
    text = [str(i) for i in range(count)]
    read = [[] for _ in range(lanes)]
    segments = list(Lanes(text, lanes, segment_words))
    for i, segment in enumerate(segments):
        assert len(segment) == lanes and len({len(lane) for lane in segment}) == 1
        last = i == len(segments) - 1
        assert 0 < len(segment[0]) <= segment_words and (last or len(segment[0]) == segment_words)
        for lane, words in zip(read, segment): lane += words
    whole = [word for lane in read for word in lane]
    assert whole == text[:len(whole)] and 0 <= count - len(whole) < lanes
    assert sum(map(segment_characters, segments)) == sum(len(word) + 1 for word in whole)


@examples(50, 700)
@given(st.integers(1, 50), st.integers(1, 50))
def test_processes_share_the_lanes(lanes, processes):
    assume(processes <= lanes)
    shares = [range(lanes)[deal(lanes, rank, processes)] for rank in range(processes)]
    assert [lane for share in shares for lane in share] == list(range(lanes))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# Plans of the cache, beside a dictionary that is read and written one word at a time

few = st.sampled_from(['a', 'b', 'c', 'd', 'e', 'f', LINE_END, UNKNOWN, PADDING])
lane_segments = st.integers(1, 6).flatmap(
    lambda count: st.lists(st.tuples(st.lists(few, min_size=count, max_size=count), st.sets(st.integers(0, count - 1))), min_size=1, max_size=5))


class Simple:
    "A cache of `slots` words: an ordered dictionary, the least recently written first. A version is (word, time)."
    def __init__(self, slots): self.slots, self.held = slots, OrderedDict()

    def read(self, word): return set(self.held.values()), self.held.get(word)

    def write(self, word, version):
        self.held.pop(word, None)
        if self.slots is not None and len(self.held) >= self.slots: self.held.popitem(last=False)
        self.held[word] = version


@examples(100, 1_500)
@given(st.lists(lane_segments, min_size=1, max_size=2), st.sampled_from([None, 1, 2, 3, 5]))
@example([[(['a', 'b', 'a', 'c'], set())]], 2)
def test_cache_plans_are_a_dictionary(lanes, slots):
    rounds = min(map(len, lanes))
    simple = [Simple(slots) for _ in lanes]
    held = [{} for _ in lanes]
    keys = [{} for _ in lanes]        # slot -> version, of each lane
    for i in range(rounds):
        count = min(len(lane[i][0]) for lane in lanes)
        segment = [lane[i][0][:count] for lane in lanes]
        resets = sorted(step for step in lanes[0][i][1] if step < count)
        before = [dict(h) for h in held]
        plan, after = plan_cache(segment, held, slots, resets)
        plan.check()
        assert held == before
        hidden = hidden_columns(plan, 0, plan.columns + count)
        for lane, tokens in enumerate(segment):
            columns = [keys[lane].get(slot) for slot in range(plan.columns)] + [(lane, i, t) for t in range(count)]
            for t, word in enumerate(tokens):
                if t in resets: simple[lane].held.clear()
                if word in (PADDING, UNKNOWN):
                    assert plan.hit[lane, t] == -1
                    continue
                seen, own = simple[lane].read(word)
                assert {columns[c] for c in range(len(columns)) if not hidden[lane, t, c]} == seen
                assert (columns[plan.hit[lane, t]] if plan.hit[lane, t] >= 0 else None) == own
                simple[lane].write(word, (lane, i, t))
        for place, word in zip(plan.place.tolist(), plan.word.tolist()):
            lane, slot = divmod(place, plan.kept)
            keys[lane][slot] = (word // count, i, word % count)
        for lane, words in enumerate(after):
            keys[lane] = {slot: keys[lane][slot] for slot in words.values()}
            assert [(word, keys[lane][slot]) for word, slot in words.items()] == list(simple[lane].held.items())
            assert sorted(words.values()) == list(range(len(words)))
        held = after


@examples(50, 700)
@given(st.lists(few, min_size=2, max_size=30), st.integers(1, 29), st.sampled_from([None, 1, 2, 3, 5]))
def test_a_segment_may_be_cut_anywhere(tokens, cut, slots):
    assume(cut < len(tokens))
    _, whole = plan_lane(tokens, {}, slots)
    _, first = plan_lane(tokens[:cut], {}, slots)
    _, parts = plan_lane(tokens[cut:], first, slots)
    assert list(whole.items()) == list(parts.items())


# Scores

corpus = synthetic((600, 60, 10))
tiny = dict(units=8, embedding=4, layers=1, heads=2, byte_units=8, byte_layers=1, byte_heads=2, context_words=6, context_symbols=24,
            vocabulary=260, segment_words=3, cache_slots=4)
resets = [dict(state_reset='epoch', cache_reset='epoch'), dict(state_reset='segment', cache_reset='segment')]
built = {}


def model_of(name, reset):
    "A tiny model in double precision."
    if (name, reset) not in built:
        cls = MODELS[name]
        names = {f.name for f in fields(cls.Config)}
        chosen = {key: value for key, value in {**tiny, **resets[reset]}.items() if key in names}
        torch.manual_seed(1)
        built[name, reset] = cls(cls.config_for(cls.Config(**chosen), corpus, 5)).double().eval()
    return built[name, reset]


def carried(model, parts):
    "Bits of each word of `parts`, lists of tokens read one after the other with the state carried."
    state, ledger = model.begin(1)
    nats = []
    for i, part in enumerate(parts):
        later = [token for other in parts[i + 1:] for token in other]
        plan, ledger = model.prepare([part], ledger, [later[0] if later else None])
        with torch.no_grad(): predictions, state = model(plan, state)
        nats += predictions.nats[0].tolist()
    return np.array(nats) / np.log(2)


spoken = st.lists(st.sampled_from(['a', 'ta', 'tea', 'ion', 'the', LINE_END, '☃', 'a☃']), min_size=1, max_size=14)


@pytest.mark.parametrize('reset', [0, 1], ids=['carried', 'reset'])
@pytest.mark.parametrize('name', [name for name, cls in MODELS.items() if cls.__module__.startswith('hclm_repro')])
@examples(6, 60)
@given(spoken, st.sets(st.integers(1, 13), max_size=4))
def test_scores_are_carried(name, reset, tokens, cuts):
    model = model_of(name, reset)
    cuts = [0, *sorted(cut for cut in cuts if cut < len(tokens)), len(tokens)]
    parts = [tokens[a:b] for a, b in zip(cuts, cuts[1:])]
    table = model.score(join_words(tokens))
    assert table.word.tolist() == tokens and table.characters.sum() == len(join_words(tokens))
    np.testing.assert_allclose(carried(model, parts), table.bits - table.surcharge, rtol=0, atol=1e-9)
    for segment in {len(part) for part in parts}:
        np.testing.assert_allclose(model.score(join_words(tokens), segment).bits, table.bits, rtol=0, atol=1e-9)


@examples(5, 100)
@given(st.lists(spoken, min_size=1, max_size=4), st.integers(1, 5))
def test_texts_beside_each_other(texts, segment):
    model = model_of('HCLM', 0)
    for tokens, table in zip(texts, model.score([join_words(tokens) for tokens in texts], segment)):
        np.testing.assert_allclose(table.bits, model.score(join_words(tokens)).bits, rtol=0, atol=1e-9)
