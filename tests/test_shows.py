"What objects show of themselves at the end of a cell, in a shell as a notebook has it."
import re

import numpy as np
import pytest
from datasets import Dataset
from gmail_nb.align import GenReal
from gmail_nb.data import Pairs, emoji, pairs, set_as_grid, show_sets_in
from gmail_nb.encoders import load_encoder
from gmail_nb.files import record
from gmail_nb.pages import ResultTable, run_page, show_page
from gmail_nb.runs.judge import Measure, judged
from IPython.core.interactiveshell import InteractiveShell

@pytest.fixture(scope='module')
def shown():
    "The forms in which a shell shows an object: MIME type -> what it is."
    shell = InteractiveShell()
    shell.display_formatter.active_types = shell.display_formatter.format_types # as a kernel has them
    show_sets_in(shell)
    return lambda value: shell.display_formatter.format(value)[0]

@pytest.fixture(scope='module')
def real(): return emoji('A', source='noto').select(range(14))

@pytest.fixture(scope='module')
def made(real):
    drawn = real.add_column('caption', [c[0] for c in real['captions']])
    return drawn.add_column('sample', [0] * len(drawn))

def test_sets_and_pairs_are_grids(shown, real, made):
    for value in (real, made.remove_columns('captions'), pairs(real, made)):
        assert shown(value)['image/png'][:4] == b'\x89PNG'
    assert 'Dataset' in shown(real)['text/plain']

def test_other_datasets_are_as_they_were(shown, real, made):
    damaged = Dataset.from_list([dict(key='a', image=dict(bytes=b'no picture', path=None), captions=['a'])])
    for other in (Dataset.from_dict(dict(key=['a'], score=[1.])), real.select([]), damaged):
        assert set(shown(other)) == {'text/plain'} and set_as_grid(other) is None
    assert set(shown(Pairs(real, made, [], []))) == {'text/plain'}

def test_a_model_is_a_short_card(shown):
    card = shown(GenReal(load_encoder('embedded')))['text/html']
    assert 'GenReal' in card and 'lora of rank' in card and len(re.findall('<tr', card)) <= 6

def test_results_are_tables_and_a_folder_is_its_page(shown, tmp_path):
    rows = [record('demo', arm, 'emoji', 'B', 'R@1', v, seed=0, n=9) for arm, v in (('gmail', .3), ('<b>', .2))]
    table = shown(ResultTable(rows))['text/html']
    assert '<table' in table and '0.3' in table and '<b>' not in table.replace('<b>R', '')
    (tmp_path/'report.html').write_text(run_page('Aligned', {}, ['Aligning helps.'], {}, None))
    assert shown(show_page(tmp_path))['text/html'].startswith('<iframe')

def test_a_verdict_is_its_sentences(shown):
    said = shown(judged('Aligning', [Measure('the cosine', np.ones(20), np.zeros(20), '', 1, 3)]))['text/plain']
    assert said.startswith('Verdict(helps)\nAligning')
