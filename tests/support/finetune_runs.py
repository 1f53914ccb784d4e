"""Tiny runs of scripts/finetune.py on generated images, and comparisons of two runs."""
import csv
import dataclasses
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

import finetune
from support.commands import environment
from support.constants import ROOT


def write_shards(folder: Path, count: int = 24, held_out: int = 1) -> Path:
    """Write two training shards and some of held-out images, with the info file that timm reads."""
    folder.mkdir()
    splits = {}
    for split, shards in (('train', 2), ('validation', held_out)):
        names = [f'{split}-{number}.tar' for number in range(shards)]
        for number, name in enumerate(names):
            with tarfile.open(folder / name, 'w') as tar:
                for index in range(count):
                    label = index % 3
                    image, key = io.BytesIO(), f'{split}{number}_{index:03d}'
                    Image.new('RGB', (40, 36), tuple(200 * (label == c) for c in range(3))).save(image, 'PNG')
                    for extension, content in (('png', image.getvalue()), ('cls', str(label).encode())):
                        info = tarfile.TarInfo(f'{key}.{extension}')
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
        splits[split] = dict(name=split, num_samples=count * len(names), filenames=names,
                             shard_lengths=[count] * len(names))
    (folder / '_info.json').write_text(json.dumps(dict(splits=splits)))
    return folder


def run(settings: finetune.FinetuneSettings, **changes) -> Path:
    """Fine-tune and return the run folder."""
    settings = dataclasses.replace(settings, **changes)
    finetune.main(settings)
    return Path(settings.output) / settings.experiment


def read_checkpoint(run_dir: Path) -> dict:
    return torch.load(run_dir / 'last' / 'checkpoint.pt', weights_only=True)


def read_metrics(run_dir: Path) -> list[dict]:
    """Read metrics.csv without images_per_second, which differs between runs."""
    with (run_dir / 'metrics.csv').open() as file:
        return [{key: float(value) for key, value in row.items() if key != 'images_per_second'}
                for row in csv.DictReader(file)]


def assert_same_tensors(first: dict, second: dict) -> None:
    assert first.keys() == second.keys() and len(first) > 10
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def assert_same_run(first: Path, second: Path) -> None:
    assert_same_tensors(load_file(first / 'model.safetensors'), load_file(second / 'model.safetensors'))
    assert_same_tensors(read_checkpoint(first)['state_dict'], read_checkpoint(second)['state_dict'])
    assert read_metrics(first) == read_metrics(second) != []


def assert_everything_loads(run_dir: Path) -> int:
    """Open each file that has its final name, and return how many there are."""
    loaders = {
        '.json': lambda path: json.loads(path.read_text()), '.csv': lambda path: read_metrics(path.parent)[0],
        '.png': lambda path: Image.open(path).load(), '.safetensors': load_file,
        '.pt': lambda path: torch.load(path, weights_only=True)}
    files = [path for path in run_dir.rglob('*') if path.is_file() and not path.name.startswith('.')]
    for path in files:
        loaders[path.suffix](path)
    return len(files)


def run_command(*arguments: str, columns: int = 200) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / 'scripts' / 'finetune.py', *arguments], capture_output=True, text=True,
        env=environment(COLUMNS=str(columns)))
