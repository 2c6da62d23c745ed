"""Execute the notebooks in place (`execute [NB...]`) or rebuild README.md from the index (`readme`)."""
import os, re, shutil, sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent
nbs, images = root/'nbs', 'docs/images'


def execute(path):
    "Run `path` from the repository root and replace it; a run that fails leaves it as it was."
    print(f'{path.name} ...', flush=True)
    nb = nbformat.read(path, as_version=4)
    NotebookClient(nb, kernel_name='python3', record_timing=False, resources={'metadata': {'path': str(root)}}).execute()
    done = path.with_name(f'.{path.name}.tmp')
    nbformat.write(nb, done)
    os.replace(done, path)


def directives(cell): return re.findall(r'^#\|\s*(.+?)\s*$', cell.source, flags=re.M)


def shown(cell):
    "`cell` as the README shows it: without nbdev's directives, and with links that start at the root."
    if cell.cell_type == 'markdown':
        relative = r'\]\((?!\w+:|[#/])([^)\s]+)'
        cell.source = re.sub(relative, lambda m: f"]({os.path.normpath(f'nbs/{m[1]}')}", cell.source)
        return cell
    if {'hide_input', 'echo: false'} & set(directives(cell)): cell.metadata.transient = {'remove_source': True}
    cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
    return cell


def readme():
    nb = nbformat.read(nbs/'index.ipynb', as_version=4)
    hidden = {'hide', 'default_exp index'}
    nb.cells = [shown(c) for c in nb.cells if c.cell_type == 'markdown' or not hidden & set(directives(c))]
    nb.metadata.language_info = {'name': 'python'}
    exporter = MarkdownExporter(exclude_raw=True)
    text, resources = exporter.from_notebook_node(nb, {'output_files_dir': images, 'unique_key': 'index'})
    text = re.sub(r'<style.*?</style>\n?', '', text, flags=re.S)
    shutil.rmtree(root/images, ignore_errors=True)
    for name, data in resources['outputs'].items():
        (root/images).mkdir(parents=True, exist_ok=True)
        (root/name).write_bytes(data)
    (root/'README.md').write_text(re.sub(r'\n{3,}', '\n\n', text).strip() + '\n', encoding='utf-8')


def main(command, *paths):
    if command == 'readme': readme()
    elif command == 'execute':
        every = [*sorted(nbs.glob('[0-9]*.ipynb')), nbs/'index.ipynb']
        for path in map(Path, paths or every): execute(path)
    else: sys.exit('The command is execute or readme.')


if __name__ == '__main__': main(*sys.argv[1:])
