"""Shards of features: columns of numbers and the paths of their images, as safetensors or Parquet."""
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from coatnet_train.runtime.files import write_file

__all__ = ['read_column', 'write_shard']


def write_shard(path: Path, columns: dict[str, torch.Tensor], paths: list[str]) -> None:
    """Write columns (N, ...) and N paths in the format of the suffix; in Parquet, (N, C, ...) are fixed-size lists."""
    if path.suffix == '.safetensors':
        content = save({name: values.contiguous() for name, values in columns.items()}, {'paths': json.dumps(paths)})
        write_file(path, lambda temporary: temporary.write_bytes(content))
        return
    import pyarrow
    from pyarrow import parquet

    def to_arrow(values: torch.Tensor) -> pyarrow.Array:
        array = pyarrow.array(values.flatten().numpy())
        for size in reversed(values.shape[1:]):
            array = pyarrow.FixedSizeListArray.from_arrays(array, size)
        return array

    table = pyarrow.table({'path': paths, **{name: to_arrow(values) for name, values in columns.items()}})
    write_file(path, lambda temporary: parquet.write_table(table, temporary))


def read_column(path: Path, name: str) -> torch.Tensor:
    """Read one column of numbers (N,) or vectors (N, C) of a shard."""
    if path.suffix == '.safetensors':
        with safe_open(path, 'pt') as shard:
            return shard.get_tensor(name)
    from pyarrow import parquet
    column = parquet.read_table(path, columns=[name])[name].combine_chunks()
    if not hasattr(column.type, 'list_size'):
        return torch.tensor(column.to_numpy())
    return torch.tensor(column.flatten().to_numpy()).reshape(-1, column.type.list_size)
