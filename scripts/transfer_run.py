"""Fine-tuning on fractions of the labels, beside a linear probe and a random start: the rows of transfer.py."""
import json
import os
import shutil
import statistics
from dataclasses import asdict
from pathlib import Path

import extract_features
import extraction
import finetune
import numpy as np
import torch
from data_settings import DataSettings
from features import linear_probe
from files import write_figure, write_json
from matplotlib.figure import Figure
from model_settings import ModelSettings
from open_model import open_model
from pictures import open_pictures, targets_of
from processes import choose_device
from provenance import provenance
from settings import SettingsError, earlier_results, flag
from timm.models import safe_model_name
from transfer_settings import WAYS, Settings

import coatnet_zoo


def check_same(settings: Settings, earlier: dict) -> None:
    """Refuse to go on with rows that were made under other settings."""
    now = json.loads(json.dumps(asdict(settings)))
    changed = [f'{flag(name)} was {earlier[name]!r} and is {now[name]!r}'
               for name in ('data_dir', 'model', 'img_size', 'batch_size', 'lr', 'scale', 'hflip', 'amp')
               if earlier[name] != now[name]]
    before, after = (dict(zip(kept['shares'], kept['updates'], strict=True)) for kept in (earlier, now))
    changed += [f'--updates was {before[share]} and is {after[share]} for share {share:g}'
                for share in sorted(before.keys() & after.keys()) if before[share] != after[share]]
    if changed:
        raise SettingsError(f'--results-file {settings.results_file} holds rows made under other settings: '
                            f'{"; ".join(changed)}. Give another file, and another --output.')


def draw(labels: np.ndarray, share: float, subset: int) -> np.ndarray:
    """Places of a share of the pictures of each class, at least two of them; a draw follows from its number alone."""
    rng = np.random.default_rng(subset)
    chosen = []
    for label in np.unique(labels):
        places = rng.permutation(np.flatnonzero(labels == label))
        chosen.append(places[:max(2, round(share * len(places)))])
    return np.sort(np.concatenate(chosen))


def link_subset(settings: Settings, files: list[Path], folder: Path) -> Path:
    """A data folder of links: these training pictures, and the whole of the validation split."""
    shutil.rmtree(folder, ignore_errors=True)
    train, _ = open_pictures(DataSettings(data_dir=settings.data_dir), 'train')
    for file in files:
        # not the parent: images of Tiny-ImageNet lie in SYNSET/images/
        link = folder / 'train' / file.relative_to(train.reader.root).parts[0] / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(file, link.parent))
    validation, _ = open_pictures(DataSettings(data_dir=settings.data_dir), 'validation')
    (folder / 'val').symlink_to(os.path.relpath(validation.reader.root, folder))
    return folder


def root_of(settings: Settings) -> Path:
    """Where the runs and features of these weights on this data go."""
    return Path(settings.output) / f'{Path(settings.data_dir).name}-{safe_model_name(settings.model)}'


def train(settings: Settings, architecture: str, data_dir: Path, count: int, updates: int, seed: int,
          pretrained: bool) -> float:
    """Top-1 (%) after the last epoch of a run, which goes on where an earlier call was stopped."""
    epochs = -(-updates // max(1, count // settings.batch_size))
    ours = architecture in coatnet_zoo.list_models()
    summary = finetune.main(finetune.Settings(
        data_dir=str(data_dir), model=settings.model, pretrained=pretrained,
        img_size=settings.img_size, epochs=epochs, val_interval=epochs, batch_size=min(settings.batch_size, count),
        lr=settings.lr, warmup_epochs=epochs / 10, scale=settings.scale, hflip=settings.hflip, color_jitter=0.0,
        amp=settings.amp, model_kwargs=('conv_norm_momentum=0.1',) if ours else (), device=settings.device,
        workers=settings.workers, seed=seed, output=str(data_dir.parent), resume='auto',
        experiment=f'{data_dir.name}-{"fine-tuned" if pretrained else "random"}'))
    return summary['top1']


def read_features(settings: Settings) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Features (N, C) and labels (N,) of both splits, before the classifier; extracted once."""
    options = extract_features.Settings(
        data_dir=settings.data_dir, model=settings.model, pretrained=True, img_size=settings.img_size, amp=settings.amp,
        device=settings.device, workers=settings.workers, output=str(root_of(settings) / 'features'))
    found = {}
    for split in ('train', 'validation'):
        options = extract_features.Settings(**{**vars(options), 'split': split})
        extract_features.main(options)
        tensors = extraction.read_split(options, extraction.open_split(options, split))
        found[split] = tuple(tensor.numpy() for tensor in tensors)
    return found


def summarize(settings: Settings, rows: list[dict]) -> dict:
    table = {}
    for way in settings.ways:
        for share in settings.shares:
            top1 = [row['top1'] for row in rows if (row['way'], row['share']) == (way, share)]
            if top1:
                deviation = statistics.stdev(top1) if len(top1) > 1 else 'not measured'
                table.setdefault(way, {})[str(share)] = dict(
                    top1=statistics.mean(top1), deviation=deviation, subsets=len(top1))
    kept = {name: value for name, value in asdict(settings).items() if name not in ('output', 'results_file')}
    return dict(settings=kept, table=table, rows=rows, **provenance(str(choose_device(settings.device))))


def plot(report: dict) -> Figure:
    """Top-1 over the share of labels; a dot a draw, a line through the means."""
    figure = Figure(figsize=(7, 4.4), layout='constrained')
    axes = figure.subplots()
    for way, cells in report['table'].items():
        shares = [100 * float(share) for share in cells]
        axes.plot(shares, [cell['top1'] for cell in cells.values()], color=WAYS[way], linewidth=2, label=way)
        for row in report['rows']:
            if row['way'] == way:
                axes.plot(100 * row['share'], row['top1'], 'o', color=WAYS[way], alpha=0.5, markersize=5)
    axes.set_xscale('log')
    ticks = sorted({100 * row['share'] for row in report['rows']})
    axes.set_xticks(ticks, [f'{tick:g} %' for tick in ticks])
    axes.set_xticks([], minor=True)
    model, data = (Path(report['settings'][name]).name for name in ('model', 'data_dir'))
    axes.set(xlabel='share of the training labels', ylabel='top-1 on the validation split (%)',
             title=f'{model.removeprefix("local-dir:")} on {data}')
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(axis='y', color='#e5e7eb')
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    return figure


def run(settings: Settings) -> dict:
    """Make the rows that are missing, and return the report."""
    torch.set_num_threads(settings.threads)
    dataset, _ = open_pictures(DataSettings(data_dir=settings.data_dir), 'train')
    labels, names = np.array(targets_of(dataset)), dataset.filenames(absolute=True)
    path = Path(settings.results_file) if settings.results_file else None
    rows, features = [], {}
    if path and (earlier := earlier_results(settings.results_file, 'settings', 'table', 'rows')):
        check_same(settings, earlier['settings'])
        rows = earlier['rows']
    model, _ = open_model(ModelSettings(model=settings.model, pretrained=True, img_size=settings.img_size))
    architecture = model.pretrained_cfg['architecture']
    report = summarize(settings, rows)
    for share, subsets, updates in zip(settings.shares, settings.subsets, settings.updates, strict=True):
        for subset in range(subsets):
            chosen = draw(labels, share, subset)
            folder = root_of(settings) / f'{share:g}-{subset}'
            for way in settings.ways:
                if any((row['way'], row['share'], row['subset']) == (way, share, subset) for row in rows):
                    continue
                if way == 'linear probe':
                    features = features or read_features(settings)
                    (inputs, targets), held_out = features['train'], features['validation']
                    top1 = linear_probe(inputs[chosen], targets[chosen], *held_out, seed=subset)['top1']
                else:
                    data_dir = link_subset(settings, [Path(names[place]) for place in chosen], folder)
                    top1 = train(settings, architecture, data_dir, len(chosen), updates, subset, way == 'fine-tuned')
                rows.append(dict(way=way, share=share, subset=subset, pictures=len(chosen), top1=top1))
                report = summarize(settings, rows)
                rows[-1].update((fact, report[fact]) for fact in ('hardware', 'commit', 'date'))
                print(f'{way:12} {share:6.1%} of the labels, draw {subset + 1}: top-1 {top1:.2f} %')
                if path:
                    write_json(path, report)
                    write_figure(path.with_suffix('.png'), plot(report))
    for way, cells in report['table'].items():
        for share, cell in cells.items():
            deviation = '' if isinstance(cell['deviation'], str) else f' +- {cell["deviation"]:.2f}'
            print(f'{way:12} {float(share):6.1%}  {cell["top1"]:6.2f} %{deviation}  ({cell["subsets"]} draws)')
    return report
