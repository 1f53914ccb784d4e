"""What a run leaves in its folder; every file under a temporary name first, so that none is ever half there."""
import csv
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors.torch import save
from timm.models import save_for_hf
from torch import nn


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, force it to disk and give it its name."""
    temporary = path.with_name(f'.{path.name}.tmp')
    write(temporary)
    with temporary.open('rb+') as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: dict) -> None:
    write_file(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8'))


def write_config(path: Path, model: nn.Module, class_names: list[str], data_config: dict) -> None:
    """Write timm's config.json for this run: its own classes and data settings, nothing of the base weights."""
    described = {
        'tag', 'license', 'description', 'origin_url', 'paper_name', 'paper_ids', 'notes', 'label_names',
        'label_descriptions', 'label_offset', 'test_input_size', 'test_crop_pct', 'test_pool_size'}
    model.pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in described}
    with tempfile.TemporaryDirectory() as scratch:
        save_for_hf(model, scratch, {'label_names': class_names}, data_config=data_config, safe_serialization=True)
        config = json.loads((Path(scratch) / 'config.json').read_text(encoding='utf-8'))
    write_json(path, config)


def write_weights(path: Path, model: nn.Module) -> None:
    # a copy in plain memory format: safetensors takes neither channels_last nor shared tensors
    tensors = {key: value.cpu().clone(memory_format=torch.contiguous_format)
               for key, value in model.state_dict().items()}
    write_file(path, lambda temporary: temporary.write_bytes(save(tensors, metadata={'format': 'pt'})))


def write_metrics(run_dir: Path, history: list[dict]) -> None:
    """Write metrics.csv and curves.png."""

    def write_rows(temporary: Path) -> None:
        with temporary.open('w', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, history[0])
            writer.writeheader()
            writer.writerows(history)

    write_file(run_dir / 'metrics.csv', write_rows)
    figure = Figure(figsize=(10, 4), layout='constrained')
    draw_curves(*figure.subplots(1, 2), history)
    write_file(run_dir / 'curves.png', lambda temporary: figure.savefig(temporary, format='png', dpi=150))


def draw_curves(loss_axes: Axes, accuracy_axes: Axes, history: list[dict]) -> None:
    """Draw loss and accuracy against the epoch, with the best epoch marked."""
    epochs = [row['epoch'] for row in history]
    best = max(history, key=rank)
    loss_axes.plot(epochs, [row['train_loss'] for row in history], '.-', color='#9ca3af', label='training (augmented)')
    loss_axes.plot(epochs, [row['eval_loss'] for row in history], '.-', color='#2563eb', label='held out')
    loss_axes.set(xlabel='epoch', ylabel='cross-entropy (nats)', title='Loss')
    accuracy_axes.plot(epochs, [row['eval_top1'] for row in history], '.-', color='#2563eb', label='held out, top-1')
    accuracy_axes.plot(best['epoch'], best['eval_top1'], 'o', color='#2563eb', clip_on=False)
    accuracy_axes.set(xlabel='epoch', ylabel='accuracy (%)',
                      title=f'Accuracy: best {best["eval_top1"]:.2f} % after epoch {best["epoch"]}')
    for axes in (loss_axes, accuracy_axes):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(axis='y', color='#e5e7eb')
        axes.set_axisbelow(True)
        axes.legend(frameon=False)


def rank(row: dict) -> tuple[float, float]:
    """Order epochs: the higher top-1 wins, then the lower loss."""
    return row['eval_top1'], -row['eval_loss']
