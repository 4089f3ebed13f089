"Learning the text side: what is trained, what is refused, what a stopped training ends in, and what comes back from a folder."

import copy, json, subprocess, sys
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest, torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from gmail_nb.align import GenReal
from gmail_nb.data import emoji
from gmail_nb.encoders import Encoder, encode_images, load_encoder
from gmail_nb.features import Features
from gmail_nb.losses import contrastive
from gmail_nb.runtime import fingerprint, noise_generator
from gmail_nb.settings import TEXT_TUNINGS, AdapterSettings, TuneSettings
from gmail_nb.train import batches, cosine_rate
from gmail_nb.tune import (
    Checkpoint,
    TextRun,
    disturbed,
    head_inputs,
    as_image_rows,
    head_module,
    lengths,
    load_tuned,
    training_fingerprints,
    own_temperature,
    save_tuned,
    text_blocks,
    text_parameters,
    todays_words,
    tune_text,
    tuned_card,
    tuned_encoder,
)

def weight(item): return 8

@pytest.fixture(scope='module')
def encoder(): return load_encoder('embedded')

@pytest.fixture(scope='module')
def real(): return emoji('B', source='noto').select(range(0, 690, 3))

@pytest.fixture(scope='module')
def captions(real): return list(real['label'])

@pytest.fixture(scope='module')
def features(encoder, real): return encode_images(encoder.encode_image, list(real['image']), encoder.preprocess)

@pytest.fixture(scope='module')
def tuned(encoder, features, captions):
    return tune_text(encoder, features, captions, TuneSettings(steps=20, every=5, validation_share=.2))

def brief(**more): return TuneSettings(**(dict(steps=10, every=5, validation_share=.2) | more))
def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.text.state_dict().values(), b.text.state_dict().values()))


# What is trained

def test_the_head_of_the_embedded_encoder_has_its_parameters(encoder):
    text = text_parameters(copy.deepcopy(encoder.text), TuneSettings('head'))
    assert sum(p.numel() for p in text.parameters() if p.requires_grad) == 384 * 256 + 256
    assert len(text_blocks(encoder.text)) == 6 and head_module(encoder.text) is encoder.text.head

def test_an_unknown_tuning_is_named_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'full'"): TuneSettings('ful')

def test_blocks_that_are_not_there_are_refused(encoder):
    with pytest.raises(ValueError, match='the last 9 of 6 blocks'):
        text_parameters(copy.deepcopy(encoder.text), TuneSettings('last', blocks=9))
    with pytest.raises(ValueError, match='no list of transformer blocks'): text_blocks(nn.Linear(2, 2))

def test_the_head_alone_gives_what_the_tower_gives(encoder, captions):
    inputs = head_inputs(encoder, captions[:10])
    whole = encoder.text(**encoder.tokenize(captions[:10]))
    torch.testing.assert_close(encoder.text.head(inputs), whole, atol=1e-5, rtol=1e-4)

def test_inputs_of_a_head_do_not_depend_on_the_batch_and_can_be_trained_on(encoder, captions):
    inputs = head_inputs(encoder, captions[:10])
    torch.testing.assert_close(head_inputs(encoder, captions[:10], batch_size=3), inputs, atol=1e-5, rtol=0)
    assert not inputs.is_inference() and not inputs.requires_grad

def test_a_tower_without_a_module_for_its_head_has_no_inputs(encoder):
    bare = Encoder('bare', nn.Identity(), nn.Identity(), None, None, 2)
    with pytest.raises(ValueError, match='bare parameter'): head_inputs(bare, ['a'])

def test_noise_keeps_the_length_of_a_row():
    x = 3 * torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    y = disturbed(x, 1., torch.Generator().manual_seed(0))
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1))

# One learner of a text head

def tune_text_head(head, image_features, inputs, steps=200, batch_size=256, lr=1e-3, noise=1., seed=0):
    "The learner of a text head that this package had beside `tune_text` up to version 0.1: here to be compared with."
    g = noise_generator('tune', seed)
    head = copy.deepcopy(head).requires_grad_(True).train()
    order = list(batches(len(inputs), min(batch_size, len(inputs)), seed, epochs=steps))[:steps]
    optimizer = torch.optim.AdamW(head.parameters(), lr, weight_decay=.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: cosine_rate(s, steps))
    for j in order:
        t = inputs[j] + noise * torch.randn(inputs[j].shape, generator=g) / inputs.shape[1]**.5
        loss = contrastive(image_features[j], F.normalize(head(F.normalize(t, dim=-1)), dim=-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head.eval()

@pytest.mark.parametrize('seed, batch_size, noise', [(0, 256, 1.), (7, 64, 1.), (3, 100, .3)])
def test_it_equals_the_learner_of_before_bit_for_bit(encoder, features, captions, seed, batch_size, noise):
    settings = TuneSettings(tuning='head', projection=False, validation_share=0., patience=None, steps=60,
                            batch_size=batch_size, lr=1e-3, noise=noise, weight_decay=.01, seed=seed)
    inputs = head_inputs(encoder, captions)
    before = tune_text_head(encoder.text.head, features, inputs, 60, batch_size, noise=noise, seed=seed)
    for shared in (inputs, None):
        after = tune_text(encoder, features, captions, settings, shared).text.head
        assert torch.equal(after.weight, before.weight) and torch.equal(after.bias, before.bias)

def test_inputs_equal_those_of_before_bit_for_bit(encoder, captions):
    with torch.inference_mode():
        parts = [captions[i:i + 64] for i in range(0, len(captions), 64)]
        before = torch.cat([encoder.text.features(**encoder.tokenize(p)) for p in parts])
    assert torch.equal(head_inputs(encoder, captions), before)

# How it goes

def test_it_repeats(encoder, features, captions):
    a, b = (tune_text(encoder, features, captions, brief()) for _ in range(2))
    assert same(a, b) and torch.equal(a.projection.weight, b.projection.weight)

def test_it_learns_and_stops_when_patience_is_over(encoder, features, captions):
    long = tune_text(encoder, features, captions, TuneSettings(steps=200, validation_share=.2))
    assert long.history[-1]['loss'] < long.history[0]['loss'] and long.best <= len(long.history)
    assert len(long.history) - long.best <= 5 * 20
    assert not torch.equal(long.projection.weight, torch.eye(256))

def test_without_a_projection_p_stays_the_identity_and_all_steps_are_made(encoder, features, captions):
    fixed = tune_text(encoder, features, captions, brief(steps=30, projection=False, patience=None))
    assert torch.equal(fixed.projection.weight, torch.eye(256)) and len(fixed.history) == 30

def test_the_encoder_is_untouched(encoder, tuned):
    start = load_encoder('embedded').text.state_dict()
    assert all(torch.equal(v, start[k]) for k, v in encoder.text.state_dict().items())

def test_with_nothing_kept_out_the_last_step_is_the_result(encoder, features, captions):
    none = tune_text(encoder, features, captions, TuneSettings(steps=3, validation_share=0))
    assert none.best == 3 and not any('validation_loss' in h for h in none.history)

def test_a_limit_makes_looks_at_fewer_captions(encoder, features, captions):
    few = tune_text(encoder, features, captions, brief(steps=5, validation_limit=10))
    every = tune_text(encoder, features, captions, brief(steps=5))
    # 10 to tell apart are easier than 46
    assert few.history[-1]['validation_loss'] < every.history[-1]['validation_loss']

def test_long_gradients_are_cut(encoder, features, captions):
    sizes, clip = [], nn.utils.clip_grad_norm_
    def watched(p, n):
        sizes.append((clip(p, n).item(), sum(q.grad.norm()**2 for q in p).item()**.5))
    with patch.object(nn.utils, 'clip_grad_norm_', side_effect=watched):
        tune_text(encoder, features, captions, TuneSettings(steps=3, validation_share=0, max_norm=.01))
    assert len(sizes) == 3 and all(before > .01 and abs(after - .01) < 1e-4 for before, after in sizes)

def test_a_mix_of_sources_is_learned_from(encoder, features, captions):
    mix = tune_text(encoder, torch.stack([features, features]), captions, brief(steps=20))
    assert mix.history[-1]['loss'] < mix.history[0]['loss']

def test_a_loss_that_is_no_number_stops_it(encoder, features, captions):
    with pytest.raises(FloatingPointError, match='lower the learning rate'):
        tune_text(encoder, features, captions, brief(lr=1e37, steps=40))

# What is refused

def test_features_of_other_captions_are_refused(encoder, features, captions):
    with pytest.raises(ValueError, match='230 images but 229 captions'): tune_text(encoder, features, captions[1:])

def test_twenty_pictures_are_enough_as_the_readme_says():
    "With the settings as they are, an alignment and a tuning keep two out at least, and train on the others."
    from house import root
    from gmail_nb.runs.align import keep_pairs_out, validation_indices
    from gmail_nb.settings import LEAST_VALIDATION, AlignRunSettings
    from gmail_nb.tune import split_pairs
    readme, n = ' '.join((root/'README.md').read_text(encoding='utf-8').split()), 20
    assert 'Twenty pictures run' in readme
    train, looked_at = split_pairs(n, TuneSettings())
    assert len(looked_at) >= 2 and len(train) + len(looked_at) == n
    share = AlignRunSettings().validation_share
    for named in range(50): # whatever the pictures are called
        kept_out = validation_indices([f'{named}/{i}' for i in range(n)], share, LEAST_VALIDATION)
        assert len(keep_pairs_out(n, kept_out, share)) + len(kept_out) == n

def test_too_few_to_train_on_are_refused(encoder, features, captions):
    with pytest.raises(ValueError, match='5 pairs leave 1 to train on and 4 to look at.*--validation-share'):
        tune_text(encoder, features[:5], captions[:5], TuneSettings(validation_share=.8))
    with pytest.raises(ValueError, match='a share is at least 0 and below 1'): TuneSettings(validation_share=1.)

@pytest.mark.parametrize('damage, said', [
    (lambda x: x.index_fill(0, torch.tensor(3), float('nan')), 'not finite in 1 rows, first in row 3'),
    (lambda x: 100 * x, 'unit length: row 0 has length 100'),
    (lambda x: x[:, :9], 'are 9 wide, embedded has 256')])
def test_features_that_cannot_belong_are_refused(encoder, features, captions, damage, said):
    with pytest.raises(ValueError, match=said): tune_text(encoder, damage(features), captions)

# Stopped and continued

class Stop(Exception): pass

def test_a_training_that_was_stopped_ends_like_one_that_was_not(encoder, features, captions, tmp_path):
    kept, settings, save = tmp_path/'run.pt', brief(steps=40, every=10), Checkpoint.save
    whole = tune_text(encoder, features, captions, settings, checkpoint=kept)
    assert not kept.exists()
    looks = iter(range(2))
    def stopping(self, *args):
        save(self, *args)
        if next(looks): raise Stop
    with patch.object(Checkpoint, 'save', stopping), pytest.raises(Stop):
        tune_text(encoder, features, captions, settings, checkpoint=kept)
    with pytest.raises(ValueError, match='a checkpoint of other captions'):
        tune_text(encoder, features.flip(0), captions, settings, checkpoint=kept)
    again = tune_text(encoder, features, captions, settings, checkpoint=kept)
    assert again.history == whole.history and not kept.exists()
    assert torch.equal(again.text.head.weight, whole.text.head.weight)
    assert torch.equal(again.projection.weight, whole.projection.weight)

def test_a_checkpoint_of_another_number_of_processes_is_refused(encoder, features, captions, tmp_path):
    kept, save = tmp_path/'run.pt', Checkpoint.save
    def stopping(self, *args):
        save(self, *args)
        raise Stop
    with patch.object(Checkpoint, 'save', stopping), pytest.raises(Stop):
        tune_text(encoder, features, captions, brief(), checkpoint=kept)
    state = torch.load(kept, weights_only=True)
    state.pop('checksum') # as it is in checkpoints of before
    torch.save(state | dict(random=state['random'] * 2), kept)
    with pytest.raises(ValueError, match='was written by 2 processes that trained together, and here are 1'):
        tune_text(encoder, features, captions, brief(), checkpoint=kept)
    whole = tune_text(encoder, features, captions, brief())
    before = {k: v for k, v in state.items() if k != 'random'} | dict(torch=state['random'][0]['torch'])
    torch.save(before, kept) # as versions before wrote it
    assert tune_text(encoder, features, captions, brief(), checkpoint=kept).history == whole.history

def test_a_checkpoint_of_before_is_known_by_its_fingerprint(encoder, features, captions):
    settings = {k: v for k, v in asdict(brief(tau=.07)).items() if k not in ('precision', 'real_projection')}
    before = fingerprint(encoder.fingerprint, settings, captions, features[None])
    assert before in training_fingerprints(encoder, as_image_rows(features), captions, brief())
    assert before not in training_fingerprints(encoder, as_image_rows(features), captions, brief(real_projection=True))

# Read by the step

def stored(x, tmp_path):
    "Features as `embed` leaves them, in a file."
    np.save(tmp_path/'features.npy', x.numpy())
    mapped = torch.from_numpy(np.load(tmp_path/'features.npy', mmap_mode='c'))
    return Features([f'k{i}' for i in range(len(x))], mapped, dict(content='0'), [])

class Elsewhere:
    "Captions that are no list."
    def __init__(self, captions): self.captions = captions
    def __len__(self): return len(self.captions)
    def __getitem__(self, i): return [self.captions[j] for j in i] if isinstance(i, list) else self.captions[i]

def test_features_in_their_file_give_what_a_tensor_gives(encoder, features, captions, tmp_path):
    x = F.normalize(features, dim=-1)
    there, here = (tune_text(encoder, f, captions, brief()) for f in (stored(x, tmp_path), F.normalize(x, dim=-1)))
    assert same(there, here) and there.history == here.history
    chosen = stored(x, tmp_path).select(list(range(0, 230, 2)))
    assert torch.equal(as_image_rows(chosen).read(torch.tensor([1, 3]))[0], F.normalize(x[[2, 6]], dim=-1))

@pytest.mark.parametrize('tuning', ['head', 'last'])
def test_many_captions_are_read_batch_by_batch(encoder, features, captions, tuning, monkeypatch):
    whole = tune_text(encoder, features, captions, brief(tuning=tuning, steps=3, batch_size=32))
    monkeypatch.setattr('gmail_nb.tune.CAPTIONS_IN_MEMORY', 10)
    asked, tokenize = [], Encoder.tokenize
    monkeypatch.setattr(Encoder, 'tokenize', lambda e, texts: asked.append(len(texts)) or tokenize(e, texts))
    parts = tune_text(encoder, features, Elsewhere(captions), brief(tuning=tuning, steps=3, batch_size=32))
    assert max(asked) <= 64 and abs(parts.history[0]['loss'] - whole.history[0]['loss']) < (
        1e-4 if tuning == 'head' else 1
    )


def test_rows_are_measured_in_chunks(features):
    one, many = lengths(as_image_rows(features)), lengths(as_image_rows(features), chunk=7)
    assert all(map(torch.equal, one, many))

def test_features_that_end_before_their_captions_are_refused(encoder, features, captions, tmp_path):
    whole = stored(features, tmp_path)
    short = Features(whole.key_column, features[:200], whole.card, [])
    with pytest.raises(ValueError, match='ends after 200 rows, but row 230'): tune_text(encoder, short, captions)
    with pytest.raises(ValueError, match=r'sources of \[229, 230\] images'): as_image_rows([features, features[1:]])

# Temperature and projections

def test_the_temperature_is_that_of_the_encoder_unless_it_is_given(encoder, features, captions):
    clip = Encoder('clip', nn.Identity(), nn.Identity(), None, None, 2, 100.)
    assert own_temperature(encoder) == .07 and own_temperature(clip) == .01
    own, given, other = (tune_text(encoder, features, captions, brief(tau=t)) for t in (None, .07, .1))
    assert same(own, given) and own.history == given.history and own.history != other.history

def test_a_precision_of_its_own(encoder, features, captions):
    half, whole = (tune_text(encoder, features, captions, brief(precision=p)) for p in ('bf16', 'no'))
    assert 0 < abs(half.history[0]['loss'] - whole.history[0]['loss']) < .1
    assert half.text.head.weight.dtype == torch.float32

def test_real_images_teach_their_own_projection_and_nothing_else(encoder, features, captions, tmp_path):
    real = F.normalize(features + .05 * torch.randn(features.shape, generator=torch.Generator().manual_seed(0)), dim=-1)
    settings = brief(steps=20, patience=None, validation_share=0.)
    alone = tune_text(encoder, features, captions, settings)
    both = tune_text(encoder, features, captions, replace(settings, real_projection=True), real_features=real)
    assert same(alone, both) and torch.equal(alone.projection.weight, both.projection.weight)
    assert alone.real_projection is None and not torch.equal(both.real_projection.weight, torch.eye(256))
    assert not torch.equal(both.project(real), both.project(real, generated=True))
    assert both.trained == alone.trained + 256 * 256
    images = torch.stack([encoder.preprocess(im) for im in emoji('B', source='twemoji').select(range(3))['image']])
    back = load_tuned(save_tuned(both, encoder, tmp_path/'both'), load_encoder('embedded'))
    with torch.inference_mode(): ours = both.project(encoder.encode_image(images))
    torch.testing.assert_close(back.encode_image(images).detach(), ours, atol=1e-5, rtol=1e-4)

def test_without_real_images_both_kinds_share_one_projection(encoder, features, captions):
    shared, own = (tune_text(encoder, features, captions, brief(real_projection=r)) for r in (False, True))
    assert same(shared, own) and own.real_projection is None and own.trained == shared.trained

def test_real_images_of_a_mix_go_through_their_projection(encoder, features, captions):
    mix = tune_text(
        encoder, torch.stack([features, features]), captions, brief(real_projection=True, steps=20, patience=None)
    )
    assert not torch.equal(mix.projection.weight, mix.real_projection.weight)

# Over processes

script = str(Path(__file__).with_name('tune_once.py'))

def test_two_processes_end_where_one_ends(forks, tmp_path):
    "Batches of 15 do not divide by two; losses agree to 1e-4."
    for name, n in (('one', 1), ('two', 2)):
        (tmp_path/name).mkdir()
        for done in forks.together(script, tmp_path/name, processes=n): assert done.status == 0, done.err[-3000:]
    files = sorted((tmp_path/'one').glob('*.json'))
    assert len(files) == 8
    for file in files:
        one, two = (json.loads((tmp_path/name/file.name).read_text()) for name in ('one', 'two'))
        assert len(one) == len(two) and one[-1]['loss'] < one[0]['loss'] + .1, file.stem
        for key in ('loss', 'validation_loss'):
            assert max(abs(a.get(key, 0) - b.get(key, 0)) for a, b in zip(one, two)) < 1e-4, file.stem
        weights, found = (load_file(tmp_path/name/f'{file.stem}.safetensors') for name in ('one', 'two'))
        assert set(weights) == set(found)
        for k in weights: # Adam makes much of rounding where a gradient is zero
            torch.testing.assert_close(found[k], weights[k], atol=.05 if file.stem == 'full' else 2e-3, rtol=0)

def test_when_a_process_fails_the_others_stop_and_say_why(forks, tmp_path):
    first, second = forks.together(script, tmp_path, 'fails')
    assert first.status != 0 and "process 1 failed: ValueError: caption 'k7' is no text" in first.err
    assert second.status != 0 and "ValueError: caption 'k7' is no text" in second.err

# Kept and read back

@pytest.fixture(scope='module')
def pixels(encoder):
    images = emoji('B', source='twemoji').select(range(1, 37, 9))['image']
    return torch.stack([encoder.preprocess(im) for im in images])

@pytest.fixture(scope='module')
def folders(encoder, tuned, tmp_path_factory):
    "One tuned from the bare encoder, and one beside the aligned model that it came through."
    root = tmp_path_factory.mktemp('tuned')
    GenReal(load_encoder('embedded')).save_pretrained(root/'model')
    save_tuned(tuned, encoder, root/'tuned')
    save_tuned(tuned, encoder, root/'both', aligned=root/'model')
    return root

def test_texts_and_images_come_back(encoder, tuned, captions, pixels, folders):
    back = load_tuned(folders/'tuned', load_encoder('embedded'))
    with torch.inference_mode(): images, texts = back.encode_image(pixels), back.encode_text(back.tokenize(captions))
    torch.testing.assert_close(texts, tuned.encode_text(encoder.tokenize(captions)))
    with torch.inference_mode(): before = encoder.encode_image(pixels)
    torch.testing.assert_close(images, tuned.project(before), atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('reading', ['f_r', 'f_g'])
def test_through_an_untrained_aligned_model_both_readings_are_the_same(encoder, tuned, pixels, folders, reading):
    assert json.loads((folders/'both'/'card.json').read_text())['aligned'] == 'model'
    with torch.inference_mode():
        there, here = load_tuned(folders/'both', reading=reading).encode_image(pixels), encoder.encode_image(pixels)
    torch.testing.assert_close(there, tuned.project(here), atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('folder, reading, error, said', [
    ('tuned', 'f_s', ValueError, "unknown reading 'f_s'"),
    ('nowhere', 'f_r', FileNotFoundError, 'card.json is missing'),
    ('model', 'f_r', ValueError, 'is no tuned text side'),
    ('tuned', 'f_g', ValueError, 'no f_g to send')])
def test_what_cannot_be_read_is_named(folders, folder, reading, error, said):
    with pytest.raises(error, match=said): load_tuned(folders/folder, reading=reading)

def test_a_base_of_another_kind_or_with_other_weights_is_refused(folders):
    tiny = Encoder('tiny', nn.Linear(2, 2), nn.Linear(2, 2), None, None, 2)
    with pytest.raises(ValueError, match='does not fit'): load_tuned(folders/'tuned', tiny)
    other = load_encoder('embedded')
    other.text.head.weight.data[0] += 1 # same shapes, other weights
    with pytest.raises(ValueError, match='with other weights'): load_tuned(folders/'tuned', other)

def test_the_base_is_loaded_by_the_name_on_the_card(folders):
    asked = []
    load_tuned(folders/'tuned', load=lambda name: asked.append(name) or load_encoder(name))
    assert asked == ['embedded']

@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_when_one_of_two_is_killed_the_other_ends_and_the_same_command_goes_on(forks, tmp_path, victim):
    "As of an alignment, in tests/test_train.py."
    def kept(name):
        (tmp_path/name).mkdir()
        for done in forks.together(script, tmp_path/name, tmp_path/f'{name}.pt'):
            assert done.status == 0, done.err[-3000:]
        return json.loads((tmp_path/name/'kept.json').read_text()), load_file(tmp_path/name/'kept.safetensors')
    whole, weights = kept('whole')
    checkpoint = tmp_path/'killed.pt'
    other = forks.killed_in_a_pair(victim, checkpoint.exists, tmp_path, checkpoint, script=script)
    assert other.status != 0, other.err[-2000:]
    assert 'another process of this run has ended without a word' in other.err, other.err[-2000:]
    again, found = kept('killed')
    assert again == whole and all(torch.equal(found[k], weights[k]) for k in weights)

def test_cards_of_before_are_read_in_the_words_of_today(encoder, tuned, tmp_path):
    before = dict(part='whole', blocks=1, rank=4, projection=True, steps=9, held_out=.2, look=7)
    card = tuned_card(save_tuned(tuned, encoder, tmp_path/'old', settings=before))
    assert TuneSettings(**card['settings']) == TuneSettings('full', steps=9, validation_share=.2, validation_limit=7)
    assert todays_words(dict(tuning='lora', rank=8)) == dict(tuning='lora', rank=8)

@pytest.mark.parametrize('tuning', TEXT_TUNINGS)
def test_every_tuning_can_be_asked_for(tuning): assert TuneSettings(tuning).tuning == tuning

def test_a_projection_alone_makes_an_encoder_of_the_base(encoder, tuned, pixels):
    whole = tuned_encoder(GenReal(load_encoder('embedded'), AdapterSettings(tuning='projections')), tuned)
    assert whole.name == 'embedded+tuned' and whole.encode_image(pixels).shape == (4, 256)
