"""Publish an exported folder on the Hub, and record it after a verified download.

    python hub/publish.py output/hub/coatnet_pico_64.tin200 --repo OWNER/coatnet_pico_64.tin200
    python hub/publish.py output/hub/coatnet_pico_64.tin200 --repo OWNER/coatnet_pico_64.tin200 --push
    python hub/publish.py output/hub/coatnet_pico_64.tin200 --package

Without --push or --package nothing is changed: the files, the state of the repository and the planned actions are
printed. --push writes --repo into the folder's card and config if they name another or none, creates the repository if
needed, uploads the changed files in one commit, and tags it (--release). It then downloads the whole commit into an
empty cache, compares every sha256, loads the model through timm and compares its logits with the golden ones. Only then
is the release written to coatnet_zoo/weights/releases.json. Safe to rerun after an interruption.

The repository must be new, empty, or at the commit recorded in releases.json. If it has changed since, the push is
rejected unless --parent names the commit to build on. Files that no export writes are kept. The token is taken from
HF_TOKEN or `hf auth login`. --package copies the weights into the package, so that they ship with it and need no
network.
"""
import scripts_path  # noqa: F401
from coatnet_train.runtime.cli import parse_flags, run_cli
from publish_settings import PublishSettings, check_values


def main(settings: PublishSettings) -> None:
    """Print the planned actions, and with --push or --package carry them out."""
    check_values(settings)
    from publish_run import run  # here: torch and timm take seconds to import
    run(settings)


if __name__ == '__main__':
    run_cli('publish.py', lambda: main(parse_flags(PublishSettings, __doc__)))
