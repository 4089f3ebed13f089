"Small captioners on random features, run by the tests as a process of its own: caption_once.py OUT [CHECKPOINTS | dies]"

import gmail_nb.runtime
import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file

from gmail_nb.captioning import CaptionTraining, Captioner, caption_tokenizer, small_decoder, train_captioner
from gmail_nb.runtime import leave_processes, set_seed
from gmail_nb.settings import CaptionerSettings, RunSettings

torch.set_num_threads(1)
words = 'red blue green old young small large round dog cat horse car boat house tree face'.split()
captions = [
    [f'{a} {b}', f'a {b} that is {a}'][: 1 + (i % 2)]
    for i, (a, b) in enumerate((a, b) for a in words[:8] for b in words[8:])
]
tokenizer = caption_tokenizer(c for cs in captions for c in cs)
features = torch.randn(2, len(captions), 32, generator=torch.Generator().manual_seed(0))

def one(run=RunSettings(), dropout=0., **how):
    "Losses and weights of one training."
    set_seed(0)
    captioner = Captioner(small_decoder(tokenizer, layers=2, width=32, dropout=dropout), tokenizer, 32)
    losses = train_captioner(
        captioner,
        features,
        captions,
        settings=CaptionerSettings(**(dict(steps=20, batch_size=16) | how)),
        seed=3,
        desc=None,
        run=run,
    )
    return losses, {n: p.detach().contiguous() for n, p in captioner.named_parameters()}

# of a batch of one caption, a second process gets none
ways = dict(even=dict(), odd=dict(batch_size=15), one=dict(batch_size=1, steps=6), plain=dict(noise=0.),
            parts=dict(batch_size=15, accumulation=3))

if sys.argv[2:] == ['dies']:
    step = CaptionTraining.advance
    def broken(self):
        if self.step == 3 and self.acc.process_index == 1: raise ValueError('the second process has had enough')
        return step(self)
    CaptionTraining.advance = broken

out = Path(sys.argv[1])
if len(sys.argv) > 2 and sys.argv[2] != 'dies':
    place, steps, dropout = sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    found = dict(kept=one(RunSettings(checkpoints=place, save_every=4), dropout, steps=steps))
else: found = {name: one(**how) for name, how in ways.items()}
if PartialState().is_main_process:
    for name, (losses, weights) in found.items():
        save_file(weights, out/f'{name}.safetensors')
        (out/f'{name}.json').write_text(json.dumps(losses))
leave_processes()
