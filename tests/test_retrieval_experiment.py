"The retrieval experiment on a world in miniature, whose answer is known."
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from gmail_nb.data import emoji
from gmail_nb.encoders import Encoder, HFText, load_encoder
from gmail_nb.experiments import retrieval as room
from gmail_nb.experiments.retrieval import (
    SeenImages, World, arm_features, head_ranks, found_by_any, hit_records, nested, recall_table, tune_arms)
from gmail_nb.settings import TuneSettings
from gmail_nb.tune import tune_text

NAMES = [
    f'{a} {b}'
    for a in ('red', 'blue', 'green', 'old', 'new', 'small')
    for b in ('house', 'dog', 'boat', 'tree', 'car', 'cup', 'moon', 'fish', 'hat', 'bell')
]
quick = TuneSettings(steps=20, batch_size=40, every=10)

@pytest.fixture(scope='module')
def encoder(): return load_encoder('embedded')

@pytest.fixture(scope='module')
def world():
    g = torch.Generator().manual_seed(0)
    real, generated, aligned, test = (F.normalize(torch.randn(60, 256, generator=g), dim=-1) for _ in range(4))
    shown = lambda n: SeenImages(NAMES[:n], NAMES[:n], test[:n], test[:n])
    return World(NAMES, arm_features(generated, aligned, real), {'B-twemoji': shown(60), 'unseen-twemoji': shown(20)})

@pytest.fixture(scope='module')
def hits(encoder, world): return tune_arms(encoder, world, quick, seeds=2)

def test_arms_need_features_of_the_same_captions():
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match='features of the same captions'): arm_features(x, x[1:], x)

def test_every_arm_is_there_with_its_ranks(hits):
    assert list(hits) == ['base', 'indiscriminate', 'gmail', 'gmail f_g', 'mix', 'real']
    assert hits['gmail']['B-twemoji']['text_to_image'].shape == (2, 60)
    assert hits['real']['unseen-twemoji']['image_to_text'].shape == (2, 20)

def test_both_readings_agree_where_one_tower_stands_for_both(hits):
    a, b = (hits[n]['B-twemoji']['text_to_image'] for n in ('gmail', 'gmail f_g'))
    assert torch.equal(a, b)

def test_a_tower_of_another_library_is_tuned_too(world, hits):
    class Letters: # every letter is a word
        def __call__(self, texts):
            return {
                'input_ids': torch.tensor([[ord(c) % 60 for c in t[:14]] + [63] * (16 - len(t[:14])) for t in texts])
            }

    torch.manual_seed(0)
    tiny = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=64,
        bos_token_id=62,
        eos_token_id=63,
        max_position_embeddings=16,
    )
    hf = HFText(CLIPTextModel(CLIPTextConfig(**tiny)), nn.Linear(32, 256, bias=False))
    other = Encoder('hf', nn.Identity(), hf.eval(), None, Letters(), 256)
    assert list(tune_arms(other, world, TuneSettings(steps=2, batch_size=40), 1)) == list(hits)

def test_smaller_shares_are_parts_of_larger_ones():
    assert set(nested(100, 1/4).tolist()) < set(nested(100, 1/2).tolist()) and len(nested(100, 1)) == 100

def test_an_unknown_arm_is_named(encoder, world):
    with pytest.raises(ValueError, match="no features for the arm 'paired'"):
        tune_arms(encoder, world, quick, 1, ('base', 'paired'))


def test_records_are_what_the_ranks_say(hits):
    records = hit_records('miniature', hits, draws=100)
    ranks = hits['gmail']['B-twemoji']['text_to_image']
    found = {r['metric']: r['value'] for r in records if (r['arm'], r['split']) == ('gmail', 'B-twemoji')}
    assert found['text_to_image_map'] == pytest.approx((1 / (ranks + 1.)).mean().item())
    assert found['text_to_image_median_rank'] == np.median(ranks.numpy() + 1)
    wanted = 'gmail-indiscriminate', 'B-twemoji', 'text_to_image_recall_at_5'
    r = next(r for r in records if (r['arm'], r['split'], r['metric']) == wanted)
    mean = {a: (hits[a]['B-twemoji']['text_to_image'] < 5).float().mean().item() for a in ('gmail', 'indiscriminate')}
    assert (
        r['value'] == pytest.approx(mean['gmail'] - mean['indiscriminate'], abs=1e-6)
        and r['low'] <= r['value'] <= r['high']
    )
    rows = [row[0] for row in recall_table(records)[1:]]
    assert rows == [
        'base',
        'indiscriminate',
        'gmail',
        'gmail f_g',
        'mix',
        'real',
        'gmail-indiscriminate',
        'gmail-base',
        'gmail f_g-gmail',
    ]


def test_in_every_row_of_answers_a_right_one_is_framed(encoder, world):
    two = {a: tune_text(encoder, world.arms[a], world.captions, quick) for a in ('indiscriminate', 'gmail')}
    queries, counts = found_by_any(encoder, two, world.tests['B-twemoji'], 3, k=10)
    ranks = torch.stack(
        [head_ranks(encoder, t, world.tests)['B-twemoji']['text_to_image'][queries] for t in two.values()]
    )
    assert (ranks < 10).any(0).all() and counts['by_any'] >= max(counts['gmail'], counts['indiscriminate'])

class Elsewhere:
    "A model whose weights are on another device: the meta device, which takes no tensor of the CPU."
    device = torch.device('meta')
    def checked(self, pixels): return pixels.to(self.device)
    def f_g(self, pixels):
        assert pixels.device == self.device, 'f_g is called with a batch of another device'
        return torch.ones(len(pixels), 256)
    def project_real(self, features): return F.normalize(features, dim=-1)
    def encode_real(self, pixels): return self.project_real(self.f_g(self.checked(pixels)))

def test_test_images_go_to_where_the_model_is(encoder):
    keys = list(emoji('unseen', source='twemoji')['key'])[:2]
    assert room.shown(encoder, Elsewhere(), 'unseen', keys).features_g.shape == (2, 256)

def test_the_words_of_an_interval_are_those_of_stats(hits):
    records = hit_records('miniature', hits, draws=50)
    records = [dict(r, low=.01, high=.02) if r['arm'] == 'gmail-indiscriminate' else r for r in records]
    said = room.retrieval_verdict(records)
    assert said.count(' it helps: ') == 12 and max(map(len, said.splitlines())) <= 120

def test_tables_fit_a_terminal(hits, tmp_path):
    room.write_retrieval(tmp_path, hit_records('miniature', hits, draws=50), [])
    assert max(map(len, (tmp_path/'retrieval_table.txt').read_text().splitlines())) <= 120
    assert (tmp_path/'arms.png').stat().st_size > 1000 and not (tmp_path/'scaling.png').exists()
