"""Fine-tuning, linear probe and random start on fractions of the labels: rows and plot of transfer.py."""
import os
import shutil
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from timm.models import safe_model_name

import coatnet_zoo
from coatnet_train.data.config import DataSettings
from coatnet_train.data.dataset import create_dataset, read_targets
from coatnet_train.evaluation import extraction
from coatnet_train.evaluation.extraction_config import ExtractionSettings
from coatnet_train.evaluation.features import linear_probe
from coatnet_train.experiments.transfer_config import METHODS, TransferSettings
from coatnet_train.models.config import ModelSettings
from coatnet_train.models.open_model import open_model
from coatnet_train.plotting.style import BLUE, GREY, ORANGE, clean_axes
from coatnet_train.runtime.accelerator import choose_device
from coatnet_train.runtime.cli import ConfigError, changed_flags, earlier_results
from coatnet_train.runtime.files import write_figure, write_json
from coatnet_train.runtime.provenance import provenance
from coatnet_train.training.config import FinetuneSettings
from coatnet_train.training.run import finetune

COLORS = dict(zip(METHODS, (BLUE, ORANGE, GREY), strict=True))


def check_same(settings: TransferSettings, earlier: dict) -> None:
    """Raise ConfigError if earlier rows were made under other settings."""
    if 'fractions' not in earlier:
        raise ConfigError(f'--results-file {settings.results_file} was written by an earlier version of this script; '
                          f'give another file.')
    changed = changed_flags(
        settings, earlier, ('data_dir', 'model', 'img_size', 'batch_size', 'lr', 'scale', 'hflip', 'amp'))
    before, after = (dict(zip(kept['fractions'], kept['updates'], strict=True)) for kept in (earlier, asdict(settings)))
    changed += [f'--updates was {before[fraction]} and is {after[fraction]} for fraction {fraction:g}'
                for fraction in sorted(before.keys() & after.keys()) if before[fraction] != after[fraction]]
    if changed:
        raise ConfigError(f'--results-file {settings.results_file} holds rows made under other settings: '
                          f'{"; ".join(changed)}. Give another file, and another --output.')


def draw(labels: np.ndarray, fraction: float, subset: int) -> np.ndarray:
    """Indices of a fraction of each class, at least two images; `subset` is the seed of the draw."""
    rng = np.random.default_rng(subset)
    chosen = []
    for label in np.unique(labels):
        places = rng.permutation(np.flatnonzero(labels == label))
        chosen.append(places[:max(2, round(fraction * len(places)))])
    return np.sort(np.concatenate(chosen))


def link_subset(settings: TransferSettings, files: list[Path], folder: Path) -> Path:
    """Make a data folder of links to the given training images and the whole validation split."""
    shutil.rmtree(folder, ignore_errors=True)
    train, _ = create_dataset(DataSettings(data_dir=settings.data_dir), 'train')
    for file in files:
        # not the parent folder: images of Tiny-ImageNet lie in SYNSET/images/
        link = folder / 'train' / file.relative_to(train.reader.root).parts[0] / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(file, link.parent))
    validation, _ = create_dataset(DataSettings(data_dir=settings.data_dir), 'validation')
    (folder / 'val').symlink_to(os.path.relpath(validation.reader.root, folder))
    return folder


def root_of(settings: TransferSettings) -> Path:
    """Folder of the runs and features for these weights and this data set."""
    return Path(settings.output) / f'{Path(settings.data_dir).name}-{safe_model_name(settings.model)}'


def train(settings: TransferSettings, architecture: str, data_dir: Path, count: int, updates: int, seed: int,
          pretrained: bool) -> float:
    """Train a run, or resume an interrupted one; returns the top-1 (%) after its last epoch."""
    epochs = -(-updates // max(1, count // settings.batch_size))
    ours = architecture in coatnet_zoo.list_models()
    summary = finetune(FinetuneSettings(
        data_dir=str(data_dir), model=settings.model, pretrained=pretrained,
        img_size=settings.img_size, epochs=epochs, val_interval=epochs, batch_size=min(settings.batch_size, count),
        lr=settings.lr, warmup_epochs=epochs / 10, scale=settings.scale, hflip=settings.hflip, color_jitter=0.0,
        amp=settings.amp, model_kwargs=('conv_norm_momentum=0.1',) if ours else (), device=settings.device,
        workers=settings.workers, seed=seed, output=str(data_dir.parent), resume='auto',
        experiment=f'{data_dir.name}-{"fine-tuned" if pretrained else "random"}'))
    return summary['top1']


def read_features(settings: TransferSettings) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pooled features (N, C) and labels (N,) of both splits, extracted once."""
    options = ExtractionSettings(
        data_dir=settings.data_dir, model=settings.model, pretrained=True, img_size=settings.img_size, amp=settings.amp,
        device=settings.device, workers=settings.workers, output=str(root_of(settings) / 'features'))
    found = {}
    for split in ('train', 'validation'):
        options = ExtractionSettings(**{**vars(options), 'split': split})
        extraction.extract_features(options)
        tensors = extraction.read_split(options, extraction.open_split(options, split))
        found[split] = tuple(tensor.numpy() for tensor in tensors)
    return found


def with_earlier_rows(settings: TransferSettings, earlier: dict, rows: list[dict]) -> TransferSettings:
    """These settings, with the methods and fractions of the rows that a results file has already."""
    plans = {fraction: plan for kept in (earlier, asdict(settings))
             for fraction, *plan in zip(kept['fractions'], kept['subsets'], kept['updates'], strict=True)}
    subsets, updates = zip(*(plans[fraction] for fraction in sorted(plans)), strict=True)
    known = {*settings.methods, *(row['method'] for row in rows)}
    methods = tuple(method for method in METHODS if method in known)
    return replace(settings, methods=methods, fractions=tuple(sorted(plans)), subsets=subsets, updates=updates)


def summarize(settings: TransferSettings, rows: list[dict]) -> dict:
    table = {}
    for method in settings.methods:
        for fraction in settings.fractions:
            top1 = [row['top1'] for row in rows if (row['method'], row['fraction']) == (method, fraction)]
            if top1:
                deviation = statistics.stdev(top1) if len(top1) > 1 else 'not measured'
                table.setdefault(method, {})[str(fraction)] = dict(
                    top1=statistics.mean(top1), deviation=deviation, subsets=len(top1))
    kept = {name: value for name, value in asdict(settings).items() if name not in ('output', 'results_file')}
    return dict(settings=kept, table=table, rows=rows, **provenance(str(choose_device(settings.device))))


def plot(report: dict) -> Figure:
    """Plot top-1 over the fraction of labels: a dot for each draw, a line through the means."""
    figure = Figure(figsize=(7, 4.4), layout='constrained')
    axes = figure.subplots()
    for method, cells in report['table'].items():
        fractions = [100 * float(fraction) for fraction in cells]
        axes.plot(fractions, [cell['top1'] for cell in cells.values()], color=COLORS[method], linewidth=2, label=method)
        for row in report['rows']:
            if row['method'] == method:
                axes.plot(100 * row['fraction'], row['top1'], 'o', color=COLORS[method], alpha=0.5, markersize=5)
    axes.set_xscale('log')
    ticks = sorted({100 * row['fraction'] for row in report['rows']})
    axes.set_xticks(ticks, [f'{tick:g} %' for tick in ticks])
    axes.set_xticks([], minor=True)
    model, data = (Path(report['settings'][name]).name for name in ('model', 'data_dir'))
    axes.set(xlabel='fraction of the training labels', ylabel='top-1 on the validation split (%)',
             title=f'{model.removeprefix("local-dir:")} on {data}')
    clean_axes(axes)
    axes.legend(frameon=False)
    return figure


def run(settings: TransferSettings) -> dict:
    """Make the missing rows, and return the report."""
    torch.set_num_threads(settings.threads)
    dataset, _ = create_dataset(DataSettings(data_dir=settings.data_dir), 'train')
    labels, names = np.array(read_targets(dataset)), dataset.filenames(absolute=True)
    path = Path(settings.results_file) if settings.results_file else None
    rows, features, whole = [], {}, settings
    if path and (earlier := earlier_results(settings.results_file, 'settings', 'table', 'rows')):
        check_same(settings, earlier['settings'])
        rows = earlier['rows']
        whole = with_earlier_rows(settings, earlier['settings'], rows)
    model, _ = open_model(ModelSettings(model=settings.model, pretrained=True, img_size=settings.img_size))
    architecture = model.pretrained_cfg['architecture']
    report = summarize(whole, rows)
    for fraction, subsets, updates in zip(settings.fractions, settings.subsets, settings.updates, strict=True):
        for subset in range(subsets):
            chosen = draw(labels, fraction, subset)
            folder = root_of(settings) / f'{fraction:g}-{subset}'
            for method in settings.methods:
                if any((row['method'], row['fraction'], row['subset']) == (method, fraction, subset) for row in rows):
                    continue
                if method == 'linear probe':
                    features = features or read_features(settings)
                    (inputs, targets), held_out = features['train'], features['validation']
                    top1 = linear_probe(inputs[chosen], targets[chosen], *held_out, seed=subset)['top1']
                else:
                    data_dir = link_subset(settings, [Path(names[place]) for place in chosen], folder)
                    top1 = train(settings, architecture, data_dir, len(chosen), updates, subset, method == 'fine-tuned')
                rows.append(dict(method=method, fraction=fraction, subset=subset, images=len(chosen), top1=top1))
                report = summarize(whole, rows)
                rows[-1].update((fact, report[fact]) for fact in ('hardware', 'commit', 'date'))
                print(f'{method:12} {fraction:6.1%} of the labels, draw {subset + 1}: top-1 {top1:.2f} %')
                if path:
                    write_json(path, report)
                    write_figure(path.with_suffix('.png'), plot(report))
    for method, cells in report['table'].items():
        for fraction, cell in cells.items():
            deviation = '' if isinstance(cell['deviation'], str) else f' +- {cell["deviation"]:.2f}'
            print(f'{method:12} {float(fraction):6.1%}  {cell["top1"]:6.2f} %{deviation}  ({cell["subsets"]} draws)')
    return report
