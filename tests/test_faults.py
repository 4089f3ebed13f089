"Commands that are killed, stopped, left without room, started twice, or given damaged files; more of it is slow."
import gmail_nb.runtime
import json
import os
import random
import shutil
import sys
import time
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path

import faults
import pytest
from faults import INT, KILL, TERM, Zygote, differing, half_written, left, moments, small_disk
from gmail_nb.data import emoji, quiet_datasets
from test_llava import language, tiny_tokenizer
from transformers import LlamaForCausalLM

def weight(item): return 60

# ---- a small world: two sets, and what every command makes of them

DRAW = '--steps', 1, '--shard-size', 8, '--quiet'
KINDS = dict(
    generate=lambda w: ('generate', w/'real.parquet', *DRAW),
    report=lambda w: ('generate', w/'real.parquet', *DRAW, '--report'),
    embed=lambda w: ('embed', w/'real.parquet', '--batch-size', 8),
    align=lambda w: ('align', w/'real.parquet', '--generated', w/'generate', '--epochs', 2, '--batch-size', 8,
                     '--validation-share', .25, '--save-every', 1),
    text=lambda w: ('tune', 'text', '--generated', w/'generate', '--model', w/'align', '--steps', 12, '--every', 3),
    caption=lambda w: ('tune', 'caption', w/'real.parquet', '--generated', w/'generate', '--model', w/'align',
                       '--test', w/'test.parquet', '--steps', 4, '--save-every', 1, '--max-new-tokens', 4),
    llava=lambda w: ('tune', 'llava', w/'real.parquet', '--language-model', w/'lm',
                     '--generated', w/'generate', '--model', w/'align', '--arm', 'both', '--project-steps', 3, '--instruct-steps', 3,
                     '--project-batch-size', 4, '--instruct-batch-size', 4, '--rank', 2, '--save-every', 1),
    vqa=lambda w: ('eval', 'vqa', '--model', w/'llava', '--limit', 4, '--max-new-tokens', 2),
    demo=lambda w: ('demo',),
    tables=lambda w: ('report', '--only', 'table14'),
    eval=lambda w: ('eval', w/'test.parquet', '--model', 'embedded', '--model', f'text=tuned:{w}/text',
                    '--no-pictures'))
ALL = dict(env=dict(PATH=''), part_rows=8, demo=True) # no Java, several parts, and a demo of two dozen images

SHARED = 'generate', 'report' # by several processes: nobody removes the hidden file that a killed one was writing

class World:
    "A folder with the sets; an unbroken run of a command is made where it is first asked for, by `world/kind`."
    def __init__(self, folder, forks):
        self.folder, self.forks, self.touches, self.seconds = folder, forks, {}, {}
        with quiet_datasets():
            emoji('B', 'noto').select(range(0, 240, 10)).to_parquet(folder/'real.parquet')
            emoji('A', 'noto').select(range(0, 120, 10)).to_parquet(folder/'test.parquet')
        LlamaForCausalLM(language()).save_pretrained(folder/'lm')
        tiny_tokenizer().save_pretrained(folder/'lm')

    def __truediv__(self, name):
        out = self.folder/name
        if name not in KINDS or name in self.touches: return out
        done = self.forks.run(*KINDS[name](self), '--out', out, below=out, count=self.folder/'count', **ALL)
        assert done.status == 0, done.err[-3000:]
        assert not half_written(out)
        self.touches[name], self.seconds[name] = int((self.folder/'count').read_text()), done.seconds
        print(f'{name}: {self.touches[name]} touches, {done.seconds:.1f} s, {done.cpu:.1f} of CPU', file=sys.stderr)
        return out

    def touches_of(self, kind): # how often an unbroken run changes something in its folder
        return self/kind and self.touches[kind]

@pytest.fixture(scope='module')
def world(tmp_path_factory, forks): return World(tmp_path_factory.mktemp('world'), forks)

@pytest.fixture(scope='module')
def zygote(tmp_path_factory):
    "Another process than the one that makes the world, with another order of sets and dicts."
    found = Zygote(tmp_path_factory.mktemp('logs'), PYTHONHASHSEED='2')
    yield found
    found.close()

@pytest.fixture
def go(world, zygote):
    "Run a command of `KINDS` into a folder."
    def run(kind, out, *more, wait=True, **how):
        begun = zygote.start(*KINDS[kind](world), *more, '--out', out, below=out, **ALL, **how)
        return begun.wait() if wait else begun
    return run

def same(world, kind, out):
    "Whether a folder holds what the unbroken run left, under the name of its own."
    return differing(left(world/kind), left(out))

# ---- killed

def killed_and_resumed(world, go, kind, out, kills, seed):
    "Kill at random touches and at random times, in turn, going on after each, and anew when it ended; then let it end."
    rng, hits, touches = random.Random(seed), 0, world.touches_of(kind)
    for i in range(4 * kills):
        if hits == kills: break
        if i % 2: # at a touch; of a run that goes on there are fewer
            status = go(kind, out, touch=rng.randint(1, touches), signal=KILL).status
        else:
            begun = go(kind, out, wait=False)
            time.sleep(rng.uniform(0, world.seconds[kind]))
            if begun.poll() is None: os.kill(begun.pid, KILL)
            status = begun.wait().status
        assert status in (0, -KILL)
        hits += status == -KILL
        if status == 0: # what is left to do was done before it was killed
            assert not same(world, kind, out)
            shutil.rmtree(out)
    done = go(kind, out)
    assert done.status == 0, done.err[-3000:]
    assert not same(world, kind, out)
    assert kind in SHARED or not half_written(out)
    return hits

def slow_but(*cheap, kinds=KINDS):
    "A case for each kind of command; all but a few of them are slow."
    slow = pytest.mark.slow
    return pytest.mark.parametrize('kind', [k if k in cheap else pytest.param(k, marks=slow) for k in kinds])

LARGEST = dict(generate=30_000, report=30_000, embed=20_000, align=60_000, text=100_000, caption=200_000, llava=60_000,
               vqa=10_000, demo=60_000, eval=15_000, tables=60_000)

@slow_but(*[k for k in KINDS if k == 'align'])
def test_a_run_that_meets_one_fault_after_another(world, go, tmp_path, kind):
    "Stopped, killed, and begun a second time while it runs: then it ends as an unbroken one. The demo is killed once."
    out, held, free, touches = tmp_path/kind, tmp_path/'held', tmp_path/'free', world.touches_of(kind)
    if kind != 'demo': stopped(go, out, kind, (INT, TERM)[len(kind) % 2], touch=touches // 2)
    assert go(kind, out, touch=min(touches // 3, 25), signal=KILL).status == -KILL
    if kind in SHARED or kind == 'demo': done = go(kind, out)
    else:
        first = go(kind, out, wait=False, hold=min(touches // 3, 25), held=held, go=free)
        faults.wait_for(held)
        told_who_is_there(go(kind, out), out, first.pid)
        free.touch()
        done = first.wait()
    assert done.status == 0, done.err[-3000:]
    assert not same(world, kind, out)
    assert kind in SHARED or not half_written(out)

@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_two_kills(world, go, tmp_path, kind): killed_and_resumed(world, go, kind, tmp_path/kind, 2, seed=kind)

@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_twenty_kills(world, go, tmp_path, kind):
    "Twenty of one folder, and then one at each of twenty touches of a folder of its own."
    print(kind, killed_and_resumed(world, go, kind, tmp_path/'a'/kind, 20, seed=f'{kind} 20'), 'of 20 kills hit')
    for n in moments(world.touches_of(kind), 20):
        out = tmp_path/f'at-{n}'/kind
        out.parent.mkdir()
        assert go(kind, out, touch=n, signal=KILL).status == -KILL
        assert go(kind, out).status == 0 and not same(world, kind, out), n

# ---- stopped

def stopped(go, out, kind, sign, touch):
    done = go(kind, out, touch=touch, signal=sign)
    assert done.status == 128 + sign, done.err[-3000:]
    assert len(done.said) == 1 and done.said[0].endswith('run the same command again to go on')
    assert ('SIGTERM' in done.said[0]) == (sign == TERM) and 'Traceback' not in done.err
    assert not half_written(out)

def stopped_and_resumed(world, go, out, kind, sign, at):
    stopped(go, out, kind, sign, max(1, int(at * world.touches_of(kind))))
    assert go(kind, out).status == 0 and not same(world, kind, out)

@pytest.mark.slow
@pytest.mark.parametrize('sign', [INT, TERM])
@pytest.mark.parametrize('kind', KINDS)
def test_a_stop_at_ten_moments(world, go, tmp_path, kind, sign):
    for i in range(10): stopped_and_resumed(world, go, tmp_path/f'{i}'/kind, kind, sign, at=.05 + i / 10.6)

@slow_but(kinds=('llava', 'tables'))
def test_each_signal_once(world, go, tmp_path, kind):
    "Ctrl-C, SIGTERM and SIGKILL on one folder, and then it goes on to its end."
    out, touches = tmp_path/kind, world.touches_of(kind)
    stopped(go, out, kind, INT, touch=touches // 2)
    stopped(go, out, kind, TERM, touch=25) # of a run that goes on there are fewer touches
    assert go(kind, out, touch=30, signal=KILL).status == -KILL
    assert go(kind, out).status == 0 and not same(world, kind, out) and not half_written(out)

# ---- no room, and no permission

def no_room(done):
    "A run that ended with one line about the room that is missing."
    one = (done.status, len(done.said)) == (2, 1) and 'Traceback' not in done.err
    return one and 'no room left for' in done.said[0]

QUICKEST = 'embed',

@slow_but(*QUICKEST)
def test_a_file_that_may_not_grow_stops_the_run_with_one_line(world, go, tmp_path, kind):
    "A quota, which every system has: no file beyond a size. Once it is lifted, the same command goes on."
    out = tmp_path/kind
    done = go(kind, out, fsize=LARGEST[kind])
    assert no_room(done), done.err[-2000:]
    assert not half_written(out)
    assert go(kind, out).status == 0 and not same(world, kind, out)

def size_of(folder): return sum(-(-p.stat().st_size // 4096) * 4096 for p in Path(folder).rglob('*') if p.is_file())

@pytest.mark.slow
@pytest.mark.parametrize('share', [.2, .5, .8])
@pytest.mark.parametrize('kind', KINDS)
def test_a_full_disk_stops_the_run_with_one_line(world, go, tmp_path, kind, share):
    "A file system that is too small, which is enlarged afterwards."
    with small_disk(tmp_path/'disk', int(share * size_of(world/kind))) as remount:
        if remount is None: pytest.skip('mounting a small tmpfs needs root')
        out = tmp_path/'disk'/kind
        done = go(kind, out)
        assert no_room(done), done.err[-2000:]
        assert not half_written(out)
        remount('size=200m')
        assert go(kind, out).status == 0 and not same(world, kind, out)

@slow_but('llava')
def test_a_folder_that_cannot_be_written_is_named(go, tmp_path, kind):
    "A file in its place, for root may write everywhere else."
    (tmp_path/kind).write_text('a file')
    done = go(kind, tmp_path/kind)
    assert done.status == 2 and len(done.said) == 1 and str(tmp_path/kind) in done.said[0]
    assert (tmp_path/kind).read_text() == 'a file'

@slow_but('embed')
def test_a_folder_that_can_only_be_read_is_named(world, go, tmp_path, kind):
    "Half of a run lies on a disk that is then mounted for reading."
    out = tmp_path/'disk'/kind
    with small_disk(tmp_path/'disk', 20_000_000) as remount:
        if remount is None: pytest.skip('mounting a small tmpfs needs root')
        assert go(kind, out, touch=world.touches_of(kind) // 2, signal=KILL).status == -KILL
        remount('ro')
        for there in (out, out.with_name('another')): # one that is begun, and one that is new
            done = go(kind, there)
            assert done.status == 2 and len(done.said) == 1 and 'ead-only file system' in done.said[0], done.err[-2000:]
        remount('rw')
        assert go(kind, out).status == 0 and not same(world, kind, out)

# ---- one of two processes that train together

@pytest.mark.slow
@pytest.mark.parametrize('kind, step', [('align', 'checkpoints/step-000002'), ('text', 'checkpoint.pt')])
def test_when_one_of_two_is_killed_the_command_ends_with_a_line_and_goes_on(world, zygote, tmp_path, kind, step):
    "Smaller trainings, and both processes killed in turn, are in tests/test_train.py and tests/test_tune.py."
    def command(out): return *KINDS[kind](world), '--out', out
    def pair(out): return [b.wait() for b in zygote.begin_together(*command(out), **ALL)]
    for done in pair(tmp_path/'whole'/kind): assert done.status == 0, done.err[-3000:]
    out = tmp_path/kind
    other = zygote.killed_in_a_pair(1, (out/step).exists, *command(out), **ALL)
    assert other.status == 2 and 'has ended without a word' in other.said[-1], other.err[-3000:]
    for done in pair(out): assert done.status == 0, done.err[-3000:]
    assert not differing(left(tmp_path/'whole'/kind), left(out))

# ---- two at once, and clocks

def told_who_is_there(done, out, pid):
    assert done.status == 2 and len(done.said) == 1, done.err[-3000:]
    assert f'{out} is being written by process {pid} on ' in done.said[0]

def test_two_that_generate_share_the_shards_and_say_so(world, go, tmp_path):
    out, held, free = tmp_path/'generate', tmp_path/'held', tmp_path/'free'
    first = go('generate', out, wait=False, hold_at='.shard-00000', held=held, go=free) # while it writes the shard
    faults.wait_for(held)
    assert list(out.glob('.lock-*'))
    second = go('generate', out)
    assert second.status == 0 and 'is being made by another process and is left to it' in second.err
    assert 'not complete' in second.err and len(list(out.glob('shard-*.parquet'))) < 3
    free.touch()
    assert first.wait().status == 0 and not same(world, 'generate', out)

@pytest.mark.slow
def test_jobs_of_different_parts_embed_into_one_folder(world, go, tmp_path):
    out, held, free = tmp_path/'embed', tmp_path/'held', tmp_path/'free'
    first = go('embed', out, '--part', '0/2', wait=False, hold=world.touches_of('embed') // 2, held=held, go=free)
    faults.wait_for(held)
    assert go('embed', out, '--part', '1/2').status == 0
    assert go('embed', out, '--part', '0/2').status == 2
    free.touch()
    assert first.wait().status == 0 and not same(world, 'embed', out)

@pytest.mark.slow
def test_a_whole_run_and_the_jobs_of_parts_keep_each_other_out(world, go, tmp_path):
    "Whichever comes first: the other is told, and what the first is writing stays."
    for i, (first, then, touch) in enumerate([(('--part', '0/2'), (), 25), ((), ('--part', '1/2'), 25)]):
        out, held, free = tmp_path/f'{i}'/'embed', tmp_path/f'held-{i}', tmp_path/f'free-{i}'
        begun = go('embed', out, *first, wait=False, hold=touch, held=held, go=free)
        faults.wait_for(held)
        (half := out/'.half.tmp').touch()
        told_who_is_there(go('embed', out, *then), out, begun.pid)
        assert half.exists()
        free.touch()
        assert begun.wait().status == 0
        assert half.exists() == bool(first) # a part is not alone, and does not tidy up
        assert go('embed', out).status == 0 and not same(world, 'embed', out) and not half_written(out)

DAY = 86_400.

@slow_but('text')
def test_a_clock_that_jumps_changes_nothing(world, go, tmp_path, kind):
    "A day forwards and back at every look, and a run that goes on a day before it began."
    out = tmp_path/kind
    assert go(kind, out, clock=[0., -DAY, DAY], touch=world.touches_of(kind) // 2, signal=KILL).status == -KILL
    done = go(kind, out, clock=[-DAY])
    assert done.status == 0 and not same(world, kind, out)
    for receipt in out.glob('shard-*.json'): assert 0 <= json.loads(receipt.read_text())['seconds'] < 600

def test_a_bar_counts_by_a_clock_that_nobody_sets(monkeypatch, capsys):
    from gmail_nb.files import progress
    bar = progress((), 'counting', total=10)
    monkeypatch.setattr(time, 'time', lambda: 0.)
    bar.update(5)
    assert 0 <= bar.format_dict['elapsed'] < 60 and 'rate' in bar.format_dict
    bar.close()

@pytest.mark.slow # processes that decode import everything again
def test_ctrl_c_is_for_the_command_and_not_for_the_processes_that_decode_for_it(world, go, tmp_path):
    "A terminal sends it to all of them."
    begun = go('align', tmp_path/'align', '--processes', 1, wait=False, hold=world.touches_of('align') // 2,
               held=tmp_path/'held', go=tmp_path/'free')
    faults.wait_for(tmp_path/'held')
    os.killpg(begun.pid, INT)
    (tmp_path/'free').touch()
    done = begun.wait()
    assert done.status == 130 and 'Traceback' not in done.err, done.err[-2000:]

# ---- files that are damaged

def flipped(at): # at: a share of the length
    def damage(path, other):
        content = bytearray(path.read_bytes())
        content[min(int(at * len(content)) + 6, len(content) - 6)] ^= 4
        path.write_bytes(bytes(content))
    return damage

def cut(path, other):
    content = path.read_bytes()
    n = len(content) // 2
    path.write_bytes(content[:n - 3 * (b'\n' in content[n - 3:n])]) # within a line

DAMAGES = dict(header=flipped(0), middle=flipped(.5), end=flipped(1), cut=cut, empty=lambda p, o: p.write_bytes(b''),
               another=lambda p, o: shutil.copyfile(o, p))

@pytest.fixture(scope='module')
def others(world, zygote, tmp_path_factory):
    "Runs of the same kinds with another seed, or another model, whose files are put in the place of the right ones."
    folder = tmp_path_factory.mktemp('others')
    more = dict(generate=('--suffix', 'in ink'), embed=('--model', world/'align', '--side', 'generated'),
                align=('--seed', 1), text=('--seed', 1), caption=('--seed', 1), llava=('--seed', 1), demo=('--seed', 1))
    @cache
    def other(kind): # made when it is asked for
        done = zygote.run(*KINDS[kind](world), *more.get(kind, ()), '--out', folder/kind, **ALL)
        assert done.status == 0, done.err[-3000:]
        return folder/kind
    return other

def damaged_copy(world, others, tmp_path, kind, name, damage):
    "A copy of a run in which one file is not as it was written; the file."
    out = tmp_path/kind
    shutil.copytree(world/kind, out)
    if kind == 'text': (tmp_path/'align').symlink_to(world/'align') # which lies beside it
    path, other = sorted(out.glob(name))[0], None
    if damage == 'another':
        alike = sorted(out.glob(name))[1:] # of another set in the same run, or of another run
        other = alike[0] if alike else sorted(others(kind).glob(name))[0]
        if other.read_bytes() == path.read_bytes(): pytest.skip('that of the other run is the same')
    DAMAGES[damage](path, other)
    return out, path

def reader(room, name, at=''):
    "A function of the package that reads what lies in the folder of a run."
    def read(folder): return getattr(import_module(f'gmail_nb.{room}'), name)(folder/at)
    return read

load_images, load_results = reader('generate', 'load_generated'), reader('files', 'read_results', 'results.jsonl')
load_aligned = lambda folder: import_module('gmail_nb.align').GenReal.from_pretrained(folder)
load_text, load_llava = reader('tune', 'load_tuned'), reader('llava_training', 'load_trained')
load_writer = reader('captioning', 'load_captioner', 'captioner')
load_embedded = lambda folder: import_module('gmail_nb.features').load_features(folder, verify=True)
load_kept = reader('splits', 'trained_on')

# kind of command, file, and what reads it
READ = [('generate', 'shard-00001-of-00003.parquet', load_images), ('generate', 'manifest.json', load_images),
        ('report', 'quality.parquet', load_images), ('align', 'results.jsonl', load_results),
        ('align', 'adapter/adapter_model.safetensors', load_aligned),
        ('align', 'projections.safetensors', load_aligned),
        ('align', 'adapter/adapter_config.json', load_aligned), ('align', 'card.json', load_aligned),
        ('align', 'trained_on.parquet', load_kept), ('align', 'trained_on.json', load_kept),
        ('text', 'text.safetensors', load_text), ('text', 'projection.safetensors', load_text),
        ('text', 'card.json', load_text),
        ('embed', 'features.npy', load_embedded), ('embed', 'keys.parquet', load_embedded),
        ('embed', 'card.json', load_embedded),
        ('caption', 'captioner/captioner.safetensors', load_writer), ('caption', 'captioner/card.json', load_writer),
        ('llava', 'projector.safetensors', load_llava), ('llava', 'adapter/adapter_model.safetensors', load_llava),
        ('llava', 'card.json', load_llava)]

def some(cases, every):
    "Every so-many-th case of files and damages; the others are slow."
    n = len(DAMAGES)
    return [pytest.param(*c, d, id=f'{c[0]}-{c[1]}-{d}', marks=[] if (i * 5 + j) % every == 0 and c[0] != 'demo' else pytest.mark.slow)
            for i, c in enumerate(cases) for j, d in enumerate(DAMAGES)]

@pytest.mark.parametrize('kind, name, read, damage', some(READ, 13))
def test_a_damaged_file_is_refused_by_name(world, others, tmp_path, kind, name, read, damage):
    "Read it: an error that names it or its folder."
    if name == 'results.jsonl' and damage in ('another', 'empty'): pytest.skip('each record stands for itself')
    read(world/kind)
    out, path = damaged_copy(world, others, tmp_path, kind, name, damage)
    with pytest.raises((ValueError, OSError)) as e: read(out)
    assert path.name.split('.')[0] in str(e.value) or kind in str(e.value), e.value

# what the same command makes anew, or names and leaves
CHECKPOINT = 'weights.safetensors', 'optimizer.pt', 'rng-0.pt', 'state.json'
AGAIN = [('generate', 'shard-00001-of-00003.parquet'), ('generate', 'shard-00001-of-00003.json'),
         ('generate', 'manifest.json'),
         ('generate', 'settings.json'), ('generate', 'captions.parquet'), ('report', 'quality.parquet'),
         ('embed', 'features.npy'), ('embed', 'keys.parquet'), ('embed', 'settings.json'), ('embed', 'card.json'),
         ('embed', 'done/00001.json'),
         ('align', 'log.jsonl'), ('align', 'real_features/features.npy'),
         *[('align', f'checkpoints/step-000004/{n}') for n in CHECKPOINT],
         ('text', 'features/*/features.npy'), ('caption', 'features/*/features.npy'),
         ('caption', 'encoded/tokens.int32'),
         ('caption', 'encoded/lengths.npy'), ('caption', 'checkpoints/step-000004/weights.safetensors'),
         ('caption', 'checkpoints/step-000004/state.json'), ('llava', 'tokens/*/features.npy'),
         ('llava', 'checkpoints/instruct/step-000003/weights.safetensors'),
         ('llava', 'checkpoints/project/step-000003/optimizer.pt'),
         ('eval', 'features/*/features.npy'), ('eval', 'features/*.npy'), ('eval', 'queries/*.npz'),
         ('eval', 'results.jsonl'),
         ('demo', 'cache/*.safetensors'), ('demo', 'generated_A_12x3_0/shard-00000-of-00001.parquet')]

@pytest.mark.parametrize('kind, name, damage', some(AGAIN, 60))
def test_a_damaged_file_is_made_anew_or_named(world, others, go, tmp_path, kind, name, damage):
    out, path = damaged_copy(world, others, tmp_path, kind, name, damage)
    damaged = path.read_bytes()
    done = go(kind, out)
    if done.status == 0: # made anew
        assert not same(world, kind, out)
        its_own = (name, damage) == ('results.jsonl', 'another') # these differ in their second alone
        assert its_own or path.read_bytes() != damaged
    else: # or named, and nothing was done
        said = done.said or [l for l in done.err.splitlines() if ' not measured: ' in l] # eval goes on with other rows
        assert done.status == 2 and len(said) == 1 and 'defect' not in done.err, done.err[-2000:]
        assert any(n in said[0] for n in (path.name, path.stem, path.parent.name)), said
        assert path.read_bytes() == damaged

FEATURES = dict(embed='features.npy', align='real_features/features.npy', text='features/*/features.npy',
                caption='features/*/features.npy', llava='tokens/*/features.npy', eval='features/*/features.npy')

@slow_but('align', kinds=FEATURES)
def test_a_flipped_byte_of_features_is_named_before_they_are_used(world, go, tmp_path, kind):
    "In the middle of the file. The part is made anew from its images, and the command says so."
    out, path = damaged_copy(world, None, tmp_path, kind, FEATURES[kind], 'middle')
    done = go(kind, out)
    assert done.status == 0 and not same(world, kind, out), done.err[-2000:]
    assert f'{path.parent.name}/features.npy: rows ' in done.err and 'not as they were written' in done.err

# ---- Ray, where it is installed

@pytest.mark.slow
def test_ray_embeds_as_one_process_does_and_outlives_a_worker(tmp_path):
    "Two workers fill the parts; one of them is killed when the first parts are there."
    pytest.importorskip('ray')
    psutil, threading = pytest.importorskip('psutil'), __import__('threading')
    from gmail_nb.features import embed
    from gmail_nb.settings import EmbedSettings
    ds, killed = emoji('B', 'noto').select(range(320)), []
    settings = EmbedSettings(8, part_rows=8, show_progress=False)
    calm = embed(ds, 'embedded', tmp_path/'calm', settings=settings)
    def kill():
        while len(list((tmp_path/'ray').glob('done/*.json'))) < 3: time.sleep(.05)
        for p in psutil.Process().children(recursive=True):
            if any('EmbedActor' in part for part in (p.name(), *p.cmdline())):
                killed.append(len(list((tmp_path/'ray').glob('done/*.json'))))
                p.kill()
                return
    threading.Thread(target=kill, daemon=True).start()
    found = embed(ds, 'embedded', tmp_path/'ray', settings=replace(settings, engine='ray', workers=2))
    import ray
    ray.shutdown()
    print(f'killed with {killed} of 40 parts whole')
    assert killed and killed[0] < 40 and not differing(left(tmp_path/'calm'), left(tmp_path/'ray'))
