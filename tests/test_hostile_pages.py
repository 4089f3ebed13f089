"Pages that are written about captions and keys of strangers: opened in a browser, nothing of theirs runs."
import json
import shutil
import subprocess

import pytest

from gmail_nb.files import with_checksum
from gmail_nb.pages import report_page, table_html

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

@needs_browser
@pytest.mark.parametrize('made', [demo_page, gallery_page])
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

@pytest.mark.parametrize('draw', [drawn_by_data, drawn_by_retrieval, drawn_by_judge, drawn_by_classes,
                                  drawn_by_vqa])
def test_dollars_in_a_text_are_no_formula(draw, tmp_path):
    from PIL import Image
    from gmail_nb.pages import save_figure
    assert save_figure(draw(FORMULAS, Image.new('RGB', (8, 8))), tmp_path/'drawn.png')

def test_a_cell_of_any_length_is_text():
    long = '<b>' * 300_000
    assert '<b>' not in table_html([['a'], [long]]) and len(table_html([['a'], [long]])) > len(long)
