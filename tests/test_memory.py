"What a set of captions and a probe hold in memory does not grow with their rows: two sizes, a fresh process each."
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from gmail_nb import data
from gmail_nb.data import OneByOne, as_table, pieces, repeated
from gmail_nb.plan import caption_table, read_captions
from gmail_nb.runtime import fingerprint, fingerprint_of

SMALL, LARGE = 20_000, 100_000

# Memory that no file stands behind, looked at every few milliseconds, above what the imports and a small run took.
WATCH = '''
import sys, threading
from pathlib import Path

def held():
    lines = Path('/proc/self/status').read_text().splitlines()
    return 1024 * int(next(l for l in lines if l.startswith('RssAnon')).split()[1])

def most(work):
    over, base = threading.Event(), held()
    seen = [base]
    def look():
        while not over.wait(.003): seen.append(held())
    watch = threading.Thread(target=look, daemon=True) # so that what fails in between ends the process
    watch.start()
    work()
    over.set()
    watch.join()
    return max(seen) - base
'''

CAPTIONS = WATCH + '''
import pyarrow as pa, pyarrow.parquet as pq
from gmail_nb.generate import open_folder, same_captions
from gmail_nb.pipelines import Generator
from gmail_nb.plan import make_settings, read_captions
from gmail_nb.settings import SourceSettings

def run(n, home):
    home.mkdir()
    said = 'a picture which somebody describes at length, ' * 4
    schema = pa.schema(dict(key=pa.string(), captions=pa.list_(pa.string())))
    with pq.ParquetWriter(home/'rows.parquet', schema) as writer:
        for start in range(0, n, 5000):
            rows = range(start, min(n, start + 5000))
            writer.write_table(pa.table([[f'{i:09}' for i in rows], [[f'{said}{i}'] for i in rows]], schema=schema))
    def work():
        table = read_captions(home/'rows.parquet', SourceSettings(cache_dir=str(home/'cache')))
        assert len(read_captions(table)) == n
        settings = make_settings(table, Generator('painter', 'painter', '0' * 40))
        open_folder(home/'made', table, settings)
        assert same_captions(home/'made'/'captions.parquet', table)
    return most(work)
'''

PROBE = WATCH + '''
import torch
from gmail_nb.classification import Standardised, probe_gradient

@torch.no_grad()
def run(n, home):
    torch.set_num_threads(1)
    x, index = torch.zeros(1, 32).expand(n, 32), torch.arange(n)
    data = Standardised(x, torch.zeros(32), torch.ones(32))
    theta = torch.zeros(1000, 33, dtype=data.dtype)
    return most(lambda: probe_gradient(theta, data, index % 1000, index, 1.))
'''

def bytes_held(code, home): # for each of the two sizes
    "At most, of one process for each size that was forked after the imports and has run the same on few rows."
    last = f'''
import os
for n in ({SMALL}, {LARGE}):
    if not (child := os.fork()):
        home = Path({str(home)!r})/str(n)
        home.mkdir()
        run(100, home/'few')
        print(run(n, home/'many'), flush=True)
        os._exit(0)
    assert not os.waitpid(child, 0)[1]
'''
    done = subprocess.run([sys.executable, '-c', code + last], capture_output=True, text=True,
                          env={**os.environ, 'HF_HOME': str(home/'hf'), 'OMP_NUM_THREADS': '1'})
    assert not done.returncode, done.stderr[-2000:]
    return map(int, done.stdout.split())

@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='Linux counts this memory')
@pytest.mark.slow
@pytest.mark.parametrize('code, most', [(CAPTIONS, 150), (PROBE, 1000)], ids=['captions', 'probe'])
def test_memory_does_not_grow_with_rows(tmp_path, code, most):
    "Captions of 200 letters, held once, would be 215 bytes a row; scores of a thousand classes, 4,000."
    small, large = bytes_held(code, tmp_path)
    each = (large - small) / (LARGE - SMALL)
    print(json.dumps(dict(small=small, large=large, bytes_a_row=round(each, 1))))
    assert each < most

def column(*chunks): return pa.chunked_array(chunks)

def test_what_is_mapped_is_the_same_table(tmp_path, monkeypatch):
    monkeypatch.setattr(data.datasets.config, 'HF_DATASETS_CACHE', tmp_path)
    said = {f'{i:05}': f'caption {i}' for i in range(3000)}
    table = read_captions(said)
    mapped = as_table(table.to_batches(max_chunksize=100), table.schema, in_memory=1000)
    assert mapped.equals(table) and list(tmp_path.glob('rows-*/rows.arrow'))
    assert not as_table([], table.schema).num_rows

@pytest.mark.parametrize('rows', [1, 2, 100])
def test_repeated_values_are_named_once_in_their_order(rows):
    keys, samples = column(['b', 'a', None], ['b', 'c', 'a', 'b']), column([0, 1, 0, 0, 0, 1, 2])
    assert repeated(keys, chunk=rows) == ['b', 'a']
    assert repeated(keys, samples, chunk=rows) == [('b', 0), ('a', 1)]
    assert repeated(column(['a\0', 'a']), column(['b', '\0b']), chunk=rows) == []
    assert repeated(column([1, 2], [1]), chunk=rows) == ['1'] and repeated(column(pa.array([], pa.string()))) == []

def test_equal_hashes_alone_are_no_repetition(monkeypatch):
    monkeypatch.setattr(data, 'hash_array', lambda texts, categorize: data.np.zeros(len(texts), data.np.uint64))
    assert repeated(column(['a', 'b', 'c'])) == [] and repeated(column(['a', 'b', 'a'])) == ['a']

def test_pieces_cover_a_column():
    words = column(list('abcde'), list('fg'))
    assert [p.to_pylist() for p in pieces(words, 3)] == [['a', 'b', 'c'], ['d', 'e'], ['f', 'g']]
    assert list(OneByOne(words)) == list('abcdefg') and fingerprint(OneByOne(words)) == fingerprint(list('abcdefg'))

def test_parts_that_are_gone_through_have_the_same_fingerprint():
    assert fingerprint_of(iter(['a', [1, 2], None])) == fingerprint('a', [1, 2], None)

def test_a_table_of_other_types_is_refused_as_before():
    with pytest.raises(ValueError, match='must be text'): caption_table(column([1]), column(['x']))
