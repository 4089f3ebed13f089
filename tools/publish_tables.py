"""Put the tables of a report into the package: `python tools/publish_tables.py FOLDER [--seeds N]`.

FOLDER is that of `gmail_report --scale embedded --seeds N`, run on the machine where this is called. Writes
assets/evidence: tables/, with the records of each part and about.json, tables.md, which is made from them, and
part_seconds.json. Then run these pages again: `python tools/execute.py` with nbs/experiments/75_results.ipynb
and nbs/index.ipynb, and `python tools/readme.py`.
"""
import argparse
import json
from importlib import resources
from pathlib import Path

import publish_times
from gmail_nb.experiments.parts import PARTS, part_file
from gmail_nb.experiments.report import asked_of, intro_text
from gmail_nb.experiments.results import results_page
from gmail_nb.files import atomic_write, check_writable, read_results, write_results
from gmail_nb.settings import report_settings

ABSENT = 'was not run in the report that is kept here'

def publish(run, seeds, home):
    "Copy what is there; a part that the report has not finished is named as absent."
    settings, folder = report_settings(False, seeds), check_writable(home/'tables')
    files = {part: part_file(run, part, settings, *asked_of(part)) for part in PARTS}
    there = {part: file for part, file in files.items() if file.exists()}
    if not there: raise SystemExit(f'{run} has no records of gmail_report --seeds {seeds}')
    for old in folder.glob('*.jsonl'): old.unlink()
    for part, file in there.items(): write_results(folder/f'{part}.jsonl', read_results(file))
    about = dict(intro=intro_text('embedded', settings), seeds=seeds,
                 absent={part: ABSENT for part in files if part not in there})
    atomic_write(folder/'about.json', json.dumps(about, indent=1) + '\n')
    atomic_write(home/'tables.md', results_page(folder))
    return there

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('run', type=Path, help='the folder of gmail_report')
    parser.add_argument('--seeds', type=int, default=1, help='whole chains of that report')
    asked = parser.parse_args()
    home = Path(str(resources.files('gmail_nb')))/'assets'/'evidence'
    print('published:', *publish(asked.run, asked.seeds, home))
    publish_times.publish(asked.run, home/'part_seconds.json')
