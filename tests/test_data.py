"The emoji set, decoding, checks of captioned sets, parquet, and pairs."
import string

import datasets
import numpy as np
import pytest
from gmail_nb.data import (
    CAPTIONED,
    FEATURES,
    SOURCES,
    SPLITS,
    as_captioned,
    check_captioned,
    decode_image,
    emoji,
    pairs,
    parquet_files,
    quiet_datasets,
    read_parquet,
    show_images,
    show_pairs,
)
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

quick = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
names = st.lists(st.text(string.ascii_letters + string.digits, min_size=1, max_size=8), min_size=1, max_size=5,
                 unique_by=str.lower)
captions = (st.text(st.characters(codec='utf-8', exclude_categories=('Cc', 'Cs', 'Zl', 'Zp')), min_size=1, max_size=30)
            .map(str.strip).filter(bool))
REAL = datasets.Features({c: FEATURES[c] for c in CAPTIONED})
GENERATED = datasets.Features(key=FEATURES['key'], caption=FEATURES['label'], image=datasets.Image(),
                              sample=datasets.Value('int64'))

def picture(i=0): return Image.fromarray(np.full((8, 8, 3), i * 37 % 256, np.uint8))

def captioned(keys, text='a thing'):
    rows = [dict(key=k, image=picture(i), captions=[text]) for i, k in enumerate(keys)]
    return datasets.Dataset.from_list(rows, features=REAL)

def generated(ids):
    rows = [dict(key=k, caption=f'a {k}', image=picture(i), sample=s) for i, (k, s) in enumerate(ids)]
    return datasets.Dataset.from_list(rows, features=GENERATED)

# the emoji set
def test_a_row_is_named_by_key_and_source():
    ds = emoji()
    assert len(ds) == 3 * len(set(ds['key'])) and set(ds['source']) == set(SOURCES)
    assert len(set(zip(ds['key'], ds['source']))) == len(ds) and ds.features == FEATURES
    assert len(emoji('A', 'noto')) + len(emoji(['B', 'unseen'], 'noto')) == len(emoji(source='noto'))

def test_families_and_concepts_have_one_split():
    ds, further = emoji(), emoji(extra=True)
    assert len({(f, t) for f, t in zip(ds['family'], ds['split'])}) == len(set(ds['family']))
    assert len({(k, t) for k, t in zip(ds['key'], ds['split'])}) == len(set(ds['key']))
    seen = set(emoji(['A', 'B'])['key']) | set(further['key'])
    assert not seen & set(emoji('unseen')['key'])
    assert not set(further['key']) & set(ds['key'])
    assert 'twemoji' not in further['source']
    tones = {f for f, g in zip(further['family'], further['group']) if g != 'flags'}
    assert tones <= set(emoji('A')['family']) # tones of A only

def test_every_selection_is_disjoint_and_complete():
    n = {(t, s): len(emoji(t, s)) for t in SPLITS for s in SOURCES}
    assert sum(n.values()) == len(emoji()) == 3 * len(set(emoji()['key']))
    assert set(emoji(['B', 'unseen'], 'twemoji')['split']) == {'B', 'unseen'}

def test_extra_drawings_touch_no_test():
    extra, tested = emoji(extra=True), emoji(['B', 'unseen'])
    assert set(extra['source']) == {'fluent', 'noto'} and set(extra['split']) == {'extra'}
    assert not set(extra['key']) & set(emoji()['key'])
    tones = {f for f, g in zip(extra['family'], extra['group']) if g != 'flags'}
    assert tones <= set(emoji('A')['family']) and not tones & set(tested['family'])

def test_descriptions_and_captions():
    for ds in (emoji(), emoji(extra=True)):
        assert min(len(d.split()) for d in ds['description']) >= 25
        assert all(c[0] == l and c[1].startswith(f'{l}: ') for c, l in zip(ds['captions'], ds['label']))

@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(source='twitter'), "unknown source 'twitter': did you mean 'twemoji'"),
        (dict(split='train'), "unknown split 'train'"),
    ],
)
def test_unknown_names(kwargs, message):
    with pytest.raises(ValueError, match=message): emoji(**kwargs)

# decoding
@pytest.mark.parametrize(
    'image',
    [
        b'',
        b'RIFF',
        b'no image at all',
        dict(bytes=b'x', path='far/away.png'),
        dict(bytes=None, path=None),
        'nothing.png',
    ],
)
def test_what_does_not_decode_names_its_key(image):
    with pytest.raises(ValueError, match="the image of 'k7' .*does not decode"): decode_image(image, 'k7')

def test_transparency_becomes_white():
    clear = Image.new('RGBA', (2, 2), (255, 0, 0, 0)); clear.putpixel((1, 1), (255, 0, 0, 255))
    assert [decode_image(clear).getpixel(p) for p in ((0, 0), (1, 1))] == [(255, 255, 255), (255, 0, 0)]
    assert decode_image(clear.convert('P')).mode == decode_image(Image.new('L', (3, 3))).mode == 'RGB'

def test_photographs_are_turned_as_the_camera_says(tmp_path):
    exif = Image.Exif(); exif[274] = 6 # a quarter turn
    Image.new('RGB', (4, 2)).save(tmp_path/'a.jpg', exif=exif)
    assert decode_image(tmp_path/'a.jpg').size == (2, 4)

# checking
@quick
@given(names, st.integers(0, 4))
def test_a_repeated_key_is_named(keys, i):
    twice = keys[i % len(keys)]
    with pytest.raises(ValueError, match=f"more than one row has the key '{twice}'"):
        check_captioned(captioned(keys + [twice]))


@pytest.mark.parametrize(
    'bad, message', [([], 'no caption'), ([''], 'an empty caption'), (['fine', ' \t'], 'an empty caption')]
)
def test_an_empty_caption_is_named(bad, message):
    rows = [dict(key='one', image=picture(), captions=['fine']), dict(key='two', image=picture(), captions=bad)]
    with pytest.raises(ValueError, match=f"my set: 'two' has {message}"):
        check_captioned(datasets.Dataset.from_list(rows, features=REAL), 'my set')


@pytest.mark.parametrize('column', ['key', 'image', 'captions'])
def test_a_missing_column_is_named_beside_those_present(column):
    with pytest.raises(ValueError, match=f"no column '{column}': it has '.*expected are 'key', 'image', 'captions'"):
        check_captioned(captioned(['a']).remove_columns(column))

def test_a_broken_image_is_named():
    rows = [dict(key='fine', image=dict(bytes=b'oops', path='a.png'), captions=['x'])]
    with pytest.raises(ValueError, match="the image of 'fine'"):
        check_captioned(datasets.Dataset.from_list(rows, features=REAL))


# parquet
@quick
@given(names, captions)
def test_parquet_round_trip(tmp_path, keys, text):
    with quiet_datasets(): captioned(keys, text).to_parquet(tmp_path/'a.parquet')
    back = check_captioned(as_captioned(read_parquet([tmp_path/'a.parquet'])))
    assert list(back['key']) == keys and back['captions'][0] == [text]
    assert [np.asarray(i).tolist() for i in back['image']] == [
        np.asarray(picture(i)).tolist() for i in range(len(keys))
    ]


def test_large_sets_are_mapped(tmp_path):
    with quiet_datasets(): captioned(['a', 'b']).to_parquet(tmp_path/'a.parquet')
    mapped = read_parquet([tmp_path/'a.parquet'], cache_dir=str(tmp_path/'cache'), in_memory=0)
    assert list(mapped['key']) == ['a', 'b'] and mapped.cache_files

def test_damaged_and_absent_files(tmp_path):
    with quiet_datasets(): captioned(['a', 'b']).to_parquet(tmp_path/'a.parquet')
    (tmp_path/'cut.parquet').write_bytes((tmp_path/'a.parquet').read_bytes()[:-30])
    with pytest.raises(ValueError, match='cut.parquet is not a whole parquet file'):
        read_parquet([tmp_path/'cut.parquet'])
    with pytest.raises(FileNotFoundError, match='no parquet file'): read_parquet([tmp_path/'none.parquet'])

def test_columns_alone_are_read(tmp_path):
    with quiet_datasets(): captioned(['a', 'b']).to_parquet(tmp_path/'a.parquet')
    words = read_parquet(parquet_files(tmp_path), columns=['key', 'captions'])
    assert words.column_names == ['key', 'captions'] and words['key'][:] == ['a', 'b']
    assert parquet_files(tmp_path/'none') == [] and parquet_files(f'{tmp_path}/*.parquet') == [tmp_path/'a.parquet']

def test_progress_bars_come_back():
    datasets.enable_progress_bars()
    with pytest.raises(KeyError), quiet_datasets(): raise KeyError
    assert datasets.is_progress_bar_enabled()

def test_columns_by_another_name():
    ds = (
        captioned(['a', 'b'])
        .remove_columns('captions')
        .add_column('caption', ['x', 'y'])
        .rename_column('key', 'img_id')
    )
    assert as_captioned(ds, key='img_id')['captions'][:] == [['x'], ['y']]
    with pytest.raises(ValueError, match="no column 'key': it has 'img_id', 'image', 'caption'"):
        as_captioned(ds.select_columns(['img_id', 'image', 'caption']))

def test_rows_without_names_are_numbered():
    assert as_captioned(captioned(['a', 'b']), key=None)['key'][:] == ['000000000', '000000001']

def test_captions_alone_are_a_set_too():
    words = as_captioned(captioned(['a']).remove_columns('image'), image=None)
    assert words.column_names == ['key', 'captions'] and check_captioned(words, images=0) is words
    with pytest.raises(ValueError, match="no column 'image'"): check_captioned(words)

def test_samples_of_a_key_are_told_apart():
    ds = captioned(['a', 'b']).remove_columns('key').add_column('key', ['a', 'a'])
    check_captioned(ds.add_column('sample', [0, 1]))
    with pytest.raises(ValueError, match=r"the \(key, sample\) \('a', 0\)"):
        check_captioned(ds.add_column('sample', [0, 0]))


def test_columns_of_other_types():
    ds = captioned(['a'])
    text = ds.remove_columns('captions').add_column('caption', ['one'])
    with quiet_datasets(): large = text.cast_column('caption', datasets.Value('large_string'))
    assert as_captioned(large)['captions'][:] == [['one']] # what polars writes
    assert as_captioned(ds.add_column('caption', ['other']), captions='caption')['captions'][:] == [['other']]
    with pytest.raises(ValueError, match="'image' holds no images"):
        as_captioned(ds.remove_columns('image').add_column('image', [3]))
    with pytest.raises(ValueError, match="'caption' holds no text"):
        as_captioned(ds.remove_columns('captions').add_column('caption', [3]))
    with pytest.raises(ValueError, match='row 1 has no key'):
        check_captioned(ds.remove_columns('key').add_column('key', [None]))


def test_sixteen_bits_are_scaled(tmp_path):
    Image.fromarray(np.full((4, 4), 30_000, np.uint16)).save(tmp_path/'a.png')
    assert decode_image(tmp_path/'a.png').getpixel((0, 0)) == (117, 117, 117) # 30000/257
    assert decode_image(Image.new('I', (2, 2), 77)).getpixel((0, 0)) == (77, 77, 77)

# pairs
@quick
@given(names, st.integers(1, 3), st.randoms())
def test_pairs_do_not_depend_on_the_order_of_rows(keys, samples, random):
    ids = [(k, s) for k in keys for s in range(samples)]; rows = list(range(len(ids))); random.shuffle(rows)
    made = generated(ids)
    a, b = pairs(captioned(keys), made), pairs(captioned(keys), made.select(rows))
    assert a.keys == b.keys == sorted(k for k in keys for _ in range(samples)) and len(a) == len(ids)
    assert [np.asarray(p['generated']).tolist() for p in a] == [np.asarray(p['generated']).tolist() for p in b]

@pytest.mark.parametrize(
    'keys, ids, message',
    [
        ('ab', [('a', 0), ('c', 0), ('d', 0)], "2 of 3 generated keys are not in the real set: 'c', 'd'"),
        ('aab', [('a', 0)], "the real set: more than one row has the key 'a'"),
        ('ab', [('a', 0), ('a', 0)], r"more than one row has the \(key, sample\) \('a', 0\)"),
        ('ab', [('x', 0)], 'no key of the generated set'),
    ],
)
def test_wrong_joins_are_explained(keys, ids, message):
    with pytest.raises(ValueError, match=message): pairs(captioned(list(keys)), generated(ids))

def test_not_strict_leaves_out():
    assert pairs(captioned(['a']), generated([('a', 0), ('b', 0)]), strict=False).keys == ['a']
    with pytest.raises(ValueError, match='choose one'): pairs(emoji('unseen'), generated([('a', 0)]))

def test_a_broken_generated_image_is_named():
    made = datasets.Dataset.from_list(
        [dict(key='a', caption='x', image=dict(bytes=b'oops', path='made.png'), sample=0)], features=GENERATED
    )
    with pytest.raises(ValueError, match=r"the image of 'a' \(made.png\)"): pairs(captioned(['a']), made)[0]

def test_figures():
    assert len(show_images([picture()]*3, ncols=2).axes) == 4
    assert len(show_pairs(pairs(captioned(['a', 'b']), generated([('a', 0), ('a', 1), ('b', 0)])), n=2).axes) == 6
    with pytest.raises(ValueError, match='2 images but 1 titles'): show_images([picture()]*2, titles=['a'])
