"""Export of a run as a release folder: read the run, check and round its weights, and write each file."""
import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import interpolate

from coatnet_train.evaluation.config import EvaluationSettings
from coatnet_train.evaluation.imagenet import evaluate
from coatnet_train.evaluation.imagenet_labels import describe_synsets
from coatnet_train.runtime.cli import ConfigError, one_line
from coatnet_train.runtime.files import replace_dir, write_file, write_json
from coatnet_train.training.run_dir import write_config, write_weights
from coatnet_zoo import kecam
from coatnet_zoo.releases import RELEASES, sha256_of
from export_settings import ExportSettings
from model_card import write_card
from onnx_files import onnx_answers, write_onnx_files
from origin import describe_converted, read_origin
from release_folder import bare_model, largest_gap, own_cfg, split_name, stored_dtypes
from release_rules import FILES, ONNX_FILES, RELEASE_FIELDS, TOLERANCE

RUN_FILES = ('config.json', 'args.json', 'summary.json', 'curves.png', 'model.safetensors')
SPLITS = ('train', 'val', 'validation', 'test')  # folder names that need their parent's name
DATA_KEYS = ('input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std')


def read_json(path: Path) -> dict | list:
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise ConfigError(f'RUN_DIR: {path} cannot be read: {one_line(error)}; give a run folder of '
                          f'finetune.py.') from error


def check_replaceable(output: Path) -> None:
    """Raise ConfigError unless the output is missing, empty or an earlier export."""
    if not output.exists() and not output.is_symlink():
        return
    names = {path.name for path in output.iterdir()} if output.is_dir() and not output.is_symlink() else {''}
    try:
        ours = 'release' in json.loads((output / 'config.json').read_text(encoding='utf-8'))
    except (OSError, ValueError):
        ours = False
    if names and not (ours and names <= {*FILES, *ONNX_FILES}):
        raise ConfigError(f'--output {output} must not exist, be empty, or be an earlier export, which it is not; '
                          f'name another folder.')


def read_run(settings: ExportSettings) -> dict:
    """Read the run's config.json; raises ConfigError unless the run is complete and of the architecture of --name."""
    origin = read_origin(settings.run_dir)
    wanted = ('config.json', 'model.safetensors') if origin else RUN_FILES
    published = kecam.WEIGHTS.get(settings.name)
    if published and (origin or {}).get('md5') != published.md5:
        raise ConfigError(f'--name {settings.name} is that of published weights, of MD5 {published.md5}, which RUN_DIR '
                          f'{settings.run_dir} does not come from; give another tag.')
    if missing := [name for name in wanted if not (settings.run_dir / name).is_file()]:
        raise ConfigError(f'RUN_DIR {settings.run_dir} must be a finished run of finetune.py or made by '
                          f'convert.py, but lacks {", ".join(missing)}; give one, or finish it with --resume auto.')
    config = read_json(settings.run_dir / 'config.json')
    architecture, _ = split_name(settings.name)
    if architecture != config['architecture']:
        raise ConfigError(f'--name {settings.name} must name the architecture of RUN_DIR {settings.run_dir}, which '
                          f'is {config["architecture"]}; give {config["architecture"]}.TAG.')
    if len(set(config.get('label_names') or ())) != config['num_classes']:
        raise ConfigError(f'RUN_DIR {settings.run_dir}: config.json must name each of its {config["num_classes"]} '
                          f'classes once under label_names; fine-tune with a data set that names them.')
    return config


def open_weights(settings: ExportSettings, config: dict) -> nn.Module:
    """The registered model with the run's weights; raises ConfigError unless they load strictly and are finite."""
    path = settings.run_dir / 'model.safetensors'
    changed = {name: value for name, value in config.get('model_args', {}).items()
               if name not in ('in_chans', 'img_size', 'num_classes', 'global_pool')}
    model = bare_model(config)
    try:
        state = load_file(path)
        model.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ConfigError(f'RUN_DIR: {path} is not a checkpoint of {config["architecture"]} with {changed or "no"} '
                          f'changes: {one_line(error)[:300]}; register what the run trained under a name of its '
                          f'own.') from error
    if broken := [name for name, value in state.items() if not value.isfinite().all()]:
        raise ConfigError(f'RUN_DIR: {path} must be finite throughout, but {", ".join(broken[:5])} is not; train '
                          f'again with a lower --lr.')
    return model


def golden_images(config: dict) -> torch.Tensor:
    """Two smooth and two noise images (4, C, H, W), normalised, the same for every export."""
    cfg = config['pretrained_cfg']
    channels, *size = cfg['input_size']
    generator = torch.Generator().manual_seed(0)
    smooth = interpolate(torch.rand(2, channels, 5, 5, generator=generator), size, mode='bicubic').clamp(0, 1)
    images = torch.cat([smooth, torch.rand(2, channels, *size, generator=generator)])
    mean, std = (torch.tensor(cfg[name]).view(-1, 1, 1) for name in ('mean', 'std'))
    return (images - mean) / std


def check_architecture(model: nn.Module, run_dir: Path, config: dict) -> None:
    """Raise ConfigError if the run's model and the registered one with the same weights have different logits."""
    images = golden_images(config)
    with torch.no_grad():
        gap = largest_gap(model(images), timm.create_model(f'local-dir:{run_dir}', pretrained=True).eval()(images))
    if gap > TOLERANCE:
        raise ConfigError(f'RUN_DIR {run_dir} trained another model than {config["architecture"]}: with '
                          f'{config["model_args"]} its logits differ by {gap:.1e} of the largest; register that '
                          f'under a name of its own.')


def rounded(model: nn.Module, dtype: str) -> dict[str, torch.Tensor]:
    """The state dict in the stored dtypes; raises ConfigError for values that 16 bits cannot hold."""
    dtypes = stored_dtypes(model, dtype)
    state = {name: value.to(dtypes[name]) for name, value in model.state_dict().items()}
    if broken := [name for name, value in state.items() if not value.isfinite().all()]:
        raise ConfigError(f'--dtype {dtype} cannot hold the values of {", ".join(broken[:5])}; use bfloat16.')
    return state


def without_folders(text: str) -> str:
    """Cut paths that begin with /, ~, ./ or ../ to their last name, so that a public card shows no local folders."""
    return re.sub(r'(^|[\s=\'":])(~|\.{0,2}/)([^\s\'"]*/)?(?=[^\s/])', r'\1', text)


def same_data(evaluated: str, trained: str) -> bool:
    """Whether two paths likely are the same data set, or one is a folder in it; their location is ignored."""
    return Path(os.path.abspath(trained)).name in Path(os.path.abspath(evaluated)).parts[-2:]


def data_name(data: str, settings: ExportSettings, args: dict, split: str) -> str:
    """Name of a data set for the card: the training data with the split, or a folder name without its parents.

    Args:
        data: --dataset or --data-dir of the evaluation.
        settings: Settings of export.py; --trained-on is the name of the training data.
        args: Settings of the run.
        split: Split of the training data that was read, if `data` does not end in it.
    """
    trained = args['dataset'] or args['data_dir']
    named, folder = Path(os.path.abspath(trained)).name, Path(os.path.abspath(data))
    if same_data(data, trained):
        known = settings.trained_on or args['dataset'].partition('/')[2] or named
        return f'{known}, {split if folder.name == named else folder.name}'
    if re.match('(hfi?ds|tfds|torch|wds)/', data):
        return data
    return f'{folder.parent.name}, {folder.name}' if folder.name in SPLITS else folder.name


def held_out_figures(settings: ExportSettings, args: dict, summary: dict, config: dict) -> tuple[dict, str, bool]:
    """Figures of a run: (metrics, name of the images, whether these images also picked the best epoch).

    Raises ConfigError for an evaluation.json that is not of this run, or not of the model as it is released.
    """
    path, trained = settings.run_dir / 'evaluation.json', args['dataset'] or args['data_dir']
    if not path.exists():
        metrics = {name: summary[name] for name in ('top1', 'top5', 'loss')}
        return metrics, data_name(trained, settings, args, args['val_split']), True
    rows, run_name = read_json(path), settings.run_dir.resolve().name
    rows = [row for row in (rows if isinstance(rows, list) else [rows])
            if not row['checkpoint'] and Path(row['model'].removeprefix('local-dir:')).name == run_name]
    if len(rows) != 1:
        raise ConfigError(f'RUN_DIR: {path} must have one row for local-dir:{settings.run_dir}, but has '
                          f'{len(rows)}; evaluate again with --results-file {path}, or remove it.')
    row, cfg = rows[0], config['pretrained_cfg']
    other = [f'{name} {row[name]}' for name, value in (
        ('img_size', cfg['input_size'][-1]), ('crop_pct', cfg['crop_pct']), ('interpolation', cfg['interpolation']),
        ('valid_labels', 'all'), ('real_labels', '')) if row[name] != value]
    if other:
        raise ConfigError(f'RUN_DIR: {path} must be of the model as it is released, but has {", ".join(other)}; '
                          f'evaluate again without these flags, or remove it.')
    metrics = {name: row[name] for name in ('top1', 'top5', 'loss', 'ece', 'images')}
    split = re.search(r'--split[ =](\S+)', row['provenance']['command'])
    name = data_name(row['data'], settings, args, split[1] if split else 'validation')
    return metrics, name, same_data(row['data'], trained) and not split


def earlier_run(args: dict) -> dict | None:
    """Summary of the run that made the --initial-checkpoint of this run; None if there is no such summary."""
    path = Path(args['initial_checkpoint']).with_name('summary.json') if args['initial_checkpoint'] else None
    return read_json(path) if path and path.is_file() else None


def starting_point(args: dict) -> str:
    if earlier := earlier_run(args):
        return (f'the weights that `{without_folders(earlier["command"])}` left: {earlier["epochs"]} epochs, '
                f'{earlier["train_seconds"] / 3600:.2f} hours, seed {earlier["seed"]}, commit {earlier["commit"]}')
    if args['initial_checkpoint']:
        return f'weights of {Path(args["initial_checkpoint"]).name}'
    return f'pretrained weights of {without_folders(args["model"])}' if args['pretrained'] else 'random weights'


def license_of_start(args: dict) -> dict[str, str]:
    """Licence of the weights that a run started from, directly or through earlier runs; apache-2.0 from random weights.

    Raises ConfigError if the origin of those weights is unknown.
    """
    model, checkpoint = args.get('model', ''), args.get('initial_checkpoint') or ''
    if not checkpoint and not args.get('pretrained'):
        return {'license': 'apache-2.0'}
    if checkpoint or model.startswith('local-dir:'):
        file = Path(checkpoint or Path(model.removeprefix('local-dir:'), 'model.safetensors'))
        if origin := read_origin(file.parent):
            return license_of_origin(origin)
        if (earlier := file.with_name('args.json')).is_file():
            return license_of_start(read_json(earlier))
        digest = sha256_of(file) if file.is_file() else None
        name = next((known for known, entry in RELEASES.items() if entry['sha256'] == digest), None)
    else:
        file = model
        name = next((known for known, entry in RELEASES.items() if model in (
            known, known.partition('.')[0], f'hf-hub:{entry["repo"]}')), None)
        if name is None and any(model in (known, known.partition('.')[0]) for known in kecam.WEIGHTS):
            return kecam.LICENSE
    if name is None:
        raise ConfigError(f'--license must be named: the run started from {file}, which is neither of a run folder '
                          f'nor a release of this package, so that its licence is not known.')
    release = RELEASES[name]['release']
    return {'license': RELEASES[name]['pretrained_cfg']['license'],
            'license_name': release['license_name'], 'license_link': release['license_link']}


def license_of_origin(origin: dict) -> dict[str, str]:
    """Licence that convert.py recorded."""
    return {name: origin[name] for name in kecam.LICENSE}


def data_of_origin(origin: dict) -> dict[str, str]:
    """Substitute for the training data fields of a run's args.json, for converted weights."""
    return {'dataset': '', 'data_dir': origin['trained_on'] or 'not stated'}


def describe_origin_release(settings: ExportSettings, origin: dict, config: dict) -> dict:
    """`describe_release` of converted weights: figures are in evaluation.json, or nobody has measured them here."""
    if settings.teacher:
        raise ConfigError(f'--teacher describes the teacher of a distilled run, but RUN_DIR {settings.run_dir} was '
                          f'made by convert.py; leave it out.')
    metrics: dict[str, float | None] = dict.fromkeys(('top1', 'top5', 'loss', 'ece', 'images', 'top1_change'))
    evaluated_on = None
    if (settings.run_dir / 'evaluation.json').exists():
        found, evaluated_on, _ = held_out_figures(settings, data_of_origin(origin), {}, config)
        metrics |= {name: value if value is None else round(value, 4) for name, value in found.items()}
    said = {name: getattr(settings, name) for name in (
        'trained_on', 'data_license', 'dataset_id', 'dtype', 'repo', 'source', 'license_name', 'license_link')}
    return describe_converted(
        origin, metrics=metrics, evaluated_on=metrics['top1'] and (settings.evaluated_on or evaluated_on), **said)


def describe_release(settings: ExportSettings, config: dict) -> dict:
    """Content of config.json under 'release'; fields unknown from the run's files and the settings are None."""
    if origin := read_origin(settings.run_dir):
        return describe_origin_release(settings, origin, config)
    args, summary = (read_json(settings.run_dir / name) for name in ('args.json', 'summary.json'))
    teacher = args.get('teacher') or summary.get('teacher') or ''  # the summary names that of --teacher-outputs
    if settings.teacher and not teacher:
        raise ConfigError(f'--teacher describes the teacher of a distilled run, but RUN_DIR {settings.run_dir} had '
                          f'none; leave it out.')
    try:
        seconds = summary['train_seconds'] + (earlier_run(args) or {'train_seconds': 0})['train_seconds']
        found, evaluated_on, picked = held_out_figures(settings, args, summary, config)
        metrics = {name: None for name in ('top1', 'top5', 'loss', 'ece', 'images', 'top1_change')} | found
        hub_id = re.fullmatch(r'hfi?ds/([\w.-]+/[\w.-]+)', args['dataset'])
        release = {
            'metrics': {name: value if value is None else round(value, 4) for name, value in metrics.items()},
            'evaluated_on': settings.evaluated_on or evaluated_on, 'picked_best_epoch': picked,
            'trained_on': settings.trained_on or args['dataset'].partition('/')[2] or None,
            'dataset_id': settings.dataset_id or (hub_id[1] if hub_id else None), 'data_license': settings.data_license,
            'recipe': args['recipe'] or None, 'command': without_folders(summary['command']),
            'hardware': f'{summary["processes"]} x ' * (summary['processes'] > 1) + summary['hardware'],
            'hours': round(seconds / 3600, 4), 'seed': summary['seed'], 'commit': summary['commit'],
            'epochs': summary['epochs'], 'best_epoch': summary['best_epoch'], 'started_from': starting_point(args),
            'teacher': settings.teacher or without_folders(teacher) or None, 'date': summary['date'],
            'torch': summary['torch'], 'timm': summary['timm'], 'dtype': settings.dtype, 'repo': settings.repo,
            'source': settings.source, 'license_name': settings.license_name, 'license_link': settings.license_link,
            'origin': None}
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f'RUN_DIR {settings.run_dir}: args.json, summary.json or evaluation.json is not as '
                          f'finetune.py and eval_imagenet.py write it: {type(error).__name__} {error}.') from error
    if unfit := [name for name, value in release['metrics'].items() if value is not None and not math.isfinite(value)]:
        raise ConfigError(f'RUN_DIR {settings.run_dir}: figures must be finite, but {", ".join(unfit)} is not.')
    return {name: release[name] for name in RELEASE_FIELDS}


def write_release_config(folder: Path, settings: ExportSettings, model: nn.Module, config: dict, release: dict) -> None:
    """Write timm's config.json and `release`, without the model_args that break transformers' TimmWrapper."""
    architecture, tag = split_name(settings.name)
    path = folder / 'config.json'
    write_config(path, model, config['label_names'], {key: config['pretrained_cfg'][key] for key in DATA_KEYS})
    written = json.loads(path.read_text(encoding='utf-8'))
    # num_classes is already at the top level, from where TimmWrapper passes it on
    written['model_args'] = {key: written['model_args'][key] for key in ('img_size', 'in_chans')}
    paper = {'paper_ids': paper_ids} if (paper_ids := own_cfg(architecture).get('paper_ids')) else {}
    words = describe_synsets(config['label_names'])
    if len(words) == config['num_classes']:
        written['label_descriptions'] = words
    written['pretrained_cfg'] |= {'tag': tag, 'license': settings.license, **paper}
    write_json(path, written | {'release': release})


def write_golden(folder: Path, config: dict) -> None:
    """Write golden.safetensors: images, and the logits of the model that timm loads from the folder."""
    images = golden_images(config)
    with torch.no_grad():
        logits = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(images)
    write_weights(folder / 'golden.safetensors', {'input': images, 'logits': logits})


def measure_rounding(settings: ExportSettings, folder: Path, release: dict) -> None:
    """Evaluate the run and the rounded weights on the same images; the release gets the figures of the rounded ones."""
    before, after = evaluate(EvaluationSettings(
        data_dir=settings.data_dir, model=(f'local-dir:{settings.run_dir}', f'local-dir:{folder}'),
        workers=settings.workers, valid_labels='all'))
    origin = read_origin(settings.run_dir)
    args = data_of_origin(origin) if origin else read_json(settings.run_dir / 'args.json')
    release['metrics'] = {name: after[name] for name in ('top1', 'top5', 'loss', 'ece', 'images')} | {
        'top1_change': round(after['top1'] - before['top1'], 4)}
    release['evaluated_on'] = settings.evaluated_on or data_name(settings.data_dir, settings, args, 'validation')
    release['picked_best_epoch'] = not origin and same_data(settings.data_dir, args['dataset'] or args['data_dir'])
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    write_json(folder / 'config.json', config | {'release': release})


def run(settings: ExportSettings) -> Path:
    """Export a run and return the folder."""
    config = read_run(settings)
    output = settings.output or Path('output/hub') / settings.name
    check_replaceable(output)
    if settings.license is None:
        origin = read_origin(settings.run_dir)
        settings = replace(settings, **(
            license_of_origin(origin) if origin else license_of_start(read_json(settings.run_dir / 'args.json'))))
    release = describe_release(settings, config)
    model = open_weights(settings, config)
    check_architecture(model, settings.run_dir, config)
    state = rounded(model, settings.dtype)
    if settings.dtype != 'float32' and all(torch.equal(value.float(), model.state_dict()[name].float())
                                           for name, value in state.items()):
        release['metrics']['top1_change'] = 0.  # the weights of the run were rounded before
    print(f'weights: {len(state)} tensors of {settings.run_dir}, all finite, those of {config["architecture"]}')

    temporary = output.with_name(f'.{output.name}.tmp')
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write_weights(temporary / 'model.safetensors', state)
        size = (temporary / 'model.safetensors').stat().st_size
        print(f'model.safetensors: {size / 1e6:.1f} MB, {settings.dtype}')
        write_release_config(temporary, settings, model, config, release)
        print(f'config.json: tag {settings.name.partition(".")[2]}, licence {settings.license}, '
              f'{config["num_classes"]} classes, input {" x ".join(map(str, config["pretrained_cfg"]["input_size"]))}')
        write_golden(temporary, config)
        print('golden.safetensors: 4 images and their logits, of the file as timm loads it')
        if settings.data_dir:
            measure_rounding(settings, temporary, release)
            print(f'{settings.dtype}: top-1 changes by {release["metrics"]["top1_change"]:+.3f} points')
        if not release['origin']:
            write_file(temporary / 'curves.png', lambda path: shutil.copyfile(settings.run_dir / 'curves.png', path))
        if settings.with_onnx:
            golden = load_file(temporary / 'golden.safetensors')
            model = timm.create_model(f'local-dir:{temporary}', pretrained=True).eval()
            write_onnx_files(temporary, model, golden['input'])
            gaps = {reader: largest_gap(logits, golden['logits'])
                    for reader, logits in onnx_answers(temporary, golden['input']).items()}
            if max(gaps.values()) > TOLERANCE:
                raise ConfigError(f'--with-onnx: the logits differ from the golden ones by {gaps} of the largest, '
                                  f'{TOLERANCE:g} allowed; leave it out.')
            print('model.onnx, model.pt2: golden logits to '
                  + ', '.join(f'{gap:.1e} ({reader})' for reader, gap in gaps.items()))
        write_card(temporary)
        print(f'README.md: top-1 {release["metrics"]["top1"]} % on {release["evaluated_on"]}'
              if release['evaluated_on'] else 'README.md: accuracy not measured')
        replace_dir(temporary, output)
    except OSError as error:
        raise ConfigError(f'--output {output} cannot be written: {one_line(error)}; choose another.') from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f'{output}: check it with python hub/verify.py {output}')
    return output
