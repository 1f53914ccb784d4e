"""From a run of scripts/finetune.py to a folder that can be published: weights, config, card and proof.

    python hub/export.py output/coatnet_pico_64 --name coatnet_pico_64.tin200 --trained-on Tiny-ImageNet-200
    python hub/export.py output/coatnet_pico_64 --name coatnet_pico_64.tin200 --dtype float16 --data-dir tiny-imagenet
    python hub/export.py output/coatnet_pico_64 --name coatnet_pico_64.tin200 --with-onnx

OUTPUT gets README.md, config.json, model.safetensors, golden.safetensors (images and what the model says of them) and
curves.png, with --with-onnx also model.onnx and model.pt2, and takes the place of an earlier export as a whole. The
figures of the card come from the run: from RUN_DIR/evaluation.json if eval_imagenet.py --results-file left one there,
else from the split that picked the best epoch, which the card then says. What is released is the registered name with
other classes, channels or image size; a run whose model computes anything else (another act, other depths) is refused.
Then: python hub/verify.py OUTPUT.
"""
import json
import math
import re
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

sys.path.append(str(Path(__file__).parents[1] / 'scripts'))

import eval_imagenet
import timm
import torch
from card import write_card
from files import write_file, write_json
from imagenet_labels import describe_synsets
from onnx_files import onnx_answers, write_onnx_files
from release_folder import (
    DTYPES,
    FILES,
    ONNX_FILES,
    RELEASE_FIELDS,
    TOLERANCE,
    bare_model,
    check_license,
    largest_gap,
    own_cfg,
    split_name,
    stored_dtypes,
)
from run_folder import write_config, write_weights
from safetensors import SafetensorError
from safetensors.torch import load_file
from settings import SettingsError, end_with_sentence, flag, one_line
from torch import nn
from torch.nn.functional import interpolate

from coatnet_zoo.releases import RELEASES, sha256_of

RUN_FILES = ('config.json', 'args.json', 'summary.json', 'curves.png', 'model.safetensors')
DATA_KEYS = ('input_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std')


@dataclass(frozen=True, kw_only=True)
class Settings:
    run_dir: tyro.conf.Positional[Path]  # Run folder of finetune.py.
    name: str  # NAME.TAG: a name of the zoo, and a tag for data and recipe, such as coatnet_pico_64.tin200.
    output: Path | None = None  # Folder to make (output/hub/NAME.TAG if not given).
    dtype: str = 'float32'  # float16 or bfloat16 round the weights of convolutions and linear layers.
    data_dir: str = ''  # Held-out pictures, as in eval_imagenet.py, to measure what --dtype costs.
    workers: int = 4  # Processes that read them.
    with_onnx: bool = False  # Also write model.onnx and model.pt2.
    license: str | None = None  # Identifier of the Hub (if not given: of the weights it started from, else apache-2.0).
    license_name: str | None = None  # Its name, for --license other.
    license_link: str | None = None  # Its address, for --license other.
    trained_on: str | None = None  # Name of the training data (that of --dataset in the run if not given).
    data_license: str | None = None  # Licence or terms of the training data.
    dataset_id: str | None = None  # The training data's OWNER/NAME on the Hub (that of hfds/ in the run if not given).
    evaluated_on: str | None = None  # Name of the pictures that the figures are of (their folder if not given).
    repo: str | None = None  # OWNER/NAME that the card's example loads.


def read_json(path: Path) -> dict | list:
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise SettingsError(f'RUN_DIR: {path} cannot be read: {one_line(error)}; give a run folder of '
                            f'finetune.py.') from error


def check_values(settings: Settings) -> None:
    """Refuse single values that cannot work, before anything is read."""
    if settings.dtype not in DTYPES:
        raise SettingsError(f'--dtype must be one of {", ".join(DTYPES)}, got {settings.dtype!r}.')
    if settings.data_dir and settings.dtype == 'float32':
        raise SettingsError('--data-dir measures what --dtype costs, which is float32 here; give --dtype, or put '
                            'figures into the card by eval_imagenet.py --results-file RUN_DIR/evaluation.json.')
    check_license(settings.license or 'apache-2.0', settings.license_name, settings.license_link)
    for name in ('trained_on', 'data_license', 'evaluated_on', 'license_name', 'license_link'):
        value = getattr(settings, name)
        if value is not None and not (value.strip() and value.isprintable()):  # it stands in a table of the card
            raise SettingsError(f'{flag(name)} must be one line of text, got {value!r}; give that, or leave it out.')
    for name in ('repo', 'dataset_id'):
        value = getattr(settings, name)
        if value is not None and not re.fullmatch(r'[\w.-]+/[\w.-]+', value):
            raise SettingsError(f'{flag(name)} must be OWNER/NAME on the Hub, got {value!r}.')


def check_replaceable(output: Path) -> None:
    """Refuse an output that is anything but an earlier export."""
    if not output.exists() and not output.is_symlink():
        return
    names = {path.name for path in output.iterdir()} if output.is_dir() and not output.is_symlink() else {''}
    try:
        ours = 'release' in json.loads((output / 'config.json').read_text(encoding='utf-8'))
    except (OSError, ValueError):
        ours = False
    if names and not (ours and names <= {*FILES, *ONNX_FILES}):
        raise SettingsError(f'--output {output} must not exist, be empty, or be an earlier export, which it is not; '
                            f'name another folder.')


def read_run(settings: Settings) -> dict:
    """The run's config.json, once the run is complete and of the architecture that --name names."""
    if missing := [name for name in RUN_FILES if not (settings.run_dir / name).is_file()]:
        raise SettingsError(f'RUN_DIR {settings.run_dir} must be a finished run of finetune.py, but lacks '
                            f'{", ".join(missing)}; give one, or finish it with --resume auto.')
    config = read_json(settings.run_dir / 'config.json')
    architecture, _ = split_name(settings.name)
    if architecture != config['architecture']:
        raise SettingsError(f'--name {settings.name} must name the architecture of RUN_DIR {settings.run_dir}, which '
                            f'is {config["architecture"]}; give {config["architecture"]}.TAG.')
    if len(set(config.get('label_names') or ())) != config['num_classes']:
        raise SettingsError(f'RUN_DIR {settings.run_dir}: config.json must name each of its {config["num_classes"]} '
                            f'classes once under label_names; fine-tune with a data set that names them.')
    return config


def open_weights(settings: Settings, config: dict) -> nn.Module:
    """The registered model with the run's weights, strictly loaded and finite."""
    path = settings.run_dir / 'model.safetensors'
    changed = {name: value for name, value in config.get('model_args', {}).items()
               if name not in ('in_chans', 'img_size', 'num_classes', 'global_pool')}
    model = bare_model(config)
    try:
        state = load_file(path)
        model.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise SettingsError(f'RUN_DIR: {path} is not a checkpoint of {config["architecture"]} with {changed or "no"} '
                            f'changes: {one_line(error)[:300]}; register what the run trained under a name of its '
                            f'own.') from error
    if broken := [name for name, value in state.items() if not value.isfinite().all()]:
        raise SettingsError(f'RUN_DIR: {path} must be finite throughout, but {", ".join(broken[:5])} is not; train '
                            f'again with a lower --lr.')
    return model


def golden_images(config: dict) -> torch.Tensor:
    """Two smooth pictures and two of noise (4, C, H, W), normalised: the same at every export."""
    cfg = config['pretrained_cfg']
    channels, *size = cfg['input_size']
    generator = torch.Generator().manual_seed(0)
    smooth = interpolate(torch.rand(2, channels, 5, 5, generator=generator), size, mode='bicubic').clamp(0, 1)
    pictures = torch.cat([smooth, torch.rand(2, channels, *size, generator=generator)])
    mean, std = (torch.tensor(cfg[name]).view(-1, 1, 1) for name in ('mean', 'std'))
    return (pictures - mean) / std


def check_architecture(model: nn.Module, run_dir: Path, config: dict) -> None:
    """Refuse a run whose model computes something else than the registered one with the same weights."""
    images = golden_images(config)
    with torch.no_grad():
        gap = largest_gap(model(images), timm.create_model(f'local-dir:{run_dir}', pretrained=True).eval()(images))
    if gap > TOLERANCE:
        raise SettingsError(f'RUN_DIR {run_dir} trained another model than {config["architecture"]}: with '
                            f'{config["model_args"]} its logits differ by {gap:.1e} of the largest; register that '
                            f'under a name of its own.')


def rounded(model: nn.Module, dtype: str) -> dict[str, torch.Tensor]:
    """The state dict as it is stored; refuses values that 16 bits cannot hold."""
    dtypes = stored_dtypes(model, dtype)
    state = {name: value.to(dtypes[name]) for name, value in model.state_dict().items()}
    if broken := [name for name, value in state.items() if not value.isfinite().all()]:
        raise SettingsError(f'--dtype {dtype} cannot hold the values of {", ".join(broken[:5])}; use bfloat16.')
    return state


def without_folders(text: str) -> str:
    """Absolute paths cut to their last name: a card is public, the folders of a machine are not."""
    return re.sub(r'(^|[\s=\'":])(~|/)[^\s\'"]*/(?=[^\s/])', r'\1', text)


def same_data(evaluated: str, trained: str) -> bool:
    """Whether two names are likely of the same data, as a whole or by its validation folder, wherever it lies."""
    return Path(trained).name in Path(evaluated).parts[-2:]


def held_out_figures(settings: Settings, args: dict, summary: dict, config: dict) -> tuple[dict, str, bool]:
    """(metrics, what they were measured on, whether this also picked the best epoch) as the run's files tell."""
    path, source = settings.run_dir / 'evaluation.json', args['dataset'] or args['data_dir']
    if not path.exists():
        metrics = {name: summary[name] for name in ('top1', 'top5', 'loss')}
        return metrics, f'{without_folders(source)}, {args["val_split"]}', True
    rows, run_name = read_json(path), settings.run_dir.resolve().name
    rows = [row for row in (rows if isinstance(rows, list) else [rows])
            if not row['checkpoint'] and Path(row['model'].removeprefix('local-dir:')).name == run_name]
    if len(rows) != 1:
        raise SettingsError(f'RUN_DIR: {path} must have one row for local-dir:{settings.run_dir}, but has '
                            f'{len(rows)}; evaluate again with --results-file {path}, or remove it.')
    row, cfg = rows[0], config['pretrained_cfg']
    other = [f'{name} {row[name]}' for name, value in (
        ('img_size', cfg['input_size'][-1]), ('crop_pct', cfg['crop_pct']), ('interpolation', cfg['interpolation']),
        ('valid_labels', 'all'), ('real_labels', '')) if row[name] != value]
    if other:
        raise SettingsError(f'RUN_DIR: {path} must be of the model as it is released, but has {", ".join(other)}; '
                            f'evaluate again without these flags, or remove it.')
    metrics = {name: row[name] for name in ('top1', 'top5', 'loss', 'ece', 'images')}
    picked = same_data(row['data'], source) and '--split' not in row['provenance']['command']
    return metrics, without_folders(row['data']), picked


def earlier_run(args: dict) -> dict | None:
    """The summary beside the checkpoint that the run started from, if a run of finetune.py left it there."""
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
    """Licence of the released weights that a run started from, at first or second hand; apache-2.0 from random weights.

    Raises SettingsError where nothing tells what the weights it started from were.
    """
    model, checkpoint = args.get('model', ''), args.get('initial_checkpoint') or ''
    if not checkpoint and not args.get('pretrained'):
        return {'license': 'apache-2.0'}
    if checkpoint or model.startswith('local-dir:'):
        file = Path(checkpoint or Path(model.removeprefix('local-dir:'), 'model.safetensors'))
        if (earlier := file.with_name('args.json')).is_file():
            return license_of_start(read_json(earlier))
        digest = sha256_of(file) if file.is_file() else None
        name = next((known for known, entry in RELEASES.items() if entry['sha256'] == digest), None)
    else:
        file = model
        name = next((known for known, entry in RELEASES.items() if model in (
            known, known.partition('.')[0], f'hf-hub:{entry["repo"]}')), None)
    if name is None:
        raise SettingsError(f'--license must be named: the run started from {file}, which is neither of a run folder '
                            f'nor a release of this package, so that its licence is not known.')
    release = RELEASES[name]['release']
    return {'license': RELEASES[name]['pretrained_cfg']['license'],
            'license_name': release['license_name'], 'license_link': release['license_link']}


def describe_release(settings: Settings, config: dict) -> dict:
    """What config.json says under 'release'; None is what the run's files and the settings do not tell."""
    args, summary = (read_json(settings.run_dir / name) for name in ('args.json', 'summary.json'))
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
            'teacher': without_folders(args['teacher']) or None, 'date': summary['date'], 'torch': summary['torch'],
            'timm': summary['timm'], 'dtype': settings.dtype, 'repo': settings.repo,
            'license_name': settings.license_name, 'license_link': settings.license_link}
    except (KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f'RUN_DIR {settings.run_dir}: args.json, summary.json or evaluation.json is not as '
                            f'finetune.py and eval_imagenet.py write it: {type(error).__name__} {error}.') from error
    if unfit := [name for name, value in release['metrics'].items() if value is not None and not math.isfinite(value)]:
        raise SettingsError(f'RUN_DIR {settings.run_dir}: figures must be finite, but {", ".join(unfit)} is not.')
    return {name: release[name] for name in RELEASE_FIELDS}


def write_release_config(folder: Path, settings: Settings, model: nn.Module, config: dict, release: dict) -> None:
    """Write config.json: timm's, of this model alone, without the model_args that break transformers' TimmWrapper."""
    architecture, tag = split_name(settings.name)
    path = folder / 'config.json'
    write_config(path, model, config['label_names'], {key: config['pretrained_cfg'][key] for key in DATA_KEYS})
    written = json.loads(path.read_text(encoding='utf-8'))
    # num_classes stands at the top already, and TimmWrapper passes it on from there
    written['model_args'] = {key: written['model_args'][key] for key in ('img_size', 'in_chans')}
    paper = {'paper_ids': paper_ids} if (paper_ids := own_cfg(architecture).get('paper_ids')) else {}
    words = describe_synsets(config['label_names'])
    if len(words) == config['num_classes']:
        written['label_descriptions'] = words
    written['pretrained_cfg'] |= {'tag': tag, 'license': settings.license, **paper}
    write_json(path, written | {'release': release})


def write_golden(folder: Path, config: dict) -> None:
    """Write images and the logits of a fresh model that timm loads from the folder."""
    images = golden_images(config)
    with torch.no_grad():
        logits = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(images)
    write_weights(folder / 'golden.safetensors', {'input': images, 'logits': logits})


def measure_rounding(settings: Settings, folder: Path, release: dict) -> None:
    """Evaluate the run and the rounded weights on the same pictures; the figures of the release become the latter's."""
    before, after = eval_imagenet.main(eval_imagenet.Settings(
        data_dir=settings.data_dir, model=(f'local-dir:{settings.run_dir}', f'local-dir:{folder}'),
        workers=settings.workers, valid_labels='all'))
    args = read_json(settings.run_dir / 'args.json')
    release['metrics'] = {name: after[name] for name in ('top1', 'top5', 'loss', 'ece', 'images')} | {
        'top1_change': round(after['top1'] - before['top1'], 4)}
    release['evaluated_on'] = settings.evaluated_on or without_folders(settings.data_dir)
    release['picked_best_epoch'] = same_data(settings.data_dir, args['dataset'] or args['data_dir'])
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    write_json(folder / 'config.json', config | {'release': release})


def swap(temporary: Path, output: Path) -> None:
    """Give the finished folder its name, in the place of an earlier one."""
    old = output.with_name(f'.{output.name}.old')
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    try:
        temporary.rename(output)
    except BaseException:
        if old.exists():
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def main(settings: Settings) -> Path:
    """Export as `settings` say and return the folder."""
    check_values(settings)
    config = read_run(settings)
    output = settings.output or Path('output/hub') / settings.name
    check_replaceable(output)
    if settings.license is None:
        settings = replace(settings, **license_of_start(read_json(settings.run_dir / 'args.json')))
    release = describe_release(settings, config)
    model = open_weights(settings, config)
    check_architecture(model, settings.run_dir, config)
    state = rounded(model, settings.dtype)
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
        write_file(temporary / 'curves.png', lambda path: shutil.copyfile(settings.run_dir / 'curves.png', path))
        if settings.with_onnx:
            golden = load_file(temporary / 'golden.safetensors')
            model = timm.create_model(f'local-dir:{temporary}', pretrained=True).eval()
            write_onnx_files(temporary, model, golden['input'])
            gaps = {reader: largest_gap(logits, golden['logits'])
                    for reader, logits in onnx_answers(temporary, golden['input']).items()}
            if max(gaps.values()) > TOLERANCE:
                raise SettingsError(f'--with-onnx: the logits differ from the golden ones by {gaps} of the largest, '
                                    f'{TOLERANCE:g} allowed; leave it out.')
            print('model.onnx, model.pt2: golden logits to '
                  + ', '.join(f'{gap:.1e} ({reader})' for reader, gap in gaps.items()))
        write_card(temporary)
        print(f'README.md: top-1 {release["metrics"]["top1"]} % on {release["evaluated_on"]}')
        swap(temporary, output)
    except OSError as error:
        raise SettingsError(f'--output {output} cannot be written: {one_line(error)}; choose another.') from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f'{output}: check it with python hub/verify.py {output}')
    return output


if __name__ == '__main__':
    end_with_sentence('export.py', lambda: main(tyro.cli(Settings, description=__doc__)))
