"Captioners over several processes: the result of one, a stop that takes all along, and checkpoints of another number."
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

script = str(Path(__file__).with_name('caption_once.py'))

def weight(item): return 40

def start(forks, out, *more, processes=1):
    out.mkdir(exist_ok=True)
    return forks.together(script, out, *more, processes=processes)

def run(forks, out, *more, processes=1):
    "Losses and weights by the name of the training."
    for done in start(forks, out, *more, processes=processes): assert done.status == 0, done.err[-3000:]
    return {p.stem: (json.loads(p.read_text()), load_file(p.with_suffix('.safetensors'))) for p in out.glob('*.json')}

def compare(alone, together):
    assert set(alone) == set(together)
    for name, (losses, weights) in alone.items():
        others, found = together[name]
        assert len(losses) == len(others) and max(abs(a - b) for a, b in zip(losses, others)) < 1e-4, name
        for k in weights: # Adam makes much of rounding where a gradient is zero
            torch.testing.assert_close(found[k], weights[k], atol=2e-3, rtol=0, msg=name)

def test_two_processes_follow_the_curve_of_one(forks, tmp_path):
    "With two sources, captions of several lengths, batches that do not divide by two, and a batch of one."
    alone = run(forks, tmp_path/'one')
    assert alone['even'][0][-1] < .9 * alone['even'][0][0] and len(alone['odd'][0]) == 20
    compare(alone, run(forks, tmp_path/'two', processes=2))

def test_a_process_that_dies_takes_the_others_along_with_its_message(forks, tmp_path):
    both = start(forks, tmp_path/'dies', 'dies', processes=2)
    assert all(done.status != 0 for done in both) and 'the second process has had enough' in both[1].err

@pytest.mark.slow
def test_another_number_of_processes_goes_on_where_there_is_no_dropout(forks, tmp_path):
    whole = run(forks, tmp_path/'whole', tmp_path/'a', 12, 0)
    run(forks, tmp_path/'part', tmp_path/'b', 12, 0, processes=2)
    for made in (tmp_path/'b').glob('step-000012'): # as if it had been stopped behind step 8
        for file in made.iterdir(): file.unlink()
        made.rmdir()
    compare(whole, run(forks, tmp_path/'rest', tmp_path/'b', 12, 0))

@pytest.mark.slow
def test_another_number_of_processes_is_refused_where_there_is_dropout(forks, tmp_path):
    run(forks, tmp_path/'two', tmp_path/'c', 8, .1, processes=2)
    done, = start(forks, tmp_path/'one', tmp_path/'c', 8, .1)
    assert done.status != 0 and 'processes is 2 there and 1 here' in done.err
