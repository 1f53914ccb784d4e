"""Timing of calls: in windows of wall time, on a GPU as replays of a CUDA graph over several input sets."""
import time
from collections.abc import Callable, Sequence

import torch

__all__ = ['GRAPH', 'WALL_CLOCK', 'default_input_sets', 'measure_window', 'peak_memory', 'replay', 'synchronize']

WALL_CLOCK, GRAPH = 'wall clock', 'CUDA graph'  # names of the two timers in results files
MIN_SETS, MAX_SETS = 3, 16  # input sets on a GPU


def synchronize(device: str) -> None:
    if device != 'cpu':
        torch.cuda.synchronize()


def measure_window(call: Callable[[], object], window: float, device: str) -> float:
    """Mean seconds of a call over a window of at least `window` seconds and one call."""
    calls, batch, start = 0, 1, time.perf_counter()
    while calls == 0 or time.perf_counter() - start < window:
        for _ in range(batch):
            call()
        synchronize(device)
        calls += batch
        # synchronise a GPU after growing batches of calls, so that its queue is never empty within a batch
        batch = 1 if device == 'cpu' else min(2 * batch, 64)
    return (time.perf_counter() - start) / calls


def replay(calls: Sequence[Callable[[], object]], device: str) -> Callable[[], object]:
    """Return one function that makes all calls in turn: on a GPU a CUDA graph of them, which costs one launch.

    Each call must have run before, since compilation cannot be captured. The graph keeps every output until its end, so
    that no call writes to memory that is in the cache from the output of the call before it.
    """
    if device == 'cpu':
        return lambda: [call() for call in calls]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    del kept  # the graph owns their memory

    def play(held: Sequence[Callable[[], object]] = tuple(calls)) -> None:  # the calls keep their inputs alive
        graph.replay()

    return play


def default_input_sets(nbytes: int, device: str) -> int:
    """Number of input sets for a call that moves `nbytes`: 1 on a CPU; on a GPU enough to exceed 4 times its L2 cache.
    """
    if device == 'cpu':
        return 1
    cache = torch.cuda.get_device_properties().L2_cache_size
    return min(MAX_SETS, max(MIN_SETS, -(-4 * cache // nbytes)))


def peak_memory(call: Callable[[], object], device: str) -> float | None:
    """Make a call; returns its peak allocation in MiB above what is already allocated on a GPU, and None on a CPU."""
    if device == 'cpu':
        call()
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    synchronize(device)
    return (torch.cuda.max_memory_allocated() - before) / 2**20
