"""Runs in processes of their own: from a plain script, with errors, and when somebody stops them."""
import json, os, signal, subprocess, sys, time

from common import root
from test_processes import alive, children

program = '''
import sys
from pathlib import Path
from hclm_repro import HCLM, HCLMConfig, Job, TrainingConfig, synthetic, train_all
folder, processes, lr, words = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
corpus = synthetic((3_000, 300, 300))
training = dict(lanes=4, word_budget=words, evaluations=2, curve_words=200, sample_words=4, save_seconds=0)
config = HCLMConfig(units=12, embedding=5, dropout=0.2, segment_words=6, cache_slots=20)
jobs = [Job(HCLM, config, corpus, TrainingConfig(**training, seed=seed, lr=lr), folder/str(seed)) for seed in (0, 1, 2)]
watched = set()
def watch(run):
    watched.add((run.folder.name, run.step))
    print('watched', run.folder.name, run.step, flush=True)
records = train_all(jobs, watch, processes)
assert [r['identity']['training']['seed'] for r in records] == [0, 1, 2]
assert {name for name, _ in watched} == {'0', '1', '2'} or not watched
'''


def start(tmp_path, *arguments):
    script = tmp_path/'program.py'
    script.write_text(program)   # it has no `if __name__ == '__main__'`, and needs none
    env = {**os.environ, 'PYTHONPATH': str(root), 'TQDM_DISABLE': '1'}
    def listen_to_ctrl_c(): signal.signal(signal.SIGINT, signal.SIG_DFL)   # a job in the background is born deaf to it
    return subprocess.Popen([sys.executable, script, *map(str, arguments)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=listen_to_ctrl_c)


def done(tmp_path, *arguments):
    process = start(tmp_path, *arguments)
    output, errors = process.communicate()
    return process.returncode, output, errors


def records(folder):
    "Records of a folder without what a clock or a process decides."
    found = {}
    for path in sorted(folder.glob('*/record.json')):
        record = json.loads(path.read_text())
        for name in ('train_seconds', 'words_per_second', 'characters_per_second', 'peak_megabytes', 'checksum'): record.pop(name)
        for row in [*record['curve'], record['valid']]: row.pop('seconds')
        found[path.parent.name] = record
    return found


def test_side_by_side_is_one_after_another_to_the_bit(tmp_path):
    for name, processes in ('together', 2), ('alone', 1):
        code, output, errors = done(tmp_path, tmp_path/name, processes, 4e-3, 1200)
        assert code == 0, errors[-3000:]
        assert 'watched 2 50' in output
    together, alone = records(tmp_path/'together'), records(tmp_path/'alone')
    assert list(together) == list(alone) == ['0', '1', '2']
    for seed in alone:
        assert not [name for name in alone[seed] if together[seed][name] != alone[seed][name]]


def test_an_error_in_a_run_is_the_error_of_all(tmp_path):
    code, _, errors = done(tmp_path, tmp_path/'wild', 2, 1e30, 1200)
    assert code != 0
    last = errors.strip().splitlines()[-1]
    assert last.startswith('FloatingPointError: the ') and 'allowed: a finite number' in last


def test_an_interrupt_ends_the_workers_and_they_resume(tmp_path):
    process = start(tmp_path, tmp_path/'long', 2, 4e-3, 4_800)
    while not list((tmp_path/'long').glob('*/checkpoint.pt')):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    workers = children(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.wait(3600) != 0
    assert not [pid for pid in workers if os.path.exists(f'/proc/{pid}')]
    assert not records(tmp_path/'long')
    code, _, errors = done(tmp_path, tmp_path/'long', 2, 4e-3, 4_800)
    assert code == 0, errors[-3000:]
    resumed = [record['resumed'] for record in records(tmp_path/'long').values()]
    assert len(resumed) == 3 and max(resumed) == 1


def test_workers_end_with_the_process_that_started_them(tmp_path):
    process = start(tmp_path, tmp_path/'long', 2, 4e-3, 10 ** 6)
    while len(list((tmp_path/'long').glob('*/checkpoint.pt'))) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    workers = children(process.pid)
    process.kill()
    process.wait()
    assert len(workers) == 2
    while any(map(alive, workers)): time.sleep(0.05)   # a test that hangs has failed
    assert not records(tmp_path/'long')
