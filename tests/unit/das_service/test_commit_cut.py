"""What one commit takes: prefixes of the partitions, within the bounds, and never a log with a hole."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from das_service.logs.streams import LogCounters
from das_service.sink.commit_cut import Bounds, Cut, LogGapError, Waiting, refuse_gap
from schemas.entries import Entry, Position

BOUNDS = Bounds(num_rows=20, num_bytes=100, num_event_days=3)


def entry(
    seq: int, *, num_rows: int = 1, num_bytes: int = 1, days: Sequence[int] = (0,), taken_at_us: int = 0
) -> Entry:
    return Entry(
        position=Position(epoch=1, seq=seq),
        num_features=1,
        num_rows=num_rows,
        taken_at_us=taken_at_us,
        rows_total=0,
        bytes_total=0,
        meta={"days": list(days)},
        fingerprint="",
        data=bytes(num_bytes),
    )


def cut(at: dict[int, Position | None]) -> Cut:
    return Cut(BOUNDS, lambda e: set(e.meta["days"]), at)


ENTRIES = st.lists(
    st.builds(
        lambda rows, size, days, at: {"num_rows": rows, "num_bytes": size, "days": days, "taken_at_us": at},
        st.integers(1, 15), st.integers(1, 80), st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 9),
    ),
    max_size=6,
)  # fmt: skip


@given(logs=st.lists(ENTRIES, min_size=1, max_size=3))
def test_a_cut_takes_prefixes_within_the_bounds_or_one_entry(logs: list[list[dict[str, object]]]) -> None:
    reply = {p: [entry(seq, **values) for seq, values in enumerate(log)] for p, log in enumerate(logs)}  # type: ignore[arg-type]
    made = cut(dict.fromkeys(reply))
    made.add(reply)
    for partition, entries in reply.items():
        own = [e for p, e in made.taken if p == partition]
        assert own == entries[: len(own)]
        assert made.at[partition] == (own[-1].position if own else None)
    taken = [e for _, e in made.taken]
    within = (
        sum(e.num_rows for e in taken) <= BOUNDS.num_rows
        and sum(len(e.data) for e in taken) <= BOUNDS.num_bytes
        and len({day for e in taken for day in e.meta["days"]}) <= BOUNDS.num_event_days
    )
    assert within or len(taken) == 1
    assert made.is_full == (len(taken) < sum(map(len, reply.values())))


def test_the_oldest_entry_goes_first() -> None:
    made = cut({0: None, 1: None})
    made.add({0: [entry(0, taken_at_us=5), entry(1, taken_at_us=1)], 1: [entry(0, taken_at_us=3)]})
    assert [(p, e.position.seq) for p, e in made.taken] == [(1, 0), (0, 0), (0, 1)]


def test_an_entry_over_every_bound_is_taken_alone() -> None:
    made = cut({0: None})
    made.add({0: [entry(0, num_rows=99, num_bytes=999, days=range(50)), entry(1)]})
    assert ([e.position.seq for _, e in made.taken], made.is_full) == ([0], True)


@pytest.mark.parametrize(("last", "seq"), [(None, 1), (Position(epoch=1, seq=4), 6), (Position(epoch=1, seq=4), 4)])
def test_a_hole_in_the_log_is_refused(last: Position | None, seq: int) -> None:
    with pytest.raises(LogGapError, match="log_lost"):
        cut({0: last}).add({0: [entry(seq)]})


def test_a_later_epoch_follows_on_any_position() -> None:
    made = cut({0: Position(epoch=1, seq=4)})
    later = Entry(
        **{name: getattr(entry(0), name) for name in Entry.__slots__} | {"position": Position(epoch=3, seq=0)}
    )
    made.add({0: [later]})
    assert made.at == {0: Position(epoch=3, seq=0)}


def counters(**values: int) -> LogCounters:
    return LogCounters(**{"epoch": 1, "last": 5, "rows": 0, "bytes": 0, "first_rows": 0, "first_bytes": 0, "repeated_rows": 0, **values})  # fmt: skip  # noqa: E501


@pytest.mark.parametrize(
    ("found", "position", "code"),
    [
        (None, None, "log_lost"),
        (counters(epoch=2), Position(epoch=1, seq=3), "log_rewound"),
        (counters(last=2), Position(epoch=1, seq=3), "log_rewound"),
    ],
)
def test_a_server_that_disagrees_with_the_table_is_refused(
    found: LogCounters | None, position: Position | None, code: str
) -> None:
    with pytest.raises(LogGapError) as refusal:
        refuse_gap(found, position, epoch=1, where="here")
    assert refusal.value.code == code


def test_a_new_epoch_may_begin_below_the_position_of_the_old_one() -> None:
    found = counters(epoch=2, last=-1)
    assert refuse_gap(found, Position(epoch=1, seq=9), epoch=2, where="here") == found


def test_a_read_is_bounded_by_bytes() -> None:
    large = Waiting(entries=100, num_rows=1, num_bytes=100 * (4 << 20))
    small = Waiting(entries=100, num_rows=100, num_bytes=100)
    assert (large.entries_per_read(4), large.entries_per_read(1), small.entries_per_read(4)) == (1, 4, 64)


def test_a_read_of_entries_whose_size_is_not_known_takes_them_for_large_ones() -> None:
    older = Waiting(entries=1)
    assert (older.entries_per_read(4), older.entries_per_read(1)) == (1, 4)
