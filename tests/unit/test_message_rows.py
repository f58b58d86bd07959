"""Rows of messages: four numbers that stand for a part of a flat memory. The memory of a GPU is the host's here."""

from __future__ import annotations

import pytest
import torch

from moempi.device.cuda_memory import MessageMemory, Rows, block_bytes


def memory_of(home: int, arrivals: int) -> MessageMemory:
    return MessageMemory(torch.device("cpu"), home, arrivals)


@pytest.mark.parametrize("dtype,begin", [(torch.float32, 128), (torch.bfloat16, 256)])
def test_rows_lie_where_they_say(dtype: torch.dtype, begin: int) -> None:
    """A block at byte 512, 3 rows of 5: from element 512 / itemsize on."""
    memory = memory_of(2048, 512)
    assert memory.home.take(1) == 0
    found = memory.take_pair(memory.home, 3, 5, (dtype, dtype))
    assert found and found[0] == 512
    rows = found[1]
    assert (len(rows), rows.begin, rows.offset, rows.nbytes) == (3, begin, 512, 15 * dtype.itemsize)
    assert rows.address == memory.memory.data_ptr() + 512 == rows.tensor().data_ptr()
    rows.tensor()[:] = torch.arange(15, dtype=dtype).view(3, 5)
    assert memory.memory[512:].view(dtype)[:15].tolist() == list(range(15))


def test_a_part_is_rows_again() -> None:
    rows = Rows.of(torch.arange(12.0).view(4, 3))
    part = rows.part(1, 3)
    assert (len(part), part.begin, part.nbytes) == (2, 3, 24)
    assert part.tensor().tolist() == [[3, 4, 5], [6, 7, 8]] == rows.tensor()[1:3].tolist()
    assert part.part(1, 2).tensor().tolist() == [[6, 7, 8]] and rows.part(0, 4) is rows
    assert len(rows.part(2, 2)) == 0


def test_answers_behind_rows_of_one_block() -> None:
    """Bfloat16 rows [2, 100] take 400 bytes of 512; the float32 answers begin behind them."""
    memory = memory_of(512, 4096)
    assert block_bytes([2 * 100 * 2, 2 * 100 * 4]) == 512 + 1024
    found = memory.take_pair(memory.arrivals, 2, 100, (torch.bfloat16, torch.float32))
    assert found
    block, rows, answers = found
    assert block == 512
    assert (rows.offset, rows.nbytes, answers.offset, answers.nbytes) == (512, 400, 1024, 800)
    assert memory.take_pair(memory.arrivals, 5, 100, (torch.bfloat16, torch.float32)) is None
    memory.give(block)
    assert memory.arrivals.take(4096) == 512
