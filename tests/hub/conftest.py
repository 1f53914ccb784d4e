"""A short, real run of scripts/finetune.py and its export; the loopback Hub, and the real client connected to it."""
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

import export
import finetune
import model_card
from coatnet_train.models import model_size
from support.constants import RELEASE_NAME as NAME
from support.hub_server import OWNER_TOKEN, HubServer
from support.images import write_images


@pytest.fixture(scope='session', autouse=True)
def sizes_counted_once() -> Iterator[None]:
    """Count parameters and multiply-adds of an architecture for one card only."""
    counted = {}

    def count(*args, **kwargs):
        key = repr((args, sorted(kwargs.items())))
        if key not in counted:
            counted[key] = model_size.model_size(*args, **kwargs)
        return counted[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_card, 'model_size', count)
        yield


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp('hub') / 'colours', train=8, val=4)


@pytest.fixture(scope='session')
def run_settings(image_folder) -> finetune.FinetuneSettings:
    """Settings with model arguments that a release drops, and data settings that differ from the registered ones."""
    return finetune.FinetuneSettings(
        data_dir=str(image_folder), model='coatnet_pico_64', img_size=32, epochs=1, batch_size=12, lr=1e-3,
        warmup_epochs=0.0, scale=(0.6, 1.0), workers=0, device='cpu', output=str(image_folder.parent), experiment='run',
        model_kwargs=('dynamic_img_size=True', 'conv_norm_momentum=0.3'), crop_pct=0.9, mean=(0.4, 0.5, 0.6),
        std=(0.3, 0.3, 0.2))


@pytest.fixture(scope='session')
def trained(run_settings) -> Path:
    """A run folder that all tests share; read-only."""
    finetune.main(run_settings)
    return Path(run_settings.output) / run_settings.experiment


@pytest.fixture
def run_dir(trained, tmp_path) -> Path:
    """A copy of the run folder that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / 'run', ignore=shutil.ignore_patterns('last')))


@pytest.fixture(scope='session')
def exported(trained, tmp_path_factory) -> Path:
    """An exported folder that all tests share; read-only."""
    return export.main(export.ExportSettings(
        run_dir=trained, name=NAME, output=tmp_path_factory.mktemp('exported') / NAME, trained_on='Colours'))


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    """A copy of the exported folder that a test may change."""
    return Path(shutil.copytree(exported, tmp_path / NAME))


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def forget_sessions() -> None:
    """Reset the HTTP sessions of huggingface_hub before 1.0, which keep the offline mode that they began with."""
    getattr(huggingface_hub.utils, 'reset_sessions', lambda: None)()


@pytest.fixture
def client(hub, monkeypatch, tmp_path) -> huggingface_hub.HfApi:
    """huggingface_hub configured as by HF_ENDPOINT, HF_HOME and HF_TOKEN for the loopback Hub and its owner."""
    home = tmp_path / 'hf_home'
    for name, value in {
        'ENDPOINT': hub.endpoint,
        'HUGGINGFACE_CO_URL_TEMPLATE': hub.endpoint + '/{repo_id}/resolve/{revision}/{filename}',
        'HF_HUB_DISABLE_XET': True, 'HF_HUB_OFFLINE': False, 'HF_HUB_DISABLE_TELEMETRY': True,
        'HF_HUB_DISABLE_PROGRESS_BARS': True, 'HF_HUB_CACHE': str(home / 'hub'), 'HF_TOKEN_PATH': str(home / 'token'),
    }.items():
        monkeypatch.setattr(constants, name, value, raising=False)
    # versions before 1.0 hold a copy
    monkeypatch.setattr('huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE',
                        constants.HUGGINGFACE_CO_URL_TEMPLATE, raising=False)
    for name in ('HUGGING_FACE_HUB_TOKEN', 'HF_OIDC_RESOURCE'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HF_TOKEN', OWNER_TOKEN)
    monkeypatch.setenv('NO_PROXY', '127.0.0.1,localhost')
    forget_sessions()
    return huggingface_hub.HfApi()


@pytest.fixture
def offline(client, monkeypatch) -> Callable[[bool], None]:
    """Function that switches offline mode on (as HF_HUB_OFFLINE=1 does) and off."""
    def go(away: bool = True) -> None:
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', away)
        forget_sessions()

    yield go
    forget_sessions()


@pytest.fixture
def environment(hub, tmp_path) -> dict[str, str]:
    """Environment variables that connect a new process to the loopback Hub."""
    return {'HF_ENDPOINT': hub.endpoint, 'HF_HOME': str(tmp_path / 'hf_home'), 'HF_TOKEN': OWNER_TOKEN,
            'HF_HUB_OFFLINE': '0', 'HF_HUB_DISABLE_XET': '1', 'HF_HUB_DISABLE_TELEMETRY': '1',
            'HF_HUB_DISABLE_PROGRESS_BARS': '1', 'NO_PROXY': '127.0.0.1,localhost', 'OMP_NUM_THREADS': '1'}
