"Images, captions and tables as strangers write them: right, or refused in one line that names the file and the row."
import csv
import html.parser
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from gmail_nb.data import decode_image
from gmail_nb.pages import report_page, table_html
from gmail_nb.settings import SourceSettings
from gmail_nb.sources import from_coco, from_folder, from_table, load_captioned

def weight(item): return 2

def encoded(image, kind, **how):
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()

RED = Image.new('RGB', (16, 8), (200, 30, 30))

def near(image, colour=(200, 30, 30), size=(16, 8)):
    assert image.mode == 'RGB' and image.size == size
    assert np.abs(np.asarray(image).astype(int) - colour).max() <= 12, np.asarray(image)[0, 0]

def refused(make, *words):
    with pytest.raises((ValueError, FileNotFoundError)) as e: make()
    said = str(e.value)
    assert '\n' not in said and len(said) < 600, said[:700]
    for w in words: assert w in said, said
    return said

# Images

def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

def huge_png(side=50_000):
    "A header, and the bytes of a few rows: 57 bytes a million."
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + header + chunk(b'IDAT', zlib.compress(bytes(1000))) + chunk(b'IEND', b'')

@pytest.mark.parametrize('side', [50_000, 14_000])
def test_a_bomb_is_refused_by_its_header(side):
    refused(lambda: decode_image(huge_png(side), 'bomb'), "'bomb'", 'pixels')

def test_the_limit_can_be_set(tmp_path):
    (tmp_path/'a.png').write_bytes(encoded(RED, 'PNG'))
    ask = ('from gmail_nb.data import decode_image\n'
           f'try: print(decode_image({str(tmp_path/"a.png")!r}).size)\n'
           'except ValueError as e: print(e)')
    def said(limit): return subprocess.run([sys.executable, '-W', 'error::UserWarning', '-c', ask],
                                           capture_output=True, text=True,
                                           env={**os.environ, 'GMAIL_MAX_PIXELS': limit}).stdout
    assert 'the limit is 100 pixels (set GMAIL_MAX_PIXELS' in said('100') and '(16, 8)' in said('1000')

@pytest.mark.parametrize('limit', ['0', '-1', 'abc', '', '1e9', '5.5', '²'])
def test_a_limit_that_is_none_is_told_in_a_line(limit):
    "By the function that reads it; of the command, where it is imported, in one line too."
    from gmail_nb import data
    refused(lambda: data._pixel_limit(limit), f'GMAIL_MAX_PIXELS is {limit!r}', 'a whole number above 0')

def test_a_command_with_a_limit_that_is_none_ends_with_a_line(tmp_path):
    pictures_of(tmp_path/'set', 1, 0)
    command = '-m', 'gmail_nb.cli.commands', 'embed', str(tmp_path/'set'), '--out', str(tmp_path/'out')
    env = {**os.environ, 'GMAIL_MAX_PIXELS': 'abc'}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env)
    assert done.returncode == 2 and not done.stdout and not (tmp_path/'out').exists(), done.stderr
    told, = done.stderr.splitlines()
    assert told == ("gmail_embed: GMAIL_MAX_PIXELS is 'abc': it is the largest image that is opened, in pixels, "
                    'a whole number above 0 such as 400000000')

@pytest.mark.parametrize('data', [
    b'', b'\0' * 100, b'not an image', b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n', b'%PDF-1.4\n', b'GIF89a',
    b'\x89PNG\r\n\x1a\n',
    b'BM' + bytes(60), b'II*\0' + bytes(60), b'RIFF\0\0\0\0WEBPVP8 ', b'\xff\xd8\xff\xe0' + bytes(40),
    encoded(RED, 'PNG')[:45],
    encoded(RED, 'JPEG')[:300], encoded(RED, 'GIF')[:40], encoded(RED, 'TIFF')[:-200], encoded(RED, 'WEBP')[:30]])
def test_what_is_no_whole_image_is_refused(data):
    refused(lambda: decode_image(data, 'row 7'), "'row 7'", 'does not decode')

def test_postscript_is_not_handed_to_a_program(tmp_path, monkeypatch):
    "Pillow would call Ghostscript for it, whatever the file is called."
    monkeypatch.setattr(subprocess, 'check_call', lambda *a, **k: pytest.fail('a program was called'))
    monkeypatch.setattr(subprocess, 'Popen', lambda *a, **k: pytest.fail('a program was called'))
    (tmp_path/'a.jpg').write_bytes(encoded(RED, 'EPS'))
    refused(lambda: decode_image(tmp_path/'a.jpg'), 'a.jpg', 'no known format')

@pytest.mark.parametrize('kind, name', [('PNG', 'a.jpg'), ('JPEG', 'a.png'), ('WEBP', 'a.gif'), ('GIF', 'a.webp'),
                                        ('BMP', 'a.tif')])
def test_a_mislabelled_image_is_read_by_its_content(tmp_path, kind, name):
    (tmp_path/name).write_bytes(encoded(RED, kind))
    near(decode_image(tmp_path/name))

def deep(): return Image.fromarray(np.full((8, 16), 51 * 257, dtype=np.uint16))

@pytest.mark.parametrize('data, colour', [
    (encoded(RED.convert('CMYK'), 'JPEG'), (200, 30, 30)), (encoded(RED.quantize(8), 'PNG'), (200, 30, 30)),
    (encoded(RED.quantize(4), 'GIF'), (200, 30, 30)), (encoded(RED.convert('L'), 'PNG'), 3 * (81,)),
    (encoded(deep(), 'PNG'), 3 * (51,)), (encoded(deep(), 'TIFF'), 3 * (51,)),
    (encoded(RED.convert('1'), 'PNG'), None),
    (encoded(Image.new('RGBA', (16, 8), (9, 9, 9, 0)), 'PNG'), (255, 255, 255)),
    (encoded(Image.new('LA', (16, 8), (0, 0)), 'PNG'), (255, 255, 255))])
def test_every_mode_becomes_rgb(data, colour):
    image = decode_image(data)
    if colour: near(image, colour)
    assert image.mode == 'RGB' and image.size == (16, 8)

@pytest.mark.parametrize('kind', ['GIF', 'WEBP', 'PNG', 'TIFF'])
def test_of_an_animation_the_first_picture_is_taken(kind):
    more = [Image.new('RGB', (16, 8), c) for c in ('blue', 'green')]
    near(decode_image(encoded(RED, kind, save_all=True, append_images=more)))

@pytest.mark.parametrize('turn, size', [(1, (16, 8)), (3, (16, 8)), (6, (8, 16)), (8, (8, 16)), (99, (16, 8))])
@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP'])
def test_the_orientation_of_a_camera_is_applied(kind, turn, size):
    half = RED.copy()
    half.paste((20, 20, 220), (0, 0, 8, 8)) # the left half is blue
    exif = Image.Exif()
    exif[0x0112] = turn
    image = decode_image(encoded(half, kind, exif=exif))
    assert image.size == size
    blue = {1: (2, 4), 3: (13, 4), 6: (4, 2), 8: (4, 13), 99: (2, 4)}[turn]
    r, _, b = image.getpixel(blue)
    assert b > r

@settings(max_examples=150, deadline=None)
@given(st.sampled_from(['PNG', 'JPEG', 'GIF', 'BMP', 'TIFF', 'WEBP']), st.integers(0, 400),
       st.binary(min_size=1, max_size=8))
def test_spoiled_bytes_decode_or_are_refused(kind, at, noise):
    data = encoded(RED, kind)
    at %= len(data)
    spoiled = data[:at] + noise + data[at + len(noise):]
    try: assert decode_image(spoiled, 'row').mode == 'RGB'
    except ValueError as e: assert "'row'" in str(e) and '\n' not in str(e)

@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(data):
    try: decode_image(data, 'row')
    except ValueError as e: assert "'row'" in str(e)

FINDINGS = sorted((Path(__file__).parent/'findings').iterdir()) # of tools/fuzz.py: image bytes and caption files

@pytest.mark.parametrize('file', FINDINGS, ids=lambda f: f.name)
def test_what_fuzzing_found_is_refused(file, tmp_path):
    if file.name.startswith('images'):
        refused(lambda: decode_image(file.read_bytes(), 'row'), "'row'")
        return
    (tmp_path/f't{file.suffix}').write_bytes(file.read_bytes())
    for images in (True, False): refused(lambda: load_captioned(tmp_path/f't{file.suffix}', images=images), 't.')

def test_parquet_with_a_damaged_middle_is_named(tmp_path):
    "The footer reads; pages behind it do not."
    pq.write_table(pa.table(dict(key=['1', '2'], image=[image] * 2, captions=[['a'], ['b']])), tmp_path/'t.parquet')
    whole = (tmp_path/'t.parquet').read_bytes()
    for at in range(4, len(whole) - 8, len(whole) // 40):
        (tmp_path/'t.parquet').write_bytes(whole[:at] + b'\xff' * 12 + whole[at + 12:])
        try: load_captioned(tmp_path/'t.parquet')
        except ValueError as e: assert '\n' not in str(e), str(e)

# Paths that leave the folder of the images

@pytest.fixture
def pictures(tmp_path):
    "A folder of pictures, and one beside it that nobody was given."
    for name in ('set', 'set/train', 'private'): (tmp_path/name).mkdir()
    for name in ('set/train/a.png', 'private/secret.png'): (tmp_path/name).write_bytes(encoded(RED, 'PNG'))
    return tmp_path

def coco(pictures, name):
    (pictures/'captions.json').write_text(json.dumps(dict(images=[dict(id=1, file_name=name)],
                                                          annotations=[dict(image_id=1, caption='a')])))
    return pictures/'captions.json'

def leaving(pictures):
    (pictures/'set'/'link.png').symlink_to(pictures/'private'/'secret.png')
    (pictures/'set'/'linked').symlink_to(pictures/'private')
    return ['../private/secret.png', str(pictures/'private'/'secret.png'), 'train/../../private/secret.png',
            'link.png', 'linked/secret.png']

def test_an_annotation_file_reads_inside_its_folder(pictures):
    for name in leaving(pictures):
        file = coco(pictures, name)
        refused(lambda: from_coco(file, pictures/'set'), 'captions.json', "outside of the folder 'set'", '--outside')
        assert len(from_coco(file, pictures/'set', outside=True)) == 1
    assert len(from_coco(coco(pictures, 'train/a.png'), pictures/'set')) == 1
    assert len(from_coco(coco(pictures, 'train/../train/a.png'), pictures/'set')) == 1

def test_a_table_reads_inside_its_folder(pictures):
    for name in leaving(pictures):
        rows = [['key', 'caption', 'image'], ['1', 'a', name]]
        with open(pictures/'set'/'t.csv', 'w', newline='') as f: csv.writer(f).writerows(rows)
        refused(lambda: load_captioned(pictures/'set'/'t.csv'), 't.csv', 'outside of the folder')
        assert len(load_captioned(pictures/'set'/'t.csv', SourceSettings(outside=True))) == 1

def test_a_linked_folder_of_images_is_the_folder_itself(pictures):
    (pictures/'here').symlink_to(pictures/'set')
    assert len(from_coco(coco(pictures, 'train/a.png'), pictures/'here')) == 1

def test_a_file_of_captions_names_what_the_folder_holds(pictures):
    (pictures/'set'/'metadata.csv').write_text('file_name,caption\n../private/secret.png,a\ntrain/a.png,b\n')
    refused(lambda: from_folder(pictures/'set'), 'which the folder does not hold')

@pytest.mark.parametrize('name, data, words', [
    ('metadata.csv', b'note,file_name,caption\nx,a.png,b\ny\n', 'row 2 is cut'),
    ('metadata.csv', b'file_name,caption\na.png,' + b'x' * 200_000 + b'\n', 'field larger'),
    ('metadata.csv', b'file_name,caption\na.png,\xff\n', 'UTF-8'), ('captions.txt', b'a.png\t\xff\n', 'not UTF-8'),
    ('captions.txt', b'a.png\n', 'neither a tab nor a comma'), ('metadata.csv', b'caption\na\n', "'file_name'")])
def test_captions_of_a_folder_that_are_wrong_are_named(tmp_path, name, data, words):
    (tmp_path/'a.png').write_bytes(encoded(RED, 'PNG'))
    (tmp_path/name).write_bytes(data)
    refused(lambda: load_captioned(tmp_path), name, words)

@pytest.mark.parametrize('name', ['../../private/secret.parquet', '/etc/passwd', 3, None, ['a']])
def test_a_manifest_names_shards_of_its_own_folder(tmp_path, name):
    (tmp_path/'settings.json').write_text('{}')
    (tmp_path/'captions.parquet').write_bytes(b'')
    (tmp_path/'manifest.json').write_text(json.dumps(dict(shards=[dict(shard=name)])))
    refused(lambda: load_captioned(tmp_path), 'manifest.json names no shards')

# Tables

def table(tmp_path, data, name='t.csv'):
    (tmp_path/name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return tmp_path/name

def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    assert from_table(table(tmp_path, '\ufeffkey,caption\n1,a\n'))['key'] == ['1']
    assert from_table(table(tmp_path, '\ufeff{"key": "1", "caption": "a"}\n', 't.jsonl'))['key'] == ['1']

@pytest.mark.parametrize('name, data, words', [
    ('t.csv', 'key,caption\n1,café\n'.encode('latin-1'), ['not UTF-8']),
    ('t.csv', b'key,caption\n1,"open\n', ['t.csv']),
    ('t.csv', b'key,caption\n1,a "b" "c\n2,d"\n', []), ('t.csv', b'key,caption\n1,a,b\n', ['3 fields', '2 columns']),
    ('t.csv', b'key,caption\n1,a\n1,b\n', ["'1'"]), ('t.csv', b'', ['no rows']),
    ('t.csv', b'key,caption\n', ['no rows']),
    ('t.csv', b'key,caption\n,a\n', ['empty key']), ('t.csv', b'key,caption\n1,\n', ['empty caption']),
    ('t.csv', b'a,b\n1,2\n', ['has no']),
    ('t.jsonl', b'{"key": "1", "caption": "a"}\n{"key": "2", "capt', ['line 2 is not JSON']),
    ('t.jsonl', b'[1]\n', ['no JSON object']),
    ('t.jsonl', b'{"key": "1", "caption": 7}\n', ['not text']),
    ('t.jsonl', b'{"key": null, "caption": "a"}\n', ['empty key']),
    ('t.jsonl', b'{"key": "1", "caption": ["a", null]}\n', ['empty caption']),
    ('t.jsonl', b'{"key": "1", "caption": {"a": 1}}\n', ['not text']),
    ('t.jsonl', b'[' * 100_000, ['line 1 is not JSON']), ('t.jsonl', b'\xff\xfe\x00', ['not UTF-8'])])
def test_a_table_that_is_wrong_is_named_with_its_line(tmp_path, name, data, words):
    file = table(tmp_path, data, name)
    if not words: assert len(from_table(file)) == 2 # odd, but legal
    else: refused(lambda: from_table(file), 't.', *words)

def test_long_captions_and_odd_characters_come_back(tmp_path):
    long, odd = 'word ' * 200_000, 'a\0b\u2028c\u202e <script>'
    rows = [dict(key='1', caption=long), dict(key='2', caption=odd)]
    ds = from_table(table(tmp_path, '\n'.join(map(json.dumps, rows)), 't.jsonl'))
    assert ds['caption'][:] == [long.strip(), odd]
    with open(tmp_path/'l.csv', 'w', newline='') as f: csv.writer(f).writerows([['key', 'caption'], ['1', long]])
    refused(lambda: from_table(tmp_path/'l.csv'), 'l.csv', 'field larger') # a quote that was never closed, most often

image = dict(bytes=encoded(RED, 'PNG'), path=None)

@pytest.mark.parametrize('columns', [
    dict(key=[1.5], image=[image], captions=[['a']]), dict(key=[None], image=[image], captions=[['a']]),
    dict(key=['1'], image=[7], captions=[['a']]),
    dict(key=['1'], image=[None], captions=[['a']]), dict(key=['1'], image=[dict(bytes=None, path=None)],
                                                          captions=[['a']]),
    dict(key=['1'], image=[image], captions=[None]), dict(key=['1'], image=[image], captions=[[]]),
    dict(key=['1'], image=[image], captions=[[None]]),
    dict(key=['1'], image=[image], captions=[3]), dict(key=['1'], image=[image], captions=[[['a']]]),
    dict(key=['1'], image=[image], captions=[dict(a='b')]),
    dict(key=['1', '1'], image=[image] * 2, captions=[['a']] * 2), dict(key=[' '], image=[image], captions=[['a']]),
    dict(key=[['1']], image=[image], captions=[['a']]),
    dict(key=[dict(a=1)], image=[image], captions=[['a']]), dict(key=['1'], image=[dict(other=1)], captions=[['a']]),
    dict(key=['1'], captions=[['a']]),
    dict(key=['1'], image=[dict(bytes=b'x', path=None)], captions=[['a']]),
    dict(key=['1'], image=[[image]], captions=[['a']])])
def test_parquet_of_another_shape_is_refused(tmp_path, columns):
    pq.write_table(pa.table(columns), tmp_path/'t.parquet')
    if columns['key'] == [1.5]: # a number is a name
        assert load_captioned(tmp_path/'t.parquet')['key'] == ['1.5']
        return
    refused(lambda: load_captioned(tmp_path/'t.parquet'))

@pytest.mark.parametrize('data', [b'', b'PAR1', b'PAR1' + bytes(50) + b'PAR1', None])
def test_parquet_that_is_none_or_empty_is_refused(tmp_path, data):
    empty = dict(key=pa.array([], pa.string()), image=pa.array([], pa.binary()),
                 captions=pa.array([], pa.list_(pa.string())))
    if data is None: pq.write_table(pa.table(empty), tmp_path/'t.parquet')
    else: (tmp_path/'t.parquet').write_bytes(data)
    refused(lambda: load_captioned(tmp_path/'t.parquet'), 't.parquet')

@pytest.mark.parametrize('found', [
    [], '[' * 100_000, {}, 3, None, dict(images=3), dict(images=[3]), dict(images=[{}]),
    dict(images=[dict(id=1)], annotations=3), dict(images=[], annotations=[3]),
    dict(images=[dict(id=1, file_name=3)], annotations=[dict(image_id=1, caption='a')]),
    dict(images=[dict(id=1, file_name='a')], annotations=[dict(image_id=1, caption=None)]),
    dict(images=[dict(file_name='a')], annotations=[dict(image_id=1, caption='a')]),
    dict(images=[dict(filename='a', split='train', sentences=3)]),
    dict(images=[dict(filename='a', sentences=[dict(raw='b')])]),
    dict(images=[dict(filename=3, split='test', cocoid=1, sentences=[dict(raw='b')])]),
    dict(images=dict(a=1), annotations=[dict(image_id=1, caption='a')])])
def test_a_coco_file_of_another_shape_is_refused(tmp_path, found):
    refused(lambda: from_coco(table(tmp_path, found if isinstance(found, str) else json.dumps(found), 'c.json'),
                              tmp_path), 'c.json')

def tar(tmp_path, *members):
    with tarfile.open(tmp_path/'t.tar', 'w') as f:
        for name, data, kind in members:
            info = tarfile.TarInfo(name)
            info.size, info.type = (len(data), kind) if kind == tarfile.REGTYPE else (0, kind)
            if kind != tarfile.REGTYPE: info.linkname = data.decode()
            f.addfile(info, io.BytesIO(data))
    return tmp_path/'t.tar'

def test_links_and_paths_of_a_tar_lead_nowhere(tmp_path):
    reg = tarfile.REGTYPE
    file = tar(tmp_path, ('a.png', b'/etc/passwd', tarfile.SYMTYPE), ('a.txt', b'said', reg))
    refused(lambda: load_captioned(file), 't.tar', 'no image')
    file = tar(tmp_path, ('../../out.png', encoded(RED, 'PNG'), reg), ('../../out.txt', b'said', reg))
    assert load_captioned(file)['key'] == ['../../out'] and sorted(p.name for p in tmp_path.iterdir()) == ['t.tar']

@pytest.mark.parametrize('member', [('a.json', b'{"capt', tarfile.REGTYPE), ('a.json', b'[1]', tarfile.REGTYPE),
                                    ('a.json', b'{"caption": 3}', tarfile.REGTYPE),
                                    ('a.txt', b'\xff\xfe', tarfile.REGTYPE), ('a.txt', b'', tarfile.REGTYPE)])
def test_a_sample_of_a_tar_that_is_wrong_is_named(tmp_path, member):
    file = tar(tmp_path, ('a.png', encoded(RED, 'PNG'), tarfile.REGTYPE), member)
    refused(lambda: load_captioned(file), 't.tar')

# Anything at all

known = (ValueError, FileNotFoundError)
some_text = st.text(max_size=20)
names = some_text | st.sampled_from(['key', 'caption', 'image'])
values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | some_text,
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
                      max_leaves=6)

def reads(source, **how):
    try: load_captioned(source, images=False, **how)
    except known as e: assert len(str(e)) < 2000

@pytest.fixture(scope='module')
def place(tmp_path_factory): return tmp_path_factory.mktemp('any')

fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

@fuzz
@given(data=st.binary(max_size=120), suffix=st.sampled_from(['csv', 'tsv', 'jsonl', 'json', 'parquet', 'tar']))
def test_any_file_reads_or_is_refused(place, data, suffix): reads(table(place, data, f'any.{suffix}'))

@fuzz
@given(text=st.text(alphabet='key,caption"\n\r\t\0;é ', max_size=80))
def test_any_table_reads_or_is_refused(place, text): reads(table(place, 'key,caption\n' + text, 'any.csv'))

@fuzz
@given(rows=st.lists(st.dictionaries(st.sampled_from(['key', 'caption', 'captions', 'image']), values, max_size=4),
                     min_size=1, max_size=4))
def test_any_json_lines_read_or_are_refused(place, rows): reads(table(place, '\n'.join(map(json.dumps, rows)),
                                                                      'any.jsonl'))

COCO = ['id', 'file_name', 'filename', 'split', 'cocoid', 'sentences', 'filepath']

@fuzz
@given(found=st.fixed_dictionaries({}, optional=dict(
    images=st.lists(st.dictionaries(st.sampled_from(COCO), values, max_size=5), max_size=2),
    annotations=st.lists(st.dictionaries(st.sampled_from(['image_id', 'caption']), values, max_size=2), max_size=2))))
def test_any_coco_file_reads_or_is_refused(place, found): reads(table(place, json.dumps(found), 'any.json'))

# Pages

BAD = ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "' onmouseover='alert(1)",
       '</table><svg onload=alert(1)>', 'a\0b', '&lt;b&gt;']

class Tags(html.parser.HTMLParser):
    def __init__(self): super().__init__(); self.found, self.handlers, self.text = [], [], ''
    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        self.handlers += [a for a, _ in attrs if a.startswith('on')]
    def handle_data(self, data): self.text += data

def tags(page):
    found = Tags()
    found.feed(page)
    return found

def test_pages_hold_what_was_said_as_text():
    plain = tags(report_page('t', 'i', [['a', 'b'], ['c', 'd']], {'e': 'data:,'}))
    for bad in BAD:
        page = tags(report_page(bad, bad, [[bad, bad], [bad, bad]], {bad: 'data:,'}))
        assert page.found == plain.found and not page.handlers
        written = tags(table_html([[bad], [bad]]))
        assert not written.handlers and 'script' not in written.found

# Pictures that do not decode are named, counted and left out

def pictures_of(folder, good, bad):
    folder.mkdir()
    for i in range(good + bad):
        noise = Image.effect_noise((16, 8), 20 + i).convert('RGB')
        (folder/f'{i:03}.png').write_bytes(encoded(noise, 'PNG') if i >= bad else b'no picture')
        (folder/f'{i:03}.txt').write_text(f'picture {i}')
    return folder

@pytest.mark.parametrize('good, bad, share, fails', [
    (3, 0, .01, False), (3, 1, .01, False), (3, 1, 0., True), (3, 2, .01, True), (3, 2, .5, False)])
def test_embedding_leaves_out_what_does_not_decode_up_to_a_share(tmp_path, capsys, good, bad, share, fails):
    from test_saved import tiny
    import gmail_nb.runs.align as room
    from gmail_nb.features import load_features
    from gmail_nb.settings import EmbedSettings
    photos, how = pictures_of(tmp_path/'photos', good, bad), EmbedSettings(most_damaged=share, show_progress=False)
    with pytest.MonkeyPatch.context() as m:
        m.setattr('gmail_nb.features.load_encoder', lambda name: tiny())
        if fails: refused(lambda: room.embed_set(photos, tmp_path/'out', 'embedded', settings=how),
                          f'{bad} of {good + bad} images', '--most-damaged')
        else: room.embed_set(photos, tmp_path/'out', 'embedded', settings=how)
    assert len(load_features(tmp_path/'out')) == good # what was made is kept
    said = capsys.readouterr().err
    assert (f'{bad} of {good + bad} images left out' in said) == bool(bad) and said.count('does not decode') == bad
    lines = (tmp_path/'out'/'skipped.jsonl').read_text().splitlines() if bad else []
    assert [json.loads(l)['key'] for l in lines] == [f'{i:03}' for i in range(bad)]

def skipped_in(folder): return [json.loads(l) for l in (folder/'skipped.jsonl').read_text().splitlines()]

def test_alignment_leaves_out_pairs_of_damaged_images(tmp_path, capsys, monkeypatch):
    from test_saved import tiny
    import gmail_nb.runs.align as room
    from gmail_nb.settings import AdapterSettings, AlignRunSettings, AlignSettings
    from gmail_nb.splits import trained_on
    real, made = pictures_of(tmp_path/'real', 19, 1), pictures_of(tmp_path/'made', 20, 0)
    (made/'007.png').write_bytes(b'no picture')
    monkeypatch.setattr(room, 'load_encoder', lambda name: tiny())
    how = dict(align=AlignSettings(epochs=1, batch_size=4), adapters=AdapterSettings(targets=('first', 'head')),
               validation_share=.2, workers=2)
    refused(lambda: room.align_sets(real, made, 'embedded', tmp_path/'out', AlignRunSettings(**how)),
            '2 of 40 images', '--most-damaged')
    assert not (tmp_path/'out'/'card.json').exists()
    room.align_sets(real, made, 'embedded', tmp_path/'out', AlignRunSettings(most_damaged=.1, **how))
    assert [(r['side'], r['key']) for r in skipped_in(tmp_path/'out')] == [('real', '000'), ('generated', '007')]
    assert '2 of 40 images left out' in capsys.readouterr().err
    learned = trained_on(tmp_path/'out')
    assert 10 < len(learned) <= 18 and not {'000', '007'} & set(learned)

@pytest.mark.parametrize('bad, status', [(0, 0), (1, 0), (3, 2)])
def test_an_evaluation_measures_what_decodes(tmp_path, capsys, bad, status):
    from gmail_nb.cli.commands import gmail_eval
    photos = pictures_of(tmp_path/'photos', 12 - bad, bad)
    how = [str(photos), '--out', str(tmp_path/'out'), '--no-pictures', '--no-show-progress']
    assert (gmail_eval(['--model', 'embedded', *how]) or 0) == status
    said = capsys.readouterr()
    assert (f'{bad} of 12 images of {photos} left out' in said.err) == bool(bad)
    if bad: assert [r['key'] for r in skipped_in(tmp_path/'out')] == [f'{i:03}' for i in range(bad)]
    else: assert not (tmp_path/'out'/'skipped.jsonl').exists()
    if status: assert '--most-damaged' in said.err + said.out
    else: assert json.loads((tmp_path/'out'/'results.jsonl').read_text().splitlines()[0])['n'] == 12 - bad

@pytest.mark.parametrize('good, bad, more, status', [(3, 1, [], 0), (3, 2, [], 2), (3, 2, ['--most-damaged', '.5'],
    0),
                                                     (300, 3, [], 0), (3, 1, ['--most-damaged', '0'], 2)])
def test_captions_are_written_and_too_many_damaged_pictures_end_badly(
        tmp_path, capsys, monkeypatch, good, bad, more, status):
    import gmail_nb.runs.tune_caption as room
    from gmail_nb.cli.commands import gmail_caption
    said = {f'{i}.png': 'a dog' for i in range(good)}, {f'{i}.gif': f'{i}.gif does not decode' for i in range(bad)}
    monkeypatch.setattr(room, 'caption_files', lambda images, captioner, settings: said)
    (tmp_path/'card.json').write_text(json.dumps(dict(prefix_length=4))) # of the captioner that is named
    try: ended = gmail_caption([str(tmp_path), '--model', str(tmp_path), *more]) or 0
    except SystemExit as e: ended = e.code
    out, err = capsys.readouterr()
    assert ended == status and out.count('a dog') == good and err.count('left out: ') == bad
    assert f'{bad} of {good + bad} images left out' in err

def test_a_set_to_learn_from_is_opened_with_its_damaged_pictures(tmp_path):
    "They are named where all images are read; looking at the first thousand ended the command."
    from gmail_nb.runs.tune_caption import captioned_rows
    assert len(captioned_rows(pictures_of(tmp_path/'photos', 3, 1))) == 4

def test_features_of_a_stranger_are_read_or_refused(tmp_path):
    from test_saved import tiny
    from gmail_nb.features import embed, load_features
    from gmail_nb.settings import EmbedSettings
    out = tmp_path/'features'
    embed(load_captioned(pictures_of(tmp_path/'photos', 3, 0)), tiny(), out,
          settings=EmbedSettings(show_progress=False))
    for name, start, stop in (('keys.parquet', 4, 60), ('keys.parquet', -80, -8), ('features.npy', 10, 60),
                              ('features.npy', 8, 10)):
        whole = (out/name).read_bytes()
        for filler in (b'\xff', b'\0', b'"', b'('):
            (out/name).write_bytes(whole[:start] + filler * (stop - start) + whole[stop:])
            try: load_features(out, verify=True)
            except ValueError as e: assert '\n' not in str(e) and 'run `embed` again' in str(e), str(e)
        (out/name).write_bytes(whole)
    assert len(load_features(out, verify=True)) == 3

@pytest.mark.parametrize('shards', [3, None, [3], [{}], [dict(shard=3, rows=1)], [dict(shard='a', rows='b')], 'text'])
def test_a_manifest_of_another_shape_is_refused(tmp_path, shards):
    from gmail_nb.generate import load_generated
    (tmp_path/'settings.json').write_text('{}')
    (tmp_path/'captions.parquet').write_bytes(b'')
    (tmp_path/'manifest.json').write_text(json.dumps(dict(shards=shards)))
    refused(lambda: load_generated(tmp_path), 'manifest.json')
