"""DuckDB as the joins want it."""

import json
from contextlib import closing

import pytest

from das_service.tables.duck import Duck

SMALL, LARGE = "10", "1000000"


@pytest.mark.parametrize(("left", "right"), [(SMALL, LARGE), (LARGE, SMALL)])
def test_joins_as_written_build_the_hash_table_of_the_right_side(left: str, right: str) -> None:
    query = f"EXPLAIN (FORMAT json) SELECT * FROM range({left}) s(i) JOIN range({right}) a(i) USING (i)"
    with closing(Duck(memory_bytes=64 << 20, joins_as_written=True)) as duck, duck.cursor() as cursor:
        (_, plan), *_ = cursor.execute(query).fetchall()

    (join,) = json.loads(plan)[0]["children"]

    assert join["name"] == "HASH_JOIN"
    assert [side["extra_info"]["Estimated Cardinality"] for side in join["children"]] == [left, right]
