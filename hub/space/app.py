"""Demo page for the models: upload an image, see the top-5 predictions and explanation maps of the stages.

    python hub/space/app.py --model coatnet_pico_64.dist_tin200 local-dir:output/coatnet_pico
    python app.py

The second line is how a Space starts it. It offers the released models, the most accurate packaged one first,
coatnet_0_kecam.in1k if its weights are in the cache, and those in the folder models/ beside this file. The only network
access is to the Hub, for released weights that do not ship with the package.
"""
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

# a checkout has coatnet_train in scripts/, a Space beside this file
sys.path.append(str(Path(__file__).resolve().parent / '../../scripts'))

from coatnet_train.models.released import released_models
from coatnet_train.runtime.cli import ConfigError, parse_flags, run_cli

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class AppSettings:
    model: tuple[str, ...] = ()  # Names of releases, local-dir:FOLDER, ... (what is released and models/ if not given).
    host: str | None = None  # Address to serve at (GRADIO_SERVER_NAME, else 127.0.0.1, if not given).
    port: int | None = None  # Port to serve at (the first free one from 7860 if not given).
    device: str = 'auto'  # auto (a GPU where there is one), cpu or cuda.


def choose_models(settings: AppSettings, folder: Path = HERE / 'models') -> tuple[str, ...]:
    """Names of the models to offer: those requested, else the released ones and the run folders in `folder`."""
    found = settings.model or (
        *released_models(), *(f'local-dir:{config.parent}' for config in sorted(folder.glob('*/config.json'))))
    if not found:
        raise ConfigError('--model must name at least one model where none are released, and names none; give '
                          'local-dir:FOLDER.')
    return found


def main(settings: AppSettings) -> None:
    """Open the models and serve the page until it is interrupted."""
    names = choose_models(settings)
    from interface import build_page, serve  # isort: skip  # here: gradio, torch and timm take seconds to import
    from answer import open_models
    from coatnet_train.runtime.accelerator import choose_device

    device = choose_device(settings.device)
    models = open_models(names, released_models(), device)
    for model in models.values():
        print(f'{model.title}: {model.weights}', flush=True)
    with TemporaryDirectory() as folder, suppress(KeyboardInterrupt):
        os.environ['GRADIO_TEMP_DIR'] = folder  # where gradio keeps uploads
        serve(build_page(models), server_name=settings.host, server_port=settings.port)


if __name__ == '__main__':
    run_cli('app.py', lambda: main(parse_flags(AppSettings, __doc__)))
