"""TaobaoAd's loader, on small files of the published format that we make ourselves, against brute force in Python."""

import csv
import gzip
import random
import shutil
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from das_service.door.validation import BodyLimits, validate_arrow
from experiments.data.taobao_ad import DayFile, build_impressions, dataset_spec, main
from schemas.dataset import DatasetSpec
from tests.served import arrow_body

HEADS = {
    "raw_sample": "user,time_stamp,adgroup_id,pid,nonclk,clk",
    "ad_feature": "adgroup_id,cate_id,campaign_id,customer,brand,price",
    "user_profile": "userid,cms_segid,cms_group_id,final_gender_code,age_level,pvalue_level,shopping_level,occupation,"
    "new_user_class_level ",
    "behavior_log": "user,time_stamp,btag,cate,brand",
}
MIDNIGHT = 1_494_000_000  # 2017-05-06 in Beijing
BEIJING = timezone(timedelta(hours=8))
Rows = dict[str, list[list[Any]]]


def make_rows() -> Rows:
    """A hundred impressions of three days, of users without profile and without behaviour too, times shared."""
    chance = random.Random(56)
    ads = [[ad, chance.randrange(9), ad % 5, ad % 3, "NULL" if ad % 4 == 0 else ad, 10.5 * ad] for ad in range(1, 21)]
    profiles = [
        [user, 1, 2, 1 + user % 2, 3, "" if user % 3 == 0 else 2, 3, 0, "" if user % 4 == 0 else 1]
        for user in range(1, 71) if user % 7
    ]  # fmt: skip
    samples = []
    for _ in range(100):
        clicked = int(chance.random() < 0.2)
        time = MIDNIGHT + chance.choice([-1 + 86_400, 86_400, chance.randrange(3 * 86_400)])
        samples.append(
            [chance.randrange(1, 71), time, chance.randrange(1, 23), chance.choice(["430548_1007", "430539_1007"]),
             1 - clicked, clicked]
        )  # fmt: skip
    samples += [samples[0], samples[1]]
    times = [sample[1] for sample in samples]
    behaviours = [
        [chance.randrange(1, 66), chance.choice(times) - chance.choice([0, 0, 1, 5_000, 900_000]),
         chance.choice(["pv", "cart", "fav", "buy"]), chance.randrange(50), chance.choice([7, 8, ""])]
        for _ in range(1_500)
    ]  # fmt: skip
    return {"raw_sample": samples, "ad_feature": ads, "user_profile": profiles, "behavior_log": behaviours}


def write(folder: Path, rows: Rows) -> Path:
    folder.mkdir(exist_ok=True)
    for name, lines in rows.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            file.write(HEADS[name] + "\n")
            csv.writer(file, lineterminator="\n").writerows(lines)
    return folder


def rows_of(files: tuple[DayFile, ...]) -> list[dict[str, Any]]:
    return [row for file in files for row in pq.read_table(file.path).to_pylist()]


def expected(rows: Rows, *, length: int) -> list[dict[str, Any]]:
    """The same rows, from the published description alone."""
    ads = {ad[0]: ad for ad in rows["ad_feature"]}
    users = {user[0]: user for user in rows["user_profile"]}
    names = HEADS["user_profile"].strip().split(",")[1:]
    seen: dict[tuple[Any, ...], int] = {}
    found = []
    for user, time, ad, pid, _, clicked in sorted(rows["raw_sample"], key=lambda sample: sample[5]):
        key = (user, time, ad, pid)
        seen[key] = seen.get(key, 0) + 1
        local = datetime.fromtimestamp(time, BEIJING)
        of_ad, of_user = ads.get(ad, [None] * 6), users.get(user, [None] * 9)
        row = {
            "example_id": "-".join(map(str, key)) + (f"-{seen[key]}" if seen[key] > 1 else ""),
            "event_time": datetime.fromtimestamp(time, UTC), "user_id": user, "adgroup_id": ad, "pid": pid,
            "cate_id": of_ad[1], "campaign_id": of_ad[2], "customer": of_ad[3],
            "brand": None if of_ad[4] == "NULL" else of_ad[4], "price": of_ad[5],
            **{name: None if value == "" else value for name, value in zip(names, of_user[1:], strict=True)},
            "hour": local.hour, "weekday": local.weekday(), "click": float(clicked),
        }  # fmt: skip
        if length:
            before = sorted(
                (at, kind, cate, brand or 0) for who, at, kind, cate, brand in rows["behavior_log"]
                if who == user and at < time
            )[-length:]  # fmt: skip
            row["history_kinds"] = [kind for _, kind, _, _ in before]
            row["history_cates"] = [cate for _, _, cate, _ in before]
            row["history_brands"] = [brand for _, _, _, brand in before]
        found.append(row)
    return sorted(found, key=lambda row: (row["event_time"], row["example_id"]))


@pytest.mark.parametrize("length", [0, 3, 50])
def test_days_hold_every_impression_with_what_was_known_before_it(tmp_path: Path, length: int) -> None:
    rows = make_rows()
    files = build_impressions(write(tmp_path / "raw", rows), tmp_path / "days", history_length=length)
    assert [file.day for file in files] == ["2017-05-06", "2017-05-07", "2017-05-08"]
    assert [file.path.name for file in files] == [f"day_{file.day}.parquet" for file in files]
    found = rows_of(files)
    assert found == expected(rows, length=length)
    assert max((len(row.get("history_cates", [])) for row in found), default=0) == min(length, 32)
    assert sum(file.num_rows for file in files) == 102
    assert sum(file.num_positives for file in files) == sum(row["click"] for row in found)
    assert sorted(path.name for path in (tmp_path / "days").iterdir()) == [file.path.name for file in files]


def test_the_columns_are_those_of_a_dataset_that_can_be_declared(tmp_path: Path) -> None:
    files = build_impressions(write(tmp_path / "raw", make_rows()), tmp_path / "days", history_length=4)
    spec = DatasetSpec.model_validate(dataset_spec(history_length=4))
    schema = pq.read_schema(files[0].path)
    assert schema.names == ["example_id", "event_time", *(feature.name for feature in spec.features), "click"]
    limits = BodyLimits(max_rows=1_000, max_decoded_bytes=10_000_000)
    for file in files:
        table = pq.read_table(file.path).drop_columns(["click"])
        now_us = table["event_time"][-1].cast(pa.int64()).as_py()
        valid = validate_arrow(arrow_body(table), spec, limits=limits, now_us=now_us)
        assert (valid.errors, valid.batch.num_rows) == ([], file.num_rows)


def test_the_same_files_give_the_same_bytes_packed_or_not_whatever_the_threads(tmp_path: Path) -> None:
    source = write(tmp_path / "raw", make_rows())
    packed = tmp_path / "packed"
    packed.mkdir()
    for path in source.iterdir():
        with gzip.open(packed / f"{path.name}.gz", "wb") as file:
            file.write(path.read_bytes())
    first = build_impressions(source, tmp_path / "days")
    second = build_impressions(packed, tmp_path / "again", num_threads=1)
    assert [file.path.read_bytes() for file in first] == [file.path.read_bytes() for file in second]
    stale = tmp_path / "days" / "day_2001-01-01.parquet"
    stale.write_bytes(b"")
    assert build_impressions(source, tmp_path / "days") == first
    assert not stale.exists()


def test_without_the_log_of_behaviours_there_are_no_histories(tmp_path: Path) -> None:
    source = write(tmp_path / "raw", make_rows())
    (source / "behavior_log.csv").unlink()
    files = build_impressions(source, tmp_path / "days")
    assert rows_of(files) == expected(make_rows(), length=0)


def test_a_missing_or_strange_file_is_told_by_name(tmp_path: Path) -> None:
    source = write(tmp_path / "raw", make_rows())

    def refused(name: str, text: str | None, *, error: type[Exception], says: str) -> None:
        other = tmp_path / "other"
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(source, other)
        (other / f"{name}.csv").unlink() if text is None else (other / f"{name}.csv").write_text(text)
        with pytest.raises(error, match=says):
            build_impressions(other, tmp_path / "days")
        assert list((tmp_path / "days").iterdir()) == []

    (tmp_path / "days").mkdir()
    refused("ad_feature", None, error=FileNotFoundError, says="has no ad_feature.csv; unpack")
    refused(
        "user_profile", "a,b\n1,2\n", error=ValueError, says="user_profile.csv has the columns a, b; it should have us"
    )
    head = HEADS["raw_sample"]
    refused(
        "raw_sample",
        f"{head}\n1,2017-05-06,3,p,1,0\n",
        error=ValueError,
        says=r"raw_sample.csv: CSV Error on Line: 2; .*\"2017-05-06\"",
    )
    refused("raw_sample", f"{head}\n1,{MIDNIGHT},3\n", error=ValueError, says="Columns: 6 Found: 3")
    refused("raw_sample", f"{head}\n1,{MIDNIGHT},3,p,1,1\n", error=ValueError, says="1 rows whose clk and nonclk")
    refused("raw_sample", f"{head}\n,{MIDNIGHT},3,p,1,0\n", error=ValueError, says="1 rows without user")
    refused(
        "ad_feature", f"{HEADS['ad_feature']}\n7,1,1,1,1,1\n7,2,1,1,1,1\n", error=ValueError, says="adgroup_id 7 more"
    )
    (source / "user_profile.csv").rename(source / "user_profile.csv.gz")
    with pytest.raises(ValueError, match=r"user_profile.csv.gz can't be read: Not a gzipped file"):
        build_impressions(source, tmp_path / "days")
    (source / "user_profile.csv.gz").rename(source / "user_profile.csv")
    with pytest.raises(ValueError, match="history_length is -1"):
        build_impressions(source, tmp_path / "days", history_length=-1)


def test_the_command_builds_and_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "raw", make_rows())
    assert main([str(source), str(tmp_path / "days"), "--history-length", "5"]) == 0
    assert "day_2017-05-08.parquet: " in capsys.readouterr().out
    assert main([str(tmp_path / "nothing"), str(tmp_path / "days")]) == 1
    assert "has no raw_sample.csv" in " ".join(capsys.readouterr().err.split())
