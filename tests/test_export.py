"Sharing: facts that stay on the card, and checkpoints that a base without a last linear map can have."
import json
import subprocess
import sys

import pytest
import torch
from house import root, run
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, SiglipConfig, SiglipImageProcessor, SiglipModel

from gmail_nb.align import GenReal
from gmail_nb.data import emoji
from gmail_nb.encoders import embedded_encoder, hf_encoder, preprocess_images
from gmail_nb.export import export, known_facts, push_to_hub, run_card
from gmail_nb.pipelines import clip_tokenizer
from gmail_nb.settings import AdapterSettings
from gmail_nb.splits import write_trained_on

NARROW = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
VISION = NARROW | dict(image_size=32, patch_size=8)
TEXT = NARROW | dict(vocab_size=49408, eos_token_id=49407, bos_token_id=49406)
SIZE = dict(height=32, width=32)


def saved(folder, *parts):
    for part in parts: part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope='module')
def clip_folder(tmp_path_factory):
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16))
    processor = CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=SIZE)
    return saved(tmp_path_factory.mktemp('clip')/'tiny', clip, processor, clip_tokenizer())


@pytest.fixture(scope='module')
def siglip_folder(tmp_path_factory):
    torch.manual_seed(0)
    text = NARROW | dict(vocab_size=49408)
    siglip = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
    return saved(tmp_path_factory.mktemp('siglip')/'tiny', siglip, SiglipImageProcessor(size=SIZE), clip_tokenizer())


def moved(folder): # a model whose adapters are not zero
    torch.manual_seed(0)
    model = GenReal(hf_encoder(folder), AdapterSettings(rank=2)).eval()
    for n, p in model.f_g.named_parameters():
        if 'lora_B' in n: p.data.normal_(std=.05)
    return model


class NoHub: # takes what is uploaded and keeps its description
    def create_repo(self, repo, private, exist_ok): self.private = private
    def upload_folder(self, repo_id, folder_path, allow_patterns): return f'{repo_id}@0'


def test_facts_of_an_earlier_save_stay_on_the_card(clip_folder, tmp_path):
    model, api = moved(clip_folder), NoHub()
    push_to_hub(model, 'owner/name', tmp_path/'push', api=api, results=dict(loss=.5), settings=dict(rank=2))
    assert push_to_hub(model, 'owner/name', tmp_path/'push', api=api) == 'owner/name@0' and api.private
    card = json.loads((tmp_path/'push'/'card.json').read_text())
    assert card['results'] == dict(loss=.5) and card['settings'] == dict(rank=2)
    assert known_facts(GenReal(embedded_encoder()), tmp_path/'push') == {} # another base


def test_another_base_of_the_same_shape_is_refused(clip_folder, tmp_path):
    folder = moved(clip_folder).save_pretrained(tmp_path/'aligned')
    other = hf_encoder(clip_folder)
    other.visual.visual_projection.weight.data += 1
    with pytest.raises(ValueError, match='load the same base weights'): GenReal.from_pretrained(folder, other)


def test_a_clip_with_its_projection_is_exported(clip_folder, tmp_path):
    model = moved(clip_folder)
    model.proj_gen.weight.data.normal_()
    x = preprocess_images(model.encoder, list(emoji('A', source='noto').select(range(4))['image']))
    loaded = hf_encoder(str(export(model, tmp_path/'out')))
    with torch.inference_mode():
        torch.testing.assert_close(loaded.encode_image(x), model.encode_generated(x), atol=1e-5, rtol=0)


def test_a_siglip_is_exported_with_an_identity_projection_alone(siglip_folder, tmp_path):
    model = moved(siglip_folder)
    model.proj_gen.weight.data[0, 1] = .5
    with pytest.raises(ValueError, match='does not end in a linear map'): export(model, tmp_path/'no')
    model.proj_gen.weight.data.copy_(torch.eye(32))
    x = preprocess_images(model.encoder, list(emoji('A', source='noto').select(range(4))['image']))
    loaded = hf_encoder(str(export(model, tmp_path/'out')))
    with torch.inference_mode(): torch.testing.assert_close(loaded.encode_image(x), model.encode_generated(x))


def test_the_embedded_encoder_has_no_format_of_its_own(tmp_path):
    with pytest.raises(ValueError, match='no checkpoint format'): export(GenReal(embedded_encoder()), tmp_path/'no')


# Cards with the numbers of a run

def recorded(arm, metric, value, **more):
    return (
        dict(experiment='align', arm=arm, dataset='drawn', split='validation', metric=metric, value=value, seed=0, n=50)
        | more
    )


def test_a_card_has_the_numbers_of_its_run(clip_folder, tmp_path):
    model = GenReal(hf_encoder(clip_folder), AdapterSettings(rank=2))
    model.save_pretrained(tmp_path, settings=dict(align=dict(lr=.001, ema=None)), data='9 pairs with drawn')
    assert 'None were recorded' in run_card(tmp_path, 'owner/name').text
    rows = [recorded('base', 'paired_cosine', .25), recorded('gmail', 'paired_cosine', .5),
            recorded('gmail - base', 'recall', -.2, low=-.3, high=-.1)]
    (tmp_path/'results.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    write_trained_on(tmp_path, ['a', 'b'])
    run(sys.executable, root/'tools'/'cards.py', tmp_path, '--repo', 'owner/name', cwd=root)
    text = (tmp_path/'README.md').read_text()
    assert (
        '| paired_cosine | 0.250 | 0.500 |' in text
        and 'On 50 pairs' in text
        and 'align.lr' in text
        and 'align.ema' not in text
    )
    assert 'Aligning hurts' in text, 'bad news stands on the card as well'
    assert 'its 2 training images' in text and "from_pretrained('owner/name')" in text and 'model-index' in text


def test_the_card_of_a_push_has_them_too(clip_folder, tmp_path):
    class Api:
        def create_repo(self, *args, **kwargs): pass
        def upload_folder(self, repo_id, folder_path, allow_patterns): return (folder_path/'README.md').read_text()
    model = GenReal(hf_encoder(clip_folder), AdapterSettings(rank=2))
    (tmp_path/'results.jsonl').write_text(json.dumps(recorded('gmail', 'paired_cosine', .5)) + '\n')
    assert '| paired_cosine | - | 0.500 |' in push_to_hub(model, 'owner/name', tmp_path, api=Api())


def test_a_folder_that_is_neither_gets_no_card(tmp_path):
    done = subprocess.run([sys.executable, root/'tools'/'cards.py', tmp_path], capture_output=True, text=True)
    assert done.returncode and 'is neither' in done.stderr and not (tmp_path/'README.md').exists()
