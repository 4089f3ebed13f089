"Aligning and embedding from files: what comes out, what goes on where it was, and what a person gets wrong."
import gmail_nb.runtime
import json
import random
import subprocess
import sys
from dataclasses import replace
from unittest.mock import patch

import datasets
import pytest
import torch
from gmail_nb.align import GenReal
from gmail_nb.cli.commands import gmail_align, gmail_embed
from gmail_nb.data import emoji
from gmail_nb.encoders import preprocess_images
from gmail_nb.features import load_features
from gmail_nb.files import read_results
from gmail_nb.generate import generate, load_generated
from gmail_nb.runs.align import (
    align_sets,
    equal_caption_ids,
    generated_images,
    indices_by_sample,
    pair_sets,
    validation_indices,
)
from gmail_nb.settings import (
    AdapterSettings,
    AlignRunSettings,
    AlignSettings,
    DrawSettings,
    RunSettings,
    SourceSettings,
    WorkSettings,
)
from gmail_nb.sources import load_captioned
from gmail_nb.splits import trained_on

def weight(item): return 20

SETTINGS = AlignRunSettings(
    AdapterSettings(adapted_share=3 / 7), AlignSettings(epochs=4, batch_size=16), validation_share=0.2
)
FLAGS = '--adapted-share .42857142857142855 --validation-share .2 --epochs 4 --batch-size 16'.split()

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Sixty drawings, an image for each, and a model aligned on them."
    home = tmp_path_factory.mktemp('home')
    real = emoji('A', source='noto').select(range(60)).select_columns(['key', 'image', 'captions'])
    real.to_parquet(home/'real.parquet')
    emoji('B', source='noto').select(range(4)).select_columns(['key', 'image', 'captions']).to_parquet(
        home/'other.parquet'
    )
    generate(
        str(home/'real.parquet'),
        'embedded',
        home/'generated',
        DrawSettings(steps=2),
        work=WorkSettings(show_progress=False),
    )
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
    statuses = {
        side: answer(
            capsys,
            gmail_embed,
            home/'generated',
            '--model',
            home/'aligned',
            '--side',
            side,
            '--out',
            home/f'features_{side}',
        )
        for side in ('real', 'generated')
    }
    assert all(s == 0 and 'features: ' in text for s, text in statuses.values())
    model = GenReal.from_pretrained(home/'aligned')
    x = preprocess_images(model.encoder, list(load_generated(home/'generated')['image'])[:4])
    with torch.inference_mode():
        torch.testing.assert_close(
            load_features(home/'features_generated')[:4], model.encode_generated(x), atol=1e-4, rtol=0
        )
        torch.testing.assert_close(load_features(home/'features_real')[:4], model.encode_real(x), atol=1e-4, rtol=0)

def test_the_command_makes_what_the_function_makes_and_goes_on(home, capsys):
    status, text = answer(
        capsys, gmail_align, home/'real.parquet', '--generated', home/'generated', *FLAGS, '--out', home/'by_command'
    )
    assert status == 0 and f"model: {home/'by_command'}" in text
    a, b = (GenReal.from_pretrained(home/name) for name in ('aligned', 'by_command'))
    for p, q in zip(a.parameters(), b.parameters()): assert torch.equal(p, q)
    again = home/'real.parquet', '--generated', home/'generated', *FLAGS, '--out', home/'by_command'
    status, _ = answer(capsys, gmail_align, *again)
    assert status == 0
    status, text = answer(
        capsys,
        gmail_align,
        home/'real.parquet',
        '--generated', home/'generated',
        *FLAGS,
        '--rank',
        2,
        '--out',
        home/'by_command',
    )
    assert status == 2 and 'rank' in text # nothing is written over

@pytest.mark.slow
def test_a_set_of_the_hub_is_aligned_as_its_file_is(home, capsys, tmp_path, monkeypatch):
    "A set with the names of columns of its owner, as `datasets` would load it."
    asked = []
    def load_dataset(name, *args, split, **kwargs):
        if name == 'parquet': return from_files(name, *args, split=split, **kwargs)
        asked.append((name, split))
        return datasets.Dataset.from_parquet(str(home/'real.parquet')).rename_columns(dict(key='id', image='picture'))
    from_files = datasets.load_dataset
    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    argv = 'someone/drawings', '--generated', home/'generated', *FLAGS, '--key', 'id', '--image', 'picture'
    status, text = answer(capsys, gmail_align, *argv, '--out', tmp_path/'hub')
    assert status == 0 and set(asked) == {('someone/drawings', 'train')}, text
    a, b = (GenReal.from_pretrained(f) for f in (home/'aligned', tmp_path/'hub'))
    for p, q in zip(a.parameters(), b.parameters()): assert torch.equal(p, q)

@pytest.mark.parametrize('argv, said', [
    (('other.parquet', '--generated', 'generated', '--out', 'x'), 'no generated key is among the real ones'),
    (('real.parquet', '--generated', 'absent', '--out', 'x'), 'absent'),
    (('real.parquet', '--generated', 'generated', '--rank', 999, '--out', 'x'), 'rank 999'),
    (('real.parquet', '--generated', 'generated', '--encoder', 'open_clip:ViT-B-23/openai', '--out', 'x'),
     "'ViT-B-32'"),
    (('real.parquet', '--generated', 'generated', '--validation-share', 0, '--out', 'x'), 'at least 2 of each'),
    (('real.parquet', '--generated', 'generated', '--trackers', 'wandbs', '--out', 'x'),
     "tracker 'wandbs' is not installed")])
def test_what_a_person_gets_wrong_in_align(home, capsys, monkeypatch, argv, said):
    monkeypatch.chdir(home)
    status, text = answer(capsys, gmail_align, *argv)
    assert status == 2 and said in text

def test_what_a_person_gets_wrong_in_embed(home, capsys, monkeypatch):
    monkeypatch.chdir(home)
    answer(capsys, gmail_embed, 'real.parquet', '--out', 'theirs')
    status, text = answer(
        capsys, gmail_embed, 'real.parquet', '--model', 'aligned', '--side', 'generated', '--out', 'theirs'
    )
    assert status == 2 and 'holds other features' in text
    with patch.dict(sys.modules, {'ray': None, 'ray.data': None}):
        status, text = answer(capsys, gmail_embed, 'real.parquet', '--engine', 'ray', '--out', 'x_ray')
    assert status == 2 and "pip install 'gmail_nb[ray]'" in text
    lost = RuntimeError('parts [0] of x are not whole: run `embed` again')
    with patch('gmail_nb.runs.align.embed', side_effect=lost):
        status, text = answer(capsys, gmail_embed, 'real.parquet', '--out', 'y')
    assert status == 2 and text.startswith('gmail_embed: parts')

def test_a_caption_with_fewer_images_gives_them_again():
    of, whole = indices_by_sample(['a', 'b', 'c', 'd'], ['c', 'a', 'c', 'a', 'b'], [0, 0, 1, 1, 0])
    assert of.tolist() == [[1, 4, 0], [3, 4, 2]] and whole.tolist() == [0, 1, 2]

def test_nobody_is_left_out_where_captions_have_five_to_seven_images():
    "97 keys with five, two with six, one with seven: one key alone was left of them before."
    counts = [5] * 97 + [6] * 2 + [7]
    made = [(f'{i:03}', s) for i, n in enumerate(counts) for s in range(n)]
    random.Random(0).shuffle(made)
    of, whole = indices_by_sample([f'{i:03}' for i in range(100)], [k for k, _ in made], [s for _, s in made])
    assert of.shape == (7, 100) and whole.tolist() == list(range(100))
    for s in range(7): assert [made[i] for i in of[s]] == [(f'{i:03}', s % n) for i, n in enumerate(counts)]
    assert set(of.flatten().tolist()) == set(range(len(made))) # every image is trained on

def test_keys_kept_out_stay_the_same_when_the_set_grows():
    keys = list(emoji('A', source='noto')['key'])
    assert set(validation_indices(keys[:30], .3)) == {i for i in validation_indices(keys, .3) if i < 30}

def test_captions_are_equal_but_for_case_and_space():
    assert equal_caption_ids(['A cat', 'a dog', 'a  cat']).tolist() == [0, 1, 0]

def test_images_of_others_are_the_first_sample_of_their_key():
    made = generated_images(emoji('A', source='fluent').select(range(3)))
    assert made['sample'][:] == [0, 0, 0] and made.column_names == ['key', 'image', 'caption', 'sample']

def test_equal_captions_go_together(home):
    settings = replace(SETTINGS, equal_captions='together', align=AlignSettings(epochs=1, batch_size=16))
    align_sets(str(home/'real.parquet'), home/'generated', 'embedded', home/'together', settings)
    assert json.loads((home/'together'/'card.json').read_text())['settings']['equal_captions'] == 'together'
    with pytest.raises(ValueError, match="did you mean 'together'"): AlignRunSettings(equal_captions='togther')

@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    "A COCO of 24 drawings with five to seven captions, in Karpathy's form: a third of it is for tests."
    root = tmp_path_factory.mktemp('coco')
    (root/'val2014').mkdir()
    splits, images = ('train', 'restval', 'test'), []
    for i, row in enumerate(emoji('A', source='noto').select(range(24))):
        name = f'COCO_val2014_{i:012}.jpg'
        row['image'].convert('RGB').save(root/'val2014'/name)
        words = [dict(raw=f'{row["label"]} {j}', tokens=['x']) for j in range(5 + i % 3)]
        images.append(dict(filepath='val2014', filename=name, cocoid=1000 + i, split=splits[i // 8], sentences=words))
    (root/'dataset_coco.json').write_text(json.dumps(dict(images=images)))
    return root

def test_all_captions_of_a_coco_are_drawn_and_aligned_but_not_those_of_its_test(coco, caplog):
    "`gmail_generate --which all`, on every split, and then `gmail_align`."
    draw = WorkSettings(show_progress=False, batch_size=64)
    generate(
        str(coco/'dataset_coco.json'),
        'embedded',
        coco/'generated',
        DrawSettings(steps=1),
        SourceSettings(which='all'),
        draw,
    )
    settings = replace(SETTINGS, align=AlignSettings(epochs=1, batch_size=4), run=RunSettings(save_every=7))
    model = align_sets(
        str(coco/'dataset_coco.json'),
        coco/'generated',
        'embedded',
        coco/'aligned',
        settings,
        SourceSettings(images=str(coco)),
    )
    assert 'dataset_coco.json: read for training is train+restval, without test' in caplog.text
    learned = {str(1000 + i) for i in range(16)}
    kept_out = {k for k in learned if validation_indices([k], .2)}
    assert set(trained_on(coco/'aligned')) == learned - kept_out and len(kept_out) >= 2
    features = load_features(coco/'aligned'/'real_features')
    assert set(features.keys) == learned
    sets = pair_sets(generated_images(coco/'generated'), features, model.encoder.preprocess, settings)
    assert len(sets.pixels) == 7 and len(sets.features) == len(learned - kept_out)

def test_a_named_split_is_trained_on(coco):
    how = SourceSettings(images=str(coco), split='train+test')
    ds = load_captioned(str(coco/'dataset_coco.json'), how, training=True)
    assert len(ds) == 16 and len(load_captioned(str(coco/'dataset_coco.json'), replace(how, split=None))) == 24

def test_too_few_pairs_are_said_before_anything_is_embedded(home, tmp_path):
    with patch('gmail_nb.runs.align.load_encoder', side_effect=AssertionError('it was loaded')):
        with pytest.raises(ValueError, match='0 to measure on.*--validation-share, 0'):
            align_sets(
                str(home/'real.parquet'),
                home/'generated',
                'embedded',
                tmp_path/'x',
                replace(SETTINGS, validation_share=0.0),
            )


def test_at_most_so_many_pairs_are_measured(home):
    few = pair_sets(
        generated_images(home/'generated'),
        load_features(home/'aligned'/'real_features'),
        None,
        replace(SETTINGS, validation_limit=3),
    )
    every = pair_sets(generated_images(home/'generated'), load_features(home/'aligned'/'real_features'), None, SETTINGS)
    assert len(few.test) == 3 < len(every.test) and few.features.keys == every.features.keys

def test_captions_of_a_set_of_pictures_stay_where_they_lie(tmp_path):
    ds = (
        emoji('A', source='fluent')
        .select(range(3))
        .select_columns(['key', 'image', 'captions'])
        .add_column('sample', [0, 1, 0])
    )
    ds.to_parquet(tmp_path/'a.parquet')
    made = generated_images(str(tmp_path/'a.parquet'))
    assert made['sample'][:] == [0, 1, 0] and made['caption'][:] == [c[0] for c in ds['captions']]

@pytest.mark.slow
def test_two_processes_align_as_one(home, tmp_path):
    "`accelerate launch -m`, on two processes of a CPU."
    launch = '-m accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no'.split()
    done = subprocess.run(
        [
            sys.executable,
            *launch,
            '-m',
            'gmail_nb.cli.commands',
            'align',
            str(home/'real.parquet'),
            '--generated',
            str(home/'generated'),
            *FLAGS,
            '--out',
            str(tmp_path/'two'),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [
        {r['metric']: r['value'] for r in read_results(f/'results.jsonl') if r['arm'] == 'gmail'}
        for f in (home/'aligned', tmp_path/'two')
    ]
    assert found[1]['paired_cosine'] == pytest.approx(found[0]['paired_cosine'], abs=5e-3)
