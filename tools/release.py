"""Check what a release would be: `python tools/release.py [--install VENV] [--keep FOLDER]`.

Builds the sdist from a copy of the tree, and the wheel from the sdist alone, so that neither can lean on a file that is not packed.
`twine check` reads both where twine is installed. With `--install`, a new virtual environment gets the wheel and nothing else of
ours, with the versions of constraints.txt, and runs `gmail_demo --quick` in an empty folder.
"""
import argparse, importlib.util, os, shutil, subprocess, sys, tarfile, tempfile, time
from pathlib import Path

root = Path(__file__).resolve().parent.parent
LEFT_OUT = (
    '.git',
    '.venv',
    '*.egg-info',
    'build',
    'dist',
    '_*cs',
    '__pycache__',
    '.pytest_cache',
    '.hypothesis',
    '*.tmp',
)


def run(*command, cwd, **env):
    "Run, and stop with what it wrote where it fails; PYTHONPATH is not handed on, so only what is installed counts."
    clean = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'PYTHONHOME', 'VIRTUAL_ENV')}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=clean | env, capture_output=True, text=True)
    if done.returncode: raise SystemExit(f'{command[:4]} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}')
    return done.stdout

def build(out):
    "The sdist and the wheel, in the folder `out`."
    with tempfile.TemporaryDirectory() as tmp:
        copy, unpacked = Path(tmp)/'gmail_nb', Path(tmp)/'unpacked'
        shutil.copytree(root, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
        commit = run('git', 'rev-parse', '--short=12', 'HEAD', cwd=root)
        (copy/'gmail_nb'/'_commit').write_text(commit) # the copy is no checkout
        run(sys.executable, 'setup.py', '--quiet', 'sdist', '-d', out, cwd=copy)
        with tarfile.open(next(out.glob('*.tar.gz'))) as t: t.extractall(unpacked, filter='data')
        source = next(unpacked.iterdir())
        run(
            sys.executable,
            '-m',
            'pip',
            'wheel',
            '--no-deps',
            '--no-build-isolation',
            '--quiet',
            '-w',
            out,
            source,
            cwd=tmp,
        )
    return next(out.glob('*.whl')), next(out.glob('*.tar.gz'))

def check(files):
    "What twine says of both files."
    if not importlib.util.find_spec('twine'): return 'twine is not installed: pip install twine, and run this again'
    return run(sys.executable, '-m', 'twine', 'check', '--strict', *files, cwd=root).strip()

def demo(venv, wheel):
    "The quick demo of the wheel alone, in an empty folder; returns what it printed."
    if venv.exists(): raise SystemExit(f'{venv.name} is there already: name a new folder')
    run(sys.executable, '-m', 'venv', venv, cwd=root)
    scripts = venv/('Scripts' if os.name == 'nt' else 'bin')
    run(scripts/'python', '-m', 'pip', 'install', '--quiet', '-c', root/'constraints.txt', wheel, cwd=venv)
    with tempfile.TemporaryDirectory() as empty:
        where = run(scripts/'python', '-c', 'import gmail_nb; print(gmail_nb.__file__)', cwd=empty).strip()
        if not Path(where).is_relative_to(venv):
            raise SystemExit(f'the package was imported from {where}, not from the wheel')
        said = run(scripts/'gmail_demo', '--quick', '--out', 'demo', cwd=empty, HF_HUB_OFFLINE='1')
        made = sorted(p.name for p in Path(empty, 'demo').iterdir())
    return f'{said.strip()}\nin an empty folder: {", ".join(made)}'

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--install', type=lambda p: Path(p).resolve(), help='a new virtual environment to run the demo from'
    )
    parser.add_argument('--keep', type=Path, help='folder that gets the wheel and the sdist')
    args, started = parser.parse_args(), time.time()
    with tempfile.TemporaryDirectory() as tmp:
        files = build(Path(tmp))
        for f in files: print(f'{f.name}: {f.stat().st_size / 1e6:.1f} MB')
        print(check(files))
        if args.install: print(demo(args.install, files[0]))
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
            for f in files: shutil.copy(f, args.keep)
    print(f'{time.time() - started:.0f} s')

if __name__ == '__main__': main()
