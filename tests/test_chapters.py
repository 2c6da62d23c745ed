import json, re
from pathlib import Path

import pytest
from common import has_parameters, notebooks, root, run

stem = lambda path: path.stem
with_parameters = [p for p in notebooks if has_parameters(p)]
without_parameters = [p for p in notebooks if not has_parameters(p)]
ablation = root/'nbs'/'05_ablation.ipynb'
offline = dict(HF_HUB_OFFLINE='1', TQDM_DISABLE='1')


def papermill(path, folder, *parameters, **env):
    return run('python', '-m', 'papermill', path, folder/'out.ipynb', '--no-progress-bar', '-p', 'preset', 'tiny',
               '-p', 'out_dir', folder/'run', *parameters, cwd=folder, **env)


def refused(done, *words):
    "The run failed, and the last line of its error is one sentence with all of `words`."
    lines = re.sub(r'\x1b\[[\d;]*m', '', done.stderr).strip().splitlines()
    assert done.returncode != 0
    check_error(lines[-1], *words)


def check_error(line, *words):
    "A line that names an error and has all `words`."
    assert re.match(r'[\w.]*(Error|Exception): \S', line), line
    assert not [w for w in words if w not in line], line


@pytest.mark.parametrize('path', with_parameters, ids=stem)
def test_papermill(path, tmp_path):
    done = papermill(path, tmp_path, **offline)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize('path', without_parameters, ids=stem)
def test_nbdev(path):
    done = run('nbdev-test', path, cwd=root, MPLBACKEND='agg', **offline)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_misspelt_parameter(tmp_path):
    refused(papermill(ablation, tmp_path, '-p', 'sead', '7', **offline), 'sead', 'seeds')


def test_misspelt_parameter_of_any_chapter(tmp_path):
    "The same without a kernel for each chapter, which would take minutes."
    done = run('python', Path(__file__).with_name('first_cells.py'), *with_parameters, cwd=tmp_path, **offline)
    assert done.returncode == 0, done.stderr[-4000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == len(with_parameters)
    for line in errors.values(): check_error(line, 'sead', 'seeds')


def test_wrong_type(tmp_path):
    refused(papermill(ablation, tmp_path, '-p', 'seeds', 'maybe', **offline), 'seeds', 'maybe')


def test_a_preset_that_a_chapter_cannot_run(tmp_path):
    equal_work = root/'nbs'/'06d_equal_work.ipynb'
    refused(papermill(equal_work, tmp_path, '-p', 'preset', 'kawakami', **offline), 'kawakami', 'allowed: one of tiny, smoke, quick, wt2')


def test_unknown_corpus(tmp_path):
    refused(papermill(ablation, tmp_path, '-p', 'corpus', 'wikitext-3', **offline), 'wikitext-3', 'pydoc')


def test_unknown_second_corpus(tmp_path):
    refused(papermill(root/'nbs'/'08_adaptation.ipynb', tmp_path, '-p', 'second', 'eltec-ger', **offline), 'eltec-ger', 'allowed: cipher, pydoc')


def test_empty_file(tmp_path):
    file = tmp_path/'nothing.txt'
    file.touch()
    refused(papermill(ablation, tmp_path, '-p', 'corpus', file, **offline), 'nothing.txt', 'empty')


def test_not_utf8(tmp_path):
    file = tmp_path/'latin.txt'
    file.write_bytes('une fenêtre ouverte\n'.encode('latin-1') * 100)
    refused(papermill(ablation, tmp_path, '-p', 'corpus', file, **offline), 'latin.txt', 'UTF-8')


def test_no_network(tmp_path, monkeypatch):
    for name in 'HCLM_DATA', 'HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE', 'HF_HUB_CACHE', 'HF_DATASETS_CACHE', 'NO_PROXY', 'no_proxy':
        monkeypatch.delenv(name, raising=False)
    nowhere = 'http://127.0.0.1:9'
    unreachable = dict(HF_HOME=str(tmp_path/'hub'), HF_ENDPOINT=nowhere, HTTPS_PROXY=nowhere, https_proxy=nowhere)
    refused(papermill(ablation, tmp_path, '-p', 'corpus', 'wikitext-2-raw', **unreachable),
            'wikitext-2-raw', 'HCLM_DATA')
