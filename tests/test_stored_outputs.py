"What notebooks store is what their cells give: no picture borrowed, no table of another form, no excuse in the prose."
import ast
import base64
import hashlib
import io
import re
import sys

import pytest
from PIL import Image
from house import cells_of, flags_of, names, root, source_of

sys.path.insert(0, str(root/'tools'))
from stored import digest, left_out, made_with, read_runs

EXPERIMENTS = [n for n in names if n.startswith('experiments/')]

def outputs(name):
    "(cell, output) of every stored output."
    for cell in cells_of(name):
        for out in cell.get('outputs', []): yield cell, out

def data_of(out, mime):
    found = out.get('data', {}).get(mime, '')
    return found if isinstance(found, str) else ''.join(found)

def pictures(name):
    for cell, out in outputs(name):
        if png := data_of(out, 'image/png'): yield cell, base64.b64decode(png)

def ends_in_print(source):
    "Whether the last statement is a call of `print`, which shows no value."
    code = '\n'.join(l for l in source.splitlines() if not l.lstrip().startswith(('#|', '%', '!')))
    try: body = ast.parse(code).body
    except SyntaxError: return False
    last = body[-1] if body else None
    called = getattr(getattr(last, 'value', None), 'func', None)
    return isinstance(last, ast.Expr) and isinstance(called, ast.Name) and called.id == 'print'

def test_no_picture_is_shared_by_two_notebooks():
    seen, shared = {}, []
    for name in names:
        for cell, png in pictures(name):
            where = seen.setdefault(hashlib.sha256(png).hexdigest(), (name, cell['id']))
            if where[0] != name: shared.append((where, (name, cell['id'])))
    assert not shared, f'the same picture stands in two notebooks: {shared}'

@pytest.mark.parametrize('name', names)
def test_a_cell_that_prints_stores_no_page(name):
    wrong = [c['id'] for c, out in outputs(name) if data_of(out, 'text/html') and ends_in_print(source_of(c))]
    assert not wrong, f'these print at their end, but store a table, run them again: {wrong}'

RUNS = read_runs() # what tools/execute.py has noted of cells that no test runs

@pytest.mark.parametrize('name', names)
def test_an_output_that_no_test_makes_is_that_of_the_source_beside_it(name):
    "A cell flagged slow, cuda or hub that changed since it ran, or never ran, is named here."
    cells, noted = left_out(cells_of(name)), RUNS.get(name, {})
    assert set(noted) <= set(cells), f'tests/stored_runs.json knows cells of {name} that are gone'
    for i, cell in cells.items():
        source = source_of(cell)
        again = (f'run `python tools/execute.py nbs/{name}.ipynb --with {" ".join(sorted(flags_of(cell)))}`, '
                 'or, where names alone changed, with `--same WHY` in place of `--with`')
        assert i in noted, f'{name}, cell {i}: nothing says which source made its output: {again}'
        assert made_with(noted[i]) == digest(source), f'{name}, cell {i} changed since its output was made: {again}'
        if isinstance(noted[i], str): assert cell['outputs'], f'{name}, cell {i} has no output: {again}'

def test_outputs_that_are_stale_or_absent_do_not_grow_in_number():
    "Each says why in tests/stored_runs.json: it needs the Hub, a GPU, Ray, or most of an hour."
    entries = [e for cells in RUNS.values() for e in cells.values() if isinstance(e, dict)]
    stale = [e['stale'] for e in entries if 'stale' in e]
    assert all(len(e) == 2 and (e.get('stale') or e.get('same')) for e in entries)
    assert len(stale) <= 6, stale

def test_outputs_that_are_kept_over_a_change_do_not_grow_in_number():
    "Each says what changed, and that it changes no output; a run with `--with` in place of `--same` takes one away."
    kept = {(n, i): e['same'] for n, cells in RUNS.items() for i, e in cells.items()
            if isinstance(e, dict) and 'same' in e}
    vague = {where: why for where, why in kept.items() if len(why.split()) < 3}
    assert not vague, f'these do not say what changed: {vague}'
    assert len(kept) <= 22, f'{len(kept)} outputs are of an older source than stands beside them'

@pytest.mark.parametrize('name', names)
def test_no_prose_excuses_what_is_stored(name):
    excuse = re.compile(r'present form|run of version|has\s+not\s+been\s+repeated')
    wrong = [c['id'] for c in cells_of(name) if c['cell_type'] == 'markdown' and excuse.search(source_of(c))]
    assert not wrong, f'run the cells again and take out what {wrong} says of an older run'

def as_it_came(cell):
    "Whether a cell shows what a shell printed, or what a long run left: neither is cut for the page."
    return source_of(cell).startswith('%%bash') or bool(flags_of(cell) & {'slow', 'cuda', 'hub'})

@pytest.mark.parametrize('name', [n for n in names if not n.startswith('making/')])
def test_stored_text_fits_the_page(name):
    wide = [
        (cell['id'], l)
        for cell, out in outputs(name)
        if name in EXPERIMENTS or not as_it_came(cell)
        for l in ''.join(out.get('text', '')).splitlines()
        if len(l) > 120
    ]
    assert not wide, f'stored lines over 120 characters: {wide}'

INSIDE = re.compile(r'data:image/(?:png|jpeg);base64,([\w+/=]+)') # a picture that a page carries

def shown(name):
    "(cell, bytes) of every PNG and JPEG that a notebook shows, those inside HTML among them."
    yield from pictures(name)
    for cell, out in outputs(name):
        if jpeg := data_of(out, 'image/jpeg'): yield cell, base64.b64decode(jpeg)
        for found in INSIDE.findall(data_of(out, 'text/html')): yield cell, base64.b64decode(found)

@pytest.mark.parametrize('name', names)
def test_pictures_have_the_width_of_a_page(name):
    "Drawn for about 800 pixels, so that no letter is stretched or shrunk; narrow ones stay as they are."
    for cell, data in shown(name):
        width, _ = Image.open(io.BytesIO(data)).size
        assert width <= 1100, f'{cell["id"]} is {width} pixels wide: letters shrink on a page of 800'

def test_no_stored_picture_has_a_palette():
    "A screenshot of 256 colours has specks around its letters and stripes in its photographs."
    kept = {path.relative_to(root).as_posix(): path.read_bytes()
            for folder in ('gmail_nb/assets', 'index_files') for path in (root/folder).glob('**/*.png')}
    kept |= {f'{name}, {cell["id"]}': data for name in names for cell, data in shown(name)}
    assert len(kept) > 100, 'pictures are looked for where they are not'
    wrong = [where for where, data in kept.items() if Image.open(io.BytesIO(data)).mode == 'P']
    assert not wrong, f'store these in true colour: {wrong}'

def test_a_picture_of_the_app_is_small_and_as_it_ships():
    "The notebook shows the file that the package brings, byte for byte."
    kept = {path.name: path.read_bytes() for path in (root/'gmail_nb'/'assets'/'demo').glob('app*.png')}
    assert len(kept) == 2 and set(kept.values()) == {png for _, png in pictures('cli/05_app')}
    large = {name: len(data) for name, data in kept.items() if len(data) > 350_000}
    assert not large, f'these are over 350 KB: {large}'
