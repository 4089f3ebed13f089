"The comparison of captioners, in miniature: arms from one base, runs that go on, records and tables; and of IFCap."
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gmail_nb.data import emoji
from gmail_nb.encoders import embedded_encoder, encode_images, preprocess_images
from gmail_nb.experiments.captioning import (FEATURE_VARIANTS, CaptionWorld, FeatureVariant, caption_arm_features,
    arm_records,
    caption_runs, arms_table, caption_verdict, pair_loss, run_file, seed_runs, train_sigmoid_heads, varied)
from gmail_nb.experiments import captioning as room
from gmail_nb.experiments.retrieval import FIVE_ARMS
from gmail_nb.experiments.ifcap import IFCAP_ARMS, TextWorld, ifcap_file, ifcap_runs, ifcap_verdict, text_world
from gmail_nb.losses import sigmoid_loss
from gmail_nb.settings import (AdapterSettings, AlignSettings, CaptionerSettings, CaptionExperimentSettings,
    DemoSettings, DrawSettings, IFCapSettings)

HOW = replace(CaptionExperimentSettings().captioner, noise=.3)
SMALL = CaptionExperimentSettings(captioner=HOW, base_steps=50, tune_steps=60, seeds=2)
SHORT = replace(SMALL, base_steps=4, tune_steps=4)

@pytest.fixture(scope='module')
def encoder(): return embedded_encoder()

@pytest.fixture(scope='module')
def through_f_r(encoder):
    return lambda ds: encode_images(encoder.encode_image, preprocess_images(encoder, list(ds['image'])))

@pytest.fixture(scope='module')
def miniature(through_f_r):
    "48 concepts of A and of B; generated images are drawings of another style, turned by a shift."
    a = emoji('A', source='noto').select(range(0, 480, 10))
    b, seen, other = (emoji('B', source=s).select(range(48)) for s in ('noto', 'twemoji', 'fluent'))
    style = through_f_r(other)
    shift = F.normalize(torch.randn(256, generator=torch.Generator().manual_seed(0)), dim=-1)
    generated, aligned = (F.normalize(style + length * shift, dim=-1) for length in (1.5, .2))
    names_a, names_b = ([[c] for c in ds['label']] for ds in (a, b))
    return CaptionWorld((through_f_r(a), names_a), caption_arm_features(generated, aligned, through_f_r(b)), names_b,
                        through_f_r(seen), {k: [c] for k, c in zip(seen['key'], seen['label'])})

@pytest.fixture(scope='module')
def runs(miniature): return caption_runs([(miniature, list(miniature.arms), seed, SMALL) for seed in range(2)])

@pytest.fixture(scope='module')
def records(runs, miniature): return arm_records('miniature', runs, miniature.references, draws=200)

def mean_cider(runs, arm): return np.mean([r.scores['CIDEr'].value for r in runs if r.arm == arm])

def difference(records):
    return next(r for r in records if r['arm'] == 'gmail-indiscriminate' and r['metric'] == 'CIDEr')

def test_every_seed_has_every_arm_and_some_arm_beats_the_base(runs):
    assert [(r.arm, r.seed) for r in runs] == [(a, s) for s in range(2) for a in FIVE_ARMS]
    mean = {a: mean_cider(runs, a) for a in FIVE_ARMS} # an order of arms in a miniature would be luck
    assert max(mean.values()) > mean['base'] >= 0

def test_a_second_run_reads_what_the_first_kept(miniature, tmp_path):
    first, again = (seed_runs(miniature, ['gmail'], 0, SHORT, folder=tmp_path) for _ in range(2))
    assert [vars(r) | dict(scores=0) for r in first] == [vars(r) | dict(scores=0) for r in again]
    assert len(list((tmp_path/'runs').iterdir())) == 2 and (tmp_path/'captioner'/'card.json').exists()

def test_every_arm_seed_and_setting_has_a_file_of_its_own(miniature, tmp_path):
    names = {run_file(tmp_path, miniature, a, s, t).name for a in FIVE_ARMS for s in range(2) for t in (SMALL, SHORT)}
    assert len(names) == 20

def test_arms_and_worlds_that_do_not_fit_are_refused(miniature):
    x = miniature.arms
    with pytest.raises(ValueError, match='must have the same images'):
        caption_arm_features(x['indiscriminate'], x['gmail'][1:], x['real'])
    with pytest.raises(ValueError, match='48 test images but references of 47'):
        replace(miniature, references=dict(list(miniature.references.items())[1:]))

def test_the_difference_of_the_records_is_that_of_the_means(records, runs):
    d = difference(records)
    assert abs(d['value'] - (mean_cider(runs, 'gmail') - mean_cider(runs, 'indiscriminate'))) < 1e-6
    assert d['low'] <= d['value'] <= d['high']

def test_the_table_has_a_row_for_every_arm_and_no_score_that_was_not_computed(records):
    rows = arms_table(records)
    assert [r[0] for r in rows[1:]] == [*FIVE_ARMS, 'references', 'gmail-indiscriminate']
    assert all(len(r) == len(rows[0]) for r in rows)
    assert not any(r['metric'] in ('METEOR', 'SPICE') for r in records)

@pytest.mark.parametrize('low, high, word', [(.1, .2, 'helps'), (-.2, -.1, 'hurts'), (-.1, .1, 'no difference')])
def test_the_verdict_is_what_the_interval_allows(records, low, high, word):
    assert word in caption_verdict([dict(difference(records), low=low, high=high, n=48, seeds=2)])

def test_heads_trained_with_siglips_loss_find_their_partner():
    images, texts = torch.randn(40, 1280), torch.randn(2, 40, 384)
    heads = train_sigmoid_heads(images, texts, [str(i // 2) for i in range(40)], steps=40)
    with torch.inference_mode():
        x, t = (F.normalize(v, dim=-1) for v in (heads['visual'](images), heads['text'](texts[0])))
    cosines, own = x @ t.T, torch.eye(40, dtype=torch.bool)
    assert cosines[own].mean() > .5 > cosines[~own].mean() + .2

def test_the_loss_of_the_heads_is_the_packages_sigmoid_loss():
    x = F.normalize(torch.randn(6, 8), dim=-1)
    ours = pair_loss(x, x.flip(0), torch.tensor(10.).log(), torch.tensor(-10.))
    torch.testing.assert_close(ours, sigmoid_loss(x, x.flip(0), .1, -10.))

def test_variants_change_known_settings_alone():
    names = {s: {f.name for f in fields(s)} for s in (AdapterSettings, AlignSettings, DrawSettings)}
    for v in FEATURE_VARIANTS.values():
        assert set(v.adapters) <= names[AdapterSettings] and set(v.draw) <= names[DrawSettings]
        assert set(v.align) <= names[AlignSettings]
        assert varied(DemoSettings(), v) != DemoSettings() or v.heads != 'clip'
    assert set(asdict(FeatureVariant())) == {f for v in FEATURE_VARIANTS.values() for f in asdict(v)}
    assert varied(DemoSettings(), FeatureVariant()) == DemoSettings()

@pytest.fixture(scope='module')
def some():
    return lambda split, source: emoji(split, source=source).select(range(0, 400, 10))

@pytest.fixture(scope='module')
def text(some, through_f_r, encoder):
    a, b, seen, other = some('A', 'noto'), some('B', 'noto'), some('B', 'twemoji'), some('B', 'fluent')
    style, names_a, names_b = through_f_r(other), [[c] for c in a['label']], [[c] for c in b['label']]
    world = CaptionWorld((through_f_r(a), names_a), dict(indiscriminate=style, gmail=style, real=through_f_r(b)),
                         names_b, through_f_r(seen), {k: [c] for k, c in zip(seen['key'], seen['label'])})
    return text_world(world, encoder)

@pytest.fixture(scope='module')
def text_runs(text): return ifcap_runs(text, 0, IFCapSettings(base_steps=80, tune_steps=30, seeds=1))

def test_ifcap_arms_go_on_from_one_start(text, text_runs, some):
    assert tuple(r.arm for r in text_runs) == IFCAP_ARMS
    assert text.names == [*some('A', 'noto')['label'], *some('B', 'noto')['label']]
    assert 0 < text.sigma < 5 and max(r.scores['CIDEr'].value for r in text_runs) > 0

def test_the_same_features_give_the_same_captions(text_runs): assert text_runs[2].captions == text_runs[3].captions

def test_ifcap_reads_what_an_earlier_run_kept(text, tmp_path):
    first, again = (ifcap_runs(text, 0, IFCapSettings(base_steps=2, tune_steps=2), tmp_path) for _ in range(2))
    assert [vars(r) | dict(scores=0) for r in first] == [vars(r) | dict(scores=0) for r in again]

def test_the_verdict_of_two_arms_is_in_the_words_of_stats(text_runs):
    said = ifcap_verdict(text_runs, 'real', 'base')
    assert said.startswith('Going on with real images and not with no further step ')
    same = ifcap_verdict(text_runs, 'gmail', 'indiscriminate')
    assert ' makes no difference that this run can show: CIDEr (times 100) differs by +0.0 ' in same

def world_of_numbers():
    x, names = torch.arange(24.).reshape(3, 8), list('abcdef')
    of_a, of_b = ([[n] for n in part] for part in (names[:3], names[3:]))
    world = CaptionWorld(
        (x, of_a), dict(indiscriminate=x, gmail=x + 1, real=x + 2), of_b, x + 3, dict(zip('klm', of_b))
    )
    return TextWorld(world, torch.arange(48.).reshape(6, 8), names, .5)

def test_captions_that_version_03_kept_have_the_names_they_had(tmp_path):
    t = world_of_numbers()
    assert run_file(tmp_path, t.world, 'gmail', 1, CaptionExperimentSettings()).name == '49252480620e07c5.json'
    assert ifcap_file(tmp_path, t, 'gmail', 1, IFCapSettings()).name == 'ifcap_901ecb09192d51a7.json'

@pytest.mark.parametrize(
    'change',
    [
        dict(noise=0.1),
        dict(batch_size=3),
        dict(mapper='transformer'),
        dict(prefix_length=2),
        dict(lr=0.1),
        dict(max_new_tokens=3),
    ],
)
def test_every_setting_of_the_captioner_is_in_the_name_of_its_file(change, tmp_path):
    t = world_of_numbers()
    for settings, name in ((CaptionExperimentSettings(), lambda s: run_file(tmp_path, t.world, 'gmail', 1, s)),
                           (IFCapSettings(), lambda s: ifcap_file(tmp_path, t, 'gmail', 1, s))):
        assert name(replace(settings, captioner=replace(settings.captioner, **change))) != name(settings)

@pytest.mark.parametrize('kind', [CaptionExperimentSettings, IFCapSettings])
@pytest.mark.parametrize(
    'change, hint', [(dict(lm='smollm2'), "leave it at 'small'"), (dict(steps=7), 'set base_steps')]
)
def test_what_the_comparisons_do_not_vary_is_refused(kind, change, hint):
    with pytest.raises(ValueError, match=hint): kind(captioner=CaptionerSettings(**change))

def test_settings_of_a_captioner_have_one_home():
    "Neither comparison repeats a field of what it nests."
    nested = {f.name for f in fields(CaptionerSettings)}
    for kind in (CaptionExperimentSettings, IFCapSettings): assert not nested & {f.name for f in fields(kind)}

def test_base_and_arm_train_as_the_settings_say(miniature, monkeypatch):
    seen = []
    def noted(captioner, features, captions, how, seed, **_): seen.append((how.steps, how.batch_size, how.lr, how.noise))
    monkeypatch.setattr(room, 'train_captioner', noted)
    s = replace(SHORT, captioner=replace(HOW, batch_size=5, lr=.1), tune_steps=6, tune_lr=.2)
    room.tune_arm(room.base_captioner(miniature, s), miniature.arms['gmail'], miniature, s, 0)
    assert seen == [(4, 5, .1, .3), (6, 5, .2, .3)]

def test_a_long_caption_goes_on_in_a_second_line():
    assert room._wrapped('smiling face with smiling eyes', 20) == 'smiling face with\nsmiling eyes'
