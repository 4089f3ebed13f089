"Alignment over processes: two of them follow the curve of one, and a run that is killed ends in the weights of one that is not."
import json, random, signal, subprocess, sys, time
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file

script = str(Path(__file__).with_name('align_once.py'))

def weight(item): return 20

def run(out, *more, launcher=()):
    out.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, *launcher, script, str(out), *map(str, more)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out/'history.json').read_text()), load_file(out/'weights.safetensors')

def test_two_processes_follow_the_curve_of_one(tmp_path):
    alone, _ = run(tmp_path/'one')
    together, _ = run(tmp_path/'two', launcher=('-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_port=0', '--rdzv_backend=c10d', '--rdzv_endpoint=localhost:0'))
    assert len(alone) == len(together) == 40 and alone[-1]['loss'] < alone[0]['loss']
    assert max(abs(a['loss'] - b['loss']) for a, b in zip(alone, together)) < 1e-4

def kill_at_random(tmp_path, kills, seed=0):
    "Start, kill after a random time, start again; at last let it run."
    rng, out, checkpoints = random.Random(seed), tmp_path/'killed', tmp_path/'checkpoints'
    out.mkdir()
    start = time.time(); whole, weights = run(tmp_path/'whole', tmp_path/'others'); took = time.time() - start
    for _ in range(kills):
        p = subprocess.Popen([sys.executable, script, str(out), str(checkpoints)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(took * rng.uniform(.3, 1)); p.send_signal(signal.SIGKILL); p.wait()
    killed, found = run(out, checkpoints)
    assert [r['loss'] for r in killed] == [r['loss'] for r in whole]
    assert all(torch.equal(found[k], weights[k]) for k in weights)

def test_killed_and_resumed_ends_in_the_same_weights(tmp_path): kill_at_random(tmp_path, 3)

@pytest.mark.slow
def test_twenty_kills(tmp_path): kill_at_random(tmp_path, 20, seed=1)
