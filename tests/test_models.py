"""What every model promises, whichever it is. A model that is added to the package is tested without being named here."""
import copy, importlib, inspect, json, os, pkgutil, re, threading, typing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, is_dataclass, replace

import nbformat
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from common import notebooks, root

import hclm_repro
from hclm_repro import saving
from hclm_repro.corpus import synthetic
from hclm_repro.model import (
    MODELS, RESETS, Config, LanguageModel, ModelConfig, Plan, Sampler, evaluating, load_pretrained, randomise,
    total_probability)
from hclm_repro.run2 import with_choices
from hclm_repro.text import LINE_END, PADDING, UNKNOWN, Alphabet

for module in pkgutil.iter_modules(hclm_repro.__path__):
    if not module.name.startswith('_'): importlib.import_module(f'hclm_repro.{module.name}')

models = dict(MODELS)
corpus = synthetic((600, 60, 10))
text = ' '.join(corpus.valid.split()[:14]) + ' ☃\n\nand the end\n'
tiny = dict(units=8, embedding=4, layers=1, heads=2, byte_units=8, byte_layers=1, byte_heads=2, context_words=6,
            context_symbols=24, vocabulary=260, segment_words=4, cache_slots=5, dropout=0.2)


def variants(cls):
    "The choices by which a config can differ from the tiny one: each choice that has a name, and sizes of the cache."
    options = fields(cls.Config) if cls.Config else ()
    names = [f.name for f in options]
    found = [{}]
    for f in options:
        for choice in f.metadata.get('choices', ()):
            if choice != f.default: found.append({f.name: choice})
    if 'cache_slots' in names: found += [dict(cache_slots=0), dict(cache_slots=None), dict(key_units=3)]
    if 'lexicon_words' in names:
        found += [dict(word_layers=2), dict(lexicon_words=6),
                  dict(cache_holds='occurrences', cache_slots=20, copy_growth=0.5), dict(lexicon_words=6, lexicon_first=2, cache_slots=0),
                  dict(lexicon_words=6, lexicon_first=1, cache_holds='occurrences', cache_slots=None, key_units=3,
                       lexicon_hidden=0.5)]
    return found


def described(case): return '-'.join([case[0], *(f'{k}={v}' for k, v in case[1].items())])

cases = [(name, choices) for name, cls in models.items() for choices in variants(cls)]
each_case = pytest.mark.parametrize('case', cases, ids=described)
each_model = pytest.mark.parametrize('case', [(name, {}) for name in models], ids=described)


def build(case, cls=None, **choices):
    "A tiny model in double precision, in evaluation mode."
    cls = cls or models[case[0]]
    names = {f.name for f in fields(cls.Config)}
    chosen = {name: value for name, value in {**tiny, **case[1], **choices}.items() if name in names}
    config = cls.config_for(cls.Config(**chosen), corpus, min_count=5)
    torch.manual_seed(0)
    return cls(config).double().eval()


def narrow_model(name, **choices):
    "A tiny model of the letters a and b whose words are short, with narrow keys if `choices` do not say otherwise."
    chosen = {**dict(alphabet='ab', units=6, embedding=3, cache_slots=3, key_units=3), **choices}
    model = randomise(models[name](models[name].Config(**chosen)).double(), 3).eval()
    model.output.bias.data[Alphabet.terminator] += 11   # words of more than four letters weigh nothing
    return model


def same(a, b):
    "Whether two structures hold equal values of equal types, dicts in the same order."
    if type(a) is not type(b): return False
    if torch.is_tensor(a): return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray): return np.array_equal(a, b)
    if is_dataclass(a): return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, dict): return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


def segments():
    "Three segments of two lanes, and the token after each lane; with holes, rare characters and an end."
    words = [w for w in corpus.words('train') if w != LINE_END]
    first = [words[:4], [words[0], LINE_END, UNKNOWN, words[1]]]
    second = [[words[0], words[2], words[0], '☃'], [words[1], words[1], words[5], LINE_END]]
    third = [[words[2], LINE_END, PADDING, PADDING], [LINE_END, words[1], words[4], words[0]]]
    return [(first, [words[0], words[1]]), (second, [words[2], LINE_END]), (third, [None, None])]


def read(model, count=3, lanes=2):
    "State and ledger after `count` segments."
    state, ledger = model.begin(lanes)
    for segment, following in segments()[:count]:
        plan, ledger = model.prepare(segment, ledger, following)
        with torch.no_grad(): _, state = model(plan, state)
    return state, ledger


def plans_of(plan):
    "`plan` and all plans within it."
    yield plan
    for f in fields(plan):
        value = getattr(plan, f.name)
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, Plan): yield from plans_of(inner)


def test_there_are_models(): assert {'LoopHCLM', 'HCLM', 'CharLSTM', 'HAT', 'ByteTransformer', 'SubwordTransformer'} <= set(models)


@each_case
@pytest.mark.parametrize('known', [True, False], ids=['following', 'following-unknown'])
def test_what_is_given_stays_as_it_is(case, known):
    model = build(case)
    state, ledger = model.begin(2)
    for segment, following in segments():
        arguments = (segment, ledger, following) if known else (segment, ledger)
        before = copy.deepcopy(arguments)
        prepared = model.prepare(*arguments)
        assert same(prepared, model.prepare(*arguments))
        assert same(before, arguments)

        plan, after = prepared
        before = copy.deepcopy((plan, state))
        with torch.no_grad(): said = model(plan, state)
        with torch.no_grad(): assert same(said, model(plan, state))
        assert same(before, (plan, state))
        with torch.no_grad(): assert same(said, model(plan, copy.deepcopy(state), reuse=True))
        state, ledger = said[1], after


@each_case
def test_plans_predictions_and_states_have_their_shapes(case):
    model = build(case)
    state, ledger = model.begin(2)
    for i, (segment, following) in enumerate(segments()):
        plan, ledger = model.prepare(segment, ledger, following)
        plan.check()
        for inner in plans_of(plan):
            for f in fields(inner):
                tensor = getattr(inner, f.name)
                if not torch.is_tensor(tensor): continue
                with pytest.raises(ValueError, match=f.name): replace(inner, **{f.name: tensor[None]}).check()

        predictions, state = model(plan, state)
        free = torch.tensor([[token in (PADDING, UNKNOWN) for token in lane] for lane in segment])
        assert predictions.nats.shape == (2, 4) and (predictions.nats[free] == 0).all()
        assert (predictions.nats >= 0).all() and predictions.nats.isfinite().all()
        for tensor in (predictions.gate, predictions.terminator, *predictions.posteriors.values()):
            assert tensor is None or tensor.shape == (2, 4)
        assert len(state['h']) == 2 and ledger['position'] == 4 * (i + 1)
        assert not any(torch.is_tensor(value) and value.requires_grad for value in state.values())


@pytest.mark.parametrize('choices', [{}, dict(score='additive')], ids=['dot', 'additive'])
@pytest.mark.parametrize('name', [name for name, cls in models.items() if 'key_units' in vars(cls.Config())])
def test_keys_as_wide_as_contexts_are_contexts(name, choices):
    "Through a matrix that changes nothing the cache is the one without it."
    model = build((name, choices))
    twin = build((name, choices), key_units=8)
    weights = twin.state_dict()
    weights.update(model.state_dict())
    weights['cache.narrow.weight'].copy_(torch.eye(8))
    twin.load_state_dict(weights)
    np.testing.assert_allclose(twin.score(text, 3).bits, model.score(text, 3).bits, rtol=0, atol=1e-9)
    assert build((name, dict(choices, key_units=3))).parameter_count != model.parameter_count


@pytest.mark.parametrize('choices', [{}, dict(score='additive'), dict(cache_slots=None, key_update='latest')], ids=str)
@pytest.mark.parametrize('name', ['LoopHCLM', 'HCLM'])
def test_narrow_keys_sum_to_one_and_know_no_future(name, choices):
    model = narrow_model(name, **choices)
    assert abs(total_probability(model, 'a ba b ☃', 'ab') - 1) < 1e-9
    words = 'a ba b a ba ab b ab a b'.split()
    whole = model.score(' '.join(words), 4).bits
    for count in (3, 5, 8):
        other = words[:count] + ['ab', 'b', 'ba'] * 2
        np.testing.assert_allclose(model.score(' '.join(other), 4).bits[:count], whole[:count], rtol=0, atol=1e-9)


@pytest.mark.parametrize('key_units', [None, 3])
def test_caches_that_hold_different_numbers_of_words(key_units):
    "Of two lanes one repeats a word, so that the columns of the other are not all taken in it."
    loops, fast = (narrow_model(name, key_units=key_units, cache_slots=None) for name in ('LoopHCLM', 'HCLM'))
    fast.load_state_dict(loops.state_dict())
    lanes = [['a', 'b', 'ab', 'ba', 'aa', 'bb', 'aab', 'aba', 'baa', 'a', 'b', 'ab'], ['a'] * 9 + ['b', 'a', 'b']]
    found = []
    for model in (loops, fast):
        state, ledger = model.begin(2)
        for first in range(0, 12, 3):
            plan, ledger = model.prepare([lane[first:first + 3] for lane in lanes], ledger)
            with torch.no_grad(): predictions, state = model(plan, state)
        found.append(predictions.nats)
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)


@each_case
def test_segments_and_neighbours_change_no_score(case):
    model = build(case)
    bits = model.score(text).bits
    for segment in (1, 3, 7): np.testing.assert_allclose(model.score(text, segment).bits, bits, rtol=0, atol=1e-9)
    for given, table in zip([text, 'a', '', text[:9]], model.score([text, 'a', '', text[:9]], 3)):
        np.testing.assert_allclose(table.bits, model.score(given).bits, rtol=0, atol=1e-9)


class Broken(Exception): pass


def broken(*_, **__): raise Broken


@each_model
@pytest.mark.parametrize('training', [True, False], ids=['training', 'evaluating'])
def test_mode_is_kept(case, training, monkeypatch):
    model = build(case).train(training)

    def kept(): return all(m.training is training for m in model.modules()) and torch.is_grad_enabled()
    assert model.score(text).equals(model.score(text)) and kept()   # without dropout
    assert model.generate('a', words=2) == model.generate('a', words=2) and kept()
    with monkeypatch.context() as patch:
        patch.setattr(type(model), 'forward', broken)
        with pytest.raises(Broken): model.score(text)
        assert kept()
    with monkeypatch.context() as patch:
        for name in ('draw', 'toss', 'choose'): patch.setattr(Sampler, name, broken)
        with pytest.raises(Broken): model.generate('a', words=2)
        assert kept()
    reading = model.score_tokens([iter(text.split())], segment=2)
    next(reading)
    assert kept()   # between two segments the caller has the model as it was


@each_model
def test_subclasses_are_saved_and_loaded(case, tmp_path):
    cls = type(f'My{case[0]}', (models[case[0]],), {})
    try:
        model = build(case, cls).float()
        model.save_pretrained(tmp_path)
        back = load_pretrained(tmp_path)
        assert type(back) is cls and back.config == model.config
        assert same(dict(back.state_dict()), dict(model.state_dict()))
        assert back.score(text).equals(model.score(text))
    finally: MODELS.pop(cls.__name__)
    with pytest.raises(ValueError, match=f'class {cls.__name__}; allowed: '): load_pretrained(tmp_path)
    described = json.loads((tmp_path / 'config.json').read_text())
    described.pop('class_name')
    (tmp_path / 'config.json').write_text(json.dumps(described))
    with pytest.raises(ValueError, match='allowed: '): load_pretrained(tmp_path)


@each_model
def test_files_are_read_side_by_side(case, tmp_path):
    model = build(case).train()
    texts = [text, text[::-1].strip() + '\nowl']
    readers = []
    for i, content in enumerate(texts):
        path = tmp_path / f'{i}.txt'
        path.write_text(content, encoding='utf-8', newline='')
        readers.append(model.score_file(path, segment=3))
    bits = [[], []]
    while any(readers):
        for i, reader in enumerate(readers):
            table = next(reader, None) if reader else None
            if table is None: readers[i] = None
            else: bits[i] += table.bits.tolist()
    for content, found in zip(texts, bits):
        np.testing.assert_allclose(found, model.score(content).bits, rtol=0, atol=1e-9)


@each_model
@pytest.mark.parametrize('state_reset', RESETS)
@pytest.mark.parametrize('cache_reset', RESETS)
def test_a_new_epoch_keeps_what_the_config_says(case, state_reset, cache_reset):
    model = build(case, state_reset=state_reset, cache_reset=cache_reset)
    old = read(model)
    before = copy.deepcopy(old)
    new = model.new_epoch(*old)
    fresh = model.begin(2)
    assert same(before, old)
    assert new[1]['position'] == 0
    for was, now, cold in zip(old, new, fresh):
        assert list(now) == list(cold)
        for name, value in now.items():
            reset = getattr(model.config, model.resets.get(name, ''), None)
            assert same(value, was[name] if reset == 'never' else cold[name]), name

    cold_state, cold_ledger = fresh
    segment, following = segments()[1]
    plan, _ = model.prepare(segment, cold_ledger, following)
    with torch.no_grad(): cold, _ = model(plan, cold_state)
    plan, _ = model.prepare(segment, new[1], following)
    with torch.no_grad(): warm, _ = model(plan, new[0])
    keeps = state_reset == 'never' or (cache_reset == 'never' and 'cache_reset' in vars(model.config))
    assert torch.equal(cold.nats, warm.nats) is not keeps


def every(cls):
    "All subclasses of `cls` that the package defines."
    for sub in cls.__subclasses__():
        if sub.__module__.startswith('hclm_repro'): yield sub
        yield from every(sub)


@pytest.mark.parametrize('cls', dict.fromkeys(every(Config)), ids=lambda cls: cls.__name__)
def test_every_choice_says_what_it_means(cls):
    assert [f.name for f in fields(cls) if not f.metadata.get('doc')] == []


def test_bases_are_not_models():
    for cls in every(LanguageModel):
        assert (cls.Config is None) is (MODELS.get(cls.__name__) is not cls), cls
    for cls in models.values():
        assert issubclass(cls.Config, ModelConfig)
        for verb in ('begin', 'prepare', 'forward'): assert getattr(cls, verb) is not getattr(LanguageModel, verb, None), (cls, verb)
        assert any(getattr(cls, verb) is not getattr(LanguageModel, verb) for verb in ('sample', 'generate')), cls


@each_model
def test_a_mode_is_seen_by_nobody_else(case):
    "Texts scored and written in threads, while another thread switches the mode of the same model to and fro."
    model = build(case, dropout=0.5).train()
    bits, written = model.score(text).bits, model.generate('a', words=3)
    done = threading.Event()

    def switch():
        while not done.is_set(): model.eval(), model.train()

    switching = threading.Thread(target=switch)
    switching.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            scored = [pool.submit(model.score, text, segment) for segment in (None, 3) * 4]
            texts = [pool.submit(model.generate, 'a', words=3) for _ in range(4)]
        for found in scored: np.testing.assert_allclose(found.result().bits, bits, rtol=0, atol=1e-9)
        for found in texts: assert found.result() == written
    finally:
        done.set()
        switching.join()


def test_evaluation_is_asked_of_the_view():
    "Nobody says `with evaluating(model):` and then asks the model, which may be in training."
    sources = [path.read_text(encoding='utf-8') for path in (root/'hclm_repro').glob('*.py')]
    sources += [cell.source for path in notebooks for cell in nbformat.read(path, 4).cells if cell.cell_type == 'code']
    found = [line for source in sources for line in source.splitlines() if re.match(r'\s*with evaluating\(', line)]
    assert found and [line for line in found if not re.search(r'with evaluating\(.*\) as \w+:', line)] == []


@each_case
def test_all_tables_have_the_same_columns(case, tmp_path):
    model = build(case)
    kinds = model.score(text).dtypes
    assert kinds.equals(model.score('').dtypes)
    for table in model.score(['', text, '\n', '☃']): assert kinds.equals(table.dtypes)
    (tmp_path/'empty').write_text('')
    table, = model.score_file(tmp_path/'empty')
    assert kinds.equals(table.dtypes) and len(table) == 0
    unknown, = model.score_tokens([[UNKNOWN, 'a', LINE_END, UNKNOWN]])
    assert kinds.equals(unknown[0].dtypes) and unknown[0].bits[0] == 0
    assert model.score([]) == []


@pytest.mark.parametrize('slots', [0, 3, None])
def test_loops_and_no_loops_say_the_same_in_all_columns(slots):
    loops, fast = (build((name, {}), cache_slots=slots) for name in ('LoopHCLM', 'HCLM'))
    fast.load_state_dict(loops.state_dict())
    tokens = [UNKNOWN, 'to', 'be', UNKNOWN, 'to', LINE_END, 'be', UNKNOWN]
    streams = [tokens, tokens[2:4], []]
    a, b = (next(model.score_tokens(streams)) for model in (loops, fast))
    for left, right in zip(a, b): pd.testing.assert_frame_equal(left, right, rtol=0, atol=1e-12)


bad_texts = None, b'ab', 7, {'a': 'b'}, iter(['a']), ['a', None], '\ud800'
bad_segments = 0, -1, 1.0, True, '3', np.bool_(True), 1 << 70
bad_writing = [dict(words=-3), dict(words=2.0), dict(words=True), dict(words=None), dict(temperature=-1), dict(temperature=np.nan),
               dict(temperature=np.inf), dict(temperature='1'), dict(temperature=None), dict(seed=1 << 64), dict(seed=-(1 << 63) - 1), dict(seed=1.5),
               dict(seed=None), dict(top_p=0), dict(top_p=1.1), dict(top_p=np.nan), dict(stop=''), dict(stop='a b'), dict(stop='a '), dict(stop=b'a'),
               dict(stop=3)]


@each_model
def test_wrong_arguments_are_refused_in_a_sentence(case, tmp_path):
    model = build(case)

    def refused(call, *given, **named):
        with pytest.raises(ValueError, match='; allowed: ') as caught: call(*given, **named)
        assert '\n' not in str(caught.value) and len(str(caught.value)) < 400
    for wrong in bad_texts:
        refused(model.score, wrong)
        refused(model.generate, wrong, words=1)
    for wrong in bad_segments: refused(model.score, 'a', segment=wrong)
    for wrong in bad_writing:
        refused(model.generate, 'a', **wrong)
        refused(model.generate, ['a', 'b'], **wrong)
    for wrong in (3, None, b'name'): refused(next, model.score_file(wrong))
    refused(next, model.score_file(tmp_path))
    if 'longest' in inspect.signature(model.generate).parameters:
        for wrong in (0, True, 4.5): refused(model.generate, 'a', longest=wrong)
    others = [other.Config() for other in models.values() if other.Config is not type(model.config)]
    wider = type('Wider', (type(model.config),), {})()   # it could have fields that are not saved
    for config in (None, {}, wider, *others): refused(type(model), config)


@each_model
def test_numbers_of_numpy_are_numbers(case):
    model = build(case)
    assert model.score(text, np.int64(3)).equals(model.score(text, 3))
    numbers = dict(words=np.int32(2), temperature=np.float32(0.5), seed=np.uint64(3), top_p=np.float64(0.75))
    assert model.generate('a', **numbers) == model.generate('a', words=2, temperature=0.5, seed=3, top_p=0.75)
    config = type(model.config)(units=np.int64(8)) if hasattr(model.config, 'units') else model.config
    json.dumps(asdict(config))


@each_model
@pytest.mark.parametrize('wrong', [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(case, wrong):
    for name, _ in build(case).named_parameters():
        model = build(case)
        with torch.no_grad(): model.get_parameter(name).view(-1)[-1] = wrong
        for call in (model.score, model.generate):
            with pytest.raises(ValueError, match=f'{name}.*; allowed: '): call('a b')


@each_model
def test_predictions_that_are_not_finite_are_refused(case):
    model = build(case)
    model.output.register_forward_hook(lambda module, inputs, logits: logits * np.nan)
    for call in (model.score, lambda prompt: model.generate(prompt, temperature=0), model.generate):
        with pytest.raises(ValueError, match='; allowed: '): call('a b')


def test_temperatures_near_zero_take_the_likeliest():
    logits = torch.tensor([-3.0, -1, -2])
    for temperature in (0, 5e-324, 1e-300, 1e-30): assert Sampler(temperature).draw(logits) == 1
    for wrong in (torch.tensor([1.0, np.nan]), torch.tensor([1.0, np.inf]), torch.tensor([-np.inf, -np.inf])):
        for temperature in (0, 1):
            with pytest.raises(ValueError, match='logit'): Sampler(temperature).draw(wrong)
    with pytest.raises(ValueError, match='probability'): Sampler().toss(np.nan)


@each_case
def test_a_prompt_is_read_in_segments(case, monkeypatch):
    model = randomise(build(case))   # what it writes depends on what it has read
    prompt = ' '.join(corpus.valid.split()[:9]) + '\n☃ the en'
    drawn = []
    draw = Sampler.draw
    monkeypatch.setattr(Sampler, 'draw', lambda self, logits: drawn.append(logits.clone()) or draw(self, logits))
    whole = model.generate(prompt, words=4)
    at_once, drawn[:] = list(drawn), []
    seen = []
    method = 'read_symbols' if hasattr(model, 'read_symbols') else 'prepare'
    original = getattr(type(model), method)

    def watched(self, given, *rest, **named):
        seen.append(len(given if method == 'read_symbols' else given[0]))
        if method == 'read_symbols': named['most'] = 5
        return original(self, given, *rest, **named)
    monkeypatch.setattr(type(model), method, watched)
    for module in ('model', 'writing'): monkeypatch.setattr(f'hclm_repro.{module}.READ_AT_ONCE', 3)
    assert model.generate(prompt, words=4) == whole
    for a, b in zip(at_once, drawn, strict=True): torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    assert method == 'read_symbols' or max(seen) == 3


@each_model
def test_a_prompt_of_one_long_word_is_read_or_refused(case):
    "Bytes that are given are read one by one in HAT: for 100,000 of them that would take hours."
    model = build(case)
    assert isinstance(model.generate('x' * 2000, words=1, **some_bytes(model)), str)
    try: assert isinstance(model.generate('x' * 100_000, words=1, **some_bytes(model)), str)
    except ValueError as error: assert 'bytes; allowed: ' in str(error)


def some_bytes(model): return dict(longest=4) if 'longest' in inspect.signature(model.generate).parameters else {}


def write_forged(folder, contents):
    for file, data in contents.items(): (folder/file).write_bytes(data)


@each_model
def test_only_what_was_saved_is_loaded(case, tmp_path):
    model = build(case)
    model.save_pretrained(tmp_path)
    contents = {file: (tmp_path/file).read_bytes() for file in saving.FILES}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(contents)
    back = load_pretrained(tmp_path)
    assert same(dict(back.state_dict()), dict(model.state_dict())) and back.score(text).equals(model.score(text))
    assert not any(module.training for module in back.modules())
    weights = safetensors.torch.load(contents['model.safetensors'])
    described = json.loads(contents['config.json'])

    def refused(new_sums=True, **changed):
        forged = {**contents, **{file: data for file, data in changed.items()}}
        if new_sums: forged['SHA256SUMS'] = saving.sums(forged)
        write_forged(tmp_path, forged)
        with pytest.raises((ValueError, FileNotFoundError), match='; allowed: ') as caught: load_pretrained(tmp_path)
        assert '\n' not in str(caught.value)
        return str(caught.value)

    def with_weights(tensors): return {'model.safetensors': safetensors.torch.save(tensors)}
    def with_config(**entries): return {'config.json': json.dumps({**described, **entries}).encode()}
    for name, weight in list(weights.items())[::4]:
        rest = {other: tensor for other, tensor in weights.items() if other != name}
        for tensors in (rest, {**rest, f'module.{name}': weight}, {**rest, name: weight[..., :-1].contiguous()}, {**rest, name: weight.float()},
                        {**weights, 'foreign': torch.ones(2)}):
            message = refused(**with_weights(tensors))
            assert 'model.safetensors' in message and ('foreign' in message or name in message)
        shorter = {other: shape for other, shape in described['tensors'].items() if other != name}
        refused(**with_weights(rest), **with_config(tensors=shorter))   # both files agree, the class does not
    for name in described['config']:
        rest = {other: value for other, value in described['config'].items() if other != name}
        assert f'field {name}' in refused(**with_config(config=rest))
        assert 'foreign' in refused(**with_config(config={**described['config'], 'foreign': 1}))
        assert name in refused(**with_config(config={**described['config'], name: [1]}))
    for name in described:
        for value in (None, 2, 'HCL', [], {}, [name]): assert 'config.json' in refused(**with_config(**{name: value}))
    for data in (b'', b'null', b'[]', b'{', b'\xff', b'[' * 100_000): refused(**{'config.json': data})
    for data in (b'', b'null', b'\xff' * 100, contents['model.safetensors'][:-1], contents['model.safetensors'] + b'0'):
        refused(**{'model.safetensors': data})

    rng = np.random.default_rng(0)
    for file, data in contents.items():
        for place in rng.choice(len(data), min(len(data), 60), replace=False):
            flipped = bytearray(data)
            flipped[place] ^= 1 << int(rng.integers(8))
            refused(new_sums=False, **{file: bytes(flipped)})
    for more in (b'\n', b'0' * 64 + b'  README.md\n'): refused(new_sums=False, SHA256SUMS=contents['SHA256SUMS'] + more)
    for file in contents:
        write_forged(tmp_path, contents)
        (tmp_path/file).unlink()
        with pytest.raises(FileNotFoundError, match=f'{file} .*; allowed: '): load_pretrained(tmp_path)
        os.mkfifo(tmp_path/file)
        with pytest.raises(FileNotFoundError, match=f'{file} .*; allowed: '): load_pretrained(tmp_path)
        (tmp_path/file).unlink()
    write_forged(tmp_path, contents)
    assert back.score(text).equals(load_pretrained(tmp_path).score(text))


def test_a_failed_saving_leaves_what_was_there(tmp_path, monkeypatch):
    old, new = build(('HCLM', {})), build(('HCLM', {}), units=16)
    old.save_pretrained(tmp_path/'model')
    (tmp_path/'model'/'record.json').write_text('{}')   # a folder may hold more
    before = {path: path.read_bytes() for path in (tmp_path/'model').iterdir()}
    fail_at = 0
    calls = []

    def failing(original, error):
        def call(*given):
            calls.append(given)
            if len(calls) > fail_at: raise error
            return original(*given)
        return call
    for error in (OSError(28, 'No space left on device'), KeyboardInterrupt()):
        for fail_at in range(3):
            calls.clear()
            with monkeypatch.context() as patch:
                patch.setattr(os, 'fsync', failing(os.fsync, error))
                for folder in ('model', 'deep/down/model'):
                    with pytest.raises(type(error)): new.save_pretrained(tmp_path/folder)
                    calls.clear()
            assert {path: path.read_bytes() for path in (tmp_path/'model').iterdir()} == before
            assert not (tmp_path/'deep').exists()
    for fail_at in (1, 2):   # between two renamings: what is there does not load
        old.save_pretrained(tmp_path/'model')
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, 'replace', failing(os.replace, OSError(5, 'Input/output error')))
            with pytest.raises(OSError, match='; allowed: '): new.save_pretrained(tmp_path/'model')
        with pytest.raises(ValueError, match='; allowed: '): load_pretrained(tmp_path/'model')
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError, match='file .*; allowed: '): new.save_pretrained(tmp_path/'file')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['file', 'model']


def test_a_name_that_is_no_folder_asks_nobody(tmp_path, monkeypatch):
    def asked(*_, **__): raise AssertionError('the network was asked')
    monkeypatch.setattr(saving, 'online', asked)
    monkeypatch.setattr(saving, 'hf_hub_download', asked)
    monkeypatch.chdir(tmp_path)
    for name in ('runs/nope', './nope', '/nope', 'nope', '../nope/model', tmp_path/'nope'):
        with pytest.raises(FileNotFoundError, match='nope.*; allowed: .*hf://'): load_pretrained(name)
    for name in (None, 3, b'nope'):
        with pytest.raises(ValueError, match='; allowed: '): load_pretrained(name)


def test_a_model_of_the_hub_comes_with_its_sums(tmp_path, monkeypatch):
    model = build(('HCLM', {}))
    model.save_pretrained(tmp_path)
    fetched = []

    def download(repository, file, **options):
        fetched.append((repository, file, options))
        return tmp_path/file
    monkeypatch.setattr(saving, 'online', lambda: True)
    monkeypatch.setattr(saving, 'hf_hub_download', download)
    back = hclm_repro.HCLM.from_pretrained('hf://user/owl', revision='v1')
    assert same(dict(back.state_dict()), dict(model.state_dict()))
    assert fetched == [('user/owl', file, dict(local_files_only=False, revision='v1')) for file in saving.FILES]
    with pytest.raises(ValueError, match='of class HCLM; allowed: CharLSTM'): hclm_repro.CharLSTM.from_pretrained(tmp_path)


def test_tied_weights_stay_tied(tmp_path):
    class Tied(models['HCLM']):
        "The same LSTM reads and writes."
        def __init__(self, config: models['HCLM'].Config):
            super().__init__(config)
            self.decoder = self.encoder
    try:
        model = build(('Tied', {}), Tied)
        model.save_pretrained(tmp_path)
        back = load_pretrained(tmp_path)
        assert back.decoder is back.encoder and back.score(text).equals(model.score(text))
        with evaluating(model.train()) as view: assert view.decoder is view.encoder and not view.encoder.training
    finally: MODELS.pop('Tied')


def test_other_choices_keep_weights_and_mode():
    model = build(('HCLM', {}))
    for training in (True, False): assert with_choices(model.train(training), cache_slots=1).training is training
    for choices in (dict(cache_slots=0), dict(score='additive'), dict(units=9)):
        with pytest.raises(ValueError, match='; allowed: '): with_choices(model, **choices)


@pytest.mark.parametrize('wrong', ['aab', 'a b', 'a\n', 'a\ud800'])
def test_alphabets_that_no_text_has_are_refused(wrong):
    for kind in (Alphabet, lambda alphabet: hclm_repro.HCLMConfig(alphabet=alphabet)):
        with pytest.raises(ValueError, match='alphabet.*; allowed: '): kind(wrong)


@pytest.mark.parametrize('cls', dict.fromkeys(every(Config)), ids=lambda cls: cls.__name__)
def test_settings_that_are_not_finite_are_refused(cls):
    kinds = typing.get_type_hints(cls)
    for f in fields(cls):
        for wrong in (np.nan, np.inf, -np.inf, 10 ** 400, True if kinds[f.name] is not bool else 1):
            with pytest.raises(ValueError, match=f'{f.name} .*; allowed: '): replace(cls(), **{f.name: wrong})
