import pytest, torch
from common import root, run
from test_kill import same

program = '''
import os, sys, torch
from hclm_repro import HCLM, HCLMConfig, TrainingConfig, build, load_corpus, train
folder, lanes, dropout, signal_at = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
corpus = load_corpus('synthetic')
training = TrainingConfig(lanes=lanes, word_budget=lanes * 6 * 20, evaluations=2, curve_words=200, sample_words=4,
                          save_seconds=0, log_every=1, score_valid=False, lr=3e-3)
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

    def train(name, processes=1, lanes=5, dropout=0.0, signal_at=-1, fails=False):
        starter = ['torchrun', '--standalone', '--nproc-per-node', str(processes)] if processes > 1 else ['python']
        done = run(*starter, str(script), str(tmp_path/name), str(lanes), str(dropout), str(signal_at),
                   cwd=root, PYTHONPATH=str(root), TQDM_DISABLE='1')
        if fails: return done
        assert done.returncode == 0, done.stderr[-3000:]
        return torch.load(tmp_path/name/'checkpoint.pt', weights_only=True)
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
    assert 'holds a run of 2 processes, not 1' in done.stderr.strip().splitlines()[-1]


def test_more_processes_than_lanes_are_refused(trained):
    done = trained('few', processes=2, lanes=1, fails=True)
    assert 'allowed: at most as many processes as lanes' in done.stderr
