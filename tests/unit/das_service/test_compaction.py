"""Which files compaction puts together: small ones of one day, bounded by the target, until few are left."""

import datetime as dt

from hypothesis import given
from hypothesis import strategies as st

from das_service.sink.compaction import choose_files
from das_service.tables.offline_store import DataFile

DAY = dt.date(2026, 3, 1)
TARGET = 100


def files(sizes: list[int]) -> list[DataFile]:
    return [DataFile(path=f"p{i}", size_bytes=size, num_rows=1, first_position=i) for i, size in enumerate(sizes)]


def test_few_small_files_are_left_alone() -> None:
    assert choose_files({DAY: files([1, 2, 3])}, most_small_files=3, target_bytes=TARGET) is None


def test_the_smallest_files_go_first_in_log_order() -> None:
    found = choose_files({DAY: files([40, 10, 49, 30, 99])}, most_small_files=2, target_bytes=TARGET)
    assert found is not None
    assert (found[0], [file.size_bytes for file in found[1]]) == (DAY, [40, 10, 30])


@given(sizes=st.lists(st.integers(1, 150), max_size=40), most=st.integers(1, 5))
def test_steps_end_with_few_small_files_and_lose_no_bytes(sizes: list[int], most: int) -> None:
    present = files(sizes)
    for step in range(len(sizes) + 1):
        found = choose_files({DAY: present}, most_small_files=most, target_bytes=TARGET)
        if found is None:
            break
        chosen = found[1]
        assert len(chosen) > 1
        assert sum(file.size_bytes for file in chosen) <= TARGET
        merged = DataFile(path=f"m{step}", size_bytes=sum(file.size_bytes for file in chosen), num_rows=1)
        present = [file for file in present if file not in chosen] + [merged]
    assert sum(1 for file in present if file.size_bytes < TARGET // 2) <= most
    assert sum(file.size_bytes for file in present) == sum(sizes)
