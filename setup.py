"The package as pip sees it. Everything that may change is in settings.ini, which nbdev reads too."
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_namespace_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='], interpolation=None) # '=' alone: a requirement may hold a colon
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

licences = {'apache2': 'Apache-2.0'}
statuses = {'2': '2 - Pre-Alpha', '3': '3 - Alpha', '4': '4 - Beta', '5': '5 - Production/Stable'}

setup(
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
