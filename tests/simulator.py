"""A second device without hardware: tensors say `sim:0`, compute on the CPU, and refuse to meet tensors of the CPU.

`install()` registers it with PyTorch for the whole process, so tests do it in a process of their own. What crosses
between the devices is counted in `traffic`, and so is each time that the program must wait for the device.
Numbers of no dimension may cross uncounted, as they do on a GPU. Autocast is a fallthrough: a block under it computes
in float32, so what runs here under `precision='bf16'` shows where tensors lie, and nothing of bfloat16.
"""
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = 'sim'
aten = torch.ops.aten

@dataclass
class Traffic:
    "What crossed between the devices."
    to_device:list = field(default_factory=list) # shapes
    to_cpu:list = field(default_factory=list)  # shapes; each makes the program wait
    weights: int = 0 # numbers that `module.to(...)` moved, which is how a model goes to a device
    waits: int = 0  # of `.item()`, `.tolist()`, `bool()`, boolean masks, and copies that do not go ahead

    def clear(self):
        self.to_device, self.to_cpu, self.weights, self.waits = [], [], 0, 0

traffic = Traffic()

@contextmanager
def counted():
    "Count from here on; gives the `Traffic`."
    traffic.clear()
    yield traffic

class SimTensor(torch.Tensor):
    "A tensor that says it is on `sim:0`; `inner` is where it really is."
    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        with torch.inference_mode(False): # made within inference mode it could not be dispatched
            made = torch.Tensor._make_wrapper_subclass(
                cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
                dtype=inner.dtype, layout=inner.layout, device=torch.device(NAME, 0), requires_grad=requires_grad)
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        watch = sys.getprofile() # of `device_cases.py`, which wants none of the many calls in here
        if not watch: return run(func, args, kwargs or {})
        sys.setprofile(None)
        try: return run(func, args, kwargs or {})
        finally: sys.setprofile(watch)

    def __repr__(self): return f'SimTensor({self.inner!r})'
    def tolist(self): return self.cpu().tolist()

    @property
    def data(self): return torch.Tensor.data.__get__(self)
    @data.setter
    def data(self, value): # what is inside changes too
        torch.Tensor.data.__set__(self, value)
        self.inner = value.inner

    def __deepcopy__(self, memo):
        if id(self) in memo: return memo[id(self)]
        made = SimTensor(self.detach().inner.clone())
        if isinstance(self, torch.nn.Parameter): made = torch.nn.Parameter(made, self.requires_grad)
        else: made.requires_grad_(self.requires_grad)
        return memo.setdefault(id(self), made)

def on_sim(device): return device is not None and torch.device(device).type == NAME
def inner(x): return x.inner if isinstance(x, SimTensor) else x
def outer(x): return SimTensor(x) if isinstance(x, torch.Tensor) and not isinstance(x, SimTensor) else x

WAITS = {aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default, aten.nonzero.default,
         aten.masked_select.default}
# an index may come from the CPU, as on a GPU; it crosses, and is counted
INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}

def refuse_mixture(func, tensors):
    "RuntimeError, as a GPU raises it, for tensors of both devices."
    foreign = [t for t in tensors if not isinstance(t, SimTensor)]
    for t in foreign:
        if t.dim() and func not in INDEX:
            raise RuntimeError(
                f'{func}: expected all tensors to be on {NAME}:0, but one of shape {tuple(t.shape)} is on the CPU'
            )
        if t.dim():
            traffic.to_device.append(tuple(t.shape))
            traffic.waits += 1 # an index is copied before the program goes on

def wait(func, tensors):
    masks = func in INDEX and any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])
    if func in WAITS or masks: traffic.waits += 1

def copied(target, source, ahead=False):
    "`target.copy_(source)`, across the devices or within one."
    if isinstance(target, SimTensor) != isinstance(source, SimTensor): cross(source, ahead)
    inner(target).copy_(inner(source))
    return target

def cross(source, ahead=False): # ahead: the program goes on meanwhile
    if moving:
        traffic.weights += source.numel()
        return
    if isinstance(source, SimTensor):
        traffic.to_cpu.append(tuple(source.shape))
        traffic.waits += not ahead
    elif source.dim():
        traffic.to_device.append(tuple(source.shape))
        traffic.waits += not ahead

def moved(x, kwargs):
    "`x.to(device, dtype)`: a new tensor where it is asked for."
    device, there = kwargs.pop('device', None), isinstance(x, SimTensor)
    to_sim = there if device is None else on_sim(device)
    if there != to_sim: cross(x, kwargs.get('non_blocking', False))
    out = aten._to_copy.default(inner(x), **kwargs)
    return outer(out) if to_sim else out

def run(func, args, kwargs):
    "Compute on the CPU what was asked of the device."
    if torch.is_inference_mode_enabled(): # there `x.to(...)` and its like arrive whole
        out = func.decompose(*args, **kwargs)
        if out is not NotImplemented: return out
    if func is aten.copy_.default: return copied(*args[:3])
    if func is aten._to_copy.default: return moved(args[0], dict(kwargs))
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    refuse_mixture(func, tensors)
    wait(func, tensors)
    device = kwargs.get('device')
    here = dict(kwargs, device=torch.device('cpu')) if on_sim(device) else kwargs
    generator = kwargs.get('generator')
    if generator is not None and generator.device.type != NAME:
        raise RuntimeError(f'{func}: expected a generator of {NAME}, found one of the CPU')
    out = func(*pytree.tree_map(inner, args), **pytree.tree_map(inner, here))
    if device is not None and not on_sim(device): return out
    return return_and_correct_aliasing(func, args, kwargs, pytree.tree_map(outer, out))

class Backend: # what torch asks the module of a device for
    def is_initialized(self): return True
    def is_available(self): return True
    def current_device(self): return 0
    def device_count(self): return 1
    def set_device(self, device): pass
    def synchronize(self, device=None): traffic.waits += 1
    def _is_in_bad_fork(self): return False
    def manual_seed(self, seed): pass     # numbers are drawn by the CPU's generator
    def manual_seed_all(self, seed): pass
    def get_rng_state(self, device=None): return torch.get_rng_state()
    def set_rng_state(self, state, device=None): torch.set_rng_state(state)
    def get_amp_supported_dtype(self): return [torch.bfloat16, torch.float16]
    def get_device_properties(self, device=None): return None
    def empty_cache(self): pass
    def memory_allocated(self, device=None): return 0

kept = [] # libraries live as long as what they registered

# what makes a tensor from nothing; all others (zeros, full, randn) fill an empty one
FACTORIES = (
    'empty.memory_format',
    'empty_strided',
    'arange',
    'arange.start',
    'arange.start_step',
    'eye',
    'eye.m',
    'linspace',
    'randperm',
    'randperm.generator',
    'scalar_tensor',
)

def factory(name):
    base, _, overload = name.partition('.')
    func = getattr(getattr(aten, base), overload or 'default')
    def make(*args, **kwargs): return SimTensor(func(*args, **dict(kwargs, device='cpu', pin_memory=False)))
    return make

moved_module, moving = torch.nn.Module.to, [] # moving: what is on its way

def keep_ties(self, *args, **kwargs):
    "`module.to(...)`. A weight with two names becomes two here, which on a GPU it does not: it is made one again."
    names, known = {}, list(self.named_parameters(remove_duplicate=False)) # held, or another gets its `id`
    for name, p in known: names.setdefault(id(p), []).append(name)
    moving.append(self)
    try: out = moved_module(self, *args, **kwargs)
    finally: moving.pop()
    for first, *others in names.values():
        for name in others:
            module, last = out.get_submodule(name.rpartition('.')[0]), name.rpartition('.')[2]
            if getattr(module, last) is not out.get_parameter(first): setattr(module, last, out.get_parameter(first))
    return out

def copy_from(source, target, non_blocking=False): return copied(target, source, non_blocking)

def install():
    "Register the device, once in a process."
    if kept: return
    _setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    library = torch.library.Library('aten', 'IMPL')
    for name in FACTORIES: library.impl(name, factory(name), 'PrivateUse1')
    library.impl('_copy_from', copy_from, 'PrivateUse1')
    autocast = torch.library.Library('_', 'IMPL')
    autocast.fallback(torch.library.fallthrough_kernel, 'AutocastPrivateUse1')
    kept.extend([library, autocast])
    torch.autograd.set_multithreading_enabled(False)
    torch.nn.Module.to = keep_ties
    for kernel in ('flash', 'mem_efficient', 'cudnn'): getattr(torch.backends.cuda, f'enable_{kernel}_sdp')(False)
