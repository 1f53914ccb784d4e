"""Checkpoints: how far a run is, what must be the same when it goes on, and the file of both."""
import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import torch

from coatnet_train.runtime.accelerator import warn
from coatnet_train.runtime.cli import SettingsError, one_line

__all__ = ['Progress', 'check_facts', 'read_checkpoint', 'write_state']

# Facts that stand for the images of a split: names, labels and content.
DIGESTS = {'digest_of_train_images': 'training', 'digest_of_val_images': 'held-out'}


@dataclass
class Progress:
    """How far a run is: what its checkpoint holds beside weights and optimizer."""

    epoch: int = 1  # the one under way
    batch: int = 0  # batches of it that are done
    updates: int = 0  # of the weights, since the start
    lr: float = 0.0  # of the last update
    loss_sum: float = 0.0  # over the pictures of this epoch
    epoch_seconds: float = 0.0
    train_seconds: float = 0.0
    history: list[dict] = field(default_factory=list)
    bad_train: list[int] = field(default_factory=list)  # places of unreadable pictures
    bad_val: list[int] = field(default_factory=list)


def read_checkpoint(path: Path) -> dict:
    """The state to go on from."""
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise SettingsError(f'--resume: {path} cannot be read: {one_line(error)}; start another '
                            f'--experiment.') from error


def check_facts(checkpoint: dict, run_dir: Path, facts: dict) -> None:
    """Refuse a checkpoint that was saved under other facts than these."""
    facts = json.loads(json.dumps(facts))  # tuples become lists, as in the file
    if [name for name in DIGESTS if name not in checkpoint['facts']]:
        warn('--resume: the run began before data were compared by their content; see to it yourself that --data-dir '
             'holds the same images.')
    if changed := [f'{name} was {value}, is {facts[name]}' for name, value in checkpoint['facts'].items()
                   if name in facts and name not in DIGESTS and facts[name] != value]:
        raise SettingsError(f'--resume {run_dir} needs the settings the run began with, but {"; ".join(changed)}; '
                            f'restore them, or start another --experiment.')
    for name, split in DIGESTS.items():
        if checkpoint['facts'].get(name, facts[name]) != facts[name]:
            raise SettingsError(f'--resume {run_dir} needs the {split} images that the run began with, but those in '
                                f'--data-dir are others; restore them, or start another --experiment.')


def write_state(state: dict, path: Path) -> None:
    with path.open('wb') as file:  # to a path of its own torch.save hides a full disk behind a RuntimeError
        torch.save(state, file)
