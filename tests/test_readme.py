"The README, as somebody reads it who knows nothing of the package and has nothing but this page."

import re
from configparser import ConfigParser

from house import cells_of, names, root, source_of

def weight(item): return 1

README = (root/'README.md').read_text(encoding='utf-8')
parser = ConfigParser(delimiters=['='], interpolation=None)
parser.read(root/'settings.ini', encoding='utf-8')

def section(title): return README.split(f'\n## {title}\n')[1].split('\n## ')[0]

def test_the_clone_stands_before_what_is_run_in_it():
    clone = f"git clone {parser['DEFAULT']['git_url']} && cd gmail_nb"
    assert README.index(clone) < README.index('python3 -m venv .venv')

def test_every_extra_is_said_to_be_for_something():
    extras = [k.removesuffix('_requirements') for k in parser['DEFAULT'] if k.endswith('_requirements')]
    line, = (p for p in README.split('\n\n') if p.startswith('What not everybody needs is an extra'))
    assert {*re.findall(r'`(\w+)` for', line)} == {*extras}
    row, = (l for l in README.splitlines() if l.startswith('| `gmail_app`'))
    assert 'needs the extra `app`' in row

def test_the_repository_can_be_cited_with_its_version():
    entry = README.split('@software{')[1].split('```')[0]
    said = dict(re.findall(r'(\w+)\s*= \{+([^{}]+)\}', entry))
    ini = parser['DEFAULT']
    assert said['version'] == ini['version'] and said['url'] == ini['git_url'] and said['author'] == ini['author']

def test_the_lines_in_python_give_the_same_numbers_every_time():
    "Seeds of images come from their keys, that of the order from the settings; adapters need one."
    line, = (l for l in section('In Python').splitlines() if 'GenReal(' in l)
    assert 'seed=' in line

def test_nothing_is_installed_from_a_registry_that_does_not_have_it():
    assert not re.search(r'pip install \S*gmail_nb', README)

def test_every_picture_has_a_text():
    texts = re.findall(r'!\[(.*?)\]\(index_files', README)
    assert len(texts) == 2 and all(len(t.split()) > 8 for t in texts)

def test_what_a_run_shows_is_read_in_a_few_seconds():
    "One number first; what is not shown in six lines at most, failures and interval in each; pages for the rest."
    said = section('What a run shows')
    lines = [l for l in said.splitlines() if l.startswith('- ')]
    assert 0 < len(lines) <= 6 and all(len(l) < 280 for l in lines)
    assert said.index('points of mean recall') < said.index(lines[0]) and 'failed' in lines[0]
    assert len(said.split()) < 500

MEASURED = re.compile(
    r'(?<![\w.])[+-]\d+\.\d|\[[+-]?\d[\d.]*, ?[+-]?\d|\d (?:points|minutes|seconds|hours)\b|\bhalf an hour'
    r'|\b(?:two|three|four|five|six|seven|eight|nine|ten) (?:points|minutes|seconds|hours)\b')
OF_OTHERS = ('the paper', 'under 30 minutes', 'two points may be lost', 'a margin says') # a limit, or the protocol's

def test_no_measured_number_is_typed_into_the_pages_of_results():
    "What was measured is read from a record by a cell that runs; prose holds limits and the paper's numbers alone."
    assert MEASURED.search('it takes nine minutes') and MEASURED.search('+6.9 [+5.4, +8.5]')
    cells = [(n, p) for n in names if n == 'index' or n.startswith('experiments/') for c in cells_of(n)
             if c['cell_type'] == 'markdown' for p in source_of(c).split('\n\n')]
    typed = [(n, m[0]) for n, p in cells if (m := MEASURED.search(p)) and not any(w in p.lower() for w in OF_OTHERS)]
    assert len(cells) > 300 and not typed, typed
