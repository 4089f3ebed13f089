"The frozen prefix: the same numbers for every kind of tower, and a cache that is read only where it fits."
import open_clip
import pytest
import torch
from torch import nn

from gmail_nb.align import GenReal
from gmail_nb.encoders import Encoder
from gmail_nb.prefix import FrozenPrefix, cache_prefix, channels_last
from gmail_nb.runtime import set_seed
from gmail_nb.settings import AdapterSettings

def small_tower():
    set_seed(0)
    return open_clip.model.CLIP(
        embed_dim=32, vision_cfg=dict(image_size=32, layers=6, width=64, patch_size=8, head_width=32),
        text_cfg=dict(width=64, heads=2, layers=1)).visual

def small_transformers():
    "transformers' image tower, giving its projected features."
    from transformers import CLIPConfig, CLIPModel
    class Wrapped(nn.Module):
        def __init__(self, m):
            super().__init__()
            self.vision, self.projection = m.vision_model, m.visual_projection
        def forward(self, x): return self.projection(self.vision(pixel_values=x).pooler_output)
    size = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2)
    return Wrapped(CLIPModel(CLIPConfig(
        projection_dim=32, vision_config=size | dict(num_hidden_layers=6, image_size=32, patch_size=8),
        text_config=size | dict(num_hidden_layers=1))))

class InTuple(nn.Module):
    "A block in the manner of older transformers."
    def __init__(self, block):
        super().__init__()
        self.block = block
    def forward(self, x): return (self.block(x),)

class Tupled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([InTuple(nn.Linear(8, 8)) for _ in range(4)])
    def forward(self, x):
        x = x[:, 0, 0, :8]
        for layer in self.layers: x = layer(x)[0]
        return x

def model_of(tower, adapters, dim=32):
    return GenReal(Encoder('small', tower, nn.Identity(), None, None, dim, 1.), adapters)

third = AdapterSettings(adapted_share=1/3)
pixels = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))

@pytest.mark.parametrize('make', [small_tower, small_transformers])
def test_replay_is_the_whole_tower_to_the_last_bit(make):
    model = model_of(make(), third)
    prefix, whole = FrozenPrefix(model), model.encode_generated(pixels)
    with prefix.replay(prefix.record(pixels)):
        assert torch.equal(model.encode_generated(torch.zeros_like(pixels)), whole)
    assert torch.equal(model.encode_generated(pixels), whole) # afterwards as before

def test_replay_of_blocks_that_give_tuples():
    model = model_of(Tupled(), AdapterSettings(targets=('layers.3.block',)), dim=8)
    prefix, whole = FrozenPrefix(model), model.encode_generated(pixels)
    with prefix.replay(prefix.record(pixels)):
        assert torch.equal(model.encode_generated(torch.zeros_like(pixels)), whole)

def test_channels_last_keeps_values_and_leaves_other_shapes():
    assert torch.equal(channels_last(pixels), pixels) and channels_last(pixels).stride()[1] == 1
    assert channels_last(pixels[0]) is not None and channels_last(pixels[0]).stride() == pixels[0].stride()

def test_a_prefix_needs_frozen_blocks_and_lora():
    with pytest.raises(ValueError, match='late_targets'): FrozenPrefix(model_of(small_tower(), AdapterSettings()))
    with pytest.raises(ValueError, match='needs LoRA in late blocks'):
        FrozenPrefix(model_of(small_tower(), AdapterSettings(tuning='full')))

def test_the_cache_is_read_back_made_again_and_mended(tmp_path):
    prefix = FrozenPrefix(model_of(small_tower(), third))
    file = tmp_path/'prefix.safetensors'
    first, again = cache_prefix(prefix, pixels, file), cache_prefix(prefix, pixels, file)
    assert torch.equal(first, again) and torch.equal(first, prefix.record(pixels))
    torch.testing.assert_close(cache_prefix(prefix, pixels.roll(1, 0), file).roll(-1, 0), first)
    file.write_bytes(b'cut off')
    assert torch.equal(cache_prefix(prefix, pixels.roll(1, 0), file).roll(-1, 0), first)
    assert torch.equal(cache_prefix(prefix, pixels, file), first)

def test_leading_dimensions_are_kept_and_size_is_checked():
    prefix = FrozenPrefix(model_of(small_tower(), third))
    assert cache_prefix(prefix, pixels[:4].unflatten(0, (2, 2))).shape[:2] == (2, 2)
    with pytest.raises(ValueError, match='adapt later blocks'): cache_prefix(prefix, pixels, max_bytes=1000)
