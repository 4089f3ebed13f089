"One batch, one row, one shard: what fails is named, and what is written is whole or absent."
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import gmail_nb.runtime
from gmail_nb import shards
from gmail_nb.pipelines import EmojiPipeline, encode_prompts, load_generator, resolve_generator
from gmail_nb.plan import Plan, make_settings, read_captions
from gmail_nb.settings import DrawSettings
from gmail_nb.shards import (GENERATED, Sampler, encode_halving, encode_image_file, image_fault, image_row,
                             is_out_of_memory, make_shard, shard_fault, write_shard)

CAPTIONS = read_captions({f'k{i}': f'caption number {i}' for i in range(6)})
SETTINGS = make_settings(CAPTIONS, resolve_generator('embedded'), shard_size=6)

def rows_of(plan):
    image = np.full((8, 8, 3), 99, np.uint8)
    return [image_row(item, image, plan.settings) for item in plan.items(0)]

class Broken(EmojiPipeline):
    "The embedded pipeline with faults that depend on the noise alone."
    def __call__(self, generator=None, **kwargs):
        if len(generator) > 4: raise torch.OutOfMemoryError('CUDA out of memory (pretended)')
        result = super().__call__(generator=generator, **kwargs)
        for i, g in enumerate(generator):
            if g.initial_seed() % 5 == 0: result.images[i] = np.nan
            if g.initial_seed() % 5 == 1: result.images[i] = 0
        return result


# ---- drawing

@pytest.mark.parametrize('fault, image', [
    (None, np.full((4, 4, 3), .5)), ('not finite', np.full((4, 4, 3), np.inf)), ('black', np.zeros((4, 4, 3)))])
def test_an_image_that_must_not_be_kept_has_a_reason(fault, image): assert image_fault(image) == fault

def test_every_fault_is_named_and_the_batch_is_halved():
    pipeline = Broken(**load_generator('embedded', device='cpu').components)
    pipeline.set_progress_bar_config(disable=True)
    captions = read_captions({f'k{i}': f'a rose number {i}' for i in range(12)})
    settings = make_settings(captions, resolve_generator('embedded'), DrawSettings(steps=2))
    sampler, items = Sampler(pipeline, settings, 16), Plan(captions, settings).items(0)
    prompts = [i.prompt for i in items]
    embedded = dict(zip(prompts, encode_prompts(pipeline, prompts)))
    results = [r for batch in sampler.draw(items, embedded) for r in batch]
    assert sampler.batch_size <= 4 and [i for i, _ in results] == items
    for item, (image, fault) in results:
        assert fault == {0: 'not finite', 1: 'black'}.get(item.seed % 5)
        assert (image is None) == bool(fault)

@pytest.mark.parametrize('text', [
    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.",
    'CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate',
    'cuDNN error: CUDNN_STATUS_ALLOC_FAILED', 'CUDA out of memory'])
def test_memory_that_runs_out_is_recognised(text):
    assert is_out_of_memory(RuntimeError(text)) and not is_out_of_memory(ValueError(text))

def test_prompts_that_do_not_fit_are_encoded_in_halves(monkeypatch):
    def encode(pipeline, prompts, *_):
        if len(prompts) > 3: raise RuntimeError('out of memory')
        return [dict(prompt=p) for p in prompts]
    monkeypatch.setattr(shards, 'encode_prompts', encode)
    settings = SimpleNamespace(guidance=3., negative='', options={})
    sampler = SimpleNamespace(pipeline=None, settings=settings)
    assert encode_halving(sampler, list('abcdefgh')) == [dict(prompt=p) for p in 'abcdefgh']


# ---- a shard on disk

def test_a_png_keeps_every_bit_and_equal_pixels_give_equal_bytes():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    for image_format in ('png', 'jpeg', 'webp'):
        assert encode_image_file(image, image_format) == encode_image_file(image.copy(), image_format)

def test_a_receipt_says_what_the_file_is(tmp_path):
    plan = Plan(CAPTIONS, SETTINGS)
    path = tmp_path/plan.shard_name(0)
    receipt = write_shard(path, rows_of(plan), [], plan.settings, truncated=0)
    assert receipt['rows'] == 6 and receipt['bytes'] == path.stat().st_size and receipt['truncated'] == 0
    assert pq.read_schema(path).names == list(GENERATED) and shard_fault(path, plan, 0) is None

def test_rows_that_failed_are_not_missed(tmp_path):
    plan = Plan(CAPTIONS, SETTINGS)
    path = tmp_path/plan.shard_name(0)
    write_shard(path, rows_of(plan)[1:], [dict(key='k0', sample=0, reason='black')], plan.settings)
    assert shard_fault(path, plan, 0) is None
    write_shard(path, rows_of(plan)[1:], [], plan.settings)
    assert shard_fault(path, plan, 0) == 'rows are not those of the plan'

def test_a_retry_draws_what_failed_and_nothing_else(tmp_path):
    drawn = []
    class Grey:
        dtype, _execution_device, tokenizer = torch.float32, torch.device('cpu'), None
        def __call__(self, prompt, generator, num_inference_steps, guidance_scale, output_type):
            drawn.append(prompt)
            return SimpleNamespace(images=np.full((len(prompt), 8, 8, 3), .5))
    plan = Plan(CAPTIONS, make_settings(CAPTIONS, resolve_generator('any/thing', resolve=False),
                                        DrawSettings(steps=1, guidance=1.)))
    failed = [dict(key='k2', sample=0, reason='black')]
    write_shard(tmp_path/plan.shard_name(0), [r for r in rows_of(plan) if r['key'] != 'k2'], failed,
                plan.settings, seconds=2., truncated=0)
    with ThreadPoolExecutor(1) as encoders, ThreadPoolExecutor(1) as writer:
        sampler = Sampler(Grey(), plan.settings, 4)
        receipt = make_shard(tmp_path, plan, 0, sampler, encoders, writer, retry=True).result()
    assert drawn == [['caption number 2']] and receipt['failures'] == [] and receipt['seconds'] >= 2
    assert shard_fault(tmp_path/plan.shard_name(0), plan, 0) is None
