"""Make the pages of the book: `pages.py [FOLDER [NOTEBOOKS]]`, from `nbs` to `_book` by default.

nbconvert makes them by the template in `tools/pages/`, from the outputs that the notebooks store. Nothing is executed,
and a page loads nothing from a network.
"""
import ast, json, os, re, shutil, sys
from html import escape, unescape
from pathlib import Path
from typing import NamedTuple

import nbformat
from jinja2 import pass_context
from latex2mathml.converter import convert as mathml
from nbconvert import TemplateExporter
from nbconvert.filters.highlight import Highlight2HTML
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.styles import get_style_by_name
from pygments.token import STANDARD_TYPES
from traitlets.config import Config

from book import directives

root = Path(__file__).resolve().parent.parent
template = root/'tools/pages'


class Page(NamedTuple):
    "A page as lists of pages name it: `name`.html, the number of its chapter or '', and a short title."
    name: str
    number: str
    title: str


class Definition(NamedTuple):
    "Where a name of the package is defined: the page, the cell, and the docstring."
    page: str
    cell: str
    docstring: str


def brief(error): return ' '.join(str(error).split())[:100]


def read(path):
    "The notebook at `path`. A ValueError names the file that is no notebook or stopped with an error."
    try: nb = nbformat.read(path, as_version=4)
    except (ValueError, AttributeError, nbformat.ValidationError) as error:
        raise ValueError(f'{path.name} is no notebook ({brief(error)}); allowed: notebooks of format 4') from None
    for number, cell in enumerate(nb.cells):
        for output in cell.get('outputs', []):
            if output.output_type != 'error': continue
            raise ValueError(f'cell {number} of {path.name} stopped with {output.ename} ({brief(output.evalue)}); '
                             'allowed: cells that ran to their end')
    return nb


def as_notebook(path):
    "A file that is no notebook, as a notebook of one cell."
    text = path.read_text(encoding='utf-8')
    if path.suffix != '.md': text = f'# {path.name}\n\n````python\n{text}\n````'
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])


def read_book(nbs):
    """The pages of the book and their notebooks: the index, the chapters it lists, and the files that they link to.

    A ValueError says which chapters are not listed, or listed but not there.
    """
    found = {path.stem: read(path) for path in sorted(nbs.glob('[!_.]*.ipynb'))}
    if 'index' not in found: raise ValueError(f'{nbs} has no index.ipynb; allowed: a folder of chapters with an index')
    index = '\n'.join(cell.source for cell in found['index'].cells)
    listed = re.findall(r'^\| (\w+) \| \[(.+?)\]\((\w+)\.ipynb\)', index, flags=re.M)
    pages = [Page('index', '', 'Overview'), *(Page(name, number, title) for number, title, name in listed)]
    names = [page.name for page in pages]
    differing = ', '.join(sorted({*names} ^ {*found}))
    if differing: raise ValueError(f'the list of chapters in index.ipynb and the notebooks differ: {differing}; '
                                   'allowed: a line for each notebook')

    prose = '\n'.join(cell.source for nb in found.values() for cell in nb.cells if cell.cell_type == 'markdown')
    files = [nbs/linked for linked in sorted(set(re.findall(r'\]\((\.\./[^)#]+)', prose)))]
    pages += [Page(path.stem, '', path.name) for path in files]
    return pages, [found[name] for name in names] + [as_notebook(path) for path in files]


def module_of(nb):
    "The module that a notebook exports, or None."
    exports = [words.split() for cell in nb.cells for words in directives(cell) if cell.cell_type == 'code']
    return next((words[1] for words in exports if words[0] == 'default_exp'), None)


def is_exported(cell): return cell.cell_type == 'code' and 'export' in directives(cell)


def named(node):
    "`{name: docstring}` of what a statement defines; a method is named after its class."
    if isinstance(node, ast.Assign): return {target.id: '' for target in node.targets if isinstance(target, ast.Name)}
    if not isinstance(node, (ast.ClassDef, ast.FunctionDef)): return {}
    name, methods = node.name, []
    if isinstance(node, ast.ClassDef): methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    if any('patch' in ast.unparse(decorator) for decorator in node.decorator_list):
        name = f'{ast.unparse(node.args.args[0].annotation)}.{name}'
    told = {name: ast.get_docstring(node) or ''}
    return told | {f'{name}.{method.name}': ast.get_docstring(method) or '' for method in methods}


def definitions(page, nb):
    "`{name: Definition}` of the public names that the cells of a notebook export."
    found = {}
    for cell in filter(is_exported, nb.cells):
        for node in ast.parse(cell.source).body:
            for name, docstring in named(node).items():
                found.setdefault(name, Definition(page.name, f'cell-id={cell.id}', docstring))
    return {name: definition for name, definition in found.items() if not re.search(r'(^|\.)_', name)}


def is_glossary(source): return '\n## Glossary\n' in f'\n{source}\n'


def glossary(nb):
    "`{term: meaning}` of the rows of the glossary, if the notebook has one."
    source = '\n'.join(cell.source for cell in nb.cells if is_glossary(cell.source))
    found = {}
    for row in re.findall(r'^\| (\*.+)\|$', source, flags=re.M):
        meaning = re.sub(r' \(\[.*|[*`]', '', row.partition(' | ')[2]).strip()
        found |= dict.fromkeys(re.findall(r'\*(.+?)\*', row), meaning)
    return found


def anchor_of(term): return f'term-{term.replace(" ", "-")}'


def plain(text):
    "HTML as plain text in one line."
    return ' '.join(unescape(re.sub(r'<[^>]*>', '', text)).split())


def alternative(source, section):
    "What a figure shows, in words: `#| fig-alt`, or its section with the titles and labels that its code gives."
    told = re.search(r'^#\|\s*fig-alt:\s*(.+)', source, flags=re.M)
    if told: return told[1].strip('\'" ')
    titles = re.findall(r'(?:title|label)(?:=|\()\s*[\'"]([^\'"]+)[\'"]', source)
    return '; '.join([f'Figure: {section}', *dict.fromkeys(titles)])


def shown(cell, module):
    "`cell` as its page shows it, with what the template has to know in its metadata; None if it shows nothing."
    if cell.cell_type != 'code': return cell
    orders = directives(cell)
    if 'hide' in orders: return None
    choices = dict(order.split(': ', 1) for order in orders if ': ' in order)
    if 'export' in orders: cell.metadata.origin = f'hclm_repro.{module}'
    if choices.get('code-fold') == 'true': cell.metadata.fold = choices.get('code-summary', 'Solution').strip('\'"')
    cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip('\n')
    hidden = 'hide_input' in orders or choices.get('echo') == 'false' or not cell.source
    cell.metadata.transient = {'remove_source': hidden}
    # A widget does nothing without a kernel; the figure beside it stays.
    cell.outputs = [output for output in cell.outputs if not any('widget' in kind for kind in output.get('data', {}))]
    return None if hidden and not cell.outputs else cell


def prepared(nb):
    "A notebook as its page shows it."
    module, section, cells = module_of(nb), '', []
    for cell in nb.cells:
        heading = re.findall(r'^#+ (.+)', cell.source, flags=re.M) if cell.cell_type == 'markdown' else []
        section = heading[-1].replace('`', '') if heading else section
        if cell.cell_type == 'code': cell.metadata.alt = alternative(cell.source, section)
        cells.append(shown(cell, module))
    nb.cells = [cell for cell in cells if cell]
    nb.metadata.language_info = {'name': 'python'}
    return nb


class Renderer(IPythonRenderer):
    "nbconvert's HTML of Markdown, with links between the pages and with formulas that need no script."
    def __init__(self, exporter, resources, source, **options):
        super().__init__(escape=False, **options)
        self.exporter, self.resources = exporter, resources
        self.defines = dict(exporter.terms) if is_glossary(source) else {}

    def link(self, text, url, title=None):
        inner = re.sub(r'</?a\b[^>]*>', '', text)
        return super().link(inner, self.exporter.address(url, self.resources['page']), title)

    def codespan(self, text):
        found = self.exporter.definition(text, self.resources['page'])
        code = super().codespan(text)
        if not found: return code
        told = escape(found.docstring.partition('\n')[0])
        return f'<a class="name" href="{found.page}.html#{found.cell}" title="{told}">{code}</a>'

    def emphasis(self, text):
        "A term of the glossary is linked to it; in the glossary it is the target."
        term = text if text in self.exporter.terms else text.removesuffix('s')
        anchor = anchor_of(term)
        if self.defines.pop(term, None): return f'<em id="{anchor}">{text}</em>'
        if term not in self.exporter.terms: return super().emphasis(text)
        told = escape(self.exporter.terms[term])
        return f'<a class="term" href="{self.exporter.glossary_page}.html#{anchor}" title="{told}"><em>{text}</em></a>'

    def heading(self, text, level, **attributes):
        "A heading that occurs twice on a page gets two anchors."
        made = super().heading(text, level, **attributes)
        anchor = re.search(r'id="(.*?)"', made)[1]
        section = {'anchor': anchor, 'title': plain(text), 'level': level, 'text': ''}
        before = [other['title'] for other in self.resources['sections']].count(section['title'])
        if before: section['anchor'] = f'{anchor}-{before + 1}'
        self.resources['sections'].append(section)
        for mark in ('"', '"#'): made = made.replace(f'{mark}{anchor}"', f'{mark}{section["anchor"]}"')
        return made

    def image(self, text, url, title=None):
        # nbconvert's `embed_images` would also parse each piece of HTML by itself, and close every <details> at once.
        return super().image(text, self._src_to_base64(url) or url, title)

    def table(self, text): return f'<div class="scroll"><table>{text}</table></div>\n'

    def inline_math(self, body): return self.formula(body, 'inline')

    def block_math(self, body): return f'<span class="scroll">{self.formula(body, "block")}</span>'

    def formula(self, tex, display):
        "The MathML of `tex`. As in TeX, a thin space follows the name of a function, but for a parenthesis."
        try: made = mathml(tex, display=display)
        except Exception: made = tex   # latex2mathml has many exceptions; a command that it does not know is none
        if '\\' in made or made == tex:
            page = self.resources['page'].name
            raise ValueError(f'{page} has the formula {tex}; allowed: the TeX that latex2mathml knows')
        return re.sub(r'<mi>(\w{2,})</mi>(?!<mo[^>]*>&#x00028;)', r'<mo lspace="0" rspace="0.17em">\1</mo>', made)


class PageExporter(TemplateExporter):
    """Exports the notebooks of one book, whose pages link to each other.

    nbconvert's HTMLExporter would parse each page once more and give it addresses of scripts in the network.
    """
    file_extension = '.html'
    output_mimetype = 'text/html'

    def __init__(self, pages, notebooks):
        kinds = ['text/html', 'text/markdown', 'image/svg+xml', 'image/png', 'image/jpeg', 'text/plain']
        config = Config({'ExtractOutputPreprocessor': {'enabled': True}})
        config.NbConvertBase.display_data_priority = kinds
        super().__init__(config=config, template_name='pages', extra_template_basedirs=[str(template.parent)],
                         exclude_input_prompt=True, exclude_output_prompt=True, optimistic_validation=True)
        self.pages = pages
        self.defined = [definitions(page, nb) for page, nb in zip(pages, notebooks)]
        self.glossary_page, self.terms = '', {}
        for page, nb in zip(pages, notebooks):
            if glossary(nb): self.glossary_page, self.terms = page.name, glossary(nb)

    def definition(self, code, page):
        "The definition of a name, or of what is called in `code`; None if it is none, or not the only one."
        name = re.match(r'[\w.]*', code)[0]
        if code not in (name, f'{name}()') and not code.startswith(f'{name}('): return None
        found = [names[name] for names in self.defined if name in names]
        own = [definition for definition in found if definition.page == page.name]
        return (own or found)[0] if own or len(found) == 1 else None

    def address(self, url, page):
        "Where a link of a notebook leads among the pages."
        if re.match(r'\w+:|#', url): return url
        path, mark, anchor = url.partition('#')
        name = Path(path).stem
        if name in [other.name for other in self.pages]: return f'{name}.html{mark}{anchor}'
        raise ValueError(f'{page.name} links to {url}; allowed: {", ".join(other.name for other in self.pages)}')

    def default_filters(self):
        yield from super().default_filters()
        yield 'highlight_code', Highlight2HTML(parent=self)
        yield 'markdown2html', self.markdown2html
        yield 'without_style', lambda text: re.sub(r'<style.*?</style>\n?', '', text, flags=re.S)

    @pass_context
    def markdown2html(self, context, source):
        "The HTML of `source`; the text is noted, section by section, for lists of sections and for the search."
        resources = context['resources']
        renderer = Renderer(self, resources, source, anchor_link_text='#', path=resources['metadata']['path'])
        last = len(resources['sections']) - 1
        made = MarkdownWithMath(renderer).render(source)
        texts = re.split(r'<h\d.*?</h\d>', made)
        for section, text in zip(resources['sections'][last:], texts): section['text'] += ' ' + plain(text)
        return made

    def export(self, number, nb, nbs):
        "The page of one notebook, its sections, and `{name: bytes}` of its figures."
        page = self.pages[number]
        previous, following = ([None] + self.pages)[number], (self.pages + [None])[number + 1]
        top = {'anchor': 'content', 'title': '', 'level': 0, 'text': ''}
        made, resources = self.from_notebook_node(prepared(nb), {
            'page': page, 'pages': self.pages, 'previous': previous, 'next': following, 'sections': [top],
            'output_files_dir': 'images', 'unique_key': page.name, 'metadata': {'path': str(nbs), 'name': page.name}})
        return made, resources['sections'], resources['outputs']


def style():
    "pages.css, and the colours of code for light and dark."
    light, dark = get_style_by_name('default'), get_style_by_name('github-dark')
    rules = []
    for token, short in STANDARD_TYPES.items():
        by_day, by_night = (colours.style_for_token(token)['color'] for colours in (light, dark))
        if short and by_day and by_night:
            rules.append(f'.highlight .{short} {{ color: light-dark(#{by_day}, #{by_night}); }}')
    return '\n'.join([(template/'pages.css').read_text(encoding='utf-8'), *rules, ''])


def search_index(exporter, sections):
    "What the search looks through, as a script: `[page, anchor, title, text]` of every section, name and term."
    entries = []
    for number, page in enumerate(exporter.pages):
        terms = [(anchor_of(term), term, meaning) for term, meaning in exporter.terms.items()]
        texts = [(section['anchor'], section['title'], section['text']) for section in sections[number]]
        names = [(found.cell, name, found.docstring) for name, found in exporter.defined[number].items()]
        here = texts + names
        if page.name == exporter.glossary_page: here = terms + here
        entries += [[number, anchor, title, ' '.join(text.split())] for anchor, title, text in here if title]
    titles = [[page.name, f'{page.number} {page.title}'.strip()] for page in exporter.pages]
    return f'const book = {json.dumps({"pages": titles, "sections": entries}, ensure_ascii=False)};\n'


def build(nbs, out):
    "Write the pages of the notebooks in `nbs` to `out`, which is replaced when all are made."
    if out.exists() and not (out/'search.js').exists():
        raise ValueError(f'{out} exists and is no book; allowed: a new folder, or that of an earlier book')
    pages, notebooks = read_book(nbs)
    exporter = PageExporter(pages, notebooks)
    made, sections = {}, []
    for number, nb in enumerate(notebooks):
        made[f'{pages[number].name}.html'], found, figures = exporter.export(number, nb, nbs)
        made |= figures
        sections.append(found)
    made |= {'search.js': search_index(exporter, sections), 'pages.css': style(),
             'pages.js': (template/'pages.js').read_text(encoding='utf-8')}

    new = out.with_name(f'.{out.name}.new')
    shutil.rmtree(new, ignore_errors=True)
    for name, content in made.items():
        (new/name).parent.mkdir(parents=True, exist_ok=True)
        (new/name).write_bytes(content if isinstance(content, bytes) else content.encode())
    shutil.rmtree(out, ignore_errors=True)
    os.replace(new, out)
    print(f'{len(pages)} pages: {out/"index.html"}')


def main(out='_book', nbs=root/'nbs'):
    try: build(Path(nbs), Path(out))
    except (OSError, ValueError) as error: sys.exit(str(error))


if __name__ == '__main__': main(*sys.argv[1:])
