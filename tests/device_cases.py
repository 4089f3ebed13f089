"""What a model goes through on the simulated device, as a process of its own: device_cases.py OUT CASE ...

Writes to OUT, a JSON file, for each case None, or the error. Nothing here is told where its tensors lie but by the
model that it is given; what loads a model itself goes where `default_device` says, which is `sim`.
"""
import gmail_nb.runtime
import copy
import json
import logging
import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import open_clip
import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import save_file
from torch import nn

import simulator
from gmail_nb.align import GenReal
from gmail_nb.captioning import (Captioner, CaptionTraining, caption_tokenizer, checkpointed, generate_ids,
                                 small_decoder, train_captioner)
from gmail_nb.classification import Labelled, fine_tune, plain_tower
from gmail_nb.data import emoji
from gmail_nb.encoders import Encoder, OpenClipVisual, encode_images, encode_texts, load_encoder, preprocess_images
from gmail_nb.export import export, merged_tower
from gmail_nb.features import embed
from gmail_nb.gallery import score_quality
from gmail_nb.generate import generate, load_generated
from gmail_nb.ifcap import IFCap, entity_prompt, ifcap_ids, train_ifcap
from gmail_nb.llava import Llava, encode_prompt, generate_answers, new_projector, turns_of
from gmail_nb.llava_training import LlavaTraining, adapt_language, example, only_trained, train_llava
from gmail_nb.pipelines import clip_tokenizer, load_generator
from gmail_nb.prefix import FrozenPrefix, cache_prefix
from gmail_nb.runs.models import eval_model
from gmail_nb.runtime import set_seed
from gmail_nb.settings import (TEXT_TUNINGS, TUNINGS, AdapterSettings, AlignSettings, CaptionerSettings, DrawSettings,
                               EmbedSettings, FineTuneSettings, LlavaSettings, RunSettings, StageSettings, TuneSettings,
                               WorkSettings)
from gmail_nb.train import Alignment, align, processes
from gmail_nb.tune import TextRun, advance as advance_text, as_image_rows, save_tuned, tune_text, tuned_encoder
from test_llava import language, tiny_tokenizer

simulator.install()
SIM = torch.device('sim', 0)
torch.set_num_threads(1)
logging.disable(logging.WARNING)
transformers.utils.logging.disable_progress_bar()
CASES = {}

def case(f):
    CASES[f.__name__] = f
    return f

def same(a, b, atol=1e-5): torch.testing.assert_close(a.cpu(), b.cpu(), atol=atol, rtol=0)

def whole_on(module, device=SIM):
    wrong = [n for n, t in [*module.named_parameters(), *module.named_buffers()] if t.device != device]
    assert not wrong, f'{len(wrong)} weights stayed behind, such as {wrong[0]}'

# small models

def registered_vit(layers=4):
    config = dict(embed_dim=32, vision_cfg=dict(image_size=32, layers=layers, width=64, patch_size=8, head_width=32),
                  text_cfg=dict(context_length=77, vocab_size=49408, width=64, heads=2, layers=2))
    file = Path(tempfile.mkdtemp())/'sim-vit.json'
    file.write_text(json.dumps(config))
    open_clip.add_model_config(file)
    return 'open_clip:sim-vit/random'

def hf_folder(kind):
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    vision, size = small | dict(image_size=32, patch_size=8), dict(height=32, width=32)
    text = small | dict(vocab_size=49408)
    if kind == 'clip':
        ends = dict(eos_token_id=49407, bos_token_id=49406)
        config = transformers.CLIPConfig(text_config=text | ends, vision_config=vision, projection_dim=16)
        model = transformers.CLIPModel(config)
        processor = transformers.CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=size)
    else:
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
        processor = transformers.SiglipImageProcessor(size=size)
    folder = Path(tempfile.mkdtemp())/kind
    for part in (model, processor, clip_tokenizer()): part.save_pretrained(folder)
    return f'hf:{folder}'

KINDS = dict(embedded=lambda: 'embedded', open_clip=registered_vit, clip=lambda: hf_folder('clip'),
             siglip=lambda: hf_folder('siglip'), timm=lambda: 'timm:test_vit/random')

def small_encoder(layers=4):
    set_seed(0)
    tower = open_clip.model.CLIP(
        embed_dim=32, vision_cfg=dict(image_size=32, layers=layers, width=64, patch_size=8, head_width=32),
        text_cfg=dict(width=64, heads=2, layers=1)).visual
    return Encoder('small', OpenClipVisual(tower), nn.Identity(), None, None, 32)

def drawings(n=6): return emoji('A', source='noto').shard(len(emoji('A', source='noto')) // n, 0).select(range(n))
TEXTS = ['a red apple', 'two dogs', 'a house', 'a very small cat', 'nothing', 'the sun']

# encoders

def encoder_case(kind):
    name = KINDS[kind]()
    set_seed(0)
    here = load_encoder(name)
    there = copy.deepcopy(here).to(SIM)
    whole_on(there)
    assert there.device == SIM and there.fingerprint == here.fingerprint
    images = list(drawings()['image'])
    x = preprocess_images(here, images)
    same(encode_images(there.encode_image, x), encode_images(here.encode_image, x), 1e-4)
    with torch.inference_mode(): assert there.image_tokens(x).device == SIM
    if kind != 'timm': same(encode_texts(there, TEXTS), encode_texts(here, TEXTS), 1e-4)
    with torch.inference_mode(): same(there.to(torch.float64).encode_image(x).float(), here.encode_image(x), 1e-4)
    model = GenReal(load_encoder(name).to(SIM))
    whole_on(model)
    with torch.inference_mode(): assert torch.equal(model.encode_generated(x), model.encode_real(x))

for kind in KINDS: CASES[f'encoder_{kind}'] = lambda kind=kind: encoder_case(kind)

# GenReal

def tuning_case(tuning):
    encoder = load_encoder('embedded')
    x = preprocess_images(encoder, list(drawings()['image']))
    before = encode_images(encoder.encode_image, x)
    model = GenReal(encoder.to(SIM), AdapterSettings(tuning=tuning))
    whole_on(model)
    assert model.device == SIM
    for side in (model.encode_real, model.encode_generated): same(encode_images(side, x), before, 1e-4)
    assert model.encode_text(encoder.tokenize(TEXTS)).device == SIM and model.generated_tokens(x).device == SIM
    folder = model.save_pretrained(Path(tempfile.mkdtemp())/'model')
    again = GenReal.from_pretrained(folder, load_encoder('embedded').to(SIM))
    whole_on(again)
    same(encode_images(again.encode_generated, x), before, 1e-4)
    assert next(merged_tower(model).parameters()).device == SIM
    model.to('cpu')
    whole_on(model, torch.device('cpu'))

for tuning in TUNINGS: CASES[f'genreal_{tuning}'] = lambda tuning=tuning: tuning_case(tuning)

@case
def exported():
    for name in (registered_vit(), hf_folder('clip')):
        model = GenReal(load_encoder(name).to(SIM))
        export(model, Path(tempfile.mkdtemp())/'out')

@case
def aligned_and_tuned_by_name():
    root, base = Path(tempfile.mkdtemp()), load_encoder(registered_vit())
    x = torch.randn(4, 3, 32, 32)
    plain = encode_images(base.encode_image, x)
    tuned = tune_text(
        base,
        nn.functional.normalize(torch.randn(12, base.dim), dim=-1),
        [f'caption {i}' for i in range(12)],
        TuneSettings(tuning='full', steps=2, validation_share=0),
    )
    file = root/'weights.safetensors'
    state = {f'visual.{k}': v for k, v in base.visual.visual.state_dict().items()} | base.text.model.state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, file)
    name = f'open_clip:sim-vit/{file}'
    fixed = load_encoder(name)
    GenReal(load_encoder(name)).save_pretrained(root/'aligned')
    save_tuned(tuned, fixed, root/'tuned', aligned=root/'aligned')
    save_tuned(tuned, fixed, root/'bare')
    for spec in ('aligned:aligned', 'tuned:tuned', 'tuned-f_g:tuned', 'tuned:bare'):
        encoder = eval_model(spec, root).to(SIM)
        whole_on(encoder)
        assert encoder.device == SIM
        assert encode_texts(encoder, TEXTS).shape == (6, 32)
        if spec.startswith('aligned'): same(encode_images(encoder.encode_image, x), plain, 1e-4)
        assert encode_images(encoder.to(torch.float64).encode_image, x).shape == (4, 32)

# alignment

def alignment_data(n=16, samples=1):
    g = torch.Generator().manual_seed(0)
    return torch.randn(samples, n, 3, 32, 32, generator=g), torch.randn(n, 3, 32, 32, generator=g)

ALIGNMENTS = dict(
    batch={}, all=dict(negatives='all'), some=dict(negatives=4), tau=dict(learn_tau=True), parts=dict(accumulation=2),
    symmetric=dict(loss='symmetric'), sigmoid=dict(loss='sigmoid'), cosine=dict(loss='cosine'), ema=dict(ema=.9),
    patience=dict(patience=1, evaluate=lambda model: dict(value=0.)), prefix=dict(prefix=True, share=1/2),
    ids=dict(ids=torch.arange(16) // 2), full=dict(tuning='full'), projections=dict(tuning='projections'),
    streamed=dict(run=RunSettings(max_bank=1)))

def aligned(evaluate=None, prefix=False, share=1., ids=None, tuning='lora', run=RunSettings(), device=SIM, **how):
    "History and trained weights of a small alignment."
    generated, real = alignment_data(samples=2)
    model = GenReal(small_encoder().to(device), AdapterSettings(adapted_share=share, tuning=tuning))
    settings = AlignSettings(**(dict(epochs=2, batch_size=8) | how))
    history = align(model, generated, encode_images(model.real_features, real), settings, evaluate,
                    ids=ids, prefix=prefix, run=run, accelerator=accelerator(device))
    whole_on(model, torch.device(device))
    return [row['loss'] for row in history], model

def accelerator(device):
    AcceleratorState._reset_state(reset_partial_state=True)
    acc = processes()
    for state in (AcceleratorState, PartialState): state._shared_state['device'] = torch.device(device)
    assert acc.device == torch.device(device)
    return acc

def align_case(name):
    how = ALIGNMENTS[name]
    (there, _), (here, _) = aligned(**how), aligned(**how, device='cpu')
    assert len(there) == len(here) and all(abs(a - b) < 1e-3 for a, b in zip(there, here)), (there, here)

for name in ALIGNMENTS: CASES[f'align_{name}'] = lambda name=name: align_case(name)

@case
def align_resumes():
    folder = Path(tempfile.mkdtemp())
    whole, _ = aligned(run=RunSettings(checkpoints=folder/'a', save_every=2))
    for step in sorted((folder/'a').glob('step-*'))[1:]: shutil.rmtree(step)
    again, _ = aligned(run=RunSettings(checkpoints=folder/'a', save_every=2))
    assert whole == again, (whole, again)

def step_traffic(**how):
    "What the second step of an alignment moves, and how often it waits: (numbers moved, numbers of its images, waits, to the CPU)"
    generated, real = alignment_data()
    model = GenReal(small_encoder().to(SIM))
    settings = AlignSettings(**(dict(epochs=2, batch_size=8) | how))
    job = Alignment(model, generated, encode_images(model.real_features, real), settings, accelerator=accelerator(SIM))
    model.train()
    job.advance()
    with simulator.counted() as t: job.advance()
    sizes = [torch.Size(s).numel() for s in t.to_device]
    return sum(sizes), 8 * 3 * 32 * 32, t.waits, t.to_cpu, t.to_device

@case
def an_alignment_step_moves_what_it_reads():
    for how in ({}, dict(negatives='all'), dict(negatives=4)):
        moved, images, waits, back, shapes = step_traffic(**how)
        assert moved <= images + 6 * 16, f'{how}: {shapes}'  # and some numbers of rows
        assert [tuple(s) for s in back if s] in ([], [(2,)]), (
            f'{how}: {back} came back'
        )  # the loss and the norm, in one read


@case
def an_alignment_step_waits_once():
    for how in ({}, dict(negatives=4), dict(loss='symmetric'), dict(learn_tau=True)):
        moved, images, waits, back, shapes = step_traffic(**how)
        assert waits <= 1, f'{how}: {waits} waits in a step'

@case
def encoding_waits_once_for_eight_batches():
    encoder = small_encoder().to(SIM)
    pixels = torch.randn(18, 3, 32, 32)
    with simulator.counted() as t: features = encode_images(encoder.encode_image, pixels, batch_size=2)
    assert len(t.to_cpu) == 9 and t.waits == 2, (len(t.to_cpu), t.waits)
    talking = load_encoder('embedded').to(SIM)
    with simulator.counted() as t: words = encode_texts(talking, ['a dog', 'a cat', 'a cow'], batch_size=1)
    assert len(t.to_cpu) == 3 and t.waits == 1 + 3, (len(t.to_cpu), t.waits) # transformers looks at each mask
    assert len(features) == 18 and len(words) == 3

@case
def a_cached_prefix():
    model = GenReal(small_encoder().to(SIM), AdapterSettings(adapted_share=1/2))
    prefix, pixels = FrozenPrefix(model), torch.randn(5, 3, 32, 32)
    whole = encode_images(model.encode_generated, pixels)
    kept = cache_prefix(prefix, pixels, Path(tempfile.mkdtemp())/'prefix.safetensors', batch_size=2)
    with torch.inference_mode(), prefix.replay(kept.to(SIM)):
        same(model.encode_generated(torch.zeros_like(pixels)), whole)

# text

def text_case(tuning):
    encoder = load_encoder('embedded' if tuning == 'head' else registered_vit()).to(SIM)
    x = nn.functional.normalize(torch.randn(24, encoder.dim), dim=-1)
    settings = TuneSettings(tuning=tuning, steps=3, batch_size=8, validation_share=.25, every=2)
    tuned = tune_text(encoder, x, [f'caption number {i}' for i in range(24)], settings)
    whole_on(tuned.text)
    whole_on(tuned.projection)
    both = tuned_encoder(GenReal(encoder, AdapterSettings(tuning='projections')), tuned)
    whole_on(both)
    assert encode_texts(both, TEXTS).shape == (6, encoder.dim)

for tuning in TEXT_TUNINGS: CASES[f'tune_text_{tuning}'] = lambda tuning=tuning: text_case(tuning)

# features, images, scores

@case
def embedding():
    ds, model = drawings(), GenReal(load_encoder('embedded').to(SIM))
    for side in ('real', 'generated', 'base'):
        found = embed(ds, model, Path(tempfile.mkdtemp())/side, side, EmbedSettings(show_progress=False))
        assert found.features.shape == (6, 256) and not found.failed
    by_name = embed(ds, 'embedded', Path(tempfile.mkdtemp())/'named', settings=EmbedSettings(show_progress=False))
    same(by_name.features, found.features, 1e-4)

@case
def generating_and_scoring():
    out = Path(tempfile.mkdtemp())/'generated'
    pipeline = load_generator('embedded', device=SIM)
    whole_on(pipeline.unet)
    work = WorkSettings(show_progress=False, shard_size=8, device='sim', dtype='float32')
    generate(drawings(4), 'embedded', out, DrawSettings(steps=2), work=work)
    assert len(load_generated(out)) == 4
    for encoder in ('embedded', load_encoder('embedded')): # by its name, and as `gmail_generate --quality` hands it on
        with simulator.counted() as t: score_quality(out, encoder, show_progress=False)
        assert t.to_device, 'the scores were measured on the CPU'

# captions

@case
def captioning():
    captions = [[c] for c in TEXTS]
    tokenizer = caption_tokenizer([c for cs in captions for c in cs])
    for tuning in ('full', 'lora', 'frozen'):
        captioner = Captioner(small_decoder(tokenizer), tokenizer, 32, tuning=tuning).to(SIM)
        whole_on(captioner)
        train_captioner(captioner, torch.randn(6, 32), captions, steps=2, batch_size=4, desc=None)
        for how in ({}, dict(beams=2), dict(top_p=.9)):
            assert len(generate_ids(captioner, torch.randn(3, 32), max_new_tokens=4, **how)) == 3

@case
def captioning_from_text():
    tokenizer = caption_tokenizer([*TEXTS, entity_prompt(['x', 'y']), entity_prompt([])])
    model = IFCap(small_decoder(tokenizer, 2), tokenizer, 32, torch.randn(6, 32), TEXTS, k=2, k_entities=3).to(SIM)
    whole_on(model)
    train_ifcap(model, torch.randn(6, 32), list(range(6)), 2, 4, noise=.1, desc=None)
    assert len(ifcap_ids(model, torch.randn(3, 32), max_new_tokens=4)) == 3

# steps of the other trainings: the program waits for a loss, and for nothing else

def waits_of(step):
    "How often the second of two steps waits, and what it copied."
    step()
    with simulator.counted() as t: step()
    return t.waits, t.to_device, t.to_cpu

@case
def a_text_step_waits_once():
    for tuning in ('head', 'lora'):
        encoder = load_encoder('embedded' if tuning == 'head' else registered_vit()).to(SIM)
        x, index = nn.functional.normalize(torch.randn(2, 24, encoder.dim), dim=-1), torch.arange(8)
        settings = TuneSettings(tuning=tuning, validation_share=0, real_projection=True)
        job = TextRun(encoder, [f'caption number {i}' for i in range(24)], settings, accelerator=accelerator(SIM))
        found = waits_of(lambda: advance_text(job, as_image_rows(x), index, as_image_rows(x[1])))
        assert found[0] <= 1, f'{tuning}: {found}'

@case
def a_captioning_step_waits_once():
    tokenizer = caption_tokenizer(TEXTS)
    for how in (dict(alike=True), {}, dict(accumulation=2), dict(accumulation=2, checkpointing=True)):
        captioner = Captioner(small_decoder(tokenizer), tokenizer, 32, tuning='lora').to(SIM)
        said = [['red']] * 6 if how.pop('alike', False) else [[c] for c in TEXTS]
        settings = CaptionerSettings(steps=9, batch_size=4, noise=.1, **how)
        job = CaptionTraining(captioner, torch.randn(6, 32), said, settings, accelerator=accelerator(SIM))
        with checkpointed(captioner.lm, settings.checkpointing): found = waits_of(job.advance)
        assert found[0] <= 1, f'{how}: {found}'

# LLaVA

def small_llava():
    set_seed(0)
    lm = transformers.LlamaForCausalLM(language())
    return Llava(lm, tiny_tokenizer(), new_projector(20, lm)).to(SIM).eval()

SAID = 'a cat', 'blue', 'the dog in red', 'one two'
LLAVA_EXAMPLES = [example('<image> what is this ?', SAID[i % 4], ('real', i)) for i in range(8)]

@case
def a_llava_step_waits_once():
    model, files = small_llava(), dict(real=torch.randn(8, 4, 20))
    settings, stage = LlavaSettings(rank=2), StageSettings(steps=9, batch_size=4)
    adapt_language(model, settings)
    with only_trained(model, True):
        job = LlavaTraining(model.train(), LLAVA_EXAMPLES, files, stage, settings, accelerator(SIM))
        found = waits_of(job.advance)
    assert found[0] <= 1, found

@case
def a_llava_learns_and_answers():
    model, stage = small_llava(), StageSettings(steps=2, batch_size=4)
    train_llava(model, LLAVA_EXAMPLES, dict(real=torch.randn(8, 4, 20)),
                LlavaSettings(project=stage, instruct=stage, rank=2), accelerator=accelerator(SIM))
    whole_on(model)
    prompts = [encode_prompt(model, turns_of('<image> what is this ?'), 1, 4)] * 2
    assert len(generate_answers(model, prompts, torch.randn(2, 4, 20), 3)) == 2

# whole commands, as they are called from the shell

@case
def commands_from_images_to_scores():
    from gmail_nb.cli.commands import COMMANDS
    from gmail_nb.runs import align, embed, evaluate, generate, tune_caption, tune_text # before `on_sim` looks
    here = Path.cwd()
    os.chdir(tempfile.mkdtemp())
    on_sim()
    try:
        drawings(48).to_parquet('real.parquet')
        emoji('B', source='noto').select(range(12)).to_parquet('B.parquet')
        for line in ('generate real.parquet --out drawn --steps 1 --quiet', 'embed real.parquet --out features',
                     'align real.parquet --generated drawn --epochs 1 --batch-size 16 --out aligned',
                     'tune text --generated drawn --model aligned --steps 2 --out tuned',
                     'tune caption --generated drawn --model aligned --test B.parquet --steps 2 --out captions',
                     'caption real.parquet --model captions',
                     'eval B.parquet --model tuned:tuned --out eval --no-pictures'):
            with simulator.counted() as t: status = COMMANDS(line.split())
            assert not status, f'gmail_{line} ended with {status}'
            assert t.to_device, f'gmail_{line} copied nothing to the device'
    finally: os.chdir(here)

# evaluation

@case
def fine_tuning():
    encoder = load_encoder('timm:test_vit/random').to(SIM)
    x, y = torch.rand(6, 3, 160, 160), torch.tensor([0, 1] * 3)
    for tower in (load_encoder('timm:test_vit/random').to(SIM).visual, plain_tower(GenReal(encoder).f_g)):
        found, losses = fine_tune(
            tower, Labelled(x, y), Labelled(x, y), ['a', 'b'], FineTuneSettings(epochs=1, batch_size=3)
        )
        assert len(losses) == 2 and len(found.best) == 6

def on_sim():
    "Let every room that asks for the fastest device, or for accelerate's, be given the simulated one."
    for name, module in list(sys.modules.items()):
        if not name.startswith('gmail_nb'): continue
        if hasattr(module, 'default_device'): module.default_device = lambda: SIM
        if hasattr(module, 'processes'): module.processes = lambda *args, **how: accelerator(SIM) # as with a GPU

if __name__ == '__main__' and sys.argv[1] == '--list': print(*CASES)
elif __name__ == '__main__':
    on_sim()
    out, names = Path(sys.argv[1]), sys.argv[2:] or list(CASES)
    found = {}
    for name in names:
        try:
            CASES[name]()
            found[name] = None
        except Exception: found[name] = traceback.format_exc()
    out.write_text(json.dumps(found))
