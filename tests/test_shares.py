"Shares of real images: what the arms learn from, what a generated image is worth, and the records that ship."
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gmail_nb.encoders import load_encoder
from gmail_nb.experiments import chain, curve, shares
from gmail_nb.experiments.demo import make_side
from gmail_nb.experiments.protocol import (
    CLAIMS, GOOD, SHARE_ARMS, SHARES, Point, arm_record, chain_settings, chosen_settings, share_arm)
from gmail_nb.retrieval import WAYS
from gmail_nb.settings import ProofSettings

def weight(item): return 60

CRUDE, HEAD = Point(1, 3.), dict(steps=3, lr=1e-3)

def miniature():
    s = ProofSettings().chain
    s = replace(s, align_captions=16, tune_captions=32, validation_captions=4, draw=replace(s.draw, samples=1),
                align=replace(s.align, epochs=1, batch_size=8))
    return ProofSettings(chain=s, seeds=1, steps=(2, 4), rates=(1e-3,), head_steps=3)

def features(n=32):
    g = torch.Generator().manual_seed(0)
    return {k: F.normalize(torch.randn(n, 256, generator=g), dim=-1) for k in ('b_generated', 'b_aligned', 'b_real')}

def record_of(arm, right, seed, n=64):
    "An arm that answers all questions of the first concepts, and none of the others."
    ranks = torch.full((n,), 50)
    ranks[:right] = 0
    return arm_record(GOOD, arm, seed, 'seen', dict.fromkeys(WAYS, ranks))

def made_up(real, seeds=2, **others):
    arms = {share_arm('real', s): v for s, v in zip(SHARES, real)} | others
    return [record_of(arm, right, seed) for arm, right in arms.items() for seed in range(seeds)]

def test_shares_are_nested_and_a_seed_has_its_own():
    rows = [set(shares.share_indices(697, s, 3).tolist()) for s in SHARES]
    assert all(few < many for few, many in zip(rows, rows[1:]))
    assert [len(r) for r in rows] == [round(697 * s) for s in SHARES]
    assert rows[1] != set(shares.share_indices(697, SHARES[1], 4).tolist())

def test_mix_and_both_differ_in_the_generated_images_alone():
    x = features()
    for share in SHARES[1:]:
        made, rows = shares.share_features(x, share, 0), shares.share_indices(32, share, 0)
        for kind, generated in (('mix', 'b_generated'), ('both', 'b_aligned')):
            first, second = made[share_arm(kind, share)].features
            assert torch.equal(first, x[generated]) and torch.equal(second[rows], x['b_real'][rows])
            rest = [i for i in range(32) if i not in rows.tolist()]
            assert torch.equal(second[rest], x[generated][rest])
        if share < 1: assert torch.equal(made[share_arm('real', share)].features, x['b_real'][rows])
    assert 'real' not in shares.share_features(x, 1, 0) # the chain has it

def test_nothing_but_the_alignment_is_between_mix_and_both(tmp_path):
    "Where it changes nothing, both arms come out alike: same captions, same order, same draws."
    s, encoder = chain_settings(miniature(), CRUDE, 0, HEAD), load_encoder('embedded')
    b = make_side(encoder, 'B', 32, 1, s, tmp_path)
    x = dict(b_generated=b.generated_features, b_aligned=b.generated_features, b_real=b.real_features)
    tests = chain.chain_tests(encoder, b, tmp_path)
    records = shares.share_records(chain.Chain(encoder, None, b, x, tests, CRUDE, 0, s))
    found = {(r['arm'], r['split']): r['found'] for r in records}
    assert len(records) == len(found) == 2 * (len(SHARE_ARMS) * len(SHARES[1:]) - 1)
    for share in SHARES[1:]:
        for split in {split for _, split in found}:
            assert found[share_arm('mix', share), split] == found[share_arm('both', share), split]

def test_no_share_and_all_of_them_are_arms_of_the_chain():
    assert [share_arm(kind, 0) for kind in SHARE_ARMS] == ['indiscriminate', 'gmail', 'base']
    assert share_arm('real', 1) == 'real' and share_arm('both', 1/16) == 'both, 1/16 of real'

@pytest.mark.parametrize('level, share', [(5, 0), (15, 1/8), (20, 1/4), (30, .75), (40, 1), (50, 1)])
def test_a_level_is_reached_where_the_straight_line_meets_it(level, share):
    assert shares.reached((0, 1/4, 1/2, 1), np.array([10, 20, 18, 42]), level) == pytest.approx(share, abs=.05)

def test_generated_images_are_worth_as_many_real_ones_as_reach_as_far():
    real = (4, 8, 12, 20, 36, 60) # of 64 concepts
    records = made_up(real, indiscriminate=20, gmail=36)
    assert shares.worth(records, 'indiscriminate').value == pytest.approx(1/4)
    assert shares.worth(records, 'gmail').value == pytest.approx(1/2)
    more = shares.worth(records, 'gmail', 'indiscriminate')
    assert more.value == pytest.approx(1/4) and more.low <= more.value <= more.high
    assert 'worth more: +16' in shares.worth_sentence(records, concepts=64)

def test_a_page_without_shares_says_so():
    with pytest.raises(ValueError, match='gmail_experiment shares'): shares.show_shares([])
    assert shares.finished_shares(made_up((1, 2, 3, 4, 5, 6), indiscriminate=3, gmail=4)) == [0]

def test_every_claim_about_shares_is_of_two_arms_that_are_run():
    run = {share_arm(kind, s) for kind in SHARE_ARMS for s in SHARES}
    own = shares.share_claims()
    assert len(own) == 2 * len(SHARES[1:]) and {a for c in own for a in (c.ours, c.theirs)} <= run
    assert set(own) <= set(CLAIMS)

def test_shares_that_ship_are_whole():
    records, arms = curve.stored(), {share_arm(k, s) for k in SHARE_ARMS for s in SHARES[1:]}
    for r in records:
        if ' of real' not in r['arm']: continue # `real` itself is an arm of every chain
        assert r['tune'] == chosen_settings() and r['point'] == dict(steps=16, guidance=3., trained=1.)
    seeds = {r['seed'] for r in records if r['arm'] == share_arm('both', 1)}
    for seed in seeds: assert arms <= {r['arm'] for r in records if r['seed'] == seed}
