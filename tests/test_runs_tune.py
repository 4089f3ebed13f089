"Tuning text sides and captioners from files: what each arm learns, what is left out, and what a person gets wrong."
import gmail_nb.runtime
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from gmail_nb.align import GenReal
from gmail_nb.captioning import caption_tokenizer, load_captioner
from gmail_nb.cli.commands import gmail_caption, gmail_tune
from gmail_nb.caption_metrics import java_missing
from gmail_nb.data import emoji
from gmail_nb.encoders import encode_images, load_encoder, preprocess_images
from gmail_nb.files import read_results
from gmail_nb.generate import generate, load_generated
from gmail_nb.runs.presets import ARMS, TEXT_RECIPES, check_arm
from gmail_nb.runs.tune_caption import (
    CaptionColumn,
    Embeddings,
    caption_files,
    caption_sets,
    captioned_rows,
    coco_rows,
    pictures_at,
    split_rows,
    training_features,
    tune_captioner,
)
from gmail_nb.runs.tune_text import pairs_of_files, tune_from_files
from gmail_nb.runtime import set_seed
from gmail_nb.settings import CaptionerSettings, CaptionRunSettings, DrawSettings, SourceSettings, TuneSettings
from gmail_nb.settings import WorkSettings
from gmail_nb.splits import trained_on, write_trained_on
from gmail_nb.tune import load_tuned, tune_text
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

def weight(item): return 30

transformers.utils.logging.disable_progress_bar()

def draw(captions, out):
    return generate(captions, 'embedded', out, DrawSettings(steps=2), work=WorkSettings(show_progress=False))

def answer(capsys, command, *argv, last=True):
    "Exit status, and what is printed on the two streams."
    capsys.readouterr()
    status = command([str(a) for a in argv])
    said = capsys.readouterr()
    return status, said.out, said.err.split('\r')[-1] if last else said.err # behind the last bar

# A text side

@pytest.fixture(scope='module')
def text(tmp_path_factory):
    "24 emoji, a generated image for each, and a model that has not been aligned."
    folder, real = tmp_path_factory.mktemp('text'), emoji('B', source='noto').select(range(24))
    made = draw(dict(zip(real['key'], real['label'])), folder/'generated')
    GenReal(load_encoder('embedded')).save_pretrained(folder/'model')
    return dict(folder=folder, real=real, made=made, drawn=load_generated(made), encoder=load_encoder('embedded'))

def test_a_recipe_learns_what_is_learned_by_hand(text):
    settings = TuneSettings(steps=10, every=5, validation_share=.2)
    recipe, out = replace(TEXT_RECIPES['small'], settings=settings), text['folder']/'recipe'
    first = tune_from_files(out, recipe, text['made'], text['folder']/'model', desc=None)
    encoder, drawn = load_encoder('embedded'), text['drawn']
    x = encode_images(encoder.encode_image, preprocess_images(encoder, list(drawn['image'])))
    by_hand = tune_text(encoder, x, list(drawn['caption']), settings)
    torch.testing.assert_close(by_hand.text.head.weight, first.text.head.weight, atol=1e-4, rtol=0)
    tokens = encoder.tokenize(list(drawn['caption'])[:3])
    torch.testing.assert_close(load_tuned(out).encode_text(tokens), first.encode_text(tokens), atol=1e-5, rtol=0)
    card = json.loads((out/'card.json').read_text())
    assert (card['arm'], card['pairs']) == ('gmail', 24)

def test_shapes_of_what_the_arms_learn(text):
    said = sum(map(len, text['real']['captions']))
    found = {
        arm: pairs_of_files(text['folder']/'arms', text['encoder'], arm, generated=text['drawn'], real=text['real'])
        for arm in ('real', 'mix', 'indiscriminate')
    }
    shapes = {arm: (tuple(x.shape), len(c)) for arm, (x, c) in found.items()}
    assert shapes == dict(real=((said, 256), said), mix=((2, 24, 256), 24), indiscriminate=((24, 256), 24))

def test_each_generated_image_of_the_mix_is_beside_its_real_partner(text):
    encoder, drawn, real = text['encoder'], text['drawn'], text['real']
    x, _ = pairs_of_files(text['folder']/'mix', encoder, 'mix', generated=drawn, real=real)
    partner = real[list(real['key']).index(drawn[5]['key'])]['image']
    alone = encode_images(encoder.encode_image, preprocess_images(encoder, [partner]))[0]
    torch.testing.assert_close(x[1, 5], torch.nn.functional.normalize(alone, dim=-1), atol=1e-5, rtol=1e-3)

@pytest.mark.parametrize(
    'arm, said', [('gmail', 'name an aligned model'), ('real', 'name a captioned set'), ('mixed', "did you mean 'mix'")]
)
def test_an_arm_that_lacks_something(text, arm, said):
    with pytest.raises(ValueError, match=said):
        pairs_of_files(text['folder']/'arms', text['encoder'], arm, generated=text['drawn'])
    with pytest.raises(ValueError, match='generated images: name their folder with --generated'):
        check_arm('mix', None, None, 1)
    assert set(ARMS) == {'gmail', 'indiscriminate', 'real', 'mix'}

def test_the_command_writes_what_was_asked(text, capsys):
    out = text['folder']/'told'
    status, said, _ = answer(
        capsys,
        gmail_tune,
        'text',
        '--generated',
        text['made'],
        '--model',
        text['folder']/'model',
        '--out',
        out,
        '--steps',
        3,
    )
    assert status == 0 and 'the best at 3' in said and f'tuned: {out}' in said
    assert json.loads((out/'card.json').read_text())['settings']['steps'] == 3

# A captioner

@pytest.fixture(scope='module')
def captions(tmp_path_factory):
    "A Karpathy file in miniature with one picture cut short and one missing, small language models, and generated images."
    folder, rows = tmp_path_factory.mktemp('captions'), []
    (folder/'coco').mkdir()
    ds = emoji('B', source='noto').select(range(40))
    for i, r in enumerate(ds):
        r['image'].save(folder/'coco'/f'{i:04}.png')
        rows.append(
            dict(
                cocoid=i,
                filename=f'{i:04}.png',
                split='train' if i % 4 else 'test',
                sentences=[dict(raw=c) for c in r['captions']],
            )
        )
    (folder/'dataset_coco.json').write_text(json.dumps(dict(images=rows, dataset='coco')))
    cut = folder/'coco'/'0005.png'
    cut.write_bytes(cut.read_bytes()[:300])
    (folder/'coco'/'0008.png').unlink()
    tokenizer = caption_tokenizer(c for r in ds['captions'] for c in r)
    sizes = dict(vocab_size=len(tokenizer), bos_token_id=2, eos_token_id=2)
    kinds = dict(
        gpt2=GPT2Config(n_positions=96, n_embd=64, n_layer=2, n_head=2, **sizes),
        llama=LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=96,
            **sizes,
        ),
        opt=OPTConfig(
            hidden_size=64,
            word_embed_proj_dim=32,
            num_hidden_layers=2,
            ffn_dim=96,
            num_attention_heads=2,
            max_position_embeddings=96,
            pad_token_id=0,
            **sizes,
        ),
    )
    for kind, config in kinds.items():
        set_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(str(folder/kind))
        tokenizer.save_pretrained(str(folder/kind))
    made = draw({str(i): r['captions'][0] for i, r in enumerate(ds)}, folder/'generated')
    GenReal(load_encoder('embedded')).save_pretrained(folder/'aligned')
    return dict(folder=folder, ds=ds, made=made, drawn=load_generated(made))

@pytest.fixture(autouse=True)
def no_java(monkeypatch): monkeypatch.setenv('PATH', '') # starting it takes longer than all the rest

def tune(capsys, captions, kind, steps, *more):
    "The preset of Table 1 with a small language model of that kind."
    folder = captions['folder']
    status, out, err = answer(
        capsys,
        gmail_tune,
        'caption',
        '--preset',
        'paper-table1',
        folder/'dataset_coco.json',
        '--images',
        folder/'coco',
        '--out',
        folder/f'out_{kind}',
        '--encoder',
        'embedded',
        '--lm',
        folder / kind,
        '--steps',
        steps,
        '--lr',
        '3e-3',
        '--most-damaged',
        '.1',
        *more,
        last=False,
    )
    return status, out, [l for l in err.splitlines() if 'left out' in l or l.startswith('gmail')]

@pytest.mark.parametrize('kind, steps', [
    ('gpt2', 80), pytest.param('opt', 10, marks=pytest.mark.slow), ('llama', 10)])
def test_a_preset_trains_on_a_karpathy_file(captions, capsys, kind, steps):
    status, out, said = tune(capsys, captions, kind, steps)
    results = {r['metric']: r for r in read_results(captions['folder']/f'out_{kind}'/'results.jsonl')}
    assert status == 0 and results['images_left_out']['value'] == 2 and results['CIDEr']['n'] == 9
    assert 'CLIPScore' in results and 'METEOR' not in results and java_missing() in ' '.join(out.split()), out
    assert said[-1] == '2 of 40 images left out' and "'5' (0005.png)" in said[0] and "'8' (0008.png)" in said[1]
    assert results['CIDEr']['split'] == 'test' and results['CIDEr']['dataset'] == 'dataset_coco'
    assert f"captioner: {captions['folder']}/out_{kind}/captioner" in out

def test_generated_images_go_through_f_g(captions, capsys):
    folder = captions['folder']
    status, _, _ = tune(
        capsys,
        captions,
        'gpt2',
        8,
        '--generated',
        captions['made'],
        '--model',
        folder/'aligned',
        '--out',
        folder/'gmail',
    )
    assert status == 0 and {r['arm'] for r in read_results(folder/'gmail'/'results.jsonl')} == {'gmail'}

@pytest.fixture(scope='module')
def trained(captions):
    folder, encoder = captions['folder'], load_encoder('embedded')
    train = coco_rows(folder/'dataset_coco.json', folder/'coco', 'train')
    arms = {
        arm: training_features(train, encoder, arm, generated=captions['drawn'])
        for arm in ('real', 'indiscriminate', 'mix')
    }
    return dict(encoder=encoder, train=train, arms=arms)

def test_the_mix_pairs_each_image_with_its_real_partner(captions, trained):
    (x, c, broken), ds, encoder = trained['arms']['mix'], captions['ds'], trained['encoder']
    assert x.shape == (2, 29, 256) and len(broken) == 1 and [len(cs) for cs in c] == [1] * 29
    whole = [i for i in range(40) if i % 4 and i != 5] # 0, 4, ... are test images and 5 is damaged
    assert sorted(cs[0] for cs in c) == sorted(ds[i]['label'] for i in whole)
    partner = encode_images(encoder.encode_image, encoder.preprocess(ds[6]['image'])[None])[0]
    torch.testing.assert_close(x[1, c.index([ds[6]['label']])], partner, atol=1e-4, rtol=1e-3)

def test_both_takes_each_image_through_its_own_side(captions, trained):
    "Real ones through f_r and its projection, generated ones through f_g; where neither was trained, it is the mix."
    model = GenReal(load_encoder('embedded'))
    with torch.no_grad():
        model.proj_gen.weight.copy_(torch.eye(256).flip(0))
        model.proj_real.weight.neg_()
    x, c, _ = training_features(trained['train'], model.encoder, 'both', model, captions['drawn'])
    mix, said, _ = trained['arms']['mix']
    assert x.shape == mix.shape and [list(a) for a in c] == [list(a) for a in said]
    every, unit = torch.arange(29), torch.nn.functional.normalize
    for source, change in ((0, lambda v: v.flip(-1)), (1, lambda v: -v)):
        wanted = unit(change(mix[source, every]), dim=-1)
        torch.testing.assert_close(unit(x[source, every], dim=-1), wanted, atol=1e-4, rtol=1e-3)
    for lacks in (dict(generated=captions['drawn']), dict(model=model)):
        with pytest.raises(ValueError, match='generated'):
            training_features(trained['train'], model.encoder, 'both', **lacks)
    with pytest.raises(ValueError, match="unknown arm 'both'"): check_arm('both', model, captions['drawn'], True)

def test_a_generated_image_is_learned_with_the_caption_it_was_made_from(captions, trained):
    (x, c, _), drawn, encoder = trained['arms']['indiscriminate'], captions['drawn'], trained['encoder']
    assert x.shape == (30, 256)
    one = drawn[list(drawn['caption']).index(c[3][0])]['image']
    torch.testing.assert_close(
        x[3], encode_images(encoder.encode_image, encoder.preprocess(one)[None])[0], atol=1e-4, rtol=1e-3
    )


def test_arms_that_lack_their_images(captions, trained):
    encoder, train, drawn = trained['encoder'], trained['train'], captions['drawn']
    with pytest.raises(ValueError, match='name their folder with --generated'): training_features(train, encoder, 'mix')
    with pytest.raises(ValueError, match="unknown arm 'gmial': did you mean 'gmail'"):
        training_features(train, encoder, 'gmial')
    others = [dict(r, key='x' + r['key']) for r in train]
    with pytest.raises(ValueError, match='no generated image has the key'):
        training_features(others, encoder, 'indiscriminate', generated=drawn)
    with pytest.raises(FileNotFoundError, match='there is no folder'):
        coco_rows(captions['folder']/'dataset_coco.json', captions['folder']/'nowhere')


def test_generated_images_alone_are_learned_from_but_for_those_tested(captions, trained):
    leave = frozenset({'0', '4'})
    x, c, _ = training_features(None, trained['encoder'], 'indiscriminate', generated=captions['drawn'], leave=leave)
    assert x.shape == (38, 256) and [captions['ds'][0]['label']] not in c

def test_three_ways_to_keep_test_images_apart(captions):
    folder, ds = captions['folder'], captions['ds']
    source = SourceSettings(images=str(folder/'coco'))
    by_split = caption_sets(folder/'dataset_coco.json', None, source=source)
    assert (len(by_split.train), len(by_split.test), by_split.split) == (30, 10, 'test')
    by_share = caption_sets(ds, None, CaptionRunSettings(validation_share=.2))
    assert not {r['key'] for r in by_share.train} & {r['key'] for r in by_share.test} and by_share.split == 'validation'
    apart = caption_sets(ds, emoji('B', source='twemoji').select(range(5)))
    assert len(apart.train) == 40 and len(apart.test) == 5
    with pytest.raises(ValueError, match='or one with --test'): caption_sets(None, None)
    with pytest.raises(ValueError, match='--validation-share, 0.1 now'): split_rows([dict(key='0')], .1)

def test_what_a_person_gets_wrong_in_tune(captions, capsys):
    folder = captions['folder']
    real = folder/'dataset_coco.json', '--images', folder/'coco'
    status, _, err = answer(capsys, gmail_tune, 'caption', *real, '--generated', folder/'coco', '--out', folder/'o2')
    assert status == 2 and '--model' in err
    status, _, err = answer(capsys, gmail_tune, 'caption', '--out', folder/'o3')
    assert status == 2 and 'or a captioned set of real ones' in err
    status, _, said = tune(capsys, captions, 'gpt2', 5, '--prefix-length', '96')
    assert status == 2 and 'but the language model has 96: shorten the prefix' in said[-1]

def test_captions_for_a_persons_own_pictures(captions, capsys):
    folder = captions['folder']
    if not (folder/'out_gpt2'/'captioner'/'card.json').exists(): tune(capsys, captions, 'gpt2', 80)
    (folder/'coco'/'cut.png').write_bytes(b'\x89PNG')
    files = [folder/'coco'/f for f in ('0001.png', '0002.png', 'cut.png', '0004.png', '0006.png', '0007.png')]
    status, out, err = answer(capsys, gmail_caption, *files, '--model', folder/'out_gpt2'/'captioner')
    written = {Path(l.split('\t')[0]).name: l.split('\t')[1] for l in out.splitlines()}
    assert status == 0 and len(written) == 5 and '1 of 6 images left out' in err
    status, _, err = answer(capsys, gmail_caption, files[2], '--model', folder/'out_gpt2'/'captioner')
    assert status == 2 and 'none of 1 images decodes' in err
    assert answer(capsys, gmail_caption, 'x.png', '--model', folder/'nowhere')[0] == 2

# The road of a captioner: features, keys, folders

FEW = CaptionerSettings(steps=3, batch_size=16, max_new_tokens=5)

def run_of(captions, name, *args, settings=FEW, **how):
    "A run on the Karpathy file in miniature, without a word."
    folder = captions['folder']
    source = SourceSettings(images=str(folder/'coco'))
    how = dict(most_damaged=.1) | how # two of forty do not decode
    return tune_captioner(folder/'dataset_coco.json', folder/name, settings, *args, source=source, **how)

def by_key(captions, keys, named=None):
    "Some of the 40 emoji under these keys."
    ds = captions['ds'].select(keys).remove_columns('key')
    return ds.add_column('key', [str(k) for k in (named or keys)])

@pytest.mark.slow
def test_arms_and_seeds_share_features_and_decode_nothing_twice(captions, monkeypatch):
    shared = str(captions['folder']/'shared')
    run_of(captions, 'seed0', captions['made'], arm='mix', features=shared)
    before = sorted(p.name for p in Path(shared).iterdir())
    def never(*args): raise AssertionError('an image was embedded again')
    monkeypatch.setattr('gmail_nb.features.embed_part', never)
    for arm in ('mix', 'real'): run_of(captions, f'seed1-{arm}', captions['made'], arm=arm, features=shared, seed=1)
    assert sorted(p.name for p in Path(shared).iterdir()) == before
    assert [n.split('-')[0] for n in before] == ['generated', 'real', 'test']

def test_sixteen_bits_on_disk(captions):
    run_of(captions, 'half', store='float16')
    cards = [json.loads(p.read_text()) for p in (captions['folder']/'half'/'features').glob('*/card.json')]
    assert {c['store'] for c in cards} == {'float16'} and len(cards) == 2

def test_keys_and_captions_are_read_without_pixels(captions, tmp_path, monkeypatch):
    ds = captions['ds'].select(range(12))
    ds.to_parquet(str(tmp_path/'some.parquet'))
    rows = captioned_rows(tmp_path/'some.parquet')
    def never(*args, **kwargs): raise AssertionError('an image was read')
    monkeypatch.setattr('datasets.Image.decode_example', never)
    column = CaptionColumn(rows, [3, 1], chunk=1)
    said = rows.select_columns(['captions'])
    assert list(column) == column[:2] == [list(said[i]['captions']) for i in (3, 1)]
    assert 'image' not in column.ds.column_names and rows.features['image'].decode is False
    train, kept = split_rows(rows, .3)
    assert sorted([*train['key'], *kept['key']]) == sorted(rows['key'])

def test_everything_of_a_run_is_on_one_device(captions, monkeypatch):
    "Whatever is embedded or trained meets weights that are where its model says it is."
    from gmail_nb import features
    seen, embedder = [], features.embedder
    def watched(model, side='real', device=None):
        made = embedder(model, side, device)
        if isinstance(model, GenReal):
            places = {p.device for part in (model.f_g, model.proj_gen, model.proj_real) for p in part.parameters()}
            seen.append((side, places == {made.device}))
        return made
    monkeypatch.setattr(features, 'embedder', watched)
    run_of(captions, 'devices', captions['made'], captions['folder']/'aligned')
    assert seen == [('generated', True)]

def test_the_same_command_goes_on_and_another_one_is_refused(captions, monkeypatch):
    first = run_of(captions, 'again')
    def never(*args): raise AssertionError('a step was taken again')
    monkeypatch.setattr('gmail_nb.captioning.CaptionTraining.advance', never)
    again = run_of(captions, 'again', settings=replace(FEW, beams=2)) # which changes the scores alone
    assert len(again) == len(first)
    with pytest.raises(ValueError, match='seed is 0 there and 1 here'): run_of(captions, 'again', seed=1)

def test_test_images_that_are_learned_from_are_refused(captions):
    folder, made = captions['folder'], captions['made']
    overlap, apart = by_key(captions, [1, 2]), by_key(captions, [3, 7], ['a', 'b'])
    for arm, how in (('real', {}), ('indiscriminate', dict(generated=made))):
        with pytest.raises(
            ValueError, match="2 of 2 images of the test set are among those of this training, such as '1', '2'"
        ):
            run_of(captions, 'leak', arm=arm, test=overlap, **how)
    with pytest.raises(ValueError, match='among those of this training'):
        tune_captioner(None, folder/'leak', FEW, made, arm='indiscriminate', test=overlap)
    assert not (folder/'leak'/'features').exists() # nothing was embedded for it
    run_of(captions, 'apart', arm='real', test=apart)
    assert sorted(trained_on(folder/'apart'/'captioner')) == sorted(str(i) for i in range(40) if i % 4)

def test_a_karpathy_file_as_the_test_set_says_what_is_learned_from(captions):
    folder = captions['folder']
    source = SourceSettings(images=str(folder/'coco'))
    records = tune_captioner(None, folder/'by_file', FEW, captions['made'], arm='indiscriminate',
                             test=folder/'dataset_coco.json', source=source, most_damaged=.1)
    assert {(r['split'], r['n']) for r in records} == {('test', 9)}
    assert not set(trained_on(folder/'by_file'/'captioner')) & {str(i) for i in range(0, 40, 4)}

def test_what_the_models_below_were_trained_on_is_no_test(captions):
    folder, model = captions['folder'], GenReal(load_encoder('embedded')).save_pretrained(captions['folder']/'knows')
    write_trained_on(model, ['4'])
    with pytest.raises(
        ValueError, match="1 of 10 images of the test set are among those of the aligned model, such as '4'"
    ):
        run_of(captions, 'leak2', captions['made'], model)
    run_of(captions, 'base')
    start = replace(FEW, start=str(folder/'base'))
    with pytest.raises(ValueError, match='among those of the captioner to start from'):
        tune_captioner(by_key(captions, [20, 24], ['x', 'y']), folder/'leak3', start, test=by_key(captions, [1, 2]))

@pytest.mark.slow
def test_a_captioner_goes_on_from_another(captions):
    folder = captions['folder']
    run_of(captions, 'first', settings=replace(FEW, steps=20))
    run_of(captions, 'second', settings=replace(FEW, steps=1, lr=1e-9, noise=0., start=str(folder/'first')))
    first, second = (load_captioner(folder/n) for n in ('first', 'second'))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(first.parameters(), second.parameters()))
    for how, said in (
        (dict(mapper='transformer'), "mapper is 'mlp' there"),
        (dict(tuning='frozen'), "tuning is 'full' there"),
        (dict(lm=str(folder/'gpt2')), 'name is None there'),
        (dict(prefix_length=5), 'prefix_length is 4 there'),
    ):
        with pytest.raises(ValueError, match=said):
            run_of(captions, 'third', settings=replace(FEW, start=str(folder/'first'), **how))


@pytest.mark.slow
def test_a_mapper_first_and_the_language_model_later(captions):
    "A frozen language model is tuned in a second run, with LoRA or in full."
    folder = captions['folder']
    frozen = replace(FEW, lm=str(folder/'gpt2'), tuning='frozen', dtype='bfloat16', steps=6)
    run_of(captions, 'mapper', settings=frozen)
    mapper = load_captioner(folder/'mapper')
    for tuning in ('lora', 'full'):
        later = replace(frozen, tuning=tuning, start=str(folder/'mapper'), steps=1, lr=1e-9, noise=0.)
        run_of(captions, f'later-{tuning}', settings=later)
        found = load_captioner(folder/f'later-{tuning}')
        assert all(
            torch.allclose(a, b, atol=1e-5) for a, b in zip(mapper.prefix.parameters(), found.prefix.parameters())
        )
        assert found.settings['tuning'] == tuning
        assert found.lm.dtype == (torch.float32 if tuning == 'full' else torch.bfloat16)

def test_a_projection_that_was_trained_goes_with_the_captioner(captions):
    folder, model = captions['folder'], GenReal(load_encoder('embedded'))
    with torch.no_grad(): model.proj_real.weight.copy_(torch.eye(256).flip(0))
    model.save_pretrained(folder/'projected')
    run_of(captions, 'with_projection', captions['made'], folder/'projected')
    run_of(captions, 'without', captions['made'], folder/'aligned')
    picture = folder/'coco'/'0004.png'
    assert (folder/'with_projection'/'captioner'/'projection.safetensors').exists()
    assert not (folder/'without'/'captioner'/'projection.safetensors').exists()
    assert caption_files(picture, folder/'with_projection')[0]

def test_pictures_come_as_files_folders_and_sets(captions, tmp_path):
    folder = captions['folder']
    if not (folder/'base'/'captioner').exists(): run_of(captions, 'base')
    captions['ds'].select(range(3)).to_parquet(str(tmp_path/'some.parquet'))
    (tmp_path/'photos'/'deep').mkdir(parents=True)
    for i, place in enumerate(('a.png', 'deep/b.png')): captions['ds'][i]['image'].save(tmp_path/'photos'/place)
    (tmp_path/'photos'/'notes.txt').write_text('no picture')
    (tmp_path/'photos'/'c.png').write_bytes(b'no picture')
    places = [tmp_path/'photos', tmp_path/'some.parquet', captions['made']]
    assert [len(pictures_at(p)) for p in places] == [3, 3, 40]
    written, broken = caption_files(places, folder/'base', batch_size=4, workers=3)
    assert len(written) == 2 + 3 + 40 and [Path(b).name for b in broken] == ['c.png']
    assert {Path(n).name for n in list(written)[:2]} == {'a.png', 'b.png'}
    (tmp_path/'empty').mkdir()
    with pytest.raises(ValueError, match='holds no pictures'): caption_files(tmp_path/'empty', folder/'base')

def test_before_any_tuning_the_error_says_what_names_a_captioner(captions, tmp_path, capsys):
    (tmp_path/'x.png').touch()
    status, _, err = answer(capsys, gmail_caption, tmp_path/'x.png', '--model', captions['folder']/'nowhere')
    assert status == 2 and f"--model {captions['folder']/'nowhere'}: no such folder" in err
    status, _, err = answer(capsys, gmail_caption, tmp_path/'x.png', '--model', tmp_path)
    assert status == 2 and 'no card.json, which gmail_tune caption writes' in err

def test_flags_of_a_captioner(captions, capsys):
    folder = captions['folder']
    status, _, said = tune(
        capsys,
        captions,
        'llama',
        2,
        '--out',
        folder/'flags',
        '--tuning',
        'lora',
        '--dtype',
        'bfloat16',
        '--beams',
        '2',
        '--noise',
        '.1',
        '--rank',
        '2',
        '--precision',
        'bf16',
        '--revision',
        'main',
        '--max-new-tokens',
        '6',
    )
    card = json.loads((folder/'flags'/'captioner'/'card.json').read_text())
    assert status == 0 and card['dtype'] == 'bfloat16' and card['rank'] == 2 and card['revision'] == 'main'
    assert {k: card['preset'][k] for k in ('beams', 'noise', 'precision')} == dict(beams=2, noise=.1, precision='bf16')
    if not torch.cuda.is_available():
        status, _, said = tune(capsys, captions, 'llama', 2, '--out', folder/'bits', '--tuning', 'lora', '--four-bit')
        assert status == 2 and 'in 4 bit needs a CUDA device' in said[0]

@pytest.mark.cuda
def test_a_run_on_a_gpu(captions):
    "Features, training and scores on the GPU; nothing meets a tensor of the CPU."
    records = run_of(captions, 'gpu', captions['made'], captions['folder']/'aligned')
    assert {r['arm'] for r in records} == {'gmail'}
