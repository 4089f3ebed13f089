"Images to features: what is decoded when, what a folder refuses, what is mended, and what belongs together."
import io
import json
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from gmail_nb import features as room
from gmail_nb.align import GenReal
from gmail_nb.data import emoji
from gmail_nb.encoders import Preprocess, embedded_encoder
from gmail_nb.features import (Features, LazyPixels, Parts, embed, embedder, load_features, match_keys,
                               native_precision)
from gmail_nb.runtime import fingerprint
from gmail_nb.settings import EmbedSettings

quiet = EmbedSettings(part_rows=16, batch_size=8, show_progress=False)

@pytest.fixture(scope='module')
def encoder(): return embedded_encoder()

@pytest.fixture(scope='module')
def drawings(): return emoji('B', source='noto').select(range(40))

@pytest.fixture(scope='module')
def plain(encoder, drawings):
    "Features without any folder."
    pixels = torch.stack([encoder.preprocess(image) for image in drawings['image']])
    return encoder.encode_image(pixels).float().clone()

@pytest.fixture
def folder(tmp_path, encoder, drawings):
    embed(drawings, encoder, tmp_path/'f_r', settings=quiet)
    return tmp_path/'f_r'

def damaged(ds, numbers):
    stored = ds.cast_column('image', datasets.Image(decode=False))['image']
    images = [dict(bytes=b'no picture' if i in numbers else s['bytes'], path=None) for i, s in enumerate(stored)]
    features = datasets.Features(key=datasets.Value('string'), image=datasets.Image())
    return datasets.Dataset.from_dict(dict(key=list(ds['key']), image=images), features=features)

# pixels

def test_a_slice_and_a_tensor_of_numbers_read_the_same_images(encoder, drawings):
    pixels = LazyPixels(drawings, encoder.preprocess)
    assert torch.equal(pixels[5:8], pixels[torch.tensor([5, 6, 7])])

def test_prefetched_images_are_those_that_are_read_and_are_not_kept(encoder, drawings):
    pixels = LazyPixels(drawings, encoder.preprocess)
    pixels.prefetch([3, 4])
    ahead = dict(pixels.coming)
    assert torch.equal(pixels[[3, 4]], torch.stack([f.result() for f in ahead.values()]))
    assert not pixels.coming

def test_pixels_are_those_of_the_chosen_indices(encoder, drawings):
    some = LazyPixels(drawings, encoder.preprocess, indices=[7, 2])
    assert len(some) == 2 and torch.equal(some[[0]], LazyPixels(drawings, encoder.preprocess)[[7]])

def test_fingerprint_of_pixels_knows_set_and_order(encoder, drawings):
    every = LazyPixels(drawings, encoder.preprocess).fingerprint
    fewer = LazyPixels(drawings, encoder.preprocess, indices=range(39)).fingerprint
    backwards = LazyPixels(drawings, encoder.preprocess, indices=range(38, -1, -1)).fingerprint
    assert every != fewer != backwards
    assert every == LazyPixels(drawings, encoder.preprocess).fingerprint

def test_pixels_refuse_an_absent_column_and_an_empty_set(encoder, drawings):
    with pytest.raises(ValueError, match="no column 'picture'"):
        LazyPixels(drawings, encoder.preprocess, column='picture')
    with pytest.raises(ValueError, match='the dataset is empty'):
        LazyPixels(drawings.select([]), encoder.preprocess)

def test_keys_and_fingerprint_of_a_subset_read_no_pixels(encoder):
    "40 MB of images: all of them were in memory at once before."
    stored = [dict(bytes=np.random.default_rng(i).bytes(40_000), path=None) for i in range(1000)]
    columns = datasets.Features(key=datasets.Value('string'), image=datasets.Image())
    ds = datasets.Dataset.from_dict(dict(key=[f'{i:04}' for i in range(1000)], image=stored), features=columns)
    some = LazyPixels(ds, encoder.preprocess, indices=range(999))
    tracemalloc.start()
    assert some.keys[5].as_py() == '0005'
    of_keys = tracemalloc.get_traced_memory()[1]
    found = some.fingerprint # 64 images: 2.6 MB
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert of_keys < 1e6 and peak < 8e6
    sampled = [stored[i]['bytes'] for i in np.unique(np.linspace(0, 998, 64).astype(int))]
    assert found == fingerprint(
        ds['key'][:999], repr(encoder.preprocess), sampled
    )  # as it was: nothing is embedded anew


def test_processes_decode_the_same_and_one_that_dies_is_told(drawings):
    pixels = LazyPixels(damaged(drawings, (5,)), Preprocess(32), processes=1)
    assert torch.equal(pixels[[3, 0, 7]], LazyPixels(drawings, Preprocess(32))[[3, 0, 7]])
    with pytest.raises(ValueError, match='does not decode'): pixels[[4, 5]]
    for p in pixels.team.pool._processes.values(): p.kill()
    with pytest.raises(RuntimeError, match='a process that decodes images has died'): pixels[0:9]

def test_a_draft_is_smaller_and_another_set(drawings, encoder, tmp_path):
    file = io.BytesIO()
    Image.effect_mandelbrot((768, 768), (-2, -1.5, 1, 1.5), 50).convert('RGB').save(file, 'JPEG')
    ds = datasets.Dataset.from_dict(dict(key=['a'], image=[dict(bytes=file.getvalue(), path=None)]),
                                    features=datasets.Features(key=datasets.Value('string'), image=datasets.Image()))
    whole, draft = (LazyPixels(ds, encoder.preprocess, draft=d) for d in (False, True))
    assert draft.shape == whole.shape and 0 < (draft[[0]] - whole[[0]]).abs().mean() < .1
    assert draft.fingerprint != whole.fingerprint

# sides of a model

def test_an_unknown_side_is_named(encoder):
    with pytest.raises(ValueError, match="'real'"): embedder(encoder, 'reel')

def test_weights_of_the_base_are_the_encoders(encoder):
    aligned = GenReal(embedded_encoder())
    base = embedder(aligned, 'base')
    assert base.weights == encoder.fingerprint == aligned.base_fingerprint
    with pytest.raises(ValueError, match="side='base'"): embedder(aligned.encoder)

def test_a_loaded_model_goes_to_the_fastest_device_and_others_stay(tmp_path, encoder, monkeypatch):
    GenReal(embedded_encoder()).save_pretrained(tmp_path/'aligned')
    monkeypatch.setattr(room, 'default_device', lambda: torch.device('meta'))
    assert embedder(tmp_path/'aligned', 'base').device.type == 'meta'
    assert embedder(encoder).device.type == 'cpu'

def test_auto_is_bfloat16_where_the_device_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: True)
    assert native_precision('auto', 'cuda') == 'bf16'
    assert native_precision('auto', 'cpu') == 'no' and native_precision('bf16', 'cpu') == 'bf16'
    with pytest.raises(ValueError, match="'bf16'"): native_precision('bf61', 'cpu')

def test_bfloat16_where_it_cannot_be_had_is_refused(monkeypatch, tmp_path, encoder, drawings):
    "Of embedding, of a captioner and of fine-tuning, which all ask here."
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: False)
    with pytest.raises(ValueError, match="'bf16', which cuda does not compute in here"): native_precision('bf16', 'cuda')
    assert native_precision('auto', 'cuda') == 'no'
    monkeypatch.setattr(torch.amp, 'is_autocast_available', lambda kind: False)
    settings = EmbedSettings(precision='bf16', show_progress=False)
    with pytest.raises(ValueError, match="choose 'no' for float32"):
        embed(drawings, encoder, tmp_path/'f', settings=settings)
    assert not list((tmp_path/'f').glob('*.npy'))

# the folder

def test_features_are_those_of_the_plain_way(folder, drawings, plain):
    found = load_features(folder)
    assert found.keys == list(drawings['key'])
    torch.testing.assert_close(found.features, plain, atol=1e-5, rtol=0)

def test_another_set_is_another_folder(folder, encoder, drawings):
    with pytest.raises(ValueError, match='holds other features'):
        embed(drawings.select(range(39)), encoder, folder, settings=quiet)
    with pytest.raises(ValueError, match="store is 'float32' there and 'float16' here"):
        embed(drawings, encoder, folder, settings=replace(quiet, store='float16'))

def test_another_batch_size_goes_on_with_the_folder(folder, encoder, drawings):
    "As after running out of memory."
    before = load_features(folder).features.clone()
    smaller = embed(drawings, encoder, folder, settings=replace(quiet, batch_size=4))
    assert torch.equal(smaller.features, before)

def test_nothing_in_a_folder_is_trusted_without_its_settings(folder, encoder, drawings):
    before = load_features(folder).features.clone()
    (folder/'settings.json').unlink()
    assert torch.equal(embed(drawings, encoder, folder, settings=quiet).features, before)

def test_damaged_images_are_named_and_left_out(tmp_path, encoder, drawings, plain):
    broken, kept = damaged(drawings, (5, 20)), [i for i in range(40) if i not in (5, 20)]
    embed(broken, encoder, tmp_path/'broken', settings=quiet)
    with open(tmp_path/'broken'/'features.npy', 'r+b') as f:
        f.seek(200)
        f.write(b'\0' * 64)
    mended = embed(broken, encoder, tmp_path/'broken', settings=quiet)
    assert [(f['index'], f['key']) for f in mended.failed] == [(i, drawings[i]['key']) for i in (5, 20)]
    assert len(mended) == 38 and mended.keys == [drawings[i]['key'] for i in kept]
    assert len(mended.mapped) == 40 and mended.mapped.data_ptr() == mended.select([0]).mapped.data_ptr()
    assert not mended[:].isnan().any()
    torch.testing.assert_close(mended.features, plain[kept], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match='holds other features'):
        embed(drawings, encoder, tmp_path/'broken', settings=quiet)

def test_a_card_of_before_holds_the_keys_and_calls_the_index_a_row(tmp_path, encoder, drawings):
    embed(damaged(drawings, (5,)), encoder, tmp_path/'old', settings=quiet)
    card = json.loads((tmp_path/'old'/'card.json').read_text())
    card['failed'] = [dict(row=f['index'], key=f['key'], reason=f['reason']) for f in card['failed']]
    card |= dict(keys=list(drawings['key']), samples=None, files=None, checksum=None)
    (tmp_path/'old'/'keys.parquet').unlink()
    (tmp_path/'old'/'card.json').write_text(json.dumps(card))
    old = load_features(tmp_path/'old')
    assert old.keys == [k for i, k in enumerate(drawings['key']) if i != 5]
    assert len(old) == 39 and old.failed[0]['index'] == 5 and not old[:].isnan().any()

def test_load_refuses_other_weights_and_unfinished_folders(folder, tmp_path):
    with pytest.raises(ValueError, match='embed again with this model'): load_features(folder, weights='0' * 16)
    with pytest.raises(FileNotFoundError, match='card.json is missing'): load_features(tmp_path)

def test_jobs_of_an_array_give_what_one_gives(folder, tmp_path, encoder, drawings):
    one = load_features(folder)
    for i in (2, 0, 1):
        found = embed(drawings, encoder, tmp_path/'jobs', settings=replace(quiet, part=f'{i}/3'))
        assert (tmp_path/'jobs'/'card.json').exists() == (i == 1)
        assert found.keys == [one.keys[j] for j in found.indices] if i != 1 else found.keys == one.keys
    assert torch.equal(found.features, one.features) and found.fingerprint == one.fingerprint
    assert (tmp_path/'jobs'/'features.npy').read_bytes() == (folder/'features.npy').read_bytes()

def test_jobs_that_begin_together_make_the_array_once(tmp_path):
    (tmp_path/'done').mkdir()
    settings = dict(n=40, dim=3, store='float32', part_rows=10)
    def job(i):
        parts = Parts(tmp_path, settings)
        for p in parts.todo(f'{i}/4'): parts.put(p, np.full((10, 3), p, 'float32'), [])
    with ThreadPoolExecutor(4) as pool: list(pool.map(job, range(4)))
    assert Parts(tmp_path, settings).todo() == []
    assert np.load(tmp_path/'features.npy')[:, 0].tolist() == np.repeat(range(4), 10).tolist()

def test_files_that_end_early_are_named(folder, encoder, drawings):
    keys = (folder/'keys.parquet').read_bytes()
    (folder/'keys.parquet').write_bytes(keys[:-20])
    with pytest.raises(ValueError, match='keys.parquet has .* bytes and had'): load_features(folder)
    (folder/'features.npy').write_bytes((folder/'features.npy').read_bytes()[:-400])
    with pytest.raises(ValueError, match='features.npy in f_r is cut short'):
        embed(drawings, encoder, folder, settings=quiet)


def test_a_flipped_bit_is_named_where_features_are_opened(folder, encoder, drawings, caplog, monkeypatch):
    "Of large files, parts from all over it are hashed; all of them by `embed`, which makes a part anew."
    whole, before = bytearray((folder/'features.npy').read_bytes()), load_features(folder).features.clone()
    whole[len(whole) // 2] ^= 1
    (folder/'features.npy').write_bytes(whole)
    with pytest.raises(ValueError, match='features.npy: rows 16 to 31 are not as they were written'):
        load_features(folder)
    monkeypatch.setattr(room, 'MOST_HASHED', 1) # the first part and the last
    assert len(load_features(folder)) == 40
    with pytest.raises(ValueError, match='rows 16 to 31'): load_features(folder, verify=True)
    assert torch.equal(embed(drawings, encoder, folder, settings=quiet).features, before)
    assert [r.getMessage().split(', ')[0] for r in caplog.records] == [
        'f_r/features.npy: rows 16 to 31 are not as they were written']
    embed(drawings, encoder, folder, settings=quiet)
    assert len(caplog.records) == 1

def test_unknown_words_of_the_settings_are_named():
    with pytest.raises(ValueError, match="part is '3/3': expected i/n"): EmbedSettings(part='3/3')
    with pytest.raises(ValueError, match="'bf16'"): EmbedSettings(precision='bf61')
    with pytest.raises(ValueError, match="'float16'"): EmbedSettings(store='float61')
    with pytest.raises(ValueError, match="'local'"): EmbedSettings(engine='locale')

def test_selecting_keeps_keys_and_changes_the_fingerprint(folder):
    found = load_features(folder)
    some = found.select([3, 1])
    assert isinstance(some, Features) and torch.equal(some[:], found[[3, 1]])
    assert some.keys == [found.keys[3], found.keys[1]] and some.fingerprint != found.fingerprint

def test_samples_of_generated_images_stay_beside_their_features(tmp_path, encoder, drawings):
    repeated = drawings.select([0, 0, 1]).add_column('sample', [0, 1, 0])
    found = embed(repeated, encoder, tmp_path/'samples', settings=quiet)
    assert found.samples == [0, 1, 0] and found.keys[0] == found.keys[1]

def test_keys_must_not_repeat_on_the_real_side():
    with pytest.raises(ValueError, match='keys repeat'): match_keys(['a', 'a'], ['a'])

def test_ray_needs_ray_and_a_name(tmp_path, encoder, drawings, monkeypatch):
    ray = replace(quiet, engine='ray')
    with pytest.raises(ValueError, match='pass its name or its folder'):
        embed(drawings, encoder, tmp_path/'no_name', settings=ray)
    monkeypatch.setitem(sys.modules, 'ray', None)
    monkeypatch.setitem(sys.modules, 'ray.data', None)
    with pytest.raises(ValueError, match=r"pip install 'gmail_nb\[ray\]'"):
        embed(drawings, 'embedded', tmp_path/'no_ray', settings=ray)
