"The page for a GPU, tried in small on a CPU: every comparison in both number formats, and what a machine without one is told."

import json

import pytest
import torch
from torch import nn

import gmail_nb.bench.gpu as gpu
from gmail_nb.bench.comparison import BENCHES, run_bench
from gmail_nb.cli.commands import gmail_bench
from gmail_nb.encoders import open_clip_encoder
from gmail_nb.pipelines import encode_prompts
from miniature import NARROW, make_open_clip

def weight(item): return 40

CPU = torch.device('cpu')
HERE, HALF = (gpu.Target(CPU, dtype, 1e11) for dtype in (torch.float32, torch.bfloat16))
NARROW_NET = dict(block_out_channels=(16, 32), norm_num_groups=8)
UNET = NARROW_NET | dict(
    sample_size=16,
    layers_per_block=1,
    cross_attention_dim=16,
    attention_head_dim=8,
    down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
    up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'),
)
TEXT = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, projection_dim=16)
VAE = NARROW_NET | dict(
    block_out_channels=(16, 16), down_block_types=('DownEncoderBlock2D',) * 2, up_block_types=('UpDecoderBlock2D',) * 2
)
XL = UNET | dict(
    cross_attention_dim=32,
    transformer_layers_per_block=1,
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=64,
)
LLAMA = NARROW | dict(vocab_size=49408, num_key_value_heads=1, max_position_embeddings=128)
# Most CPUs imitate bfloat16, many times slower.
FORMATS = pytest.mark.parametrize('on', [
    pytest.param(HERE, id='float32'), pytest.param(HALF, id='bfloat16', marks=pytest.mark.slow)])

@pytest.fixture
def clip(tmp_path):
    torch.manual_seed(0)
    make_open_clip(tmp_path)
    return open_clip_encoder(f'local-dir:{tmp_path}')

def has_figures(line):
    assert min(line[k] for k in ('ratio', 'share', 'plain_share')) > 0
    return json.loads(json.dumps(line)) == line

@FORMATS
@pytest.mark.parametrize('share', [1., 1/3])
def test_alignment_in_small(clip, on, share):
    line = gpu.compare_alignment('align', clip, on, size=32, batch=8, share=share, steps=2)
    assert has_figures(line) and line['n'] == 8

@FORMATS
def test_tuning_in_small(clip, on):
    assert has_figures(gpu.compare_tuning('tune', clip, on, size=32, batch=8, steps=3))

@FORMATS
def test_captions_in_small(clip, on):
    assert has_figures(gpu.compare_caption_training('train', LLAMA, clip, on, size=32, batch=4, steps=2))
    line = gpu.compare_caption_writing('write', LLAMA, clip, on, size=32, n=3, tokens=4)
    assert has_figures(line) and (on is HALF or line['same'] == 1)

def tiny_sd(): return gpu.sd2_sized(CPU, torch.float32, UNET, TEXT, VAE)
def tiny_sdxl(dtype=torch.float32): return gpu.sdxl_sized(CPU, dtype, XL, TEXT, TEXT, VAE)

@pytest.mark.parametrize('make', [tiny_sd, tiny_sdxl])
def test_both_ways_draw_the_same(make):
    torch.manual_seed(0)
    line = gpu.compare_generation('generate', make(), HERE, n=3, batch_size=2, steps=2, size=32)
    assert has_figures(line) and line['apart'] < .5 and line['failed'] == 0

def test_pictures_that_are_no_numbers_are_counted():
    pipeline = tiny_sd()
    nn.init.constant_(pipeline.vae.decoder.conv_out.weight, float('nan'))
    line = gpu.compare_generation('generate', pipeline, HERE, n=2, batch_size=2, steps=1, size=32)
    assert line['failed'] == 2 and line['apart'] is None and line['ratio'] > 0

def test_weights_are_made_in_their_format():
    pipeline = tiny_sdxl(torch.bfloat16)
    assert {p.dtype for m in (pipeline.unet, pipeline.vae, pipeline.text_encoder_2) for p in m.parameters()} == {
        torch.bfloat16
    }
    assert torch.get_default_dtype() == torch.float32
    assert gpu.llama_sized(LLAMA, 'cpu', torch.bfloat16).dtype == torch.bfloat16

def test_sdxl_without_a_negative_prompt_is_guided_as_the_pipeline_guides_it():
    pipeline = tiny_sdxl()
    pipeline.register_to_config(force_zeros_for_empty_prompt=True) # as stabilityai/stable-diffusion-xl-base-1.0 has it
    ours = encode_prompts(pipeline, ['a cat'], 7.5)[0]['negative_prompt_embeds']
    theirs = pipeline.encode_prompt('a cat', device=CPU, do_classifier_free_guidance=True)[1]
    torch.testing.assert_close(ours, theirs)

def test_operations_are_those_of_the_formula():
    net, x = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False)), torch.randn(5, 8)
    forward = 2 * 5 * (8 * 16 + 16 * 4)
    assert gpu.count_operations(lambda: net(x)) == forward
    assert gpu.count_operations(lambda: net(x).sum().backward()) == 3 * forward - 2 * 5 * 8 * 16 # x needs no gradient

def test_attention_is_counted_under_inference_mode_too():
    q = torch.randn(1, 2, 8, 4)
    def attend():
        with torch.inference_mode(): torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert gpu.count_operations(attend) == 2 * (2 * 2 * 8 * 8 * 4)

@pytest.mark.parametrize(
    'name, peak',
    [
        ('NVIDIA H100 80GB HBM3', 989.4e12),
        ('NVIDIA H100 PCIe', 756e12),
        ('NVIDIA H200', 989.4e12),
        ('NVIDIA A100 80GB PCIe', 312e12),
        ('NVIDIA L40S', 362e12),
        ('NVIDIA L4', 121e12),
        ('NVIDIA H200 NVL', None),
        ('NVIDIA H100 NVL', None),
        ('NVIDIA L40', None),
        ('NVIDIA H100 80GB HBM3 MIG 1g.10gb', None),
        ('Tesla T4', None),
    ],
)
def test_a_peak_belongs_to_one_card(name, peak): assert gpu.known_peak(name) == peak

def test_a_data_sheet_goes_before_a_measurement(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'NVIDIA L4')
    assert gpu.peak_of(torch.device('cuda')) == (121e12, 'data sheet')
    assert gpu.peak_of(CPU, torch.float32, n=64)[1] == 'measured'

def test_losses_that_part_are_shown():
    with pytest.raises(AssertionError, match=r'align: the two ways part, losses \[1.0, 2.0\]'):
        gpu.check_equal('align', [1., 2.], [1., 2.01], HERE)
    gpu.check_equal('align', [1., 2.], [1., 2.01], HALF)

@pytest.mark.skipif(torch.cuda.is_available(), reason='a GPU is here')
def test_a_machine_without_a_gpu_is_told(capsys):
    assert BENCHES['gpu'].at == 'gmail_nb.bench.gpu:gpu_page' and BENCHES['gpu'].cuda
    with pytest.raises(ValueError, match='needs a CUDA device'): run_bench('gpu')
    assert gmail_bench(['gpu']) == 2 and 'needs a CUDA device' in capsys.readouterr().err

def test_a_page_goes_on_behind_what_does_not_fit(monkeypatch):
    def too_large(name): raise torch.OutOfMemoryError
    for name in ('generation_page', 'towers_page', 'captions_page'): monkeypatch.setattr(gpu, name, lambda on: {})
    monkeypatch.setattr(
        gpu,
        'captions_page',
        lambda on: {'write, 405B': too_large, 'write, 1B': lambda name: dict(name=name, ratio=2.0)},
    )
    monkeypatch.setattr(gpu, 'peak_of', lambda *how: (1e12, 'measured'))
    page = gpu.gpu_page(CPU, torch.float32, only='write')
    assert [r['name'] for r in page] == ['write, 405B', 'write, 1B'] and page[0]['said'] == 'does not fit this device'
    assert page[1]['peak_tflops'] == 1 and gpu.gpu_page(CPU, torch.float32, only='align') == []

def test_pages_have_the_published_sizes():
    every = [n for page in (gpu.generation_page, gpu.towers_page, gpu.captions_page) for n in page(HERE)]
    assert len(every) == len(set(every)) == 12

@pytest.mark.cuda
def test_the_page_at_full_size(): assert all('ratio' in line or 'said' in line for line in gpu.gpu_page())
