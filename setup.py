"The package as pip sees it. Everything that may change is in settings.ini, which nbdev reads too."
import shlex
import subprocess
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='], interpolation=None) # '=' alone: a requirement may hold a colon
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

licences = {'apache2': 'Apache-2.0'}
statuses = {'2': '2 - Pre-Alpha', '3': '3 - Alpha', '4': '4 - Beta', '5': '5 - Production/Stable'}

def commit():
    "The commit of this checkout, or the one that an sdist was made from; '' where nobody knows."
    kept = here/cfg['lib_path']/'_commit'
    if kept.is_file(): return kept.read_text()
    def git(*args): return subprocess.run(['git', *args], capture_output=True, text=True, cwd=here)
    try:
        if git('ls-files', '--error-unmatch', 'setup.py').returncode: return '' # a checkout of something else, or none
        return git('rev-parse', '--short=12', 'HEAD').stdout
    except OSError: return ''

def keep_commit(folder): # records name it, where the package is no checkout any more
    if found := commit(): (Path(folder)/cfg['lib_path']/'_commit').write_text(found)

class BuildWithCommit(build_py):
    def run(self):
        super().run()
        if not self.editable_mode: keep_commit(self.build_lib)

class SdistWithCommit(sdist):
    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        keep_commit(base_dir)

setup(
    cmdclass=dict(build_py=BuildWithCommit, sdist=SdistWithCommit),
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    keywords=cfg['keywords'].split(),
    url=cfg['git_url'],
    project_urls={'Documentation': cfg['doc_host'] + cfg['doc_baseurl']},
    author=cfg['author'],
    license=licences[cfg['license']],
    license_files=['LICENSE', 'NOTICE'],
    classifiers=[
        f"Development Status :: {statuses[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    packages=find_namespace_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*'], exclude=['*.__pycache__*']), # folders of assets too
    package_data={cfg['lib_name']: ['assets/*', 'assets/**/*']}, # pictures, heads, generator, and the NOTICE beside each
    include_package_data=True,
    python_requires='>=' + cfg['min_python'],
    install_requires=shlex.split(cfg['requirements']),
    extras_require={name: cfg[f'{name}_requirements'].split() for name in ('dev', 'ray', 'captions', 'umap', 'app')},
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"], # lets the pages of other nbdev projects link here
    },
    zip_safe=False,
)
