import os, subprocess, sys, time
from pathlib import Path

import pytest, torch
from common import root, run
from hclm_repro.training import read_checkpoint
from test_kill import same

program = '''
import os, sys, torch
from hclm_repro import HCLM, HCLMConfig, TrainingConfig, build, load_corpus, train
folder, lanes, dropout, signal_at = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
updates, lr = int(sys.argv[5]), float(sys.argv[6])
corpus = load_corpus('synthetic')
training = TrainingConfig(lanes=lanes, word_budget=lanes * 6 * updates, evaluations=2, curve_words=200, sample_words=4,
                          save_seconds=0, log_every=1, score_valid=False, lr=lr)
config = HCLMConfig(units=12, embedding=5, dropout=dropout, segment_words=6, cache_slots=20, cache_reset='never')

def watch(run):
    if run.step == signal_at: os._exit(3)

record = train(build(HCLM, config, corpus, training).double(), corpus, training, folder, watch)
assert record['processes'] == int(os.environ.get('WORLD_SIZE', 1)), record['processes']
print(record['steps']['bpc'][-1])
'''


@pytest.fixture
def trained(tmp_path):
    script = tmp_path/'program.py'
    script.write_text(program)

    def train(name, processes=1, lanes=5, dropout=0.0, signal_at=-1, updates=20, lr=3e-3, fails=False, waits=True):
        starter = ['torchrun', '--standalone', '--nproc-per-node', str(processes)] if processes > 1 else ['python']
        arguments = [script, tmp_path/name, lanes, dropout, signal_at, updates, lr]
        command = [*starter, *map(str, arguments)]
        env = dict(PYTHONPATH=str(root), TQDM_DISABLE='1')
        if not waits:
            command[0] = str(Path(sys.executable).parent/command[0])
            return subprocess.Popen(command, cwd=root, env={**os.environ, **env}, stderr=subprocess.DEVNULL)
        done = run(*command, cwd=root, **env)
        if fails: return done
        assert done.returncode == 0, done.stderr[-3000:]
        return read_checkpoint(tmp_path/name/'checkpoint.pt')
    return train


def test_two_processes_train_what_one_trains(trained):
    one, two = trained('one'), trained('two', processes=2)
    assert one['step'] == two['step'] == 20 and one['words_read'] == two['words_read']
    for name, weight in one['model'].items():
        assert (weight - two['model'][name]).abs().max() <= 1e-10 * weight.abs().max(), name
    assert two['steps']['bpc'] == pytest.approx(one['steps']['bpc'], abs=1e-5)
    assert [p['valid_bpc'] for p in two['curve']] == pytest.approx([p['valid_bpc'] for p in one['curve']], abs=1e-9)
    whole, = one['parts']
    for name in ('h', 'c'):
        dealt = torch.cat([part['state'][name] for part in two['parts']])
        assert (whole['state'][name] - dealt).abs().max() < 1e-10, name
    assert whole['ledger']['held'] == [held for part in two['parts'] for held in part['ledger']['held']]


def test_two_processes_stop_and_go_on_bit_by_bit(trained):
    whole = trained('whole', processes=2, dropout=0.3)
    assert trained('stopped', processes=2, dropout=0.3, signal_at=10, fails=True).returncode != 0
    stopped = trained('stopped', processes=2, dropout=0.3)
    assert (whole['resumed'], stopped['resumed']) == (0, 1)
    assert not same(*(part['random'] for part in whole['parts']))   # other lanes, other dropout
    for name in ('model', 'optimizer', 'parts', 'steps', 'best_weights'): assert same(whole[name], stopped[name]), name


def test_another_number_of_processes_is_refused(trained):
    trained('two', processes=2, signal_at=10, fails=True)
    done = trained('two', fails=True)
    assert 'holds a run with processes = 2, not 1' in done.stderr.strip().splitlines()[-1]


def test_more_processes_than_lanes_are_refused(trained):
    done = trained('few', processes=2, lanes=1, fails=True)
    assert 'allowed: at most as many processes as lanes' in done.stderr


def alive(pid):
    "Whether a process runs; one that has ended and was not asked how does not."
    try: return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except FileNotFoundError: return False


def children(pid):
    try: return Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    except FileNotFoundError: return []


def test_a_killed_torchrun_takes_its_processes_along(trained, tmp_path):
    checkpoint = tmp_path/'orphans'/'checkpoint.pt'
    process = trained('orphans', processes=2, updates=100_000, waits=False)
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.05)
    workers = children(process.pid)
    process.kill()
    process.wait()
    assert len(workers) == 2
    while any(map(alive, workers)): time.sleep(0.05)   # a test that hangs has failed
    assert not checkpoint.with_name('record.json').exists()
    resumed = trained('orphans', processes=2, updates=100_000, signal_at=read_checkpoint(checkpoint)['step'] + 5, fails=True)
    assert resumed.returncode != 0 and read_checkpoint(checkpoint)['resumed'] == 1


def test_a_second_torchrun_is_refused_and_the_first_goes_on(trained, tmp_path):
    checkpoint = tmp_path/'shared'/'checkpoint.pt'
    process = trained('shared', processes=2, updates=100_000, waits=False)
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.05)
    for processes in (1, 2):
        refused = trained('shared', processes=processes, updates=100_000, fails=True)
        assert refused.returncode != 0
        assert f"{tmp_path/'shared'} is in use by another process; allowed: another folder" in refused.stderr
    step = read_checkpoint(checkpoint)['step']
    while read_checkpoint(checkpoint)['step'] == step: assert process.poll() is None
    process.terminate()
    process.wait()


def test_a_number_that_is_not_finite_stops_all_processes(trained, tmp_path):
    done = trained('wild', processes=2, lr=1e30, fails=True)
    assert done.returncode != 0
    assert 'FloatingPointError: the ' in done.stderr and 'allowed: a finite number' in done.stderr
    assert all(weight.isfinite().all() for weight in read_checkpoint(tmp_path/'wild'/'checkpoint.pt')['model'].values())
