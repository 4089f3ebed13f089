"Where adapters go, and how they train."
import pytest
import torch
from torch import nn

from gmail_nb.align import GenReal, load_adapter, trained_parameters
from gmail_nb.encoders import Encoder, HFVisual, OpenClipVisual, embedded_encoder
from gmail_nb.lora import LeanAttention, block_layers, block_list, late_targets, lora_targets, lora_tower
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


# one rule for every library

WIDE = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2)

def transformers_tower(kind='CLIP'):
    import transformers
    torch.manual_seed(0)
    config = getattr(transformers, f'{kind}Config')(vision_config=WIDE | dict(image_size=64, patch_size=16))
    return HFVisual(getattr(transformers, f'{kind}Model')(config).vision_model, None)

def timm_tower():
    import timm
    shape = dict(img_size=64, patch_size=16, embed_dim=64, depth=2, num_heads=2, num_classes=0)
    return timm.create_model('vit_tiny_patch16_224', **shape)

def of_transformers(): return Encoder('hf', transformers_tower(), nn.Identity(), None, None, 64)

@pytest.mark.parametrize('layers, count', [('all', 8192), ('attention', 3072)])
def test_the_same_tower_trains_as_much_from_every_library(vit, layers, count):
    for tower in (vit, transformers_tower(), transformers_tower('Siglip'), timm_tower()):
        assert trained_parameters(lora_tower(tower, AdapterSettings(layers=layers)))[0] == count


def test_an_unknown_choice_of_layers_names_the_known():
    with pytest.raises(ValueError, match="'attention'"): AdapterSettings(layers='atention')


def test_pooling_is_not_adapted_and_a_cnn_keeps_its_convolutions(lite0):
    assert not any('head' in n for n in block_layers(transformers_tower('Siglip')))
    assert lora_targets(lite0, 'attention') == lora_targets(lite0) and len(lora_targets(lite0)) == 32


def moved(model):
    torch.manual_seed(1)
    for n, p in model.f_g.named_parameters():
        if 'lora_B' in n: p.data.normal_(std=.05)
    return model.eval()

def test_shared_layers_are_saved_for_anyone_and_shared_again(tmp_path):
    from peft import PeftModel
    model, x = moved(GenReal(of_transformers())), torch.randn(2, 3, 64, 64)
    folder = model.save_pretrained(tmp_path/'shared')
    again = GenReal.from_pretrained(folder, of_transformers())
    plain = PeftModel.from_pretrained(transformers_tower(), str(folder/'adapter')).eval() # as others load it
    with torch.inference_mode():
        assert torch.equal(again.encode_generated(x), model.encode_generated(x))
        torch.testing.assert_close(plain(x), model.f_g(x))
    assert trained_parameters(again.f_g)[0] == trained_parameters(model.f_g)[0] == 8192


def test_an_adapter_of_before_keeps_its_own_layers(tmp_path): # queries and values alone, as they were chosen once
    tower = of_transformers()
    targets = tuple(n for n, _ in tower.visual.named_modules() if n.endswith(('q_proj', 'v_proj')) and 'encoder' in n)
    model = moved(GenReal(tower, AdapterSettings(targets=targets)))
    folder, x = model.save_pretrained(tmp_path/'before'), torch.randn(2, 3, 64, 64)
    again = GenReal.from_pretrained(folder, of_transformers())
    with torch.inference_mode(): assert torch.equal(again.encode_generated(x), model.encode_generated(x))
    assert trained_parameters(load_adapter(of_transformers(), folder/'adapter'))[0] == 2048


def test_a_call_that_fails_leaves_the_weights_as_they_were(vit):
    adapted = lora_tower(vit).eval()
    for n, p in adapted.named_parameters():
        if 'lora_B' in n: p.data.normal_(std=.05)
    first = {k: v.clone() for k, v in adapted.state_dict().items()}
    block = adapted.base_model.model.transformer.resblocks[0].attn
    with torch.inference_mode(), pytest.raises(Exception):
        block(torch.zeros(1, 1, 7), torch.zeros(1, 1, 7), torch.zeros(1, 1, 7))
    assert all(torch.equal(v, first[k]) for k, v in adapted.state_dict().items())


def test_a_copy_has_weights_of_its_own(vit):
    import copy
    adapted = lora_tower(vit).eval()
    twin, x = copy.deepcopy(adapted), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        twin(x)
        for p in twin.parameters(): p.add_(1.)
    assert all(not torch.equal(p, q) for p, q in zip(adapted.parameters(), twin.parameters()))
    assert not any(p.data_ptr() == q.data_ptr() for p, q in zip(adapted.parameters(), twin.parameters()))
