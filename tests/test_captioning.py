"Captioners: masks from lengths, captions that end, the same words in any batch, and folders of before."
import json
import unittest.mock
from importlib import metadata

import numpy as np
import pytest
import torch

from gmail_nb.captioning import (Captioner, caption_ids, caption_loss, caption_statistics, caption_tokenizer,
    captioner_settings, generate_ids, load_captioner, load_lm, save_captioner, small_decoder, train_captioner,
    write_captions)
from gmail_nb.data import emoji
from gmail_nb.encoders import embedded_encoder, encode_images, preprocess_images
from gmail_nb.runtime import set_seed

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
    with pytest.raises(ValueError, match='either beams or nucleus'):
        write_captions(learned[0], features, beams=2, top_p=.9)
    with pytest.raises(ValueError, match='100 tokens are 104 positions'):
        write_captions(learned[0], features, max_new_tokens=100)

def test_a_folder_gives_the_same_captions_and_an_odd_one_is_refused(learned, features, tmp_path):
    folder = save_captioner(learned[0], tmp_path/'saved', encoder='embedded')
    assert write_captions(load_captioner(folder), features) == write_captions(learned[0], features)
    card = json.loads((folder/'card.json').read_text())
    (folder/'card.json').unlink()
    with pytest.raises(FileNotFoundError, match='card.json is missing'): load_captioner(folder)
    (folder/'card.json').write_text(json.dumps(card | dict(prefix_length=5)))
    with pytest.raises(ValueError, match='does not fit its card'): load_captioner(folder)

def test_a_captioner_saved_before_its_words_changed_loads(learned, features, tmp_path):
    folder = save_captioner(learned[0], tmp_path/'saved')
    card = json.loads((folder/'card.json').read_text())
    del card['tuning']
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
