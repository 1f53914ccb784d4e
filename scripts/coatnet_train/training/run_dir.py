"""The run directory of finetune.py: its choice, and the files written to it."""
import json
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from safetensors.torch import save
from timm.models import safe_model_name, save_for_hf
from torch import nn

from coatnet_train.evaluation.evaluator import Predictions
from coatnet_train.plotting.plots import draw_curves
from coatnet_train.runtime.cli import ConfigError, check_output
from coatnet_train.runtime.console import check_utf8
from coatnet_train.runtime.files import write_csv, write_figure, write_file, write_json
from coatnet_train.training.config import FinetuneSettings

__all__ = [
    'find_run', 'loading_line', 'score_key', 'write_config', 'write_curves', 'write_metrics', 'write_predictions',
    'write_weights']


def write_config(path: Path, model: nn.Module, class_names: list[str], data_config: dict) -> None:
    """Write timm's config.json with the classes and data settings of this run, without metadata of the base weights."""
    described = {
        'tag', 'license', 'description', 'origin_url', 'paper_name', 'paper_ids', 'notes', 'label_names',
        'label_descriptions', 'label_offset', 'test_input_size', 'test_crop_pct', 'test_pool_size'}
    model.pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in described}
    with tempfile.TemporaryDirectory(prefix='.config', dir=path.parent) as scratch:  # timm writes the weights too
        save_for_hf(model, scratch, {'label_names': class_names}, data_config=data_config, safe_serialization=True)
        config = json.loads((Path(scratch) / 'config.json').read_text(encoding='utf-8'))
    write_json(path, config)


def write_weights(path: Path, state: dict[str, torch.Tensor]) -> None:
    # a copy in plain memory format: safetensors takes neither channels_last nor shared tensors
    tensors = {key: value.cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    write_file(path, lambda temporary: temporary.write_bytes(save(tensors, metadata={'format': 'pt'})))


def write_metrics(run_dir: Path, history: list[dict]) -> None:
    """Write metrics.csv, a row for each evaluated epoch."""
    write_csv(run_dir / 'metrics.csv', history)


def write_curves(run_dir: Path, history: list[dict]) -> None:
    """Write curves.png."""
    write_figure(run_dir / 'curves.png', curves_figure(history))


def curves_figure(history: list[dict]) -> Figure:
    """Losses and accuracies over the epochs of metrics.csv."""
    figure = Figure(figsize=(10, 4), layout='constrained')
    draw_curves(*figure.subplots(1, 2), history, max(history, key=score_key))
    return figure


def write_predictions(run_dir: Path, files: list[str], class_names: list[str], predictions: Predictions) -> None:
    """Write predictions.csv, a row for each held-out image that could be read: file, label, prediction, confidence."""
    columns = files, predictions.labels.tolist(), predictions.top5[:, 0].tolist(), predictions.confidence.tolist()
    write_csv(run_dir / 'predictions.csv', [
        {'file': file, 'label': class_names[label], 'prediction': class_names[prediction],
         'confidence': round(confidence, 6)}
        for file, label, prediction, confidence in zip(*columns, strict=True) if label >= 0])


def loading_line(run_dir: Path) -> str:
    """Python line that loads the model of a run, ready to paste."""
    return f'import timm, coatnet_zoo; model = timm.create_model({f"local-dir:{run_dir}"!r}, pretrained=True)'


def score_key(row: dict) -> tuple[float, float]:
    """Sort key of epochs: higher top-1 first, then lower loss."""
    return row['eval_top1'], -row['eval_loss']


def find_run(settings: FinetuneSettings) -> tuple[Path, Path | None]:
    """Return the run folder and its checkpoint, if any; raises ConfigError for a run that would be overwritten."""
    run_dir = Path(settings.output) / (settings.experiment or safe_model_name(settings.model))
    if settings.resume not in ('', 'auto'):
        run_dir = Path(settings.resume)
    check_utf8(run_dir, '--resume' if settings.resume not in ('', 'auto') else '--output')
    checkpoint = run_dir / 'last' / 'checkpoint.pt'
    check_output(checkpoint)
    if settings.resume and checkpoint.is_file():
        return run_dir, checkpoint
    if settings.resume not in ('', 'auto'):
        raise ConfigError(f'--resume {settings.resume} must be a run folder, but there is no {checkpoint}; '
                          f'give the folder that holds last/, or auto.')
    # A run killed in its first epoch has args.json but no checkpoint: auto begins it again.
    if (run_dir / ('summary.json' if settings.resume else 'args.json')).exists():
        raise ConfigError(f'--output {run_dir} already holds a run, which is never overwritten; continue it with '
                          f'--resume auto (while it has last/), or choose another --experiment.')
    return run_dir, None
