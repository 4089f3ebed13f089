"Wrong values on every flag of every command: one line, status 2, and nothing written. Made from the fields of the settings."

import functools
import os
from types import NoneType
from typing import Literal, get_args, get_origin

import pytest
from test_cli import all_commands

from gmail_nb.cli import flags
from gmail_nb.cli.commands import (gmail_align, gmail_caption, gmail_embed, gmail_eval, gmail_generate,
                                   gmail_tune)
from gmail_nb.cli.flags import Command, flag_names, options_of
from gmail_nb.settings import RANGES, check_value

def weight(item): return 1

class Reached(BaseException): "The work was begun."

NUMBERS = ('nan', 'inf', '-inf', '-1', '1e400', '9' * 30, 'many', '1,5', '٣½', '', ' ', '0x10')
# 0 is a value of these, and -1 or huge of none
TEXTS = ('', '   ', 'a\0b')

def kinds_of(o): return {k for k in (get_args(o.annotation) or (o.annotation,)) if k is not NoneType}

def wrong_values(o):
    "What can never be meant by a flag."
    kinds, name = kinds_of(o), o.path[-1]
    if kinds & {int, float}:
        least, _, *ends = RANGES.get(name, (0, 0))
        zero = ('0',) if least > 0 or set(ends) & {'above', 'inside'} else ()
        return NUMBERS + zero
    if any(get_origin(k) is Literal for k in (o.annotation, *kinds)): return ('nothing-of-the-kind', '')
    if kinds == {dict}: return ('', '[1]', '{', '[' * 100_000, '"a"')
    if kinds & {str, list} and bool not in kinds and name not in ('prefix', 'suffix', 'negative'): return TEXTS
    return ()

def cases():
    for name, c in all_commands():
        if 'table' in name and name != 'experiment table2': continue # they are made alike
        for o in options(c):
            if not o.required and wrong_values(o): yield pytest.param(c, o, id=f'{name} {o.dest}')

made_by = Command.parser

@functools.lru_cache(None)
def parser_of(c): return made_by(c)

@pytest.fixture
def stubbed(monkeypatch, tmp_path):
    "Commands read and check all that was typed, and stop where their work would begin."
    def reached(command, values, preset=None):
        flags.arguments_of(command.work, values, preset, command.fixed)
        raise Reached
    monkeypatch.setattr(Command, 'carry_out', reached)
    monkeypatch.setattr(Command, 'parser', parser_of)
    monkeypatch.chdir(tmp_path)

@functools.lru_cache(None)
def options(c): return options_of(c.work, c.presets, c.leave, tuple(c.fixed))

def required(c):
    "Something for every argument that must be given."
    needed = [o for o in options(c) if o.required]
    return [w for o in needed for w in (['x'] if o.positional else [f'--{flag_names(options(c))[o.dest]}', 'x'])]

def one_line_and_nothing_written(capsys, c, *argv):
    status = c([*required(c), *argv])
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert status == 2 and len(lines) == 1 and len(lines[0]) < 600 and not said.out, (argv, status, said.err[-300:])
    assert os.listdir('.') == []
    return lines[0]

@pytest.mark.parametrize('c, o', cases())
def test_a_wrong_value_is_one_line(c, o, stubbed, capsys):
    flag = flag_names(options(c))[o.dest]
    for value in wrong_values(o):
        said = one_line_and_nothing_written(capsys, c, f'--{flag}={value}')
        assert o.path[-1] in said or flag in said, said

@pytest.mark.parametrize(
    'name, c', [pytest.param(n, c, id=n) for n, c in all_commands() if 'table' not in n or n.endswith('table2')]
)
def test_defaults_are_values_that_may_be_meant(name, c, stubbed):
    for o in options(c):
        if not o.required and o.default is not None and o.default != (): check_value(o.path[-1], o.default)
    with pytest.raises(Reached): c(required(c))

@pytest.mark.parametrize('c, argv, said', [
    (gmail_align, ['--key', 'a', '--no-key'], 'not allowed with'),
    (gmail_align, ['--loss', 'symmetric', '--negatives', 'all'], 'symmetric'),
    (gmail_align, ['--loss', 'cosine', '--negatives', '64'], 'cosine has no negatives'),
    (gmail_caption, ['--beams', '4', '--top-p', '.9'], 'choose either'),
    (gmail_embed, ['--engine', 'ray', '--processes', '2'], 'choose one'),
    (gmail_tune.commands['text'], ['--patience', '3', '--no-patience'], 'not allowed with'),
    (gmail_tune.commands['caption'], ['--four-bit', '--tuning', 'full'], '4 bit'),
    (gmail_tune.commands['caption'], ['--splits', 'train'], 'expected 2 arguments')])
def test_two_that_exclude_each_other_are_told(c, argv, said, stubbed, capsys):
    assert said in one_line_and_nothing_written(capsys, c, *argv)

@pytest.mark.parametrize('part', ['2/2', '3/2', 'a/b', '1/0', '-1/2', '0/', '/2', '1', '1/2/3', '0/1e3', '٣/٤'])
@pytest.mark.parametrize('c', [gmail_generate, gmail_embed], ids=lambda c: c.name)
def test_a_part_that_is_none_is_told(c, part, stubbed, capsys):
    "0/2 is the first of two."
    assert f'part is {part!r}: expected i/n' in one_line_and_nothing_written(capsys, c, f'--part={part}')
    with pytest.raises(Reached): c([*required(c), '--part=0/2'])

DEVICED = gmail_generate, gmail_align, gmail_tune.commands['text'], gmail_embed, gmail_caption, gmail_eval

@pytest.mark.parametrize('device', ['cuda', 'cuda:7', 'tpu', 'cuda:x', 'CPU'])
@pytest.mark.parametrize('c', DEVICED, ids=lambda c: c.name)
def test_a_device_that_is_not_there_is_told_before_anything_is_written(c, device, stubbed, capsys, monkeypatch):
    import torch
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    assert f'there is no device {device!r}' in one_line_and_nothing_written(capsys, c, '--device', device)

@pytest.mark.parametrize(
    'name, value',
    [
        ('lr', 1e-3),
        ('seed', 0),
        ('batch_size', 1),
        ('validation_share', 0.0),
        ('top_p', 1.0),
        ('a_new_field', -3),
        ('suffix', ''),
        ('key', None),
        ('options', {}),
        ('images', ('a', 'b')),
    ],
)
def test_what_may_be_meant_passes(name, value): check_value(name, value)
