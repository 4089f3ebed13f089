"Questions: what is refused, how they are asked, what counts as an answer, and questions about drawings that nobody can answer by place."

import gmail_nb.runtime
from collections import Counter

import datasets
import pytest
from gmail_nb.data import emoji
from gmail_nb.vqa import (
    LETTERS, OPEN_WORDS, Answered, Question, Questions, accuracy, accuracy_difference, check_question,
    drawing_questions, judge, load_questions, main_colour, mmmu_choice, mmmu_prompt, mmmu_question, open_right,
    scienceqa_choice, scienceqa_prompt, scienceqa_question, vqa_records, with_markers)
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

@pytest.mark.parametrize('answer', ['', 'Z', 'AB', ' '])
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

# Forty answers of the kind that models give, each judged by hand
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


def test_scores_by_hand():
    "A set in the real schema of ScienceQA; the numbers are counted by hand."
    rows = [
        dict(
            image=None,
            question=f'Q{i}?',
            choices=['x', 'y'],
            answer=i % 2,
            hint='',
            subject='natural science' if i < 6 else 'social science',
        )
        for i in range(8)
    ]
    ds = datasets.Dataset.from_list(rows, features=datasets.Features(dict(
        image=datasets.Image(), question=datasets.Value('string'), choices=datasets.List(datasets.Value('string')),
        answer=datasets.Value('int8'), hint=datasets.Value('string'), subject=datasets.Value('string'))))
    run = [judge(q, a) for q, a in zip(Questions(ds), ['A', 'B', 'A', 'A', 'what?', 'B', 'A', 'B'])]
    found = {s: i.value for s, i in accuracy([run]).items()}
    assert found == {'all': .75, 'natural science': 4 / 6, 'social science': 1.}
    values = {r['metric']: r['value'] for r in vqa_records('real', 'mini', 'test', [run])}
    assert values == {
        'accuracy': 0.75,
        'accuracy:natural science': 4 / 6,
        'accuracy:social science': 1.0,
        'unread': 1 / 8,
    }


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
