"""Package metadata comes from settings.ini; the version from tocoad/__init__.py, where nbdev keeps it."""
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(here / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
lib = cfg["lib_path"]
said = (here / lib / "__init__.py").read_text(encoding="utf-8")
version = re.search(r'^__version__\s*=\s*["\'](.+?)["\']', said, re.M)[1]
extras = {k.removesuffix("_requirements"): names.split() for k, names in cfg.items() if k.endswith("_requirements")}

setup(
    version=version,
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    classifiers=["Programming Language :: Python :: 3", "Framework :: Jupyter",
                 "Topic :: Scientific/Engineering :: Image Recognition"],
    packages=find_packages(include=[lib, f"{lib}.*"]),
    package_data={lib: ["paper/*.csv", "paper/*.css", "parts/*.html", "site/*.html", "site/*.css"]},
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": [f"{lib}={lib}._modidx:d"]},
)
