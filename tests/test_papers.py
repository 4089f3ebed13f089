"What surrounds the code: how to cite it, how to change it, how people treat each other, what an issue asks for; and a release that is built and checked."

import re
import sys
from configparser import ConfigParser

import pytest
import yaml
from house import root, run

def weight(item): return 60 if 'release' in item.name else 1

parser = ConfigParser(delimiters=['='], interpolation=None)
parser.read(root/'settings.ini', encoding='utf-8')
settings = parser['DEFAULT']
papers = ('CONTRIBUTING.md', 'CODE_OF_CONDUCT.md', 'CITATION.cff')

def read(name): return (root/name).read_text(encoding='utf-8')

def test_citation_says_what_settings_say():
    cff = yaml.safe_load(read('CITATION.cff'))
    assert cff['cff-version'] == '1.2.0' and cff['version'] == settings['version']
    assert (
        cff['repository-code'] == settings['git_url'] and cff['url'] == settings['doc_host'] + settings['doc_baseurl']
    )
    assert cff['authors'] == [{'name': settings['author']}], 'no person is named but those of settings.ini'
    assert f"## [{cff['version']}] - {cff['date-released']}" in read('CHANGELOG.md')
    assert cff['license'] == {'apache2': 'Apache-2.0'}[settings['license']]

def test_citation_names_the_paper_as_the_readme_does():
    paper, = yaml.safe_load(read('CITATION.cff'))['references']
    readme = read('README.md')
    assert paper['title'] in readme and paper['url'] in readme
    assert f"pages = {{{paper['start']}--{paper['end']}}}" in readme and f"volume = {{{paper['volume']}}}" in readme

@pytest.mark.parametrize('name', papers)
def test_files_that_a_paper_names_are_there(name):
    text = read(name)
    named = set(re.findall(r'\]\(([^)#:]+)\)', text)) | set(re.findall(r'\b((?:tools|tests|nbs)/[\w/.]+\.\w+)', text))
    missing = [f for f in named if not (root/f).exists()]
    assert not missing, missing

@pytest.mark.parametrize('name', papers)
def test_no_address_is_invented(name):
    assert not re.search(r'[\w.]+@[\w-]+\.\w+', read(name))

def test_changing_a_notebook_fits_one_page():
    assert len(read('CONTRIBUTING.md').split()) < 700

@pytest.mark.parametrize('path', sorted((root/'.github'/'ISSUE_TEMPLATE').glob('*.yml')), ids=lambda p: p.stem)
def test_issue_forms_are_as_github_reads_them(path):
    form = yaml.safe_load(path.read_text(encoding='utf-8'))
    if path.stem == 'config': return
    assert {'name', 'description', 'body'} <= set(form)
    ids = [part['id'] for part in form['body']]
    assert len(ids) == len(set(ids))
    for part in form['body']:
        assert part['type'] in ('textarea', 'input', 'checkboxes', 'dropdown', 'markdown') and part['attributes'].get(
            'label'
        )


def test_versions_are_printed_as_the_form_of_bugs_asks():
    form = yaml.safe_load(read('.github/ISSUE_TEMPLATE/bug.yml'))
    asked = next(p for p in form['body'] if p['id'] == 'versions')['attributes']['description']
    said = run(sys.executable, '-c', re.search(r'python -c "(.*)"', asked)[1], cwd=root).stdout
    assert 'torch' in said and 'cores' in said

@pytest.mark.slow
def test_a_release_builds_and_is_checked(tmp_path):
    "The wheel is made from the sdist alone; twine reads both where it is installed."
    said = run(sys.executable, root/'tools'/'release.py', '--keep', tmp_path, cwd=root).stdout
    assert re.search(r'gmail_nb-\S+\.whl: [\d.]+ MB', said) and 'FAILED' not in said
    import tarfile
    with tarfile.open(next(tmp_path.glob('*.tar.gz'))) as t: held = {n.partition('/')[2] for n in t.getnames()}
    assert {*papers, 'nbs/tutorials/10_your_pictures.ipynb', 'nbs/tutorials/colab.svg', 'tools/release.py'} <= held
