"""The model card (README.md) of a release folder: a template filled in from its config.json alone."""
import json
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from coatnet_train.models.model_size import model_size
from coatnet_train.runtime.files import write_file
from release_rules import ONNX_FILES, TOLERANCE

__all__ = ['card_data', 'name_of', 'write_card']

TEMPLATE = Path(__file__).with_name('card_template.md')
BLOCK_TYPES = {
    'C': 'MBConv with squeeze-excite', 'T': 'Transformer block with relative attention',
    'L': 'LightConv, a softmax-normalised kernel shared by the channels of a head',
    'D': 'DynamicConv, the same kernel predicted afresh at each position'}
MISSING = 'not measured'


def name_of(config: dict) -> str:
    return f'{config["architecture"]}.{config["pretrained_cfg"]["tag"]}'


def card_data(config: dict) -> ModelCardData:
    """YAML metadata of a card, taken from config.json alone."""
    release, cfg = config['release'], config['pretrained_cfg']
    data_set = release['dataset_id']
    results = [
        EvalResult(
            task_type='image-classification', dataset_name=release['evaluated_on'],
            dataset_type=data_set or re.sub('[^a-z0-9]+', '-', release['evaluated_on'].lower()).strip('-'),
            metric_type='accuracy', metric_name=f'{title} accuracy (%)', metric_value=release['metrics'][metric])
        for title, metric in (('Top-1', 'top1'), ('Top-5', 'top5')) if release['metrics'][metric] is not None]
    _, _, base = (release['started_from'] or '').partition('hf-hub:')
    return ModelCardData(
        library_name='timm', license=cfg['license'], license_name=release['license_name'],
        license_link=release['license_link'], pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'coatnet_zoo'], datasets=[data_set] if data_set else None,
        metrics=['accuracy'], model_name=name_of(config) if results else None, eval_results=results or None,
        base_model=base.partition('@')[0] or None)


def table(rows: dict[str, object]) -> str:
    cells = [(title, str(value).replace('|', '\\|')) for title, value in rows.items()]
    return '\n'.join(['| | |', '| - | - |', *(f'| {title} | {value} |' for title, value in cells)])


def number(value: float | None, digits: int, sign: str = '') -> str:
    return MISSING if value is None else f'{value:{sign}.{digits}f}'


def results_table(release: dict) -> str:
    metrics = release['metrics']
    rows = {
        'top-1 accuracy (%)': number(metrics['top1'], 2), 'top-5 accuracy (%)': number(metrics['top5'], 2),
        'cross-entropy (nats)': number(metrics['loss'], 4),
        'expected calibration error (%)': number(metrics['ece'], 2), 'images': number(metrics['images'], 0)}
    if release['dtype'] != 'float32':
        rows[f'change of top-1 by rounding to {release["dtype"]} (points)'] = number(metrics['top1_change'], 3, '+')
    return table(rows)


def evaluated(release: dict, name: str) -> str:
    """Paragraph on the images behind the figures and their limits; for converted weights, on the author's figures."""
    lines = [f'Measured on: {release["evaluated_on"]}.'] if release['evaluated_on'] else []
    if origin := release['origin']:
        reported = 'Nobody is known to have reported its accuracy.'
        if origin['top1'] is not None:
            reported = f'Top-1 accuracy as its author reports: {origin["top1"]} %.'
        lines += [reported, f'To measure it: `python scripts/eval_imagenet.py --model '
                            f'hf-hub:{release["repo"] or f"OWNER/{name}"} --pretrained --data-dir imagenet`.']
        if origin['chelsea']:
            lines.append('When it was converted, `hub/convert.py --check-chelsea` held it to what its author says of a '
                         'photograph: Egyptian cat {:.5f}, tiger cat {:.5f}.'.format(*origin['chelsea']))
        elif origin['file'].endswith('.h5'):
            lines.append(f'The conversion was not held to an answer of the real file; where that is, '
                         f'`python hub/convert.py {origin["file"]} --check-chelsea` does it.')
    if release['picked_best_epoch']:
        lines.append('These images also picked the best epoch, so the figures are a little too good.')
    if release['dtype'] != 'float32' and release['metrics']['top1_change'] is None and (
            not release['origin'] or release['metrics']['top1'] is not None):
        lines.append(f'The figures are those of the float32 weights, before they were rounded to {release["dtype"]}.')
    return ' '.join(lines)


def origin_table(release: dict) -> str:
    """Table of the origin of converted weights."""
    origin = release['origin']
    return table({
        'data': release['trained_on'] or 'not stated', 'file': origin['file'], 'MD5 of the file': origin['md5'],
        'address': origin['url'] or 'not stated', 'commit of coatnet_zoo': release['commit'] or 'not stated',
        'versions': ', '.join(f'{name} {release[name]}' for name in ('torch', 'timm') if release[name]) or 'not stated',
        'day of the conversion': release['date'] or 'not stated'})


def training_table(release: dict) -> str:
    epochs = MISSING
    if release['epochs'] is not None:
        epochs = f'{release["epochs"]}, of which number {release["best_epoch"]} was the best and is released'
    rows = {
        'data': release['trained_on'] or 'not stated', 'starting from': release['started_from'] or 'not stated',
        'teacher': release['teacher'], 'recipe': release['recipe'] or 'none by name',
        'epochs': epochs, 'hours in all': number(release['hours'], 2), 'hardware': release['hardware'] or MISSING,
        'seed': 'not stated' if release['seed'] is None else release['seed'],
        'commit of coatnet_zoo': release['commit'] or 'not stated',
        'versions': ', '.join(f'{name} {release[name]}' for name in ('torch', 'timm') if release[name]) or 'not stated',
        'day': release['date'] or 'not stated'}
    return table({title: value for title, value in rows.items() if value is not None})


def licences(config: dict) -> str:
    release, license = config['release'], config['pretrained_cfg']['license']
    if license == 'other':
        license = f'[{release["license_name"]}]({release["license_link"]})'
    return (f'Weights: {license}. Training data ({release["trained_on"] or "not stated"}): '
            f'{release["data_license"] or "licence not stated"}; its terms may bind users of the weights too.')


def pip_source(address: str | None) -> str | None:
    """Requirement for pip: a URL of a git repository gets the prefix git+, archives and names stay unchanged."""
    if not address or address.startswith('git+') or '://' not in address:
        return address
    return address if address.endswith(('.whl', '.zip', '.tar.gz')) else f'git+{address}'


def write_card(folder: Path, config: dict | None = None) -> None:
    """Write README.md from the config.json beside it, or from `config`."""
    config = config or json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    release = config['release']
    channels, height, width = config['pretrained_cfg']['input_size']
    parameters, multiply_adds, model = model_size(
        config['architecture'], num_classes=config['num_classes'], in_chans=channels, img_size=(height, width))
    stored, stride = 'The weights are stored in float32.', model.feature_info[-1]['reduction']
    if release['dtype'] != 'float32':
        stored = (f'The weights of convolutions and linear layers are stored in {release["dtype"]}, everything else in '
                  f'float32; timm loads all of them as float32.')
    card = ModelCard.from_template(
        card_data(config), template_path=str(TEMPLATE), name=name_of(config), architecture=config['architecture'],
        repo=release['repo'] or f'OWNER/{name_of(config)}', source=pip_source(release['source']),
        classes=config['num_classes'], descriptions='label_descriptions' in config, layout=model.cfg.layout,
        block_types=', '.join(f'`{name}` {BLOCK_TYPES[name]}' for name in dict.fromkeys(model.cfg.layout)),
        parameters=f'{parameters / 1e6:.2f}', multiply_adds=f'{multiply_adds / 1e9:.2f}', stored=stored,
        size=f'{height} x {width} pixels', channels=channels, height=height, width=width,
        mode='RGB' if channels == 3 else 'L', top=min(5, config['num_classes']), tolerance=f'{100 * TOLERANCE:g} %',
        with_onnx=all((folder / name).exists() for name in ONNX_FILES), results=results_table(release),
        evaluated=evaluated(release, name_of(config)), converted=release['origin'] is not None,
        training=origin_table(release) if release['origin'] else training_table(release),
        command=release['command'] or 'not stated', licences=licences(config),
        sizes=f' Others must be multiples of {stride} and are asked for with `img_size=`; accuracy there: not measured.'
              if 'T' in model.cfg.layout else ' It takes others as they come; accuracy there: not measured.')
    write_file(folder / 'README.md', lambda temporary: temporary.write_text(f'{card.content}\n', encoding='utf-8'))
