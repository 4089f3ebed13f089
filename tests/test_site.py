"The pages are built from the committed notebooks: one for each, with its pictures, no link broken, nothing fetched from elsewhere."

import functools
import html
import html.parser
import http.server
import importlib.util
import os
import re
import shutil
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import browser
import pytest
from house import cells_of, flags_of, names, root

def weight(item): return 90

def site_tool():
    "tools/site.py as a module; its name is one of the standard library's."
    spec = importlib.util.spec_from_file_location('site_tool', root/'tools'/'site.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool

class Page(html.parser.HTMLParser):
    "The links, pictures and anchors of one page."
    def __init__(self, path):
        super().__init__()
        self.links, self.files, self.anchors = [], [], set()
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs.get('id'), attrs.get('name')}
        if tag == 'a' and attrs.get('href'): self.links.append(attrs['href'])
        if tag in ('img', 'script') and attrs.get('src'): self.files.append(attrs['src'])
        if tag == 'link' and attrs.get('rel') in ('stylesheet', 'icon'): self.files.append(attrs['href'])

def page_of(name):
    folder, _, stem = name.rpartition('/')
    page = re.sub(r'^[0-9]+[a-zA-Z0-9]*_', '', stem.lower()) + '.html'
    return f'{folder}/{page}' if folder else page

def target(site, page, link):
    path = unquote(urlsplit(link).path)
    return (site/page).parent/path if path else site/page

@pytest.fixture(scope='module')
def site(tmp_path_factory, request):
    "The folder of the pages, and what is in them. GMAIL_SITE names one that is built already."
    if built := os.environ.get('GMAIL_SITE'):
        out = Path(built).resolve()
    else:
        if not shutil.which('quarto'):
            pytest.importorskip('smalldocs', reason='neither quarto nor smalldocs (Python 3.11 or later) is installed')
        out = tmp_path_factory.mktemp('pages')/'site'
        forks = request.getfixturevalue('forks') # which has imported what the notebooks import
        done = forks.start('--out', out, script=root/'tools'/'site.py', cwd=root).wait(900)
        assert done.status == 0, done.err[-6000:]
    return out, {p.relative_to(out).as_posix(): Page(p) for p in out.rglob('*.html')}

def test_every_notebook_has_a_page(site):
    missing = [n for n in names if page_of(n) not in site[1]]
    assert not missing, missing

def test_pages_bring_what_they_need(site):
    out, pages = site
    for name, page in pages.items():
        for link in page.files:
            if link.startswith('data:'): continue
            elsewhere = urlsplit(link).netloc
            assert not elsewhere, f'{name} fetches {link}'
            assert target(out, name, link).exists(), f'{name} lacks {link}'

def test_style_sheets_ask_nobody_else(site):
    for sheet in site[0].rglob('*.css'):
        asked = re.findall(r'''(?:@import\s*|url\()["']?(?:https?:)?//[^;)]*''', sheet.read_text(encoding='utf-8'))
        assert not asked, f'{sheet.name}: {asked[:2]}'

def test_pages_have_a_dark_side(site):
    "A theme for each mode on every page, and colours of ours for what the theme leaves light."
    for page in site[0].rglob('*.html'): assert 'data-mode="dark"' in page.read_text(encoding='utf-8'), page.name
    assert '.quarto-dark body' in (site[0]/'styles.css').read_text(encoding='utf-8')

def test_no_link_is_broken(site):
    out, pages = site
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc: continue
            to = target(out, name, link)
            assert to.exists(), f'{name}: link to {link}'
            other = pages.get(to.resolve().relative_to(out.resolve()).as_posix())
            if parts.fragment and other: assert unquote(parts.fragment) in other.anchors, f'{name}: no {link}'

def said(page):
    "(text outside code, each block of code), as a browser shows them."
    body = re.sub(r'<(script|style|head|math)\b.*?</\1>', '', page.read_text(encoding='utf-8'), flags=re.S)
    plain = lambda text: html.unescape(re.sub(r'<[^>]+>', '', text))
    blocks = [plain(m[1]) for m in re.finditer(r'<pre\b[^>]*>(.*?)</pre>', body, re.S)]
    body = re.sub(r'<pre\b.*?</pre>', '', body, flags=re.S)
    return plain(re.sub(r'<code\b.*?</code>', '`code`', body, flags=re.S)), blocks

def test_no_page_shows_a_link_as_it_is_written(site):
    "Neither in prose, where a link would stand in another, nor in the signatures that nbdev writes."
    for name in site[1]:
        prose, blocks = said(site[0]/name)
        written = re.findall(r'.{0,40}\]\([\w./#-]+\)', prose)
        assert not written, f'{name}: {written[:2]}'
        for block in (b for b in blocks if re.match(r'\s*(def|class) \w+', b)):
            assert not re.search(r'\[`[^`]+`\]\([\w./#-]+\)', block), f'{name}: {block[:200]}'
            assert max(map(len, block.splitlines())) <= 320, f'{name}: a line of pages: {block[:200]}'
        flags = re.findall(r'(?:^|[\s(])\u2013[a-z]\S+', prose)
        assert not flags, f'{name}: a dash where a flag is typed: {flags[:2]}'
        assert 'Call self as a function' not in prose, f'{name}: words of Python for a function without any'

def test_a_link_in_the_words_of_a_link_is_taken_out():
    whole_links, name = site_tool().whole_links, '[`align`](train.html#align)'
    assert whole_links(f'[{name}](train.ipynb)') == '[`align`](train.ipynb)'
    assert whole_links(f'of [a {name} and {name}](a.ipynb), {name}') == f'of [a `align` and `align`](a.ipynb), {name}'
    assert whole_links(f'[1] {name} (so) [2]') == f'[1] {name} (so) [2]'
    assert whole_links(f'{name}\n```python\ndef f(x) # an {name}\n```\n{name}') == (
        f'{name}\n```python\ndef f(x) # an `align`\n```\n{name}')

def test_a_flag_keeps_its_hyphens():
    as_typed = site_tool().flags_as_typed
    assert as_typed('Without --model it asks, (--no-key).') == 'Without `--model` it asks, (`--no-key`).'
    for text in ('`--model` --- a dash', 'a--b', '```\ngmail --model\n```', '[x](a--b.html)', '|---|--:|'):
        assert as_typed(text) == text

def test_columns_of_words_stand_at_the_left():
    table = '| arm | of | mean |\n|---|---:|---:|\n| a \\| b | real | +1.2 |\n| c | made | none |'
    assert site_tool().words_left(f'So:\n\n{table}\n') == f'So:\n\n{table}\n'.replace('---:|---:', '---|---:')

def test_what_was_printed_in_columns_is_marked():
    cell = '<div class="cell-output cell-output-stdout">\n<pre><code>{}</code></pre></div>'
    table, prose = cell.format('arm   R@1   R@5\na     1.2   3.4'), cell.format('One.  Two words.\nThree.')
    assert site_tool().for_the_eye(table + prose) == table.replace('<pre>', '<pre class="columns">') + prose

def test_a_short_flag_in_prose_is_not_broken():
    page = '<p><code>{}--real</code> <code>gmail_align --real</code></p><pre><code>--real</code></pre>'
    assert site_tool().for_the_eye(page.replace('{}', '')) == page.replace('<code>{}', '<code class="flag">')

def test_no_line_of_a_table_ends_inside_an_interval():
    page = '<td>+1.3 [-0.4,{}+3.0]</td><td align="right">[.1,{}.2]</td><td>one, two</td><p>[-0.4, +3.0]</p>'
    assert site_tool().for_the_eye(page.format(' ', ' ')) == page.format('&nbsp;', '&nbsp;')

def test_code_does_not_begin_with_an_empty_line():
    cell = '<pre class="sourceCode bash"><code class="sourceCode bash">{}ls\n\npwd</code></pre>'
    assert site_tool().for_the_eye(cell.format('\n')) == cell.format('')

def test_a_signature_shows_a_long_default_by_its_kind():
    shown = site_tool().short_default(repr)
    assert shown(3) == '3' and shown(('a', 'b')) == "('a', 'b')"
    assert shown(tuple(range(99))) == '(...)' and shown({i: i for i in range(99)}) == '{...}'
    assert shown(range(10**50, 10**60)) == 'range(...)'

def test_pages_show_every_picture(site):
    for name in names:
        shown = [c for c in cells_of(name) if c['cell_type'] == 'code' and 'hide' not in flags_of(c)]
        drawn = sum('image/png' in o.get('data', {}) for c in shown for o in c['outputs'])
        page = (site[0]/page_of(name)).read_text(encoding='utf-8')
        assert page.count('<img') >= drawn, f'{name}: {drawn} pictures in the notebook, fewer on its page'

def test_links_to_colab_name_the_notebook_in_the_repository(site):
    for name in (n for n in names if n.startswith('tutorials/')):
        found = [l for l in site[1][page_of(name)].links if 'colab.research.google.com' in l]
        assert found and found[0].endswith(f'/nbs/{name}.ipynb'), f'{name}: {found}'

def test_the_evidence_is_a_page_with_tables_and_in_the_sidebar(site):
    out, pages = site
    text = (out/'evidence.html').read_text(encoding='utf-8')
    first = (root/'gmail_nb'/'assets'/'evidence'/'page.md').read_text(encoding='utf-8')
    claims = [l for l in first.splitlines() if l.startswith('| ') and not l.startswith('| claim')]
    assert text.count('<tr') >= len(claims) > 30 and 'Claims that were not confirmed' in text and '|---' not in text
    for name, page in pages.items():
        assert any(target(out, name, l).resolve() == out.resolve()/'evidence.html' for l in page.links), name


# What Quarto writes is finished by the same functions; here is a page of its kind, so that it need not be installed

QUARTO = '''<html><head>
<link href="../site_libs/quarto-html/quarto.css" rel="stylesheet">
<script src="https://cdnjs.cloudflare.com/ajax/libs/require.js/2.3.6/require.min.js" integrity="sha512-c3"
  crossorigin="anonymous"></script>
<script src="https://cdnjs.cloudflare.com/polyfill/v3/polyfill.min.js?features=es6"></script>
<script type="application/javascript">define('jquery', [],function() {return window.jQuery;})</script>
<link rel="stylesheet" href="https://cdn.jsdelivr.net/npm/katex@0.15.1/dist/katex.min.css" />
<script defer="" src="/site_libs/katex/katex.min.js"></script>
<link rel="stylesheet" href="/site_libs/katex/katex.min.css">
</head><body><a href="https://github.com/gmail-nb/gmail_nb">code</a>
<span class="math inline">x^2</span><a href="../losses.html#GenReal.encode">encode</a></body></html>'''
SHEET = '@import"https://fonts.googleapis.com/css2?family=Source+Sans+Pro:wght@300;400&display=swap";body{color:red}'

@pytest.fixture
def by_quarto(tmp_path):
    (tmp_path/'site_libs'/'bootstrap').mkdir(parents=True)
    (tmp_path/'site_libs'/'bootstrap'/'bootstrap.min.css').write_text(SHEET)
    (tmp_path/'runs').mkdir()
    (tmp_path/'runs'/'align.html').write_text(QUARTO)
    (tmp_path/'index.html').write_text(QUARTO.replace('../', ''))
    (tmp_path/'losses.html').write_text('<html><h3 id="GenReal">GenReal</h3></html>')
    return site_tool().finish(tmp_path)

@pytest.mark.parametrize('name', ['index.html', 'runs/align.html'])
def test_a_page_of_quarto_asks_nobody_else(by_quarto, name):
    page = Page(by_quarto/name)
    assert not [f for f in page.files if urlsplit(f).netloc]
    wanted = [f for f in page.files if 'katex' in f]
    assert len(wanted) == 3
    for file in wanted: assert target(by_quarto, name, file).exists(), file
    assert 'https://github.com/gmail-nb/gmail_nb' in page.links # a link is no request
    assert page.links[-1].endswith('losses.html#GenReal')

def test_a_style_sheet_of_quarto_asks_nobody_else(by_quarto):
    assert (by_quarto/'site_libs'/'bootstrap'/'bootstrap.min.css').read_text() == 'body{color:red}'

def test_quarto_is_told_to_take_the_katex_of_the_site():
    text = (root/'_quarto.yml').read_text(encoding='utf-8')
    assert re.search(r'html-math-method:.*\n\s+method: katex\n\s+url: /site_libs/katex/', text)


# In a browser, at the width of a desk and of a hand

WIDTHS = 1200, 390
FEW = ('index.html', 'losses.html', 'evidence.html', 'rooms.html', 'tutorials/your_pictures.html', 'runs/align.html')
LOOK = '''(() => {
  const text = document.createTreeWalker(document.querySelector('main') || document.body, NodeFilter.SHOW_TEXT)
  const raw = [], kept = 'code, pre, script, style, textarea, .katex-mathml'
  while (text.nextNode()) {
    const said = text.currentNode
    if (!said.parentElement.closest(kept) && /\\\\[(\\[]|\\$\\$/.test(said.data)) raw.push(said.data.slice(0, 60))
  }
  for (const e of document.querySelectorAll('.katex-error')) raw.push(e.title || e.innerText.slice(0, 60))
  for (const e of document.querySelectorAll('span.math'))
    if (!e.querySelector('.katex')) raw.push(e.innerText.slice(0, 60))
  const within = e => { // something around it scrolls
    for (let p = e; p && p !== document.body; p = p.parentElement)
      if (/auto|scroll/.test(getComputedStyle(p).overflowX) &&
          p.getBoundingClientRect().right <= innerWidth + 1) return true
    return false
  }
  const shown = e => e.offsetParent && !e.closest('.katex-mathml')
  const wide = [...document.querySelectorAll('main *')].filter(
    e => shown(e) && e.getBoundingClientRect().right > innerWidth + 1 && !within(e))
  const all = [...document.images]
  return {maths: raw, over: document.documentElement.scrollWidth - innerWidth,
          wide: wide.slice(0, 3).map(e => e.outerHTML.slice(0, 120)),
          pictures: all.filter(i => i.complete && !i.naturalWidth).map(i => i.src.slice(0, 80))}
})()'''
LOADED = "[...document.images].every(i => { i.loading = 'eager'; return i.complete })"

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_): pass

@pytest.fixture(scope='module')
def address(site):
    "Where the pages are served: a browser asks for the index of the search, which it does not do of files."
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(site[0]))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_address[1]}'
        server.shutdown()

def faults(page, address, name):
    "What is wrong with one page, at each width."
    page.errors, page.requests, found = [], [], []
    url = f'{address}/{name}'
    for width in WIDTHS:
        page.size(width, 900)
        if width == WIDTHS[0]: page.open(url)
        page.wait(f"location.href == '{url}' && document.readyState == 'complete' && {LOADED}")
        seen = page.run(LOOK)
        if seen['over'] > 0: found.append(f"{name} at {width}: {seen['over']} pixels too wide")
        found += [f'{name} at {width}: {what}: {e}' for what in ('maths', 'wide', 'pictures') for e in seen[what]]
    found += [f'{name}: console: {e}' for e in page.errors]
    return found + [f'{name} asks {r[:90]}' for r in page.requests if not r.startswith((address, 'data:', 'blob:'))]

def look_at(tmp_path, address, pages):
    with browser.Page(tmp_path/'profile') as page:
        return [f for name in pages for f in faults(page, address, name)]

needs_browser = pytest.mark.skipif(not browser.chromium, reason='there is no chromium')

@needs_browser
def test_a_browser_finds_no_fault_in_a_few_pages(site, address, tmp_path):
    found = look_at(tmp_path, address, FEW)
    assert not found, '\n'.join(found)

@needs_browser
@pytest.mark.slow
def test_a_browser_finds_no_fault_in_any_page(site, address, tmp_path):
    found = look_at(tmp_path, address, sorted(site[1]))
    assert not found, '\n'.join(found)

WRONG = dict(
    maths='<p>loss \\[ x^2 \\]</p>', picture='<img src="none.png">', wide='<pre style="width: 2000px">x</pre>',
    console='<script>null.x</script>', elsewhere='<script>fetch("http://127.0.0.1:9/").catch(() => 0)</script>')

@needs_browser
@pytest.mark.parametrize('name', WRONG)
def test_the_browser_would_find_it(tmp_path, name):
    (tmp_path/'page.html').write_text(f'<html><main>{WRONG[name]}</main></html>')
    (tmp_path/'favicon.ico').write_bytes(b'')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = look_at(tmp_path, f'http://127.0.0.1:{server.server_address[1]}', ['page.html'])
        server.shutdown()
    assert found
