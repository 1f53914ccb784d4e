"""coatnet_train/data/image_folder.py: images and classes of a folder, as every script reads them."""
import shutil
import sys
import unicodedata
from pathlib import Path

import pytest
from PIL import Image, features
from timm.data.readers.reader_image_folder import ReaderImageFolder

import hold_out
from coatnet_train.data.config import DataSettings
from coatnet_train.data.dataset import create_dataset, read_image, read_targets
from coatnet_train.data.folder_dataset import FolderReader
from coatnet_train.data.image_folder import find_images, list_images
from coatnet_train.runtime.cli import ConfigError
from coatnet_train.training.config import FinetuneSettings
from coatnet_train.training.loaders import create_datasets
from support.images import write_images


def add(path: Path, colour: str = 'red') -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (8, 6), colour).save(path)
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    return write_images(tmp_path / 'own', train=3, val=2)


def open_both(data: Path):
    return create_datasets(FinetuneSettings(data_dir=str(data), model='test_resnet'))


def test_ordinary_folders_have_the_order_and_labels_of_timm(tmp_path):
    root = tmp_path / 'folder 2'
    for name in ('a', 'a b', 'a-1', 'b10', 'b9', 'Cat', 'dog', 'émile', '10', '9'):
        for file in ('10.jpg', '9.jpg', 'x 1.PNG', 'X2.jpeg', 'ä.png'):
            add(root / name / file)
    ours, theirs = FolderReader(root), ReaderImageFolder(str(root))
    assert ours.samples == theirs.samples and len(ours.samples) == 50
    assert ours.class_to_idx == theirs.class_to_idx


def test_images_deeper_than_their_class_are_refused_and_one_is_named(data, tmp_path):
    for name in ('red', 'blue', 'green'):
        for split in ('train', 'val'):
            for view in ('front', 'side'):
                add(data / split / name / view / '1.jpg')
    message = r'train: blue/front/1\.jpg lies deeper than CLASS/IMAGE; move it into blue'
    with pytest.raises(ConfigError, match='--data-dir .*' + message):
        create_dataset(DataSettings(data_dir=str(data)), 'train')
    with pytest.raises(ConfigError, match='TRAIN_DIR .*' + message):
        hold_out.main(hold_out.HoldOutSettings(data / 'train', tmp_path / 'split', per_class=1))
    shutil.rmtree(data / 'train' / 'blue')
    (data / 'train' / 'blue').mkdir()
    with pytest.raises(ConfigError, match=r'green/front/1\.jpg lies deeper'):
        list_images(data / 'train')


def test_hidden_folders_are_skipped_and_loops_not_followed(data, tmp_path, capsys):
    for hidden in ('.ipynb_checkpoints/0.png', 'red/.ipynb_checkpoints/0.png', '.git/0.png', '__MACOSX/red/0.png',
                   'red/._0.png', 'red/.hidden.jpg'):
        add(data / 'train' / hidden)
    (data / 'train' / 'red' / 'loop').symlink_to('..')
    (data / 'train' / 'red' / 'larger').symlink_to('../..')
    (data / 'train' / 'itself').symlink_to('.')
    (data / 'train' / 'red' / 'self').symlink_to('self')
    dataset, names = create_dataset(DataSettings(data_dir=str(data)), 'train')
    assert names == ['blue', 'green', 'red'] and len(dataset) == 9
    assert 'links to a folder that holds them (itself)' in capsys.readouterr().err
    counts = hold_out.main(hold_out.HoldOutSettings(data / 'train', tmp_path / 'split', per_class=1))
    assert counts == {'train': 6, 'validation': 3}
    images, errors = find_images([data / 'train'])
    assert len(images) == 9 and not errors


@pytest.mark.parametrize('dataset, package', [('wds/', 'webdataset'), ('hfds/a/b', 'datasets')])
def test_a_missing_package_names_its_extra(data, monkeypatch, dataset, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs the package {package}; .* pip install '\.\[data\]'"):
        create_dataset(DataSettings(data_dir=str(data), dataset=dataset), 'train')


def test_hold_out_is_named_where_there_is_something_to_hold_out(data):
    shutil.move(data / 'val', data.parent / 'two words')
    with pytest.raises(ConfigError, match=r'scripts/hold_out\.py .*train NEW_FOLDER'):
        create_dataset(DataSettings(data_dir=str(data)), 'validation')
    shutil.move(data / 'train', data / 'val')
    with pytest.raises(ConfigError, match='has no folder train') as error:
        create_dataset(DataSettings(data_dir=str(data)), 'train')
    assert 'scripts/hold_out' not in str(error.value)
    with pytest.raises(ConfigError, match=r"scripts/hold_out\.py '.*two words' NEW_FOLDER"):
        create_dataset(DataSettings(data_dir=str(data.parent / 'two words')), 'train')


def test_links_to_classes_and_images_are_followed(data, tmp_path):
    (data / 'train' / 'pink').symlink_to(data / 'train' / 'red')
    (tmp_path / 'linked').mkdir()
    (tmp_path / 'linked' / 'train').symlink_to(data / 'train')
    counts = hold_out.main(hold_out.HoldOutSettings(tmp_path / 'linked' / 'train', tmp_path / 'split', per_class=1))
    assert counts == {'train': 8, 'validation': 4}
    _, _, names = open_both(tmp_path / 'split')
    assert names == ['blue', 'green', 'pink', 'red']


@pytest.mark.parametrize('suffix', [
    'jfif', 'JFIF', 'gif', 'ppm', 'tga', 'mpo', 'jp2',
    pytest.param('avif', marks=pytest.mark.skipif(not features.check('avif'), reason='this Pillow has no AVIF'))])
def test_whatever_pillow_reads_is_read(data, suffix):
    for split in ('train', 'val'):
        for path in list((data / split / 'red').iterdir()):
            Image.open(path).save(path.with_suffix(f'.{suffix}'))
            path.unlink()
    train, _, names = open_both(data)
    assert names == ['blue', 'green', 'red'] and len(train) == 9
    assert read_image(train, read_targets(train).index(2))[0].size == (40, 36)
    assert len(find_images([data / 'train'])[0]) == 9


def test_what_is_left_out_is_named_with_counts_once(data, capsys):
    for number in range(2):
        (data / 'train' / 'red' / f'{number}.HEIC').write_bytes(b'')
        (data / 'train' / 'owl').mkdir(exist_ok=True)
        (data / 'train' / 'owl' / f'{number}.heic').write_bytes(b'')
    (data / 'train' / 'red' / 'clip.mpg').write_bytes(b'')
    (data / 'train' / 'readme').write_text('text')
    (data / 'train' / 'red' / 'Thumbs.db').write_bytes(b'')
    for _ in range(2):
        create_dataset(DataSettings(data_dir=str(data)), 'train')
    assert capsys.readouterr().err == (
        f'note: left out of {data}/train: 4 .heic (such as owl/0.heic), 1 .mpg (such as red/clip.mpg), '
        f'1 without a suffix (such as readme), 1 class folder without images (owl)\n')
    find_images([data / 'train'])
    assert capsys.readouterr().err == f'note: left out of {data}/train: 4 .heic, 1 .mpg, 1 without a suffix\n'
    create_dataset(DataSettings(data_dir=str(data)), 'validation')
    assert capsys.readouterr().err == ''


def test_only_what_would_be_read_is_held_out(data, tmp_path):
    for name in ('Thumbs.db', '.DS_Store', 'zz.txt', 'desktop.ini'):
        (data / 'train' / 'red' / name).write_bytes(b'no image')
    (data / 'train' / '.git').mkdir()
    (data / 'train' / '.git' / 'HEAD').write_bytes(b'')
    hold_out.main(hold_out.HoldOutSettings(data / 'train', tmp_path / 'split', per_class=1))
    held = sorted(str(path.relative_to(tmp_path / 'split')) for path in (tmp_path / 'split').rglob('*.*'))
    assert held == sorted([f'train/{name}/{number}.png' for name in ('blue', 'green', 'red') for number in (0, 1)] +
                          [f'validation/{name}/2.png' for name in ('blue', 'green', 'red')])
    with pytest.raises(ConfigError, match=r'TRAIN_DIR .*nowhere is not a folder'):
        hold_out.main(hold_out.HoldOutSettings(tmp_path / 'nowhere', tmp_path / 'other', per_class=1))


# Error messages


def test_a_stray_image_in_one_split_is_named(data):
    add(data / 'train' / 'stray.png')
    with pytest.raises(ConfigError, match=r'stray\.png lies beside folders of classes; move it, every image must'):
        open_both(data)


def test_images_in_no_class_folder_are_refused(data):
    shutil.rmtree(data / 'val')
    add(data / 'val' / '0.png')
    with pytest.raises(ConfigError, match='every image must lie in the folder of its class, but those of validation'):
        open_both(data)


def test_two_spellings_of_one_name_are_said_to_look_alike(data):
    one, two = (unicodedata.normalize(form, 'café') for form in ('NFC', 'NFD'))
    for split, name in (('train', one), ('val', two)):
        shutil.copytree(data / split / 'red', data / split / name)
    with pytest.raises(ConfigError, match=r"(?s)are in one only.*'cafe\\u0301' and 'caf\\xe9' look alike") as refused:
        open_both(data)
    assert 'rename one' in str(refused.value)
    shutil.copytree(data / 'train' / 'red', data / 'train' / two)
    with pytest.raises(ConfigError, match=r"class folders 'cafe\\u0301' and 'caf\\xe9' look alike"):
        open_both(data)


def test_a_missing_validation_split_names_the_command_that_makes_one(data, tmp_path):
    shutil.rmtree(data / 'val')
    with pytest.raises(ConfigError, match=rf'--data-dir {data} has no folder validation or .*hold_out\.py '
                                            rf'{data}/train NEW_FOLDER --per-class 10'):
        open_both(data)
    with pytest.raises(ConfigError, match=rf'no folder train or training; .*hold_out\.py {data}/train NEW_FOLDER'):
        open_both(data / 'train')
    hold_out.main(hold_out.HoldOutSettings(data / 'train', tmp_path / 'new', per_class=1))
    assert len(open_both(tmp_path / 'new')[1]) == 3
    (tmp_path / 'bare').mkdir()
    with pytest.raises(ConfigError, match=r'no folder train') as refused:
        open_both(tmp_path / 'bare')
    assert 'hold_out' not in str(refused.value)


def test_digits_that_are_no_decimals_are_part_of_a_name(data):
    (data / 'train' / 'red').rename(data / 'train' / '1²2')
    assert create_dataset(DataSettings(data_dir=str(data)), 'train')[1] == ['1²2', 'blue', 'green']


# Tiny-ImageNet


def test_tiny_imagenet_is_read_as_it_comes(tmp_path, capsys):
    root = tmp_path / 'tiny-imagenet-200'
    annotations = []
    for synset in ('n02', 'n01'):
        for number in range(3):
            add(root / 'train' / synset / 'images' / f'{synset}_{number}.JPEG')
        (root / 'train' / synset / f'{synset}_boxes.txt').write_text('n01_0.JPEG\t0\t0\t62\t62\n')
    for number, synset in enumerate(('n02', 'n01', 'n02')):
        add(root / 'val' / 'images' / f'val_{number}.JPEG')
        annotations.append(f'val_{number}.JPEG\t{synset}\t0\t0\t62\t62\n')
    (root / 'val' / 'val_annotations.txt').write_text(''.join(annotations))
    train, val, names = open_both(root)
    assert names == ['n01', 'n02'] and read_targets(train) == [0, 0, 0, 1, 1, 1] and read_targets(val) == [1, 0, 1]
    assert train.filename(0) == 'n01/images/n01_0.JPEG' and val.filename(2) == 'images/val_2.JPEG'
    assert capsys.readouterr().err == ''
    hold_out.main(hold_out.HoldOutSettings(root / 'train', tmp_path / 'split', per_class=1))
    assert (tmp_path / 'split' / 'validation' / 'n01' / 'n01_2.JPEG').is_file()
    (root / 'val' / 'val_annotations.txt').write_text('val_0.JPEG n02\n')
    with pytest.raises(ConfigError, match=r'val_annotations\.txt must have IMAGE, a tab and a class in each line'):
        open_both(root)
