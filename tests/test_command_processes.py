"""Training from the shell over two processes: `accelerate launch -m gmail_nb.cli.commands tune ...` ends where one
process ends, in what it measures and in what it saves."""
import gmail_nb.runtime
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gmail_nb.align import GenReal
from gmail_nb.captioning import caption_tokenizer, small_decoder
from gmail_nb.data import emoji, quiet_datasets
from gmail_nb.encoders import load_encoder
from gmail_nb.files import read_results
from gmail_nb.runtime import set_seed
from gmail_nb.settings import AdapterSettings
from gmail_nb.splits import trained_on
from test_llava import trained_like

def weight(item): return 120

LAUNCH = ('-m', 'accelerate.commands.launch', '--cpu', '--num_processes', '2', '--num_machines', '1',
          '--mixed_precision', 'no', '--dynamo_backend', 'no')

# of numbers that two processes add up in another order; Adam makes much of rounding where a gradient is zero
LOSS, WEIGHT = 1e-3, 5e-3

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Real drawings, those of another style in the place of generated ones, an aligned model, a language model."
    home = tmp_path_factory.mktemp('home')
    with quiet_datasets():
        for name, split, style in (('real', 'B', 'noto'), ('drawn', 'B', 'fluent'), ('test', 'A', 'noto')):
            ds = emoji(split, style).sort('key')
            ds.select(range(40 if name != 'test' else 6)).to_parquet(home/f'{name}.parquet')
    model = GenReal(load_encoder('embedded'), AdapterSettings(rank=2, adapted_share=1/7))
    trained_like(model)
    model.save_pretrained(home/'aligned')
    set_seed(0)
    words = caption_tokenizer([c for style in ('noto', 'fluent') for cs in emoji('B', style)['captions'] for c in cs])
    small_decoder(words, layers=2, width=32, dropout=0.).save_pretrained(home/'lm') # processes draw masks of their own
    words.save_pretrained(home/'lm')
    return home

def run(home, *argv, processes=1):
    "A command in a shell. Without Java, which two of the scores would take."
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PATH': '', 'PYTHONPATH': str(Path(__file__).parent.parent)}
    launch = LAUNCH if processes > 1 else ()
    done = subprocess.run([sys.executable, *launch, '-m', 'gmail_nb.cli.commands', *map(str, argv)], cwd=home,
                          capture_output=True, text=True, env=env)
    assert done.returncode == 0, f'{processes}: {done.stderr[-3000:]}'
    return done.stdout

def close(one, two, atol):
    "Tensors of two files, by name."
    a, b = load_file(one), load_file(two)
    assert a.keys() == b.keys() and a, (one, sorted(a.keys() ^ b.keys()))
    for k in a: torch.testing.assert_close(b[k], a[k], atol=atol, rtol=0, msg=lambda m, k=k: f'{two}, {k}: {m}')

def moved(folder, name, key):
    "Whether the weights are others than at the start: a comparison of nothing would pass too."
    return not torch.equal(load_file(folder/name)[key], torch.eye(256))

def measures(folder):
    "Numbers of the verdict on a card."
    return json.loads((folder/'card.json').read_text())['verdict']['measures']

def near(one, two, atol):
    "Nested numbers, nearly equal."
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for k in one: near(one[k], two[k], atol)
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for a, b in zip(one, two): near(a, b, atol)
    elif isinstance(one, float): assert two == pytest.approx(one, abs=atol)

@pytest.mark.slow
def test_two_processes_tune_a_text_side_as_one(home):
    argv = ('tune', 'text', 'real.parquet', '--generated', 'drawn.parquet', '--model', 'aligned', '--arm', 'mix',
            '--steps', 12, '--every', 4, '--batch-size', 15, '--validation-share', .25)
    said = [run(home, *argv, '--out', f'text{n}', processes=n).splitlines() for n in (1, 2)]
    one, two = home/'text1', home/'text2'
    assert moved(one, 'projection.safetensors', 'weight')
    for name in ('text', 'projection'): close(one/f'{name}.safetensors', two/f'{name}.safetensors', WEIGHT)
    near(measures(one), measures(two), .05) # a query of ten that changes its rank
    assert trained_on(one) == trained_on(two)
    assert [l.replace('text2', 'text1') for l in said[1] if l.startswith('tuned:')] == [said[0][-1]] # said once
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())

@pytest.mark.slow
def test_two_processes_tune_a_captioner_as_one(home):
    argv = ('tune', 'caption', 'real.parquet', '--generated', 'drawn.parquet', '--model', 'aligned', '--arm', 'both',
            '--test', 'test.parquet', '--lm', 'lm', '--steps', 12, '--batch-size', 15, '--max-new-tokens', 6)
    for n in (1, 2): run(home, *argv, '--out', f'captions{n}', processes=n)
    one, two = home/'captions1', home/'captions2'
    losses = [[r['loss'] for r in read_results(f/'log.jsonl') if 'loss' in r] for f in (one, two)]
    assert len(losses[0]) == 12 and losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], abs=LOSS)
    files = [p.relative_to(one) for p in sorted((one/'captioner').rglob('*.safetensors'))]
    assert files
    for file in files: close(one/file, two/file, WEIGHT)
    scores = [{r['metric']: r['value'] for r in read_results(f/'results.jsonl')} for f in (one, two)]
    assert scores[0].keys() == scores[1].keys() and scores[1] == pytest.approx(scores[0], abs=.05)
    assert trained_on(one/'captioner') == trained_on(two/'captioner')
