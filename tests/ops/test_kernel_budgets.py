"""Resources of kernels compiled without a GPU: instructions, registers, spills and shared memory."""
import pytest
import torch

pytest.importorskip('triton', reason='needs the triton package')

import compiled
import triton
from compiled import BUILDS, TOOLS, Build, compiling_for, launch_direct

from coatnet_zoo.ops.dynamicconv2d import direct as dynamic_direct
from coatnet_zoo.ops.lightconv2d import direct as light_direct

pytestmark = [
    pytest.mark.skipif(not all((TOOLS / name).exists() for name in ('ptxas', 'cuobjdump', 'nvdisasm')),
                       reason='this triton comes without ptxas, cuobjdump and nvdisasm')]
bf16 = torch.bfloat16
VERSION = '.'.join(triton.__version__.split('.')[:2])


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))


def budget(row: dict[str, str], column: str) -> float:
    """Recorded value for this Triton version, else 1.5 times the maximum of the others, which schedule differently."""
    same = ('kernel', 'arch', 'shape', 'kernel_size', 'head_dim', 'dropconnect')
    rows = {kept['triton']: float(kept[column]) for kept in compiled.read_budgets()
            if all(kept[name] == row[name] for name in same)}
    assert rows, f'results/kernel_budgets.csv has no {row}; run PYTHONPATH=. python tests/ops/compiled.py'
    return rows[VERSION] if VERSION in rows else 1.5 * max(rows.values())


# each kernel once in the fast tests, for sm_90
@pytest.mark.skipif(tuple(map(int, VERSION.split('.'))) < (3, 6),
                    reason=f'budgets are kept for Triton 3.6 and later, this is {VERSION}')
@pytest.mark.parametrize('build', [
    pytest.param(build, id=str(build), marks=(
        [] if (build.arch, build.size) == (90, 56) and build.K < 13 else pytest.mark.slow))
    for build in BUILDS])
def test_band_kernels_keep_to_their_budgets(build: Build):
    for used in build.usages():
        row = build.row(used)
        for column, margin in (('instructions_per_output', 1.03), ('registers', 1.03), ('shared_bytes', 1.)):
            assert float(row[column]) <= margin * budget(row, column), f'{column} of {row}'
        # far fewer would mean that another loop was counted
        assert float(row['instructions_per_output']) >= .5 * budget(row, 'instructions_per_output')
        assert used.lanes_inner, f'an access of {used.kernel} touches a cache line a lane'
        assert used.spilled <= budget(row, 'spilled_bytes') and used.registers <= 255


@pytest.mark.slow
@pytest.mark.parametrize('size,C,K,dtype,p', [
    (56, 96, 7, bf16, .1), (28, 192, 7, torch.float32, 0.)])
def test_direct_kernels_compile_for_hopper(size, C, K, dtype, p):
    """The registers of a multiprocessor fit at least 3 programs of 4 warps; at most 4 per thread are spilled."""
    with compiling_for(90) as seen:
        launch_direct(size, C, K, dtype, p)
    assert len(seen) == 8
    # the register limit holds for recent Triton versions; older ones schedule differently
    most = 168 if tuple(map(int, VERSION.split('.'))) >= (3, 9) else 255
    assert all(used.registers <= most and used.spilled <= 16 for used in seen), seen


@pytest.mark.slow
def test_direct_kernels_compile_for_images_of_2_31_elements_and_small_heads(monkeypatch):
    for kernels in (light_direct, dynamic_direct):
        monkeypatch.setattr(kernels, 'needs_int64', lambda *tensors: True)
    with compiling_for(90) as seen:
        launch_direct(9, 6, 5, torch.float16, .1, head=2)
    assert len(seen) == 8
