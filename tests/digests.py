"Print a fingerprint of each result of the page on determinism, made in the plain way. `python digests.py`."
import gmail_nb.runtime
import tempfile
from pathlib import Path

import torch
from gmail_nb.bench.determinism import RESULTS
from gmail_nb.runtime import fingerprint

if __name__ == '__main__':
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        for name, make in RESULTS.items(): print(fingerprint(make(Path(tmp)/name)))
