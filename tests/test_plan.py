"Captions from anywhere, settings of a run, and which image lies where with which noise."
import json
from dataclasses import asdict

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gmail_nb.data import emoji
from gmail_nb.pipelines import resolve_generator
from gmail_nb.plan import (Plan, Settings, caption_table, image_seed, make_settings, read_captions, settings_difference)
from gmail_nb.settings import DrawSettings, Generator, SourceSettings

ALL = SourceSettings(which='all')

# captions in memory
@pytest.mark.parametrize('source, message', [
    ([('a', 'x'), ('b', 'y'), ('a', 'z')], "the key 'a' occurs more than once"),
    ({'a': 'x', 'b': ' \n'}, "empty caption for the key 'b'"),
    ([], 'there is not one caption'), ([('', 'x')], 'captions have no key')])
def test_wrong_captions_are_named(source, message):
    with pytest.raises(ValueError, match=message): read_captions(source)

def test_several_captions_of_a_key():
    assert read_captions({'a': ['x', 'y'], 'b': ['z']}, ALL).to_pydict() == dict(
        key=['a', 'a', 'b'], index=[0, 1, 0], caption=['x', 'y', 'z']
    )
    assert read_captions({'a': ['x', 'y'], 'b': ['z', 'v']}, SourceSettings(which=1))['caption'].to_pylist() == [
        'y',
        'v',
    ]
    assert read_captions({'a': ['x', 'y'], 'b': ['z', 'v']}, SourceSettings(which='1'))['caption'].to_pylist() == [
        'y',
        'v',
    ]
    assert read_captions({'a': ['x', 'y']})['caption'].to_pylist() == ['x']
    with pytest.raises(ValueError, match="which is 'frist'"): read_captions({'a': 'x'}, SourceSettings(which='frist'))

def test_a_list_is_numbered():
    assert read_captions(['x', 'y'])['key'].to_pylist() == ['000000000', '000000001']

def test_styles_of_a_concept_are_one_key():
    assert (
        read_captions(emoji('unseen'))['key'].to_pylist() == read_captions(emoji('unseen', 'noto'))['key'].to_pylist()
    )
    ds = datasets.Dataset.from_dict(dict(key=['a', 'a'], source=['one', 'two'], captions=[['x'], ['y']]))
    with pytest.raises(ValueError, match="the key 'a' occurs more than once, with different captions"):
        read_captions(ds)


# captions on disk
def test_coco(tmp_path):
    rows = [dict(image_id=7, caption='a dog'), dict(image_id=7, caption='the dog')]
    (tmp_path/'c.json').write_text(json.dumps(dict(annotations=rows)))
    assert read_captions(tmp_path/'c.json', ALL).to_pydict() == dict(
        key=['7', '7'], index=[0, 1], caption=['a dog', 'the dog']
    )


def test_tables(tmp_path):
    (tmp_path/'c.tsv').write_text('key\tcaption\na/b\tline one\nç\tline two\n', encoding='utf-8')
    assert read_captions(tmp_path/'c.tsv')['key'].to_pylist() == ['a/b', 'ç']
    (tmp_path/'c.jsonl').write_text('{"key": "a", "captions": ["x", "y"]}\n{"key": "b", "captions": ["z"]}\n')
    assert read_captions(tmp_path/'c.jsonl', ALL).to_pydict() == dict(
        key=['a', 'a', 'b'], index=[0, 1, 0], caption=['x', 'y', 'z']
    )
    with pytest.raises(ValueError, match=r"no caption number 1 \(counted from 0\) for the key 'b'"):
        read_captions(tmp_path/'c.jsonl', SourceSettings(which=1))

def test_a_table_without_names(tmp_path):
    (tmp_path/'cc3m.TSV').write_text('a dog\thttp://example.com/1\n"a cat\thttp://example.com/2\n')
    found = read_captions(tmp_path/'cc3m.TSV', SourceSettings(key=None, caption='0', header=False))
    assert found.to_pydict() == dict(key=['000000000', '000000001'], index=[0, 0], caption=['a dog', '"a cat'])

def test_parquet(tmp_path):
    pq.write_table(pa.table(dict(id=['a'], text=['x'], url=['u'])), tmp_path/'d.parquet')
    assert read_captions(str(tmp_path/'?.parquet'), SourceSettings(key='id'))['key'].to_pylist() == ['a']
    assert read_captions(tmp_path/'d.parquet', SourceSettings(key=None))['caption'].to_pylist() == ['x']
    with pytest.raises(ValueError, match="no column 'key': it has 'id', 'text', 'url'"):
        read_captions(tmp_path/'d.parquet')


@pytest.mark.parametrize('columns, message', [
    (dict(key=['a', 'a'], caption=['x', 'x']), "more than one row has the key 'a'"),
    (dict(key=['a', None], caption=['x', 'y']), 'row 2 has no key'),
    (dict(key=['a', 'b'], caption=['x', ' ']), "'b' has an empty caption"),
    (dict(key=['a'], caption=[3]), "'caption' holds no text")])
def test_wrong_parquet_is_named(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path/'d.parquet')
    with pytest.raises(ValueError, match=message): read_captions(tmp_path/'d.parquet')

def test_a_broken_file_is_named(tmp_path):
    (tmp_path/'d.parquet').write_text('no parquet')
    with pytest.raises(ValueError, match='d.parquet'): read_captions(tmp_path/'d.parquet')
    (tmp_path/'sub').mkdir()
    (tmp_path/'sub/a.txt').write_text('a cat')
    with pytest.raises(ValueError, match='a.txt is no captioned set'): read_captions(tmp_path/'sub/a.txt')
    with pytest.raises(FileNotFoundError, match='no captions at'): read_captions('nothing.txt')

def test_a_table_of_captions_comes_back(tmp_path):
    captions = read_captions(emoji(['A', 'B'], 'noto'))
    pq.write_table(captions, tmp_path/'c.parquet')
    assert read_captions(tmp_path/'c.parquet').equals(captions) and read_captions(captions).equals(captions)

def test_a_folder_of_pictures_is_read_without_looking(tmp_path):
    (tmp_path/'a b').mkdir()
    (tmp_path/'a b/x.1.png').write_bytes(b'no picture')
    (tmp_path/'metadata.csv').write_text('file_name,caption\na b/x.1.png,one\na b/x.1.png,two\n')
    for source in (tmp_path, tmp_path/'metadata.csv'):
        assert read_captions(source, ALL).to_pydict() == dict(key=['a b/x.1']*2, index=[0, 1], caption=['one', 'two'])

def test_generated_images_give_back_their_captions(tmp_path):
    image = dict(bytes=b'not looked at', path=None)
    rows = [dict(key='a', caption=c, sample=s, image=image) for s, c in enumerate(['one', 'one', 'two', 'two'])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path/'shard-00000-of-00001.parquet')
    (tmp_path/'settings.json').write_text('{}')
    (tmp_path/'manifest.json').write_text('{"shards": [{"shard": "shard-00000-of-00001.parquet"}]}')
    assert read_captions(tmp_path, ALL).to_pydict() == dict(key=['a', 'a'], index=[0, 1], caption=['one', 'two'])

# settings
@pytest.fixture(scope='module')
def few(): return read_captions(emoji(['A', 'B'], 'noto')).slice(500, 20)

@pytest.fixture(scope='module')
def embedded(): return resolve_generator('embedded')

def test_what_is_absent_comes_from_the_generator(few, embedded):
    s = make_settings(few, embedded, DrawSettings(options={'style': 'noto'}))
    assert (s.steps, s.guidance, s.width, s.image_format, s.scheduler, s.samples) == (16, 3., 64, 'png', 'default', 1)
    assert s.options == {'style': 'noto'} and s.n_captions == 20 and s.shard_size == 256 and s.dtype == 'float32'
    assert make_settings(few, resolve_generator('any/thing', resolve=False)).guidance is None

def test_three_and_three_point_nought_are_one_setting(few, embedded):
    assert make_settings(few, embedded, DrawSettings(guidance=3)) == make_settings(
        few, embedded, DrawSettings(guidance=3.0)
    )


@pytest.mark.parametrize('wrong, message', [(dict(samples=0), 'samples is 0'), (dict(steps=-1), 'steps is -1'),
                                            (dict(image_format='gif'), 'image format')])
def test_wrong_settings_are_named(few, embedded, wrong, message):
    with pytest.raises(ValueError, match=message): make_settings(few, embedded, DrawSettings(**wrong))
    with pytest.raises(TypeError, match='stepz'): DrawSettings(stepz=3)
    with pytest.raises(ValueError, match='shard_size is 0'): make_settings(few, embedded, shard_size=0)

def test_settings_are_recorded_as_before(few, embedded):
    "Folders that exist are continued: the JSON form may not change."
    names = [
        'generator',
        'revision',
        'steps',
        'guidance',
        'width',
        'height',
        'scheduler',
        'prefix',
        'suffix',
        'negative',
        'options',
        'dtype',
        'samples',
        'image_format',
        'shard_size',
        'n_captions',
        'captions',
    ]
    recorded = json.loads(json.dumps(asdict(make_settings(few, embedded))))
    assert list(recorded) == names and Settings(**recorded) == make_settings(few, embedded)
    assert make_settings(caption_table(['a', 'b'], ['one', 'two']), embedded).captions == 'e5292d45fbd837db'

def test_differences(few, embedded):
    a, b = (asdict(make_settings(few, embedded, DrawSettings(steps=s))) for s in (16, 50))
    assert settings_difference(a, a).empty and settings_difference(a, b)['setting'].tolist() == ['steps']

# plans
def test_every_image_has_its_place_and_its_seed(few, embedded):
    plan = Plan(few, make_settings(few, embedded, DrawSettings(samples=3), shard_size=16))
    every = [i for k in range(len(plan)) for i in plan.items(k)]
    assert len(every) == 60 == len({(i.key, i.sample) for i in every}) == len({i.seed for i in every})
    assert [i.key for i in every] == [k for k in few['key'].to_pylist() for _ in range(3)]
    assert [plan.size(k) for k in range(len(plan))] == [len(plan.items(k)) for k in range(len(plan))]
    other = Plan(few, make_settings(few, embedded, DrawSettings(samples=3), shard_size=7))
    assert {i.seed for i in every} == {
        i.seed for k in range(9) for i in other.items(k)
    }  # the shard size changes no seed
    eight = Plan(few, make_settings(few, embedded, DrawSettings(samples=3, steps=8)))
    assert not {i.seed for i in every} & {i.seed for i in eight.items(0)}                # the steps change every seed

def test_a_seed_never_changes():
    "Folders that exist are continued with it."
    generator = Generator('a generator', 'x', 'a revision', 16, 3., 64, 64)
    pinned = make_settings(
        read_captions({'1f34e': 'red apple'}), generator, DrawSettings(negative='blurry', options={'style': 'noto'})
    )
    assert image_seed('1f34e', 2, pinned) == 786584730925924837

def test_samples_count_through_the_captions_of_a_key(embedded):
    captions = read_captions({'a': ['one', 'two'], 'b': ['three']}, ALL)
    items = Plan(captions, make_settings(captions, embedded, DrawSettings(samples=2, prefix='<', suffix='>'))).items(0)
    assert [(i.key, i.sample, i.prompt) for i in items] == [
        ('a', 0, '<one>'),
        ('a', 1, '<one>'),
        ('a', 2, '<two>'),
        ('a', 3, '<two>'),
        ('b', 0, '<three>'),
        ('b', 1, '<three>'),
    ]


def karpathy(folder, *splits):
    rows = [dict(cocoid=i, filename=f'{i}.jpg', split=s, sentences=[dict(raw=f'{s} {i}'), dict(raw=f'again {i}')])
            for i, s in enumerate(splits)]
    (folder/'dataset_coco.json').write_text(json.dumps(dict(images=rows)))
    return folder/'dataset_coco.json'

@pytest.mark.parametrize('there, asked, drawn', [
    (('train', 'test', 'restval', 'val'), None, ['0', '2']), (('train', 'test', 'val'), None, ['0']),
    (('train', 'test'), 'test', ['1']), (('train', 'test', 'restval'), 'train+test', ['0', '1'])])
def test_no_test_caption_is_drawn_unasked(tmp_path, caplog, there, asked, drawn):
    found = read_captions(karpathy(tmp_path, *there), SourceSettings(split=asked))
    assert found['key'].to_pylist() == drawn and ('reading train' in caplog.text) == (asked is None)
    assert len(caplog.records) == (asked is None) # in one line

def test_a_file_of_tests_alone_draws_nothing_unasked(tmp_path):
    with pytest.raises(ValueError, match='has no split train or restval'):
        read_captions(karpathy(tmp_path, 'test', 'val'))


def test_all_captions_have_a_sample_each(tmp_path, embedded):
    captions = read_captions(karpathy(tmp_path, 'train', 'train', 'test'), SourceSettings(which='all'))
    plan = Plan(captions, make_settings(captions, embedded, DrawSettings(samples=2)))
    made = [(i.key, i.sample, i.caption) for i in plan.items(0)]
    assert [(k, s) for k, s, _ in made] == [(k, s) for k in '01' for s in range(4)]
    assert [c for _, _, c in made[:4]] == ['train 0', 'train 0', 'again 0', 'again 0']

def test_captions_of_a_file_are_chosen_in_columns(tmp_path, monkeypatch):
    "Without a Python object for each: of a million captions, memory above the imports is half of what it was."
    from gmail_nb import plan
    rows = [dict(key=f'k{i}', captions=[f'{i} a', f'{i} b', f'{i} c'][:1 + i % 3]) for i in range(3000)]
    (tmp_path/'t.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    by_key = {r['key']: r['captions'] for r in rows}
    expected = {w: read_captions(by_key, SourceSettings(which=w)) for w in ('first', 'all', 0)}
    monkeypatch.setattr(plan, '_captions_by_key', None) # which is for keys that repeat
    for which, table in expected.items():
        found = read_captions(tmp_path/'t.jsonl', SourceSettings(which=which))
        assert found.to_pydict() == table.to_pydict() and found.schema == table.schema
    with pytest.raises(ValueError, match="no caption number 1 .* for the key 'k0'"):
        read_captions(tmp_path/'t.jsonl', SourceSettings(which=1))
