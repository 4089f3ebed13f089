"Readers of captioned sets: what comes back in every form, and what a wrong file is told."
import csv
import io
import json
import string
import tarfile

import datasets
import numpy as np
import pytest
from gmail_nb import sources
from gmail_nb.data import CAPTIONED, FEATURES, emoji, quiet_datasets
from gmail_nb.settings import SourceSettings
from gmail_nb.sources import captions_of, from_coco, from_folder, from_table, key_of, load_captioned
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

quick = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
names = st.lists(st.text(string.ascii_letters + string.digits, min_size=1, max_size=8), min_size=1, max_size=5,
                 unique_by=str.lower)
captions = (st.text(st.characters(codec='utf-8', exclude_categories=('Cc', 'Cs', 'Zl', 'Zp')), min_size=1, max_size=30)
            .map(str.strip).filter(bool))
REAL = datasets.Features({c: FEATURES[c] for c in CAPTIONED})

def picture(i=0): return Image.fromarray(np.full((8, 8, 3), i * 37 % 256, np.uint8))

def captioned(keys, text='a thing'):
    rows = [dict(key=k, image=picture(i), captions=[text]) for i, k in enumerate(keys)]
    return datasets.Dataset.from_list(rows, features=REAL)

def write_parquet(ds, path):
    with quiet_datasets(): ds.to_parquet(path)
    return path

# one door
UNTIDY = {'a b/v1.2.png': ['one', 'two'], 'a b/.hidden/x.jpg': ['three'], 'ключ.PNG': ['four, with a comma'],
          'd.e/f#g.webp': ['five']}

@pytest.fixture
def untidy(tmp_path):
    "Pictures in sub-folders, with dots and spaces in their names, and a metadata.csv."
    root = tmp_path/'my photos v1.0'
    for i, name in enumerate(UNTIDY):
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(root/name)
    with open(root/'metadata.csv', 'w', encoding='utf-8', newline='') as f:
        csv.writer(f).writerows([['file_name', 'caption'], *([n, c] for n, cs in UNTIDY.items() for c in cs)])
    return root

@pytest.mark.parametrize('images', [True, False])
def test_a_folder_and_its_metadata_have_the_same_keys(untidy, images):
    of = {key_of(n): c for n, c in UNTIDY.items()}
    for source in (untidy, str(untidy), untidy/'metadata.csv'):
        ds = load_captioned(source, images=images)
        assert dict(zip(ds['key'], ds['captions'])) == of
        assert ('image' in ds.column_names) == images

def test_a_file_of_captions_is_read_with_the_pictures_of_its_folder(untidy):
    (untidy/'metadata.csv').unlink()
    (untidy/'captions.txt').write_text(''.join(f'{n}#{i}\t{c}\n' for n, cs in UNTIDY.items() for i, c in enumerate(cs)))
    of = {key_of(n): c for n, c in UNTIDY.items()}
    for source in (untidy, untidy/'captions.txt'):
        assert dict(zip(load_captioned(source)['key'], load_captioned(source)['captions'])) == of
    assert load_captioned(untidy)[0]['image'].size == (8, 8)

def test_captions_alone_decode_nothing(untidy):
    for p in untidy.rglob('*.*'):
        if p.suffix.lower() in ('.png', '.jpg', '.webp'): p.write_bytes(b'no picture')
    assert len(load_captioned(untidy, images=False)) == 4
    with pytest.raises(ValueError, match='does not decode'): load_captioned(untidy)

def test_a_metadata_file_without_pictures_is_enough_for_words(tmp_path):
    (tmp_path/'metadata.csv').write_text('file_name,caption\nx/a.b.png,one\nx/a.b.png,two\n')
    assert load_captioned(tmp_path/'metadata.csv', images=False).to_dict() == dict(
        key=['x/a.b'], captions=[['one', 'two']]
    )
    with pytest.raises(ValueError, match='holds no images'): load_captioned(tmp_path/'metadata.csv')

def test_other_texts_may_lie_beside_pictures(tmp_path):
    picture().save(tmp_path/'a.png')
    (tmp_path/'a.txt').write_text('one\n\ntwo\n')
    (tmp_path/'README.txt').write_text('about these pictures')
    assert load_captioned(tmp_path)['captions'][:] == [['one', 'two']]

def test_every_form_of_parquet(tmp_path):
    for i, keys in enumerate(('ab', 'cd')): write_parquet(captioned(list(keys)), tmp_path/f'part-{i}.parquet')
    for source in (tmp_path, str(tmp_path), f'{tmp_path}/part-*.parquet'):
        for images in (True, False): assert load_captioned(source, images=images)['key'][:] == list('abcd')
    assert load_captioned(tmp_path/'part-1.parquet')['key'][:] == ['c', 'd']
    assert load_captioned(captioned(['a']), images=False).column_names == ['key', 'captions']

@quick
@given(names, captions)
def test_parquet_round_trip(tmp_path, keys, text):
    back = load_captioned(write_parquet(captioned(keys, text), tmp_path/'a.parquet'))
    assert list(back['key']) == keys and back['captions'][0] == [text]
    assert [np.asarray(i).tolist() for i in back['image']] == [
        np.asarray(picture(i)).tolist() for i in range(len(keys))
    ]


def test_columns_of_any_name(tmp_path):
    ds = captioned(['a', 'b']).rename_columns(dict(key='id', image='picture', captions='words'))
    path, how = write_parquet(ds, tmp_path/'a.parquet'), SourceSettings(key='id', image='picture', caption='words')
    assert load_captioned(path, how)['captions'][:] == [['a thing']]*2
    assert load_captioned(path, SourceSettings(key=None, caption='words'), images=False)['key'][:] == [
        '000000000',
        '000000001',
    ]
    with pytest.raises(
        ValueError, match="no column 'key', 'caption', 'image': it has 'id', 'picture', 'words'.*--no-key"
    ):
        load_captioned(path)

def test_styles_of_one_concept_stay_apart(tmp_path):
    path = write_parquet(emoji('unseen').select(range(9)), tmp_path/'a.parquet')
    assert len(load_captioned(path)) == len(load_captioned(path, images=False)) == 9

@pytest.mark.parametrize('suffix', ['csv', 'tsv', 'jsonl'])
def test_tables_with_pictures(tmp_path, suffix):
    (tmp_path/'p').mkdir()
    for i in range(2): picture(i).save(tmp_path/f'p/{i} x.png')
    rows = [dict(key=f'k{i}', caption=f'caption {i}', image=f'p/{i} x.png') for i in range(2)]
    mark = '\t' if suffix == 'tsv' else ','
    lines = (
        [json.dumps(r) for r in rows]
        if suffix == 'jsonl'
        else [mark.join(r) for r in (rows[0], *(r.values() for r in rows))]
    )
    path = tmp_path/f't.{suffix}'
    path.write_text('\n'.join(lines))
    ds = load_captioned(path)
    assert (
        ds['key'][:] == ['k0', 'k1']
        and ds['captions'][:] == [['caption 0'], ['caption 1']]
        and ds[1]['image'].size == (8, 8)
    )
    (tmp_path/'p/1 x.png').unlink()
    assert load_captioned(path, images=False)['key'][:] == ['k0', 'k1']
    with pytest.raises(FileNotFoundError, match=r"names 1 of 2 images that are not there, such as 'p/1 x.png'"):
        load_captioned(path)


def test_a_table_without_pictures_is_enough_for_words(tmp_path):
    (tmp_path/'cc3m.tsv').write_text('a dog\thttp://example.com/1\n"a cat\thttp://example.com/2\n')
    how = SourceSettings(key=None, caption='0', header=False)
    assert load_captioned(tmp_path/'cc3m.tsv', how, images=False)['captions'][:] == [['a dog'], ['"a cat']]
    (tmp_path/'t.csv').write_text('key,text\na,one\n')
    assert load_captioned(tmp_path/'t.csv', images=False)['captions'][:] == [['one']]
    with pytest.raises(ValueError, match="row 1 has no 'image': it has 'key', 'text'"): load_captioned(tmp_path/'t.csv')

def test_both_files_of_coco_through_the_door(coco):
    split = SourceSettings(images=str(coco), split='val+restval')
    assert load_captioned(coco/'karpathy.json', split)['key'][:] == ['1', '2']
    assert load_captioned(coco/'karpathy.json', SourceSettings(split='test'), images=False)['captions'][:] == [
        ['caption 0.0', 'caption 0.1']
    ]
    assert load_captioned(coco/'plain.json', SourceSettings(images=str(coco/'val2014')))['key'][:] == ['0', '1', '2']
    assert load_captioned(coco/'karpathy.json')['file'][0] == 'COCO_0.png' # pictures beside the file
    with pytest.raises(FileNotFoundError, match='does not hold 3 of 3 images'): load_captioned(coco/'plain.json')
    with pytest.raises(ValueError, match="unknown split 'tset'"):
        load_captioned(coco/'karpathy.json', SourceSettings(split='tset'))


def test_annotations_alone_are_enough_for_words(tmp_path):
    rows = [dict(image_id=7, caption='a dog '), dict(image_id=3, caption='a cat'), dict(image_id=7, caption='the dog')]
    (tmp_path/'c.json').write_text(
        json.dumps(dict(images=[dict(id=3, file_name='x'), dict(id=9, file_name='y')], annotations=rows))
    )
    ds = load_captioned(tmp_path/'c.json', images=False)
    assert ds.to_dict() == dict(
        key=['7', '3'], captions=[['a dog', 'the dog'], ['a cat']]
    )  # in the order of the annotations
    (tmp_path/'d.json').write_text(json.dumps(dict(annotations=rows)))
    assert load_captioned(tmp_path/'d.json', images=False).to_dict() == ds.to_dict()
    with pytest.raises(ValueError, match="d.json names no images"): load_captioned(tmp_path/'d.json')

@pytest.fixture
def made(tmp_path):
    "What `generate` writes: two samples of a key, beside a table of captions and a table of quality."
    folder, features = (
        tmp_path/'made',
        datasets.Features({**REAL, 'caption': FEATURES['label'], 'sample': datasets.Value('int32')}),
    )
    del features['captions']
    folder.mkdir()
    rows = [dict(key='a', image=picture(s), caption='one', sample=s) for s in range(2)]
    write_parquet(datasets.Dataset.from_list(rows, features=features), folder/'shard-00000-of-00001.parquet')
    write_parquet(datasets.Dataset.from_dict(dict(key=['a'], index=[0], caption=['one'])), folder/'captions.parquet')
    (folder/'settings.json').write_text('{}')
    (folder/'manifest.json').write_text('{"shards": [{"shard": "shard-00000-of-00001.parquet"}]}')
    return folder

def test_generated_images_are_a_captioned_set(made):
    ds = load_captioned(made)
    assert ds['key'][:] == ['a', 'a'] and ds['captions'][:] == [['one'], ['one']] and ds['sample'][:] == [0, 1]
    assert ds[1]['image'].size == (8, 8)
    assert load_captioned(made, images=False).to_dict() == dict(key=['a', 'a'], captions=[['one']]*2, sample=[0, 1])

def test_generated_images_must_be_complete(made):
    (made/'shard-00000-of-00001.parquet').rename(made/'away')
    with pytest.raises(ValueError, match='has lost shards'): load_captioned(made)
    (made/'manifest.json').unlink()
    with pytest.raises(ValueError, match="the run in 'made' is not complete"): load_captioned(made)

def test_what_is_not_there_or_no_set_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match='no captions at .*expected a parquet file'):
        load_captioned(tmp_path/'none.parquet')
    with pytest.raises(FileNotFoundError, match='no captions at .*expected a parquet file'):
        load_captioned('nothing.txt')
    with pytest.raises(FileNotFoundError, match='no captions at'): load_captioned('sub/nothing.csv')
    (tmp_path/'a.md').write_text('a cat')
    with pytest.raises(ValueError, match='a.md is no captioned set: expected'): load_captioned(tmp_path/'a.md')
    (tmp_path/'words.csv').write_text('a,b\n')
    with pytest.raises(ValueError, match='words.csv has no rows'): load_captioned(tmp_path/'words.csv')
    write_parquet(captioned(['a']), tmp_path/'a.parquet')
    (tmp_path/'cut.parquet').write_bytes((tmp_path/'a.parquet').read_bytes()[:-30])
    for images in (True, False):
        with pytest.raises(ValueError, match='cut.parquet is not a whole parquet file'):
            load_captioned(tmp_path/'cut.parquet', images=images)


def test_for_training_only_its_splits_are_read(tmp_path, caplog):
    def file(*splits):
        images = [
            dict(filename='x.png', cocoid=i, split=s, sentences=[dict(raw=f'caption {i}')])
            for i, s in enumerate(splits)
        ]
        (tmp_path/'k.json').write_text(json.dumps(dict(images=images)))
        return tmp_path/'k.json'
    assert load_captioned(file('train', 'restval', 'val', 'test'), images=False, training=True)['key'][:] == ['0', '1']
    assert 'k.json: read for training is train+restval, without val+test (--split names others)' in caplog.text
    assert load_captioned(file('val', 'train'), images=False, training=True)['key'][:] == [
        '1'
    ]  # Flickr30k has no restval
    assert len(load_captioned(file('train', 'test'), images=False)) == 2  # what measures may read all
    with pytest.raises(ValueError, match="has the splits 'test' and none for training.*--split"):
        load_captioned(file('test'), images=False, training=True)


def test_a_set_of_the_hub_is_read_by_its_id(monkeypatch):
    asked = []
    def load(repo, split, cache_dir):
        asked.append((repo, split))
        return captioned(['a', 'b'])
    monkeypatch.setattr(sources.datasets, 'load_dataset', load)
    assert load_captioned('owner/pictures', training=True)['key'][:] == ['a', 'b']
    load_captioned('owner/pictures', SourceSettings(split='validation[:10]'), images=False)
    assert asked == [('owner/pictures', 'train'), ('owner/pictures', 'validation[:10]')]

def test_a_coco_file_without_its_images_says_where_it_looked(coco):
    with pytest.raises(FileNotFoundError, match=r"the folder of a.json does not hold 1 of 1 images.*\(--images\)"):
        (coco/'a.json').write_text(
            json.dumps(dict(images=[dict(id=1, file_name='no.png')], annotations=[dict(image_id=1, caption='x')]))
        )
        from_coco(coco/'a.json', '')

# tar shards
def write_tar(path, files):
    "Members in this order: {name: bytes}."
    with tarfile.open(path, 'w') as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path

def png(i=0):
    file = io.BytesIO()
    picture(i).save(file, 'PNG')
    return file.getvalue()

@pytest.fixture
def tars(tmp_path):
    "Three samples in two shards, with a text or JSON, and what else such shards hold."
    (tmp_path/'tars').mkdir()
    write_tar(
        tmp_path/'tars/a.tar',
        {
            'x/1.png': png(1),
            'x/1.txt': b'one\ntwo\n',
            'x/1.json': b'{"caption": "of json", "url": null}',
            './2.PNG': png(2),
            './2.json': b'{"caption": "three", "width": 8, "more": {"a": []}}',
        },
    )
    write_tar(tmp_path/'tars/b.tar', {'3.seg.png': png(3), '3.txt': 'vier ü'.encode()})
    return tmp_path/'tars'

@pytest.mark.parametrize('mapped', [False, True])
def test_tar_shards_are_a_captioned_set(tars, tmp_path, monkeypatch, mapped):
    if mapped: monkeypatch.setattr(sources, 'IN_MEMORY', 0)
    for source in (tars, f'{tars}/*.tar'):
        ds = load_captioned(source, SourceSettings(cache_dir=str(tmp_path/'cache')))
        assert dict(zip(ds['key'], ds['captions'])) == {'x/1': ['one', 'two'], '2': ['three'], '3': ['vier ü']}
        assert bool(ds.cache_files) == mapped and ds[1]['image'].getpixel((0, 0)) == picture(2).getpixel((0, 0))
    assert load_captioned(tars/'a.tar', SourceSettings(caption='caption'), images=False)['captions'][:] == [
        ['of json'],
        ['three'],
    ]


def test_a_changed_shard_is_read_again(tars, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, 'IN_MEMORY', 0)
    how = SourceSettings(cache_dir=str(tmp_path/'cache'))
    load_captioned(tars/'b.tar', how)
    write_tar(tars/'b.tar', {'9.png': png(), '9.txt': b'another'})
    assert load_captioned(tars/'b.tar', how)['captions'][:] == [['another']]

@pytest.mark.parametrize('mapped', [False, True])
@pytest.mark.parametrize('images', [False, True])
def test_shards_that_end_early_are_named(tars, tmp_path, monkeypatch, images, mapped):
    if mapped: monkeypatch.setattr(sources, 'IN_MEMORY', 0)
    whole = (tars/'a.tar').read_bytes()
    with tarfile.open(tars/'a.tar') as tar:
        last = tar.getmembers()[-1].offset  # cut where a member begins, in one, in a header
    for n in (last, 700, last + 100, 0):
        (tars/'a.tar').write_bytes(whole[:n])
        with pytest.raises(ValueError, match='a.tar is no tar file, or not all of it.*download it again'):
            load_captioned(tars, SourceSettings(cache_dir=str(tmp_path/'cache')), images=images)

@pytest.mark.parametrize(
    'files, message',
    [
        ({'1.png': b'x'}, "'1' in t.tar has neither a .txt nor a .json"),
        ({'1.txt': b'x'}, "'1' in t.tar has no image"),
        ({'1.png': b'x', '1.txt': b' '}, "'1' in t.tar has an empty caption"),
        ({'1.png': b'x', '1.txt': b'x'}, "the image of '1'"),
        ({'1.png': b'x', '1.json': b'{"url": "x"}'}, "'1' in t.tar has no 'caption'"),
    ],
)
def test_what_a_sample_lacks_is_said(tmp_path, files, message):
    with pytest.raises(ValueError, match=message): load_captioned(write_tar(tmp_path/'t.tar', files))

def test_rows_beyond_what_memory_is_for_are_mapped(tmp_path, monkeypatch):
    (tmp_path/'t.tsv').write_text('key\tcaption\n' + ''.join(f'{i}\tcaption {i}\n' for i in range(3000)))
    held = load_captioned(tmp_path/'t.tsv', images=False)
    monkeypatch.setattr(sources, 'WORDS_IN_MEMORY', 10_000)
    mapped = load_captioned(tmp_path/'t.tsv', images=False)
    assert mapped.to_dict() == held.to_dict() and mapped.cache_files and not held.cache_files

# folders
@quick
@given(names, st.lists(captions, min_size=1, max_size=3), st.sampled_from(['metadata', 'tabs', 'beside']))
def test_folder_forms_agree(tmp_path_factory, keys, texts, form):
    folder = tmp_path_factory.mktemp('folder')
    for k in keys: picture().save(folder/f'{k}.png')
    if form == 'metadata':
        with open(folder/'metadata.csv', 'w', encoding='utf-8', newline='') as f:
            csv.writer(f).writerows([['file_name', 'caption'], *([f'{k}.png', t] for k in keys for t in texts)])
    elif form == 'tabs':
        (folder/'captions.txt').write_text(''.join(f'{k}.png\t{t}\n' for k in keys for t in texts), encoding='utf-8')
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
    images = [
        dict(
            filepath='val2014',
            filename=f'COCO_{i}.png',
            cocoid=i,
            imgid=i,
            split=s,
            sentences=[dict(raw=f'caption {i}.{j} ') for j in range(2)],
        )
        for i, s in enumerate(['test', 'val', 'restval'])
    ]
    (tmp_path/'val2014').mkdir()
    for i in images: picture(i['cocoid']).save(tmp_path/'val2014'/i['filename'])
    (tmp_path/'karpathy.json').write_text(json.dumps(dict(images=images)))
    plain = dict(
        images=[dict(id=i['cocoid'], file_name=i['filename']) for i in images],
        annotations=[dict(image_id=i['cocoid'], caption=s['raw']) for i in images for s in i['sentences']],
    )
    (tmp_path/'plain.json').write_text(json.dumps(plain))
    return tmp_path

def test_both_files_of_coco_agree(coco):
    karpathy, plain = from_coco(coco/'karpathy.json', coco), from_coco(coco/'plain.json', coco/'val2014')
    assert karpathy['captions'][:] == plain['captions'][:] and karpathy['key'][:] == plain['key'][:] == ['0', '1', '2']
    assert from_coco(coco/'karpathy.json', coco, split='val+restval')['key'][:] == ['1', '2']

def test_coco_errors(coco):
    with pytest.raises(ValueError, match="unknown split 'tset': did you mean 'test'"):
        from_coco(coco/'karpathy.json', coco, split='tset')
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
            if suffix == 'csv':
                csv.writer(f, delimiter=mark).writerows([['key', 'caption'], *([k, text] for k in keys)])
            else:
                f.write(
                    ''.join(f'{k}\t{c}\n' for k, c in [('key', 'caption'), *((k, text) for k in keys)])
                )  # quotes are characters
    (folder/'t.jsonl').write_text('\n'.join(json.dumps(dict(key=k, caption=text)) for k in keys), encoding='utf-8')
    for suffix in ('csv', 'tsv', 'jsonl'):
        assert from_table(folder/f't.{suffix}').to_dict() == dict(key=keys, caption=[text] * len(keys))


@pytest.mark.parametrize(
    'lines, message',
    [
        ('{"key": "a", "caption": "one"}\n{"key": "b", "caption": " "}', 'row 2 has an empty caption'),
        ('{"key": "a", "caption": "x"}\n{"key": "a", "caption": "y"}', "more than one row has the key 'a'"),
        ('{"key": "a", "caption": 5}', 'not text'),
        ('{"key": null, "caption": "x"}', 'row 1 has an empty key'),
        ('[1]', 'no JSON object'),
        ('{"key": "a", "captions": ["x", ""]}', 'row 1 has an empty caption'),
        ('{"key": "a", "text": "one"}', "row 1 has no 'caption'"),
        ('{"key": "a"', 'line 1 is not JSON'),
        ('', 'has no rows'),
    ],
)
def test_table_errors(tmp_path, lines, message):
    (tmp_path/'t.jsonl').write_text(lines)
    with pytest.raises(ValueError, match=message): from_table(tmp_path/'t.jsonl')

@pytest.mark.parametrize(
    'content, message',
    [
        ('key,caption\na,"hello there\nb,a dog\nc,a "cat"\n', "t.CSV after row 0: ',' expected"),
        ('key,caption\na,hello, there\n', 'line 2 has 3 fields, but there are 2 columns'),
        ('key,caption\na,' + 'x' * 200_000, 't.CSV after row 0: field larger'),
        ('key,caption\na,\xe9'.encode('latin-1'), 't.CSV after row .: not UTF-8'),
    ],
)
def test_broken_tables_name_their_file(tmp_path, content, message):
    (tmp_path/'t.CSV').write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message): from_table(tmp_path/'t.CSV')

def test_no_row_of_a_table_is_lost(tmp_path):
    (tmp_path/'t.tsv').write_text('key\tcaption\na\t"hello there\nb\ta dog\nc\ta "cat"\nd\tfour\n\n')
    assert from_table(tmp_path/'t.tsv').to_dict() == dict(
        key=list('abcd'), caption=['"hello there', 'a dog', 'a "cat"', 'four']
    )
    (tmp_path/'t.jsonl').write_text('{"key": "a", "caption": "x\u2028y"}\n\n', encoding='utf-8')
    assert from_table(tmp_path/'t.jsonl')['caption'][:] == ['x\u2028y']
    (tmp_path/'t.jsonl').write_text('{"key": "a", "captions": ["x", "y"]}\n{"key": "b", "captions": ["z"]}')
    assert from_table(tmp_path/'t.jsonl')['captions'][:] == [['x', 'y'], ['z']]

@pytest.mark.parametrize(
    'content, message',
    [
        (
            dict(images=[dict(id=1, file_name='a.png')], annotations=[dict(id=1, image_id=1, bbox=[])]),
            "has no caption but 'id', 'image_id', 'bbox'",
        ),
        (dict(images=[dict(id=1, file_name='a.png')], annotations=[dict(image_id=1, caption=None)]), 'has no caption'),
        ([1], 'it has a list'),
    ],
)
def test_other_json_is_no_caption_file(tmp_path, content, message):
    (tmp_path/'instances.json').write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f'instances.json is no COCO caption file: .*{message}'):
        from_coco(tmp_path/'instances.json', tmp_path)


def test_captions_of_a_set():
    ds = emoji('unseen')
    assert captions_of(ds)['key'][:] == list(dict.fromkeys(ds['key'])) and captions_of(captioned(['a']), which=5)[
        'caption'
    ][:] == ['a thing']

def test_a_column_of_a_file_that_has_none_is_refused(tmp_path):
    "It would be passed over without a word otherwise."
    file = tmp_path/'captions_val2017.json'
    file.write_text(json.dumps(dict(images=[dict(id=1, file_name='1.jpg')],
                                    annotations=[dict(image_id=1, caption='a cat')])))
    assert len(load_captioned(file, images=False)) == 1
    with pytest.raises(ValueError, match='has no columns: leave caption .*nocol'):
        load_captioned(file, SourceSettings(caption='nocol'), images=False)
