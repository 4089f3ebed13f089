"The study of the alignment in miniature: what a variant changes, one row a caption or two, records and what may be said."

from dataclasses import asdict, replace
from inspect import signature

import pytest
import torch

from gmail_nb.encoders import load_encoder
from gmail_nb.experiments.alignment import (
    MEASURES, REFERENCE, STUDY, VARIANTS, Variant, alignment_experiment, alignment_records, alignment_runs,
    alignment_table, alignment_verdict, sampled_rows)
from gmail_nb.experiments.demo import make_side
from gmail_nb.files import read_results
from gmail_nb.settings import STUDY_SEEDS, DemoSettings
from gmail_nb.stats import Interval, verdict

def weight(item): return 60

FEW = (REFERENCE, 'full tuning', 'projections only', 'all negatives', 'samples not as negatives')

def small():
    s = DemoSettings()
    return replace(s, align_captions=24, tune_captions=24, draw=replace(s.draw, samples=2, steps=1),
                   align=replace(s.align, epochs=2, batch_size=12))

@pytest.fixture(scope='module')
def home(tmp_path_factory): return tmp_path_factory.mktemp('alignment')

@pytest.fixture(scope='module')
def found(home): return alignment_runs(home, small(), {n: VARIANTS[n] for n in FEW}, seeds=2)

def test_a_variant_changes_nothing_else():
    s = DemoSettings()
    assert Variant().applied(s) == s
    for name, v in VARIANTS.items():
        changed = v.applied(s)
        assert (changed.draw, changed.tune, changed.seed) == (s.draw, s.tune, s.seed), name
        for part, said in (('adapters', v.adapters), ('align', v.align)):
            before, after = asdict(getattr(s, part)), asdict(getattr(changed, part))
            assert {k for k in before if before[k] != after[k]} <= set(said), name

def test_the_study_is_the_demo_but_for_its_epochs():
    s = DemoSettings()
    assert replace(STUDY, align=replace(STUDY.align, epochs=s.align.epochs)) == s

def test_seeds_and_settings_of_the_study_have_one_home():
    for function in (alignment_runs, alignment_experiment):
        assert signature(function).parameters['seeds'].default == STUDY_SEEDS
    assert signature(alignment_experiment).parameters['settings'].default is STUDY

def test_the_sigmoid_loss_has_its_own_temperature():
    assert VARIANTS['sigmoid'].applied(DemoSettings()).align.temperature == .1

def test_runs_are_read_again(home, found):
    files = {p.name: p.stat().st_mtime_ns for p in (home/'variants').glob('*.safetensors')}
    again = alignment_runs(home, small(), {n: VARIANTS[n] for n in FEW}, seeds=2)
    assert len(files) == 10
    assert files == {p.name: p.stat().st_mtime_ns for p in (home/'variants').glob('*.safetensors')}
    assert all(torch.equal(x['ranks'], y['ranks']) for n in FEW for x, y in zip(found[n], again[n]))

def test_the_table_names_every_variant_and_the_base(found):
    assert {r[0] for r in alignment_table(alignment_records(found))[1:]} == {*FEW, 'base'}

def test_records_of_every_seed_and_difference(found):
    records = alignment_records(found)
    assert len(records) == 6 * 2 * 2 + 5 * 2
    assert all(r['low'] <= r['value'] <= r['high'] for r in records if 'low' in r)

def test_another_reference_is_allowed(found):
    records = alignment_records(found, 'full tuning')
    assert {r['arm'] for r in records if 'low' in r} == {
        f'{n} - full tuning' for n in (*FEW, 'base') if n != 'full tuning'
    }


def test_the_verdict_names_its_reference(found):
    for m in MEASURES:
        assert alignment_verdict(alignment_records(found), m).startswith(f"By {m}, against 'the demo")

@pytest.mark.parametrize('low, high', [(.1, .2), (-.2, -.1), (-.1, .1)])
def test_the_verdict_is_in_the_words_of_stats(found, low, high):
    records = [dict(r, low=low, high=high) if 'low' in r else r for r in alignment_records(found)]
    said = verdict(Interval(0, low, high))
    text = ' '.join(alignment_verdict(records).split()) # long lists are wrapped
    assert f'{said}: {", ".join((*FEW[1:], "base"))}' in text and text.count(': none') == 2

def test_the_experiment_writes_records_table_and_figures(home, found):
    records = alignment_experiment(home, small(), {n: VARIANTS[n] for n in FEW}, seeds=2)
    assert [r['value'] for r in records] == [r['value'] for r in alignment_records(found)]
    assert len(read_results(home/'alignment_results.jsonl')) == len(records)
    assert REFERENCE in (home/'alignment_table.txt').read_text()
    assert all((home/f'alignment_{m}.png').stat().st_size > 1000 for m in MEASURES)

def test_unknown_way_of_using_samples(home):
    side = make_side(load_encoder('embedded'), 'A', 24, 2, small(), home)
    with pytest.raises(ValueError, match="'all'"): sampled_rows(side, 'al')
