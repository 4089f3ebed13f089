"The gap: every measure against a plain computation, and what it refuses."
import pytest
import torch
import torch.nn.functional as F

from gmail_nb.gap import (alignment, centroid_distance, gap_report, modality_probe, paired_cosines,
                          project_2d, ranks, recall_at_k, some_pairs, uniformity)

def unit(*shape, seed=0): return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)

@pytest.fixture(scope='module')
def real(): return unit(400, 16)

@pytest.fixture(scope='module')
def generated(real): return F.normalize(real + .9 * unit(1, 16, seed=1) + .03 * unit(400, 16, seed=2), dim=-1)

def test_a_point_is_its_own_nearest(real):
    assert ranks(real, real).sum().item() == 0

def test_ranks_do_not_depend_on_the_chunk_and_are_those_of_sorting(generated, real):
    found = ranks(generated, real)
    assert torch.equal(ranks(generated, real, chunk=7), found)
    assert torch.equal(ranks(generated, real, chunk=50, block=3), found) and torch.equal(
        ranks(generated, real, 32, 1), found
    )
    order = (generated @ real.T).argsort(1, descending=True)
    assert (order == torch.arange(400)[:, None]).int().argmax(1).tolist() == found.tolist()

def test_collapsed_features_find_nothing():
    assert recall_at_k(ranks(torch.ones(20, 4), torch.ones(20, 4)), 10) == 0.
    assert ranks(torch.ones(20, 4), torch.ones(20, 4), chunk=4, block=2).tolist() == [19] * 20

def test_unpaired_and_damaged_features_are_refused(real):
    with pytest.raises(ValueError, match='the gallery has 400'): recall_at_k(ranks(real, real), 401)
    with pytest.raises(ValueError, match=r'\(400, 16\) and \(399, 16\)'): ranks(real, real[1:])
    with pytest.raises(ValueError, match='not finite'): paired_cosines(real * float('nan'), real)
    with pytest.raises(ValueError, match='cannot be split'): modality_probe(real[:3], real[:3])

def test_uniformity_is_that_of_all_distances(real):
    dense = torch.pdist(F.normalize(real.double(), dim=-1)).square().mul(-2).exp().mean().log().item()
    assert abs(uniformity(real) - dense) < 1e-9 and abs(uniformity(real, chunk=7) - dense) < 1e-9
    with pytest.raises(ValueError, match='at least 2'): uniformity(real[:1])

def test_alignment_is_two_minus_two_cosines(generated, real):
    assert alignment(generated, real) == pytest.approx(2 - 2 * paired_cosines(generated, real).mean().item(), abs=1e-5)

def test_a_probe_tells_a_gap_and_no_gap(generated, real):
    assert modality_probe(generated, real) > .9 and abs(modality_probe(unit(400, 16, seed=3), real) - .5) < .1
    assert centroid_distance(real, real) == 0

def test_taking_the_shift_out_closes_the_gap(generated, real):
    closed = F.normalize(generated - (generated - real).mean(0), dim=-1)
    assert paired_cosines(closed, real).mean() > paired_cosines(generated, real).mean()
    assert centroid_distance(closed, real) < centroid_distance(generated, real)

def test_the_report_leaves_out_a_k_without_room(real):
    assert 'gen_to_real_recall_at_5' in gap_report(real[:6], real[:6])
    assert 'gen_to_real_recall_at_10' not in gap_report(real[:6], real[:6])

def test_of_many_pairs_some_are_drawn(generated, real):
    "The time of a report does not grow with the set."
    many_g, many_r = generated.repeat(50, 1), real.repeat(50, 1)
    some = some_pairs(20_000, 300)
    assert (
        len(some) == 300
        and torch.equal(some, some_pairs(20_000, 300))
        and not torch.equal(some, some_pairs(20_000, 300, seed=1))
    )
    assert gap_report(many_g, many_r, limit=300) == gap_report(many_g[some], many_r[some])
    assert gap_report(generated, real) == gap_report(generated, real, limit=400)

def test_an_unknown_projection_is_named(real):
    with pytest.raises(ValueError, match="'umap'"): project_2d(real, 'umapp')
