"""A training run is killed anywhere, and within its writes, and goes on to the same bits."""
import random, signal, time

import pytest
from children import Calm, Child, same
from common import many

MODELS = ['HCLM', 'CharLSTM']
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
KILLS = 5   # of each run


@pytest.fixture(scope='module')
def calm(tmp_path_factory):
    runs = {}
    def of(model):
        if model not in runs: runs[model] = Calm(tmp_path_factory.mktemp('calm')/'run', model=model)
        return runs[model]
    return of


@pytest.mark.parametrize('number', range(many(2, 20)))
def test_killed_anywhere(number, calm, tmp_path, counted):
    dice = random.Random(number)
    model = MODELS[number % len(MODELS)]
    quiet = calm(model)
    pause = quiet.seconds / len(quiet.ticks)
    kills = folders = 0
    while kills < KILLS:
        folders += 1
        folder = tmp_path/f'run{folders}'
        finished = False
        while kills < KILLS and not finished:
            child = Child(folder, model=model)
            child.wait_for_tick(dice.randint(1, len(quiet.ticks) // 4))
            time.sleep(dice.random() * 2 * pause)
            child.signal(dice.choice(SIGNALS))
            finished = child.wait() == 0
            kills += not finished
        same(Child(folder, model=model).finished(), quiet, folder)
    counted('kills at random', kills)


def within(number, ticks):
    "A place among the changes of files: a tick, and how many bytes are still written there, None for none."
    dice = random.Random(number)
    changes = [i for i, name in enumerate(ticks, 1) if name != 'update']
    share = len(changes) / many(4, 20)
    tick = changes[int((number + dice.random()) * share)]
    early = tick < changes[-len(changes) // 4]   # enough is written after it
    size = int(2 ** dice.uniform(0, 12)) if number % 2 and early else None
    return tick, size


@pytest.mark.parametrize('number', range(many(4, 20)))
def test_killed_within_a_write(number, calm, tmp_path, counted):
    quiet = calm('HCLM')
    folder = tmp_path/'run'
    tick, size = within(number, quiet.ticks)
    at = (tick, 'signal', signal.SIGKILL) if size is None else (tick, 'cut', size)
    assert Child(folder, at=at).wait() in (-signal.SIGKILL, -signal.SIGXFSZ)
    same(Child(folder).finished(), quiet, folder)
    counted('kills aimed at the writes')
