"The commands answer: quickly where nothing is computed, in one line where something is wrong."
import argparse
import functools
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from gmail_nb.cli import commands
from gmail_nb.cli.commands import COMMANDS, gmail_demo, gmail_eval, gmail_experiment, gmail_generate, gmail_tune
from gmail_nb.cli.flags import (
    Commands,
    call_with,
    command,
    derived,
    flag_names,
    help_of,
    options_of,
    reader,
    run_command,
)
from gmail_nb.cli.flags import with_named
from gmail_nb.settings import PAPER_ALIGN, AdapterSettings, AlignRunSettings, AlignSettings, TuneSettings

def weight(item): return 5

def all_commands():
    "(name, command) of everything that can be run, kinds of commands too."
    for name, c in COMMANDS.commands.items():
        if isinstance(c, Commands): yield from ((f'{name} {kind}', found) for kind, found in c.commands.items())
        else: yield name, c

def answer(capsys, command, *argv):
    "Exit status, and what is printed on both streams."
    status = command(list(map(str, argv)))
    said = capsys.readouterr()
    return status, said.out, said.err

# How quick they are, and what they load

ASKED = '''
import resource, sys
from gmail_nb.cli.commands import COMMANDS
status = COMMANDS(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
heavy = [m for m in ("torch", "numpy", "datasets", "transformers", "matplotlib") if m in sys.modules]
print("\\nasked", status, round(used.ru_utime + used.ru_stime, 2), *heavy, file=sys.stderr)
'''

def asked(*argv):
    "Exit status, seconds of the processor, and heavy modules that were loaded, of a process of its own."
    done = subprocess.run([sys.executable, '-c', ASKED, *argv], capture_output=True, text=True)
    line = next(l for l in done.stderr.splitlines() if l.startswith('asked'))
    _, status, seconds, *heavy = line.split()
    return int(status), float(seconds), heavy, done

ONE_TABLE = [n for n, _ in all_commands() if 'table' not in n] + ['experiment table2'] # they are made alike

@pytest.mark.parametrize('name', ONE_TABLE + ['tune', 'experiment'])
def test_help_is_quick_and_loads_nothing_heavy(name):
    status, seconds, heavy, done = asked(*name.split(), '--help')
    assert status == 0 and not heavy and seconds < 1.5, (seconds, heavy)
    assert 'usage:' in done.stdout

@pytest.mark.parametrize('name', ONE_TABLE)
def test_a_mistyped_flag_is_answered_quickly_with_the_nearest(name):
    status, seconds, heavy, done = asked(*name.split(), '--debgu')
    assert status == 2 and not heavy and seconds < 1.5, (seconds, heavy)
    said = [l for l in done.stderr.splitlines() if l.startswith(('gmail', 'python'))]
    assert len(said) == 1 and "did you mean '--debug'?" in said[0], done.stderr

def test_the_module_runs_as_a_script():
    "What `accelerate launch -m gmail_nb.cli.commands align` does."
    done = subprocess.run(
        [sys.executable, '-m', 'gmail_nb.cli.commands', 'align', '--epohcs', '3'], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr == "gmail_align: unknown flag '--epohcs': did you mean '--epochs'?\n"

def test_every_console_script_is_a_command():
    from configparser import ConfigParser
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(Path(__file__).resolve().parent.parent/'settings.ini', encoding='utf-8')
    scripts = dict(s.split('=') for s in ini['DEFAULT']['console_scripts'].split())
    assert set(scripts) == {f'gmail_{n}' for n in COMMANDS.commands}
    for name, at in scripts.items():
        assert at == f'gmail_nb.cli.commands:{name}'
        assert getattr(commands, name) is COMMANDS.commands[name.removeprefix('gmail_')]

AB = 'a', '--generated', 'b' # two folders, for `gmail_align`

# Flags are the fields of the settings

@pytest.mark.parametrize('name, c', list(all_commands()))
def test_every_flag_has_a_help_or_a_plain_name(name, c):
    told = c.parser().format_help()
    found = options_of(c.work, c.presets, c.leave, tuple(c.fixed))
    assert len({o.dest for o in found}) == len(found)
    for o in found: assert o.comment or o.path[-1] in NAMES_SAY_IT, o
    for word in ('--debug', 'example: gmail_', 'exit status: 0 done'): assert word in ' '.join(told.split())

# fields of settings of the experiments, which other fields of theirs explain
NAMES_SAY_IT = ('lr', 'batch_size', 'prefix_length', 'mapper', 'seeds', 'seed', 'max_new_tokens', 'captioner')

@pytest.mark.parametrize('name, c', list(all_commands()))
def test_the_help_of_a_flag_is_no_fragment(name, c):
    "A phrase that can be understood without the name of the field, in words of the shell."
    for o in options_of(c.work, c.presets, c.leave, tuple(c.fixed)):
        said = help_of(o)
        assert not re.match(r'(of|or|before|False:|None:)', said), (o.dest, said)
        assert 'None' not in said and 'load_encoder' not in said, (o.dest, said)

@pytest.mark.parametrize('name, said', [
    ('chat', 'one question; without it several turns are read, a line each, to an empty one'),
    ('eval', "sets by name, or any captioned sets; without it the preset's, or our own")])
def test_a_word_without_a_flag_says_what_its_absence_does(name, said):
    "A flag says so at its --no- form; a word has none."
    c = dict(all_commands())[name]
    assert said in ' '.join(c.parser().format_help().split())
    for o in options_of(c.work, c.presets, c.leave, tuple(c.fixed)):
        if not o.positional: assert 'without it' not in help_of(o), o

def test_a_flag_has_one_name_for_one_thing():
    "A flag that several commands have means the same: they take it from one field, or say the same of it."
    meant = {}
    for name, c in all_commands():
        found = options_of(c.work, c.presets, c.leave, tuple(c.fixed))
        names = flag_names(found)
        for o in found:
            if o.group and not o.required: meant.setdefault((names[o.dest], o.group), set()).add(o.path[-1])
            assert names[o.dest] not in ('debug', 'dry-run', 'preset', 'help') or len(o.path) == 1
        assert len(set(names.values())) == len(names), name
    assert all(len(fields) == 1 for fields in meant.values())

# words for one thing, of which all commands take the same
SYNONYMS = [{'language-model', 'lm', 'llm'}, {'clip', 'max-norm', 'max-grad-norm'}, {'lr', 'learning-rate'},
            {'out', 'output', 'folder'}, {'batch-size', 'batch'}, {'seeds', 'chains'},
            {'precision', 'autocast'}, {'workers', 'threads'}, {'rank', 'lora-rank'},
            {'save-every', 'checkpoint-every'}]

def kind_of(o):
    "What is typed behind a flag: a number, nothing, or a text."
    found = {k for k in (get_args(o.annotation) or (o.annotation,)) if k is not type(None)}
    return 'number' if found & {int, float} else 'switch' if found == {bool} else 'text'

def test_no_command_has_another_word_for_a_flag_of_another():
    "Neither a synonym, nor one name for a choice here and a number there, nor for a count here and a share there."
    kinds, meant = {}, {}
    for name, c in all_commands():
        found = options_of(c.work, c.presets, c.leave, tuple(c.fixed))
        for o in found:
            flag = flag_names(found)[o.dest]
            kinds.setdefault(flag, {}).setdefault(kind_of(o), name)
            numbers = {float, int} & set(get_args(o.annotation) or (o.annotation,))
            for number in numbers: meant.setdefault(flag, {}).setdefault(number, name)
    for words in SYNONYMS:
        assert len(words & set(kinds)) <= 1, words & set(kinds)
    assert not {f: k for f, k in kinds.items() if len(k) > 1}
    assert not {f: k for f, k in meant.items() if len(k) > 1}

SETS = ['generate', 'align', 'embed', 'tune text', 'tune caption', 'tune llava', 'eval']

@pytest.mark.parametrize('name', SETS)
def test_a_captioned_set_is_the_first_word_and_called_set(name):
    c = dict(all_commands())[name]
    first = options_of(c.work)[0]
    assert first.path == ('captioned',) and first.positional
    assert c.parser().format_help().split('positional arguments:')[1].split()[0] == 'set'
    flags = {f for a in c.parser()._actions if a.help != argparse.SUPPRESS for f in a.option_strings}
    assert not flags & {'--data', '--set'} and ('--real' in flags) == (name == 'generate') # which shows a second set

@pytest.mark.parametrize('name', [n for n in SETS if n not in ('generate', 'embed')])
def test_the_generated_folder_has_one_name(name):
    assert '--generated GENERATED' in dict(all_commands())[name].parser().format_help()

OLDER = [ # as it was written, as it is written now, and what is said of it
    ('tune text', '--real photos --test t.json --test-split test', 'photos --test t.json --test-split test', '--real'),
    ('tune caption', '--real c.json --splits train+restval test', 'c.json --split train+restval --test-split test',
     '--split and --test-split in place of --splits'),
    ('tune llava', '--real photos --arm real', 'photos --arm real', 'SET, without a flag, in place of --real'),
    ('tune llava', '--tokens kept --rank 2', '--token-folder kept --rank 2', '--token-folder in place of --tokens'),
    ('align', 'photos drawn --rank 2', 'photos --generated drawn --rank 2', '--generated drawn'),
    ('align', 'photos --rank 2 drawn', 'photos --generated drawn --rank 2', '--generated drawn'),
    ('align', 'photos --generated d --image photo', 'photos --generated d --image-column photo', ''),
    ('eval', '--data photos --model a --data chalk', 'photos --model a chalk', 'SET, without a flag'),
    ('eval vqa', '--data questions --limit 3', 'questions --limit 3', 'SET, without a flag'),
    ('caption', 'a.png --captioner captions', 'a.png --model captions', '--model in place of --captioner'),
    ('experiment table2', '--data coco-5k --scale paper', '--test coco-5k --scale paper', '--test in place of --data'),
    ('tune caption', 'photos --lm small', 'photos --language-model small', ''),
    ('tune text', 'photos --max-norm 2', 'photos --clip 2', ''),
    ('tune llava', 'photos --warmup .1', 'photos --warmup-share .1', ''),
    ('experiment captioning', '--layers 3 --width 64', '--decoder-layers 3 --decoder-width 64', ''),
    ('experiment table6', '--lm gpt2=small --scale paper', '--language-model gpt2=small --scale paper', ''),
    ('chat', 'what is it --generated', 'what is it --side generated', '--side generated in place of --generated')]

@pytest.mark.parametrize('name, older, now, said', OLDER, ids=[f'{n} {o.split()[0]}' for n, o, *_ in OLDER])
def test_an_older_spelling_is_understood_and_told(name, older, now, said, capsys):
    c = dict(all_commands()) | {'eval vqa': gmail_eval.words['vqa']}
    seen = seen_settings(c[name], *older.split())
    told = capsys.readouterr().err
    assert seen == seen_settings(c[name], *now.split()) and capsys.readouterr().err == ''
    assert said in told and len(told.splitlines()) == (bool(said) + ('--splits' in older))

def test_an_older_spelling_is_in_no_help_and_no_hint():
    for name, older, *_ in OLDER:
        c = dict(all_commands()).get(name, gmail_eval.words['vqa'])
        flag = next((w for w in older.split() if w in ('--real', '--data', '--splits', '--captioner')), None)
        assert flag is None or f'{flag} ' not in c.parser().format_help()
    with pytest.raises(ValueError, match="did you mean SET, without a flag"):
        gmail_eval.parser().parse_args(['--dataset', 'photos'])

def test_what_an_older_word_said_is_said_once_and_by_one_process(capsys, monkeypatch):
    seen_settings(gmail_eval, '--data', 'a', '--data', 'b')
    assert len(capsys.readouterr().err.splitlines()) == 1
    monkeypatch.setenv('RANK', '1')
    seen_settings(gmail_eval, '--data', 'a')
    assert capsys.readouterr().err == ''


def test_the_column_of_images_is_told_from_their_folder(capsys):
    told = answer(capsys, commands.gmail_align, '--help')[1]
    assert '--image-column' in told and '--images' in told and '--image IMAGE' not in told
    for flag in ('--image', '--image-column'): # the first is what it was called
        assert seen_settings(commands.gmail_align, 'a', '--generated', 'b', flag, 'photo')['source'].image == 'photo'

def test_flags_stand_in_groups():
    told = gmail_generate.parser().format_help()
    for title in ('Drawing', 'Reading a captioned set', 'Shards and workers'):
        assert f'\n{title}' in told

def test_groups_of_flags_have_headings_and_no_comments():
    "A few words, such as 'Image tower'; what a class of settings is for is said where it is defined."
    for name, c in all_commands():
        for group in (g for one in (c, *getattr(c, 'words', {}).values()) for g in one.parser()._action_groups):
            words = group.title.split()
            assert len(words) <= 9 and words[0] not in ('What', 'How', 'Where', 'A'), f'{name}: {group.title}'

def test_what_is_left_out_says_what_happens_then(capsys):
    for c, flag, words in ((commands.gmail_align, '--no-key', 'the number of a row is its name'),
                           (gmail_tune.commands['text'], '--no-patience', 'to the end')):
        told = ' '.join(answer(capsys, c, '--help')[1].split())
        assert f'{flag} {words}' in told

def test_defaults_are_those_of_the_settings():
    found = {o.dest: o.default for o in options_of(commands.gmail_align.work)}
    assert found['settings.align.lr'] == AlignSettings().lr == 1e-3
    assert found['settings.align.batch_size'] == AlignSettings().batch_size
    assert found['settings.adapters.rank'] == AdapterSettings().rank
    assert found['settings.validation_share'] == AlignRunSettings().validation_share

def seen_settings(c, *argv):
    "What a command would call its function with."
    seen = {}
    named = vars(c.parser().parse_args([str(a) for a in argv]))
    preset = c.quick if named.get('quick') else None
    if c.presets: preset = c.presets[named.pop('preset')]
    @functools.wraps(c.work)
    def note(*args, **kwargs): seen.update(kwargs, args=args)
    call_with(note, {k: tuple(v) if isinstance(v, list) else v for k, v in named.items()}, preset, c.fixed)
    return seen

def test_a_preset_stands_but_for_the_flags_beside_it():
    seen = seen_settings(
        commands.gmail_align, 'photos', '--generated', 'drawn', '--preset', 'paper', '--batch-size', '64', '--rank', '2'
    )
    assert seen['settings'].align == replace(PAPER_ALIGN, batch_size=64)
    assert seen['settings'].adapters == AdapterSettings(rank=2) and seen['args'][0] == 'photos'

def test_the_temperature_follows_the_loss():
    assert seen_settings(commands.gmail_align, *AB, '--loss', 'sigmoid')['settings'].align.temperature == .1
    assert (
        seen_settings(commands.gmail_align, *AB, '--loss', 'sigmoid', '--tau', '.2')['settings'].align.temperature
        == 0.2
    )
    assert derived(AlignSettings()) == set() and AlignSettings().tau is None

@pytest.mark.parametrize('typed, value', [('batch', 'batch'), ('all', 'all'), ('4096', 4096)])
def test_negatives_are_a_word_or_a_number(typed, value):
    assert seen_settings(commands.gmail_align, *AB, '--negatives', typed)['settings'].align.negatives == value

def test_flags_of_generate_reach_their_settings():
    seen = seen_settings(gmail_generate, 'captions.csv', '--no-key', '--no-header', '--caption', '0', '--samples', '2',
                         '--options', '{"style": "noto"}', '--no-verify', '--retry-failed', '--image-format', 'webp',
                         '--which', '3', '--part', '3/8', '--quality', '--workers', '4', '--engine', 'ray')
    assert seen['source'].key is None and seen['source'].header is False and seen['source'].caption == '0'
    assert (
        seen['draw'].samples == 2 and seen['draw'].options == dict(style='noto') and seen['draw'].image_format == 'webp'
    )
    assert seen['source'].which == 3 and seen['part'] == '3/8' and seen['after'].quality is True
    assert seen['work'].verify is False and seen['work'].retry_failed and seen['work'].engine == 'ray'
    assert seen_settings(gmail_generate, 'x', '--quality', 'open_clip:ViT-B-32/openai')['after'].quality.startswith(
        'open_clip'
    )


def test_flags_of_tune_reach_their_recipes():
    text = seen_settings(gmail_tune.commands['text'], '--preset', 'gmail-clip', '--steps', '3', '--tuning', 'head',
                         '--encoder', 'embedded', '--no-projection', '--no-patience', '--lr', '1e-3', '--seed', '7')
    recipe = text['recipe']
    assert (recipe.encoder, recipe.settings.steps, recipe.settings.tuning, recipe.settings.seed) == (
        'embedded',
        3,
        'head',
        7,
    )
    assert recipe.settings.batch_size == 512 and recipe.settings.patience is None and not recipe.settings.projection
    caption = seen_settings(gmail_tune.commands['caption'], '--preset', 'paper-table1', '--lm', 'small',
                            'dataset_coco.json', '--split', 'train+restval', '--test-split', 'test', '--images', 'coco')
    assert caption['preset'].settings.lm == 'small' and caption['preset'].settings.prefix_length == 10
    assert caption['run'].test_split == 'test' and caption['source'].split == 'train+restval'
    assert caption['args'][0] == 'dataset_coco.json' and caption['source'].images == 'coco'

def test_repeated_flags_of_eval():
    seen = seen_settings(gmail_eval, '--model', 'A=embedded', '--model', 'hf:clip', 'emoji', '--rows', 'CLIP')
    assert seen['model'] == ('A=embedded', 'hf:clip') and seen['args'] == ('emoji',) and seen['rows'] == ('CLIP',)

def test_quick_starts_from_smaller_settings():
    seen = seen_settings(gmail_experiment.commands['captioning'], '--quick', '--seeds', '1')
    assert seen['settings'].base_steps == 300 and seen['settings'].seeds == 1 and seen['quick'] is True
    assert seen_settings(gmail_experiment.commands['captioning'])['settings'].base_steps == 1200

def test_help_names_what_can_be_chosen(capsys):
    for c, words in (
        (gmail_generate, ('flux-schnell', 'sdxl-turbo')),
        (gmail_eval, ('paper-table7', 'longclip:FILE', 'sun397')),
        (gmail_tune.commands['text'], ('gmail-clip-cc12m',)),
        (gmail_tune.commands['caption'], ('paper-table13',)),
    ):
        status, out, _ = answer(capsys, c, '--help')
        assert status == 0 and all(w in out for w in words)

def test_sets_named_in_the_help_are_those_there_are():
    from gmail_nb.classification import CLASSIFICATION_SETS
    from gmail_nb.retrieval import RETRIEVAL_SETS
    from gmail_nb.runs.presets import SET_NAMES
    assert set(SET_NAMES) == {*RETRIEVAL_SETS, *CLASSIFICATION_SETS, 'emoji-long', 'emoji-group'}

# Errors

def raising(error):
    def work(): raise error
    return work

@pytest.mark.parametrize(
    'error',
    [
        ValueError('no\nsuch  name'),
        OSError('no\nsuch  name'),
        ImportError('no\nsuch  name'),
        RuntimeError('no\nsuch  name'),
        FloatingPointError('no\nsuch  name'),
    ],
)
def test_an_error_is_one_line_and_status_2(error, capsys):
    assert run_command('gmail_try', raising(error)) == 2
    assert capsys.readouterr().err == 'gmail_try: no such name\n'

def test_debug_shows_the_traceback(capsys):
    assert run_command('gmail_try', raising(ValueError('here')), debug=True) == 2
    said = capsys.readouterr().err
    assert 'Traceback (most recent call last)' in said and said.splitlines()[-1] == 'gmail_try: here'
    status, _, err = answer(capsys, gmail_eval, '--preset', 'paper-table22', '--debug')
    assert status == 2 and 'Traceback' in err

def test_stopping_is_one_line(capsys):
    assert run_command('gmail_try', raising(KeyboardInterrupt())) == 130
    assert 'Traceback' not in capsys.readouterr().err

@pytest.mark.parametrize('error', [KeyError('rows'), TypeError('no\nsuch call'), AttributeError('no attribute')])
def test_a_defect_says_that_it_is_one(error, capsys):
    assert run_command('gmail_try', raising(error)) == 1
    said = capsys.readouterr().err
    assert (
        'a defect of the program' in said
        and type(error).__name__ in said
        and '--debug' in said
        and said.count('\n') == 1
    )
    assert run_command('gmail_try', raising(error), debug=True) == 1 and 'Traceback' in capsys.readouterr().err

def test_an_error_without_words_is_named(capsys):
    assert run_command('gmail_try', raising(OSError())) == 2
    assert capsys.readouterr().err == 'gmail_try: OSError\n'

@pytest.mark.parametrize(
    'command, argv, said',
    [
        (gmail_tune, ['text', '--preset', 'gmail-clop'], "unknown preset 'gmail-clop'"),
        (gmail_tune, ['caption', '--preset', 'paper-table2'], "did you mean 'paper-table"),
        (gmail_tune, ['--task', 'text'], 'the kind comes first: gmail_tune text|caption'),
        (gmail_tune, ['speech'], "unknown kind 'speech'"),
        (gmail_tune, ['text', 'a', '--clip', '0'], '--clip is 0.0: it must be above 0'),
        (gmail_experiment, ['alignmnt'], "did you mean 'alignment'"),
        (commands.gmail_align, ['photos'], 'the following arguments are required: --generated'),
        (commands.gmail_align, [], 'the following arguments are required: set'),
        (gmail_experiment, ['table22'], "unknown name 'table22': did you mean"),
        (gmail_experiment, ['table2', '--steps', '2'], 'go with --scale paper'),
        (gmail_experiment, ['table2', '--scale', 'paper', '--quick'], '--quick is of the embedded set'),
        (
            gmail_experiment,
            ['table2', '--scale', 'paper', '--rows', 'CLOP'],
            "unknown row 'CLOP': did you mean",
        ),
        (gmail_generate, ['a', '--batch-size', '-3'], '--batch-size is -3: it must be above 0'),
        (gmail_generate, ['a', '--workers', '0'], '--workers is 0: it must be above 0'),
        (commands.gmail_embed, ['a', '--batch-size', '0'], '--batch-size is 0'),
        (commands.gmail_caption, ['a.png', '--batch-size', '0'], '--batch-size is 0'),
        (commands.gmail_caption, ['a.png', '--top-p', '2'], '--top-p is 2.0'),
        (gmail_generate, ['a', '--bogusss', '1'], 'gmail_generate --help lists all'),
        (commands.gmail_align, [*AB, '--epochs', 'many'], "invalid int value: 'many'"),
        (commands.gmail_align, [*AB, '--tuning', 'lorra'], "did you mean 'lora'"),
        (commands.gmail_align, [*AB, '--validation-share', '2'], '--validation-share is 2.0'),
        (commands.gmail_embed, ['a', '--side', 'reel'], "invalid choice: 'reel'"),
        (gmail_generate, ['a', '--options', '{style}'], 'is not JSON'),
        (commands.gmail_caption, [], 'required: images'),
    ],
)
def test_what_a_person_gets_wrong(command, argv, said, capsys):
    status, _, err = answer(capsys, command, *argv)
    assert status == 2 and said in err and len(err.splitlines()) == 1

def test_beginnings_of_flags_are_not_guessed(capsys):
    status, _, err = answer(capsys, gmail_demo, '--qui')
    assert status == 2 and "did you mean '--quick'?" in err

def test_a_folder_that_cannot_be_written_is_refused_first(tmp_path, capsys):
    (tmp_path/'file').write_text('')
    status, _, err = answer(capsys, gmail_demo, '--out', tmp_path/'file')
    assert status == 2 and err.splitlines()[-1].startswith('gmail_demo: cannot write into the folder')

def test_lists_of_kinds(capsys):
    for c, names in (
        (gmail_tune, ('text', 'caption')),
        (gmail_experiment, ('demo', 'retrieval', 'alignment', 'captioning', 'ifcap', 'table2', 'flux-dev', 'sets:')),
    ):
        status, out, _ = answer(capsys, c, '--list')
        assert status == 0 and all(n in out for n in names)
        assert answer(capsys, c)[0] == 2

# The parts

def test_a_function_becomes_a_command(capsys):
    @command()
    def add(a:int, b:int=2, loud:bool=True):
        "Add numbers."
        print(a + b, 'loud' if loud else 'quiet')
    assert add(['3', '--b', '4', '--no-loud']) == 0 and capsys.readouterr().out == '7 quiet\n'
    assert add.__doc__ == 'Add numbers.' and add.name == 'add' and add.work(1) is None

def test_status_of_a_function_is_that_of_its_command():
    @command()
    def lost(): return 3
    assert lost([]) == 3

def test_readers():
    assert reader(int|None)('3') == 3 and reader(float)('1e-3') == 1e-3 and reader(str|None)('3') == '3'
    assert reader(str|int)('3') == 3 and reader(dict|None)('{"a": 1}') == {'a': 1}
    for text in ('[1]', '{a}'):
        with pytest.raises(argparse.ArgumentTypeError): reader(dict)(text)

def test_named_values_go_to_any_depth():
    changed = with_named(AlignRunSettings(), {('align', 'lr'): .1, ('align', 'seed'): 3, ('workers',): 9})
    assert changed.align == AlignSettings(lr=.1, seed=3) and changed.workers == 9
    assert with_named(TuneSettings(), {}) == TuneSettings()

def test_bench_is_called_by_name(monkeypatch, capsys):
    status, _, err = answer(capsys, commands.gmail_bench, 'generatr')
    assert status == 2 and "did you mean 'generate'" in err

# Experiments are called as they are written

EXPERIMENTS = dict(
    retrieval=('retrieval_experiment', 'retrieval_table.txt'),
    alignment=('alignment_experiment', 'alignment_table.txt'),
    captioning=('caption_experiment', 'caption_table.txt'),
    ifcap=('ifcap_experiment', 'ifcap_table.txt'),
    llava=('llava_experiment', 'llava_table.txt'),
)

@pytest.mark.parametrize('name', EXPERIMENTS)
@pytest.mark.parametrize('quick', [(), ('--quick',)])
def test_an_experiment_is_called_with_its_settings(name, quick, tmp_path, monkeypatch, capsys):
    import importlib
    import inspect
    module, (function, table) = importlib.import_module(f'gmail_nb.experiments.{name}'), EXPERIMENTS[name]
    signature, seen = inspect.signature(getattr(module, function)), {}
    def note(*args, **kwargs):
        seen.update(signature.bind(*args, **kwargs).arguments)
        (tmp_path/table).write_text('a table\n')
        if name == 'llava': (tmp_path/'llava_results.jsonl').write_text('') # which its two tables read
    monkeypatch.setattr(module, function, note)
    status, out, err = answer(capsys, gmail_experiment, name, '--out', tmp_path, '--seed', 3, *quick)
    assert status == 0 and 'a table\n' in out and f'results: {tmp_path}' in out, err
    demo = seen['settings'] if name == 'alignment' else seen['demo']
    assert demo.seed == demo.align.seed == 3 and demo.align_captions == (256 if quick else 772)
    if name != 'alignment': assert seen['settings'].seed == 3

def test_defaults_of_the_experiments_are_their_own():
    import inspect
    from gmail_nb.experiments.retrieval import retrieval_experiment
    ours = seen_settings(gmail_experiment.commands['retrieval'])['settings']
    assert ours == inspect.signature(retrieval_experiment).parameters['settings'].default

def test_the_demo_is_called_with_its_settings(tmp_path, monkeypatch, capsys):
    import gmail_nb.experiments.demo as room
    seen = []
    monkeypatch.setattr(room, 'demo', lambda out, settings: seen.append((out, settings)) or [])
    monkeypatch.setattr(room, 'demo_table', lambda records: [['arm']])
    monkeypatch.setattr(room, 'demo_verdict', lambda records: 'It helps.')
    status, out, _ = answer(capsys, gmail_demo, '--quick', '--seed', 2, '--out', tmp_path)
    assert status == 0 and 'It helps.' in out and f'report: {tmp_path}/report.html' in out
    assert seen[0][1].seed == 2 and seen[0][1].align_captions == 256

def test_the_demo_can_be_crude_or_another_point(tmp_path, monkeypatch, capsys):
    import gmail_nb.experiments.demo as room
    from gmail_nb.settings import demo_settings
    seen = []
    monkeypatch.setattr(room, 'demo', lambda out, settings: seen.append(settings) or [])
    monkeypatch.setattr(room, 'demo_table', lambda records: [['arm']])
    monkeypatch.setattr(room, 'demo_verdict', lambda records: 'It helps.')
    for flags in (['--crude'], ['--steps', 3, '--guidance', 8], ['--crude', '--steps', 8]):
        assert answer(capsys, gmail_demo, *flags, '--out', tmp_path)[0] == 0
    crude, other, both = seen
    assert crude == demo_settings() and (other.draw.steps, other.draw.guidance, other.seeds) == (3, 8, 1)
    assert (both.draw.steps, both.draw.guidance, both.seeds) == (8, 8, 5)
    status, _, err = answer(capsys, gmail_demo, '--steps', 0, '--out', tmp_path)
    assert status == 2 and 'steps is 0' in err

def test_bench_prints_a_table_or_json(monkeypatch, capsys):
    import json
    import gmail_nb.bench.comparison as room
    line = dict(name='generate', ours=2., plain=1., ratio=2., unit='images/s', n=4, machine='a machine')
    monkeypatch.setattr(room, 'run_bench', lambda name: [line])
    status, out, _ = answer(capsys, commands.gmail_bench, 'generate')
    assert status == 0 and 'ratio' in out and 'a machine' in out
    assert json.loads(answer(capsys, commands.gmail_bench, 'generate', '--json')[1]) == [line]

def test_bench_writes_where_it_is_told(monkeypatch, tmp_path, capsys):
    import json
    import gmail_nb.bench.comparison as room
    line = dict(name='generate', ours=2., plain=1., ratio=2., unit='images/s', n=4, machine='a machine')
    monkeypatch.setattr(room, 'run_bench', lambda name: [line])
    status, out, _ = answer(capsys, commands.gmail_bench, 'generate', '--out', tmp_path/'bench')
    assert status == 0 and f'results: {tmp_path}/bench/generate.json' in out
    assert json.loads((tmp_path/'bench'/'generate.json').read_text()) == [line]

@pytest.mark.parametrize('name', ['table2', 'table12'])
def test_a_table_on_the_embedded_set_is_what_the_report_runs_for_it(name, monkeypatch, tmp_path, capsys):
    "Also where no chain of steps draws it at the paper's scale."
    import gmail_nb.experiments.report as room
    asked = []
    def called(scale, seeds, out, quick):
        asked.append((scale, seeds, out, quick))
        rows = [[name, 'where', 'mean recall'], ['CLIP', 'paper', '61.9'], ['', 'embedded, 2 chains', '14.1']]
        return room.Shown(name, 'Retrieval', 'embedded', 'Drawings.', [rows])
    monkeypatch.setitem(room.CALLS, name, called)
    status, out, err = answer(capsys, gmail_experiment, name, '--out', tmp_path, '--seeds', '2')
    assert status == 0 and asked == [('embedded', 2, str(tmp_path), False)], err
    assert 'CLIP, paper' in out and '61.9' in out and '  embedded, 2 chains' in out
    assert f'{tmp_path}/{name}/{name}.md' in out
    assert answer(capsys, gmail_experiment, name, '--quick', '--out', tmp_path)[0] == 0 and asked[-1][3] is True

def test_a_table_that_nothing_stands_for_says_so_and_is_no_success(tmp_path, capsys):
    status, out, _ = answer(capsys, gmail_experiment, 'table15', '--out', tmp_path)
    assert status == 2 and 'Not run: nothing here stands for it' in out and '48.3' in out

def test_what_tables_ran_before_has_names_of_its_own():
    from gmail_nb.experiments.tables import TABLES
    assert {t.embedded for t in TABLES.values()} <= set(gmail_experiment.commands)

def test_the_scale_of_the_paper_takes_its_seeds(monkeypatch, tmp_path, capsys):
    import gmail_nb.experiments.tables as room
    asked = []
    def note(table, out, run):
        asked.append(run.seeds)
        (tmp_path/table).mkdir()
        (tmp_path/table/'paper.txt').write_text('a table')
    monkeypatch.setattr(room, 'run_table', note)
    status, out, _ = answer(capsys, gmail_experiment, 'table2', '--scale', 'paper', '--seeds', '3', '--out', tmp_path)
    assert status == 0 and asked == [3] and 'a table' in out

def test_a_gpu_that_is_too_small_says_what_to_do():
    import torch
    from gmail_nb.cli.flags import one_line
    said = one_line(torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'))
    assert '--accumulation' in said and 'Tried to allocate' in said and '\n' not in said

def test_a_list_whose_reader_has_enough_ends_quietly():
    "`gmail_experiment --list | head -1`"
    code = 'import sys; from gmail_nb.cli.commands import gmail_experiment as e; sys.exit(e())'
    command = [sys.executable, '-c', code, '--list']
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as going:
        assert going.stdout.readline().startswith('usage')
        going.stdout.close()
        assert 'Traceback' not in going.stderr.read() and going.wait() == 0
