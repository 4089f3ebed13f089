"What the tests know of the house: its notebooks, their cells, and the order of the rooms."
import json
import os
import re
import subprocess
from pathlib import Path

root = Path(__file__).resolve().parent.parent
folders = ('', 'runs', 'experiments', 'bench', 'cli', 'making', 'tutorials') # each may import from those before it

def path_of(name): return root/'nbs'/f'{name}.ipynb'
def read_notebook(name): return json.loads(path_of(name).read_text(encoding='utf-8'))
def cells_of(name): return read_notebook(name)['cells']
def source_of(cell): return ''.join(cell['source'])
def flags_of(cell): return set(re.findall(r'^#\|\s*([\w-]+)', source_of(cell), re.M))
def exported(cell): return cell['cell_type'] == 'code' and bool(flags_of(cell) & {'export', 'exports', 'exporti'})

def place(name):
    "Where a notebook stands: folders in their order, numbers within a folder."
    folder, _, stem = name.rpartition('/')
    return folders.index(folder), stem

names = sorted((p.relative_to(root/'nbs').with_suffix('').as_posix() for p in (root/'nbs').rglob('*.ipynb')
                if not any(part.startswith(('.', '_')) for part in p.relative_to(root/'nbs').parts)), key=place)

def modules():
    "{module below gmail_nb: the notebook that gives it}"
    found = {n: re.search(r'#\|\s*default_exp\s+([\w.]+)', path_of(n).read_text(encoding='utf-8')) for n in names}
    return {m[1]: n for n, m in found.items() if m}

def run(*command, cwd, **env):
    "Run and return the finished process; a failure shows what the command wrote."
    done = subprocess.run([str(c) for c in command], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, f'{command[:3]} failed:\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}'
    return done

def files_below(folder):
    leave = {'__pycache__', '.ipynb_checkpoints'}
    return {p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file() and not leave & set(p.parts)}

def tracked():
    "The files of the repository: what git knows or would add; everything where there is no git."
    try: listed = run('git', 'ls-files', '-co', '--exclude-standard', '-z', cwd=root).stdout.split('\0')
    except (AssertionError, FileNotFoundError): listed = files_below(root)
    return sorted(root/p for p in listed if p and (root/p).is_file())
