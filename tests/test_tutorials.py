"The tutorials: each opens in Colab, says what it needs and how long it takes, names commands and flags that exist, and says why a cell shows nothing."

import contextlib
import functools
import io
import re
import shlex
import sys

import pytest
from house import cells_of, flags_of, names, path_of, root, run, source_of

def weight(item): return 10

tutorials = [n for n in names if n.startswith('tutorials/')]
REPOSITORY = re.search(
    r'^git_url\s*=\s*https://github\.com/(\S+)', (root/'settings.ini').read_text(encoding='utf-8'), re.M
)[1]


def prose(name): return [source_of(c) for c in cells_of(name) if c['cell_type'] == 'markdown']

def test_there_are_tutorials(): assert len(tutorials) >= 6

def test_every_tutorial_begins_as_the_tool_writes_it():
    run(sys.executable, root/'tools'/'tutorials.py', '--check', cwd=root)

@pytest.mark.parametrize('name', tutorials)
def test_the_link_to_colab_is_that_of_this_notebook(name):
    link = f'https://colab.research.google.com/github/{REPOSITORY}/blob/main/nbs/{name}.ipynb'
    assert f'[![Open in Colab](colab.svg)]({link})' in prose(name)[1]
    assert (path_of(name).parent/'colab.svg').is_file()

@pytest.mark.parametrize('name', tutorials)
def test_a_reader_knows_what_it_needs_and_how_long_it_takes(name):
    _, top, opening = prose(name)[:3]
    assert re.search(r'took \d+ seconds on \d+ cores', top), 'run it with tools/execute.py, and then tools/tutorials.py'
    assert opening.startswith('You need ')

@pytest.mark.parametrize('name', tutorials)
def test_a_cell_without_output_says_why(name):
    "Cells that need a GPU or the Hub carry none, and the text above them tells."
    said = ''
    for cell in cells_of(name):
        if cell['cell_type'] == 'markdown': said = source_of(cell)
        elif flags_of(cell) & {'cuda', 'hub'} and not cell['outputs']: assert 'no output' in said, source_of(cell)
        elif 'slow' in flags_of(cell): assert cell['outputs'], f'run it with --with slow: {source_of(cell)[:80]}'

# Commands as they are typed: in cells of bash, and in the fenced lines of the prose

FENCED = re.compile(r'^```sh\n(.*?)^```', re.M | re.S)

def shell_lines(name):
    "Every command line, joined where it goes on in the next one."
    cells = [source_of(c) for c in cells_of(name) if source_of(c).startswith('%%bash')]
    for text in (*cells, *(f for t in prose(name) for f in FENCED.findall(t))):
        for line in text.replace('\\\n', ' ').splitlines():
            if m := re.search(r'(?:gmail_|-m gmail_nb\.cli\.commands )(\w+)( .*)', line): yield m[1], m[2]

@functools.cache
def told(*argv):
    "What a command says when it is asked for help."
    from gmail_nb.cli.commands import COMMANDS
    with contextlib.redirect_stdout(io.StringIO()) as out: assert COMMANDS([*argv, '--help']) == 0
    return out.getvalue()

def values_of(flag, words):
    "What a command line gives a flag, as one word or as two."
    yield from (w.partition('=')[2] for w in words if w.startswith(f'{flag}='))
    yield from (value for w, value in zip(words, words[1:]) if w == flag)

def preset(command, kind, value):
    "The settings of a preset, as the command takes them; `ValueError` for one that it refuses."
    from gmail_nb.cli.commands import COMMANDS
    from gmail_nb.cli.flags import Commands, preset_named
    from gmail_nb.runs.presets import EVAL_PRESETS
    found = COMMANDS.commands[command]
    if isinstance(found, Commands): found = found.find(kind[0] if kind else next(iter(found.commands)))
    return preset_named(value, found.presets or (EVAL_PRESETS if command == 'eval' else {}))

def test_a_preset_that_is_refused_is_noticed():
    "The name is known, and says to use another command."
    assert preset('tune', ['caption'], 'paper-table1') and preset('eval', [], 'paper-table2')
    with pytest.raises(ValueError, match='gmail_experiment table9'): preset('tune', ['caption'], 'paper-table9')
    assert list(values_of('--preset', ['--preset', 'a', '--steps', '3', '--preset=b'])) == ['b', 'a']

@pytest.mark.parametrize('name', tutorials)
def test_commands_and_flags_exist(name):
    for command, rest in shell_lines(name):
        words = shlex.split(re.split(r'\s(?:[|&>;]|2>)', rest)[0], comments=True)
        kind = words[:1] if command in ('tune', 'experiment') else []
        known = told(command, *kind)
        for flag in (w.partition('=')[0] for w in words if w.startswith('--')):
            assert re.search(rf'{flag}(?![\w-])', known), f'{name}: {command} has no {flag}'
        for value in values_of('--preset', words): assert preset(command, kind, value), f'{name}: {command} {value}'

def test_commands_are_found():
    found = {c for n in tutorials for c, _ in shell_lines(n)}
    assert {'generate', 'align', 'tune', 'eval', 'caption', 'experiment', 'embed'} <= found
