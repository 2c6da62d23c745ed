"""Many threads score one model while another thread trains a copy of it: every bit is as in peace."""
import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from common import many

from hclm_repro import TrainingConfig, build, synthetic, train
from hclm_repro.model import MODELS

CALLS = many(80, 1_000)
corpus = synthetic((1_500, 150, 10))


class Enough(Exception): pass


def trained(cls, folder, watch=None, words=240):
    sizes = dict(units=16, dropout=0.5, segment_words=6)
    if cls is MODELS['HCLM']: sizes.update(embedding=8, cache_slots=20)
    else: sizes.update(layers=1, heads=2, byte_units=8, byte_layers=1, byte_heads=2)
    training = TrainingConfig(lanes=4, word_budget=words, evaluations=max(1, words // 240), curve_words=60, sample_words=3, min_count=5,
                              save_seconds=0, threads=1)
    model = build(cls, cls.Config(**sizes), corpus, training)
    train(model, corpus, training, folder, watch)
    return model


def modes(model): return [module.training for module in model.modules()]


@pytest.mark.parametrize('name', ['HCLM', 'HAT'])
@pytest.mark.parametrize('training', [False, True], ids=['evaluating', 'training'])
def test_threads(name, training, tmp_path, counted):
    model = trained(MODELS[name], tmp_path/'first')
    assert not any(modes(model))   # as `train` leaves it
    words = corpus.valid.split()
    texts = [' '.join(words[i:i + 6 + i % 5]) for i in range(0, 60, 6)]
    peaceful = copy.deepcopy(model).eval()
    expected = [peaceful.score(text) for text in texts]
    said = peaceful.generate(texts[0], words=3)
    model.train(training)
    before = modes(model)

    done = threading.Event()
    def enough(run):
        if done.is_set(): raise Enough
    trainings = []
    def keep_training():
        while not done.is_set():
            try: trained(MODELS[name], tmp_path/f'other{len(trainings)}', enough, words=24_000)
            except Enough: pass
            trainings.append(True)
    def score(number):
        place = number % len(texts)
        if number % 10 == 3: return model.generate(texts[0], words=3) == said
        return model.score(texts[place]).equals(expected[place])

    trainer = threading.Thread(target=keep_training)
    trainer.start()
    try:
        with ThreadPoolExecutor(8) as pool: right = list(pool.map(score, range(CALLS // 4)))
    finally:
        done.set()
        trainer.join()
    assert all(right) and len(right) == CALLS // 4 and trainings
    assert modes(model) == before
    counted('calls from eight threads beside a training', len(right))
