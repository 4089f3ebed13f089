"""Write what every tutorial begins with: `python tools/tutorials.py [--check]`.

The link that opens it in Colab comes from settings.ini, and the time that it takes from what its last cell printed,
so neither can be wrong. The cell below them installs the package where it is not (in Colab), finds its commands,
and works in an empty folder.
"""
import argparse, json, re, sys
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parent.parent
tutorials = sorted((root/'nbs'/'tutorials').glob('*.ipynb'))
BADGE, SETUP, TIME = 'c01ab000', 'c01ab001', 'c01ab002' # ids of the cells

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
print(f'This page took {time.time() - clock:.0f} s on {os.cpu_count()} cores.')
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

def taken(nb):
    "What the last run printed about its time."
    found = [''.join(o.get('text', '')) for c in nb['cells'] if c['id'] == TIME for o in c['outputs']]
    match = re.search(r'took (\d+) s on (\d+) cores', ''.join(found))
    if not match: return 'It has not been run yet.'
    return f'The run that is shown here took {match[1]} seconds on {match[2]} cores.'

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
    put(nb, BADGE, 'markdown', 1, f'[![Open in Colab](colab.svg)]({colab_link(path, s)}) {taken(nb)}')
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
