"""CoAtNet for timm: `import coatnet_zoo` registers the models, `timm.create_model` builds them."""
from . import models

__all__ = ['__version__', 'models']
__version__ = '0.1.0'
