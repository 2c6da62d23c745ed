import json, os, sys
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from common import code_cells, notebooks, root, run
from filelock import FileLock
from nbformat import v4, write

sys.path.insert(0, str(root/'tools'))
import pages
from book import directives


class Found(HTMLParser):
    "What a page holds: anchors, links, what it loads, figures, and its title."
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loaded, self.alts, self.title, self.language = [], [], [], [], '', ''
        self.open = ''
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.open = tag
        if 'id' in given: self.ids.append(given['id'])
        if tag == 'html': self.language = given['lang']
        if tag == 'a' and 'href' in given: self.links.append(given['href'])
        if tag == 'img': self.alts.append(given.get('alt', ''))
        if tag == 'link': self.loaded.append(given['href'])
        elif 'src' in given: self.loaded.append(given['src'])

    def handle_data(self, data):
        if self.open == 'title': self.title += data.strip()


@pytest.fixture(scope='session')
def book(tmp_path_factory):
    "The pages of the book, made once even if tests run side by side: a folder."
    shared = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ: shared = shared.parent
    with FileLock(shared/'book.lock'):
        if not (shared/'book').exists():
            done = run('python', root/'tools/pages.py', shared/'book', cwd=root)
            assert done.returncode == 0, done.stderr
    return shared/'book'


@pytest.fixture(scope='session')
def found(book): return {path.name: Found(path) for path in book.glob('*.html')}


def index_of(folder):
    text = (folder/'search.js').read_text(encoding='utf-8')
    return json.loads(text.removeprefix('const book = ').removesuffix(';\n'))


def test_a_page_for_each_chapter(found):
    assert {f'{path.stem}.html' for path in notebooks} <= found.keys()
    for name, page in found.items():
        assert page.title and page.language == 'en', name
        assert len(page.ids) == len(set(page.ids)), name
    assert len({page.title for page in found.values()}) == len(found)


def test_links_lead_somewhere(found):
    lost = []
    for name, page in found.items():
        for link in page.links:
            if link.startswith(('http:', 'https:')): continue
            target, _, anchor = link.partition('#')
            other = found.get(target or name)
            if other is None or anchor and unquote(anchor) not in other.ids: lost.append((name, link))
    assert lost == []


def test_nothing_comes_from_a_network(book, found):
    loaded = {(name, file) for name, page in found.items() for file in page.loaded}
    assert [entry for entry in loaded if not entry[1].startswith('data:') and not (book/entry[1]).is_file()] == []
    assert not [name for name in ('pages.css', 'pages.js') if 'http' in (book/name).read_text(encoding='utf-8')]


def test_figures_have_words(found):
    alts = [alt for page in found.values() for alt in page.alts]
    assert len(alts) > 50 and all(len(alt) > len('Figure: ') for alt in alts)


@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_hidden_cells_are_absent(path, book, found):
    for cell in code_cells(path):
        if 'hide' in directives(cell): assert f'cell-id={cell.id}' not in found[f'{path.stem}.html'].ids
    assert '>#|' not in (book/f'{path.stem}.html').read_text(encoding='utf-8')


def test_search_finds(book, found):
    index = index_of(book)
    names = [name for name, _ in index['pages']]
    for page, anchor, title, _ in index['sections']: assert anchor in found[f'{names[page]}.html'].ids, title
    about = {names[page] for page, _, title, text in index['sections'] if 'cache' in f'{title} {text}'.lower()}
    assert {'00_idea', '02_run1', '03_cache'} <= about
    assert [title for _, _, title, _ in index['sections']].count('PointerCache') == 1


def test_names_are_linked_to_what_defines_them(found):
    targets = {link for link in found['04b_run2.html'].links if link.startswith('03_cache.html#cell-id=')}
    assert targets and 'term-lane' in found['00_idea.html'].ids


# A book of two small chapters shows each directive by itself.

figure = v4.new_output('display_data', {'image/png': 'iVBORw0KGgo=', 'text/plain': '<Figure>'})
widget = v4.new_output('display_data', {'application/vnd.jupyter.widget-view+json': {}, 'text/plain': 'interactive()'})


@pytest.fixture
def small(tmp_path):
    "`small(cells...)` builds a book whose chapter has these cells, and returns the text of its page."
    def made(*cells):
        nbs = tmp_path/'nbs'
        nbs.mkdir()
        index = v4.new_markdown_cell('# Small\n\n| 01 | [One](01_one.ipynb) | why |')
        write(v4.new_notebook(cells=[index]), nbs/'index.ipynb')
        write(v4.new_notebook(cells=[v4.new_markdown_cell('# One'), *cells]), nbs/'01_one.ipynb')
        pages.main(tmp_path/'out', nbs)
        return (tmp_path/'out/01_one.html').read_text(encoding='utf-8')
    return made


def test_directives(small):
    text = small(
        v4.new_code_cell('#| hide\nsecret'),
        v4.new_code_cell('#| echo: false\nplot(title="A curve")', outputs=[figure, widget]),
        v4.new_code_cell('#| default_exp one'),
        v4.new_code_cell('#| export\nWIDTH = 3'),
        v4.new_markdown_cell('So `WIDTH` is known, and $x_1$.'),
        v4.new_code_cell('#| code-fold: true\n#| code-summary: Solution\nanswer'),
        v4.new_markdown_cell('<details><summary>In words</summary>\n\nYes.\n\n</details>'))
    for absent in ('secret', 'plot', 'default_exp', 'interactive', '#|', '$'): assert absent not in text, absent
    assert 'alt="Figure: One; A curve"' in text and 'hclm_repro.one</div>' in text
    assert '<summary>Solution</summary>' in text and '<math' in text
    assert '<p>Yes.</p>\n</details>' in text
    assert 'title=""><code>WIDTH</code></a>' in text


def error(kind): return v4.new_output('error', ename=kind, evalue='too bad', traceback=[])


@pytest.mark.parametrize('cell, words', [
    (v4.new_code_cell('1 / 0', outputs=[error('ZeroDivisionError')]), ['01_one.ipynb', 'ZeroDivisionError']),
    (v4.new_markdown_cell('[two](02_two.ipynb)'), ['01_one', '02_two.ipynb']),
    (v4.new_markdown_cell('$\\unheard$'), ['01_one', 'unheard'])], ids=['error', 'link', 'formula'])
def test_what_is_wrong_is_named(cell, words, small, tmp_path):
    with pytest.raises(SystemExit) as stopped: small(cell)
    assert not [word for word in [*words, '; allowed: '] if word not in stopped.value.code], stopped.value.code
    assert not (tmp_path/'out').exists()


def test_other_folders_are_kept(tmp_path):
    (tmp_path/'letter').write_text('dear')
    with pytest.raises(SystemExit, match='is no book; allowed: '): pages.main(tmp_path)
    assert (tmp_path/'letter').read_text() == 'dear'
