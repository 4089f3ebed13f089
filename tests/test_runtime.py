"torchvision, devices, seeds that depend on names alone, and fingerprints."
import hashlib

import numpy as np
import pytest
import torch
from gmail_nb.runtime import (default_device, default_dtype, fingerprint, machine, mend_torchvision, module_fingerprint,
                              noise_generator, set_seed, stable_seed, use_all_cores)

def test_torchvision_imports_and_resizes():
    import torchvision
    assert torchvision.transforms.functional.resize(torch.zeros(3, 8, 8), [4, 4]).shape == (3, 4, 4)
    assert mend_torchvision() == mend_torchvision() # a second call changes nothing

def test_a_cpu_computes_in_float32():
    assert default_dtype('cpu') == torch.float32
    assert default_device().type in machine() or 'no accelerator' in machine() or torch.cuda.is_available()

def test_a_set_number_of_threads_stays(monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    assert use_all_cores() == torch.get_num_threads()

def test_a_seed_is_the_hash_of_its_names():
    assert stable_seed('a', 1) == int.from_bytes(hashlib.sha256(b'["a",1]').digest()[:8], 'big') >> 1
    assert stable_seed('a', 'bc') != stable_seed('ab', 'c')
    assert 0 <= stable_seed('é\n', None, 2.5) < 2**63

def test_noise_does_not_depend_on_order():
    names = [(key, sample) for key in ('1f34e', '1f680') for sample in (0, 1)]
    def draw(n): return torch.randn(16, 16, generator=noise_generator('noise', *n))
    noise, again = {n: draw(n) for n in names}, {n: draw(n) for n in reversed(names)}
    assert all(torch.equal(noise[n], again[n]) for n in names)

def test_global_seeds_repeat():
    set_seed(3)
    a, b = torch.rand(2), np.random.rand()
    set_seed(3)
    assert torch.equal(a, torch.rand(2)) and b == np.random.rand()

def test_equal_contents_have_one_fingerprint():
    assert fingerprint({'a': 1, 'b': [torch.ones(2)]}) == fingerprint({'b': [torch.ones(2)], 'a': 1})
    assert fingerprint(torch.ones(3).bfloat16()) == fingerprint(torch.ones(3).bfloat16())

def test_a_fingerprint_stays_what_it_was():
    "Caches and folders that exist are recognised by these."
    assert fingerprint('a', 1, None, [True, 2.5], {'k': b'x'}) == '0676dcef914ea16e'
    assert fingerprint(torch.arange(3), np.arange(3)) == 'd9652901cd12c38c'

@pytest.mark.parametrize(
    'a, b', [((torch.ones(2, 3),), (torch.ones(3, 2),)), (('a', 'bc'), ('ab', 'c')), ((1,), ('1',))]
)
def test_different_contents_have_two(a, b):
    assert fingerprint(*a) != fingerprint(*b)

def test_one_changed_weight_is_seen():
    layer = torch.nn.Linear(3, 2)
    before = module_fingerprint(layer)
    with torch.no_grad(): layer.bias[0] += 1e-6
    assert before != module_fingerprint(layer)

def test_what_cannot_be_fingerprinted_is_said():
    with pytest.raises(TypeError, match='cannot fingerprint'): fingerprint(object())
