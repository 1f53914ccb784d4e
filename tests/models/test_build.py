"""Model entrypoints: keywords, tags and weight sources that are rejected before anything is built."""
import pytest
import timm
import torch

import coatnet_zoo


def test_unknown_keyword_never_passes_silently():
    with pytest.raises(TypeError, match="coatnet_0 has no keyword 'drop_path'; did you mean 'drop_path_rate'"):
        timm.create_model('coatnet_0', drop_path=.1)
    with pytest.raises(TypeError, match=r"no keyword 'zzz'\. Known: img_size, .*layout.*"):
        timm.create_model('coatnet_0', zzz=1)


def test_output_stride_is_refused():
    with pytest.raises(ValueError, match=r'output_stride is not supported, got 16: .*\[2, 4, 8, 16, 32\]'):
        timm.create_model('coatnet_0', features_only=True, output_stride=16)


def test_unknown_tag_lists_known_ones():
    with pytest.raises(ValueError, match="coatnet_0 has no pretrained tag 'in1k'; known tags: untrained"):
        timm.create_model('coatnet_0.in1k', pretrained=True)


def test_pretrained_without_weights_says_which_names_have_some():
    with pytest.raises(RuntimeError, match=r'coatnet_0 has no released weights\. Names of this zoo that have some: '):
        timm.create_model('coatnet_0', pretrained=True)
    with pytest.raises(RuntimeError, match=r'coatnet_pico_64\.untrained has no released weights'):
        timm.create_model('coatnet_pico_64.untrained', pretrained=True)


def test_missing_checkpoint_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no checkpoint file .*gone\.safetensors'):
        timm.create_model(
            'coatnet_0', pretrained=True, pretrained_cfg_overlay=dict(file=f'{tmp_path}/gone.safetensors'))


def test_readme_keywords_build():
    model = timm.create_model('coatnet_0', num_classes=10, img_size=384, drop_path_rate=0.2, device='meta')
    assert model.num_classes == 10 and model.img_size == (384, 384)
    assert timm.get_pretrained_cfg('coatnet_0').input_size == (3, 224, 224)


def test_renamed_keywords_say_what_to_write(tmp_path):
    """The config.json of an older run has keywords by their former names."""
    with pytest.raises(TypeError, match=r"coatnet_0 has no keyword 'softmax' any more: write .attn_softmax_dtype."):
        timm.create_model('coatnet_0', softmax='input')
    model = timm.create_model('coatnet_pico_64', num_classes=3, drop_path_schedule='inclusive')
    timm.models.save_for_hf(model, tmp_path, model_args=dict(drop_path_ramp='closed', img_size=64))
    with pytest.raises(TypeError, match=r"write 'drop_path_schedule', with 'exclusive' for 'open' and 'inclusive' for "
                                        r"'closed'; in a saved model, that is model_args in its config.json"):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    config = (tmp_path / 'config.json').read_text()
    (tmp_path / 'config.json').write_text(
        config.replace('"drop_path_ramp": "closed"', '"drop_path_schedule": "inclusive"'))
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert loaded.cfg.drop_path_schedule == 'inclusive' and loaded.pretrained_cfg['source'] == 'local-dir'
    assert 'state_dict' not in loaded.pretrained_cfg
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


def test_only_what_fails_in_reading_is_blamed_on_the_file(tmp_path):
    file = tmp_path / 'damaged.safetensors'
    file.write_bytes(b'no checkpoint')
    overlay = dict(file=str(file))
    with pytest.raises(RuntimeError, match=r'damaged.safetensors could not be read as weights of coatnet_pico_64: '):
        timm.create_model('coatnet_pico_64', pretrained=True, pretrained_cfg_overlay=overlay)
    with pytest.raises(ValueError, match='head_dim must divide the width'):
        timm.create_model('coatnet_pico_64', head_dim=7, pretrained=True, pretrained_cfg_overlay=overlay)


def test_list_models_are_the_names_of_this_package():
    names = coatnet_zoo.list_models()
    assert {'coatnet_0', 'lightconvnet_tiny', 'dynamicconvnet_pico_64'} <= set(names)
    assert 'coatnet_0_224' not in names and all(timm.is_model(name) for name in names)  # timm's own is not among them
    assert coatnet_zoo.list_models(pretrained=True) == [
        name for name in timm.list_models(pretrained=True) if name.partition('.')[0] in names] != []
