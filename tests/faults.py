"""Commands without the seconds of their imports, and under faults: a process that has imported the package forks a
child for each, which, where it is asked to, kills itself, stops, or meets a limit at a chosen touch of its folder.
`python faults.py` is that process."""
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
KILL, INT, TERM = signal.SIGKILL, signal.SIGINT, signal.SIGTERM

# ---- in the process that forks, and in its children

def writes(event, args):
    "The path that an event of the interpreter is about to change, or None."
    if event == 'open' and isinstance(args[0], (str, bytes)):
        return os.fsdecode(args[0]) if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else None
    if event in ('os.rename', 'os.mkdir', 'os.remove', 'os.truncate', 'os.chmod'):
        return None if isinstance(args[0], int) else os.fsdecode(args[0]) # 3.10 gives the number of an open file

def at_touches(below, act):
    "Call `act(n, path)` before the n-th change of anything below a folder."
    count = [0]
    def hook(event, args):
        if event.partition('.')[0] not in ('open', 'os'): return
        path = writes(event, args)
        if path is None or not os.path.abspath(path).startswith(str(below)): return
        count[0] += 1
        act(count[0], path)
    sys.addaudithook(hook)
    return count

def wait_for(path, seconds=120):
    until = time.monotonic() + seconds
    while not os.path.exists(path):
        if time.monotonic() > until: raise SystemExit(f'{path} did not come')
        time.sleep(.01)

def prepare(job):
    "What is to happen to this child."
    signal.signal(INT, signal.default_int_handler) # a shell has it ignored by what it starts in the background
    if 'cwd' in job: os.chdir(job['cwd'])
    if job.get('fsize'): resource.setrlimit(resource.RLIMIT_FSIZE, (job['fsize'], resource.RLIM_INFINITY))
    if job.get('clock'):
        real, steps = time.time, iter(job['clock'] * 100_000)
        time.time = lambda: real() + next(steps)
    os.environ.update(job.get('env', {}))
    if 'part_rows' in job: # no flag, for no person needs it
        import gmail_nb.runs.align as room
        embed = room.embed
        room.embed = lambda *a: embed(*a[:4], replace(a[4], part_rows=job['part_rows'])) if len(a) > 4 else embed(*a)
    if 'demo' in job: # no flags either
        import gmail_nb.experiments.demo as room
        s = room.DemoSettings(align_captions=12, tune_captions=12, validation_captions=4, seeds=2)
        s = replace(s, align=replace(s.align, epochs=2, batch_size=4), tune=replace(s.tune, steps=10))
        room.headline_settings = lambda quick, seed, *more: replace(s, seed=seed, align=replace(s.align, seed=seed))
        import gmail_nb.settings
        from gmail_nb.experiments.parts import miniature_report
        gmail_nb.settings.report_settings = lambda *asked: miniature_report()
    if 'threads' in job:
        import torch
        torch.set_num_threads(job['threads'])
        os.environ['OMP_NUM_THREADS'] = str(job['threads'])
    def act(n, path):
        if n == job.get('touch'): os.kill(os.getpid(), job['signal'])
        here = job['hold_at'] in path and not os.path.exists(job['held']) if 'hold_at' in job else n == job.get('hold')
        if here: # stand still until a file says go on
            Path(job['held']).touch()
            wait_for(job['go'])
    if 'below' in job: return at_touches(job['below'], act)

def carry_out(job):
    "Run a command, a file of Python, or a function of a test's module, and end with its status."
    import importlib
    import runpy
    for fd, name in ((1, 'out'), (2, 'err')):
        file = os.open(f'{job["log"]}.{name}', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, fd)
        os.close(file)
    count = prepare(job)
    try:
        if 'call' in job:
            module, _, name = job['call'].partition(':')
            status = getattr(importlib.import_module(module), name)(*job['args']) or 0
        elif 'script' in job:
            sys.argv, status = [job['script'], *job['argv']], 0
            runpy.run_path(job['script'], run_name='__main__')
        else:
            from gmail_nb.cli.commands import COMMANDS
            status = COMMANDS.commands[job['argv'][0]](job['argv'][1:])
    except SystemExit as e: status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 70 # never that of a command
    finally:
        if job.get('count'): Path(job['count']).write_text(str(count[0]))
    threading._shutdown() # threads end as they do at the end of Python; the modules need not be taken down
    for stream in (sys.stdout, sys.stderr): stream.flush()
    os._exit(status)

def serve():
    sys.path.insert(0, str(HERE))
    import gmail_nb.runtime
    import torch
    torch.set_num_threads(1)
    import gmail_nb.cli.commands, gmail_nb.runs.align, gmail_nb.runs.evaluate, gmail_nb.runs.generate # noqa: F401
    import gmail_nb.runs.tune_caption, gmail_nb.runs.tune_text, gmail_nb.runs.tune_llava, gmail_nb.runs.vqa # noqa: F401
    import gmail_nb.experiments.demo # noqa: F401
    import matplotlib.pyplot, open_clip, timm, transformers.models.gpt2.modeling_gpt2 # noqa: F401
    answer = os.fdopen(os.dup(1), 'w', buffering=1)
    print('ready', file=answer)
    for line in sys.stdin:
        job = json.loads(line)
        if 'poll' in job:
            pid, status, used = os.wait4(job['poll'], os.WNOHANG)
            ended = [os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime]
            print(json.dumps(ended if pid else None), file=answer)
            continue
        pid = os.fork()
        if not pid:
            answer.close()
            os.setpgrp()
            return carry_out(job)
        print(pid, file=answer)
    os._exit(0) # its modules need not be taken down

# ---- in the test

@dataclass
class Ended:
    status:int # negative: the signal that killed it
    out:str
    err:str
    seconds:float
    cpu:float # seconds of it, its own and its processes'

    @property
    def said(self): # the error stream without bars and warnings
        lines = [l for part in self.err.split('\n') for l in part.split('\r')[-1:]]
        return [l for l in lines if l.startswith('gmail')]

class Started:
    def __init__(self, zygote, pid, log):
        self.zygote, self.pid, self.log, self.began, self.status = zygote, pid, log, time.monotonic(), None

    def poll(self): # None while it runs
        if self.status is None:
            if (ended := self.zygote.ask(dict(poll=self.pid))) is not None: self.status, self.cpu = ended
        return self.status

    def wait(self, timeout=300):
        until = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > until:
                os.kill(self.pid, KILL)
                self.poll()
                raise TimeoutError(Path(f'{self.log}.err').read_text()[-3000:])
            time.sleep(.01)
        out, err = (Path(f'{self.log}.{n}').read_text() for n in ('out', 'err'))
        return Ended(status, out, err, time.monotonic() - self.began, self.cpu)

class Zygote:
    "The process that forks. Its environment is that of the tests, its hash seed its own."
    def __init__(self, folder, **env):
        self.folder, self.n = Path(folder), 0
        path = os.pathsep.join([str(HERE.parent), os.environ.get('PYTHONPATH', '')]).strip(os.pathsep)
        env = {**os.environ, 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg',
               'TOKENIZERS_PARALLELISM': 'false', 'PYTHONPATH': path} | env
        self.process = subprocess.Popen([sys.executable, str(HERE/'faults.py')], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, bufsize=1, env=env)
        assert self.process.stdout.readline() == 'ready\n'

    def ask(self, job):
        self.process.stdin.write(json.dumps(job) + '\n')
        return json.loads(self.process.stdout.readline())

    def start(self, *argv, **how):
        self.n += 1
        log = str(self.folder/f'log-{self.process.pid}-{self.n}')
        what = {} if 'call' in how else dict(argv=[str(a) for a in argv])
        how = {k: str(v) if isinstance(v, Path) else v for k, v in how.items()}
        return Started(self, self.ask(dict(log=log, **what, **how)), log)

    def run(self, *argv, **how): return self.start(*argv, **how).wait()

    def begin_together(self, *argv, processes=2, **how):
        "So many processes of a command or of a file of Python, which find each other as torchrun lets them."
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        env = dict(WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        if processes == 1: env = {}
        ranks = [dict(RANK=i, LOCAL_RANK=i) if env else {} for i in range(processes)]
        every = how.pop('env', {}) | env
        return [self.start(*argv, env={k: str(v) for k, v in (every | rank).items()}, **how) for rank in ranks]

    def together(self, script, *argv, processes=2):
        "What became of them."
        return [b.wait() for b in self.begin_together(*argv, script=script, processes=processes)]

    def killed_in_a_pair(self, victim, when, *argv, **how):
        "What became of the other one, when one of two is killed as soon as `when()` is true."
        begun = self.begin_together(*argv, **how)
        until = time.monotonic() + 120
        while not when():
            assert time.monotonic() < until and all(b.poll() is None for b in begun), 'over before it was killed'
            time.sleep(.002)
        os.kill(begun[victim].pid, KILL)
        assert begun[victim].wait().status == -KILL
        return begun[1 - victim].wait(90)

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)

# ---- what is left of a run

# what two equal runs may tell differently: when, for how long, and of themselves in short; and where models lie
VOLATILE = 'date', 'commit', 'seconds', 'machine', 'checksum', 'files', 'aligned'
SETS = 'target_modules', 'modules_to_save', 'exclude_modules' # peft writes them in any order

def plain(value):
    if isinstance(value, dict):
        but = VOLATILE + (('value', 'cores') if value.get('metric') == 'run_seconds' else ())
        return {k: sorted(v) if k in SETS and v else plain(v) for k, v in value.items() if k not in but}
    return [plain(v) for v in value] if isinstance(value, list) else value

def content(path):
    "The bytes of a file; of JSON what is said, but for times."
    if path.suffix == '.json': return plain(json.loads(path.read_text()))
    if path.suffix == '.jsonl': return [plain(json.loads(l)) for l in path.read_text().splitlines()]
    if path.suffix == '.html':
        return re.sub(r'<tr><td>(seconds|images_per_second)</td><td>[\d.]+', '', path.read_text())
    return path.read_bytes()

def left(folder, but=('checkpoints',)):
    "What a run left, by name; checkpoints and hidden files aside."
    files = {p.relative_to(folder): p for p in sorted(Path(folder).rglob('*')) if p.is_file()}
    return {str(n): content(p) for n, p in files.items() if not n.name.startswith('.') and not set(n.parts) & set(but)}

def differing(a, b):
    return sorted({n for n in a.keys() | b.keys() if a.get(n) != b.get(n)})

def half_written(folder):
    "Temporary files that a whole run leaves behind."
    return [str(p.relative_to(folder)) for p in Path(folder).rglob('*') if p.name.endswith('.tmp')]

@contextmanager
def small_disk(folder, size):
    "A file system of that many bytes; None where it cannot be mounted."
    folder = Path(folder)
    folder.mkdir()
    how = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(folder)]
    can = os.geteuid() == 0 and subprocess.run(how, capture_output=True).returncode == 0
    def again(*options):
        subprocess.run(['mount', '-o', ','.join(('remount', *options)), str(folder)], check=True)
    try: yield again if can else None
    finally:
        if can: subprocess.run(['umount', '-l', str(folder)])

def moments(total, n, seed=0):
    "n different touches of a run that has so many."
    return sorted(random.Random(seed).sample(range(1, total + 1), min(n, total)))

if __name__ == '__main__': serve()
