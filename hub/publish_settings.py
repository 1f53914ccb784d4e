"""Settings of publish.py and their checks, without torch and timm."""
import re
from dataclasses import dataclass
from pathlib import Path

from coatnet_train.runtime.cli import ConfigError, one_line, tyro

__all__ = ['PublishSettings', 'check_values']


@dataclass(frozen=True, kw_only=True)
class PublishSettings:
    folder: tyro.conf.Positional[Path]  # Folder that export.py made.
    repo: str = ''  # Repository on the Hub, as OWNER/NAME.
    push: bool = False  # Upload, tag, check and record; without it only what would be done is printed.
    package: bool = False  # Copy the weights into coatnet_zoo/weights and record them there.
    release: str = 'v1'  # Git tag of the commit; one that exists is never moved.
    parent: str = ''  # Commit (40 digits) to build upon, if releases.json does not record it.
    private: bool = False  # If the repository is made, make it private.


def check_values(settings: PublishSettings) -> None:
    """Raise ConfigError for single values that cannot work, before anything is read."""
    if settings.push and not settings.repo:
        raise ConfigError('--push needs --repo OWNER/NAME, and it is not given; give it.')
    if not settings.repo and not settings.package:
        raise ConfigError('--repo must name a repository as OWNER/NAME, and names none; give one, or --package.')
    if not re.fullmatch(r'[A-Za-z0-9]+([._-][A-Za-z0-9]+)*', settings.release) or settings.release == 'main':
        raise ConfigError(f'--release must be a git tag of letters, digits and single . _ - between them, such as '
                          f'v2, got {settings.release!r}.')
    if settings.repo:
        from huggingface_hub.errors import HFValidationError  # imported here, so that --help works without it
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(settings.repo)
        except HFValidationError as error:
            raise ConfigError(f'--repo must be OWNER/NAME as the Hub allows it, got {settings.repo!r}: '
                              f'{one_line(error)}') from error
        if '/' not in settings.repo:
            raise ConfigError(f'--repo must be OWNER/NAME, got {settings.repo!r}; put the owner in front.')
