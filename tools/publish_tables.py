"""Put the tables of a report into the package: `python tools/publish_tables.py FOLDER`.

FOLDER is that of `gmail_report --scale embedded`, run on the machine where this is called. Of each part the run with
the most whole chains is taken; a part that the folder lacks, or has with fewer chains than the package, stays as it
is. Writes assets/evidence: tables/, with the records of each part and about.json, tables.md, which is made from them,
and part_seconds.json. Then run these pages again: `python tools/execute.py` with nbs/experiments/75_results.ipynb
and nbs/index.ipynb, and `python tools/readme.py`.
"""
import argparse
import json
from importlib import resources
from pathlib import Path

import publish_times
from gmail_nb.experiments.parts import ONCE, PARTS, part_file
from gmail_nb.experiments.report import asked_of, intro_text
from gmail_nb.experiments.results import results_page
from gmail_nb.files import atomic_write, check_writable, read_results, write_results
from gmail_nb.settings import report_settings

ABSENT = 'was not run in the report that is kept here'
MOST = 20 # chains that are looked for

def finished(run, part):
    "The records of a part with the most chains, or None."
    for seeds in range(MOST, 0, -1):
        file = part_file(run, part, report_settings(False, seeds), *asked_of(part))
        if file.exists(): return read_results(file)

def chains_of(records):
    "Over how many whole chains a part was run."
    return next(r['n'] for r in records if r['metric'] == 'run_seconds')

def publish(run, home):
    "Take what has more chains than what is there, and say how many each part has."
    folder, chains = check_writable(home/'tables'), {}
    for part in PARTS:
        file, found = folder/f'{part}.jsonl', finished(run, part)
        kept = read_results(file) if file.exists() else None
        if found and (not kept or chains_of(found) >= chains_of(kept)): write_results(file, found)
        elif not kept: continue
        chains[part] = chains_of(read_results(file))
    if not chains: raise SystemExit(f'{run} has no records of gmail_report --scale embedded')
    many = [n for part, n in chains.items() if part not in ONCE]
    intro = intro_text('embedded', report_settings(False, max(many)), many)
    about = dict(intro=intro, seeds=max(many), absent={p: ABSENT for p in PARTS if p not in chains})
    atomic_write(folder/'about.json', json.dumps(about, indent=1) + '\n')
    atomic_write(home/'tables.md', results_page(folder))
    return chains

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('run', type=Path, help='the folder of gmail_report')
    asked = parser.parse_args()
    home = Path(str(resources.files('gmail_nb')))/'assets'/'evidence'
    print('published, with so many chains:', publish(asked.run, home))
    publish_times.publish(asked.run, home/'part_seconds.json')
