"""The impressions against brute force on the raw tables, and laws that any sampling of them must keep."""

from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.data import complete_journey
from experiments.data.complete_journey import (
    DATASET_SPEC,
    EXAMPLE_COLUMNS,
    FEATURE_COLUMNS,
    LABEL_COLUMN,
    WeekFile,
    build_impressions,
    count_before,
    find_data,
)
from schemas.dataset import TIMESTAMP, DatasetSpec

SLICE = "hash(example_id) % 500 = 0"  # about 300 rows of the three weeks


@pytest.fixture(scope="module")
def con(week_files: dict[int, WeekFile]) -> Iterator[duckdb.DuckDBPyConnection]:
    """The raw tables under their own names, and `rows`: the built weeks."""
    with duckdb.connect(":memory:") as con:
        con.execute("SET TimeZone = 'UTC'")
        for file in find_data().glob("*.parquet"):
            con.read_parquet(str(file)).create_view(file.stem)
        con.read_parquet([str(file.path) for file in week_files.values()]).create_view("built")
        con.execute("CREATE TABLE rows AS SELECT *, event_time::TIMESTAMP AS time FROM built")
        con.execute(
            "CREATE TABLE bought AS SELECT DISTINCT household_id, transaction_timestamp AS time, store_id, week, "
            "product_id FROM transactions"
        )
        con.execute(
            "CREATE TABLE promoted AS SELECT DISTINCT week, store_id, product_id FROM promotions "
            "WHERE week IN (1, 2, 20) AND (display_location <> '0' OR mailer_location <> '0')"
        )
        yield con


def _numbers(con: duckdb.DuckDBPyConnection, query: str) -> tuple[object, ...]:
    (row,) = con.sql(query).fetchall()
    return tuple(row)


def test_the_same_week_has_the_same_bytes_alone_and_with_one_thread(
    week_files: dict[int, WeekFile], tmp_path: Path
) -> None:
    (alone,) = build_impressions(tmp_path, weeks=[2], num_threads=1)
    assert alone.path.read_bytes() == week_files[2].path.read_bytes()


def test_a_rerun_leaves_no_week_of_the_run_before_and_reports_its_rows(tmp_path: Path) -> None:
    (tmp_path / "week_53.parquet").write_bytes(b"stale")
    (tmp_path / "notes.txt").write_text("not ours")
    reported: list[int] = []
    (file,) = build_impressions(tmp_path, weeks=[1], on_progress=reported.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "week_01.parquet"]
    assert reported == [file.num_rows]


def test_a_week_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weeks \[0, 54\] are outside 1\.\.53"):
        build_impressions(tmp_path, weeks=[0, 1, 54])


def test_rows_are_in_the_order_of_event_time_then_example_id(week_files: dict[int, WeekFile]) -> None:
    table = pq.read_table(week_files[2].path, columns=["event_time", "example_id"])
    rows = list(zip(*(column.to_pylist() for column in table.columns), strict=True))
    assert rows == sorted(rows)


def test_every_example_has_its_own_id(con: duckdb.DuckDBPyConnection) -> None:
    assert _numbers(con, "SELECT count(*) - count(DISTINCT example_id) FROM rows") == (0,)


def test_files_count_their_rows_and_positives(con: duckdb.DuckDBPyConnection, week_files: dict[int, WeekFile]) -> None:
    counted = con.sql("SELECT week, count(*), count(*) FILTER (purchase = 1) FROM rows GROUP BY week ORDER BY week")
    assert counted.fetchall() == [(file.week, file.num_rows, file.num_positives) for file in week_files.values()]


def test_the_declaration_fits_the_service_and_the_files(week_files: dict[int, WeekFile]) -> None:
    spec = DatasetSpec.model_validate(DATASET_SPEC)
    schema = pq.read_schema(week_files[20].path)
    assert tuple(schema.names) == (*EXAMPLE_COLUMNS, LABEL_COLUMN, "week")
    assert schema.field("event_time").type == TIMESTAMP
    kinds = {feature.name: pa.float32() if feature.type == "float" else feature.arrow_type for feature in spec.features}
    assert {name: schema.field(name).type for name in FEATURE_COLUMNS} == kinds


def test_only_what_is_declared_nullable_is_missing(week_files: dict[int, WeekFile]) -> None:
    table = pq.read_table(week_files[20].path)
    missing = {name for name in table.column_names if table[name].null_count}
    nullable = {feature["name"] for feature in DATASET_SPEC["features"] if feature.get("nullable")}
    assert missing <= nullable
    assert {"age", "home_ownership"} <= missing


def test_a_model_sees_neither_basket_nor_week() -> None:
    assert not {"basket_id", "week", LABEL_COLUMN} & set(FEATURE_COLUMNS)


def test_positives_are_the_promoted_products_of_the_basket_all_of_them(con: duckdb.DuckDBPyConnection) -> None:
    expected = (
        "SELECT household_id, time, store_id, product_id FROM bought JOIN promoted USING (week, store_id, product_id)"
    )
    found = "SELECT user_id, time, store_id, product_id FROM rows WHERE purchase = 1"
    assert con.sql(f"({expected}) EXCEPT ALL ({found})").fetchall() == []
    assert con.sql(f"({found}) EXCEPT ALL ({expected})").fetchall() == []


def test_every_impression_is_of_a_product_promoted_in_that_store_that_week(con: duckdb.DuckDBPyConnection) -> None:
    assert _numbers(con, "SELECT count(*) FROM rows ANTI JOIN promoted USING (week, store_id, product_id)") == (0,)


def test_a_negative_was_not_bought_in_the_basket(con: duckdb.DuckDBPyConnection) -> None:
    negatives = "SELECT user_id AS household_id, time, store_id, product_id FROM rows WHERE purchase = 0"
    query = f"SELECT count(*) FROM ({negatives}) SEMI JOIN bought USING (household_id, time, store_id, product_id)"
    assert _numbers(con, query) == (0,)


def test_a_basket_has_nine_negatives_per_positive_and_three_more(con: duckdb.DuckDBPyConnection) -> None:
    baskets = "SELECT count(*) AS n, count(*) FILTER (purchase = 1) AS p FROM rows GROUP BY user_id, time, store_id"
    assert _numbers(con, f"SELECT count(*) FILTER (n <> 10 * p + 3) FROM ({baskets})") == (0,)


def test_every_basket_in_a_store_with_promotions_is_there(con: duckdb.DuckDBPyConnection) -> None:
    stores = "SELECT DISTINCT week, store_id FROM promoted"
    expected = f"SELECT DISTINCT household_id, time, store_id FROM bought SEMI JOIN ({stores}) USING (week, store_id)"
    found = "SELECT DISTINCT user_id, time, store_id FROM rows"
    assert con.sql(f"({expected}) EXCEPT ({found})").fetchall() == []


def test_of_several_flags_the_most_prominent_stand(con: duckdb.DuckDBPyConnection) -> None:
    flags = (
        "SELECT week, store_id, product_id, arg_min(display_location, strpos('13456297A0', display_location)) AS d, "
        "arg_min(mailer_location, strpos('DZHFLXJPAC0', mailer_location)) AS m "
        "FROM promotions WHERE week IN (1, 2, 20) GROUP BY ALL"
    )
    differs = "count(*) FILTER (display <> d OR mailer <> m)"
    query = f"SELECT {differs}, count(*) FROM rows JOIN ({flags}) USING (week, store_id, product_id)"
    assert _numbers(con, query) == (0, *_numbers(con, "SELECT count(*) FROM rows"))


@pytest.mark.parametrize(
    ("feature", "attribute"),
    [
        ("user_product_purchases", "product_id"),
        ("user_type_purchases", "product_type"),
        ("user_category_purchases", "product_category"),
        ("user_manufacturer_purchases", "manufacturer_id"),
    ],
)
def test_history_counts_are_purchases_strictly_before_the_event(
    con: duckdb.DuckDBPyConnection, feature: str, attribute: str
) -> None:
    query = f"""
        SELECT r.example_id, any_value(r.{feature})::BIGINT, count(b.product_id)
        FROM (SELECT * FROM rows WHERE {SLICE}) r
        LEFT JOIN (SELECT bought.*, products.{attribute} AS subject FROM bought JOIN products USING (product_id)) b
        ON b.household_id = r.user_id AND b.time < r.time AND b.subject = r.{attribute}
        GROUP BY r.example_id"""
    rows = con.sql(query).fetchall()
    assert [row for row in rows if row[1] != row[2]] == []
    assert sum(row[1] for row in rows) > 0


def test_baskets_are_counted_strictly_before_the_event(con: duckdb.DuckDBPyConnection) -> None:
    query = f"""
        SELECT r.example_id, any_value(r.user_baskets)::BIGINT, count(b.time)
        FROM (SELECT * FROM rows WHERE {SLICE}) r
        LEFT JOIN (SELECT DISTINCT household_id, time, store_id FROM bought) b
        ON b.household_id = r.user_id AND b.time < r.time GROUP BY r.example_id"""
    rows = con.sql(query).fetchall()
    assert [row for row in rows if row[1] != row[2]] == []
    assert sum(row[1] for row in rows) > 0


def test_active_campaigns_run_at_the_time_their_last_day_included(con: duckdb.DuckDBPyConnection) -> None:
    query = """
        SELECT r.user_id, r.time, any_value(r.num_active_campaigns), count(d.campaign_id)
        FROM (SELECT DISTINCT user_id, time, num_active_campaigns FROM rows) r
        LEFT JOIN (campaigns c JOIN campaign_descriptions d USING (campaign_id))
        ON c.household_id = r.user_id AND r.time >= d.start_date AND r.time < d.end_date + INTERVAL 1 DAY
        GROUP BY r.user_id, r.time"""
    rows = con.sql(query).fetchall()
    assert [row for row in rows if row[2] != row[3]] == []
    assert max(row[2] for row in rows) > 1


def test_a_coupon_is_of_an_active_campaign_of_the_household_for_the_product(con: duckdb.DuckDBPyConnection) -> None:
    query = f"""
        SELECT r.example_id, any_value(r.has_coupon), count(k.campaign_id) > 0
        FROM (SELECT * FROM rows WHERE {SLICE}) r
        LEFT JOIN (campaigns c JOIN campaign_descriptions d USING (campaign_id) JOIN coupons k USING (campaign_id))
        ON c.household_id = r.user_id AND k.product_id = r.product_id
            AND r.time >= d.start_date AND r.time < d.end_date + INTERVAL 1 DAY
        GROUP BY r.example_id"""
    rows = con.sql(query).fetchall()
    assert [row for row in rows if row[1] != row[2]] == []
    assert any(row[2] for row in rows)


def test_popularity_is_of_the_weeks_before_only() -> None:
    bought = [(1, 0), (1, 1), (2, 1), (2, 1), (4, 0)]  # week and product of one purchase each
    week, product = (np.array(column) for column in zip(*bought, strict=True))
    nothing = np.zeros(len(bought), np.int64)
    baskets = complete_journey._Baskets(
        week=week, seconds=nothing, household=nothing, store=nothing, basket=np.arange(len(bought)), product=product
    )
    earlier = complete_journey._count_earlier_purchases(baskets, num_products=2)
    assert earlier[1:6].tolist() == [[0, 0], [1, 1], [1, 3], [1, 3], [2, 3]]


def test_attributes_are_those_of_the_product_the_household_and_the_clock(con: duckdb.DuckDBPyConnection) -> None:
    query = """
        SELECT count(*) FROM rows r JOIN products p USING (product_id)
        LEFT JOIN demographics d ON d.household_id = user_id
        WHERE (r.manufacturer_id, r.department, r.brand, r.product_category, r.product_type)
            IS DISTINCT FROM (p.manufacturer_id, p.department, p.brand, p.product_category, p.product_type)
        OR (r.age, r.income, r.home_ownership, r.marital_status, r.household_size, r.household_comp, r.kids_count)
            IS DISTINCT FROM
            (d.age, d.income, d.home_ownership, d.marital_status, d.household_size, d.household_comp, d.kids_count)
        OR hour <> extract(hour FROM time) OR weekday <> isodow(time) - 1"""
    assert _numbers(con, query) == (0,)


@given(
    subjects=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=30),
    asked=st.tuples(st.integers(0, 3), st.integers(0, 5)),
)
def test_equal_times_never_count(subjects: list[tuple[int, int]], asked: tuple[int, int]) -> None:
    keys = np.sort(np.array([(subject << 25) | seconds for subject, seconds in subjects], dtype=np.int64))
    (counted,) = count_before(keys, np.array([(asked[0] << 25) | asked[1]]))
    assert counted == sum(subject == asked[0] and seconds < asked[1] for subject, seconds in subjects)
