"Class vectors, labels, scores, the eight sets on disk, probes and fine-tuning."
import importlib.util
import json
from importlib import resources
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.metrics import balanced_accuracy_score

import gmail_nb.runtime # before torchvision
from gmail_nb.classification import (CALTECH, CLASSIFICATION_SETS, FilePixels, Predictions, best_strength, classification_miniature,
                                     classification_scores, classify, fine_tune, lines_of, linear_probe, load_classification_set,
                                     per_image, read_class_folders, read_imagenet, worst_pairs, write_lines, zero_shot_weights)
from gmail_nb.data import emoji
from gmail_nb.encoders import TimmVisual, encode_texts, load_encoder

WORDINGS = '{c}', 'an emoji of {c}', 'a drawing of {c}'
NAMES = ['red heart', 'dog face']

@pytest.fixture(scope='module')
def encoder(): return load_encoder('embedded')

@pytest.fixture(scope='module')
def weights(encoder): return zero_shot_weights(encoder, NAMES, WORDINGS)

@pytest.fixture(scope='module')
def x(): return F.normalize(torch.randn(60, 256, generator=torch.Generator().manual_seed(0)), dim=-1)

@pytest.fixture
def root(tmp_path): return classification_miniature(tmp_path/'sets')

@pytest.fixture(scope='module')
def drawn(): return [im.convert('RGB') for im in emoji('B', source='twemoji').select(range(40))['image']]

def scaled(image): return torch.tensor(np.asarray(image.resize((32, 32)))).permute(2, 0, 1) / 127.5 - 1

def tiny_vit():
    torch.manual_seed(0)
    shape = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=2, num_classes=0)
    return TimmVisual(timm.create_model('vit_tiny_patch16_224', **shape))

# class vectors and labels

def test_class_vectors_are_the_mean_of_their_prompts(encoder, weights):
    one = lambda c: torch.stack([encode_texts(encoder, [t.replace('{c}', c)])[0] for t in WORDINGS])
    by_hand = torch.stack([F.normalize(one(c).mean(0), dim=0) for c in NAMES])
    torch.testing.assert_close(weights, by_hand, atol=1e-4, rtol=0)

def test_names_and_templates_are_checked(encoder):
    with pytest.raises(ValueError, match="1 class names repeat, such as 'crane'"): zero_shot_weights(encoder, ['crane', 'crane', 'dog'])
    with pytest.raises(ValueError, match='has no {c}'): zero_shot_weights(encoder, ['crane'], ('a photo',))
    with pytest.raises(ValueError, match='0 class names and 1 templates'): zero_shot_weights(encoder, [])

def test_labels_are_checked(x, weights):
    with pytest.raises(ValueError, match='labels reach from 0 to 2, but there are 2'): classify(x[:3], weights, torch.arange(3), ['a', 'b'])
    with pytest.raises(ValueError, match='3 images but 2 labels'): classify(x[:3], weights, torch.arange(2), ['a', 'b'])

def test_features_are_checked(x, weights):
    with pytest.raises(ValueError, match='unit length'): classify(2 * x[:2], weights, torch.arange(2), ['a', 'b'])
    with pytest.raises(ValueError, match='256 wide, class vectors 9'): classify(x[:2], weights[:, :9], torch.arange(2), ['a', 'b'])

@pytest.mark.parametrize('factor, said', [(float('nan'), 'class features hold values that are not finite'), (50., 'class features must have unit length: row 1')])
def test_one_class_cannot_take_every_image(x, weights, factor, said):
    wrong = torch.stack([weights[0], weights[1] * factor])
    with pytest.raises(ValueError, match=said): classify(x[:2], wrong, torch.arange(2), ['a', 'b'])

# scores

def predictions(c=8, n=90):
    g = torch.Generator().manual_seed(1)
    best = torch.stack([torch.randperm(c, generator=g)[:5] for _ in range(n)])
    return Predictions(best, torch.randint(c, (n,), generator=g), list('abcdefgh'[:c]))

def test_mean_over_classes_is_balanced_accuracy():
    p = predictions()
    found = classification_scores(p)['mean_per_class']
    assert found.value == pytest.approx(balanced_accuracy_score(p.labels, p.best[:, 0]), abs=1e-9)
    assert per_image(p)['mean_per_class'].mean().item() == pytest.approx(found.value, abs=1e-5)

def test_top5_needs_more_than_five_classes():
    p = predictions()
    few = Predictions(p.best[:, :3].clamp(max=4), p.labels.clamp(max=4), list('abcde'))
    assert 'top5' not in classification_scores(few) and 'top5' in classification_scores(p)

def test_worst_pairs_by_hand():
    q = Predictions(torch.tensor([[1], [1], [0], [2], [2]]), torch.tensor([0, 0, 0, 2, 1]), ['a', 'b', 'c'])
    assert worst_pairs(q, 1)[0][:3] == (0, 1, 2) and worst_pairs(q)[0][3] == pytest.approx(2 / 3)

# the eight sets

@pytest.mark.skipif(not importlib.util.find_spec('clip_benchmark'), reason='clip-benchmark is not installed')
def test_names_and_wordings_are_those_of_clip_benchmark():
    folder = resources.files('clip_benchmark')/'datasets'
    theirs = json.loads((folder/'en_zeroshot_classification_templates.json').read_text())
    names = json.loads((folder/'en_classnames.json').read_text())
    keys = dict(dtd='dtd', cars='cars', sun397='sun397', food101='food101', aircraft='fgvc_aircraft', pets='pets', caltech101='caltech101', imagenet='imagenet1k')
    for ours, key in keys.items(): assert sorted(CLASSIFICATION_SETS[ours].templates) == sorted(theirs[key])
    assert set(CALTECH.values()) <= set(names['caltech101'])
    assert list(open_clip.IMAGENET_CLASSNAMES) == names['imagenet1k']

def pairs_of(files, labels): return sorted((str(f), int(l)) for f, l in zip(files, labels))

@pytest.mark.parametrize('name', ['dtd', 'cars', 'food101', 'aircraft', 'pets'])
def test_readers_agree_with_torchvision(name, root):
    from torchvision import datasets as tv
    make = dict(dtd=tv.DTD, cars=tv.StanfordCars, food101=tv.Food101, aircraft=tv.FGVCAircraft, pets=tv.OxfordIIITPet)[name]
    ds, ours = make(root, 'test'), load_classification_set(name, root)[0]
    theirs = list(map(tuple, ds._samples)) if name == 'cars' else list(zip(getattr(ds, '_image_files', None) or ds._images, ds._labels))
    assert pairs_of(ours.files, ours.labels) == sorted((str(f), int(l)) for f, l in theirs)
    assert [c.replace('_', ' ') for c in ds.classes] == ours.classnames

def test_training_files_of_cars_agree_with_torchvision(root):
    from torchvision import datasets as tv
    cars = load_classification_set('cars', root, 'train')[0]
    assert list(map(str, cars.files)) == [str(f) for f, _ in tv.StanfordCars(root, 'train')._samples]

def test_sun_with_and_without_its_official_split(root):
    from torchvision import datasets as tv
    assert [len(load_classification_set('sun397', root, s)[0].files) for s in ('train', 'test')] == [3, 3]
    (root/'SUN397'/'Testing_01.txt').unlink()
    sun, ours = tv.SUN397(root), load_classification_set('sun397', root)[0]
    assert pairs_of(ours.files, ours.labels) == pairs_of(sun._image_files, sun._labels)
    (root/'SUN397'/'Testing_01.txt').write_text('/a/abbey/sun_00.jpg\n')
    assert len(load_classification_set('sun397', root)[0].files) == 1

def test_what_is_not_there_is_named(root):
    with pytest.raises(FileNotFoundError, match='pets: '): load_classification_set('pets', root/'nowhere')
    with pytest.raises(ValueError, match="did you mean 'food101'"): load_classification_set('food', root)
    with pytest.raises(FileNotFoundError, match='needs the folder'): load_classification_set('dtd')
    (root/'dtd/dtd/images/woven/woven_0001.jpg').unlink()
    with pytest.raises(FileNotFoundError, match='dtd: 1 of 6 images are not there, such as woven/woven_0001.jpg'): load_classification_set('dtd', root)
    with pytest.raises(ValueError, match='has 0 class folders, not 1,000'): read_imagenet(root/'food-101')

def test_a_folder_of_classes_is_a_set(root):
    own = load_classification_set(str(root/'caltech101'/'101_ObjectCategories'))[0]
    assert own.classnames == ['BACKGROUND Google', 'car side', 'wild cat']

def test_training_images_are_not_tested_on(root):
    folder = root/'caltech101'/'101_ObjectCategories'
    for read in (lambda s: load_classification_set('caltech101', root, s)[0], lambda s: read_class_folders(folder, s)):
        train, test = read('train'), read('test')
        assert train.files and not set(train.files) & set(test.files)
        assert train.classnames == test.classnames

def test_dtd_trains_on_train_and_val(root):
    write_lines(root/'dtd/dtd/labels/val1.txt', 'woven/woven_0000.jpg')
    assert len(lines_of(root/'dtd/dtd/labels/train1.txt')) + 1 == 7
    assert len(load_classification_set('dtd', root, 'train')[0].files) == 7

def test_every_kind_of_file_in_capitals_too(tmp_path, drawn):
    for i, s in enumerate(('jpg', 'JPG', 'PNG', 'bmp', 'tif', 'jpeg')):
        for c in 'ab':
            (tmp_path/c).mkdir(exist_ok=True)
            drawn[0].save(tmp_path/c/f'{i}.{s}')
    assert len(load_classification_set(str(tmp_path))[0].files) == 12
    assert len(load_classification_set(str(tmp_path), split='train')[0].files) == 6
    for c in ('test/b', 'train/a', 'train/b'):
        (tmp_path/c).mkdir(parents=True)
        drawn[0].save(tmp_path/c/'0.png')
    assert [load_classification_set(str(tmp_path), split=s)[0].labels.tolist() for s in ('train', 'test')] == [[0, 1], [1]]

# probes and fine-tuning

def test_a_probe_needs_two_classes(x):
    with pytest.raises(ValueError, match='of one class'):
        linear_probe(x, torch.zeros(60, dtype=torch.long), x, torch.zeros(60, dtype=torch.long), ['a', 'b'])

@pytest.mark.parametrize('at', [1, 3])
def test_labels_of_a_probe_have_names(x, at):
    args = [x[:20], torch.arange(20) % 2, x[:10], torch.zeros(10, dtype=torch.long)]
    args[at] = args[at] + 5
    with pytest.raises(ValueError, match='but there are 2 classes'): linear_probe(*args, ['a', 'b'])

def test_features_of_a_probe_are_finite(x):
    bad = x[:20].clone()
    bad[3] = float('nan')
    with pytest.raises(ValueError, match='not finite, first in row 3'):
        linear_probe(bad, torch.arange(20) % 2, x[:10], torch.zeros(10, dtype=torch.long), ['a', 'b'])

def test_a_probe_of_two_classes_ranks_both(x):
    binary = linear_probe(x, torch.arange(60) % 2, x[:10], torch.zeros(10, dtype=torch.long), ['a', 'b'], strengths=(1.,))
    assert binary.best.shape == (10, 2)

def test_strengths_are_searched_not_all_tried():
    tried = []
    assert best_strength(lambda c: tried.append(c) or -abs(np.log10(c) - 2.25)) == pytest.approx(10**2.25)
    assert len(tried) < 15

def test_images_decoded_on_the_way_train_the_same(drawn):
    y, pixels = torch.arange(40) % 2, torch.stack([scaled(im) for im in drawn])
    def losses(x): return fine_tune(tiny_vit(), x(slice(0, 24)), y[:24], x(slice(24, 40)), y[24:], ['a', 'b'], epochs=1)[1]
    assert losses(lambda s: FilePixels(drawn[s], scaled)) == losses(lambda s: pixels[s])

def test_images_and_labels_are_as_many(drawn):
    pixels = torch.stack([scaled(im) for im in drawn[:4]])
    with pytest.raises(ValueError, match='images but'): fine_tune(tiny_vit(), pixels, torch.zeros(3), pixels, torch.zeros(4), ['a', 'b'])
