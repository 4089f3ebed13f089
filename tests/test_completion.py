"The completion that commands print, in the shells themselves: keys are typed, and what then stands there is read."
import os
import pty
import re
import select
import shutil
import subprocess
import time

import pytest
from gmail_nb.cli.commands import COMMANDS
from gmail_nb.cli.flags import completion

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp('typed')
    for shell in ('bash', 'zsh', 'fish'): (tmp_path/f'words.{shell}').write_text(completion(COMMANDS, shell))
    for name in ('my pictures', 'my plots'): (tmp_path/name).mkdir()
    (tmp_path/'bin').mkdir()
    for name in ('gmail_align', 'gmail_tune'):
        (tmp_path/'bin'/name).write_text('#!/bin/sh\nexit 0\n')
        (tmp_path/'bin'/name).chmod(0o755)
    return tmp_path

def typed(folder, argv, keys, last, seconds=30):
    "What a shell shows once `keys` were typed, as soon as `last` is among it."
    path = f'{folder}/bin:{os.environ["PATH"]}'
    env = dict(os.environ, PS1='> ', TERM='vt100', HOME=str(folder), PATH=path)
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(folder)
        os.execvpe(argv[0], argv, env)
    seen, until, sent = '', time.monotonic() + seconds, 0
    try:
        while time.monotonic() < until and last not in seen:
            if not select.select([terminal], [], [], .5)[0]: # it waits: the next line
                if sent < len(keys): os.write(terminal, keys[sent].encode())
                sent += 1
                continue
            try: seen += os.read(terminal, 1 << 16).decode(errors='replace')
            except OSError: break
    finally:
        os.close(terminal)
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    return re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', seen)

@pytest.mark.skipif(not shutil.which('zsh'), reason='needs zsh')
@pytest.mark.parametrize('line, found', [
    ('gmail_align --gene', '--generated'), ('gmail_tune cap', 'caption'),
    ('gmail_tune text --arm ind', 'indiscriminate'),
    ('gmail_align my', 'my\\ p')])
def test_zsh_completes(folder, line, found):
    "Also where the person has set up no completion at all."
    seen = typed(folder, ['zsh', '-f', '-i'], ['. ./words.zsh\n', f'{line}\t'], found)
    assert found in seen.replace('\r', '') and 'not found' not in seen

@pytest.mark.parametrize('line, found', [('gmail_align my\\ pi', 'my\\ pictures'), ('gmail_tune te', 'text')])
def test_bash_completes_at_a_prompt(folder, line, found):
    assert found in typed(folder, ['bash', '--norc', '-i'], ['. ./words.bash\n', f'{line}\t'], found)

@pytest.mark.skipif(not shutil.which('fish'), reason='needs fish')
@pytest.mark.parametrize('line, found', [
    ('gmail_align --gene', '--generated'), ('gmail_tune ca', 'caption'),
    ('gmail_tune text --arm ind', 'indiscriminate'), ('gmail_eval vqa --bli', '--blind'),
    ('gmail_eval --skip', '--skip-existing')])
def test_fish_completes(folder, line, found):
    asked = ['fish', '--no-config', '-c', f'source words.fish; complete -C "{line}"']
    done = subprocess.run(asked, cwd=folder, capture_output=True, text=True, timeout=60)
    assert not done.stderr and done.returncode == 0
    assert [l.split('\t')[0] for l in done.stdout.splitlines()] == ([found] if found else [])

def test_a_file_with_a_space_is_one_word(folder):
    line = ('. ./words.bash; COMP_WORDS=(gmail_align my); COMP_CWORD=1; _gmail_align; '
            'printf "%s|" "${COMPREPLY[@]}"')
    done = subprocess.run(['bash', '-c', line], cwd=folder, capture_output=True, text=True)
    assert sorted(done.stdout.strip('|').split('|')) == ['my pictures', 'my plots']

def test_help_of_a_flag_is_short_and_quoted_in_fish(folder):
    lines = (folder/'words.fish').read_text().splitlines()
    assert all(l.startswith('complete -c gmail_') for l in lines) and len(lines) > 200
    assert any("row\\'s" in l or "\\'" in l for l in lines) # a quote within the quotes
