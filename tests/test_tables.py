"The paper's tables: what they are made of, what they share, and that each runs to its end in miniature."
import json
from dataclasses import replace
from pathlib import Path

import pytest

from gmail_nb.cli.flags import preset_named
from gmail_nb.experiments.tables import (TABLES, Drawing, TableRun, alignment_plan, as_asked, chain, check_runs,
                                         counts_of, dry_table, embedded_images, exchanged, folder_name, needs_of, paper_plan,
                                         passes_of, run_table, seeded, table_miniature, tables_text)
from gmail_nb.files import read_results
from gmail_nb.pipelines import tiny_stable_diffusion
from gmail_nb.runs import dry_run
from gmail_nb.runs.presets import CAPTION_SOURCES, CAPTIONER_PRESETS, EVAL_PRESETS, TEXT_RECIPES, with_known
from gmail_nb.settings import GENERATORS, CaptionerSettings

def weight(item): return 60

MADE = {n: t for n, t in TABLES.items() if t.rows}
CAPTIONED = [n for n, t in TABLES.items() if t.task == 'caption']

# As data

def test_no_two_captioning_tables_are_one_configuration():
    rows = {n: tuple(r.last for r in TABLES[n].rows) for n in CAPTIONED}
    assert len(set(rows.values())) == len(rows) == 8

def test_ranks_and_generators_are_those_of_the_tables():
    adapters = [r.last.aligning.settings.adapters for r in TABLES['table11'].rows]
    assert [(a.tuning, a.rank) for a in adapters] == [('lora', 2), ('lora', 4), ('lora', 6), ('full', 4)]
    assert needs_of(TABLES['table17'])['generators'] == ['flux-dev'] and needs_of(TABLES['table6'])['generators'] == [
        'stable-diffusion-2'
    ]
    steps = {r.name: r.last.settings.steps for r in TABLES['table13'].rows}
    assert steps['GMAIL'] == steps['generated, no alignment'] and steps['base'] == 141_000
    assert [r.last.arm for r in TABLES['table16'].rows] == ['mix', 'gmail'] and TABLES['table8'].rows[
        1
    ].last.aligning.encoder.startswith('hf:google')


def test_more_captions_are_more_captions():
    drawn = list(dict.fromkeys(r.last.drawing.captions for r in TABLES['table7'].rows if not isinstance(r.last, str)))
    assert drawn == ['coco', 'cc3m', 'cc12m']
    assert {r.last.aligning.drawing.captions for r in TABLES['table7'].rows} == {'coco'} # CC's real images lie nowhere

def test_every_reported_number_has_a_metric():
    for t in MADE.values():
        for row in t.rows:
            for numbers in row.reported.values(): assert len(numbers) <= len(t.metrics)

def test_what_is_measured_is_never_learned_from():
    assert CAPTION_SOURCES['coco'].learned == 'train' # which has no image of val2014, and so none of val2017
    assert not {'val', 'test'} & set(CAPTION_SOURCES['coco'].source.split.split('+'))

def test_recipes_fix_no_temperature_of_ours():
    from gmail_nb.settings import TuneSettings
    for r in TEXT_RECIPES.values(): assert r.settings.tau == TuneSettings().tau

def test_every_needed_generator_and_caption_set_is_known():
    for t in MADE.values():
        needs = needs_of(t)
        assert set(needs['generators']) <= set(GENERATORS) and any(s in CAPTION_SOURCES for s in needs['sets'])

def test_old_names_of_presets_stay():
    assert {f'paper-table{n}' for n in (1, 6, 8, 9, 11, 13, 16, 17)} | {'small', 'paper-table1-llama'} <= set(
        CAPTIONER_PRESETS
    )
    assert {'paper-table2', 'paper-table3', 'paper-table4', 'paper-table5', 'paper-table7'} == set(EVAL_PRESETS)

def test_four_bit_can_be_reached_where_there_is_such_a_setting():
    known = {f for f in CaptionerSettings.__dataclass_fields__}
    assert 'four_bit' in known and CAPTIONER_PRESETS['llama-4bit'].settings.four_bit
    assert with_known(CaptionerSettings(), no_such=1) == CaptionerSettings()

# What is shared

def test_equal_steps_have_one_folder_and_others_have_not():
    assert folder_name(Drawing()) == folder_name(Drawing()) != folder_name(Drawing(generator='flux-dev'))
    nine, eleven = ({s.folder for s in paper_plan(t)} for t in ('table9', 'table11'))
    assert len(nine & eleven) == 4
    everything = [s.folder for t in MADE for s in paper_plan(t)]
    drawings = {f for f in everything if f.name.startswith('drawing')}
    assert len(drawings) == 4 # COCO by two generators, CC3M and CC12M

def test_a_step_comes_after_those_that_it_needs():
    for table in MADE:
        order = [folder_name(s.link) for s in paper_plan(table, run=TableRun(seeds=2))]
        for step in paper_plan(table, run=TableRun(seeds=2)):
            at = order.index(folder_name(step.link))
            for before in chain([step.link])[:-1]: assert order.index(folder_name(before)) < at

def test_seeds_share_the_images():
    one, two = (paper_plan('table6', run=TableRun(seeds=n)) for n in (1, 2))
    kinds = [type(s.link).__name__ for s in two]
    assert kinds.count('Drawing') == 1 and kinds.count('Aligning') == 2 and len(two) == 2 * len(one) - 1
    link = TABLES['table6'].rows[1].last
    assert seeded(link, 3).aligning.settings.align.seed == 3 and seeded(link, 0) == link

def test_names_are_exchanged():
    assert exchanged('a', ('b',)) == 'b' and exchanged('a', ('c=b',)) == 'a' and exchanged('a', ('a=b',)) == 'b'
    link = as_asked(
        TABLES['table17'].rows[1].last, TableRun(generator=('flux-dev=embedded',), epochs=2, validation_share=0.3)
    )
    assert link.drawing.generator == link.aligning.drawing.generator == 'embedded' and link.start.drawing is None
    assert link.aligning.settings.align.epochs == 2 and link.aligning.settings.validation_share == .3

# In miniature

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    home = tmp_path_factory.mktemp('tables')
    table_miniature(home/'sets')
    tiny_stable_diffusion(home/'flux', seed=1)
    run = TableRun(
        str(home/'sets'),
        encoder=('embedded',),
        lm=('small',),
        steps=3,
        epochs=1,
        batch_size=8,
        generator=('stable-diffusion-2=embedded', f'flux-dev={home / "flux"}'),
        validation_share=0.4,
        max_new_tokens=8,
        draw_steps=1,
        device='cpu',
    )
    return home, run

@pytest.mark.parametrize(
    'table, rows',
    [
        ('table2', ('CLIP', 'CLIP + GMAIL')),
        ('table1', ('ClipCap', 'ClipCap + GMAIL')),
        pytest.param('table11', ('rank 2', 'full'), marks=pytest.mark.slow),
        pytest.param('table17', ('GMAIL',), marks=pytest.mark.slow),
        pytest.param('table11', (), marks=pytest.mark.slow),
        pytest.param('table17', (), marks=pytest.mark.slow),
    ],
)
def test_a_table_runs_to_its_end(world, table, rows, capsys):
    home, run = world
    run = replace(run, rows=rows, test=('coco-val2017', 'coco-5k') if table == 'table2' else ())
    records = run_table(table, home/'out', run)
    assert all(s.done for s in paper_plan(table, home/'out', run))
    names = rows or tuple(r.name for r in TABLES[table].rows)
    assert {r['arm'] for r in records} == set(names) and all(r['n'] > 0 for r in records)
    text = (home/'out'/table/'paper.txt').read_text()
    assert text.count('in the paper') == len(names) and all(n in text for n in names)
    assert read_results(home/'out'/table/'table.jsonl') == records
    capsys.readouterr()
    again = run_table(table, home/'out', run) # finds all of it done
    said = capsys.readouterr().out
    assert 'begins' not in said and [r['value'] for r in again] == [r['value'] for r in records]
    assert not [r.what for r in dry_table(table, home/'out', run) if r.state in ('missing', 'refused')]

def test_a_dry_run_says_memory_and_time_of_every_step(world, tmp_path, monkeypatch):
    home, run = world
    tried, measured = [], dry_run.forward_rate
    def counted(*args, **how):
        tried.append((*args, *how.values()))
        return measured(*args, **how)
    monkeypatch.setattr(dry_run, 'forward_rate', counted)
    for table in ('table2', 'table9'):
        rows = [r for r in dry_table(table, tmp_path/'none', run) if r.state in ('to write', 'estimate')]
        starts = [i for i, r in enumerate(rows) if r.what in ('drawing', 'aligned', 'text', 'captioner')]
        for i in starts:
            said = [r for r in rows[i + 1:] if r.what != 'output'][:3]
            assert any(r.what == 'time' and r.where for r in said[:2]), rows[i]
            assert rows[i].what == 'drawing' or said[0].what == 'memory' and 'weights of' in said[0].note
        if table == 'table2': assert any(r.what == 'time of texts' and r.where for r in rows)
    assert len(tried) == len(set(tried)) + 1 # once a table for each tower, batch and side

def test_a_killed_step_is_run_again_and_no_other(world, capsys):
    home, run = world
    run = replace(run, rows=('ClipCap', 'ClipCap + GMAIL'))
    run_table('table1', home/'out', run)
    step = paper_plan('table1', home/'out', run)[-1]
    (step.folder/'done.json').unlink()
    capsys.readouterr()
    run_table('table1', home/'out', run)
    said = capsys.readouterr().out
    assert said.count('begins') == 1 and f'{step.folder.name}: begins' in said

def test_a_text_side_learns_from_no_image_that_is_measured(world):
    home, run = world
    run = replace(run, rows=('CLIP + GMAIL',), test=('coco-val2017',))
    run_table('table2', home/'out', run)
    folder = next(s.folder for s in paper_plan('table2', home/'out', run) if s.folder.name.startswith('text'))
    assert json.loads((folder/'card.json').read_text())['pairs'] == 24 # twelve images of train with two captions each

def test_the_steps_of_an_alignment_are_those_of_its_run(world, tmp_path):
    "One image a key in an epoch, of the split that is learned from, without the keys that are kept out."
    home, run = world
    run = replace(run, rows=('CLIP + GMAIL',), test=('coco-val2017',))
    told = next(r.note for r in dry_table('table2', tmp_path/'none', run) if r.what == 'aligned')
    run_table('table2', home/'out', run)
    folder = next(s.folder for s in paper_plan('table2', home/'out', run) if s.folder.name.startswith('aligned'))
    steps = [l for l in (folder/'log.jsonl').read_text().splitlines() if 'loss' in json.loads(l)]
    assert told.startswith(f'{len(steps)} steps of ') and '1 times through' in told
    pairs = int(told.split('through ')[1].split()[0])
    assert len(steps) == max(1, pairs // 8) and pairs < 12 # of train, of which some are kept out

def test_the_published_numbers_stand_where_no_captions_are():
    assert counts_of('coco', {}) == (113_287, 566_747) and counts_of('coco', {}, learned=True) == (82_783, 414_113)
    link = TABLES['table6'].rows[1].last
    assert alignment_plan(link.aligning, {}).n < 82_783 and embedded_images(link, {}) == 566_747
    assert embedded_images(TABLES['table9'].rows[3].last, {}) == 113_287 # real images, each once
    assert passes_of(link.aligning, {}) < 82_783 * (1 + 3 * link.aligning.settings.align.epochs)

def test_the_command(world, capsys):
    from gmail_nb.cli.commands import gmail_experiment
    home, run = world
    flags = [
        '--scale',
        'paper',
        '--root',
        run.root,
        '--out',
        home/'out',
        '--rows',
        'CLIP',
        '--rows',
        'CLIP + GMAIL',
        '--test',
        'coco-val2017',
        '--encoder',
        'embedded',
        '--lm',
        'small',
        '--steps',
        3,
        '--epochs',
        1,
        '--batch-size',
        8,
        '--validation-share',
        0.4,
        '--max-new-tokens',
        8,
        '--draw-steps',
        1,
        '--device',
        'cpu',
        *(v for g in run.generator for v in ('--generator', g)),
    ]
    assert gmail_experiment(['table2', *map(str, flags)]) == 0
    out = capsys.readouterr().out
    assert 'begins' not in out and 'in the paper' in out # the steps of the test above

# What has no rows, and what one process alone may do

def test_a_table_without_rows_says_what_to_do_instead(capsys):
    for table in set(TABLES) - set(MADE):
        assert table in tables_text() and TABLES[table].left_out in tables_text()
        with pytest.raises(ValueError, match=f'{table} has no command of its own'): check_runs(table)
        with pytest.raises(ValueError, match='has no command of its own'): dry_table(table)
    assert set(TABLES) == {f'table{n}' for n in range(1, 18)}

def test_several_processes_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv('WORLD_SIZE', '8')
    with pytest.raises(ValueError, match='--part 0/8'): run_table('table2', tmp_path)
    assert not list(tmp_path.iterdir())

def test_names_of_presets_that_were_several_captioners_say_where_they_are():
    for n in (6, 9, 11, 16, 17):
        with pytest.raises(ValueError, match=f'gmail_experiment table{n} --scale paper'):
            preset_named(f'paper-table{n}', CAPTIONER_PRESETS)

def test_a_dry_run_adds_up_the_room_of_images_without_the_captions(tmp_path):
    rows = dry_table('table6', tmp_path, TableRun(root=str(tmp_path)))
    drawing = next(r for r in rows if r.what == 'drawing')
    assert drawing.note == '566,747 images' and any('days' in r.where for r in rows if r.what == 'time')
    assert 'GB' in rows[-1].note and rows[-1].what == 'output'

def test_rows_and_seeds_share_features(monkeypatch):
    from gmail_nb.experiments import tables
    asked = []
    monkeypatch.setattr('gmail_nb.runs.tune_caption.tune_captioner', lambda *a, **k: asked.append(k['features']))
    for row in TABLES['table6'].rows:
        tables.run_captioner(row.last, Path('out')/'x', TableRun(), lambda link: Path('out'))
    assert set(asked) == {str(Path('out')/'features')}

@pytest.mark.parametrize('field', ['encoder', 'rows', 'test'])
def test_a_name_in_place_of_a_list_is_refused(field):
    "A string would be read letter by letter."
    with pytest.raises(ValueError, match=f"{field} is 'embedded', and not a list"): TableRun(**{field: 'embedded'})
    with pytest.raises(ValueError, match='not a list'): TableRun(**{field: dict(a='b')})
