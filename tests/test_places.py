"What was named and is not there is told before anything heavy is loaded, in one line that begins with what was typed."
import json
import sys

import pytest
from test_cli import all_commands

from gmail_nb.cli.commands import COMMANDS, gmail_eval, gmail_experiment, gmail_tune
from gmail_nb.cli.flags import arguments_of, in_flags
from gmail_nb.runs import places
from gmail_nb.runs.places import (
    IMAGES, PLACES, TABLES, base_of, kind_of_folder, may_be_on_hub, why_no_captioner, why_no_encoder, why_no_eyes,
    why_no_folder, why_no_generator, why_no_language_model, why_no_llava, why_no_pipeline, why_no_questions, why_no_row,
    why_no_set, why_no_writer, why_not_aligned, why_not_measured)

def weight(item): return 8

@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder with a set, and folders with the card of each kind of model."
    monkeypatch.chdir(tmp_path)
    (tmp_path/'photos'/'my. cats').mkdir(parents=True)
    (tmp_path/'photos'/'my. cats'/'a b.png').touch()
    cards = dict(aligned=dict(base='embedded', dim=256), tuned=dict(kind='tuned text'), captions=dict(prefix_length=4),
                 llava=dict(kind='llava'), other={})
    for name, card in cards.items():
        (tmp_path/name).mkdir()
        (tmp_path/name/'card.json').write_text(json.dumps(card))
    return tmp_path

ASKED = [ # a command with something that is not there, and how its message begins
    ('generate nowhere', 'SET nowhere: no such file or folder'),
    ('generate photo', "SET photo: no such file or folder: did you mean 'photos'?"),
    ('generate photos --generator sdxl-trubo', '--generator sdxl-trubo: unknown generator'),
    ('generate photos --repo nowhere', '--repo nowhere: no such folder'),
    ('generate photos --real nowhere', '--real nowhere: no such file or folder'),
    ('generate photos --quality clip', '--quality clip: no such encoder: known are embedded, open_clip'),
    ('align nowhere --generated photos', 'SET nowhere: '),
    ('align photos --generated nowhere', '--generated nowhere: no such file or folder'),
    ('align photos --generated photos --encoder clip', '--encoder clip: no such encoder'),
    ('align photos --generated photos --images nowhere', '--images nowhere: no such folder'),
    ('align photos --generated photos --encoder timm:vit/no.pth', '--encoder timm:vit/no.pth: no such file: no.pth'),
    ('embed photos --model nowhere', '--model nowhere: neither a folder nor an encoder'),
    ('embed photos --model captions', '--model captions: this is a folder of gmail_tune caption, and not of gmail_al'),
    ('tune text --generated nowhere --model aligned', '--generated nowhere: no such file or folder'),
    ('tune text --generated photos --model alignd', "--model alignd: no such folder: did you mean 'aligned'?"),
    ('tune text --generated photos --model tuned', '--model tuned: this is a folder of gmail_tune text, and not'),
    ('tune text photos --test nowhere', '--test nowhere: no such file or folder'),
    ('tune caption photos --start nowhere', '--start nowhere: no such folder'),
    ('tune caption photos --language-model ./nowhere', '--language-model ./nowhere: no such folder'),
    ('tune llava photos --instructions nowhere', '--instructions nowhere: no such file or folder'),
    ('tune llava photos --instruction-images nowhere', '--instruction-images nowhere: no such folder'),
    ('caption photos --model nowhere', '--model nowhere: no such folder'),
    ('caption photos --model aligned', '--model aligned: this is a folder of gmail_align, and not of gmail_tune cap'),
    ('caption nowhere.png --model captions', 'IMAGES nowhere.png: no such file or folder'),
    ('chat what --model llava --image nowhere.png', '--image nowhere.png: no such file'),
    ('chat what --model llava --image photos', '--image photos: this is a folder, and not a picture'),
    ('chat what --model other', "--model other: this is a folder of 'no model', and not of gmail_tune llava"),
    ('eval nowhere', 'SET nowhere: no such file or folder'),
    ('eval coco-5kk', "SET coco-5kk: no such set: did you mean 'coco-5k'?"),
    ('eval --model tuned:nowhere', '--model tuned:nowhere: no such folder'),
    ('eval --model row=tuned:nowhere', '--model row=tuned:nowhere: no such folder'),
    ('eval --root nowhere', '--root nowhere: no such folder'),
    ('eval vqa nowhere --model llava', 'SET nowhere: no such file or folder'),
    ('eval vqa --model aligned', '--model aligned: this is a folder of gmail_align'),
    ('app --captioner mine=nowhere', '--captioner mine=nowhere: no such folder'),
    ('app --llava nowhere', '--llava nowhere: no such folder'),
    ('experiment llava --language-model ./nowhere', '--language-model ./nowhere: no such folder'),
    ('experiment table2 --scale paper --root nowhere', '--root nowhere: no such folder'),
    ('report --scale paper --models nowhere', '--models nowhere: no such folder')]

def told(capsys, line, before=()):
    "The one line of a command that is refused, which loaded nothing and wrote nothing."
    loaded = set(sys.modules)
    status = COMMANDS(line.split())
    said = capsys.readouterr()
    assert status == 2 and len(said.err.splitlines()) == 1 and not said.out, (status, said)
    new = {m for m in set(sys.modules) - loaded if m.startswith(('gmail_nb.', 'torch', 'transformers', 'datasets'))}
    assert new <= {'gmail_nb.runs.claims'}, new
    return said.err.strip().partition(': ')[2]

@pytest.mark.parametrize('line, begins', ASKED, ids=[l for l, _ in ASKED])
def test_what_is_not_there_is_told_with_what_was_typed(line, begins, here, capsys):
    before = {p.name for p in here.iterdir()}
    assert told(capsys, line).startswith(begins)
    assert {p.name for p in here.iterdir()} == before

def test_nothing_heavy_is_loaded_before():
    "In a process of its own: this one has loaded everything."
    from test_cli import asked
    status, seconds, heavy, done = asked('tune', 'text', '--generated', 'nowhere', '--model', 'embedded')
    assert status == 2 and not heavy and seconds < 1.5, (seconds, heavy)
    assert done.stderr.startswith('gmail_tune text: --generated nowhere: no such file or folder')

def test_a_default_that_is_not_there_says_which_flag_names_another(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert told(capsys, 'chat what') == ("name one with --model (a folder of gmail_tune llava, or a published LLaVA); "
                                         "without it 'llava' is read: no such folder")
    (tmp_path/'a.png').touch()
    assert told(capsys, 'caption a.png').startswith('name one with --model (a folder of gmail_tune caption')
    assert told(capsys, 'eval vqa').startswith('name a LLaVA with --model')

@pytest.mark.parametrize('name, c', [*all_commands(), ('eval vqa', gmail_eval.words['vqa'])])
def test_no_other_default_is_looked_for_in_vain(name, c, tmp_path, monkeypatch):
    "A field of the same name elsewhere, such as a `start` that is no folder, would end every run."
    monkeypatch.chdir(tmp_path)
    (tmp_path/'photos').mkdir()
    (tmp_path/'photos'/'a.png').touch()
    needed = {o.dest: ('photos',) if o.several else 'photos' for o in c.options() if o.required}
    if name in ('caption', 'chat'): needed['model'] = 'owner/llava' if name == 'chat' else 'llava:owner/llava'
    for preset in (c.presets or dict(none=None)).values():
        if isinstance(preset, str): continue
        bound = arguments_of(c.work, needed, preset, c.fixed)
        bound.apply_defaults()
        c.check_places(needed, bound.arguments)

@pytest.mark.parametrize('look, names', [
    (why_no_set, ['photos', 'owner/photos', 'photos/my. cats/*.png']), (why_no_folder, ['photos']),
    (why_not_aligned, ['aligned', 'owner/aligned']), (why_no_captioner, ['captions', 'owner/captions']),
    (why_no_writer, ['captions', 'llava', 'llava:owner/name']), (why_no_llava, ['llava', 'owner/llava']),
    (why_no_encoder, ['embedded', 'open_clip:ViT-B-32/openai', 'open_clip:hf-hub:owner/name', 'hf:owner/name@main',
                      'hf:longclip-B', 'llava:owner/name', 'timm:vit/photos']),
    (why_no_eyes, ['embedded', 'aligned', 'tuned', 'owner/aligned']),
    (why_no_row, ['embedded', 'aligned', 'tuned:tuned', 'tuned-f_g:tuned', 'stretched:embedded']),
    (why_no_generator, ['embedded', 'lcm', 'owner/sd']), (why_no_pipeline, ['owner/sd']),
    (why_no_language_model, ['small', 'smollm2', 'gpt2', 'owner/lm']),
    (why_no_questions, ['emoji-questions', 'photos', 'owner/questions']),
    (why_not_measured, ['emoji', 'coco-5k', 'photos', 'owner/photos'])], ids=lambda v: getattr(v, '__name__', ''))
def test_what_may_be_meant_passes(look, names, here):
    for name in names: assert look(name) == '', name
    assert look('./nowhere') # nothing lies there, and no name of the Hub begins so

def test_every_place_is_of_an_option():
    "A word that no command has any more would look after nothing."
    taken = {o.path[-1] for _, c in [*all_commands(), ('', gmail_eval.words['vqa'])] for o in c.options()}
    assert set(PLACES) <= taken
    for name, c in all_commands():
        own = {o.path[-1] for o in c.options()}
        given = {n for n, look in c.places.items() if PLACES.get(n) is not look}
        assert given <= own and set(c.enough) <= own, name

def test_suffixes_are_those_that_are_read():
    from gmail_nb.sources import IMAGE_SUFFIXES, TABLE_SUFFIXES
    assert set(IMAGES) == set(IMAGE_SUFFIXES) and set(TABLES) == {*TABLE_SUFFIXES, '.parquet', '.tar'}

def test_questions_by_name_are_those_there_are():
    from gmail_nb.runs.instructions import OWN_QUESTIONS
    assert why_no_questions(OWN_QUESTIONS) == '' and may_be_on_hub('owner/name') and not may_be_on_hub('owner/a.csv')

def test_an_unfinished_run_is_no_set(here):
    (here/'drawn').mkdir()
    (here/'drawn'/'settings.json').write_text('{}')
    assert why_no_set('drawn') == 'the run in this folder is not complete: run gmail_generate again'

def test_one_set_that_is_there_is_enough_for_eval(here):
    given = dict(captioned=('nowhere', 'photos'), model=('embedded', 'tuned:nowhere'), models='.')
    bound = arguments_of(gmail_eval.work, given)
    bound.apply_defaults()
    gmail_eval.check_places(given, bound.arguments)

def test_cards_say_what_a_folder_is(here):
    found = {name: kind_of_folder(name) for name in ('aligned', 'tuned', 'captions', 'llava', 'other', 'photos')}
    assert found == dict(
        aligned='aligned', tuned='tuned', captions='captioner', llava='llava', other='no model', photos=None)
    (here/'other'/'card.json').write_text('[')
    with pytest.raises(ValueError, match='card.json is no JSON'): kind_of_folder('other')

# The encoder of an aligned model

@pytest.mark.parametrize('kind, at', [('text', 'recipe.encoder'), ('caption', 'preset.settings.encoder')])
def test_the_encoder_follows_from_the_card_of_the_model(kind, at, here, capsys):
    c = gmail_tune.commands[kind]
    (here/'aligned'/'card.json').write_text(json.dumps(dict(base='open_clip:ViT-B-32/openai', dim=512)))
    assert base_of('aligned') == c.follows(dict(model='aligned'))[at] == 'open_clip:ViT-B-32/openai'
    assert c.follows({'model': 'aligned', at: 'open_clip:ViT-B-32/openai'})[at] == 'open_clip:ViT-B-32/openai'
    assert c.follows(dict(model='owner/aligned')) == dict(model='owner/aligned') and c.follows({}) == {}
    said = told(capsys, f'tune {kind} photos --generated photos --model aligned --encoder embedded')
    assert said.startswith('--encoder embedded: aligned was aligned on open_clip:ViT-B-32/openai.')

@pytest.mark.parametrize('kind', ['text', 'caption'])
def test_what_lacks_something_to_learn_from_is_told_at_once(kind, here, capsys):
    assert told(capsys, f'tune {kind}').startswith('there is nothing to learn from: name generated images with --gen')
    assert '--model' in told(capsys, f'tune {kind} photos --generated photos')
    assert 'learns from generated images' in told(capsys, f'tune {kind} photos --arm mix')

# Words of the shell

@pytest.mark.parametrize('said, shown', [
    ('batch_size is 0: it must be above 0', '--batch-size is 0: it must be above 0'),
    ("beams is 4 and top_p is 0.9: choose either", '--beams is 4 and --top-p is 0.9: choose either'),
    ('the image is damaged', 'the image is damaged'), ('image is the first column', 'image is the first column'),
    ("no column 'batch_size'", "no column 'batch_size'"), ('photos/batch_size is gone', 'photos/batch_size is gone')])
def test_fields_are_flags_in_messages(said, shown):
    written = dict(batch_size='--batch-size', beams='--beams', top_p='--top-p', image='--image-column')
    assert in_flags(said, written) == shown

def test_a_field_of_two_stages_is_left_as_it_is():
    from gmail_nb.cli.flags import of_one
    written = {'s.project.epochs': '--project-epochs', 's.instruct.epochs': '--instruct-epochs', 's.lr': '--lr'}
    assert of_one(written) == dict(lr='--lr')

def test_bench_lists_what_there_is(capsys):
    bench = COMMANDS.commands['bench']
    assert bench(['--list']) == 0 and 'generate   batches of captions beside one a call' in capsys.readouterr().out
    assert bench(['--list', '--json']) == 0 and set(json.loads(capsys.readouterr().out)['names']) >= {'generate', 'gpu'}
    assert '--list' in bench.parser().format_help()

def test_experiments_list_tables_at_both_scales(capsys):
    assert gmail_experiment(['--list']) == 0
    assert 'gmail_experiment table2 --seeds 1 --out proof' in capsys.readouterr().out
    assert places.without_row('a=b') == 'b'
