"""Put the ratios that the pages of the benchmarks store into the package: `python tools/publish_ratios.py`.

Reads the stored outputs of nbs/bench: the tables of cells flagged slow or cuda, which hold a benchmark at its full
size, and the machine that each cell prints. Writes assets/evidence/bench.jsonl, which the page bench/80_ratios shows;
run that page again after it. With --check nothing is written: what differs is named, and the status is 1.
"""
import argparse
import json
import re
from pathlib import Path

from gmail_nb.files import read_results, write_results
from stored import flags_of, source_of

root = Path(__file__).resolve().parent.parent
file = root/'gmail_nb'/'assets'/'evidence'/'bench.jsonl'
HEADING = re.compile(r'^\s*name\s+ours\s+plain\s+ratio\s+unit\s+n\b')
NUMBER = r'(\d[\d,]*(?:\.\d+)?)'
ROW = re.compile(rf'^\s*(\S.*?)\s+{NUMBER}\s+{NUMBER}\s+{NUMBER}\s+([^\d\s]\S*(?: \S+)*?)\s+(\d[\d,]*)(?:\s|$)')
MACHINE = re.compile(r'^\d+ cores?, .*torch \S+$|^.*Python \S+, torch \S+$', re.M)

def number(text): return float(text.replace(',', ''))

def rows_of(text):
    "(name, ours, plain, ratio, unit, n) of each line below a heading, up to a line of another form."
    below = False
    for line in text.splitlines():
        if HEADING.match(line): below = True
        elif below and (m := ROW.match(line)):
            yield m[1], number(m[2]), number(m[3]), number(m[4]), m[5], int(number(m[6]))
        else: below = False

def records_of(cell, room, where):
    "The comparisons of a cell's stored output; `ValueError` where a ratio or a machine does not fit."
    text = ''.join(''.join(o.get('text', '')) for o in cell['outputs'])
    rows, there = list(rows_of(text)), sorted(set(MACHINE.findall(text)))
    if rows and len(there) != 1: raise ValueError(f'{where} stores ratios, and {len(there)} machines')
    for name, ours, plain, ratio, unit, n in rows:
        # figures are stored with three decimals and the ratio with two
        if not any(abs(r - ratio) < .006 + .005 * ratio for r in (ours / plain, plain / ours)):
            raise ValueError(f'{where}: {ratio} is not the ratio of {ours} and {plain}')
        yield dict(room=room, name=name, ours=ours, plain=plain, ratio=ratio, unit=unit, n=n, machine=there[0])

def stored_records():
    "Of every page, in the order of the rooms."
    found = []
    for path in sorted((root/'nbs'/'bench').glob('[0-9]*.ipynb')):
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            if cell['cell_type'] != 'code' or not flags_of(source_of(cell)) & {'slow', 'cuda'}: continue
            found += records_of(cell, f'bench/{path.stem}', f'{path.stem}, cell {cell["id"]}')
    return found

def plain(record): return {k: v for k, v in record.items() if k != 'checksum'}

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--check', action='store_true', help='write nothing, and fail where the file differs')
    found = stored_records()
    if parser.parse_args().check:
        kept = list(map(plain, read_results(file))) if file.exists() else []
        differ = [r for r in found if r not in kept] + [r for r in kept if r not in found]
        for r in differ: print(r['room'], r['name'], r['ratio'])
        raise SystemExit(f'{len(differ)} differ: run python tools/publish_ratios.py' if differ else 0)
    write_results(file, found)
    print(f'{len(found)} ratios of {len({r["room"] for r in found})} pages')
