"The losses: Eq. 1 and its relatives, against their formulas, their gradients and other libraries."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gmail_nb.losses import (Temperature, bank_info_nce, contrastive, cosine_loss, info_nce, loss_by_name,
                             sigmoid_loss, sigmoid_rows, symmetric_info_nce)


def unit(*shape, dtype=torch.float32): return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


@pytest.fixture
def ab(): # two sets of features that are not of unit length
    g = torch.Generator().manual_seed(0)
    return [torch.randn(9, 5, generator=g, dtype=torch.float64) for _ in range(2)]


@pytest.fixture
def banked(): # features, the bank they belong to, and where
    torch.manual_seed(0)
    bank, targets = unit(500, 32), torch.randperm(500)[:64]
    x = F.normalize(bank[targets] + .9 * unit(64, 32), dim=-1).requires_grad_()
    return x, bank, targets


@pytest.fixture
def small(): # in double precision, for `gradcheck`
    torch.manual_seed(0)
    x = unit(6, 5, dtype=torch.float64).requires_grad_()
    tau = torch.tensor(.2, dtype=torch.float64, requires_grad=True)
    return x, unit(11, 5, dtype=torch.float64), torch.tensor([3, 0, 10, 7, 7, 2]), tau


ids = torch.tensor([0, 1, 2, 3, 3, 3, 4, 7, 8, 8, 2])


def test_eq1_is_the_formula_in_a_loop(ab):
    a, b = ab
    def score(i, j): return math.exp(F.cosine_similarity(a[i], b[j], 0) / .07)
    manual = -sum(math.log(score(i, i) / sum(score(i, j) for j in range(9))) for i in range(9)) / 9
    torch.testing.assert_close(info_nce(a, b).item(), manual)


def test_eq1_does_not_depend_on_lengths(ab):
    a, b = ab
    torch.testing.assert_close(info_nce(3 * a, .1 * b), info_nce(a, b))


def test_eq1_gives_the_real_side_no_gradient(ab):
    generated, real = (v.clone().requires_grad_() for v in ab)
    info_nce(generated, real).backward()
    assert real.grad is None and generated.grad.abs().sum() > 0
    assert torch.autograd.gradcheck(lambda v: info_nce(v, ab[1]), (generated,))


def test_eq1_refuses_what_are_no_pairs(ab):
    a, b = ab
    with pytest.raises(ValueError, match=r'\(9, 5\) generated and \(8, 5\) real'): info_nce(a, b[:8])
    with pytest.raises(ValueError, match='positive'): info_nce(a, b, 0)


def test_relatives_equal_those_of_open_clip():
    import gmail_nb.runtime
    from open_clip.loss import ClipLoss, SigLipLoss
    torch.manual_seed(0)
    g, r = unit(64, 32), unit(64, 32)
    torch.testing.assert_close(symmetric_info_nce(g, r), ClipLoss()(g, r, torch.tensor(1 / .07)))
    torch.testing.assert_close(contrastive(g, r), ClipLoss()(g, r, torch.tensor(1 / .07)))
    theirs = SigLipLoss()(g, r, torch.tensor(10.), torch.tensor(-10.))
    torch.testing.assert_close(sigmoid_loss(g, r), theirs)


def test_sigmoid_in_parts_is_the_whole_and_spares_siblings():
    torch.manual_seed(0)
    g, r = unit(6, 5), unit(6, 5)
    halves = [sigmoid_rows(g[i:i + 3], r, torch.arange(i, i + 3)) for i in (0, 3)]
    torch.testing.assert_close(sum(halves) / 2, sigmoid_loss(g, r))
    twins = torch.tensor([0, 0, 1, 2, 3, 4])
    assert sigmoid_rows(g, r, torch.arange(6), bank_ids=twins) < sigmoid_loss(g, r)


def test_cosine_is_one_minus_the_cosine():
    assert abs(cosine_loss(torch.eye(4), torch.eye(4)).item()) < 1e-6
    assert abs(cosine_loss(torch.eye(4), torch.eye(4).roll(1, 0)).item() - 1) < 1e-6


def test_temperature_stays_above_its_bound_and_can_leave_it(ab):
    assert Temperature(.001)().item() >= .01 - 1e-6
    cold = Temperature(.001)
    info_nce(*ab, cold()).backward()
    assert cold.log_scale.grad.abs() > 0


def test_streamed_loss_and_gradient_equal_the_dense_ones(banked):
    x, bank, targets = banked
    dense = F.cross_entropy(F.normalize(x, dim=-1) @ bank.T / .07, targets)
    grad, = torch.autograd.grad(dense, x)
    streamed = bank_info_nce(x, bank, targets, chunk=7)
    streamed_grad, = torch.autograd.grad(streamed, x)
    torch.testing.assert_close(streamed, dense, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(streamed_grad, grad, atol=1e-5, rtol=1e-4)
    tiles = bank_info_nce(x, bank, targets, chunk=7, columns=50)
    torch.testing.assert_close(tiles, dense, atol=1e-5, rtol=1e-5)


def test_the_batch_as_bank_is_eq1(banked):
    x, bank, targets = banked
    ours = bank_info_nce(x, bank[targets], torch.arange(64))
    torch.testing.assert_close(ours, info_nce(x, bank[targets]))


@pytest.mark.parametrize('how', [dict(chunk=4), dict(bank_ids=ids, chunk=5), dict(bank_ids=ids, chunk=4, columns=3)],
                         ids=['rows', 'with ids', 'rows, columns and ids'])
def test_streamed_gradient_is_the_derivative(small, how):
    x, bank, targets, tau = small
    assert torch.autograd.gradcheck(lambda x, t: bank_info_nce(x, bank, targets, t, **how), (x, tau))


def test_bank_in_half_precision_on_disk(banked, tmp_path):
    x, bank, targets = banked
    mapped = torch.from_numpy(np.memmap(tmp_path/'bank', np.float16, 'w+', shape=tuple(bank.shape)))
    mapped.copy_(bank)
    dense = F.cross_entropy(F.normalize(x, dim=-1) @ bank.T / .07, targets)
    torch.testing.assert_close(bank_info_nce(x, mapped, targets, columns=50), dense, atol=1e-2, rtol=1e-2)


def test_bank_refuses_targets_outside_and_other_widths(small):
    x, bank, targets, _ = small
    with pytest.raises(IndexError, match='the bank has 11 rows'): bank_info_nce(x, bank, targets + 1)
    with pytest.raises(ValueError, match='6 wide, the bank 5'): bank_info_nce(unit(2, 6), bank, targets[:2])


def test_unknown_loss_names_the_nearest():
    with pytest.raises(ValueError, match='info_nce'): loss_by_name('infonce')
