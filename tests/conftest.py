"Settings that must stand before torch is imported, and the order of the tests."
import os

# Two processes with two threads each on two cores are many times slower than one process.
for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'): os.environ[name] = '1'
os.environ['MPLBACKEND'] = 'agg'
os.environ['HF_HUB_OFFLINE'] = '1'         # a test that wants the network must fail, not wait
os.environ['TOKENIZERS_PARALLELISM'] = 'false'

import pytest

import gmail_nb.runtime # mends torchvision, before open_clip or timm are imported by a test

def pytest_collection_modifyitems(items):
    "Longest first, so that the last worker to finish does not start late: what a case weighs is set by its module."
    def weight(item):
        weigh = getattr(item.module, 'weight', None)
        return -weigh(item) if weigh else -30
    items.sort(key=weight)
    for item in items: # one worker a module, which makes its models and folders once; notebooks go one by one
        if item.originalname != 'test_notebook_runs':
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))
