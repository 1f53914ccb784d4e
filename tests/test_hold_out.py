"""scripts/hold_out.py: every image is linked once, the source folder is unchanged, and errors have a message."""
from pathlib import Path

import pytest

from coatnet_train.runtime.cli import ConfigError
from hold_out import HoldOutSettings, main


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    for name in ('cat', 'dog'):
        (tmp_path / 'all' / name).mkdir(parents=True)
        for number in range(12):
            (tmp_path / 'all' / name / f'{name}_{number}.jpg').write_text(f'{name} {number}')
    return tmp_path / 'all'


def test_every_image_goes_to_one_split(image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(HoldOutSettings(Path('all'), Path('split'), per_class=3)) == {'train': 18, 'validation': 6}
    held = sorted(path.name for path in (tmp_path / 'split/validation/cat').iterdir())
    assert held == ['cat_10.jpg', 'cat_11.jpg', 'cat_9.jpg']  # natural order, not the order of strings
    texts = [path.read_text() for path in (tmp_path / 'split').rglob('*.jpg')]
    assert sorted(texts) == sorted(path.read_text() for path in image_folder.rglob('*.jpg'))
    assert not any(path.is_symlink() for path in image_folder.rglob('*'))


@pytest.mark.parametrize('per_class', (0, 12))
def test_a_class_keeps_an_image_in_each_split(image_folder, tmp_path, per_class):
    with pytest.raises(ConfigError, match='--per-class must be from 1 to 11'):
        main(HoldOutSettings(image_folder, tmp_path / 'split', per_class=per_class))


def test_a_class_of_one_image_is_refused_before_anything_is_written(image_folder, tmp_path):
    (image_folder / 'owl').mkdir()
    (image_folder / 'owl' / 'one.jpg').write_text('one')
    with pytest.raises(ConfigError, match=r'TRAIN_DIR .* at least two images of a class, .*owl has 1; add some'):
        main(HoldOutSettings(image_folder, tmp_path / 'split', per_class=1))
    assert not (tmp_path / 'split').exists()


def test_no_folder_is_written_over(image_folder, tmp_path):
    main(HoldOutSettings(image_folder, tmp_path / 'split', per_class=1))
    with pytest.raises(ConfigError, match=r'OUTPUT .* exists'):
        main(HoldOutSettings(image_folder, tmp_path / 'split', per_class=1))


def test_no_folder_is_made_among_the_classes(image_folder):
    for output in (image_folder / 'split', image_folder / 'red' / '..' / 'split'):
        with pytest.raises(ConfigError, match=r'OUTPUT must lie outside TRAIN_DIR .*, got .*split; name another'):
            main(HoldOutSettings(image_folder, output, per_class=1))
        assert not output.exists()


def test_a_folder_without_classes_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r'TRAIN_DIR .* must hold a sub-folder for each class'):
        main(HoldOutSettings(tmp_path, tmp_path / 'split'))
