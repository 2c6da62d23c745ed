from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

root = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(root/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

setup(
    version=cfg['version'],
    description=cfg['description'],
    long_description=(root/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license_expression=cfg['license'],
    author=cfg['author'],
    keywords=cfg['keywords'].split(),
    classifiers=['Programming Language :: Python :: 3', 'Framework :: Jupyter',
                 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    # Chapter 05 goes into the wheel, for kaggle/runner.ipynb; the other chapters do not.
    packages=[cfg['lib_path'], f"{cfg['lib_path']}.nbs"],
    package_dir={f"{cfg['lib_path']}.nbs": cfg['nbs_path']},
    package_data={f"{cfg['lib_path']}.nbs": ['05_ablation.ipynb'],
                  cfg['lib_path']: ['shipped/record.json', 'shipped/model/*']},
    include_package_data=False,
    install_requires=cfg['requirements'].strip().splitlines(),
    entry_points=dict(console_scripts=cfg['console_scripts'].split()),
    extras_require={'dev': cfg['dev_requirements'].strip().splitlines()},
)
