"""The model card of a released folder, made from its config.json alone.

    python hub/card.py output/hub/coatnet_pico_64.tin200

rewrites README.md there, as export.py does. Unknown figures are shown as "not measured".
"""
from dataclasses import dataclass
from pathlib import Path

import scripts_path  # noqa: F401
from coatnet_train.runtime.cli import ConfigError, one_line, parse_flags, run_cli, tyro

__all__ = ['CardSettings', 'main']


@dataclass(frozen=True, kw_only=True)
class CardSettings:
    folder: tyro.conf.Positional[Path]  # Folder that export.py made.


def main(settings: CardSettings) -> None:
    """Write the card of the folder."""
    from model_card import write_card  # here: torch and timm take seconds to import

    try:
        write_card(settings.folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f'FOLDER {settings.folder} must be one that export.py made, but its config.json cannot be '
                          f'used: {one_line(error)}; export anew.') from error
    print(f'card: {settings.folder / "README.md"}')


if __name__ == '__main__':
    run_cli('card.py', lambda: main(parse_flags(CardSettings, __doc__)))
