"""The pull towards `f_r`: what it adds to Eq. 1, in every kind of tower, in parts, with a frozen prefix, with tokens and
after a stop; and that a run without it is what it was."""
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from gmail_nb.encoders import encode_images
from gmail_nb.prefix import FrozenPrefix
from gmail_nb.settings import AlignSettings, RunSettings
from gmail_nb.train import GeneratedSide, align, alignment_parameters, checkpoints_in
from test_tokens import model_of, towers, x_g, x_r

def weight(item): return 20

short = AlignSettings(epochs=2, batch_size=16, pull_weight=3.)

@pytest.fixture(scope='module')
def real(): return encode_images(model_of().real_features, x_r)

def trained(real, settings=short, model=None, **how):
    "The history, all trained weights in one vector, and the model."
    model = model or model_of()
    history = align(model, x_g, real, settings, how.pop('evaluate', None), **how)
    return history, torch.cat([p.detach().flatten() for p in alignment_parameters(model)]), model

@pytest.fixture(scope='module')
def plain(real): return trained(real)

def way_gone(model):
    "1 - cosine of the same generated images through both towers."
    with torch.no_grad():
        return 1 - F.cosine_similarity(model.encode_generated(x_g), model.real_features(x_g)).mean().item()

@pytest.mark.parametrize('kind', towers)
@pytest.mark.parametrize('tuning', ['lora', 'full', 'projections'])
def test_the_target_is_f_r_whatever_is_trained(kind, tuning):
    model = model_of(kind, tuning=tuning)
    side = GeneratedSide(model, short)
    near = side.unaligned(x_g[:4])
    torch.testing.assert_close(near, model.real_features(x_g[:4]).detach(), atol=1e-5, rtol=1e-4)
    assert not near.requires_grad and side(x_g[:4]).requires_grad
    assert {n for n, p in side.named_parameters() if p.requires_grad} == {
        n for n, p in GeneratedSide(model, AlignSettings()).named_parameters() if p.requires_grad}

def test_the_loss_is_eq_1_and_the_weighted_pull(real):
    eq_1 = trained(real, replace(short, pull_weight=0.))[0][0]
    assert 'pull_loss' not in eq_1
    for w in (.5, 2.):
        row = trained(real, replace(short, pull_weight=w))[0][0]
        assert row['pull_loss'] > 1e-4 and row['loss'] == pytest.approx(eq_1['loss'] + w * row['pull_loss'], rel=1e-4)

def test_f_g_stays_nearer_the_more_it_is_pulled(real):
    longer = replace(short, epochs=12, lr=3e-3)
    gone = [way_gone(trained(real, replace(longer, pull_weight=w))[2]) for w in (0., 3., 100.)]
    assert gone[0] > gone[1] + .01 > gone[2] + .02

@pytest.mark.parametrize('how', [dict(), dict(loss='symmetric'), dict(loss='sigmoid'), dict(loss='cosine')], ids=str)
def test_a_batch_in_parts_has_the_curve_of_one(how, real):
    rows = [trained(real, replace(short, accumulation=a, **how))[0] for a in (1, 4)]
    for a, b in zip(*rows):
        for name in ('loss', 'pull_loss'): assert a[name] == pytest.approx(b[name], rel=2e-3)

def test_a_frozen_prefix_changes_nothing_of_either_tower(plain, real):
    "The gradients are added in another order, and AdamW makes a whole step of a gradient that is nearly zero."
    model, whole = model_of(), GeneratedSide(model_of(), short)
    late = GeneratedSide(model, short, prefix := FrozenPrefix(model), x_g.shape[1:])
    activations = prefix.record(x_g)
    assert torch.equal(late(activations), whole(x_g)) and torch.equal(late.unaligned(activations), whole.unaligned(x_g))
    history, weights, _ = trained(real, prefix=True)
    for a, b in zip(history, plain[0]): assert a['loss'] == pytest.approx(b['loss'], rel=1e-5)
    assert (weights - plain[1]).abs().mean() < 1e-5

def test_activations_in_a_file_are_those_in_memory(real, tmp_path):
    assert torch.equal(trained(real, prefix=tmp_path/'prefix.x')[1], trained(real, prefix=True)[1])

def test_it_goes_with_tokens(real):
    with torch.no_grad(): tokens = model_of().encoder.image_tokens(x_r).half()
    row = trained(real, replace(short, tokens='position', token_weight=2.), real_tokens=tokens)[0][0]
    eq_1 = trained(real, replace(short, pull_weight=0.))[0][0]['loss']
    assert row['loss'] == pytest.approx(eq_1 + 2 * row['token_loss'] + 3 * row['pull_loss'], rel=1e-4)

def test_dropout_of_the_adapters_does_not_reach_the_target(real):
    side = GeneratedSide(model_of(dropout=.5).train(), short)
    assert torch.equal(side.unaligned(x_g[:4]), side.unaligned(x_g[:4]))
    with torch.no_grad(): assert not torch.equal(side(x_g[:4]), side(x_g[:4]))

def test_a_stopped_run_goes_on_to_the_same_bits(plain, real, tmp_path):
    run = RunSettings(checkpoints=str(tmp_path), save_every=1)
    def stop(model): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): trained(real, run=run, evaluate=stop)
    history, weights, _ = trained(real, run=run)
    assert torch.equal(weights, plain[1]) and history == plain[0]
    with pytest.raises(ValueError, match='pull_weight is 3.0 there and 2.0 here'):
        trained(real, replace(short, pull_weight=2.), run=run)

def test_without_a_pull_a_checkpoint_is_one_of_before(real, tmp_path):
    trained(real, replace(short, pull_weight=0.), run=RunSettings(checkpoints=str(tmp_path)))
    there = json.loads((checkpoints_in(tmp_path)[-1]/'state.json').read_text())
    assert 'pull_weight' not in there['settings']

@pytest.mark.parametrize('wrong', [-1., float('nan')])
def test_a_weight_that_would_push_is_refused(wrong):
    with pytest.raises(ValueError, match='pull_weight'): AlignSettings(pull_weight=wrong)
