"""How many entries lie after a place, against entries written out."""

from hypothesis import given
from hypothesis import strategies as st

from das_service.logs.streams import LogCounters, entries_after
from schemas.entries import Position

PLACES = st.none() | st.builds(lambda epoch, seq: Position(epoch=epoch, seq=seq), st.integers(1, 3), st.integers(0, 12))


def counters(*, older: Position | None, last: int) -> LogCounters:
    return LogCounters(
        epoch=3, last=last, rows=0, bytes=0, first_rows=0, first_bytes=0, repeated_rows=0, older=older
    )  # fmt: skip


@given(place=PLACES, older=st.none() | st.integers(0, 9), last=st.integers(-1, 9))
def test_entries_after_a_place_are_those_of_both_epochs(place: Position | None, older: int | None, last: int) -> None:
    survived = [Position(epoch=2, seq=seq) for seq in range(0 if older is None else older + 1)]
    entries = [*survived, *(Position(epoch=3, seq=seq) for seq in range(last + 1))]
    expected = sum(place is None or entry.number > place.number for entry in entries)
    assert entries_after(place, counters(older=survived[-1] if survived else None, last=last)) == expected


def test_a_group_that_was_given_nothing_has_all_before_it() -> None:
    place = Position(epoch=0, seq=0)
    assert entries_after(place, counters(older=Position(epoch=2, seq=4), last=1)) == 7
