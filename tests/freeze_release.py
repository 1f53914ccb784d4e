"""Freeze a packaged release for regression tests: names, dtypes and shapes of tensors, golden logits, predictions.

    python tests/freeze_release.py output/hub/coatnet_pico_64.tin200 ...           # everything
    python tests/freeze_release.py --predictions-only coatnet_pico_64.tin200 ...   # if the rest is frozen

Run it once, after hub/publish.py --package; tests/models/test_shipped_weights.py compares the package with the frozen
files. The predictions are those for every 20th held-out image of Tiny-ImageNet, 500 of 10,000; they need
tiny-imagenet-val.zip in $COATNET_ZOO_DATA, by default ../shared/data beside the checkout. Remove the files of a release
that is no longer packaged.
"""
import argparse
import csv
import json
import shutil
import sys
import tempfile
from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors import safe_open
from timm.data import create_transform, resolve_data_config

sys.path.append(str(Path(__file__).parents[1]))  # an installed coatnet_zoo has precedence, as in conformance.py

import coatnet_zoo  # noqa: F401  registers the names
from support.images import unpack_images

RELEASES = Path(__file__).with_name('releases')
IMAGES, EVERY = 'tiny-imagenet-val', 20


def tensors_of(path: Path) -> dict[str, list]:
    """[dtype, shape] of every tensor of a safetensors file, sorted by name."""
    with safe_open(path, framework='pt') as file:
        slices = {name: file.get_slice(name) for name in sorted(file.keys())}
        return {name: [part.get_dtype(), list(part.get_shape())] for name, part in slices.items()}


@torch.inference_mode()
def predict_images(name: str, folder: Path) -> list[dict]:
    """Predict all images below a folder with released weights; returns rows of file, prediction and probability."""
    model = timm.create_model(name, pretrained=True).eval()
    transform = create_transform(**resolve_data_config(model=model, use_test_size=True))
    labels, rows = model.pretrained_cfg['label_names'], []
    files = sorted(folder.rglob('*.jpg'))
    for start in range(0, len(files), 50):
        part = files[start:start + 50]
        images = torch.stack([transform(Image.open(file).convert('RGB')) for file in part])
        best = model(images).softmax(-1).max(-1)
        rows += [{'file': f'{file.parent.name}/{file.name}', 'prediction': labels[index], 'confidence': round(value, 4)}
                 for file, index, value in zip(part, best.indices.tolist(), best.values.tolist(), strict=True)]
    return rows


def read_predictions(name: str) -> list[dict]:
    """Read the rows that `write_predictions` wrote."""
    with (RELEASES / f'{name}.predictions.csv').open(newline='', encoding='utf-8') as file:
        return [{**row, 'confidence': float(row['confidence'])} for row in csv.DictReader(file)]


def write_predictions(name: str, images: Path) -> None:
    rows = predict_images(name, images)
    with (RELEASES / f'{name}.predictions.csv').open('x', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, rows[0], lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    print(f'{name}: {len(rows)} predictions')


def write_tensors(folder: Path) -> None:
    lines = [f'{json.dumps(name)}: {json.dumps(kind)}' for name, kind in
             tensors_of(folder / 'model.safetensors').items()]
    with (RELEASES / f'{folder.name}.json').open('x', encoding='utf-8') as file:  # fails if the file exists
        file.write('{' + ',\n'.join(lines) + '}\n')
    shutil.copyfile(folder / 'golden.safetensors', RELEASES / f'{folder.name}.golden.safetensors')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('releases', nargs='+', type=Path, help='exported folders, or names of releases')
    parser.add_argument('--predictions-only', action='store_true', help='write no tensors and golden logits')
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        images = unpack_images(IMAGES, Path(scratch), EVERY)
        for release in arguments.releases:
            if not arguments.predictions_only:
                write_tensors(release)
            write_predictions(release.name, images)


if __name__ == '__main__':
    main()
