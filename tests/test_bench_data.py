"The benchmark of reading in small: both ways make the same tensors, and every stage is measured."
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from gmail_nb.bench.data import (
    FORMS, MadeCaptions, PlainPhotos, Stage, bench_data, bench_forms, cores_for, held, in_form, made_photo, made_photos,
    measured_stages, read_ours, transform, work_rate)
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

@pytest.mark.parametrize('form', FORMS)
def test_every_form_holds_the_same_photographs(tmp_path, form):
    folder = made_photos(tmp_path/'photos', 5, 300)
    place = in_form(folder, form)
    assert place.exists() and read_ours(place, 2) == 5
    assert torch.equal(LazyPixels(load_captioned(place), transform())[0:5],
                       LazyPixels(load_captioned(folder), transform())[0:5])

def test_forms_are_measured_with_each_number_of_cores():
    found = {(r['form'], r['cores']): r['rate'] for r in bench_forms(n=8, size=64, rounds=1, several=(1, 2))}
    assert set(found) == {(f, k) for f in (*FORMS, 'DataLoader, folder') for k in (1, 2)} and min(found.values()) > 0

def test_work_of_other_processes_is_counted():
    busy = 'import time\nwhile time.process_time() < .3: pass'
    assert work_rate(lambda: subprocess.run([sys.executable, '-c', busy]).returncode + 3) < 3 / .29

def test_made_captions_end(): assert list(MadeCaptions(2)) == ['caption 0', 'caption 1']

def test_trainings_are_measured():
    found = measured_stages(400, 'training_stages')
    assert [r["stage"].partition(":")[0] for r in found] == [
        "align", "align", "tune text", "tune text", "captioner", "captioner", "probe"]
    assert all(r['rows'] == 400 and 0 <= r['megabytes'] < 500 for r in found)

def test_what_a_stage_holds_is_told_by_the_row_and_for_other_rows():
    "From the most rows that were measured; a megabyte of ten thousand rows is about a hundred bytes a row."
    rows = [dict(rows=n, stage='keys', seconds=1., megabytes=m) for n, m in ((1000, 50.), (10_000, 1.))]
    found = held(pd.DataFrame(rows), 10**6).loc['keys']
    assert found['bytes a row'] == 2**20 / 10_000 and found['GB'] == pytest.approx(2**20 / 1e7)

@pytest.mark.slow
def test_trainings_over_a_million_rows_hold_less_than_two_gigabytes():
    "Alignment and tuning over a file of two gigabytes hold less than two beside it; the table is printed."
    for r in (found := measured_stages(1_000_000, 'training_stages')):
        print(f'{r["stage"]:32} {r["seconds"] / 10:8.3f} s for 100,000 rows, {r["megabytes"]:6.0f} MB')
    assert max(r['megabytes'] for r in found if not r['stage'].startswith('probe')) < 2000 # which holds all features
