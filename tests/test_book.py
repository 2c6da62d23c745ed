import ast, io, re, tokenize

import nbformat, pytest
from common import code_cells, is_parameters, notebooks, read, root, run

each = pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
chapters = [p for p in notebooks if p.stem[0].isdigit()]
no_parameters = {
    'index', '00_idea', '01a_text', '01b_corpora', '01c_model', '02_run1', '03_cache', '03b_lexicon',
    '03c_occurrences', '04_machine',
    '04a_recurrence', '04b_run2', '04c_files', '04c_folder', '04c_learning', '04c_training', '04f_sharing', '06a_transformer', '06b_hat', '06c_rivals', '06e_writing',
    '12_command', '13_surprisal'}


def files(folder): return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file() and p.suffix != '.pyc'}


def same(before, after):
    assert [str(p) for p in sorted(before.keys() | after.keys()) if before.get(p) != after.get(p)] == []


def module_of(path):
    "The module that a chapter exports, or None."
    found = [re.search(r'^#\|\s*default_exp\s+(\w+)', c.source, flags=re.M) for c in code_cells(path)]
    return next((match[1] for match in found if match), None)


def imported(source):
    "Modules of the package that `source` imports."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): found |= {name.name for name in node.names}
        if not isinstance(node, ast.ImportFrom): continue
        origin = '.'.join(filter(None, ['hclm_repro' if node.level else '', node.module]))
        if origin == 'hclm_repro': found |= {f'hclm_repro.{name.name}' for name in node.names}
        else: found.add(origin)
    return {name.split('.')[1] for name in found if name.startswith('hclm_repro.')} & modules.keys()


modules = {module_of(p): p.stem for p in chapters if module_of(p)}   # module -> its chapter
each_module = pytest.mark.parametrize('name', modules)


def source_of(name): return (root/'hclm_repro'/f'{name}.py').read_text(encoding='utf-8')


def stands_on(name):
    "All modules of the package that module `name` imports, directly or not."
    todo, found = [name], set()
    while todo:
        new = imported(source_of(todo.pop())) - found
        found |= new
        todo += new
    return found


def code_lines(source):
    "Numbers of the lines that are neither blank nor comment nor docstring."
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        kinds = ast.Module, ast.ClassDef, ast.FunctionDef
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    quiet = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0] for token in tokens if token.type not in quiet} - docstrings


def test_there_are_notebooks(): assert {'index', '00_idea', '05_ablation'} <= {p.stem for p in notebooks}


@each
def test_valid(path):
    nb = read(path)
    nbformat.validate(nb)
    assert nb.metadata.kernelspec == {'name': 'python3', 'language': 'python', 'display_name': 'python3'}


# Many cells of these chapters export, and so show nothing; the first two are bound by the cells before the first model.
least_shown = {'01b_corpora': 0.54, '01c_model': 0.3, '03b_lexicon': 0.59, '03c_occurrences': 0.5, '04a_recurrence': 0.65,
               '04c_files': 0.55, '04c_folder': 0.55, '04c_learning': 0.6, '04c_training': 0.6, '04d_experiments': 0.64,
               '04f_sharing': 0.53, '06a_transformer': 0.63, '06e_writing': 0.6, '10_frontier': 0.55, '12_command': 0.6}


@each
def test_outputs_are_stored(path):
    cells = code_cells(path)
    assert not [c.source for c in cells for o in c.outputs if o.output_type == 'error']
    exporting = [c for c in cells if '#| export' in c.source]
    assert sum(bool(c.outputs) for c in cells) >= least_shown.get(path.stem, 2 / 3) * len(cells)
    if path.stem in least_shown: assert 10 * sum(bool(c.outputs) for c in cells) >= 9 * (len(cells) - len(exporting))


@each
def test_cells_are_short(path):
    assert len(read(path).cells) <= 130
    lengths = {c.source: [line for line in c.source.splitlines() if line.strip() and not line.startswith('#|')]
               for c in code_cells(path)}
    assert not [source for source, lines in lengths.items() if len(lines) > 25]


@each
def test_parameters_cell(path):
    cells = [c for c in read(path).cells if is_parameters(c)]
    assert len(cells) == (path.stem not in no_parameters)
    assert not [c for c in cells if '#| export' in c.source]


@each
def test_links_lead_somewhere(path):
    "Links to files of this repository, in the prose of a chapter."
    prose = '\n'.join(c.source for c in read(path).cells if c.cell_type == 'markdown')
    targets = re.findall(r'\]\((?!\w+:|#)([^)#\s]+)', prose)
    assert not [target for target in targets if not (path.parent/target).exists()]


def test_the_first_model_comes_early():
    "The first HCLM of the book comes before its 160th cell."
    before = 0
    for path in chapters:
        sources = [c.source if c.cell_type == 'code' else '' for c in read(path).cells]
        found = [i for i, source in enumerate(sources) if 'class LoopHCLM' in source]
        if found: break
        before += len(sources)
    assert found and before + found[0] < 160


@each_module
def test_module_is_short(name): assert len(code_lines(source_of(name))) <= 450


@each_module
def test_imports_lead_back(name):
    "A module imports those of earlier chapters, and so do the cells of its chapter."
    earlier = {other for other, chapter in modules.items() if chapter <= modules[name]}
    notebook = '\n'.join(c.source for c in code_cells(root/'nbs'/f'{modules[name]}.ipynb'))
    assert imported(source_of(name)) <= earlier
    assert imported(re.sub(r'^[%!].*$', '', notebook, flags=re.M)) <= earlier


def test_models_need_no_training():
    assert not stands_on('hat') & {'run1', 'run2', 'training', 'experiment'}
    for name in 'cache', 'transformer': assert 'training' not in stands_on(name)


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
