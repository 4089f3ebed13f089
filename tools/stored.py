"""Which source made the stored output of the cells that the tests do not run.

tests/stored_runs.json holds, for each cell flagged slow, cuda, hub or eval: false, the beginning of the SHA-256 of its
source when its output was made. `tools/execute.py` writes it, `tests/test_stored_outputs.py` compares. An entry is

    "1a2b3c..."                          the output is that of this source
    {"source": ..., "same": why}         the source changed since, in a way that changes no output
    {"source": ..., "stale": why}        the output is that of another source, or there is none
"""
import hashlib
import json
import re
from pathlib import Path

FLAGS = ('slow', 'cuda', 'hub')
root = Path(__file__).resolve().parent.parent
PATH = root/'tests'/'stored_runs.json'

def source_of(cell): return ''.join(cell['source'])

def flags_of(source):
    "The flags for which the tests leave a cell out."
    found = set(re.findall(r'^#\|\s*(\w+)\s*$', source, re.M)) & set(FLAGS)
    return found | {'eval'} if re.search(r'^#\|\s*eval:\s*false', source, re.M) else found

def digest(source): return hashlib.sha256(source.strip().encode()).hexdigest()[:12]

def name_of(path): return Path(path).resolve().relative_to(root/'nbs').with_suffix('').as_posix()

def left_out(cells):
    "{id: cell} of those that the tests do not run."
    return {c['id']: c for c in cells if c['cell_type'] == 'code' and flags_of(source_of(c))}

def read_runs(): return json.loads(PATH.read_text(encoding='utf-8')) if PATH.exists() else {}

def write_runs(runs):
    runs = {name: dict(sorted(cells.items())) for name, cells in sorted(runs.items()) if cells}
    PATH.write_text(json.dumps(runs, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')

def note_run(name, cells, ran, same=None):
    """Note the source of the cells whose id is in `ran`; entries of cells that are gone are removed.

    With `same`, a reason, changed cells that did not run keep their output and their new source is noted with it."""
    runs = read_runs()
    known, now = runs.get(name, {}), left_out(cells)
    kept = {i: known[i] for i in now if i in known}
    for i, cell in now.items():
        source = digest(source_of(cell))
        if i in ran: kept[i] = source
        elif same and cell['outputs'] and made_with(kept.get(i)) != source: kept[i] = dict(source=source, same=same)
    write_runs(runs | {name: kept})

def made_with(entry): return entry['source'] if isinstance(entry, dict) else entry
