"""What a run of finetune.py leaves in its folder."""
import json
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from safetensors.torch import save
from timm.models import save_for_hf
from torch import nn

from coatnet_train.evaluation.evaluator import Predictions
from coatnet_train.plotting.plots import draw_curves
from coatnet_train.runtime.files import write_csv, write_figure, write_file, write_json

__all__ = ['loading_line', 'rank', 'write_config', 'write_metrics', 'write_predictions', 'write_weights']


def write_config(path: Path, model: nn.Module, class_names: list[str], data_config: dict) -> None:
    """Write timm's config.json for this run: its own classes and data settings, nothing of the base weights."""
    described = {
        'tag', 'license', 'description', 'origin_url', 'paper_name', 'paper_ids', 'notes', 'label_names',
        'label_descriptions', 'label_offset', 'test_input_size', 'test_crop_pct', 'test_pool_size'}
    model.pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in described}
    with tempfile.TemporaryDirectory(prefix='.config', dir=path.parent) as scratch:  # timm writes weights beside it
        save_for_hf(model, scratch, {'label_names': class_names}, data_config=data_config, safe_serialization=True)
        config = json.loads((Path(scratch) / 'config.json').read_text(encoding='utf-8'))
    write_json(path, config)


def write_weights(path: Path, state: dict[str, torch.Tensor]) -> None:
    # a copy in plain memory format: safetensors takes neither channels_last nor shared tensors
    tensors = {key: value.cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    write_file(path, lambda temporary: temporary.write_bytes(save(tensors, metadata={'format': 'pt'})))


def write_metrics(run_dir: Path, history: list[dict]) -> None:
    """Write metrics.csv and curves.png."""
    write_csv(run_dir / 'metrics.csv', history)
    figure = Figure(figsize=(10, 4), layout='constrained')
    draw_curves(*figure.subplots(1, 2), history, max(history, key=rank))
    write_figure(run_dir / 'curves.png', figure)


def write_predictions(run_dir: Path, files: list[str], class_names: list[str], predictions: Predictions) -> None:
    """Write predictions.csv, a row for each held-out image that could be read: file, label, prediction, confidence."""
    columns = files, predictions.labels.tolist(), predictions.top5[:, 0].tolist(), predictions.confidence.tolist()
    write_csv(run_dir / 'predictions.csv', [
        {'file': file, 'label': class_names[label], 'prediction': class_names[guess], 'confidence': round(sure, 6)}
        for file, label, guess, sure in zip(*columns, strict=True) if label >= 0])


def loading_line(run_dir: Path) -> str:
    """A line of Python that loads the model of a run, as it stands."""
    return f'import timm, coatnet_zoo; model = timm.create_model({f"local-dir:{run_dir}"!r}, pretrained=True)'


def rank(row: dict) -> tuple[float, float]:
    """Order epochs: the higher top-1 wins, then the lower loss."""
    return row['eval_top1'], -row['eval_loss']
