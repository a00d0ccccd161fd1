"""Installs tscnc_tf: `pip install .`; pyproject.toml says what it is and what it needs."""

from setuptools import setup

setup()
