"""Alignment, text tuning and a probe over many rows of 512 numbers, with seconds of each stage
and memory above the mapped files: million_rows.py FOLDER [ROWS]"""

import gmail_nb.runtime
import json
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from gmail_nb.align import GenReal
from gmail_nb.classification import Labelled, linear_probe
from gmail_nb.encoders import Encoder
from gmail_nb.features import Features
from gmail_nb.settings import AdapterSettings, AlignSettings, ProbeSettings, TuneSettings
from gmail_nb.train import Alignment, Order, epoch_order
from gmail_nb.tune import check_features_fit, check_training_set, as_image_rows, split_pairs, step_order, tune_text

WIDTH, torch_threads = 512, torch.set_num_threads(1)

def anonymous() -> float: # GB that this process holds and that are no file (of Linux)
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(l.split()[1]) for l in lines if l.startswith('RssAnon')) / 1e6

class Peak(threading.Thread):
    "The most that was held while it ran."
    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.going = anonymous(), True
    def run(self):
        while self.going:
            self.most = max(self.most, anonymous())
            time.sleep(.02)

class Images:
    "Small images that are made where they are read."
    def __init__(self, n): self.shape, self.ndim, self.fingerprint = torch.Size((n, 3, 4, 4)), 4, f'{n} images'
    def __len__(self): return self.shape[0]

    def __getitem__(self, index):
        return (index.float()[:, None, None, None] / len(self)).expand(-1, 3, 4, 4).contiguous()


class Said:
    "Captions that are made where they are read."
    def __init__(self, n): self.n = n
    def __len__(self): return self.n

    def __getitem__(self, index):
        return [f'caption {i}' for i in index] if isinstance(index, list) else f'caption {index}'


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(128, 64), nn.Linear(64, WIDTH)
    def forward(self, input_ids): return self.head(self.embedding(input_ids).mean(1))

def letters(texts): return dict(input_ids=torch.tensor([[ord(c) % 128 for c in t.ljust(16)] for t in texts]))

def rows_on_disk(folder, n):
    "Unit features in a file, written in chunks."
    path, g = folder/'features.npy', torch.Generator().manual_seed(0)
    array = np.lib.format.open_memmap(path, 'w+', np.float32, (n, WIDTH))
    for i in range(0, n, 50_000):
        k = min(50_000, n - i)
        array[i:i + k] = F.normalize(torch.randn(k, WIDTH, generator=g), dim=-1).numpy()
    array.flush()
    del array
    mapped = torch.from_numpy(np.load(path, mmap_mode='c'))
    return Features([str(i) for i in range(n)], mapped, dict(content='0'), [])

def measure(folder, n):
    "Seconds for 100,000 rows of each stage, and GB at the most above what stood before."
    torch.manual_seed(0)
    features, times = rows_on_disk(folder, n), {}
    visual = nn.Sequential(nn.Flatten(), nn.Linear(48, WIDTH))
    encoder = Encoder('tiny', visual, Tower(), None, letters, WIDTH, 1 / .07).eval()
    before, peak = anonymous(), Peak()
    peak.start()
    def stage(name, work):
        start = time.perf_counter()
        out = work()
        times[name] = (time.perf_counter() - start) / n * 1e5
        return out
    align = AlignSettings(epochs=1, batch_size=512, negatives=512)
    stage('align: order of an epoch', lambda: epoch_order(n, 0, 0))
    stage('align: all batches', lambda: sum(len(b) for b in Order(n, 512, 0, 1)))
    model = GenReal(encoder, AdapterSettings(tuning='projections'))
    run = stage('align: checks, bank and plan', lambda: Alignment(model, Images(n), features, align))
    stage('align: steps of an epoch', lambda: [run.advance() for _ in range(len(run.plan))])
    aligned = peak.most - before
    s, x, said = (
        TuneSettings('full', steps=n // 512 - 20, batch_size=512, every=10**9, validation_limit=5000),
        as_image_rows(features),
        Said(n),
    )
    stage('tune: checks of features', lambda: check_features_fit(encoder, x))
    stage('tune: validation split', lambda: split_pairs(n, s))
    stage('tune: all batches', lambda: sum(len(b) for b in step_order(n - n // 10, s)))
    stage('tune: all, of an epoch', lambda: tune_text(encoder, features, said, s, checkpoint=folder/'run.pt'))
    rows, few = Labelled(features.mapped, torch.arange(n) % 1000), slice(0, 2000) # ImageNet has 1,281,167
    once = ProbeSettings(strengths=(1.,), max_steps=1)
    stage('probe: a step of 1,000 classes', lambda: linear_probe(
        rows, Labelled(rows.x[few], rows.labels[few]), [str(i) for i in range(1000)], once))
    peak.going = False
    return dict(rows=n, seconds=times, align_gb=aligned, most_gb=peak.most - before, file_gb=n * WIDTH * 4 / 1e9)

if __name__ == '__main__':
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    print(json.dumps(measure(folder, int((sys.argv[2:] or ['1000000'])[0])), indent=1))
