"""The thread that prepares the next segment while a card computes: the same numbers, and gone when the run has ended."""
import random, threading, traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_kill import same
from test_models import build, corpus, models
from tqdm import tqdm

from hclm_repro import training
from hclm_repro.model import Plan
from hclm_repro.training import TrainingConfig, TrainingRun, read_checkpoint, train

short = replace(corpus, train=' '.join(corpus.words('train')[:100]))
quick = TrainingConfig(lanes=2, epochs=2, word_budget=None, evaluations=1, curve_words=20, sample_words=1, log_every=3,
                       save_seconds=0, threads=1, min_count=5, score_valid=False)
each_model = pytest.mark.parametrize('name', models)


class Stop(Exception): pass


@pytest.fixture
def ahead(monkeypatch):
    "Runs have the thread on a CPU, too. What is prepared there, by thread and update: `planned`."
    planned, plan = [], TrainingRun.plan

    def noted(run, segment, ledger):
        planned.append((threading.current_thread() is threading.main_thread(), run.step))
        return plan(run, segment, ledger)

    monkeypatch.setattr(tqdm, 'monitor_interval', 0)   # the bar has a thread of its own, which lives on
    monkeypatch.setattr(TrainingRun, 'planner', lambda run: ThreadPoolExecutor(1))
    monkeypatch.setattr(TrainingRun, 'plan', noted)
    before = threading.enumerate()
    yield planned
    assert threading.enumerate() == before


def fresh(name, **choices):
    lasting = dict(state_reset='never', cache_reset='never')
    return build((name, lasting), segment_words=9, **choices).float()


def trained(name, folder, watch=None, config=quick):
    train(fresh(name), short, config, folder, watch)
    checkpoint = read_checkpoint(folder/'checkpoint.pt')
    for point in checkpoint['curve']: point.pop('seconds')
    return {key: value for key, value in checkpoint.items() if key not in ('seconds', 'resumed')}


def differences(a, b): return [key for key in a if not same(a[key], b[key])]


def stop_at(step):
    def watch(run):
        if run.step == step: raise Stop
    return watch


@each_model
def test_the_thread_changes_nothing(name, tmp_path, request):
    "Two epochs with dropout; stopped within an epoch, before, at and after its end, and resumed."
    alone = trained(name, tmp_path/'alone')
    epoch = alone['step'] // 2
    assert epoch > 4
    planned = request.getfixturevalue('ahead')
    assert not differences(alone, trained(name, tmp_path/'whole'))
    assert [step for here, step in planned if here] == [0, epoch]
    assert len([step for here, step in planned if not here]) == 2 * epoch - 2   # the update may be ahead of the thread
    for step in (2, epoch - 1, epoch, epoch + 1) if name == 'HCLM' else (epoch - 1,):
        with pytest.raises(Stop): trained(name, tmp_path/str(step), stop_at(step))
        assert read_checkpoint(tmp_path/str(step)/'checkpoint.pt')['step'] == step
        assert not differences(alone, trained(name, tmp_path/str(step)))


def test_nothing_is_prepared_after_the_end(ahead, tmp_path):
    "Of a run that ends within an epoch."
    trained('HCLM', tmp_path, config=replace(quick, epochs=None, word_budget=4 * 18))
    assert ahead == [(True, 0), (False, 0), (False, 1), (False, 2)]


def test_on_a_cpu_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(training, 'ThreadPoolExecutor', None)
    trained('HCLM', tmp_path)


places = [(TrainingRun, 'next_segment'), (TrainingRun, 'plan'), (training.Updater, 'update'), (TrainingRun, 'after'),
          (TrainingRun, 'add_point'), (TrainingRun, 'write'), (TrainingRun, 'show')]

@pytest.mark.parametrize('error', [Stop, KeyboardInterrupt])
@pytest.mark.parametrize('owner, name', places, ids=[name for _, name in places])
def test_the_thread_ends_with_the_run(owner, name, error, ahead, tmp_path, monkeypatch):
    "Wherever an error or Ctrl-C ends that, the third time the run comes to the place. The fixture looks for the thread."
    calls, whole = [], getattr(owner, name)

    def fail(*arguments, **options):
        calls.append(name)
        if len(calls) == 3: raise error
        return whole(*arguments, **options)

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(error): trained('HCLM', tmp_path, config=replace(quick, evaluations=5))
    assert [step for here, step in ahead if not here]


def test_what_goes_wrong_in_the_thread_is_raised(ahead, tmp_path, monkeypatch):
    "With its own traceback, at the update that needs the plan: the one before has been saved. It can be mended, and resumed."
    alone = trained('HCLM', tmp_path/'alone')
    prepare = models['HCLM'].prepare

    def stumble(model, segment, ledger, following=None):
        if ledger['position'] == 27: raise KeyError('a word without a number')
        return prepare(model, segment, ledger, following)

    monkeypatch.setattr(models['HCLM'], 'prepare', stumble)
    with pytest.raises(KeyError) as caught: trained('HCLM', tmp_path/'stumbled')
    names = [call.name for call in traceback.extract_tb(caught.value.__traceback__)]
    assert names[-1] == 'stumble' and 'advance' in names
    assert read_checkpoint(tmp_path/'stumbled'/'checkpoint.pt')['step'] == 3
    monkeypatch.setattr(models['HCLM'], 'prepare', prepare)
    assert not differences(alone, trained('HCLM', tmp_path/'stumbled'))


@each_model
def test_a_plan_draws_nothing_and_has_no_gradient(name, tmp_path):
    run = TrainingRun(fresh(name), short, quick, tmp_path)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    plan, _ = run.plan(run.lanes[0], run.ledger)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1]) and states[2] == random.getstate()
    assert not [tensor for tensor in tensors_of(plan) if tensor.requires_grad]


def tensors_of(value):
    "The tensors of a plan, of plans within it and of lists of them."
    if torch.is_tensor(value): return [value]
    inner = value if isinstance(value, list) else vars(value).values() if isinstance(value, Plan) else ()
    return [tensor for part in inner for tensor in tensors_of(part)]


@each_model
def test_a_plan_for_a_card_is_pinned(name, tmp_path, monkeypatch):
    "All of its tensors, on the card of the run: a new thread would take the first one."
    run = TrainingRun(fresh(name), short, quick, tmp_path)
    plan, _ = run.plan(run.lanes[0], run.ledger)
    pinned, cards = [], []

    def pin(tensor):
        pinned.append(tensor.clone())
        return pinned[-1]

    def on(device):
        cards.append(device)
        return nullcontext()

    monkeypatch.setattr(torch.Tensor, 'pin_memory', pin)
    monkeypatch.setattr(torch.cuda, 'device', on)
    run.device = torch.device('cuda', 1)
    there, _ = run.plan(run.lanes[0], run.ledger)
    assert cards == [run.device] and type(there) is type(plan)
    assert [id(tensor) for tensor in tensors_of(there)] == list(map(id, pinned)) and len(pinned) == len(tensors_of(plan))
    assert all(map(torch.equal, tensors_of(plan), pinned))
