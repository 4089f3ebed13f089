"Evaluations from files to tables: every preset on miniatures, what is left out, and what a person gets wrong."
import gmail_nb.runtime
import json
import shutil
from dataclasses import replace
from unittest.mock import patch

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from gmail_nb.align import GenReal
from gmail_nb.classification import CLASSIFICATION_SETS, classification_miniature
from gmail_nb.cli.commands import gmail_eval
from gmail_nb.data import emoji
from gmail_nb.encoders import load_encoder
from gmail_nb.files import read_results, record, write_results
from gmail_nb.generate import generate
from gmail_nb.long_captions import OPENAI_MEAN, convert_longclip, stretch_encoder
from gmail_nb.retrieval import WAYS, load_retrieval_set, retrieval_miniature
from gmail_nb.runs.evaluate import (
    EvalRun,
    EvalSet,
    check_leaks,
    eval_table,
    labelled_set,
    picture_name,
    read_set,
    table_blocks,
    compared_names,
)
from gmail_nb.runs.models import eval_model, kind_of_folder, model_at, safe_name, spec_of, trained_keys
from gmail_nb.runs.presets import EIGHT, EVAL_PRESETS, RECALLS, TEXT_RECIPES
from gmail_nb.settings import DrawSettings, EmbedSettings, EvalSettings, TuneSettings, WorkSettings
from gmail_nb.splits import write_trained_on
from gmail_nb.tune import save_tuned, tune_text
from PIL import Image

def weight(item): return 40

transformers.utils.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings('ignore') # probes of towers with random weights
SYNCLR = 'SynCLR=synclr:test_vit/synclr.pth'
TUNED = 'gmail-clip', 'gmail-longclip', 'gmail-clip-l', 'gmail-clip-coco', 'gmail-clip-cc3m', 'gmail-clip-cc12m'

def tuned(base, steps):
    "A text side after a few steps on features drawn at random."
    features = F.normalize(torch.randn(12, base.dim, generator=torch.Generator().manual_seed(0)), dim=-1)
    return tune_text(base, features, [f'caption {i}' for i in range(12)], TuneSettings(steps=steps, validation_share=0))

def small_models(below):
    "A model of each format that the tables name, with a few thousand random weights."
    below.mkdir()
    torch.manual_seed(0)
    vision = dict(image_size=32, layers=1, width=64, patch_size=16, head_width=64)
    text = dict(context_length=248, vocab_size=49408, width=64, heads=1, layers=1)
    state = dict(open_clip.model.CLIP(24, vision, text, quick_gelu=True).state_dict())
    state['positional_embedding_res'] = torch.randn(248, 64) * .01
    torch.save(state, below/'longclip-B.pt')
    convert_longclip(below/'longclip-B.pt', below/'clip')
    tower = timm.create_model('test_vit', num_classes=0).state_dict()
    torch.save(dict(model={f'module.visual.{k}': v for k, v in tower.items()}), below/'synclr.pth')
    GenReal(load_encoder(f"timm:test_vit/{below/'synclr.pth'}")).save_pretrained(below/'gmail-synclr')
    GenReal(load_encoder(f"hf:{below/'clip'}")).save_pretrained(below/'aligned')
    base = load_encoder(f"hf:{below/'clip'}")
    text_side = tuned(base, 3)
    for name in TUNED: save_tuned(text_side, base, below/name, aligned=below/'aligned')
    return base

class World:
    "The miniatures, and the command on them."
    def __init__(self, folder, capsys=None):
        self.folder, self.below = folder, folder/'models'
        self.root = retrieval_miniature(folder/'data', 10)
        classification_miniature(self.root)
        self.base = small_models(self.below)

    def ask(self, capsys, *argv):
        "Exit status, and what is printed on the two streams."
        capsys.readouterr()
        status = gmail_eval([str(a) for a in argv])
        said = capsys.readouterr()
        return status, said.out, said.err

    def preset(self, capsys, name, *more, out='out'):
        return self.ask(capsys, '--preset', name, '--root', self.root, '--models', self.below, '--out', self.folder/out,
                        '--model', 'CLIP=hf:clip', '--no-pictures', *more)

    def records(self, out='out'): return read_results(self.folder/out/'results.jsonl')

@pytest.fixture(scope='module')
def world(tmp_path_factory): return World(tmp_path_factory.mktemp('world'))

def value_of(records):
    return {(r['experiment'], r['arm'], r['dataset'], r['metric']): r['value'] for r in records}

# The presets, one by one

def slow(*case): return pytest.param(*case, marks=pytest.mark.slow)

@pytest.mark.parametrize('name, more', [
    slow('paper-table2', ()), slow('paper-table3', ()), slow('paper-table5', ()),
    ('paper-table7', ('--rows', 'COCO captions', '--rows', 'CC12M captions'))])
def test_retrieval_presets(world, capsys, name, more):
    status, printed, _ = world.preset(capsys, name, *more, out=name)
    records = world.records(name)
    assert status == 0 and printed.startswith(EVAL_PRESETS[name].data[0])
    assert all('low' in r and r['model'] for r in records) and {r['experiment'] for r in records} == {name}
    words = (world.folder/name/'table.txt').read_text().split()
    assert words and words == printed.split()[:len(words)] # sentences follow

def test_differences_are_those_of_the_rows(world, capsys):
    if not (world.folder/'paper-table2').exists(): world.preset(capsys, 'paper-table2', out='paper-table2')
    value = value_of(world.records('paper-table2'))
    for way in WAYS:
        rows = [value['paper-table2', arm, 'coco-5k', f'{way}_map'] for arm in ('CLIP + GMAIL', 'CLIP')]
        assert value['paper-table2', 'CLIP + GMAIL - CLIP', 'coco-5k', f'{way}_map'] == pytest.approx(
            rows[0] - rows[1], abs=1e-6
        )


def test_table4_zero_shot_on_all_eight_sets(world, capsys):
    zero_shot = '--rows', 'CLIP', '--rows', 'CLIP + GMAIL', '--rows', 'CLIP + GMAIL (f_g)'
    sets = [d for d in EIGHT if d != 'imagenet']
    status, _, _ = world.preset(capsys, 'paper-table4', *sets, *zero_shot, out='table4')
    one_wording = replace(CLASSIFICATION_SETS['imagenet'], templates=('a photo of a {c}.',))
    with patch.dict(CLASSIFICATION_SETS, imagenet=one_wording): # one of its 80 wordings, for time
        second, _, _ = world.preset(capsys, 'paper-table4', 'imagenet', *zero_shot[:4], out='table4')
    mains = {r['dataset']: r['of'] for r in world.records('table4') if r['metric'] == 'main' and 'of' in r}
    assert status == second == 0 and set(mains) == set(EIGHT)
    assert [mains[d] for d in ('pets', 'aircraft', 'caltech101', 'dtd')] == ['mean_per_class'] * 3 + ['top1']

@pytest.mark.slow
def test_table4_rows_without_a_text_side(world, capsys):
    probe = world.preset(
        capsys, 'paper-table4', '--rows', 'SynCLR', '--rows', 'SynCLR + GMAIL', '--model', SYNCLR, out='probe'
    )
    records = world.records('probe')
    assert probe[0] == 0
    assert {r['dataset'] for r in records if r['arm'] == 'SynCLR' and r['how'] == 'linear probe'} == set(EIGHT)
    value = value_of(records)
    difference = value['paper-table4', 'SynCLR + GMAIL - SynCLR', 'pets', 'main']
    rows = [value['paper-table4', arm, 'pets', 'main'] for arm in ('SynCLR + GMAIL', 'SynCLR')]
    assert difference == pytest.approx(rows[0] - rows[1], abs=1e-6)
    for d in ('caltech101', 'pets'): # all rows of a table test the same images
        assert len({r['n'] for r in records if r['dataset'] == d and r['metric'] == 'main'}) == 1

def test_table4_fine_tuned(world, capsys):
    status, _, _ = world.preset(
        capsys,
        'paper-table4',
        'pets',
        '--rows',
        'SynCLR',
        '--model',
        SYNCLR,
        '--how',
        'fine-tune',
        out='fine',
    )
    assert status == 0 and {r['how'] for r in world.records('fine')} == {'fine-tuned'}

def test_fine_tuning_an_aligned_tower_trains_all_of_it(world, capsys):
    asked = (
        'pets',
        '--rows',
        'SynCLR',
        '--rows',
        'SynCLR + GMAIL',
        '--model',
        SYNCLR,
        '--how',
        'fine-tune',
        '--epochs',
        '2',
    )
    tower = sum(p.numel() for p in timm.create_model('test_vit', num_classes=0).parameters())
    for start in ('f_g', 'f_r'):
        status, _, _ = world.preset(capsys, 'paper-table4', *asked, '--tower', start, out=f'fine_{start}')
        records = [r for r in world.records(f'fine_{start}') if 'trained' in r]
        assert status == 0 and {r['trained'] for r in records} == {tower}
        assert {r['how'] for r in records if r['arm'] == 'SynCLR + GMAIL'} == {f'fine-tuned from {start}'}

def test_table4_from_generated_images_through_f_g(world, capsys):
    pets = labelled_set('pets', world.root)[0].classnames
    drawn = generate(
        {f'{c}/{i}': c for c in pets for i in range(2)},
        'embedded',
        world.folder/'pets',
        DrawSettings(steps=2),
        work=WorkSettings(show_progress=False),
    )
    more = 'pets', '--rows', 'SynCLR + GMAIL', '--generated', drawn
    status, _, _ = world.preset(capsys, 'paper-table4', *more, out='generated')
    assert status == 0 and {r['how'] for r in world.records('generated')} == {
        'linear probe on generated images through f_g'
    }


def test_every_tuned_row_has_its_recipe():
    models = [m for p in EVAL_PRESETS.values() for m in p.models.values()]
    assert {m.split(':')[1] for m in models if m.startswith('tuned')} <= set(TEXT_RECIPES)

# Going on, and leaving out

def test_what_is_there_is_not_measured_again(world, capsys):
    if not (world.folder/'paper-table5').exists(): world.preset(capsys, 'paper-table5', out='paper-table5')
    status, _, said = world.preset(capsys, 'paper-table5', '--skip-existing', out='paper-table5')
    assert status == 0 and said.count('already there') == 12

def test_weights_that_are_absent_are_named_and_left_out(world, capsys):
    weights = world.below/'longclip-B.pt'
    weights.rename(world.below/'away.pt')
    try:
        status, _, said = world.preset(
            capsys, 'paper-table5', 'urban-1k', '--rows', 'CLIP', '--rows', 'Long-CLIP', out='lost'
        )
    finally: (world.below/'away.pt').rename(weights)
    assert status == 0 and 'Long-CLIP left out: longclip-B.pt is not here' in said

def test_a_model_that_was_tuned_again_is_measured_again(world, capsys):
    asked = 'paper-table2', '--rows', 'CLIP + GMAIL', 'coco-5k', '--skip-existing'
    world.preset(capsys, *asked, out='again')
    assert 'already there' in world.preset(capsys, *asked, out='again')[2]
    save_tuned(tuned(world.base, 4), world.base, world.below/'gmail-clip', aligned=world.below/'aligned')
    status, _, said = world.preset(capsys, *asked, out='again')
    assert status == 0 and 'already there' not in said

def test_other_files_under_the_same_name_make_another_set(world, tmp_path):
    def files(root): return read_set('coco-5k', EvalRun('t', tmp_path, root=root)).files
    assert files(world.root) != files(retrieval_miniature(tmp_path/'elsewhere', 10))

def test_a_download_that_fails_and_a_set_that_is_not_there_cost_only_themselves(world, capsys):
    with patch(f'{load_encoder.__module__}.open_clip_encoder', side_effect=RuntimeError('Failed to download')):
        status, printed, said = world.ask(
            capsys,
            '--model',
            'A=open_clip:ViT-B-16/openai',
            '--model',
            'B=hf:clip',
            '--models',
            world.below,
            'urban-1k',
            '--root',
            world.root,
            'nothere/',
            '--task',
            'long',
            '--no-pictures',
            '--out',
            world.folder/'some',
        )
    assert status == 0 and 'A left out: Failed to download' in said and 'nothere/ left out' in said and 'B' in printed

def test_a_preset_goes_on_without_one_of_its_sets(world, capsys):
    (world.root/'val2017').rename(world.root/'gone')
    try: status, printed, said = world.preset(capsys, 'paper-table2', '--rows', 'CLIP', out='half')
    finally: (world.root/'gone').rename(world.root/'val2017')
    assert status == 0 and 'coco-val2017 left out' in said and printed.startswith('coco-5k')

# Sets of one's own

def test_a_folder_with_a_folder_for_each_class(tmp_path, capsys):
    kinds, ds = ('animals & nature', 'food & drink'), emoji('B', source='twemoji')
    for i, (image, group) in enumerate(zip(ds[::9]['image'], ds[::9]['group'])):
        if group not in kinds: continue
        (tmp_path/'mine'/group).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path/'mine'/group/f'{i}.png')
    (tmp_path/'own').mkdir() # what another command left there stays
    write_results(tmp_path/'own'/'results.jsonl', [record('demo', 'gmail', 'emoji', 'B', 'cosine', .5, 0, 9)])
    status = gmail_eval(
        [
            '--task',
            'classification',
            str(tmp_path/'mine'),
            '--out',
            str(tmp_path/'own'),
            '--skip-existing',
        ]
    )
    assert status == 0 and next((tmp_path/'own').glob('mine*_matrix.png')).stat().st_size > 1000
    assert {r['experiment'] for r in read_results(tmp_path/'own'/'results.jsonl')} == {'demo', 'classification'}

def test_a_gallery_of_three_has_no_recall_at_five(world, capsys):
    three, ds = world.folder/'three', emoji('B', source='twemoji')
    three.mkdir()
    for i in range(3):
        ds[i]['image'].save(three/f'{i}.png')
        (three/f'{i}.txt').write_text(ds[i]['label'])
    status, _, said = world.ask(
        capsys,
        three,
        '--model',
        'CLIP=hf:clip',
        '--models',
        world.below,
        '--no-pictures',
        '--out',
        world.folder/'small',
    )
    assert status == 0 and 'no recall at 5, 10, the gallery has 3' in said

def test_what_was_trained_on_is_not_tested(world, capsys):
    torch.manual_seed(0)
    for c in 'abc':
        (world.folder/'noise'/c).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(torch.randint(255, (32, 32, 3), dtype=torch.uint8).numpy()).save(
                world.folder/'noise' / c/f'{i}.png'
            )
    status, _, _ = world.ask(
        capsys,
        '--task',
        'classification',
        world.folder/'noise',
        '--model',
        'timm:test_vit/random',
        '--no-pictures',
        '--out',
        world.folder/'noise_out',
    )
    top1 = next(r for r in world.records('noise_out') if r['metric'] == 'top1')
    assert status == 0 and top1['value'] < .7 and top1['n'] == 18 # noise has no classes

def test_the_packages_own_sets():
    ds = emoji('B', source='twemoji')
    assert len(labelled_set('emoji-concept', None)[0].classnames) == len(ds)
    assert load_retrieval_set('emoji-long')[0][0]['captions'] == [ds[0]['description']]
    with pytest.raises(ValueError, match="unknown classification set 'emoji-family'"):
        labelled_set('emoji-family', None)


def test_pictures_of_answers_are_written(world, capsys):
    status, _, _ = world.ask(
        capsys,
        '--preset',
        'paper-table2',
        '--root',
        world.root,
        '--models',
        world.below,
        '--out',
        world.folder/'seen',
        '--model',
        'CLIP=hf:clip',
        '--rows',
        'CLIP',
        'coco-val2017',
    )
    assert status == 0 and all((world.folder/'seen'/f'coco-val2017_CLIP_{p}.png').exists() for p in (*WAYS, 'recall'))

# Tables, names and models

def test_a_set_too_small_for_ten_keeps_the_papers_numbers_in_their_columns():
    rows = [
        dict(experiment='t', arm='CLIP', dataset='s', metric=m, value=0.5, low=0.4, high=0.6)
        for m in RECALLS
        if 'at_10' not in m
    ]
    table = eval_table(rows, 't', 's', RECALLS, {('CLIP', 's'): (51.8, 76.8, 84.3, 32.7, 57.7, 68.2)})
    assert table[0][1:] == ['I2T R@1', 'I2T R@5', 'T2I R@1', 'T2I R@5'] and table[2][1:] == [
        '51.8',
        '76.8',
        '32.7',
        '57.7',
    ]


def test_two_names_never_share_a_file():
    names = 'open_clip:ViT-B-16/openai', 'open_clip:ViT-L-14/openai', '/a/test', '/b/test', 'test'
    assert len({safe_name(n) for n in names}) == 5

def test_models_by_a_string(world):
    below = world.below
    assert eval_model('synclr:test_vit/synclr.pth', below).preprocess.mean == OPENAI_MEAN
    assert eval_model('stretched:hf:clip', below).name.endswith('+248')
    assert eval_model('tuned-f_g:gmail-clip', below).dim == 24
    wide = stretch_encoder(world.base, 260)
    save_tuned(tuned(wide, 3), wide, below/'stretched')
    assert eval_model('tuned:stretched', below).tokenize(['a ' * 300])['input_ids'].shape[1] == 260

def test_published_weights_are_converted_once(world, tmp_path):
    with patch('gmail_nb.runs.models.convert_longclip', side_effect=convert_longclip) as convert:
        for _ in range(2): eval_model('longclip:longclip-B.pt', world.below, tmp_path)
    assert convert.call_count == 1

@pytest.mark.parametrize('argv, said', [
    (('--preset', 'paper-table22'), "did you mean 'paper-table2'"),
    (('--preset', 'paper-table4', '--task', 'long'), 'is a table of classification, not of long'),
    (('--task', 'speech'), "unknown task 'speech'"),
    (('--model', 'clip'), '--model clip: no such encoder: known are embedded'),
    (('--preset', 'paper-table2', '--rows', 'CLOP'), "unknown row 'CLOP'"),
    (('--preset', 'paper-table7', '--models', 'none', '--root', 'ROOT'), '--models none: no such folder'),
    (('--preset', 'paper-table7', '--models', 'ROOT', '--root', 'ROOT'), 'none of the models is there'),
    (('flicker30k',), "did you mean 'flickr30k'"),
    (('--task', 'classification', 'dtd'), 'needs the folder'),
    (('--rows', 'CLIP'), '--rows chooses rows of a --preset')])
def test_what_a_person_gets_wrong(world, capsys, tmp_path, argv, said):
    status, _, err = world.ask(capsys, *(world.root if a == 'ROOT' else a for a in argv), '--out', tmp_path/'o')
    assert status == 2 and said in err

def test_sun397_needs_its_two_lists_for_a_probe(world, capsys, tmp_path):
    root = tmp_path/'sets'
    shutil.copytree(world.root/'SUN397', root/'SUN397')
    for split in ('Training', 'Testing'): (root/'SUN397'/f'{split}_01.txt').unlink()
    status, _, err = world.ask(
        capsys,
        '--task',
        'classification',
        'sun397',
        '--root',
        root,
        '--models',
        world.below,
        '--model',
        'timm:test_vit/synclr.pth',
        '--out',
        tmp_path/'o',
    )
    assert status == 2 and 'Training_01.txt' in err

# Features are kept

def test_a_second_call_and_other_tasks_read_the_features(world, capsys):
    asked = (
        'urban-1k',
        '--root',
        world.root,
        '--model',
        'CLIP=hf:clip',
        '--models',
        world.below,
        '--no-pictures',
        '--out',
        world.folder/'kept',
    )
    assert world.ask(capsys, *asked)[0] == 0
    with (
        patch('gmail_nb.encoders.Encoder.encode_image', side_effect=AssertionError),
        patch('gmail_nb.encoders.Encoder.encode_text', side_effect=AssertionError),
    ):
        assert world.ask(capsys, *asked)[0] == world.ask(capsys, *asked, '--task', 'long')[0] == 0
    kept = world.folder/'kept'/'features'
    assert [len(list(kept.glob(n))) for n in ('images-*', 'texts-*.npy')] == [1, 1]

def test_features_of_16_bits(world, capsys):
    asked = (
        'coco-5k',
        '--root',
        world.root,
        '--model',
        'CLIP=hf:clip',
        '--models',
        world.below,
        '--no-pictures',
        '--out',
        world.folder/'sixteen',
    )
    assert world.ask(capsys, *asked, '--store', 'float16')[0] == 0
    settings, = (json.loads(f.read_text()) for f in (world.folder/'sixteen'/'features').glob('images-*/settings.json'))
    assert settings['store'] == 'float16'

def test_features_of_two_aligned_towers_are_never_mixed(world, tmp_path):
    for seed in (1, 2):
        torch.manual_seed(seed)
        torch.save(timm.create_model('test_vit', num_classes=0).state_dict(), tmp_path/f'{seed}.pth')
        GenReal(load_encoder(f'timm:test_vit/{tmp_path}/{seed}.pth')).save_pretrained(tmp_path/f'aligned{seed}')
    one, two = (eval_model(f'aligned{seed}', tmp_path) for seed in (1, 2))
    assert one.fingerprint != two.fingerprint and one.generated_side.fingerprint != two.generated_side.fingerprint
    assert eval_model('aligned1', tmp_path).fingerprint == one.fingerprint

# A row that fails costs itself

def failing(error):
    real = eval_model
    def load(spec, *args):
        found = real(spec, *args)
        if spec == 'longclip:longclip-B.pt': found.encode_image = lambda pixels: (_ for _ in ()).throw(error)
        return found
    return load

@pytest.mark.parametrize('error', [TypeError('dies at the first image'), RuntimeError('out of memory'), KeyError('x')])
def test_a_row_that_fails_is_named_and_the_others_go_on(world, capsys, tmp_path, error):
    with patch('gmail_nb.runs.evaluate.eval_model', failing(error)):
        status, printed, said = world.preset(
            capsys, 'paper-table2', 'coco-5k', '--rows', 'Long-CLIP', '--rows', 'CLIP', out=tmp_path/'o'
        )
    row = next(l for l in printed.splitlines() if l.startswith('Long-CLIP'))
    assert status == 2 and 'not measured' in row and str(error).strip("'") in printed
    assert 'Long-CLIP on coco-5k not measured' in said and 'CLIP on coco-5k: 50 queries' in said
    assert {r['arm'] for r in read_results(tmp_path/'o'/'results.jsonl')} == {'CLIP'}
    assert 'not measured' in (tmp_path/'o'/'table.txt').read_text()

def test_an_old_result_is_not_shown_for_a_row_that_fails(world, capsys, tmp_path):
    asked = 'coco-5k', '--rows', 'Long-CLIP', '--rows', 'CLIP'
    assert world.preset(capsys, 'paper-table2', *asked, out=tmp_path/'o')[0] == 0
    with patch('gmail_nb.runs.evaluate.eval_model', failing(ValueError('broken'))):
        # other pixels, so that no features are there
        shutil.rmtree(tmp_path/'o'/'features')
        status, printed, _ = world.preset(capsys, 'paper-table2', *asked, out=tmp_path/'o')
    assert status == 2 and next(l for l in printed.splitlines() if l.startswith('Long-CLIP')).split()[1:3] == [
        'not',
        'measured',
    ]


def test_a_damaged_folder_costs_its_row(world, capsys, tmp_path):
    shutil.copytree(world.below/'gmail-clip', tmp_path/'models'/'gmail-clip')
    shutil.copytree(world.below/'clip', tmp_path/'models'/'clip')
    (tmp_path/'models'/'gmail-clip'/'card.json').write_text('{"kind": "tuned text"}')
    status, printed, said = world.ask(
        capsys,
        'urban-1k',
        '--root',
        world.root,
        '--models',
        tmp_path/'models',
        '--model',
        'CLIP=hf:clip',
        '--model',
        'G=gmail-clip',
        '--no-pictures',
        '--out',
        tmp_path/'o',
    )
    assert status == 2 and 'G on urban-1k not measured' in said and 'CLIP' in printed

# Trained on, tested on

def test_a_model_is_not_tested_on_what_it_was_trained_on(world, capsys, tmp_path):
    models = tmp_path/'models'
    shutil.copytree(world.below, models)
    write_trained_on(models/'aligned', ['3', '4', 'COCO_train2014_000000000077'])
    asked = (
        'coco-5k',
        'urban-1k',
        '--root',
        world.root,
        '--models',
        models,
        '--no-pictures',
        '--model',
        'CLIP=hf:clip',
        '--model',
    )
    status, printed, said = world.ask(capsys, *asked, 'G=tuned:gmail-clip', '--out', tmp_path/'o')
    assert status == 2 and "2 of 10 images of coco-5k are among those of the training of G, such as '3', '4'" in said
    assert 'G on urban-1k: 12 queries' in said  # whose numbers only count its images
    assert {(r['arm'], r['dataset']) for r in read_results(tmp_path/'o'/'results.jsonl')} >= {
        ('CLIP', 'coco-5k'),
        ('G', 'urban-1k'),
    }
    status, _, _ = world.ask(capsys, *asked, 'G=tuned:gmail-clip', '--out', tmp_path/'allowed', '--equal-keys', 'allow')
    assert status == 0

def test_the_keys_of_the_aligned_model_count_too(world, tmp_path):
    models = tmp_path/'models'
    shutil.copytree(world.below, models)
    write_trained_on(models/'gmail-clip', ['b'])
    write_trained_on(models/'aligned', ['a'])
    assert (
        trained_keys('tuned:gmail-clip', models)
        == trained_keys('gmail-clip', models)
        == trained_keys('tuned-f_g:gmail-clip', models)
        == ['a', 'b']
    )
    assert trained_keys('aligned', models) == ['a'] and trained_keys('hf:clip', models) == []

def test_a_picture_has_one_name():
    same = (
        'COCO_val2014_000000000139.jpg',
        '139',
        '000000000139',
        'val2017/000000000139.jpg',
        'val2014/COCO_val2014_000000000139',
    )
    assert {picture_name(k) for k in same} == {'139'}
    assert picture_name('1000092795.jpg') == '1000092795' and picture_name('pug/7.v2') == 'pug/7.v2'

def test_flickrs_files_are_compared_and_not_its_numbers(world):
    tested = EvalSet(*load_retrieval_set('flickr30k', world.root))
    assert compared_names(tested)[:2] == ['0', '1'] and tested.data['file'][:2] == ['0.jpg', '1.jpg'] # of the miniature
    assert compared_names(EvalSet(*load_retrieval_set('urban-1k', world.root))) == []
    assert (
        compared_names(EvalSet(*load_retrieval_set('emoji')))
        == []
        == compared_names(EvalSet(*labelled_set('emoji-group', None)))
    )


def test_classes_are_compared_by_folder_and_file(world, tmp_path):
    folder = tmp_path/'aligned'
    shutil.copytree(world.below/'gmail-synclr', folder)
    tested = EvalSet(*labelled_set('imagenet', world.root))
    key = picture_name('/'.join(tested.data.files[0].parts[-2:]))
    write_trained_on(folder, [key])
    with pytest.raises(ValueError, match='1 of 6 images of imagenet'):
        check_leaks('S', 'aligned', tmp_path, 'imagenet', tested)
    check_leaks('S', 'aligned', tmp_path, 'imagenet', tested, EvalSettings(equal_keys='allow'))

# Folders by their cards

def test_folders_are_known_by_their_cards(world, capsys, tmp_path):
    below = world.below
    assert [kind_of_folder(below/n) for n in ('aligned', 'gmail-clip', 'clip')] == ['aligned', 'tuned', None]
    assert (
        spec_of('aligned', below) == 'aligned:aligned'
        and spec_of('stretched:gmail-clip', below) == 'stretched:tuned:gmail-clip'
    )
    assert eval_model('gmail-clip', below).fingerprint == eval_model('tuned:gmail-clip', below).fingerprint
    assert isinstance(model_at(below/'aligned'), GenReal) and model_at(below/'gmail-clip').name.endswith('+tuned')
    (tmp_path/'captioner').mkdir()
    (tmp_path/'captioner'/'card.json').write_text('{"kind": "captioner"}')
    with pytest.raises(ValueError, match="holds 'captioner', which is no encoder"): spec_of('captioner', tmp_path)

def test_a_bare_folder_is_evaluated(world, capsys, tmp_path):
    status, printed, _ = world.ask(
        capsys,
        'urban-1k',
        '--root',
        world.root,
        '--models',
        world.below,
        '--model',
        'aligned',
        '--model',
        'gmail-clip',
        '--no-pictures',
        '--out',
        tmp_path/'o',
    )
    assert status == 0 and 'gmail-clip' in printed

# Files in COCO's forms

@pytest.mark.parametrize('more, n, split', [((), 10, 'test'), (('--split', 'train'), 2, 'train')])
def test_a_karpathy_file_is_a_set(world, capsys, tmp_path, more, n, split):
    file = world.root/'dataset_coco.json'
    status, _, said = world.ask(
        capsys,
        file,
        '--images',
        world.root,
        '--model',
        'CLIP=hf:clip',
        '--models',
        world.below,
        '--no-pictures',
        '--out',
        tmp_path/'o',
        *more,
    )
    records = read_results(tmp_path/'o'/'results.jsonl')
    assert status == 0 and f'{n} images of the split {split}' in said and {r['split'] for r in records} == {split}
    assert {r['n'] for r in records if r['metric'].startswith('image')} == {n}

def test_tables_are_cut_into_blocks_that_fit():
    table = [['set', *(f'column {i}' for i in range(12))], ['row', *('90.0 [80.0, 95.0]' for _ in range(12))]]
    lines = table_blocks(table).splitlines()
    assert max(map(len, lines)) <= 110 and sum(l.startswith('row') for l in lines) == 3
