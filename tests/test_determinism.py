"Equal to the last bit, or within which tolerance: each line of the page's table, and what other Pythons change."
import gmail_nb.runtime
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gmail_nb.bench.determinism import (
    OTHER_WAYS, PINNED, PROMISES, RESULTS, distance_to_plain, drawn_by_seed, rows_of_promises)

def weight(item): return 50

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason='the promises are those of a CPU')

@pytest.fixture(scope='module')
def runs(tmp_path_factory): return tmp_path_factory.mktemp('runs')

# Whatever is made again after a stop; `-m slow` changes the batch, the threads and the processes as well.
OFTEN = [(result, 'restart') for result in RESULTS]

@pytest.mark.parametrize('result, way', [
    pytest.param(*p, id='-'.join(p), marks=[] if p in OFTEN else pytest.mark.slow) for p in PROMISES])
def test_a_promise_of_the_table(runs, result, way):
    found = distance_to_plain(runs, result, way)
    assert found <= PROMISES[result, way], f'{result} differ by {found} where {way} changes'

def test_every_result_and_way_is_in_the_table():
    assert set(OFTEN) <= set(PROMISES)
    assert {r for r, _ in PROMISES} == set(RESULTS) and {w for _, w in PROMISES} == set(OTHER_WAYS)

def test_seeds_orders_and_fingerprints_are_those_of_every_version_of_python():
    "This number was the same in Python 3.10, 3.11 and 3.13; the tests run in each."
    assert drawn_by_seed() == PINNED

def digests(python):
    "The fingerprints of the four results, in another process."
    env = {**os.environ, 'PYTHONPATH': str(Path(__file__).parent.parent), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([python, Path(__file__).parent/'digests.py'], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()

@pytest.mark.slow
def test_other_versions_of_python_make_the_same_bits():
    "`OTHER_PYTHONS` names interpreters, with the packages of this one, by their paths with ':' between them."
    others = os.environ.get('OTHER_PYTHONS', '').split(':')
    if others == ['']: pytest.skip('OTHER_PYTHONS names none')
    here = digests(sys.executable)
    assert len(here) == len(RESULTS)
    for python in others: assert digests(python) == here, python

def test_the_order_of_sets_and_dicts_changes_no_fingerprint(forks, tmp_path):
    "That process has a hash seed of its own; the one of these tests is drawn at each start."
    script = tmp_path/'drawn.py'
    script.write_text('from gmail_nb.bench.determinism import drawn_by_seed; print(hash("a"), drawn_by_seed())')
    done = forks.run(script=script)
    order, drawn = done.out.split()
    assert drawn == PINNED and int(order) != hash('a'), done.err

def test_the_table_has_a_row_for_each_promise(runs):
    "As the notebook shows it; the differences are made up, for each promise has a test of its own."
    heading, *rows = rows_of_promises(runs, lambda folder, result, way: PROMISES[result, way])
    assert len(rows) == len(PROMISES) and all(len(r) == len(heading) and r[2] == r[3] for r in rows)
    assert ['features', 'jobs', 'equal to the last bit', 'equal to the last bit'] in rows
