import nbformat, pytest
from common import is_parameters, notebooks, read, root, run

each = pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
no_parameters = {'index', '00_corpus', '03_cache'}


def files(folder): return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file() and p.suffix != '.pyc'}


def same(before, after):
    assert [str(p) for p in sorted(before.keys() | after.keys()) if before.get(p) != after.get(p)] == []


def test_there_are_notebooks(): assert {'index', '00_corpus', '05_ablation'} <= {p.stem for p in notebooks}


@each
def test_valid(path):
    nb = read(path)
    nbformat.validate(nb)
    assert nb.metadata.kernelspec == {'name': 'python3', 'language': 'python', 'display_name': 'python3'}


@each
def test_outputs_are_stored(path):
    cells = [c for c in read(path).cells if c.cell_type == 'code']
    assert not [c.source for c in cells for o in c.outputs if o.output_type == 'error']
    assert sum(bool(c.outputs) for c in cells) >= len(cells) / 2


@each
def test_parameters_cell(path):
    cells = [c for c in read(path).cells if is_parameters(c)]
    assert len(cells) == (path.stem not in no_parameters)
    assert not [c for c in cells if '#| export' in c.source]


def test_export_is_in_sync(copy):
    done = run('nbdev-export', cwd=copy)
    assert done.returncode == 0, done.stderr
    same(files(root/'hclm_repro'), files(copy/'hclm_repro'))


def test_notebooks_are_clean(copy):
    done = run('nbdev-clean', cwd=copy)
    assert done.returncode == 0, done.stderr
    same(files(root/'nbs'), files(copy/'nbs'))


def test_readme_is_in_sync(copy):
    done = run('python', 'tools/book.py', 'readme', cwd=copy)
    assert done.returncode == 0, done.stderr
    assert (root/'README.md').read_text(encoding='utf-8') == (copy/'README.md').read_text(encoding='utf-8')
    same(files(root/'docs/images'), files(copy/'docs/images'))


def test_a_deleted_record_leaves_the_readme(copy):
    for record in (copy/'results').glob('*.json'):
        if not record.name.startswith('pydoc-HCLM+Cache'): record.unlink()
    for command in ['execute', 'nbs/index.ipynb'], ['readme']:
        done = run('python', 'tools/book.py', *command, cwd=copy, TQDM_DISABLE='1')
        assert done.returncode == 0, done.stderr
    models = lambda folder: [line.split(' | ')[0] for line in (folder/'README.md').read_text(encoding='utf-8').splitlines()
                             if line.startswith(('| HCLM + Cache ', '| No-'))]
    assert models(copy) == ['| HCLM + Cache'] and {'| No-Cache', '| No-Hierarchy'} <= set(models(root))
