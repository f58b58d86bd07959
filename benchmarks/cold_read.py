"""One measurement of start_up.py: read weights that are not in the cache, plainly or as tensors. Prints JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from moempi.files.weights import open_weights

BLOCK = 8 << 20  # bytes of a plain read


def main() -> None:
    path, how = Path(sys.argv[1]), sys.argv[2]
    forget(path)
    begin = time.perf_counter()
    nbytes = read_plainly(path) if how == "plain" else read_tensors(path)
    print(json.dumps({"bytes": nbytes, "seconds": time.perf_counter() - begin}))


def forget(path: Path) -> None:
    """Make the kernel drop what it keeps of a file."""
    file = os.open(path, os.O_RDONLY)
    os.fdatasync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def read_plainly(path: Path) -> int:
    """All bytes of a file, in order, into one buffer."""
    file, block, total = os.open(path, os.O_RDONLY), bytearray(BLOCK), 0
    while n := os.readv(file, [block]):
        total += n
    os.close(file)
    return total


def read_tensors(path: Path) -> int:
    """Everything that a rank reads which holds all experts."""
    with open_weights(path) as weights:
        config = weights.config
        shared = [name for name in weights.shapes if "/experts_" not in name]
        total = sum(weights.tensor(name).nbytes for name in shared)
        for layer in config.moe_layers:
            for expert in range(config.n_experts):
                total += sum(matrix.nbytes for matrix in weights.expert(layer, expert, 0, config.expert_hidden))
    return total


if __name__ == "__main__":
    main()
