"""Verify a release folder before it is published; prints the sha256 of each file.

    python hub/verify.py output/hub/coatnet_pico_64.tin200

Rejects files that are not on the list (links and hidden files too); tensors that are not finite, or whose names, shapes
or dtypes differ from the registered model; a config or card without tag or licence, or that disagree; and pickled data
in model.pt2. Then a fresh process loads the folder as users do, through timm's local-dir: (and through transformers,
onnxruntime and torch.export where they apply), and compares logits on the golden inputs: the difference must be at most
1e-5 of the largest golden logit. A failure gives one message and exit code 2.
"""
from dataclasses import dataclass
from pathlib import Path

import scripts_path  # noqa: F401
from coatnet_train.runtime.cli import parse_flags, run_cli, tyro

__all__ = ['VerifySettings', 'main']


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    folder: tyro.conf.Positional[Path]  # Folder that export.py made.


def main(settings: VerifySettings) -> None:
    """Verify the folder and print the checksums of its files."""
    from verification import verify  # here: torch and timm take seconds to import

    for name, digest in verify(settings.folder).items():
        print(f'{digest}  {name}')


if __name__ == '__main__':
    run_cli('verify.py', lambda: main(parse_flags(VerifySettings, __doc__)))
