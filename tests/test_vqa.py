"Questions: what is refused, how they are asked, what counts as an answer, and questions about drawings that nobody can answer by place."

import gmail_nb.runtime
import re
from collections import Counter

import datasets
import numpy as np
import pytest
import yaml
from gmail_nb.data import emoji, quiet_datasets
from gmail_nb.vqa import (
    LETTERS, OPEN_WORDS, OUTSIDE, REFUSED, Answered, Question, Questions, accuracy, accuracy_difference,
    answer_kinds, check_question,
    drawing_questions, judge, load_questions, main_colour, mmmu_choice, mmmu_prompt, mmmu_question, open_right,
    scienceqa_choice, scienceqa_prompt, scienceqa_question, small_mmmu, small_scienceqa, vqa_records, why_unread,
    with_markers)
from PIL import Image

plain = Question('q', 'Which?', 1, ('red', 'green', 'blue'))

@pytest.mark.parametrize(
    'change, said',
    [
        (dict(text=' '), 'has no words'),
        (dict(answer=3), 'none of its 3 choices'),
        (dict(answer=-1), 'none of its 3 choices'),
        (dict(answer='B'), 'none of its 3 choices'),
        (dict(choices=(), answer=()), 'has no right answer'),
        (dict(choices=(), answer=(' ',)), 'has no right answer'),
        (dict(text='see <image 2>'), 'speaks of image 2 but has 0'),
        (dict(choices=tuple('abcdefghijk'), answer=0), 'has over 10 choices'),
    ],
)
def test_questions_that_cannot_be_asked(change, said):
    with pytest.raises(ValueError, match=f"question 'q'.*{said}"): check_question(Question(**(plain.__dict__ | change)))

def test_options_are_read_as_data():
    row = dict(question='?', options='__import__("os").getcwd()', answer='A', image_1=None)
    with pytest.raises(ValueError, match='are no list'): mmmu_question(row, 'q')

@pytest.mark.parametrize('answer', ['Z', 'AB', 'a'])
def test_a_letter_outside_the_choices(answer):
    row = dict(question='?', options="['x', 'y']", answer=answer, image_1=None)
    with pytest.raises(ValueError, match='none of its 2 choices'): mmmu_question(row, 'q')

def test_several_images_in_a_question():
    images = [Image.new('RGB', (8, 8), c) for c in ('red', 'green', 'blue')]
    row = dict(
        question='Is <image 2> or <image 1> larger?',
        options="['<image 3>', 'none']",
        answer='A',
        subfield='Math',
        **{f'image_{i + 1}': im for i, im in enumerate(images)},
    )
    q = mmmu_question(row, 'q')
    words, order = with_markers(mmmu_prompt(q), q)
    assert words.count('<image>') == 3 and [im.getpixel((0, 0)) for im in order] == [
        (0, 128, 0),
        (255, 0, 0),
        (0, 0, 255),
    ]


def test_an_image_without_a_mark_stands_in_front():
    words, order = with_markers('Which?', Question('q', 'Which?', 0, ('a', 'b'), ('one',)))
    assert words == '<image>\nWhich?' and order == ['one']

# Answers of the kind that models give, each judged by hand
SCIENCE = {
    'A': 0,
    'B.': None,
    'C. blue': 2,
    'C.\nblue': None,
    'The answer is B': 1,
    'The answer is B. Because of it.': 1,
    'b': None,
    'D': None,
    'The answer is D.': None,
    'AB': None,
    'Answer: A': None,
    'I think The answer is C.': 2,
    ' A ': 0,
    'The answer is A or B. The answer is B.': 1, # with its point first, and only then without
    'The answer is A, or The answer is B': 0,
    'The answer is D or B. The answer is D.': None,
    'A\n': 0,
}
MMMU = {
    '(A)': 0,
    '(A) red': 0,
    'A': 0,
    'B.': 1,
    'The answer is C': 2,
    'C, since it is blue': None,
    'red': None,
    'Sorry.': None,
    'It must be the green one of them': 1,
    '(A) no, rather (B)': 1,
    'it is A or rather B in the end': 1,
    '(D)': None,
    'The sky in this picture looks blue and not red': 0,
    'A!': 0,
    "'B'": 1,
}

@pytest.mark.parametrize('answer, number', SCIENCE.items())
def test_science_answers(answer, number): assert scienceqa_choice(answer, 3) == number

@pytest.mark.parametrize('answer, number', MMMU.items())
def test_mmmu_answers(answer, number): assert mmmu_choice(answer, plain.choices) == number

def as_published(text, choices):
    "LLaVA's rule when its paper appeared: a letter, a letter with a point, or 'The answer is X.' exactly once."
    options = 'ABCDE'
    if text in list(options): said = text
    elif len(text) >= 3 and text[0] in options and text[1:3] == '. ': said = text[0]
    else:
        found = re.findall(r'The answer is ([A-Z]).', text)
        said = found[0] if len(found) == 1 else 'FAILED'
    return options.index(said) if said in list(options[:choices]) else None

def as_it_stands(text, choices):
    "LLaVA's rule of today: the sentence with its point is looked for before the one without."
    text, options, said = text.replace('\n', '. '), 'ABCDE', 'FAILED'
    if text.strip() in list(options): said = text.strip()
    elif len(text) >= 3 and text[0] in options and text[1:3] == '. ': said = text[0]
    else:
        ways = (re.search(pattern, text) for pattern in (r'The answer is ([A-E])\.', r'The answer is ([A-E])'))
        said = next((found[1] for found in ways if found), said)
    return options.index(said) if said in list(options[:choices]) else None

STRICT = {'A': 0, 'B.': None, 'C. blue': 2, 'C\nblue': None, 'The answer is B': None, 'The answer is B.': 1,
          'The answer is B. No, The answer is C.': None, 'The answer is D.': None, 'The answer is Z.': None,
          ' A ': 0, 'I think The answer is C, and more': 2, 'b': None, '': None, 'AB': None}

@pytest.mark.parametrize('answer, number', STRICT.items())
def test_the_stricter_rule_of_the_paper(answer, number):
    assert scienceqa_choice(answer, 3, strict=True) == number == as_published(answer.strip(), 3)

def test_the_two_rules_part_where_the_page_says_so():
    kinder = [a for a in STRICT if scienceqa_choice(a, 3) != scienceqa_choice(a, 3, strict=True)]
    assert kinder == ['C\nblue', 'The answer is B', 'The answer is B. No, The answer is C.']
    q = Question('q', 'Which?', 1, ('red', 'green', 'blue'))
    assert judge(q, 'The answer is B').right and not judge(q, 'The answer is B', strict=True).right
    mixed = [f'{a}{b}' for a in ('The answer is ', 'So. The answer is ', '', 'A. ') for b in
             ('A', 'B.', 'C. The answer is C.', 'E', 'F.', 'D\n', 'a')]
    for a in mixed:
        assert scienceqa_choice(a, 4, strict=True) == as_published(a.strip(), 4), a
        assert scienceqa_choice(a, 4) == as_it_stands(a, 4), a

@pytest.mark.parametrize('answer', [*SCIENCE, *STRICT])
def test_the_rule_as_it_stands(answer): assert scienceqa_choice(answer, 3) == as_it_stands(answer, 3)

def test_scienceqas_own_script_draws_where_nothing_can_be_read():
    several = [Question(str(i), 'Which?', 1, plain.choices) for i in range(300)]
    drawn = [judge(q, 'I cannot tell', guess=True) for q in several]
    assert .2 < np.mean([a.right for a in drawn]) < .47
    assert drawn == [judge(q, 'I cannot tell', guess=True) for q in several]
    assert not any(judge(q, 'I cannot tell').right for q in several) and {a.why for a in drawn} == {REFUSED}
    assert judge(plain, 'A', guess=True) == judge(plain, 'A') # what can be read is read
    strictly = [judge(q, 'The answer is A', guess=True, strict=True).read for q in several]
    assert set(strictly) == set('ABC')

@pytest.mark.parametrize('answer, why', [
    ('I am sorry, I cannot help with that.', REFUSED), ("I can't see any image", REFUSED),
    ('No image is given.', REFUSED),
    ('I do not know.', REFUSED), ('D', OUTSIDE), ('(E)', OUTSIDE), ('The answer is F.', OUTSIDE), ('G. none', OUTSIDE),
    ('', 'empty'), (' \n', 'empty'), ('a bird', 'unread'), ('b', 'unread'), ('(D) or rather (B)', 'unread')])
def test_a_refusal_is_no_answer_outside_the_choices(answer, why):
    assert why_unread(answer, 'ABC') == why
    assert judge(plain, answer).why == why and not judge(plain, answer).right

def test_kinds_of_answers_are_counted():
    run = [judge(plain, a) for a in ('B', 'A', 'I cannot tell', 'E', '', 'a bird')]
    assert answer_kinds(run) == dict.fromkeys(('right', 'wrong', REFUSED, OUTSIDE, 'empty', 'unread'), 1)
    values = {r['metric']: r['value'] for r in vqa_records('real', 'mini', 'test', [run])}
    assert values['unread'] == 4 / 6 and values[REFUSED] == values[OUTSIDE] == 1 / 6
    opened = Question('q', 'How many?', ('12',))
    assert [judge(opened, a, 'mmmu').why for a in ('12', '13', 'I cannot count them')] == ['', '', REFUSED]
    assert answer_kinds([judge(opened, a, 'mmmu') for a in ('12', '13')])['wrong'] == 1

def test_the_stricter_rule_is_asked_for(monkeypatch):
    import gmail_nb.vqa as room
    monkeypatch.setattr(room, 'answer_all', lambda model, asked, *_: ['The answer is B'] * len(asked))
    see = type('See', (), dict(encoder=None))
    model, questions = type('Model', (), dict(marker='<image>')), Questions(small_scienceqa())
    kind, strict = (room.ask_questions(model, see, questions, strict=s) for s in (False, True))
    assert [a.read for a in kind[:3]] == ['B'] * 3 and {a.read for a in strict} == {'-'}

OPEN = [
    ('24', ('24',), True),
    ('The result is 24.0', ('24',), True),
    ('so x = 24', ('24',), True),
    ('124', ('24',), False),
    ('about 1,200', ('1200',), True),
    ('2.4e1', ('24',), True),
    ('A parabola', ('parabola',), True),
    ('hyperbola', ('parabola',), False),
    ('the letter a here', ('a',), True),
    ('data', ('b',), False),
    ('', ('x',), False),
]

@pytest.mark.parametrize('answer, right, is_right', OPEN)
def test_open_answers(answer, right, is_right): assert open_right(answer, right) == is_right

def test_what_cannot_be_read_is_wrong_unless_drawn():
    assert not judge(plain, 'no idea', 'mmmu').right and judge(plain, 'no idea', 'mmmu').read == '-'
    drawn = [judge(Question(str(i), 'Which?', 1, plain.choices), 'no idea', 'mmmu', guess=True) for i in range(300)]
    assert 0.2 < sum(a.right for a in drawn) / 300 < 0.47 and drawn == [
        judge(Question(str(i), 'Which?', 1, plain.choices), 'no idea', 'mmmu', guess=True) for i in range(300)
    ]


def test_records_of_a_run():
    run = [judge(q, a) for q, a in zip(Questions(small_scienceqa()), ['B', 'A', 'what?', 'A', 'C', 'A'])]
    values = {r['metric']: r['value'] for r in vqa_records('real', 'mini', 'test', [run])}
    assert values == {'accuracy': 5 / 6, 'accuracy:language science': 1., 'accuracy:natural science': 2 / 3,
                      'accuracy:social science': 1., 'unread': 1 / 6}

def test_arms_and_seeds_answer_the_same_questions():
    run = [Answered(str(i), '', 'A', 'A', bool(i % 2)) for i in range(4)]
    with pytest.raises(ValueError, match='cannot be pooled'): accuracy([run, run[::-1]])
    with pytest.raises(ValueError, match='ask both the same'): accuracy_difference([run], [run[::-1]])

def test_a_set_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match='no parquet files of questions'): load_questions(tmp_path)
    with pytest.raises(ValueError, match='is no set of questions'): load_questions(emoji('unseen', 'noto'))

def test_the_place_of_the_right_choice_says_nothing():
    drawings = emoji('unseen', 'twemoji')
    quiz = drawing_questions(drawings, pool=emoji(source='twemoji'))
    for kind in OPEN_WORDS:
        places = Counter(q.answer for q in quiz if q.subject == kind)
        assert max(places.values()) - min(places.values()) <= 1
    assert len({q.key for q in quiz}) == len(quiz) and all(check_question(q) and len(set(q.choices)) == 4 for q in quiz)
    assert all(set(q.letters) == set(LETTERS[:4]) for q in quiz)

def test_only_one_thing_is_counted():
    drawings = emoji('unseen', 'twemoji')
    counted = {q.key for q in drawing_questions(drawings, ('count',), emoji(source='twemoji'))}
    named = zip(drawings['key'], drawings['label'])
    several = [k for k, name in named if name in ('pancakes', 'bow and arrow', 'bubbles')]
    assert len(several) == 3 and not {f'{k}:count' for k in several} & counted and len(counted) > len(drawings) / 2

def test_colours_of_plain_pictures():
    def half(colour):
        im = Image.new('RGB', (8, 8), 'white')
        im.paste(colour, (0, 0, 8, 5))
        return im

    for name, colour in dict(
        red=(220, 30, 40),
        green=(60, 170, 60),
        blue=(40, 90, 220),
        yellow=(250, 210, 60),
        brown=(120, 70, 40),
        black=(10, 10, 10),
        gray=(128, 128, 128),
    ).items(): assert main_colour(half(colour)) == name
    two = half((220, 30, 40))
    two.paste((40, 90, 220), (0, 3, 8, 6))
    assert main_colour(two) is None

def test_prompts_are_those_of_the_benchmarks():
    q = scienceqa_question(
        dict(image=None, question='Which  is it?', choices=['x', 'y'], answer=0, hint=' ', subject=''), 'q'
    )
    assert scienceqa_prompt(q).startswith('Context: N/A\nQuestion: Which is it?\nOptions: (A) x (B) y\n')

# sets as they are published

def test_small_sets_have_the_columns_of_the_hub():
    science, mmmu = small_scienceqa(), small_mmmu()
    assert science.column_names == ['image', 'question', 'choices', 'answer', 'hint', 'task', 'grade',
                                    'subject', 'topic', 'category', 'skill', 'lecture', 'solution']
    assert mmmu.column_names == ['id', 'question', 'options', 'explanation', *(f'image_{i}' for i in range(1, 8)),
                                 'img_type', 'answer', 'topic_difficulty', 'question_type', 'subfield']
    assert science.features['answer'].dtype == 'int8' and mmmu.features['options'].dtype == 'string'

def test_scienceqa_scored_by_hand():
    "Six questions, four right: two of three of natural science, one of two of language, one of one of social science."
    said = ['B', 'A.', 'The answer is C', 'A', 'I cannot tell', 'A']
    run = [judge(q, a) for q, a in zip(Questions(small_scienceqa()), said)]
    assert [a.right for a in run] == [True, False, True, True, False, True] # 'A.' is not read as a letter
    found = {s: i.value for s, i in accuracy([run]).items()}
    assert found == {'all': 4 / 6, 'natural science': 2 / 3, 'language science': 1 / 2, 'social science': 1.}
    assert len(Questions(small_scienceqa(), images_only=True)) == 4

def test_mmmu_scored_by_hand():
    "Five questions: two images, images as choices, an open number, an open word, and a refusal."
    questions = Questions(small_mmmu())
    assert [len(q.images) for q in questions] == [1, 2, 3, 1, 1]
    said = ['I am sorry, I cannot help with that', '(B)', 'It is picture C', 'so there are twelve', 'The half is 1.250']
    run = [judge(q, a, 'mmmu') for q, a in zip(questions, said)]
    assert [a.right for a in run] == [False, True, True, True, True] and run[0].read == '-'
    assert {s: i.value for s, i in accuracy([run]).items()} == {'all': 4 / 5, 'Art': 1., 'Biology': 1 / 2, 'Math': 1.}
    drawn = judge(questions[0], said[0], 'mmmu', guess=True)
    assert drawn.read in questions[0].letters and drawn.right == (drawn.read == 'B')
    wrong = ['A', 'neither of them', '(C) or rather (A)', '13', '2.5']
    assert not any(judge(q, a, 'mmmu').right for q, a in zip(questions, wrong))

YAML = '''multi: "{}

{}

Answer with the option's letter from the given choices directly."
short: "{}

Answer the question using a single word or phrase."
''' # as MMMU's script for LLaVA has them; an empty line of YAML is one line break

def test_mmmu_is_asked_to_the_letter():
    form, (_, two, _, opened, _) = yaml.safe_load(YAML), Questions(small_mmmu())
    listed = ''.join(f'({l}) {c}\n' for l, c in zip('ABCD', two.choices))
    assert mmmu_prompt(two) == form['multi'].format(two.text, listed)
    assert mmmu_prompt(opened) == form['short'].format(opened.text)

def test_of_two_choices_at_one_place_the_first_counts():
    assert mmmu_choice('in the picture there is a red car on it', ('red', 'red car', 'car of red')) == 0

def test_guesses_are_asked_for(monkeypatch):
    import gmail_nb.vqa as room
    monkeypatch.setattr(room, 'answer_all', lambda model, asked, *_: ['no idea'] * len(asked))
    see = type('See', (), dict(encoder=None))
    model, questions = type('Model', (), dict(marker='<image>')), Questions(small_mmmu())
    plain, drawn = (room.ask_questions(model, see, questions, guess=g) for g in (False, True))
    assert [a.read for a in plain[:3]] == ['-'] * 3 and all(a.read in 'ABCD' for a in drawn[:3])

@pytest.mark.parametrize('answer', ['?', None, float('nan'), 'nan', '', ' ', "['?']", "['12', None]"])
@pytest.mark.parametrize('options', ['[]', "['x', 'y']"])
def test_answers_that_are_kept_back(answer, options):
    if options != '[]' and str(answer).startswith('['): return
    row = dict(question='?', options=options, answer=answer, image_1=None)
    with pytest.raises(ValueError, match="question 'test_Art_1' has no right answer"): mmmu_question(row, 'test_Art_1')

def test_a_choice_may_be_the_sign_of_an_answer_that_is_kept_back():
    "A sign to choose is no missing answer: the set stays, and each choice is shown as it is."
    signs = ['?', 'nan', '', '!']
    row = dict(question='Which sign is it?', options=str(signs), answer='B', image_1=None)
    q = mmmu_question(row, 'validation_Math_1')
    assert q.choices == tuple(signs) and q.right == 'B' and '(A) ?' in mmmu_prompt(q)
    with pytest.raises(ValueError, match='has no right answer'): mmmu_question(row | dict(answer='?'), 'test_Math_1')

@pytest.mark.parametrize('key, subject', [
    ('validation_Art_Theory_12', 'Art_Theory'), ('dev_Math_1', 'Math'), ('7', 'Painting')])
def test_a_subject_of_mmmu_is_its_configuration(key, subject):
    row = dict(question='?', options="['x', 'y']", answer='A', image_1=None, subfield='Painting')
    assert mmmu_question(row, key).subject == subject

# folders and the Hub

@pytest.fixture(scope='module')
def laid_out(tmp_path_factory):
    "ScienceQA and MMMU as the Hub lays them out."
    root = tmp_path_factory.mktemp('sets')
    science, mmmu = small_scienceqa(), small_mmmu()
    with quiet_datasets():
        for i, split in enumerate(('train', 'validation', 'test')):
            file = f'{split}-00000-of-00001-1028f23e353fbe3e.parquet'
            science.select(range(i, 6, 3)).to_parquet(root/'ScienceQA'/'data'/file)
        for subject, rows in dict(Biology=[0, 1], Art=[2], Math=[3, 4]).items():
            for split in ('dev', 'validation'):
                mmmu.select(rows).to_parquet(root/'MMMU'/subject/f'{split}-00000-of-00001.parquet')
    return root

def test_a_folder_is_read_by_split_and_subject(laid_out):
    science = [q.text for q in Questions(small_scienceqa())]
    for folder in ('ScienceQA', 'ScienceQA/data'):
        found = load_questions(laid_out/folder, 'test')
        assert [q.text for q in found] == science[2::3] and found.place('1') == 'scienceqa/test/1'
        asked = r"the splits 'test', 'train', 'validation': choose one \(split in Python, --split\)"
        with pytest.raises(ValueError, match=asked):
            load_questions(laid_out/folder)
        with pytest.raises(ValueError, match="no parquet files of the split 'dev'"):
            load_questions(laid_out/folder, 'dev')
    assert len(load_questions(laid_out/'MMMU', 'validation')) == 5
    assert {q.subject for q in load_questions(laid_out/'MMMU', 'validation', 'Math')} == {'Math'}
    with pytest.raises(ValueError, match="of the subject 'Mathematics'"):
        load_questions(laid_out/'MMMU', 'dev', 'Mathematics')
    assert len(load_questions(laid_out/'ScienceQA'/'data'/'test-00000-of-00001-1028f23e353fbe3e.parquet')) == 2

def test_a_set_on_the_hub_has_its_own_split_and_all_subjects(monkeypatch):
    "No network: the library's three calls are answered from the small sets."
    asked, sets = [], dict(science=small_scienceqa(), mmmu=small_mmmu())
    def named(name): return sets[name.split('/')[1]]
    def load(name, config, split): asked.append((config, split)); return named(name)
    def configs(name): return ['default'] if 'science' in name else ['Art', 'Biology', 'Math']
    def builder(name, config): return type('B', (), dict(info=type('I', (), dict(features=named(name).features))))
    for name, work in dict(load_dataset=load, get_dataset_config_names=configs, load_dataset_builder=builder).items():
        monkeypatch.setattr(datasets, name, work)
    assert load_questions('hub/science').split == 'test' and asked == [('default', 'test')]
    asked.clear()
    assert len(load_questions('hub/mmmu')) == 15 and asked == [(c, 'validation') for c in ('Art', 'Biology', 'Math')]
    asked.clear()
    load_questions('hub/mmmu', 'dev', 'Art')
    assert asked == [('Art', 'dev')]
    nothing = type('B', (), dict(info=type('I', (), dict(features=None))))
    monkeypatch.setattr(datasets, 'load_dataset_builder', lambda *_: nothing)
    with pytest.raises(ValueError, match='choose a split with --split'): load_questions('hub/mmmu')
