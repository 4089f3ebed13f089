"Words of a caption: what the Java tokenizer of the captioning field does with the odd ones."
import pytest

from gmail_nb.caption_tokens import tokenize_caption
from gmail_nb.data import emoji

SENTENCES = {
    "A man's dog doesn't like the 3.5 inch (red) ball, isn't it?":
        "a man 's dog does n't like the 3.5 inch -lrb- red -rrb- ball is n't it",
    'Two people with "NY" T-shirts -- one on/off a 20-year-old surfboard...':
        'two people with ny t-shirts one on/off a 20-year-old surfboard',
    "They're at St. John's, 10:30 p.m., in the 1980's": "they 're at st. john 's 10:30 p.m. in the 1980 's",
    "Rock 'n' roll & 1/2 cup of 7-Eleven's café: $5.00": "rock 'n' roll & 1/2 cup of 7-eleven 's café $ 5.00"}
ODD = {
    'cannot gonna': 'can not gon na', 'the U.S. flag': 'the u.s. flag', 'an apple.An orange': 'an apple.an orange',
    '#1 @home a*b': '# 1 @home a * b', "o'clock d'Angelo": "o'clock d'angelo", "dogs' words": 'dogs words',
    '“curly” ‘s’ don’t': "curly s do n't", '½ £5 €3': '1/2 # 5 $ 3', 'www.foo.com x@y.com': 'www.foo.com x@y.com',
    '': '', '...': '', 'No. 5 no. x': 'no. 5 no x'}

@pytest.mark.parametrize('text, words', SENTENCES.items())
def test_sentences_are_cut_as_java_cuts_them(text, words): assert tokenize_caption(text) == words.split()

@pytest.mark.parametrize('text, words', ODD.items())
def test_odd_words_are_cut_as_java_cuts_them(text, words): assert tokenize_caption(text) == words.split()

def test_words_of_the_embedded_set_are_fewer_than_pieces_between_spaces_and_hold_no_punctuation():
    texts = [c for captions in emoji('B', source='twemoji').remove_columns('image')['captions'] for c in captions]
    cut = {t for c in texts for t in tokenize_caption(c)}
    assert len(cut) < len({t for c in texts for t in c.lower().split()})
    assert not any(set(t) & set(',;"') for t in cut)
