"""Alignment of grid tokens: its loss by hand, one pass for tokens and pooled embedding in every kind of tower, the same result
in parts, with a frozen prefix and after a stop, and nothing of it where it is off; then the gap that it closes."""
import json
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from gmail_nb.align import GenReal
from gmail_nb.encoders import Encoder, HFVisual, OpenClipVisual, TimmVisual, encode_images
from gmail_nb.gap import (
    recalls,
    show_token_gap,
    side_by_side,
    token_centroids,
    token_cosines,
    token_distances,
    token_gap_report,
)
from gmail_nb.losses import token_loss
from gmail_nb.runtime import set_seed
from gmail_nb.settings import AdapterSettings, AlignRunSettings, AlignSettings, RunSettings
from gmail_nb.train import (
    Alignment,
    GeneratedSide,
    SharedBlocks,
    align,
    alignment_parameters,
    check_token_pairs,
    checkpoints_in,
    made_from,
)

def weight(item): return 20

# the loss

def by_hand(g, r, how):
    "One image at a time, one token at a time."
    found = []
    for a, b in zip(g.tolist(), r.tolist()):
        def apart(x, y): return sum((p - q)**2 for p, q in zip(x, y))
        own = sum(apart(y, [0] * len(y)) for y in b) / len(b)
        if how == 'position': found.append(sum(map(apart, a, b)) / len(a) / own)
        else:
            there, back = [min(apart(x, y) for y in b) for x in a], [min(apart(x, y) for x in a) for y in b]
            found.append((sum(there) / len(a) + sum(back) / len(b)) / 2 / own)
    return sum(found) / len(found)

@pytest.mark.parametrize('how,there', [('position', 6), ('best', 6), ('best', 4)])
def test_the_loss_is_what_it_is_by_hand(how, there):
    g, r = torch.randn(3, 6, 5), torch.randn(3, there, 5)
    assert token_loss(g, r, how).item() == pytest.approx(by_hand(g, r, how), rel=1e-4)

def test_the_loss_has_its_ends_and_gives_no_gradient_to_the_real_side():
    g, r = torch.randn(4, 9, 8, requires_grad=True), torch.randn(4, 9, 8, requires_grad=True)
    for how in ('position', 'best'):
        assert token_loss(r, r, how) < 1e-5 and token_loss(0 * r, r, how) > .3
        token_loss(g, r, how).backward()
    assert g.grad.abs().sum() > 0 and r.grad is None
    assert token_loss(0 * r, r).item() == pytest.approx(1) and token_loss(g, r, 'best') <= token_loss(g, r)
    assert token_loss(r[:, torch.randperm(9)], r, 'best') < 1e-5 # another order is no distance
    assert token_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)) == 0 # nothing there, and no division by it
    assert token_loss(r.half(), r.half()).dtype == torch.float32

@pytest.mark.parametrize(
    'g,r,how,said',
    [
        ((2, 4, 8), (2, 5, 8), 'position', 'no positions in common'),
        ((2, 4, 8), (3, 4, 8), 'best', 'tokens .* of pairs'),
        ((2, 4, 8), (2, 4, 9), 'position', 'of pairs'),
        ((2, 8), (2, 8), 'best', 'of pairs'),
        ((2, 4, 8), (2, 4, 8), 'near', 'best'),
    ],
)
def test_tokens_that_do_not_belong_together_are_refused(g, r, how, said):
    with pytest.raises(ValueError, match=said): token_loss(torch.zeros(g), torch.zeros(r), how)

# one pass

class Preprocess:
    "A picture of 32 pixels as a tensor."
    def __call__(self, image): return torch.from_numpy(np.array(image.convert('RGB'))).permute(2, 0, 1) / 127.5 - 1
    def __repr__(self): return 'Preprocess(32)'

def vit():
    tower = open_clip.model.CLIP(
        embed_dim=32, vision_cfg=dict(image_size=32, layers=4, width=64, patch_size=8, head_width=32),
        text_cfg=dict(width=64, heads=2, layers=1)).visual
    return OpenClipVisual(tower), 32

def clip():
    config = CLIPVisionConfig(hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
                              image_size=32, patch_size=8, projection_dim=32)
    model = CLIPVisionModelWithProjection(config)
    return HFVisual(model.vision_model, model.visual_projection), 32

def timm_vit():
    model = timm.create_model(
        'vit_tiny_patch16_224', img_size=32, patch_size=8, depth=4, embed_dim=48, num_heads=4, num_classes=0
    )
    return TimmVisual(model), 48

towers = dict(open_clip=vit, transformers=clip, timm=timm_vit)

def model_of(kind='open_clip', **adapters):
    "The same model each time, a little trained, so that its two sides differ."
    set_seed(0)
    tower, dim = towers[kind]()
    model = GenReal(
        Encoder('small', tower, nn.Identity(), Preprocess(), None, dim, 1.0),
        AdapterSettings(**(dict(adapted_share=1 / 2) | adapters)),
    )
    with torch.no_grad():
        for n, p in model.f_g.named_parameters():
            if 'lora_B' in n: p.normal_(std=.02)
    return model

def pixels(n, seed): return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
x_g, x_r = pixels(32, 0), pixels(32, 1)

@pytest.mark.parametrize('kind', towers)
@pytest.mark.parametrize('tuning', ['lora', 'full'])
def test_tokens_and_embedding_of_one_pass_are_those_of_two(kind, tuning):
    "Values and gradients, and every block runs once."
    model = model_of(kind, tuning=tuning)
    side, calls = GeneratedSide(model, AlignSettings(tokens='position')), []
    for b in side._blocks.blocks: b.register_forward_hook(lambda *_: calls.append(1))
    pooled, tokens = side(x_g[:4])
    assert len(calls) == len(side._blocks.blocks) == 4
    assert not any(type(b).__name__ == 'Stored' for b in side._blocks.blocks) # put back
    torch.testing.assert_close(pooled, model.encode_generated(x_g[:4]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tokens, model.generated_tokens(x_g[:4]), atol=1e-5, rtol=1e-4)
    def loss(p, t): return p[:, 0].sum() + t.square().mean()
    names = [n for n, p in side.named_parameters() if p.requires_grad]
    weights = [p for p in side.parameters() if p.requires_grad]
    once = torch.autograd.grad(loss(pooled, tokens), weights, allow_unused=True)
    twice = torch.autograd.grad(
        loss(model.encode_generated(x_g[:4]), model.generated_tokens(x_g[:4])), weights, allow_unused=True
    )
    for n, a, b in zip(names, once, twice):
        assert (a is None) == (b is None), n
        if a is not None: torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=n)

def test_a_tower_that_is_not_trained_has_no_tokens_to_align():
    with pytest.raises(ValueError, match='leaves the tower as it is'): SharedBlocks(model_of(tuning='projections'))

def test_the_blocks_are_put_back_after_a_failure():
    shared = SharedBlocks(model_of())
    before = list(shared.blocks)
    with pytest.raises(RuntimeError):
        with shared.replay(None): raise RuntimeError
    assert list(shared.blocks) == before

# a run

short = AlignSettings(epochs=2, batch_size=16, tokens='position')

@pytest.fixture(scope='module')
def real(): return encode_images(model_of().real_features, x_r)

@pytest.fixture(scope='module')
def real_tokens():
    with torch.no_grad(): return model_of().encoder.image_tokens(x_r).half()

def trained(real, tokens, settings=short, **how):
    "The history, all trained weights in one vector, and the model."
    model = model_of()
    history = align(model, x_g, real, settings, how.pop('evaluate', None), real_tokens=tokens, **how)
    return history, torch.cat([p.detach().flatten() for p in alignment_parameters(model)]), model

@pytest.fixture(scope='module')
def plain(real, real_tokens): return trained(real, real_tokens)

def test_tokens_come_closer_than_by_eq_1_alone(plain, real, real_tokens):
    longer = replace(short, epochs=12, lr=3e-3)
    def apart(m):
        with torch.no_grad(): return token_loss(m.generated_tokens(x_g), real_tokens).item()
    before = apart(model_of())
    alone, both = (
        apart(trained(real, t, s)[2]) for t, s in ((None, replace(longer, tokens='none')), (real_tokens, longer))
    )
    assert both < min(alone, before) - .02
    assert (
        0 < plain[0][0]['token_loss'] < plain[0][0]['loss']
        and 'token_loss' not in trained(real, None, replace(short, tokens='none'))[0][0]
    )


def test_a_step_reads_both_losses_at_once(real, real_tokens, monkeypatch):
    "On a GPU each number that is read is a wait: there is one for loss, norm and the tokens' loss together."
    read, tolist = [], torch.Tensor.tolist
    def watched(x):
        if x.is_floating_point(): read.append(x.numel())
        return tolist(x)
    job = Alignment(model_of(), x_g, real, short, real_tokens=real_tokens)
    monkeypatch.setattr(torch.Tensor, 'tolist', watched)
    row = job.advance()
    assert read == [3] and 0 < row['token_loss'] < row['loss']

def test_the_loss_is_eq_1_and_the_weighted_tokens(real, real_tokens):
    first = {w: trained(real, real_tokens, replace(short, token_weight=w, epochs=1))[0][0] for w in (.5, 2.)}
    eq_1 = trained(real, None, replace(short, tokens='none', epochs=1))[0][0]['loss']
    for w, row in first.items(): assert row['loss'] == pytest.approx(eq_1 + w * row['token_loss'], rel=1e-4)

@pytest.mark.parametrize('loss', ['info_nce', 'symmetric', 'sigmoid'])
def test_a_batch_in_parts_has_the_curve_of_one(loss, real, real_tokens):
    rows = [trained(real, real_tokens, replace(short, loss=loss, tokens='best', accumulation=a))[0] for a in (1, 4)]
    for a, b in zip(*rows):
        assert a['loss'] == pytest.approx(b['loss'], rel=2e-3) and a['token_loss'] == pytest.approx(
            b['token_loss'], rel=2e-3
        )


def test_a_frozen_prefix_and_a_file_of_activations_change_nothing(plain, real, real_tokens, tmp_path):
    for prefix in (True, tmp_path/'prefix.x'):
        torch.testing.assert_close(trained(real, real_tokens, prefix=prefix)[1], plain[1], atol=1e-6, rtol=1e-5)

def test_a_stopped_run_goes_on_to_the_same_bits(plain, real, real_tokens, tmp_path):
    run = RunSettings(checkpoints=str(tmp_path), save_every=1)
    def stop(model): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): trained(real, real_tokens, run=run, evaluate=stop)
    history, weights, _ = trained(real, real_tokens, run=run)
    assert torch.equal(weights, plain[1]) and history == plain[0]
    with pytest.raises(ValueError, match='images or features are others'): trained(real, real_tokens.flip(0), run=run)
    with pytest.raises(ValueError, match='token_weight is None there and 2.0 here'):
        trained(real, real_tokens, replace(short, token_weight=2.), run=run)

def test_without_tokens_a_checkpoint_is_one_of_before(real, tmp_path):
    "Its settings and its data have the names and the fingerprint that earlier versions wrote."
    off = replace(short, tokens='none')
    trained(real, None, off, run=RunSettings(checkpoints=str(tmp_path)))
    there = json.loads((checkpoints_in(tmp_path)[-1]/'state.json').read_text())
    assert not {'tokens', 'token_weight'} & set(there['settings'])
    assert there['data'] == made_from([x_g], real, off, None) != made_from([x_g], real, off, None, real)

def test_tokens_that_are_no_partners_are_refused(real, real_tokens):
    for tokens, how, said in (
        (None, 'position', 'are absent'),
        (real_tokens, 'none', 'are given'),
        (real_tokens[:9], 'best', 'tokens of 9'),
        (real_tokens[..., :8], 'best', 'same tower'),
        (real_tokens[:, :3], 'position', 'no positions'),
    ):
        with pytest.raises(ValueError, match=said):
            Alignment(model_of(), x_g, real, replace(short, tokens=how), real_tokens=tokens)
    check_token_pairs(model_of(), [x_g], real_tokens[:, :3], replace(short, tokens='best'))
    with pytest.raises(ValueError, match='position'): AlignSettings(tokens='positon')
    with pytest.raises(ValueError, match='token_weight'): AlignSettings(token_weight=0)

# files in, a folder out

def test_a_run_on_disk_aligns_tokens_and_its_card_says_so(tmp_path):
    from gmail_nb.data import emoji
    from gmail_nb.runs.align import align_sets
    real = emoji('A', source='noto').select(range(24)).select_columns(['key', 'image', 'captions'])
    drawn = emoji('A', source='fluent').select(range(24)).select_columns(['key', 'image', 'captions'])
    settings = AlignRunSettings(
        AdapterSettings(adapted_share=2 / 7),
        AlignSettings(epochs=1, batch_size=8, tokens='position'),
        validation_share=0.2,
    )
    model = align_sets(real, drawn, 'embedded', tmp_path, settings)
    card = json.loads((tmp_path/'card.json').read_text())
    assert card['settings']['align']['tokens'] == 'position'
    stored = np.load(tmp_path/'real_tokens'/'features.npy', mmap_mode='r')
    assert stored.dtype == np.float16 and stored.shape == (24, 16 * 1280)
    back = GenReal.from_pretrained(tmp_path)
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        torch.testing.assert_close(back.generated_tokens(images), model.generated_tokens(images), atol=1e-4, rtol=1e-3)
    rows = [json.loads(l) for l in (tmp_path/'log.jsonl').read_text().splitlines()]
    assert all(r['token_loss'] > 0 for r in rows)

# the gap

def test_measures_of_the_gap_by_hand():
    g = torch.Generator().manual_seed(0)
    r = torch.randn(30, 4, 6, generator=g)
    x = r + .5 * torch.randn(30, 4, 6, generator=g)
    cosines, apart, means = token_cosines(x, r), token_distances(x, r), token_centroids(x, r)
    assert cosines.shape == apart.shape == (30, 4) and means.shape == (4,)
    assert cosines[3, 1].item() == pytest.approx(F.cosine_similarity(x[3, 1], r[3, 1], dim=0).item(), abs=1e-6)
    assert apart.mean().item() == pytest.approx(token_loss(x, r).item(), rel=1e-5)
    unit = [F.normalize(t[:, 2], dim=-1).mean(0) for t in (x, r)]
    assert means[2].item() == pytest.approx((unit[0] - unit[1]).norm().item(), abs=1e-6)
    torch.testing.assert_close(
        side_by_side(x) @ side_by_side(r).T,
        torch.stack([F.cosine_similarity(x[:, None, t], r[None, :, t], dim=-1) for t in range(4)]).mean(0),
    )


def test_the_report_tells_a_gap_from_a_collapse():
    r = torch.randn(40, 9, 8)
    same, collapsed = token_gap_report(r, r), token_gap_report(r[:1].expand(40, -1, -1), r)
    assert same['token_cosine'] == pytest.approx(1) and same['token_distance'] == 0 == same['token_centroid_distance']
    assert same['token_gen_to_real_recall_at_1'] == 1 and collapsed['token_real_to_gen_recall_at_10'] == 0
    assert set(token_gap_report(r.half(), r.half(), limit=20)) == set(same)
    assert {f'token_{k}' for k in recalls(torch.eye(40), torch.eye(40))} < set(same)
    for bad in (r[:, :4], r[..., 0], r * float('nan')):
        with pytest.raises(ValueError, match='tokens of pairs|not finite'): token_cosines(r, bad)

def test_a_map_is_a_square_where_there_is_one():
    grid, row = (show_token_gap({'a': torch.rand(5, n), 'b': torch.rand(5, n)}) for n in (16, 17))
    assert grid.axes[0].images[0].get_array().shape == (4, 4) and row.axes[0].images[0].get_array().shape == (1, 17)

# folders of before

def test_folders_made_before_there_were_tokens_keep_their_names():
    "Names of a table's steps and of kept features, as version 0.4 made them."
    from gmail_nb.experiments.tables import Aligning, CaptionTuning, folder_name
    from gmail_nb.runtime import fingerprint
    from gmail_nb.settings import DemoSettings, described

    assert (
        folder_name(Aligning()) == 'aligned-b11740beb1'
        and folder_name(CaptionTuning(aligning=Aligning())) == 'captioner-9211a6b57c'
    )
    assert fingerprint(json.dumps(described(DemoSettings()))) == '26b530c540ed6d32'
    here = Aligning()
    tokens = replace(here, settings=replace(here.settings, align=replace(here.settings.align, tokens='best')))
    assert folder_name(tokens) != folder_name(here) and described(tokens)['settings']['align']['tokens'] == 'best'
