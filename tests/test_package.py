"What pip installs: the wheel carries the data, the weights, their licences and the commands; the files that describe it agree."

import re, shlex, shutil, subprocess, sys, zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from house import run

root = Path(__file__).resolve().parent.parent
parser = ConfigParser(delimiters=['='], interpolation=None)
parser.read(root/'settings.ini', encoding='utf-8')
settings = parser['DEFAULT']

def weight(item): return 60 if 'wheel' in item.fixturenames else 1

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "A wheel built from a copy, so that no build folder is left in the tree."
    copy, out = tmp_path_factory.mktemp('project')/'gmail_nb', tmp_path_factory.mktemp('wheel')
    shutil.copytree(
        root,
        copy,
        ignore=shutil.ignore_patterns(
            '.git', '.venv', '*.egg-info', 'build', 'dist', '_*cs', '__pycache__', '.pytest_cache', 'nbs', '.hypothesis'
        ),
    )
    git = ('git', '-c', 'user.name=gmail_nb', '-c', 'user.email=gmail_nb@localhost', '-c', 'core.autocrlf=false')
    for step in (('init', '-q'), ('add', 'setup.py'), ('commit', '-q', '-m', 'as it is')): run(*git, *step, cwd=copy)
    head = run('git', 'rev-parse', '--short=12', 'HEAD', cwd=copy).stdout.strip()
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'pip',
            'wheel',
            '--no-deps',
            '--no-build-isolation',
            '--quiet',
            '-w',
            str(out),
            str(copy),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    with zipfile.ZipFile(next(out.glob('*.whl'))) as z:
        z.commit = head
        yield z

def read(wheel, ending): return next(wheel.read(n).decode() for n in wheel.namelist() if n.endswith(ending))

def test_wheel_carries_every_module_and_asset(wheel):
    held = set(wheel.namelist())
    for path in (root/'gmail_nb').rglob('*'):
        if (
            path.is_file()
            and '__pycache__' not in path.parts
            and path.suffix not in ('.pyc', '.tmp')
            and not path.name.startswith('.')
        ):
            assert path.relative_to(root).as_posix() in held, f'{path.relative_to(root)} is not in the wheel'
    assert all(n.startswith(('gmail_nb/', 'gmail_nb-')) for n in held), 'the wheel holds something besides the package'

def test_wheel_says_of_which_commit_it_was_built(wheel):
    assert read(wheel, '/_commit').strip() == wheel.commit

def test_wheel_carries_notices(wheel):
    held = wheel.namelist()
    assert any(n.endswith('/LICENSE') for n in held) and any(n.endswith('/NOTICE') for n in held)
    assert any(re.match(r'gmail_nb/assets/emoji/NOTICE', n) for n in held), 'the drawings travel without their licences'

def test_wheel_names_the_commands(wheel):
    entries = read(wheel, 'entry_points.txt')
    for command in settings['console_scripts'].split():
        name, function = command.split('=')
        assert re.search(rf'^{name} = {re.escape(function)}$', entries, re.M)

def test_wheel_metadata(wheel):
    meta = read(wheel, 'METADATA')
    assert f"Version: {settings['version']}\n" in meta and f"Requires-Python: >={settings['min_python']}" in meta
    assert 'License: Apache-2.0' in meta or 'License-Expression: Apache-2.0' in meta
    assert meta.count('Requires-Dist') == sum(
        len(shlex.split(v)) for k, v in settings.items() if k.endswith('requirements')
    )


def test_commands_exist():
    "Each console script names a function that can be imported, by a Python that has imported nothing else."
    named = [c.split('=')[1].split(':') for c in settings['console_scripts'].split()]
    code = '; '.join(f'from {module} import {function}; assert callable({function})' for module, function in named)
    run(sys.executable, "-c", code, cwd=root)

def constrained():
    "{name: {version: marker}} of constraints.txt."
    pins = {}
    for line in (root/'constraints.txt').read_text().splitlines():
        if line and not line.startswith('#'):
            pin, _, marker = line.partition(';')
            name, version = pin.strip().split('==')
            pins.setdefault(name, {})[version] = marker.strip()
    return pins

def test_constraints_pin_every_requirement():
    pins = constrained()
    for requirement in shlex.split(settings['requirements']) + settings['dev_requirements'].split():
        name = re.match(r'[\w.-]+', requirement)[0].lower().replace('_', '-')
        assert name in pins, f'{name} has no exact version in constraints.txt'
    assert list(pins['torch']) == ['2.13.0']
    for name, versions in pins.items():
        assert len(versions) == 1 or all(versions.values()), f'{name} is pinned twice for one Python'


def test_version_has_one_home():
    assert f"__version__ = \"{settings['version']}\"" in (root/'gmail_nb'/'__init__.py').read_text()
    assert f"## [{settings['version']}]" in (root/'CHANGELOG.md').read_text()

def test_readme_has_the_two_commands():
    "Each is one line that a shell can run in a fresh clone; `.ci/run` takes the second from here."
    lines = [l for l in (root/'README.md').read_text().splitlines() if l.startswith('python3 -m venv .venv')]
    assert len(lines) == 2
    assert 'gmail_demo' in lines[0] and lines[1].endswith('-m pytest')
    assert all('-c constraints.txt' in l for l in lines)
