"""The model families; importing them registers their names with timm."""
from . import coatnet, lightconvnet
from .backbone import Backbone
from .build import list_models
from .config import FLAVORS, BackboneCfg

__all__ = ['FLAVORS', 'Backbone', 'BackboneCfg', 'coatnet', 'lightconvnet', 'list_models']
