"""What a LLaVA learns from generated images: the arms get the same questions in the same order, begin with the same weights, and
go on where they were stopped; scores of choices are those by hand; and the page says what the intervals allow."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

import gmail_nb.experiments.llava as room
from gmail_nb.caption_metrics import Score
from gmail_nb.captioning import caption_tokenizer
from gmail_nb.data import emoji
from gmail_nb.experiments.llava import (
    LLAVA_CLAIMS,
    SEVEN_ARMS,
    Lesson,
    LlavaArms,
    LlavaResults,
    LlavaRun,
    LlavaWorld,
    agreed,
    arm_examples,
    arm_file,
    base_examples,
    choice_scores,
    drawn_once,
    gap_rows,
    grid_tokens,
    kept_tokens,
    kinds_table,
    labelled,
    lessons,
    llava_records,
    llava_runs,
    llava_sentences,
    llava_table,
    longer_claims,
    longer_name,
    longer_records,
    longer_runs,
    longer_table,
    of_length,
    one_sentence,
    open_prompts,
    pooled,
    preferred,
    real_half,
    right_choices,
    said_answers,
    said_to_all,
    show_llava,
    show_some_answers,
    some_questions,
    token_gaps,
    written_names,
)
from gmail_nb.gap import token_gap_report
from gmail_nb.losses import by_best
from gmail_nb.runtime import set_seed
from gmail_nb.settings import DemoSettings, LlavaExperimentSettings
from gmail_nb.stats import bootstrap
from gmail_nb.vqa import Question, shows_one

def weight(item): return 15

WORDS = ['red', 'blue', 'one', 'two', 'a cat', 'a dog', 'a red bird', 'a fish']

def question(i, answer=0):
    picture = Image.new('RGB', (16, 16), ['red', 'green', 'blue', 'white'][i % 4])
    return Question(
        f'k{i}:{("name", "group", "count", "colour")[i % 4]}',
        'What is it?',
        answer,
        tuple(WORDS[4:]),
        (picture,),
        '',
        ('name', 'group', 'count', 'colour')[i % 4],
    )

@pytest.fixture(scope='module')
def language(tmp_path_factory):
    "A language model of two layers with random weights, in a folder."
    folder = tmp_path_factory.mktemp('lm')
    tokenizer = caption_tokenizer(
        [*WORDS, 'What is it? What is shown in the picture? Answer briefly. system user assistant']
    )
    tokenizer.chat_template = ("{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
                               "{% if add_generation_prompt %}assistant {% endif %}")
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

@pytest.fixture(scope='module')
def settings(language):
    return LlavaExperimentSettings(
        str(language),
        base_steps=6,
        steps=6,
        batch_size=4,
        base_lr=5e-3,
        lr=5e-3,
        dtype='float32',
        concepts=8,
        tested=4,
        asked=4,
        seeds=2,
    )

@pytest.fixture(scope='module')
def world():
    draw = torch.Generator().manual_seed(0)
    kinds = 'A', 'real', 'indiscriminate', 'gmail', 'gmail tokens', 'captions', 'questions'
    tokens = {k: torch.randn(8, 4, 12, generator=draw).half() for k in kinds}
    told = [Lesson(f'k{i}:name', 'What is it?', WORDS[4 + i % 4], i) for i in range(8)]
    tokens['captions'] = tokens['captions'][:4]
    return LlavaWorld(tokens, [WORDS[4 + i % 4] for i in range(8)], told, {f'k{i}': [WORDS[4 + i]] for i in range(4)},
                      [question(i, i % 4) for i in range(8)])

# what is asked

def test_only_what_has_one_answer_for_both_is_asked():
    real, other = question(0, 1), question(0, 2)
    assert agreed([real], [other]) == [] == agreed([real], [question(1, 1)])
    assert agreed([real, question(1)], [question(1), real]) == [(real, real), (question(1), question(1))]

def test_lessons_point_at_pictures_of_their_own():
    rows = emoji('B', source='noto').select(range(0, 690, 115))
    told, real, generated = lessons(
        rows, labelled(list(emoji('B', source='fluent').select(range(0, 690, 115))['image']), rows)
    )
    counted = [k for k, name in zip(rows['key'], rows['label']) if shows_one(name)]
    n = len(rows) + len(counted) # a count is asked about a picture of its own
    assert 0 < len(counted) and len(real) == len(generated) == n and {one.row for one in told} == set(range(n))
    by = {one.key: one for one in told}
    for key in rows['key']: assert by[f'{key}:name'].row == by[f'{key}:group'].row
    for key in counted: assert by[f'{key}:name'].row != by[f'{key}:count'].row
    assert {k for k in by if k.endswith(':count')} == {f'{k}:count' for k in counted}
    assert [by[f'{k}:name'].answer for k in rows['key']] == list(rows['label']) and drawn_once(told) == [
        by[f'{k}:name'].row for k in rows['key']
    ]
    assert len({im.tobytes() for im in real} & {im.tobytes() for im in generated}) == 0

def test_arms_differ_in_their_pictures_alone(world):
    said = {arm: [e.turns[-1] for e in arm_examples(world, arm)] for arm in SEVEN_ARMS}
    assert all(s == said['real'] for s in said.values())
    rows = {arm: [e.images[0][1] for e in arm_examples(world, arm)] for arm in ('gmail', 'both', 'real')}
    assert rows['gmail'] == rows['both'] == rows['real'] and not arm_examples(world, 'words')[0].images
    t = world.tokens
    assert world.files('both')['first'] is t['gmail'] and world.files('both')['other'] is t['real']
    assert world.files('gmail')['first'] is world.files('gmail')['other'] is t['gmail'] and world.files('words') == {}
    assert {e.images[0][0] for e in arm_examples(world, 'both')} == {'first', 'other'}
    assert all(e.images == (('A', i),) for i, e in enumerate(base_examples(world)))

def test_both_has_one_kind_of_image_a_concept():
    "A concept with real and generated images would be told by both, and replaced by neither."
    facts = 'name', 'group', 'count', 'colour'
    told = [Lesson(f'k{i}:{fact}', 'What is it?', 'red', i) for i in range(9) for fact in facts]
    world = LlavaWorld({}, [], told, {}, [])
    def kinds(seed):
        found = {}
        for one, e in zip(told, arm_examples(world, 'both', seed)):
            found.setdefault(one.key.split(':')[0], set()).add(e.images[0][0])
        return found
    for seed in range(3):
        assert all(len(k) == 1 for k in kinds(seed).values())
        assert sorted(map(sorted, kinds(seed).values())) == [['first']] * 5 + [['other']] * 4
    assert len({str(kinds(seed)) for seed in range(3)}) == 3 and kinds(1) == kinds(1)
    assert real_half(told, 1) == {k for k, v in kinds(1).items() if v == {'other'}}

def test_places_are_pooled():
    x = torch.arange(16.).view(1, 16, 1).expand(-1, -1, 3).half()
    assert pooled(x, 2)[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5] and torch.equal(pooled(x, 4), x)
    for tokens, side in ((x[:, :15], 2), (x, 5)):
        with pytest.raises(ValueError, match='square grid'): pooled(tokens, side)

def test_tokens_are_kept_for_the_same_pictures_alone(tmp_path):
    made = []
    def compute(): made.append(1); return torch.ones(2, 4, 3).half() * len(made)

    for name, expected in (('a', 1), ('a', 1), ('b', 2)):
        assert kept_tokens(tmp_path/'x.safetensors', name, compute)[0, 0, 0] == expected
    (tmp_path/'x.safetensors').write_bytes(b'cut short')
    assert kept_tokens(tmp_path/'x.safetensors', 'b', compute)[0, 0, 0] == 3

# one model, several arms

@pytest.fixture(scope='module')
def arms(world, settings): return LlavaArms(world, settings, seed=0)

def weights_of(arms): return torch.cat([p.detach().flatten() for p in arms.own.values()])

def test_every_arm_begins_with_the_same_first_stage(arms, world, settings):
    assert len(arms.trained('base')) == 6 # of stage one
    begin = weights_of(arms).clone()
    losses = arms.trained('real')
    assert len(losses) == 6 and losses[-1] < losses[0] and not torch.equal(weights_of(arms), begin)
    assert arms.trained('gmail') != losses
    assert arms.trained('real') == losses # whatever came between
    arms.trained('base')
    assert torch.equal(weights_of(arms), begin)
    other = LlavaArms(world, settings, seed=1)
    other.begin()
    assert not torch.equal(weights_of(other), begin)

def test_choices_are_scored_as_by_hand(arms, world):
    "Of several questions of different length together, each choice by itself."
    arms.trained('real')
    model, tokens = arms.model, world.tokens['questions'][:3]
    texts = ['What is it?', 'What is shown in the picture? What is it?', 'a cat']
    choices = [('a cat', 'a red bird', 'blue', 'two')] * 3
    together = choice_scores(model, open_prompts(model, texts, tokens), tokens, choices)
    for i, text in enumerate(texts):
        prompt = open_prompts(model, [text], tokens[i:i + 1])[0]
        for j, c in enumerate(choices[i]):
            tail = model.tokenizer(c, add_special_tokens=False)['input_ids'] + [model.end]
            with torch.no_grad():
                logits = model.lm(
                    inputs_embeds=model.embed(torch.tensor([prompt.ids + tail]), tokens[i : i + 1])
                ).logits
            logp = logits[0, len(prompt.ids) - 1:-1].log_softmax(-1)[range(len(tail)), tail]
            assert together[i, j].item() == pytest.approx(logp.mean().item(), abs=1e-4)

def test_answers_do_not_depend_on_the_batch(arms, world):
    q, tokens = world.questions, world.tokens['questions']
    assert (
        preferred(arms.model, q, tokens, 3) == preferred(arms.model, q, tokens)
        and len(preferred(arms.model, q, None, 5)) == 8
    )
    names = [written_names(arms.model, world.tokens['captions'], 4, 5, batch_size=n) for n in (1, 4)]
    assert names[0] == names[1] and len(set(written_names(arms.model, None, 4, 5))) == 1

def test_a_run_that_is_cut_short_goes_on_with_the_next_arm(world, settings, tmp_path, monkeypatch):
    answered, done = room.answered, []
    def cut(trained, arm):
        if len(done) == 3: raise KeyboardInterrupt
        done.append(arm)
        return answered(trained, arm)
    monkeypatch.setattr(room, 'answered', cut)
    with pytest.raises(KeyboardInterrupt): llava_runs(world, 0, settings, tmp_path)
    monkeypatch.setattr(room, 'answered', answered)
    runs, whole = llava_runs(world, 0, settings, tmp_path), llava_runs(world, 0, settings)
    assert done == ['base', 'words', 'indiscriminate'] and [r.arm for r in runs] == list(SEVEN_ARMS)
    assert [(r.captions, r.choices, r.losses) for r in runs] == [(r.captions, r.choices, r.losses) for r in whole]
    monkeypatch.setattr(room, 'answered', None)
    assert llava_runs(world, 0, settings, tmp_path) == runs # read, and nothing trained

def test_the_seconds_of_an_arm_are_without_the_first_stage(world, settings, monkeypatch):
    "Also of an arm that is trained by itself, when that of the base is read from its file."
    clock, learn = [0.], LlavaArms.learn
    def slowly(self, name, *rest):
        clock[0] += dict(project=100, instruct=7)[name]
        return learn(self, name, *rest)
    monkeypatch.setattr(LlavaArms, 'learn', slowly)
    monkeypatch.setattr(room.time, 'process_time', lambda: clock[0])
    assert room.answered(LlavaArms(world, settings, 0), 'gmail')['training'] == 7
    assert room.answered(LlavaArms(world, settings, 0), 'base')['training'] == 100

def test_what_an_arm_depends_on_is_in_the_name_of_its_file(world, settings, tmp_path):
    here = arm_file(tmp_path, world, 'gmail', 0, settings)
    for same in (dict(seeds=9), dict(longer=7), dict(longer_seeds=0)): # how many arms there are, not what one is
        assert arm_file(tmp_path, world, 'gmail', 0, replace(settings, **same)) == here
    halves = [arm_file(tmp_path, world, 'both', 0, replace(settings, seed=s)) for s in (0, 1)]
    assert halves[0] != halves[1]
    other = replace(world, tokens=world.tokens | dict(gmail=world.tokens['real']))
    for changed in (
        arm_file(tmp_path, world, 'gmail', 1, settings),
        arm_file(tmp_path, world, 'real', 0, settings),
        arm_file(tmp_path, other, 'gmail', 0, settings),
        arm_file(tmp_path, world, 'gmail', 0, replace(settings, steps=7)),
        arm_file(tmp_path, replace(world, told=world.told[::-1]), 'gmail', 0, settings),
    ): assert changed != here
    assert arm_file(tmp_path, other, 'base', 0, settings) == arm_file(tmp_path, world, 'base', 0, settings)

def test_a_longer_training_changes_its_steps_alone(world, settings, tmp_path, monkeypatch):
    "The records carry the steps; a chain that is missing is counted; nothing else is another than with these steps."
    s = replace(settings, longer=9)
    monkeypatch.setattr(room, 'DRAWS', 100)
    runs = [r for seed in range(2) for r in llava_runs(world, seed, s, tmp_path)]
    longer = longer_runs(world, 0, s, tmp_path)
    assert [r.arm for r in longer] == [longer_name(a, 9) for a in room.LONGER_ARMS]
    plain = llava_runs(world, 0, replace(s, steps=9), arms=('gmail',))[0]
    gmail = longer[0]
    assert gmail == replace(plain, arm='gmail, 9 steps', training=gmail.training, testing=gmail.testing)
    assert len(gmail.losses) == 9 and [r for r in runs if r.arm == 'gmail'][0].losses != gmail.losses
    records = longer_records(runs, longer, world, 9)
    by = {(r['arm'], r['metric']): r for r in records}
    assert {r['steps'] for r in records} == {9} and {r['seeds'] for r in records} == {1} # of two chains
    assert by['gmail, 9 steps - indiscriminate, 9 steps', 'accuracy']['n'] == 8
    right = [[c == q.answer for c, q in zip(r.choices, world.questions)] for r in (gmail, runs[3])]
    assert runs[3].arm == 'gmail' and runs[3].seed == 0
    expected = np.mean(right[0]) - np.mean(right[1])
    assert by['gmail, 9 steps - gmail', 'accuracy']['value'] == pytest.approx(expected)
    table = longer_table(records, 9)
    assert table[1][0] == 'gmail*' and {row[-1] for row in table[1:]} == {'1'}
    said = llava_sentences(records, longer_claims(9, records))
    assert said[0].startswith('After 9 steps, aligning') and all('1 seed)' in one for one in said)
    two = longer_records(runs, longer[:2], world, 9) # arms that are not there are not spoken of
    assert longer_runs(world, 0, s, tmp_path, train=False) == longer and not longer_runs(world, 1, s, tmp_path, train=False)
    begun = [*longer, replace(longer[0], seed=1)] # a chain that is not finished does not count
    assert room.finished_chains(begun) == longer and {r['seeds'] for r in longer_records(runs, begun, world, 9)} == {1}
    assert len(llava_sentences(two, longer_claims(9, two))) == 4 < len(said) == 14
    assert room.chains_note(records, 9, 2).startswith('1 of 2 chains have trained for 9 steps; intervals over')
    both = llava_records(room.scored(runs, world)) + records
    assert of_length(both, 9) == records and {row[0] for row in llava_table(both)[1:8]} == set(SEVEN_ARMS)
    assert [t.get_text() for t in show_llava(both).axes[0].get_yticklabels()] == list(SEVEN_ARMS)

@pytest.mark.parametrize('done, said', [
    (0, '0 of 3 chains have trained for 320 steps.'), (1, '1 of 3 chains have trained for 320 steps; '),
    (2, '2 of 3 chains have trained for 320 steps.'), (3, '3 of 3 chains have trained for 320 steps.')])
def test_the_page_says_how_many_chains_trained_longer(done, said):
    note = room.chains_note([dict(seeds=done)] * bool(done), 320, 3)
    assert note.startswith(said) and ('over concepts alone' in note) == (done == 1)

def of_chains(records, seeds):
    "Records of this page as those of a longer training of so many chains."
    def name(arm): return ' - '.join(longer_name(a, 320) for a in arm.split(' - '))
    return [r | dict(arm=name(r['arm']), steps=320, seeds=seeds) for r in records]

@pytest.mark.parametrize('seeds, over', [(1, '1 seed)'), (2, '2 seeds)')])
def test_of_the_longer_training_it_is_said_which_alignment_helps(records, seeds, over):
    "Each alignment beside none, and both beside one another, with intervals, in accuracy and in CIDEr."
    longer = of_chains(records, seeds)
    said = llava_sentences(longer, longer_claims(320, longer))
    assert len(said) == 12 and all(s.startswith('After 320 steps, ') and s.endswith(f'{over}.') for s in said)
    assert 'by Eq. 1 helps: accuracy' in said[0] and 'their tokens too' in said[2] and '95% interval' in said[2]
    assert {row[-1] for row in longer_table(longer, 320)[1:]} == {str(seeds)}

def test_seconds_that_hold_the_first_stage_are_marked(records):
    "An arm that was run by itself trained the first stage as well: a star, and what is left without it."
    assert room.seconds_note(records) == '' and not any('*' in row[-1] for row in llava_table(records))
    took = dict(base=8., both=19., gmail=11.)
    some = [r | dict(value=took.get(r['arm'], 10.)) if r['metric'] == 'seconds' else r for r in records]
    by = {row[0]: row[-1] for row in llava_table(some)}
    assert (by['both'], by['gmail'], by['base']) == ('19*', '11', '8')
    said = room.seconds_note(some)
    assert said.startswith('*: both was run by itself') and said.endswith('about 11')

def test_the_arms_stand_beside_each_other(records):
    by = {(r['arm'], r['metric']): r for r in records}
    value = {a: by[a, 'accuracy']['value'] for a in SEVEN_ARMS}
    for a, b in (('gmail', 'real'), ('both', 'gmail'), ('both', 'real')):
        apart = by[f'{a} - {b}', 'accuracy']
        assert apart['value'] == pytest.approx(value[a] - value[b]) and apart['low'] <= apart['value'] <= apart['high']

# numbers

def test_one_sentence_about_every_picture():
    "It is chosen among learned names that are not tested, each by the others, and scored by the package's metric."
    told = [Lesson(f'k{i}:name', '?', name, i) for i, name in
            enumerate(('a blue fish', 'a red bird', 'a red fish', 'two suns', 'a red bird'))]
    told.append(Lesson('k0:group', '?', 'a red bird', 0)) # no name
    world = LlavaWorld({}, [], told, dict(k4=['a red bird'], k5=['one cat']), [])
    assert one_sentence(world) in ('a red bird', 'a red fish') # words that others share
    assert one_sentence(replace(world, references=dict(k1=['a red bird'], k2=['a red fish']))) != 'a red fish'
    score = said_to_all('a red bird', world.references)
    by_hand = room.caption_scores(LlavaRun('', 0, ['a red bird'] * 2, [], [], 0., 0.), world.references)['CIDEr']
    assert score.each.tolist() == by_hand.each.tolist() and score.each[0] > score.each[1] == 0
    results = LlavaResults([], [], {}, score)
    one = [r for r in llava_records(results, pairs=()) if r['arm'] == 'one sentence']
    assert [r['metric'] for r in one] == ['CIDEr'] and one[0]['value'] == pytest.approx(score.value)

def test_kinds_of_question_stand_beside_chance(records, results):
    heading, chance, *rows = kinds_table(records)
    assert heading[1:] == ['name', 'group', 'count', 'colour'] and chance == ['chance', *['25.0'] * 4]
    by = {row[0]: row[1:] for row in rows}
    assert by['gmail'] == ['100.0 [100.0, 100.0]'] * 4 and set(by) >= {'base', 'words - base', 'gmail - base'}
    right = [right_choices(results.of(arm), results.questions, 'group').mean() for arm in ('words', 'base')]
    assert by['words - base'][1].startswith(f'{100 * (right[0] - right[1]):+.1f} [')

@pytest.fixture(scope='module')
def results(world):
    "Made up: `gmail` is always right, `indiscriminate` never, and the others draw."
    rng, runs, cider = np.random.default_rng(0), [], {}
    questions = [question(i, i % 4) for i in range(40)]
    for arm in SEVEN_ARMS:
        for seed in range(3):
            right = [q.answer for q in questions]
            drawn = rng.integers(0, 4, 40).tolist()
            choices = right if arm == 'gmail' else [(a + 1) % 4 for a in right] if arm == 'indiscriminate' else drawn
            runs.append(LlavaRun(arm, seed, ['a cat'] * 4, choices, [2., 1.], 10., 1.))
        each = np.full(20, .8 if arm == 'gmail' else .3) + rng.normal(0, .05, (3, 20))
        cider[arm] = [Score('CIDEr', e) for e in each]
    return LlavaResults(runs, questions, cider)

@pytest.fixture(scope='module')
def records(results): return llava_records(results)

def test_records_say_what_was_answered(records):
    by = {(r['arm'], r['metric']): r for r in records}
    assert by['gmail', 'accuracy']['value'] == 1 and by['indiscriminate', 'accuracy']['value'] == 0
    assert by['gmail - indiscriminate', 'accuracy']['low'] == 1 and by['gmail', 'accuracy:count']['n'] == 10
    assert by['gmail', 'seconds']['value'] == 10 and all(r['seeds'] == 3 for r in records)
    assert by['gmail - indiscriminate', 'CIDEr']['value'] == pytest.approx(.5, abs=.05)

def test_questions_about_one_drawing_are_drawn_together():
    "Four questions a drawing that are right or wrong together: the interval is twice as wide as of single ones."
    questions = [replace(question(i % 4, 0), key=f'k{i // 4}:{i % 4}') for i in range(160)]
    right = np.random.default_rng(0).random(40) < .5
    runs = [LlavaRun('gmail', seed, [], np.where(np.repeat(right, 4), 0, 1).tolist(), [1.], 1., 1.) for seed in range(3)]
    results = LlavaResults(runs, questions, {})
    found, single = results.accuracy('gmail'), bootstrap(right_choices(runs, questions))
    assert found.value == single.value and found.n == 160
    assert 1.7 < (found.high - found.low) / (single.high - single.low) < 2.3
    assert results.accuracy_difference('gmail', 'gmail').high == 0

def test_sentences_claim_what_the_intervals_allow(records):
    said = llava_sentences(records)
    assert len(said) == 2 * len(LLAVA_CLAIMS)
    assert said[0].startswith('Aligning the generated images by Eq. 1 helps: accuracy') and '3 seeds' in said[0]
    assert 'hurts' in said[4] and said[4].startswith('Aligning the tokens beside Eq. 1') # drawn answers against right ones

def test_tables_and_pictures_are_made_of_the_records(results, records):
    table = llava_table(records)
    assert [row[0] for row in table[1:8]] == list(SEVEN_ARMS) and table[4][2].startswith('100.0')
    assert table[4][3] == '100 (' + table[2][3] + ')' # beside it, what words alone get
    assert [row[0] for row in table[8:]] and all(row[1].startswith(('+', '-')) for row in table[8:])
    whole = {k: torch.randn(20, 4, 6) for k in ('real', 'indiscriminate', 'gmail', 'gmail best match')}
    whole['gmail tokens'] = whole['real'].clone()
    one = token_gaps(whole, list(range(12)))
    assert one['gmail tokens']['token_distance'].max() == 0 < one['gmail']['token_distance'].min()
    names = ['indiscriminate', 'gmail', 'gmail tokens', 'gmail best match', *(f'{a} - {b}' for a, b in room.GAP_PAIRS)]
    assert [row[0] for row in gap_rows(room.pooled_gaps([one, one]))[1:]] == names
    assert [t.get_text() for t in show_llava(records).axes[0].get_yticklabels()] == list(SEVEN_ARMS)
    picked = some_questions(results.questions, each=2)
    assert [results.questions[i].subject for i in picked] == [
        'name',
        'name',
        'group',
        'group',
        'count',
        'count',
        'colour',
        'colour',
    ]
    assert len(show_some_answers(results, picked).axes) == 16 # eight pictures, each with its answers below
    right = said_answers(results.of('gmail')[0], results.questions)
    assert all(a.right and a.read in 'ABCD' for a in right)

def test_the_gap_is_that_of_all_chains():
    "Means over chains, paired differences, and the numbers of the room that measures gaps."
    draw = torch.Generator().manual_seed(0)
    wholes = [{k: torch.randn(20, 4, 6, generator=draw) for k in ('real', *room.GAPS.values())} for _ in range(3)]
    for w in wholes: w['gmail'] = w['real'] + .5 * w['indiscriminate']
    chains = [token_gaps(w, list(range(20))) for w in wholes]
    found = room.pooled_gaps(chains)
    for arm in room.GAPS.values():
        def near(w): return dict(token_best_distance=by_best(w[arm], w['real']).mean().item())
        theirs = [token_gap_report(w[arm], w['real']) | near(w) for w in wholes]
        for m, d in found[arm].items():
            assert d.value == pytest.approx(np.mean([t[m] for t in theirs]), abs=1e-6) and d.low <= d.value <= d.high
    apart = found['gmail - indiscriminate']['token_cosine']
    assert apart.low > 0 and apart.n == 20
    best = found['gmail best match - gmail tokens']['token_best_distance'] # of this arm beside the other way
    both = [found[arm]['token_best_distance'].value for arm in ('gmail best match', 'gmail tokens')]
    assert best.value == pytest.approx(both[0] - both[1]) and 'gmail best match - gmail' in found
    ours, theirs = (found[arm]['token_cosine'].value for arm in ('gmail', 'indiscriminate'))
    assert apart.value == pytest.approx(ours - theirs)
    told = room.gap_sentences(found, 3)
    assert told[0].startswith('Aligning by Eq. 1 helps') and '20 drawings, 3 chains' in told[0]
    kept = room.gap_records(found, 3)
    named = {(r['arm'], r['metric']) for r in kept}
    assert named >= {('gmail - indiscriminate', 'token_cosine'), ('gmail', 'token_distance')}
    assert all(r['low'] <= r['value'] <= r['high'] and r['seeds'] == 3 for r in kept)
    with pytest.raises(ValueError, match='cannot be pooled'): room.check_same_drawings([['a'], ['b']])

# the full world

def test_concepts_that_are_tested_may_not_be_learned(tmp_path, monkeypatch):
    both = emoji('unseen', source='noto').select(range(8))
    monkeypatch.setattr(room, 'some_concepts', lambda split, n, seed: both)
    class NoPairs:
        keys = list(emoji('B', source='noto')['key'][::120])
        def __len__(self): return 6
        def __getitem__(self, i): return dict(generated=Image.new('RGB', (64, 64), 'red'))
    monkeypatch.setattr(room, 'draw_side', lambda *_: NoPairs())
    settings = LlavaExperimentSettings(concepts=6, tested=3, asked=130)
    with pytest.raises(ValueError, match='of the questions are among those of the drawings learned from'):
        room.all_pictures(tmp_path, DemoSettings(), settings)
    monkeypatch.setattr(room, 'some_concepts', lambda split, n, seed: emoji('A', source='noto').select(range(8)))
    found = room.all_pictures(tmp_path, DemoSettings(), settings)
    keys = {q.key.rpartition(':')[0] for q in found.rest['questions']}
    assert keys == set(emoji('unseen')['key']) and len(found.images['captions']) == 3 == len(found.rest['references'])
    assert set(found.rest['references']) <= set(NoPairs.keys) and len(found.images['real']) == len(
        found.images['generated']
    )
    assert any(one.key.endswith(':count') for one in found.rest['told'])

def test_an_aligned_model_of_other_settings_is_refused(tmp_path):
    (tmp_path/'model_tokens').mkdir()
    (tmp_path/'model_tokens'/'card.json').write_text(json.dumps(dict(settings=dict(align=dict(lr=9.)))))
    with pytest.raises(ValueError, match='aligned with other settings'):
        room.token_model(None, tmp_path, DemoSettings())


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match='tested'): LlavaExperimentSettings(concepts=5, tested=6)
    with pytest.raises(ValueError, match='grid'): LlavaExperimentSettings(grid=0)
    for name, n in dict(longer=0, longer_seeds=-1).items():
        with pytest.raises(ValueError, match=name): LlavaExperimentSettings(**{name: n})
    s = LlavaExperimentSettings(steps=7, lr=.5).llava
    assert (s.instruct.steps, s.instruct.lr, s.project.steps, s.dtype) == (
        7,
        0.5,
        LlavaExperimentSettings().base_steps,
        'bfloat16',
    )


def test_tokens_are_those_of_the_tower():
    from gmail_nb.encoders import embedded_encoder, preprocess_images
    encoder, images = embedded_encoder(), list(emoji('A', source='noto').select(range(3))['image'])
    with torch.no_grad(): whole = encoder.image_tokens(preprocess_images(encoder, images))
    torch.testing.assert_close(
        grid_tokens(encoder.image_tokens, encoder, images, 2).float(), whole, atol=4e-3, rtol=1e-3
    )
