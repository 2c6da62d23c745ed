"""Inputs that are wrong: each is refused in one sentence that says what is allowed, and nothing is left of the attempt.

A table: what is wrong -> what is called. The functions take the folder in which they may look."""
import inspect
import json
import lzma
import math
import os
import signal
import subprocess
import sys
import typing
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from common import check_sentence, files, root

from hclm_repro import Corpus, TrainingConfig, build, keep, load_corpus, load_pretrained, preset, synthetic, train
from hclm_repro.corpus import Lanes, read_text
from hclm_repro.experiment import Experiment, Job, read_parameters, train_all
from hclm_repro.model import MODELS, Config
from hclm_repro.text import Alphabet, split_words, stream_words

lines = ''.join(f'line {i}\n' for i in range(40))
corpus = synthetic((600, 60, 10))
quick = TrainingConfig(lanes=2, word_budget=24, evaluations=1, curve_words=10, sample_words=1, min_count=5, threads=1)
HCLM = MODELS['HCLM']
small = HCLM.Config(units=8, embedding=4, segment_words=6, cache_slots=5)
cases = {}


def table(group, **calls):
    for name, call in calls.items(): cases[f'{group}: {name.replace("_", " ")}'] = call


def fresh(config=small): return build(HCLM, config, corpus, quick)


# Files of a corpus

def a_file(content, name='text.txt', look=load_corpus):
    def call(folder):
        (folder/name).write_bytes(content)
        return lambda: look(folder/name)
    return call


packed = lzma.compress(lines.encode())
half = lines.encode()[:-1] + '☃'.encode()[:-1]
broken = bytearray(packed)
broken[len(packed) // 2] ^= 1
bad_files = dict(
    empty=b'', one_space=b' ', only_spaces=b' ' * 1000, only_line_ends=b'\n' * 100, blank_lines=b' \n' * 100, one_line=b'one line\n',
    nineteen_lines=b'a line\n' * 19, no_line_ends=b'word ' * 1000, one_long_word=b'a' * 100_000, latin_1='fenêtre\n'.encode('latin-1') * 40,
    utf_16=lines.encode('utf-16'), utf_16_without_mark=lines.encode('utf-16-le'), utf_32=lines.encode('utf-32'), half_a_character=half,
    a_lone_surrogate=b'\xed\xa0\x80\n' * 40, overlong=b'\xc0\xaf\n' * 40, beyond_unicode=b'\xf5\x80\x80\x80\n' * 40,
    a_nul=lines.encode() + b'\0\n', a_picture=b'\x89PNG\r\n\x1a\n' + bytes(200), a_program=b'\x7fELF' + bytes(200),
    blank_end=lines.encode() + b'\n' * 40, blank_beginning=b'\n' * 400 + b'a b\n', a_gzip=b'\x1f\x8b\x08' + bytes(50))
bad_packed = dict(
    empty=b'', plain=lines.encode(), cut=packed[:-9], cut_in_the_middle=packed[:len(packed) // 2], only_a_head=packed[:12], broken=bytes(broken),
    followed_by_text=packed + b'more', followed_by_half=packed + packed[:20], followed_by_broken=packed + bytes(broken), old_lzma=lzma.compress(lines.encode(), lzma.FORMAT_ALONE),
    packed_nothing=lzma.compress(b''), packed_blanks=lzma.compress(b' \n' * 50), packed_latin_1=lzma.compress('fenêtre\n'.encode('latin-1') * 40),
    packed_nul=lzma.compress(lines.encode() + b'\0'), packed_half_a_character=lzma.compress(half))
table('a corpus of one file', **{name: a_file(content) for name, content in bad_files.items()})
table('a packed corpus', **{name: a_file(content, 'text.txt.xz') for name, content in bad_packed.items()})
table('a stream of words', **{name: a_file(content, 'text.txt', lambda path: list(stream_words(path))) for name, content in bad_files.items()
                              if name in ('latin_1', 'utf_16', 'half_a_character', 'a_lone_surrogate', 'overlong', 'a_gzip')})
table('a packed stream', **{name: a_file(content, 'text.txt.xz', lambda path: list(stream_words(path))) for name, content in bad_packed.items()
                            if name in ('empty', 'plain', 'cut', 'broken', 'followed_by_text', 'packed_latin_1')})


def no_file(make):
    def call(folder):
        place = make(folder)
        return lambda: load_corpus(place if place is not None else folder/'text.txt')
    return call


def in_folder(**contents):
    "A folder with files; `None`: a folder, a pipe or a link that leads nowhere, by name."
    def call(folder):
        for name, content in contents.items():
            path = folder/name.replace('_dot_', '.').replace('_tilde', '~')
            if content == 'folder': path.mkdir()
            elif content == 'pipe': os.mkfifo(path)
            elif content == 'link': path.symlink_to('nowhere')
            elif content == 'loop': path.symlink_to(path)
            else: path.write_bytes(content)
        return lambda: load_corpus(folder)
    return call


text = lines.encode()
table('no file',
      a_pipe=no_file(lambda folder: os.mkfifo(folder/'text.txt')), a_packed_pipe=no_file(lambda folder: (os.mkfifo(folder/'pipe.xz'), folder/'pipe.xz')[1]),
      a_device=no_file(lambda folder: '/dev/zero'), a_null_device=no_file(lambda folder: '/dev/null'), a_memory=no_file(lambda folder: '/proc/self/mem'),
      a_dead_link=no_file(lambda folder: (folder/'text.txt').symlink_to('nowhere')), a_loop=no_file(lambda folder: (folder/'text.txt').symlink_to('text.txt')),
      nothing=no_file(lambda folder: folder/'nothing.txt'), a_long_name=no_file(lambda folder: 'a' * 300), a_nul_name=no_file(lambda folder: 'a\0b'),
      a_surrogate_name=no_file(lambda folder: '\ud800'), an_empty_name=no_file(lambda folder: ''), a_number=no_file(lambda folder: 3),
      a_list=no_file(lambda folder: ['pydoc']), some_bytes=no_file(lambda folder: b'pydoc'), a_near_name=no_file(lambda folder: 'wikitext-3'),
      capitals=no_file(lambda folder: 'PYDOC'), below_a_file=no_file(lambda folder: ((folder/'file').write_text('a'), folder/'file'/'below')[1]))
cases['no file: None'] = lambda folder: lambda: load_corpus(None)
table('a folder', empty=in_folder(), no_train=in_folder(valid_dot_txt=text, test_dot_txt=text), no_valid=in_folder(train_dot_txt=text, test_dot_txt=text),
      no_test=in_folder(train_dot_txt=text, valid_dot_txt=text), only_a_backup=in_folder(train_dot_txt_tilde=text, valid_dot_txt=text, test_dot_txt=text),
      blank_valid=in_folder(train_dot_txt=text, valid_dot_txt=b' \n', test_dot_txt=text), empty_valid=in_folder(train_dot_txt=text, valid_dot_txt=b'', test_dot_txt=text),
      empty_second_file=in_folder(**{'train-a_dot_txt': text, 'train-b_dot_txt': b''}, valid_dot_txt=text, test_dot_txt=text),
      twice=in_folder(train_dot_txt=text, train_dot_txt_dot_xz=packed, valid_dot_txt=text, test_dot_txt=text),
      a_folder_within=in_folder(train='folder', valid_dot_txt=text, test_dot_txt=text), a_pipe_within=in_folder(train_dot_txt='pipe', valid_dot_txt=text, test_dot_txt=text),
      a_link_within=in_folder(train_dot_txt='link', valid_dot_txt=text, test_dot_txt=text), a_loop_within=in_folder(train_dot_txt='loop', valid_dot_txt=text, test_dot_txt=text),
      latin_1_within=in_folder(train_dot_txt=text, valid_dot_txt='fenêtre'.encode('latin-1'), test_dot_txt=text),
      nul_within=in_folder(train_dot_txt=text, valid_dot_txt=text, test_dot_txt=b'a\0'), cut_within=in_folder(train_dot_txt_dot_xz=packed[:-9], valid_dot_txt=text, test_dot_txt=text),
      other_formats=in_folder(train_dot_json=text, valid_dot_csv=text, test_dot_gz=text))
for value in ('valid', (), ('valid', 'text'), None, [3], {'valid': 1}):
    cases[f'splits: {value!r}'] = lambda folder, value=value: lambda: load_corpus('eltec-eng', splits=value)
table('a corpus by name', not_there=lambda folder: lambda: load_corpus('eltec-eng', data_dir=folder), in_a_file=lambda folder: lambda: load_corpus('wikitext-2', data_dir=__file__),
      in_a_number=lambda folder: lambda: load_corpus('wikitext-2', data_dir=3), in_a_list=lambda folder: lambda: load_corpus('eltec-eng', data_dir=['a']),
      in_a_nul=lambda folder: lambda: load_corpus('eltec-eng', data_dir='a\0b'))


def named_file(content):
    def call(folder):
        (folder/'eltec-eng').mkdir()
        for split in ('train', 'valid', 'test'): (folder/'eltec-eng'/f'{split}.txt').write_bytes(content if split == 'valid' else text)
        return lambda: load_corpus('eltec-eng', data_dir=folder)
    return call


table('a named corpus', blank=named_file(b'\n'), latin_1=named_file('é'.encode('latin-1')), nul=named_file(b'a\0'))
table('a corpus in memory', no_split=lambda folder: lambda: Corpus('mine').counts('valid'), another_split=lambda folder: lambda: corpus.words('dev'),
      blank=lambda folder: lambda: Corpus('mine', train='a', valid=' \n').counts('valid'),
      some_bytes=lambda folder: lambda: Corpus('mine', train=b'a'), a_list=lambda folder: lambda: Corpus('mine', valid=['a']),
      a_surrogate_split=lambda folder: lambda: Corpus('mine', valid='a\ud800').counts('valid'), a_surrogate_fingerprint=lambda folder: lambda: Corpus('mine', test='\ud800').sha256, surrogate=lambda folder: lambda: split_words('a\ud800'),
      no_lanes=lambda folder: lambda: Lanes(['a'], 0, 3), no_words_a_segment=lambda folder: lambda: Lanes(['a'], 1, 0), many_lanes=lambda folder: lambda: Lanes(['a'], 2, 3),
      a_letter_twice=lambda folder: lambda: Alphabet('aab'))


# Configs: each field of each config, with values of a wrong type and out of its range

def wrong_values(f, kind):
    "Values that a field must not take."
    kinds = typing.get_args(kind) or (kind,)
    if str not in kinds: yield 'many'
    if int in kinds and float not in kinds: yield from (2.5, math.nan)
    if float in kinds: yield from (math.nan, math.inf, -math.inf)
    if bool not in kinds: yield True
    if type(None) not in kinds: yield None
    if f.metadata.get('at_least') is not None: yield f.metadata['at_least'] - 1
    if f.metadata.get('above') is not None: yield f.metadata['above']
    if f.metadata.get('at_most') is not None: yield f.metadata['at_most'] + 1
    if f.metadata.get('choices'): yield 'another'
    yield [1]


for kind in dict.fromkeys([TrainingConfig, Experiment, *(cls.Config for cls in MODELS.values() if cls.__module__.startswith('hclm_repro'))]):
    hints = typing.get_type_hints(kind)
    for f in fields(kind):
        for value in wrong_values(f, hints[f.name]):
            cases[f'{kind.__name__}: {f.name}={value!r}'] = lambda folder, kind=kind, choice={f.name: value}: lambda: kind(**choice)

heads = {name: MODELS[name].Config for name in ('HAT', 'ByteTransformer', 'SubwordTransformer')}
table('sizes', **{f'{name}_heads': lambda folder, kind=kind: lambda: kind(units=10, heads=4) for name, kind in heads.items()})
table('training', both_lengths=lambda folder: lambda: TrainingConfig(epochs=1, word_budget=10), no_length=lambda folder: lambda: TrainingConfig(word_budget=None))
for seeds in ('', 'maybe', '0,0', '-1', '1.5', '0;1', ',', -1): cases[f'seeds: {seeds!r}'] = lambda folder, seeds=seeds: lambda: Experiment(seeds=seeds)
table('presets', unknown=lambda folder: lambda: preset(HCLM, 'huge'), no_model=lambda folder: lambda: preset('GPT', 'tiny'),
      unknown_parameter=lambda folder: lambda: read_parameters(Experiment, {}, dict(sead=7)), unknown_of_experiment=lambda folder: lambda: Experiment(preset='huge'))


# Scoring and writing

class Once:
    "A model that is built when it is first needed."
    def __call__(self):
        if not hasattr(self, 'model'): self.model = fresh().eval()
        return self.model


model = Once()


def verb(name, *arguments, **choices): return lambda folder: lambda: getattr(model(), name)(*arguments, **choices)


for value in (None, 3, 2.5, b'text', (c for c in 'text'), {'text': 1}, {'text'}, [None], ['text', 3], [['text']], ['text', b'text'], 'a\ud800', ['a', '\ud800'], np.array(3), True):
    shown = 'a generator' if inspect.isgenerator(value) else repr(value)
    cases[f'score: {shown}'] = verb('score', value)
for value in (0, -1, 2.5, True, '3', math.nan, [3]):
    cases[f'score: segment={value!r}'] = verb('score', 'a text', segment=value)
    cases[f'score_file: segment={value!r}'] = lambda folder, value=value: lambda: list(model().score_file(root/'README.md', segment=value))
for value in (None, 3.5, ['README.md'], '', 'nothing.txt', '/', '/dev/zero', 'a\0b', '\ud800', b'README.md'):
    cases[f'score_file: {value!r}'] = lambda folder, value=value: lambda: list(model().score_file(value))
for name, content in (('latin-1', 'é'.encode('latin-1')), ('cut', packed[:-9])):
    cases[f'score_file: {name}'] = a_file(content, 'text.xz' if name == 'cut' else 'text.txt', lambda path: list(model().score_file(path)))
wrong_writing = dict(
    prompt=(None, 3, b'The', {'The': 1}, {'The'}, ['The', None], '\ud800', True), words=(-3, 2.5, True, '3', None, math.nan), seed=(2 ** 64, 'x', 1.5, None, True, math.nan),
    temperature=(-1, math.nan, math.inf, 'hot', None, True), top_p=(0, 1.5, math.nan, 'all', None), stop=(3, 'two words', 'a\nb', '', b'a', ['a']))
for name, values in wrong_writing.items():
    for value in values:
        choices = {**dict(prompt='The', words=1), name: value}
        cases[f'generate: {name}={value!r}'] = verb('generate', **choices)


# Training

def training(**changes):
    "`train` with one argument that is wrong."
    def call(folder):
        arguments = dict(model=fresh(), corpus=corpus, config=quick, folder=folder/'run')
        arguments.update({name: value(folder) if callable(value) and name in ('folder', 'corpus') else value for name, value in changes.items()})
        return lambda: train(**arguments)
    return call




table('train', a_dict_of_choices=training(config={'lr': 1.0}), no_choices=training(config=None), a_model_by_name=training(model='HCLM'), a_class=training(model=HCLM),
      no_model=training(model=None), a_corpus_by_name=training(corpus='pydoc'), no_corpus=training(corpus=None), a_number_as_folder=training(folder=3),
      bytes_as_folder=training(folder=b'run'), a_watch_that_is_none=training(watch='yes'),
      no_folder=training(folder=None), no_valid=training(corpus=Corpus('mine', train=corpus.train)), no_train=training(corpus=Corpus('mine', valid=corpus.valid)),
      blank_valid=training(corpus=Corpus('mine', train=corpus.train, valid=' \n')), blank_train=training(corpus=Corpus('mine', train=' \n', valid='a')),
      surrogate_in_train=training(corpus=Corpus('mine', train='a\ud800 ' * 40, valid='a')),
      surrogate_in_valid=training(corpus=Corpus('mine', train=corpus.train, valid='a\ud800')), surrogate_in_test=training(corpus=Corpus('mine', train=corpus.train, valid='a', test='\ud800')),
      few_words=training(corpus=Corpus('mine', train='one', valid='a')))
table('build', no_model=lambda folder: lambda: build('GPT', small, corpus, quick), a_config_of_another=lambda folder: lambda: build('CharLSTM', small, corpus, quick),
      a_dict=lambda folder: lambda: build(HCLM, {'units': 8}, corpus, quick), no_training=lambda folder: lambda: build(HCLM, small, corpus, None),
      no_corpus=lambda folder: lambda: build(HCLM, small, 'pydoc', quick))


def a_run(**contents):
    "A run in a folder that holds files that are no run's."
    def call(folder):
        (folder/'run').mkdir()
        for name, content in contents.items():
            path = folder/'run'/name.replace('_dot_', '.')
            if content == 'folder': path.mkdir()
            elif content == 'pipe': os.mkfifo(path)
            else: path.write_bytes(content)
        made = fresh()
        return lambda: train(made, corpus, quick, folder/'run')
    return call


table('a run', empty_record=a_run(record_dot_json=b''), record_of_nothing=a_run(record_dot_json=b'{}'), cut_record=a_run(record_dot_json=b'{"label": "a", "ste'),
      record_null=a_run(record_dot_json=b'null'), record_list=a_run(record_dot_json=b'[]'), record_nan=a_run(record_dot_json=b'{"code": NaN}'),
      record_latin_1=a_run(record_dot_json=b'\xe9'), record_folder=a_run(record_dot_json='folder'), record_pipe=a_run(record_dot_json='pipe'),
      empty_checkpoint=a_run(checkpoint_dot_pt=b''), text_checkpoint=a_run(checkpoint_dot_pt=b'text'), folder_checkpoint=a_run(checkpoint_dot_pt='folder'),
      pipe_checkpoint=a_run(checkpoint_dot_pt='pipe'))


# Saved models

def saved(change):
    "A saved model with something changed."
    def call(folder):
        fresh().save_pretrained(folder/'model')
        change(folder/'model')
        return lambda: load_pretrained(folder/'model')
    return call


def rewrite(name, content): return lambda folder: (folder/name).write_bytes(content)


def edit(**changes):
    def change(folder):
        described = json.loads((folder/'config.json').read_text())
        described.update(changes)
        (folder/'config.json').write_text(json.dumps(described))
    return saved(change)


table('a saved model', no_config=saved(lambda folder: (folder/'config.json').unlink()), no_weights=saved(lambda folder: (folder/'model.safetensors').unlink()),
      empty_config=saved(rewrite('config.json', b'')), config_of_nothing=saved(rewrite('config.json', b'{}')), config_list=saved(rewrite('config.json', b'[]')),
      config_null=saved(rewrite('config.json', b'null')), cut_config=saved(rewrite('config.json', b'{"units": 8, "cl')), latin_1_config=saved(rewrite('config.json', b'\xe9')),
      empty_weights=saved(rewrite('model.safetensors', b'')), text_weights=saved(rewrite('model.safetensors', b'some text, and more of it')),
      huge_header=saved(rewrite('model.safetensors', b'\xff' * 8 + b'{}')), other_units=edit(units=16), no_cache=edit(cache_slots=0), other_score=edit(score='additive'),
      unknown_field=edit(colour='red'), unknown_class=edit(class_name='GPT'), other_class=edit(class_name='CharLSTM'), number_as_class=edit(class_name=3),
      list_as_class=edit(class_name=['HCLM']), other_alphabet=edit(alphabet='ab'), wrong_type=edit(units='8'))
table('a model that is not there', nothing=lambda folder: lambda: load_pretrained(folder/'nothing'), a_file=lambda folder: lambda: load_pretrained(__file__),
      an_empty_folder=lambda folder: lambda: load_pretrained(folder), none=lambda folder: lambda: load_pretrained(None), a_number=lambda folder: lambda: load_pretrained(3),
      an_empty_name=lambda folder: lambda: load_pretrained(''), a_nul=lambda folder: lambda: load_pretrained('a\0b'), a_path=lambda folder: lambda: load_pretrained('runs/nope'))


# Records

def a_record(content, name=None):
    def call(folder):
        (folder/'runs'/'mine').mkdir(parents=True)
        if content is not None: (folder/'runs'/'mine'/'record.json').write_bytes(content)
        return lambda: keep(folder/'runs'/'mine', name, folder/'results')
    return call


good = b'{"label": "mine"}'
table('keep', no_record=a_record(None), empty=a_record(b''), nothing=a_record(b'{}'), cut=a_record(b'{"lab'), null=a_record(b'null'), nan=a_record(b'{"label": NaN}'),
      latin_1=a_record(b'\xe9'), out_of_the_folder=a_record(good, '../../x'), above=a_record(good, '..'), below=a_record(good, 'a/b'), absolute=a_record(good, '/tmp/x'),
      a_nul=a_record(good, 'a\0b'), a_number=a_record(good, 3), no_run=lambda folder: lambda: keep(folder/'nothing', None, folder/'results'), none=lambda folder: lambda: keep(None))
table('jobs', a_corpus_that_is_none=lambda folder: lambda: train_all([Job(HCLM, small, 'wikitext-3', quick, folder/'run', 'cpu')]),
      processes=lambda folder: lambda: train_all([Job(HCLM, small, corpus, quick, folder/'run', 'cpu')] * 2, processes=0))


def hangs(*_): raise RuntimeError('it hangs')


@pytest.fixture
def alarm():
    "Ends what waits for ever."
    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(300)
    yield
    signal.alarm(0)


@pytest.mark.parametrize('name', cases)
def test_bad_input(name, tmp_path, monkeypatch, alarm, counted):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    call = cases[name](tmp_path)
    before = files(tmp_path)
    with pytest.raises(Exception) as caught: call()
    check_sentence(caught.value)
    assert files(tmp_path) == before
    counted('bad inputs')


def test_there_are_many(): assert len(cases) >= 200


def test_sizes_of_numpy_are_integers():
    "A number that is right in value and comes from an array is no fault."
    assert model().score('a b c', segment=np.int64(2)).equals(model().score('a b c', segment=2))
    assert model().generate('a', words=np.int64(2), seed=np.int32(1)) == model().generate('a', words=2, seed=1)


def test_what_looks_odd_and_is_right():
    for text in ('', ' ', '\n', 'a\0b', '\ufeffa', '𝒳' * 50): assert model().score(text).characters.sum() == len(' '.join(text.split(' ')).strip(' '))
    assert model().score([]) == [] and model().score(('a', 'b'))[1].equals(model().score('b'))


program = '''
import sys
from hclm_repro import HCLM, TrainingConfig, build, synthetic, train
corpus = synthetic((600, 60, 10))
training = TrainingConfig(lanes=2, word_budget=24, min_count=5)
train(build(HCLM, HCLM.Config(units=8), corpus, training), corpus, training, sys.argv[1])
'''


def test_a_program_ends_with_the_sentence(tmp_path, counted):
    (tmp_path/'file').write_text('a file')
    done = subprocess.run([sys.executable, '-c', program, tmp_path/'file'], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': str(root)})
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert str(tmp_path/'file') in last and '; allowed: ' in last
    assert files(tmp_path) == {'file': b'a file'}
    counted('bad inputs')
