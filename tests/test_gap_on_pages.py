"The gap before and after stands on every page of what an aligned model is below; other pages say so."

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_runs_tune_text import files # noqa: F401  a fixture: 24 emoji, an image drawn for each, an aligned model

from gmail_nb.files import record, write_results
from gmail_nb.pages import data_uri
from gmail_nb.runs.align import GAP_TITLE, gap_before_and_after
from gmail_nb.runs.evaluate import aligned_below, evaluate_as_asked
from gmail_nb.runs.instructions import OWN_QUESTIONS
from gmail_nb.runs.judge import Verdict
from gmail_nb.runs.presets import TEXT_RECIPES
from gmail_nb.runs.tune_llava import Judged, write_llava_page
from gmail_nb.runs.tune_text import text_tries, tune_from_files
from gmail_nb.runs.vqa import VQAResult, aligned_behind, asked_set, write_vqa
from gmail_nb.settings import LlavaSettings, TuneSettings, VQASettings
from gmail_nb.tune import TunedText
from gmail_nb.vqa import Answered

def weight(item): return 15

PICTURE = b'\x89PNG a picture of the gap'

def as_aligned(folder, **values):
    "The files of a run of gmail_align that the pages read."
    folder.mkdir(exist_ok=True, parents=True)
    found = [record('align', arm, 'drawn', 'validation', 'paired_cosine', v, 0, 12) for arm, v in values.items()]
    write_results(folder/'results.jsonl', found)
    (folder/'gap.png').write_bytes(PICTURE)
    return folder

def test_the_numbers_and_the_picture_of_the_alignment(tmp_path):
    pictures, tables = gap_before_and_after(dict(mine=as_aligned(tmp_path/'a', base=.25, gmail=.75)))
    assert pictures == {f'{GAP_TITLE}: mine': data_uri(PICTURE)}
    said = str(tables[f'{GAP_TITLE}: mine'])
    assert '0.25' in said and '0.75' in said and 'base' in said and 'gmail' in said

def test_without_an_aligned_model_the_page_says_so():
    assert gap_before_and_after({}) == ({}, {GAP_TITLE: [['aligned model'], ['none: nothing was aligned here']]})

UNREAD = [(None, 'no results.jsonl'), ('{"a": ', 'not JSON'), ('', 'no gap was measured')]

@pytest.mark.parametrize('text, said', UNREAD)
def test_a_folder_without_numbers_costs_no_page(tmp_path, text, said):
    if text is not None: (tmp_path/'results.jsonl').write_text(text)
    (rows,) = gap_before_and_after(dict(a=tmp_path))[1].values()
    assert said in rows[1][0]

def page(out): return (Path(out)/'report.html').read_text(encoding='utf-8')

def recipe(): # two steps
    return replace(TEXT_RECIPES['small'], settings=TuneSettings(steps=2, every=1, validation_share=.2))

@pytest.fixture(scope='module')
def tuned(files): # noqa: F811
    folder = files['folder']
    as_aligned(folder/'model', base=.25, gmail=.75)
    tune_from_files(folder/'by_gmail', recipe(), files['made'], folder/'model', desc=None)
    tune_from_files(folder/'without', recipe(), files['made'], arm='indiscriminate', desc=None)
    return folder

def test_the_page_of_a_tuned_text_side(tuned):
    there, without = page(tuned/'by_gmail'), page(tuned/'without')
    assert GAP_TITLE in there and data_uri(PICTURE) in there and '0.75' in there
    assert 'nothing was aligned here' in without and data_uri(PICTURE) not in without

def test_the_page_of_a_measurement(tuned, monkeypatch):
    "Of no query: what is measured is the business of other tests."
    from gmail_nb.runs import evaluate as room
    monkeypatch.setattr(room, 'evaluate_rows', lambda models, data, run, *_: room.Results(run))
    for name in ('measured', 'base alone'): (tuned/name).mkdir()
    asked = dict(data=('emoji',), below=tuned, pictures=False)
    evaluate_as_asked(model=('base=embedded', 'ours=tuned:by_gmail'), out=tuned/'measured', **asked)
    assert f'{GAP_TITLE}: ours' in page(tuned/'measured') and data_uri(PICTURE) in page(tuned/'measured')
    evaluate_as_asked(model=('base=embedded',), out=tuned/'base alone', **asked)
    assert 'nothing was aligned here' in page(tuned/'base alone')

def test_rows_through_one_aligned_model_share_its_gap(tuned):
    models = dict(a='aligned:model', b='tuned:by_gmail', c='tuned:without', d='embedded', e='tuned:absent', f='hf:x')
    assert aligned_below(models, tuned) == {'a, b': (tuned/'model').resolve()}

def test_the_page_of_a_captioner(tuned, files, monkeypatch): # noqa: F811
    "Its last step alone: what is learned is the business of other tests."
    from gmail_nb.runs import tune_caption as room
    shown = {}
    monkeypatch.setattr(room, 'write_page', lambda out, title, pictures, verdict, tables, about: shown.update(
        pictures=pictures, tables=tables))
    for name in ('score_captioner', 'keep_captioner', 'write_results'):
        monkeypatch.setattr(room, name, lambda *_, **__: {})
    monkeypatch.setattr(room, 'captions_for', lambda *_, **__: [[]])
    monkeypatch.setattr(room, 'caption_records', lambda *_: [record('c', 'gmail', 'd', 'test', 'CIDEr', .5, 0, 3)])
    monkeypatch.setattr(room, 'judge_captions', lambda *_: room.Verdict('untold', ()))
    monkeypatch.setattr(room, 'caption_pictures_of', lambda *_: {})
    class Job:
        settings, run, arm, out, encoder = room.CaptionerSettings(), room.CaptionRunSettings(), 'gmail', tuned, None
        projection, broken, aligned = None, {}, {}
        class test: broken = {}
        class sets: test = None
    for aligned in ({}, dict(model=tuned/'model')):
        Job.aligned = aligned
        room.finish_captioner(Job, None, [])
        assert bool(shown['pictures']) == bool(aligned) and any(GAP_TITLE in t for t in shown['tables'])

def test_the_page_of_a_llava(tuned):
    it = Judged(None, {}, [], None, None, Verdict('untold', ('nothing was kept out',)))
    for name, model in (('seeing', tuned/'model'), ('plain', None)):
        (tuned/name).mkdir()
        write_llava_page(tuned/name, it, dict(project=[2., 1.]), LlavaSettings(), 'gmail', model)
    there, without = page(tuned/'seeing'), page(tuned/'plain')
    assert f'{GAP_TITLE}: model' in there and data_uri(PICTURE) in there and '0.75' in there
    assert 'nothing was aligned here' in without and data_uri(PICTURE) not in without

def llava_folder(folder, aligned):
    "As much of a tuned folder as the page of its answers reads."
    folder.mkdir()
    card = dict(kind='llava', settings={}, aligned=aligned and str(aligned))
    (folder/'card.json').write_text(json.dumps(card))
    return folder

def test_the_page_of_questions(tuned):
    tuned_llavas = dict(mine=llava_folder(tuned/'l1', tuned/'model'), other=llava_folder(tuned/'l2', None),
                        lost=llava_folder(tuned/'l3', tuned/'gone'), hub='llava-hf/llava-1.5-7b-hf')
    behind = aligned_behind(tuned_llavas)
    assert behind == dict(mine=(tuned/'model').resolve(), lost=tuned/'gone')
    asked = asked_set(OWN_QUESTIONS, VQASettings(limit=4))
    said = [Answered(asked[i].key, asked[i].subject, 'B', 'B', False, '') for i in range(4)]
    for name in ('mine', 'other', 'lost'):
        found = VQAResult({name: said}, 'ours', 'test', verdict=Verdict('untold', ('alone',)))
        out = tuned/f'asked {name}'
        out.mkdir()
        write_vqa(found, asked, {name: tuned_llavas[name]}, out, VQASettings())
    assert f'{GAP_TITLE}: mine' in page(tuned/'asked mine') and data_uri(PICTURE) in page(tuned/'asked mine')
    assert 'nothing was aligned here' in page(tuned/'asked other')
    assert 'no gap was measured' in page(tuned/'asked lost')

# What is advised where tuning did not help

def ran(best, n=10): return TunedText(None, None, [dict(step=s, loss=1.) for s in range(1, n + 1)], 0, best)

def test_more_steps_where_the_best_is_the_last_and_fewer_where_it_is_not():
    assert text_tries('unclear', ran(10), 130, 144)[1].startswith('more --steps than 10')
    assert text_tries('hurts', ran(3), 130, 144)[1].startswith('fewer --steps')
    assert text_tries('helps', ran(3), 130, 144) == ()

def test_where_too_few_were_kept_out_the_share_that_is_enough_is_named():
    (said,) = text_tries('untold', ran(3), 130, 144)
    assert said.startswith('--validation-share 0.2,') and 'of the 144 captions' in said
