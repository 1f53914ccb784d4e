"""Tables of the weights on Tiny-ImageNet-200: released, distilled from a teacher, and trained from labels alone."""
from pathlib import Path

from coatnet_train.report.tables import NOT_MEASURED, epochs_of, read_csv, read_json, table

__all__ = ['distilled', 'previews', 'released', 'weights']

# small models of the zoo and timm models of similar size, to be trained alike on Tiny-ImageNet-200
COMPARED_MODELS = (
    'coatnet_pico_64', 'lightconvnet_pico_64', 'dynamicconvnet_pico_64', 'coatnet_pico_ccdd_64', 'convnextv2_femto',
    'resnet18', 'coatnet_pico_rw_224')


def weights(root: Path) -> str:
    """Table of all released weights, from coatnet_zoo/weights/releases.json."""
    releases = _releases(root)
    if not releases:
        return ('No weights are released yet: models start from random initialisation, or from weights of your own, '
                'and\n`pretrained=True` says so. Accuracy, robustness and biases: not measured.')
    rows = []
    for name, entry in sorted(releases.items()):
        release, metrics, link = entry['release'], entry['release']['metrics'], entry['repo']
        places = ['the package'] * bool(entry['packaged']) + [f'[{link}](https://huggingface.co/{link})'] * bool(link)
        rows.append([
            f'`{name}`', *(NOT_MEASURED if metrics[key] is None else f'{metrics[key]:.2f}' for key in ('top1', 'top5')),
            release['evaluated_on'], release['trained_on'] or 'not stated', _teacher(entry), _duration(release),
            f'{entry["size"] / 1e6:.1f}', ', '.join(places), _license(entry), f'`{entry["sha256"][:12]}`'])
    return table(['name', 'top-1 (%)', 'top-5 (%)', 'measured on', 'trained on', 'teacher', 'training', 'MB',
                  'comes with', 'licence', 'sha256'], rows)


def released(root: Path) -> str:
    """Short table of the released weights, for README."""
    releases = _releases(root)
    if not releases:
        return 'No weights are released yet.'
    rows = []
    for name, entry in sorted(releases.items()):
        metrics, place = entry['release']['metrics'], 'the package' if entry['packaged'] else 'the Hub'
        rows.append([f'`{name}`', NOT_MEASURED if metrics['top1'] is None else f'{metrics["top1"]:.1f}',
                     entry['release']['evaluated_on'], _teacher(entry), place, _license(entry)])
    return table(['weights', 'top-1 (%)', 'measured on', 'teacher', 'from', 'licence'], rows)


def distilled(root: Path) -> str:
    """Table of the teacher and the models distilled from it, from results/tin200_dist."""
    rows = []
    for path in sorted((root / 'results' / 'tin200_dist').glob('*/summary.json'),
                       key=lambda path: (path.parent.name != 'teacher', path.parent.name)):
        run, validation = read_json(path), path.with_name('validation.csv')
        measured = read_csv(validation)[-1] if validation.exists() else {}
        teacher = path.parent.name == 'teacher'
        rows.append([
            f'`{run["model"]}`, the teacher' if teacher else f'`{run["model"]}`', str(run['epochs']),
            f'{run["train_seconds"] / 60:.1f}', *(f'{run[key]:.2f}' for key in ('top1', 'top5')),
            *(f'{float(measured[key]):.2f}' if measured else NOT_MEASURED for key in ('top1', 'top5')),
            run['hardware']])
    if not rows:
        return 'Distillation: not measured.'
    return table(['model', 'epochs', 'minutes', 'top-1 (%), held out of train', 'top-5 (%)', 'top-1 (%), validation',
                  'top-5 (%)', 'hardware'], rows)


def previews(root: Path) -> str:
    """Table of runs on labels alone after the last epoch, from results/tin200_preview and results/tin200."""
    def reached(name: str, file: str, column: str = 'eval_top1') -> str:
        return epochs_of(root, (f'tin200_preview/{name}/{file}', f'tin200_preview/{name}-seed*/{file}'), column)

    folders = {folder.name.split('-seed')[0] for folder in (root / 'results' / 'tin200_preview').glob('*')}
    rows = [[f'`{name}`', reached(name, 'metrics.csv'), reached(name, 'metrics_more.csv'),
             reached(name, 'validation.csv', 'top1'),
             epochs_of(root, (f'tin200/{name}-seed*/metrics.csv',), 'eval_top1')]
            for name in (*COMPARED_MODELS, *sorted(folders - set(COMPARED_MODELS)))]
    return table(['top-1 (%) on 2,000 images held out of train', 'after `tin200_preview`',
                  'then `tin200_preview_more`', 'that, on the validation split', '`tin200`, on a GPU'], rows)


def _releases(root: Path) -> dict:
    return read_json(root / 'coatnet_zoo' / 'weights' / 'releases.json')


def _teacher(entry: dict) -> str:
    return 'yes' if entry['release'].get('teacher') else 'no'  # the card describes it


def _duration(release: dict) -> str:
    hours = release['hours']
    if hours is None:
        return NOT_MEASURED
    return f'{hours:.1f} h on {release["hardware"]}' if hours >= 1 else f'{60 * hours:.0f} min on {release["hardware"]}'


def _license(entry: dict) -> str:
    return entry['release']['license_name'] or entry['pretrained_cfg']['license']
