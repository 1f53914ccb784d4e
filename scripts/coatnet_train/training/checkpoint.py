"""Checkpoints: progress of a run, and the resume signature, which must be the same on resuming."""
import json
import pickle
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from coatnet_train.data.config import is_stream
from coatnet_train.data.digest import data_digest
from coatnet_train.runtime.accelerator import warn
from coatnet_train.runtime.cli import ConfigError, one_line
from coatnet_train.training.config import RESUME_IGNORED_FIELDS, FinetuneSettings, upgrade_fields

__all__ = ['Progress', 'check_resume_signature', 'read_checkpoint', 'resume_signature', 'write_state']

# Entries of a resume signature that are digests of a split: names, labels and contents of its images.
DIGESTS = {'digest_of_train_images': 'training', 'digest_of_val_images': 'held-out'}


@dataclass
class Progress:
    """Progress of a run: the part of a checkpoint that is neither weights nor optimizer."""

    epoch: int = 1  # current epoch
    batch: int = 0  # finished batches of this epoch
    updates: int = 0  # weight updates since the start
    lr: float = 0.0  # learning rate of the last update
    loss_sum: float = 0.0  # sum of the loss over the images of this epoch
    epoch_seconds: float = 0.0
    train_seconds: float = 0.0
    history: list[dict] = field(default_factory=list)
    bad_train: list[int] = field(default_factory=list)  # indices of unreadable images
    bad_val: list[int] = field(default_factory=list)


def read_checkpoint(path: Path) -> dict:
    """Read a checkpoint and rename its settings to the present field names; raises ConfigError if it is unreadable."""
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f'--resume: {path} cannot be read: {one_line(error)}; start another --experiment.') from error
    signature = checkpoint.pop('facts', None) or checkpoint['resume_signature']
    return checkpoint | {'resume_signature': {'teacher_outputs': ''} | upgrade_fields(signature)}


def resume_signature(settings: FinetuneSettings, train_set: Dataset, val_set: Dataset, class_names: list[str],
                     accelerator: Accelerator) -> dict[str, object]:
    """Everything that the result of a run depends on: settings, data and the number of processes."""
    # streams divide their shards among the workers, so their order depends on the number of workers
    ignored = (*RESUME_IGNORED_FIELDS, *(() if is_stream(settings) else ('workers',)))
    signature = {name: value for name, value in asdict(settings).items() if name not in ignored}
    signature |= {f'digest_of_{name}_images': data_digest(dataset, class_names, accelerator)
                  for name, dataset in (('train', train_set), ('val', val_set))}
    signature |= {'classes': class_names, 'train_images': len(train_set), 'val_images': len(val_set),
                  'teacher_outputs': '',  # replaced by their digest if any are used
                  'processes': accelerator.num_processes, 'sharded': accelerator.is_fsdp2}
    return json.loads(json.dumps(signature))  # tuples become lists, as in the file


def check_resume_signature(checkpoint: dict, run_dir: Path, signature: dict[str, object]) -> None:
    """Raise ConfigError if the checkpoint was saved under another resume signature."""
    saved = checkpoint['resume_signature']
    if [name for name in DIGESTS if name not in saved]:
        warn('--resume: the run began before data were compared by their content; make sure yourself that --data-dir '
             'holds the same images.')
    if changed := [f'{name} was {value}, is {signature[name]}' for name, value in saved.items()
                   if name in signature and name not in DIGESTS and signature[name] != value]:
        raise ConfigError(f'--resume {run_dir} needs the settings the run began with, but {"; ".join(changed)}; '
                          f'restore them, or start another --experiment.')
    for name, split in DIGESTS.items():
        if saved.get(name, signature[name]) != signature[name]:
            raise ConfigError(f'--resume {run_dir} needs the {split} images that the run began with, but those in '
                              f'--data-dir are others; restore them, or start another --experiment.')


def write_state(state: dict, path: Path) -> None:
    with path.open('wb') as file:  # given a path, torch.save would turn a full disk into a RuntimeError
        torch.save(state, file)
