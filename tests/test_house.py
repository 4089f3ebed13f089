"How the house is built and how its notebooks read: rooms in order, nothing private borrowed, short lines, lessons between."

import ast
import re
import statistics
import sys

import pytest
from house import cells_of, exported, flags_of, modules, names, path_of, place, root, run, source_of, tracked

def lines_of(cell):
    return [l for l in source_of(cell).splitlines() if l.strip() and not l.startswith('#|')]

def is_definition(cell):
    "Exports more than imports. Cells of imports count as lines; but there is nothing in them that a lesson could show."
    return exported(cell) and bool(re.search(r'^(def |class |async |@|[A-Za-z_][\w.]*\s*[=:(])', source_of(cell), re.M))

def is_lesson(cell):
    return cell['cell_type'] == 'code' and not exported(cell) and not flags_of(cell) & {'hide', 'default_exp'}

def imports(code):
    "(module, name) of everything imported from this package; a whole module has no name."
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('gmail_nb'):
            yield from ((node.module, a.name) for a in node.names)
        if isinstance(node, ast.Import):
            yield from ((a.name, None) for a in node.names if a.name.startswith('gmail_nb.'))

def exported_code(name): return '\n'.join(source_of(c) for c in cells_of(name) if exported(c))

@pytest.mark.parametrize('name', names)
def test_notebook_opens_with_title_and_purpose(name):
    "An H1, then a `>` line; both are what the pages and the table of rooms show."
    opening = '\n'.join(source_of(c) for c in cells_of(name)[:3] if c['cell_type'] == 'markdown')
    assert re.match(r'# \S', opening) and re.search(r'^> \S', opening, re.M)

@pytest.mark.parametrize('name', names)
def test_a_heading_has_a_cell_of_its_own(name):
    "So that a link to it stays whole when the text below is written anew. The title has its `>` line with it."
    shared = [c['id'] for c in cells_of(name) if c['cell_type'] == 'markdown'
              and re.search(r'^##+ \S', source_of(c), re.M) and '\n' in source_of(c).strip()]
    assert not shared, f'split these cells: {shared}'

@pytest.mark.parametrize('name', names)
def test_notebook_imports_only_lower_rooms(name):
    made_by = modules()
    for module, _ in imports(exported_code(name)):
        if module == 'gmail_nb': continue
        lower = made_by[module.removeprefix('gmail_nb.')]
        assert place(lower) < place(name), f'{name} imports {module}, which {lower} makes'

@pytest.mark.parametrize('name', names)
def test_nothing_private_is_borrowed(name):
    borrowed = [n for _, n in imports(exported_code(name)) if n and n.startswith('_') and not n.startswith('__')]
    assert not borrowed, f'{name} imports {borrowed}: make it public, or keep it in its room'

@pytest.mark.parametrize('name', names)
def test_lines_fit_the_page(name):
    "No line of code over 120 characters, and few over 100."
    lines = [l for c in cells_of(name) if c['cell_type'] == 'code' for l in lines_of(c)]
    long = [l for l in lines if len(l) > 120]
    assert not long, f'{len(long)} lines over 120 characters, such as {long[0]!r}'
    wide = [l for l in lines if len(l) > 100]
    assert len(wide) <= max(3, .03 * len(lines)), f'{len(wide)} of {len(lines)} lines over 100 characters'

@pytest.mark.parametrize('name', names)
def test_exports_are_short_and_lessons_stand_between(name):
    "No exported cell over 40 lines, and no more than 60 exported lines without a lesson that runs: imports count too."
    run_of = 0
    for i, cell in enumerate(cells_of(name)):
        if is_lesson(cell): run_of = 0
        if not exported(cell): continue
        n = len(lines_of(cell))
        run_of += n
        assert n <= 40, f'cell {i} exports {n} lines'
        assert run_of <= 60, f'cell {i}: {run_of} exported lines without a lesson'

@pytest.mark.parametrize('name', names)
def test_a_lesson_comes_after_the_second_exported_cell_at_the_latest(name):
    "A reader sees what a definition does before the third one; markdown between them shows nothing."
    row = []
    for i, cell in enumerate(cells_of(name)):
        if is_lesson(cell): row = []
        if is_definition(cell): row.append(i)
        assert len(row) <= 2, f'cells {row} export, and no lesson that runs stands between'

def test_an_exported_cell_has_at_most_twelve_lines_in_the_middle():
    "And at most 15 in every room: where a lesson stands before and behind, each definition has a cell of its own."
    sizes = {n: [len(lines_of(c)) for c in cells_of(n) if exported(c)] for n in names}
    assert statistics.median(sum(sizes.values(), [])) <= 12
    long = {n: statistics.median(found) for n, found in sizes.items() if found and statistics.median(found) > 15}
    assert not long, f'the middle of the exported cells of a room is at most 15 lines: {long}'

def test_hidden_cells_are_short():
    "Walls of assertions are files of tests, where they fail by name."
    long = [f'{n}: cell {i}' for n in names for i, c in enumerate(cells_of(n))
            if c['cell_type'] == 'code' and 'hide' in flags_of(c) and not exported(c) and len(lines_of(c)) > 25]
    assert not long, long

# Defaults have one home

WORDS_OF_ALL = {'key', 'image', 'side', 'encoder', 'part'} # a usual word, such as our column, and no choice
OWN_SIZES = { # module, function, parameter: a size of its own, which only happens to be one of some settings
    ('captioning', 'TransformerMapper.__init__', 'layers'),   # of the mapper, where the settings' are the decoder's
    ('captioning', 'small_decoder', 'width'), ('plan', 'make_settings', 'dtype'), # of the arithmetic
    ('experiments.llava', 'grid_tokens', 'batch_size'), ('experiments.llava', 'preferred', 'batch_size'),
    ('runs.app', 'gallery_of', 'batch_size'), ('runs.dry_run', 'forward_rate', 'batch_size'),
    ('runs.embed', 'undecodable', 'batch_size')}

def literals(code):
    "(function, parameter, value) of every default that is a number above 1 or below 0, or a text."
    def inside(node, above):
        for x in ast.iter_child_nodes(node):
            if not isinstance(x, (ast.ClassDef, ast.FunctionDef)):
                yield from inside(x, above)
                continue
            name = f'{above}{x.name}'
            if isinstance(x, ast.FunctionDef):
                a = x.args
                pairs = list(zip((a.posonlyargs + a.args)[::-1], a.defaults[::-1]))
                for arg, value in pairs + list(zip(a.kwonlyargs, a.kw_defaults)):
                    if isinstance(value, ast.Constant) and isinstance(value.value, (int, float, str)):
                        if value.value not in (0, 1, True, False, ''): yield name, arg.arg, value.value
            yield from inside(x, f'{name}.')
    yield from inside(ast.parse(code), '')

def test_a_default_of_the_settings_is_written_there_alone():
    "A function whose parameter is a field takes its default from there: `rank:int=CaptionerSettings.rank`."
    from dataclasses import fields, is_dataclass
    from gmail_nb import settings
    known = {}
    for c in vars(settings).values():
        if isinstance(c, type) and is_dataclass(c) and c is not settings.Generator:
            for f in fields(c): known.setdefault(f.name, []).append(f.default)
    twice = []
    for module, name in modules().items():
        if module.startswith('bench'): continue # the plain way, and a bench, have sizes of their own
        for function, arg, value in literals(exported_code(name)):
            if arg in WORDS_OF_ALL or (module, function, arg) in OWN_SIZES: continue
            if any(value == d for d in known.get(arg, ())): twice.append(f'{module}.{function}: {arg}={value!r}')
    assert not twice, f'write the field of the settings in place of its value: {twice}'

def test_rows_are_of_a_table_a_file_or_records():
    "Numbers of rows are `indices`, tensors `features`, and a size is a `chunk`."
    found = [f'{n}: {m[0]}' for n in names
             for m in re.finditer(r'\brows:[^=,)#\n]*(?:\bint\b|Tensor|ndarray)[^=,)#\n]*', exported_code(n))]
    assert not found, found

def test_sidebar_names_every_notebook():
    listed = re.findall(r'(\S+)\.ipynb', (root/'nbs'/'sidebar.yml').read_text(encoding='utf-8'))
    assert sorted(listed) == sorted(names), f'nbs/sidebar.yml: {set(listed) ^ set(names)}'

def test_list_of_rooms_names_every_notebook():
    listed = path_of('rooms').read_text(encoding='utf-8')
    missing = [n for n in names if n not in ('index', 'rooms') and f'({n}.ipynb)' not in listed]
    assert not missing, f'run rooms.ipynb again: it lacks {missing}'

def test_readme_is_what_the_index_gives():
    run(sys.executable, root/'tools'/'readme.py', '--check', cwd=root)

def test_no_file_names_a_path_of_one_machine():
    path_of_one_machine = re.compile(r'(?<![\w.:/-])/(?:work|tmp|root|home)/[\w.]')
    bad = []
    for path in tracked():
        data = path.read_bytes()
        if b'\0' in data[:4096]: continue # parquet, weights, pictures
        text = re.sub(r'"image/png": "[^"]*"', '', data.decode('utf-8', 'replace'))
        bad += [f'{path.relative_to(root)}: {m[0]}' for m in path_of_one_machine.finditer(text)]
    assert not bad, bad

def test_lines_of_tests_and_tools_fit_too():
    "None over 120 characters but for a sentence, and none over 170."
    root = path_of('index').parent.parent
    files = sorted([*root.glob('tests/*.py'), *root.glob('tools/*.py')])
    long = [(f.name, l) for f in files for l in f.read_text(encoding='utf-8').splitlines() if len(l) > 120]
    assert not [l for l in long if len(l[1]) > 170] and len(long) <= 50, long
