"Tables 10 and 15: a LLaVA of CLIP and a small Llama, and a Llama alone, go the way of the paper's tables in miniature."
from dataclasses import replace

import pytest
from test_llava import language, tiny_llava, tiny_tokenizer
from transformers import LlamaForCausalLM

from gmail_nb.cli.commands import gmail_experiment
from gmail_nb.data import quiet_datasets
from gmail_nb.experiments.tables import (
    EMBEDDED_ARMS, LLAMA_CHAT, LLAVA_ID, QUESTION_SETS, TABLES, Drawing, TableRun, as_asked, chain, dry_table,
    embedded_answers, folder_name, llava_of, needs_of, paper_plan, question_place, run_table, table_miniature)
from gmail_nb.files import read_results, record, write_results
from gmail_nb.llava_training import trained_card
from gmail_nb.runs.presets import L14
from gmail_nb.splits import trained_on
from gmail_nb.vqa import small_mmmu, small_scienceqa

def weight(item): return 60

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "COCO, ScienceQA and MMMU in miniature, as they are laid out, and both models in folders."
    home = tmp_path_factory.mktemp('asked')
    sets = table_miniature(home/'sets')
    with quiet_datasets():
        for split in ('train', 'test'):
            small_scienceqa().to_parquet(sets/'ScienceQA'/'data'/f'{split}-00000-of-00001.parquet')
        for subject, rows in dict(Biology=[0, 1], Art=[2], Math=[3, 4]).items():
            small_mmmu().select(rows).to_parquet(sets/'MMMU'/subject/'validation-00000-of-00001.parquet')
    for part in tiny_llava(): part.save_pretrained(home/'llava')
    LlamaForCausalLM(language()).save_pretrained(home/'llama')
    tiny_tokenizer().save_pretrained(home/'llama')
    lm = f'{LLAVA_ID}={home/"llava"}', f'{LLAMA_CHAT}={home/"llama"}'
    run = TableRun(str(sets), encoder=(f'{L14}=embedded',), lm=lm, generator=('embedded',), steps=2, epochs=1,
                   batch_size=4, validation_share=.4, draw_steps=1, max_new_tokens=4, device='cpu')
    return home, run

ROWS = 'LLaVA as published', 'LLaVA + GMAIL', 'Llama 3 + GMAIL'

@pytest.fixture(scope='module')
def made(world):
    home, run = world
    return run_table('table10', home/'out', replace(run, rows=ROWS), say=lambda line: None)

def test_both_tables_ask_the_same_models():
    assert [r.last for r in TABLES['table10'].rows] == [r.last for r in TABLES['table15'].rows]
    arms = [r.last.arm for r in TABLES['table10'].rows if not isinstance(r.last, str)]
    assert set(arms) == {'real', 'indiscriminate', 'mix', 'gmail', 'both'} and arms.count('gmail') == 2
    needs = needs_of(TABLES['table10'])
    assert LLAVA_ID in needs['lms'] and LLAMA_CHAT in needs['lms'] and f'llava:{LLAVA_ID}' in needs['encoders']
    assert TABLES['table10'].rows[4].reported == dict(scienceqa=(87.6,))

def test_a_tower_goes_with_its_llava():
    link = llava_of('gmail')
    mine = as_asked(link, TableRun(lm=(f'{LLAVA_ID}=mine',)))
    assert mine.settings.encoder == mine.aligning.encoder == 'llava:mine' and mine.settings.language_model == 'mine'
    named = as_asked(link, TableRun(encoder=(f'llava:{LLAVA_ID}=llava:other',), lm=(f'{LLAVA_ID}=mine',)))
    assert named.aligning.encoder == 'llava:other' and as_asked(link, TableRun()) == link

def test_the_weights_of_every_generator_may_be_others_and_pinned():
    link = next(r.last for r in TABLES['table2'].rows if r.name == 'CLIP + GMAIL')
    drawings = [s for s in chain([link]) if isinstance(s, Drawing)]
    assert drawings and {(d.repo, d.revision) for d in drawings} == {(None, None)}
    asked = as_asked(link, TableRun(generator_repo='mine/sd2', generator_revision='a' * 40, draw_steps=7))
    found = [s for s in chain([asked]) if isinstance(s, Drawing)]
    assert {(d.repo, d.revision, d.draw.steps) for d in found} == {('mine/sd2', 'a' * 40, 7)}
    assert len(found) == len(drawings)

def test_table_10_is_tuned_asked_and_written(world, made):
    home, run = world
    assert {(r['arm'], r['dataset'], r['split'], r['metric'], r['n']) for r in made} == {
        (row, 'scienceqa', 'test', 'accuracy', 6) for row in ROWS}
    text = (home/'out'/'table10'/'paper.txt').read_text()
    assert text.count('in the paper') == 2 and '87.6' in text and '91.2' in text and 'LLaVA as published' in text
    assert (home/'out'/'table10'/'scienceqa'/'report.html').exists()
    assert read_results(home/'out'/'table10'/'table.jsonl') == made
    steps = paper_plan('table10', home/'out', replace(run, rows=ROWS))
    assert all(s.done for s in steps) and len({s.folder for s in steps}) == 5 # images, two alignments, two LLaVAs

def test_what_was_learned_is_what_the_row_says(world, made):
    home, run = world
    own = as_asked(llava_of('gmail'), run)
    card, settings = trained_card(home/'out'/folder_name(own))
    assert card['arm'] == 'gmail' and card['instructions'] == 6 and card['encoder'] == f'llava:{home/"llava"}'
    assert settings.project.steps == settings.instruct.steps == 2
    keys = trained_on(home/'out'/folder_name(own))
    assert 'scienceqa/train/0' in keys and not [k for k in keys if k.startswith('scienceqa/test')]

def test_table_15_asks_what_is_there_and_nothing_is_trained_again(world, made):
    home, run = world
    said = []
    records = run_table('table15', home/'out', replace(run, rows=ROWS), say=said.append)
    assert said and all('already there' in line for line in said)
    assert {(r['dataset'], r['split'], r['n']) for r in records} == {('mmmu', 'validation', 5)}
    answers = sorted((home/'out'/'table15'/'mmmu').glob('answers-*.jsonl'))
    assert len(answers) == len(ROWS)
    before = [f.stat().st_mtime_ns for f in answers]
    assert [r['value'] for r in run_table('table15', home/'out', replace(run, rows=ROWS), say=said.append)] == [
        r['value'] for r in records]
    assert [f.stat().st_mtime_ns for f in answers] == before # answers are read, not asked again

def test_the_command_and_its_dry_run(world, made, capsys):
    home, run = world
    flags = ['--scale', 'paper', '--root', run.root, '--out', home/'out', '--encoder', run.encoder[0], '--generator',
             'embedded', '--steps', 2, '--epochs', 1, '--batch-size', 4, '--validation-share', .4, '--draw-steps', 1,
             '--max-new-tokens', 4, '--device', 'cpu', *(v for lm in run.lm for v in ('--lm', lm)),
             *(v for r in ROWS for v in ('--rows', r))]
    assert gmail_experiment(['table10', *map(str, flags), '--dry-run']) == 0
    out = capsys.readouterr().out
    assert 'would run' in out and 'instructions' in out and 'questions' in out and out.count('done') == 5
    assert gmail_experiment(['table10', *map(str, flags)]) == 0
    assert '87.6' in capsys.readouterr().out

def test_a_dry_run_names_what_is_missing(tmp_path):
    rows = dry_table('table10', tmp_path/'out', TableRun(str(tmp_path)))
    lost = {r.what for r in rows if r.state in ('missing', 'refused')}
    assert {'generator', 'encoder', 'language model', 'questions', 'instructions'} <= lost
    assert any('2,213 steps of 256, and 1,193 of 128' in r.note for r in rows) and not (tmp_path/'out').exists()

def test_sets_of_questions_by_folder_or_on_the_hub(tmp_path):
    run = TableRun(str(tmp_path))
    assert question_place('mmmu', run) == QUESTION_SETS['mmmu'][1]
    (tmp_path/'MMMU').mkdir()
    assert question_place('mmmu', run) == str(tmp_path/'MMMU') and question_place('my/own', run) == 'my/own'

# on the embedded set

def embedded_records(folder):
    arms = dict.fromkeys(EMBEDDED_ARMS.values(), .3)
    write_results(folder/'llava_results.jsonl', [record('llava', a, 'emoji', 'unseen', 'accuracy', v, 0, 184,
                                                        low=v - .05, high=v + .05) for a, v in arms.items()])

@pytest.mark.parametrize('table, theirs', [('table10', ('85.2', '91.2')), ('table15', ('44.7', '48.3'))])
def test_embedded_records_stand_beside_the_papers_numbers(tmp_path, table, theirs):
    embedded_records(tmp_path)
    rows = embedded_answers(table, tmp_path)
    assert [r[0] for r in rows[1:8]] == list(EMBEDDED_ARMS) and all(r[1] for r in rows[1:8])
    assert set(theirs) <= {r[2] for r in rows} and rows[7][1].startswith('+30.0')
    with pytest.raises(FileNotFoundError, match='gmail_experiment llava writes it'):
        embedded_answers(table, tmp_path/'nowhere')

def test_the_experiment_of_llava_shows_both_tables(tmp_path, monkeypatch, capsys):
    import gmail_nb.experiments.llava as room
    def ran(out, *settings):
        embedded_records(tmp_path)
        (tmp_path/'llava_table.txt').write_text('a table')
    monkeypatch.setattr(room, 'llava_experiment', ran)
    assert gmail_experiment(['llava', '--out', str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert '85.2' in out and '48.3' in out and 'a table' in out
