"""scripts/import_weights.py: tensors are paired in their order, and rejected unless all shapes agree."""
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from coatnet_train.runtime.cli import ConfigError
from import_weights import ImportWeightsSettings, main


@pytest.fixture
def model(randomize) -> torch.nn.Module:
    return randomize(timm.create_model('test_resnet'))


@pytest.fixture
def weights(model, tmp_path) -> Path:
    """A file with the tensors of a model under other names, as in a port by another package."""
    path = tmp_path / 'port.pth'
    torch.save({f'net.{number}.w': tensor for number, tensor in enumerate(model.state_dict().values())}, path)
    return path


def test_tensors_are_paired_in_their_order(model, weights, tmp_path, capsys):
    main(ImportWeightsSettings('test_resnet', weights, tmp_path / 'out.safetensors'))
    found = load_file(tmp_path / 'out.safetensors')
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name
    assert f'{len(expected)} tensors' in capsys.readouterr().out
    timm.create_model('test_resnet', pretrained=True, pretrained_cfg_overlay=dict(
        file=str(tmp_path / 'out.safetensors'), num_classes=1000))


def test_a_package_of_weights_is_read_without_running_it(model, weights, tmp_path, monkeypatch):
    package = tmp_path / 'port_of_weights'
    (package / 'models').mkdir(parents=True)
    (package / '__init__.py').write_text('raise RuntimeError')
    monkeypatch.syspath_prepend(tmp_path)
    settings = ImportWeightsSettings('test_resnet', Path('port_of_weights'), tmp_path / 'out.safetensors')
    with pytest.raises(ConfigError, match=r'WEIGHTS port_of_weights must be a package with one \.pth file, but has 0'):
        main(settings)
    weights.rename(package / 'models' / 'port.pth')
    main(settings)
    assert torch.equal(load_file(settings.output)['fc.bias'], model.fc.bias)
    with pytest.raises(ConfigError, match=r"neither a file nor an installed package; .* '\.\[teacher\]'"):
        main(ImportWeightsSettings('test_resnet', Path('no_such_package'), tmp_path / 'out.safetensors'))


def test_half_leaves_norms_and_biases_as_they_are(model, weights, tmp_path):
    main(ImportWeightsSettings('test_resnet', weights, tmp_path / 'out.safetensors', half=True))
    found = load_file(tmp_path / 'out.safetensors')
    for name, tensor in model.state_dict().items():
        expected = tensor.half() if name.endswith('weight') and tensor.ndim > 1 else tensor
        assert found[name].dtype == expected.dtype and torch.equal(found[name], expected), name
    assert found['bn1.num_batches_tracked'].dtype == torch.int64 and found['conv1.0.weight'].dtype == torch.float16


def test_tensors_that_do_not_fit_are_refused(weights, tmp_path):
    state = torch.load(weights)
    changes = {
        'fewer': (dict(list(state.items())[:-1]), r'must hold the \d+ tensors of test_resnet, but has \d+; give'),
        'other': ({**state, 'net.0.w': torch.zeros(5, 3, 3, 3)},
                  r'net\.0\.w must have the shape of conv1\.0\.weight, \(\d+, 3, 3, 3\), but has \(5, 3, 3, 3\)'),
        'reversed': (dict(reversed(state.items())), r'must have the shape of')}
    for name, (content, message) in changes.items():
        torch.save(content, tmp_path / f'{name}.pth')
        with pytest.raises(ConfigError, match=message):
            main(ImportWeightsSettings('test_resnet', tmp_path / f'{name}.pth', tmp_path / 'out.safetensors'))
    assert not (tmp_path / 'out.safetensors').exists()


def test_wrong_names_are_refused(weights, tmp_path):
    out = tmp_path / 'out.safetensors'
    for arguments, message in (
            (('test_resnet', weights, tmp_path / 'out.pth'), r'OUTPUT must end in \.safetensors, got .*\.pth'),
            (('test_resnet', tmp_path / 'none.pth', out), r'WEIGHTS .* is neither'),
            (('test_resnett', weights, out), r'MODEL test_resnett .*did you mean test_resnet')):
        with pytest.raises(ConfigError, match=message):
            main(ImportWeightsSettings(*arguments))
