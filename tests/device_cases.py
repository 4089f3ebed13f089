"""What a model goes through on the simulated device, as a process of its own: device_cases.py OUT CASE ...

Writes to OUT, a JSON file, for each case its error, or None, and the functions of the package that it called. COVERED
says which function that takes a model is called by which case, and REASONS why others are by none. Nothing here is
told where its tensors lie but by the model that it is given; what loads a model itself goes where `default_device`
says, which is `sim`.
"""
import gmail_nb.runtime
import ast
import copy
import functools
import inspect
import json
import logging
import os
import shutil
import sys
import tempfile
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import open_clip
import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import save_file
from torch import nn

import simulator
from gmail_nb.align import GenReal
from gmail_nb.captioning import (Captioner, CaptionLearner, CaptionTraining, caption_tokenizer, checkpointed,
                                 generate_ids, small_decoder, train_captioner)
from gmail_nb.classification import (FineTuning, Labelled, classify, fine_tune, linear_probe, one_step, plain_tower,
                                     zero_shot_weights)
from gmail_nb.data import emoji
from gmail_nb.encoders import Encoder, OpenClipVisual, encode_images, encode_texts, load_encoder, preprocess_images
from gmail_nb.export import export, merged_tower
from gmail_nb.features import embed
from gmail_nb.gallery import score_quality
from gmail_nb.gap import (gap_report, paired_cosines, show_cosines, show_gap, show_token_gap, token_cosines,
                          token_gap_report)
from gmail_nb.generate import generate, load_generated
from gmail_nb.ifcap import (IFCap, IFCapBatches, IFCapTraining, entity_prompt, ifcap_ids, ifcap_loss, save_ifcap,
                            train_ifcap, write_ifcap)
from gmail_nb.llava import (Llava, encode_prompt, from_llava, generate_answers, new_projector, save_llava,
                            turns_of)
from gmail_nb.llava_training import LlavaTraining, adapt_language, example, only_trained, train_llava
from gmail_nb.long_captions import recall_by_length, stretch_encoder
from gmail_nb.pipelines import clip_tokenizer, load_generator
from gmail_nb.prefix import FrozenPrefix, cache_prefix
from gmail_nb.runs.app import both_features, drawing, drawn_pairs, gallery_of
from gmail_nb.runs.evaluate import evaluate
from gmail_nb.runs.models import eval_model
from gmail_nb.runtime import set_seed
from gmail_nb.settings import (TEXT_TUNINGS, TUNINGS, AdapterSettings, AlignSettings, CaptionerSettings, DrawSettings,
                               EmbedSettings, EvalSettings, FineTuneSettings, LlavaSettings, ProbeSettings,
                               RunSettings, StageSettings, TuneSettings, WorkSettings)
from gmail_nb.train import Alignment, align, processes
from gmail_nb.tune import TextRun, advance as advance_text, as_image_rows, save_tuned, tune_text, tuned_encoder
from test_llava import language, tiny_llava, tiny_tokenizer

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
    streamed=dict(run=RunSettings(max_bank=1)), tokens=dict(tokens='position', accumulation=2),
    tokens_best=dict(tokens='best', loss='symmetric'), pull=dict(pull_weight=2., accumulation=2))

def aligned(evaluate=None, prefix=False, share=1., ids=None, tuning='lora', run=RunSettings(), device=SIM, **how):
    "History and trained weights of a small alignment."
    generated, real = alignment_data(samples=2)
    model = GenReal(small_encoder().to(device), AdapterSettings(adapted_share=share, tuning=tuning))
    settings = AlignSettings(**(dict(epochs=2, batch_size=8) | how))
    tokens = tokens_of(model, real, settings)
    history = align(model, generated, encode_images(model.real_features, real), settings, evaluate, ids=ids,
                    prefix=prefix, run=run, accelerator=accelerator(device), real_tokens=tokens)
    whole_on(model, torch.device(device))
    return [row['loss'] for row in history], model

def tokens_of(model, real, settings): # on the CPU, as from their file
    if settings.tokens == 'none': return None
    with torch.inference_mode(): return model.encoder.image_tokens(real).cpu().half()

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
    "Of the second step: numbers moved, numbers of its images, waits, shapes to the CPU, shapes to the device"
    generated, real = alignment_data()
    model = GenReal(small_encoder().to(SIM))
    settings = AlignSettings(**(dict(epochs=2, batch_size=8) | how))
    job = Alignment(model, generated, encode_images(model.real_features, real), settings,
                    accelerator=accelerator(SIM), real_tokens=tokens_of(model, real, settings))
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
    moved, images, _, _, shapes = step_traffic(tokens='position')
    assert moved <= images + 8 * 16 * 64 + 6 * 16, shapes # and the tokens of their real partners

@case
def an_alignment_step_waits_once():
    for how in ({}, dict(negatives=4), dict(loss='symmetric'), dict(learn_tau=True), dict(tokens='position'),
                dict(tokens='best', accumulation=2), dict(pull_weight=2.)):
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
    for encoder in ('embedded', load_encoder('embedded').to(SIM)): # as `--quality` has it
        with simulator.counted() as t: score_quality(out, encoder, show_progress=False)
        assert t.to_device, 'the scores were measured on the CPU'
    with simulator.counted() as t: score_quality(out, load_encoder('embedded'), show_progress=False) # --device cpu
    assert not t.to_device, 'an encoder that was put on the CPU was moved'

@case
def gaps_are_measured_and_drawn():
    from gmail_nb.bench import determinism
    from gmail_nb.runs.align import alignment_measures
    g, r = (torch.nn.functional.normalize(torch.randn(12, 8), dim=-1).to(SIM) for _ in range(2))
    assert gap_report(g, r) and show_cosines(paired_cosines(g, r), paired_cosines(r, r)) and show_gap((g, r), (r, r))
    tokens = torch.randn(12, 4, 8).to(SIM)
    assert token_gap_report(tokens, tokens + 1) and show_token_gap(dict(before=token_cosines(tokens, tokens + 1)))
    assert [len(m.ours) for m in alignment_measures(g, r, r)] == [12, 12]
    moved = load_encoder('embedded').to(SIM)
    determinism.load_encoder = lambda name: moved
    assert len(determinism.text_side(Path(tempfile.mkdtemp())))

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
    assert len(write_ifcap(model, torch.randn(3, 32), max_new_tokens=4)) == 3
    save_ifcap(model, Path(tempfile.mkdtemp())/'ifcap')

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

@case
def a_fine_tuning_step_waits_once():
    x, y, index = torch.rand(6, 3, 32, 32), torch.tensor([0, 1] * 3), torch.arange(4)
    for precision in ('no', 'bf16'):
        settings = FineTuneSettings(epochs=9, batch_size=4, clip=1., precision=precision)
        run = FineTuning(small_encoder().to(SIM).visual, Labelled(x, y), 2, settings)
        found = waits_of(lambda: one_step(run, index))
        assert found[0] <= 1 and found[1] == [(4, 3, 32, 32), (4,)], found

@case
def an_ifcap_step_waits_once():
    tokenizer = caption_tokenizer([*TEXTS, entity_prompt(['x', 'y']), entity_prompt([])])
    for noise in (0., .1):
        model = IFCap(small_decoder(tokenizer, 2), tokenizer, 32, torch.randn(6, 32), TEXTS, k=2, k_entities=3).to(SIM)
        read = IFCapBatches(model.train(), torch.randn(6, 32), list(range(6)), IFCapTraining(noise=noise))
        learner = CaptionLearner(model, 9, 1e-3)
        found = waits_of(lambda: learner.step(ifcap_loss(model, *read(torch.arange(4)))))
        assert found[0] <= 1, f'{noise}: {found}'

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

@case
def zero_shot_and_probe():
    here = load_encoder(registered_vit())
    there, names = copy.deepcopy(here).to(SIM), ['cat', 'dog', 'house']
    x, y = nn.functional.normalize(torch.randn(12, here.dim), dim=-1), torch.arange(12) % 3
    words = zero_shot_weights(there, names, ('a photo of a {c}.', '{c}'))
    same(words, zero_shot_weights(here, names, ('a photo of a {c}.', '{c}')), 1e-4)
    with simulator.counted() as t: found = classify(x, words.to(SIM), y, names)
    assert sum(torch.Size(s).numel() for s in t.to_device) <= words.numel() + x.numel(), t.to_device
    assert torch.equal(found.best, classify(x, words.cpu(), y, names).best)
    settings = ProbeSettings(strengths=(.1, 1.), max_steps=5)
    probes = [linear_probe(Labelled(x, y), Labelled(x, y), names, settings, device) for device in (SIM, 'cpu')]
    assert torch.equal(*(p.best for p in probes))

@case
def long_captions():
    encoder = load_encoder(hf_folder('clip')).to(SIM)
    stretched = stretch_encoder(encoder, 248)
    whole_on(stretched)
    plain = stretch_encoder(copy.deepcopy(encoder).to('cpu'), 248)
    long = [' '.join(TEXTS * n) for n in (1, 6, 12)]
    same(encode_texts(stretched, long), encode_texts(plain, long), 1e-4)
    for text in (load_encoder(registered_vit()).to(SIM), stretched):
        assert encode_texts(stretch_encoder(text, 300) if text is not stretched else text, long).shape == (3, text.dim)
    found = recall_by_length(stretched, nn.functional.normalize(torch.randn(3, encoder.dim), dim=-1), long, (12, 100))
    assert set(found) == {12, 100}

@case
def a_set_of_classes_is_evaluated():
    root, ds = Path(tempfile.mkdtemp()), drawings(8)
    for i, image in enumerate(ds['image']):
        folder = root/'set'/('train' if i < 4 else 'test')/'ab'[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image.convert('RGB').save(folder/f'{i}.png')
    quiet = EvalSettings(EmbedSettings(show_progress=False, batch_size=4),
                         ProbeSettings(strengths=(1.,), max_steps=3), FineTuneSettings(epochs=1, batch_size=4))
    bare = load_encoder('timm:test_vit/random').visual.model.state_dict()
    save_file({k: v.contiguous() for k, v in bare.items()}, root/'bare.safetensors')
    tower = f'timm:test_vit/{root}/bare.safetensors'
    GenReal(load_encoder(tower)).save_pretrained(root/'aligned')
    models = dict(words='embedded', tower=tower)
    for how, rows in (('probe', models), ('fine-tune', dict(tower=f'aligned:{root}/aligned'))):
        found = evaluate(rows, (str(root/'set'),), 'classification', root/how, how=how, settings=quiet,
                         say=lambda text: None)
        assert {r['arm'] for r in found} >= set(rows), found

@case
def a_published_llava():
    "What transformers reads goes to the device, sees, and is written from there."
    model, processor = tiny_llava('clip')
    llava, tower = from_llava(model, processor)
    images = [d.convert('RGB') for d in drawings(2)['image']]
    x = preprocess_images(tower, images)
    here, there = copy.deepcopy(tower).image_tokens(x).detach(), tower.to(SIM)
    whole_on(there)
    with torch.inference_mode(): same(there.image_tokens(x), here, 1e-4)
    aligned = GenReal(there, AdapterSettings(rank=2))
    whole_on(aligned)
    whole_on(llava.to(SIM))
    assert (save_llava(llava, Path(tempfile.mkdtemp())/'plain', aligned)/'config.json').exists()

@case
def the_app():
    pipeline, model = load_generator('embedded', device=SIM), GenReal(load_encoder('embedded').to(SIM))
    x = preprocess_images(model.encoder, list(drawings(2)['image']))
    same(*both_features(model, x), 1e-4)
    drawn = list(drawing(pipeline, 'a red apple', steps=2))
    assert drawn
    pairs = drawn_pairs(pipeline, 2, DrawSettings(steps=1))
    gallery_of(model, pairs, 2)

# a LLaVA, from the shell

@case
def the_benchmark_of_a_gpu():
    "Both ways of each comparison agree; in float32, because autocast computes nothing of bfloat16 here."
    from gmail_nb.bench import gpu # what it imports no other case needs
    on, name = gpu.Target(SIM, torch.float32, 1.), registered_vit(layers=3)
    llama = dict(vocab_size=49408, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=128)
    def clip():
        set_seed(0)
        return load_encoder(name)
    lines = [gpu.compare_alignment('align', clip(), on, 32, 4, share, steps=1) for share in (1., 1/3)]
    lines.append(gpu.compare_tuning('tune', clip(), on, 32, 4, steps=1))
    lines.append(gpu.compare_caption_training('train', llama, clip(), on, 32, 4, steps=1))
    lines.append(gpu.compare_caption_writing('write', llama, clip(), on, 32, 2, tokens=2))
    assert all(line['ratio'] > 0 for line in lines) and lines[-1]['same'] == 1

def small_words(folder):
    transformers.LlamaForCausalLM(language()).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder

@case
def commands_of_a_llava():
    from gmail_nb.runs import tune_llava, vqa # before `on_sim` looks
    with shell_on_sim() as here:
        for name, style in (('real', 'noto'), ('drawn', 'fluent')):
            emoji('B', style).sort('key').select(range(12)).to_parquet(f'{name}.parquet')
        small_words('lm')
        GenReal(load_encoder('embedded'), AdapterSettings(rank=2, adapted_share=1/7)).save_pretrained('aligned')
        emoji('unseen', 'noto')[0]['image'].convert('RGB').save('a.png')
        stages = '--project-steps 2 --instruct-steps 2 --project-batch-size 4 --instruct-batch-size 4 --rank 2'
        here('tune llava', 'tune llava real.parquet --generated drawn.parquet --model aligned --arm both '
             f'--language-model lm {stages} --out llava')
        here('chat', 'chat what --image a.png --model llava --max-new-tokens 3')
        here('llava caption', 'caption a.png --model llava --max-new-tokens 3')
        here('eval vqa', 'eval vqa --model llava --limit 4 --max-new-tokens 2 --out vqa')

# whole commands, as they are called from the shell

class Budget(NamedTuple):
    "What a command may copy, besides the weights of the models that it loads."
    images:int  # pictures to the device, each time that one goes through a tower
    numbers:int # other numbers to the device
    reads:int   # how often all weights go to the CPU, for their fingerprint or to be saved
    back:int    # other numbers to the CPU
    why:str     # where the other numbers come from

BUDGETS = {
    'generate': Budget(0, 160_000, 0, 48 * 3 * 64 * 64, 'captions and noise go, pictures come'),
    'embed': Budget(48, 0, 1, 48 * 256, 'features come'),
    'align': Budget(116, 12_000, 1, 700_000, 'features and adapters go; features, adapters, and both moments come'),
    'tune text': Budget(48, 320_000, 3, 0, 'features, word numbers and adapters go; features and weights come'),
    'tune caption': Budget(60, 260_000, 1, 11_000_000, 'features, adapters go; features, weights, moments come'),
    'caption': Budget(48, 16, 0, 48 * 24, 'word numbers come'),
    'eval': Budget(12, 24_000, 1, 12_000, 'word numbers and maps go, features and ranks come'),
    'tune llava': Budget(24, 600_000, 0, 12_600_000,
                         'tokens and adapters go; tokens, adapters, moments and, for its fingerprint, f_g come'),
    'chat': Budget(1, 48, 0, 12, 'words go and come'),
    'llava caption': Budget(2, 64, 0, 12, 'words go and come'),
    'eval vqa': Budget(5, 500, 0, 24, 'words go and come')}

def is_picture(shape): return len(shape) == 4 and shape[1] == 3

def check_budget(name, t):
    "Pictures cross as often as is stated; no more of anything else."
    def size(shapes): return sum(torch.Size(s).numel() for s in shapes)
    budget, there = BUDGETS[name], [s for s in t.to_device if not is_picture(s)]
    images = sum(s[0] for s in t.to_device if is_picture(s))
    said = f'{name}: {images} images, {size(there):,} numbers, {size(t.to_cpu):,} back, {t.weights:,} weights'
    assert t.weights, f'{name} moved no model to the device'
    assert images == budget.images and size(there) <= budget.numbers, f'{said}; allowed: {budget}'
    assert size(t.to_cpu) <= budget.reads * t.weights + budget.back, f'{said}; allowed: {budget}'

@contextmanager
def shell_on_sim():
    "A folder of its own, and what runs a command there and checks what it copied."
    from gmail_nb.cli.commands import COMMANDS
    here = Path.cwd()
    os.chdir(tempfile.mkdtemp())
    on_sim()
    def run(name, line):
        with simulator.counted() as t: status = COMMANDS(line.split())
        assert not status, f'gmail_{line} ended with {status}'
        check_budget(name, t)
    try: yield run
    finally: os.chdir(here)

@case
def commands_from_images_to_scores():
    from gmail_nb.runs import align, embed, evaluate, generate, tune_caption, tune_text # before `on_sim` looks
    lines = {
        'generate': 'generate real.parquet --out drawn --steps 1 --quiet',
        'embed': 'embed real.parquet --out features',
        'align': 'align real.parquet --generated drawn --epochs 1 --batch-size 16 --out aligned',
        'tune text': 'tune text --generated drawn --model aligned --steps 2 --out tuned',
        'tune caption': 'tune caption --generated drawn --model aligned --test B.parquet --steps 2 --out captions',
        'caption': 'caption real.parquet --model captions',
        'eval': 'eval B.parquet --model tuned:tuned --out eval --no-pictures'}
    with shell_on_sim() as run:
        drawings(48).to_parquet('real.parquet')
        emoji('B', source='noto').select(range(12)).to_parquet('B.parquet')
        for name, line in lines.items(): run(name, line)

def on_sim():
    "Let every room that asks for the fastest device, or for accelerate's, be given the simulated one."
    for name, module in list(sys.modules.items()):
        if not name.startswith('gmail_nb'): continue
        if hasattr(module, 'default_device'): module.default_device = lambda: SIM
        if hasattr(module, 'processes'): module.processes = lambda *args, **how: accelerator(SIM) # as with a GPU

# what takes a model, and the case that calls it: case -> room -> names of functions and classes. A case that does not
# call what it is told to fails. Whatever else takes a model has a reason below.

COVERED = {
    'commands_from_images_to_scores': {
        'align': (
            'DualTower FrozenTower aligned_model card_of check_base check_plain generated_tower load_adapter '
            'read_weights trained_parameters write_weights'
        ),
        'caption_metrics': 'clip_scores score_captions',
        'captioning': (
            'CaptionLearner CaptionLoss CaptionTraining Captioner caption_ids caption_loss caption_parts '
            'caption_text check_captioner_input checkpointed continue_from drawn_by generate_ids has_dropout '
            'padding_of prefixed_logits save_captioner train_captioner training_facts write_captions '
            'write_encoded'
        ),
        'encoders': 'Encoder count encode_texts first_weight fit_weights',
        'features': (
            'embed embed_local embed_part embedder fill finish_features folder_settings model_name side_weights'
        ),
        'generate': 'carry_out generate number_format',
        'lora': (
            'block_layers check_rank chosen_targets join_qkv keep_base_weights linear_layers lora_targets '
            'lora_tower train_beside_weights weight_side weights_read_directly'
        ),
        'pipelines': (
            'call_default check_call check_format check_negative check_options encode_prompts text_windows '
            'truncated_prompts'
        ),
        'retrieval': 'embed_captioned embed_texts features_made_from fill_texts set_features',
        'runs.align': (
            'align_sets embed_set keep_start new_model partner_tokens real_features report_alignment '
            'train_and_judge train_pairs whole_images'
        ),
        'runs.embed': 'embed_shared embed_together features_place',
        'runs.evaluate': 'chosen_models eval_retrieval evaluate_as_asked measure_row measured_task',
        'runs.generate': 'look_at',
        'runs.presets': 'check_arm',
        'runs.tune_caption': (
            'Seer Embeddings caption_files caption_pictures caption_test captions_for encoded_below features_of '
            'finish_captioner keep_captioner models_below score_captioner trained_projection training_features '
            'tune_captioner'
        ),
        'runs.tune_text': 'Sides finish_text judge_text keep_tuned seen_by text_pictures tune_from_files tune_sets',
        'runtime': 'module_fingerprint',
        'shards': 'Sampler',
        'train': 'Alignment Bank GeneratedSide align alignment_parameters check_pairs check_token_pairs fits',
        'tune': (
            'ProjectedTower TextRun check_features_fit check_training_set head_inputs head_module load_tuned '
            'own_temperature save_tuned show_tuning text_parameters training_fingerprints tune_text tuned_encoder'
        ),
    },
    'commands_of_a_llava': {
        'encoders': 'preprocess_images',
        'llava': (
            'Llava VisualTokens answer_all earlier_answers encode_all encode_prompt generate_answers '
            'language_part llava_loss lora_layers new_projector read_shared_words'
        ),
        'llava_training': (
            'LlavaLoss LlavaTraining adapt_language adapter_config adapter_place adapter_state as_trained '
            'embed_tokens encode_example fit_projector grid_of language_facts linear_names only_trained '
            'projector_state put_adapter save_trained token_settings token_side token_weights train_llava '
            'train_stage'
        ),
        'lora': 'block_list late_targets',
        'runs.tune_llava': (
            'Talk Talker Tuning begun_tuning chat check_llava_arm keep_llava learn_from likelihoods llava_captions '
            'set_tokens started taught token_width tune_llava vision_of'
        ),
        'runs.vqa': 'answered evaluate_vqa named_models',
        'vqa': 'ask_questions',
    },
    'a_set_of_classes_is_evaluated': {
        'classification': 'FineTuned FineTuning check_trainable fine_tune plain_tower same_start zero_shot_weights',
        'encoders': 'TimmVisual load_bare',
        'runs.evaluate': (
            'eval_classification file_features fine_tuned_classes learned_classes start_tower whole_files'
        ),
    },
    'exported': {
        'encoders': 'HFText HFVisual OpenClipText OpenClipVisual',
        'export': (
            'export export_open_clip export_transformers fold_projection last_linear merged_tower open_clip_state '
            'put_towers'
        ),
    },
    'captioning_from_text': {
        'ifcap': 'IFCap IFCapBatches ifcap_ids ifcap_loss save_ifcap train_ifcap write_after write_ifcap',
    },
    'a_published_llava': {
        'encoders': 'LlavaTower tower_encoder',
        'llava': 'from_llava merged_language merged_state plain_state save_llava',
    },
    'long_captions': {
        'long_captions': 'cut_at recall_by_length stretch_embedding stretch_encoder stretch_parameter stretch_text',
    },
    'the_app': {
        'runs.app': 'both_features decoded_latents denoised drawing drawn_pairs gallery_of',
    },
    'align_prefix': {
        'lora': 'lora_update',
        'prefix': 'FrozenPrefix cache_prefix first_adapted',
        'train': 'recorded',
    },
    'a_captioning_step_waits_once': {
        'captioning': 'checkpointing_of encode_captions lora_lm lora_modules',
    },
    'generating_and_scoring': {
        'gallery': 'image_caption_scores score_quality',
    },
    'align_tokens': {
        'train': 'SharedBlocks',
    },
    'a_text_step_waits_once': {
        'tune': 'attention_targets',
    },
}

# ROOM.NAME, or all of a room -> why no case calls it
REASONS = {
    'experiments.*': 'loads its encoder to `default_device` and calls what the cases call; a run takes minutes',
    'bench.*': 'measures on the device there is; those of `gmail_bench gpu` are the case `the_benchmark_of_a_gpu`',
    'runs.dry_run.*': 'reads names of models; what it measures goes where `--device` says',
    'runs.presets.recipe': 'takes the name of an encoder, and loads none',
    'runs.tune_llava.dry_llava': 'reads names of models',
    'runs.tune_llava.dry_chat': 'reads names of models',
    'runs.tune_llava.look_llava': 'reads the name of a model',
    'runs.vqa.dry_vqa': 'reads names of models',
    'runs.vqa.answers_file': 'reads the card of a folder',
    'runs.tune_text.check_text_test_apart': 'reads the keys of a folder',
    'runs.tune_text.text_tries': 'reads which step was the best',
    'encoders.fill_tower': 'reads weights from files before a tower goes to a device',
    'export.known_facts': 'reads the card of a folder',
    'export.push_to_hub': 'uploads what `export` wrote',
    'runs.align.push_aligned': 'uploads a folder',
    'features.EmbedActor': 'a worker of Ray, which the tests have not; it calls `embedder` and `embed_part`',
    'features.embed_ray': 'hands parts to workers of Ray, which the tests have not',
    'pipelines.use_scheduler': 'changes the scheduler, which has no weights',
    'pipelines.count_truncated': 'counts words with the tokenizer',
    'runs.places.base_of': 'reads the card of a model, whose folder it is given',
    'runs.app.Viewer': 'holds what `make_viewer` was given; its pictures go through `both_features`',
    'runs.app.make_viewer': 'moves its model to `default_device`, and needs a finished demo',
    'runs.evaluate.generated_training': '`set_features` through f_g, which embedding covers',
    'runs.tune_llava.instructed': 'embeds the pictures of instructions as `learn_from` does those of captions',
    'runs.tune_llava.behind': 'reads the weights once, for their fingerprint',
    'runs.tune_llava.write_llava_page': 'shows the gap that `gap_before_and_after` measures',
    'runs.tune_llava.aligned_tower': '`GenReal.from_pretrained` beside an encoder that is not moved yet',
    'runs.tune_text.pairs_of_files': 'joins `Sides` and `text_pairs`, which `tune text` calls',
    'tune.text_blocks': 'lists blocks for the tuning `last`, a case of the slow group',
    'tune.TunedText': 'holds what `tune_text` made',
}

def told():
    "The table as lists: names covered by each case, and reasons by name."
    named = {c: [f'{room}.{n}' for room, ns in rooms.items() for n in ns.split()] for c, rooms in COVERED.items()}
    return dict(covered=named, reasons=REASONS)

def not_called(name, called): return sorted(set(told()['covered'].get(name, ())) - called)

PACKAGE = str(Path(gmail_nb.runtime.__file__).parent)

@functools.cache
def qualnames(file):
    "Names with those of what stands around them, by first line and name."
    found = {}
    def walk(node, around):
        for child in ast.iter_child_nodes(node):
            is_class = isinstance(child, ast.ClassDef)
            if not is_class and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                walk(child, around)
                continue
            first = min(part.lineno for part in (child, *child.decorator_list))
            found[first, child.name] = around + child.name
            walk(child, f'{around}{child.name}.' + '<locals>.' * (not is_class))
    walk(ast.parse(Path(file).read_text(encoding='utf-8')), '')
    return found

def qualname(code):
    "Python 3.10 knows that of functions alone, not of their code."
    known = getattr(code, 'co_qualname', None)
    return known or qualnames(code.co_filename).get((code.co_firstlineno, code.co_name), code.co_name)

class Called:
    "Names of the functions and classes of the package that were called, such as `tune.tune_text`."
    def __init__(self): self.names, self.known = set(), {}

    def __call__(self, frame, event, arg):
        if event != 'call': return
        code = frame.f_code
        if code not in self.known: self.known[code] = self.name_of(code, frame)
        if self.known[code]: self.names.add(self.known[code])

    def name_of(self, code, frame):
        if code.co_filename == '<string>' and code.co_name == '__init__': # of a dataclass
            made = type(frame.f_locals.get('self'))
            return f'{made.__module__}.{made.__qualname__}'.removeprefix('gmail_nb.')
        body = not code.co_flags & inspect.CO_OPTIMIZED # of a class, or of a file that is imported
        if body or not code.co_filename.startswith(PACKAGE): return None
        room = '.'.join(Path(code.co_filename).relative_to(PACKAGE).with_suffix('').parts)
        return f'{room}.{qualname(code).removesuffix(".__init__")}' # with a class for its methods

def outcome(name):
    "The error of a case, or None, and what it called."
    called, error = Called(), None
    sys.setprofile(called)
    try: CASES[name]()
    except Exception: error = traceback.format_exc()
    finally: sys.setprofile(None)
    if not error and (lost := not_called(name, called.names)): error = f'the table says that it calls {lost}'
    return dict(error=error, called=sorted(called.names))

if __name__ == '__main__' and sys.argv[1] == '--list': print(*CASES)
elif __name__ == '__main__' and sys.argv[1] == '--table': print(json.dumps(told()))
elif __name__ == '__main__':
    on_sim()
    out, names = Path(sys.argv[1]), sys.argv[2:] or list(CASES)
    found = {name: outcome(name) for name in names}
    out.write_text(json.dumps(found))
