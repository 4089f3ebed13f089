"What a text side learns from, from files: images of the split that was named, never of a test set, read where they lie."

import gmail_nb.runtime
import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from gmail_nb.align import GenReal
from gmail_nb.cli.commands import gmail_tune
from gmail_nb.data import emoji, quiet_datasets
from gmail_nb.encoders import load_encoder
from gmail_nb.generate import generate
from gmail_nb.runs.presets import TEXT_RECIPES
from gmail_nb.runs.tune_text import Captions, Sides, pairs_of_files, text_pairs, tune_from_files
from gmail_nb.settings import DrawSettings, SourceSettings, TuneSettings, WorkSettings
from gmail_nb.splits import trained_on, write_trained_on
from gmail_nb.tune import load_tuned, split_pairs

def weight(item): return 15

brief = replace(TEXT_RECIPES['small'], settings=TuneSettings(steps=3, every=3, validation_share=.2))

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "24 emoji as a Karpathy file, of which every third is a test image; an image drawn for each; an aligned model."
    folder, real, rows = tmp_path_factory.mktemp('text'), emoji('B', source='noto').select(range(24)), []
    (folder/'pictures').mkdir()
    for i, r in enumerate(real):
        r['image'].save(folder/'pictures'/f'{i:04}.png')
        split = 'train' if i % 3 else 'test'
        rows.append(dict(cocoid=i, filename=f'{i:04}.png', split=split, sentences=[dict(raw=c) for c in r['captions']]))
    (folder/'karpathy.json').write_text(json.dumps(dict(images=rows, dataset='coco')))
    captions = {str(i): r['captions'][0] for i, r in enumerate(real)}
    made = generate(
        captions, 'embedded', folder/'generated', DrawSettings(steps=1), work=WorkSettings(show_progress=False)
    )
    GenReal(load_encoder('embedded')).save_pretrained(folder/'model')
    write_trained_on(folder/'model', ['0', 'other'])
    return dict(folder=folder, made=made, karpathy=folder/'karpathy.json',
                source=SourceSettings(images=str(folder/'pictures'), split='train'))

test_keys = {str(i) for i in range(0, 24, 3)}

@pytest.mark.parametrize('arm', ['gmail', 'indiscriminate', 'mix', 'real'])
def test_only_keys_of_the_named_split_are_learned_from(files, arm):
    out = files['folder']/f'split_{arm}'
    tune_from_files(
        out, brief, files['made'], files['folder']/'model', files['karpathy'], arm, files['source'], desc=None
    )
    learned = set(trained_on(out)) - {'0', 'other'} # which the aligned model had learned from
    assert learned and not learned & test_keys
    card = json.loads((out/'card.json').read_text())
    assert card['pairs'] == (32 if arm == 'real' else 16) and card['settings']['tau'] == .07

def test_keys_that_are_only_looked_at_are_not_trained_on_and_those_of_the_model_are(files):
    out = files['folder']/'kept'
    tune_from_files(out, brief, files['made'], files['folder']/'model', desc=None)
    _, validation = split_pairs(24, brief.settings)
    learned = trained_on(out)
    assert 'other' in learned and len(set(learned) - {'other', '0'}) in (18, 19)
    assert not {str(i) for i in validation.tolist()} - {'0'} & set(learned)

def test_a_test_set_that_shares_an_image_is_refused_before_anything_is_made(files):
    out = files['folder']/'leak'
    with pytest.raises(ValueError, match='8 of 8 images of karpathy are among those of the training set'):
        tune_from_files(
            out, brief, files['made'], files['folder']/'model', test=files['karpathy'], test_split='test', desc=None
        )
    assert not (out/'features').exists()
    with pytest.raises(ValueError, match='1 of 8 images of karpathy are among those of the alignment in model'):
        tune_from_files(out, brief, files['made'], files['folder']/'model', files['karpathy'], 'gmail', files['source'],
                        test=files['karpathy'], test_split='test', desc=None)

def test_the_command_refuses_a_leak_and_says_what_is_missing(files, capsys):
    out = str(files['folder']/'told')
    argv = [
        'text',
        '--generated',
        str(files['made']),
        '--arm',
        'indiscriminate',
        '--out',
        out,
        '--test',
        str(files['karpathy']),
        '--test-split',
        'test',
    ]
    assert gmail_tune(argv) == 2 and 'are among those of the training set' in capsys.readouterr().err
    assert gmail_tune(['text', '--out', out]) == 2
    assert 'name generated images with --generated and the model' in capsys.readouterr().err
    assert gmail_tune([*argv[:7], '--device', 'cuda:9']) == 2 and "no device 'cuda:9'" in capsys.readouterr().err

def test_real_partners_teach_their_own_projection(files):
    both = replace(brief, settings=replace(brief.settings, real_projection=True))
    out = files['folder']/'both'
    tuned = tune_from_files(
        out, both, files['made'], files['folder']/'model', files['karpathy'], 'gmail', files['source'], desc=None
    )
    assert tuned.real_projection is not None and not torch.equal(tuned.real_projection.weight, tuned.projection.weight)
    back = load_tuned(out)
    torch.testing.assert_close(back.visual.maps[1].weight, tuned.real_projection.weight)

def test_captions_and_features_are_read_by_the_row(files):
    real = emoji('B', source='noto').select(range(24))
    captions = Captions(real, np.array([3, 3, 5]), np.array([0, 1, 0]))
    assert (
        captions[[2, 0]] == [real[5]['captions'][0], real[3]['captions'][0]] and captions[1] == real[3]['captions'][1]
    )
    assert list(captions) == captions[[0, 1, 2]] and captions.keys() == {real[3]['key'], real[5]['key']}
    x, said = pairs_of_files(files['folder']/'rows', load_encoder('embedded'), 'real', real=real)
    assert len(x) == len(said) and torch.equal(x[0, 0], x[0, 1])

def test_images_that_do_not_decode_are_left_out_with_their_captions(files, capsys):
    real = emoji('B', source='noto').select(range(6))
    def damaged(row, i): return row | (dict(image=dict(bytes=b'no picture', path=None)) if i == 2 else {})
    import datasets

    cut = real.cast_column('image', datasets.Image(decode=False)).map(
        damaged, with_indices=True, load_from_cache_file=False
    )
    cut = cut.cast_column('image', datasets.Image())
    sides = Sides(files['folder']/'cut', load_encoder('embedded'))
    found = text_pairs(sides, 'real', real=cut)
    assert '1 of 6 images of real left out' in capsys.readouterr().err
    assert (
        found.captions.keys() == {real[i]['key'] for i in (0, 1, 3, 4, 5)}
        and found.images.read(slice(None)).isfinite().all()
    )

@pytest.mark.parametrize('bad, share, fails', [(1, .01, False), (2, .01, True), (2, .5, False)])
def test_real_images_that_do_not_decode_are_left_out_up_to_a_share(tmp_path, capsys, bad, share, fails):
    "They were an error of the first of them, whatever the share."
    with quiet_datasets():
        some = emoji('B', 'noto').select(range(12)).cast_column('image', datasets.Image(decode=False))
        rows = [dict(r) for r in some]
        for r in rows[:bad]: r['image'] = dict(bytes=b'no picture', path=None)
        datasets.Dataset.from_list(rows, features=emoji('B', 'noto').features).to_parquet(tmp_path/'set.parquet')
    def run(): return tune_from_files(tmp_path/'out', brief, real=tmp_path/'set.parquet', most_damaged=share, desc=None)
    if fails:
        with pytest.raises(ValueError, match='2 of 12 images of real do not decode'): run()
    else:
        run()
        assert len(trained_on(tmp_path/'out')) == 12 - bad
    assert f'{bad} of 12 images of real left out' in capsys.readouterr().err
    assert len((tmp_path/'out'/'skipped.jsonl').read_text().splitlines()) == bad
