"""Run timm's own model tests over every name that coatnet_zoo registers.

    python tests/conformance.py                                    # all names
    python tests/conformance.py --max-params 45e6                  # names up to 45 M parameters
    python tests/conformance.py --models '*_pico*' -x -k fx        # some names; the rest goes to pytest

The tests are tests/test_models.py of timm's source distribution in the installed version. It is downloaded once into
.cache/, checked against tests/timm_sdist.sha256 and run unchanged, with `timm.list_models` restricted to our names. The
run fails if one of the EXPECTED tests misses a name, or for a skip that is not in ALLOWED_SKIPS.
"""

import argparse
import fnmatch
import gc
import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / '.cache'
CHECKSUMS = Path(__file__).with_name('timm_sdist.sha256')

# Every test of the file that is parametrised over all models.
EXPECTED = (
    'test_model_forward', 'test_model_backward', 'test_model_default_cfgs', 'test_model_forward_torchscript',
    'test_model_forward_features', 'test_model_forward_intermediates_features', 'test_model_forward_intermediates',
    'test_prune_intermediate_layers_contract', 'test_model_forward_fx', 'test_model_backward_fx',
    'test_model_forward_fx_torchscript',
)
HUB_TESTS = {
    'test_model_inference': 'compares with tensors stored in the timm organisation of the Hub',
    'test_model_load_pretrained': 'downloads the weights of every tag',
    'test_model_features_pretrained': 'downloads the weights of every tag',
}
ALLOWED_SKIPS: dict[str, str] = {}  # 'test_function[model_name]': reason
MARKERS = ('base', 'forward', 'backward', 'cfg', 'cfg_nonstd', 'torchscript', 'features', 'fxforward', 'fxbackward')


def cached_sdist(version: str) -> Path:
    """Return timm's source distribution in .cache/, downloaded on first use."""
    sdist = CACHE / f'timm-{version}.tar.gz'
    if not sdist.exists():
        CACHE.mkdir(exist_ok=True)
        # A broken download must not be taken for a cached one.
        with tempfile.TemporaryDirectory(dir=CACHE) as partial:
            command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--no-binary', ':all:', '--dest', partial]
            if subprocess.run([*command, f'timm=={version}']).returncode:
                sys.exit(f'no source distribution of the installed timm {version}: pip download failed (see above); '
                         f'install a released timm, or put its sdist at {sdist}')
            os.replace(Path(partial, sdist.name), sdist)
    return sdist


def verify_checksum(sdist: Path, accept_new: bool) -> None:
    """Stop unless the sdist has the recorded sha256, or has none recorded and `accept_new` is set."""
    found = hashlib.sha256(sdist.read_bytes()).hexdigest()
    recorded = {name: digest for digest, name in map(str.split, CHECKSUMS.read_text().splitlines())}
    expected = recorded.get(sdist.name)
    if expected is None:
        print(f'{CHECKSUMS.name} has no line for {sdist.name}; the line to add:\n{found}  {sdist.name}', flush=True)
        if not accept_new:
            sys.exit('add that line once the release is trusted, or pass --accept-new-sdist for this run')
    elif found != expected:
        sys.exit(f'sha256 of {sdist} must be the one in {CHECKSUMS.name}\n  expected {expected}\n  found    {found}\n'
                 'delete the file and run again; if the sums still differ, do not run it')


def extract_tests(sdist: Path, version: str) -> Path:
    """Unpack tests/ beside the sdist, every time, so that an edited copy is never run; returns test_models.py."""
    top = f'timm-{version}'
    with tarfile.open(sdist) as archive:
        members = [m for m in archive.getmembers() if m.name.startswith(f'{top}/tests/')]
        archive.extractall(CACHE, members=members, filter='data')
    test_models = CACHE / top / 'tests' / 'test_models.py'
    if not test_models.is_file():
        sys.exit(f'{sdist.name} must hold tests/test_models.py, found {len(members)} files under tests/; '
                 'use a timm version whose sdist carries its tests')
    return test_models


def registered_names() -> list[str]:
    """Return the names that importing coatnet_zoo adds to timm's registry or replaces in it."""
    import timm

    before = {name: timm.models.model_entrypoint(name) for name in timm.list_models()}
    import coatnet_zoo

    names = [name for name in timm.list_models() if before.get(name) is not timm.models.model_entrypoint(name)]
    if not names:
        sys.exit(f'coatnet_zoo must register models on import, found none from {coatnet_zoo.__file__}; '
                 'check that its __init__ imports the model modules')
    return names


def select_names(names: list[str], patterns: list[str], max_params: float) -> list[str]:
    """Narrow our names by wildcard patterns, then by the parameter count of a model on the meta device."""
    import timm
    import torch

    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            sys.exit(f'--models must match a registered name, found {pattern!r}; known: {", ".join(names)}')
    chosen = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    if max_params < float('inf'):
        with torch.device('meta'):
            sizes = {name: sum(p.numel() for p in timm.create_model(name).parameters()) for name in chosen}
        chosen = [name for name in chosen if sizes[name] <= max_params]
        if not chosen:
            sys.exit(f'--max-params must be at least {min(sizes.values())}, the smallest model, found {max_params:g}')
    return chosen


def narrow_listing(patch: pytest.MonkeyPatch, names: list[str]) -> None:
    """Restrict timm's list_models and list_pretrained to `names`: filters apply, `module` is always ours."""
    import timm

    list_models, list_pretrained = timm.list_models, timm.list_pretrained
    modules = [m for m in timm.list_modules() if any(timm.models.is_model_in_modules(n, m) for n in names)]

    def keep(found: list[str]) -> list[str]:
        return [name for name in found if timm.models.get_arch_name(name) in names]

    def list_ours(filter: str | Iterable[str] = '', module: str | Iterable[str] = '', *args, **kwargs) -> list[str]:
        # The module list of the test file holds timm's modules only and would leave ours out.
        return keep(list_models(filter, modules, *args, **kwargs))

    patch.setattr(timm, 'list_models', list_ours)
    patch.setattr(timm, 'list_pretrained', lambda *args, **kwargs: keep(list_pretrained(*args, **kwargs)))


class ConformancePlugin:
    """Pytest plugin that keeps the items of our models, checks that none is missing and counts outcomes."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.items: dict[str, tuple[str, str]] = {}  # node id: (test function, model)
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)  # model: outcome: number of tests
        self.unlisted_skips: list[str] = []

    def pytest_configure(self, config: pytest.Config) -> None:
        for marker in MARKERS:
            config.addinivalue_line('markers', f'{marker}: group of model tests in timm')
        config.addinivalue_line('markers', 'timeout(seconds): limit, kept only where pytest-timeout is installed')

    @pytest.hookimpl(tryfirst=True)  # before -k and -m, whose choice must not look like missing tests
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept, dropped = [], []
        for item in items:
            test = getattr(item, 'originalname', item.name)
            parameters = item.callspec.params if hasattr(item, 'callspec') else {}
            # Literal timm names are ignored; an empty list of names comes as a placeholder object.
            model = str(parameters.get('model_name')).partition('.')[0]
            if model in self.names and test not in HUB_TESTS:
                self.items[item.nodeid] = test, model
                kept.append(item)
            else:
                dropped.append(item)
        found = set(self.items.values())
        missing = [f'  {model}: {test}' for model in self.names for test in EXPECTED if (test, model) not in found]
        if missing:
            raise pytest.UsageError('\n'.join([
                'each model must have an item in each EXPECTED test, found none for', *missing,
                'give the name default_cfgs, or one that no filter list of test_models.py matches; '
                'where timm has renamed the test, correct EXPECTED']))
        # Model by model, so that the memory of a large one is free before the next.
        items[:] = sorted(kept, key=lambda item: self.names.index(self.items[item.nodeid][1]))
        config.hook.pytest_deselected(items=dropped)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        import torch

        torch.manual_seed(0)  # weights and inputs are random: a failure must be reproducible

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test, model = self.items[report.nodeid]
        if report.when == 'call' or not report.passed:
            self.outcomes[model][report.outcome] += 1
        if report.skipped and f'{test}[{model}]' not in ALLOWED_SKIPS:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            self.unlisted_skips.append(f'  {test}[{model}]: {reason}')

    def pytest_runtest_logfinish(self) -> None:
        gc.collect()

    def table(self) -> str:
        """Format the number of tests by model and outcome."""
        width = max(map(len, self.names))
        totals = Counter(model for _, model in self.items.values())
        rows = [f'{"model":{width}}  passed  failed  skipped  of']
        for name in self.names:
            n = self.outcomes[name]
            rows.append(f'{name:{width}}  {n["passed"]:6}  {n["failed"]:6}  {n["skipped"]:7}  {totals[name]:2}')
        return '\n'.join(rows)


def main(arguments: list[str] | None = None) -> int:
    """Run the conformance tests and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--max-params', type=float, default=float('inf'), help='leave out larger models')
    parser.add_argument('--models', nargs='+', default=['*'], metavar='PATTERN', help='wildcards of names')
    parser.add_argument('--accept-new-sdist', action='store_true', help='run a timm version with no recorded sha256')
    options, pytest_arguments = parser.parse_known_args(arguments)

    sys.path.append(str(ROOT))  # an installed coatnet_zoo has precedence over the checkout
    registered = registered_names()
    names = select_names(registered, options.models, options.max_params)
    version = importlib.metadata.version('timm')
    sdist = cached_sdist(version)
    verify_checksum(sdist, options.accept_new_sdist)
    test_models = extract_tests(sdist, version)
    print(f'timm {version} tests, {len(names)} of {len(registered)} names from {sys.modules["coatnet_zoo"].__file__}')

    plugin = ConformancePlugin(names)
    # No ini file: the options of this project's own tests are not meant for timm's. No xdist: one model at a time.
    settings = ['-c', os.devnull, f'--rootdir={test_models.parent}', '-p', 'no:xdist', '-p', 'no:cacheprovider']
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv('GITHUB_ACTIONS', raising=False)  # it removes tests from the file
        narrow_listing(patch, names)
        code = int(pytest.main([*settings, str(test_models), *pytest_arguments], plugins=[plugin]))
    if plugin.outcomes:
        print(f'\n{plugin.table()}')
    if plugin.unlisted_skips:
        print('\nskipped, but not in ALLOWED_SKIPS of tests/conformance.py:', *plugin.unlisted_skips, sep='\n')
    return code or int(bool(plugin.unlisted_skips))


if __name__ == '__main__':
    sys.exit(main())
