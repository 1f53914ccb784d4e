"""Put an exported folder on the Hub, and record it once its own download has proved to be the same.

    python hub/publish.py output/hub/coatnet_pico_64.tin200 --repo OWNER/coatnet_pico_64.tin200
    python hub/publish.py output/hub/coatnet_pico_64.tin200 --repo OWNER/coatnet_pico_64.tin200 --push
    python hub/publish.py output/hub/coatnet_pico_64.tin200 --package

Without --push or --package nothing changes anywhere: the files, the state of the repository and what would be done are
printed. --push writes --repo into the folder's card and config if they name another or none, makes the repository if
need be, uploads what differs in one commit, gives it a git tag (--release), downloads the whole commit into an empty
cache, compares every sha256, loads it through timm, compares its logits with the golden ones, and only then writes it
to coatnet_zoo/weights/releases.json. Interrupted anywhere, run it again.

A repository is built upon if it is new or empty, or at the commit that releases.json records; if somebody has changed
it since, the push is refused unless --parent names the commit that you have looked at. Files there that no export
writes are left alone. The token is that of HF_TOKEN or of `hf auth login`. --package copies the weights into the
package, so that they ship with it and need no network.
"""
import scripts_path  # noqa: F401
from coatnet_train.runtime.cli import parse_flags, run_cli
from publish_settings import PublishSettings, check_values


def main(settings: PublishSettings) -> None:
    """Print what would be done, or do it."""
    check_values(settings)
    from publish_run import run  # here: torch and timm take seconds to import
    run(settings)


if __name__ == '__main__':
    run_cli('publish.py', lambda: main(parse_flags(PublishSettings, __doc__)))
