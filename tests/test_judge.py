"Commands judge their own result: what they keep, what they say, what a program reads, and the page they leave."
import gmail_nb.runtime
import json
import random
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from gmail_nb.align import GenReal
from gmail_nb.cli.commands import COMMANDS, gmail_align, gmail_bench, gmail_eval, gmail_experiment, gmail_tune
from gmail_nb.cli.flags import Command, Commands, completion, run_command
from gmail_nb.data import emoji
from gmail_nb.files import read_results
from gmail_nb.runs.align import align_sets
from gmail_nb.runs.judge import FEWEST, SAID, Measure, Verdict, enough_kept_out, judged, read_verdict
from gmail_nb.settings import AdapterSettings, AlignRunSettings, AlignSettings

KEPT = 64
SETTINGS = AlignRunSettings(
    AdapterSettings(adapted_share=1 / 7), AlignSettings(epochs=2, batch_size=16, lr=3e-3), validation_share=.4
)

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Drawings in two styles that stand for real and generated ones, in true pairs and in shuffled ones."
    home = tmp_path_factory.mktemp('home')
    known = {s: emoji('A', source=s) for s in ('noto', 'fluent')}
    keys = sorted(set(known['noto']['key']) & set(known['fluent']['key']))[:KEPT]
    at = {s: {k: i for i, k in enumerate(ds['key'])} for s, ds in known.items()}
    sets = {s: ds.select([at[s][k] for k in keys]).select_columns(['key', 'image', 'captions'])
            for s, ds in known.items()}
    sets['noto'].to_parquet(home/'real.parquet')
    sets['fluent'].to_parquet(home/'drawn.parquet')
    shuffled = random.Random(0).sample(range(KEPT), KEPT)
    words = sets['fluent'].select_columns(['key', 'captions'])
    mixed = concatenate_datasets([words, sets['fluent'].select_columns('image').select(shuffled)], axis=1)
    mixed.select_columns(['key', 'image', 'captions']).to_parquet(home/'wrong.parquet')
    return home

def aligned(home, drawn, out, **how):
    sets = str(home/'real.parquet'), str(home/f'{drawn}.parquet')
    return align_sets(*sets, 'embedded', home/out, replace(SETTINGS, **how))

@pytest.fixture(scope='module')
def good(home):
    aligned(home, 'drawn', 'good')
    return home/'good'

# Aligning

def test_what_came_closer_says_so_on_the_card_and_on_the_page(good):
    verdict = read_verdict(good)
    assert verdict.said in SAID and verdict.facts['kept_step'] in (0, 2, 4, 6, 8)
    assert set(verdict.measures) == {'the cosine of validation pairs', 'generated-to-real R@1 on them'}
    n = next(iter(verdict.measures.values())).n
    assert verdict.facts['judged_by'] == n >= FEWEST and f'{n} pairs' in verdict.sentences[0]
    page = (good/'report.html').read_text()
    order = [page.index(t) for t in ('<img', verdict.sentences[0][:30], 'paired_cosine', 'adapters.rank', 'torch')]
    assert order == sorted(order) and not re.search(r'src="(?!data:)', page)
    assert {p.name for p in good.glob('*.png')} == {'pairs.png', 'worst.png', 'cosines.png', 'gap.png', 'loss.png'}

def test_the_pairs_that_judge_did_not_choose(good):
    rows = [json.loads(l) for l in (good/'log.jsonl').read_text().splitlines()]
    verdict, held = read_verdict(good), {r['n'] for r in read_results(good/'results.jsonl')}
    assert held.pop() - verdict.facts['judged_by'] in (verdict.facts['judged_by'], verdict.facts['judged_by'] + 1)
    best = max((r for r in rows if 'paired_cosine' in r), key=lambda r: r['paired_cosine'])
    assert verdict.facts['kept_step'] in (0, best['step'])

@pytest.mark.slow
def test_a_run_of_before_that_is_over_says_which_weights_it_has(home):
    "Begun without the best weights, it goes on with them and has those of its end."
    last = aligned(home, 'drawn', 'before', keep_best=False)
    again = aligned(home, 'drawn', 'before')
    assert read_verdict(home/'before').facts['kept_step'] in (0, 4)
    if read_verdict(home/'before').facts['kept_step']: assert torch.equal(last.proj_gen.weight, again.proj_gen.weight)

def test_pairs_learned_by_heart_leave_the_encoder_as_it_came(home):
    "Shuffled pairs teach nothing that holds for others: the start is kept, and the worst pairs are shown."
    model = aligned(home, 'wrong', 'wrong', align=replace(SETTINGS.align, epochs=4))
    verdict = read_verdict(home/'wrong')
    assert verdict.said in ('hurts', 'unclear', 'helps') and (home/'wrong'/'worst.png').exists()
    if verdict.facts['kept_step'] == 0:
        x = torch.randn(2, 3, 112, 112)
        with torch.inference_mode():
            assert torch.equal(model.encode_generated(x), model.encode_real(x))
        assert 'as it came' in verdict.text()
    if verdict.said != 'helps': assert 'more pairs' in verdict.text() and 'worst.png' in verdict.text()

def test_a_worse_training_is_put_back(home, monkeypatch):
    "A training that moves away from the partners ends as the encoder that it began with."
    import gmail_nb.runs.align as room
    def worse(model, sets, *rest):
        with torch.no_grad(): model.proj_gen.weight.copy_(-torch.eye(model.encoder.dim))
        model.tau = .07
        return [dict(step=1, loss=3., lr=1e-3), dict(step=2, loss=.1, lr=1e-3, paired_cosine=-.4)]
    monkeypatch.setattr(room, 'train_pairs', worse)
    model = aligned(home, 'drawn', 'worse')
    verdict, saved = read_verdict(home/'worse'), GenReal.from_pretrained(home/'worse')
    assert verdict.said == 'hurts' and verdict.facts['kept_step'] == 0 and 'by heart' in verdict.text()
    for m in (model, saved): assert torch.equal(m.proj_gen.weight, torch.eye(m.encoder.dim))
    found = {(r['arm'], r['metric']): r['value'] for r in read_results(home/'worse'/'results.jsonl')}
    assert found['base', 'paired_cosine'] == found['gmail', 'paired_cosine']
    aligned(home, 'drawn', 'kept', keep_best=False)
    assert torch.equal(GenReal.from_pretrained(home/'kept').proj_gen.weight, -torch.eye(saved.encoder.dim))
    assert 'weights of the end' in read_verdict(home/'kept').text()

def test_the_command_says_it_to_people_and_to_programs(home, good, capsys):
    argv = [str(home/'real.parquet'), '--generated', str(home/'drawn.parquet'), '--adapted-share', str(1 / 7),
            '--epochs', '2', '--batch-size', '16', '--lr', '3e-3', '--validation-share', '.4', '--out', str(good)]
    assert gmail_align(argv) == 0
    said = capsys.readouterr().out
    assert read_verdict(good).sentences[0] in said and f'report: {good}/report.html' in said
    assert gmail_align([*argv, '--json']) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found['status'] == 0 and found['verdict']['said'] == read_verdict(good).said and 'model:' in said.err

# What may be said

@pytest.mark.parametrize('shift, word', [(.1, 'helps'), (0., 'unclear'), (-.1, 'hurts')])
def test_the_interval_chooses_the_word(shift, word):
    rng = np.random.default_rng(1)
    before = rng.normal(.3, .1, 60)
    found = judged('Aligning', [Measure('it', before + rng.normal(shift, .05, 60), before)])
    assert found.said == word

@pytest.mark.parametrize('n', [0, 1, FEWEST - 1])
def test_too_few_tell_nothing(n):
    found = judged('Aligning', [Measure('it', np.ones(n), np.zeros(n))])
    assert found.said == 'untold' and not found.measures

def test_a_verdict_comes_back_from_a_card_and_is_absent_from_older_ones(tmp_path):
    rng = np.random.default_rng(1)
    found = judged('Aligning', [Measure('it', rng.normal(size=20), rng.normal(size=20))])
    (tmp_path/'card.json').write_text(json.dumps(dict(verdict=found.card())))
    assert read_verdict(tmp_path) == found
    for old in ({}, dict(verdict='good'), dict(verdict=dict(said='superb'))):
        (tmp_path/'card.json').write_text(json.dumps(old))
        assert read_verdict(tmp_path) is None

# One object for programs

def test_one_object_on_standard_output(capsys):
    def greet(name:str): # who
        "Greet."
        print('hello')
        return dict(greeted=name)
    status = Command(greet, name='gmail_greet')(['Ada', '--json'])
    out, err = capsys.readouterr()
    assert status == 0 and json.loads(out) == dict(command='gmail_greet', status=0, greeted='Ada') and 'hello' in err

def test_an_error_is_an_object_too(capsys):
    def fail(): raise ValueError('no such folder')
    assert run_command('gmail_try', fail, as_json=True) == 2
    out, err = capsys.readouterr()
    assert json.loads(out) == dict(command='gmail_try', status=2, error='no such folder') and 'no such folder' in err
    for command, argv in ((gmail_tune, ['txt', '--json']), (gmail_eval, ['--modle', 'x', '--json'])):
        assert command(argv) == 2 and json.loads(capsys.readouterr().out)['status'] == 2

def test_another_process_says_nothing(capsys, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    run_command('gmail_try', lambda: dict(a=1), as_json=True)
    assert capsys.readouterr().out == ''

def test_a_dry_run_as_an_object(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status = gmail_align(['nowhere', '--generated', 'nothing', '--dry-run', '--json'])
    found = json.loads(capsys.readouterr().out)
    assert status == found['status'] == 2 and {'what', 'where', 'state', 'note'} == set(found['plan'][0])

def test_what_prints_json_of_its_own_tells_an_error_and_a_dry_run_as_an_object(capsys):
    for argv, status in ((['algn', '--json'], 2), (['align', '--dry-run', '--json'], 0)):
        assert gmail_bench(argv) == status
        found = json.loads(capsys.readouterr().out)
        assert found['command'] == 'gmail_bench' and found['status'] == status and ('error' in found) == bool(status)

def test_a_list_as_an_object(capsys):
    assert gmail_experiment(['--list', '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['names'].keys() == gmail_experiment.commands.keys() and all(found['names'].values())

@pytest.mark.parametrize('name', COMMANDS.commands)
def test_every_command_answers_with_an_object(name, capsys, monkeypatch, tmp_path):
    "Of an unknown flag, whatever kinds it has; and its help names --json, and what each status means."
    monkeypatch.chdir(tmp_path)
    command = COMMANDS.commands[name]
    for c in [*getattr(command, 'commands', {}).values(), *getattr(command, 'words', {}).values()] or [command]:
        assert c(['--no-such-flag', '--json']) == 2
        found = json.loads(capsys.readouterr().out)
        assert found['command'] == c.name and found['status'] == 2 and 'no-such-flag' in found['error']
        assert c(['--help']) == 0
        said = ' '.join(capsys.readouterr().out.split())
        assert '--json' in said and 'exit status: 0 done, 1 a defect of the program, 2 not possible as asked' in said

@pytest.mark.parametrize('n, share', [(60, '0.4'), (3000, '0.05'), (44, '0.5')])
def test_a_share_that_keeps_enough_out_is_named(n, share):
    said = enough_kept_out(n, 'pairs')
    assert said.startswith(f'--validation-share {share},') and f'of the {n} pairs' in said
    assert float(share) * n >= 2 * FEWEST

def test_of_a_dozen_no_share_keeps_enough_out(): assert enough_kept_out(12, 'pairs').startswith('more pairs')

# Completion

@pytest.fixture(scope='module')
def script(): return completion(COMMANDS, 'bash')

def completed(script, *words):
    typed = ' '.join(w or "''" for w in words)
    line = f'{script}\nCOMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _{words[0]}; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(['bash', '-c', line], capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return done.stdout.split()

@pytest.mark.parametrize('words, found', [
    (('gmail_tune', 'te'), ['text']), (('gmail_tune', 'text', '--arm', 'in'), ['indiscriminate']),
    (('gmail_align', '--validation-s'), ['--validation-share']), (('gmail_eval', 'vqa', '--bli'), ['--blind']),
    (('gmail_eval', '--how', ''), ['probe', 'fine-tune']), (('gmail_experiment', 'cur'), ['curve'])])
def test_bash_completes(script, words, found): assert completed(script, *words) == found

def test_every_command_prints_its_completion(capsys):
    assert COMMANDS(['--completion', 'zsh']) == 0 and capsys.readouterr().out.startswith('autoload')
    assert gmail_tune(['--completion', 'bash']) == 0
    assert 'complete -o filenames -F _gmail_tune gmail_tune' in capsys.readouterr().out
    assert gmail_tune.commands['text'](['--completion', 'bash']) == 2 # completed with its first word
    assert gmail_tune(['--completion', 'tcsh']) == 2

# Tuning and measuring

@pytest.fixture(scope='module')
def tuned(home):
    from gmail_nb.runs.presets import TEXT_RECIPES
    from gmail_nb.runs.tune_text import tune_from_files
    from gmail_nb.settings import TuneSettings
    settings = TuneSettings(steps=20, every=10, validation_share=.4)
    recipe = replace(TEXT_RECIPES['small'], settings=settings)
    tune_from_files(home/'tuned', recipe, real=str(home/'real.parquet'), desc=None)
    return home/'tuned'

def test_a_text_side_is_judged_on_captions_kept_out(tuned):
    verdict = read_verdict(tuned)
    n = next(iter(verdict.measures.values())).n
    assert verdict.said != 'untold' and FEWEST <= n <= KEPT and f'{n} captions' in verdict.sentences[0]
    page = (tuned/'report.html').read_text()
    assert page.index('<img') < page.index(verdict.sentences[0][:20]) < page.index('T2I R@1') < page.index('recipe.')
    assert {'found.png', 'worst.png', 'difference.png', 'loss.png'} <= {p.name for p in tuned.iterdir()}

@pytest.mark.slow
def test_a_measurement_has_a_sentence_for_each_difference(home, tuned, monkeypatch, capsys):
    monkeypatch.chdir(home)
    test = emoji('B', source='twemoji').select(range(30))
    test.select_columns(['key', 'image', 'captions']).to_parquet('test.parquet')
    rows = '--model', 'base=embedded', '--model', 'ours=tuned:tuned'
    assert gmail_eval([*rows, 'test.parquet', '--out', 'eval', '--json']) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert len(found['verdict']['sentences']) == 2 and found['verdict']['sentences'][0] in said.err
    assert 'ours in place of base' in found['verdict']['sentences'][0] and found['tables']
    page = (home/'eval'/'report.html').read_text()
    assert page.index('<img') < page.index('ours in place of base')

# Objects show themselves

def test_pairs_sets_and_models_show_themselves(home, good):
    from gmail_nb.data import pairs, show_captioned
    from gmail_nb.pages import ResultTable, show_page
    files, cache = (str(home/f'{n}.parquet') for n in ('real', 'drawn')), str(home/'cache')
    real, drawn = (Dataset.from_parquet(f, cache_dir=cache) for f in files)
    made = drawn.add_column('caption', [c[0] for c in drawn['captions']]).add_column('sample', [0] * len(drawn))
    assert pairs(real, made)._repr_png_()[:4] == b'\x89PNG' and len(show_captioned(real, 5).axes) >= 5
    card = GenReal.from_pretrained(good)._repr_html_()
    assert 'embedded' in card and 'lora of rank 4' in card
    assert 'paired_cosine' in ResultTable(read_results(good/'results.jsonl'))._repr_html_()
    assert show_page(good)._repr_html_().startswith('<iframe')
    with pytest.raises(FileNotFoundError, match='no page'): show_page(home)
