"Equal to the last bit, or within which tolerance: each line of the page's table, and what other Pythons change."
import gmail_nb.runtime
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gmail_nb.bench.determinism import PINNED, PROMISES, RESULTS, OTHER_WAYS, distance_to_plain, drawn_by_seed

def weight(item): return 50

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason='the promises are those of a CPU')

@pytest.fixture(scope='module')
def runs(tmp_path_factory): return tmp_path_factory.mktemp('runs')

@pytest.mark.parametrize('result, way', PROMISES, ids='-'.join)
def test_a_promise_of_the_table(runs, result, way):
    found = distance_to_plain(runs, result, way)
    assert found <= PROMISES[result, way], f'{result} differ by {found} where {way} changes'

def test_every_result_and_way_is_in_the_table():
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

def test_the_order_of_sets_and_dicts_changes_no_fingerprint():
    code = 'from gmail_nb.bench.determinism import drawn_by_seed; print(drawn_by_seed())'
    env = {**os.environ, 'PYTHONHASHSEED': '12345', 'PYTHONPATH': str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    assert done.stdout.split() == [PINNED], done.stderr
