"Small alignments on random pictures, run by the tests as a process of its own: align_once.py OUT [CHECKPOINTS | fails]"
import gmail_nb.runtime
import json
import sys
from pathlib import Path

import torch
import torch.distributed

# An alignment over processes exchanges gradients, sums and small objects, never features: whoever gathers fails.
def refuse(*args, **kwargs): raise AssertionError('a process gathered tensors of the others')
for name in ('all_gather', 'all_gather_into_tensor', 'all_gather_object', 'gather', 'gather_object'):
    setattr(torch.distributed, name, refuse)

import open_clip
from accelerate import PartialState
from safetensors.torch import save_file
from torch import nn

from gmail_nb.align import GenReal
from gmail_nb.encoders import Encoder, OpenClipVisual, encode_images
from gmail_nb.runtime import leave_processes, set_seed
from gmail_nb.settings import AdapterSettings, AlignSettings, RunSettings
from gmail_nb.train import align, alignment_parameters

torch.set_num_threads(1)

def small_tower():
    "An image tower of four blocks for pictures of 32 pixels."
    return open_clip.model.CLIP(
        embed_dim=32, vision_cfg=dict(image_size=32, layers=4, width=64, patch_size=8, head_width=32),
        text_cfg=dict(width=64, heads=2, layers=1)).visual

def one(evaluate=None, run=RunSettings(), generated=None, **how):
    "History and weights of one alignment."
    set_seed(0)
    tower = small_tower()
    if 'tokens' in how: tower = OpenClipVisual(tower) # which says what its tokens are
    encoder = Encoder('small', tower, nn.Identity(), None, None, 32, 1.)
    model = GenReal(encoder, AdapterSettings(dropout=.1 if run.checkpoints else 0.))
    drawn, real = torch.randn(2, 64, 3, 32, 32), torch.randn(64, 3, 32, 32)
    generated = drawn if generated is None else generated
    settings = AlignSettings(**(dict(epochs=10, batch_size=16, negatives=16) | how))
    tokens = {}
    if settings.tokens != 'none':
        with torch.no_grad(): tokens['real_tokens'] = model.encoder.image_tokens(real).half()
    history = align(model, generated, encode_images(model.real_features, real), settings, evaluate, run=run, **tokens)
    return history, {f'p{i}': p.detach().contiguous() for i, p in enumerate(alignment_parameters(model))}

looks = []
def look(model): # by the first process only: the others must stop when it does
    looks.append(1)
    return dict(made_up=-float(len(looks)))

ways = dict(
    even=dict(), odd=dict(batch_size=15, epochs=3), two=dict(batch_size=2, epochs=1),
    tau=dict(batch_size=15, epochs=3, learn_tau=True), parts=dict(batch_size=15, epochs=2, accumulation=3),
    cosine=dict(loss='cosine', negatives='batch', batch_size=15, epochs=2),
    all=dict(negatives='all', epochs=2),
    sigmoid=dict(loss='sigmoid', batch_size=15, epochs=2, accumulation=2),
    symmetric=dict(loss='symmetric', negatives='batch', batch_size=15, epochs=2, learn_tau=True),
    symmetric_parts=dict(loss='symmetric', negatives='batch', batch_size=15, epochs=2, accumulation=2),
    symmetric_two=dict(loss='symmetric', negatives='batch', batch_size=2, epochs=1),
    tokens=dict(tokens='position', batch_size=15, epochs=2, accumulation=2),
    tokens_symmetric=dict(tokens='best', loss='symmetric', negatives='batch', batch_size=15, epochs=2, accumulation=2),
    pull=dict(pull_weight=2., batch_size=15, epochs=2, accumulation=2),
    stops=dict(evaluate=look, patience=2, epochs=9))

class Failing:
    "Images of which the second process cannot decode one."
    shape, ndim, fingerprint = torch.Size((64, 3, 32, 32)), 4, 'failing'
    def __len__(self): return 64
    def __getitem__(self, index):
        if PartialState().process_index == 1 and 7 in index: raise ValueError("image 'k7' does not decode")
        return torch.zeros(len(index), 3, 32, 32)

out = Path(sys.argv[1])
if sys.argv[2:] == ['fails']: found = {'fails': one(generated=Failing())}
elif len(sys.argv) > 2: found = {'kept': one(run=RunSettings(checkpoints=sys.argv[2], save_every=1), epochs=12)}
else: found = {name: one(**how) for name, how in ways.items()}
if PartialState().is_main_process:
    for name, (history, weights) in found.items():
        save_file(weights, out/f'{name}.safetensors')
        (out/f'{name}.json').write_text(json.dumps(history))
leave_processes()
