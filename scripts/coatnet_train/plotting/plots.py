"""Figures of runs and evaluations: curves, confusion matrix, misclassified images, reliability diagram."""
import re
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from timm.data import ImageNetInfo

from coatnet_train.plotting.style import BLUE, GREY, RED, clean_axes, escape_math, use_fonts, use_integer_epochs

if TYPE_CHECKING:
    from coatnet_train.evaluation.evaluator import Misclassified

__all__ = [
    'confusion_figure', 'draw_curves', 'misclassified_figure', 'reliability_figure', 'synset_names', 'to_pixels']

SYNSET = re.compile(r'n\d{8}')
MAX_NAMED_CLASSES = 40  # maximum number of classes that are named on the axes of a confusion matrix


def draw_curves(loss_axes: Axes, accuracy_axes: Axes, history: list[dict], best: dict) -> None:
    """Draw loss and accuracy against the epoch, with the best epoch marked."""
    epochs = [row['epoch'] for row in history]
    loss_axes.plot(epochs, [row['train_loss'] for row in history], '.-', color=GREY, label='training (augmented)')
    loss_axes.plot(epochs, [row['eval_loss'] for row in history], '.-', color=BLUE, label='held out')
    loss_axes.set(xlabel='epoch', ylabel='cross-entropy (nats)', title='Loss')
    accuracy_axes.plot(epochs, [row['eval_top1'] for row in history], '.-', color=BLUE, label='held out, top-1')
    accuracy_axes.plot(best['epoch'], best['eval_top1'], 'o', color=BLUE, clip_on=False)
    accuracy_axes.set(xlabel='epoch', ylabel='accuracy (%)',
                      title=f'Accuracy: best {best["eval_top1"]:.2f} % after epoch {best["epoch"]}')
    for axes in (loss_axes, accuracy_axes):
        use_integer_epochs(axes)
        clean_axes(axes)
        axes.legend(frameon=False)


def confusion_figure(labels: torch.Tensor, predicted: torch.Tensor, class_names: list[str]) -> Figure:
    """Confusion matrix in percent of each row: rows are true classes, columns predicted ones; labels of -1 are ignored.

    Args:
        labels: True classes (N,) int64.
        predicted: Predicted classes (N,) int64.
        class_names: In label order.
    """
    count = len(class_names)
    class_names = [escape_math(name) for name in synset_names(class_names)]
    use_fonts(class_names)
    read = labels >= 0
    matrix = torch.bincount(labels[read] * count + predicted[read], minlength=count * count).view(count, count).double()
    percent = (100 * matrix / matrix.sum(1, keepdim=True).clamp(min=1)).numpy()
    named = count <= MAX_NAMED_CLASSES
    side = min(14, 3 + 0.35 * count) if named else 9
    figure = Figure(figsize=(side + 1, side), layout='constrained')
    axes = figure.subplots()
    image = axes.imshow(percent, cmap='Blues', vmin=0, vmax=100)
    if named:
        axes.set_xticks(range(count), class_names, rotation=90 if max(map(len, class_names)) > 2 else 0)
        axes.set_yticks(range(count), class_names)
    if count <= 15:
        for row, column in np.argwhere(percent >= 0.5):
            axes.text(column, row, f'{percent[row, column]:.0f}', ha='center', va='center', fontsize=8,
                      color='white' if percent[row, column] > 60 else 'black')
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    accuracy = 100 * matrix.diagonal().sum() / matrix.sum().clamp(min=1)
    axes.set(xlabel='predicted', ylabel='true', title=f'{int(matrix.sum())} held-out images, {accuracy:.2f} % correct')
    figure.colorbar(image, ax=axes, shrink=0.8, label='percent of the true class')
    return figure


def synset_names(class_names: list[str]) -> list[str]:
    """First name of each ImageNet synset, such as tench, followed by the synset where two share it.

    Returns the names unchanged unless all of them are synsets.
    """
    if not all(SYNSET.fullmatch(name) for name in class_names):
        return class_names
    known = ImageNetInfo('imagenet-22k').label_descriptions(as_dict=True)
    short = [known.get(name, name).split(', ')[0] for name in class_names]
    return [first if short.count(first) == 1 else f'{first} {name}'
            for first, name in zip(short, class_names, strict=True)]


def to_pixels(image: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Undo the normalisation of an image (C, H, W): (H, W, 3) in 0..1, or (H, W) if it is grey."""
    values = image.float() * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    values = values.clamp(0, 1).permute(1, 2, 0).numpy()
    return values[..., 0] if values.shape[-1] == 1 else values


def shorten(name: str, length: int = 22) -> str:
    """Cut the middle out of a longer name; the end stays, because it distinguishes files."""
    return name if len(name) <= length else f'{name[:length // 3]}…{name[len(name) + 1 + length // 3 - length:]}'


def misclassified_figure(wrong: 'list[Misclassified]', files: list[str], class_names: list[str],
                         mean: tuple[float, ...], std: tuple[float, ...]) -> Figure:
    """Grid of misclassified images in the given order, each with its predicted class, true class and file name.

    Args:
        wrong: `Predictions.wrong`.
        files: File name of each, or ''.
        class_names: In label order.
        mean: Mean of the normalisation.
        std: Standard deviation of the normalisation.
    """
    columns = min(6, max(3, len(wrong)))
    rows = max(1, -(-len(wrong) // columns))
    figure = Figure(figsize=(1.9 * columns, 2.5 * rows + 0.5), layout='constrained')
    class_names = synset_names(class_names)
    use_fonts([*class_names, *files])
    figure.suptitle('Misclassified with most confidence' if wrong else 'No image was misclassified')
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis('off')
    for axes, item, file in zip(figure.axes, wrong, files, strict=False):
        axes.imshow(to_pixels(item.image, mean, std), cmap='gray', vmin=0, vmax=1)
        predicted, true = (escape_math(class_names[label][:22]) for label in (item.prediction, item.label))
        lines = f'{predicted}, {100 * item.confidence:.0f} %', f'is {true}', escape_math(shorten(file))
        axes.set_title('\n'.join(lines), fontsize=8)
    return figure


def reliability_figure(bins: list[tuple[int, float, float]], title: str) -> Figure:
    """Reliability diagram: accuracy against confidence, and below it the percentage of images in each bin.

    Args:
        bins: What `reliability` returned: (images, mean confidence, accuracy) of each bin.
        title: Title of the figure.
    """
    use_fonts([title])
    figure = Figure(figsize=(5.5, 6.5), layout='constrained')
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width, total = 100 / len(bins), max(1, sum(count for count, _, _ in bins))
    middles = [width * (index + 0.5) for index in range(len(bins))]
    above.plot([0, 100], [0, 100], '--', color=GREY, label='calibrated')
    above.bar(middles, [100 * accuracy for _, _, accuracy in bins], width * 0.9, color='#93b4f5', label='accuracy')
    gaps = [(100 * confidence, 100 * accuracy) for count, confidence, accuracy in bins if count]
    above.vlines([confidence for confidence, _ in gaps], *zip(*map(sorted, gaps), strict=True), color=RED, label='gap')
    above.plot(*zip(*gaps, strict=True), '.', color=RED, clip_on=False)
    above.set(ylabel='accuracy (%)', title=title, xlim=(0, 100), ylim=(0, 100))
    figure.legend(frameon=False, loc='outside lower center', ncols=3)
    below.bar(middles, [100 * count / total for count, _, _ in bins], width * 0.9, color=GREY)
    below.set(xlabel='confidence (%)', ylabel='images (%)')
    for axes in (above, below):
        clean_axes(axes)
    return figure
