"""Image sources of scripts/finetune.py, and unreadable images."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from coatnet_train.data.config import DataSettings
from coatnet_train.data.dataset import IndexedImageDataset, create_dataset, read_image, read_targets
from coatnet_train.data.loader import EpochSampler
from coatnet_train.runtime.cli import ConfigError
from support.constants import CLASSES
from support.finetune_runs import assert_same_run, read_checkpoint, read_metrics, run, write_shards
from support.images import write_images


def spoil(path: Path) -> Path:
    """Truncate an image file."""
    path.write_bytes(path.read_bytes()[:100])
    return path


def test_unreadable_images_are_named_skipped_and_counted_once(settings, tmp_path, capsys):
    data = write_images(tmp_path / 'own')
    bad = [spoil(data / 'train' / 'red' / '3.png'), spoil(data / 'val' / 'blue' / '0.png')]
    run_dir = run(settings, data_dir=str(data), max_bad_images=0.1)
    printed = capsys.readouterr()
    summary = json.loads((run_dir / 'summary.json').read_text())
    assert summary['unreadable'] == list(map(str, bad))
    for path in bad:
        assert (printed.out + printed.err).count(f'unreadable, skipped: {path}') == 1

    (data / 'val' / 'blue' / '0.png').unlink()  # unreadable held-out images do not count in the metrics
    clean = run(settings, data_dir=str(data), max_bad_images=0.1, experiment='clean')
    for with_bad, without in zip(read_metrics(run_dir), read_metrics(clean), strict=True):
        assert with_bad == pytest.approx(without)


def test_too_many_unreadable_images_stop_the_run(settings, tmp_path):
    data = write_images(tmp_path / 'own')
    path = spoil(data / 'train' / 'red' / '3.png')
    with pytest.raises(ConfigError, match=r'--max-bad-images 0.001 allows 0 .* 36 images.*red/3.png.*number 1'):
        run(settings, data_dir=str(data))
    (data / 'train' / 'red' / '3.png').write_bytes(b'')
    with pytest.raises(ConfigError, match=str(path)):
        run(settings, data_dir=str(data), resume='auto')


@pytest.mark.parametrize(
    'content', [b'', b'no image', b'\x89PNG\r\n\x1a\n' + bytes(50), b'GIF89a', b'\xff\xd8\xff\xe0junk'])
def test_every_kind_of_broken_file_is_found(tmp_path, content):
    data = write_images(tmp_path / 'own', train=2, val=1)
    (data / 'train' / 'green' / '0.png').write_bytes(content)
    dataset, _ = create_dataset(DataSettings(data_dir=str(data)), 'train')
    index = next(i for i in range(6) if dataset.filename(i) == 'green/0.png')
    image, label, bad = IndexedImageDataset(dataset, pil_to_tensor)[0, index]
    assert (label, bad) == (-1, index) and image.shape == (3, 1, 1)
    image, label, bad = IndexedImageDataset(dataset, pil_to_tensor, substitute=True)[0, index]
    assert bad == index and label == read_targets(dataset)[(index + 1) % 6] and image.shape == (3, 36, 40)


def test_order_follows_from_seed_and_epoch_and_goes_on_in_the_middle():
    sampler = EpochSampler(50, seed=3, shuffle=True)
    sampler.epoch = 2
    whole = list(sampler)
    assert sorted(index for _, index in whole) == list(range(50)) and {epoch for epoch, _ in whole} == {2}
    sampler.start = 20
    assert list(sampler) == whole[20:] and len(sampler) == 30
    sampler.start, sampler.epoch = 0, 3
    assert [index for _, index in sampler] != [index for _, index in whole]
    assert list(EpochSampler(50, seed=4, shuffle=True)) != list(EpochSampler(50, seed=3, shuffle=True))


def test_balanced_classes_are_drawn_equally_often():
    labels = [0] * 900 + [1] * 90 + [2] * 10
    drawn = torch.tensor([labels[index] for _, index in EpochSampler(1000, 0, True, labels)]).bincount()
    assert drawn.min() > 270 and drawn.max() < 400


def test_balanced_run_sees_another_order(settings, tmp_path):
    data = write_images(tmp_path / 'own')
    for index in range(2, 12):
        (data / 'train' / 'red' / f'{index}.png').unlink()
    plain, balanced = (run(settings, data_dir=str(data), experiment=str(on), class_balanced=on, epochs=1)
                       for on in (False, True))
    assert read_metrics(plain) != read_metrics(balanced)


def test_class_map_sets_the_order_of_the_labels(settings, tmp_path):
    names = tmp_path / 'classes.txt'
    names.write_text('red\nblue\ngreen\n')
    run_dir = run(settings, class_map=str(names), epochs=1)
    assert json.loads((run_dir / 'config.json').read_text())['label_names'] == ['red', 'blue', 'green']


def test_hub_data_sets_train_whole_and_streamed(settings, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_DATASETS_OFFLINE', '1')
    options = dict(data_dir=str(tmp_path / 'cache'), epochs=1, val_split='validation')
    folder = write_images(tmp_path / 'own')
    (folder / 'val').rename(folder / 'validation')
    whole = run(settings, dataset=f'hfds/{folder}', experiment='whole', **options)
    assert json.loads((whole / 'config.json').read_text())['label_names'] == list(CLASSES)
    assert read_checkpoint(whole)['resume_signature']['train_images'] == 36
    streamed = run(settings, dataset=f'hfids/{folder}', experiment='streamed', train_num_samples=36, val_num_samples=15,
                   **options)
    assert json.loads((streamed / 'config.json').read_text())['label_names'] == list(CLASSES)
    assert len(read_metrics(streamed)) == 1
    # an error of the reader would be the traceback of a worker
    for schema in ('hfds', 'hfids'):
        with pytest.raises(ConfigError, match=r'--input-key photo.*name the columns|cannot be read.*photo'):
            run(settings, dataset=f'{schema}/{folder}', input_key='photo', train_num_samples=36, **options)
        with pytest.raises(ConfigError, match=r'--target-key breed.*name the columns|cannot be read.*breed'):
            run(settings, dataset=f'{schema}/{folder}', target_key='breed', train_num_samples=36, num_classes=3,
                **options)
    with pytest.raises(ConfigError, match=r'--workers must be at most the shards .*, 1, got 2'):
        run(settings, dataset=f'hfids/{folder}', train_num_samples=36, val_num_samples=15, workers=2, **options)


def test_shards_train_the_same_twice(settings, tmp_path):
    folder = write_shards(tmp_path / 'shards')
    options = dict(data_dir=str(folder), dataset='wds/', num_classes=3, workers=1)
    first, second = (run(settings, experiment=name, **options) for name in ('first', 'second'))
    assert_same_run(first, second)
    assert json.loads((first / 'config.json').read_text())['label_names'] == ['0', '1', '2']
    with pytest.raises(ConfigError, match='--num-classes is needed'):
        run(settings, data_dir=str(folder), dataset='wds/', experiment='third')
    for changes, sentence in (
            (dict(num_classes=2), r'--num-classes: labels must be from 0 to 1, found 0 to 2'),
            (dict(target_key='breed'), r'--target-key breed.*name the columns'),
            (dict(workers=3), r'--workers must be at most the shards .*, 2, got 3')):
        with pytest.raises(ConfigError, match=sentence):
            run(settings, **options | changes | dict(experiment='-'.join(changes)))


def test_grey_shards_are_read_as_grey(settings, tmp_path):
    folder = write_shards(tmp_path / 'shards')
    run_dir = run(settings, data_dir=str(folder), dataset='wds/', num_classes=3, in_chans=1, epochs=1)
    assert json.loads((run_dir / 'config.json').read_text())['pretrained_cfg']['input_size'][0] == 1


@pytest.mark.parametrize('extension', ['webp', 'bmp', 'tiff'])
def test_folders_hold_more_than_jpeg_and_png(tmp_path, extension):
    data = write_images(tmp_path / 'own', train=2, val=1)
    for path in list((data / 'train').rglob('*.png')):
        Image.open(path).save(path.with_suffix(f'.{extension}'))
        path.unlink()
    dataset, found = create_dataset(DataSettings(data_dir=str(data)), 'train')
    assert len(dataset) == 6 and found == sorted(CLASSES)
    assert read_image(dataset, 0)[0].size == (40, 36)


def test_names_that_differ_by_case_have_one_order_and_formulas_stay_names(settings, tmp_path):
    names = ('a', 'A', 'b', 'B', '$1', '$5')
    data = write_images(tmp_path / 'own', classes=names, train=2, val=1)
    dataset, found = create_dataset(DataSettings(data_dir=str(data)), 'train')
    assert found == ['$1', '$5', 'A', 'a', 'B', 'b']
    assert all(Path(dataset.filename(i)).parent.name == found[label] for i, label in enumerate(read_targets(dataset)))
    run_dir = run(settings, data_dir=str(data), epochs=1)
    assert json.loads((run_dir / 'config.json').read_text())['label_names'] == found


def test_sixteen_bits_of_grey_are_scaled(tmp_path):
    data = write_images(tmp_path / 'own', train=2, val=1)
    values = (np.arange(36 * 40, dtype=np.uint16) * 45).reshape(36, 40)
    Image.fromarray(values).save(data / 'train' / 'blue' / '0.png')
    dataset, _ = create_dataset(DataSettings(data_dir=str(data)), 'train')
    image, _ = read_image(dataset, 0)
    assert np.array_equal(np.asarray(image)[..., 0], values >> 8)


def test_images_beside_the_classes_are_refused(settings, tmp_path):
    data = write_images(tmp_path / 'own', train=2, val=1)
    for split in ('train', 'val'):
        (data / split / 'stray.png').write_bytes((data / 'train' / 'red' / '0.png').read_bytes())
    with pytest.raises(ConfigError, match='in the folder of its class'):
        run(settings, data_dir=str(data))


def test_unreadable_images_are_remembered_over_a_resume(settings, tmp_path):
    data = write_images(tmp_path / 'own')
    path = spoil(data / 'train' / 'red' / '3.png')
    run_dir = run(settings, data_dir=str(data), max_bad_images=0.1)
    run(settings, data_dir=str(data), max_bad_images=0.2, resume='auto')
    assert json.loads((run_dir / 'summary.json').read_text())['unreadable'] == [str(path)]
