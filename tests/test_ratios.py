"The page of all ratios is what the pages of the benchmarks store; a ratio that does not fit its figures is refused."
import sys

import pytest
from house import root

sys.path.insert(0, str(root/'tools'))
import publish_ratios
from gmail_nb.bench.ratios import ratio_sentences, show_ratios, stored_ratios

def weight(item): return 1

MACHINE = '4 cores, no accelerator, Python 3.11.7, torch 2.6.0+cpu'

def cell(text): return dict(id='a', source='#| slow\nrun()', outputs=[dict(text=text)])

def test_the_file_is_what_the_pages_store():
    kept = list(map(publish_ratios.plain, publish_ratios.read_results(publish_ratios.file)))
    assert kept == publish_ratios.stored_records(), 'run python tools/publish_ratios.py, and bench/80_ratios again'
    assert len({r['room'] for r in kept}) >= 5

HEADING = 'name  ours  plain  ratio  unit  n'

def read(*lines): return list(publish_ratios.records_of(cell('\n'.join((HEADING, *lines))), 'bench/x', 'x'))

def test_names_and_units_may_have_spaces_and_numbers():
    found, = read('threads 768  1,500.5  3,001  2.0  s a core  1,600  1.4', MACHINE)
    assert found == dict(room='bench/x', name='threads 768', ours=1500.5, plain=3001, ratio=2., unit='s a core',
                         n=1600, machine=MACHINE)

def test_a_ratio_that_its_figures_do_not_give_is_refused():
    with pytest.raises(ValueError, match='3.0 is not the ratio of 2.0 and 8.0'): read('loss  2  8  3.0  s  1', MACHINE)

def test_a_ratio_without_its_machine_is_refused():
    with pytest.raises(ValueError, match='0 machines'): read('loss  2  8  4.0  s  1')

def test_the_worst_comes_first():
    records = stored_ratios()
    assert [r['ratio'] for r in records] == sorted(r['ratio'] for r in records)
    worse = [r['name'] for r in records if r['ratio'] < 1]
    assert all(name in ratio_sentences(records)[0] for name in worse)
    with pytest.raises(ValueError, match='no ratio'): ratio_sentences([])

def test_every_ratio_has_a_dot():
    records = stored_ratios()
    assert len(show_ratios(records).axes[0].get_yticks()) == len(records)
