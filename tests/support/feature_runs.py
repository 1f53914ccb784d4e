"""Tiny runs of scripts/extract_features.py, their files, and the same features by timm and PIL alone."""
import dataclasses
import json
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors import safe_open
from timm.data import create_transform, resolve_data_config
from timm.utils import random_seed

import extract_features
from support.constants import CLASSES


def run(settings: extract_features.ExtractionSettings, **changes) -> Path:
    """Extract and return the folder of --split."""
    settings = dataclasses.replace(settings, **changes)
    extract_features.main(settings)
    return Path(settings.output) / (settings.split or 'images')


def read_index(folder: Path) -> dict:
    return json.loads((folder / 'index.json').read_text())


def shards_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in ('.safetensors', '.parquet'))


def read_rows(folder: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Columns and paths of all safetensors shards."""
    columns, paths = [], []
    for path in shards_of(folder):
        with safe_open(path, 'pt') as shard:
            columns.append({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118  safe_open is no dict
            paths += json.loads(shard.metadata()['paths'])
    return {name: torch.cat([part[name] for part in columns]) for name in columns[0]}, paths


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in shards_of(folder)}


def expected_rows(folder: Path, model: torch.nn.Module, mode: str = 'RGB') -> tuple[torch.Tensor, list, list]:
    """Expected (embeddings, labels, paths) of a model that ends in a mean over positions, by timm and PIL alone."""
    transform = create_transform(**resolve_data_config({'input_size': (len(mode), 32, 32)}, model=model))
    files = [(folder / name / f'{index}.png', label) for label, name in enumerate(CLASSES)
             for index in range(len(list((folder / name).iterdir())))]
    with torch.no_grad():
        values = torch.cat([model.forward_features(transform(Image.open(file).convert(mode))[None]).mean((2, 3))
                            for file, _ in files])
    return values, [label for _, label in files], [str(file.relative_to(folder)) for file, _ in files]


def seeded_model(seed: int = 42, **arguments: object) -> torch.nn.Module:
    random_seed(seed)
    return timm.create_model('test_resnet', **arguments).eval()


def brute_force_knn(train, train_labels, val, val_labels, k, temperature) -> float:
    right = 0
    for x, label in zip(val.tolist(), val_labels.tolist(), strict=True):
        votes = {}
        found = []
        for y, other in zip(train.tolist(), train_labels.tolist(), strict=True):
            length = (sum(a * a for a in x) * sum(b * b for b in y)) ** .5
            found.append((sum(a * b for a, b in zip(x, y, strict=True)) / length, other))
        for similarity, other in sorted(found, reverse=True)[:k]:
            votes[other] = votes.get(other, 0) + np.exp(similarity / temperature)
        right += max(votes, key=votes.get) == label
    return 100 * right / len(val)
