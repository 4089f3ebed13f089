"Generation under kills, damage, full disks and odd input. Most tests draw with a stand-in pipeline, for what is tested is the bookkeeping."

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st

import gmail_nb.runtime
from gmail_nb import generate as g
from gmail_nb import shards
from gmail_nb.data import emoji
from gmail_nb.generate import generate, load_generated
from gmail_nb.pipelines import load_generator, tiny_stable_diffusion
from gmail_nb.plan import read_captions
from gmail_nb.settings import DrawSettings, Generator, SourceSettings, WorkSettings


class NoisePipeline:
    "Draws noise; the first row of an image tells which prompt it was given."
    dtype, _execution_device, tokenizer = torch.float32, torch.device('cpu'), None

    def __call__(self, prompt, generator, num_inference_steps, guidance_scale, output_type, height=64, width=64):
        images = []
        for p, gen in zip(prompt, generator, strict=True):
            image = torch.rand(height, width, 3, generator=gen).numpy()
            image[0, :32, 0] = np.frombuffer(hashlib.sha256(p.encode()).digest(), np.uint8)/255
            images.append(image)
        return SimpleNamespace(images=np.stack(images))


def prompt_mark(row):
    "The digest of the prompt that was drawn into an image."
    return np.asarray(row['image'])[0, :32, 0].tobytes()

def settings_of(**options):
    "Settings by the names of their fields."
    kinds = dict(draw=DrawSettings, source=SourceSettings, work=WorkSettings)
    of = {name: {f.name: options.pop(f.name) for f in fields(kind) if f.name in options}
          for name, kind in kinds.items()}
    assert not options, options
    return {name: kinds[name](**given) for name, given in of.items()}

def made(captions, generator, out, pipeline=None, show_progress=False, **options):
    "`generate` with settings by the names of their fields."
    return generate(captions, generator, out, pipeline=pipeline,
                    **settings_of(show_progress=show_progress, **options))

def run(captions, out, **options):
    return made(captions, 'embedded', out, pipeline=NoisePipeline(), **options)

def shard_bytes(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).glob('shard-*.parquet'))}

CAPTIONS = {f'k{i}': f'caption number {i}' for i in range(23)}


# ---- what a row says is what was drawn

text = st.text(min_size=1, max_size=300).filter(lambda s: s.strip())
odd_keys = st.one_of(
    text,
    st.sampled_from(
        [
            'a/b/../c',
            '.',
            '..',
            'ключ',
            '鍵',
            '🦊',
            'x' * 300,
            'with space',
            'new\nline',
            "quote'\"",
            'NUL?',
            'shard-00000-of-00001.parquet',
        ]
    ),
)


@hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    captions=st.dictionaries(odd_keys, text, min_size=1, max_size=6),
    samples=st.sampled_from([1, 2, 7]),
    shard_size=st.integers(1, 11),
    batch_size=st.integers(1, 5),
)
def test_every_image_stands_beside_its_caption(tmp_path_factory, captions, samples, shard_size, batch_size):
    out = tmp_path_factory.mktemp('run')
    ds = load_generated(run(captions, out, samples=samples, shard_size=shard_size, batch_size=batch_size))
    assert [(r['key'], r['sample']) for r in ds] == [(k, s) for k in captions for s in range(samples)]
    for row in ds:
        assert row['caption'] == captions[row['key']]
        assert prompt_mark(row) == hashlib.sha256(row['caption'].encode()).digest()
    assert len(set(ds['sha256'])) == len(set(ds['seed'])) == len(ds)
    shutil.rmtree(out)

def test_layout_and_order_change_no_image(tmp_path):
    def images(folder): return {(r['key'], r['sample']): r['sha256'] for r in load_generated(folder)}
    first = images(run(CAPTIONS, tmp_path/'a', samples=3, shard_size=16, batch_size=4))
    reverse = dict(reversed(CAPTIONS.items()))
    assert first == images(run(reverse, tmp_path/'b', samples=3, shard_size=5, batch_size=3))
    for i in (2, 0, 1): run(CAPTIONS, tmp_path/'c', samples=3, shard_size=4, part=(i, 3))
    assert first == images(tmp_path/'c')

def test_several_captions_of_a_key(tmp_path):
    captions = {'a': ['one', 'two'], 'b': ['three']}
    ds = load_generated(run(captions, tmp_path/'x', which='all', samples=2))
    assert [(r['key'], r['sample'], r['caption']) for r in ds] == [
        ('a', 0, 'one'),
        ('a', 1, 'one'),
        ('a', 2, 'two'),
        ('a', 3, 'two'),
        ('b', 0, 'three'),
        ('b', 1, 'three'),
    ]


@pytest.mark.parametrize(
    'captions, message',
    [
        ([('a', 'x'), ('a', 'y')], "the key 'a' occurs more than once"),
        ({'k': ''}, "empty caption for the key 'k'"),
        ({'k': ' \n\t'}, "empty caption for the key 'k'"),
        ([], 'not one caption'),
        ([('', 'x')], 'have no key'),
    ],
)
def test_wrong_captions_are_named(tmp_path, captions, message):
    with pytest.raises(ValueError, match=message): run(captions, tmp_path/'x')


# ---- damage

@pytest.mark.parametrize(
    'damage', ['truncate', 'flip', 'empty', 'no receipt', 'bad receipt', 'list receipt', 'text', 'other run', 'lost']
)
def test_damage_is_repaired(tmp_path, damage, caplog):
    out = run(CAPTIONS, tmp_path/'run', shard_size=8)
    before, victim = shard_bytes(out), sorted(out.glob('shard-*.parquet'))[1]
    content = victim.read_bytes()
    if damage == 'truncate': victim.write_bytes(content[:-7])
    if damage == 'flip': victim.write_bytes(content[:99] + bytes([content[99] ^ 8]) + content[100:])
    if damage == 'empty': victim.write_bytes(b'')
    if damage == 'text': victim.write_text('not parquet')
    if damage == 'no receipt': victim.with_suffix('.json').unlink()
    if damage == 'bad receipt': victim.with_suffix('.json').write_text('{')
    if damage == 'list receipt': victim.with_suffix('.json').write_text('[]')
    if damage == 'lost': victim.unlink()
    if damage == 'other run':
        other = run({k: c + '!' for k, c in CAPTIONS.items()}, tmp_path/'other', shard_size=8)
        for s in ('.parquet', '.json'): shutil.copy((other/victim.name).with_suffix(s), victim.with_suffix(s))
    run(CAPTIONS, out, shard_size=8)
    assert shard_bytes(out) == before
    assert (victim.name in caplog.text) == (damage != 'lost')

def test_an_incomplete_run_is_not_loaded_by_mistake(tmp_path):
    out = run(CAPTIONS, tmp_path/'run', shard_size=8)
    sorted(out.glob('shard-*.json'))[0].unlink()
    with pytest.raises(ValueError, match='lost shards'): load_generated(out)
    class Bug(NoisePipeline):
        def __call__(self, prompt, **kwargs): raise KeyError('a bug')
    with pytest.raises(KeyError): made(CAPTIONS, 'embedded', out, pipeline=Bug(), shard_size=8)
    with pytest.raises(ValueError, match='not complete'): load_generated(out)
    assert (
        len(load_generated(out, partial=True)) < len(CAPTIONS) == len(load_generated(run(CAPTIONS, out, shard_size=8)))
    )


def test_a_finished_run_loads_nothing(tmp_path, monkeypatch):
    run(CAPTIONS, tmp_path/'run')
    monkeypatch.setattr(g, 'load_generator', lambda *a, **k: pytest.fail('a model was loaded'))
    made(CAPTIONS, 'embedded', tmp_path/'run')

def test_settings_that_differ_stop_the_run(tmp_path):
    run(CAPTIONS, tmp_path/'run', steps=3)
    for change in (dict(steps=4), dict(samples=2), dict(guidance=1.), dict(negative='x'), dict(shard_size=9)):
        with pytest.raises(ValueError, match=f'(?s)other settings.*{next(iter(change))}'):
            run(CAPTIONS, tmp_path/'run', **{'steps': 3, **change})
    with pytest.raises(ValueError, match='captions'): run({**CAPTIONS, 'new': 'one more'}, tmp_path/'run', steps=3)

def test_batches_halve_until_they_fit(tmp_path):
    class Small(NoisePipeline):
        def __call__(self, prompt, **kwargs):
            if len(prompt) > 3: raise torch.OutOfMemoryError('CUDA out of memory')
            return super().__call__(prompt, **kwargs)
    a = made(CAPTIONS, 'embedded', tmp_path/'a', pipeline=Small(), batch_size=16)
    assert shard_bytes(a) == shard_bytes(run(CAPTIONS, tmp_path/'b'))

def test_an_image_that_never_fits_is_a_recorded_failure(tmp_path):
    class Never(NoisePipeline):
        def __call__(self, prompt, **kwargs):
            if 'caption number 7' in prompt: raise RuntimeError('out of memory')
            return super().__call__(prompt, **kwargs)
    out = made(CAPTIONS, 'embedded', tmp_path/'a', pipeline=Never(), batch_size=8)
    assert json.loads((out/'manifest.json').read_text())['failures'] == [
        dict(key='k7', sample=0, reason='out of memory')
    ]
    assert 'k7' not in load_generated(out)['key']
    run(CAPTIONS, out)
    assert len(load_generated(out)) == 22 # not retried unless asked
    run(CAPTIONS, out, retry_failed=True)
    assert shard_bytes(out) == shard_bytes(run(CAPTIONS, tmp_path/'b'))

def test_other_errors_stop_the_run(tmp_path):
    class Bug(NoisePipeline):
        def __call__(self, prompt, **kwargs): raise KeyError('a bug')
    with pytest.raises(KeyError): made(CAPTIONS, 'embedded', tmp_path/'a', pipeline=Bug())

def test_safety_checker_blanks_are_failures(tmp_path):
    class Checked(NoisePipeline):
        def __call__(self, prompt, **kwargs):
            result = super().__call__(prompt, **kwargs)
            result.nsfw_content_detected = [p.endswith('5') for p in prompt]
            return result
    out = made(CAPTIONS, 'embedded', tmp_path/'a', pipeline=Checked())
    assert {(f['key'], f['reason']) for f in json.loads((out/'manifest.json').read_text())['failures']} == {
        ('k5', 'safety checker'),
        ('k15', 'safety checker'),
    }


# ---- wrong settings leave no trace, and damage is never signed off

class Worded(NoisePipeline):
    "A stand-in whose call takes more."

    def __call__(
        self, prompt, generator, num_inference_steps, guidance_scale, output_type, style=None, negative_prompt=None
    ):
        return super().__call__(prompt, generator, num_inference_steps, guidance_scale, output_type)


@pytest.mark.parametrize(
    'wrong, message',
    [
        (dict(options=dict(styel='x')), "unknown option 'styel': did you mean 'style'"),
        (dict(options=dict(prompt='x')), "unknown option 'prompt'"),
        (dict(scheduler='DDIMSheduler'), 'another scheduler'),
        (dict(dtype='float16'), 'float16 is not for a CPU'),
        (dict(negative='x', guidance=1.0), 'ignore the negative prompt'),
        (dict(shard_size=0), 'shard_size is 0'),
        (dict(which='frist'), "which is 'frist'"),
        (dict(engine='rya'), "unknown engine 'rya'"),
    ],
)
def test_a_wrong_setting_does_not_bind_the_folder(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        made(CAPTIONS, 'embedded', tmp_path/'run', pipeline=Worded(), **wrong)
    assert not (tmp_path/'run/settings.json').exists()
    assert len(load_generated(run(CAPTIONS, tmp_path/'run'))) == 23

def test_a_wrong_scheduler_or_width_does_not_bind_the_folder(tmp_path):
    for wrong, message in (
        (dict(scheduler='DDIMSheduler'), "did you mean 'DDIMScheduler'"),
        (dict(scheduler='DDIMScheduler'), 'cannot use'),
        (dict(width=128), 'draws images of width 64, not 128'),
        (dict(options=dict(style='nota')), "unknown style 'nota'"),
    ):
        with pytest.raises(ValueError, match=message): made({'a': 'x'}, 'embedded', tmp_path/'run', steps=1, **wrong)
        assert not (tmp_path/'run/settings.json').exists()

def test_an_error_while_drawing_does_not_bind_the_folder_but_finished_shards_do(tmp_path):
    class Late(NoisePipeline):
        def __call__(self, prompt, **kwargs):
            if 'caption number 9' in prompt: raise KeyError('a bug')
            return super().__call__(prompt, **kwargs)
    with pytest.raises(KeyError): made(CAPTIONS, 'embedded', tmp_path/'a', pipeline=Late(), shard_size=64)
    assert not (tmp_path/'a/settings.json').exists()
    with pytest.raises(KeyError): made(CAPTIONS, 'embedded', tmp_path/'b', pipeline=Late(), shard_size=8)
    assert (tmp_path/'b/settings.json').exists() and not list((tmp_path/'b').glob('.lock*'))

def test_settings_that_do_not_read_are_named(tmp_path):
    (run(CAPTIONS, tmp_path/'run')/'settings.json').write_text('{')
    with pytest.raises(ValueError, match='run/settings.json does not read'): run(CAPTIONS, tmp_path/'run')

@pytest.mark.parametrize('damage', ['truncate', 'no receipt'])
def test_a_part_does_not_sign_off_the_damage_of_another(tmp_path, damage, caplog):
    out = run(CAPTIONS, tmp_path/'run', shard_size=8, part=(0, 2))
    victim = out/'shard-00000-of-00003.parquet'
    if damage == 'truncate': victim.write_bytes(victim.read_bytes()[:-9])
    else: victim.with_suffix('.json').unlink()
    run(CAPTIONS, out, shard_size=8, part=(1, 2))
    assert not (out/'manifest.json').exists() and 'made again' not in caplog.text and f'{victim.name}: ' in caplog.text
    run(CAPTIONS, out, shard_size=8, part=(0, 2))
    assert len(load_generated(out)) == 23

def test_a_part_reads_only_its_own_shards(tmp_path, monkeypatch):
    out, read = run(CAPTIONS, tmp_path/'run', shard_size=4), []
    monkeypatch.setattr(
        shards, 'file_sha256', lambda path, real=shards.file_sha256: (read.append(path.name), real(path))[1]
    )
    run(CAPTIONS, out, shard_size=4, part=(1, 3))
    assert read == ['shard-00001-of-00006.parquet', 'shard-00004-of-00006.parquet']
    run(CAPTIONS, out, shard_size=4, verify=False)
    assert len(read) == 2

def test_two_runs_share_a_folder(tmp_path, caplog):
    "While the first draws its first shard, the second makes the others; nothing is lost, drawn twice or left behind."
    drawn = []
    class Second(NoisePipeline):
        def __call__(self, prompt, **kwargs):
            drawn.extend(prompt)
            return super().__call__(prompt, **kwargs)
    class First(Second):
        def __call__(self, prompt, **kwargs):
            if not drawn: made(CAPTIONS, 'embedded', tmp_path/'run', pipeline=Second(), shard_size=8)
            return super().__call__(prompt, **kwargs)
    made(CAPTIONS, 'embedded', tmp_path/'run', pipeline=First(), shard_size=8)
    assert (
        sorted(drawn) == sorted(CAPTIONS.values())
        and 'shard-00000-of-00003.parquet is being made by another process' in caplog.text
    )
    assert shard_bytes(tmp_path/'run') == shard_bytes(run(CAPTIONS, tmp_path/'calm', shard_size=8)) and not list(
        (tmp_path/'run').glob('.lock*')
    )
    assert len(load_generated(tmp_path/'run')) == 23

def test_a_retry_may_change_the_number_format_and_keeps_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(
        shards, 'truncated_prompts', lambda pipeline, prompts, options: [p for p in prompts if p.endswith('7')]
    )

    class Half(NoisePipeline):
        def __call__(self, prompt, **kwargs):
            result = super().__call__(prompt, **kwargs)
            for i, p in enumerate(prompt):
                if p.endswith('5') and torch.is_autocast_enabled('cpu'): result.images[i] = 0
            return result
    def manifest(): return json.loads((tmp_path/'a/manifest.json').read_text())
    options = dict(pipeline=Half(), shard_size=8)
    made(CAPTIONS, 'embedded', tmp_path/'a', dtype='bfloat16', **options)
    assert len(manifest()['failures']) == 2 and manifest()['truncated'] == 2
    with pytest.raises(ValueError, match='(?s)other settings.*dtype'):
        made(CAPTIONS, 'embedded', tmp_path/'a', dtype='float32', **options)
    seconds = manifest()['seconds']
    made(CAPTIONS, 'embedded', tmp_path/'a', dtype='float32', retry_failed=True, **options)
    assert (
        not manifest()['failures']
        and manifest()['truncated'] == 2
        and manifest()['seconds'] >= seconds
        and manifest()['settings']['dtype'] == 'bfloat16'
    )
    receipts = [json.loads(p.read_text()) for p in sorted((tmp_path/'a').glob('shard-*.json'))]
    assert [r.get('drawn_in') for r in receipts] == [
        [dict(key='k5', sample=0, dtype='float32')],
        [dict(key='k15', sample=0, dtype='float32')],
        None,
    ]
    assert [r['truncated_keys'] for r in receipts] == [['k7'], [], ['k17']]
    assert (
        len(load_generated(made(CAPTIONS, 'embedded', tmp_path/'a', dtype='bfloat16', **options))) == 23
    )  # the folder is what it was


def test_settings_of_a_generator_without_preset_are_its_own(tmp_path):
    given = []
    class Plain(NoisePipeline):
        def __call__(
            self, prompt, generator, output_type, num_inference_steps=3, guidance_scale=4.0, height=64, width=64
        ):
            given.append((num_inference_steps, guidance_scale))
            return super().__call__(prompt, generator, num_inference_steps, guidance_scale, output_type)
    preset = Generator('no/preset', 'no/preset', 'a'*40, image_format='png')
    ds = load_generated(made({'a': 'x'}, preset, tmp_path/'a', pipeline=Plain()))
    assert given == [(3, 4.)] and ds['steps'] == ds['guidance'] == [None] and ds['width'] == [64]

def test_a_folder_without_a_shard_reads_as_empty(tmp_path):
    (tmp_path/'run').mkdir(); (tmp_path/'run/settings.json').write_text('{}')
    assert len(load_generated(tmp_path/'run', partial=True)) == 0

def test_where_captions_come_from_is_told_to_generate(tmp_path):
    (tmp_path/'cc3m.tsv').write_text('a dog\thttp://example.com\n"a cat\thttp://example.com\n')
    ds = load_generated(run(tmp_path/'cc3m.tsv', tmp_path/'run', key=None, caption='0', header=False))
    assert ds['caption'][:] == ['a dog', '"a cat'] and ds['key'][:] == ['000000000', '000000001']


# ---- a disk that fills

def test_full_disk_by_file_size_limit(forks, tmp_path):
    "A quota that every system has: no file may grow beyond a limit."
    script = f"""
import resource
import test_generate as t
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
try: t.run(t.CAPTIONS, {str(tmp_path/'run')!r}, shard_size=8)
except OSError as e: print('STOPPED', e)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
t.run(t.CAPTIONS, {str(tmp_path/'run')!r}, shard_size=8)
"""
    (tmp_path/'limited.py').write_text(script)
    done = forks.run(script=tmp_path/'limited.py')
    assert done.status == 0, done.err
    assert "STOPPED" in done.out and "no room left for the folder 'run'" in done.out
    assert not list((tmp_path/'run').glob('.*.tmp'))
    assert shard_bytes(tmp_path/'run') == shard_bytes(run(CAPTIONS, tmp_path/'calm', shard_size=8))

def test_full_disk_on_a_small_file_system(tmp_path):
    disk = tmp_path/'disk'; disk.mkdir()
    mounted = (
        os.geteuid() == 0
        and subprocess.run(
            ['mount', '-t', 'tmpfs', '-o', 'size=220k', 'tmpfs', str(disk)], capture_output=True
        ).returncode
        == 0
    )
    if not mounted: pytest.skip('mounting a small tmpfs needs root')
    try:
        with pytest.raises(OSError, match='no room left'): run(CAPTIONS, disk/'run', shard_size=4)
        finished = shard_bytes(disk/'run')
        assert 0 < len(finished) < 6
        subprocess.run(['mount', '-o', 'remount,size=20m', str(disk)], check=True)
        run(CAPTIONS, disk/'run', shard_size=4)
        assert shard_bytes(disk/'run') == shard_bytes(run(CAPTIONS, tmp_path/'calm', shard_size=4))
        assert finished.items() <= shard_bytes(disk/'run').items()
    finally: subprocess.run(['umount', str(disk)])


# ---- kills

SCRIPT = """
import sys, pyarrow.parquet as pq
from gmail_nb.generate import generate
from gmail_nb.settings import DrawSettings, WorkSettings
draw = DrawSettings(samples=2, steps=int(sys.argv[3]))
work = WorkSettings(shard_size=int(sys.argv[4]), batch_size=8, show_progress=False)
generate(pq.read_table(sys.argv[1]), 'embedded', sys.argv[2], draw, work=work)
"""

def killed_runs(forks, folder, captions, out, kills, steps, shard_size, window, seed):
    "Kill a run `kills` times, then let it finish; returns the kills that hit a running process, and the finished shards at each."
    path, script, rng, hits, there = folder/'captions.parquet', folder/'draw.py', random.Random(seed), 0, []
    pq.write_table(captions, path)
    script.write_text(SCRIPT)
    def files(): return set(out.glob('.shard*')) | set(out.glob('shard*'))
    while hits < kills:
        seen, begun = files(), None
        process = forks.start(path, out, steps, shard_size, script=script)
        limit = rng.uniform(0, window)
        while process.poll() is None:
            if begun is None and (rng.random() < .0005 or files() - seen):
                begun = time.time() # drawing, or now and then while loading
            if begun is not None and time.time() - begun > limit:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(.005)
        done = process.wait()
        if done.status == 0: break # finished before all kills were spent
        assert done.status == -signal.SIGKILL, done.err
        hits += 1
        there.append(len(list(out.glob('shard-*.json'))))
    done = forks.run(path, out, steps, shard_size, script=script)
    assert done.status == 0, done.err
    return hits, there

def check_killed(forks, tmp_path, n_captions, kills, steps, shard_size, window):
    captions, path = read_captions(emoji(['A', 'B'], 'noto')).slice(0, n_captions), tmp_path/'captions.parquet'
    how = dict(steps=steps, shard_size=shard_size, window=window, seed=n_captions)
    hits, there = killed_runs(forks, tmp_path, captions, tmp_path/'killed', kills, **how)
    calm = forks.run(path, tmp_path/'calm', steps, shard_size, script=tmp_path/'draw.py')
    assert calm.status == 0, calm.err
    print(f'{hits} kills; finished shards at each: {there}')
    ds, text = (
        load_generated(tmp_path/'killed'),
        dict(zip(captions['key'].to_pylist(), captions['caption'].to_pylist())),
    )
    assert hits == kills
    assert len(ds) == 2*n_captions and len(set(zip(ds['key'], ds['sample']))) == 2*n_captions
    assert all(text[k] == c for k, c in zip(ds['key'], ds['caption']))
    assert shard_bytes(tmp_path/'killed') == shard_bytes(tmp_path/'calm')
    assert not [p for p in (tmp_path/'killed').glob('.shard*.tmp')]

def test_two_kills(forks, tmp_path):
    check_killed(forks, tmp_path, n_captions=24, kills=2, steps=2, shard_size=8, window=.5)

@pytest.mark.slow
def test_thirty_kills(forks, tmp_path):
    check_killed(forks, tmp_path, n_captions=400, kills=30, steps=4, shard_size=8, window=2.)

@pytest.mark.slow
def test_ray_workers_and_a_killed_one(tmp_path):
    "Ray gives the bytes of the local engine, also when one of its workers is killed."
    pytest.importorskip('ray')
    psutil = pytest.importorskip('psutil')
    import threading
    captions = read_captions(emoji(['A', 'B'], 'noto')).slice(0, 60)
    options = dict(samples=2, steps=8, shard_size=8, batch_size=8)
    pipeline = load_generator('embedded')
    calm = made(captions, 'embedded', tmp_path/'calm', pipeline=pipeline, **options)
    killed = []
    def kill():
        "Once the second shard is there, kill the process that makes shards."
        while len(list((tmp_path/'ray').glob('shard-*.json'))) < 2: time.sleep(.05)
        for p in psutil.Process().children(recursive=True):
            if 'ShardActor' in p.name() or any('ShardActor' in c for c in p.cmdline()):
                p.kill()
                killed.append(p.pid)
                return

    threading.Thread(target=kill, daemon=True).start()
    made(captions, 'embedded', tmp_path/'ray', engine='ray', workers=2, **options)
    import ray; ray.shutdown()
    assert killed and shard_bytes(tmp_path/'ray') == shard_bytes(calm)


# ---- other pipelines

def test_tiny_stable_diffusion_is_the_same_alone_and_in_a_batch(tmp_path):
    folder = tiny_stable_diffusion(tmp_path/'sd')
    def pixels(out, batch_size):
        return np.stack(
            [
                np.asarray(r['image'])
                for r in load_generated(
                    made(dict(list(CAPTIONS.items())[:5]), folder, tmp_path / out, steps=2, batch_size=batch_size)
                )
            ]
        ).astype(int)

    assert np.abs(pixels('one', 1) - pixels('five', 5)).max() <= 1


# ---- reading it back

def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='no generated images'): load_generated(tmp_path)
    run(CAPTIONS, tmp_path/'part', shard_size=8, part=(0, 2))
    with pytest.raises(ValueError, match='not complete'): load_generated(tmp_path/'part')

def test_keys_samples_and_captions_of_a_loaded_run_are_those_of_the_table(tmp_path):
    captions = read_captions(emoji(['A', 'B'], 'noto')).slice(500, 20)
    texts = dict(zip(captions['key'].to_pylist(), captions['caption'].to_pylist()))
    ds = load_generated(run(captions, tmp_path/'run', samples=3, shard_size=16, batch_size=8))
    assert len(ds) == 60 and set(zip(ds['key'], ds['sample'])) == {(k, s) for k in texts for s in range(3)}
    assert all(texts[k] == c for k, c in zip(ds['key'], ds['caption']))

def test_mended_failures_stand_in_the_order_of_the_plan(tmp_path):
    class Dark(NoisePipeline):
        def __call__(self, prompt, **kwargs):
            result = super().__call__(prompt, **kwargs)
            result.images[[p.endswith('7') for p in prompt]] = 0
            return result
    calm = load_generated(run(CAPTIONS, tmp_path/'calm', shard_size=8))
    out = made(CAPTIONS, 'embedded', tmp_path/'run', pipeline=Dark(), shard_size=8)
    assert len(load_generated(out)) == 21
    mended = load_generated(run(CAPTIONS, out, shard_size=8, retry_failed=True))
    assert not json.loads((out/'manifest.json').read_text())['failures']
    assert mended['key'][:] == calm['key'][:] and mended['sample'][:] == calm['sample'][:]

def test_prefix_and_suffix_are_in_the_prompt_and_not_in_the_caption(tmp_path):
    ds = load_generated(run(CAPTIONS, tmp_path/'run', prefix='see: ', suffix=', a photo'))
    assert all(p == f'see: {c}, a photo' for p, c in zip(ds['prompt'], ds['caption']))
