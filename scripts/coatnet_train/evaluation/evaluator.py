"""Evaluate a classifier: timm's metrics plus per-image predictions in dataset order.

Several processes share the batches and give the numbers of a single one: the padding of the last batch is removed.
"""
import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.task import ClassificationEvaluator
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from coatnet_train.data.dataset import check_labels
from coatnet_train.runtime.cli import ConfigError

__all__ = ['Misclassified', 'Predictions', 'expected_calibration_error', 'predict', 'reliability']


class Misclassified(NamedTuple):
    """An image whose predicted class differs from its label."""

    confidence: float    # probability of the predicted class
    index: int | None    # in the data; None for a stream
    image: torch.Tensor  # (C, H, W), normalised
    label: int
    prediction: int


@dataclass
class Predictions:
    """Predictions for N images in dataset order; a label of -1 marks an unreadable image.

    scores: loss (nats), top1 and top5 (%) of timm's evaluator over the readable images.
    wrong: misclassified images, the most confident first.
    """

    scores: dict[str, float]
    labels: torch.Tensor      # (N,) int64
    top5: torch.Tensor        # (N, up to 5) int64, best first
    confidence: torch.Tensor  # (N,) float32, probability of the best
    wrong: list[Misclassified] = field(default_factory=list)


def predict(
        model: nn.Module, loader: DataLoader, accelerator: Accelerator, *, classes: torch.Tensor | None = None,
        on_batch: Callable[[torch.Tensor], object] = lambda bad: None, keep_wrong: int = 0) -> Predictions:
    """Evaluate a model; raises ConfigError for labels out of range, or a stream without a readable image.

    Args:
        model: (B, C, H, W) -> (B, classes) logits; put into eval mode.
        loader: What `create_loader` returned; prepared by the accelerator unless it is a stream.
        accelerator: Precision and processes to use.
        classes: Indices of the logits that compete, in label order; all if not given.
        on_batch: Called with the third item of every batch, for `UnreadableImages.add`.
        keep_wrong: Number of misclassified images to keep in `wrong`.
    """
    streamed = isinstance(loader.dataset, IterableDataset)  # each process reads a part of its own, of any length
    evaluator = ClassificationEvaluator(device=accelerator.device)
    parts, wrong, local_batch = [], [], 0
    model.eval()
    for images, labels, bad in loader:
        with torch.inference_mode(), accelerator.autocast():
            logits = model(images.to(accelerator.device))
        logits = logits.float() if classes is None else logits.float()[:, classes.to(logits.device)]
        check_labels(labels, logits.shape[-1])
        labels = labels.to(accelerator.device)
        local_batch = local_batch or len(images)  # of this process, in every batch but the last
        if keep_wrong:
            first = (len(parts) * accelerator.num_processes + accelerator.process_index) * local_batch
            probabilities = logits.softmax(-1)
            for i in (logits.argmax(-1) != labels).nonzero().flatten().tolist():
                # skip the padding of the last batch, which repeats images of another process
                if labels[i] >= 0 and (streamed or first + i < len(loader.dataset)):
                    predicted = int(logits[i].argmax())
                    # the index breaks ties, because tensors cannot be ordered
                    confidence = float(probabilities[i, predicted])
                    item = confidence, -(first + i), images[i].cpu(), int(labels[i]), predicted
                    (heapq.heappush if len(wrong) < keep_wrong else heapq.heappushpop)(wrong, item)
        if not streamed:
            logits, labels, bad = accelerator.gather_for_metrics((logits, labels, bad.to(accelerator.device)))
        on_batch(bad)
        read = labels >= 0
        evaluator.update(logits[read], labels[read])
        top5 = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
        confidence = logits.softmax(-1).max(-1).values
        parts.append(tuple(tensor.cpu() for tensor in (labels, top5, confidence)))
    across = streamed and accelerator.num_processes > 1
    if across:
        parts = gather_object(parts)
    if not parts:
        raise ConfigError('no image of the stream can be read; see above for the reasons.')
    labels, top5, confidences = (torch.cat(column) for column in zip(*parts, strict=True))
    if keep_wrong and accelerator.num_processes > 1:
        wrong = gather_object(wrong)
    ranked = [Misclassified(confidence, None if streamed else -index, *rest)
              for confidence, index, *rest in sorted(wrong, key=lambda item: item[:2], reverse=True)[:keep_wrong]]
    return Predictions(dict(evaluator.compute(distributed=across)), labels, top5, confidences, ranked)


def reliability(predictions: Predictions, bins: int = 15) -> list[tuple[int, float, float]]:
    """(images, mean confidence, accuracy in 0..1) of each of `bins` equal confidence intervals; zeros if empty."""
    read = predictions.labels >= 0
    confidence = predictions.confidence[read].double()
    correct = (predictions.top5[read, 0] == predictions.labels[read]).double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1  # bins are (low, high], as in Guo et al.
    rows = []
    for i in range(bins):
        inside = place == i
        count = int(inside.sum())
        rows.append((count, confidence[inside].mean().item() if count else 0.,
                     correct[inside].mean().item() if count else 0.))
    return rows


def expected_calibration_error(predictions: Predictions, bins: int = 15) -> float:
    """ECE in percent: mean gap between confidence and accuracy over the bins, weighted by their images.

    Guo et al., "On Calibration of Modern Neural Networks", equation 3 (https://arxiv.org/abs/1706.04599).
    """
    rows = reliability(predictions, bins)
    total = sum(count for count, _, _ in rows)
    return 100 * sum(count * abs(accuracy - confidence) for count, confidence, accuracy in rows) / max(total, 1)
