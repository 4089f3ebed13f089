"Alignment over processes: several of them follow the curve of one, and a run that is killed ends in the weights of one that is not."
import json, random, signal, subprocess, sys, time
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file

script = str(Path(__file__).with_name('align_once.py'))

def weight(item): return 20

def launcher(processes): return ('-m', 'torch.distributed.run', f'--nproc_per_node={processes}', '--master_port=0', '--rdzv_backend=c10d', '--rdzv_endpoint=localhost:0')

def run(out, *more, processes=1):
    "Histories and weights by the name of the alignment."
    out.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, *(launcher(processes) if processes > 1 else ()), script, str(out), *map(str, more)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {p.stem: (json.loads(p.read_text()), load_file(p.with_suffix('.safetensors'))) for p in out.glob('*.json')}

def compare(alone, together):
    for name, (history, weights) in alone.items():
        others, found = together[name]
        assert len(history) == len(others), name
        assert max(abs(a['loss'] - b['loss']) for a, b in zip(history, others)) < 1e-4, name
        for k in weights: torch.testing.assert_close(found[k], weights[k], atol=2e-3, rtol=0, msg=name) # Adam makes much of rounding where a gradient is zero
    assert len(alone['even'][0]) == 40 and alone['even'][0][-1]['loss'] < alone['even'][0][0]['loss']
    assert len(alone['stops'][0]) == 12 # three looks, the first the best
    assert alone['tau'][0][-1]['tau'] != pytest.approx(.07, abs=1e-4)

def test_two_processes_follow_the_curve_of_one(tmp_path):
    "With batches that do not divide by two as well; the script makes every gather an error."
    compare(run(tmp_path/'one'), run(tmp_path/'two', processes=2))

@pytest.mark.slow
def test_three_processes_follow_the_curve_of_one(tmp_path):
    "Of a batch of two, the third process gets no row."
    compare(run(tmp_path/'one'), run(tmp_path/'three', processes=3))

def newest(checkpoints): return max([int(p.name[5:]) for p in checkpoints.glob('step-*')], default=0)

def kill_at_random(tmp_path, kills, seed=0, total=48):
    "Start; kill in or behind a random step, as the checkpoints tell; start again; at last let it run."
    rng, out, checkpoints = random.Random(seed), tmp_path/'killed', tmp_path/'checkpoints'
    out.mkdir()
    whole, weights = run(tmp_path/'whole', tmp_path/'others')['kept']
    for target in sorted(rng.sample(range(1, total - 6), kills)):
        p = subprocess.Popen([sys.executable, script, str(out), str(checkpoints)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while newest(checkpoints) < target and p.poll() is None: time.sleep(.001)
        time.sleep(rng.uniform(0, .01))
        assert p.poll() is None, 'the run was over before it could be killed'
        p.send_signal(signal.SIGKILL); p.wait()
        assert target <= newest(checkpoints) < total
    killed, found = run(out, checkpoints)['kept']
    assert [r['loss'] for r in killed] == [r['loss'] for r in whole] == [json.loads(line)['loss'] for line in (checkpoints/'log.jsonl').read_text().splitlines()]
    assert len(killed) == total and all(torch.equal(found[k], weights[k]) for k in weights)

def test_killed_and_resumed_ends_in_the_same_weights(tmp_path): kill_at_random(tmp_path, 2)

@pytest.mark.slow
def test_twenty_kills(tmp_path): kill_at_random(tmp_path, 20, seed=1)

@pytest.mark.slow
def test_the_command_on_two_processes(tmp_path):
    "`gmail_align` as `accelerate launch` starts it ends where one process ends."
    from gmail_nb.data import emoji
    from gmail_nb.generate import generate
    emoji('A', source='noto').select(range(40)).select_columns(['key', 'image', 'captions']).to_parquet(tmp_path/'real.parquet')
    generate(str(tmp_path/'real.parquet'), 'embedded', tmp_path/'generated', steps=1, show_progress=False)
    for name, processes in (('one', 1), ('two', 2)):
        options = ('--adapted', '.43', '--held-out', '.3', '--epochs', '2', '--batch-size', '7', '--equal-captions', 'together', '--out', tmp_path/name)
        done = subprocess.run([sys.executable, *(launcher(processes) if processes > 1 else ()), '-m', 'gmail_nb.align_cli', str(tmp_path/'real.parquet'), str(tmp_path/'generated'), *map(str, options)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = ([json.loads(line) for line in (tmp_path/name/'log.jsonl').read_text().splitlines()] for name in ('one', 'two'))
    assert len(one) == len(two) and max(abs(a['loss'] - b['loss']) for a, b in zip(one, two)) < 1e-4 and (tmp_path/'two'/'card.json').exists()
