"The model: what is trained, that the real side stays as it was, and folders that load again."
import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from gmail_nb.align import GenReal, model_card, trained_parameters
from gmail_nb.data import emoji
from gmail_nb.encoders import Encoder, embedded_encoder, preprocess_images, timm_encoder
from gmail_nb.losses import info_nce
from gmail_nb.lora import late_targets
from gmail_nb.settings import TUNINGS, AdapterSettings


@pytest.fixture(scope='module')
def before(): return embedded_encoder()


@pytest.fixture(scope='module')
def pixels(before): return preprocess_images(before, list(emoji('A', source='noto').select(range(40, 48))['image']))


@pytest.fixture(scope='module')
def base(before, pixels):
    with torch.inference_mode(): return before.encode_image(pixels)


@pytest.fixture(scope='module')
def trained(before, pixels, base): # by two steps of Eq. 1
    torch.manual_seed(0)
    model = GenReal(copy.deepcopy(before)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    for _ in range(2):
        loss = info_nce(model.encode_generated(pixels.rot90(1, (2, 3))), base)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope='module')
def other(before): # an encoder with other weights
    encoder = copy.deepcopy(before)
    encoder.__dict__.pop('fingerprint', None)
    encoder.visual.head.weight.data += 1
    return encoder


@pytest.mark.parametrize('tuning', TUNINGS)
def test_untrained_equals_the_base(before, pixels, base, tuning):
    model = GenReal(copy.deepcopy(before), AdapterSettings(tuning=tuning)).eval()
    with torch.inference_mode():
        assert torch.equal(model.encode_generated(pixels), base)
        assert torch.equal(model.encode_real(pixels), base)


def test_projections_train_least_and_full_most(before):
    trained = {}
    for tuning in TUNINGS:
        model = GenReal(copy.deepcopy(before), AdapterSettings(tuning=tuning))
        model.proj_real.requires_grad_(False)
        trained[tuning] = trained_parameters(model)[0]
    assert trained['projections'] < trained['lora'] < trained['full']


def test_a_share_of_blocks_is_late_targets_by_name(before, pixels):
    models = []
    for how in (dict(adapted_share=4/7), dict(targets=tuple(late_targets(before.visual, 4/7)))):
        torch.manual_seed(3)
        models.append(GenReal(copy.deepcopy(before), AdapterSettings(**how)))
    a, b = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in models)
    assert list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize('how, message', [
    (dict(rank=4000), 'rank 4000 does not fit'), (dict(rank=0), 'rank 0 does not fit'),
    (dict(targets=('trunk.blocks.0.0.conv_pww',)), 'module of Lite0Tower')])
def test_adapters_that_do_not_fit_are_refused(before, how, message):
    with pytest.raises(ValueError, match=message): GenReal(copy.deepcopy(before), AdapterSettings(**how))


def test_unknown_tuning_names_the_nearest():
    with pytest.raises(ValueError, match="'lora'"): AdapterSettings(tuning='lorra')


def test_an_encoder_is_adapted_once(before):
    encoder = copy.deepcopy(before)
    GenReal(encoder)
    with pytest.raises(ValueError, match='adapted already'): GenReal(encoder)


def test_every_adapter_gets_a_gradient_and_the_real_side_none(trained, before, pixels, base):
    trained.zero_grad()
    info_nce(trained.encode_generated(pixels.rot90(1, (2, 3))), base).backward()
    weights = [(n, p) for n, p in trained.f_g.named_parameters() if p.requires_grad]
    assert [n for n, p in weights if p.grad is None or not p.grad.abs().sum() > 0] == []
    with torch.inference_mode():
        assert torch.equal(trained.encode_real(pixels), base)
        assert torch.equal(trained.encoder.encode_image(pixels), base)
        assert not torch.equal(trained.encode_generated(pixels), base)


def test_a_saved_model_loads_as_it_was(trained, before, pixels, base, tmp_path):
    folder = trained.save_pretrained(tmp_path/'aligned', loss=dict(name='info_nce', tau=.07))
    assert not (folder/'adapter'/'README.md').exists() and (folder/'README.md').exists()
    loaded = GenReal.from_pretrained(folder, copy.deepcopy(before))
    with torch.inference_mode():
        assert torch.equal(loaded.encode_generated(pixels), trained.encode_generated(pixels))
        assert torch.equal(loaded.encode_real(pixels), base)
    by_name = GenReal.from_pretrained(str(folder))
    with torch.inference_mode(): assert torch.equal(by_name.encode_real(pixels), base)


def test_another_base_is_refused(trained, before, other, tmp_path):
    folder = trained.save_pretrained(tmp_path/'aligned')
    with pytest.raises(ValueError, match='load the same base weights'): GenReal.from_pretrained(folder, other)
    with pytest.raises(ValueError, match='load the same base weights'): GenReal(other, folder=folder/'adapter')


def test_an_adapter_of_another_architecture_is_refused(trained, tmp_path):
    folder = trained.save_pretrained(tmp_path/'aligned')
    alone = shutil.copytree(folder/'adapter', tmp_path/'alone'/'adapter')
    vit = timm_encoder('vit_tiny_patch16_224/random').visual
    with pytest.raises(ValueError, match='another architecture'):
        GenReal(Encoder('vit', vit, nn.Identity(), None, None, 192, 1.), folder=alone)


def test_projections_alone_count_one_projection(before, tmp_path):
    model = GenReal(copy.deepcopy(before), AdapterSettings(tuning='projections'))
    card = json.loads((model.save_pretrained(tmp_path/'bare')/'card.json').read_text())
    assert card['trained'][0] == before.dim**2 and card['format'] == 1


def test_a_whole_tower_is_saved_and_loaded(before, pixels, base, tmp_path):
    free = GenReal(copy.deepcopy(before), AdapterSettings(tuning='full')).eval()
    with torch.no_grad():
        for p in free.f_g.parameters(): p.mul_(1.01)
    again = GenReal.from_pretrained(free.save_pretrained(tmp_path/'full'), copy.deepcopy(before))
    with torch.inference_mode():
        assert torch.equal(again.encode_generated(pixels), free.encode_generated(pixels))
        assert not torch.equal(again.encode_generated(pixels), base)
        assert torch.equal(again.encode_real(pixels), base)


def test_an_unfinished_or_absent_folder_never_goes_to_the_hub(trained, before, tmp_path, monkeypatch):
    folder = trained.save_pretrained(tmp_path/'aligned')
    (folder/'card.json').unlink()
    def asked(*args, **kwargs): raise AssertionError('the Hub was asked')
    monkeypatch.setattr('huggingface_hub.snapshot_download', asked)
    with pytest.raises(FileNotFoundError, match='card.json is missing'): GenReal.from_pretrained(folder, before)
    with pytest.raises(FileNotFoundError, match='there is no folder'): GenReal.from_pretrained(tmp_path/'no', before)


def test_folders_without_a_tuning_are_lora(trained, before, pixels, tmp_path):
    folder = trained.save_pretrained(tmp_path/'old')
    card = json.loads((folder/'card.json').read_text())
    del card['tuning']
    (folder/'card.json').write_text(json.dumps(card))
    again = GenReal.from_pretrained(folder, copy.deepcopy(before))
    with torch.inference_mode(): assert torch.equal(again.encode_generated(pixels), trained.encode_generated(pixels))


def test_the_card_shows_results_and_the_base_on_the_hub(trained, tmp_path):
    folder = trained.save_pretrained(tmp_path/'aligned', 'owner/name', results=dict(loss_last=.5))
    text = (folder/'README.md').read_text()
    assert '| loss_last | 0.500 |' in text and "from_pretrained('owner/name')" in text and 'base_model' not in text
    card = json.loads((folder/'card.json').read_text()) | dict(base='hf:openai/clip-vit-large-patch14@32bd64')
    assert 'base_model: openai/clip-vit-large-patch14' in str(model_card(card))


def test_import_needs_no_model_library():
    code = ('import sys, gmail_nb.align\n'
            'print([m for m in ("transformers", "open_clip", "timm", "peft", "datasets") if m in sys.modules])')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert out.stdout.strip() == '[]', out.stdout + out.stderr
