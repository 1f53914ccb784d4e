"""State dicts that load, their conversion, and the error messages for those that do not."""
import pytest
import timm
import torch
from safetensors.torch import save_file

from coatnet_zoo.models.state_dict import checkpoint_filter_fn
from support.closeness import assert_same_up_to_rounding

IMAGES = torch.randn(2, 3, 64, 64)


def create(name: str = 'coatnet_pico_64', **kwargs) -> torch.nn.Module:
    return timm.create_model(name, num_classes=kwargs.pop('num_classes', 1000), **kwargs).eval()


def load(name: str, file, **kwargs) -> torch.nn.Module:
    overlay = dict(file=str(file), num_classes=1000)  # also where released weights have another number
    return create(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


@pytest.fixture
def saved(tmp_path, randomize):
    model = randomize(create())
    torch.save(model.state_dict(), tmp_path / 'own.pth')
    save_file(model.state_dict(), tmp_path / 'own.safetensors')
    return model, tmp_path


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_own_weights_load_from_file(saved, suffix):
    model, folder = saved
    assert_same_up_to_rounding(load('coatnet_pico_64', folder / f'own.{suffix}')(IMAGES), model(IMAGES))


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
@pytest.mark.parametrize('wrapped', [False, True])
def test_timm_weights_load_from_file(tmp_path, suffix, wrapped, randomize):
    theirs = randomize(timm.create_model('coatnet_0_224').eval())
    file = tmp_path / f'timm.{suffix}'
    if suffix == 'pth':
        torch.save({'state_dict': theirs.state_dict()} if wrapped else theirs.state_dict(), file)
    else:
        save_file(theirs.state_dict(), file)
    images = torch.randn(1, 3, 224, 224)
    ours = load('coatnet_0', file, flavor='timm')
    torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-4)


def test_timm_weights_without_stem_bias_want_the_timm_flavor(tmp_path):
    default = timm.create_model('coatnet_0_224').state_dict()
    with pytest.raises(RuntimeError, match="flavor='timm'"):
        create('coatnet_0', pretrained=True, pretrained_cfg_overlay=dict(state_dict=default))
    biased = timm.create_model('coatnet_0_224', stem_bias=True).state_dict()
    with pytest.raises(RuntimeError, match="add stem_bias=True to flavor='timm'"):
        create('coatnet_0', flavor='timm', pretrained=True, pretrained_cfg_overlay=dict(state_dict=biased))


def test_timm_weights_load_at_another_size(randomize):
    theirs = randomize(timm.create_model('coatnet_0_224', img_size=(64, 96)).eval()).state_dict()
    same = create('coatnet_0', flavor='timm', img_size=(64, 96), pretrained=True,
                  pretrained_cfg_overlay=dict(state_dict=dict(theirs)))
    tables = [k for k in same.state_dict() if k.endswith('table')]
    timms = theirs['stages.2.blocks.1.attn.rel_pos.relative_position_bias_table']
    assert torch.equal(same.state_dict()['stages.2.blocks.1.attn.rel_bias.table'].flatten(1).T, timms) and tables
    with pytest.raises(RuntimeError, match='is not square'):
        create('coatnet_0', flavor='timm', pretrained=True, pretrained_cfg_overlay=dict(state_dict=dict(theirs)))


@pytest.mark.parametrize('size', [96, (64, 128)], ids=str)
def test_weights_of_one_size_load_at_another(saved, size):
    model, folder = saved
    model.set_input_size(size)
    other = load('coatnet_pico_64', folder / 'own.safetensors', img_size=size)
    images = torch.randn(1, 3, *((size, size) if isinstance(size, int) else size))
    torch.testing.assert_close(other(images), model(images))


def test_classifier_and_channels_adapt(saved):
    model, folder = saved
    other = load('coatnet_pico_64', folder / 'own.safetensors', num_classes=7, in_chans=1)
    assert other(IMAGES[:, :1]).shape == (2, 7)
    torch.testing.assert_close(other.state_dict()['stem.conv1.weight'], model.stem.conv1.weight.sum(1, keepdim=True))
    assert torch.equal(other.stages[3].blocks[1].attn.qkv.weight, model.stages[3].blocks[1].attn.qkv.weight)
    pyramid = timm.create_model(
        'coatnet_pico_64', pretrained=True, features_only=True,
        pretrained_cfg_overlay=dict(file=str(folder / 'own.safetensors'), num_classes=1000)).eval()
    torch.testing.assert_close(pyramid(IMAGES)[-1], model.forward_features(IMAGES))


def test_other_class_count_says_how_to_load(tmp_path):
    save_file(create(num_classes=10).state_dict(), tmp_path / 'ten.safetensors')
    with pytest.raises(RuntimeError, match=r'classifier of 10 classes, the model one of 1000.*num_classes=10'):
        load('coatnet_pico_64', tmp_path / 'ten.safetensors')
    overlay = dict(file=str(tmp_path / 'ten.safetensors'), num_classes=10)
    assert create(pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay).num_classes == 3


def test_classifier_that_fits_is_kept(tmp_path, randomize):
    """Ten classes into ten: timm alone would drop the classifier, because the pretrained cfg has 1000 classes."""
    model = randomize(create(num_classes=10))
    save_file(model.state_dict(), tmp_path / 'ten.safetensors')
    loaded = load('coatnet_pico_64', tmp_path / 'ten.safetensors', num_classes=10)
    assert_same_up_to_rounding(loaded(IMAGES), model(IMAGES))


def test_values_that_are_no_tensors_are_named(saved):
    model, _ = saved
    with pytest.raises(RuntimeError, match='values that are no tensors: epoch'):
        checkpoint_filter_fn({**model.state_dict(), 'epoch': 3}, model)


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
@pytest.mark.parametrize('keep', [0, 5, 1000, .5, .999])
def test_truncated_checkpoints_say_so(saved, suffix, keep):
    _, folder = saved
    whole = (folder / f'own.{suffix}').read_bytes()
    file = folder / f'cut.{suffix}'
    file.write_bytes(whole[:keep if isinstance(keep, int) else int(len(whole) * keep)])
    with pytest.raises(RuntimeError, match=rf'cut\.{suffix} could not be read as weights of coatnet_pico_64'):
        load('coatnet_pico_64', file)


@pytest.mark.parametrize('num_classes', [1000, 3])
def test_foreign_checkpoints_list_what_is_missing_and_unexpected(tmp_path, num_classes):
    save_file(timm.create_model('test_resnet').state_dict(), tmp_path / 'foreign.safetensors')
    with pytest.raises(RuntimeError, match=r'Missing \(\d+\): stem.conv1.weight.*Unexpected \(\d+\): .*bn1\.'):
        load('coatnet_pico_64', tmp_path / 'foreign.safetensors', num_classes=num_classes)


@pytest.mark.parametrize(('theirs', 'named'), [
    ('coatnet_pico_rw_224', 'coatnet_0_rw_224.sw_in1k'), ('coatnet_nano_rw_224', 'coatnet_0_rw_224.sw_in1k'),
    ('coatnet_nano_cc_224', 'coatnet_0_rw_224.sw_in1k'), ('coatnet_bn_0_rw_224', 'coatnet_bn_0_rw_224.sw_in1k'),
    ('coatnet_rmlp_nano_rw_224', 'coatnet_rmlp_1_rw_224.sw_in1k'),
    ('coatnet_rmlp_1_rw2_224', 'coatnet_rmlp_1_rw_224.sw_in1k'),
    ('coatnext_nano_rw_224', 'coatnext_nano_rw_224.sw_in1k'), ('maxvit_tiny_tf_224', 'maxvit_tiny_tf_224.in1k')])
@pytest.mark.parametrize('ours', ['coatnet_pico', 'coatnet_0', 'lightconvnet_pico_64'])
def test_other_architectures_of_timm_are_known_and_named(theirs, named, ours):
    state = timm.create_model(theirs, device='meta').state_dict()
    assert timm.models.is_model_pretrained(named)
    with pytest.raises(ValueError, match=rf"architecture than {ours}.*create_model\('{named}', pretrained=True"):
        create(ours, device='meta', pretrained=True, pretrained_cfg_overlay=dict(state_dict=state, num_classes=1000))


def test_the_likely_reason_is_said_first(saved):
    model, _ = saved
    with pytest.raises(RuntimeError, match=r'does not fit the model: it is of another architecture \(75 of 156 names'):
        checkpoint_filter_fn(model.state_dict(), create('lightconvnet_pico_64'))
    with pytest.raises(RuntimeError, match=r'the model: it has another width \(stages\.0\S+ is \(.*\) and must be \('):
        checkpoint_filter_fn(model.state_dict(), create(embed_dim=(48, 64, 128, 256)))


def test_incomplete_and_misshapen_state_dicts_are_refused(saved):
    model, _ = saved
    state = model.state_dict()
    del state['stages.1.blocks.0.expand.weight']
    state['extra'] = torch.zeros(1)
    state['stages.0.blocks.0.project.weight'] = torch.zeros(2, 2)
    with pytest.raises(RuntimeError) as error:
        checkpoint_filter_fn(state, model)
    for part in ('Missing (1): stages.1.blocks.0.expand.weight.', 'Unexpected (1): extra.',
                 'Wrong shape (1): stages.0.blocks.0.project.weight (2, 2) for (32, 128, 1, 1).'):
        assert part in str(error.value)


def test_filter_leaves_the_given_dict_alone(saved):
    model, _ = saved
    state = model.state_dict()
    keys, table = list(state), state['stages.2.blocks.0.attn.rel_bias.table'].clone()
    larger = create(img_size=96)
    checkpoint_filter_fn(state, larger)
    assert list(state) == keys and torch.equal(state['stages.2.blocks.0.attn.rel_bias.table'], table)


def test_local_dir_round_trip_keeps_ablation_and_size(tmp_path, randomize):
    model = randomize(create(layout='CTTT', rel_bias='post', img_size=(32, 48), num_classes=4, flavor='timm'))
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    images = torch.randn(1, 3, 32, 48)
    assert_same_up_to_rounding(loaded(images), model(images))


def test_features_need_no_classes_of_the_model(tmp_path):
    name, overlay = 'lightconvnet_pico_64.untrained', dict(file=str(tmp_path / 'three.safetensors'))
    save_file(timm.create_model(name, num_classes=3).state_dict(), overlay['file'])
    with pytest.raises(RuntimeError, match='a classifier of 3 classes'):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    features = timm.create_model(name, pretrained=True, features_only=True, pretrained_cfg_overlay=overlay)
    whole = timm.create_model(name, pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay)
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(features.eval()(image)[-1], whole.eval().forward_intermediates(image)[1][-1])
