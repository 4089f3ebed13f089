"One folder of captioned pictures goes through every command as it is, and its keys are the same throughout."
import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

def weight(item): return 120

COLOURS = dict(red='#c33', green='#3a3', blue='#36c', grey='#888')
SHAPES = ('ball', 'box', 'kite')

def picture(colour, shape, turn):
    "A shape on a light ground."
    image = Image.new('RGB', (96, 96), '#eee')
    at, draw = 12 + 6 * turn, ImageDraw.Draw(image)
    box = (at, at, 84, 84)
    if shape == 'ball': draw.ellipse(box, fill=COLOURS[colour])
    if shape == 'box': draw.rectangle(box, fill=COLOURS[colour])
    if shape == 'kite': draw.polygon([(48, at), (84, 48), (48, 84), (at, 48)], fill=COLOURS[colour])
    return image

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "24 pictures in sub-folders, with dots and spaces in their names, and a metadata.csv."
    folder, rows = tmp_path_factory.mktemp('my pictures')/'photos v1.0', []
    for turn in range(2):
        for colour in COLOURS:
            for shape in SHAPES:
                name = f'{colour} things/day {turn + 1}/{shape} no. {turn}.{"jpg" if turn else "png"}'
                (folder/name).parent.mkdir(parents=True, exist_ok=True)
                picture(colour, shape, turn).save(folder/name)
                rows.append((name, f'a {colour} {shape}, picture {turn + 1}'))
    with open(folder/'metadata.csv', 'w', newline='') as f: csv.writer(f).writerows([('file_name', 'caption'), *rows])
    return folder, sorted(name.rpartition('.')[0] for name, _ in rows)

def shell(cwd, *argv):
    "What a person sees when the command succeeds."
    done = subprocess.run([sys.executable, '-m', 'gmail_nb.cli.commands', *map(str, argv)], cwd=cwd,
                          capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PATH': ''})
    assert done.returncode == 0, f'{argv}: {done.stderr[-3000:]}'
    return done.stdout

def forked(forks, cwd, *argv):
    "The same from a process that has loaded the libraries, which takes a shell several seconds for each command."
    done = forks.run(*argv, cwd=cwd, env=dict(PATH=''))
    assert done.status == 0, f'{argv}: {done.err[-3000:]}'
    return done.out

def feature_keys(folder): return sorted(pq.read_table(folder/'keys.parquet')['key'].to_pylist())

@pytest.fixture(scope='module', params=['forks', pytest.param('shell', marks=pytest.mark.slow)])
def way(request, photos, forks, tmp_path_factory):
    """The whole way from the folder to a tuned model, and what each command said.

    Two of them start from a shell, as a person's do: the first, and the last, which reads what other processes wrote.
    With `-m slow` all of them do, which takes two minutes."""
    home, folder = tmp_path_factory.mktemp('home'), photos[0]
    steps = [
        ('align', folder, '--generated', 'generated', '--epochs', 3, '--batch-size', 8, '--validation-share', .2,
         '--adapted-share', .43),
        ('embed', folder, '--model', 'aligned', '--out', 'features'),
        ('embed', 'generated', '--model', 'aligned', '--side', 'generated', '--out', 'features_g'),
        ('tune', 'text', '--generated', 'generated', '--model', 'aligned', '--steps', 10, '--batch-size', 8),
        ('tune', 'caption', folder, '--generated', 'generated', '--model', 'aligned', '--steps', 10,
         '--batch-size', 8, '--validation-share', .3, '--max-new-tokens', 4),
        ('eval', folder, '--model', 'tuned:tuned', '--model', 'embedded', '--no-pictures',
         '--equal-keys', 'allow')] # the same pictures: a measure of what was learned by heart
    said = []
    for argv in (('generate', folder, '--steps', 2, '--quiet'), *steps):
        alone = request.param == 'shell' or argv[0] in ('generate', 'eval')
        said.append(shell(home, *argv) if alone else forked(forks, home, *argv))
    return home, said

def test_a_shell_is_told_how_to_go_on(photos, tmp_path):
    "A mistake in the first command, typed in a shell: one line, status 2, and nothing is written."
    done = subprocess.run([sys.executable, '-m', 'gmail_nb.cli.commands', 'align', str(photos[0]), '--generate', 'x'],
                          cwd=tmp_path, capture_output=True, text=True, env={**os.environ, 'PATH': ''})
    assert done.returncode == 2 and "did you mean '--generated'" in done.stderr, done.stderr
    assert 'Traceback' not in done.stderr and not list(tmp_path.iterdir())

def test_every_command_says_where_its_results_lie(way):
    _, said = way
    for text, ends in zip(
        said,
        (
            'images: generated',
            'model: aligned',
            'features: features',
            'features: features_g',
            'tuned: tuned',
            'captioner: captions/captioner',
            'results: eval/results.jsonl',
        ),
    ):
        assert text.splitlines()[-1].startswith(ends), text

def test_the_keys_are_those_of_the_pictures_throughout(way, photos):
    from gmail_nb.generate import load_generated
    home, keys = way[0], photos[1]
    assert sorted(load_generated(home/'generated')['key']) == keys
    assert (
        feature_keys(home/'features')
        == feature_keys(home/'features_g')
        == feature_keys(home/'aligned'/'real_features')
        == keys
    )
    with np.load(next((home/'eval'/'queries').glob('*tuned*'))) as f:
        assert sorted(f['keys:image_to_text'].tolist()) == keys
    assert set(feature_keys(home/'tuned'/'features'/'gmail')) == set(keys)
    assert len(keys) == 24 and 'red things/day 1/ball no. 0' in keys

def test_scores_are_there(way):
    from gmail_nb.files import read_results
    arms = {r['arm'] for r in read_results(way[0]/'eval'/'results.jsonl')}
    assert {'tuned:tuned', 'embedded'} < arms
    captions = read_results(way[0]/'captions'/'results.jsonl')
    assert {r['arm'] for r in captions} == {'gmail'} and {r['split'] for r in captions} == {'validation'}

def test_the_file_of_captions_is_the_same_set_as_its_folder(way, photos, forks, tmp_path):
    from gmail_nb.generate import load_generated
    folder, keys = photos
    forked(forks, tmp_path, 'generate', folder/'metadata.csv', '--steps', 1, '--quiet')
    assert sorted(load_generated(tmp_path/'generated')['key']) == keys
    forked(forks, tmp_path, 'embed', folder/'metadata.csv', '--out', 'features')
    assert feature_keys(tmp_path/'features') == keys
