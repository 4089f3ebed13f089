"The demo in miniature: its parts, its records, and that it repeats."
import inspect
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch

from gmail_nb.encoders import load_encoder, preprocess_images
from gmail_nb.experiments.chain import chain_seed
from gmail_nb.experiments.demo import (
    DEMO_ARMS, PRIMARY, PRIMARY_ROWS, demo, demo_table, demo_verdict, dry_headline, headline_settings, make_side,
    point_of, show_place,
    some_concepts)
from gmail_nb.experiments.protocol import (
    GOOD, TESTS, Claim, Point, by_seed, chain_settings, chosen_settings, claim_difference)
from gmail_nb.files import asset, read_results
from gmail_nb.settings import DemoSettings, ProofSettings, demo_settings
from gmail_nb.stats import DRAWS, Interval, bootstrap, class_mean, paired_difference, resample, verdict

def weight(item): return 60

def small():
    s = DemoSettings()
    return replace(s, align_captions=12, tune_captions=12, validation_captions=4, seeds=2,
                   align=replace(s.align, epochs=2, batch_size=4), tune=replace(s.tune, steps=10))

@pytest.mark.slow
def test_images_of_a_side_lie_by_sample(tmp_path):
    encoder = load_encoder('embedded')
    side = make_side(encoder, 'A', 6, 2, small(), tmp_path)
    assert side.generated_pixels.shape[:2] == (2, 6)
    assert torch.equal(side.generated_pixels[1, 3], preprocess_images(encoder, [side.pairs[7]['generated']])[0])
    assert side.pairs[7]['key'] == side.keys[3]

def test_fewer_concepts_are_among_more():
    assert set(some_concepts('A', 5, 0)['key']) < set(some_concepts('A', 9, 0)['key'])

def test_more_concepts_than_there_are():
    with pytest.raises(ValueError, match='choose between'): some_concepts('B', 10**6, 0)

def test_the_demo_repeats_and_writes_its_records(tmp_path):
    records, again = demo(tmp_path/'one', small()), demo(tmp_path/'two', small())
    assert [r['value'] for r in records] == [r['value'] for r in again]
    assert {r['arm'] for r in records} == {*DEMO_ARMS, 'gmail-indiscriminate'}
    assert (tmp_path/'one'/'report.html').stat().st_size > 50_000
    fields = {'experiment', 'arm', 'dataset', 'split', 'metric', 'value', 'seed', 'n'}
    assert all(fields <= set(r) for r in read_results(tmp_path/'one'/'results.jsonl'))

def test_quick_is_smaller_and_keeps_the_rest():
    for crude in (False, True):
        quick, full = (headline_settings(q, seed=3, crude=crude) for q in (True, False))
        assert quick.align_captions < full.align_captions and quick.align.epochs == 8 and quick.align.seed == 3
        assert quick.draw.steps == full.draw.steps and quick.adapters == full.adapters

def test_the_demo_draws_as_the_generator_does_and_is_set_as_a_chain():
    s = headline_settings(seed=2)
    assert s == chain_settings(ProofSettings(), GOOD, 2, chosen_settings()) and s.draw.steps == GOOD.steps
    other = headline_settings(steps=3, guidance=8.)
    assert (other.draw.steps, other.draw.guidance) == (3, 8) and replace(other, draw=s.draw, seed=2) == replace(
        s, align=other.align, tune=other.tune)

def test_crude_is_what_it_was():
    assert headline_settings(crude=True) == demo_settings() == DemoSettings()
    assert headline_settings(quick=True, seed=4, crude=True) == demo_settings(quick=True, seed=4)
    s = DemoSettings()
    assert (s.draw.steps, s.draw.guidance, s.draw.samples, s.seeds) == (3, 8, 3, 5)

@pytest.mark.slow
def test_the_demo_is_a_point_of_the_chain(tmp_path):
    "The same concepts are found, one by one, by another function in another folder."
    chain = replace(small(), seeds=1, draw=replace(small().draw, samples=1))
    point, head = Point(2, 3.), dict(steps=12, lr=1e-3)
    theirs = chain_seed(point, 1, tmp_path/'chain', head, ProofSettings(chain=chain))
    s = chain_settings(ProofSettings(chain=chain), point, 1, head)
    ours = demo(tmp_path/'demo', replace(s, draw=replace(s.draw, image_format=None)))
    assert point_of(ours) == point
    for arm in DEMO_ARMS:
        for test in TESTS:
            (a,), (b,) = (by_seed(records, arm, point, test).items() for records in (ours, theirs))
            assert a[0] == b[0] == 1 and np.array_equal(a[1], b[1]), (arm, test)

# what ships

def stored(): return read_results(asset('demo', 'results.jsonl'))

def test_the_stored_run_is_a_point_of_the_curve():
    known = read_results(asset('evidence', 'records.jsonl'))
    assert point_of(stored()) == GOOD
    for arm in DEMO_ARMS:
        for test in TESTS:
            assert np.array_equal(by_seed(stored(), arm, GOOD, test)[0], by_seed(known, arm, GOOD, test)[0]), (arm, test)

def test_the_verdict_names_the_metric_then_what_is_not_shown():
    first, lost, main, shown = demo_verdict(stored()).splitlines()
    assert first == PRIMARY and lost.startswith('Not shown') and shown.startswith('Shown')
    d, _ = claim_difference(stored(), Claim('', 'gmail', 'indiscriminate', GOOD))
    r = next(r for r in stored() if (r['arm'], r['metric']) == ('gmail-indiscriminate', 'mean_recall'))
    assert (r['value'], r['low'], r['high']) == d[:3] and verdict(d) in main
    assert 'unseen concepts' in lost # or the front page is to be written anew

def test_the_primary_metric_heads_the_table():
    rows = demo_table(stored())
    assert [r[0] for r in rows[1:3]] == [*PRIMARY_ROWS.values()] and rows[0][1:-1] == [*DEMO_ARMS]
    assert all(len(r) == len(rows[0]) for r in rows)
    assert not any('_' in r[0] for r in rows) and not any(cell == '' for r in rows for cell in r)

def test_records_of_an_older_demo_are_named():
    old = read_results(asset('demo', 'crude.jsonl'))
    with pytest.raises(ValueError, match='before 0.5'): demo_verdict(old)
    assert demo_table(old)[1][0] == 'paired cosine' # the table needs no more than it has

def test_a_run_with_other_steps_stands_among_the_chains():
    own = [dict(r, point=dict(steps=4, guidance=8., trained=1.)) if 'point' in r else r for r in stored()]
    fig = show_place(own)
    left, right = fig.axes
    assert '4 steps, guidance 8, 697 concepts' in fig.get_suptitle()
    assert {t.get_text() for t in left.get_xticklabels()} >= {'3', '4', '16'}
    assert len(right.lines) == 2 * (len(left.lines[0].get_xdata()) + 1) + 1

def test_a_look_beforehand_counts_the_drawings():
    images = {False: dry_headline(), True: dry_headline(quick=True)}
    for quick, looks in images.items():
        s = headline_settings(quick)
        assert f'{s.align_captions * s.draw.samples + s.tune_captions:,} drawings' in looks[-2].note

@pytest.mark.slow
def test_the_crude_run_gives_the_numbers_of_before(tmp_path):
    "To the last digit but for the aligned arm, whose sums fall in another order where threads or processor differ."
    def numbers(records): return {(r['arm'], r['split'], r['metric'], r['seed']): r['value'] for r in records}
    new = numbers(demo(tmp_path, headline_settings(crude=True)))
    old = numbers(read_results(asset('demo', 'crude.jsonl')))
    assert all(new[k] == v if 'gmail' not in k[0] else abs(new[k] - v) < .01 for k, v in old.items())

def test_every_interval_is_drawn_as_often_as_the_demo_draws():
    for function in (resample, bootstrap, paired_difference, class_mean):
        assert inspect.signature(function).parameters['draws'].default == DRAWS == 2000

class Moved(Exception): pass

@pytest.mark.parametrize(
    'name, function',
    [
        ('demo', 'demo'),
        ('retrieval', 'retrieval_world'),
        ('retrieval', 'world_features'),
        ('alignment', 'alignment_runs'),
        ('captioning', 'variant_encoder'),
        ('ifcap', 'ifcap_experiment'),
    ],
)
def test_an_experiment_loads_its_encoder_onto_the_device_that_is_fastest(name, function, tmp_path, monkeypatch):
    room = import_module(f'gmail_nb.experiments.{name}')
    class Loaded:
        def to(self, device): raise Moved(device)
    for loader in ('load_encoder', 'embedded_encoder'):
        if hasattr(room, loader): monkeypatch.setattr(room, loader, lambda *args, **kwargs: Loaded())
    monkeypatch.setattr(room, 'default_device', lambda: 'the fastest')
    if name == 'captioning': arguments = (room.FeatureVariant(), tmp_path)
    elif function == 'world_features': arguments = (tmp_path, DemoSettings())
    else: arguments = (tmp_path,)
    with pytest.raises(Moved, match='the fastest'): getattr(room, function)(*arguments)
