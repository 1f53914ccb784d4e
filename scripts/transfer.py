"""How much pretrained weights help on few labels: fine-tuned, and frozen under a linear probe, beside a random start.

    python scripts/transfer.py --data-dir imagenette --model coatnet_pico_64.tin200_preview \\
        --results-file results/transfer_imagenette_cpu.json

Each share of the training split is drawn several times, evenly over the classes; all three ways see the same pictures,
and fine-tuning and random start take the same number of updates under the same settings, more where there are more
pictures. Nothing is chosen on the validation split: what counts is the last epoch. Rows that the results file holds are
not made again; one that was made under other settings is refused.
"""
import json
import os
import shutil
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import extract_features
import finetune
import numpy as np
import torch
import tyro
from data_settings import DataSettings
from features import linear_probe
from matplotlib.figure import Figure
from model_settings import ModelSettings
from open_model import open_model
from pictures import open_pictures, targets_of
from processes import choose_device
from provenance import provenance
from run_folder import write_figure, write_json
from settings import SettingsError, earlier_results, end_with_sentence, flag, one_line
from timm.models import model_entrypoint, safe_model_name

import coatnet_zoo

WAYS = {'fine-tuned': '#2563eb', 'linear probe': '#d97706', 'random start': '#9ca3af'}


@dataclass(frozen=True, kw_only=True)
class Settings:
    data_dir: str  # Folder with train/ and val/, a sub-folder a class in each.
    model: str  # With weights: NAME.TAG of a release, hf-hub:OWNER/NAME or local-dir:FOLDER.
    img_size: int | None = None  # Height and width in pixels (the model's own if not given).
    shares: tuple[float, ...] = (0.01, 0.1, 1.0)  # Of the training split.
    subsets: tuple[int, ...] = (5, 5, 1)  # Draws of each share.
    ways: tuple[str, ...] = tuple(WAYS)  # Of these.
    updates: tuple[int, ...] = (300, 1000, 3000)  # Of the weights, for each share; rounded up to whole epochs.
    batch_size: int = 32  # Pictures per update.
    lr: float = 5e-4  # Highest learning rate of AdamW; cosine decay after a tenth of warm-up.
    scale: tuple[float, float] = (0.35, 1.0)  # Area of the random crop, as a share of the picture.
    hflip: float = 0.5  # Probability of a horizontal flip.
    amp: bool = False  # bfloat16 autocast.
    device: str = 'auto'  # cpu or cuda; auto takes CUDA where there is one.
    workers: int = 1  # Processes that read pictures.
    threads: int = 1  # CPU threads.
    output: str = 'output/transfer'  # Folder of runs and features.
    results_file: str = ''  # JSON to write after every row; the plot takes its name.


def check_values(settings: Settings) -> None:
    """Refuse single values that cannot work, before anything is read."""
    for name in ('batch_size', 'threads'):
        if getattr(settings, name) < 1:
            raise SettingsError(f'{flag(name)} must be at least 1, got {getattr(settings, name)}.')
    if not settings.shares or not all(0 < share <= 1 for share in settings.shares):
        raise SettingsError(f'--shares must be above 0 and at most 1, got {settings.shares}.')
    for name in ('subsets', 'updates'):
        values = getattr(settings, name)
        if len(values) != len(settings.shares) or min(values) < 1:
            raise SettingsError(f'{flag(name)} must give a number of at least 1 for each of --shares, got {values} for '
                                f'{settings.shares}.')
    if not settings.ways:
        raise SettingsError(f'--ways must name at least one of {", ".join(WAYS)}, got none.')
    if unknown := sorted(set(settings.ways) - set(WAYS)):
        raise SettingsError(f'--ways must be of {", ".join(WAYS)}, got {unknown[0]!r}.')
    try:
        Path(settings.output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f'--output {settings.output} cannot be made: {one_line(error)}; choose another.') from error


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
    for file in files:
        link = folder / 'train' / file.parent.name / file.name
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
    ours = model_entrypoint(architecture).__module__.startswith(f'{coatnet_zoo.__name__}.')
    summary = finetune.main(finetune.Settings(
        data_dir=str(data_dir), model=settings.model if pretrained else architecture, pretrained=pretrained,
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
        tensors = extract_features.read_split(options, extract_features.open_split(options, split))
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


def main(settings: Settings) -> dict:
    """Make the rows that are missing, and return the report."""
    check_values(settings)
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


if __name__ == '__main__':
    end_with_sentence('transfer.py', lambda: main(tyro.cli(Settings, description=__doc__)))
