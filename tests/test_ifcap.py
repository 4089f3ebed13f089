"Noise, retrieval, entities, the loss, training and writing of the captioner from text alone."
import numpy as np
import pytest
import torch

from gmail_nb.captioning import caption_ids, caption_tokenizer, small_decoder
from gmail_nb.data import emoji
from gmail_nb.encoders import embedded_encoder, encode_images, encode_texts
from gmail_nb.ifcap import (
    IFCap,
    entity_prompt,
    entity_vocabulary,
    frequent_entities,
    ifcap_ids,
    ifcap_loss,
    load_ifcap,
    matching_noise,
    retrieve,
    save_ifcap,
    train_ifcap,
    write_ifcap,
)
from gmail_nb.runtime import set_seed

def weight(item): return 40

@pytest.fixture(scope='module')
def pairs():
    encoder, drawn = embedded_encoder(), emoji('A', source='noto').select(range(0, 772, 16))
    names = list(drawn['label'])
    images = encode_images(encoder.encode_image, zip(drawn['key'], drawn['image']), encoder.preprocess)
    return names, encode_texts(encoder, names), images

def fresh(names, features):
    tokenizer = caption_tokenizer([*names, entity_prompt(['x', 'y']), entity_prompt([])])
    set_seed(0)
    return IFCap(small_decoder(tokenizer, 2), tokenizer, 256, features, names)

@pytest.fixture(scope='module')
def trained(pairs):
    names, texts, images = pairs
    model = fresh(names, texts)
    train_ifcap(model, texts, list(range(len(names))), 150, 24, lr=4e-3, noise=matching_noise(texts, images), desc=None)
    return model

# noise and retrieval

def test_pairs_that_are_none_are_refused(pairs):
    with pytest.raises(ValueError, match='do not belong together'): matching_noise(pairs[1], -pairs[1])

def test_nearest_of_a_caption_is_itself_unless_forbidden(pairs):
    texts, own = pairs[1], torch.arange(len(pairs[1]))
    assert (retrieve(texts, texts, 1)[:, 0] == own).float().mean() > .95
    assert not (retrieve(texts, texts, 5, own) == own[:, None]).any()

def test_retrieval_does_not_depend_on_chunks(pairs):
    texts, own = pairs[1], torch.arange(len(pairs[1]))
    assert torch.equal(retrieve(texts, texts, 5, own, chunk=7), retrieve(texts, texts, 5, own))

def test_a_bank_can_be_too_small(pairs):
    with pytest.raises(ValueError, match='choose a smaller k'):
        retrieve(pairs[1][:2], pairs[1][:5], 5, torch.tensor([0, 1]))


# entities

def test_captions_are_counted_and_not_repetitions():
    assert frequent_entities(['a heart heart heart', 'dog'], {'heart', 'dog'}, threshold=2) == []

def test_nothing_retrieved_gives_no_entities():
    assert frequent_entities([], {'x'}) == []
    assert entity_prompt([]) == 'there is something in the image.'

def test_vocabulary_by_nouns_and_without():
    assert entity_vocabulary(['a dog in the 2nd car :'], {'dog', 'cat'}) == {'dog'}
    assert entity_vocabulary(['a dog, 7']) == {'dog'}

# loss and training

def test_padding_behind_a_caption_changes_nothing(pairs, trained):
    names, texts, _ = pairs
    few = caption_ids(trained, names[:3])
    prompts = [trained.prompt_ids(e) for e in (['x'], [], ['red', 'heart', 'y'])]
    near = retrieve(texts[:3], texts, 5)
    with torch.no_grad():
        alone = [
            ifcap_loss(trained, texts[i : i + 1], near[i : i + 1], prompts[i : i + 1], few[i : i + 1]).item()
            for i in range(3)
        ]
        together = ifcap_loss(trained, texts[:3], near, prompts, few).item()
    assert np.average(alone, weights=[len(c) for c in few]) == pytest.approx(together, abs=1e-5)

def test_unpaired_input_is_refused(pairs):
    names, texts, _ = pairs
    model = fresh(names, texts)
    with pytest.raises(ValueError, match=f'{len(names)} features but 2 captions'): train_ifcap(model, texts, [0, 1])
    with pytest.raises(ValueError, match='one feature a caption'): fresh(names[1:], texts)

def test_a_loss_that_is_no_number_stops_the_run(pairs):
    names, texts, _ = pairs
    with pytest.raises(FloatingPointError, match='at step 1'):
        train_ifcap(fresh(names, texts), texts * float('nan'), list(range(len(names))), steps=1, desc=None)

# writing and saving

def test_a_caption_is_the_same_in_any_batch(pairs, trained):
    images = pairs[2]
    assert ifcap_ids(trained, images, batch_size=64) == ifcap_ids(trained, images, batch_size=1)
    assert write_ifcap(trained, images[:8], beams=2) == write_ifcap(trained, images[:8], beams=2, batch_size=3)

def test_features_and_lengths_are_checked(pairs, trained):
    with pytest.raises(ValueError, match='expected features'): write_ifcap(trained, torch.randn(2, 8))
    with pytest.raises(ValueError, match='shorten the prefix'): write_ifcap(trained, pairs[2][:2], max_new_tokens=60)

def test_an_unfinished_folder_is_named(trained, tmp_path):
    save_ifcap(trained, tmp_path/'saved')
    assert load_ifcap(tmp_path/'saved').lookup == trained.lookup
    (tmp_path/'saved'/'card.json').unlink()
    with pytest.raises(FileNotFoundError, match='card.json is missing'): load_ifcap(tmp_path/'saved')
