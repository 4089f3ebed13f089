"Exact ranks: the same whatever the blocks, ties and order; what is refused; the readers of every benchmark."
import json
import tracemalloc
from dataclasses import replace
from unittest.mock import patch

import datasets, numpy as np, pytest, torch
import torch.nn.functional as F

from gmail_nb.data import emoji
from gmail_nb.encoders import encode_texts, load_encoder
from gmail_nb.gap import ranks as paired_ranks
from gmail_nb.retrieval import (
    RETRIEVAL_SETS,
    TIES,
    WAYS,
    Counting,
    count_above,
    embed_captioned,
    embed_texts,
    features_made_from,
    from_flickr_tokens,
    from_sharegpt4v,
    from_urban,
    image_identity,
    load_retrieval_set,
    nearest,
    own_levels,
    owners,
    per_query,
    retrieval,
    retrieval_in_folds,
    retrieval_miniature,
    retrieval_records,
    retrieval_scores,
    set_features,
    show_recall,
    thresholds,
)
from gmail_nb.settings import EmbedSettings, SourceSettings
from gmail_nb.stats import bootstrap

QUIET = EmbedSettings(show_progress=False)

def weight(item): return 8

def unit(x): return F.normalize(x, dim=-1)
def draw(*shape, seed=0): return unit(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))

g = torch.Generator().manual_seed(0) # as in the notebook
images, image_of_text = unit(torch.randn(300, 32, generator=g)), torch.arange(1500) // 5
texts = unit(images[image_of_text] + 1.2 * unit(torch.randn(1500, 32, generator=g)))
found = retrieval(images, texts, image_of_text, chunk=128)

def by_sorting(images, texts, of):
    "The definition, with the whole matrix: ranks of texts, of images, and the average precision."
    scores = texts @ images.T
    by_text = (scores.argsort(1, descending=True) == of[:, None]).int().argmax(1)
    mine = of[scores.T.argsort(1, descending=True)] == torch.arange(len(images))[:, None]
    precision = (mine * mine.cumsum(1) / torch.arange(1, len(texts) + 1)).sum(1) / mine.sum(1)
    return by_text, mine.int().argmax(1), precision

# Ranks

def test_counting_agrees_with_sorting():
    by_text, by_image, precision = by_sorting(images, texts, image_of_text)
    assert torch.equal(found.text_to_image, by_text) and torch.equal(found.image_to_text, by_image)
    torch.testing.assert_close(found.average_precision, precision)
    assert torch.equal(found.image_of_text, image_of_text)

@pytest.mark.parametrize('chunk', [7, 300, 4096])
def test_the_result_does_not_depend_on_the_blocks(chunk):
    other = retrieval(images, texts, image_of_text, chunk=chunk)
    assert torch.equal(other.text_to_image, found.text_to_image)
    assert torch.equal(other.image_to_text, found.image_to_text)

def test_the_result_does_not_depend_on_the_order_of_the_texts():
    p = torch.randperm(1500, generator=torch.Generator().manual_seed(2))
    mixed = retrieval(images, texts[p], image_of_text[p], chunk=64)
    assert torch.equal(mixed.text_to_image, found.text_to_image[p])
    assert torch.equal(mixed.image_to_text, found.image_to_text)
    torch.testing.assert_close(mixed.average_precision, found.average_precision)

def test_with_one_caption_each_it_is_the_function_of_the_gap_notebook():
    pairs = retrieval(images, texts[::5])
    assert torch.equal(pairs.text_to_image, paired_ranks(texts[::5], images))

def test_images_may_have_different_numbers_of_captions():
    r = retrieval(images[:3], texts[:6], torch.tensor([0, 0, 0, 1, 2, 2]))
    assert r.gallery == (3, 6) and len(r.image_to_text) == 3

def test_half_precision_moves_recall_by_little():
    half = retrieval(images.half(), texts.half(), image_of_text)
    share = lambda r: (r.text_to_image < 1).float().mean()
    assert abs(share(half) - share(found)) < .01

def test_features_are_read_from_memory_mapped_files(tmp_path):
    for name, x in dict(v=images, t=texts).items(): np.save(tmp_path/f'{name}.npy', x.numpy())
    v, t = (np.load(tmp_path/f'{name}.npy', mmap_mode='r') for name in 'vt')
    mapped = retrieval(v, t, image_of_text, chunk=128)
    assert torch.equal(mapped.text_to_image, found.text_to_image)
    assert torch.equal(mapped.average_precision, found.average_precision)

def test_one_image_may_have_most_of_the_texts():
    many = torch.cat([torch.arange(300), torch.zeros(1200, dtype=torch.long)])
    crowd = retrieval(images, texts, many, chunk=64)
    _, by_image, precision = by_sorting(images, texts, many)
    assert torch.equal(crowd.image_to_text, by_image)
    torch.testing.assert_close(crowd.average_precision, precision)

def test_memory_goes_with_the_texts_and_not_with_images_times_the_largest_count():
    many = torch.cat([torch.arange(300), torch.zeros(1200, dtype=torch.long)])
    for count, places in ((torch.bincount(many), 1500), (torch.tensor([5, 5]), 10)):
        assert sum(len(p) for _, p in thresholds(count.cumsum(0) - count, count)) == places

@pytest.mark.parametrize('chunk', [7, 64, 2048])
def test_a_device_that_is_named_changes_nothing(chunk):
    other = retrieval(images.half(), texts.half(), image_of_text, chunk=chunk, device='cpu')
    half = retrieval(images.half(), texts.half(), image_of_text)
    assert torch.equal(other.text_to_image, half.text_to_image) and torch.equal(other.image_to_text, half.image_to_text)

def test_images_of_a_block_are_read_once_for_several_blocks_of_texts():
    class Read:
        "Counts how often rows are asked for."
        dtype, shape, times = torch.float32, images.shape, 0
        def __len__(self): return len(images)
        def __getitem__(self, index):
            self.times += 1
            return images.numpy()[index]
    read, levels = Read(), own_levels(images, texts, image_of_text)
    above = count_above(read, texts, levels, chunk=100)
    assert read.times == 2 * 3 # two groups of eight blocks of texts, three blocks of images
    assert torch.equal(above[0], found.text_to_image)

def test_memory_of_a_pass_is_that_of_its_blocks():
    levels = own_levels(images, texts, image_of_text)
    assert Counting(images, texts, levels, chunk=50).buffers.numel() == 2 * 50 * 50

# Ties

def test_collapsed_features_get_the_worst_rank_or_the_best():
    one = unit(torch.ones(40, 8))
    assert retrieval(one, one).text_to_image.tolist() == [39] * 40
    assert retrieval(one, one).image_to_text.tolist() == [39] * 40
    assert retrieval(one, one, ties='best').image_to_text.tolist() == [0] * 40

def test_a_doubled_image_is_a_tie_for_its_own_captions_alone():
    doubled, twice = torch.cat([images, images[:1]]), torch.cat([texts, texts[:1]])
    at = torch.cat([image_of_text, torch.tensor([300])])
    a, b = (retrieval(doubled, twice, at, ties=t).text_to_image for t in ('worst', 'best'))
    assert (a - b)[:5].tolist() == [1] * 5 and (a - b)[5:1500].sum() == 0

@pytest.mark.parametrize('ties, rank_of, copy_of', [('worst', 256, 1), ('best', 0, 0)])
@pytest.mark.parametrize('chunk', [3, 16, 100, 256, 2048])
def test_copies_tie_over_all_blocks_whole_and_cut(chunk, ties, rank_of, copy_of):
    v = draw(1, 512, seed=chunk).expand(257, -1).contiguous()
    copied = draw(257, 512, seed=chunk + 1)
    copied[256] = copied[0]
    collapsed = retrieval(v, v, ties=ties, chunk=chunk)
    copies = retrieval(copied, copied, ties=ties, chunk=chunk)
    for way in WAYS:
        assert collapsed[way].unique().tolist() == [rank_of]
        assert copies[way][[0, 256]].tolist() == [copy_of] * 2

# What is refused

def nan_at(x, row):
    x = x.clone()
    x[row, 2] = float('nan')
    return x

@pytest.mark.parametrize('args, said', [
    ((images[0], texts[0]), r'expected \(N, D\) image features'),
    ((images[:0], texts[:0]), 'with N > 0'),
    ((images, texts[:, :16], image_of_text), '32 wide and text features 16'),
    ((torch.cat([images[:3], 2 * images[3:]]), texts, image_of_text), 'row 3 has length 2'),
    ((images, nan_at(texts, 7), image_of_text), 'first in row 7'),
    ((images, texts, image_of_text[1:]), '1500 integers'),
    ((images[:299], texts, image_of_text), '5 texts have no image: text 1495 names image 299, but there are 299'),
    ((images, texts[:1495], image_of_text[:1495]), '1 of 300 images have no text, the first is row 299')])
def test_input_without_an_answer_is_named(args, said):
    with pytest.raises(ValueError, match=said): retrieval(*args)

def test_an_unknown_rule_for_ties_is_refused():
    assert set(TIES) == {'worst', 'best'}
    with pytest.raises(ValueError, match="unknown rule for ties 'random'"):
        retrieval(images, texts, image_of_text, ties='random')


def test_owners_are_found_by_key():
    assert owners(['a', 'b'], ['b', 'a', 'b']).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="listed twice, such as 'b'"): owners(['a', 'b', 'b'], ['a'])
    with pytest.raises(ValueError, match="1 captions belong to images that are not listed, such as 'z'"):
        owners(['a', 'b'], ['a', 'z'])


# Scores

def test_scores_lie_in_their_intervals_and_equal_the_definition():
    table = retrieval_scores(found)
    assert all(i.low <= i.value <= i.high for i in table.values())
    by_text, _, precision = by_sorting(images, texts, image_of_text)
    assert table['text_to_image_map'].value == pytest.approx((1 / (by_text + 1)).float().mean().item(), abs=1e-6)
    assert table['image_to_text_map'].value == pytest.approx(precision.mean().item(), abs=1e-6)

def test_captions_of_an_image_are_drawn_together_whatever_its_number():
    ranks = found.text_to_image + 1.
    a, b = (bootstrap(ranks, 'median', groups=of) for of in (image_of_text, image_of_text + 7))
    assert a == b == retrieval_scores(found)['text_to_image_median_rank']

def test_the_interval_of_a_share_is_the_textbook_one():
    v = (torch.rand(5000, generator=torch.Generator().manual_seed(3)) < .3).float()
    i = bootstrap(v)
    sd = (i.value * (1 - i.value) / 5000)**.5
    assert (i.high - i.low) / (2 * 1.96 * sd) == pytest.approx(1, abs=.1)
    assert bootstrap(torch.tensor([1., 2., 9.]), 'median').value == 2

def test_five_captions_that_succeed_or_fail_together_make_a_wider_interval():
    same = (torch.rand(200, generator=torch.Generator().manual_seed(4)) < .5).float().repeat_interleave(5)
    wide, narrow = (bootstrap(same, groups=of) for of in (torch.arange(200).repeat_interleave(5), None))
    assert wide.value == narrow.value
    assert 1.8 < (wide.high - wide.low) / (narrow.high - narrow.low) < 2.8 # the square root of 5

def test_groups_of_one_are_no_groups():
    v = (torch.rand(5000, generator=torch.Generator().manual_seed(3)) < .3).float()
    mean, grouped = (bootstrap(v, groups=of) for of in (None, torch.arange(5000)))
    assert list(mean[:3]) == pytest.approx(list(grouped[:3]), abs=.003)
    assert bootstrap(v, 'median').value == bootstrap(v, 'median', groups=torch.arange(5000)).value

def test_recall_in_a_gallery_that_is_too_small_says_nothing():
    few = retrieval(images[:3], texts[:6], torch.tensor([0, 0, 0, 1, 2, 2]))
    with pytest.raises(ValueError, match='recall at 5 of a gallery of 3'): per_query(few)

def test_records_hold_the_interval_and_the_number_of_queries():
    records = retrieval_records('x', 'a', 'd', 's', found, seed=3, note='n')
    by_metric = {r['metric']: r for r in records}
    assert by_metric['text_to_image_map']['n'] == 1500 and by_metric['image_to_text_map']['n'] == 300
    first, score = records[0], retrieval_scores(found)[records[0]['metric']]
    assert (first['value'], first['low'], first['high'], first['seed'], first['note']) == (*score[:3], 3, 'n')

# Embedding a captioned set

@pytest.fixture(scope='module')
def encoder(): return load_encoder('embedded')

@pytest.fixture(scope='module')
def drawings(): return emoji('B', source='twemoji').select(range(0, 600, 4))

@pytest.fixture(scope='module')
def world(encoder, drawings): return embed_captioned(encoder, drawings.select(range(40)))

def test_features_come_from_the_cache_the_second_time(encoder, drawings, world, tmp_path):
    few = drawings.select(range(6))
    first = embed_captioned(encoder, few, 1, tmp_path, QUIET)
    assert len(first.captions) == 6
    with (
        patch.object(encoder, 'encode_image', side_effect=AssertionError),
        patch.object(encoder, 'encode_text', side_effect=AssertionError),
    ):
        again = embed_captioned(encoder, few, 1, tmp_path, QUIET)
    assert torch.equal(first.image_features, again.image_features) and torch.equal(
        first.text_features, again.text_features
    )
    torch.testing.assert_close(again.image_features, world.image_features[:6], atol=1e-5, rtol=0)

def test_other_images_weights_or_captions_are_embedded_again(encoder, drawings, tmp_path):
    few = drawings.select(range(6))
    embed_captioned(encoder, few, 1, tmp_path, QUIET)
    embed_captioned(encoder, few, 2, tmp_path, QUIET)                      # the same images, more captions
    embed_captioned(encoder, drawings.select(range(1, 7)), 1, tmp_path, QUIET)
    assert [len(list(tmp_path.glob(n))) for n in ('images-*', 'texts-*.npy')] == [2, 3]
    names = {
        features_made_from(encoder, few, s)
        for s in (QUIET, replace(QUIET, store='float16'), replace(QUIET, workers=5, batch_size=3))
    }
    assert len(names) == 2 # workers and batches change nothing

def test_features_of_16_bits_take_half_the_disk_and_rank_alike(encoder, drawings, world, tmp_path):
    few = drawings.select(range(40))
    half = embed_captioned(encoder, few, None, tmp_path, replace(QUIET, store='float16'))
    assert half.image_features.dtype == half.text_features.dtype == torch.float16
    ours, theirs = half.ranks(), world.ranks()
    for way in WAYS: assert (ours[way] - theirs[way]).abs().float().mean() < .1
    assert torch.equal(
        nearest(world.text_features[:3], half.image_features, 1),
        nearest(world.text_features[:3], world.image_features, 1),
    )


def test_a_damaged_image_is_named(encoder, tmp_path):
    rows = [dict(key=str(i), image=str(tmp_path/f'{i}.png'), captions=['a']) for i in range(3)]
    for r in rows: emoji('B', source='twemoji')[0]['image'].save(r['image'])
    ds = datasets.Dataset.from_list(rows).cast_column('image', datasets.Image())
    (tmp_path/'1.png').write_bytes(b'no picture')
    for cache in (None, tmp_path/'cache'):
        with pytest.raises(ValueError, match="'1'"): set_features(encoder, ds, cache, QUIET)
    emoji('B', source='twemoji')[0]['image'].save(tmp_path/'1.png')
    assert len(set_features(encoder, ds, tmp_path/'cache', QUIET)) == 3

def test_texts_that_were_half_written_are_made_again(encoder, tmp_path):
    words = [f'word {i}' for i in range(9)]
    first = embed_texts(encoder, words, tmp_path).clone()
    file, = tmp_path.glob('texts-*.npy')
    file.write_bytes(file.read_bytes()[:-100])
    assert torch.equal(embed_texts(encoder, words, tmp_path), first)

def test_identity_tells_files_and_bytes_apart(tmp_path):
    (tmp_path/'a').write_bytes(b'one')
    path, encoded = image_identity(tmp_path/'a'), image_identity(b'one')
    assert path == image_identity(dict(bytes=None, path=str(tmp_path/'a'))) and encoded == image_identity(
        dict(bytes=b'one', path=None)
    )
    (tmp_path/'a').write_bytes(b'other')
    assert image_identity(tmp_path/'a') != path and image_identity(b'two') != encoded

def test_an_image_listed_twice_is_refused(encoder, drawings):
    few = drawings.select(range(6))
    with pytest.raises(ValueError, match='listed twice'):
        embed_captioned(encoder, datasets.concatenate_datasets([few, few.select([0])]))


def test_captions_know_their_image_and_texts_do_not_depend_on_the_batch(encoder, world):
    assert world.image_of_text.tolist()[:4] == [0, 0, 1, 1]
    a, b = (encode_texts(encoder, world.captions[:9], batch_size=n) for n in (2, 64))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)

def test_the_nearest_are_found_while_the_gallery_streams_by(world):
    best = nearest(world.text_features[:7], world.image_features, 5, chunk=16)
    assert torch.equal(best, (world.text_features[:7] @ world.image_features.T).topk(5, 1)[1])
    assert torch.equal(best[:, 0] == world.image_of_text[:7], world.ranks().text_to_image[:7] == 0)
    with pytest.raises(ValueError, match='the 5 best of a gallery of 3'):
        nearest(world.text_features[:7], world.image_features[:3])


def test_drawings_of_one_style_find_those_of_another(encoder, drawings):
    others = emoji('B', source='noto')
    number = {k: i for i, k in enumerate(others['key'])}
    one = embed_captioned(encoder, drawings, per_image=1)
    two = embed_captioned(encoder, others.select([number[k] for k in drawings['key']]), per_image=1)
    between = retrieval(one.image_features, two.image_features)
    assert torch.equal(between.text_to_image, paired_ranks(two.image_features, one.image_features))
    assert (between.text_to_image < 1).float().mean() > .2

def test_recall_is_drawn_for_galleries_of_unequal_sizes():
    fig = show_recall({'a': retrieval(images[:3], texts[:6], torch.tensor([0, 0, 0, 1, 2, 2]))})
    assert [len(ax.lines[0].get_xdata()) for ax in fig.axes] == [3, 6]

# Readers

@pytest.fixture(scope='module')
def root(tmp_path_factory): return retrieval_miniature(tmp_path_factory.mktemp('miniature'))

def test_coco_is_read_with_its_protocol(root):
    ds, known = load_retrieval_set('coco-5k', root)
    assert (len(ds), len(ds[0]['captions']), known.per_image) == (10, 6, 5)

@pytest.mark.parametrize('name', ['coco-5k', 'coco-1k', 'coco-val2017'])
def test_of_five_to_seven_captions_an_image_the_first_five_are_taken(encoder, root, name):
    ds, known = load_retrieval_set(name, root)
    assert {len(c) for c in ds['captions']} == {5, 6, 7}
    e = embed_captioned(encoder, ds, known.per_image)
    assert len(e.captions) == 50 and torch.bincount(e.image_of_text).tolist() == [5] * 10
    assert e.captions[5:10] == ds[1]['captions'][:5]
    everything = embed_captioned(encoder, ds)
    assert len(everything.captions) == sum(len(c) for c in ds['captions']) and everything.ranks().gallery == (
        10,
        len(everything.captions),
    )


def test_of_karpathys_file_the_test_images_are_read_unless_a_split_is_named(root):
    def read(**source):
        return load_retrieval_set(str(root/'dataset_coco.json'), source=SourceSettings(images=str(root), **source))

    (test, known), (train, other) = read(), read(split='train')
    assert (len(test), known.split, len(train), other.split) == (10, 'test', 2, 'train')
    assert not set(test['key']) & set(train['key'])

def test_cocos_own_file_is_read_whole(root):
    source = SourceSettings(images=str(root/'val2017'))
    ds, known = load_retrieval_set(str(root/'annotations'/'captions_val2017.json'), source=source)
    assert len(ds) == 10 and known.split == 'all' and {len(c) for c in ds['captions']} == {5, 6, 7}

def test_own_long_captions():
    ds, known = load_retrieval_set('emoji-long')
    assert ds[0]['captions'] == [ds[0]['description']] and known.keys == 'concepts'
    assert {n for n, s in RETRIEVAL_SETS.items() if s.keys == 'concepts'} == {'emoji', 'emoji-long'}

def test_keys_are_read_without_the_pictures(tmp_path):
    big = np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8)
    from PIL import Image
    for i in range(20):
        Image.fromarray(np.roll(big, i)).save(tmp_path/f'{i}.png')
    rows = dict(
        key=[str(i) for i in range(20)], image=[str(tmp_path/f'{i}.png') for i in range(20)], captions=[['a']] * 20
    )
    datasets.Dataset.from_dict(rows).cast_column('image', datasets.Image()).to_parquet(str(tmp_path/'big.parquet'))
    ds = datasets.load_dataset(
        'parquet', data_files=str(tmp_path/'big.parquet'), split='train', cache_dir=str(tmp_path/'cache')
    )
    with patch('PIL.Image.open', side_effect=AssertionError):
        tracemalloc.start()
        list(ds['key']), [c[:5] for c in ds['captions']]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2e6

def test_long_captions_are_read(root):
    described = emoji('B', source='twemoji')[12]['description'].replace('\n', ' ').strip()
    assert load_retrieval_set('sharegpt4v-1k', root)[0][3]['captions'] == [described]
    assert len(load_retrieval_set('urban-1k', root)[0]) == 12

def test_all_of_flickr_is_its_test_and_more(root):
    everything = load_retrieval_set('flickr30k-all', root)[0]
    test = load_retrieval_set('flickr30k', root)[0]
    assert len(everything) == 12 and everything[1]['captions'] == test[1]['captions']

def test_a_line_of_another_form_is_named(tmp_path):
    (tmp_path/'odd.token').write_text('1.jpg a caption\n')
    with pytest.raises(ValueError, match='odd.token line 1'): from_flickr_tokens(tmp_path/'odd.token', tmp_path)

def test_folds_are_galleries_of_their_own(encoder, root):
    e = embed_captioned(encoder, load_retrieval_set('coco-5k', root)[0], 5)
    folds = retrieval_in_folds(e, 5)
    alone = retrieval(e.image_features[:2], e.text_features[:10], e.image_of_text[:10])
    assert torch.equal(folds.text_to_image[:10], alone.text_to_image) and folds.gallery == (2, 10)
    with pytest.raises(ValueError, match='10 images do not make 3 equal galleries'): retrieval_in_folds(e, 3)

def test_names_and_folders_that_are_not_there(root):
    with pytest.raises(ValueError, match="did you mean 'flickr30k'"): load_retrieval_set('flicker30k')
    with pytest.raises(FileNotFoundError, match='no caption/\\*.txt'): from_urban(root/'val2014')
    with pytest.raises(FileNotFoundError, match='on no hub'): load_retrieval_set('urban-1k')

def test_an_image_that_is_not_there_is_named(tmp_path):
    lost = retrieval_miniature(tmp_path)
    (lost/'sam'/'images'/'sa_0.jpg').unlink()
    with pytest.raises(FileNotFoundError, match="1 of 12 images are not there, such as 'sam/images/sa_0.jpg'"):
        load_retrieval_set('sharegpt4v-1k', lost)

def test_an_entry_without_an_answer_is_named(tmp_path):
    (tmp_path/'broken.json').write_text(json.dumps([dict(image='a.jpg', conversations=[])]))
    with pytest.raises(ValueError, match='entry 0 has no answer'): from_sharegpt4v(tmp_path/'broken.json', tmp_path)

def test_folders_and_parquet_files_of_ones_own_are_sets_too(drawings, tmp_path):
    mine = tmp_path/'mine'
    mine.mkdir()
    for i, r in enumerate(drawings.select(range(3))):
        r['image'].convert('RGB').save(mine/f'{i}.png')
        (mine/f'{i}.txt').write_text(r['label'])
    assert len(load_retrieval_set(str(mine))[0]) == 3
    drawings.select(range(4)).to_parquet(str(tmp_path/'mine.parquet'))
    assert len(load_retrieval_set(str(tmp_path/'mine.parquet'))[0]) == 4
