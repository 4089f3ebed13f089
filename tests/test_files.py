"Files that are whole or absent, names with help, and records."
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from gmail_nb.files import (asset, atomic_path, atomic_write, check_writable, commit, name_some, progress, read_results,
                            record, unknown_name, versions, write_results)

def one(value=0.43, **extra):
    return record('demo', 'gmail', 'emoji', 'B', 'paired_cosine', value, seed=0, n=799, **extra)


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    atomic_write(tmp_path/'log.txt', 'first')
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path/'log.txt') as tmp:
        tmp.write_text('half of the sec')
        raise KeyboardInterrupt
    assert (tmp_path/'log.txt').read_text() == 'first'
    assert len(list(tmp_path.iterdir())) == 1

def test_others_may_read_what_was_written(tmp_path):
    assert os.stat(atomic_write(tmp_path/'a', b'x')).st_mode & 0o777 == 0o644

def test_a_file_is_no_folder_to_write_into(tmp_path):
    atomic_write(tmp_path/'log.txt', 'first')
    with pytest.raises(OSError, match='log.txt'): check_writable(tmp_path/'log.txt')
    with pytest.raises(OSError, match='cannot write into the folder'): check_writable(tmp_path/'log.txt'/'inside')
    assert check_writable(tmp_path/'new'/'deep').is_dir()

def test_unknown_names_show_what_is_near_or_known():
    assert "did you mean 'embedded'" in str(unknown_name('encoder', 'embeded', ['embedded', 'other']))
    assert str(unknown_name('source', 'zzz', ['noto', 'fluent'])) == "unknown source 'zzz': known: 'fluent', 'noto'."
    with pytest.raises(ValueError, match='and 28 more'):
        raise unknown_name('thing', '???', [f'name {i}' for i in range(40)])

def test_some_of_many_are_named():
    assert name_some('abc') == "'a', 'b', 'c'" and name_some('abcd') == "'a', 'b', 'c' and 1 more"
    assert name_some({'a': 1}) == "'a'" and len(name_some(['x'*300])) == 82

def test_a_missing_asset_is_named():
    with pytest.raises(FileNotFoundError, match='nothing.bin'): asset('nothing.bin')
    assert asset('emoji', 'emoji.parquet').exists()

def test_progress_gives_every_item():
    assert sum(progress(range(1000), 'adding')) == 499500

def test_an_installed_package_knows_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr('gmail_nb.files.resources', SimpleNamespace(files=lambda name: tmp_path))
    assert commit() is None
    (tmp_path/'_commit').write_text('0123456789ab\n')
    assert commit() == '0123456789ab' == one()['commit']

def test_records_come_back_as_they_were(tmp_path):
    rows = [one()]
    write_results(tmp_path/'results.jsonl', rows)
    assert read_results(tmp_path/'results.jsonl') == rows
    odd = [rows[0] | dict(note='one\u2028two')] # splitlines would cut here
    write_results(tmp_path/'odd.jsonl', odd)
    assert read_results(tmp_path/'odd.jsonl') == odd

def test_a_record_says_what_it_was_made_with():
    assert one()['versions'] == versions() and one()['commit'] == commit() and one(low=.1)['low'] == .1

@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_result_must_be_finite(value):
    with pytest.raises(ValueError, match='finite'): one(value)

def test_a_broken_line_is_named_by_its_number(tmp_path):
    (tmp_path/'bad.jsonl').write_text('{"a":1}\nnot json\n')
    with pytest.raises(ValueError, match='line 2'): read_results(tmp_path/'bad.jsonl')

def test_nothing_heavy_is_imported():
    "Commands answer fast because the lowest rooms are light."
    code = 'import sys, gmail_nb.files, gmail_nb.settings; print([m for m in ("torch", "numpy", "datasets") if m in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.strip() == '[]', done.stdout + done.stderr

@pytest.mark.parametrize('kernel, shown', [(False, ''), (True, 'counting')])
def test_a_bar_is_silent_where_nobody_watches(kernel, shown, monkeypatch, capsys):
    "In a pipe a short run says nothing, also where numbers are set beside the bar; a notebook sees its bar."
    monkeypatch.delitem(sys.modules, 'ipykernel', raising=False)
    if kernel: monkeypatch.setitem(sys.modules, 'ipykernel', object())
    with progress((), 'counting', total=3) as bar:
        for _ in range(3):
            bar.set_postfix(dict(loss=1), refresh=False)
            bar.update()
    said = capsys.readouterr()
    assert not said.out and shown in said.err and bool(said.err) == kernel

def test_a_long_run_in_a_log_has_a_line_now_and_then(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, 'ipykernel', raising=False)
    clock = iter(range(0, 10 ** 6, 100)) # every look at it is 100 seconds later
    monkeypatch.setattr('time.monotonic', lambda: next(clock))
    for _ in progress(range(60), 'counting'): pass
    assert 1 < capsys.readouterr().err.count('counting') < 60
