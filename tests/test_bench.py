"Benchmarks in small: both ways agree, every line has its fields, and what cannot be measured says so."
import importlib.util
import json
import subprocess
import sys

import pytest
import torch

import gmail_nb.bench.align as bench_align
import gmail_nb.bench.generate as bench_generate
import gmail_nb.bench.retrieval as bench_retrieval
from gmail_nb.bench.comparison import BENCHES, comparison, dry_bench, function_of, run_bench

def weight(item): return 40

def test_ratio_is_in_our_favour_above_one():
    assert comparison('rate', 6., 2., 'images/s', 1)['ratio'] == 3
    assert comparison('time', 2., 6., 's', 1, higher_is_better=False)['ratio'] == 3

def test_unknown_name_has_a_neighbour():
    with pytest.raises(ValueError, match="did you mean 'generate'"): run_bench('generatr')

def test_every_bench_is_a_function():
    for bench in BENCHES.values(): assert callable(function_of(bench)) and callable(function_of(bench, sizes=True))

def test_a_dry_run_tells_sizes_and_time_of_the_stored_rates():
    rows = {r.where: r for r in dry_bench('generate')}
    assert rows['n 48'].note == 'images' and rows['38 s'].what == 'time'
    assert 'output' not in {r.what for r in rows.values()}
    assert [r.what for r in dry_bench('retrieval', 'out')][-1] == 'output'

def test_the_gpu_is_missing_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    looks = dry_bench('gpu')
    assert looks[0].state == 'missing' and looks[-1].note.startswith('not known')

# generation

def test_days_of_the_paper_stand_beside_our_rate(monkeypatch):
    monkeypatch.setattr(bench_generate, 'bench_generate', lambda: [comparison('generate', 2., 1., 'images/s', 4)])
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    listed = bench_generate.bench_generation()
    assert listed[0]['days_COCO'] == round(560_000 / 2 / 86_400, 2)
    assert set(bench_generate.CAPTION_SETS) == {n[5:] for n in listed[0] if n.startswith('days_')}

@pytest.mark.slow
def test_generation_has_both_number_formats():
    quick = bench_generate.bench_generate(n=4, rounds=1)
    assert {r['name'] for r in quick} == {'generate', 'generate_float32'}
    assert set(quick[0]) == {'name', 'ours', 'plain', 'ratio', 'unit', 'n', 'machine'}

def test_stable_diffusion_has_the_published_size():
    with torch.device('meta'):
        unet, *_ = bench_generate.sd2_parts(bench_generate.SD2_UNET, bench_generate.SD2_TEXT, bench_generate.SD2_VAE)
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6) == 866

# retrieval

@pytest.mark.skipif(not importlib.util.find_spec('clip_benchmark'), reason='clip-benchmark is not installed')
def test_the_stand_in_is_clip_benchmark():
    from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k
    scores, right = made_up_scores()
    for k in (1, 5, 10):
        ours = bench_retrieval.dense_recall_at_k(scores, right, k)
        torch.testing.assert_close(ours, recall_at_k(scores, right, k))

def made_up_scores():
    g = torch.Generator().manual_seed(1)
    scores, right = torch.randn(6, 30, generator=g), torch.rand(6, 30, generator=g) < .3
    right[:, 0] = True
    return scores, right

def test_dense_recall_by_hand():
    scores, right = made_up_scores()
    best = scores.topk(5, 1).indices
    by_hand = right.gather(1, best).sum(1) / right.sum(1)
    torch.testing.assert_close(bench_retrieval.dense_recall_at_k(scores, right, 5), by_hand)

def test_random_features_are_unit_vectors_with_equal_shares():
    images, texts, image_of_text = bench_retrieval.random_features(200, 1000, 64, noise=2)
    assert [x.shape for x in (images, texts, image_of_text)] == [(200, 64), (1000, 64), (1000,)]
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(1000))
    assert torch.bincount(image_of_text).tolist() == [5] * 200

def test_ways_agree_on_every_recall():
    features = bench_retrieval.random_features(200, 1000, 64, noise=2)
    assert bench_retrieval.our_recalls(*features) == bench_retrieval.plain_recalls(*features)

@pytest.mark.slow
def test_retrieval_is_faster_in_less_memory():
    time, memory = bench_retrieval.compare_retrieval(1000, 5000, 128)
    assert time['ratio'] > 3 and memory['ratio'] > 1

@pytest.mark.slow
def test_a_large_gallery_stands_beside_its_matrix():
    big = bench_retrieval.bench_retrieval_large(2000, 10_000, 64)[0]
    assert big['seconds'] > 0 and big['plain'] > 76 and big['n'] == 20_000_000

def test_lack_of_memory_is_said(monkeypatch):
    killed = subprocess.CompletedProcess([], -9, '', 'Killed')
    monkeypatch.setattr(subprocess, 'run', lambda *a, **k: killed)
    with pytest.raises(RuntimeError, match='for lack of memory'): bench_retrieval.measure_ways(10, 10)
    with pytest.raises(RuntimeError, match='-9 is lack of memory'): bench_align.measured_loss('dense', 10, 10)

# alignment

@pytest.mark.slow
def test_memory_is_counted_without_linux_too():
    here = bench_align.measured_loss('dense', 8192, 128)
    # through a shell: the peak that Linux counts for a process begins with that of its parent, and pytest is large
    command = '"$0" -c "$1" dense 8192 128 /absent; true'
    done = subprocess.run(['sh', '-c', command, sys.executable, bench_align._LOSS], capture_output=True, text=True)
    assert json.loads(done.stdout)['mib'] > .5 * here['mib'], done.stderr

def test_every_bound_belongs_to_a_row():
    towers = {f'{name}, {what}' for name in ('embedded', 'ViT-B/32')
              for what in ('cached real side', 'and frozen prefix')}
    assert set(bench_align.MUST) == towers | {'loss memory', 'loss time', 'encoding by 64, freed memory kept'}

def test_streamed_loss_needs_less():
    memory, time = bench_align.compare_loss(8192, 128)
    assert memory['name'] == 'loss memory' and memory['ratio'] > 3 and time['name'] == 'loss time'

def test_batches_double_until_they_do_not_fit():
    def fits(batch):
        if batch > 1000: raise torch.OutOfMemoryError
        return batch
    assert bench_align.largest_batch(fits) == (512, 512)
    assert bench_align.largest_batch(fits, 2048) == (0, None)

def test_rows_of_a_gpu_in_small():
    rows = bench_align.compare_on_gpu('embedded', bench_align.embedded_encoder(), 64, batch=4, most=8)
    assert rows[2]['ours'] == rows[2]['plain'] == 8
    assert all(r['ours'] > 0 for r in rows if r['unit'] == 'images/s')
    assert bench_align.bench_gpu() == [] or torch.cuda.is_available()

def test_a_line_can_be_written_as_json():
    assert json.loads(json.dumps(comparison('rate', 6., 2., 'images/s', 1)))['unit'] == 'images/s'
