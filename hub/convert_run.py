"""Conversion of third-party weights into a run folder: checks, config.json, model.safetensors and origin.json."""
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import timm
import torch
from timm.data import ImageNetInfo
from torch import nn

import coatnet_zoo
from coatnet_train.models.config import ModelSettings
from coatnet_train.models.open_model import open_model
from coatnet_train.models.weights_file import read_weights
from coatnet_train.runtime.cli import ConfigError, did_you_mean, one_line
from coatnet_train.runtime.files import replace_dir, write_json
from coatnet_train.runtime.provenance import provenance
from coatnet_train.training.run_dir import write_config, write_weights
from coatnet_zoo import kecam
from coatnet_zoo.download import digest_of
from convert_settings import ConvertSettings
from export_run import without_folders
from origin import ORIGIN

RUN_FILES = {'config.json', 'model.safetensors', ORIGIN}
EGYPTIAN_CAT, TIGER_CAT = (285, 0.99324566), (282, 0.00381939)  # class and probability, from kecam's README
CHELSEA_TOLERANCE = 1e-3


def check_replaceable(output: Path) -> None:
    """Raise ConfigError unless the output is missing, empty or an earlier conversion."""
    names = {path.name for path in output.iterdir()} if output.is_dir() else {'a file'} if output.exists() else set()
    if names and not (ORIGIN in names and names <= {*RUN_FILES, 'evaluation.json'}):
        raise ConfigError(f'--output {output} must not exist, be empty, or be an earlier conversion, which it is not; '
                          f'name another folder.')


def image_size(state: dict[str, torch.Tensor], architecture: str) -> int | None:
    """Image size in pixels of the weights, from the size of their first bias table; None if they have none.

    The table for n x n positions has shape (heads, 2n - 1, 2n - 1) here and ((2n - 1)^2, heads) in timm.
    """
    for name, table in state.items():
        if found := re.search(r'stages\.(\d)\..*(rel_bias\.table|relative_position_bias_table)$', name):
            side = table.shape[-1] if table.ndim == 3 else math.isqrt(len(table))
            stages = timm.create_model(architecture, device='meta').feature_info[1:]
            return (side + 1) // 2 * stages[int(found[1])]['reduction']
    return None


def open_source(settings: ConvertSettings, architecture: str) -> tuple[nn.Module, dict]:
    """Open the model with the weights of SOURCE, strictly loaded; returns it with its data settings.

    Raises ConfigError for a file without stem or classifier, or weights that do not fit.
    """
    model_settings = ModelSettings(
        model=architecture, model_kwargs=settings.model_kwargs, mean=settings.mean, std=settings.std,
        interpolation=settings.interpolation, crop_pct=settings.crop_pct)
    if not settings.is_file:
        return open_model(replace(model_settings, model=settings.source, pretrained=True))
    state = read_weights(settings.source, 'SOURCE')
    shapes = {part: next((value.shape for name, value in state.items() if name.endswith(part)), None)
              for part in ('head.fc.weight', 'stem.conv1.weight')}
    if None in shapes.values():
        raise ConfigError(f'SOURCE {settings.source} must hold a CoAtNet with its classifier, but has no '
                          f'{" and no ".join(name for name, shape in shapes.items() if shape is None)}; give another.')
    size = image_size(state, architecture)
    if 'flavor=timm' in settings.model_kwargs:
        print(f'flavor=timm: {architecture} is the name of another model, so export.py will not release this one')
    return open_model(
        replace(model_settings, img_size=size, in_chans=shapes['stem.conv1.weight'][1]), settings.source, 'SOURCE',
        num_classes=shapes['head.fc.weight'][0])


def read_class_names(settings: ConvertSettings, num_classes: int) -> list[str]:
    """Class names from --class-names, else those of ImageNet-1k; raises ConfigError unless each class has its own."""
    if settings.class_names is None:
        names, source = list(ImageNetInfo('imagenet-1k').label_names()), 'those of ImageNet-1k'
    else:
        try:
            text = settings.class_names.read_text(encoding='utf-8')
        except (OSError, ValueError) as error:
            raise ConfigError(f'--class-names {settings.class_names} cannot be read: {one_line(error)}; give a text '
                              f'file in UTF-8.') from error
        names, source = [line.strip() for line in text.splitlines() if line.strip()], str(settings.class_names)
    if len(names) != num_classes or len(set(names)) != num_classes:
        raise ConfigError(f'--class-names must give each of the {num_classes} classes of SOURCE a name of its own, but '
                          f'{source} are {len(names)}, {len(set(names))} of them different; give a file with a class '
                          f'a line.')
    return names


@torch.no_grad()
def see_chelsea(model: nn.Module, data_config: dict) -> tuple[float, float]:
    """Probabilities of Egyptian cat and tiger cat for scikit-image's photograph of a cat.

    As in kecam's README: the whole image, resized bilinearly without antialiasing to 224 x 224 pixels.

    Raises ConfigError for a model of another input size or number of classes.
    """
    if tuple(data_config['input_size']) != (3, 224, 224) or model.num_classes != 1000:
        raise ConfigError(f'--check-chelsea is for weights of 1000 classes and images of (3, 224, 224), but SOURCE has '
                          f'{model.num_classes} and {tuple(data_config["input_size"])}; leave it out.')
    from skimage.data import chelsea  # from the extra [demo]

    image = torch.from_numpy(chelsea()).movedim(-1, 0)[None] / 255
    image = nn.functional.interpolate(image, (224, 224), mode='bilinear', antialias=False)
    mean, std = (torch.tensor(data_config[name]).view(1, 3, 1, 1) for name in ('mean', 'std'))
    shares = model((image - mean) / std)[0].softmax(0)
    return tuple(shares[index].item() for index, _ in (EGYPTIAN_CAT, TIGER_CAT))


def check_chelsea(shares: tuple[float, float], source: str) -> None:
    """Raise ConfigError unless the probabilities are those of kecam's README, to CHELSEA_TOLERANCE."""
    expected = EGYPTIAN_CAT[1], TIGER_CAT[1]
    if not all(abs(found - share) <= CHELSEA_TOLERANCE for found, share in zip(shares, expected, strict=True)):
        raise ConfigError(
            f'--check-chelsea: SOURCE {source} sees an Egyptian cat with {shares[0]:.8f} and a tiger cat with '
            f'{shares[1]:.8f}, its author {expected[0]} and {expected[1]} ({CHELSEA_TOLERANCE:g} allowed): these are '
            f'other weights, or they were converted wrongly; nothing was written.')


def describe_origin(settings: ConvertSettings, shares: tuple[float, float] | None) -> dict:
    """Content of origin.json; unknown fields are None."""
    if settings.is_file:
        md5 = digest_of(Path(settings.source), 'md5')
        published = next((weights for weights in kecam.WEIGHTS.values() if weights.md5 == md5), None)
        file = Path(settings.source).name
    else:  # its MD5 was checked when it was downloaded
        published = kecam.WEIGHTS[settings.source]
        md5, file = published.md5, Path(published.url).name
    if settings.of_kecam and published is None:
        print(f'MD5 {md5} is of no file that keras_cv_attention_models published: the accuracy of these weights is '
              f'not known')
    license = {name: getattr(settings, name) for name in kecam.LICENSE}
    if settings.of_kecam and settings.license is None:
        license = kecam.LICENSE
    process = provenance('cpu')
    return {
        'file': file, 'md5': md5, 'url': settings.origin or (published and published.url),
        'top1': published and published.top1, 'chelsea': shares and list(shares),
        'trained_on': settings.trained_on or (published and 'ImageNet-1k'),
        'data_license': published and 'ImageNet terms: non-commercial research', **license,
        'command': without_folders(process['command']),
        **{name: process[name] for name in ('date', 'torch', 'timm', 'commit')}}


def run(settings: ConvertSettings) -> Path:
    """Convert the weights and return the run folder."""
    if not settings.is_file and settings.source not in kecam.WEIGHTS:
        raise ConfigError(f'SOURCE {settings.source} is none of {", ".join(kecam.WEIGHTS)}; give one, or a file.')
    architecture = settings.model or 'coatnet_0_kecam'
    if architecture not in (mine := coatnet_zoo.list_models()):
        raise ConfigError(f'--model {architecture} must be a name of the zoo without a tag'
                          f'{did_you_mean(architecture, mine) or "."}')
    if not settings.is_file and architecture != 'coatnet_0_kecam':
        raise ConfigError(f'--model must be coatnet_0_kecam for SOURCE {settings.source}, got {architecture}; leave it '
                          f'out.')
    output = settings.output or Path('output') / architecture
    check_replaceable(output)
    model, data_config = open_source(settings, architecture)
    state = model.state_dict()
    if broken := [name for name, value in state.items() if not value.isfinite().all()]:
        raise ConfigError(f'SOURCE {settings.source} must be finite throughout, but {", ".join(broken[:5])} is not; '
                          f'give another.')
    names = read_class_names(settings, model.num_classes)
    print(f'{settings.source}: {len(state)} tensors, {architecture}, {model.num_classes} classes, input '
          f'{" x ".join(map(str, data_config["input_size"]))}')
    shares = None
    if settings.check_chelsea:
        shares = see_chelsea(model, data_config)
        check_chelsea(shares, settings.source)
        print(f'chelsea: Egyptian cat {shares[0]:.8f}, tiger cat {shares[1]:.8f}, as its author reports')
    write_run(output, model, names, data_config, describe_origin(settings, shares))
    print(f'{output}: release it with python hub/export.py {output} --name {architecture}.TAG, or fine-tune with '
          f'--model local-dir:{output} --pretrained')
    return output


def write_run(output: Path, model: nn.Module, names: list[str], data_config: dict, origin: dict) -> None:
    """Write the run folder under a temporary name and rename it to `output`, replacing an earlier conversion."""
    state = model.state_dict()  # taken before timm writes the config, which changes the model
    temporary = output.with_name(f'.{output.name}.tmp')
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write_config(temporary / 'config.json', model, names, data_config)
        write_weights(temporary / 'model.safetensors', state)
        write_json(temporary / ORIGIN, origin)
        replace_dir(temporary, output)
    except OSError as error:
        raise ConfigError(f'--output {output} cannot be written: {one_line(error)}; choose another.') from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
