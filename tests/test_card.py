"""What a card asks of every model, tested without one: no step looks at a value, no tensor lies on another device."""
from collections import Counter

import pytest
import torch
from card import CARD, Card, CardTensor, is_card, on_card, plain
from test_models import build, cases, corpus, described, models, segments, text
from torch.utils._pytree import tree_leaves, tree_map_only

from hclm_repro.bench import launches
from hclm_repro.cache import PointerCache
from hclm_repro.corpus import Lanes, segment_characters
from hclm_repro.machine import autocast, few_calls, multiplies_bf16
from hclm_repro.model import randomise
from hclm_repro.run1 import HCLMConfig
from hclm_repro.training import TrainingConfig, Updater, train

def ways():
    "Each case as on a CPU, and, where that is another program, as on a CUDA card."
    for case in cases:
        yield pytest.param(case, False, id=described(case))
        if case[0] in ('HCLM', 'CharLSTM', 'HAT'): yield pytest.param(case, True, id=f'{described(case)}-few-calls')


each_way = pytest.mark.parametrize('case, asked', list(ways()))
each_model = pytest.mark.parametrize('name', models)


def losses(model, device):
    "The nats of three segments on `device`, whose gradients are left in the model; the last state; what a card has seen."
    torch.manual_seed(0)   # words that are hidden from the lexicon are drawn
    state, ledger = model.begin(2)
    nats, seen = [], Counter()
    for segment, following in segments():
        plan, ledger = model.prepare(segment, ledger, following)
        plan = plan.to(device)
        CardTensor.seen.clear()
        predictions, state = model(plan, state, reuse=True)
        predictions.nats.sum().backward()
        nats.append(predictions.nats.detach())
        seen += CardTensor.seen
    return nats, state, seen


def tensors(value): return [leaf for leaf in tree_leaves(value) if torch.is_tensor(leaf)]


@each_way
def test_no_value_is_looked_at(case, asked):
    "On `meta` tensors have a shape and no value."
    model = build(case).to('meta').train()
    with few_calls(asked): nats, state, _ = losses(model, 'meta')
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and {tensor.device.type for tensor in tensors([nats, state, grads])} == {'meta'}
    assert [tuple(n.shape) for n in nats] == [(2, 4)] * 3
    on_cpu = build(case).train()
    losses(on_cpu, 'cpu')
    assert [p.grad is None for p in model.parameters()] == [p.grad is None for p in on_cpu.parameters()]


def test_the_pretend_card_is_strict():
    with Card():
        a = torch.arange(6., device=CARD).view(2, 3)
        for mixed in (lambda: a + torch.ones(3), lambda: torch.ones(2) @ a, lambda: a[:, torch.tensor([0, 2])],
                      lambda: torch.cat([a, torch.ones(1, 3)]), lambda: torch.where(a > 2, a, torch.ones(3))):
            with pytest.raises(RuntimeError, match='card and CPU'): mixed()
        assert (a + torch.tensor(1.)).device == CARD and (2 * a).sum().device == CARD
        looks = [lambda: a.sum().item(), lambda: bool(a[0, 0]), lambda: a.tolist(), lambda: a[a > 2], lambda: a.nonzero(),
                 lambda: a.numpy(), lambda: torch.equal(a, a), lambda: f'{float(a[1, 1])}', lambda: a.unique()]
        for look in looks:
            CardTensor.seen.clear()
            look()
            assert CardTensor.seen['waits'] > 0
        CardTensor.seen.clear()
        assert torch.equal(a.cpu(), torch.arange(6.).view(2, 3)) and type(a.cpu()) is torch.Tensor
        assert CardTensor.seen['down'] == 2
        b = torch.ones(2).to(CARD).requires_grad_()
        (b * b).sum().backward()
        assert isinstance(b.grad, CardTensor) and plain(b.grad).tolist() == [2, 2]


@each_way
def test_a_card_gives_the_numbers_of_the_cpu(case, asked):
    model, twin = build(case, dropout=0.0).train(), build(case, dropout=0.0).train()
    with few_calls(asked):
        nats, state, _ = losses(model, 'cpu')
        with Card(): found, after, seen = losses(twin.to(CARD), CARD)
    gradients = [[p.grad for p in m.parameters()] for m in (model, twin)]
    for a, b in zip(tensors([nats, state, gradients[0]]), tensors([found, after, gradients[1]]), strict=True):
        assert isinstance(b, CardTensor) and torch.equal(a, plain(b))
    assert seen['waits'] == seen['down'] == 0
    if case[0] != 'LoopHCLM': assert seen['up'] == 0   # the loops send each word by itself


@pytest.mark.parametrize('case', [way.values[0] for way in ways() if way.values[1]], ids=described)
def test_few_calls_give_the_same_numbers(case):
    results = []
    for chosen in (False, True):
        model = build(case, dropout=0.0).train()
        with few_calls(chosen): nats, state, _ = losses(model, 'cpu')
        results.append(tensors([nats, state, [p.grad for p in model.parameters()]]))
    for a, b in zip(*results, strict=True): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@each_model
def test_a_card_scores_and_writes(name):
    model, twin = build((name, {})), build((name, {}))
    with Card():
        twin.to(CARD)
        assert twin.score(text, segment=5).equals(model.score(text, segment=5))
        assert twin.generate('a b', words=2, seed=3) == model.generate('a b', words=2, seed=3)


class Killed(Exception): pass


@each_model
def test_a_run_on_a_card_is_killed_and_resumed(name, tmp_path, monkeypatch):
    config = TrainingConfig(lanes=2, word_budget=64, evaluations=2, curve_words=40, sample_words=1, log_every=3,
                            save_seconds=0, threads=1, min_count=5)
    load = torch.load

    def load_there(path, map_location=None, **options):
        loaded = load(path, map_location='cpu', **options)
        return tree_map_only(torch.Tensor, on_card, loaded) if is_card(map_location) else loaded

    def kill(run):
        assert run.coming   # the thread is at work
        if run.step == 3: raise Killed

    monkeypatch.setattr(torch, 'load', load_there)
    model = build((name, {}), dropout=0.0).float()
    record = train(model, corpus, config, tmp_path/'cpu')
    with Card():
        twin = build((name, {}), dropout=0.0).float().to(CARD)
        with pytest.raises(Killed): train(twin, corpus, config, tmp_path/'card', watch=kill)
        twin = build((name, {}), dropout=0.0).float().to(CARD)
        found = train(twin, corpus, config, tmp_path/'card')
    assert found['resumed'] == 1 and found['updates'] == record['updates'] > 3
    assert found['steps'] == record['steps']
    for a, b in zip(record['curve'], found['curve'], strict=True):
        assert (a['valid_bpc'], a['sample']) == (b['valid_bpc'], b['sample'])
    assert found['valid']['bits'] == record['valid']['bits']
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert isinstance(b, CardTensor) and torch.equal(a, plain(b))


@pytest.mark.parametrize('score', ['dot', 'additive'])
def test_large_scores_do_not_overflow_in_float16(score):
    cache = randomise(PointerCache(HCLMConfig(units=600, cache_slots=40, score=score)))
    plan, held = cache.plan([[f'w{i}' for i in range(40)]], [{}])
    keys = 1 - torch.rand(1, 40, 600) / 8
    again, _ = cache.plan([['w3', 'w3', 'w9']], held)
    contexts = (keys[:, :3] + 0.1).requires_grad_()
    with torch.no_grad():
        cache.query.weight.copy_(200 * torch.eye(600))
        if score == 'additive':
            cache.key.weight.copy_(3 * torch.eye(600))
            cache.energy.weight.fill_(150)
    assert cache.slot_scores(contexts, keys).abs().max() > torch.finfo(torch.float16).max
    with autocast(torch.device('cpu'), 'fp16'): source, _ = cache(contexts, keys, again)
    gradients = torch.autograd.grad(source.log_p.sum(), [contexts, *cache.query.parameters()])
    assert all(tensor.isfinite().all() for tensor in (source.log_p, *gradients))


@each_model
def test_half_precision_changes_few_bits(name):
    "The bits of a model after some training, in float32 and with products in half precision."
    if name == 'LoopHCLM' and not multiplies_bf16(torch.device('cpu')): pytest.skip("oneDNN's LSTM needs a processor with bf16")
    model = build((name, {}), dropout=0.0).float()
    updater = Updater(model, TrainingConfig(lr=1e-2))
    state, ledger = model.begin(4)
    lanes = Lanes(corpus.words('train'), 4, model.config.segment_words)
    totals = Counter()
    for segment in list(lanes)[:12]:
        plan, ledger = model.prepare(segment, ledger)
        _, state = updater.update(model, plan, state, segment_characters(segment))
    for precision in ('fp32', 'bf16', 'fp16'):
        state, ledger = model.begin(4)
        for segment in list(lanes)[12:24]:
            plan, ledger = model.prepare(segment, ledger)
            with torch.no_grad(), autocast(model.device, precision): predictions, state = model(plan, state)
            totals[precision] += predictions.nats.double().sum().item()
    assert totals['bf16'] == pytest.approx(totals['fp32'], rel=5e-3)
    assert totals['fp16'] == pytest.approx(totals['fp32'], rel=5e-3)


each_fast = pytest.mark.parametrize('name', [name for name in models if name != 'LoopHCLM'])   # oneDNN's LSTM cannot


@each_fast
def test_gradients_are_clipped_as_they_are(name):
    "Not as they are scaled."
    norms, gradients = [], []
    for precision in ('fp32', 'fp16'):
        model = build((name, {}), dropout=0.0).float().train()
        updater = Updater(model, TrainingConfig(clip=0.5), precision)
        updater.scaler.load_state_dict(dict(updater.scaler.state_dict(), scale=2.0**10) if precision == 'fp16' else {})
        state, ledger = model.begin(2)
        plan, _ = model.prepare(segments()[0][0], ledger)
        updater.update(model, plan, state, 20)
        flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        gradients.append(flat)
        norms.append(flat.norm().item())
    assert norms == pytest.approx([0.5, 0.5], rel=1e-3)
    assert (gradients[0] - gradients[1]).norm() < 0.02


@each_fast
def test_loss_scaling_backs_off_and_recovers(name):
    "Where the scaled gradient of an update overflows, the weights stay and the scale is halved; later it grows again."
    model = build((name, {}), dropout=0.0).float().train()
    updater = Updater(model, TrainingConfig(lr=1e-2), precision='fp16')
    updater.scaler.load_state_dict(dict(updater.scaler.state_dict(), scale=2.0**26, growth_interval=4))
    state, ledger = model.begin(4)
    losses, scales = [], []
    lanes = list(Lanes(corpus.words('train'), 4, model.config.segment_words))
    for segment in 2 * lanes:
        plan, ledger = model.prepare(segment, ledger)
        before = [p.detach().clone() for p in model.parameters()]
        scale = updater.scaler.get_scale()
        loss, state = updater.update(model, plan, state, segment_characters(segment))
        kept = all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
        assert kept == (updater.scaler.get_scale() < scale)
        assert all(p.isfinite().all() for p in model.parameters())
        losses.append(loss.item())
        scales.append(updater.scaler.get_scale())
    lowest = scales.index(min(scales))
    assert scales[0] < 2.0**26 and max(scales[lowest:]) > scales[lowest]
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize('case', [case for case in cases if case[0] in ('HCLM', 'CharLSTM', 'HAT')], ids=described)
def test_launches_are_few(case):
    "Of an update on a card, whatever the choices; of HAT with one layer in each of its stacks."
    model = build(case).float()
    tokens = corpus.words('train')
    calls, copies = launches(model, tokens, lanes=4)
    most = 500 if case[0] == 'HAT' else 300
    if case[1].get('lexicon_words'): most = 400
    assert calls.total() <= most and copies < 40
    assert launches(model, tokens, lanes=8)[0].total() == calls.total()
    assert launches(model, tokens, lanes=4, few=False)[0].total() > calls.total()
