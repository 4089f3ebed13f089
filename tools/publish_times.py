"""Put the seconds that the parts of a report took into the package: `python tools/publish_times.py FOLDER`.

FOLDER is that of `gmail_report --scale embedded`, with or without --quick, run on the machine where this is called.
Parts that it has not finished keep what was measured of them before. Writes assets/evidence/part_seconds.json, which
`gmail_report --dry-run` reads.
"""
import argparse
import json
from importlib import resources
from pathlib import Path

from gmail_nb.experiments.parts import ONCE, PARTS, part_file
from gmail_nb.experiments.report import asked_of
from gmail_nb.files import atomic_write, read_results
from gmail_nb.runtime import machine
from gmail_nb.settings import report_settings

def measured(run, quick, most=20):
    "Seconds of one core a chain by part, of the parts that this folder has finished."
    found = {}
    for part in PARTS:
        for seeds in range(1, most + 1):
            file = part_file(run, part, report_settings(quick, seeds), *asked_of(part))
            if not file.exists(): continue
            took = next(r for r in read_results(file) if r['metric'] == 'run_seconds')
            found[part] = round(took['cores'] / (1 if part in ONCE else seeds), 1)
    return found

def publish(run, file):
    told = json.loads(file.read_text(encoding='utf-8')) if file.exists() else dict(seconds={})
    for kind, quick in (('full', False), ('quick', True)):
        told['seconds'][kind] = told['seconds'].get(kind, {}) | measured(run, quick)
    atomic_write(file, json.dumps(dict(machine=machine(), seconds=told['seconds']), indent=1) + '\n')
    return told['seconds']

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('run', type=Path, help='the folder of gmail_report')
    home = Path(str(resources.files('gmail_nb')))/'assets'/'evidence'
    for kind, parts in publish(parser.parse_args().run, home/'part_seconds.json').items(): print(kind, parts)
