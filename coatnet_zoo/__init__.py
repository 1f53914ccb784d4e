"""CoAtNet for timm: `import coatnet_zoo` registers the models, `timm.create_model` builds them."""
from . import models
from .models import list_models
from .releases import verify_weights

__all__ = ['__version__', 'list_models', 'models', 'verify_weights']
__version__ = '0.1.0'
