"Encoders: numbers of the library behind each, errors that name the nearest, batches and the cache."
import json

import pytest
import torch
from torch import nn

import gmail_nb.runtime
import open_clip
from safetensors.torch import save
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from gmail_nb.data import emoji
from gmail_nb.encoders import (cached_features, embedded_encoder, encode_images, encode_texts, hf_encoder,
                               load_encoder, open_clip_encoder, preprocess_images, read_cache, timm_encoder)
from gmail_nb.pipelines import clip_tokenizer

TEXT = dict(context_length=77, vocab_size=49408, width=64, heads=2, layers=2)
VIT = dict(image_size=32, layers=1, width=32, patch_size=8, head_width=16)


@pytest.fixture(scope='module')
def encoder(): return embedded_encoder()


@pytest.fixture(scope='module')
def drawings(): return emoji('B', source='twemoji').shard(116, 20).select(range(6))


@pytest.fixture(scope='module')
def images(drawings): return list(drawings['image'])


@pytest.fixture(scope='module')
def words(drawings): return list(drawings['label'])


@pytest.fixture(scope='module')
def pixels(encoder, images): return preprocess_images(encoder, images)


def registered(folder, name, config): # an architecture that open_clip knows from now on
    (folder/f'{name}.json').write_text(json.dumps(config))
    open_clip.add_model_config(folder/f'{name}.json')
    return config


def test_features_are_unit_vectors_nearest_to_their_words(encoder, pixels, words):
    with torch.inference_mode():
        x, t = encoder.encode_image(pixels), encoder.encode_text(encoder.tokenize(words))
    assert x.shape == (6, 256)
    torch.testing.assert_close(x.norm(dim=-1), torch.ones(6))
    torch.testing.assert_close(t.norm(dim=-1), torch.ones(6))
    cosines = x @ t.T
    assert cosines.diagonal().mean() > cosines.mean()


def test_wrong_pixels_are_refused(encoder):
    with pytest.raises(ValueError, match=r'\(3, 112, 112\)'): encoder.encode_image(torch.zeros(3, 112, 112))
    with pytest.raises(ValueError, match='uint8'): encoder.encode_image(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_batch_statistics_never_train(encoder):
    encoder.train()
    assert not any(m.training for m in encoder.visual.modules() if isinstance(m, nn.BatchNorm2d))
    encoder.eval()


def test_size_changes_the_preprocessing(encoder, images):
    assert embedded_encoder(size=64).preprocess(images[0]).shape == (3, 64, 64)
    assert encoder.preprocess.size == 112


def test_open_clip_folder_and_file_equal_the_library(images, words, tmp_path):
    vision = dict(image_size=32, layers=2, width=64, patch_size=8, head_width=32)
    tiny = registered(tmp_path, 'tiny-vit-t', dict(embed_dim=32, vision_cfg=vision, text_cfg=TEXT))
    torch.manual_seed(0)
    reference = open_clip.create_model('tiny-vit-t').eval()
    whole = tmp_path/'whole' # in open_clip's own layout, as the Hub holds it
    whole.mkdir()
    (whole/'open_clip_config.json').write_text(json.dumps(dict(model_cfg=tiny, preprocess_cfg={})))
    (whole/'open_clip_model.safetensors').write_bytes(save(dict(reference.state_dict())))
    for spec in (f'tiny-vit-t/{whole}/open_clip_model.safetensors', f'local-dir:{whole}'):
        clip = open_clip_encoder(spec)
        x = preprocess_images(clip, images)
        with torch.inference_mode():
            assert torch.equal(clip.encode_image(x), reference.encode_image(x, normalize=True))
            tokens = open_clip.get_tokenizer('tiny-vit-t')(words)
            theirs = reference.encode_text(tokens, normalize=True)
            assert torch.equal(clip.encode_text(clip.tokenize(words)), theirs)
            assert clip.image_tokens(x).shape == (6, 16, 64)


@pytest.mark.parametrize('weights, activation', [('openai', 'QuickGELU'), ('laion2b_s34b_b79k', 'GELU')])
def test_activation_is_that_of_the_weights(monkeypatch, weights, activation):
    create = open_clip.create_model_and_transforms
    def without_download(name, pretrained=None, **kwargs): return create(name, **kwargs) # random weights stand in
    monkeypatch.setattr(open_clip, 'create_model_and_transforms', without_download)
    visual = open_clip_encoder(f'ViT-B-32/{weights}').visual.visual
    assert type(visual.transformer.resblocks[0].mlp.gelu).__name__ == activation


CNN = dict(embed_dim=32, vision_cfg=dict(image_size=64, layers=[1, 1, 1, 1], width=8), text_cfg=TEXT)
COCA = dict(embed_dim=32, custom_text=True, multimodal_cfg=TEXT | dict(context_length=76, layers=1),
            vision_cfg=VIT | dict(attentional_pool=True, attn_pooler_heads=2, output_tokens=True),
            text_cfg=TEXT | dict(context_length=76, embed_cls=True, output_tokens=True))


empty = torch.empty


@pytest.mark.parametrize('name, config, tokens', [('tiny-resnet-t', CNN, 4), ('tiny-coca-t', COCA, 16)])
def test_a_cnn_and_coca_give_features_and_tokens(images, words, tmp_path, name, config, tokens, monkeypatch):
    # open_clip leaves a projection of CoCa as the memory was: here it is no number, always
    monkeypatch.setattr(torch, 'empty', lambda *size, **kwargs: empty(*size, **kwargs).fill_(float('nan'))
                        if all(isinstance(n, int) for n in size) and not kwargs else empty(*size, **kwargs))
    registered(tmp_path, name, config)
    e = open_clip_encoder(f'{name}/random')
    x = preprocess_images(e, images[:2])
    with torch.inference_mode():
        assert e.encode_image(x).shape == (2, 32)
        assert e.image_tokens(x).shape[:2] == (2, tokens)
        assert e.encode_text(e.tokenize(words[:2])).shape == (2, 32)


def test_clip_in_half_precision_loads_in_full(tmp_path):
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config = CLIPConfig(text_config=small | dict(eos_token_id=49407, bos_token_id=49406), projection_dim=16,
                        vision_config=small | dict(image_size=32, patch_size=8))
    size = dict(height=32, width=32)
    tokenizer = clip_tokenizer()
    processor = CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=size)
    for part in (CLIPModel(config).half(), processor, tokenizer): part.save_pretrained(tmp_path/'half')
    assert next(hf_encoder(str(tmp_path/'half')).visual.parameters()).dtype == torch.float32
    ours = tokenizer(['a red apple'])['input_ids'][0]
    assert ours == open_clip.get_tokenizer('ViT-B-32')(['a red apple'])[0][:5].tolist()


def test_other_kinds_of_models_are_refused(tmp_path):
    (tmp_path/'config.json').write_text(json.dumps(dict(model_type='bert')))
    with pytest.raises(ValueError, match='expected clip or siglip'): hf_encoder(str(tmp_path))


def test_timm_swin_gives_a_grid_of_tokens():
    swin = timm_encoder('swin_tiny_patch4_window7_224/random')
    assert swin.image_tokens(torch.zeros(1, 3, 224, 224)).shape == (1, 49, 768)


def test_timm_weights_that_do_not_fit_or_are_absent(tmp_path):
    (tmp_path/'other.safetensors').write_bytes(save(dict(a=torch.zeros(1))))
    with pytest.raises(ValueError, match='does not fit'):
        timm_encoder(f'vit_tiny_patch16_224/{tmp_path}/other.safetensors')
    with pytest.raises(FileNotFoundError, match='is not here'): timm_encoder('vit_tiny_patch16_224/absent.pth')


@pytest.mark.parametrize('name, near', [
    ('embeded', "'embedded'"), ('open_clip:ViT-B-23/openai', "'ViT-B-32'"), ('open_clip:ViT-B-32/opnai', "'openai'"),
    ('open_clip:ViT-B-32', 'names no weights: write open_clip:ViT-B-32/WEIGHTS with one of openai, .*random'),
    ('open_clip:ViT-B-32/', 'names no weights'),
    ('open_clip:@@@/random', r'more\.'), ('timm:vit_tiny_patch16_223/random', "'vit_tiny_patch16_224'")])
def test_an_unknown_name_is_answered_with_near_ones(name, near):
    with pytest.raises(ValueError, match=near): load_encoder(name)


def test_images_in_every_form_give_the_same_features(encoder, drawings, images, pixels):
    at_once = encode_images(encoder.encode_image, pixels)
    keyed = zip(drawings['key'], images)
    assert at_once.shape == (6, 256) and not at_once.is_inference()
    for other in (encode_images(encoder.encode_image, pixels, batch_size=4),
                  encode_images(encoder.encode_image, keyed, encoder.preprocess, batch_size=4),
                  encode_images(encoder.encode_image, images, encoder.preprocess)):
        torch.testing.assert_close(other, at_once, atol=1e-5, rtol=0)


def test_broken_images_raise_or_are_set_apart(encoder, images):
    some, broken = [('good', images[0]), ('torn', b'no image')], {}
    with pytest.raises(ValueError, match="'torn'"): encode_images(encoder.encode_image, some, encoder.preprocess)
    assert len(encode_images(encoder.encode_image, some, encoder.preprocess, broken=broken)) == 1
    assert list(broken) == ['torn'] and 'does not decode' in broken['torn']
    with pytest.raises(ValueError, match='none of 1 images decodes'):
        encode_images(encoder.encode_image, some[1:], encoder.preprocess, broken={})
    with pytest.raises(ValueError, match='no images'): encode_images(encoder.encode_image, [], encoder.preprocess)


def test_texts_are_in_order_however_they_are_batched(encoder):
    texts = ['a dog ' * n for n in (9, 1, 5, 2, 7)]
    with torch.inference_mode(): whole = encoder.encode_text(encoder.tokenize(texts))
    for how in (dict(), dict(batch_size=2), dict(batch_size=2, by_length=True)):
        torch.testing.assert_close(encode_texts(encoder, texts, **how), whole, atol=1e-5, rtol=0)
    assert encode_texts(encoder, texts, encoder.text.features).shape == (5, 384)
    tower = encode_texts(encoder, texts, encoder.text)
    torch.testing.assert_close(nn.functional.normalize(tower, dim=-1), whole, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match='no texts'): encode_texts(encoder, [])


@pytest.fixture
def cache(tmp_path): # what is asked for, and how often it was computed
    calls = []
    def ask(made_from='a', value=1., keys=None):
        def compute():
            calls.append(made_from)
            return torch.full((2, 3), value)
        return cached_features(tmp_path/'below'/'f.safetensors', made_from, compute, keys)
    ask.calls, ask.file = calls, tmp_path/'below'/'f.safetensors'
    return ask


def test_cache_is_read_when_it_was_made_from_the_same(cache):
    assert torch.equal(cache(), cache(value=9.)) and cache.calls == ['a']
    assert cache('b', 5.)[0, 0] == 5 and cache.calls == ['a', 'b']


def test_a_damaged_cache_is_made_again(cache):
    first = cache()
    cache.file.write_bytes(b'cut off')
    assert torch.equal(cache(), first) and len(cache.calls) == 2
    for card in (b'\xff\xfe', b'[]'):
        cache.file.with_suffix('.json').write_bytes(card)
        assert read_cache(cache.file, 'a') is None


def test_cache_keeps_and_compares_keys(cache):
    cache(keys=['x', 'y'])
    assert json.loads(cache.file.with_suffix('.json').read_text())['keys'] == ['x', 'y']
    assert read_cache(cache.file, 'a', ['y', 'x']) is None and read_cache(cache.file, 'other', ['x', 'y']) is None
    with pytest.raises(ValueError, match='2 images but 1 keys'): cache('c', keys=['x'])


def test_an_absent_cache_is_none(tmp_path): assert read_cache(tmp_path/'absent.safetensors', 'x', ['a']) is None
