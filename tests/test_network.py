import hashlib, os

import pandas as pd
import pytest
from common import root, run

hang = '''
import socket, time
import datasets   # imports take as long as the machine is slow
from hclm_repro import load_corpus
def hang(*args, **kwargs): time.sleep(60)
socket.getaddrinfo = hang
started = time.perf_counter()
try: load_corpus('wikitext-2-raw')
except FileNotFoundError as error: print(error)
print(time.perf_counter() - started, flush=True)
import os; os._exit(0)
'''


def test_a_name_look_up_that_hangs_costs_five_seconds_at_most(tmp_path, monkeypatch):
    for name in 'HCLM_DATA', 'HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE': monkeypatch.delenv(name, raising=False)
    done = run('python', '-c', hang, cwd=tmp_path, HF_HOME=str(tmp_path/'hub'), PYTHONPATH=str(root))
    message, seconds = done.stdout.strip().splitlines()
    assert 'wikitext-2-raw' in message and 'HCLM_DATA' in message and 'pydoc' in message
    assert float(seconds) < 5


@pytest.mark.skipif('HCLM_DATA' not in os.environ, reason='HCLM_DATA is not set')
def test_rows_of_the_hub_become_the_file_again(tmp_path):
    "The Hub's rows have lost their blank lines; a folder of the same name stands in for the Hub."
    from hclm_repro import load_corpus
    text = load_corpus('wikitext-2', splits=('valid',)).valid
    folder = tmp_path/'Salesforce'/'wikitext'/'wikitext-2-raw-v1'
    folder.mkdir(parents=True)
    rows = pd.DataFrame(dict(text=['' if line == ' \n' else line for line in text.splitlines(keepends=True)]))
    for split in 'train', 'validation', 'test': rows.to_parquet(folder/f'{split}-00000-of-00001.parquet')
    (tmp_path/'Salesforce'/'wikitext'/'README.md').write_text('---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n' + ''.join(
        f'  - split: {s}\n    path: wikitext-2-raw-v1/{s}-*\n' for s in ('train', 'validation', 'test')) + '---\n')
    program = 'from hclm_repro import load_corpus; print(load_corpus("wikitext-2-raw", data_dir="/nowhere").sha256["valid"])'
    done = run('python', '-c', program, cwd=tmp_path, HF_HOME=str(tmp_path/'hub'), HF_HUB_OFFLINE='1', PYTHONPATH=str(root))
    assert done.stdout.strip() == hashlib.sha256(text.encode()).hexdigest(), done.stderr[-2000:]
