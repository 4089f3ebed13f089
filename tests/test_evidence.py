"The evidence: its protocol, its chains, the records that ship and the page that they give."
import ast
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from house import cells_of, source_of

from gmail_nb.data import emoji
from gmail_nb.encoders import load_encoder
from gmail_nb.experiments import chain, controls, curve, demo, evidence, report, unseen
from gmail_nb.experiments.chain import best_setting, chain_fingerprint
from gmail_nb.experiments.protocol import (
    CHOOSING_STYLE, CLAIMS, CONTROLS, CURVES, GOOD, PRIMARY_METRICS, STATES, TESTS, Claim, Point, arm_record, by_seed,
    caption_record, chain_settings, chosen_settings, claims_table, claim_difference, found, is_validation, six_recalls,
    said_first, scores, state)
from gmail_nb.files import asset, read_results
from gmail_nb.retrieval import WAYS
from gmail_nb.settings import DemoSettings, ProofSettings, proof_settings
from gmail_nb.stats import Interval, paired_difference, verdict

def weight(item): return 60

def ranks(seed, n=40, worst=30):
    g = torch.Generator().manual_seed(seed)
    return {way: torch.randint(0, worst, (n,), generator=g) for way in WAYS}

def made_up(arm, seeds=2, point=GOOD, worst=30, test='seen'):
    return [arm_record(point, arm, s, test, ranks(s, worst=worst)) for s in range(seeds)]

def miniature():
    s = ProofSettings().chain
    s = replace(s, align_captions=16, tune_captions=16, validation_captions=4, draw=replace(s.draw, samples=1),
                align=replace(s.align, epochs=1, batch_size=8))
    return ProofSettings(chain=s, seeds=1, steps=(2, 4), rates=(1e-3,), head_steps=3)

CRUDE, HEAD = Point(1, 3.), dict(steps=3, lr=1e-3)

# the protocol

def test_mean_recall_is_the_mean_of_the_six_recalls():
    r = ranks(0)
    assert found(r).float().mean().item() / 6 == pytest.approx(np.mean(list(six_recalls(r).values())))
    kept = arm_record(GOOD, 'gmail', 0, 'seen', r)
    assert scores(kept).mean() == pytest.approx(kept['value']) and len(kept['found']) == kept['n'] == 40

def test_a_claim_takes_the_seeds_that_both_arms_have():
    records = made_up('gmail', 3) + made_up('indiscriminate', 2)
    d, seeds = claim_difference(records, Claim('', 'gmail', 'indiscriminate'))
    ours, theirs = (
        np.stack([by_seed(records, a, GOOD, 'seen')[s] for s in (0, 1)]) for a in ('gmail', 'indiscriminate')
    )
    assert seeds == 2 and d == paired_difference(ours, theirs)

def test_a_claim_of_two_points_is_a_difference_of_differences():
    poor = Point(1, 3.)
    records = made_up('gmail', point=poor, worst=12) + made_up('indiscriminate', point=poor, worst=60)
    records += made_up('gmail') + made_up('indiscriminate')
    d, _ = claim_difference(records, Claim('', 'gmail', 'indiscriminate', poor, less=GOOD))
    alone, _ = claim_difference(records, Claim('', 'gmail', 'indiscriminate', poor))
    assert d.value == pytest.approx(alone.value) and d.low > 0 # there is none at the other point

def test_failed_claims_stand_first_and_a_margin_is_a_margin():
    records = made_up('gmail', worst=12) + made_up('base', worst=60) + made_up('real', worst=12)
    claims = (Claim('not run', 'gmail', 'ridge'), Claim('better', 'gmail', 'base'), Claim('equal', 'gmail', 'real'),
              Claim('not worse', 'gmail', 'real', margin=.02))
    assert [r[:2] for r in claims_table(records, claims)[1:]] == [
        ['equal', 'cannot be told so far'], ['better', 'confirmed so far'], ['not worse', 'confirmed so far'],
        ['not run', 'not run']]
    whole = made_up('gmail', 5, worst=12) + made_up('base', 5, worst=60)
    assert claims_table(whole, claims[1:2])[1][1] == 'confirmed'
    told = 'Failed:\n  - none\nCannot be told:\n  - equal\nOne chain alone:\n  - none'
    assert said_first(records, claims).endswith(told)
    one = made_up('gmail', 1, worst=12) + made_up('base', 1, worst=60)
    assert [r[1] for r in claims_table(one, claims[1:2])[1:]] == ['one chain alone'] # items alone confirm nothing
    assert said_first(one, claims[1:2]).endswith('One chain alone:\n  - better')

@pytest.mark.parametrize('low, high, plain, may_lose_two', [
    (.01, .03, 'confirmed', 'confirmed'), (0., .03, 'cannot be told', 'confirmed'),
    (-.01, .03, 'cannot be told', 'confirmed'), (-.03, .03, 'cannot be told', 'cannot be told'),
    (-.03, -.01, 'failed', 'cannot be told'), (-.05, -.03, 'failed', 'failed')])
def test_failed_is_an_interval_on_the_wrong_side(low, high, plain, may_lose_two):
    d = Interval((low + high) / 2, low, high)
    assert state(Claim('', 'gmail', 'base'), d, 5) == plain
    assert state(Claim('', 'gmail', 'base', margin=.02), d, 5) == may_lose_two

def test_the_words_of_the_protocol_are_those_of_the_statistics():
    "A claim without a margin is confirmed where `verdict` says helps, and failed where it says hurts."
    words = dict(helps='confirmed', hurts='failed')
    for ends in ((.01, .02), (-.01, .02), (-.02, -.01)):
        d = Interval(0., *ends)
        assert state(Claim('', 'gmail', 'base'), d, 5) == words.get(verdict(d), 'cannot be told')

def test_one_thing_varies_at_a_time():
    for axis, points in CURVES.items():
        fields = [tuple(asdict(p).values()) for p in points]
        assert sum(len(set(column)) > 1 for column in zip(*fields)) == 1, axis
    assert {c.theirs for c in CLAIMS} >= {*CONTROLS, 'indiscriminate', 'matched', 'base'}

# choosing

def test_choosing_reads_neither_b_nor_the_style_of_the_test(tmp_path, monkeypatch):
    read = []
    def watched(split=None, source=None, extra=False):
        read.append((split, source, extra))
        return emoji(split, source, extra)
    for room in (chain, demo): monkeypatch.setattr(room, 'emoji', watched)
    seen = chain.seen_drawings
    monkeypatch.setattr(chain, 'seen_drawings', lambda part: tuple(rows[:40] for rows in seen(part))) # for time
    chosen = chain.choose_settings(tmp_path, miniature(), (CRUDE,))
    assert read and all(
        extra or (split, source) in (('A', 'noto'), ('A', CHOOSING_STYLE)) for split, source, extra in read
    )
    kept = json.loads((tmp_path/'chosen.json').read_text())
    assert chosen == kept['chosen'] == best_setting(kept['scores'])
    assert chain.choose_settings(tmp_path, miniature(), (CRUDE,)) == chosen == chosen_settings(tmp_path)

def test_the_blind_heads_have_seen_no_validation_family():
    _, _, keys = chain.seen_drawings(3)
    kept_out = {r['key'] for r in emoji('A', 'noto').remove_columns('image') if is_validation(r['family'], 3)}
    assert kept_out and not kept_out & set(keys)

def test_fewer_steps_where_two_settings_are_equal():
    rows = [dict(steps=n, lr=lr, mean_recall=.5) for n in (200, 100) for lr in (1e-3, 3e-3)]
    assert best_setting(rows)['steps'] == 100

# chains

def test_a_seed_moves_the_images_the_alignment_and_the_tuning():
    one, two = (chain_settings(ProofSettings(), GOOD, seed, HEAD) for seed in (0, 1))
    assert one.seed != two.seed and one.align.seed != two.align.seed and one.tune.seed != two.tune.seed
    assert replace(one, seed=1, align=two.align, tune=two.tune) == two

def test_a_chain_is_read_again_and_depends_on_its_settings(tmp_path):
    encoder, s = load_encoder('embedded'), miniature()
    first = chain.chain_seed(CRUDE, 0, tmp_path, HEAD, s, encoder)
    assert {r['arm'] for r in first} == {'base', 'indiscriminate', 'gmail', 'matched', 'real', 'generated', 'aligned'}
    assert {r['split'] for r in first if r['metric'] == 'mean_recall'} == set(TESTS.values())
    assert all(len(r['recalls']) == 6 for r in first if r['metric'] == 'mean_recall')
    assert chain.chain_seed(CRUDE, 0, tmp_path, HEAD, s, encoder) == first
    asked = CRUDE, 0, tmp_path, HEAD, s, encoder, 'controls', controls.control_records
    more = chain.chain_seed(*asked)
    assert chain.chain_seed(*asked) == more != first
    assert {r['arm'] for r in more} == set(CONTROLS)
    gathered = curve.gathered(tmp_path)
    assert len({json.dumps(r, sort_keys=True) for r in gathered}) == len(gathered)
    assert curve.joined(gathered, gathered) == gathered
    for arm in ('gmail', 'ridge'): assert curve.is_stored(gathered, CRUDE, 0, HEAD, arm)
    settings = [chain_settings(s, CRUDE, 0, h) for h in (HEAD, dict(HEAD, steps=4))]
    assert len({chain_fingerprint(encoder, c, 'embedded') for c in settings}) == 2

def test_a_generator_that_was_not_trained_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='30_generator'): chain.generator_of(Point(16, 3., .3), tmp_path)

def test_a_cycle_gives_nobody_its_own_partner():
    real = torch.arange(9.)[:, None]
    side = demo.Side(list(range(9)), [], torch.zeros(1), torch.zeros(1), real, None)
    for seed in range(5):
        other = controls.shuffled_pairs(side, seed).real_features
        assert (other != real).all() and sorted(other.flatten().tolist()) == real.flatten().tolist()

def test_quick_is_smaller_and_keeps_the_generator():
    quick, full = proof_settings(quick=True), proof_settings(seeds=3)
    assert quick.seeds == 1 and full.seeds == 3 and quick.chain.align_captions < full.chain.align_captions
    assert quick.chain.draw.steps == full.chain.draw.steps and full.chain.adapters == DemoSettings().adapters

# what ships

@pytest.fixture(scope='module')
def stored_page(): return evidence.evidence_page(curve.stored())

def test_the_page_is_made_of_the_records_byte_for_byte(stored_page):
    assert stored_page.encode() == asset('evidence', 'page.md').read_bytes()

def test_the_runs_used_the_settings_that_were_chosen():
    chosen, times = chosen_settings(), {**controls.LONGER}
    kept = json.loads(asset('evidence', 'chosen.json').read_text())
    assert kept['chosen'] == best_setting(kept['scores'])
    lora = unseen.lora_tune(chain_settings(ProofSettings(), GOOD, 0, chosen))
    own = {unseen.kept_arm('a tenth of the rate'): dict(chosen, lr=chosen['lr'] / 10),
           unseen.kept_arm('LoRA in the tower'): dict(steps=lora.steps, lr=lora.lr)}
    tuned = [r for r in curve.stored() if 'tune' in r]
    assert tuned
    for r in tuned:
        plain = dict(chosen, steps=chosen['steps'] * times.get(r['arm'], 1))
        assert r['tune'] == pytest.approx(own.get(r['arm'], plain)), r['arm']

def test_records_that_ship_are_whole():
    records = read_results(asset('evidence', 'records.jsonl'))
    for r in records:
        if r['metric'] != 'mean_recall': continue
        assert r['n'] == len(r['found']) == {'B-twemoji': 697, 'unseen-twemoji': 130}[r['split']]
        assert scores(r).mean() == pytest.approx(r['value'], abs=1e-6)
        assert np.mean(list(r['recalls'].values())) == pytest.approx(r['value'], abs=1e-5)
    chains = {(r['seed'], tuple(r['point'].values())) for r in records}
    for seed, point in chains:
        arms = {r['arm'] for r in records if (r['seed'], tuple(r['point'].values())) == (seed, point)}
        assert arms >= {'base', 'indiscriminate', 'gmail', 'matched', 'real'}

def test_the_page_names_what_the_records_hold(stored_page):
    "A section for captions and one for shares, where there are such records, and none where there are not."
    records, page = curve.stored(), stored_page
    captions, shares = (any(r['metric'] == 'CIDEr' for r in records),
                        any(r['arm'].startswith('both, ') for r in records))
    assert ('## Captions' in page) == captions and ('mix is worth' in page) == shares
    plain = [r for r in records if r['metric'] != 'CIDEr' and ' of real' not in r['arm']]
    assert '## Captions' not in evidence.evidence_page(plain)

def test_the_demo_speaks_of_its_own_arms_alone():
    "A claim about captions or shares of real images is none of a run that has neither."
    said = demo.demo_claims(GOOD)
    assert said and all(c.metric == 'mean_recall' and c.ours == 'gmail' for c in said)

def test_every_state_has_a_place():
    states = [STATES.index(r[1].removesuffix(' so far')) for r in claims_table(curve.stored())[1:]]
    assert states == sorted(states) and len(states) == len(CLAIMS)

# pages that are made of records

def test_a_metric_is_primary_before_a_table_asks_for_it():
    "The first column of every table of captions, classes and questions, by which its claims are judged."
    first = {n: report.EMBEDDED[n].columns[0].metric for n in ('table2', 'table3', 'table5', 'table7')}
    assert set(first.values()) == {PRIMARY_METRICS['retrieval']}
    captions = [n for n, c in report.EMBEDDED.items() if c.rows and c.rows[0].part in ('captions', 'variants')]
    assert {report.EMBEDDED[n].columns[0].metric for n in captions} == {PRIMARY_METRICS['captions']}
    assert report.EMBEDDED['table10'].columns[0].metric == PRIMARY_METRICS['questions'] == PRIMARY_METRICS['classes']

def test_captions_have_their_own_number_of_chains():
    poor = Point(3, GOOD.guidance)
    records = made_up('gmail', 3, poor) + made_up('indiscriminate', 3, poor)
    for arm, seeds in (('gmail', 2), ('indiscriminate', 1)):
        records += [caption_record(poor, arm, s, np.full(40, .5)) for s in range(seeds)]
    head, row = curve.curve_table(records, 'steps')
    assert head[-4:] == ['gmail - indiscriminate [95%]', 'chains', 'the same in CIDEr', 'its chains']
    assert (row[-3], row[-1]) == ('3', '1')

def shown_by(source, names):
    "Run a cell, and give what its last expression is."
    *body, last = ast.parse('\n'.join(l for l in source.splitlines() if not l.startswith('#|'))).body
    exec(compile(ast.Module(body, []), 'index', 'exec'), names)
    if isinstance(last, ast.Expr): return eval(compile(ast.Expression(last.value), 'index', 'eval'), names)
    exec(compile(ast.Module([last], []), 'index', 'exec'), names)

def test_the_front_page_says_what_the_records_say():
    "Every cell of index that reads records and not a run is run again; its text must be the one that is stored."
    names, compared = {}, 0
    for cell in cells_of('index'):
        if cell['cell_type'] != 'code' or 'echo: false' not in source_of(cell): continue
        value = shown_by(source_of(cell), names)
        kept = [out['data']['text/markdown'] for out in cell['outputs'] if 'text/markdown' in out.get('data', {})]
        assert len(kept) == isinstance(value, names['Markdown'] if 'Markdown' in names else ()), cell['id']
        for text in kept:
            assert value.data == ''.join(text), f"{cell['id']}: run index again, then tools/readme.py"
            compared += 1
    assert compared and {'stored', 'CLAIMS'} & {*names}
