"""Feed spoiled files to the readers: `python tools/fuzz.py --minutes 10 --seed 0 --keep findings`.

Images, caption files and the files of a generated folder are taken as people have them, some bytes are changed, cut,
doubled or swapped, and the result is read. A reader may return, or refuse with a `ValueError` or `FileNotFoundError`
of one line; everything else, and a file that takes longer than 20 seconds, is a finding: the bytes are kept, and the
traceback is printed once for each place. `--engine atheris` lets coverage choose the changes where Atheris is
installed; the loop here needs nothing. Ends with a line of counts, and with status 1 when something was found.
"""
import argparse
import csv
import io
import json
import logging
import os
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

REFUSED = ValueError, FileNotFoundError
TOO_LONG = 20 # seconds for one file
WORDS = [b'\0', b'\n', b'\r', b'"', b',', b'{', b'}', b'[', b']', b'null', b'-1', b'1e999', b'NaN', b'\xff\xfe',
         b'\xef\xbb\xbf',
         b'../', b'/etc/passwd', b'\x7f\xff\xff\xff', b'\xff\xff\xff\xff', b'\x80', b'true', b'""', b'key',
         b'caption']

def pictures():
    "A small picture in every format that is read: name -> bytes."
    import numpy as np
    from PIL import Image
    from gmail_nb.data import FORMATS
    noise = np.random.default_rng(0).integers(0, 255, (12, 17, 3), dtype=np.uint8)
    found = {}
    for kind in FORMATS:
        for mode in ('RGB', 'P', 'CMYK', 'I;16', 'LA'):
            out = io.BytesIO()
            try: Image.fromarray(noise).convert('L' if mode == 'I;16' else mode).convert(mode).save(out, kind)
            except (OSError, ValueError, KeyError): continue
            found[f'{kind}-{mode}'] = out.getvalue()
    return found

def csv_bytes(rows, **how):
    out = io.StringIO()
    csv.writer(out, **how).writerows(rows)
    return out.getvalue().encode()

def caption_files():
    "Caption files as people have them: name -> bytes."
    import pyarrow as pa
    import pyarrow.parquet as pq
    png = pictures()['PNG-RGB']
    rows = [['key', 'caption', 'note'], ['1', 'a dog, "running"', 'é'], ['2', 'two\nlines', '']]
    lines = [dict(key=k, caption=c) for k, c, _ in rows[1:]]
    plain = dict(images=[dict(id=1, file_name='a.png')], annotations=[dict(image_id=1, caption='a'), dict(image_id=1,
        caption='b')])
    split = dict(images=[dict(filename='a.png', filepath='', split=s, cocoid=i, sentences=[dict(raw='a')])
                         for i, s in enumerate(('train', 'restval', 'test'))])
    parquet, tar = io.BytesIO(), io.BytesIO()
    pq.write_table(pa.table(dict(key=['1', '2'], image=[dict(bytes=png, path=None)] * 2,
                                 captions=[['a'], ['b', 'c']])), parquet)
    with tarfile.open(fileobj=tar, mode='w') as f:
        for name, data in (('1.png', png), ('1.txt', b'a'), ('2.png', png), ('2.json', b'{"caption": "b"}')):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            f.addfile(info, io.BytesIO(data))
    return {'t.csv': csv_bytes(rows), 't.tsv': csv_bytes(rows, delimiter='\t'),
            't.jsonl': '\n'.join(map(json.dumps, lines)).encode(),
            'coco.json': json.dumps(plain).encode(), 'karpathy.json': json.dumps(split).encode(),
            't.parquet': parquet.getvalue(), 't.tar': tar.getvalue(),
            'metadata.csv': b'file_name,caption\na.png,a dog\n',
            'metadata.jsonl': b'{"file_name": "a.png", "caption": "a dog"}\n'}

class Images:
    "Bytes of an image."
    def __init__(self, home): self.seeds = pictures()

    def read(self, name, data):
        from gmail_nb.data import decode_image
        assert decode_image(data, 'row').mode == 'RGB'

class Captions:
    "A caption file, with and without its pictures."
    def __init__(self, home):
        self.seeds, self.home = caption_files(), home/'captions'
        self.home.mkdir()
        (self.home/'a.png').write_bytes(pictures()['PNG-RGB'])

    def read(self, name, data):
        from gmail_nb.settings import SourceSettings
        from gmail_nb.sources import load_captioned
        path = self.home/name
        path.write_bytes(data)
        source = SourceSettings(images=str(self.home) if name.endswith('.json') else None)
        try:
            for images in (False, True):
                try: load_captioned(str(path), source, images=images)
                except REFUSED as e: said(e)
        finally: path.unlink()

class Folders:
    "Each file of a generated folder, of features and of an aligned folder."
    def __init__(self, home):
        from gmail_nb.settings import EmbedSettings
        self.home, drawn = home/'folders', home/'drawn'
        made_folder(drawn)
        from gmail_nb.encoders import load_encoder
        from gmail_nb.features import embed
        from gmail_nb.generate import load_generated
        embed(load_generated(drawn), load_encoder('embedded'), home/'features',
              settings=EmbedSettings(show_progress=False))
        files = [f for place in ('drawn', 'features') for f in (home/place).rglob('*') if f.is_file()]
        whole = [f for f in files if f.stat().st_size and not f.name.startswith('.')]
        self.seeds = {str(f.relative_to(home)): f.read_bytes() for f in whole}
        self.whole = home

    def read(self, name, data):
        from gmail_nb.features import load_features
        from gmail_nb.generate import load_generated
        from gmail_nb.sources import load_captioned
        place = Path(name).parts[0]
        shutil.copytree(self.whole/place, self.home/place)
        (self.home/name).write_bytes(data)
        readers = [load_generated, load_captioned]
        if place == 'features': readers = [load_features, lambda f: load_features(f, verify=True)]
        try:
            for reader in readers:
                try: reader(self.home/place)
                except REFUSED as e: said(e)
        finally: shutil.rmtree(self.home)

def made_folder(folder):
    "A complete run of `generate`: two images of one step each."
    from gmail_nb.generate import generate
    from gmail_nb.settings import DrawSettings
    table = folder.with_suffix('.csv')
    table.write_bytes(csv_bytes([['key', 'caption'], ['1', 'a dog'], ['2', 'a cat']]))
    generate(table, 'embedded', folder, DrawSettings(steps=1))

def said(error):
    "A refusal is a line; a longer one is a finding."
    text = str(error)
    if not text.strip() or '\n' in text or len(text) >= 2000: raise AssertionError('not a line') from error
    raise error

def changed(data, others, rng):
    "The bytes with one to four changes."
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        i, n = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 16, 64))
        kind = rng.randrange(8)
        if kind == 0 and data: data[i % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1: data[i:i + n] = rng.randbytes(n)
        elif kind == 2: del data[i:i + n]
        elif kind == 3: del data[i:]
        elif kind == 4: data[i:i] = data[i:i + n] * rng.choice((1, 2, 50))
        elif kind == 5: data[i:i + rng.choice((0, 1, 4))] = rng.choice(WORDS)
        elif kind == 6: data[i:i + n] = bytes(n)
        else:
            other = rng.choice(others)
            j = rng.randrange(len(other) + 1)
            data[i:i + n] = other[j:j + n]
    return bytes(data)

class Findings:
    "What was read, what was refused, and what went wrong, kept in a folder."
    def __init__(self, keep): self.keep, self.counts, self.places, self.tried = Path(keep), Counter(), {}, Counter()

    def attempt(self, target, name, data):
        "Read one file; anything but an answer or a refusal is kept."
        self.tried[type(target).__name__.lower()] += 1
        signal.alarm(TOO_LONG)
        try: target.read(name, data)
        except REFUSED: self.counts['refused'] += 1
        except BaseException as e:
            if isinstance(e, KeyboardInterrupt): raise
            self.add(type(target).__name__.lower(), name, data, e)
        else: self.counts['read'] += 1
        finally: signal.alarm(0)

    def add(self, what, name, data, error):
        "Keep the bytes; print the traceback of a place that is new."
        behind = error.__cause__ if isinstance(error, AssertionError) and error.__cause__ else error
        frames = traceback.extract_tb(behind.__traceback__)
        ours = [f for f in frames if 'gmail_nb' in f.filename] or frames
        place = type(error).__name__, ours[-1].name, ours[-1].lineno, frames[-1].name
        self.counts['found'] += 1
        if place in self.places: return
        self.places[place] = f'{what}-{len(self.places)}-{Path(name).name}'
        self.keep.mkdir(parents=True, exist_ok=True)
        (self.keep/self.places[place]).write_bytes(data)
        print(f'FOUND {what} {name} -> {self.places[place]}')
        traceback.print_exception(error, limit=-6, file=sys.stdout)
        sys.stdout.flush()

def late(*_): raise TimeoutError(f'a file took longer than {TOO_LONG} seconds')

def by_chance(targets, found, end, rng):
    "The loop that needs nothing: a file of a target, changed and read, until the time is over."
    while time.time() < end:
        target = rng.choice(targets)
        name = rng.choice(list(target.seeds))
        found.attempt(target, name, changed(target.seeds[name], list(target.seeds.values()), rng))

def guided(targets, found, seconds, seed, home):
    "Let Atheris choose; it ends the process when the time is over."
    import atheris
    names = [(t, n) for t in targets for n in t.seeds]
    (corpus := home/'corpus').mkdir()
    for i, (t, n) in enumerate(names): (corpus/f'{i:03}').write_bytes(bytes([i]) + t.seeds[n])

    def one(data):
        if not data: return
        target, name = names[data[0] % len(names)]
        found.attempt(target, name, data[1:])
        state = dict(counts=found.counts, tried=found.tried, places=[[*k, v] for k, v in found.places.items()])
        (home/'state').write_text(json.dumps(state))
        os.replace(home/'state', home/'seen.json')
    # of libFuzzer no alarm, for that is ours
    atheris.Setup(['fuzz', str(corpus), f'-seed={seed + 1}', f'-max_total_time={seconds}', '-max_len=8192',
                   '-timeout=0', '-rss_limit_mb=8192', f'-artifact_prefix={home}/ended-'], one)
    atheris.Fuzz()

def by_coverage(targets, found, seconds, seed, home):
    "The same with Atheris, which looks at the lines that a file reaches, in a process that it may end."
    sys.stdout.flush()
    if not (child := os.fork()):
        try: guided(targets, found, seconds, seed, home)
        finally: os._exit(1) # it did not begin
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if (home/'seen.json').exists():
        seen = json.loads((home/'seen.json').read_text())
        found.counts.update(seen['counts'])
        found.tried.update(seen['tried'])
        found.places.update({tuple(place): name for *place, name in seen['places']})
    if not status: return
    print(f'FOUND the process ended with status {status}')
    found.counts['found'] += 1
    found.places['the process', status] = 'ended'
    found.keep.mkdir(parents=True, exist_ok=True)
    for file in home.glob('ended-*'): shutil.copy(file, found.keep) # what it read last, after a byte that names the target

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--minutes', type=float, default=10)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--keep', default='findings', help='folder for the bytes of findings')
    p.add_argument('--engine', choices=('chance', 'atheris'), default='chance')
    p.add_argument('--only', choices=('images', 'captions', 'folders'), nargs='*')
    a = p.parse_args()
    os.environ.setdefault('HF_HUB_OFFLINE', '1')
    if a.engine == 'atheris':
        import atheris
        with atheris.instrument_imports(include=['gmail_nb', 'PIL']): import gmail_nb.sources # noqa: F401
    warnings.simplefilter('ignore')
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGALRM, late)
    home = Path(tempfile.mkdtemp(prefix='fuzz-'))
    kinds = [k for k in (Images, Captions, Folders) if not a.only or k.__name__.lower() in a.only]
    targets, found = [k(home) for k in kinds], Findings(a.keep)
    try:
        if a.engine == 'atheris': by_coverage(targets, found, int(a.minutes * 60), a.seed, home)
        else: by_chance(targets, found, time.time() + a.minutes * 60, random.Random(a.seed))
    finally: shutil.rmtree(home, ignore_errors=True)
    counts = f'{sum(found.tried.values())} files ({dict(found.tried)}): {dict(found.counts)}'
    print(f'seed {a.seed}: {counts}; places: {len(found.places)}')
    return 1 if found.places else 0

if __name__ == '__main__': sys.exit(main())
