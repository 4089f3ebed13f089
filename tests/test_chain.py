"""The whole chain on a miniature in the real formats: from COCO's files, a Stable Diffusion folder, encoders of open_clip
and transformers, GPT-2 and Llama to captions, images, alignment, features, text side, captioner, scores and exports;
from the shell, and through Python."""
import gmail_nb.runtime
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from miniature import (ENCODERS, LANGUAGE_MODELS, SPLITS, all_captions, captions_in, encoder_name, keys_of, miniature,
                       pictures)
from peft import PeftModel
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from gmail_nb.align import GenReal
from gmail_nb.captioning import load_captioner
from gmail_nb.cli.commands import gmail_align, gmail_eval, gmail_generate, gmail_tune
from gmail_nb.encoders import load_encoder, open_clip_encoder
from gmail_nb.export import export
from gmail_nb.features import load_features
from gmail_nb.files import read_results
from gmail_nb.generate import load_generated
from gmail_nb.runs.align import align_sets, embed_set
from gmail_nb.runs.evaluate import evaluate
from gmail_nb.runs.generate import generate_run
from gmail_nb.runs.presets import TextRecipe
from gmail_nb.runs.tune_caption import caption_files, tune_captioner
from gmail_nb.runs.tune_text import tune_from_files
from gmail_nb.settings import (AlignRunSettings, AlignSettings, CaptionerSettings, DrawSettings, SourceSettings,
                               TuneSettings, WorkSettings)
from gmail_nb.sources import load_captioned
from gmail_nb.splits import trained_on

def weight(item): return 100

TRAIN, TEST = 'train+restval', 'test'

@pytest.fixture(scope='module')
def mini(tmp_path_factory): return miniature(tmp_path_factory.mktemp('miniature'))

@pytest.fixture
def without_java(monkeypatch): monkeypatch.setenv('PATH', '') # two of the scores would take longer than all the rest

# The miniature is what it says

def test_captions_of_the_miniature_are_those_of_coco_in_kind(mini):
    found = json.loads((mini/'coco'/'dataset_coco.json').read_text())['images']
    assert {len(i['sentences']) for i in found} == {5, 6, 7}
    assert {s: len(keys_of(mini/'coco', s)) for s in SPLITS} == SPLITS
    for i in found: assert (mini/'coco'/i['filepath']/i['filename']).exists()

@pytest.mark.parametrize('year, lies_in', [('train2014', 'train'), ('val2014', 'restval+val+test')])
def test_both_files_know_the_same_keys(mini, year, lies_in):
    own = load_captioned(
        mini/'coco'/'annotations'/f'captions_{year}.json', SourceSettings(images=str(mini/'coco' / year))
    )
    both = load_captioned(mini/'coco'/'dataset_coco.json', SourceSettings(images=str(mini/'coco'), split=lies_in))
    assert sorted(own['key']) == sorted(both['key']) == keys_of(mini/'coco', lies_in)
    assert dict(zip(own['key'], own['captions'])) == dict(zip(both['key'], both['captions']))

def test_val2017_lies_inside_val2014(mini):
    keys = [
        load_captioned(mini/'coco'/'annotations'/f'captions_{y}.json', images=False)['key']
        for y in ('val2014', 'val2017')
    ]
    assert set(keys[1]) < set(keys[0]) and set(keys[1]) & set(keys_of(mini/'coco', 'restval'))

def test_every_model_is_read_by_its_own_library(mini):
    pipeline = StableDiffusionPipeline.from_pretrained(mini/'sd')
    assert pipeline.tokenizer.model_max_length == 77 and pipeline.scheduler.config.steps_offset == 1
    for name in LANGUAGE_MODELS:
        lm, words = AutoModelForCausalLM.from_pretrained(mini/name), AutoTokenizer.from_pretrained(mini/name)
        text = all_captions()[0]
        assert (
            words.decode(words(text)['input_ids'], skip_special_tokens=True) == text
            and len(words) == lm.config.vocab_size
        )
    turn = AutoTokenizer.from_pretrained(mini/'llama').apply_chat_template(
        [dict(role='user', content='hi ')], tokenize=False
    )
    assert turn == '<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>'

def test_a_miniature_is_the_same_at_every_call(mini, tmp_path):
    again = miniature(tmp_path)
    def files(folder): return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file()}
    assert files(again) == files(mini)

# From the shell

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

def told(mini, split): # how every command is told of some of COCO's images
    return mini/'coco'/'dataset_coco.json', '--images', mini/'coco', '--split', split

DRAW = '--steps', 1, '--quiet'
ALIGN = '--epochs', 2, '--batch-size', 8, '--validation-share', .3, '--no-keep-best' # random weights come no closer
TEXT = '--steps', 4, '--batch-size', 8, '--every', 2, '--tuning', 'lora'
CAPTION = '--steps', 3, '--batch-size', 8, '--max-new-tokens', 4

@pytest.fixture(scope='module')
def way(mini, forks, tmp_path_factory):
    "The way from COCO's folder to scores, and what each command said; the first is from a shell."
    home, name, coco = tmp_path_factory.mktemp('shell'), encoder_name(mini, 'open_clip'), mini/'coco'
    steps = [
        ('generate', *told(mini, TRAIN), '--generator', mini/'sd', *DRAW, '--samples', 2, '--out', 'first'),
        ('generate', *told(mini, TRAIN), '--generator', mini/'sd', *DRAW, '--which', 'all', '--out', 'all'),
        (
            'align',
            *told(mini, TRAIN)[:1],
            '--generated',
            'first',
            *told(mini, TRAIN)[1:],
            '--encoder',
            name,
            *ALIGN,
            '--out',
            'aligned',
        ),
        ('embed', *told(mini, TEST), '--model', 'aligned', '--side', 'base', '--out', 'seen'),
        ('embed', 'all', '--model', 'aligned', '--side', 'generated', '--out', 'drawn'),
        ('tune', 'text', '--generated', 'all', '--model', 'aligned', '--encoder', name, *TEXT, '--out', 'tuned'),
        (
            'tune',
            'caption',
            *told(mini, '')[:3],
            '--split',
            TRAIN,
            '--test-split',
            TEST,
            '--generated',
            'all',
            '--model',
            'aligned',
            '--encoder',
            name,
            '--lm',
            mini/'gpt2',
            *CAPTION,
            '--out',
            'captions',
        ),
        (
            'caption',
            *sorted((coco/'val2017').glob('*.jpg')),
            '--model',
            'captions/captioner',
            '--max-new-tokens',
            4,
        ),
        (
            'eval',
            *told(mini, TEST),
            '--model',
            name,
            '--model',
            'aligned:aligned',
            '--model',
            'tuned:tuned',
            '--no-pictures',
        ),
    ]
    return home, [shell(home, *steps[0]), *[forked(forks, home, *argv) for argv in steps[1:]]]

def test_every_command_says_where_its_results_lie(way):
    ends = ('images: first', 'images: all', 'model: aligned', 'features: seen', 'features: drawn', 'tuned: tuned',
            'captioner: captions/captioner', None, 'results: eval/results.jsonl')
    for said, end in zip(way[1], ends, strict=True):
        assert end is None or said.splitlines()[-1].startswith(end), said

def test_every_caption_of_the_split_has_its_images(way, mini):
    first, every = (load_generated(way[0]/name) for name in ('first', 'all'))
    assert sorted(first['key']) == sorted(2 * keys_of(mini/'coco', TRAIN))
    assert len(every) == captions_in(mini/'coco', TRAIN) and sorted(set(every['key'])) == keys_of(mini/'coco', TRAIN)
    said = {str(key): [c.strip() for c in captions] for key, _, _, captions in pictures()}
    assert all(row['caption'] in said[row['key']] for row in every.select_columns(['key', 'caption']))
    assert {c for k in keys_of(mini/'coco', TRAIN) for c in said[k]} == set(every['caption'])

def test_keys_are_the_same_throughout(way, mini):
    home, train, test = way[0], keys_of(mini/'coco', TRAIN), keys_of(mini/'coco', TEST)
    def keys(folder): return pq.read_table(home/folder/'keys.parquet')['key'].to_pylist()
    assert sorted(keys('aligned/real_features')) == train
    assert sorted(keys('seen')) == test
    assert sorted(set(keys('drawn'))) == sorted(set(keys('tuned/features/gmail'))) == train
    assert len(keys('drawn')) == len(keys('tuned/features/gmail')) == captions_in(mini/'coco', TRAIN)
    for stored in (home/'eval'/'queries').glob('*.npz'):
        with np.load(stored) as f: assert sorted(f['keys:image_to_text'].tolist()) == test
    assert {r['n'] for r in read_results(home/'captions'/'results.jsonl')} == {len(test)}

def test_every_number_is_one(way):
    for name in ('aligned', 'captions', 'eval'):
        records = read_results(way[0]/name/'results.jsonl')
        numbers = [r[k] for r in records for k in ('value', 'low', 'high') if r.get(k) is not None]
        assert numbers and all(map(math.isfinite, numbers)), name
    assert load_features(way[0]/'drawn').mapped.isfinite().all()

def test_a_caption_for_every_picture_that_was_named(way, mini):
    lines = way[1][7].splitlines()
    assert [l.split('\t')[0] for l in lines] == [str(p) for p in sorted((mini/'coco'/'val2017').glob('*.jpg'))]

def answer(capsys, command, *argv):
    capsys.readouterr()
    status = command([str(a) for a in argv])
    said = capsys.readouterr()
    return status, said.out + said.err

def test_images_of_all_captions_can_be_aligned(way, mini, capsys, tmp_path):
    real, *more = told(mini, TRAIN)
    name = encoder_name(mini, 'open_clip')
    status, said = answer(
        capsys, gmail_align, real, '--generated', way[0]/'all', *more, '--encoder', name, *ALIGN,
        '--out', tmp_path/'aligned'
    )
    assert status == 0, said
    assert len(pq.read_table(tmp_path/'aligned'/'real_features'/'keys.parquet')) == 16

def test_a_file_with_splits_is_drawn_without_its_test_images(mini, capsys, tmp_path):
    file = mini/'coco'/'dataset_coco.json'
    assert answer(capsys, gmail_generate, file, '--generator', mini/'sd', *DRAW, '--out', tmp_path/'made')[0] == 0
    assert sorted(load_generated(tmp_path/'made')['key']) == keys_of(mini/'coco', TRAIN)

def test_a_model_is_not_measured_on_what_it_learned_from(way, mini, capsys, tmp_path):
    "restval, which was trained on, and val2017 share images."
    status, said = answer(
        capsys,
        gmail_eval,
        'coco-val2017',
        '--root',
        mini/'coco',
        '--model',
        f'tuned:{way[0]}/tuned',
        '--no-pictures',
        '--out',
        tmp_path/'eval',
    )
    assert status == 2 and 'among those of the training of' in said, said

def test_the_published_names_of_sets_find_the_files(way, mini, capsys, tmp_path):
    status, said = answer(
        capsys,
        gmail_eval,
        'coco-5k',
        '--root',
        mini/'coco',
        '--model',
        f'tuned:{way[0]}/tuned',
        '--no-pictures',
        '--out',
        tmp_path/'eval',
    )
    assert status == 0, said
    with np.load(next((tmp_path/'eval'/'queries').glob('*.npz'))) as f:
        assert sorted(f['keys:image_to_text'].tolist()) == keys_of(mini/'coco', TEST)

def test_a_captioner_is_not_scored_on_what_it_learns_from(way, mini, capsys, tmp_path, without_java):
    "val2017 holds images of restval."
    status, said = answer(
        capsys,
        gmail_tune,
        'caption',
        *told(mini, '')[:3],
        '--split',
        TRAIN,
        '--test',
        mini/'coco'/'annotations'/'captions_val2017.json',
        '--encoder',
        encoder_name(mini, 'open_clip'),
        '--lm',
        mini/'gpt2',
        *CAPTION,
        '--out',
        tmp_path/'captions',
    )
    assert status == 2 and 'among those of' in said, said

@pytest.mark.slow
def test_two_processes_align_as_one(way, mini, tmp_path):
    "`accelerate launch` on two processes of a CPU."
    launch = '-m accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no'.split()
    real, *more = told(mini, TRAIN)
    argv = real, way[0]/'first', *more, '--encoder', encoder_name(mini, 'open_clip'), *ALIGN, '--out', tmp_path/'two'
    done = subprocess.run(
        [sys.executable, *launch, '-m', 'gmail_nb.cli.commands', 'align', *map(str, argv)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [
        {(r['arm'], r['metric']): r['value'] for r in read_results(f/'results.jsonl')}
        for f in (way[0]/'aligned', tmp_path/'two')
    ]
    assert found[1] == pytest.approx(found[0], abs=5e-3)

# Through Python

def source(mini, split): return SourceSettings(images=str(mini/'coco'), split=split)

@pytest.fixture(scope='module')
def drawn(mini, tmp_path_factory):
    "Generated images: two of the first caption, and one of each caption."
    home, work = tmp_path_factory.mktemp('drawn'), WorkSettings(show_progress=False)
    for name, which, samples in (('first', 'first', 2), ('all', 'all', 1)):
        how = replace(source(mini, TRAIN), which=which)
        generate_run(
            str(mini/'coco'/'dataset_coco.json'),
            str(mini/'sd'),
            home / name,
            DrawSettings(steps=1, samples=samples),
            how,
            work,
        )
    return home

HOW = AlignRunSettings(align=AlignSettings(epochs=2, batch_size=8), validation_share=.3, keep_best=False)
LEARN = dict(
    open_clip=('lora', 'gpt2', 'full'), clip=('full', 'gpt2', 'frozen'), siglip=('last', 'llama', 'lora')
)  # text side, LM, LM


@pytest.fixture(scope='module', params=ENCODERS)
def chain(request, mini, drawn, tmp_path_factory):
    "The way of one encoder: aligned, features of both sides, a tuned text side, a captioner and scores."
    kind, home, file = request.param, tmp_path_factory.mktemp(request.param), str(mini/'coco'/'dataset_coco.json')
    name, (text, lm, lm_tuning) = encoder_name(mini, kind), LEARN[kind]
    align_sets(file, drawn/'first', name, home/'aligned', HOW, source(mini, TRAIN))
    embed_set(file, home/'seen', home/'aligned', 'base', source=source(mini, TEST))
    embed_set(drawn/'first', home/'drawn', home/'aligned', 'generated')
    recipe = TextRecipe(name, TuneSettings(tuning=text, steps=4, batch_size=8, every=2))
    tune_from_files(home/'tuned', recipe, drawn/'all', home/'aligned', desc=None)
    settings = CaptionerSettings(name, str(mini/lm), tuning=lm_tuning, steps=3, batch_size=8, max_new_tokens=4)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv('PATH', '')
        tune_captioner(
            file,
            home/'captions',
            settings,
            drawn/'all',
            home/'aligned',
            test_split=TEST,
            source=source(mini, TRAIN),
        )
    models = {m: m for m in (name, f'aligned:{home}/aligned', f'tuned:{home}/tuned')}
    evaluate(models, (file,), out=home/'eval', source=source(mini, TEST), pictures=False, say=lambda text: None)
    return kind, home

def test_scores_of_every_model_are_there(chain, mini):
    kind, home = chain
    records = read_results(home/'eval'/'results.jsonl')
    numbers = [r['value'] for r in records + read_results(home/'captions'/'results.jsonl')]
    assert all(map(math.isfinite, numbers))
    arms = {r['arm'] for r in records if ' - ' not in r['arm']}
    assert arms == {encoder_name(mini, kind), f'aligned:{home}/aligned', f'tuned:{home}/tuned'}
    assert {r['n'] for r in records if r['metric'] == 'image_to_text_recall_at_1'} == {SPLITS[TEST]}

def test_keys_and_captions_of_every_stage_agree(chain, mini, drawn):
    kind, home = chain
    train, test, made = keys_of(mini/'coco', TRAIN), keys_of(mini/'coco', TEST), load_generated(drawn/'first')
    assert sorted(load_features(home/'aligned'/'real_features').keys) == train
    assert sorted(load_features(home/'seen').keys) == test
    found = load_features(home/'drawn')
    assert found.keys == list(made['key']) and found.samples == list(made['sample'])
    assert json.loads((home/'tuned'/'card.json').read_text())['pairs'] == captions_in(mini/'coco', TRAIN)

def test_a_captioner_writes_for_files(chain, mini):
    _, home = chain
    files = [str(p) for p in sorted((mini/'coco'/'val2017').glob('*.jpg'))]
    found, broken = caption_files(files, home/'captions'/'captioner', max_new_tokens=4)
    assert list(found) == files and not broken
    assert not load_captioner(home/'captions'/'captioner').training

def stack(pixels): return torch.stack(pixels)

def plain(folder, kind):
    "A model as its own library loads it: (PIL images) -> pixels, pixels -> unit features, texts -> unit features."
    if kind == 'open_clip':
        model, _, transform = open_clip.create_model_and_transforms(f'local-dir:{folder}')
        words = open_clip.get_tokenizer(f'local-dir:{folder}')
        return (
            model.eval(),
            lambda images: stack([transform(i.convert('RGB')) for i in images]),
            lambda x: model.encode_image(x, normalize=True),
            lambda texts: model.encode_text(words(texts), normalize=True),
        )
    model, processor, words = (c.from_pretrained(folder) for c in (AutoModel, AutoImageProcessor, AutoTokenizer))
    how = dict(
        padding='max_length',
        truncation=True,
        max_length=model.config.text_config.max_position_embeddings,
        return_tensors='pt',
    )

    def unit(out): return F.normalize(getattr(out, 'pooler_output', out), dim=-1) # a tensor, before transformers 5
    def text(texts): return unit(model.get_text_features(**words(texts, **how)))

    return (
        model.eval(),
        lambda images: processor([i.convert('RGB') for i in images], return_tensors='pt')['pixel_values'],
        lambda x: unit(model.get_image_features(pixel_values=x)),
        text,
    )

def photos(mini, keys):
    "The pictures of these keys of val2014, from the disk."
    return [Image.open(mini/'coco'/'val2014'/f'COCO_val2014_{int(k):012}.jpg') for k in keys]

@torch.inference_mode()
def test_features_of_f_r_are_those_of_the_library(chain, mini):
    kind, home = chain
    _, pixels, see, read = plain(mini/kind, kind)
    found = load_features(home/'seen')
    torch.testing.assert_close(found[:], see(pixels(photos(mini, found.keys))), atol=1e-5, rtol=0)
    texts, encoder = all_captions()[:9], load_encoder(encoder_name(mini, kind))
    torch.testing.assert_close(encoder.encode_text(encoder.tokenize(texts)), read(texts), atol=1e-5, rtol=0)

@torch.inference_mode()
def test_an_adapter_is_read_by_plain_peft(chain, mini, drawn):
    "On the library's own model, with the projection applied by hand."
    kind, home = chain
    model, made = GenReal.from_pretrained(home/'aligned'), load_generated(drawn/'first')
    whole, pixels, see, _ = plain(mini/kind, kind)
    x = pixels(list(made['image'][:6]))
    before = see(x)
    PeftModel.from_pretrained(whole, str(home/'aligned'/'adapter')).eval() # in place
    after = F.normalize(see(x) @ model.proj_gen.weight.T, dim=-1)
    torch.testing.assert_close(after, load_features(home/'drawn')[:6], atol=1e-5, rtol=0)
    assert (after - before).abs().max() > 1e-4 # f_g has moved

@torch.inference_mode()
def test_an_export_is_read_by_its_own_library(chain, mini, drawn, tmp_path, request):
    kind, home = chain
    model, made = GenReal.from_pretrained(home/'aligned'), load_generated(drawn/'first')
    if kind == 'siglip': # has no last linear map to take the projection
        with pytest.raises(ValueError, match='does not end in a linear map'): export(model, tmp_path/'plain')
        model.proj_gen.weight.copy_(torch.eye(model.encoder.dim))
    _, pixels, see, read = plain(export(model, tmp_path/'plain'), kind)
    x, texts = pixels(list(made['image'][:6])), all_captions()[:9]
    torch.testing.assert_close(see(x), model.encode_generated(x), atol=1e-5, rtol=0)
    torch.testing.assert_close(read(texts), model.encode_text(model.encoder.tokenize(texts)), atol=1e-5, rtol=0)

@torch.inference_mode()
def test_an_export_keeps_the_activation_of_its_weights(monkeypatch, tmp_path):
    "OpenAI's weights have QuickGELU, which the name of their architecture does not say."
    create = open_clip.create_model_and_transforms
    def without_download(name, pretrained=None, **kwargs): return create(name, **kwargs) # random weights stand in
    monkeypatch.setattr(open_clip, 'create_model_and_transforms', without_download)
    model = GenReal(open_clip_encoder('ViT-B-32/openai'))
    whole = open_clip.create_model(f"local-dir:{export(model, tmp_path/'plain')}").eval()
    activations = {type(b.mlp.gelu).__name__ for b in whole.visual.transformer.resblocks}
    assert activations == {'QuickGELU'}

@pytest.mark.parametrize('folder, names', [
    pytest.param('aligned', 'train+restval'),
    pytest.param('tuned', 'train+restval'),
    pytest.param('captions/captioner', 'train+restval')])
def test_what_a_model_learned_from_stays_beside_it(chain, mini, folder, names):
    known = set(trained_on(chain[1]/folder))
    assert known and known <= set(keys_of(mini/'coco', names))

def test_a_text_side_learns_from_the_split_alone(mini, drawn, tmp_path):
    "Although there are images of the test split's captions too."
    how, file = (
        SourceSettings(images=str(mini/'coco'), split='train+restval+val+test'),
        str(mini/'coco'/'dataset_coco.json'),
    )
    generate_run(file, str(mini/'sd'), tmp_path/'made', DrawSettings(steps=1), how, WorkSettings(show_progress=False))
    recipe = TextRecipe(encoder_name(mini, 'clip'), TuneSettings(steps=2, batch_size=8))
    tune_from_files(
        tmp_path/'tuned', recipe, tmp_path/'made', None, file, 'indiscriminate', source(mini, TRAIN), desc=None
    )
    assert json.loads((tmp_path/'tuned'/'card.json').read_text())['pairs'] == len(keys_of(mini/'coco', TRAIN))

# The shell and Python do the same

def test_the_shell_draws_and_aligns_as_python_does(way, mini, drawn, tmp_path):
    for name in ('first', 'all'):
        ours, theirs = (list(load_generated(f/name)['sha256']) for f in (drawn, way[0]))
        assert ours == theirs
    model = align_sets(
        str(mini/'coco'/'dataset_coco.json'),
        drawn/'first',
        encoder_name(mini, 'open_clip'),
        tmp_path/'aligned',
        HOW,
        source(mini, TRAIN),
    )
    shell_made = GenReal.from_pretrained(way[0]/'aligned')
    for p, q in zip(model.f_g.parameters(), shell_made.f_g.parameters(), strict=True): torch.testing.assert_close(p, q)
