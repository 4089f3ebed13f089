"Unseen concepts and fair targets: what each arm learns from, what intervals allow, and which targets heads have seen."
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gmail_nb.data import emoji
from gmail_nb.encoders import load_encoder
from gmail_nb.experiments import chain, fair, unseen
from gmail_nb.experiments.demo import Side
from gmail_nb.experiments.protocol import GOOD, arm_record, chain_settings
from gmail_nb.retrieval import WAYS
from gmail_nb.settings import ProofSettings, TuneSettings

def weight(item): return 40

HEAD = dict(steps=16, lr=3e-3)

def rows(n, seed):
    return F.normalize(torch.randn(n, 256, generator=torch.Generator().manual_seed(seed)), dim=-1)

def side(n, word, seed): # captions that no other side has
    keys, captions = [f'{word}{i}' for i in range(n)], [f'{word} {i}' for i in range(n)]
    return Side(keys, captions, torch.zeros(1, n, 1), rows(n, seed), rows(n, seed + 1), None)

def settings(): return chain_settings(ProofSettings(), GOOD, 0, HEAD)

def record_of(arm, right, seed=0, test='seen', n=60):
    "An arm that answers all questions of the first concepts, and none of the others."
    ranks = torch.full((n,), 50)
    ranks[:right] = 0
    return arm_record(GOOD, arm, seed, test, dict.fromkeys(WAYS, ranks))

# what is kept of unseen concepts

def test_an_average_lies_between_its_heads_and_changes_neither():
    base, tuned = nn.Linear(3, 2), nn.Linear(3, 2)
    kept = [p.clone() for h in (base, tuned) for p in h.parameters()]
    for share in (0, 1/4, 1/2, 1):
        out = unseen.average_head(base, tuned, share)
        for p, b, t in zip(out.parameters(), base.parameters(), tuned.parameters()):
            torch.testing.assert_close(p, share * b + (1 - share) * t)
    assert all(torch.equal(p, k) for p, k in zip([*base.parameters(), *tuned.parameters()], kept))

@pytest.fixture
def tunings(monkeypatch):
    "What text heads are tuned on, in place of tuning them: each gets weights of its own."
    made = []
    def tuned(encoder, features, captions, how, inputs=None):
        made.append((features, list(captions), how, inputs))
        head = nn.Linear(2, 2)
        with torch.no_grad(): [p.fill_(len(made)) for p in head.parameters()]
        return SimpleNamespace(text=head)
    monkeypatch.setattr(unseen, 'tune_text', tuned)
    monkeypatch.setattr(unseen, 'head_module', lambda text: text)
    def inputs(encoder, a, b):
        of_b, of_a = rows(len(b.keys), 9), rows(len(a.keys), 8)
        return {'B': (b.captions, of_b), 'BA': (b.captions + a.captions, torch.cat([of_b, of_a]))}
    monkeypatch.setattr(unseen, 'side_inputs', inputs)
    return made

def test_every_way_learns_from_what_it_says(tunings):
    base = nn.Linear(2, 2)
    with torch.no_grad(): [p.fill_(0.) for p in base.parameters()]
    a, b = side(5, 'a', 10), side(7, 'b', 20)
    x = dict(b_aligned=rows(7, 1), b_generated=rows(7, 2), a_real=a.real_features)
    encoder = SimpleNamespace(text=SimpleNamespace(head=base))
    heads = unseen.kept_heads(chain.Chain(encoder, a, b, x, {}, GOOD, 0, settings()))
    assert {*heads} == {unseen.kept_arm(w) for w in unseen.WAYS_TO_KEEP if 'LoRA' not in w} | {*unseen.BESIDE_THEM}
    by = {i: t for i, t in enumerate(tunings, 1)} # a head holds the number of its tuning
    def tuning(arm, times=1): return by[round(times * heads[arm][0].weight[0, 0].item())]
    features, captions, how, inputs = tuning(unseen.kept_arm('A replayed'))
    assert captions == b.captions + a.captions and torch.equal(features, torch.cat([x['b_aligned'], x['a_real']]))
    assert how == settings().tune and len(inputs) == 12
    features, captions, how, _ = tuning(unseen.kept_arm('a tenth of the rate'))
    assert torch.equal(features, x['b_aligned']) and how == replace(settings().tune, lr=settings().tune.lr / 10)
    assert heads[unseen.kept_arm('a tenth of the rate')][1] == dict(steps=16, lr=pytest.approx(3e-4))
    features, captions, _, inputs = tuning('A alone')
    assert torch.equal(features, x['a_real']) and captions == a.captions and torch.equal(inputs, rows(5, 8))
    features, captions, how, _ = tuning('indiscriminate, half of the base', 2)
    assert torch.equal(features, x['b_generated']) and captions == b.captions and how == settings().tune
    for way, share in unseen.AVERAGES.items():
        features, *_ = tuning(unseen.kept_arm(way), 1 / (1 - share))
        assert torch.equal(features, x['b_aligned'])

def test_lora_leaves_the_head_and_is_tested_through_its_own_tower(monkeypatch):
    encoder, seen = load_encoder('embedded'), []
    head, query = encoder.text.head.weight.clone(), next(iter(encoder.text.parameters())).clone()
    b = side(12, 'word', 0)
    def inputs(e, captions):
        seen.append((e, list(captions)))
        return torch.zeros(len(captions), e.text.head.in_features)
    monkeypatch.setattr(unseen, 'head_inputs', inputs)
    tests = {t: chain.Test(rows(n, 3), None) for t, n in (('seen', 12), ('unseen', 130))}
    s = replace(settings(), tune=replace(settings().tune, steps=8, batch_size=4))
    whole = chain.Chain(encoder, None, b, dict(b_aligned=rows(12, 5)), tests, GOOD, 0, s)
    records = unseen.lora_records(whole)
    how = unseen.lora_tune(s)
    assert (how.tuning, how.steps, how.batch_size, how.lr) == ('lora', 1, 2, TuneSettings().lr)
    assert {r['arm'] for r in records} == {'gmail, LoRA in the tower'}
    assert records[0]['tune'] == dict(steps=1, lr=how.lr)
    tower = seen[0][0].text
    assert tower is not encoder.text and torch.equal(tower.head.weight, head)
    assert any(not torch.equal(p, q) for p, q in zip(tower.parameters(), encoder.text.parameters()))
    assert torch.equal(encoder.text.head.weight, head)
    assert torch.equal(next(iter(encoder.text.parameters())), query)
    assert [len(c) for _, c in seen] == [12, 130] and seen[1][1] == list(emoji('unseen', source='twemoji')['label'])

def made_up(way, named, others):
    "Two chains whose arms answer so many concepts of 60: named ones, and others."
    out = []
    for seed in range(2):
        for arm, (n, u) in dict(base=(10, 40), gmail=(30, 30), **{unseen.kept_arm(way): (named, others)}).items():
            out += [record_of(arm, n, seed, 'seen'), record_of(arm, u, seed, 'unseen')]
    return out

@pytest.mark.parametrize('named, others, safe', [(30, 40, True), (40, 44, True), (30, 30, False), (10, 40, False)])
def test_what_loses_neither_is_what_the_intervals_say(named, others, safe):
    "One way keeps both; one keeps no unseen concept that gmail lost; one keeps them and loses what was named."
    records = made_up('A replayed', named, others)
    assert unseen.finished_ways(records) == ['gmail, A replayed']
    *_, last = unseen.kept_sentences(records)
    assert last.endswith('with: gmail, A replayed.' if safe else 'with: none of them.')
    row = unseen.kept_table(records)[-1]
    assert row[0] == 'gmail, A replayed' and row[4].startswith(f'{100 * (others - 30) / 60:+.1f}') and row[-1] == '2'

# fair targets

def test_blind_heads_have_seen_the_seen_targets_and_no_unseen_one():
    part = ProofSettings().validation_part
    keys, seen = list(emoji('A', source='noto')['key']), set(chain.seen_drawings(part)[2])
    for seed in range(2):
        found = {k: {keys[i] for i in v} for k, v in fair.target_indices(keys, seed, part).items()}
        assert found['seen'] <= seen and not found['unseen'] & seen and len(found['seen']) == len(found['unseen']) > 100

def test_each_alignment_has_its_own_targets(monkeypatch):
    called, names = [], ('blind', 'ordinary')
    def aligned(encoder, some, b, s):
        called.append((encoder.name, some.keys, some.real_features, s))
        return rows(7, len(called))
    monkeypatch.setattr(fair, 'aligned_on', aligned)
    monkeypatch.setattr(fair, 'encode_images', lambda encode, pixels, **more: rows(7, 50))
    encoders = {n: SimpleNamespace(name=n, encode_image=None) for n in names}
    ordinary = side(12, 'a', 1)
    sides = dict(ordinary=ordinary, blind=replace(ordinary, real_features=rows(12, 77)))
    chosen = dict(unseen=[0, 3, 5, 7, 8, 9], seen=[1, 2, 4, 6, 10, 11])
    s = replace(settings(), align_captions=12, validation_captions=2)
    made = fair.fair_features(encoders, sides, side(7, 'b', 3), chosen, s)
    assert [*made] == ['blind heads, not aligned', *(fair.fair_arm(*f) for f in fair.FAIR_ALIGNED)]
    assert [h for h, _ in made.values()] == ['blind', 'blind', 'blind', 'ordinary']
    for (heads, targets), (name, keys, real, how) in zip(fair.FAIR_ALIGNED, called):
        assert name == heads and keys == [ordinary.keys[i] for i in chosen[targets]]
        assert torch.equal(real, sides[heads].real_features[chosen[targets]]) and how.align_captions == 6

def test_a_difference_of_benefits_is_one():
    arms = {'indiscriminate': 10, fair.fair_arm('ordinary', 'unseen'): 22, fair.fair_arm('blind'): 6,
            fair.fair_arm('blind', 'unseen'): 12, fair.fair_arm('blind', 'seen'): 24}
    records = [record_of(arm, right, seed) for arm, right in arms.items() for seed in range(3)]
    added = {f: fair.fair_benefit(records, *f) for f in fair.FAIR_ALIGNED}
    assert [(round(60 * d.value), n) for d, n in added.values()] == [(6, 3), (18, 3), (12, 3)]
    first, seen, ordinary = fair.FAIR_ALIGNED
    assert round(60 * fair.fair_difference(records, first, seen)[0].value) == -12
    assert round(60 * fair.fair_difference(records, first, ordinary)[0].value) == -6
    said = fair.fair_sentences(records)
    assert 'unseen targets add less, by -20.0' in said[1] and 'by -10.0' in said[2]
    assert [r[-1] for r in fair.fair_table(records)[1:]] == ['3'] * 3

def test_chains_are_paired_by_seed():
    "An arm that a chain lacks takes the chain out of the difference, and no other stands in."
    records = [record_of(fair.fair_arm('blind'), 6, s) for s in (0, 1)]
    records.append(record_of(fair.fair_arm('blind', 'unseen'), 12, 1))
    assert fair.fair_benefit(records, 'blind', 'unseen')[1] == 1
    assert fair.fair_difference(records, *fair.FAIR_ALIGNED[:2]) == (None, 0)

def test_a_page_without_a_chain_says_so():
    for show in (unseen.show_kept, fair.show_fair):
        with pytest.raises(ValueError, match='gmail_experiment'): show([])
    assert unseen.kept_sentences([]) == fair.fair_sentences([]) == ['No chain of this page is stored yet.']
    assert len(unseen.kept_table([])) == len(fair.fair_table([])) == 1
