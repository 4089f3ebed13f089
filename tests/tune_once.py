"Small trainings of a text side, run by the tests as a process of its own: tune_once.py OUT [CHECKPOINT | fails]"
import gmail_nb.runtime
import json
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from gmail_nb.encoders import Encoder, HFText
from gmail_nb.runtime import leave_processes
from gmail_nb.settings import TuneSettings
from gmail_nb.tune import tune_text

torch.set_num_threads(1)
torch.manual_seed(0)
config = CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
                        bos_token_id=62, eos_token_id=63, max_position_embeddings=16)

class Letters:
    "Every letter is a word; the highest id ends the text."
    def __call__(self, texts):
        rows = [[ord(c) % 60 for c in t[:14]] for t in texts]
        return {'input_ids': torch.tensor([r + [63] * (16 - len(r)) for r in rows])}

tower = HFText(CLIPTextModel(config), nn.Linear(32, 24, bias=False)).eval()
encoder = Encoder('tiny', nn.Identity(), tower, None, Letters(), 24, 20.)
x, captions = F.normalize(torch.randn(2, 64, 24), dim=-1), [f'{i:02} of {33 * i}' for i in range(64)]

class Failing:
    "Captions of which the second process cannot read one."
    def __len__(self): return len(captions)
    def __getitem__(self, i):
        if os.environ.get('RANK') == '1' and i == 7: raise ValueError("caption 'k7' is no text")
        return captions[i]

def one(images=x[0], captions=captions, checkpoint=None, **how):
    how = TuneSettings(**(dict(steps=20, every=5, batch_size=15, lr=5e-3, validation_share=.2) | how))
    tuned = tune_text(encoder, images, captions, how, checkpoint=checkpoint, real_features=x[1])
    found = {k: v.contiguous() for k, v in tuned.text.state_dict().items()}
    maps = dict(P=tuned.projection, P_r=tuned.real_projection)
    return tuned.history, found | {k: m.weight.clone() for k, m in maps.items() if m is not None}

ways = dict(
    head=dict(), lora=dict(tuning='lora'), last=dict(tuning='last', max_norm=.5), full=dict(tuning='full', patience=1),
    mix=dict(images=x, noise=.3), real=dict(real_projection=True), mix_real=dict(images=x, real_projection=True),
    two=dict(batch_size=2, steps=10))

out, more = Path(sys.argv[1]), sys.argv[2:]
if more == ['fails']: found = {'fails': one(captions=Failing(), tuning='lora')}
elif more: found = {'kept': one(checkpoint=more[0], tuning='lora')}
else: found = {name: one(**how) for name, how in ways.items()}
if PartialState().is_main_process:
    for name, (history, weights) in found.items():
        save_file(weights, out/f'{name}.safetensors')
        (out/f'{name}.json').write_text(json.dumps(history))
leave_processes()
