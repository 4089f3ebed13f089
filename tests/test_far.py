"Tests of the experiment on concepts far from those that were aligned."
import numpy as np
import pytest
import torch

from gmail_nb.experiments.curve import stored
from gmail_nb.experiments.far import (LOOK, NEARNESS, added_each, far_sentence, far_table, groups_by, half_difference,
                                      in_order, nearest_in_a)
from gmail_nb.experiments.protocol import GOOD, Point, by_seed

def test_every_concept_is_in_one_group_the_farthest_first():
    near = torch.tensor([.3, .9, .1, .5, .7, .2, .8])
    groups = groups_by(near, 3)
    assert sorted(np.concatenate(groups)) == list(range(7))
    assert [len(g) for g in groups] == [3, 2, 2] and list(groups[0]) == [2, 5, 0]

def test_halves_differ_by_what_is_added_to_each():
    added = np.array([[.1, .2, .5, .9, .4]])
    d = half_difference(torch.arange(5.), added)
    assert d.value == pytest.approx(np.mean([.9, .4]) - np.mean([.1, .2, .5]))

def test_what_is_added_is_the_difference_of_two_arms_chain_by_chain():
    records = stored()
    added = added_each(records)
    ours, theirs = (by_seed(records, arm, GOOD, 'seen') for arm in ('gmail', 'indiscriminate'))
    assert added.shape == (len(ours), 697)
    np.testing.assert_array_equal(added[1], ours[1] - theirs[1])

def test_a_point_without_a_chain_says_what_runs_it():
    with pytest.raises(ValueError, match='no chain is stored at 77 steps.*gmail_experiment curve'):
        added_each(stored(), Point(77, 3.))

class Letters:
    "An encoder whose features say which word a caption begins with."
    device = 'cpu'

def test_nearness_is_to_the_most_similar_concept_of_a(monkeypatch):
    import gmail_nb.experiments.far as far
    rows = dict(B=['north', 'between'], A=['east', 'north'])
    at = dict(north=[0., 1.], east=[1., 0.], between=[.8, .6])
    monkeypatch.setattr(far, 'in_order', lambda split: dict(captions=[[w] for w in rows[split]]))
    monkeypatch.setattr(far, 'encode_texts', lambda encoder, words: torch.tensor([at[w] for w in words]))
    cosines, index = nearest_in_a(Letters(), 'name')
    assert index == [1, 0] and cosines.tolist() == pytest.approx([1, .8])

def test_concepts_are_in_the_order_of_their_keys():
    keys = in_order('A')['key']
    assert list(keys) == sorted(keys) and len(keys) == 772

def test_another_measure_is_refused():
    with pytest.raises(KeyError): nearest_in_a(Letters(), 'taste')
    assert LOOK in NEARNESS

def test_the_sentence_says_whom_it_speaks_of_and_the_table_has_a_row_a_group():
    records, near = stored(), torch.linspace(0, 1, 697)
    said = far_sentence(records, near, 'chance')
    assert said.startswith('By chance: for the quarter farthest from A') and '[' in said
    assert [r[0] for r in far_table(records, near, k=3)] == ['from far to near', '1 of 3', '2 of 3', '3 of 3']

def test_every_question_to_the_chains_names_an_arm_that_a_finished_chain_has():
    "By which its dry run tells what is left."
    from gmail_nb.cli.commands import CHAIN_EXPERIMENTS
    arms = {r['arm'] for r in stored()}
    assert {arm for _, arm, _ in CHAIN_EXPERIMENTS.values()} <= arms
