"""Bytes change, files are cut, files are missing: nothing of it is loaded as if it were whole."""
import random, shutil, signal, warnings

import pytest
import torch
from children import Calm, Child, program, result
from common import check_sentence, files, many

FLIPS = many(10, 100)


@pytest.fixture(scope='module')
def calm(tmp_path_factory): return Calm(tmp_path_factory.mktemp('calm')/'run')


@pytest.fixture(scope='module')
def killed(calm, tmp_path_factory):
    "A run that was killed shortly before its end."
    folder = tmp_path_factory.mktemp('killed')/'run'
    updates = [i for i, name in enumerate(calm.ticks, 1) if name == 'update']
    assert Child(folder, at=(updates[-4], 'signal', signal.SIGKILL)).wait() == -signal.SIGKILL
    return folder


def flip(path, dice):
    "Change one bit of one byte."
    content = bytearray(path.read_bytes())
    place = dice.randrange(len(content))
    content[place] ^= 1 << dice.randrange(8)
    path.write_bytes(content)
    return place


def shorten(path, dice): path.write_bytes(path.read_bytes()[:dice.randrange(path.stat().st_size)])


def lengthen(path, dice): path.write_bytes(path.read_bytes() + bytes(dice.randrange(1, 100)))


def remove(path, dice): path.unlink()


def checkpoints(folder): return sorted(folder.glob('checkpoint*.pt'), key=lambda path: path.stat().st_mtime_ns)


def resume(folder, calm):
    "What is said when the run in `folder` goes on: the refusal, or the warnings of a run that came to the right end."
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter('always')
        try: program(folder)
        except (ValueError, OSError) as error:
            check_sentence(error)
            return [str(error)]
    found = result(folder)
    assert [name for name in calm.result if found[name] != calm.result[name]] == []
    return [str(warning.message) for warning in heard]


@pytest.mark.parametrize('damage, count', [(flip, FLIPS), (shorten, many(2, 20)), (lengthen, many(1, 10))], ids=['flip', 'shorten', 'lengthen'])
def test_a_damaged_checkpoint_is_named(damage, count, killed, calm, tmp_path, counted):
    older = 0
    for number in range(count):
        folder = tmp_path/f'run{number}'
        shutil.copytree(killed, folder)
        newest = checkpoints(folder)[-1]
        damage(newest, random.Random(number))
        said = resume(folder, calm)
        assert [text for text in said if newest.name in text], (number, said)
        older += (folder/'record.json').exists()
        shutil.rmtree(folder)
    counted(f'damaged checkpoints named ({damage.__name__})', count)
    counted('of which went on from the one before', older)


@pytest.mark.parametrize('damage', [flip, shorten, remove], ids=['flip', 'shorten', 'remove'])
def test_the_checkpoint_before_is_not_needed(damage, killed, calm, tmp_path, counted):
    folder = tmp_path/'run'
    shutil.copytree(killed, folder)
    assert len(checkpoints(folder)) == 2
    damage(checkpoints(folder)[0], random.Random(0))
    resume(folder, calm)
    assert (folder/'record.json').exists()
    counted('damaged older checkpoints')


def test_both_checkpoints_damaged(killed, calm, tmp_path, counted):
    folder = tmp_path/'run'
    shutil.copytree(killed, folder)
    for path in checkpoints(folder): flip(path, random.Random(1))
    before = files(folder)
    said = resume(folder, calm)
    assert not (folder/'record.json').exists()
    assert [text for text in said if 'allowed: ' in text]
    assert {name: content for name, content in files(folder).items() if name.endswith('.pt')} == {
        name: content for name, content in before.items() if name.endswith('.pt')}
    counted('damaged older checkpoints')


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "Saved models of two classes."
    from hclm_repro import build, synthetic, TrainingConfig
    from hclm_repro.model import MODELS
    corpus = synthetic((600, 60, 10))
    folders = []
    for name, more in (('HCLM', dict(cache_slots=5)), ('HAT', dict(byte_units=8, byte_layers=1, byte_heads=2, heads=2, layers=1))):
        folder = tmp_path_factory.mktemp('saved')/name
        config = MODELS[name].Config(units=8, **(dict(embedding=4) if name == 'HCLM' else {}), **more)
        build(MODELS[name], config, corpus, TrainingConfig(min_count=5)).save_pretrained(folder)
        folders.append(folder)
    return folders


def weighty(folder):
    "Files of a saved model that say something of it."
    return sorted(path for path in folder.iterdir() if path.name != 'README.md')


@pytest.mark.parametrize('damage, count', [(flip, FLIPS), (shorten, many(4, 20)), (lengthen, many(2, 10)), (remove, many(2, 6))],
                         ids=['flip', 'shorten', 'lengthen', 'remove'])
def test_a_damaged_model_is_refused(damage, count, saved, tmp_path, counted):
    from hclm_repro import load_pretrained
    for number in range(count):
        dice = random.Random(number)
        whole = saved[number % len(saved)]
        folder = tmp_path/f'model{number}'
        shutil.copytree(whole, folder)
        path = dice.choice(weighty(folder))
        damage(path, dice)
        changed = files(folder)
        with pytest.raises((ValueError, OSError)) as caught: load_pretrained(folder)
        check_sentence(caught.value, folder)
        assert files(folder) == changed
        shutil.rmtree(folder)
    counted(f'damaged models refused ({damage.__name__})', count)


def test_every_byte_of_a_small_file_of_a_model(saved, tmp_path, counted):
    "Not one byte of what describes a model can change unseen."
    from hclm_repro import load_pretrained
    folder = tmp_path/'model'
    shutil.copytree(saved[0], folder)
    for path in weighty(folder):
        content = path.read_bytes()
        if len(content) > 4096: continue
        for place in range(0, len(content), many(97, 3)):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
            with pytest.raises((ValueError, OSError)) as caught: load_pretrained(folder)
            check_sentence(caught.value, folder)
            counted('damaged models refused (flip)')
        path.write_bytes(content)
    assert isinstance(load_pretrained(folder), torch.nn.Module)
