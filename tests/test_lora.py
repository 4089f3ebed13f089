"Where adapters go, and how they train."
import pytest
import torch
from torch import nn

from gmail_nb.align import GenReal
from gmail_nb.encoders import Encoder, OpenClipVisual, embedded_encoder
from gmail_nb.lora import LeanAttention, block_list, late_targets, lora_targets, lora_tower
from gmail_nb.settings import AdapterSettings


@pytest.fixture(scope='module')
def lite0(): return embedded_encoder().visual


@pytest.fixture
def vit(): # of open_clip, small and random
    import gmail_nb.runtime
    import open_clip
    torch.manual_seed(0)
    vision = dict(image_size=64, layers=2, width=64, patch_size=16, head_width=32)
    text = dict(width=64, heads=2, layers=1)
    return open_clip.model.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text).visual


def test_a_share_of_one_is_all_targets(lite0): assert late_targets(lite0, 1) == lora_targets(lite0)


def test_late_targets_leave_the_first_block_out(lite0):
    assert all('blocks.0.' not in t for t in late_targets(lite0, 1/3))


def test_a_share_of_nothing_is_refused(lite0):
    with pytest.raises(ValueError, match='above 0'): late_targets(lite0, 0)


def test_a_tower_without_blocks_says_so():
    with pytest.raises(ValueError, match='no list of blocks'): block_list(nn.Linear(2, 2), ['x'])


def test_a_tower_without_a_known_place_says_so():
    with pytest.raises(ValueError, match='no place for LoRA'): lora_targets(nn.Sequential(nn.Linear(2, 2)))


def test_dropout_drops_in_attention_too(vit):
    dropping = lora_tower(vit, AdapterSettings(dropout=.5)).train()
    for n, p in dropping.named_parameters():
        if 'lora_B' in n and 'mlp' not in n: p.data.normal_()
    x = torch.randn(2, 3, 64, 64)
    assert not torch.equal(dropping(x), dropping(x))
    dropping.eval()
    assert torch.equal(dropping(x), dropping(x))


def test_attention_trains_beside_the_weights(vit):
    adapted = lora_tower(vit)
    assert sum(isinstance(m, LeanAttention) for m in adapted.modules()) == 2


def test_half_precision_gives_the_real_side_the_same_numbers_each_time(vit):
    half = GenReal(Encoder('vit', OpenClipVisual(vit), nn.Identity(), None, None, 32, 1.)).to(torch.bfloat16)
    x = torch.randn(2, 3, 64, 64).bfloat16()
    with torch.inference_mode():
        a, b = (half.encode_real(x) for _ in range(2))
        half.encode_generated(x)
        assert torch.equal(a, b) and torch.equal(a, half.encode_real(x))
