"Works that a room cites are on the page of references, and what stands there is cited by the room that it names."

import json
import re

import pytest
from house import names, path_of

def weight(item): return 1

CITED = re.compile(r'https://(?:arxiv\.org/abs|doi\.org)/[^\s)"\\]+')

def prose(name):
    cells = json.loads(path_of(name).read_text(encoding='utf-8'))['cells']
    return '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')

lines = [l for l in prose('references').splitlines() if l.startswith('- ')]
listed = {link: line for line in lines for link in CITED.findall(line)}

@pytest.mark.parametrize('link', listed)
def test_a_work_is_cited_by_the_room_that_is_named_beside_it(link):
    rooms = re.findall(r'\]\(([\w/]+)\.ipynb\)', listed[link])
    assert rooms and all(link in prose(room) for room in rooms), f'{rooms} do not cite {link}'

def test_every_work_has_a_line_and_every_citation_is_listed():
    assert len(listed) == len(lines) > 10
    cited = {link for name in names if name != 'references' for link in CITED.findall(prose(name))}
    assert cited == {*listed}, cited ^ {*listed}

def test_no_work_is_named_by_its_authors_alone():
    bare = [(n, m[0]) for n in names for m in re.finditer(r'[^\[]{20}\bet al\.(?![^\[\]]*\]\()', prose(n))]
    assert not bare, bare
