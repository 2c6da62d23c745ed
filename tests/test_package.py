import ast, math, os, re, sys
import zipfile
from configparser import ConfigParser

import pytest
from common import root, run

shipped = root/'hclm_repro/shipped'
heavy = 'nbdev jupyter jupyter_core jupyter_client jupyterlab notebook nbformat ipykernel papermill datasets matplotlib.pyplot'
probe = f"""
import sys, time
start = time.perf_counter()
import torch, pandas, huggingface_hub
middle = time.perf_counter()
import hclm_repro
end = time.perf_counter()
loaded = [name for name in '{heavy}'.split() if name in sys.modules]
print(hclm_repro.__file__, middle - start, end - middle, *loaded, sep='\\n')
"""


@pytest.fixture(scope='module')
def settings():
    config = ConfigParser(delimiters=['='])
    config.read(root/'settings.ini', encoding='utf-8')
    return config['DEFAULT']


def test_one_version(settings):
    assert f"__version__ = \"{settings['version']}\"" in (root/'hclm_repro/__init__.py').read_text().replace("'", '"')
    assert f"requires-python = \">={settings['min_python']}\"" in (root/'pyproject.toml').read_text()
    assert f"\nversion: {settings['version']}\n" in (root/'CITATION.cff').read_text()
    assert f"\n## {settings['version']}" in (root/'CHANGELOG.md').read_text()


def test_hooks_have_the_versions_of_the_tests(settings):
    if not (root/'.pre-commit-config.yaml').exists(): pytest.skip('a source distribution has no hooks')
    hooks = (root/'.pre-commit-config.yaml').read_text()
    pins = dict(re.findall(r'^(nbdev|fastcore|execnb)==(\S+)', settings['dev_requirements'], flags=re.M))
    assert f"rev: {pins['nbdev']} " in hooks and f"[fastcore=={pins['fastcore']}, execnb=={pins['execnb']}]" in hooks


def test_wheel(copy, tmp_path, settings):
    # Without --wheel the wheel is built from the source distribution, which shows that MANIFEST.in names all it takes.
    done = run('python', '-m', 'build', '--no-isolation', '--outdir', tmp_path, cwd=copy)
    assert done.returncode == 0, done.stdout + done.stderr
    wheel, = tmp_path.glob('*.whl')
    names = zipfile.ZipFile(wheel).namelist()
    assert [n for n in names if n.endswith('.dist-info/licenses/LICENSE')]
    assert {f'hclm_repro/{p.name}' for p in (root/'hclm_repro').glob('*.py')} == {n for n in names if n.endswith('.py')}
    assert wheel.stat().st_size < 10e6
    assert 'hclm_repro/nbs/05_ablation.ipynb' in names   # kaggle/runner.ipynb runs it
    of_the_model = {str(path.relative_to(root)) for path in shipped.rglob('*') if path.is_file()}
    assert of_the_model == {n for n in names if n.startswith('hclm_repro/shipped/')}

    scripts, = [n for n in names if n.endswith('.dist-info/entry_points.txt')]
    assert 'hclm = hclm_repro.command:main' in zipfile.ZipFile(wheel).read(scripts).decode()

    installed = tmp_path/'installed'
    done = run('python', '-m', 'pip', 'install', '--no-deps', '--no-index', '--target', installed, wheel, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # The first import may wait for the disk and compile; the second is what a user meets.
    for _ in range(2): done = run('python', '-c', probe, cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    where, others, own, *loaded = done.stdout.split('\n')[:-1]
    assert where.startswith(str(installed))
    assert loaded == []
    assert float(own) < float(others)   # light, however slow the machine


def test_every_import_is_required():
    "What the modules import comes from Python, from the package, or from its requirements; two compressors may be missing."
    config = ConfigParser(delimiters=['='])
    config.read(root/'settings.ini', encoding='utf-8')
    required = set(re.findall(r'^\s*([\w-]+)', config['DEFAULT']['requirements'], flags=re.M)) | {'hclm_repro', 'IPython', 'zstandard', 'pyppmd'}
    imported = set()
    for path in (root/'hclm_repro').glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Import): imported |= {name.name.split('.')[0] for name in node.names}
            if isinstance(node, ast.ImportFrom) and not node.level: imported.add(node.module.split('.')[0])
    assert imported - set(sys.stdlib_module_names) - required == set()


@pytest.mark.skipif(not (shipped/'model').is_dir(), reason='no model comes with the package yet')
def test_the_model_of_the_package():
    "It is loaded without a name and without a network, in float32, and its card says what its record says."
    import torch
    from hclm_repro import load_pretrained
    from hclm_repro.files import read_record
    from huggingface_hub import ModelCard
    model = load_pretrained()
    assert not model.training and {weight.dtype for weight in model.parameters()} == {torch.float32}
    table = model.score('The owl saw the vole , and the owl ate it .\n')
    assert 0 < table.bits.sum() / table.characters.sum() < math.log2(len(model.config.alphabet))   # of somebody who guesses
    assert model.generate('The', words=5)
    record = read_record(shipped/'record.json')
    data = ModelCard.load(shipped/'model/README.md').data
    assert data.eval_results[0].metric_value == round(record['valid']['bpc'], 4)
    assert data.license == 'cc-by-sa-3.0' or not record['identity']['corpus'].startswith('wikitext')


@pytest.mark.skipif(not (shipped/'model').is_dir() or 'HCLM_DATA' not in os.environ, reason='no model yet, or HCLM_DATA is not set')
def test_the_model_of_the_package_costs_what_its_record_says():
    "All of valid, some minutes: rounding the weights to half precision costs less than half a percent of a bit."
    from hclm_repro import evaluate, load_corpus, load_pretrained
    from hclm_repro.files import read_record
    record = read_record(shipped/'record.json')
    found = evaluate(load_pretrained(), load_corpus(record['identity']['corpus']), 'valid')
    assert abs(found['bpc'] - record['valid']['bpc']) < 0.005
    assert found['characters'] == record['valid']['characters']


def test_the_card_of_a_model_of_bytes():
    "It has no alphabet, so no character is rare."
    from hclm_repro import HAT, SubwordTransformer, preset
    for cls in (HAT, SubwordTransformer):
        card = cls(preset(cls, 'tiny')[0]).generate_model_card()
        assert 'characters apart' not in str(card) and 'byte-level' in card.data.tags


def test_the_card_of_the_records_describes_each_field():
    from hclm_repro.files import read_record
    card = (root/'results/README.md').read_text(encoding='utf-8')
    runs = [record for record in map(read_record, (root/'results').glob('*.json')) if 'class_name' in record]
    assert runs and not [name for record in runs for name in record if f'`{name}`' not in card]
