"The benchmark of reading in small: both ways make the same tensors, and every stage is measured."
import numpy as np
import torch

from gmail_nb.bench.data import PlainPhotos, Stage, bench_data, cores_for, made_photo, made_photos, transform
from gmail_nb.features import LazyPixels
from gmail_nb.sources import load_captioned

def weight(item): return 30

def test_both_ways_make_the_same_tensors(tmp_path):
    folder = made_photos(tmp_path/'photos', 4, 300)
    plain = torch.stack([PlainPhotos(folder, transform())[i] for i in range(4)])
    assert torch.equal(LazyPixels(load_captioned(folder), transform())[0:4], plain)
    assert made_photo(32, 0) == made_photo(32, 0) != made_photo(32, 1)

def test_every_way_has_a_line():
    lines = bench_data(n=32, sizes=(64,), rounds=1)
    assert [r['name'] for r in lines] == ['threads 64', 'threads_draft 64'] and all(r['ours'] > 0 for r in lines)

def test_cores_are_rounded_up(): assert [cores_for(g, 100) for g in (1, 100, 101)] == [1, 1, 2]

def test_a_stage_counts_memory_without_files(tmp_path):
    np.save(tmp_path/'a.npy', np.ones(2**22))
    with Stage() as mapped: np.load(tmp_path/'a.npy', mmap_mode='r').sum()
    assert mapped.megabytes < 20
