"""torch.hub.load('OWNER/coatnet_zoo', 'coatnet_0') for every name of the package, with timm's keywords."""
from functools import partial

from timm import create_model

from coatnet_zoo import list_models

dependencies = ['huggingface_hub', 'safetensors', 'timm', 'torch']
globals().update({name: partial(create_model, name) for name in list_models()})
