"""Keras .h5 files as keras_cv_attention_models publishes them, with random numbers."""
import re
from pathlib import Path

import numpy as np
import timm

from coatnet_zoo import kecam

__all__ = ['keras_weights', 'write_keras', 'write_published']


def keras_weights(path: Path) -> dict[str, np.ndarray]:
    """Read the tensors of a Keras .h5 file by name."""
    import h5py

    with h5py.File(path) as file:
        return {name: group[name][()] for group in file.values() for name in group.attrs.get('weight_names', ())}


def write_keras(path: Path, weights: dict[str, np.ndarray]) -> None:
    """Write tensors by name LAYER/NAME as Keras' save_weights does."""
    import h5py

    layers: dict[str, list[str]] = {}
    for name in weights:
        layers.setdefault(name.partition('/')[0], []).append(name)
    with h5py.File(path, 'w') as file:
        for layer, names in layers.items():
            group = file.create_group(layer)
            group.attrs['weight_names'] = [name.encode() for name in names]
            for name in names:
                group[name] = weights[name]


def write_published(path: Path) -> Path:
    """Write coatnet0_224_imagenet.h5 with random numbers in place of the weights, and return its path."""
    model = timm.create_model('coatnet_0_kecam')
    generator = np.random.default_rng(0)
    names = {module: layer for layer, module in kecam._STEM_AND_HEAD.items()}
    weights: dict[str, np.ndarray] = {}
    for key, value in model.state_dict().items():
        module, _, parameter = key.rpartition('.')
        block = re.match(r'stages\.(\d)\.blocks\.(\d+)\.', key)
        known = names
        if block:
            layers = kecam._MBCONV if block[1] in '01' else kecam._TRANSFORMER
            known = {target: f'stack_{int(block[1]) + 1}_block_{int(block[2]) + 1}_{layer}'
                     for layer, target in layers.items()}
            module = module.removeprefix(block.group())
        layer = known[module]
        absent = parameter == 'bias' and module in kecam._WITHOUT_BIAS
        if absent or parameter == 'num_batches_tracked':
            continue
        array = generator.normal(0, .02, value.shape).astype(np.float32)
        if parameter == 'table':
            name, array = 'positional_embedding', array.reshape(len(array), -1)
        elif parameter.startswith('running'):
            name, array = dict(running_mean='moving_mean', running_var='moving_variance')[parameter], np.abs(array) + 1
        elif value.ndim == 1:
            name = 'gamma' if parameter == 'weight' else 'bias' if layer.endswith(('_conv', 'predictions')) else 'beta'
        elif module == 'depthwise':
            name, array = 'depthwise_kernel', array.transpose(2, 3, 0, 1)
        elif layer.endswith('_conv'):
            name, array = 'kernel', array.reshape(*array.shape[:2], *(array.shape[2:] or (1, 1))).transpose(2, 3, 1, 0)
        else:
            name, array = 'kernel', array.T
        weights[f'{layer}/{name}:0'] = array
    assert len(weights) == 170 and sum(array.size for array in weights.values()) == 23_291_218  # as in the real file
    write_keras(path, weights)
    return path
