"""Tables of the architectures: all models by size, and a recommended model for each task."""
from pathlib import Path

from coatnet_train.report.tables import read_json, table

__all__ = ['choices', 'count_models', 'models']

# Rows of the table in README: a task, and the model recommended for it.
CHOICES = (
    ('ImageNet-1k weights, at 224 px', 'coatnet_0_kecam'),
    ('images of 32 to 96 px', 'coatnet_pico_64'),
    ('the same without attention, for any image size', 'lightconvnet_pico_64'),
    ('the same with kernels predicted at each position', 'dynamicconvnet_pico_64'),
    ('a CPU or a small GPU, at 224 px', 'coatnet_pico'),
    ("the paper's models, up to `coatnet_5`", 'coatnet_0'),
    ('large images: no attention, cost linear in pixels', 'coatnet_0_ccdd'),
    ('detection and segmentation at sizes that vary', 'lightconvnet_tiny'),
)
DOWNLOADED = ('coatnet_0_kecam',)  # names whose weights come from their publisher (coatnet_zoo/kecam.py)


def count_models() -> dict:
    """Count parameters and multiply-adds of every model of the zoo at its default image size, on the meta device."""
    import coatnet_zoo  # imported here, because it takes seconds and only --count needs it
    from coatnet_train.models.model_size import model_size
    from coatnet_train.runtime.provenance import provenance

    counts = {}
    for name in coatnet_zoo.list_models():
        parameters, multiply_adds, model = model_size(name, num_classes=1000)  # also where released weights have others
        counts[name] = dict(
            layout=model.cfg.layout, parameters=parameters, multiply_adds=multiply_adds, img_size=model.img_size[0],
            strides=[level['reduction'] for level in model.feature_info])
    return dict(models=counts, **provenance('cpu'))


def models(root: Path) -> str:
    """Table of all models by number of parameters."""
    counts = read_json(root / 'results' / 'models.json')['models']
    rows = [
        [f'`{name}`', row['layout'], f'{row["parameters"] / 1e6:.2f}', f'{row["multiply_adds"] / 1e9:.2f}',
         str(row['img_size']), ' '.join(map(str, row['strides']))]
        for name, row in sorted(counts.items(), key=lambda item: item[1]['parameters'])]
    header = ['name', 'layout', 'parameters (M)', 'multiply-adds (G)', 'image size', 'strides of the features']
    return table(header, rows) + '\n\nEach with 1000 classes.'


def choices(root: Path) -> str:
    """Table of the recommended model for each task, with its size and whether weights are released."""
    counts = read_json(root / 'results' / 'models.json')['models']
    released = {name.partition('.')[0] for name in read_json(root / 'coatnet_zoo' / 'weights' / 'releases.json')}
    rows = [
        [task, f'`{name}`', counts[name]['layout'], f'{counts[name]["parameters"] / 1e6:.1f}',
         f'{counts[name]["multiply_adds"] / 1e9:.1f}',
         'yes' if name in released else 'downloaded' if name in DOWNLOADED else 'no']
        for task, name in CHOICES]
    return table(['for', 'name', 'layout', 'parameters (M)', 'multiply-adds (G)', 'weights'], rows)
