"""The runner for rented machines, and what Kaggle is told about it."""
import json, re

import pytest
from common import read, root, run

folder = root/'kaggle'
metadata = json.loads((folder/'kernel-metadata.json').read_text(encoding='utf-8'))
# As the command line of Kaggle reads them.
KINDS = dict(id=str, id_no=int, title=str, code_file=str, language=str, kernel_type=str, is_private=bool, enable_gpu=bool,
             enable_tpu=bool, enable_internet=bool, machine_shape=str, keywords=list, dataset_sources=list,
             competition_sources=list, kernel_sources=list, model_sources=list, docker_image=str, docker_image_pinning_type=str)


def test_metadata():
    assert {key: type(value) for key, value in metadata.items()} == {key: KINDS[key] for key in metadata}
    needed = {'id', 'title', 'code_file', 'language', 'kernel_type', 'enable_internet', 'machine_shape', 'is_private'}
    assert needed <= metadata.keys()
    slug = re.sub(r'[^a-z0-9]+', '-', metadata['title'].lower())
    assert len(metadata['title']) >= 5 and metadata['id'] == f'USER/{slug}'   # Kaggle refuses another one
    assert (metadata['language'], metadata['kernel_type']) == ('python', 'notebook')
    assert (folder/metadata['code_file']).is_file()
    assert metadata['enable_gpu'] and metadata['machine_shape'] == 'NvidiaTeslaT4' and metadata['enable_internet']
    for name in metadata['dataset_sources']: assert re.fullmatch(r'[\w-]+/[a-z0-9-]+', name)


def runner(place, *parameters):
    "Run the runner with papermill in the folder `place`."
    done = run('python', '-m', 'papermill', folder/'runner.ipynb', place/'out.ipynb', '--no-progress-bar', '--log-output', *parameters,
               cwd=place, HF_HUB_OFFLINE='1', TQDM_DISABLE='1')
    return done, done.stdout + done.stderr


def test_the_runner_with_a_checkout(tmp_path):
    done, said = runner(tmp_path, '-p', 'source', root, '-p', 'preset', 'tiny', '-p', 'corpus', 'pydoc')
    assert done.returncode == 0, said[-4000:]
    assert f'source: {root}\n' in said and 'Table 2 on pydoc, preset tiny, seeds 0;' in said
    table = (tmp_path/'ablation/table.txt').read_text(encoding='utf-8')
    assert [name for name in ('HCLM + Cache', 'No-Cache', 'No-Hierarchy') if name not in table] == []
    assert read(tmp_path/'ablation/05_ablation.ipynb').metadata.papermill.exception is None


@pytest.mark.parametrize('parameters', [(), ('-p', 'source', 'nowhere')], ids=['nothing near', 'no such folder'])
def test_the_runner_without_a_package(tmp_path, parameters):
    done, said = runner(tmp_path, *parameters)
    assert done.returncode != 0 and re.search(r'FileNotFoundError: there is no hclm_repro in \S+; allowed: a checkout', said)
