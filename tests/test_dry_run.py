"Asked first: what is there, what is missing, and that nothing is written."
from pathlib import Path

import huggingface_hub
import pytest
import torch
from test_cli import all_commands

from gmail_nb.classification import classification_miniature
from gmail_nb.cli.commands import COMMANDS, gmail_experiment
from gmail_nb.cli.flags import Commands, options_of
from gmail_nb.data import emoji, quiet_datasets
from gmail_nb.generate import generate
from gmail_nb.retrieval import retrieval_miniature
from gmail_nb.runs import dry_run
from gmail_nb.runs.dry_run import (
    HUB_SETS,
    SET_FILES,
    dry_align,
    dry_eval,
    dry_generate,
    dry_text,
    look_data,
    look_decoding,
    look_device,
    look_generated,
    look_hub,
    look_lm,
    look_model,
    look_out,
    look_set,
    rate_at,
    some_pictures,
)
from gmail_nb.runs.presets import EIGHT, SET_NAMES, TEXT_RECIPES
from gmail_nb.settings import (
    AlignRunSettings,
    AlignSettings,
    DrawSettings,
    EmbedSettings,
    EvalSettings,
    RunSettings,
    SourceSettings,
    WorkSettings,
)
from gmail_nb.splits import write_trained_on

quiet = WorkSettings(show_progress=False)

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    folder = classification_miniature(retrieval_miniature(tmp_path_factory.mktemp('sets')))
    generate(folder/'dataset_coco.json', 'embedded', folder/'drawn', DrawSettings(steps=1),
             SourceSettings(split='test', which='all'), quiet)
    return folder

def files_of(folder): return {str(p): p.stat().st_mtime_ns for p in Path(folder).rglob('*')}

def answer(capsys, *argv):
    status = COMMANDS(list(map(str, argv)))
    said = capsys.readouterr()
    return status, said.out, said.err

def asked(root):
    "A call of every command that reads or computes, and its exit status."
    coco, drawn = root/'dataset_coco.json', root/'drawn'
    return {
        'demo': ([], 0), 'generate': ([coco], 0), 'generate sd': ([coco, '--generator', 'stable-diffusion-2'], 2),
        'align': ([coco, '--generated', drawn, '--split', 'test', '--validation-share', '.2'], 0),
        'align apart': ([coco, '--generated', drawn], 2),
        'embed': ([coco, '--split', 'test'], 0), 'embed nothing': (['photos'], 2),
        'tune text': ([coco], 0), 'tune text without': ([], 2), 'tune caption': ([coco], 0),
        'tune caption gmail': ([coco, '--generated', drawn, '--model', root/'aligned'], 2),
        'caption': ([root/'val2017'/'000000000000.jpg'], 2),
        'eval': (['emoji'], 0), 'eval preset': (['--preset', 'paper-table2', '--root', root], 2),
        'experiment retrieval': (['--quick'], 0), 'experiment table2': ([], 0),
        'experiment table2 paper': (['--scale', 'paper', '--root', root], 2),
        'bench': (['retrieval'], 0), 'bench kept': (['generate', '--out', 'kept'], 0)}

CALLS = list(asked(Path('x')))

@pytest.mark.parametrize('name', [
    pytest.param(n, marks=pytest.mark.slow if n == 'tune text without' else ()) for n in CALLS])
def test_every_command_says_what_it_would_do_and_writes_nothing(name, root, tmp_path, monkeypatch, capsys):
    argv, wanted = asked(root)[name]
    words = [
        w
        for w in name.split()
        if w in ('tune', 'text', 'caption', 'experiment', *COMMANDS.commands) or w in gmail_experiment.commands
    ]
    before = files_of(root)
    monkeypatch.chdir(tmp_path)
    status, out, err = answer(capsys, *words, *argv, '--dry-run')
    assert status == wanted, out + err
    assert out.startswith('what') and ('this would not run' in out) == (wanted == 2) and 'device' in out
    assert not list(tmp_path.iterdir()) and files_of(root) == before

def test_every_command_has_one():
    for name, c in COMMANDS.commands.items():
        for each in (c.commands.values() if isinstance(c, Commands) else [c]):
            assert each.dry and '--dry-run' in each.parser().format_help(), name


# Sets

def test_the_files_of_named_sets_are_those_that_are_read(root):
    assert set(SET_FILES) == {n for n in SET_NAMES if not n.startswith('emoji')} and set(HUB_SETS) <= set(SET_FILES)
    for name in SET_FILES:
        looks = look_data(name, root)
        if name == 'coco-val2017' or name not in EIGHT: assert looks[0].state == 'there', looks
    there = [name for name in EIGHT if look_data(name, root)[0].state == 'there']
    assert set(there) >= set(EIGHT) - {'imagenet'}, there

def test_a_set_that_is_not_there_is_named(tmp_path):
    assert (
        look_data('flickr30k-all', tmp_path)[0].state == 'missing'
        and 'token' in look_data('flickr30k-all', tmp_path)[0].note
    )
    assert '--root' in look_data('dtd', None)[0].note

def test_pictures_that_are_not_there_are_named(root):
    rows, ds = look_set('set', root/'dataset_coco.json', SourceSettings(images=str(root/'val2017'), split='test'))
    assert [r.state for r in rows] == ['there', 'missing'] and '--images' in rows[1].note and len(ds) == 10

def test_a_column_that_is_missing_is_named(tmp_path):
    with quiet_datasets():
        emoji('A', 'noto').select(range(4)).rename_column('image', 'photo').to_parquet(tmp_path/'set.parquet')
    rows, _ = look_set('set', tmp_path/'set.parquet')
    assert rows[1].state == 'missing' and "'photo'" in rows[1].note and '--image-column' in rows[1].note
    assert look_set('set', tmp_path/'set.parquet', SourceSettings(image='photo'))[0][1].state == 'there'
    assert "no column 'title'" in look_set('set', tmp_path/'set.parquet', SourceSettings(caption='title'))[0][0].note

def test_a_generated_folder_that_lost_a_shard_is_missing(root, tmp_path):
    out = generate(
        root/'dataset_coco.json',
        'embedded',
        tmp_path/'x',
        DrawSettings(steps=1),
        SourceSettings(split='train'),
        quiet,
    )
    assert look_generated(out)[0][0].state == 'there'
    next(out.glob('shard-*.parquet')).unlink()
    assert 'gmail_generate again' in look_generated(out)[0][0].note
    (out/'manifest.json').unlink()
    assert 'not complete' in look_generated(out)[0][0].note

# Runs

def test_a_run_that_began_says_what_is_left_and_how_fast_it_was(root):
    draw, source = DrawSettings(steps=1), SourceSettings(split='test', which='all')
    rows = dry_generate(root/'dataset_coco.json', 'embedded', root/'drawn', draw=draw, source=source)
    said = {r.what: r for r in rows}
    assert said['run so far'].note == '60 images are finished' and said['time'].note == 'nothing is left to do'
    other = dry_generate(root/'dataset_coco.json', 'embedded', root/'drawn', draw=DrawSettings(steps=2), source=source)
    assert any(r.state == 'refused' and 'steps 1 and not 2' in r.note for r in other)

def test_too_few_pairs_are_refused(root):
    rows = dry_align(root/'dataset_coco.json', root/'drawn', source=SourceSettings(split='test'),
                     settings=AlignRunSettings(validation_share=0.))
    assert any(r.state == 'refused' and '--validation-share' in r.note for r in rows)

def test_steps_and_images_are_those_of_the_plan_that_the_run_makes(root, monkeypatch):
    "Five to seven images of a caption take turns: an epoch is as long as there are keys, and not images."
    import math
    from gmail_nb.align import GenReal
    from gmail_nb.encoders import load_encoder
    from gmail_nb.features import Features
    from gmail_nb.runs.align import generated_images, pair_sets
    from gmail_nb.sources import load_captioned
    from gmail_nb.train import Alignment
    source, align = SourceSettings(split='test'), AlignSettings(epochs=3, batch_size=3)
    settings, model = AlignRunSettings(align=align, validation_share=.2), GenReal(load_encoder('embedded'))
    real = load_captioned(root/'dataset_coco.json', source)
    features = Features(list(real['key']), torch.zeros(len(real), 256), dict(content='0'), [])
    sets = pair_sets(generated_images(root/'drawn'), features, model.encoder.preprocess, settings)
    plan = Alignment(model, sets.pixels, sets.features, align).plan
    seen = []
    def looked(look, encoder, images, *more, **how):
        seen.append(images)
        return []
    monkeypatch.setattr(dry_run, 'look_work', looked)
    rows = dry_align(root/'dataset_coco.json', root/'drawn', source=source, settings=settings)
    said = {r.what: r.note for r in rows}
    assert said['steps'].startswith(f'{len(plan)} steps of 3 pairs: 3 epochs of ')
    assert len(plan) == 3 * math.floor(plan.n / 3)
    assert seen == [10 + dry_run.STEP * 3 * len(plan)] and '60 of 60' in said['pairs'] and '10 pairs' in said['pairs']

def test_a_row_that_would_be_refused_for_a_leak_says_so_first(root, tmp_path):
    "Keys of restval lie in the model's folder, and val2017 has their images."
    for name, key in dict(leaks='COCO_val2014_000000000003', apart='COCO_train2014_000000000099').items():
        (tmp_path/name).mkdir()
        write_trained_on(tmp_path/name, [key])
        (tmp_path/name/'card.json').write_text('{}')
    asked = dict(model=tuple(f'{n}=aligned:{n}' for n in ('leaks', 'apart')), models=tmp_path, root=root)
    rows = dry_eval(('coco-val2017', 'emoji'), **asked)
    refused, = (r for r in rows if r.state == 'refused')
    assert refused[:2] == ('row leaks', 'coco-val2017') and 'are among those of the training of leaks' in refused.note
    allowed = dry_eval(('coco-val2017',), settings=EvalSettings(equal_keys='allow'), **asked)
    assert not [r for r in allowed if r.state == 'refused']

def test_a_disk_without_room_is_refused(tmp_path):
    assert look_out(tmp_path, 1e18).state == 'refused' and look_out(tmp_path/'a'/'b').state == 'to write'

@pytest.mark.parametrize(
    'asked, state',
    [
        (('cpu', None), 'there'),
        (('cuda:99', None), 'missing'),
        (('gpu', None), 'refused'),
        (('cpu', 'float16'), 'refused'),
    ],
)
def test_devices(asked, state): assert look_device(*asked).state == state

# Weights

class Answer:
    def __init__(self, error=None): self.error = error
    def __call__(self, *args, **kwargs):
        if self.error: raise self.error
    def repo_info(self, *args, **kwargs):
        file = type('File', (), dict(size=3_000_000_000))
        return type('Info', (), dict(siblings=[file, file]))

def online(monkeypatch, error=None):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(huggingface_hub, 'auth_check', Answer(error))
    monkeypatch.setattr(huggingface_hub, 'HfApi', Answer)

def gated():
    from huggingface_hub.errors import GatedRepoError
    return GatedRepoError.__new__(GatedRepoError)

def test_weights_on_the_hub_are_to_be_downloaded(monkeypatch):
    online(monkeypatch)
    look = look_hub('weights', 'no-owner-of/this', 'main')
    assert look.state == 'to download' and look.note == "6 GB; 'main' is not pinned to a commit"
    assert 'pinned' not in look_hub('weights', 'no-owner-of/this', 'a' * 40).note

def test_a_licence_that_must_be_accepted_is_named(monkeypatch):
    online(monkeypatch, gated())
    look = look_hub('weights', 'meta-llama/Meta-Llama-3-8B')
    assert look.state == 'missing' and 'accept its licence at huggingface.co/meta-llama' in look.note

def test_a_hub_that_does_not_answer_is_said(monkeypatch):
    online(monkeypatch, ConnectionError('no route'))
    assert 'the Hub says: no route' in look_hub('weights', 'no-owner-of/this').note

def test_weights_in_the_cache_are_there(monkeypatch, tmp_path):
    (tmp_path/'w.bin').write_bytes(b'1234')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda *a, **k: str(tmp_path))
    assert look_hub('weights', 'owner/name', 'a' * 40)[2:] == ('there', '4 B')
    assert look_hub('weights', 'owner/name').note == '4 B; the newest revision is not pinned to a commit'

def test_models_by_name(tmp_path):
    (tmp_path/'tuned').mkdir()
    (tmp_path/'vit.pth').write_bytes(b'1234')
    assert look_model('tuned:tuned', tmp_path).note == 'it has no card.json'
    (tmp_path/'tuned'/'card.json').write_text('{}')
    for name in (
        'tuned:tuned',
        'tuned-f_g:tuned',
        'timm:vit_tiny/vit.pth',
        'longclip:vit.pth',
        'stretched:embedded',
        'embedded',
    ):
        assert look_model(name, tmp_path).state == 'there', name
    for name in (
        'aligned:else',
        'timm:vit_tiny/no.pth',
        'longclip:no.pt',
        'hf:owner/name',
        'open_clip:ViT-B-99/openai',
        'what',
    ):
        assert look_model(name, tmp_path).state == 'missing', name
    assert look_lm('small').state == 'there' and look_lm('no/such/folder').state == 'missing'

# what loads a model and takes no device, and why
TAKES_THE_FASTEST = dict(
    demo='a run on the embedded set', app='shows what a demo has made, or an aligned model',
    bench='compares ways on the device there is', experiment='runs on the embedded set')

def takes_a_device():
    "(name, command) of all that can be told where to run, and the names of the others."
    every = [*all_commands(), *((f'{n} {w}', c) for n, k in all_commands() for w, c in k.words.items())]
    yes = [(n, c) for n, c in every if any(o.path[-1] == 'device' for o in options_of(c.work, c.presets, c.leave))]
    return yes, {n for n, _ in every} - {n for n, _ in yes}

def test_every_command_that_loads_a_model_takes_a_device_or_says_why_not():
    yes, no = takes_a_device()
    told = {'generate', 'align', 'embed', 'tune text', 'tune caption', 'tune llava', 'caption', 'chat', 'eval',
            'eval vqa', 'report'}
    assert told <= {n for n, _ in yes}
    assert {n.split()[0] for n in no} == set(TAKES_THE_FASTEST)

@pytest.mark.parametrize('name, c', [pytest.param(n, c, id=n) for n, c in takes_a_device()[0]])
def test_a_device_that_is_not_there_ends_every_command(name, c, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    needed = [o for o in options_of(c.work, c.presets, c.leave, tuple(c.fixed)) if o.required]
    words = [w for o in needed for w in (['x'] if o.positional else [f'--{o.path[-1]}', 'x'])]
    for dry in ([], ['--dry-run']):
        status = c([*words, '--device', 'cuda:7', *dry])
        said = capsys.readouterr()
        assert status == 2 and "there is no device 'cuda:7'" in said.err and not said.out, said.err[-300:]
    assert not list(tmp_path.iterdir())

def test_a_dry_run_looks_at_the_device_that_is_asked_for(root, tmp_path, monkeypatch, capsys):
    "Were it not refused already, the plan would speak of it, and of no other."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('gmail_nb.train.check_device', lambda device: None)
    real, drawn = root/'dataset_coco.json', root/'drawn'
    asked = {'generate': [real], 'align': [real, '--generated', drawn], 'embed': [real], 'tune text': [real],
             'tune caption': [real], 'tune llava': [real], 'caption': [root/'val2017'], 'chat': ['what'], 'eval': [],
             'eval vqa': []}
    for name, argv in asked.items():
        status, out, err = answer(capsys, *name.split(), *argv, '--device', 'cuda:7', '--dry-run')
        line = next((l for l in out.splitlines() if l.startswith('device')), out + err)
        assert status == 2 and 'cuda:7' in line and 'missing' in line, (name, line)

# Times in the precision and batch of the run

def card(fits, rate=400., error=torch.OutOfMemoryError):
    "A device whose memory holds batches of so many images; it remembers what was tried."
    asked = []
    def measure(n):
        asked.append(n)
        if n > fits: raise error("can't allocate memory: you tried to allocate 9 bytes")
        return rate
    return measure, asked

def test_a_batch_is_timed_as_it_is_asked_for():
    measure, asked = card(1000)
    assert rate_at(measure, 64) == (400., 64, '') and asked == [8, 64]
    assert rate_at(card(1000)[0], 4) == (400., 4, '')

@pytest.mark.parametrize('error', [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_a_memory_that_is_too_small_is_said_and_a_smaller_batch_timed(error):
    rate, size, why = rate_at(card(100, error=error)[0], 256)
    assert size == 64 and 'a batch of 256 does not fit' in why
    assert rate_at(card(3, error=error)[0], 256)[1:] == (2, why) and rate_at(card(3, error=error)[0], 5)[1] == 2
    with pytest.raises(ValueError, match='not even one image'): rate_at(card(0, error=error)[0], 256)

def test_another_error_is_no_lack_of_memory():
    def broken(n): raise RuntimeError('the kernel is broken')
    with pytest.raises(RuntimeError, match='kernel is broken'): rate_at(broken, 64)

def test_a_batch_that_takes_too_long_is_not_tried():
    measure, asked = card(1000, rate=10.)
    assert rate_at(measure, 256) == (10., 8, 'a batch of 256 would take 26 s') and asked == [8]

def test_the_dry_run_times_with_the_settings_of_the_run(root, monkeypatch):
    asked = []
    def rate(name, *how, texts=False):
        asked.append(how)
        return dry_run.Speed(10., 256, 100, 'a guess from batches of 8')
    monkeypatch.setattr(dry_run, 'forward_rate', rate)
    align = AlignSettings(batch_size=100, accumulation=3, precision='bf16')
    settings = AlignRunSettings(align=align, validation_share=.2, run=RunSettings(device='cpu'))
    rows = dry_align(root/'dataset_coco.json', root/'drawn', source=SourceSettings(split='test'), settings=settings)
    dry_run.dry_embed(root/'dataset_coco.json', settings=EmbedSettings(7, precision='no', device='cpu'))
    assert asked == [(34, 'bf16', 'cpu'), (7, 'no', 'cpu')]
    assert any(r.what == 'time' and 'a guess from batches of 8' in r.note for r in rows)

def test_what_was_timed_names_precision_and_batch():
    rate, dim, _, how = dry_run.forward_rate('embedded', 4, 'bf16')
    assert rate > 0 and dim == 256 and 'bfloat16 and batches of 4' in how

@pytest.mark.slow
def test_a_recipe_that_means_other_captions_says_so(root):
    "Its steps are one epoch of the published set; a small set would be read hundreds of times."
    found = dry_text(str(root/'dataset_coco.json'), source=SourceSettings(split='test'), recipe=TEXT_RECIPES['gmail-clip'])
    said = {look.what: look.note for look in found}
    assert said['recipe'] == 'its steps are one epoch of 414,113 captions: see --steps'
    assert said['steps'].startswith('808 steps of 512, ')
    own = dry_text(str(root/'dataset_coco.json'), source=SourceSettings(split='test'), recipe=TEXT_RECIPES['small'])
    assert 'recipe' not in {look.what for look in own}

# decoding

def test_pictures_are_found_in_every_form_that_has_them_at_hand(root, tmp_path):
    emoji('A', 'noto').select(range(20)).to_parquet(tmp_path/'set.parquet')
    folder = next(p for p in root.iterdir() if p.is_dir() and any(p.glob('*.[jp][pn]g')))
    for source in (root/'dataset_coco.json', root/'drawn', tmp_path/'set.parquet', folder):
        assert some_pictures(source, n=3) and len(some_pictures(source, n=3)) <= 3, source
    for source in ('owner/set', tmp_path/'nowhere', tmp_path/'a.tar', tmp_path): assert source == tmp_path or (
        not some_pictures(source))

def test_decoding_has_a_row_where_pictures_can_be_tried(root, tmp_path):
    row, = look_decoding(1000, root/'drawn')
    assert row.what == 'decoding' and row.where and '1,000 images at' in row.note
    assert not look_decoding(None, root/'drawn')
    (tmp_path/'a.png').write_bytes(b'no picture')
    assert look_decoding(5, tmp_path) == [] # the command says which does not decode

def test_the_dry_runs_that_read_images_say_what_decoding_takes(root, tmp_path):
    rows = dry_run.dry_embed(root/'drawn', out=tmp_path/'features')
    assert [r.what for r in rows].count('decoding') == 1
    assert next(r for r in rows if r.what == 'time').note.endswith('decoding is not in it')


# In words that a stranger reads

def test_counts_have_their_words_and_no_number_is_written_with_an_exponent(root, tmp_path):
    captions = tmp_path/'one.csv'
    captions.write_text('key,caption\nrose,a red rose\n')
    said = {r.what: r for r in dry_generate(captions, out=tmp_path/'x')}
    assert said['captions'].note == '1 caption, 1 image, 1 shard' and said['time'].where == 'under 1 s'
    assert said['output'].note.startswith('1 image to draw; ') and ' needed, ' in said['output'].note
    assert dry_run.look_steps(400, 256, 12).note == '400 steps of 256, 8,533 times through 12 captions'
    assert dry_run.look_steps(1, 12, 12).note == '1 step of 12, once through 12 captions'
    assert dry_run.look_time(12, 1879.2, 'here').note == '12 images at 1,879 a second: here'

@pytest.mark.slow
def test_tuning_a_text_side_says_what_training_takes(root, tmp_path):
    "A head reads its texts once and is timed by itself; where the tower learns, its passes are counted."
    rows = {r.what: r for r in dry_text(str(root/'dataset_coco.json'), out=tmp_path/'x', recipe=TEXT_RECIPES['small'],
                                        source=SourceSettings(split='test'))}
    assert rows['time of training'].where and '400 steps of 256: 10 of them were timed' in rows['time of training'].note
    assert 'each once' in rows['time of texts'].note
    slow = dry_run.look_training('embedded', TEXT_RECIPES['gmail-clip'].settings, 12, dry_run.Speed(1000., how='here'))
    assert [r.what for r in slow] == ['time of training'] and '808 steps of 512, each as 3 passes' in slow[0].note
    unknown, = dry_run.look_training('embedded', TEXT_RECIPES['small'].settings, 12, dry_run.Speed(how='not here'))
    assert not unknown.where and 'not known: ' in unknown.note and 'not here' in unknown.note

@pytest.mark.slow
def test_a_head_that_learns_more_a_step_takes_longer():
    from gmail_nb.settings import TuneSettings
    small, large = (min(dry_run.head_seconds('embedded', TuneSettings(batch_size=n), 'cpu') for _ in range(3))
                    for n in (8, 2048))
    assert 0 < small < large

@pytest.mark.parametrize('kind', ['text', 'caption'])
def test_the_dry_run_says_which_encoder_a_model_was_aligned_on(kind, root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'aligned').mkdir()
    (tmp_path/'aligned'/'card.json').write_text('{"base": "open_clip:ViT-B-32/random", "dim": 512}')
    argv = ['tune', kind, root/'dataset_coco.json', '--generated', root/'drawn', '--model', 'aligned', '--dry-run']
    monkeypatch.setattr(dry_run, 'encoder_speed', lambda *args, **how: dry_run.Speed(how='not asked'))
    status, out, err = answer(capsys, *argv)
    line = next(l for l in out.splitlines() if l.startswith('encoder'))
    assert 'ViT-B-32/random' in line and 'aligned was aligned on it' in line, out + err
