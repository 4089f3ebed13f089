"Files from strangers: a pickle is never run, the Hub is never asked for what is written like a path, code of a folder is refused."

import json
import os
import pickle
import shutil
import socket

import huggingface_hub
import numpy as np
import pytest
import torch
from miniature import make_clip, make_gpt2, make_open_clip
from safetensors.torch import save_file
from test_llava import processor_of, tiny_llava
from test_saved import LOADERS, Tower, aligned, saved, tiny

from gmail_nb.align import GenReal
from gmail_nb.captioning import load_captioner, load_lm
from gmail_nb.encoders import load_encoder
from gmail_nb.files import check_no_code, found_on_disk, on_disk
from gmail_nb.llava import load_llava
from gmail_nb.long_captions import published_state
from gmail_nb.pipelines import load_generator, resolve_generator, tiny_stable_diffusion
from gmail_nb.runs.models import eval_model
from gmail_nb.settings import Generator
from gmail_nb.train import Checkpoints
from gmail_nb.tune import Checkpoint
from gmail_nb.weights import load_part, load_whole, read_torch

def weight(item): return 5

@pytest.fixture(scope='module')
def models(tmp_path_factory):
    "A model of each library, as it is published."
    root = tmp_path_factory.mktemp('models')
    for name, make in (('clip', make_clip), ('open_clip', make_open_clip), ('gpt2', make_gpt2)):
        (root/name).mkdir()
        make(root/name)
    tiny_stable_diffusion(root/'pipeline')
    model, processor = tiny_llava()
    model.save_pretrained(root/'llava')
    processor.save_pretrained(root/'llava')
    return root

# The Hub

class Asked(BaseException): "Somebody asked the network."

@pytest.fixture
def no_network(monkeypatch, tmp_path):
    "Online as far as the libraries know, and every way out is a failure. Names are relative to an empty folder."
    def asked(*args, **kwargs): raise Asked(f'{args} {kwargs}')
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(socket, 'socket', asked)
    monkeypatch.setattr(socket, 'create_connection', asked)
    monkeypatch.setattr(socket, 'getaddrinfo', asked)
    for name in ('snapshot_download', 'model_info', 'repo_info', 'list_repo_files', 'list_repo_tree'):
        if hasattr(huggingface_hub, name): monkeypatch.setattr(huggingface_hub, name, asked)
    for name in ('model_info', 'repo_info', 'list_repo_files', 'get_paths_info', 'file_exists'):
        monkeypatch.setattr(huggingface_hub.HfApi, name, asked)
    monkeypatch.setattr(huggingface_hub.file_download, 'get_hf_file_metadata', asked)
    monkeypatch.chdir(tmp_path)
    return tmp_path

def relative(models, kind, to='models'):
    "A copy below the working folder, by the name that somebody would write."
    shutil.copytree(models/kind, f'{to}/{kind}')
    return f'{to}/{kind}'

READ = dict(clip=lambda n: load_encoder(f'hf:{n}'), open_clip=lambda n: load_encoder(f'open_clip:local-dir:{n}'),
            gpt2=load_lm, pipeline=load_generator, llava=load_llava)

@pytest.mark.parametrize('kind', READ)
def test_what_lies_on_disk_is_read_without_the_network(models, no_network, kind):
    READ[kind](relative(models, kind))

GONE = [
    ('clip', 'model.safetensors'),
    ('clip', 'config.json'),
    ('clip', 'tokenizer*'),
    ('clip', 'preprocessor_config.json'),
    ('open_clip', 'open_clip_config.json'),
    ('open_clip', 'open_clip_model.safetensors'),
    ('gpt2', 'model.safetensors'),
    ('gpt2', 'config.json'),
    ('gpt2', 'tokenizer*'),
    ('pipeline', 'unet'),
    ('pipeline', 'vae/config.json'),
    ('pipeline', 'model_index.json'),
    ('pipeline', 'text_encoder/*.safetensors'),
    ('llava', 'model.safetensors'),
    ('llava', 'config.json'),
    ('llava', '*processor*'),
]

@pytest.mark.parametrize('kind, gone', GONE)
def test_a_file_that_is_missing_from_a_folder_is_not_looked_for_on_the_hub(models, no_network, kind, gone):
    name = relative(models, kind)
    found = list(os.scandir(name)) and [p for p in __import__('pathlib').Path(name).glob(gone)]
    assert found, gone
    for p in found: shutil.rmtree(p) if p.is_dir() else p.unlink()
    with pytest.raises((ValueError, OSError)) as e: READ[kind](name)
    assert not isinstance(e.value, Asked)

@pytest.mark.parametrize('kind', READ)
@pytest.mark.parametrize('name', ['models/gone', './gone', '../gone', '/gone/model', '~/gone', 'a/b/gone'])
def test_a_path_where_nothing_is_is_not_looked_for_on_the_hub(no_network, kind, name):
    os.mkdir('models')
    with pytest.raises((ValueError, OSError)): READ[kind](name)

@pytest.mark.parametrize(
    'kind, gone',
    [
        ('aligned', 'adapter/adapter_model.safetensors'),
        ('aligned', 'adapter/adapter_config.json'),
        ('aligned', 'adapter'),
        ('captioner', 'lm'),
        ('captioner', 'tokenizer'),
        ('captioner', 'lm/config.json'),
        ('tuned', 'text.safetensors'),
        ('llava', 'model.safetensors'),
    ],
)
def test_a_part_of_our_own_folders_is_not_looked_for_on_the_hub(saved, no_network, kind, gone):
    "`aligned/adapter` has the form of a repository's name, and so has `captioner/tokenizer`."
    shutil.copytree(saved/kind, kind)
    for card in ('card.json', 'checksums.json'):
        if os.path.exists(f'{kind}/{card}'): # as an earlier version wrote it
            said = json.loads(open(f'{kind}/{card}').read())
            open(f'{kind}/{card}', 'w').write(json.dumps(said | dict(files={}, checksum=None)))
    path = f'{kind}/{gone}'
    shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    with pytest.raises((ValueError, OSError)): LOADERS[kind](__import__('pathlib').Path(kind))

@pytest.mark.parametrize('name', ['aligned', 'models/aligned', './aligned', '/aligned/x'])
def test_an_aligned_or_tuned_folder_that_is_gone_is_not_looked_for_on_the_hub(no_network, name):
    os.mkdir('models')
    with pytest.raises((ValueError, OSError)): GenReal.from_pretrained(name, tiny())
    for kind in ('aligned', 'tuned'):
        with pytest.raises((ValueError, OSError)): eval_model(f'{kind}:{name}')

def test_a_generator_whose_folder_is_gone_is_not_looked_for_on_the_hub(no_network):
    os.mkdir('models')
    with pytest.raises(FileNotFoundError, match='not looked for on the Hub'): resolve_generator('models/mine')
    with pytest.raises((ValueError, OSError)): load_generator(Generator('mine', 'models/mine', 'main'))

def test_a_folder_that_refers_to_a_repository_does_not_make_us_ask(models, no_network):
    "A folder of a language model may name the base of an adapter."
    name = relative(models, 'gpt2')
    open(f'{name}/adapter_config.json', 'w').write(
        json.dumps(dict(peft_type='LORA', base_model_name_or_path='owner/name'))
    )
    with pytest.raises((ValueError, OSError)): load_lm(name)

def test_names_and_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not on_disk('openai/clip-vit-base-patch32') and not on_disk('gpt2') and not found_on_disk('gpt2')
    (tmp_path/'openai').mkdir()
    assert on_disk('openai/clip-vit-base-patch32') and on_disk('openai') and on_disk('.\\model')
    with pytest.raises(FileNotFoundError, match="no model at 'openai/clip-vit-base-patch32'"):
        found_on_disk('openai/clip-vit-base-patch32')


# Pickles

class Trap:
    "Makes a folder when it is unpickled."
    def __init__(self, at): self.at = at
    def __reduce__(self): return os.mkdir, (str(self.at),)

@pytest.fixture
def trap(tmp_path):
    "A value to hide in a file; the test fails if it is ever called."
    yield Trap(tmp_path/'trapped')
    assert not (tmp_path/'trapped').exists(), 'a pickle has run'

def refused(make, name):
    with pytest.raises((ValueError, OSError)) as e: make()
    said = str(e.value)
    assert name in said and '\n' not in said and len(said) < 400 and 'weights_only' not in said, said

@pytest.mark.parametrize('legacy', [False, True])
def test_a_pickle_is_refused_by_everything_that_reads_weights(trap, tmp_path, legacy):
    for name, inside in (('model.pt', trap), ('wrapped.pth', dict(state_dict=dict(a=torch.ones(1), b=trap)))):
        torch.save(inside, tmp_path/name, _use_new_zipfile_serialization=not legacy)
        refused(lambda: read_torch(tmp_path/name), name)
        refused(lambda: published_state(tmp_path/name), name)
        refused(lambda: load_encoder(f'timm:vit_tiny_patch16_224/{tmp_path/name}'), name)
        refused(lambda: load_encoder(f'open_clip:ViT-B-32/{tmp_path/name}'), name)
        refused(lambda: eval_model(f'longclip:{tmp_path/name}', out=tmp_path/'out'), name)

def test_a_plain_pickle_is_refused_too(trap, tmp_path):
    (tmp_path/'model.pt').write_bytes(pickle.dumps(trap))
    refused(lambda: read_torch(tmp_path/'model.pt'), 'model.pt')

def test_an_adapter_that_is_a_pickle_is_refused(saved, trap, tmp_path):
    folder = shutil.copytree(saved/'aligned'/'adapter', tmp_path/'alone'/'adapter')
    (folder/'adapter_model.safetensors').unlink()
    torch.save(trap, folder/'adapter_model.bin')
    refused(lambda: GenReal(tiny(), folder=folder), 'adapter_model.bin is a pickle')

@pytest.mark.parametrize(
    'kind, weights, pickled',
    [
        ('clip', 'model.safetensors', 'pytorch_model.bin'),
        ('gpt2', 'model.safetensors', 'pytorch_model.bin'),
        ('llava', 'model.safetensors', 'pytorch_model.bin'),
        ('open_clip', 'open_clip_model.safetensors', 'open_clip_pytorch_model.bin'),
        ('pipeline', 'unet/diffusion_pytorch_model.safetensors', 'unet/diffusion_pytorch_model.bin'),
        ('pipeline', 'text_encoder/model.safetensors', 'text_encoder/pytorch_model.bin'),
    ],
)
def test_a_model_whose_weights_are_a_pickle_is_refused(models, trap, tmp_path, kind, weights, pickled):
    folder = shutil.copytree(models/kind, tmp_path/kind)
    (folder/weights).unlink()
    torch.save(dict(weight=trap), folder/pickled)
    refused(lambda: READ[kind](str(folder)), kind)

def test_a_captioner_checkpoint_or_features_that_are_a_pickle_are_refused(saved, trap, tmp_path):
    captioner = shutil.copytree(saved/'captioner', tmp_path/'captioner')
    (captioner/'captioner.safetensors').write_bytes(pickle.dumps(trap))
    refused(lambda: load_captioner(captioner), 'captioner.safetensors')
    features = shutil.copytree(saved/'features', tmp_path/'features')
    np.save(features/'features.npy', np.array([trap] * 10, dtype=object), allow_pickle=True)
    refused(lambda: LOADERS['features'](features), 'features.npy')
    for name in ('optimizer.pt', 'rng-0.pt', 'weights.safetensors'):
        steps = shutil.copytree(saved/'checkpoints', tmp_path/f'checkpoints-{name}')
        torch.save(trap, steps/'step-000004'/name)
        refused(lambda: LOADERS['checkpoints'](steps), name)
        refused(lambda: read_torch(steps/'step-000004'/name), name)
    torch.save(dict(made_from='x', more=trap), tmp_path/'checkpoint.pt')
    refused(lambda: Checkpoint(tmp_path/'checkpoint.pt', 'x').read(), 'checkpoint.pt')

@pytest.mark.parametrize('inside', [[1, 2], dict(a=1), dict(made_from='x', weights=[], optimizer={}, checksum='0')])
def test_a_checkpoint_of_something_else_is_refused(tmp_path, inside):
    torch.save(inside, tmp_path/'checkpoint.pt')
    refused(lambda: Checkpoint(tmp_path/'checkpoint.pt', 'x').read(), 'checkpoint.pt')

# Code of a folder's own

@pytest.mark.parametrize(
    'kind, file',
    [
        ('clip', 'config.json'),
        ('gpt2', 'config.json'),
        ('gpt2', 'tokenizer_config.json'),
        ('clip', 'preprocessor_config.json'),
        ('llava', 'config.json'),
        ('pipeline', 'unet/config.json'),
    ],
)
def test_a_folder_that_brings_code_is_refused_with_a_reason(models, tmp_path, kind, file):
    folder = shutil.copytree(models/kind, tmp_path/kind)
    said = json.loads((folder/file).read_text())
    (folder/file).write_text(json.dumps(said | dict(auto_map=dict(AutoModel='mine.Mine', AutoConfig='mine.Config'))))
    for at in {folder, (folder/file).parent}: (at/'mine.py').write_text("raise SystemExit('code of a folder has run')")
    refused(lambda: READ[kind](str(folder)), 'asks for code of its own (auto_map)')

def test_a_captioner_that_brings_code_is_refused(saved, tmp_path):
    folder = shutil.copytree(saved/'captioner', tmp_path/'captioner')
    said = json.loads((folder/'lm'/'config.json').read_text())
    (folder/'lm'/'config.json').write_text(json.dumps(said | dict(auto_map=dict(AutoConfig='mine.Config'))))
    card = json.loads((folder/'card.json').read_text())
    (folder/'card.json').write_text(json.dumps(card | dict(files={}, checksum=None)))
    refused(lambda: load_captioner(folder), 'asks for code of its own')

@pytest.mark.parametrize('asked', [['mine', 'Mine'], ['os', 'system'], ['gmail_nb.files', 'asset']])
def test_a_pipeline_takes_its_parts_from_the_libraries_alone(models, tmp_path, asked):
    folder = shutil.copytree(models/'pipeline', tmp_path/'pipeline')
    index = json.loads((folder/'model_index.json').read_text())
    (folder/'model_index.json').write_text(json.dumps(index | dict(unet=asked)))
    refused(lambda: load_generator(folder), 'neither diffusers nor transformers')

def test_a_plain_folder_asks_for_no_code(models):
    for kind in READ: check_no_code(models/kind)
