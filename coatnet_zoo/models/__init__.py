"""The families; importing them registers their names with timm."""
from . import coatnet, lightconvnet
from .backbone import FLAVORS, Backbone, BackboneCfg

__all__ = ['FLAVORS', 'Backbone', 'BackboneCfg', 'coatnet', 'lightconvnet']
