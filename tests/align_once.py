"A small alignment on random pictures, run by the tests as a process of its own: align_once.py OUT [CHECKPOINTS]"
import gmail_nb.runtime
import json, os, sys
from pathlib import Path

import open_clip, torch
from safetensors.torch import save_file
from torch import nn

from gmail_nb.align import GenReal
from gmail_nb.encoders import Encoder, in_batches
from gmail_nb.runtime import set_seed
from gmail_nb.train import align, alignment_parameters

torch.set_num_threads(1)
set_seed(0)
tower = open_clip.model.CLIP(embed_dim=32, vision_cfg=dict(image_size=32, layers=4, width=64, patch_size=8, head_width=32), text_cfg=dict(width=64, heads=2, layers=1)).visual
model = GenReal(Encoder('small', tower, nn.Identity(), None, None, 32, 1.), dropout=.1 if len(sys.argv) > 2 else 0.)
generated, real = torch.randn(2, 64, 3, 32, 32), torch.randn(64, 3, 32, 32)
history = align(model, generated, in_batches(model.real_features, real), epochs=10, batch_size=16, negatives=16, checkpoints=sys.argv[2] if len(sys.argv) > 2 else None, save_every=3)
if int(os.environ.get('RANK', 0)) == 0:
    out = Path(sys.argv[1])
    save_file({f'p{i}': p.detach().contiguous() for i, p in enumerate(alignment_parameters(model))}, out/'weights.safetensors')
    (out/'history.json').write_text(json.dumps(history))
