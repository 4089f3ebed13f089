"Contact sheets, scores, the page and the card of a generated folder."
import json
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

import gmail_nb.runtime
from gmail_nb.data import emoji, quiet_datasets
from gmail_nb.encoders import load_encoder
from gmail_nb.gallery import (image_caption_scores, contact_sheet, dataset_card, hub_layout, quality_encoder,
                              score_quality, write_report, write_sheets)
from gmail_nb.generate import generate, load_generated
from gmail_nb.pipelines import EmojiPipeline, load_generator, quiet_loading
from gmail_nb.settings import DrawSettings, WorkSettings

QUIET = WorkSettings(show_progress=False, shard_size=8)

@pytest.fixture(scope='module')
def captions(): return emoji('B', 'noto').select(range(0, 120, 10))

@pytest.fixture(scope='module')
def encoder():
    with quiet_loading(): return load_encoder('embedded')

@pytest.fixture(scope='module')
def folder(captions, encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp('gallery')/'generated'
    generate(captions, 'embedded', out, DrawSettings(steps=4), work=QUIET)
    score_quality(out, encoder, show_progress=False)
    write_sheets(out)
    return out

class DarkPipeline(EmojiPipeline):
    "Every image fails."
    def __call__(self, generator=None, **kwargs):
        return SimpleNamespace(images=np.zeros((len(generator), 64, 64, 3)))

def test_a_sheet_has_room_for_every_image(folder):
    ds = load_generated(folder)
    assert contact_sheet(ds['image'], ncols=5, side=32).size == (160, 96)

def test_there_is_a_sheet_for_each_shard_and_new_ones_are_kept(folder):
    sheets = write_sheets(folder)
    assert len(sheets) == len(json.loads((folder/'manifest.json').read_text())['shards']) == 2
    before = sheets[0].stat().st_mtime_ns
    write_sheets(folder)
    assert sheets[0].stat().st_mtime_ns == before

def test_scores_say_who_measured_them(folder, encoder):
    assert quality_encoder(folder)['fingerprint'] == encoder.fingerprint
    assert pq.read_table(folder/'quality.parquet').column_names == ['key', 'sample', 'quality']
    assert quality_encoder(folder.parent) is None

def test_scores_fall_when_captions_are_shuffled(folder, encoder):
    ds = load_generated(folder)
    others = ds['caption'][5:] + ds['caption'][:5]
    shuffled = ds.remove_columns('caption').add_column('caption', others)
    right = image_caption_scores(ds, encoder, show_progress=False)
    assert right.mean() > image_caption_scores(shuffled, encoder, show_progress=False).mean()
    np.testing.assert_allclose(right, ds['quality'][:], atol=1e-6)

def test_the_page_stands_alone_and_says_all(folder, captions, encoder):
    text = write_report(folder, real=captions).read_text()
    assert text.count('<img') == 4 and 'http' not in text.replace('http-equiv', '')
    assert 'Real and generated' in text and encoder.fingerprint in text
    assert all(f'href="sheets/{p.name}"' in text for p in (folder/'sheets').glob('*.jpg'))

def test_a_run_in_which_every_image_failed_has_a_page_too(tmp_path):
    pipeline = DarkPipeline(**load_generator('embedded').components)
    out = generate({'a': 'x', 'b': 'y'}, 'embedded', tmp_path/'dark', work=QUIET, pipeline=pipeline)
    text = write_report(out).read_text()
    assert write_sheets(out) == [] and 'not one good image' in text and 'black' in text

def test_the_layout_of_the_hub_loads_with_the_library_of_the_hub(folder, tmp_path):
    layout = hub_layout(folder, tmp_path/'hub')
    with quiet_datasets():
        loaded = datasets.load_dataset(str(layout), split='train', cache_dir=str(tmp_path/'cache'))
    ds = load_generated(folder)
    assert loaded['key'][:] == ds['key'][:] and loaded['sha256'][:] == ds['sha256'][:]
    assert loaded[0]['image'].size == (64, 64)

def test_the_card_names_generator_licence_and_settings(folder):
    card = dataset_card(folder)
    assert 'drawn from captions by `embedded`' in card.text and 'apache-2.0' in card.text
    assert '| steps | 4 |' in card.text and card.data.tags == ['synthetic', 'generated-images', 'gmail']
