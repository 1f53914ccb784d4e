"""Loading weight files into any model through the flags of the scripts: accepted files and error messages."""
import pathlib

import pytest
import timm
import torch
from safetensors.torch import save_file

from coatnet_train.models.config import ModelSettings
from coatnet_train.models.open_model import open_model
from coatnet_train.models.weights_file import to_flags
from coatnet_train.runtime.cli import ConfigError

NAME = 'coatnet_pico_64'
SMALL = ('depths=(1,1,1,1)', 'embed_dim=(16,16,32,64)')


@pytest.fixture
def model(randomize) -> torch.nn.Module:
    return randomize(timm.create_model(
        NAME, num_classes=4, img_size=32, depths=(1, 1, 1, 1), embed_dim=(16, 16, 32, 64))).eval()


@pytest.fixture
def load(tmp_path):
    """Function that saves an object with torch and opens it as the weights of a model."""

    def save_and_open(content, name=NAME, num_classes=4, option='--checkpoint', **changes):
        torch.save(content, tmp_path / 'weights.pth')
        settings = ModelSettings(**dict(model=name, img_size=32, model_kwargs=SMALL if name == NAME else ()) | changes)
        return open_model(settings, str(tmp_path / 'weights.pth'), option, num_classes=num_classes)[0]

    return save_and_open


def under(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


WRAPPED = {
    'alone': lambda state: state,
    'model_state_dict': lambda state: {
        'epoch': 3, 'optimizer_state_dict': {'state': {0: {'exp_avg': torch.zeros(2)}}}, 'model_state_dict': state},
    'lightning': lambda state: {
        'epoch': 1, 'pytorch-lightning_version': '2.0',
        'state_dict': {**under('model.', state), 'criterion.weight': torch.ones(4)}},
    'nested': lambda state: {'model': {'state_dict': under('module._orig_mod.', state)}},
    'backbone': lambda state: {'weights': under('backbone.', state)},
    'average': lambda state: {**under('module.', state), 'n_averaged': torch.tensor(3)},
    'fsdp': lambda state: {
        key.replace('blocks.0.', 'blocks.0._checkpoint_wrapped_module.'): value for key, value in state.items()},
    'model_is_a_name': lambda state: {'model': 'coatnet', 'model_state_dict': state, 'epoch': 1},
    'of_unknown_name': lambda state: {'my_net': state, 'epoch': 1},
}


@pytest.mark.parametrize('wrap', WRAPPED.values(), ids=list(WRAPPED))
def test_state_dicts_load_whatever_they_are_wrapped_in(model, load, wrap):
    loaded = load(wrap(model.state_dict()))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), model(images)) and model(images).std() > 0


def test_weights_load_at_another_image_size(model, load):
    loaded = load(model.state_dict(), img_size=64)
    model.set_input_size((64, 64))
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(loaded(images), model(images))


def test_weights_of_timm_load_into_the_zoo(load, randomize):
    theirs = randomize(timm.create_model('coatnet_0_224', img_size=64, num_classes=4, depths=(1, 1, 1, 1)).eval())
    images = torch.randn(1, 3, 64, 64)
    ours = load({'state_dict': under('model.', theirs.state_dict())}, 'coatnet_0', img_size=64,
                model_kwargs=('flavor=timm', 'depths=(1,1,1,1)'))
    torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-4)


def test_timms_own_filter_takes_weights_to_another_size(load, randomize):
    theirs = randomize(timm.create_model('test_vit', img_size=64, num_classes=4).eval())
    load(theirs.state_dict(), 'test_vit', img_size=96)
    same = load(theirs.state_dict(), 'test_vit', img_size=64)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(same(images), theirs(images))


def test_a_model_without_classes_leaves_the_classifier(model, load):
    loaded = load(model.state_dict(), num_classes=0)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), model.forward_head(model.forward_features(images), pre_logits=True))


def head(state: dict, classes: int) -> dict:
    return {**state, 'head.fc.weight': torch.zeros(classes, 64), 'head.fc.bias': torch.zeros(classes)}


MISFITS = {  # file content, options for opening it, and the start of the message after "does not fit --model NAME: "
    'classes': (
        lambda state: head(state, 1000), {}, r'it has 1000 classes and the model 4\. .*Give --num-classes 1000'),
    'classes_of_data': (
        lambda state: head(state, 1000), dict(option='--initial-checkpoint'),
        r'it has 1000 classes and the model 4\. .*must be the data.s.*--model local-dir:FOLDER --pretrained'),
    'channels': (lambda state: state, dict(in_chans=1), r'it takes images of 3 channels and the model of 1\.'),
    'width': (lambda state: state, dict(model_kwargs=('depths=(1,1,1,1)', 'embed_dim=(16,16,32,96)')),
              r'it has another width \(stages\.3\.\S+ is \(.*\) and must be \('),
    'depth': (lambda state: state, dict(model_kwargs=('depths=(1,1,2,1)', SMALL[1])),
              r'it has other layers or another depth\. Missing \(\d+\): (stages\.2\.blocks\.1\.\S+ ){3}\.\.\.\. Give'),
    'architecture': (lambda state: timm.create_model('test_resnet').state_dict(), {},
                     r'it is of another architecture \(0 of \d+ names agree\)\.'),
    'into_timm': (lambda state: state, dict(name='test_resnet'), 'it is of another architecture'),
    'two_models': (lambda state: {**under('student.', state), **under('teacher.', state)}, {},
                   r'it holds several models, under student\., teacher\.; save the one that is meant'),
    'rw': (lambda state: timm.create_model('coatnet_nano_rw_224').state_dict(), {},
           r'The checkpoint is of a coatnet_rw .* --model coatnet_0_rw_224\.sw_in1k --pretrained'),
    'flavor': (lambda state: timm.create_model('coatnet_0_224', depths=(1, 1, 1, 1)).state_dict(), {},
               r"The checkpoint is timm's coatnet_N_224 .* --model-kwargs flavor=timm\."),
}


@pytest.mark.parametrize(('make', 'opened', 'message'), MISFITS.values(), ids=list(MISFITS))
def test_what_does_not_fit_is_said_first(model, load, make, opened, message):
    option, name = opened.get('option', '--checkpoint'), opened.get('name', NAME)
    with pytest.raises(ConfigError, match=rf'^{option} \S+ does not fit --model {name}: {message}'):
        load(make(model.state_dict()), **opened)


class Whole:
    """Stand-in for any object that pickle would have to import."""


UNREADABLE = {
    'full_model': (Whole(), r'holds pickled objects \(\S*Whole\).*torch\.save\(model\.state_dict\(\), \.\.\.\)'),
    'path': ({'state_dict': {}, 'hyper_parameters': pathlib.PurePosixPath('data')}, r'holds pickled objects \(pathlib'),
    'list': ([1, 2], 'holds no weights that torch or safetensors can read'),
    'epoch': ({'state_dict': {'weight': torch.zeros(1), 'epoch': 3}}, r"holds no weights .*\['epoch'\] are no tensors"),
    'two': ({'first': {'weight': torch.zeros(1)}, 'second': {'weight': torch.zeros(1)}},
            r'holds several state dicts \(first, second\); save the one'),
}


@pytest.mark.parametrize(('content', 'message'), UNREADABLE.values(), ids=list(UNREADABLE))
def test_files_without_a_state_dict_say_how_to_save_one(load, content, message):
    with pytest.raises(ConfigError, match=rf'^--checkpoint \S+ {message}'):
        load(content)


@pytest.mark.filterwarnings('ignore:.*torch.jit')
def test_torchscript_is_no_state_dict(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / 'script.pt')
    with pytest.raises(ConfigError, match='holds a TorchScript model, not weights alone'):
        open_model(ModelSettings(model='test_resnet'), str(tmp_path / 'script.pt'))


def test_safetensors_load_as_well(model, tmp_path):
    save_file(under('model.', model.state_dict()), tmp_path / 'weights.safetensors')
    settings = ModelSettings(model=NAME, img_size=32, model_kwargs=SMALL)
    loaded, _ = open_model(settings, str(tmp_path / 'weights.safetensors'), num_classes=4)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize(('settings', 'arguments', 'flags', 'keywords'), [
    (dict(model='coatnet_0', pretrained=True), {}, ('--no-pretrained', '--checkpoint'), ('pretrained=', 'overlay')),
    (dict(model='coatnet_pico_rw_224', pretrained=True), {}, ('--no-pretrained',), ('pretrained=',)),
    (dict(model='test_resnet'), dict(dropconnect=.1), ('--dropconnect',), ('keyword',)),
    (dict(model='test_resnet', model_kwargs=('glue=1',)), {}, ('--model-kwargs glue',), ('keyword',)),
    (dict(model=NAME), dict(try_sizes=(96,)), ('--img-size 96', '--model-kwargs dynamic_img_size=True'), (
        'img_size=(', 'set_input_size')),
    (dict(model=NAME, img_size=37), {}, ('--img-size must be a multiple',), ('img_size must',)),
    (dict(model='test_resnet', mean=(.5, .5)), {}, ('--mean must',), ()),
], ids=lambda value: value.get('model') if isinstance(value, dict) else None)
def test_errors_of_models_speak_of_flags(settings, arguments, flags, keywords):
    with pytest.raises(ConfigError, match='cannot be built: ') as error:
        open_model(ModelSettings(**settings), **arguments)
    message = str(error.value).partition('cannot be built: ')[2]
    assert all(text in message for text in flags) and not any(text in message for text in keywords), message


def test_keywords_become_flags():
    assert to_flags("Use `pretrained=False`, num_classes=7 and flavor='timm'.") == (
        'Use --no-pretrained, --num-classes 7 and --model-kwargs flavor=timm.')
