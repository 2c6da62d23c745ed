import os, random, signal, subprocess, sys, time

import torch
from common import root
from hclm_repro.training import read_checkpoint

program = '''
import sys
from concurrent.futures import ThreadPoolExecutor
from hclm_repro import HCLM, HCLMConfig, TrainingConfig, build, load_corpus, train
from hclm_repro.training import TrainingRun
if sys.argv[2] == 'ahead': TrainingRun.planner = lambda run: ThreadPoolExecutor(1)
corpus = load_corpus('synthetic')
training = TrainingConfig(lanes=4, word_budget=4 * 6 * 60, evaluations=3, curve_words=200, sample_words=4, save_seconds=0, score_valid=False)
config = HCLMConfig(units=12, embedding=5, dropout=0.2, segment_words=6, cache_slots=20)
train(build(HCLM, config, corpus, training), corpus, training, sys.argv[1])
'''


def start(folder, way):
    env = {**os.environ, 'TQDM_DISABLE': '1', 'PYTHONPATH': str(root)}
    return subprocess.Popen([sys.executable, '-c', program, str(folder), way], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finished(folder, way):
    process = start(folder, way)
    assert process.wait(3600) == 0, process.stderr.read().decode()[-2000:]
    return read_checkpoint(folder/'checkpoint.pt')


def same(a, b):
    if torch.is_tensor(a): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_killed_runs_go_on_bit_by_bit(tmp_path):
    "Those that are killed prepare the next segment in a thread, as on a card; the one that is left alone does not."
    dice, checkpoint, steps = random.Random(0), tmp_path/'killed'/'checkpoint.pt', []
    for _ in range(6):
        process, before = start(tmp_path/'killed', 'ahead'), checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while process.poll() is None and not (checkpoint.exists() and checkpoint.stat().st_mtime_ns > before): time.sleep(0.002)
        time.sleep(dice.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        steps.append(read_checkpoint(checkpoint)['step'])
    assert sorted(steps) == steps and 0 < steps[0] < steps[-1]
    killed, whole = finished(tmp_path/'killed', 'ahead'), finished(tmp_path/'whole', 'alone')
    for log in killed['curve'], whole['curve']:
        for row in log: row.pop('seconds')
    assert steps[-1] < whole['step']
    assert (killed.pop('resumed'), whole.pop('resumed')) == (len(steps), 0)
    assert not [k for k in whole if k != 'seconds' and not same(killed[k], whole[k])]
