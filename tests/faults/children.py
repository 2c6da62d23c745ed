"""Training runs in processes that are there to be killed, stopped and starved.

They are forked from a server that has loaded the package, so that a hundred of them cost little. Each counts its *ticks*: updates, and
whatever it does to a file of the run. A tick is a place at which something can be made to happen, on a fast machine and on a slow one."""
import contextlib, ctypes, hashlib, json, mmap, multiprocessing, os, resource, signal, struct, subprocess, sys, time, traceback
from pathlib import Path

CHANGES = {'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.truncate', 'os.link', 'os.symlink', 'os.chmod'}

server = multiprocessing.get_context('forkserver')
server.set_forkserver_preload(['hclm_repro', 'torch._dynamo'])   # which the first optimizer loads


class Ticks:
    "Counts ticks of this process in `file`, and calls `act(count)` at each. `names`: what they were."
    def __init__(self, folder, file, act):
        from torch.optim.optimizer import register_optimizer_step_post_hook
        self.folder, self.act, self.names = os.path.abspath(folder), act, []
        file.write_bytes(bytes(8))
        with open(file, 'r+b') as opened: self.memory = mmap.mmap(opened.fileno(), 8)
        sys.addaudithook(self.hear)
        register_optimizer_step_post_hook(lambda *_: self.tick('update'))

    def hear(self, event, arguments):
        if event == 'open':
            if not arguments[2] & (os.O_WRONLY | os.O_RDWR): return
        elif event not in CHANGES: return
        path = arguments[0]
        if isinstance(path, (str, bytes, os.PathLike)) and os.path.abspath(os.fsdecode(path)).startswith(self.folder): self.tick(event)

    def tick(self, name):
        self.names.append(name)
        self.memory[:] = struct.pack('q', len(self.names))
        self.act(len(self.names))


def limit(size, deadly):
    "From now on no file grows beyond `size` bytes: the write that tries it fails, as on a full disk, or is `deadly`."
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def become_nobody():
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


def mount(folder, *options):
    "Mount something at `folder`, for this process alone. Raises `OSError` where that is not allowed."
    new_mounts = 0x00020000
    if ctypes.CDLL(None, use_errno=True).unshare(new_mounts): raise OSError(ctypes.get_errno(), 'unshare')
    for command in (['--make-rprivate', '/'], [*options, str(folder)]):
        done = subprocess.run(['mount', *command], capture_output=True, text=True)
        if done.returncode: raise OSError(1, done.stderr)


def program(folder, model='HCLM', words=600, seed=0, **choices):
    "A short training run with all that a long one has."
    from hclm_repro import TrainingConfig, build, synthetic, train
    from hclm_repro.model import MODELS
    corpus = synthetic((1_500, 150, 10))
    training = dict(lanes=4, word_budget=words, evaluations=3, curve_words=60, sample_words=3, save_seconds=0, log_every=7, seed=seed,
                    min_count=5, threads=1)
    sizes = dict(units=8, embedding=4, dropout=0.2, segment_words=6)
    if model == 'HCLM': sizes.update(cache_slots=20, cache_reset='never', state_reset='never')
    config = MODELS[model].Config(**sizes)
    training = TrainingConfig(**{**training, **choices})
    return train(build(model, config, corpus, training), corpus, training, folder)


def child(function, folder, notes, at, arguments):
    "What runs in the process. `at`: (tick, what happens there, number) or None. `notes`: a folder for what is to be told."
    out = os.open(notes/'output.txt', os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2): os.dup2(out, stream)
    def act(count):
        if at is None or count != at[0]: return
        if at[1] == 'signal': os.kill(os.getpid(), at[2])
        else: limit(at[2], deadly=at[1] == 'cut')
    ticks = Ticks(folder, notes/'ticks', act)
    try:
        told = function(folder, **arguments)
        told = told if isinstance(told, dict) else None
        code = 0
    except Exception as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        traceback.print_exc()
        told = dict(error=type(error).__name__, kinds=[kind.__name__ for kind in type(error).__mro__], text=str(error))
        code = 1
    (notes/'told.json').write_text(json.dumps(dict(told=told, ticks=ticks.names)))
    os._exit(code)


class Child:
    "A process that does `function(folder, **arguments)`, by default a training run. It makes notes beside that folder, or in `place`."
    def __init__(self, folder, function=program, at=None, place=None, **arguments):
        self.folder = Path(folder)
        self.notes = Path(place or self.folder.parent)/f'notes-{time.monotonic_ns()}'
        self.notes.mkdir(mode=0o777)
        self.notes.chmod(0o777)
        self.process = server.Process(target=child, args=(function, self.folder, self.notes, at, arguments))
        self.process.start()

    @property
    def ticks(self):
        try: return struct.unpack('q', (self.notes/'ticks').read_bytes())[0]
        except (FileNotFoundError, struct.error): return 0

    def wait(self):
        "The exit code: negative for the signal that ended it."
        self.process.join()
        return self.process.exitcode

    def wait_for_tick(self, tick):
        while self.process.is_alive() and self.ticks < tick: time.sleep(0.0005)

    def wait_until_stopped(self):
        while self.process.is_alive() and self.state != 'T': time.sleep(0.005)

    @property
    def state(self): return Path(f'/proc/{self.process.pid}/stat').read_text().rsplit(')', 1)[1].split()[0]

    def signal(self, number):
        with contextlib.suppress(ProcessLookupError): os.kill(self.process.pid, number)   # it may have ended

    @property
    def output(self): return (self.notes/'output.txt').read_text()

    def told(self): return json.loads((self.notes/'told.json').read_text())

    def finished(self):
        "What the run has come to; the process must have ended well."
        assert self.wait() == 0, self.output[-3000:]
        return result(self.folder)

    def refusal(self):
        "The sentence with which the process has ended."
        assert self.wait() == 1, self.output[-3000:]
        told = self.told()['told']
        assert set(told['kinds']) & {'ValueError', 'OSError', 'ArithmeticError'}, self.output[-3000:]
        assert told['text'].count('; allowed: ') == 1 and '\n' not in told['text'], told['text']
        assert self.output.strip().splitlines()[-1].endswith(told['text'])
        return told['text']


def result(folder):
    "What must be the same to the bit, however often a run was ended and resumed."
    from safetensors.numpy import load_file
    record = json.loads((folder/'record.json').read_text())
    names = ('identity', 'steps', 'curve', 'valid', 'updates', 'words_read', 'class_name', 'parameters', 'precision', 'processes')
    kept = {name: record[name] for name in names}
    for row in [*kept['curve'], kept['valid']]: row.pop('seconds')
    weights = load_file(folder/'model'/'model.safetensors')
    kept['weights'] = {name: hashlib.sha256(weight.tobytes()).hexdigest() for name, weight in weights.items()}
    return kept


def names(folder): return sorted(str(path.relative_to(folder)) for path in folder.rglob('*'))


class Calm:
    "A run that nobody disturbs, for comparison."
    def __init__(self, folder, **arguments):
        started = time.perf_counter()
        run = Child(folder, **arguments)
        self.result = run.finished()
        self.seconds = time.perf_counter() - started
        self.ticks = run.told()['ticks']
        self.names = names(folder)
        self.folder = folder


def same(found, calm, folder):
    "The run in `folder` has ended as the calm one has, and nothing more lies there."
    different = [name for name in calm.result if found[name] != calm.result[name]]
    assert different == []
    assert names(folder) == calm.names
