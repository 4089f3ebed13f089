"""Build the pages: `python tools/site.py [--out _docs]`.

nbdev turns the notebooks into pages with their API entries; Quarto renders them where it is installed,
smalldocs (pure Python) where it is not. Works on a copy, so the tree and parallel builds stay untouched.
The notebooks are shown as they were executed: nothing is run again but the definitions that the API entries need.
Whoever renders, the pages bring all that they show: no script, style, font or formula comes from another server.
"""
import argparse, functools, json, os, re, shutil, subprocess, tempfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent
katex = root/'tools'/'katex'

def show_source(nb):
    "Follow each exported definition by its source: nbdev alone would show the signature and hide the code."
    cells = []
    for cell in nb['cells']:
        cells.append(cell)
        if cell['cell_type'] != 'code': continue
        source = ''.join(cell['source'])
        exported = re.match(r'#\|\s*export', source)
        if not exported and 'show_doc' not in source:
            cell['source'] = '#| eval: false\n' + source  # nbdev would run whatever stands beside an import
        if not exported or not re.search(r'^(def|class|@)', source, re.M): continue
        code = re.sub(r'^#\|.*\n', '', source, flags=re.M)
        options = '#| eval: false\n#| code-fold: show\n#| code-summary: "Source"\n'
        cells.append({**cell, 'id': f"{cell['id']}-source", 'source': options + code, 'outputs': []})
        cell['outputs'], cells[-1]['outputs'] = [], cell['outputs'] # nbdev drops the export cell with what it printed
    nb['cells'] = cells

def split_title(nb):
    "Give prose that shares the title's cell a cell of its own: nbdev keeps only the title and the `>` line of that cell."
    first = nb['cells'][0]
    head, rest = [], ''.join(first['source']).splitlines(keepends=True)
    while rest and (not rest[0].strip() or rest[0].startswith(('# ', '> '))): head.append(rest.pop(0))
    if first['cell_type'] != 'markdown' or not head or not rest: return
    first['source'] = ''.join(head).strip()
    nb['cells'].insert(1, {'cell_type': 'markdown', 'id': 'after-title', 'metadata': {}, 'source': ''.join(rest)})

def evidence_notebook():
    "The page of claims that ships with the package, as a notebook of prose."
    text = (root/'gmail_nb'/'assets'/'evidence'/'page.md').read_text(encoding='utf-8')
    title, _, rest = text.partition('\n')
    top = f'{title}\n\n> Every claim of this package about its method, with its interval, and the failed ones first.'
    made = '[The published page](experiments/19_evidence.ipynb) tells how it is made, and from which records.'
    prose = lambda id, source: dict(cell_type='markdown', id=id, metadata={}, source=source)
    kernel = dict(display_name='python3', language='python', name='python3')
    return dict(cells=[prose('title', top), prose('made', made), prose('claims', rest.strip())],
                metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)

def stage(work):
    "Copy what the pages need into the folder `work`: the sidebar has the notebooks that exist, and the evidence."
    shutil.copytree(root/'nbs', work/'nbs', symlinks=False, ignore=shutil.ignore_patterns('.ipynb_checkpoints', '_*'))
    for name in ('settings.ini', '_quarto.yml'): shutil.copy(root/name, work/name)
    shutil.copy(root/'_quarto.yml', work/'nbs'/'_quarto.yml')
    for path in work.glob('nbs/**/*.ipynb'):
        nb = json.loads(path.read_text(encoding='utf-8'))
        split_title(nb)
        show_source(nb)
        path.write_text(json.dumps(nb, ensure_ascii=False), encoding='utf-8')
    sidebar = work/'nbs'/'sidebar.yml'
    lines = sidebar.read_text(encoding='utf-8').splitlines()
    listed = lambda line: (m := re.search(r'(\S+\.ipynb)', line)) is None or (work/'nbs'/m[1]).exists()
    lines = list(filter(listed, lines))
    at = next(i for i, line in enumerate(lines) if 'rooms.ipynb' in line) + 1
    lines[at:at] = ['      - text: The evidence', '        href: evidence.ipynb']
    sidebar.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    (work/'nbs'/'evidence.ipynb').write_text(json.dumps(evidence_notebook(), ensure_ascii=False), encoding='utf-8')

NAMED = re.compile(r'\[(`[^`\]]+`)\]\([^()\s]+\)') # what nbdev makes of a name in backticks
AROUND = re.compile(rf'\[((?:[^\[\]]|{NAMED.pattern})+)\]\(([^()\s]+)\)')

def whole_links(text):
    """Markdown whose links are those of its author: nbdev makes a link of a name wherever it stands.

    In the words of a link, `[`align`](train.ipynb)`, that makes one inside another, which no browser follows;
    in code, as in the comments of a signature, it is shown as it is written."""
    parts = re.split(r'(^```.*?^```)', text, flags=re.M | re.S) # prose, code, prose, ...
    plain = lambda said: NAMED.sub(r'\1', said)
    parts[::2] = [AROUND.sub(lambda m: f'[{plain(m[1])}]({m[3]})', part) for part in parts[::2]]
    parts[1::2] = map(plain, parts[1::2])
    return ''.join(parts)

def flags_as_typed(text):
    "Markdown whose flags are code: a renderer makes a dash of the two hyphens, in docstrings above all."
    parts = re.split(r'(^```.*?^```|`[^`\n]+`|\]\([^()\s]+\))', text, flags=re.M | re.S) # prose, code or address, ...
    parts[::2] = [re.sub(r'(?<![\w-])--[a-z][\w-]*', r'`\g<0>`', part) for part in parts[::2]]
    return ''.join(parts)

TABLE = re.compile(r'^(\|.*\|\n)(\|[-:|]+\|)\n((?:\|.*\|(?:\n|$))+)', re.M) # heading, rule, rows

def words_left(text):
    "Markdown whose tables have columns of words at the left: `table_markdown` puts all but the first at the right."
    cells = lambda line: [c.strip() for c in re.split(r'(?<!\\)\|', line)[1:-1]]
    def aligned(m):
        columns = zip(*map(cells, m[3].splitlines()))
        number = [any(re.match(r'[+-]?\d', c) for c in column) for column in columns]
        rule = [r if n else '---' for r, n in zip(cells(m[2]), number)]
        return f'{m[1]}|{"|".join(rule)}|\n{m[3]}'
    return TABLE.sub(aligned, text)

NO_WORDS = '*Call self as a function.*' # Python's words of any function, where one has no docstring

def mend_prose(nb):
    "The prose of a notebook, and what its cells show as Markdown, with links and flags as they are meant."
    mended = lambda text: words_left(flags_as_typed(whole_links(''.join(text)))).replace(NO_WORDS, '')
    for cell in nb['cells']:
        if cell['cell_type'] == 'markdown': cell['source'] = mended(cell['source'])
        for data in (out['data'] for out in cell.get('outputs', []) if 'text/markdown' in out.get('data', {})):
            data['text/markdown'] = mended(data['text/markdown'])

def short_default(plain, most=80):
    "How a signature shows a default: nbdev writes out every field of it, on pages of text for a large one."
    def shown(o):
        text = plain(o)
        if len(text) <= most: return text
        return {tuple: '(...)', list: '[...]', dict: '{...}'}.get(type(o), f'{type(o).__name__}(...)')
    return shown

def process(work):
    "nbdev's processing of every notebook in one process (libraries are imported once); returns the folder of results."
    os.chdir(work)
    # before the notebooks: each would mend torchvision for itself, and once is all it takes
    import gmail_nb.runtime, torchvision
    from fastcore import docments
    from nbdev.config import get_config
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    refresh_quarto_yml()
    plain = docments._fmt_default
    docments._fmt_default = short_default(plain)
    try: done = proc_nbs(n_workers=0, force=True)
    finally: docments._fmt_default = plain
    home = get_config()
    for path in done.glob('**/*.ipynb'): # links among our own pages work from any folder, and without a network
        nb = json.loads(path.read_text(encoding='utf-8'))
        mend_prose(nb)
        text = json.dumps(nb, ensure_ascii=False)
        path.write_text(text.replace(f'{home.doc_host}{home.doc_baseurl}/', to_top(path, done)), encoding='utf-8')
    return done, home.doc_path.name

def to_top(page, site):
    "The relative way from a page to the folder that the site is in: empty, '../', ..."
    return '../' * (len(page.relative_to(site).parts) - 1)

def page_name(stem):
    "The name nbdev gives a page: `00_core` becomes `core`."
    return re.sub(r'^\d+[a-zA-Z0-9]*_', '', stem.lower())

def rename_outputs(done):
    "Give each page the name nbdev chose for it: smalldocs does not read `output-file`."
    # an address elsewhere, such as Colab's, names the notebook as it is in the repository
    numbered = re.compile(r'https?://[^\s"\'()<>]+|(?<!\w)\d+[a-zA-Z0-9]*_(\w+\.(?:ipynb|html))')
    pages = list(done.glob('**/*.ipynb'))
    for path in [*pages, done/'sidebar.yml']:
        text = path.read_text(encoding='utf-8')
        path.write_text(numbered.sub(lambda m: m[1] or m[0], text), encoding='utf-8')
    for path in pages: path.rename(path.with_name(f'{page_name(path.stem)}.ipynb'))

def local_katex(site):
    "Serve KaTeX from the site itself: smalldocs names a content delivery network, Quarto the address of _quarto.yml."
    shutil.copytree(katex, site/'site_libs'/'katex', dirs_exist_ok=True)
    address = re.compile(r'https?://[^"\'\s]*/katex@[\d.]+/dist/(?:contrib/)?|(?<=["\'])[./]*site_libs/katex/')
    for page in site.glob('**/*.html'):
        text = page.read_text(encoding='utf-8')
        ours = f'{to_top(page, site)}site_libs/katex/'
        page.write_text(address.sub(ours, text), encoding='utf-8')

def no_scripts_from_elsewhere(site):
    """Leave out scripts and styles that a page would load from another server.

    Quarto adds them for widgets, of which these pages have none; offline each of them is an error of the console."""
    theirs = re.compile(r'<script\b[^>]*\bsrc="(?:https?:)?//[^>]*>\s*</script>\s*|'
                        r'<link\b(?=[^>]*\brel="(?:stylesheet|preload|preconnect)")'
                        r'(?=[^>]*\bhref="(?:https?:)?//)[^>]*>\s*')
    for page in site.glob('**/*.html'):
        text = page.read_text(encoding='utf-8')
        plain = theirs.sub('', text)
        if plain != text: page.write_text(plain, encoding='utf-8')

def no_fonts_from_elsewhere(site):
    "Leave out the fonts that a theme asks another server for: offline there are none, and the console has an error."
    for sheet in site.glob('site_libs/**/*.css'): # an address of a font may hold a `;` of its own
        text = sheet.read_text(encoding='utf-8')
        plain = re.sub(r'@import\s*(?:url\([^)]*\)|"[^"]*"|\'[^\']*\')\s*;',
                       lambda m: '' if '//' in m[0] else m[0], text)
        if plain != text: sheet.write_text(plain, encoding='utf-8')

def methods_to_classes(site):
    "Let a link to a method that has no entry of its own lead to its class, whose source shows it."
    texts = {p.resolve(): p.read_text(encoding='utf-8') for p in site.glob('**/*.html')}
    anchors = {p: set(re.findall(r'id="([^"]+)"', text)) for p, text in texts.items()}
    for page, text in texts.items():
        def repair(link):
            there = anchors.get((page.parent/link[1]).resolve() if link[1] else page, set())
            whole = f'{link[2]}.{link[3]}' in there or link[2] not in there
            return link[0] if whole else f'href="{link[1]}#{link[2]}"'
        mended = re.sub(r'href="([^"#:]*)#([\w-]+)\.([\w.-]+)"', repair, text)
        if mended != text: page.write_text(mended, encoding='utf-8')

INTERVAL = re.compile(r'\[([+-]?[\d.]+), ([+-]?[\d.]+)\]')

def for_the_eye(text):
    """HTML in which a browser breaks less: what was printed in columns is marked, to be scrolled where it is wide,
    and so are short flags in prose, which would break after a hyphen; no code begins with an empty line, and no line
    of a table ends inside an interval."""
    printed = re.compile(r'(<div class="cell-output[^>]*>\s*<pre)(><code>)(.*?)(?=</code></pre>)', re.S)
    in_columns = re.compile(r'\S {2,}\S.* {2,}\S')
    def marked(m): return f'{m[1]} class="columns"{m[2]}{m[3]}' if in_columns.search(m[3]) else m[0]
    text = re.sub(r'(?<!<pre>)<code>(?=-[^<\n]{1,23}</code>)', '<code class="flag">', printed.sub(marked, text))
    text = re.sub(r'(<td[^>]*>)([^<]*)(?=</td>)', lambda m: m[1] + INTERVAL.sub(r'[\1,&nbsp;\2]', m[2]), text)
    return re.sub(r'(<code class="sourceCode[^>]*>)\n+', r'\1', text) # where `%%bash` stood

def ease_reading(site):
    "`for_the_eye` of every page."
    for page in site.glob('**/*.html'):
        text = page.read_text(encoding='utf-8')
        mended = for_the_eye(text)
        if mended != text: page.write_text(mended, encoding='utf-8')

def finish(site):
    "What the pages of either renderer still need."
    local_katex(site)
    no_scripts_from_elsewhere(site)
    no_fonts_from_elsewhere(site)
    methods_to_classes(site)
    ease_reading(site)
    return site

def by_smalldocs(done):
    "Render with smalldocs, which looks for the class of each token in a list: once a kind of token is enough."
    from smalldocs import cli, highlight
    plain = highlight.css_class
    known = functools.cache(plain) # what a token says counts only where it steers the program, as `if` does
    highlight.css_class = lambda kind, said: known(kind, said if said in highlight.CONTROL else '')
    os.chdir(done)
    try:
        if cli.main(['render', '.']): raise SystemExit('smalldocs did not render the pages: it says why above')
    finally: highlight.css_class = plain

def render(done, doc_path):
    "Render the processed notebooks with Quarto, or else with smalldocs; returns the folder of the site."
    if shutil.which('quarto'):
        subprocess.run(['quarto', 'render', '--no-cache', '--no-execute'], cwd=done, check=True)
    else:
        rename_outputs(done)
        by_smalldocs(done)
    return finish(done/doc_path)

def build(out):
    "Build the site into the folder `out`, which is replaced."
    out = Path(out).resolve()
    if out.exists() and any(out.iterdir()) and not (out/'site_libs').exists():
        raise SystemExit(f'{out.name} holds something that is not a site: give another folder')
    with tempfile.TemporaryDirectory() as tmp:
        work = Path(tmp).resolve()
        stage(work)
        try: site = render(*process(work))
        finally: os.chdir(root) # nbdev finds settings.ini from the working folder, which is about to go
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(site, out)
    print(f'{len(list(out.glob("**/*.html")))} pages in {out.name}')

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--out', default=root/'_docs', help='folder of the site (default: _docs)')
    build(parser.parse_args().out)
