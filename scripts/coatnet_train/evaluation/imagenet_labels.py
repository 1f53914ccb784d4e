"""Map from the classes of the data to logits, and the labels of ImageNet and its relatives."""
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from timm.data import ImageNetInfo, RealLabelsImagenet, infer_imagenet_subset
from torch import nn

from coatnet_train.runtime.cli import ConfigError

if TYPE_CHECKING:
    from coatnet_train.evaluation.evaluator import Predictions

__all__ = [
    'ALEXNET_ERROR', 'LabelMap', 'corruption_folders', 'describe_synsets', 'map_labels', 'mean_corruption_error',
    'to_real_labels']

# Top-1 error of AlexNet over the five severities: Hendrycks and Dietterich, https://arxiv.org/abs/1903.12261, with the
# digits of their published evaluation (https://github.com/hendrycks/robustness).
ALEXNET_ERROR = {
    'gaussian_noise': 0.886428, 'shot_noise': 0.894468, 'impulse_noise': 0.922640, 'defocus_blur': 0.819880,
    'glass_blur': 0.826268, 'motion_blur': 0.785948, 'zoom_blur': 0.798360, 'snow': 0.866816, 'frost': 0.826572,
    'fog': 0.819324, 'brightness': 0.564592, 'contrast': 0.853204, 'elastic_transform': 0.646056,
    'pixelate': 0.717840, 'jpeg_compression': 0.606500}
SEVERITIES = ('1', '2', '3', '4', '5')
INDICES_OF_TIMM = ('imagenet_a', 'imagenet_r', 'mini_imagenet')


@dataclass(frozen=True)
class LabelMap:
    """Map between the labels of a dataset and the logits of a model.

    order: The logits that compete: those of labels 0, 1, ... first, then those without a label.
    names: Name of every logit.
    descriptions: ImageNet's descriptions, or ''.
    valid_labels: Name of the set of logits that compete.
    notes: Assumptions to print.
    """

    order: list[int]
    names: list[str]
    descriptions: list[str]
    valid_labels: str
    notes: list[str]

    @property
    def classes(self) -> torch.Tensor | None:
        """The argument `classes` of `predict`; None if every label is its logit index."""
        return None if self.order == list(range(len(self.names))) else torch.tensor(self.order)

    def to_logits(self, predictions: 'Predictions') -> 'Predictions':
        """Convert labels and predictions to logit indices; a label of -1 stays."""
        order = torch.tensor(self.order)
        labels = torch.where(predictions.labels < 0, -1, order[predictions.labels])
        return dataclasses.replace(predictions, labels=labels, top5=order[predictions.top5])


def describe_synsets(names: Iterable[str]) -> dict[str, str]:
    """Descriptions of the names that are ImageNet synsets, such as n01440764: 'tench, Tinca tinca'."""
    imagenet, descriptions = ImageNetInfo('imagenet-22k'), {}
    for name in names:
        try:
            descriptions[name] = imagenet.label_name_to_description(name)
        except KeyError:  # not a synset
            continue
    return descriptions


def map_labels(class_names: list[str], model: nn.Module, valid_labels: str = 'auto', *, ordered_by: str = '',
               flat: bool = False) -> LabelMap:
    """Find the logit of each class by name: the model's own label_names, ImageNet synsets, or numbers (ImageNet-V2).

    Args:
        class_names: Class names of the data in label order.
        model: Model whose `num_classes` and `pretrained_cfg['label_names']` are read.
        valid_labels: Logits that compete: 'all', 'folder', a file of indices or one of INDICES_OF_TIMM; 'auto' takes
            the 200 of ImageNet-A or -R if the data have exactly these classes, else all.
        ordered_by: 'data set' or 'class map' if the order of the classes came from there. Where names do not match and
            the counts do, labels are then taken as logit indices: a class map always, a data set if the model has no
            label names, others if it has neither these nor the classes of an ImageNet.
        flat: Whether the images have no classes.

    Raises ConfigError with the expected names where classes and logits do not match.
    """
    count = model.num_classes
    subset = infer_imagenet_subset(model)
    own = model.pretrained_cfg.get('label_names') or []
    own = list(own.values()) if isinstance(own, dict) else list(own)
    own = own if len(own) == count else []
    names = own or (ImageNetInfo(subset).label_names() if subset else [])
    place = {name: index for index, name in enumerate(names)}
    notes = []
    if flat:
        logits = []
    elif place and all(name in place for name in class_names):
        logits = [place[name] for name in class_names]
        if len(logits) < count:
            notes.append(f'{len(logits)} of the model\'s {count} classes are in the data, mapped to its logits by '
                         f'{"its label names" if own else "ImageNet synset"}')
    elif subset and all(name.isdecimal() and int(name) < count for name in class_names):
        logits = [int(name) for name in class_names]
        notes.append(f'{len(logits)} classes named by numbers, taken as indices of the logits (as in ImageNet-V2)')
    elif len(class_names) == count and (
            ordered_by == 'class map' or (not own and (ordered_by == 'data set' or not subset))):
        logits, names = list(range(count)), class_names
        notes.append(f'its {count} logits are taken in the order of the data\'s classes, {_some(class_names)}')
    else:
        strange = [name for name in class_names if name not in place]
        expected = (f'the model\'s {count} label names ({_some(own)})' if own else
                    f'ImageNet synsets ({_some(names)}) or numbers below {count}' if subset else
                    f'{count} classes, for the model has {count} logits without names')
        raise ConfigError(
            f'--data-dir has {len(class_names)} classes ({_some(class_names)}) that do not fit the model: expected '
            f'{expected}, but {_some(strange) if names else f"found {len(class_names)}"}'
            f'{" are none of these" if names else ""}; choose the model of these classes, rename the folders, or give '
            f'--num-classes or --class-map.')
    names = names or [str(index) for index in range(count)]
    competing, valid_labels = _competing(valid_labels, logits, count, subset)
    if len(competing) < count:
        notes.append(f'only {len(competing)} of {count} logits compete (--valid-labels {valid_labels})')
    elif len(logits) < count and not flat:
        notes.append(f'all {count} logits compete (--valid-labels folder leaves it to those of the data)')
    known = describe_synsets(names)
    taken = set(logits)
    return LabelMap(logits + [index for index in competing if index not in taken], names,
                    [known.get(name, '') for name in names], valid_labels, notes)


def _some(names: list[str]) -> str:
    return ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')


def _indices_of_timm(name: str) -> list[int]:
    text = (files('timm.data') / '_info' / f'{name}_indices.txt').read_text(encoding='utf-8')
    return [int(line) for line in text.split()]


def _competing(valid_labels: str, logits: list[int], count: int, subset: str | None) -> tuple[list[int], str]:
    name = valid_labels.removesuffix('.txt').removesuffix('_indices')
    if valid_labels == 'auto':
        if subset == 'imagenet-1k':
            for name in ('imagenet_a', 'imagenet_r'):
                if sorted(logits) == (indices := _indices_of_timm(name)):
                    return indices, name
        return list(range(count)), 'all'
    if valid_labels == 'all':
        return list(range(count)), 'all'
    if valid_labels == 'folder':
        return logits, 'folder'
    if Path(valid_labels).is_file():
        try:
            indices = [int(line) for line in Path(valid_labels).read_text(encoding='utf-8').split()]
        except ValueError as error:
            raise ConfigError(f'--valid-labels {valid_labels} must hold one index a line: {error}.') from error
    elif name in INDICES_OF_TIMM:
        indices = _indices_of_timm(name)
    else:
        raise ConfigError(f'--valid-labels must be auto, all, folder, {", ".join(INDICES_OF_TIMM)} or a file of '
                          f'indices, got {valid_labels!r}.')
    if wrong := [index for index in indices if not 0 <= index < count]:
        raise ConfigError(f'--valid-labels {valid_labels} must hold indices from 0 to {count - 1}, got {wrong[0]}.')
    if missing := sorted(set(logits) - set(indices)):
        raise ConfigError(f'--valid-labels {valid_labels} leaves out {len(missing)} classes of the data, such as '
                          f'logit {missing[0]}; give indices that hold all of them, or folder.')
    return indices, valid_labels


def to_real_labels(predictions: 'Predictions', file_names: list[str], real_labels: str = 'timm') -> 'Predictions':
    """Score predictions against ReaL labels: a prediction is correct if it is any of the labels of the image.

    As timm's `RealLabelsImagenet`, after Beyer et al., https://arxiv.org/abs/2006.07159. The returned label of an image
    is its best ranked prediction among the ReaL labels, else the first of these, and -1 without any. There is no loss.
    Raises ConfigError for labels that cannot be read, or images that are not those of the validation split.

    Args:
        predictions: With logit indices.
        file_names: Names of the image files in dataset order, without folders.
        real_labels: 'timm' for the labels bundled with timm, or a file in the format of real.json.
    """
    try:
        table = RealLabelsImagenet(file_names, real_json=None if real_labels == 'timm' else real_labels).real_labels
        allowed = [table[name] for name in file_names]
    except AssertionError as error:
        raise ConfigError(f'--real-labels {real_labels} is for all images of ImageNet\'s validation split, but the '
                          f'data have {len(file_names)}; complete them.') from error
    except KeyError as error:
        raise ConfigError(f'--real-labels {real_labels} knows images by the names of ImageNet\'s validation split '
                          f'such as ILSVRC2012_val_00000001.JPEG, not {error}; keep these names.') from error
    except (OSError, ValueError) as error:
        raise ConfigError(f'--real-labels {real_labels} cannot be read ({error}); give timm or real.json.') from error
    labels = torch.tensor([
        -1 if read < 0 or not real else next((label for label in top5 if label in real), real[0])
        for read, real, top5 in zip(predictions.labels.tolist(), allowed, predictions.top5.tolist(), strict=True)])
    hits = predictions.top5[labels >= 0] == labels[labels >= 0, None]
    percent = 100 / max(len(hits), 1)
    scores = dict(loss=None, top1=percent * int(hits[:, 0].sum()), top5=percent * int(hits.any(1).sum()))
    return dataclasses.replace(predictions, labels=labels, scores=scores)


def corruption_folders(root: Path) -> list[tuple[str, str, Path]]:
    """(corruption, severity, folder) of each part of a folder CORRUPTION/SEVERITY/CLASS/, as ImageNet-C's; else []."""

    def folders(path: Path) -> list[Path]:
        return sorted(item for item in path.iterdir() if item.is_dir() and not item.name.startswith('.'))

    parts = []
    for corruption in folders(root) if root.is_dir() else []:
        inside = folders(corruption)
        if not inside or not all(item.name in SEVERITIES and folders(item) for item in inside):
            return []
        parts += [(corruption.name, item.name, item) for item in inside]
    return parts


def mean_corruption_error(errors: dict[str, dict[str, float]]) -> float | None:
    """mCE in percent, relative to AlexNet, from the top-1 error (%) of each corruption and severity.

    None unless all 15 corruptions have all 5 severities.
    """
    if any(set(errors.get(name, ())) != set(SEVERITIES) for name in ALEXNET_ERROR):
        return None
    ratios = [sum(errors[name].values()) / len(SEVERITIES) / alexnet for name, alexnet in ALEXNET_ERROR.items()]
    return sum(ratios) / len(ratios)
