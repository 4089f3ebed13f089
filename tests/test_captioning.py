"Captioners: masks from lengths, captions that end, the same words in any batch, and folders of before."
import json
import unittest.mock
from importlib import metadata

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker

from gmail_nb import weights
from gmail_nb.captioning import (
    Captioner,
    CaptionPlan,
    CaptionTraining,
    Sources,
    caption_batches,
    caption_ids,
    caption_loss,
    caption_statistics,
    caption_tokenizer,
    captioner_card,
    captioner_settings,
    encode_captions,
    generate_ids,
    has_dropout,
    load_captioner,
    load_lm,
    noisy_features,
    own_share,
    own_shares,
    padding_of,
    read_encoded,
    save_captioner,
    small_decoder,
    train_captioner,
    write_captions,
    write_encoded,
)
from gmail_nb.data import emoji
from gmail_nb.encoders import embedded_encoder, encode_images, preprocess_images
from gmail_nb.features import embed
from gmail_nb.runs.presets import GPT2, LLAMA, SIGLIP
from gmail_nb.runtime import noise_generator, set_seed, stable_seed
from gmail_nb.settings import CaptionerSettings, CaptionRunSettings, EmbedSettings, RunSettings, is_commit
from gmail_nb.train import Log, checkpoints_in, cosine_rate, epoch_order
from gmail_nb.weights import load_part

@pytest.fixture(scope='module')
def drawn(): return emoji('A', source='noto')

@pytest.fixture(scope='module')
def tokenizer(drawn): return caption_tokenizer(c for cs in drawn['captions'] for c in cs)

@pytest.fixture(scope='module')
def some(drawn): return drawn.select(range(0, 480, 10))

@pytest.fixture(scope='module')
def names(some): return [[c] for c in some['label']]

@pytest.fixture(scope='module')
def features(some):
    encoder = embedded_encoder()
    return encode_images(encoder.encode_image, preprocess_images(encoder, list(some['image'])))

@pytest.fixture(scope='module')
def learned(tokenizer, features, names):
    "A captioner that was shown 48 drawings, and its losses."
    set_seed(0)
    captioner = Captioner(small_decoder(tokenizer), tokenizer, 256)
    return captioner, train_captioner(captioner, features, names, steps=150, batch_size=24, desc=None)

@pytest.fixture
def fresh(tokenizer):
    set_seed(0)
    return Captioner(small_decoder(tokenizer), tokenizer, 256).eval()

def test_any_word_can_be_spelled_and_comes_back(drawn, tokenizer):
    for text in (drawn[120]['captions'][1].lower(), "a money-mouth zebra named xyz o'clock"):
        back = tokenizer.decode(tokenizer(text)['input_ids'])
        assert back.replace(' :', ':').replace(' ,', ',') == text

def test_a_vocabulary_needs_captions():
    with pytest.raises(ValueError, match='no captions'): caption_tokenizer([])

def test_padding_behind_a_caption_changes_nothing(fresh):
    x, ids = torch.randn(3, 256), caption_ids(fresh, ['red heart', 'grinning face with big eyes', 'dog'])
    alone = [caption_loss(fresh, x[i:i + 1], ids[i:i + 1]).item() for i in range(3)]
    together = caption_loss(fresh, x, ids).item()
    assert abs(np.average(alone, weights=[len(c) for c in ids]) - together) < 1e-5

def test_a_token_of_number_zero_counts_like_any_other(fresh):
    x, end = torch.randn(1, 256), fresh.end
    assert abs(caption_loss(fresh, x, [[0, 0, end]]) - caption_loss(fresh, x, [[end]])) > 1e-4

def test_a_caption_that_is_cut_keeps_its_end(fresh):
    assert [c[-1] for c in caption_ids(fresh, ['a ' * 90, 'b'], longest=10)] == [fresh.end] * 2

@pytest.mark.parametrize('settings, said', [
    (dict(prefix_length=64), 'has 64: shorten'), (dict(mapper='mpl'), "unknown mapper 'mpl': did you mean 'mlp'"),
    (dict(tuning='all'), 'unknown tuning')])
def test_settings_that_cannot_be_are_refused(tokenizer, settings, said):
    with pytest.raises(ValueError, match=said): Captioner(small_decoder(tokenizer), tokenizer, 256, **settings)

def test_captions_longer_than_the_window_are_refused(fresh):
    with pytest.raises(ValueError, match='70 tokens are 74 positions'): caption_ids(fresh, ['a ' * 90], longest=70)

def test_a_captioner_learns(learned): assert learned[1][-1] < .5 * learned[1][0]

def test_unpaired_input_and_broken_features_are_refused(fresh, features, names):
    with pytest.raises(ValueError, match='features of 48 images but captions of 47'):
        train_captioner(fresh, features, names[1:])
    with pytest.raises(ValueError, match='at least one caption'): train_captioner(fresh, features[:2], [['a'], []])
    with pytest.raises(FloatingPointError, match='at step 1'):
        train_captioner(fresh, features[:2] * float('nan'), names[:2], steps=1, desc=None)

def test_captions_are_right_end_and_hold_no_special_tokens(learned, features, names):
    captioner, _ = learned
    greedy = write_captions(captioner, features)
    assert np.mean([g == n[0].lower() for g, n in zip(greedy, names)]) > .5
    assert all(row[-1] == captioner.end for row in generate_ids(captioner, features))
    assert not any('[' in t for t in greedy)
    assert all(len(row) <= 2 for row in generate_ids(captioner, features, max_new_tokens=2))

@pytest.mark.parametrize('mode', [{}, dict(beams=3), dict(top_p=.9, temperature=1.5, seed=3)])
def test_captions_are_the_same_at_any_batch_size(learned, features, mode):
    many, one = (write_captions(learned[0], features, batch_size=b, **mode) for b in (64, 1))
    assert many == one

def test_another_seed_draws_other_captions(learned, features):
    a, b = (write_captions(learned[0], features, top_p=.9, temperature=1.5, seed=s) for s in (0, 1))
    assert a != b

def test_writing_checks_what_it_is_given(learned, features):
    with pytest.raises(ValueError, match='expected features'): write_captions(learned[0], torch.randn(2, 8))
    with pytest.raises(ValueError, match='choose either'):
        write_captions(learned[0], features, beams=2, top_p=.9)
    with pytest.raises(ValueError, match='100 tokens are 104 positions'):
        write_captions(learned[0], features, max_new_tokens=100)

def test_a_folder_gives_the_same_captions_and_an_odd_one_is_refused(learned, features, tmp_path):
    folder = save_captioner(learned[0], tmp_path/'saved', encoder='embedded')
    assert write_captions(load_captioner(folder), features) == write_captions(learned[0], features)
    card = json.loads((folder/'card.json').read_text()) | dict(checksum=None)
    (folder/'card.json').unlink()
    with pytest.raises(FileNotFoundError, match='card.json is missing'): load_captioner(folder)
    (folder/'card.json').write_text(json.dumps(card | dict(prefix_length=5)))
    with pytest.raises(ValueError, match='does not fit its card'): load_captioner(folder)

def test_a_captioner_saved_before_its_words_changed_loads(learned, features, tmp_path):
    folder = save_captioner(learned[0], tmp_path/'saved')
    card = json.loads((folder/'card.json').read_text())
    del card['tuning'], card['checksum']
    (folder/'card.json').write_text(json.dumps(card | dict(tune='whole')))
    assert captioner_settings(card | dict(tune='lora'))['tuning'] == 'lora'
    again = load_captioner(folder)
    assert again.settings['tuning'] == 'full'
    assert write_captions(again, features) == write_captions(learned[0], features)

def test_a_frozen_language_model_stays_as_it_was(tokenizer, features, names):
    captioner = Captioner(small_decoder(tokenizer), tokenizer, 256, tuning='frozen')
    before = {n: p.clone() for n, p in captioner.lm.named_parameters()}
    train_captioner(captioner, features, names, steps=2, desc=None)
    assert all(torch.equal(p, before[n]) for n, p in captioner.lm.named_parameters())

def test_a_language_model_that_cannot_be_had_says_what_to_do():
    with unittest.mock.patch('importlib.metadata.files', side_effect=metadata.PackageNotFoundError):
        with pytest.raises(ImportError, match='pip install'): load_lm('smollm2')
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='needs a CUDA device'): load_lm('anything', four_bit=True)

def test_images_that_do_not_decode_are_left_out_by_name(some, features):
    encoder, broken = embedded_encoder(), {}
    files = list(zip(some['key'], list(some['image'])[:5])) + [('cut.png', b'\x89PNG\r\n\x1a\n')]
    x = encode_images(encoder.encode_image, files, encoder.preprocess, batch_size=2, broken=broken)
    assert list(broken) == ['cut.png']
    torch.testing.assert_close(x, features[:5], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match='none of'):
        encode_images(encoder.encode_image, files[-1:], encoder.preprocess, broken={})

def test_statistics_count_words_ends_and_distinct_captions():
    found = caption_statistics(['a dog', 'a dog', 'one red car', 'x'], [True, True, True, False])
    assert found == dict(mean_length=2., hit_limit=.25, distinct=.75)

# The loop

def plain_loop(captioner, samples, captions, steps, size, lr, noise, seed):
    "What the loop did when it was one function on one process, with everything in memory."
    flat = caption_ids(captioner, [c for cs in captions for c in cs])
    first, g = np.cumsum([0] + [len(cs) for cs in captions]), noise_generator('captioner', seed)
    parameters = [p for p in captioner.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: cosine_rate(i, steps, min(20, steps // 10)))
    batches, epoch, losses = [], 0, []
    while len(batches) < steps:
        batches += [(epoch, i) for i in epoch_order(len(captions), seed, epoch).split(size)]
        epoch += 1
    with torch.random.fork_rng():
        torch.manual_seed(stable_seed('dropout', seed) % 2**63)
        for epoch, indices in batches[:steps]:
            turn, sample = divmod(epoch, len(samples))
            x = noisy_features(samples[sample, indices], noise, g)
            loss = caption_loss(
                captioner, x, [flat[first[i] + (turn + i) % len(captions[i])] for i in indices.tolist()]
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return losses

@pytest.fixture
def several(some, features):
    "Two sources, and one or two captions an image."
    x = torch.stack([features, features.flip(0)])
    return x, [list(c) for c in some['captions']]

def again_and_again(tokenizer, n=3):
    for _ in range(n):
        set_seed(0)
        yield Captioner(small_decoder(tokenizer), tokenizer, 256)

def test_the_loop_is_the_plain_one_to_the_last_bit(tokenizer, several, tmp_path):
    by_hand, ours, from_files = again_and_again(tokenizer)
    (x, captions), how = several, dict(noise=.3, seed=5)
    losses = plain_loop(by_hand, x, captions, 14, 16, 2e-3, **how)
    assert train_captioner(ours, x, captions, steps=14, batch_size=16, lr=2e-3, desc=None, **how) == losses
    encoded = write_encoded(from_files, captions, tmp_path/'encoded')
    settings = CaptionerSettings(steps=14, batch_size=16, lr=2e-3, noise=.3)
    assert train_captioner(from_files, list(x), encoded, settings=settings, seed=5, desc=None) == losses
    for a, b, c in zip(by_hand.parameters(), ours.parameters(), from_files.parameters()):
        assert torch.equal(a, b) and torch.equal(a, c)

@pytest.mark.parametrize('dies_at', [1, 6, 11])
def test_a_run_that_is_stopped_anywhere_ends_like_one_that_is_not(tokenizer, several, tmp_path, monkeypatch, dies_at):
    whole, stopped, again = again_and_again(tokenizer)
    x, captions = several
    def go(captioner, place):
        run = RunSettings(checkpoints=str(tmp_path/place), save_every=3)
        return train_captioner(captioner, x, captions, steps=12, batch_size=16, noise=.3, desc=None, run=run)
    losses, note = go(whole, 'whole'), Log.note
    monkeypatch.setattr(Log, 'note', lambda self, row: 1 / (dies_at - row['step']) and note(self, row))
    with pytest.raises(ZeroDivisionError): go(stopped, 'part')
    monkeypatch.undo()
    torch.manual_seed(99) # what else is drawn meanwhile
    assert go(again, 'part') == losses
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))
    lines = [json.loads(l) for l in (tmp_path/'part'/'log.jsonl').read_text().splitlines()]
    assert [l['step'] for l in lines] == list(range(1, 13)) and [l['loss'] for l in lines] == losses
    assert len(checkpoints_in(tmp_path/'part')) == 2

@pytest.mark.parametrize('other, said', [
    (dict(seed=1), 'seed is 0 there and 1 here'), (dict(steps=9), 'steps is 3 there and 9 here'),
    (dict(lr=1.), 'lr is'), (dict(captions=[['a']] * 48), 'the images or features are others')])
def test_a_checkpoint_of_another_training_is_refused(tokenizer, several, tmp_path, other, said):
    one, two, _ = again_and_again(tokenizer)
    run = RunSettings(checkpoints=str(tmp_path), save_every=3)
    how = dict(features=several[0], captions=several[1], steps=3, batch_size=16, desc=None, run=run)
    train_captioner(one, **how)
    with pytest.raises(ValueError, match=said): train_captioner(two, **how | other)

def test_a_checkpoint_of_other_first_weights_or_of_another_number_of_processes_is_refused(tokenizer, several, tmp_path):
    one, two, three = again_and_again(tokenizer)
    run = RunSettings(checkpoints=str(tmp_path), save_every=3)
    how = dict(features=several[0], captions=several[1], steps=3, batch_size=16, desc=None, run=run)
    train_captioner(one, **how)
    with torch.no_grad(): next(two.parameters()).add_(1)
    with pytest.raises(ValueError, match='begins_with is'): train_captioner(two, **how)
    file = next(tmp_path.glob('step-*'))/'state.json'
    state = json.loads(file.read_text())
    state['settings']['processes'] = 2
    del state['checksum'] # of what it said before
    file.write_text(json.dumps(state))
    with pytest.raises(ValueError, match='processes is 2 there and 1 here'): train_captioner(three, **how)
    assert has_dropout(three) and not has_dropout(Captioner(small_decoder(tokenizer, dropout=0.), tokenizer, 256))

def test_a_plan_gives_each_image_once_an_epoch_and_the_list_is_the_plan():
    plan = CaptionPlan(10, 4, 0, 7)
    assert sorted(torch.cat([plan.batch(i) for i in range(3)]).tolist()) == list(range(10))
    assert [plan.epoch(i) for i in range(7)] == [0, 0, 0, 1, 1, 1, 2]
    assert torch.equal(plan.batch(5), plan.batch(5)) and torch.equal(plan.batch(0), epoch_order(10, 0, 0)[:4])
    assert all(
        e == plan.epoch(i) and torch.equal(b, plan.batch(i)) for i, (e, b) in enumerate(caption_batches(10, 4, 0, 7))
    )


@pytest.mark.parametrize('n', [1, 2, 3])
def test_shares_of_the_processes_are_the_mean_of_the_batch(n):
    lengths, values = [3, 6, 2, 4], np.arange(4.)
    parts = [own_share(lengths, i, n) for i in range(n)]
    mean = np.mean([share * np.average(values[own], weights=np.array(lengths)[own]) for own, share in parts])
    assert abs(mean - np.average(values, weights=lengths)) < 1e-12
    assert sorted(i for own, share in parts for i in own if share) == list(range(4))

@pytest.mark.parametrize('n', [1, 2, 3])
@pytest.mark.parametrize('parts', [1, 2, 9])
def test_parts_of_a_batch_count_by_their_tokens(n, parts):
    lengths, values = [3, 6, 2, 4, 11], np.arange(5.)
    every = [p for i in range(n) for p in own_shares(lengths, parts, i, n)]
    mean = sum(share * np.average(values[own], weights=np.array(lengths)[own]) for own, share in every) / n
    assert abs(mean - np.average(values, weights=lengths)) < 1e-12
    assert sorted(i for own, share in every for i in own if share) == list(range(5))
    assert all(len(own_shares(lengths, parts, i, n)) <= parts for i in range(n))
    assert own_shares([3], parts, 1, 2) == [([0], 0.)]

def less_memory(tokenizer, several, dropout=0., run=RunSettings(), **how):
    "Losses and weights of a training on captions of several lengths."
    set_seed(0)
    captioner = Captioner(small_decoder(tokenizer, layers=2, width=32, heads=4, dropout=dropout), tokenizer, 256)
    settings = CaptionerSettings(**(dict(steps=12, batch_size=11) | how))
    losses = train_captioner(captioner, *several, desc=None, settings=settings, run=run)
    assert not captioner.training and not captioner.lm.is_gradient_checkpointing
    return losses, captioner.trained()

def check_same(one, other, loss, weight):
    assert len(one[0]) == len(other[0]) and max(abs(a - b) for a, b in zip(one[0], other[0])) < loss
    for n, w in one[1].items(): torch.testing.assert_close(other[1][n], w, atol=weight, rtol=0, msg=n)

@pytest.mark.parametrize('parts', [2, 3, 64])
def test_a_batch_in_parts_learns_as_the_whole(tokenizer, several, parts):
    "Within 1e-4 of the loss: Adam makes much of rounding where a gradient is zero."
    whole = less_memory(tokenizer, several)
    check_same(whole, less_memory(tokenizer, several, accumulation=parts), 1e-4, 2e-3)

def test_activations_computed_again_change_no_number_with_dropout_either(tokenizer, several):
    whole = less_memory(tokenizer, several, dropout=.3)
    check_same(whole, less_memory(tokenizer, several, dropout=.3, checkpointing=True), 1e-6, 1e-6)

def test_only_the_last_part_lets_processes_add_up(tokenizer, several, monkeypatch):
    held, entered = [], []
    class Held:
        def __enter__(self): entered.append('in')
        def __exit__(self, *_): entered.append('out')
    set_seed(0)
    captioner = Captioner(small_decoder(tokenizer, layers=1, width=32, dropout=0.), tokenizer, 256)
    job = CaptionTraining(captioner, *several, CaptionerSettings(steps=1, batch_size=9, accumulation=3))
    monkeypatch.setattr(job.acc, 'no_sync', lambda module: held.append(module) or Held())
    inside = []
    job.learner.value = lambda loss: inside.append(list(entered)) or loss.item()
    job.advance()
    assert held == [job.loss] * 2 and inside == [['in', 'out'] * 2]

def test_with_dropout_a_run_goes_on_with_the_same_parts_only(tokenizer, several, tmp_path):
    def at(place, dropout, steps=4, **how):
        run = RunSettings(checkpoints=str(tmp_path/place), save_every=2)
        return less_memory(tokenizer, several, dropout, run, steps=steps, **how)
    at('drops', .1)
    with pytest.raises(ValueError, match='accumulation is 1 there and 2 here'): at('drops', .1, accumulation=2)
    at('plain', 0.)
    assert len(at('plain', 0., accumulation=2)[0]) == 4
    for place in ('drops', 'plain'): # a checkpoint from before parts were there
        card = checkpoints_in(tmp_path/place)[-1]/'state.json'
        state = json.loads(card.read_text())
        del state['settings']['accumulation'], state['checksum']
        card.write_text(json.dumps(state))
    assert len(at('drops', .1)[0]) == 4 and len(at('plain', 0.)[0]) == 4

def test_captions_on_disk_are_those_in_memory_and_half_a_folder_is_not_read(fresh, several, tmp_path):
    captions = several[1]
    there, here = write_encoded(fresh, iter(captions), tmp_path), encode_captions(fresh, captions)
    assert there.fingerprint == here.fingerprint and len(there) == 48
    flat = [caption_ids(fresh, cs) for cs in captions]
    assert all(there.of(i, t).tolist() == flat[i][(t + i) % len(flat[i])] for i in range(48) for t in range(3))
    with open(tmp_path/'tokens.int32', 'rb+') as f: f.truncate(40)
    with pytest.raises(ValueError, match='write them again'): read_encoded(tmp_path)
    (tmp_path/'card.json').unlink()
    with pytest.raises(ValueError, match='holds no whole captions'): read_encoded(tmp_path)
    with pytest.raises(ValueError, match='at least one caption'): write_encoded(fresh, [['a'], []], tmp_path)
    with pytest.raises(ValueError, match='holds no whole captions'): read_encoded(tmp_path)

def test_features_are_read_from_their_file_also_in_sixteen_bits(tokenizer, drawn, tmp_path):
    some = drawn.select(range(0, 80, 10)).select_columns(['key', 'image'])
    found = {s: embed(some, embedded_encoder(), tmp_path/s, settings=EmbedSettings(store=s, show_progress=False))
             for s in ('float32', 'float16')}
    by_hand, ours, short = again_and_again(tokenizer)
    names = [['a dog']] * 8
    losses = train_captioner(by_hand, found['float32'].mapped.clone(), names, steps=4, batch_size=4, desc=None)
    assert train_captioner(ours, found['float32'], names, steps=4, batch_size=4, desc=None) == losses
    half = train_captioner(short, found['float16'], names, steps=4, batch_size=4, desc=None)
    assert half == pytest.approx(losses, abs=.02)
    assert Sources([found['float32'], found['float16']])[1, torch.tensor([0])].dtype == torch.float32
    greedy = write_captions(by_hand, found['float32'])
    assert greedy == write_captions(by_hand, found['float32'].mapped) and len(greedy) == 8

def test_defaults_of_the_loop_are_those_of_the_settings(fresh, features, names):
    job = CaptionTraining(fresh, features, names)
    s = CaptionerSettings()
    assert (len(job.plan), job.plan.batch_size, job.learner.lr, job.length) == (s.steps, s.batch_size, s.lr, s.noise)

# Number formats

@pytest.fixture(scope='module')
def lm_folder(tokenizer, tmp_path_factory):
    "A tiny GPT-2 in bfloat16, as language models are published."
    folder = tmp_path_factory.mktemp('lm')
    set_seed(0)
    small_decoder(tokenizer, layers=2, width=32, dropout=0.).to(torch.bfloat16).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return str(folder)

@pytest.mark.parametrize('tuning', ['full', 'lora', 'frozen'])
def test_what_is_trained_has_float32_and_comes_back_as_it_was(lm_folder, features, names, tmp_path, tuning):
    lm, tokenizer = load_lm(lm_folder, torch.bfloat16)
    captioner = Captioner(lm, tokenizer, 256, tuning=tuning, name=lm_folder)
    assert {p.dtype for p in captioner.trained().values()} == {torch.float32}
    frozen = {n: p.clone() for n, p in captioner.named_parameters() if not p.requires_grad}
    assert {p.dtype for p in frozen.values()} <= {torch.bfloat16}
    losses = train_captioner(captioner, features, names, steps=12, batch_size=16, lr=1e-2, noise=0., desc=None)
    assert losses[-1] < losses[0] and all(
        torch.equal(p, dict(captioner.named_parameters())[n]) for n, p in frozen.items()
    )
    save_captioner(captioner, tmp_path)
    kept = json.loads((tmp_path/'card.json').read_text())['dtype']
    assert kept == ('float32' if tuning == 'full' else 'bfloat16')
    again = load_captioner(tmp_path)
    assert [p.dtype for p in again.parameters()] == [p.dtype for p in captioner.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), captioner.parameters()))
    assert write_captions(again, features[:4], max_new_tokens=5) == write_captions(
        captioner, features[:4], max_new_tokens=5
    )
    wide = load_captioner(tmp_path, dtype='float32')
    assert {p.dtype for p in wide.parameters()} == {torch.float32}

def test_small_steps_are_not_lost_in_a_bfloat16_model(lm_folder, features, names):
    "Steps of 1e-5 are far below the distance of neighbouring numbers in bfloat16."
    lm, tokenizer = load_lm(lm_folder, torch.bfloat16)
    captioner = Captioner(lm, tokenizer, 256, tuning='lora')
    before = {n: p.detach().clone() for n, p in captioner.trained().items() if 'lora_A' in n}
    train_captioner(captioner, features, names, steps=5, batch_size=16, lr=1e-5, desc=None)
    moved = [not torch.equal(captioner.trained()[n].to(torch.bfloat16).float(), captioner.trained()[n]) for n in before]
    assert before and all(moved)

def test_autocast_learns_what_float32_learns(tokenizer, features, names):
    wide, narrow, _ = again_and_again(tokenizer)
    how = dict(steps=6, batch_size=16, noise=0., desc=None)
    a = train_captioner(wide, features, names, **how)
    b = train_captioner(narrow, features, names, settings=CaptionerSettings(precision='bf16'), **how)
    assert a != b and b == pytest.approx(a, abs=.1) and {p.dtype for p in narrow.parameters()} == {torch.float32}

def test_cards_say_the_dtype_and_older_ones_say_it_among_their_settings(lm_folder, tmp_path):
    lm, tokenizer = load_lm(lm_folder, torch.bfloat16)
    folder = save_captioner(Captioner(lm, tokenizer, 256, tuning='frozen', name=lm_folder), tmp_path)
    card = json.loads((folder/'card.json').read_text())
    for more, dtype in ((dict(preset=dict(dtype='bfloat16')), torch.bfloat16), ({}, torch.float32)):
        older = {k: v for k, v in card.items() if k not in ('dtype', 'revision', 'four_bit', 'checksum')} | more
        (folder/'card.json').write_text(json.dumps(older))
        assert load_captioner(folder).lm.dtype == dtype

@pytest.mark.parametrize(
    'settings, said',
    [
        (dict(dtype='bf16'), "unknown dtype 'bf16'"),
        (dict(precision='fp16'), 'unknown precision'),
        (dict(noise=-1.0), 'noise is -1'),
        (dict(four_bit=True), 'weights in 4 bit cannot be trained'),
        (dict(beams=0), 'beams is 0'),
    ],
)
def test_settings_of_a_captioner_that_cannot_be(settings, said):
    with pytest.raises(ValueError, match=said): CaptionerSettings(**settings)

def test_settings_of_a_run_that_cannot_be():
    with pytest.raises(ValueError, match='unknown store'): CaptionRunSettings(store='int8')

def test_the_folder_above_a_captioner_will_do_and_another_models_will_not(learned, features, tmp_path):
    save_captioner(learned[0], tmp_path/'run'/'captioner')
    assert write_captions(load_captioner(tmp_path/'run'), features[:2]) == write_captions(learned[0], features[:2])
    (tmp_path/'aligned').mkdir()
    (tmp_path/'aligned'/'card.json').write_text(json.dumps(dict(base='embedded')))
    with pytest.raises(ValueError, match='something else than a captioner'): captioner_card(tmp_path/'aligned')
    with pytest.raises(FileNotFoundError, match='--model'): captioner_card(tmp_path/'nowhere')

def test_a_tracker_is_told_the_settings_and_every_step(tokenizer, features, names, tmp_path):
    class Notes(GeneralTracker):
        name, requires_logging_directory, tracker = 'notes', False, None
        def store_init_configuration(self, values): self.settings, self.rows = values, []
        def log(self, values, step=None, **_): self.rows.append((step, values))
    notes = Notes()
    run = RunSettings(trackers=(notes,), log_file=str(tmp_path/'log.jsonl'))
    train_captioner(next(iter(again_and_again(tokenizer))), features, names, steps=3, batch_size=16, desc=None, run=run)
    assert [step for step, _ in notes.rows] == [1, 2, 3] and notes.settings['steps'] == 3

def test_a_model_of_the_hub_is_read_at_its_commit_and_any_other_is_told_of_once(monkeypatch):
    asked, said = [], []
    kind = type('Kind', (), dict(from_pretrained=lambda name, **how: asked.append((name, how['revision']))))
    monkeypatch.setattr(weights.log, 'warning', lambda text, *more: said.append(text % more))
    weights.tell_unpinned.cache_clear()
    for name in ('openai-community/gpt2', 'openai-community/gpt2', 'some/model', 'some/model'): load_part(kind, name)
    assert asked[0] == asked[1] == ('openai-community/gpt2', weights.COMMITS['openai-community/gpt2'])
    assert asked[3] == ('some/model', None) and len(said) == 1 and 'name a commit' in said[0]
    load_part(kind, 'some/model', revision='0' * 40)
    assert len(said) == 1 and asked[-1][1] == '0' * 40
    assert {GPT2, LLAMA, SIGLIP.removeprefix('hf:')} <= set(weights.COMMITS)
    assert all(map(is_commit, weights.COMMITS.values()))

def test_a_text_without_padding_has_its_mask_on_a_gpu(tokenizer):
    "Without one, transformers looks in every step whether texts were packed, and the program waits for the answer."
    lm, real = small_decoder(tokenizer, layers=2, width=32, dropout=0.).eval(), torch.ones(3, 5, dtype=torch.bool)
    assert padding_of(real, lm, torch.device('cpu')) == {}
    told = padding_of(real, lm, torch.device('meta')) # stands for any device that is not the CPU
    assert told['attention_mask'].shape == (1, 1, 5, 5) and told['attention_mask'].device.type == 'meta'
    here = dict(attention_mask=torch.ones(5, 5).tril().bool()[None, None], position_ids=torch.arange(5)[None])
    words = torch.randn(3, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(lm(inputs_embeds=words, **here).logits, lm(inputs_embeds=words).logits)
