"Tests of tools/publish_tables.py: what of a report goes into the package."
import json
import shutil
import sys
from importlib import resources
from pathlib import Path

import pytest

from gmail_nb.experiments.parts import part_file
from gmail_nb.experiments.report import asked_of
from gmail_nb.files import read_results, write_results
from gmail_nb.settings import report_settings

TOOLS = Path(__file__).parents[1]/'tools'

@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    yield __import__('publish_tables')
    sys.modules.pop('publish_tables', None)

@pytest.fixture
def home(tmp_path):
    "A copy of what the package holds."
    shutil.copytree(str(resources.files('gmail_nb')/'assets'/'evidence'), tmp_path/'evidence')
    return tmp_path/'evidence'

def finish(run, part, seeds):
    "Records as a report of so many chains would leave them: those of the package, with another count."
    kept = read_results(resources.files('gmail_nb')/'assets'/'evidence'/'tables'/f'{part}.jsonl')
    records = [r | (dict(n=seeds) if r['metric'] == 'run_seconds' else dict(seeds=seeds)) for r in kept]
    file = part_file(run, part, report_settings(False, seeds), *asked_of(part))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_results(file, records)

def test_of_each_part_the_run_with_most_chains_is_taken(tool, home, tmp_path):
    for seeds in (2, 7): finish(tmp_path/'run', 'gap', seeds)
    chains = tool.publish(tmp_path/'run', home)
    assert chains['gap'] == 7 and set(chains) == set(tool.PARTS)
    assert {r.get('seeds') for r in read_results(home/'tables'/'gap.jsonl') if 'seeds' in r} == {7}
    about = json.loads((home/'tables'/'about.json').read_text())
    assert ' to 7 whole chains, as each row says' in about['intro'] and about['absent'] == {}
    assert 'embedded, 7 chains' in (home/'tables.md').read_text()

def test_fewer_chains_replace_nothing(tool, home, tmp_path):
    finish(tmp_path/'more', 'texts', 9)
    tool.publish(tmp_path/'more', home)
    before = (home/'tables'/'texts.jsonl').read_bytes()
    finish(tmp_path/'run', 'texts', 2)
    assert tool.publish(tmp_path/'run', home)['texts'] == 9
    assert (home/'tables'/'texts.jsonl').read_bytes() == before

def test_a_folder_without_records_is_refused_where_there_is_nothing_else(tool, tmp_path):
    with pytest.raises(SystemExit, match='has no records of gmail_report'):
        tool.publish(tmp_path/'run', tmp_path/'evidence')
