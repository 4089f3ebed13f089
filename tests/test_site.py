"The pages are built from the committed notebooks: one for each, with its pictures, no link broken, nothing fetched from elsewhere."

import html.parser
import re
import shutil
import sys
from urllib.parse import unquote, urlsplit

import pytest
from house import cells_of, flags_of, names, root, run

def weight(item): return 90

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
def site(tmp_path_factory):
    if not shutil.which('quarto'):
        pytest.importorskip('smalldocs', reason='neither quarto nor smalldocs (Python 3.11 or later) is installed')
    out = tmp_path_factory.mktemp('pages')/'site'
    run(sys.executable, root/'tools'/'site.py', '--out', out, cwd=root)
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
            assert shutil.which('quarto') or not elsewhere, f'{name} fetches {link}'
            assert elsewhere or target(out, name, link).exists(), f'{name} lacks {link}'

def test_style_sheets_ask_nobody_else(site):
    if shutil.which('quarto'): pytest.skip('what Quarto brings is its own')
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
