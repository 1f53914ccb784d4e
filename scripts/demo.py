"""Train coatnet_pico_64 on scikit-learn's 1,797 handwritten digits, reload it and look at what it gets wrong.

    python scripts/demo.py
    python scripts/demo.py --results-file results/demo_cpu.json

Takes 2 to 3 minutes on 2 CPU cores. Ends with output/demo/demo.png, and with exit code 1 if fewer than 97 % of the
held-out digits are read right or the reloaded model differs from the trained one.
"""

import os
import shutil
import sys
import time
from pathlib import Path

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # before torch: spinning threads are ten times slower on busy cores

import finetune
import numpy as np
import timm
import torch
import tyro
from matplotlib.figure import Figure
from PIL import Image
from plots import draw_curves
from provenance import provenance
from run_folder import rank, write_json
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import create_dataset, create_transform, resolve_data_config
from torch.utils.data import DataLoader

DEMO_DIR = Path('output/demo')
IMG_SIZE = 32
LEAST_ACCURACY = 97.0  # percent of the held-out digits
RECIPE = finetune.Settings(
    data_dir=str(DEMO_DIR / 'digits'), model='coatnet_pico_64', img_size=IMG_SIZE,
    model_kwargs=('conv_norm_momentum=0.1',),  # the official 0.01 is made for runs of many thousand steps
    epochs=12, batch_size=64, lr=1.2e-3, warmup_epochs=1, model_ema=True, model_ema_decay=0.98,
    scale=(0.8, 1.0), hflip=0.0, color_jitter=0.0, workers=0, device='cpu', seed=0,
    output=str(DEMO_DIR), experiment='run',
)


def write_digits(folder: Path) -> None:
    """Write the digits as PNGs of IMG_SIZE pixels: train/ and val/ (a fixed, stratified fifth), a folder per digit."""
    digits = load_digits()
    parts = train_test_split(np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)
    for split, indices in zip(('train', 'val'), parts, strict=True):
        for index in indices:
            path = folder / split / str(digits.target[index]) / f'{index:04d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            grey = np.rint(digits.images[index] * 255 / 16).astype(np.uint8)  # 17 levels of ink, 0 to 16
            Image.fromarray(grey).resize((IMG_SIZE, IMG_SIZE), Image.Resampling.BICUBIC).convert('RGB').save(path)


def read_held_out(run_dir: Path, folder: Path) -> tuple[torch.Tensor, np.ndarray, list[str]]:
    """Reload the trained model as any user would, and return its probabilities, the true labels and the file names."""
    model = timm.create_model(f'local-dir:{run_dir}', pretrained=True).eval().to(memory_format=torch.channels_last)
    transform = create_transform(**resolve_data_config(model=model))
    dataset = create_dataset('', root=str(folder), search_split=False, transform=transform)
    with torch.inference_mode():
        probabilities = [
            model(images.to(memory_format=torch.channels_last)).softmax(dim=-1)
            for images, _ in DataLoader(dataset, RECIPE.batch_size)]
    labels = np.array([label for _, label in dataset.reader.samples])
    return torch.cat(probabilities), labels, dataset.filenames(absolute=True)


def draw_demo(history: list[dict], probabilities: torch.Tensor, labels: np.ndarray, files: list[str],
              columns: int = 8, rows: int = 5) -> Figure:
    """Draw the training curves at left and, at right, held-out digits with what the model reads: errors first."""
    confidence, predicted = (values.numpy() for values in probabilities.max(dim=-1))
    wrong, right = np.flatnonzero(predicted != labels), np.flatnonzero(predicted == labels)
    shown = [*wrong, *np.random.default_rng(0).permutation(right)][: columns * rows]

    figure = Figure(figsize=(15, 7), layout='constrained')
    left, middle = figure.subfigures(1, 2, width_ratios=(1, 1.55), wspace=0.04)
    draw_curves(*left.subplots(2, 1), history, max(history, key=rank))
    middle.suptitle(f'{len(labels)} held-out digits: {len(wrong)} read wrong (red), '
                    f'{100 * len(right) / len(labels):.2f} % right', fontsize=13)
    for axes in middle.subplots(rows, columns).flat:
        axes.set_axis_off()
    for axes, index in zip(middle.axes, shown, strict=False):
        axes.imshow(Image.open(files[index]), cmap='gray')
        is_wrong = predicted[index] != labels[index]
        title = f'{predicted[index]}, not {labels[index]}' if is_wrong else f'{predicted[index]}'
        axes.set_title(f'{title}  {100 * confidence[index]:.0f} %', fontsize=10, pad=3,
                       color='#dc2626' if is_wrong else '#374151')
    return figure


def main(results_file: str = '') -> int:
    """Run the demo and return the exit code.

    Args:
        results_file: JSON to write, with hardware and versions.
    """
    start = time.perf_counter()
    run_dir = DEMO_DIR / 'run'
    for folder in (run_dir, DEMO_DIR / 'digits'):  # its own from an earlier demo
        shutil.rmtree(folder, ignore_errors=True)
    write_digits(DEMO_DIR / 'digits')
    summary = finetune.main(RECIPE)

    probabilities, labels, files = read_held_out(run_dir, DEMO_DIR / 'digits' / 'val')
    history = torch.load(run_dir / 'last' / 'checkpoint.pt', weights_only=True)['progress']['history']
    draw_demo(history, probabilities, labels, files).savefig(DEMO_DIR / 'demo.png', dpi=120)
    right = int((probabilities.argmax(dim=-1).numpy() == labels).sum())
    accuracy = 100 * right / len(labels)
    print(f'reloaded from {run_dir}: {right} of {len(labels)} held-out digits right, {accuracy:.2f} %; '
          f'picture: {DEMO_DIR / "demo.png"}')
    if accuracy != summary['top1']:
        print(f'demo.py: the reloaded model has {accuracy:.2f} %, training reported {summary["top1"]:.2f} %.')
        return 1
    if accuracy < LEAST_ACCURACY:
        print(f'demo.py: {accuracy:.2f} % is below the expected {LEAST_ACCURACY} %.')
        return 1
    if results_file:
        write_json(Path(results_file), dict(
            top1=accuracy, images=len(labels), epochs=RECIPE.epochs, seed=RECIPE.seed,
            seconds=round(time.perf_counter() - start, 1), threads=torch.get_num_threads(), **provenance('cpu')))
    return 0


if __name__ == '__main__':
    sys.exit(tyro.cli(main, description=__doc__))
