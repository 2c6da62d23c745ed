import json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest
from common import run
from hclm_repro.command import COMMANDS, DEFAULT_MODEL, FIRST
from hclm_repro.training import read_checkpoint

programs = Path(sys.executable).parent
environment = dict(os.environ, TQDM_DISABLE='1', HF_HUB_OFFLINE='1', PATH=f'{programs}{os.pathsep}{os.environ["PATH"]}')
model = 'runs/pydoc-HCLM-tiny-0/model'
story = 'The owl saw the vole , and the owl — an “owl” — ate it .\n'


def shell(line, folder, **env):
    "Run a line as somebody does who types it in `folder`."
    return subprocess.run(['bash', '-c', line], cwd=folder, env={**environment, **env}, capture_output=True, timeout=3600, text=True,
                          encoding='utf-8')


def start(line, folder):
    "Start a line of `hclm` to which Ctrl-C can be sent, whatever the tests were started from."
    def listen(): signal.signal(signal.SIGINT, signal.default_int_handler)
    pipes = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.PIPE)
    return subprocess.Popen([programs/'hclm', *line.split()], cwd=folder, env=environment, text=True, preexec_fn=listen, **pipes)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A folder in which the first example of the help has been run as it is printed."
    folder = tmp_path_factory.mktemp('command')
    done = shell(FIRST, folder)
    assert (done.returncode, done.stdout) == (0, f'{model}\n'), done.stderr
    return folder


def example_of(text): return text.split('\nexample')[1].splitlines()[1].strip()


@pytest.mark.parametrize('name', COMMANDS)
def test_examples_work_as_printed(folder, name):
    example = example_of(shell(f'hclm {name} --help', folder).stdout)
    assert example == COMMANDS[name].example
    done = shell(example, folder)
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize('arguments', ['--help', '--version', 'score --help', 'score', 'score /nowhere --model m'])
def test_what_needs_no_model_waits_for_none(tmp_path, arguments):
    done = run('python', '-X', 'importtime', programs/'hclm', *arguments.split(), cwd=tmp_path)
    assert done.returncode == (0 if arguments.startswith('-') or 'help' in arguments else 2)
    assert 'argparse' in done.stderr and 'torch' not in done.stderr


def test_a_pipe_has_the_rows_of_a_file(folder):
    (folder/'story.txt').write_text(story, encoding='utf-8')
    file, piped = [shell(line, folder) for line in (f'hclm score story.txt --model {model}', f'cat story.txt | hclm score - --model {model}')]
    assert file.stdout == piped.stdout and file.stdout.count('\n') == 1 + len(story.split()) + 1
    assert file.stderr.count('\n') == piped.stderr.count('\n') == 1 and 'bits per character' in file.stderr


def test_every_line_may_be_a_text_of_its_own(folder):
    (folder/'lines.txt').write_text(f'{story}\n{story * 2}', encoding='utf-8')
    done = shell(f'hclm score lines.txt --model {model} --lines', folder)
    header, *rows = [line.split('\t') for line in done.stdout.splitlines()]
    assert header[:2] == ['line', 'word'] and {row[0] for row in rows} == {'1', '3', '4'}
    first, *others = [[row[1:4] for row in rows if row[0] == number] for number in '134']
    for other in others:
        assert [row[0] for row in other] == [row[0] for row in first]
        assert [float(row[2]) for row in other] == pytest.approx([float(row[2]) for row in first], abs=1e-4)


@pytest.mark.parametrize('option', ['--tsv', '--json'])
def test_results_are_utf8_everywhere(folder, option):
    (folder/'story.txt').write_text(story, encoding='utf-8')
    done = shell(f'hclm score story.txt --model {model} {option}', folder, PYTHONUTF8='0', LC_ALL='C', PYTHONIOENCODING='latin-1')
    assert done.returncode == 0 and '“owl”' in done.stdout, done.stderr


def test_a_reader_who_leaves(folder):
    (folder/'long.txt').write_text(story * 1000, encoding='utf-8')
    done = shell(f'hclm score long.txt --model {model} | head -1; echo ${{PIPESTATUS[0]}}', folder)
    header, code = done.stdout.splitlines()
    assert (code, done.stderr) == ('141', '') and header.startswith('word\tcharacters\tbits')


def test_a_full_disk(folder):
    if not Path('/dev/full').exists(): pytest.skip('no /dev/full here')
    done = shell(f'hclm info {model} > /dev/full', folder)
    assert (done.returncode, done.stderr) == (2, 'hclm: [Errno 28] No space left on device\n')


@pytest.mark.parametrize('name, content, words', [
    ('nowhere.txt', None, 'No such file'), ('', None, 'is a folder'), ('empty.txt', b'', 'has no word'),
    ('latin.txt', 'une fenêtre\n'.encode('latin-1'), 'is not UTF-8 text (byte 7)')])
def test_refused_texts(tmp_path, name, content, words):
    if content is not None: (tmp_path/name).write_bytes(content)
    done = shell(f'hclm score "{tmp_path/name}" --model nowhere', tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (2, '', 1)
    assert done.stderr.startswith(f'hclm: {tmp_path/name}') and words in done.stderr and '; allowed: ' in done.stderr


def test_no_model(tmp_path):
    done = shell('echo an owl | hclm score - --model nowhere', tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (2, '', 1)
    assert done.stderr.startswith('hclm: nowhere has no config.json')


@pytest.mark.parametrize('line', ['echo The owl | hclm score -', 'hclm generate "The" --words 5'])
def test_the_model_of_the_package_needs_no_name(tmp_path, line):
    done = shell(line, tmp_path)
    if Path(DEFAULT_MODEL).is_dir(): assert done.returncode == 0 and done.stdout, done.stderr
    else:
        assert (done.returncode, done.stdout) == (2, '')
        assert done.stderr.startswith('hclm: no model comes with this version of hclm_repro; allowed: ')


def test_bytes_of_standard_input_that_are_no_text(folder):
    done = shell(f"printf 'an owl\\n\\377\\n' | hclm score - --model {model}", folder)
    assert (done.returncode, done.stderr) == (2, 'hclm: line 2 of standard input is not UTF-8 text; allowed: UTF-8 text\n')


def test_ctrl_c_while_scoring(folder):
    process = start(f'score - --model {model} --segment 100 --json', folder)
    process.stdin.write('the owl\n' * 100)
    process.stdin.flush()
    rows = [json.loads(process.stdout.readline())['word'] for _ in range(150)]   # more than one segment
    assert rows[:2] == ['the', 'owl']
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=3600)
    assert process.returncode == 130 and err.startswith('hclm: stopped by Ctrl-C; so far ') and err.endswith(' words/s)\n'), err


def test_ctrl_c_while_training(folder):
    "However early it comes, it is told in a sentence. Once there are updates, it leaves a checkpoint, from which the same line goes on."
    place = folder/'long'/'pydoc-HCLM-tiny-0'
    checkpoint = place/'checkpoint.pt'

    def stopped(wait):
        process = start('train pydoc --preset tiny --word-budget 100000000 --out-dir long', folder)
        while not (place/'.lock').exists(): assert process.poll() is None, process.stderr.read()
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=3600)
        assert (process.returncode, out, err.count('\n')) == (130, '', 1), err
        assert err.startswith('hclm: stopped by Ctrl-C')
        return err

    wait = 0
    while not checkpoint.exists():
        said = stopped(wait)
        wait += 0.5
    assert said.endswith('; long/pydoc-HCLM-tiny-0 holds a checkpoint, the same command goes on from there\n')
    step = read_checkpoint(checkpoint)['step']
    while not read_checkpoint(checkpoint)['resumed']:
        (place/'.lock').unlink(missing_ok=True)
        stopped(wait)
        wait += 0.5
    assert read_checkpoint(checkpoint)['step'] >= step > 0


def test_memory_does_not_grow_with_the_text(folder):
    program = f'''
import resource, sys
from hclm_repro.command import main
assert main(['score', sys.argv[1], '--model', {model!r}]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
'''
    peaks = []
    for name, times in dict(some=3_000, more=12_000).items():   # the first is long enough for all buffers
        (folder/name).write_text(story * times, encoding='utf-8')
        done = subprocess.run([sys.executable, '-c', program, name], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stderr.split()[-1]))
    assert peaks[1] < 1.05 * peaks[0]
