"Saved folders: every file that is missing, cut, changed or of another model is named, and what was saved before still loads."

import copy
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from test_llava import processor_of, tiny_llava
from torch import nn

from gmail_nb.align import GenReal
from gmail_nb.captioning import Captioner, caption_tokenizer, load_captioner, save_captioner, small_decoder
from gmail_nb.data import emoji
from gmail_nb.encoders import Encoder, Preprocess
from gmail_nb.features import embed, load_features
from gmail_nb.files import check_files, checked_card, file_checksums, write_card
from gmail_nb.llava import from_llava, load_llava, save_llava
from gmail_nb.settings import AdapterSettings, EmbedSettings
from gmail_nb.train import Checkpoints, read_state
from gmail_nb.tune import TunedText, load_tuned, save_tuned
from gmail_nb.weights import read_tensors, read_torch

def weight(item): return 3

class Tower(nn.Module):
    "Two linear maps of an image of 8 pixels a side: a tower that loads at once."
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(192, 16), nn.Linear(16, 8)
    def forward(self, pixels): return self.head(self.first(pixels.flatten(1)))

class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(9, 8), nn.Linear(8, 8)
    def forward(self, input_ids): return self.head(self.words(input_ids).mean(1))

def tiny():
    torch.manual_seed(0)
    return Encoder('tiny', Tower(), Text(), Preprocess(8), None, 8).eval()

def aligned(tuning='lora'):
    torch.manual_seed(1)
    model = GenReal(tiny(), AdapterSettings(tuning=tuning, targets=('first', 'head')))
    with torch.no_grad():
        for p in model.f_g.parameters():
            if p.requires_grad: p.add_(.1)
    return model

def trained_captioner():
    tokenizer = caption_tokenizer(['a cat on a mat'])
    torch.manual_seed(0)
    return Captioner(small_decoder(tokenizer, layers=1, width=16, heads=2, window=16), tokenizer, 8, prefix_length=2)

def checkpoint_in(folder):
    acc, tensors = Accelerator(cpu=True), dict(weights=dict(a=torch.ones(3)), noise=dict(state=torch.zeros(2)))
    state = dict(step=4, settings={}, model={}, data='x')
    return Checkpoints(folder, acc).save(state, tensors, dict(state={0: dict(step=torch.ones(2))}))

def read_checkpoint(folder):
    read_state(folder)
    read_tensors(folder/'weights.safetensors')
    return read_torch(folder/'optimizer.pt')

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "One folder of each kind."
    root = tmp_path_factory.mktemp('saved')
    aligned().save_pretrained(root/'aligned')
    aligned('full').save_pretrained(root/'full')
    encoder = tiny()
    text = copy.deepcopy(encoder.text)
    text.head.weight.data += .1
    save_tuned(TunedText(text, nn.Linear(8, 8, bias=False), [], 64, 1), encoder, root/'tuned')
    save_captioner(trained_captioner(), root/'captioner')
    checkpoint_in(root/'checkpoints')
    embed(emoji('B', source='noto').select(range(10)), encoder, root/'features',
          settings=EmbedSettings(part_rows=4, show_progress=False))
    model, processor = tiny_llava()
    save_llava(from_llava(model, processor)[0], root/'llava')
    return root

LOADERS = dict(
    aligned=lambda f: GenReal.from_pretrained(f, tiny()), full=lambda f: GenReal.from_pretrained(f, tiny()),
    tuned=lambda f: load_tuned(f, tiny()), captioner=load_captioner, llava=lambda f: load_llava(str(f)),
    checkpoints=lambda f: read_checkpoint(f/'step-000004'), features=lambda f: load_features(f, verify=True))

FILES = [
    ('aligned', 'adapter/adapter_model.safetensors'),
    ('aligned', 'adapter/adapter_config.json'),
    ('aligned', 'projections.safetensors'),
    ('full', 'tower.safetensors'),
    ('tuned', 'text.safetensors'),
    ('tuned', 'projection.safetensors'),
    ('captioner', 'captioner.safetensors'),
    ('captioner', 'lm/config.json'),
    ('captioner', 'tokenizer/tokenizer.json'),
    ('checkpoints', 'step-000004/weights.safetensors'),
    ('checkpoints', 'step-000004/optimizer.pt'),
    ('checkpoints', 'step-000004/rng-0.pt'),
    ('llava', 'model.safetensors'),
    ('llava', 'config.json'),
    ('features', 'features.npy'),
    ('features', 'keys.parquet'),
]


def missing(data): return None
def empty(data): return b''
def cut(data): return data[:len(data) // 2]
def longer(data): return data + bytes(8)
def zeroed(data): return data[:-40] + bytes(40)
def flipped(data): return data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1:]

def spoil(saved, tmp_path, kind, name, how):
    folder = shutil.copytree(saved/kind, tmp_path/kind)
    data = how((folder/name).read_bytes())
    (folder/name).unlink()
    if data is not None: (folder/name).write_bytes(data)
    return folder

@pytest.mark.parametrize('how', [missing, empty, cut, longer, zeroed, flipped])
@pytest.mark.parametrize('kind, name', FILES)
def test_a_file_that_is_not_as_it_was_saved_is_named(saved, tmp_path, kind, name, how):
    if name == 'keys.parquet' and how in (longer, zeroed, flipped): pytest.skip('parquet keeps its own checks')
    if kind == 'features' and how is longer: pytest.skip('bytes behind the array are never read')
    folder = spoil(saved, tmp_path, kind, name, how)
    with pytest.raises((ValueError, FileNotFoundError)) as e: LOADERS[kind](folder)
    said = str(e.value)
    assert name.rpartition('/')[2] in said and '\n' not in said and len(said) < 400, said

@pytest.mark.parametrize('kind', LOADERS)
def test_a_whole_folder_loads_in_silence(saved, kind):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        LOADERS[kind](saved/kind)

# Folders from before checksums: names, shapes and values of the tensors

def before(saved, tmp_path, kind):
    "The folder as an earlier version wrote it."
    folder = shutil.copytree(saved/kind, tmp_path/kind)
    for card in (*folder.glob('card.json'), *folder.glob('*/state.json')):
        said = json.loads(card.read_text())
        card.write_text(json.dumps({k: v for k, v in said.items() if k not in ('files', 'checksum')}))
    (folder/'checksums.json').unlink(missing_ok=True)
    return folder

@pytest.mark.parametrize('kind', LOADERS)
def test_a_folder_of_before_loads_in_silence(saved, tmp_path, kind):
    folder = before(saved, tmp_path, kind)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        LOADERS[kind](folder)

def half(t): return dict(sorted(t.items())[::2])
def renamed(t): return {f'other.{k}': v for k, v in t.items()}
def one_more(t): return t | dict(extra=torch.ones(2))
def reshaped(t): return {k: v[None] for k, v in t.items()}
def no_numbers(t): return {k: v * float('nan') for k, v in t.items()}
def infinite(t): return {k: v + float('inf') for k, v in t.items()}

TENSORS = [
    ('aligned', 'adapter/adapter_model.safetensors'),
    ('aligned', 'projections.safetensors'),
    ('full', 'tower.safetensors'),
    ('tuned', 'projection.safetensors'),
    ('captioner', 'captioner.safetensors'),
    ('llava', 'model.safetensors'),
]

@pytest.mark.parametrize('how', [half, renamed, one_more, reshaped, no_numbers, infinite])
@pytest.mark.parametrize('kind, name', TENSORS)
def test_tensors_that_do_not_belong_are_named(saved, tmp_path, kind, name, how):
    if kind == 'llava' and how is one_more: pytest.skip('transformers reports what it does not know')
    if kind == 'tuned' and how is half: pytest.skip('there is one')
    folder = before(saved, tmp_path, kind)
    changed = {k: v.contiguous() for k, v in how(load_file(folder/name)).items()}
    save_file(changed, folder/name, dict(format='pt'))
    with pytest.raises((ValueError, RuntimeError)) as e: LOADERS[kind](folder)
    said = str(e.value)
    assert {folder.name, name.rpartition('/')[2], 'adapter'} & set(said.replace('/', ' ').replace(':', ' ').split()), (
        said
    )


def test_a_spoiled_row_of_features_is_seen_where_it_is_looked_at(saved, tmp_path):
    folder = before(saved, tmp_path, 'features')
    array = np.load(folder/'features.npy', mmap_mode='r+')
    array[7] = np.nan
    with pytest.raises(ValueError, match='1 rows hold values that are no finite numbers, such as 7'):
        load_features(folder, verify=False)
    array[7] = 1
    array.flush()
    assert len(load_features(folder, verify=False)) == 10 # its values are numbers: the checksums know better
    for verify in (None, True):
        with pytest.raises(ValueError, match='rows 4 to 7 are not as they were written'):
            load_features(folder, verify=verify)

# Cards

@pytest.mark.parametrize('kind', ['aligned', 'tuned', 'captioner', 'features'])
@pytest.mark.parametrize(
    'text',
    [
        '',
        'no json',
        '[1, 2]',
        '"a"',
        'null',
        '{}',
        '{"base": 7}',
        '{"base": ["tiny"]}',
        '[' * 100_000,
        '{"base": "tiny", "files": 3}',
        '{"base": "tiny", "files": {"a": 3}}',
        '{"base": "tiny", "files": {"../secret": {}}}',
        '{"prefix_length": "four", "tuning": "full"}',
        '{"weights": 1, "model": "x", "content": "y", "failed": []}',
    ],
)
def test_a_card_of_another_kind_is_refused_in_one_line(saved, tmp_path, kind, text):
    folder = shutil.copytree(saved/kind, tmp_path/kind)
    (folder/'card.json').write_text(text)
    with pytest.raises((ValueError, FileNotFoundError)) as e: LOADERS[kind](folder)
    assert '\n' not in str(e.value) and len(str(e.value)) < 500

@pytest.mark.parametrize(
    'field, value', [('tuning', 3), ('tuning', ['lora']), ('base_fingerprint', 5), ('base', None), ('files', [])]
)
def test_a_field_of_another_type_is_refused(saved, tmp_path, field, value):
    folder = shutil.copytree(saved/'aligned', tmp_path/'aligned')
    card = json.loads((folder/'card.json').read_text()) | dict(checksum=None)
    (folder/'card.json').write_text(json.dumps(card | {field: value}))
    with pytest.raises(ValueError): GenReal.from_pretrained(folder, tiny())

@pytest.mark.parametrize('index', ['3', -1, 99, None, 2.5])
def test_a_damaged_image_that_is_none_is_refused(saved, tmp_path, index):
    folder = shutil.copytree(saved/'features', tmp_path/'features')
    card = json.loads((folder/'card.json').read_text()) | dict(checksum=None)
    (folder/'card.json').write_text(json.dumps(card | dict(failed=[dict(index=index, key='a', reason='b')])))
    with pytest.raises(ValueError, match='damaged images'): load_features(folder)

def test_an_adapter_for_another_base_is_refused_by_its_names(saved, tmp_path):
    alone = shutil.copytree(saved/'aligned'/'adapter', tmp_path/'alone'/'adapter')
    other = tiny()
    other.visual = nn.Sequential(nn.Flatten(), nn.Linear(192, 8))
    with pytest.raises(ValueError, match='another architecture'): GenReal(other, folder=alone)

def test_an_adapter_that_is_no_lora_is_refused(saved, tmp_path):
    alone = shutil.copytree(saved/'aligned'/'adapter', tmp_path/'alone'/'adapter')
    config = json.loads((alone/'adapter_config.json').read_text())
    for odd in (dict(peft_type='IA3'), dict(peft_type=None), dict(megatron_config=dict(a=1), megatron_core='os')):
        (alone/'adapter_config.json').write_text(json.dumps(config | odd))
        with pytest.raises(ValueError, match='plain LoRA is what is read'): GenReal(tiny(), folder=alone)

def test_checksums_know_files_by_name_and_leave_hidden_ones_out(tmp_path):
    (tmp_path/'parts').mkdir()
    for name in ('a.bin', '.b.bin', 'parts/c.bin', 'd.txt'): (tmp_path/name).write_bytes(name.encode())
    found = file_checksums(tmp_path, '*.bin', 'parts/*')
    assert list(found) == ['a.bin', 'parts/c.bin'] and found['a.bin']['size'] == 5
    check_files(tmp_path, found)
    write_card(tmp_path, dict(x=1), '*.bin')
    assert checked_card(tmp_path, x=int)['x'] == 1
    with pytest.raises(ValueError, match="'x' is 1"): checked_card(tmp_path, x=str)
