"Cards of what gmail_tune writes, by tools/cards.py: numbers and verdict of the run, how it is used, what is no test."

import json
import subprocess
import sys

import pytest
from house import root, run

from gmail_nb.files import record, write_results
from gmail_nb.splits import write_trained_on

def weight(item): return 10

VERDICT = dict(said='hurts', sentences=['Tuning hurts: R@1 differs by -9.0 points.'],
               tries=['more captions'], measures={})
CARDS = {
    'tuned text': dict(kind='tuned text', base='embedded', arm='gmail', aligned='../elsewhere/aligned',
                       settings=dict(steps=40, tau=None)),
    'captioner': dict(prefix_length=4, mapper='mlp', encoder='embedded', arm='gmail',
                      preset=dict(steps=40, lm='small')),
    'llava': dict(kind='llava', encoder='embedded', arm='both', aligned=None,
                  settings=dict(language_model='smollm2', project=dict(steps=40))),
}

def folder_with(folder, card, **more):
    folder.mkdir(parents=True)
    (folder/'card.json').write_text(json.dumps(card | dict(versions=dict(gmail_nb='1.2.3')) | more))
    write_trained_on(folder, ['a', 'b'])
    return folder

SCORE = record('t', 'gmail', 'photos', 'test', 'CIDEr', .5, 0, 48)

@pytest.fixture(scope='module')
def texts(tmp_path_factory):
    "One call for four folders: a card of each kind, and a run of a captioner that holds it in a folder of its own."
    home, folders = tmp_path_factory.mktemp('cards'), {}
    for kind, card in CARDS.items():
        folders[kind] = folder_with(home/kind/'mine', card, verdict=VERDICT)
        write_results(folders[kind]/'results.jsonl', [SCORE | dict(low=.4, high=.6)])
    folder_with(home/'run'/'captioner', CARDS['captioner'])
    write_results(home/'run'/'results.jsonl', [SCORE])
    run(sys.executable, root/'tools'/'cards.py', *folders.values(), home/'run', cwd=root)
    assert not (home/'run'/'README.md').exists(), 'it belongs beside the weights'
    folders['run'] = home/'run'/'captioner'
    return {name: (folder/'README.md').read_text() for name, folder in folders.items()}

@pytest.mark.parametrize('kind', CARDS)
def test_a_card_has_the_numbers_the_verdict_and_the_command(texts, kind):
    text = texts[kind]
    assert 'Tuning hurts' in text and 'To try: more captions.' in text, 'bad news stands on the card as well'
    assert '| gmail | CIDEr | 0.500 [0.400, 0.600] | 48 | photos, test |' in text
    command = {'tuned text': 'gmail_eval --model tuned:mine', 'captioner': 'gmail_caption PICTURES --model mine',
               'llava': '--model mine'}[kind]
    assert command in text and 'its 2 training images' in text and 'steps | 40 |' in text and 'gmail_nb 1.2.3' in text
    assert 'tau' not in text and 'elsewhere' not in text and 'None' not in text
    assert 'pip install git+https://' in text and 'pip install gmail_nb' not in text, 'it is on no registry'
    head = json.loads(text.split('---')[1])
    assert head['library_name'] == 'gmail_nb'

def test_the_results_of_a_captioner_are_those_of_its_run(texts):
    assert '| gmail | CIDEr | 0.500 | 48 |' in texts['run'] and 'recorded no verdict' in texts['run']

def test_the_card_of_something_else_is_refused(tmp_path):
    folder_with(tmp_path/'features', dict(n=3, side='f_r'))
    command = [sys.executable, root/'tools'/'cards.py', tmp_path/'features']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode and 'something else' in done.stderr and not (tmp_path/'features'/'README.md').exists()
