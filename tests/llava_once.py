"A small LLaVA on random tokens, run by the tests as a process of its own: llava_once.py OUT [CHECKPOINTS]"
import gmail_nb.runtime
import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from gmail_nb.llava import Llava, new_projector
from gmail_nb.llava_training import example, train_llava
from gmail_nb.runtime import set_seed
from gmail_nb.settings import LlavaSettings, RunSettings, StageSettings
from safetensors.torch import save_file
from test_llava import language, tiny_tokenizer
from transformers import LlamaForCausalLM

torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
files = dict(real=torch.randn(12, 4, 20, generator=g).half(), generated=torch.randn(12, 4, 20, generator=g).half())
words = 'a cat', 'the dog in red', 'blue', 'one two yes'
examples = [
    example(
        '<image> what is this ?' if i % 5 else 'what is this ?',
        words[i % 4],
        *([(('real', 'generated')[i % 2], i % 12)] if i % 5 else []),
    )
    for i in range(37)
]
stage = StageSettings(steps=12, batch_size=8, lr=3e-3)

def one(run=RunSettings(desc=None), **how):
    "Losses and weights of one training."
    set_seed(0)
    lm = LlamaForCausalLM(language())
    model = Llava(lm, tiny_tokenizer(), new_projector(20, lm))
    settings = LlavaSettings(**(dict(project=stage, instruct=stage, rank=2, seed=3) | how))
    losses = train_llava(model, examples, files, settings, run)
    kept = {n: p.detach().contiguous() for n, p in model.named_parameters() if 'projector' in n or 'lora_' in n}
    return losses['project'] + losses['instruct'], kept

odd = StageSettings(steps=6, batch_size=1, lr=3e-3) # of a batch of one, a second process gets none
if __name__ == '__main__':
    out = Path(sys.argv[1])
    ways = dict(even=dict(), one=dict(project=odd, instruct=odd))
    if len(sys.argv) > 2: found = dict(kept=one(RunSettings(checkpoints=sys.argv[2], save_every=5, desc=None)))
    else: found = {name: one(**how) for name, how in ways.items()}
    if PartialState().is_main_process:
        for name, (losses, weights) in found.items():
            save_file(weights, out/f'{name}.safetensors')
            (out/f'{name}.json').write_text(json.dumps(losses))
