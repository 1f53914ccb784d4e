"""CoAtNet for timm: `import coatnet_zoo` registers the models, `timm.create_model` builds them."""
from . import models
from .releases import verify_weights

__all__ = ['__version__', 'models', 'verify_weights']
__version__ = '0.1.0'
