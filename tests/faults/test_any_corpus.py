"""Chapter 05 on corpora that nobody would choose: each ends in a table, or in one sentence before anything is trained."""
import ast, os, random

import pytest
from children import Child, names
from common import code_cells, is_parameters, many, root

dice = random.Random(0)


def letters(count, alphabet='abcd', width=12):
    "So many words of a few letters, some in a line."
    spoken = [''.join(dice.choices(alphabet, k=dice.randint(1, 4))) for _ in range(count)]
    return ''.join(word + ('\n' if i % width == width - 1 else ' ') for i, word in enumerate(spoken)) + '\n'


plain = letters(2_000)
tables = dict(   # splits, or one text
    four_letters=dict(train=plain, valid=letters(200), test='a'),
    one_letter=dict(train='a ' * 2_000, valid='a a\n', test='a'),
    valid_of_one_word=dict(train=plain, valid='abc', test='a'),
    valid_of_one_unknown_letter=dict(train=plain, valid='☃', test='a'),
    valid_of_twenty_lines=dict(train=plain, valid='a b\n' * 20, test='a'),
    valid_nearly_blank=dict(train=plain, valid='\n' * 30 + 'a', test='a'),
    valid_of_one_long_word=dict(train=plain, valid='abcd' * 1_500, test='a'),
    no_line_ends=dict(train=' '.join(plain.split()), valid='ab cd ' * 40, test='a'),
    a_long_word_in_train=dict(train=f'{plain}{"abcd" * 500}\n{plain}', valid=letters(50), test='a'),
    only_line_ends_and_a_word=dict(train='\n' * 2_000 + 'a', valid='\n\na', test='a'),
    all_words_new=dict(train=' '.join(map(str, range(2_000))), valid=' '.join(map(str, range(5_000, 5_100))), test='a'),
    no_letter_twenty_five_times=dict(train='the quick brown fox jumps\n' * 12, valid='over the dog\n', test='a'),
    twenty_lines_in_all='one two three\n' * 20,
    other_planes=dict(train=letters(1_000, '𝒳𝒴🂡é'), valid=letters(60, '𝒳𝒴🂡é'), test='a'))
sentences = dict(
    only_blanks=' \n' * 100,
    one_long_word='a' * 100_000,
    no_lines_to_cut=' '.join(plain.split()),
    train_of_one_word=dict(train='a' * 50_000, valid='a', test='a'),
    train_of_three_words=dict(train='a b c', valid='a', test='a'),
    blank_valid=dict(train=plain, valid=' \n', test='a'))
in_short = ['valid_of_one_long_word']   # of four letters, too; the others are left to `make test-long`


def cell_source(cell, choices):
    if not is_parameters(cell): return cell.source
    return cell.source + '\n' + '\n'.join(f'{name} = {value!r}' for name, value in choices.items())


def show(value):
    "What a notebook does with the last value of a cell."
    for name in ('__repr__', '_repr_html_', '_repr_markdown_'):
        if value is not None and hasattr(value, name): getattr(value, name)()


def chapter(folder, name, **choices):
    "In a process of its own, on one core: the cells of a chapter one after another, as a kernel would."
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ['TQDM_DISABLE'] = '1'
    import matplotlib
    matplotlib.use('agg')
    from matplotlib import pyplot as plt
    space = {'__name__': '__main__'}
    for cell in code_cells(root/'nbs'/f'{name}.ipynb'):
        tree = ast.parse(cell_source(cell, choices))
        last = ast.Expression(tree.body.pop().value) if isinstance((tree.body or [None])[-1], ast.Expr) else None
        exec(compile(tree, name, 'exec'), space)
        if last: show(eval(compile(last, name, 'eval'), space))
        for number in plt.get_fignums(): plt.figure(number).canvas.draw()
        plt.close('all')


def start(content, folder):
    "The chapter at preset tiny on a corpus in files."
    place = folder/'corpus'
    if isinstance(content, str): place.write_text(content, encoding='utf-8', newline='')
    else:
        place.mkdir()
        for split, text in content.items(): (place/f'{split}.txt').write_text(text, encoding='utf-8', newline='')
    return Child(folder/'runs', chapter, name='05_ablation', corpus=str(place), preset='tiny', seeds='0', out_dir=str(folder/'runs'))


@pytest.mark.parametrize('name', many(in_short, list(tables)))
def test_table(name, tmp_path, counted):
    run = start(tables[name], tmp_path)
    assert run.wait() == 0, run.output[-3000:]
    table = (tmp_path/'runs'/'table.txt').read_text()
    assert all(row in table for row in ('HCLM + Cache', 'No-Cache', 'No-Hierarchy', 'valid bpc')) and 'nan' not in table.lower()
    counted('strange corpora with a table')


@pytest.mark.parametrize('name', many(['only_blanks'], list(sentences)))
def test_sentence(name, tmp_path, counted):
    run = start(sentences[name], tmp_path)
    said = run.refusal()
    assert str(tmp_path/'corpus') in said or 'lanes' in said
    assert 'update' not in run.told()['ticks']
    assert not (tmp_path/'runs').exists() or names(tmp_path/'runs') == []
    counted('strange corpora refused at the start')
