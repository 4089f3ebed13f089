"Caption metrics: numbers counted by hand, refusals by name, intervals of corpus scores."
import importlib.util
import os
import unittest.mock

import numpy as np
import pytest

from gmail_nb.caption_metrics import (Score, WordVectors, bleu, check_captions, cider, clip_scores, counting_scores,
    lcs_length, rouge_l, score_captions, score_difference, score_interval, tokenized, transport, wmd,
    word_movers_distance)
from gmail_nb.data import emoji
from gmail_nb.encoders import embedded_encoder, encode_images, encode_texts

H, R = 'the cat the cat on'.split(), 'the cat sat on the mat'.split()
TWO = [['red', 'ball'], ['blue', 'cube']]
ALONE = [[t] for t in TWO]

def close(a, b, eps): np.testing.assert_allclose(a, b, rtol=0, atol=eps)

@pytest.fixture(scope='module')
def vectors(): return WordVectors()

@pytest.fixture(scope='module')
def drawn(): return emoji('B', source='twemoji')

@pytest.fixture(scope='module')
def references(drawn): return {k: list(c) for k, c in zip(drawn['key'], drawn['captions'])}

@pytest.mark.parametrize('hypotheses, refs, said', [
    ({'a': 'x'}, {'b': ['y']}, "no hypothesis for 'b'; no references for 'a'"),
    ({'a': ' '}, {'a': ['y']}, "empty for 'a'"),
    ({'a': 'x'}, {'a': 'y'}, "a string for 'a'"),
    ({'a': 'x'}, {'a': ['y', '']}, 'no references, or an empty one'),
    ({'a': 'x'}, {'a': []}, 'no references, or an empty one'),
    ({}, {}, 'nothing to score'),
    ({str(i): '' for i in range(10)}, {str(i): ['x'] for i in range(10)}, 'and 7 more')])
def test_what_would_change_a_score_is_refused_with_its_keys(hypotheses, refs, said):
    with pytest.raises(ValueError, match=said): check_captions(hypotheses, refs)

def test_bleu_is_what_one_counts_by_hand():
    b1, b2, *_ = bleu([H], [[R]])
    close([b1.value, b2.value], [4/5 * np.exp(-.2), (4/5 * 1/4)**.5 * np.exp(-.2)], 1e-7)
    close([s.value for s in bleu([R], [[R, H]])], [1.] * 4, 1e-7)
    assert bleu([[]], [[R]])[0].value == 0

def test_bleu_of_a_corpus_is_no_mean_of_captions():
    pair = bleu([H, R], [[R], [R]])[1]
    assert abs(pair.value - pair.each.mean()) > .01

def test_rouge_is_what_one_counts_by_hand():
    p, q = 3/5, 3/6
    assert lcs_length(H, R) == 3
    close(rouge_l([H], [[R]]).value, (1 + 1.44) * p * q / (q + 1.44 * p), 1e-9)
    assert rouge_l([['x']], [[R]]).value == 0

def test_cider_of_equal_captions_of_two_words_is_half_of_ten(): close(cider(TWO, ALONE).each, [5., 5.], 1e-9)

def test_cider_of_one_word_of_two_has_a_cosine_of_a_half_over_four_lengths():
    close(cider([['red', 'cube'], ['blue', 'cube']], ALONE).each[0], 10 * .5 / 4, 1e-9)

def test_cider_clips_a_repeated_word_and_lowers_another_length():
    repeated = [['red'] * 4, ['blue', 'cube']] # clipped to 1*1 / (4 * sqrt 2), length differs by 2
    close(cider(repeated, ALONE).each[0], 10 / 4 / (4 * 2**.5) * np.exp(-4 / 72), 1e-9)
    close(cider(repeated, ALONE, plain=True).each[0], 10 / 4 / 2**.5, 1e-9)

def test_cider_of_a_single_image_is_zero(): assert cider([['red']], [[['red']]]).value == 0

def test_words_travel_less_far_to_a_puppy_than_to_a_car(vectors):
    near, far = (word_movers_distance(t.split(), 'a dog on grass'.split(), vectors)
                 for t in ('a puppy on grass', 'a car on grass'))
    assert 0 < near < far
    one = word_movers_distance(['dog'], ['cat'], vectors)
    close(one, float(np.linalg.norm(vectors('dog') - vectors('cat'))), 1e-5)
    assert wmd([[]], [[['x']]], vectors).value == 0

def test_transport_is_the_same_with_and_without_pot(vectors):
    a, b, cost = np.array([.5, .5]), np.array([.25, .75]), np.array([[0., 1.], [2., .5]])
    texts = 'a puppy on grass'.split(), 'a dog on grass'.split()
    near, find = word_movers_distance(*texts, vectors), importlib.util.find_spec
    close(transport(a, b, cost), .25 * 0 + .25 * 1 + .5 * .5, 1e-9)
    with unittest.mock.patch('importlib.util.find_spec', lambda name: None if name == 'ot' else find(name)):
        close(transport(a, b, cost), .5, 1e-9)
        close(word_movers_distance(*texts, vectors), near, 1e-6)

def test_clip_scores_are_cosines_and_prefer_the_right_caption(drawn):
    encoder, few = embedded_encoder(), drawn.select(range(0, 96, 12))
    labels, captions = list(few['label']), [list(c) for c in few['captions']]
    x = encode_images(encoder.encode_image, list(zip(few['key'], few['image'])), encoder.preprocess)
    right = clip_scores(labels, captions, x, encoder, prompt='')
    wrong = clip_scores(labels[1:] + labels[:1], captions, x, encoder, prompt='')
    assert right[0].value > wrong[0].value and right[1].value > wrong[1].value
    cos = (encode_texts(encoder, labels) * x).sum(-1).clamp(min=0).numpy()
    close(right[0].each, 2.5 * cos, 1e-4)
    close(right[1].each, 2 * 2.5 * cos / (2.5 * cos + 1), 1e-4) # the label is its own reference
    with pytest.raises(ValueError, match='features of 7 images'): clip_scores(labels, [labels] * 8, x[:7], encoder)

def test_scores_that_need_java_are_named_as_absent_without_it(references, vectors, monkeypatch):
    monkeypatch.setenv('PATH', '')
    first = dict(list(references.items())[:8])
    encoder = embedded_encoder()
    x = encode_texts(encoder, [c[0] for c in first.values()])
    result = score_captions({k: c[0] for k, c in first.items()}, first, x, encoder, prompt='', vectors=vectors)
    assert set(result.absent) == {'METEOR', 'SPICE'} and not {'METEOR', 'SPICE'} & set(result.scores)
    close(result['BLEU-1'].value, 1, 1e-6)
    with pytest.raises(KeyError, match='needs'): result['METEOR']
    with pytest.raises(KeyError, match="no score 'BLEU'"): result['BLEU']
    assert '| CIDEr |' in result._repr_markdown_() and 'absent' in repr(result)

@pytest.mark.slow
def test_scores_fall_for_every_way_to_spoil_a_caption_and_order_matters_to_some(references, vectors):
    some, rng = dict(list(references.items())[:200]), np.random.default_rng(0)
    long = {k: v[1] for k, v in some.items()}
    def drop(t, n): return ' '.join(t.split()[:-n] or t.split()[:1])

    ways = dict(
        whole=long,
        one={k: drop(t, 1) for k, t in long.items()},
        three={k: drop(t, 3) for k, t in long.items()},
        shuffled={k: ' '.join(rng.permutation(t.split())) for k, t in long.items()},
        twice={k: f'{t} {t}' for k, t in long.items()},
        anothers=dict(zip(long, [*long.values()][1:] + [*long.values()][:1])),
    )
    def all_scores(h):
        cut = tokenized(h, {k: v[1:] for k, v in some.items()})
        return {s.name: s.value for s in [*counting_scores(*cut), wmd(*cut, vectors)]}
    table = {w: all_scores(h) for w, h in ways.items()}
    assert table['shuffled']['BLEU-4'] < table['shuffled']['BLEU-1'] and abs(table['shuffled']['WMD'] - 1) < 1e-6
    shown = ('BLEU-1', 'BLEU-4', 'ROUGE-L', 'CIDEr', 'WMD')
    assert all(t[n] <= table['whole'][n] + 1e-9 for t in table.values() for n in shown)
    assert table['anothers']['CIDEr'] < .3 * table['whole']['CIDEr']

@pytest.fixture(scope='module')
def captioners(references):
    "Scores of captioners that are right about a share of 200 images, three seeds each."
    some = dict(list(references.items())[:200])
    def sometimes(p, seed):
        g, k = np.random.default_rng(seed), list(some)
        return {x: some[x][0] if g.random() < p else some[k[(i + 31) % len(k)]][0] for i, x in enumerate(k)}
    def scores(p, j): return {s.name: s for s in counting_scores(*tokenized(sometimes(p, 10 * j + int(100 * p)), some))}
    by = {p: [scores(p, j) for j in range(3)] for p in (.3, .31, .4)}
    return lambda p, name: [run[name] for run in by[p]]

def test_a_difference_that_is_large_enough_is_told_and_a_small_one_is_not(captioners):
    d = score_difference(captioners(.4, 'CIDEr'), captioners(.3, 'CIDEr'), 300)
    assert d.low > 0 and d.low < d.value < d.high
    d = score_difference(captioners(.31, 'CIDEr'), captioners(.3, 'CIDEr'), 300)
    assert d.low < 0 < d.high
    assert score_difference(captioners(.3, 'CIDEr'), captioners(.3, 'CIDEr'), 50)[:3] == (0., 0., 0.)

def test_the_interval_of_a_corpus_score_lies_around_it(captioners):
    score = captioners(.3, 'BLEU-2')[0]
    found = score_interval(score, 200)
    close(found.value, score.value, 1e-5)
    assert found.low < found.value < found.high and found.n == 200

def test_captioners_of_other_metrics_or_seeds_cannot_be_paired(captioners):
    with pytest.raises(ValueError, match='cannot pair'):
        score_difference(captioners(.3, 'CIDEr'), captioners(.4, 'BLEU-4'))
    with pytest.raises(ValueError, match='cannot pair'):
        score_difference(captioners(.3, 'CIDEr')[:2], captioners(.4, 'CIDEr'))

@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('pycocoevalcap') is None, reason='needs pycocoevalcap')
def test_cider_and_rouge_equal_the_reference_code(references):
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    hypotheses = {k: ' '.join(c[1].split()[:3]) for k, c in references.items()}
    h, r = tokenized(hypotheses, references)
    theirs = {i: [' '.join(t) for t in refs] for i, refs in enumerate(r)}, {i: [' '.join(t)] for i, t in enumerate(h)}
    for program, score in ((Cider(), cider(h, r)), (Rouge(), rouge_l(h, r))):
        value, each = program.compute_score(*theirs)
        close(score.value, value, 1e-6)
        close(score.each, np.array(each), 1e-6)
