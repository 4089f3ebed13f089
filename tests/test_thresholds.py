"Few pairs and wrong pictures: what is changed, and what is said of it. `thresholds` itself is run in its notebook."
from dataclasses import asdict

import pytest
import torch

from gmail_nb.experiments.demo import Side
from gmail_nb.experiments.protocol import GOOD, TESTS
from gmail_nb.experiments.thresholds import (
    COSTS, HARD, RIGHT_SHARES, THRESHOLD_SHARES, WAYS, half_way, is_of, missing_cells, threshold_arm,
    threshold_cells, threshold_sentences, threshold_table, way_settings, wrong_pictures)
from gmail_nb.settings import ProofSettings

N = 40

def numbered(n=N):
    "Concepts whose picture, feature and real feature are their number."
    x = torch.arange(n).float()
    return Side([str(i) for i in range(n)], [f'thing {i}' for i in range(n)], x.reshape(1, n, 1, 1, 1),
                x[:, None], x[:, None], None)

@pytest.mark.parametrize('right', RIGHT_SHARES)
def test_a_share_of_the_pictures_stays_right(right):
    side = wrong_pictures(numbered(), right, 3)
    picture, partner = side.generated_pixels.flatten(), side.real_features.flatten()
    assert (picture == partner).sum() == round(right * N)
    assert sorted(picture.tolist()) == list(range(N)), 'every picture is used once'
    assert torch.equal(side.generated_features.flatten(), picture)

def test_who_is_right_among_few_is_right_among_more():
    rights = [{i for i, v in enumerate(wrong_pictures(numbered(), r, 0).generated_features.flatten()) if v == i}
              for r in sorted(RIGHT_SHARES)]
    assert all(few <= more for few, more in zip(rights, rights[1:]))

def test_another_seed_makes_others_wrong():
    first, second = (wrong_pictures(numbered(), .5, seed).generated_features for seed in (0, 1))
    assert not torch.equal(first, second)

def test_every_way_differs_from_the_plain_one_in_settings_or_in_code():
    whole, code = ProofSettings().chain, {'half way', 'begun elsewhere'}
    plain = way_settings(whole, 48, 'plain')
    same = {w for w in WAYS if w != 'plain' and way_settings(whole, 48, w) == plain}
    assert same == code

def test_the_name_of_an_arm_says_what_it_is():
    for share, right, way in threshold_cells():
        n = round(share * 772)
        assert is_of(threshold_arm(n, right, way)) == (n, right, way)

def test_half_way_halves_what_lora_adds_and_the_turn_of_the_projection():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A, self.lora_B = (torch.nn.Linear(3, 3, bias=False) for _ in range(2))
            self.proj_gen = torch.nn.Linear(3, 3, bias=False)
    model = Model()
    a, b, w = (p.detach().clone() for p in model.parameters())
    half_way(model)
    assert torch.equal(model.lora_A.weight, a) and torch.equal(model.lora_B.weight, b / 2)
    assert torch.allclose(model.proj_gen.weight, (w + torch.eye(3)) / 2)

def made_up(gains):
    "Records of one chain in which an arm's concepts answer as many more questions as is said."
    point = asdict(GOOD)
    def arm(name, more):
        return dict(arm=name, point=point, metric='mean_recall', split=TESTS['seen'], seed=0,
                    found=str(3 + more) * N, value=(3 + more) / 6)
    gap = dict(arm='generated', point=point, metric='gen_to_real_recall_at_1',
               split='B', value=.4, seed=0)
    records = [arm('indiscriminate', 0), gap]
    for name, more in gains.items(): records += [arm(name, more), gap | dict(arm=name)]
    return records

def test_harm_is_said_first_and_a_threshold_is_read_off():
    n, hard = 48, HARD[1]
    gains = {threshold_arm(n, 1., 'plain'): 2, threshold_arm(n, .5, 'plain'): 1,
             threshold_arm(n, hard, 'plain'): -1, threshold_arm(n, hard, 'half way'): 0}
    records = made_up(gains)
    said = threshold_sentences(records)
    assert said[0] == 'The plain way harms the text side with 48 concepts, 25.0% right.'
    assert 'With 48 concepts it helps from 50.0% right pictures on.' in said
    assert said[-1].startswith('half way, beside the plain way: better (+16.7')
    plain, ways = (threshold_table(records, w) for w in (False, True))
    assert [r[1] for r in plain[2:]] == ['25%', '50%', '100%'] and [r[2] for r in ways[2:]] == ['plain', 'half way']

def test_nothing_is_said_of_chains_that_were_not_run():
    assert threshold_sentences([]) == ['No chain is finished: `gmail_experiment thresholds` runs them.']
    assert len(threshold_table([], True)) == 2

def test_the_grid_holds_the_hard_case():
    cells = threshold_cells()
    assert {c[:2] for c in cells if c[2] == 'plain'} == {(n, r) for n in THRESHOLD_SHARES for r in RIGHT_SHARES}
    assert {c[2] for c in cells if c[:2] == HARD} == set(WAYS)
    costs = [(n, 1., way) for way in COSTS for n in THRESHOLD_SHARES]
    assert [c for c in cells if c[:2] != HARD and c[2] != 'plain'] == costs and set(COSTS) < set(WAYS)

def test_a_chain_runs_what_it_lacks_and_nothing_else():
    "A later way is missing of a chain that has the earlier ones; with other settings of the head, all are."
    chosen = dict(steps=3, lr=1e-3)
    lacking = THRESHOLD_SHARES[0], 1., COSTS[-1]
    arms = [threshold_arm(round(c[0] * 96), *c[1:]) for c in threshold_cells() if c != lacking]
    records = [dict(arm=a, point=asdict(GOOD), seed=0, tune=chosen) for a in arms]
    assert missing_cells(records, 0, chosen, 96) == [lacking]
    others = missing_cells(records, 1, chosen, 96), missing_cells(records, 0, dict(chosen, steps=4), 96)
    assert others == (threshold_cells(), threshold_cells())
