"""Checks of a release folder: files, tensors, config, card, and logits in a fresh process."""
import hashlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import SafetensorError, safe_open

from coatnet_train.runtime.cli import ConfigError, one_line
from model_card import card_data, name_of
from onnx_files import check_no_pickles, onnx_answers
from release_folder import bare_model, largest_gap, split_name, stored_dtypes
from release_rules import DTYPES, ONNX_FILES, RELEASE_FIELDS, TOLERANCE, check_license, list_files

__all__ = ['check_answers', 'verify']

ROOT = Path(__file__).parents[1]
CONFIG_KEYS = {
    'architecture', 'num_classes', 'num_features', 'global_pool', 'label_names', 'label_descriptions', 'model_args',
    'pretrained_cfg', 'release'}
CFG_KEYS = {
    'tag', 'license', 'paper_ids', 'custom_load', 'input_size', 'fixed_input_size', 'interpolation', 'crop_pct',
    'crop_mode', 'mean', 'std', 'num_classes', 'pool_size', 'first_conv', 'classifier'}


def require(holds: bool, file: str, rule: str) -> None:
    if not holds:
        raise ConfigError(f'{file} {rule}; export anew.')


def read_config(folder: Path) -> dict:
    """Read config.json; raises ConfigError if required fields are missing, or others are present."""
    try:
        config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
        cfg, release = config['pretrained_cfg'], config['release']
        metrics = release['metrics']
        size, label_names = cfg['input_size'], config['label_names']
        for name, value in (('tag', cfg.get('tag')), ('license', cfg.get('license'))):
            require(isinstance(value, str) and bool(value), 'config.json', f'must give the {name} of these weights')
        missing = [field for field in RELEASE_FIELDS if field not in release]
        require(not missing, 'config.json', f'lacks {", ".join(missing)} under release')
        split_name(f'{config["architecture"]}.{cfg["tag"]}', 'config.json: architecture and tag')
        check_license(cfg['license'], release['license_name'], release['license_link'], 'config.json: ')
        strange = sorted({*config} - CONFIG_KEYS | {*cfg} - CFG_KEYS)
        require(not strange, 'config.json', f'must describe these weights alone, but also has {", ".join(strange)}')
        require(cfg['custom_load'] is False, 'config.json', 'must have custom_load false')
        require(release['dtype'] in DTYPES, 'config.json', f'must have a dtype of {", ".join(DTYPES)}')
        finite = [math.isfinite(value) for value in metrics.values() if value is not None]
        require({'top1', 'top5', 'loss'} <= {*metrics} and all(finite), 'config.json',
                'must have top1, top5 and loss under metrics, each a number or null')
        origin = release['origin']
        require(origin is None or bool(origin['file'] and re.fullmatch('[0-9a-f]{32}', origin['md5'])), 'config.json',
                'must give the file and the MD5 of the weights that were converted under origin')
        require(len(size) == 3 and all(type(side) is int and side > 0 for side in size), 'config.json',
                'must have an input_size of three positive integers')
        require(config['model_args'] == {'img_size': size[1:], 'in_chans': size[0]}, 'config.json',
                # other arguments would change the architecture, and num_classes breaks transformers
                'must have the img_size and in_chans of its input_size under model_args, and nothing else')
        require(len(cfg['mean']) == len(cfg['std']) == size[0] and min(cfg['std']) > 0 and 0 < cfg['crop_pct'] <= 1
                and bool(cfg['interpolation'] and cfg['crop_mode']), 'config.json',
                'must have mean, std, crop_pct, crop_mode and interpolation that fit its input_size')
        require(config['num_classes'] == cfg['num_classes'] == len(label_names) == len(set(label_names))
                and all(isinstance(name, str) for name in label_names), 'config.json',
                f'must name each of its {config["num_classes"]} classes once, but has {len(set(label_names))} names')
        words = config.get('label_descriptions', dict.fromkeys(label_names, ''))
        require({*words} == {*label_names} and all(isinstance(text, str) for text in words.values()), 'config.json',
                'must have words for all of its label_names under label_descriptions, or no label_descriptions')
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f'config.json cannot be used: {type(error).__name__} {one_line(error)}; '
                          f'export anew.') from error
    return config


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file; raises ConfigError unless its metadata has format: pt and all tensors are finite."""
    try:
        with safe_open(path, 'pt') as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    except (OSError, SafetensorError) as error:
        raise ConfigError(f'{path.name} cannot be read: {one_line(error)}; export anew.') from error
    require(metadata.get('format') == 'pt', path.name, 'must carry the metadata format: pt, or transformers refuses it')
    broken = [name for name, value in tensors.items() if not value.isfinite().all()]
    require(not broken, path.name, f'must be finite throughout, but {", ".join(broken[:5])} is not')
    return tensors


def check_tensors(found: dict[str, torch.Tensor], config: dict) -> None:
    """Raise ConfigError unless names, shapes and dtypes are those of the registered model as it is stored."""
    model = bare_model(config, device='meta')
    expected, dtypes = model.state_dict(), stored_dtypes(model, config['release']['dtype'])
    wrong = [f'{name} is missing' for name in expected if name not in found]
    wrong += [f'{name} is not of this model' for name in found if name not in expected]
    wrong += [f'{name} is {str(value.dtype)[6:]} {tuple(value.shape)} for {str(dtypes[name])[6:]} '
              f'{tuple(expected[name].shape)}' for name, value in found.items() if name in expected
              and (value.dtype, value.shape) != (dtypes[name], expected[name].shape)]
    require(not wrong, 'model.safetensors', f'must hold the tensors of {config["architecture"]}, but '
            f'{"; ".join(wrong[:5])}{" and so on" * (len(wrong) > 5)}')


def check_golden(golden: dict[str, torch.Tensor], config: dict) -> None:
    """Raise ConfigError for golden tensors of wrong names, dtypes or shapes, or with equal logits for all inputs."""
    require({*golden} == {'input', 'logits'} and all(value.dtype == torch.float32 for value in golden.values()),
            'golden.safetensors', 'must hold the float32 tensors input and logits and nothing else')
    count, shape = len(golden['input']), tuple(golden['input'].shape[1:])
    require(count > 1 and shape == tuple(config['pretrained_cfg']['input_size'])
            and tuple(golden['logits'].shape) == (count, config['num_classes']), 'golden.safetensors',
            'must hold several inputs of the model\'s input_size, and a logit for each of them and each class')
    require(golden['logits'].std(0).max() > 0, 'golden.safetensors', 'must have logits that tell its inputs apart')


def check_card(folder: Path, config: dict) -> None:
    """Raise ConfigError for a card whose YAML metadata disagree with config.json."""
    try:
        metadata = ModelCard.load(folder / 'README.md').data.to_dict()
    except Exception as error:  # yaml and the card's own checks raise many kinds
        raise ConfigError(f'README.md must begin with metadata in YAML, which cannot be read: {one_line(error)}; '
                          f'export anew.') from error
    expected = card_data(config).to_dict()
    wrong = sorted(key for key in {*metadata, *expected} if metadata.get(key) != expected.get(key))
    require(not wrong, 'README.md', f'must agree with config.json in its metadata, but {", ".join(wrong)} do not')


def check_curves(path: Path, converted: bool) -> None:
    """Raise ConfigError unless curves.png is a readable PNG, or missing in the case of converted weights."""
    if not (converted or path.exists()):
        raise ConfigError(f'FOLDER {path.parent} lacks {path.name}; export anew.')
    require(not (converted and path.exists()), path.name, 'must not be there: these weights were converted')
    if converted:
        return
    try:
        with Image.open(path, formats=('PNG',)) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f'curves.png cannot be read: {one_line(error)}; export anew.') from error


def check_answers(folder: Path) -> list[str]:
    """Load a folder as users do, and compare logits with the golden ones; returns 'READER DIFFERENCE' messages.

    Meant to run in a fresh process. Raises ConfigError above TOLERANCE.
    """
    config, golden = read_config(folder), read_tensors(folder / 'golden.safetensors')
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    require(list(model.pretrained_cfg['label_names']) == config['label_names'], 'config.json', 'loses its label_names')
    with torch.no_grad():
        answers = {'timm': model(golden['input'])}
        if importlib.util.find_spec('transformers'):
            from transformers import AutoModelForImageClassification

            wrapped, report = AutoModelForImageClassification.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
            amiss = [f'{kind} {sorted(map(str, names))[:3]}' for kind, names in report.items() if names]
            require(not amiss, 'model.safetensors', f'does not load through transformers: {", ".join(amiss)}')
            answers['transformers'] = wrapped.eval()(golden['input']).logits
    if (folder / 'model.pt2').exists():
        answers |= onnx_answers(folder, golden['input'])
    messages = []
    for reader, logits in answers.items():
        gap = largest_gap(logits, golden['logits'])
        require(gap <= TOLERANCE, 'golden.safetensors',
                f'has logits that {reader} does not give: they differ by {gap:.1e} of the largest, not {TOLERANCE:g}')
        messages.append(f'{reader} {gap:.1e}')
    return messages


def check_in_fresh_process(folder: Path) -> str:
    """Run `check_answers` in a new process, offline and without a token; returns its messages."""
    code = ('import sys; from pathlib import Path; from coatnet_train.runtime.cli import run_cli; from '
            'verification import check_answers; '
            'run_cli("", lambda: print(*check_answers(Path(sys.argv[1])), sep=", "))')
    environment = {name: value for name, value in os.environ.items()
                   if name not in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN')}
    environment |= {'HF_HUB_OFFLINE': '1', 'TRANSFORMERS_VERBOSITY': 'error', 'PYTHONPATH': os.pathsep.join([
        str(ROOT / 'hub'), str(ROOT / 'scripts'), str(ROOT), os.environ.get('PYTHONPATH', '')])}
    done = subprocess.run(
        [sys.executable, '-c', code, str(folder.resolve())], capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f'exit code {done.returncode}']
        if done.returncode == 2:
            raise ConfigError(lines[-1].removeprefix(': '))
        raise ConfigError(f'FOLDER {folder} does not load in a fresh process: {lines[-1]}; export anew.')
    return done.stdout.splitlines()[-1]


def verify(folder: Path) -> dict[str, str]:
    """Run all checks on a release folder and return the sha256 of every file; raises ConfigError if a check fails."""
    files = list_files(folder)
    config = read_config(folder)
    check_tensors(read_tensors(folder / 'model.safetensors'), config)
    check_golden(read_tensors(folder / 'golden.safetensors'), config)
    check_card(folder, config)
    check_curves(folder / 'curves.png', converted=config['release']['origin'] is not None)
    if {*ONNX_FILES} <= {path.name for path in files}:
        check_no_pickles(folder / 'model.pt2')
    print(f'{name_of(config)}: files, tensors, config and card agree')
    print(f'largest difference of logits in a fresh process: {check_in_fresh_process(folder)}')
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
