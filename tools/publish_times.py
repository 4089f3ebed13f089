"""Put the seconds that the parts of a report took into the package: `python tools/publish_times.py FOLDER`.
With `--demo quick full` both demos run once more, in folders of their own, and what they took is put there too.

FOLDER is that of `gmail_report --scale embedded`, with or without --quick, run on the machine where this is called.
Parts that it has not finished keep what was measured of them before. Writes assets/evidence/part_seconds.json, which
`gmail_report --dry-run`, `gmail_demo --dry-run` and the README read.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path

import torch

from gmail_nb.experiments.parts import ONCE, PARTS, part_file
from gmail_nb.experiments.report import asked_of, suited
from gmail_nb.files import atomic_write, read_results
from gmail_nb.runtime import machine
from gmail_nb.settings import report_settings

def measured(run, quick, most=20):
    "Seconds of one core a chain by part, of the parts that this folder has finished."
    found = {}
    for part in PARTS:
        for seeds in range(1, 1 + (1 if quick else most)): # a quick run has one chain whatever is asked
            file = part_file(run, part, suited(report_settings(quick, seeds)), *asked_of(part))
            if not file.exists(): continue
            took = next(r for r in read_results(file) if r['metric'] == 'run_seconds')
            found[part] = round(took['cores'] / (1 if part in ONCE else seeds), 1)
    return found

def on_the_clock(run, quick):
    "Seconds of all parts of one chain, drawing among them, if this folder has them all."
    files = [part_file(run, part, suited(report_settings(quick, 1)), *asked_of(part)) for part in PARTS]
    if not all(f.exists() for f in files): return {}
    took = sum(next(r['value'] for r in read_results(f) if r['metric'] == 'run_seconds') for f in files)
    return {'quick' if quick else 'full': round(took, 1)}

def of_demo(kind):
    "Seconds of a whole `gmail_demo`, from its start to its page: on the clock, and of one core."
    def spent(): return sum(os.times()[2:4]) # of children that have ended
    with tempfile.TemporaryDirectory() as folder:
        cores, began = spent(), time.monotonic()
        argv = ['demo', '--out', f'{folder}/demo', *(['--quick'] if kind == 'quick' else [])]
        subprocess.run([sys.executable, '-m', 'gmail_nb.cli.commands', *argv], check=True)
        return dict(clock=round(time.monotonic() - began, 1), cores=round(spent() - cores, 1))

def publish(run, file, demos=()):
    told = json.loads(file.read_text(encoding='utf-8')) if file.exists() else dict(seconds={})
    for kind, quick in (('full', False), ('quick', True)) if run else ():
        told['seconds'][kind] = told['seconds'].get(kind, {}) | measured(run, quick)
    cpu, known = torch.backends.cpu.get_cpu_capability(), told.get('demo', {})
    demos = known | {cpu: known.get(cpu, {}) | {kind: of_demo(kind) for kind in demos}} if demos else known
    reports, own = told.get('report', {}), on_the_clock(run, False) | on_the_clock(run, True) if run else {}
    if own: reports[cpu] = reports.get(cpu, {}) | own
    found = dict(machine=machine(), seconds=told['seconds'], report=reports, demo=demos)
    atomic_write(file, json.dumps(found, indent=1) + '\n')
    return told['seconds'] | dict(report=reports, demo=demos)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('run', type=Path, nargs='?', help='the folder of gmail_report')
    parser.add_argument('--demo', nargs='*', default=[], choices=('quick', 'full'), help='demos that are run and timed')
    home, args = Path(str(resources.files('gmail_nb')))/'assets'/'evidence', parser.parse_args()
    for kind, took in publish(args.run, home/'part_seconds.json', args.demo).items(): print(kind, took)
