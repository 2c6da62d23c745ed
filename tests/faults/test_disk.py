"""A disk that is full, a folder that cannot be written, and a folder that somebody else is writing in."""
import os, random, shutil, signal, sys, tempfile
from pathlib import Path

import pytest
from children import Calm, Child, become_nobody, mount, names, program, result, same
from common import check_sentence, files, many, root


@pytest.fixture(scope='module')
def calm(tmp_path_factory): return Calm(tmp_path_factory.mktemp('calm')/'run')


@pytest.mark.parametrize('number', range(many(3, 20)))
def test_a_full_disk(number, calm, tmp_path, counted):
    "From some tick on no file can grow: the run says so, leaves no half of a file, and goes on when there is room."
    dice = random.Random(number)
    folder = tmp_path/'run'
    tick = dice.randint(1, len(calm.ticks) * 3 // 4)
    refused = Child(folder, at=(tick, 'full', int(2 ** dice.uniform(0, 12))))
    assert str(folder) in refused.refusal()
    assert set(names(folder)) <= set(calm.names)
    same(Child(folder).finished(), calm, folder)
    counted('full disks')


def on_a_small_disk(folder):
    "In a process of its own: a disk of 64 kB is full, then a larger one is not."
    mount(folder, '-t', 'tmpfs', '-o', 'size=64k', 'none')
    try: program(folder/'run')
    except OSError as error: check_sentence(error, folder)
    else: raise AssertionError('the disk is larger than the run')
    left = names(folder)
    mount(folder, '-o', 'remount,size=4m')
    program(folder/'run')
    return dict(left=left, names=names(folder/'run'), result=result(folder/'run'))


def mounting(child):
    "What a child that mounts something has told; the test is skipped where that is not allowed."
    code = child.wait()
    told = child.told()['told']
    if code and 'PermissionError' not in told['kinds'] and ('unshare' in told['text'] or 'mount' in told['text']): pytest.skip(told['text'])
    assert code == 0, child.output[-3000:]
    return told


def test_a_small_disk(calm, tmp_path, counted):
    told = mounting(Child(tmp_path, on_a_small_disk))
    assert not [name for name in told['left'] if name.removeprefix('run/') not in [*calm.names, 'run']]
    assert told['result'] == calm.result and told['names'] == calm.names
    counted('full disks')


def on_a_read_only_disk(folder):
    "In a process of its own: a run in a folder that is mounted read-only."
    mount(folder, '--bind', str(folder))
    mount(folder, '-o', 'remount,bind,ro')
    for place in (folder, folder/'run'):
        try: program(place)
        except OSError as error: check_sentence(error, place)
        else: raise AssertionError('the disk can be written')


def test_a_read_only_disk(tmp_path, counted):
    child = Child(tmp_path, on_a_read_only_disk)
    mounting(child)
    assert 'update' not in child.told()['ticks']
    counted('folders that cannot be written', 2)


def as_nobody(folder):
    become_nobody()
    program(folder)


@pytest.fixture
def public_folder():
    "A folder that everybody can enter. pytest's own are for its user alone."
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(os.getuid() != 0, reason='only root can become somebody else')
def test_a_folder_of_somebody_else(public_folder, counted):
    ours = public_folder/'ours'
    ours.mkdir(mode=0o755)
    needed = [*public_folder.parents, *Path(root, 'tests').parents, *Path(sys.prefix, 'lib').parents]
    if not all(path.stat().st_mode & 0o001 for path in needed): pytest.skip('somebody else cannot reach the package')
    for folder in (ours, ours/'run'):
        child = Child(folder, as_nobody, place=public_folder)
        assert str(folder) in child.refusal()
        assert 'update' not in child.told()['ticks'] and names(ours) == []
    counted('folders that cannot be written', 2)


@pytest.mark.parametrize('place', ['file', 'file/below', 'file/below/deeper', '/proc/run', '/proc/self/run', '/dev/null', '/sys/run', 'a' * 300, 
                                   'new/' + 'a' * 300,
                                   'nul\0', 'surrogate\ud800'])
def test_no_folder(place, tmp_path, counted):
    (tmp_path/'file').write_text('a file')
    before = files(tmp_path)
    with pytest.raises((OSError, ValueError)) as caught: program(tmp_path/place, words=24)
    check_sentence(caught.value)
    assert files(tmp_path) == before
    counted('folders that cannot be written')


@pytest.mark.parametrize('number', range(many(1, 6)))
def test_two_processes_in_one_folder(number, calm, tmp_path, counted):
    "While one is at work the second one refuses; it begins where the first one is killed."
    dice = random.Random(number)
    folder = tmp_path/'run'
    first = Child(folder, at=(dice.randint(2, len(calm.ticks) - 1), 'signal', signal.SIGSTOP))
    first.wait_until_stopped()
    before = files(folder)
    try:
        assert str(folder) in Child(folder).refusal()
        assert files(folder) == before
        first.signal(signal.SIGKILL if number % 2 else signal.SIGCONT)
        found = Child(folder).finished() if first.wait() else result(folder)
    finally: first.signal(signal.SIGKILL)   # a process that is stopped would be waited for
    same(found, calm, folder)
    counted('second processes refused')
