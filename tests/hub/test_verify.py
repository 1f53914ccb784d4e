"""hub/verify.py: a good folder passes, and every kind of damage has its error message."""
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import export
import verification as verify
from coatnet_train.runtime.cli import ConfigError
from support.commands import environment
from support.constants import ROOT

FILES = ('README.md', 'config.json', 'curves.png', 'golden.safetensors', 'model.safetensors')


def run_command(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / 'hub' / 'verify.py', folder], capture_output=True, text=True,
                          env=environment(HF_TOKEN='hf_secret'))


@pytest.fixture
def no_process(monkeypatch):
    """Fail the test if the folder is loaded: damage must be found before."""
    def start(folder):
        raise AssertionError('went on to load the folder')

    monkeypatch.setattr(verify, 'check_in_fresh_process', start)


def test_good_folder_passes_in_a_fresh_process_and_its_digests_are_those_of_sha256sum(folder):
    done = run_command(folder)
    assert done.returncode == 0, done.stderr
    first, second, *digests = done.stdout.splitlines()
    assert first == 'coatnet_pico_64.colours: files, tensors, config and card agree'
    assert re.match(r'largest difference of logits in a fresh process: timm \d\.\de[+-]\d\d', second)
    expected = subprocess.run(['sha256sum', *FILES], cwd=folder, capture_output=True, text=True, check=True).stdout
    assert digests == expected.splitlines()
    assert 'hf_secret' not in done.stdout + done.stderr
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def test_weights_that_changed_are_found_by_their_logits(folder):
    path = folder / 'model.safetensors'
    state = load_file(path)
    state['stages.2.blocks.3.norm1.bias'] += 0.01
    save_file(state, path, metadata={'format': 'pt'})
    with pytest.raises(ConfigError, match=r'^golden.safetensors has logits that timm does not give: .* anew\.$'):
        verify.check_answers(folder)


@pytest.mark.parametrize(('code', 'said'), [
    (2, r'^golden.safetensors is amiss; export anew\.$'),
    (1, r'does not load in a fresh process: : golden.safetensors is amiss; export anew\.; export anew\.$')])
def test_what_the_fresh_process_says_is_passed_on(folder, tmp_path, monkeypatch, code, said):
    python = tmp_path / 'python'
    python.write_text(f'#!/bin/sh\necho a warning >&2\necho ": golden.safetensors is amiss; export anew." >&2\n'
                      f'test -z "$HF_TOKEN" && exit {code}\n')
    python.chmod(0o755)
    monkeypatch.setattr(verify.sys, 'executable', str(python))
    monkeypatch.setenv('HF_TOKEN', 'hf_secret')
    with pytest.raises(ConfigError, match=said):
        verify.verify(folder)


# Files


def test_missing_file_is_named(folder, no_process):
    for name in FILES:
        (folder / name).rename(folder.parent / name)
        with pytest.raises(ConfigError, match=f'lacks {name}; export anew'):
            verify.verify(folder)
        (folder.parent / name).rename(folder / name)


def link(folder: Path) -> None:
    (folder / 'curves.png').rename(folder.parent / 'curves.png')
    (folder / 'curves.png').symlink_to(folder.parent / 'curves.png')


@pytest.mark.parametrize(('damage', 'said'), [
    (lambda folder: (folder / 'pytorch_model.bin').touch(), "'pytorch_model.bin' is none of"),
    (lambda folder: (folder / '.env').touch(), "'.env' is none of"),
    (lambda folder: (folder / '.eval_results').mkdir(), "'.eval_results' is none of"),
    (lambda folder: (folder / 'model.pt2').touch(), 'lacks model.onnx'),
    (lambda folder: ((folder / 'model.onnx').mkdir(), (folder / 'model.pt2').touch()), 'model.onnx must be a file'),
    (link, 'curves.png must be a file, not a link'),
    (lambda folder: (folder / 'curves.png').write_bytes(b'GIF89a'), 'curves.png cannot be read'),
    (lambda folder: os.truncate(folder / 'curves.png', 999), 'curves.png cannot be read'),
], ids=range(8))
def test_anything_off_the_list_is_refused(folder, no_process, damage, said):
    damage(folder)
    with pytest.raises(ConfigError, match=said):
        verify.verify(folder)


def test_folder_that_is_none_is_refused(folder):
    (folder.parent / 'link').symlink_to(folder)
    for path in (folder / 'none', folder / 'README.md', folder.parent / 'link'):
        with pytest.raises(ConfigError, match=r'FOLDER .* must be a folder that export.py made'):
            verify.verify(path)


@pytest.mark.parametrize(('members', 'said'), [
    ({'m/data/sample_inputs/model.pt': b'PK'}, 'no pickled data, but m/data/sample_inputs/model.pt is'),
    ({'m/data/weights/model_weights_config.json': b'{"config": {"a": {"use_pickle": true}}}'}, 'no pickled.* a is'),
    ({'m/data/constants/model_constants_config.json': b'[]'}, 'cannot be read'), (None, 'cannot be read')])
def test_pickled_program_is_refused(folder, no_process, members, said):
    (folder / 'model.onnx').touch()
    if members is None:
        torch.save({}, folder / 'model.pt2', _use_new_zipfile_serialization=False)
    else:
        with zipfile.ZipFile(folder / 'model.pt2', 'w') as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    with pytest.raises(ConfigError, match=f'model.pt2 .*{said}'):
        verify.verify(folder)


# Tensors


def rename(state: dict) -> None:
    state['head.fc.weights'] = state.pop('head.fc.weight')


def put_nan(state: dict) -> None:
    state['stages.3.blocks.1.mlp.fc1.weight'][0, 0] = float('nan')


@pytest.mark.parametrize(('damage', 'said'), [
    (rename, 'head.fc.weight is missing; head.fc.weights is not of this model'),
    (put_nan, r'must be finite throughout, but stages.3.blocks.1.mlp.fc1.weight is not'),
    (lambda state: state.update({'head.fc.bias': torch.zeros(4)}), r'bias is float32 \(4,\) for float32 \(3,\)'),
    (lambda state: state.update({'head.fc.bias': state['head.fc.bias'].half()}), r'is float16 \(3,\) for float32'),
    (lambda state: state.update({'head.fc.weight': state['head.fc.weight'].bfloat16()}), 'is bfloat16 .* for float32'),
], ids=range(5))
def test_tensors_that_are_not_the_models_are_named(folder, no_process, damage, said):
    path = folder / 'model.safetensors'
    state = load_file(path)
    damage(state)
    save_file(state, path, metadata={'format': 'pt'})
    with pytest.raises(ConfigError, match=f'model.safetensors .*{said}.* export anew'):
        verify.verify(folder)


@pytest.mark.parametrize('name', ['model.safetensors', 'golden.safetensors'])
def test_safetensors_files_are_whole_and_say_that_they_are_torchs(folder, no_process, name):
    path = folder / name
    for metadata in (None, {'format': 'np'}):
        save_file(load_file(path), path, metadata=metadata)
        with pytest.raises(ConfigError, match=f'{name} must carry the metadata format: pt'):
            verify.verify(folder)
    for content in (path.read_bytes()[:-1], path.read_bytes() + b'\0', b'', b'\x80\x04.'):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=f'{name} cannot be read'):
            verify.verify(folder)


@pytest.mark.parametrize(('damage', 'said'), [
    (lambda golden: golden.pop('logits'), 'input and logits and nothing else'),
    (lambda golden: golden.update(more=torch.zeros(1)), 'input and logits and nothing else'),
    (lambda golden: golden.update(input=golden['input'].double()), 'float32 tensors'),
    (lambda golden: golden.update({name: value[:1].clone() for name, value in golden.items()}), 'several inputs'),
    (lambda golden: golden.update({name: value[:0].clone() for name, value in golden.items()}), 'several inputs'),
    (lambda golden: golden.update(input=golden['input'][..., :16].clone()), "the model's input_size"),
    (lambda golden: golden.update(logits=golden['logits'][:, :2].clone()), 'each class'),
    (lambda golden: golden['logits'].zero_(), 'tell its inputs apart'),
    (lambda golden: golden['input'].fill_(float('inf')), 'finite throughout, but input is not'),
], ids=range(9))
def test_golden_tensors_that_prove_nothing_are_refused(folder, no_process, damage, said):
    golden = load_file(folder / 'golden.safetensors')
    damage(golden)
    save_file(golden, folder / 'golden.safetensors', metadata={'format': 'pt'})
    with pytest.raises(ConfigError, match=f'golden.safetensors must .*{said}'):
        verify.verify(folder)


@pytest.mark.parametrize(('share', 'passes'), [(5e-6, True), (2e-5, False)])
def test_logits_may_differ_by_a_hundred_thousandth_of_the_largest(folder, share, passes):
    golden = load_file(folder / 'golden.safetensors')
    logits = golden['logits']
    logits[1, 2] += share * logits.abs().max()
    save_file(golden, folder / 'golden.safetensors', metadata={'format': 'pt'})
    if passes:
        assert verify.check_answers(folder)[0].startswith('timm ')
    else:
        with pytest.raises(ConfigError, match=r'has logits that timm does not give: .* (1.9|2.[01])e-05'):
            verify.check_answers(folder)


def test_transformers_is_left_out_where_it_is_not_installed(folder, monkeypatch):
    monkeypatch.setattr(verify.importlib.util, 'find_spec', lambda name: None)
    assert [answer.split()[0] for answer in verify.check_answers(folder)] == ['timm']


# Config and card


def edit(**changes) -> Callable[[dict], None]:
    """Function that sets keys of pretrained_cfg (by prefix those of 'release' or the top level); ... removes a key."""
    def change(config: dict) -> None:
        for name, value in changes.items():
            part, _, key = name.rpartition('__')
            target = config['release']['metrics'] if part == 'metrics' else config[part] if part else config
            target.pop(key, None)
            if value is not ...:
                target[key] = value

    return change


@pytest.mark.parametrize(('change', 'said'), [
    (edit(pretrained_cfg__tag=...), 'must give the tag'), (edit(pretrained_cfg__license=...), 'must give the license'),
    (edit(pretrained_cfg__license=''), 'must give the license'), (edit(pretrained_cfg__tag=None), 'must give the tag'),
    (edit(pretrained_cfg__license='Apache License'), 'identifier of the Hub'),
    (edit(pretrained_cfg__license='other'), '--license-name'), (edit(release__license_name='x'), '--license other'),
    (edit(pretrained_cfg__tag='untrained'), 'architecture and tag must'), (edit(architecture='resnet18'), 'of the zoo'),
    (edit(pretrained_cfg__origin_url='https://example.com'), 'these weights alone, but also has origin_url'),
    (edit(pretrained_cfg__test_input_size=[3, 64, 64]), 'also has test_input_size'), (edit(extra=1), 'also has extra'),
    (edit(pretrained_cfg__hf_hub_id='timm/other'), 'also has hf_hub_id'),
    (edit(pretrained_cfg__custom_load=True), 'custom_load false'),
    (edit(model_args={'img_size': [32, 32], 'in_chans': 3, 'num_classes': 3}), 'model_args, and nothing else'),
    (edit(model_args={'img_size': [64, 64], 'in_chans': 3}), 'img_size and in_chans of its input_size'),
    (edit(model_args=...), "KeyError 'model_args'"), (edit(release=...), "KeyError 'release'"),
    (edit(release__seed=...), 'lacks seed under release'), (edit(release__dtype='int8'), 'dtype of float32, float16'),
    (edit(metrics__top1=...), 'top1, top5 and loss under metrics'), (edit(metrics__loss=float('inf')), 'or null'),
    (edit(pretrained_cfg__mean=[0.5]), 'mean, std'), (edit(pretrained_cfg__std=[0.3, 0, 0.3]), 'mean, std'),
    (edit(pretrained_cfg__crop_pct=1.2), 'crop_pct'), (edit(pretrained_cfg__crop_mode=''), 'crop_mode'),
    (edit(pretrained_cfg__input_size=[3, 32]), 'three positive integers'),
    (edit(label_names=['a', 'b']), 'each of its 3 classes once, but has 2'),
    (edit(label_names=['a', 'b', 'a']), 'each of its 3 classes once'), (edit(label_names=...), 'KeyError'),
    (edit(label_descriptions={'red': 'a colour'}), 'words for all of its label_names'),
    (edit(pretrained_cfg__num_classes=4), 'each of its 3 classes'), (edit(pretrained_cfg=[]), 'cannot be used'),
])
def test_config_that_says_too_little_or_too_much_is_refused(folder, no_process, change, said):
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f'config.json.*{said}'):
        verify.verify(folder)


def test_config_that_is_no_json_is_refused(folder, no_process):
    for content in (b'{"architecture"', b'[]', b'', b'\xff\xfe'):
        (folder / 'config.json').write_bytes(content)
        with pytest.raises(ConfigError, match=r'config.json cannot be used'):
            verify.verify(folder)


@pytest.mark.parametrize(('old', 'new', 'said'), [
    ('license: apache-2.0', 'license: mit', 'but license do not'), ('license: apache-2.0\n', '', 'license do not'),
    ('library_name: timm', 'library_name: keras', 'library_name do not'), ('- coatnet_zoo\n', '', 'tags do not'),
    ('name: coatnet_pico_64.colours', 'name: coatnet_pico_64.tin200', 'model-index do not'),
    ('value: 100', 'value: 99', 'model-index do not'), ('---\nlibrary', 'library', 'do not'),
    ('---\nlibrary_name', '---\nlibrary_name: [', 'cannot be read'),
    ('pipeline_tag', 'datasets: [me/x]\npipeline_tag', 'datasets do not'),
])
def test_card_that_disagrees_with_the_config_is_refused(folder, no_process, old, new, said):
    text = (folder / 'README.md').read_text()
    assert old in text
    (folder / 'README.md').write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=f'README.md must .*{said}'):
        verify.verify(folder)


def test_16_bit_folder_passes(trained, tmp_path):
    folder = export.main(export.ExportSettings(
        run_dir=trained, name='coatnet_pico_64.half', output=tmp_path / 'half', dtype='float16'))
    verify.check_tensors(verify.read_tensors(folder / 'model.safetensors'), verify.read_config(folder))
    assert verify.check_answers(folder)[0].startswith('timm ')
    shutil.copy(trained / 'model.safetensors', folder / 'model.safetensors')
    with pytest.raises(ConfigError, match=r'head.fc.weight is float32 .* for float16'):
        verify.check_tensors(verify.read_tensors(folder / 'model.safetensors'), verify.read_config(folder))
