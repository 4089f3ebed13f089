"The demo in miniature: its parts, its records, and that it repeats."
import inspect
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from gmail_nb.encoders import load_encoder, preprocess_images
from gmail_nb.experiments.demo import ARMS, demo, demo_verdict, make_side, some_concepts
from gmail_nb.files import asset, read_results
from gmail_nb.settings import DemoSettings, demo_settings
from gmail_nb.stats import DRAWS, Interval, bootstrap, class_mean, paired_difference, resample, verdict

def weight(item): return 60

def small():
    s = DemoSettings()
    return replace(s, align_captions=12, tune_captions=12, validation_captions=4, seeds=2,
                   align=replace(s.align, epochs=2, batch_size=4), tune=replace(s.tune, steps=10))

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
    assert {r['arm'] for r in records} == {*ARMS, 'gmail-indiscriminate'}
    assert (tmp_path/'one'/'report.html').stat().st_size > 50_000
    fields = {'experiment', 'arm', 'dataset', 'split', 'metric', 'value', 'seed', 'n'}
    assert all(fields <= set(r) for r in read_results(tmp_path/'one'/'results.jsonl'))

def test_quick_is_smaller_and_keeps_the_rest():
    quick, full = demo_settings(quick=True, seed=3), demo_settings(seed=3)
    assert quick.align_captions < full.align_captions and quick.align.epochs == 8 and quick.align.seed == 3
    assert quick.draw.steps == full.draw.steps and quick.adapters == full.adapters

def test_the_verdict_of_the_demo_is_a_sentence_of_stats():
    stored = read_results(asset('demo', 'results.jsonl'))
    wanted = 'gmail-indiscriminate', 'text_to_image_recall_at_1'
    r = next(r for r in stored if (r['arm'], r['metric']) == wanted)
    assert verdict(Interval(r['value'], r['low'], r['high'])) in demo_verdict(stored)

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
    if name == 'captioning': arguments = (room.Variant(), tmp_path)
    elif function == 'world_features': arguments = (tmp_path, DemoSettings())
    else: arguments = (tmp_path,)
    with pytest.raises(Moved, match='the fastest'): getattr(room, function)(*arguments)
