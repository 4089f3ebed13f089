"Captions on the curve: one base a seed, records that hold every caption, and claims in CIDEr."
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gmail_nb.experiments import caption_curve, curve
from gmail_nb.experiments.captioning import CaptionWorld
from gmail_nb.experiments.protocol import (
    CAPTION_POINTS, CLAIMS, CURVES, GOOD, Claim, arm_record, by_seed, caption_record, claim_difference, scores)
from gmail_nb.retrieval import WAYS
from gmail_nb.settings import CaptionExperimentSettings

def weight(item): return 20

SHORT = replace(CaptionExperimentSettings(), layers=1, width=32, base_steps=3, tune_steps=3)

def world(shift=0.):
    g = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(12, 256, generator=g), dim=-1)
    moved = F.normalize(x + shift, dim=-1)
    names = [[f'a {colour} {thing}'] for colour in ('red', 'green', 'blue') for thing in ('cat', 'dog', 'car', 'hat')]
    references = {str(i): n for i, n in enumerate(names)}
    return CaptionWorld((torch.stack([x, x]), names), dict(indiscriminate=moved, gmail=x), names, x, references)

def made_up(arm, value, seeds=2, point=GOOD, n=20):
    rng = np.random.default_rng(0)
    return [caption_record(point, arm, s, value + rng.random(n)) for s in range(seeds)]

def test_points_of_a_seed_share_the_base_and_other_seeds_do_not():
    before, w = [], world()
    first = caption_curve.caption_records(caption_curve.seed_arms(w, SHORT, 0, before), GOOD)
    again = caption_curve.caption_records(caption_curve.seed_arms(w, SHORT, 0, before), GOOD)
    alone = caption_curve.caption_records(caption_curve.seed_arms(w, SHORT, 0, []), GOOD)
    assert [r['each'] for r in first] == [r['each'] for r in again] == [r['each'] for r in alone]
    caption_curve.seed_arms(w, SHORT, 1, before)
    assert before[1].base is before[0].base and before[2].base is None

def test_arms_of_equal_images_say_the_same():
    "Same base, same captions, same order: the images are all that differs."
    records = caption_curve.caption_records(caption_curve.seed_arms(world(), SHORT, 0, []), GOOD)
    each = {r['arm']: r['each'] for r in records}
    assert list(each) == ['base', 'indiscriminate', 'gmail'] and each['indiscriminate'] == each['gmail']
    assert all(r['captioner'] == caption_curve.captioner_card(SHORT) for r in records)

def test_an_empty_caption_has_a_score():
    each = caption_curve.cider_of(['', 'a red cat'], {'1': ['a blue dog'], '2': ['a red cat']})
    assert each[0] == 0 and each[1] > 1

def test_a_record_holds_every_caption():
    r = caption_record(GOOD, 'gmail', 0, np.array([0, 1.23456, 10]))
    assert r['each'] == [0, 1235, 10000] and r['n'] == 3
    assert scores(r).mean() == pytest.approx(r['value'])

def test_cider_and_mean_recall_are_never_mixed():
    ranks = {way: torch.zeros(20).long() for way in WAYS}
    recalls = [arm_record(GOOD, arm, s, 'seen', ranks) for arm in ('gmail', 'indiscriminate') for s in range(2)]
    records = recalls + made_up('gmail', 2) + made_up('indiscriminate', 1, seeds=1)
    d, seeds = claim_difference(records, Claim('', 'gmail', 'indiscriminate', metric='CIDEr'))
    assert seeds == 1 and d.value == pytest.approx(1, abs=1e-3)
    d, seeds = claim_difference(records, Claim('', 'gmail', 'indiscriminate'))
    assert seeds == 2 and d.value == 0 and len(by_seed(records, 'gmail', GOOD, 'seen')[0]) == 20

def test_claims_about_captions_are_of_points_on_the_curve():
    own = caption_curve.caption_claims()
    assert len(own) == 4 and set(own) <= set(CLAIMS) and {c.point for c in own} == set(CAPTION_POINTS)
    assert set(CAPTION_POINTS) <= set(CURVES['steps']) and all(c.measure == 'points of CIDEr' for c in own)

def test_the_table_of_the_curve_has_captions_where_there_are_some():
    ranks = {way: torch.zeros(20).long() for way in WAYS}
    recalls = [arm_record(GOOD, arm, 0, 'seen', ranks) for arm in ('gmail', 'indiscriminate')]
    without = curve.curve_table(recalls, 'steps')
    whole = curve.curve_table(recalls + made_up('gmail', 2) + made_up('indiscriminate', 1), 'steps')
    assert 'the same in CIDEr' not in without[0] and whole[0][-2] == 'the same in CIDEr'
    assert whole[1][-2].startswith('+100.0') and whole[1][-1] == '2', 'two chains of captions'
    assert whole[1][-3] == without[1][-1] == '1', 'one of recalls'
    assert curve.caption_table(recalls)[1:] == []

def test_captions_of_other_settings_are_run_again():
    card = caption_curve.captioner_card(SHORT)
    records = [dict(r, captioner=card) for arm in ('gmail', 'indiscriminate') for r in made_up(arm, 1)]
    assert caption_curve.has_captions(records, GOOD, 0, SHORT)
    assert not caption_curve.has_captions(records, GOOD, 2, SHORT)
    assert not caption_curve.has_captions(records, GOOD, 0, replace(SHORT, tune_steps=9))
    assert caption_curve.has_captions(records, GOOD, 0, replace(SHORT, seeds=1)) # how many there are changes nothing

def test_captions_that_ship_are_whole():
    found = [r for r in curve.stored() if r['metric'] == 'CIDEr']
    for r in found:
        assert r['n'] == len(r['each']) == 697 and scores(r).mean() == pytest.approx(r['value'], abs=1e-9)
        assert r['captioner'] == caption_curve.captioner_card(CaptionExperimentSettings())
    for seed, steps in {(r['seed'], r['point']['steps']) for r in found}:
        arms = {r['arm'] for r in found if (r['seed'], r['point']['steps']) == (seed, steps)}
        assert arms == {'base', 'indiscriminate', 'gmail'}
