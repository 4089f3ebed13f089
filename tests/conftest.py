"Settings that must stand before torch is imported, and the order of the tests."
import os

# Two processes with two threads each on two cores are many times slower than one process.
for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'): os.environ[name] = '1'
os.environ['MPLBACKEND'] = 'agg'
os.environ['HF_HUB_OFFLINE'] = '1'         # a test that wants the network must fail, not wait
os.environ['TOKENIZERS_PARALLELISM'] = 'false'

import pytest
from faults import Zygote
from xdist.scheduler import LoadScopeScheduling

import gmail_nb.runtime # mends torchvision, before open_clip or timm are imported by a test

@pytest.fixture(scope='session')
def forks(tmp_path_factory):
    "A process that has imported the package and runs commands, or functions of tests, each in a fork of itself."
    found = Zygote(tmp_path_factory.mktemp('forks'), PYTHONHASHSEED='1')
    yield found
    found.close()

def pytest_collection_modifyitems(items):
    "Longest first, so that the last worker to finish does not start late: what a case weighs is set by its module."
    def weight(item):
        weigh = getattr(item.module, 'weight', None)
        return -weigh(item) if weigh else -30
    items.sort(key=weight)

def pytest_xdist_make_scheduler(config, log):
    "One worker a module, which makes its models and folders once; the notebooks go one by one."
    class ByModule(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return nodeid if '::test_notebook_runs[' in nodeid else nodeid.split('::')[0]
    return ByModule(config, log)
