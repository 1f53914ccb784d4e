"""The extras of the package, and the modules that each provides to the scripts."""
import sys
from importlib.util import find_spec
from pathlib import Path

__all__ = ['EXTRAS', 'explain_missing_module', 'is_installed']

# extra of pyproject.toml: top-level modules; the first extra also lists the package and its dependencies
EXTRAS = {
    'scripts': ('tyro', 'accelerate', 'matplotlib', 'PIL', 'tqdm', 'coatnet_zoo', 'huggingface_hub', 'numpy',
                'safetensors', 'timm', 'torch', 'torchvision'),
    'data': ('datasets', 'pyarrow', 'webdataset'),
    'demo': ('skimage', 'sklearn'),
    'kecam': ('h5py',),
    'space': ('gradio',),
    'transformers': ('transformers',),
    'runtimes': ('openvino',),
    'test': ('onnx_ir', 'onnxruntime', 'onnxscript', 'tensorboard'),
}


def is_installed(module: str) -> bool:
    """Whether a top-level module can be imported."""
    return find_spec(module) is not None


def explain_missing_module(error: ModuleNotFoundError) -> int:
    """Print to stderr which extra provides a module that is not installed, and return the exit code 2.

    Raises the error again for any other module, which is a bug in the code.
    """
    module = (error.name or '').partition('.')[0]
    extra = next((extra for extra, modules in EXTRAS.items() if module in modules), None)
    if extra is None or find_spec(module):
        raise error
    print(f"{Path(sys.argv[0]).name}: the module {module} is not installed; in a checkout of coatnet_zoo: pip install "
          f"'.[{extra}]'", file=sys.stderr)
    return 2
