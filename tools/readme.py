"""Write README.md from nbs/index.ipynb and its stored outputs: `python tools/readme.py [--check]`.

nbdev's own `nbdev_readme` needs Quarto; this needs nothing but Python. Pictures go to `index_files`.
"""
import argparse, base64, json, re, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
pictures = 'index_files'

def text(value): return ''.join(value) if isinstance(value, list) else value

def relink(markdown):
    "Links to notebooks as seen from the README, one folder up."
    return re.sub(r'\]\((?!https?:|#|/)([\w./-]+\.ipynb)', r'](nbs/\1', markdown)

def render_output(out, name, alt=''):
    "One stored output as markdown, and the picture it needs as {file name: bytes}; `alt` says what it shows."
    if out['output_type'] == 'stream':
        return ('', {}) if out.get('name') == 'stderr' else (f"```\n{text(out['text']).rstrip()}\n```", {})
    data = out.get('data', {})
    if 'text/markdown' in data: return relink(text(data['text/markdown']).strip()), {}
    if 'image/png' in data:
        return f'![{alt}]({pictures}/{name}.png)', {f'{name}.png': base64.b64decode(text(data['image/png']))}
    if 'text/html' in data: return re.sub(r'<style.*?</style>\s*', '', text(data['text/html']), flags=re.S).strip(), {}
    return (f"```\n{text(data['text/plain']).rstrip()}\n```", {}) if 'text/plain' in data else ('', {})

def render_cell(cell):
    "One cell as markdown and pictures; hidden cells give nothing."
    source = text(cell['source']).strip()
    if cell['cell_type'] == 'markdown':
        return relink(source), {}
    options = set(re.findall(r'^#\|\s*(.+?)\s*$', source, re.M))
    if cell['cell_type'] != 'code' or any(re.match(r'(hide|export|default_exp|include:\s*false)', o) for o in options):
        return '', {}
    code = re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip()
    alt = next((o.removeprefix('fig-alt:').strip(' "') for o in options if o.startswith('fig-alt:')), '')
    parts, files = ([] if 'echo: false' in options or not code else [f'```python\n{code}\n```']), {}
    for i, out in enumerate(cell['outputs']):
        part, pics = render_output(out, f"{cell['id']}-{i}", alt)
        parts.append(part); files |= pics
    return '\n\n'.join(filter(None, parts)), files

def render(path):
    "The whole notebook: markdown, and its pictures."
    cells = [render_cell(c) for c in json.loads(path.read_text(encoding='utf-8'))['cells']]
    note = '<!-- Written by tools/readme.py from nbs/index.ipynb: change that notebook, not this file. -->'
    files = {name: data for _, pics in cells for name, data in pics.items()}
    return '\n\n'.join([note, *(t for t, _ in cells if t)]) + '\n', files

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--check', action='store_true', help='write nothing; exit 1 when the README is not what the notebook gives'
    )
    check = parser.parse_args().check
    markdown, files = render(root/'nbs'/'index.ipynb')
    wanted = {root/'README.md': markdown.encode()} | {root/pictures/name: data for name, data in files.items()}
    stale = [p for p in (root/pictures).glob('*') if p not in wanted]
    changed = [p for p, data in wanted.items() if not p.exists() or p.read_bytes() != data]
    if check:
        sys.exit(
            'out of date, run tools/readme.py: ' + ', '.join(p.name for p in changed + stale) if changed or stale else 0
        )
    for p in stale: p.unlink()
    for p in changed: p.parent.mkdir(exist_ok=True); p.write_bytes(wanted[p])
    print('README.md written' if changed or stale else 'README.md is up to date')

if __name__ == '__main__': main()
