"""The entrypoints: keywords, tags and sources that are refused before anything is built."""
import pytest
import timm


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
