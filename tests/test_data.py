"Readers of captioned sets: what comes back, and what a wrong file is told."
import csv, json, string

import numpy as np, pytest
from gmail_nb.data import (FEATURES, SOURCES, SPLITS, as_captioned, captions_of, check_captioned, decode_image, emoji, from_coco, from_folder,
                           from_table, load_captioned, pairs, quiet_datasets, read_parquet, show_images, show_pairs)
import datasets
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

quick = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
names = st.lists(st.text(string.ascii_letters + string.digits, min_size=1, max_size=8), min_size=1, max_size=5, unique_by=str.lower)
captions = st.text(st.characters(codec='utf-8', exclude_categories=('Cc', 'Cs', 'Zl', 'Zp')), min_size=1, max_size=30).map(str.strip).filter(bool)
CAPTIONED = datasets.Features({c: FEATURES[c] for c in ('key', 'image', 'captions')})
GENERATED = datasets.Features(key=FEATURES['key'], caption=FEATURES['label'], image=datasets.Image(), sample=datasets.Value('int64'))

def picture(i=0): return Image.fromarray(np.full((8, 8, 3), i * 37 % 256, np.uint8))
def captioned(keys, text='a thing'): return datasets.Dataset.from_list([dict(key=k, image=picture(i), captions=[text]) for i, k in enumerate(keys)], features=CAPTIONED)
def generated(ids): return datasets.Dataset.from_list([dict(key=k, caption=f'a {k}', image=picture(i), sample=s) for i, (k, s) in enumerate(ids)], features=GENERATED)

# the emoji set
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

@pytest.mark.parametrize('kwargs, message', [(dict(source='twitter'), "unknown source 'twitter': did you mean 'twemoji'"), (dict(split='train'), "unknown split 'train'")])
def test_unknown_names(kwargs, message):
    with pytest.raises(ValueError, match=message): emoji(**kwargs)

# decoding
@pytest.mark.parametrize('image', [b'', b'RIFF', b'no image at all', dict(bytes=b'x', path='far/away.png'), dict(bytes=None, path=None), 'nothing.png'])
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
    with pytest.raises(ValueError, match=f"more than one row has the key '{twice}'"): check_captioned(captioned(keys + [twice]))

@pytest.mark.parametrize('bad, message', [([], 'no caption'), ([''], 'an empty caption'), (['fine', ' \t'], 'an empty caption')])
def test_an_empty_caption_is_named(bad, message):
    rows = [dict(key='one', image=picture(), captions=['fine']), dict(key='two', image=picture(), captions=bad)]
    with pytest.raises(ValueError, match=f"my set: 'two' has {message}"): check_captioned(datasets.Dataset.from_list(rows, features=CAPTIONED), 'my set')

@pytest.mark.parametrize('column', ['key', 'image', 'captions'])
def test_a_missing_column_is_named_beside_those_present(column):
    with pytest.raises(ValueError, match=f"no column '{column}': it has '.*expected are 'key', 'image', 'captions'"):
        check_captioned(captioned(['a']).remove_columns(column))

def test_a_broken_image_is_named():
    rows = [dict(key='fine', image=dict(bytes=b'oops', path='a.png'), captions=['x'])]
    with pytest.raises(ValueError, match="the image of 'fine'"): check_captioned(datasets.Dataset.from_list(rows, features=CAPTIONED))

# parquet
@quick
@given(names, captions)
def test_parquet_round_trip(tmp_path, keys, text):
    with quiet_datasets(): captioned(keys, text).to_parquet(tmp_path/'a.parquet')
    back = load_captioned(tmp_path/'a.parquet')
    assert list(back['key']) == keys and back['captions'][0] == [text]
    assert [np.asarray(i).tolist() for i in back['image']] == [np.asarray(picture(i)).tolist() for i in range(len(keys))]

def test_large_sets_are_mapped(tmp_path):
    with quiet_datasets(): captioned(['a', 'b']).to_parquet(tmp_path/'a.parquet')
    mapped = read_parquet([tmp_path/'a.parquet'], cache_dir=str(tmp_path/'cache'), in_memory=0)
    assert list(mapped['key']) == ['a', 'b'] and mapped.cache_files

def test_damaged_and_absent_files(tmp_path):
    with quiet_datasets(): captioned(['a', 'b']).to_parquet(tmp_path/'a.parquet')
    (tmp_path/'cut.parquet').write_bytes((tmp_path/'a.parquet').read_bytes()[:-30])
    with pytest.raises(ValueError, match='cut.parquet is not a whole parquet file'): read_parquet([tmp_path/'cut.parquet'])
    with pytest.raises(FileNotFoundError, match='no parquet file'): read_parquet([tmp_path/'none.parquet'])
    with pytest.raises(FileNotFoundError, match='expected a parquet file'): load_captioned(tmp_path/'none.parquet')
    (tmp_path/'words.csv').write_text('a,b\n')
    with pytest.raises(ValueError, match='is not parquet'): load_captioned(tmp_path/'words.csv')

def test_progress_bars_come_back():
    datasets.enable_progress_bars()
    with pytest.raises(KeyError), quiet_datasets(): raise KeyError
    assert datasets.is_progress_bar_enabled()

def test_columns_by_another_name():
    ds = captioned(['a', 'b']).remove_columns('captions').add_column('caption', ['x', 'y']).rename_column('key', 'img_id')
    assert as_captioned(ds, key='img_id')['captions'][:] == [['x'], ['y']]
    with pytest.raises(ValueError, match="no column 'key'"): as_captioned(ds)

# folders
@quick
@given(names, st.lists(captions, min_size=1, max_size=3), st.sampled_from(['metadata', 'tabs', 'beside']))
def test_folder_forms_agree(tmp_path_factory, keys, texts, form):
    folder = tmp_path_factory.mktemp('folder')
    for k in keys: picture().save(folder/f'{k}.png')
    if form == 'metadata':
        with open(folder/'metadata.csv', 'w', encoding='utf-8', newline='') as f: csv.writer(f).writerows([['file_name', 'caption'], *([f'{k}.png', t] for k in keys for t in texts)])
    elif form == 'tabs': (folder/'captions.txt').write_text(''.join(f'{k}.png\t{t}\n' for k in keys for t in texts), encoding='utf-8')
    else:
        for k in keys: (folder/f'{k}.txt').write_text('\n'.join(texts), encoding='utf-8')
    if form == 'beside' and 'captions' in keys: return # that name is taken by the other form
    ds = from_folder(folder)
    assert dict(zip(ds['key'], ds['captions'])) == {k: texts for k in keys}

def test_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match='no folder'): from_folder(tmp_path/'nowhere')
    with pytest.raises(ValueError, match='holds no images'): from_folder(tmp_path)
    picture().save(tmp_path/'a.png'); picture().save(tmp_path/'b.png')
    (tmp_path/'captions.txt').write_text('image,caption\na.png#0,one, two\na.png#1,three\n')
    with pytest.raises(ValueError, match="no caption for 'b.png'"): from_folder(tmp_path)
    (tmp_path/'captions.txt').write_text('a.png,one\nb.png,two\nc.png,three\n')
    with pytest.raises(FileNotFoundError, match="'c.png'"): from_folder(tmp_path)
    (tmp_path/'captions.txt').write_text('a.png,one\nnonsense\n')
    with pytest.raises(ValueError, match='line 2'): from_folder(tmp_path)
    (tmp_path/'metadata.csv').write_text('name,text\na.png,x\n')
    with pytest.raises(ValueError, match="metadata.csv has the columns 'name', 'text'"): from_folder(tmp_path)

# COCO
@pytest.fixture
def coco(tmp_path):
    images = [dict(filepath='val2014', filename=f'COCO_{i}.png', cocoid=i, imgid=i, split=s, sentences=[dict(raw=f'caption {i}.{j} ') for j in range(2)]) for i, s in enumerate(['test', 'val', 'restval'])]
    (tmp_path/'val2014').mkdir()
    for i in images: picture(i['cocoid']).save(tmp_path/'val2014'/i['filename'])
    (tmp_path/'karpathy.json').write_text(json.dumps(dict(images=images)))
    plain = dict(images=[dict(id=i['cocoid'], file_name=i['filename']) for i in images], annotations=[dict(image_id=i['cocoid'], caption=s['raw']) for i in images for s in i['sentences']])
    (tmp_path/'plain.json').write_text(json.dumps(plain))
    return tmp_path

def test_both_files_of_coco_agree(coco):
    karpathy, plain = from_coco(coco/'karpathy.json', coco), from_coco(coco/'plain.json', coco/'val2014')
    assert karpathy['captions'][:] == plain['captions'][:] and karpathy['key'][:] == plain['key'][:] == ['0', '1', '2']
    assert from_coco(coco/'karpathy.json', coco, split='val+restval')['key'][:] == ['1', '2']

def test_coco_errors(coco):
    with pytest.raises(ValueError, match="unknown split 'tset': did you mean 'test'"): from_coco(coco/'karpathy.json', coco, split='tset')
    with pytest.raises(ValueError, match='has no splits'): from_coco(coco/'plain.json', coco/'val2014', split='test')
    with pytest.raises(FileNotFoundError, match='does not hold 3 of 3 images'): from_coco(coco/'plain.json', coco)
    (coco/'other.json').write_text('{"licenses": []}')
    with pytest.raises(ValueError, match="it has 'licenses'"): from_coco(coco/'other.json', coco)

# tables
@quick
@given(names, captions)
def test_tables_agree(tmp_path_factory, keys, text):
    folder = tmp_path_factory.mktemp('tables')
    for suffix, mark in (('csv', ','), ('tsv', '\t')):
        with open(folder/f't.{suffix}', 'w', encoding='utf-8', newline='') as f:
            if suffix == 'csv': csv.writer(f, delimiter=mark).writerows([['key', 'caption'], *([k, text] for k in keys)])
            else: f.write(''.join(f'{k}\t{c}\n' for k, c in [('key', 'caption'), *((k, text) for k in keys)])) # quotes are characters
    (folder/'t.jsonl').write_text('\n'.join(json.dumps(dict(key=k, caption=text)) for k in keys), encoding='utf-8')
    for suffix in ('csv', 'tsv', 'jsonl'): assert from_table(folder/f't.{suffix}').to_dict() == dict(key=keys, caption=[text]*len(keys))

@pytest.mark.parametrize('lines, message', [
    ('{"key": "a", "caption": "one"}\n{"key": "b", "caption": " "}', 'row 2 has an empty caption'), ('{"key": "a", "caption": "x"}\n{"key": "a", "caption": "y"}', "more than one row has the key 'a'"),
    ('{"key": "a", "caption": 5}', 'not text'), ('{"key": null, "caption": "x"}', 'row 1 has an empty key'), ('[1]', 'no JSON object'), ('{"key": "a", "captions": ["x", ""]}', 'row 1 has an empty caption'),
    ('{"key": "a", "text": "one"}', "row 1 has no 'caption'"), ('{"key": "a"', 'line 1 is not JSON'), ('', 'has no rows')])
def test_table_errors(tmp_path, lines, message):
    (tmp_path/'t.jsonl').write_text(lines)
    with pytest.raises(ValueError, match=message): from_table(tmp_path/'t.jsonl')

@pytest.mark.parametrize('content, message', [
    ('key,caption\na,"hello there\nb,a dog\nc,a "cat"\n', "t.CSV after row 0: ',' expected"), ('key,caption\na,hello, there\n', 'line 2 has 3 fields, but there are 2 columns'),
    ('key,caption\na,' + 'x'*200_000, 't.CSV after row 0: field larger'), ('key,caption\na,\xe9'.encode('latin-1'), 't.CSV after row .: not UTF-8')])
def test_broken_tables_name_their_file(tmp_path, content, message):
    (tmp_path/'t.CSV').write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message): from_table(tmp_path/'t.CSV')

def test_no_row_of_a_table_is_lost(tmp_path):
    (tmp_path/'t.tsv').write_text('key\tcaption\na\t"hello there\nb\ta dog\nc\ta "cat"\nd\tfour\n\n')
    assert from_table(tmp_path/'t.tsv').to_dict() == dict(key=list('abcd'), caption=['"hello there', 'a dog', 'a "cat"', 'four'])
    (tmp_path/'t.jsonl').write_text('{"key": "a", "caption": "x\u2028y"}\n\n', encoding='utf-8')
    assert from_table(tmp_path/'t.jsonl')['caption'][:] == ['x\u2028y']
    (tmp_path/'t.jsonl').write_text('{"key": "a", "captions": ["x", "y"]}\n{"key": "b", "captions": ["z"]}')
    assert from_table(tmp_path/'t.jsonl')['captions'][:] == [['x', 'y'], ['z']]

@pytest.mark.parametrize('content, message', [
    (dict(images=[dict(id=1, file_name='a.png')], annotations=[dict(id=1, image_id=1, bbox=[])]), "has no caption but 'id', 'image_id', 'bbox'"),
    (dict(images=[dict(id=1, file_name='a.png')], annotations=[dict(image_id=1, caption=None)]), 'has no caption'), ([1], 'it has a list')])
def test_other_json_is_no_caption_file(tmp_path, content, message):
    (tmp_path/'instances.json').write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f'instances.json is no COCO caption file: .*{message}'): from_coco(tmp_path/'instances.json', tmp_path)

def test_columns_of_other_types():
    ds = captioned(['a'])
    text = ds.remove_columns('captions').add_column('caption', ['one'])
    with quiet_datasets(): large = text.cast_column('caption', datasets.Value('large_string'))
    assert as_captioned(large)['captions'][:] == [['one']] # what polars writes
    assert as_captioned(ds.add_column('caption', ['other']), captions='caption')['captions'][:] == [['other']]
    with pytest.raises(ValueError, match="'image' holds no images"): as_captioned(ds.remove_columns('image').add_column('image', [3]))
    with pytest.raises(ValueError, match="'caption' holds no text"): as_captioned(ds.remove_columns('captions').add_column('caption', [3]))
    with pytest.raises(ValueError, match='row 1 has no key'): check_captioned(ds.remove_columns('key').add_column('key', [None]))

def test_sixteen_bits_are_scaled(tmp_path):
    Image.fromarray(np.full((4, 4), 30_000, np.uint16)).save(tmp_path/'a.png')
    assert decode_image(tmp_path/'a.png').getpixel((0, 0)) == (117, 117, 117) # 30000/257
    assert decode_image(Image.new('I', (2, 2), 77)).getpixel((0, 0)) == (77, 77, 77)

def test_captions_of_a_set():
    ds = emoji('unseen')
    assert captions_of(ds)['key'][:] == list(dict.fromkeys(ds['key'])) and captions_of(captioned(['a']), which=5)['caption'][:] == ['a thing']

# pairs
@quick
@given(names, st.integers(1, 3), st.randoms())
def test_pairs_do_not_depend_on_the_order_of_rows(keys, samples, random):
    ids = [(k, s) for k in keys for s in range(samples)]; rows = list(range(len(ids))); random.shuffle(rows)
    made = generated(ids)
    a, b = pairs(captioned(keys), made), pairs(captioned(keys), made.select(rows))
    assert a.keys == b.keys == sorted(k for k in keys for _ in range(samples)) and len(a) == len(ids)
    assert [np.asarray(p['generated']).tolist() for p in a] == [np.asarray(p['generated']).tolist() for p in b]

@pytest.mark.parametrize('keys, ids, message', [
    ('ab', [('a', 0), ('c', 0), ('d', 0)], "2 of 3 generated keys are not in the real set: 'c', 'd'"), ('aab', [('a', 0)], "the real set: more than one row has the key 'a'"),
    ('ab', [('a', 0), ('a', 0)], r"more than one row has the \(key, sample\) \('a', 0\)"), ('ab', [('x', 0)], 'no key of the generated set')])
def test_wrong_joins_are_explained(keys, ids, message):
    with pytest.raises(ValueError, match=message): pairs(captioned(list(keys)), generated(ids))

def test_not_strict_leaves_out():
    assert pairs(captioned(['a']), generated([('a', 0), ('b', 0)]), strict=False).keys == ['a']
    with pytest.raises(ValueError, match='choose one'): pairs(emoji('unseen'), generated([('a', 0)]))

def test_a_broken_generated_image_is_named():
    made = datasets.Dataset.from_list([dict(key='a', caption='x', image=dict(bytes=b'oops', path='made.png'), sample=0)], features=GENERATED)
    with pytest.raises(ValueError, match=r"the image of 'a' \(made.png\)"): pairs(captioned(['a']), made)[0]

def test_figures():
    assert len(show_images([picture()]*3, ncols=2).axes) == 4
    assert len(show_pairs(pairs(captioned(['a', 'b']), generated([('a', 0), ('a', 1), ('b', 0)])), n=2).axes) == 6
    with pytest.raises(ValueError, match='2 images but 1 titles'): show_images([picture()]*2, titles=['a'])
