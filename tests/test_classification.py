"Class vectors, labels, scores, the eight sets on disk, probes and fine-tuning."
import importlib.util
import json
import shutil
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

import gmail_nb.runtime # before torchvision
from house import root as repository, run
from gmail_nb.align import GenReal
from gmail_nb.classification import (
    CALTECH,
    CLASSIFICATION_SETS,
    FineTuned,
    Labelled,
    Predictions,
    Standardised,
    best_strength,
    classification_miniature,
    classification_scores,
    classify,
    fine_tune,
    fit_probe,
    fit_strength,
    image_rows,
    lines_of,
    linear_probe,
    load_classification_set,
    moments,
    per_image,
    plain_tower,
    read_class_folders,
    read_imagenet,
    worst_pairs,
    write_lines,
    zero_shot_weights,
)
from gmail_nb.data import emoji
from gmail_nb.encoders import Encoder, TimmVisual, count, encode_texts, load_encoder
from gmail_nb.features import LazyPixels
from gmail_nb.settings import AdapterSettings, FineTuneSettings, ProbeSettings

WORDINGS = '{c}', 'an emoji of {c}', 'a drawing of {c}'
NAMES = ['red heart', 'dog face']

@pytest.fixture(scope='module')
def encoder(): return load_encoder('embedded')

@pytest.fixture(scope='module')
def weights(encoder): return zero_shot_weights(encoder, NAMES, WORDINGS)

@pytest.fixture(scope='module')
def x(): return F.normalize(torch.randn(60, 256, generator=torch.Generator().manual_seed(0)), dim=-1)

@pytest.fixture(scope='module')
def miniature(tmp_path_factory): return classification_miniature(tmp_path_factory.mktemp('miniature'))

@pytest.fixture
def root(miniature, tmp_path):
    "A copy that a test may change, without the 2,000 folders of ImageNet, which take seconds to remove."
    return shutil.copytree(miniature, tmp_path/'sets', ignore=shutil.ignore_patterns('imagenet'))

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
    with pytest.raises(ValueError, match="1 class names repeat, such as 'crane'"):
        zero_shot_weights(encoder, ['crane', 'crane', 'dog'])
    with pytest.raises(ValueError, match='has no {c}'): zero_shot_weights(encoder, ['crane'], ('a photo',))
    with pytest.raises(ValueError, match='0 class names and 1 templates'): zero_shot_weights(encoder, [])

def test_labels_are_checked(x, weights):
    with pytest.raises(ValueError, match='labels reach from 0 to 2, but there are 2'):
        classify(x[:3], weights, torch.arange(3), ['a', 'b'])
    with pytest.raises(ValueError, match='3 images but 2 labels'): classify(x[:3], weights, torch.arange(2), ['a', 'b'])

def test_features_are_checked(x, weights):
    with pytest.raises(ValueError, match='unit length'): classify(2 * x[:2], weights, torch.arange(2), ['a', 'b'])
    with pytest.raises(ValueError, match='256 wide, class vectors 9'):
        classify(x[:2], weights[:, :9], torch.arange(2), ['a', 'b'])


@pytest.mark.parametrize(
    'factor, said',
    [
        (float('nan'), 'class features hold values that are not finite'),
        (50.0, 'class features must have unit length: row 1'),
    ],
)
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
    keys = dict(
        dtd='dtd',
        cars='cars',
        sun397='sun397',
        food101='food101',
        aircraft='fgvc_aircraft',
        pets='pets',
        caltech101='caltech101',
        imagenet='imagenet1k',
    )
    for ours, key in keys.items(): assert sorted(CLASSIFICATION_SETS[ours].templates) == sorted(theirs[key])
    assert set(CALTECH.values()) <= set(names['caltech101'])
    assert list(open_clip.IMAGENET_CLASSNAMES) == names['imagenet1k']

def pairs_of(files, labels): return sorted((str(f), int(l)) for f, l in zip(files, labels))

@pytest.mark.parametrize('name', ['dtd', 'cars', 'food101', 'aircraft', 'pets'])
def test_readers_agree_with_torchvision(name, root):
    from torchvision import datasets as tv

    make = dict(dtd=tv.DTD, cars=tv.StanfordCars, food101=tv.Food101, aircraft=tv.FGVCAircraft, pets=tv.OxfordIIITPet)[
        name
    ]
    ds, ours = make(root, 'test'), load_classification_set(name, root)[0]
    theirs = (
        list(map(tuple, ds._samples))
        if name == 'cars'
        else list(zip(getattr(ds, '_image_files', None) or ds._images, ds._labels))
    )
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
    with pytest.raises(FileNotFoundError, match='dtd: 1 of 6 images are not there, such as woven/woven_0001.jpg'):
        load_classification_set('dtd', root)
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
    assert [load_classification_set(str(tmp_path), split=s)[0].labels.tolist() for s in ('train', 'test')] == [
        [0, 1],
        [1],
    ]


# probes and fine-tuning

def two_sides(x, n=60): return Labelled(x[:n], torch.arange(n) % 2), Labelled(x[:10], torch.zeros(10, dtype=torch.long))

def test_a_probe_needs_two_classes(x):
    one = Labelled(x, torch.zeros(60, dtype=torch.long))
    with pytest.raises(ValueError, match='of one class'): linear_probe(one, one, ['a', 'b'])

@pytest.mark.parametrize('which', [0, 1])
def test_labels_of_a_probe_have_names(x, which):
    sides = two_sides(x, 20)
    sides[which].labels = sides[which].labels + 5
    with pytest.raises(ValueError, match='but there are 2 classes'): linear_probe(*sides, ['a', 'b'])

def test_features_of_a_probe_are_finite(x):
    sides = two_sides(x.clone(), 20)
    sides[0].x[3] = float('nan')
    with pytest.raises(ValueError, match='not finite, first in row 3'): linear_probe(*sides, ['a', 'b'])

def test_a_probe_of_two_classes_ranks_both(x):
    assert linear_probe(*two_sides(x), ['a', 'b'], ProbeSettings((1.,))).best.shape == (10, 2)

def clouds(n, c, d=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % c
    centres = torch.randn(c, d, generator=torch.Generator().manual_seed(0))
    return (centres[y] + 1.5 * torch.randn(n, d, generator=g)) * (1 + torch.arange(d)) + 3, y

@pytest.mark.parametrize('classes', [2, 5])
@pytest.mark.parametrize('strength', [1e-3, .1, 10.])
def test_a_fit_is_scikit_learns(classes, strength):
    x, y = clouds(300, classes)
    mean, std = moments(x)
    data = Standardised(x, mean, std, chunk=70)
    fit = fit_strength(data, y, torch.arange(300), strength, ProbeSettings(tolerance=1e-7, max_steps=2000))
    z = ((x - mean) / std).double().numpy()
    theirs = LogisticRegression(C=strength, tol=1e-10, max_iter=5000).fit(z, y.numpy())
    assert fit.converged
    np.testing.assert_allclose(fit.theta[:, :-1].numpy(), theirs.coef_, atol=2e-4, rtol=1e-3)
    ours = linear_probe(
        Labelled(x, y),
        Labelled(*clouds(200, classes, seed=1)),
        list('abcde'[:classes]),
        ProbeSettings((strength,), tolerance=1e-7, max_steps=2000),
    )
    test = clouds(200, classes, seed=1)
    assert ours.right.float().mean().item() == pytest.approx(
        theirs.score(((test[0] - mean) / std).numpy(), test[1].numpy()), abs=1e-6
    )


def test_a_probe_reads_a_mapped_file_of_16_bits_a_chunk_at_a_time(tmp_path):
    x, y = clouds(400, 4)
    x = F.normalize(x, dim=-1)
    np.save(tmp_path/'x.npy', x.half().numpy())
    mapped = np.load(tmp_path/'x.npy', mmap_mode='r')
    a, b = (linear_probe(Labelled(f, y), Labelled(f, y), list('abcd')) for f in (mapped, x))
    assert (a.best[:, 0] == b.best[:, 0]).float().mean() > .97 and a.facts['converged'] and b.facts['converged']
    torch.testing.assert_close(moments(mapped, 64)[1], x.std(0), atol=1e-3, rtol=1e-2)

def test_a_large_set_learns_in_32_bits_for_a_small_test():
    x, y = clouds(2**16 + 1, 3, d=64)
    p = linear_probe(Labelled(x, y), Labelled(x[:50], y[:50]), list('abc'), ProbeSettings((.1,)))
    assert Standardised(x, *moments(x)).dtype == torch.float32 and p.facts['converged'] and p.right.float().mean() > .8

def test_classes_without_training_images_are_never_found(x):
    train = Labelled(x, 1 + 2 * (torch.arange(60) % 2)) # 1 and 3 of five
    p = linear_probe(train, Labelled(x[:10], torch.full((10,), 4)), list('abcde'))
    assert set(p.best.unique().tolist()) == {1, 3} and not p.right.any()

def test_a_fit_that_has_not_converged_says_so(x, caplog):
    p = linear_probe(*two_sides(x), ['a', 'b'], ProbeSettings((1e6,), max_steps=2))
    assert not p.facts['converged'] and p.facts['gradient'] > 1e-4
    assert 'has not converged' in caplog.text and '--max-steps' in caplog.text

def test_a_warm_start_takes_fewer_steps_to_the_same_place():
    x, y = clouds(300, 5)
    data, s = Standardised(x, *moments(x)), ProbeSettings(tolerance=1e-6)
    near = fit_strength(data, y, torch.arange(300), .1, s)
    cold, warm = (fit_strength(data, y, torch.arange(300), .13, s, start) for start in (None, near.theta))
    assert warm.passes < cold.passes
    torch.testing.assert_close(warm.theta, cold.theta, atol=1e-3, rtol=1e-3)

def test_strengths_are_searched_not_all_tried():
    tried = []
    assert best_strength(lambda c: tried.append(c) or -abs(np.log10(c) - 2.25)) == pytest.approx(10**2.25)
    assert len(tried) < 15

def test_a_clear_fall_ends_the_first_look():
    tried = []
    def score(c): return tried.append(c) or .9 - .1 * abs(np.log10(c) + 3)
    assert best_strength(score, n=1000) == pytest.approx(1e-3) and max(tried) < 10 # of 10^6

def test_the_probe_chooses_what_does_best_on_rows_kept_out():
    x, y = clouds(120, 3, d=40)
    fit = fit_probe(Standardised(x, *moments(x)), y)
    assert fit.strength < 1 # as many numbers as rows of a class: little may be believed

def test_images_decoded_on_the_way_train_the_same(drawn):
    y, pixels = torch.arange(40) % 2, torch.stack([scaled(im) for im in drawn])
    def losses(x):
        sides = Labelled(x(slice(0, 24)), y[:24]), Labelled(x(slice(24, 40)), y[24:])
        return fine_tune(tiny_vit(), *sides, ['a', 'b'], FineTuneSettings(epochs=1))[1]
    assert losses(lambda s: LazyPixels(image_rows(drawn[s]), scaled)) == losses(lambda s: pixels[s])

def test_images_and_labels_are_as_many(drawn):
    pixels = torch.stack([scaled(im) for im in drawn[:4]])
    sides = Labelled(pixels, torch.zeros(3)), Labelled(pixels, torch.zeros(4))
    with pytest.raises(ValueError, match='images but'): fine_tune(tiny_vit(), *sides, ['a', 'b'])

@pytest.fixture
def halves(drawn):
    pixels, y = torch.stack([scaled(im) for im in drawn]), torch.arange(40) % 2
    return Labelled(pixels[:24], y[:24]), Labelled(pixels[24:], y[24:])

def test_a_stopped_fine_tuning_ends_where_another_does(halves, tmp_path):
    s = FineTuneSettings(epochs=4, batch_size=8, save_every=5, warmup=2, clip=1.)
    def dropping():
        tower = tiny_vit()
        for m in tower.modules():
            if type(m).__name__ == 'Mlp': m.drop1 = torch.nn.Dropout(.3) # random numbers must be those of the step
        return tower
    whole, losses = fine_tune(dropping(), *halves, ['a', 'b'], s)
    calls, file = [], tmp_path/'kept'/'run.pt'
    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == 8: raise KeyboardInterrupt
        return original(*args, **kwargs)
    import gmail_nb.classification as room
    original = room.one_step
    with pytest.MonkeyPatch.context() as m:
        m.setattr(room, 'one_step', stop)
        with pytest.raises(KeyboardInterrupt): fine_tune(dropping(), *halves, ['a', 'b'], s, file)
    assert file.exists()
    again, more = fine_tune(dropping(), *halves, ['a', 'b'], s, file)
    assert more == losses and torch.equal(again.best, whole.best) and not file.exists()

def test_a_checkpoint_of_another_run_is_refused(halves, tmp_path):
    s, file = FineTuneSettings(epochs=2, batch_size=8, save_every=1), tmp_path/'run.pt'
    import gmail_nb.classification as room
    with pytest.MonkeyPatch.context() as m:
        m.setattr(room, 'predict', lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): fine_tune(tiny_vit(), *halves, ['a', 'b'], s, file)
    with pytest.raises(ValueError, match='checkpoint of other weights'):
        fine_tune(tiny_vit(), *halves, ['a', 'b'], FineTuneSettings(epochs=3, batch_size=8), file)

def test_a_loss_that_is_no_number_is_named(halves):
    with pytest.raises(FloatingPointError, match='no number at step'):
        fine_tune(tiny_vit(), *halves, ['a', 'b'], FineTuneSettings(epochs=3, lr=1e30, head_lr=1e30))

# towers of aligned models

def towers():
    "A tower of timm and one of open_clip, as encoders."
    torch.manual_seed(0)
    vision = dict(image_size=32, layers=2, width=32, patch_size=16, head_width=16)
    clip = open_clip.model.CLIP(24, vision, dict(context_length=8, vocab_size=64, width=32, heads=2, layers=1))
    from gmail_nb.encoders import OpenClipVisual
    yield 'timm', tiny_vit(), 48
    yield 'open_clip', OpenClipVisual(clip.visual), 24

@pytest.mark.parametrize('tuning', ['lora', 'full', 'projections'])
@pytest.mark.parametrize('which', [0, 1])
def test_all_parameters_of_an_aligned_tower_are_trained(which, tuning, halves):
    name, tower, dim = list(towers())[which]
    size = count(tower)
    model = GenReal(
        Encoder(name, tower, torch.nn.Identity(), None, None, dim).eval(), AdapterSettings(tuning=tuning, rank=2)
    )
    start = plain_tower(model.f_g)
    assert count(start) == size
    tuned = FineTuned(start, 2, halves[0].x[:2])
    assert sum(p.numel() for p in tuned.tower.parameters() if p.requires_grad) == size
    p, _ = fine_tune(start, *halves, ['a', 'b'], FineTuneSettings(epochs=1))
    assert p.facts['trained'] == size

@pytest.mark.parametrize('which', [0, 1])
def test_a_plain_tower_is_f_g_or_f_r(which, halves):
    name, tower, dim = list(towers())[which]
    model = GenReal(Encoder(name, tower, torch.nn.Identity(), None, None, dim).eval(), AdapterSettings(rank=2)).eval()
    for n, p in model.f_g.named_parameters():
        if 'lora_B' in n: torch.nn.init.normal_(p, std=.05, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        x = halves[0].x[:4]
        f_g, f_r = model.f_g(x), model.encoder.visual(x)
        assert (f_g - f_r).abs().max() > 1e-3
        torch.testing.assert_close(plain_tower(model.f_g)(x), f_g, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(plain_tower(model.f_g, 'f_r')(x), f_r, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.f_g(x), f_g) # the model is left as it was

def test_f_r_inside_a_model_is_not_fine_tuned(halves):
    model = GenReal(Encoder('t', tiny_vit(), torch.nn.Identity(), None, None, 48).eval())
    with pytest.raises(ValueError, match='plain_tower'): fine_tune(model.encoder.visual, *halves, ['a', 'b'])

TWO = """
import sys
import gmail_nb.runtime
import torch
sys.path.insert(0, sys.argv[1])
from test_classification import tiny_vit
from gmail_nb.classification import Labelled, fine_tune, process_state
from gmail_nb.settings import FineTuneSettings
g = torch.Generator().manual_seed(0)
x, y = torch.randn(22, 3, 32, 32, generator=g), torch.arange(22) % 2
p, losses = fine_tune(tiny_vit(), Labelled(x[:12], y[:12]), Labelled(x[12:], y[12:]), ['a', 'b'], FineTuneSettings(epochs=2, batch_size=5))
s = process_state()
torch.save(dict(best=p.best, losses=losses, processes=s.num_processes), f'{sys.argv[2]}/{s.process_index}.pt')
"""

def test_two_processes_train_as_one_does(forks, tmp_path):
    (tmp_path/'two.py').write_text(TWO)
    found = {}
    for n in (1, 2):
        out = tmp_path/str(n)
        out.mkdir()
        for done in forks.together(tmp_path/'two.py', Path(__file__).parent, out, processes=n):
            assert done.status == 0, done.err[-3000:]
        found[n] = [torch.load(f, weights_only=True) for f in sorted(out.glob('*.pt'))]
    one, (first, second) = found[1][0], found[2]
    assert (one['processes'], first['processes'], second['processes']) == (1, 2, 2)
    assert torch.equal(first['best'], second['best']) and first['losses'] == second['losses']
    assert one['losses'] == pytest.approx(first['losses'], abs=1e-5)
    assert torch.equal(one['best'], first['best'])
