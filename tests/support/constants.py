"""Paths and names that many tests use."""
import os
from pathlib import Path

__all__ = ['CLASSES', 'DATA', 'RELEASE_NAME', 'ROOT']

ROOT = Path(__file__).parents[2]
CLASSES = ('blue', 'green', 'red')  # classes of the generated images, which have that colour
RELEASE_NAME = 'coatnet_pico_64.colours'  # name of the release that the tests make of their run
DATA = Path(os.environ.get('COATNET_ZOO_DATA') or ROOT.parent / 'shared' / 'data')  # packed sets of real images
