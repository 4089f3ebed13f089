"Aligning and embedding from files: what comes out, what goes on where it was, and what a person gets wrong."
import gmail_nb.runtime
import json
import subprocess
import sys
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from gmail_nb.align import GenReal
from gmail_nb.cli.commands import gmail_align, gmail_embed
from gmail_nb.data import emoji
from gmail_nb.encoders import preprocess_images
from gmail_nb.features import load_features
from gmail_nb.files import read_results
from gmail_nb.generate import generate, load_generated
from gmail_nb.runs.align import align_sets, caption_ids, generated_images, indices_by_sample, validation_indices
from gmail_nb.settings import AdapterSettings, AlignRunSettings, AlignSettings, DrawSettings, WorkSettings

def weight(item): return 20

SETTINGS = AlignRunSettings(AdapterSettings(adapted_share=3/7), AlignSettings(epochs=4, batch_size=16), validation_share=.2)
FLAGS = '--adapted-share .42857142857142855 --validation-share .2 --epochs 4 --batch-size 16'.split()

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Sixty drawings, an image for each, and a model aligned on them."
    home = tmp_path_factory.mktemp('home')
    real = emoji('A', source='noto').select(range(60)).select_columns(['key', 'image', 'captions'])
    real.to_parquet(home/'real.parquet')
    emoji('B', source='noto').select(range(4)).select_columns(['key', 'image', 'captions']).to_parquet(home/'other.parquet')
    generate(str(home/'real.parquet'), 'embedded', home/'generated', DrawSettings(steps=2), work=WorkSettings(show_progress=False))
    align_sets(str(home/'real.parquet'), home/'generated', 'embedded', home/'aligned', SETTINGS)
    return home

def answer(capsys, command, *argv):
    "Exit status, and what is printed on both streams."
    capsys.readouterr()
    status = command([str(a) for a in argv])
    said = capsys.readouterr()
    return status, said.out + said.err.split('\r')[-1]

def test_the_folder_loads_as_a_model_that_came_closer(home):
    found = {(r['arm'], r['metric']): r['value'] for r in read_results(home/'aligned'/'results.jsonl')}
    assert found['gmail', 'paired_cosine'] > found['base', 'paired_cosine']
    card = json.loads((home/'aligned'/'card.json').read_text())
    features = load_features(home/'aligned'/'real_features')
    assert card['tau'] == .07 and features.card['weights'] == card['base_fingerprint']
    assert card['settings']['adapters']['adapted_share'] == 3/7 and card['settings']['align']['lr'] == 1e-3
    assert len((home/'aligned'/'log.jsonl').read_text().splitlines()) == 12
    assert {r['split'] for r in read_results(home/'aligned'/'results.jsonl')} == {'validation'}

def test_both_sides_of_the_model_and_its_features_are_the_same(home, capsys):
    statuses = {side: answer(capsys, gmail_embed, home/'generated', '--model', home/'aligned', '--side', side, '--out', home/f'features_{side}')
                for side in ('real', 'generated')}
    assert all(s == 0 and 'features: ' in text for s, text in statuses.values())
    model = GenReal.from_pretrained(home/'aligned')
    x = preprocess_images(model.encoder, list(load_generated(home/'generated')['image'])[:4])
    with torch.inference_mode():
        torch.testing.assert_close(load_features(home/'features_generated')[:4], model.encode_generated(x), atol=1e-4, rtol=0)
        torch.testing.assert_close(load_features(home/'features_real')[:4], model.encode_real(x), atol=1e-4, rtol=0)

def test_the_command_makes_what_the_function_makes_and_goes_on(home, capsys):
    status, text = answer(capsys, gmail_align, home/'real.parquet', home/'generated', *FLAGS, '--out', home/'by_command')
    assert status == 0 and f"model: {home/'by_command'}" in text
    a, b = (GenReal.from_pretrained(home/name) for name in ('aligned', 'by_command'))
    for p, q in zip(a.parameters(), b.parameters()): assert torch.equal(p, q)
    status, _ = answer(capsys, gmail_align, home/'real.parquet', home/'generated', *FLAGS, '--out', home/'by_command')
    assert status == 0
    status, text = answer(capsys, gmail_align, home/'real.parquet', home/'generated', *FLAGS, '--rank', 2, '--out', home/'by_command')
    assert status == 2 and 'rank' in text # nothing is written over

@pytest.mark.parametrize('argv, said', [
    (('other.parquet', 'generated', '--out', 'x'), 'no generated key is among the real ones'),
    (('real.parquet', 'absent', '--out', 'x'), 'absent'),
    (('real.parquet', 'generated', '--rank', 999, '--out', 'x'), 'rank 999'),
    (('real.parquet', 'generated', '--encoder', 'open_clip:ViT-B-23/openai', '--out', 'x'), "'ViT-B-32'"),
    (('real.parquet', 'generated', '--validation-share', 0, '--out', 'x'), 'at least 2 of each'),
    (('real.parquet', 'generated', '--trackers', 'wandbs', '--out', 'x'), "tracker 'wandbs' is not installed")])
def test_what_a_person_gets_wrong_in_align(home, capsys, monkeypatch, argv, said):
    monkeypatch.chdir(home)
    status, text = answer(capsys, gmail_align, *argv)
    assert status == 2 and said in text

def test_what_a_person_gets_wrong_in_embed(home, capsys, monkeypatch):
    monkeypatch.chdir(home)
    answer(capsys, gmail_embed, 'real.parquet', '--out', 'theirs')
    status, text = answer(capsys, gmail_embed, 'real.parquet', '--model', 'aligned', '--side', 'generated', '--out', 'theirs')
    assert status == 2 and 'holds other features' in text
    with patch.dict(sys.modules, {'ray': None, 'ray.data': None}):
        status, text = answer(capsys, gmail_embed, 'real.parquet', '--engine', 'ray', '--out', 'x_ray')
    assert status == 2 and "pip install 'gmail_nb[ray]'" in text
    lost = RuntimeError('parts [0] of x are not whole: run `embed` again')
    with patch('gmail_nb.runs.align.embed', side_effect=lost): status, text = answer(capsys, gmail_embed, 'real.parquet', '--out', 'y')
    assert status == 2 and text.startswith('gmail_embed: parts')

def test_indices_by_sample_leave_out_keys_that_lack_one():
    keys = ['a', 'b', 'c', 'd']
    assert indices_by_sample(keys, ['c', 'a', 'c', 'a', 'b'], [0, 0, 1, 1, 0]) == ([[1, 0], [3, 2]], [0, 2])

def test_keys_kept_out_stay_the_same_when_the_set_grows():
    keys = list(emoji('A', source='noto')['key'])
    assert set(validation_indices(keys[:30], .3)) == {i for i in validation_indices(keys, .3) if i < 30}

def test_captions_are_equal_but_for_case_and_space():
    assert caption_ids(['A cat', 'a dog', 'a  cat']).tolist() == [0, 1, 0]

def test_images_of_others_are_the_first_sample_of_their_key():
    made = generated_images(emoji('A', source='fluent').select(range(3)))
    assert made['sample'][:] == [0, 0, 0] and made.column_names == ['key', 'image', 'caption', 'sample']

def test_equal_captions_go_together(home):
    settings = replace(SETTINGS, equal_captions='together', align=AlignSettings(epochs=1, batch_size=16))
    align_sets(str(home/'real.parquet'), home/'generated', 'embedded', home/'together', settings)
    assert json.loads((home/'together'/'card.json').read_text())['settings']['equal_captions'] == 'together'
    with pytest.raises(ValueError, match="did you mean 'together'"): AlignRunSettings(equal_captions='togther')

@pytest.mark.slow
def test_two_processes_align_as_one(home, tmp_path):
    "`accelerate launch -m`, on two processes of a CPU."
    launch = '-m accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no'.split()
    done = subprocess.run([sys.executable, *launch, '-m', 'gmail_nb.cli.commands', 'align', str(home/'real.parquet'), str(home/'generated'),
                           *FLAGS, '--out', str(tmp_path/'two')], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [{r['metric']: r['value'] for r in read_results(f/'results.jsonl') if r['arm'] == 'gmail'} for f in (home/'aligned', tmp_path/'two')]
    assert found[1]['paired_cosine'] == pytest.approx(found[0]['paired_cosine'], abs=5e-3)
