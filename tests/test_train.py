"""Alignment: what must not change its numbers, what it refuses, and what it keeps. Over processes, several of them
follow the curve of one, and a run that is killed ends in the weights of one that is not."""
import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from accelerate.tracking import GeneralTracker
from datasets import Dataset, Features as Columns, Image, Value
from PIL import Image as Picture
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gmail_nb.align import GenReal
from gmail_nb.encoders import Encoder, encode_images
from gmail_nb.features import LazyPixels, embed
from gmail_nb.runtime import set_seed
from gmail_nb.settings import AdapterSettings, AlignSettings, EmbedSettings, RunSettings, described
from gmail_nb.train import (Alignment, Bank, Checkpoints, Order, align, alignment_parameters, bank_bytes, batches,
                            check_device, checkpoints_in, draw_others, epoch_order, own_parts, processes, rng_state,
                            run_precision, set_rng_state)

script = str(Path(__file__).with_name('align_once.py'))

def weight(item): return 20

# a small tower on random pictures: a step takes milliseconds

class Preprocess:
    "A picture of 32 pixels as a tensor."
    def __call__(self, image): return torch.from_numpy(np.array(image.convert('RGB'))).permute(2, 0, 1) / 127.5 - 1
    def __repr__(self): return 'Preprocess(32)'

def small_encoder():
    set_seed(0)
    tower = open_clip.model.CLIP(
        embed_dim=32, vision_cfg=dict(image_size=32, layers=4, width=64, patch_size=8, head_width=32),
        text_cfg=dict(width=64, heads=2, layers=1)).visual
    return Encoder('small', tower, nn.Identity(), Preprocess(), None, 32, 1.)

late = AdapterSettings(adapted_share=1/2)

def new_model(adapters=late):
    "The same model each time."
    set_seed(1)
    return GenReal(small_encoder(), adapters)

def pictures(n, seed):
    numbers = np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    return [Picture.fromarray(x) for x in numbers]

generated_images, real_images = pictures(32, 0), pictures(32, 1)
x_g, x_r = (torch.stack([Preprocess()(i) for i in images]) for images in (generated_images, real_images))

def as_dataset(images):
    columns = Columns(key=Value('string'), image=Image())
    return Dataset.from_dict(dict(key=[f'k{i}' for i in range(len(images))], image=images), features=columns)

@pytest.fixture(scope='module')
def real(): return encode_images(new_model().real_features, x_r)

short = AlignSettings(epochs=3, batch_size=16)

def trained(real, pixels=x_g, settings=short, evaluate=None, adapters=late, **how):
    "Losses of 6 steps, all trained weights in one vector, and the model."
    model = new_model(adapters)
    history = align(model, pixels, real, settings, evaluate, **how)
    weights = torch.cat([p.detach().flatten() for p in alignment_parameters(model)])
    return torch.tensor([r['loss'] for r in history]), weights, model

@pytest.fixture(scope='module')
def plain(real): return trained(real)

def at(folder, **how): return RunSettings(checkpoints=str(folder), save_every=1, **how)

# order, negatives, parts

def test_the_order_is_a_function_of_seed_and_epoch():
    assert torch.equal(epoch_order(8, 0, 0), epoch_order(8, 0, 0))
    assert not torch.equal(epoch_order(8, 0, 0), epoch_order(8, 0, 1))
    assert sorted(epoch_order(8, 0, 1).tolist()) == list(range(8))

def test_batches_by_their_step_are_those_of_the_list_and_two_epochs_are_held():
    for n, size in ((10, 3), (2, 3), (6, 6)):
        order, listed = Order(n, size, 5, 4), list(batches(n, size, 5, 4))
        assert len(order) == len(listed) and all(map(torch.equal, order, listed))
        assert len(order.held) == 2 and torch.equal(order[0], listed[0])
        with pytest.raises(IndexError): order[len(order)]

def test_a_smaller_batch_is_left_out_unless_it_is_alone():
    assert [len(b) for b in batches(8, 3, 0, 2)] == [3, 3, 3, 3]
    assert [len(b) for b in batches(2, 3, 0, 2)] == [2, 2]

def test_other_negatives_are_different_and_free():
    taken = torch.tensor([7, 0, 3])
    others = draw_others(10, taken, 4, 0, 5)
    assert len(set(others.tolist()) | {7, 0, 3}) == 7 and others.max() < 10
    assert set(draw_others(10, taken, 99, 0).tolist()) == {1, 2, 4, 5, 6, 8, 9}

def test_every_row_counts_once_over_parts_and_processes():
    for size, accumulation, world in ((16, 4, 1), (5, 2, 3), (2, 1, 3)):
        own = [own_parts(size, accumulation, p, world) for p in range(world)]
        counted = [
            (i, share / len(places)) for parts in own for places, share in parts if share for i in places.tolist()
        ]
        assert sorted(counted) == [(i, world) for i in range(size)]

def test_a_bank_that_is_read_gives_what_a_resident_one_gives(real):
    model = new_model()
    assert torch.equal(Bank(model, real, 0)[[3, 1]], Bank(model, real)[[3, 1]])
    assert Bank(model, real, 0).resident is None and len(Bank(model, real)) == 32
    assert torch.equal(Bank(model, real).whole(chunk=5), Bank(model, real).resident)

def test_on_a_cpu_a_large_bank_stays_in_its_file_unless_every_step_reads_it():
    cpu, gpu, every = torch.device('cpu'), torch.device('cuda'), AlignSettings(negatives='all')
    assert bank_bytes(AlignSettings(), cpu, 2**31) == 2**28 and bank_bytes(every, cpu, 2**31) == 2**31
    assert bank_bytes(AlignSettings(), gpu, 2**31) == 2**31 and bank_bytes(AlignSettings(), cpu, 9) == 9

# what must not change the result

def test_a_run_learns_and_leaves_the_real_side(plain, real):
    losses, _, model = plain
    assert losses[-1] < losses[0]
    assert torch.equal(encode_images(model.encode_real, x_r), real)

def test_the_same_curve_with_a_frozen_prefix(plain, real):
    "Attention rounds by the size of the batch, and the prefix is recorded in other batches."
    torch.testing.assert_close(trained(real, prefix=True)[0], plain[0], atol=1e-3, rtol=0)

@pytest.fixture(scope='module')
def drawings():
    "Model, pictures and real features of the shipped encoder, a convolutional one: it does not round by the batch."
    from gmail_nb.data import emoji
    from gmail_nb.encoders import embedded_encoder, preprocess_images
    ds = emoji('A', source='noto').select(range(200, 232))
    encoder = embedded_encoder()
    pixels = preprocess_images(encoder, list(ds['image']))
    return encoder, ds.select_columns(['key', 'image']), pixels.flip(-1), encode_images(encoder.encode_image, pixels)

def drawn(drawings, settings=short, pixels=None, **how):
    "Losses and weights of an alignment of drawings with their mirror images."
    encoder, _, mirrored, real = drawings
    set_seed(0)
    model = GenReal(copy.deepcopy(encoder), AdapterSettings(adapted_share=3/7))
    history = align(model, mirrored if pixels is None else pixels, real, settings, **how)
    return [r['loss'] for r in history], torch.cat([p.detach().flatten() for p in alignment_parameters(model)])

def test_the_same_weights_with_a_frozen_prefix_where_rows_do_not_depend_on_their_batch(drawings):
    assert torch.equal(drawn(drawings, prefix=True)[1], drawn(drawings)[1])

def test_the_same_weights_with_a_prefix_of_images_decoded_on_the_way(drawings):
    encoder, ds, _, _ = drawings
    lazy = LazyPixels(ds, encoder.preprocess)
    assert torch.equal(drawn(drawings, pixels=lazy, prefix=True)[1], drawn(drawings, pixels=lazy[:])[1])

def test_the_same_weights_with_images_decoded_on_the_way(plain, real):
    lazy = LazyPixels(as_dataset(generated_images), Preprocess())
    assert torch.equal(trained(real, lazy)[1], plain[1])

def test_the_same_weights_with_features_read_by_the_step(plain, tmp_path):
    quiet = EmbedSettings(show_progress=False)
    stored = embed(as_dataset(real_images), new_model(), tmp_path/'f_r', 'base', quiet)
    assert torch.equal(trained(stored, run=RunSettings(max_bank=0))[1], plain[1])

def test_parts_of_a_batch_add_up_to_the_same_curve(plain, real):
    losses, _, _ = trained(real, settings=replace(short, accumulation=4))
    torch.testing.assert_close(losses, plain[0], atol=1e-2, rtol=0)
    torch.testing.assert_close(losses[0], plain[0][0], atol=1e-5, rtol=0)

def test_the_symmetric_loss_in_parts_follows_its_curve_also_with_dropout(real):
    both = replace(short, loss='symmetric')
    whole, parts = (trained(real, settings=replace(both, accumulation=n))[0] for n in (1, 3))
    torch.testing.assert_close(parts, whole, atol=1e-2, rtol=0)
    torch.testing.assert_close(parts[0], whole[0], atol=1e-5, rtol=0)
    drops = Alignment(new_model(replace(late, dropout=.5)), x_g, real, replace(both, accumulation=3))
    drops.model.train()
    batch, torch_state = drops.data.batch(0), torch.get_rng_state()
    first = drops.runner.columns_first(batch)
    assert torch.equal(torch.get_rng_state(), torch_state) # the pass with gradients draws the same masks
    again = drops.runner.columns(batch, [drops.runner.side(x) for x in batch.inputs])
    torch.testing.assert_close(first, again, atol=0, rtol=0)

class Reads(TorchDispatchMode):
    "Counts the times that a number of a tensor is asked for, which a GPU has to be waited for."
    count = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        asked = func is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point()
        self.count += asked # whole numbers are indices, which are looked at on the CPU
        return func(*args, **kwargs or {})

@pytest.mark.parametrize('how', [
    dict(), dict(accumulation=4), dict(negatives=8), dict(loss='symmetric'), dict(loss='sigmoid'),
    dict(loss='symmetric', accumulation=2), dict(loss='cosine'), dict(ema=.9), dict(pull_weight=2.)], ids=str)
def test_a_step_waits_for_its_device_once(real, how, monkeypatch):
    run = Alignment(new_model(), x_g, real, AlignSettings(**(dict(epochs=2, batch_size=16) | how)))
    run.advance()
    run.runner.optimizer.step = lambda: None # AdamW's own counts of steps lie on the CPU
    read, lists = torch.Tensor.tolist, []
    monkeypatch.setattr(torch.Tensor, 'tolist', lambda x: lists.append(x.is_floating_point()) or read(x))
    with Reads() as reads: run.advance()
    assert reads.count == 0 and sum(lists) == 1 # loss and length of the gradient together

def test_a_run_that_is_stopped_goes_on_to_the_same_weights(plain, real, tmp_path):
    def killed(model): raise KeyboardInterrupt # in the middle of the run, after the first epoch
    with pytest.raises(KeyboardInterrupt): trained(real, evaluate=killed, run=at(tmp_path))
    assert [p.name for p in checkpoints_in(tmp_path)] == ['step-000001']
    assert torch.equal(trained(real, run=at(tmp_path))[1], plain[1])
    rows = [json.loads(line) for line in (tmp_path/'log.jsonl').read_text().splitlines()]
    assert [r['step'] for r in rows] == list(range(1, 7))

def test_a_prefix_is_recorded_in_the_precision_of_the_run(drawings):
    bf16 = replace(short, precision='bf16', epochs=1)
    early, whole = (drawn(drawings, bf16, prefix=p) for p in (True, False))
    assert torch.equal(early[1], whole[1]) and early[0] != drawn(drawings, prefix=True)[0][:2]

def test_features_stored_in_float16_follow_the_curve(plain, real):
    assert (trained(real.half())[0] - plain[0]).abs().max() < 1e-2

def test_dropout_draws_the_same_after_a_stop(real, tmp_path):
    class Stop(Exception): pass
    def stop(model): raise Stop
    drops = replace(late, dropout=.3)
    whole = trained(real, adapters=drops)[1]
    with pytest.raises(Stop): trained(real, adapters=drops, evaluate=stop, run=at(tmp_path))
    assert torch.equal(trained(real, adapters=drops, run=at(tmp_path))[1], whole)

# what may

@pytest.mark.parametrize('how', [
    dict(negatives=12), dict(negatives='all'), dict(learn_tau=True), dict(loss='symmetric'),
    dict(loss='symmetric', accumulation=2), dict(loss='sigmoid', accumulation=2), dict(loss='cosine'),
    dict(ema=.9), dict(precision='bf16')], ids=str)
def test_every_choice_runs_and_learns(real, how):
    losses = trained(real, settings=AlignSettings(**(dict(epochs=6, batch_size=16) | how)), prefix=True)[0]
    assert losses[-2:].mean() < losses[:2].mean()

def test_samples_take_turns_by_epoch(plain, real):
    "The second sample is seen in the second epoch."
    both = trained(real, [x_g, x_r])[0]
    assert torch.equal(both[:2], plain[0][:2]) and both[2] < plain[0][2]

def test_equal_captions_are_no_negatives_of_each_other(plain, real):
    assert trained(real, ids=torch.arange(32) // 4)[0][0] < plain[0][0]

# averages, temperature, early stopping

def test_what_is_measured_is_what_is_kept(real):
    kept, settings = [], AlignSettings(epochs=2, batch_size=16, ema=.9, learn_tau=True, weight_decay=.5)
    def look(m):
        kept.append(m.proj_gen.weight.detach().clone())
        return dict(x=len(kept))
    model = new_model()
    history = align(model, x_g, real, settings, look, prefix=True)
    assert torch.equal(kept[-1], model.proj_gen.weight)
    # the loss moves the temperature, decay does not; model.tau is averaged like the weights
    assert history[0]['tau'] != history[-1]['tau'] and 0 < abs(model.tau - .07) < .005

def test_the_temperature_does_not_decay(real):
    settings = AlignSettings(learn_tau=True, weight_decay=.5)
    groups = Alignment(new_model(), x_g, real, settings).runner.optimizer.param_groups
    assert [g['weight_decay'] for g in groups] == [.5, 0.] and len(groups[1]['params']) == 1

def test_a_run_that_stopped_early_is_over_and_keeps_its_best(real, tmp_path):
    looks, seen = iter((.1, .3, .2, .2, .9)), []
    def look(m):
        seen.append(m.proj_gen.weight.detach().clone())
        return dict(made_up=next(looks))
    def stopping():
        model = new_model()
        settings = AlignSettings(epochs=9, batch_size=16, patience=2)
        run = RunSettings(checkpoints=str(tmp_path))
        return model, align(model, x_g, real, settings, look, prefix=tmp_path/'early', run=run)
    (first, once), (second, again) = stopping(), stopping()
    assert len(once) == len(again) == 8 and len(seen) == 4
    assert torch.equal(seen[1], first.proj_gen.weight) and torch.equal(seen[1], second.proj_gen.weight)

def test_a_look_that_measures_nothing_leaves_no_trace(real):
    history = align(new_model(), x_g, real, replace(short, epochs=1), lambda m: {})
    assert all('x' not in r and set(r) == {'step', 'loss', 'lr'} for r in history)

# checkpoints and the log

def test_checkpoints_of_another_run_are_refused(real, tmp_path):
    trained(real, run=at(tmp_path))
    with pytest.raises(ValueError, match='lr is 0.001 there and 0.002 here'):
        trained(real, settings=replace(short, lr=2e-3), run=at(tmp_path))
    with pytest.raises(ValueError, match='rank is 4 there and 2 here, alpha is 16 there and 1 here'):
        trained(real, adapters=replace(late, rank=2, alpha=1), run=at(tmp_path))
    with pytest.raises(ValueError, match="tuning is 'lora' there and 'projections' here"):
        trained(real, adapters=AdapterSettings(tuning='projections'), run=at(tmp_path))
    with pytest.raises(ValueError, match='the images or features are others'):
        trained(real, x_g.flip(0), run=at(tmp_path))

def test_a_checkpoint_of_before_is_gone_on_from(plain, real, tmp_path):
    "The first versions wrote neither the model nor whether the run had stopped."
    class Stop(Exception): pass
    def stop(model): raise Stop
    with pytest.raises(Stop): trained(real, evaluate=stop, run=at(tmp_path))
    file = checkpoints_in(tmp_path)[-1]/'state.json'
    state = json.loads(file.read_text())
    assert set(state) == {'step', 'bad', 'best', 'stopped', 'settings', 'model', 'data', 'history', 'processes', 'files', 'checksum'}
    assert state['settings'] == json.loads(json.dumps(described(replace(short, precision='no', tau=.07))))
    for later in ('model', 'stopped', 'processes', 'checksum'): del state[later]
    file.write_text(json.dumps(state))
    assert torch.equal(trained(real, run=at(tmp_path))[1], plain[1])

def test_checkpoints_are_in_order_beyond_six_digits(tmp_path):
    for k in (999_999, 1_000_000, 20): (tmp_path/f'step-{k:06}').mkdir()
    assert [p.name for p in checkpoints_in(tmp_path)] == ['step-000020', 'step-999999', 'step-1000000']

def test_the_newest_checkpoints_are_kept(tmp_path):
    keeper = Checkpoints(tmp_path, processes(), keep=2)
    for step in (1, 2, 3): keeper.save(dict(step=step), dict(weights=dict(w=torch.ones(2))), {})
    assert [p.name for p in checkpoints_in(tmp_path)] == ['step-000002', 'step-000003']

def test_random_generators_stand_where_they_stood(tmp_path):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    torch.save(rng_state(torch.device('cpu')), tmp_path/'rng.pt')
    def next_numbers(): return random.random(), np.random.rand(), torch.rand(1).item()
    ahead = next_numbers()
    set_rng_state(torch.load(tmp_path/'rng.pt', weights_only=True), torch.device('cpu'))
    assert next_numbers() == ahead

def test_a_tracker_gets_every_row_and_the_file_too(real, tmp_path):
    class Notes(GeneralTracker):
        name, requires_logging_directory, tracker = 'notes', False, None
        def store_init_configuration(self, values): self.settings, self.rows = values, []
        def log(self, values, step=None, **_): self.rows.append((step, values))
    notes = Notes()
    trained(real, run=RunSettings(trackers=(notes,), log_file=str(tmp_path/'notes.jsonl')))
    assert len(notes.rows) == 6 and notes.rows[-1][0] == 6
    assert all(v is not None for v in notes.settings.values())
    assert len((tmp_path/'notes.jsonl').read_text().splitlines()) == 6

# what it refuses

def test_pairs_and_features_must_fit(real, tmp_path):
    model = new_model()
    with pytest.raises(ValueError, match='embed the real images with the encoder'):
        align(model, x_g, real[:, :16])
    with pytest.raises(ValueError, match='at least one sample'): align(model, [], real)
    with pytest.raises(ValueError, match='3 generated images but 2 real'): align(model, x_g[:3], real[:2])
    with pytest.raises(ValueError, match='at least 2 pairs'): align(model, x_g[:1], real[:1])
    quiet = EmbedSettings(show_progress=False)
    stored = embed(as_dataset(real_images), model, tmp_path/'f_r', 'base', quiet)
    foreign = replace(stored, card=stored.card | dict(weights='0' * 16))
    with pytest.raises(ValueError, match='were made by weights 0000'): align(model, x_g, foreign)

def test_settings_without_sense_are_named(real):
    with pytest.raises(ValueError, match='accumulation is 0'): AlignSettings(accumulation=0)
    with pytest.raises(ValueError, match='tau is 0'): AlignSettings(tau=0)
    with pytest.raises(ValueError, match='between 0 and 1'): AlignSettings(ema=1.5)
    with pytest.raises(ValueError, match="'bf16'"): AlignSettings(precision='bf61')
    with pytest.raises(ValueError, match="'all'"): AlignSettings(negatives='every')
    with pytest.raises(ValueError, match='further negatives have none'): AlignSettings(loss='symmetric', negatives=4)
    AlignSettings(loss='symmetric', accumulation=2).check_loss(processes=2)

def test_the_temperature_follows_the_loss_unless_it_is_given():
    assert AlignSettings().tau is None and AlignSettings().temperature == .07
    assert replace(AlignSettings(), loss='sigmoid').temperature == .1
    assert replace(AlignSettings(tau=.2), loss='sigmoid').temperature == .2

def test_a_device_that_is_not_there_is_refused(real):
    with pytest.raises(ValueError, match="no device 'cuda:9', only cpu"): check_device('cuda:9')
    with pytest.raises(ValueError, match="no device 'tpu'"):
        align(new_model(), x_g, real, run=RunSettings(device='tpu'))
    check_device('cpu'), check_device(None)

def test_bfloat16_where_it_cannot_be_had_is_refused(monkeypatch):
    from types import SimpleNamespace
    def there(kind): return SimpleNamespace(mixed_precision='no', device=torch.device(kind))
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: False)
    with pytest.raises(ValueError, match="'bf16', which cuda does not compute in"):
        run_precision(AlignSettings(precision='bf16'), there('cuda'))
    assert run_precision(AlignSettings(), there('cuda')) == 'no'
    assert run_precision(AlignSettings(precision='bf16'), there('cpu')) == 'bf16'

def test_features_that_end_before_their_keys_are_refused(real, tmp_path):
    stored = embed(as_dataset(real_images), new_model(), tmp_path/'f_r', 'base', EmbedSettings(show_progress=False))
    cut = replace(stored, mapped=stored.mapped[:20])
    with pytest.raises(ValueError, match='ends after 20 rows, but row 32 is asked for'): align(new_model(), x_g, cut)
    with pytest.raises(ValueError, match='but row 31 is'): align(new_model(), x_g[:2], cut.select([3, 30]))

def test_a_call_without_sense_is_named(real):
    model = new_model()
    with pytest.raises(ValueError, match='pass evaluate'): align(model, x_g, real, AlignSettings(patience=2))
    with pytest.raises(ValueError, match='is not installed'):
        align(model, x_g, real, run=RunSettings(trackers=('tensorbored',)))
    with pytest.raises(ValueError, match='with ids of equal captions'):
        align(model, x_g, real, AlignSettings(loss='symmetric'), ids=torch.arange(32))
    with pytest.raises(ValueError, match='draw a number'):
        align(model, x_g, real, AlignSettings(negatives='all'), run=RunSettings(max_bank=1000))

def test_losses_that_are_no_numbers_change_nothing_and_stop_the_run(real):
    settings = AlignSettings(epochs=5, batch_size=16, most_bad_steps=2)
    model = new_model()
    before = model.proj_gen.weight.detach().clone()
    with pytest.raises(FloatingPointError, match='no number in 3 steps'):
        align(model, x_g * float('nan'), real, settings)
    assert torch.equal(model.proj_gen.weight, before)

def test_adapters_that_take_no_part_are_named():
    import timm
    from gmail_nb.encoders import TimmVisual
    tower = timm.create_model('beit_base_patch16_224', img_size=64, embed_dim=64, depth=2, num_heads=2, num_classes=0)
    beit = Encoder('beit', TimmVisual(tower), nn.Identity(), None, None, 64, 1.)
    targets = ('model.blocks.0.attn.qkv', 'model.blocks.1.attn.proj')
    real = F.normalize(torch.randn(4, 64), dim=-1)
    with pytest.raises(ValueError, match='take no part'):
        align(GenReal(beit, AdapterSettings(targets=targets)), torch.randn(4, 3, 64, 64), real,
              AlignSettings(epochs=1, batch_size=4))

def test_the_model_goes_to_the_device_also_without_a_prefix(real, monkeypatch):
    moved = []
    monkeypatch.setattr(GenReal, 'to', lambda m, device: moved.append(device) or m)
    Alignment(new_model(), x_g, real, AlignSettings())
    assert moved == [torch.device('cpu')]

def test_accelerates_own_precision_counts_for_auto():
    from types import SimpleNamespace
    asked = lambda precision: SimpleNamespace(mixed_precision=precision, device=torch.device('cpu'))
    assert run_precision(AlignSettings(), asked('bf16')) == 'bf16'
    assert run_precision(AlignSettings(precision='no'), asked('bf16')) == 'no'
    with pytest.raises(ValueError, match="'fp16'"): run_precision(AlignSettings(), asked('fp16'))

# over processes, and killed

def launcher(processes):
    return ('-m', 'torch.distributed.run', f'--nproc_per_node={processes}', '--master_port=0',
            '--rdzv_backend=c10d', '--rdzv_endpoint=localhost:0')

def run(forks, out, *more, processes=1):
    "Histories and weights by the name of the alignment."
    out.mkdir(exist_ok=True)
    for done in forks.together(script, out, *more, processes=processes): assert done.status == 0, done.err[-3000:]
    return {p.stem: (json.loads(p.read_text()), load_file(p.with_suffix('.safetensors'))) for p in out.glob('*.json')}

def compare(alone, together):
    for name, (history, weights) in alone.items():
        others, found = together[name]
        assert len(history) == len(others), name
        # sums of another order, which a CPU's kernels decide: 1.1e-4 was seen with AVX2, less with AVX-512
        assert max(abs(a['loss'] - b['loss']) for a, b in zip(history, others)) < 5e-4, name
        for k in weights: # Adam makes much of rounding where a gradient is zero
            torch.testing.assert_close(found[k], weights[k], atol=2e-3, rtol=0, msg=name)
    assert len(alone['even'][0]) == 40 and alone['even'][0][-1]['loss'] < alone['even'][0][0]['loss']
    assert len(alone['stops'][0]) == 12 # three looks, the first the best
    assert alone['tau'][0][-1]['tau'] != pytest.approx(.07, abs=1e-4)

def test_two_processes_follow_the_curve_of_one(forks, tmp_path):
    "With batches that do not divide by two as well; the script makes every gather an error."
    compare(run(forks, tmp_path/'one'), run(forks, tmp_path/'two', processes=2))

def test_when_a_process_fails_the_others_stop_and_say_why(tmp_path):
    "The second of two cannot decode an image; without a word the first would wait for it."
    command = [sys.executable, *launcher(2), script, str(tmp_path), 'fails']
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    assert "stopping, because process 1 failed: ValueError: image 'k7' does not decode" in done.stderr

def test_a_checkpoint_of_another_number_of_processes_is_refused(forks, tmp_path):
    run(forks, tmp_path/'one', tmp_path/'checkpoints')
    for done in forks.together(script, tmp_path, tmp_path/'checkpoints', processes=2):
        assert done.status != 0 and 'was written by 1 processes that trained together, and here are 2' in done.err

@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_when_one_of_two_is_killed_the_other_ends_and_the_same_command_goes_on(forks, tmp_path, victim):
    "It waits for nobody: here without a launcher, which would end it too."
    checkpoints = tmp_path/'checkpoints'
    whole, weights = run(forks, tmp_path/'whole', tmp_path/'others', processes=2)['kept']
    other = forks.killed_in_a_pair(victim, lambda: newest(checkpoints) > 8, tmp_path, checkpoints, script=script)
    assert other.status != 0, other.err[-2000:]
    assert 'another process of this run has ended without a word' in other.err, other.err[-2000:]
    assert 8 < newest(checkpoints) < len(whole)
    killed, found = run(forks, tmp_path/'killed', checkpoints, processes=2)['kept']
    assert killed == whole and all(torch.equal(found[k], weights[k]) for k in weights)

@pytest.mark.slow
def test_three_processes_follow_the_curve_of_one(forks, tmp_path):
    "Of a batch of two, the third process gets no row."
    compare(run(forks, tmp_path/'one'), run(forks, tmp_path/'three', processes=3))

def newest(checkpoints): return max([int(p.name[5:]) for p in checkpoints.glob('step-*')], default=0)

def kill_at_random(forks, tmp_path, kills, seed=0, total=48):
    "Start; kill in or behind a random step, as the checkpoints tell; start again; at last let it run."
    rng, out, checkpoints = random.Random(seed), tmp_path/'killed', tmp_path/'checkpoints'
    out.mkdir()
    whole, weights = run(forks, tmp_path/'whole', tmp_path/'others')['kept']
    for target in sorted(rng.sample(range(1, total - 6), kills)):
        p = forks.start(out, checkpoints, script=script)
        while newest(checkpoints) < target and p.poll() is None: time.sleep(.001)
        time.sleep(rng.uniform(0, .01))
        assert p.poll() is None, 'the run was over before it could be killed'
        os.kill(p.pid, signal.SIGKILL)
        assert p.wait().status == -signal.SIGKILL
        assert target <= newest(checkpoints) < total
    killed, found = run(forks, out, checkpoints)['kept']
    logged = [json.loads(line)['loss'] for line in (checkpoints/'log.jsonl').read_text().splitlines()]
    assert [r['loss'] for r in killed] == [r['loss'] for r in whole] == logged
    assert len(killed) == total and all(torch.equal(found[k], weights[k]) for k in weights)

def test_killed_and_resumed_ends_in_the_same_weights(forks, tmp_path): kill_at_random(forks, tmp_path, 2)

@pytest.mark.slow
def test_twenty_kills(forks, tmp_path): kill_at_random(forks, tmp_path, 20, seed=1)

@pytest.mark.slow
def test_the_command_on_two_processes(tmp_path):
    "`gmail_align` as `accelerate launch` starts it ends where one process ends."
    from gmail_nb.data import emoji
    from gmail_nb.generate import generate
    from gmail_nb.settings import DrawSettings, WorkSettings
    source = tmp_path/'real.parquet'
    drawings = emoji('A', source='noto').select(range(40)).select_columns(['key', 'image', 'captions'])
    drawings.to_parquet(source)
    generate(
        str(source), 'embedded', tmp_path/'generated', DrawSettings(steps=1), work=WorkSettings(show_progress=False)
    )
    for name, n in (('one', 1), ('two', 2)):
        options = ('--adapted-share', '.43', '--validation-share', '.3', '--epochs', '2', '--batch-size', '7',
                   '--equal-captions', 'together', '--out', tmp_path/name)
        start = [sys.executable, *(launcher(n) if n > 1 else ()), '-m', 'gmail_nb.cli.commands', 'align']
        done = subprocess.run([*start, str(source), str(tmp_path/'generated'), *map(str, options)],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    logs = [(tmp_path/name/'log.jsonl').read_text().splitlines() for name in ('one', 'two')]
    one, two = ([json.loads(line) for line in lines] for lines in logs)
    assert len(one) == len(two) and max(abs(a['loss'] - b['loss']) for a, b in zip(one, two)) < 1e-4
    assert (tmp_path/'two'/'card.json').exists()
