"Pages that are written about captions and keys of strangers: opened in a browser, nothing of theirs runs."
import ast
import json
import re
import shutil
import subprocess
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import gmail_nb
import pytest
from PIL import Image

from gmail_nb.files import with_checksum
from gmail_nb.pages import Page, report_page, table_html

def weight(item): return 3

RUN = "document.documentElement.setAttribute('data-ran','yes')"
BAD = [f'<script>{RUN}</script>', f'"><img src=x onerror="{RUN}">', f"' autofocus onfocus='{RUN}' x='",
       f'</table></title></style><svg onload="{RUN}">', f'<a href="javascript:{RUN}">x</a>',
       f'&lt;script&gt;{RUN}&lt;/script&gt;',
       f'<iframe srcdoc="<script>parent.{RUN}</script>">', f'-->]]><body onload="{RUN}">']
browser = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
needs_browser = pytest.mark.skipif(not browser, reason='there is no chromium')

def opened(page, home):
    "What the page has become after its scripts ran, if it has any."
    how = ['--headless', '--no-sandbox', '--disable-gpu', '--virtual-time-budget=2000',
           f'--user-data-dir={home/"profile"}']
    done = subprocess.run([browser, *how, '--dump-dom', page.as_uri()], capture_output=True, text=True, timeout=120)
    assert '<html' in done.stdout, done.stderr[-500:]
    return done.stdout

def demo_page(home):
    "The page of the demo, with its title, text, table and captions of pictures."
    rows = [['name', *BAD], *([bad, *BAD] for bad in BAD)]
    (home/'demo.html').write_text(report_page(BAD[0], ' '.join(BAD), rows, {bad: 'data:,' for bad in BAD}),
                                  encoding='utf-8')
    return home/'demo.html'

def gallery_page(home):
    "The page of a generated folder: keys, captions, settings, failures and names of files are from a stranger."
    from gmail_nb.gallery import write_report
    from gmail_nb.generate import generate
    from gmail_nb.settings import DrawSettings
    table = home/'captions.jsonl'
    table.write_text('\n'.join(json.dumps(dict(key=b, caption=b)) for b in BAD))
    out = generate(table, 'embedded', home/'drawn', DrawSettings(steps=1, prefix=BAD[0]))
    manifest = json.loads((out/'manifest.json').read_text())
    manifest['failures'] = [dict(key=b, sample=0, reason=b, **{b: b}) for b in BAD]
    (out/'manifest.json').write_text(json.dumps(with_checksum(manifest))) # a stranger can sum up too
    (out/'sheets').mkdir()
    for i, bad in enumerate(b.replace('/', '') for b in BAD): (out/'sheets'/f'{i} {bad}.jpg').write_bytes(b'')
    return write_report(out)

@needs_browser
def test_the_browser_would_tell(tmp_path):
    "The check of the check: a page that is not escaped does run."
    (tmp_path/'a.html').write_text(f'<html><body>{BAD[1]}</body></html>')
    assert 'data-ran="yes"' in opened(tmp_path/'a.html', tmp_path).split('<head>')[0]

def run_page_of(home):
    "The page of a training or an evaluation: title, pictures, sentences, tables and settings."
    from gmail_nb.pages import run_page
    rows = [list(BAD), *([bad] * len(BAD) for bad in BAD)]
    text = run_page(BAD[0], {b: 'data:,' for b in BAD}, BAD, {b: rows for b in BAD}, {b: {b: [b]} for b in BAD})
    (home/'run.html').write_text(text, encoding='utf-8')
    return home/'run.html'

def shown_of_strangers():
    "A table of the report whose heading, texts, claims and cells are from a stranger."
    claims = [SimpleNamespace(table=b, said=b, measure=b, theirs=b, text=b, state=f'failed {b}', ours=[1.], seeds=1)
              for b in BAD]
    return SimpleNamespace(name='table1', heading=BAD[0], stands=BAD[1], absent=BAD[2], tables=[[BAD, BAD]],
                           claims=claims, pictures={b: 'data:,' for b in BAD})

def paper_page(home):
    "The page of all tables."
    from gmail_nb.experiments import report
    with pytest.MonkeyPatch.context() as m:
        m.setattr(report, 'all_claims', lambda shown: [c for s in shown for c in s.claims])
        m.setattr(report, 'counted', lambda claims: BAD[0])
        text = report.page_html([shown_of_strangers()], BAD[0])
    (home/'paper.html').write_text(text, encoding='utf-8')
    return home/'paper.html'

class Viewer:
    "What the app asks, answered by a stranger."
    def near(self, seen, side): return [(WHITE, b) for b in BAD]
    def maps(self, seen, name): return [WHITE, WHITE]
    def captions(self, seen): return [[b, b] for b in BAD]
    def draw(self, *asked): yield WHITE
    def look(self, picture, generated=False): return picture
    def landing(self, seen, caption): return [BAD, BAD]

def drawn():
    from gmail_nb.cli.app import drawn_findings
    return ''.join(list(drawn_findings(None, Viewer(), BAD[0], 1, 0))[-1][1:])

def of(room, name, *args):
    found = getattr(import_module(f'gmail_nb.{room}'), name)
    return found(*args) if args else found

WHITE = Image.new('RGB', (4, 4), 'white')
PAGES = demo_page, gallery_page, run_page_of, paper_page
CASES = { # a function that writes tags -> the page above that holds them, or a piece of HTML, made here
    'pages.table_html': lambda: table_html([BAD, BAD]),
    'pages.report_page': demo_page, 'pages.run_page': run_page_of,
    'pages.Page._repr_html_': lambda: Page(f'<script>parent.{RUN}</script>{BAD[6]}')._repr_html_(),
    'align._repr_html_': lambda: of('align', 'GenReal')._repr_html_(
        SimpleNamespace(summary=lambda: {b: b for b in BAD})),
    'cli.app.pictures_html': lambda: of('cli.app', 'pictures_html', [(WHITE, b) for b in BAD]),
    'cli.app.findings_html': lambda: of('cli.app', 'findings_html', Viewer(), WHITE, BAD[0]),
    'cli.app.captions_html': lambda: of('cli.app', 'captions_html', Viewer(), WHITE),
    'cli.app.drawn_findings': drawn,
    'experiments.report.shown_html': lambda: of('experiments.report', 'shown_html', shown_of_strangers()),
    'experiments.report.page_html': paper_page,
    **{f'gallery.{n}': gallery_page
       for n in ('picture', 'sample_sections', 'sheet_links', 'run_sections', 'write_report')}}
OURS = { # what stands between their tags is ours alone
    'experiments.report.evidence_html': 'records that ship with the package', 'cli.app.found_here': 'its two texts',
    'gallery.quality_sections': 'captions are drawn, in a picture',
    'gallery.pair_sections': 'a count, and a picture'}

TAG = re.compile(r'<(!doctype|html|head|body|title|h[1-6]|p|b|i|a|pre|table|tr|td|th|img|figure|figcaption|iframe|'
                 'div|span|section|style|details|summary|ul|li|br|form|input|button|script|svg|nav)[\\s>/]', re.I)

def writers_of(node, room, above=()):
    "Functions with a tag in one of their texts, but for the first text, which is their description."
    for n in ast.iter_child_nodes(node):
        if isinstance(n, ast.ClassDef): yield from writers_of(n, room, (*above, n.name))
        if not isinstance(n, ast.FunctionDef): continue
        said = ast.get_docstring(n, clean=False)
        values = [c.value for c in ast.walk(n) if isinstance(c, ast.Constant)]
        texts = [v for v in values if isinstance(v, str) and v != said]
        if any(TAG.search(t + ' ') for t in texts): yield '.'.join((room, *above, n.name))

def test_every_function_that_writes_tags_has_a_case():
    "A new one is named here until a page or a piece in `CASES` holds what it writes."
    home = Path(gmail_nb.__file__).parent
    rooms = {'.'.join(f.relative_to(home).with_suffix('').parts): f for f in home.rglob('*.py')}
    found = {w for room, f in rooms.items() for w in writers_of(ast.parse(f.read_text(encoding='utf-8')), room)}
    assert found == {*CASES, *OURS}
    assert {c for c in CASES.values() if c in PAGES} == set(PAGES)

def test_a_function_that_writes_tags_is_found():
    "The check of the check."
    source = 'def a():\n    "A <b>."\nclass C:\n    def b(self, x): return f"<b>{x}</b>"\ndef c(): return "a < b"'
    assert list(writers_of(ast.parse(source), 'room')) == ['room.C.b']

def pieces_page(home):
    "All that is no page of its own, such as what a notebook and the app show."
    pieces = [make() for make in CASES.values() if make not in PAGES]
    (home/'pieces.html').write_text(f'<!doctype html><html><body>{"".join(pieces)}</body></html>', encoding='utf-8')
    return home/'pieces.html'

@needs_browser
@pytest.mark.parametrize('made', [*PAGES, pieces_page])
def test_nothing_of_a_stranger_runs_in_a_page(made, tmp_path):
    page = made(tmp_path)
    assert RUN.split('(')[0] in page.read_text(encoding='utf-8') # it is there, as text
    dom = opened(page, tmp_path)
    assert 'data-ran="yes"' not in dom.split('<head>')[0] and '<script' not in dom and '<svg' not in dom

FORMULAS = ['face with $_$ eyes', '$5 #1, $3 #2', '$x_{$']

def drawn_by_data(texts, image):
    from gmail_nb.data import show_images
    return show_images([image] * len(texts), texts)

def drawn_by_retrieval(texts, image):
    from gmail_nb.retrieval import show_retrieval
    return show_retrieval(texts, [[image]] * len(texts), [[True]] * len(texts))

def drawn_by_judge(texts, image):
    from gmail_nb.runs.judge import show_differences
    from gmail_nb.stats import Interval
    return show_differences({t: Interval(.1, .0, .2) for t in texts})

def drawn_by_classes(texts, image):
    import torch
    from gmail_nb.classification import Predictions, show_confusion_matrix
    best = torch.arange(len(texts))[:, None]
    return show_confusion_matrix(Predictions(best, best[:, 0], texts))

def drawn_by_vqa(texts, image):
    from gmail_nb.vqa import Answered, Question, show_answers
    asked = [Question(t, t, 0, tuple(texts), (image,)) for t in texts]
    return show_answers(asked, {texts[0]: [Answered(t, '', t, '-', False) for t in texts]})

def drawn_by_accuracy(texts, image):
    "A subject and a row are named by whoever made the questions and the model."
    from gmail_nb.runs.vqa import VQAResult, show_accuracy
    from gmail_nb.vqa import Answered
    said = [Answered(t, t, '', '-', i % 2 == 0) for i, t in enumerate(texts * 2)]
    return show_accuracy(VQAResult({texts[0]: said}, 'set', 'test'))

def drawn_by_captions(texts, image):
    from gmail_nb.experiments.captioning import show_captions
    return show_captions([image] * len(texts), texts, {texts[0]: texts})

def drawn_by_caption_scores(texts, image):
    from gmail_nb.experiments.captioning import show_intervals
    found = [dict(arm=t, metric=m, value=.1, low=.0, high=.2) for t in texts for m in ('CIDEr mean', 'CIDEr')]
    return show_intervals(found)

def drawn_by_arms(texts, image):
    from gmail_nb.experiments.retrieval import WAYS, show_arms
    return show_arms([dict(arm=t, split=texts[0], metric=f'{w}_recall_at_1', value=.1, low=.0, high=.2)
                      for t in texts for w in WAYS])

FIGURES = [drawn_by_data, drawn_by_retrieval, drawn_by_judge, drawn_by_classes, drawn_by_vqa, drawn_by_accuracy,
           drawn_by_captions, drawn_by_caption_scores, drawn_by_arms]
OUR_TEXTS = set('''show_comparison show_costs _grid show_controls show_curve show_gap_closed show_place show_llava
    show_fewer_pairs show_scaling show_shares quality_sections show_cosines show_gap show_token_gap show_lengths
    show_losses show_history show_tuning show_kept show_fair show_far show_ratios
    show_thresholds show_claims show_evidence'''.split()) # names of measures, settings and arms; `_grid` ends in `_finished`

def figures_of(tree):
    "Functions that open a figure, and whether its texts are drawn as they are written."
    for f in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
        calls = {getattr(c.func, 'id', getattr(c.func, 'attr', '')) for c in ast.walk(f) if isinstance(c, ast.Call)}
        if calls & {'subplots', 'Figure', 'figure'}: yield f.name, 'as_written' in calls

def test_figures_draw_texts_as_they_are_written():
    "All but those whose every text is ours."
    home = Path(gmail_nb.__file__).parent
    found = dict(f for room in home.rglob('*.py') for f in figures_of(ast.parse(room.read_text(encoding='utf-8'))))
    assert {name for name, written in found.items() if not written} == OUR_TEXTS

@pytest.mark.parametrize('draw', FIGURES)
def test_dollars_in_a_text_are_no_formula(draw, tmp_path):
    from PIL import Image
    from gmail_nb.pages import save_figure
    assert save_figure(draw(FORMULAS, Image.new('RGB', (8, 8))), tmp_path/'drawn.png')

def test_a_cell_of_any_length_is_text():
    long = '<b>' * 300_000
    assert '<b>' not in table_html([['a'], [long]]) and len(table_html([['a'], [long]])) > len(long)
