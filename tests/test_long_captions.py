"Stretched positions, stretched towers, and published weights of Long-CLIP."
import open_clip
import pytest
import torch
from torch import nn

from gmail_nb.encoders import Encoder, HFText, HFTokenizer, OpenClipText, OpenClipTokenizer
from gmail_nb.long_captions import (
    convert_longclip,
    cut_at,
    stretch_encoder,
    stretch_positions,
    stretch_text,
    to_transformers,
)
from gmail_nb.pipelines import clip_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel

words = 'a small red house by the sea under a grey sky with two boats'.split()
long_text = ' '.join((words * 20)[:200])

def waves():
    places = torch.arange(77)
    return torch.stack([torch.sin(places / 9), torch.cos(places / 17)], 1)

@pytest.fixture(scope='module')
def encoders():
    torch.manual_seed(0)
    tiny = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                bos_token_id=49406, eos_token_id=49407, attn_implementation='sdpa')
    hf = HFText(CLIPTextModel(CLIPTextConfig(**tiny)), nn.Linear(32, 24, bias=False))
    clip = open_clip.model.CLIP(24, dict(image_size=32, layers=1, width=32, patch_size=16, head_width=16),
                                dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2))
    clip.visual = nn.Identity()
    for p in (hf.tower.embeddings.position_embedding.weight, clip.positional_embedding): p.data.normal_(std=.3)
    tokenizers = HFTokenizer(clip_tokenizer(), 77), OpenClipTokenizer(open_clip.get_tokenizer('ViT-B-32'))
    return [Encoder(n, nn.Identity(), text, None, t, 24).eval()
            for n, text, t in zip(('transformers', 'open_clip'), (hf, OpenClipText(clip)), tokenizers)]

@pytest.fixture(scope='module')
def state():
    torch.manual_seed(1)
    shapes = (dict(image_size=32, layers=2, width=64, patch_size=8, head_width=64),
              dict(context_length=248, vocab_size=49408, width=64, heads=1, layers=2))
    reference = open_clip.model.CLIP(24, *shapes, quick_gelu=True).eval()
    return dict(reference.state_dict()) | dict(positional_embedding_res=torch.randn(248, 64) * .3)

@pytest.mark.parametrize('dtype, off', [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_half_precision_is_stretched_in_float32(dtype, off):
    rough = torch.randn(77, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = stretch_positions(rough)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), stretch_positions(rough.float()), atol=off, rtol=off)

def test_the_same_length_changes_nothing():
    assert torch.equal(stretch_positions(waves(), 77), waves())

def test_other_lengths_and_none_kept():
    assert stretch_positions(waves(), 130, 0).shape == (130, 2)
    torch.testing.assert_close(stretch_positions(waves(), 153, 1)[1::2][:76], waves()[1:])

def test_what_cannot_be_stretched_is_refused():
    with pytest.raises(ValueError, match='keep 76 of 77'): stretch_positions(waves(), keep=76)
    with pytest.raises(ValueError, match='cannot shorten'): stretch_positions(waves(), 50)
    with pytest.raises(ValueError, match='nothing to stretch'): stretch_text(nn.Linear(2, 2))

def test_an_unknown_tokenizer_is_refused():
    class Odd: pass
    odd = Encoder('odd', nn.Identity(), nn.Identity(), None, Odd(), 2)
    with pytest.raises(ValueError, match='Odd is not known'): cut_at(odd, 5)

@pytest.mark.parametrize('which', [0, 1])
def test_words_after_77_tokens_are_read_for_the_first_time(encoders, which):
    e = encoders[which]
    wide, a, b = stretch_encoder(e), long_text, long_text + ' and a lighthouse'
    with torch.inference_mode():
        if e.name == 'transformers':
            torch.testing.assert_close(e.encode_text(e.tokenize([a])), e.encode_text(e.tokenize([b])))
        moved = wide.encode_text(wide.tokenize([a])) - wide.encode_text(wide.tokenize([b]))
    assert moved.norm() > 1e-4
    assert wide.tokenize([a])['input_ids'].shape[1] > 77 and e.tokenize([a])['input_ids'].shape[1] == 77

@pytest.mark.parametrize('which', [0, 1])
def test_a_stretched_encoder_has_a_name_and_fingerprint_of_its_own(encoders, which):
    wide = stretch_encoder(encoders[which])
    assert wide.name.endswith('+248') and wide.fingerprint != encoders[which].fingerprint
    assert wide.visual is encoders[which].visual

def test_converted_weights_are_safetensors(state, tmp_path):
    torch.save(state, tmp_path/'longclip-tiny.pt')
    folder = convert_longclip(tmp_path/'longclip-tiny.pt', tmp_path/'longclip')
    assert len(list(folder.glob('*.safetensors'))) == 1

def test_incomplete_and_strange_checkpoints_are_named(state):
    with pytest.raises(ValueError, match="'visual.proj' is missing"):
        to_transformers({k: v for k, v in state.items() if k != 'visual.proj'})
    with pytest.raises(ValueError, match='no place or are missing'): to_transformers(dict(state, extra=torch.zeros(1)))

def test_a_plain_clip_is_converted_too(state):
    plain = {k: v for k, v in state.items() if k != 'positional_embedding_res'}
    assert to_transformers(plain).config.text_config.max_position_embeddings == 248
