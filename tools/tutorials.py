"""Write what every tutorial begins with: `python tools/tutorials.py [--check]`.

The link that opens it in Colab comes from settings.ini, and the day and length of the run that is shown from what its
last cell printed, so none of them can be wrong. A page that the ordinary tests leave out says why (`LONG`, which the
tests read). The cell below them installs the package where it is not (in Colab), finds its commands, and works in an
empty folder.
"""
import argparse, json, re, sys
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parent.parent
tutorials = sorted((root/'nbs'/'tutorials').glob('*.ipynb'))
BADGE, SETUP, TIME = 'c01ab000', 'c01ab001', 'c01ab002' # ids of the cells

# Tutorials that take too long for the ordinary tests, and what takes the time
LONG = {
    '10_your_pictures': 'it draws 144 images and trains an encoder, two text sides and a captioner',
    '20_new_encoder': 'it embeds and draws several hundred images with an encoder of its own',
    '30_new_generator': 'it draws with three pipelines, one of them in a process that loads the libraries anew',
    '40_paper_scale': 'each of its dry runs is a process that loads the libraries anew',
    '50_many_machines': 'each of its commands is a process that loads the libraries anew',
}
OTHERS = 'Other tests run the same commands, smaller'

# Seconds of a run of the same page on two cores that had less else to do, for pages whose last run had more
ALONE = {'10_your_pictures': 283, '20_new_encoder': 112, '30_new_generator': 128, '40_paper_scale': 84,
         '50_many_machines': 144, '60_paper_with_code': 5}

setup = """#| hide
import os
import sys
import tempfile
import time
from pathlib import Path

if 'google.colab' in sys.modules:
    get_ipython().system('pip install -q git+{repository}')
scripts = str(Path(sys.executable).parent)
os.environ['PATH'] = os.pathsep.join([scripts, os.environ.get('PATH', '')])
clock, came_from = time.time(), os.getcwd()
os.chdir(tempfile.mkdtemp()) # what is made here goes elsewhere"""

last = """#| echo: false
took, day = time.time() - clock, time.strftime('%Y-%m-%d')
print(f'This page took {took:.0f} s on {os.cpu_count()} cores, on {day}.')
os.chdir(came_from)"""

def settings():
    "The section of settings.ini."
    parser = ConfigParser(delimiters=['='], interpolation=None)
    parser.read(root/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']

def colab_link(path, s):
    "Where Colab finds a notebook of the repository."
    owner = s['git_url'].removeprefix('https://github.com/')
    return f'https://colab.research.google.com/github/{owner}/blob/{s["branch"]}/{path.relative_to(root).as_posix()}'

def taken(nb, alone):
    "What the last run printed about its day and its time; the time of a run before, where this one took twice as long."
    found = [''.join(o.get('text', '')) for c in nb['cells'] if c['id'] == TIME for o in c['outputs']]
    match = re.search(r'took (\d+) s on (\d+) cores(?:, on ([\d-]+))?', ''.join(found))
    if not match: return 'It has not been run yet.'
    made = f' was made on {match[3]} and' if match[3] else ''
    said = f'The run that is shown here{made} took {match[1]} seconds on {match[2]} cores.'
    if not alone or int(match[1]) < 2 * alone: return said
    return f'{said} The machine had much other work then; a run before, with less of it, took {alone} seconds.'

def tested(path):
    "Which tests run a tutorial, for a page that the ordinary ones leave out."
    if path.stem not in LONG: return ''
    return (f' The tests of every change leave this page out, because {LONG[path.stem]}. {OTHERS}; this page '
            'itself is run by `python -m pytest -m slow -k tutorials`, which a workflow does every week.')

def put(nb, id, kind, at, source):
    "Give the cell with this id a source; a cell that is missing is added."
    cell = next((c for c in nb['cells'] if c['id'] == id), None)
    if cell is None:
        cell = dict(cell_type=kind, id=id, metadata={}, source=[])
        if kind == 'code': cell |= dict(execution_count=None, outputs=[])
        nb['cells'].insert(len(nb['cells']) if at is None else at, cell)
    cell['source'] = source.splitlines(keepends=True)

def written(path, s):
    "The notebook as it should be, as text."
    nb = json.loads(path.read_text(encoding='utf-8'))
    ran = taken(nb, ALONE.get(path.stem)) + tested(path)
    put(nb, BADGE, 'markdown', 1, f'[![Open in Colab](colab.svg)]({colab_link(path, s)})\n\n{ran}')
    put(nb, SETUP, 'code', 2, setup.replace('{repository}', s['git_url']))
    put(nb, TIME, 'code', None, last)
    return json.dumps(nb, ensure_ascii=False, indent=1) + '\n'

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--check', action='store_true', help='write nothing; exit 1 when a tutorial begins otherwise')
    check, s = parser.parse_args().check, settings()
    changed = {p: t for p in tutorials if (t := written(p, s)) != p.read_text(encoding='utf-8')}
    if check: sys.exit(f'run tools/tutorials.py: {", ".join(p.name for p in changed)}' if changed else 0)
    for path, text in changed.items(): path.write_text(text, encoding='utf-8')
    print(', '.join(p.name for p in changed) or 'all tutorials begin as they should')

if __name__ == '__main__': main()
