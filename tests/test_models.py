"""What every model promises, whichever it is. A model that is added to the package is tested without being named here."""
import copy, importlib, json, pkgutil
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
import torch

import hclm_repro
from hclm_repro.corpus import synthetic
from hclm_repro.model import MODELS, RESETS, Config, LanguageModel, ModelConfig, Plan, Sampler, load_pretrained
from hclm_repro.text import LINE_END, PADDING, UNKNOWN

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
