"""Listing sample files, cutting them into partitions, their order in an epoch, and reading one."""

from __future__ import annotations

import gc
import os
import uuid
import zipfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowps.errors import DataError, SchemaError
from flowps.hub import partition as partition_module
from flowps.hub.partition import Partition, SampleFile, epoch_order, list_files, partitions, read_table

KNOB = "data.train"
COLUMNS = pa.schema([("label", pa.int8()), ("u", pa.int64())])


def rows(start: int, stop: int) -> pa.Table:
    """Rows `start` … `stop` of an endless table: u is the number of the row."""
    u = np.arange(start, stop)
    return pa.table({"label": pa.array(u % 2, pa.int8()), "u": u}, schema=COLUMNS)


def write(path: Path, row_groups: Sequence[int] = (3,), start: int = 0) -> Path:
    """A file of rows from `start`, in row groups of these sizes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, COLUMNS) as writer:
        for size in row_groups:
            writer.write_table(rows(start, start + size))
            start += size
    return path


def write_table(path: Path, columns: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def listed(*sources: Path | str) -> list[SampleFile]:
    return list_files([str(source) for source in sources], KNOB)


def urls(*sources: Path | str) -> list[str]:
    return [file.url for file in listed(*sources)]


def refusal_of(*sources: Path | str, error: type[DataError] = DataError) -> str:
    with pytest.raises(error) as refusal:
        listed(*sources)
    assert type(refusal.value) is error
    return str(refusal.value)


def only_partition(path: Path | str) -> Partition:
    (found,) = partitions(listed(path), 1 << 20)
    return found


def read_refusal_of(partition: Partition, columns: Sequence[str] = ("label", "u")) -> str:
    with pytest.raises(DataError) as refusal:
        read_table(partition, columns)
    return str(refusal.value)


@pytest.fixture
def memory() -> Iterator[str]:
    """A folder of fsspec's in-memory file system, which all of the process shares."""
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    fs, path = fsspec.core.url_to_fs(url)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def put(url: str, table: pa.Table) -> str:
    with fsspec.open(url, "wb") as file:
        pq.write_table(table, file)
    return url


# --- what a source names ----------------------------------------------------------------------------------------------


def test_a_file_and_what_its_footer_says(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(rows(0, 5).replace_schema_metadata({"flowps.best_auc": "0.8"}), path, row_group_size=2)
    (file,) = listed(path)
    assert file.url == str(path)
    assert dict(file.columns) == {"label": pa.int8(), "u": pa.int64()}
    assert (file.row_groups, file.num_rows, dict(file.hive)) == ((2, 2, 1), 5, {})
    assert file.metadata["flowps.best_auc"] == "0.8"


def test_a_file_may_have_any_name(tmp_path: Path) -> None:
    path = write(tmp_path / "part 0 (copy), 50% ü.data")
    assert urls(path) == [str(path)]
    assert read_table(only_partition(path), ["u"]).num_rows == 3


def test_globs_in_a_stable_order(tmp_path: Path) -> None:
    paths = [write(tmp_path / name) for name in ("c.parquet", "a.parquet", "b.parquet", "z.txt")]
    assert urls(tmp_path / "*.parquet") == sorted(str(p) for p in paths[:3])
    assert urls(tmp_path / "[ab].parquet") == [str(paths[1]), str(paths[2])]
    assert urls(tmp_path / "?.parquet") == sorted(str(p) for p in paths[:3])


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "data" / "a.parquet")
    monkeypatch.chdir(tmp_path)
    assert urls("data/a.parquet") == urls("data") == urls("data/*") == [str(path)]


def test_sources_in_their_order_and_each_file_once(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.parquet"), write(tmp_path / "b.parquet")
    assert urls(b, a) == [str(b), str(a)]
    assert urls(b, tmp_path, a) == [str(b), str(a)]


def test_one_file_by_two_spellings_is_one_file(tmp_path: Path) -> None:
    path = write(tmp_path / "sub" / "a.parquet")
    assert urls(path, f"{tmp_path}/./sub/a.parquet", f"{tmp_path}/sub/../sub") == [str(path)]


def test_a_directory_means_the_parquet_files_below_it(tmp_path: Path) -> None:
    paths = [write(tmp_path / name) for name in ("b.parquet", "deep/er/c.parquet", "a.pq")]
    for other in ("notes.txt", "d.parquet.crc", "e.csv"):
        (tmp_path / other).write_text("not Parquet")
    assert urls(tmp_path) == sorted(str(p) for p in paths)
    assert urls(f"{tmp_path}/") == urls(tmp_path)


def test_hidden_and_underscored_files_and_folders_are_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path / "sub" / "a_b.c.parquet")
    for hidden in ("_metadata.parquet", ".a.parquet", "_tmp/b.parquet", "sub/.cache/deep/c.parquet", "sub/_d.parquet"):
        write(tmp_path / hidden)
    assert urls(tmp_path) == [str(path)]


def test_a_folder_that_is_hidden_itself_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / ".cache" / "_data" / "a.parquet")
    assert urls(tmp_path / ".cache" / "_data") == [str(path)]
    assert urls(path) == [str(path)]


def test_a_glob_of_folders_means_the_files_below_them(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"day={d}" / "hour=1" / "a.parquet") for d in (1, 2)]
    write(tmp_path / "other" / "a.parquet")
    assert urls(tmp_path / "day=*") == [str(p) for p in paths]


def test_a_glob_of_files_and_folders_takes_both(tmp_path: Path) -> None:
    """Nothing is dropped in silence: not the folders either, because a file matched too."""
    paths = [write(tmp_path / "a.parquet"), write(tmp_path / "more" / "b.parquet")]
    assert sorted(urls(tmp_path / "*")) == sorted(str(p) for p in paths)


def test_a_star_passes_over_hidden_and_underscored_names(tmp_path: Path) -> None:
    """What Spark leaves beside the data (_SUCCESS, _temporary, .part.crc) is no data through a glob either."""
    paths = [write(tmp_path / "files" / "a.parquet"), write(tmp_path / "folders" / "day=1" / "a.parquet")]
    (tmp_path / "files" / "_SUCCESS").touch()
    write(tmp_path / "folders" / "_temporary" / "b.parquet")
    write(tmp_path / "folders" / ".cache" / "c.parquet")
    assert urls(tmp_path / "files" / "*") == [str(paths[0])]
    assert urls(tmp_path / "folders" / "*") == [str(paths[1])]


def test_a_path_with_brackets_that_exists_is_no_pattern(tmp_path: Path) -> None:
    file = write(tmp_path / "part [1]" / "x.parquet")
    assert urls(file) == urls(tmp_path / "part [1]") == [str(file)]


def test_a_chain_of_fsspec_urls(tmp_path: Path) -> None:
    """Files in an archive: the url of each keeps the way to the archive."""
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for k in range(2):
            archive.write(write(tmp_path / f"{k}.parquet", start=3 * k), f"part/{k}.parquet")
    for source in (f"zip://part/*.parquet::file://{tmp_path}/all.zip", f"zip://part::file://{tmp_path}/all.zip"):
        files = listed(source)
        assert [file.url for file in files] == [f"zip://part/{k}.parquet::file://{tmp_path}/all.zip" for k in range(2)]
        read = [read_table(part, COLUMNS.names) for part in partitions(files, 10)]
        assert pa.concat_tables(read)["u"].to_pylist() == list(range(6))


def test_an_empty_path_is_refused() -> None:
    """Of an unset variable: it would mean all below the working directory."""
    assert refusal_of("").startswith("data.train: a path is empty; give ")
    assert refusal_of(" ").startswith("data.train: a path is empty; give ")


def test_lists_of_dictionaries_over_several_row_groups(tmp_path: Path) -> None:
    """Arrow reads them from one row group only."""
    tags = pa.array([["a"], ["b", "c"], None, [], ["a", None]], pa.list_(pa.dictionary(pa.int32(), pa.string())))
    table = pa.table({"label": pa.array([0, 1, 0, 1, 0], pa.int8()), "tags": tags})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=2)
    (part,) = partitions(listed(tmp_path / "x.parquet"), 10)
    assert len(part.row_groups) == 3
    assert read_table(part, ["tags"])["tags"].to_pylist() == [["a"], ["b", "c"], None, [], ["a", None]]


def test_a_file_that_shrinks_while_it_is_read_is_an_error_not_the_end_of_the_process(tmp_path: Path) -> None:
    """Mapped into memory, reading behind the new end would be a bus error."""
    file = write(tmp_path / "x.parquet", [200_000])
    with partition_module._open(str(file)) as opened:
        os.truncate(file, 4096)
        with pytest.raises(OSError, match=r".+"):
            opened.read_row_group(0)


def test_an_fsspec_url(memory: str) -> None:
    url = put(f"{memory}/day=1/a b.parquet", rows(0, 3))
    put(f"{memory}/_tmp/b.parquet", rows(0, 3))
    for source in (url, memory, f"{memory}/", f"{memory}/day=1", f"{memory}/*/a*.parquet", f"{memory}/day=*"):
        (file,) = listed(source)
        assert file.url.startswith("memory://")
        assert file.url.endswith("/day=1/a b.parquet")
        assert dict(file.hive) == {"day": "1"}
        found = read_table(only_partition(source), ["u", "day"])
        assert found.to_pydict() == {"u": [0, 1, 2], "day": ["1"] * 3}


# --- hive keys --------------------------------------------------------------------------------------------------------


def test_hive_keys_become_string_columns(tmp_path: Path) -> None:
    for day, hour in (("2024-09-21", "07"), ("2024-09-22", "23")):
        write(tmp_path / f"date={day}" / f"hour={hour}" / "a.parquet")
    first, second = listed(tmp_path)
    assert dict(first.hive) == {"date": "2024-09-21", "hour": "07"}
    assert dict(second.hive) == {"date": "2024-09-22", "hour": "23"}
    assert dict(first.columns) == {"date": pa.string(), "hour": pa.string(), "label": pa.int8(), "u": pa.int64()}
    part = partitions([first], 100)[0]
    assert dict(part.hive) == {"date": "2024-09-21", "hour": "07"}
    found = read_table(part, ["hour", "u", "label"])
    assert found.column("hour").to_pylist() == ["07"] * 3
    assert found.schema.field("hour").type == pa.string()
    assert set(found.column_names) == {"hour", "u", "label"}


@pytest.mark.parametrize("value", ["a/b", "50%", "x=y", "ü b", "", "%2F"])
def test_hive_values_are_percent_decoded(tmp_path: Path, value: str) -> None:
    write(tmp_path / f"city%20name={quote(value, safe='=')}" / "a.parquet")
    (file,) = listed(tmp_path)
    assert dict(file.hive) == {"city name": value}
    assert read_table(partitions([file], 100)[0], ["city name"]).to_pydict() == {"city name": [value] * 3}


def test_a_key_that_is_also_a_stored_column_is_read_from_the_file(tmp_path: Path) -> None:
    write(tmp_path / "u=9" / "a.parquet")
    (file,) = listed(tmp_path)
    assert (dict(file.hive), file.columns["u"]) == ({}, pa.int64())
    assert read_table(partitions([file], 100)[0], ["u"]).column("u").to_pylist() == [0, 1, 2]


def test_a_file_name_with_an_equals_sign_is_no_key(tmp_path: Path) -> None:
    write(tmp_path / "k=1.parquet")
    assert dict(listed(tmp_path)[0].hive) == {}


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_missing_path(tmp_path: Path) -> None:
    message = refusal_of(tmp_path / "nowhere.parquet")
    assert message.startswith(f"{KNOB}: {tmp_path}/nowhere.parquet: no such file or directory")
    assert "give Parquet files, a glob, a directory or an fsspec URL" in message


@pytest.mark.parametrize("pattern", ["*.parquet", "part-?.parquet", "part-[0-9].parquet"])
def test_a_glob_that_matches_nothing(tmp_path: Path, pattern: str) -> None:
    message = refusal_of(tmp_path / pattern)
    assert message.startswith(f"{KNOB}: {tmp_path}/{pattern}: matches no file")


def test_one_missing_source_among_others(tmp_path: Path) -> None:
    assert "gone.parquet: no such file" in refusal_of(write(tmp_path / "a.parquet"), tmp_path / "gone.parquet")


def test_an_empty_directory(tmp_path: Path) -> None:
    assert refusal_of(tmp_path) == f"{KNOB}: {tmp_path}: the directory holds no .parquet file"
    (tmp_path / "notes.txt").write_text("x")
    write(tmp_path / "_hidden.parquet")
    assert "holds no .parquet file" in refusal_of(tmp_path)


def test_an_unknown_kind_of_url() -> None:
    assert refusal_of("nosuch://bucket/a.parquet").startswith(f"{KNOB}: nosuch://bucket/a.parquet: cannot be listed: ")


def test_a_missing_url(memory: str) -> None:
    assert refusal_of(f"{memory}/a.parquet").startswith(f"{KNOB}: {memory}/a.parquet: no such file")


@pytest.mark.parametrize("content", [b"", b"x", b"label,u\n0,1\n" * 10])
def test_what_is_not_parquet(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    message = refusal_of(path)
    assert message.startswith(f"{path}: not a readable Parquet file")
    assert "\n" not in message


def test_a_bad_file_among_good_ones_is_named(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}.parquet")
    (tmp_path / "b.parquet").write_bytes(b"not Parquet at all")
    assert refusal_of(tmp_path).startswith(f"{tmp_path}/b.parquet: not a readable")


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_truncated_file(tmp_path: Path, share: float) -> None:
    path = write(tmp_path / "a.parquet", [500])
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert "not Parquet, or truncated" in refusal_of(path)


def test_a_truncated_url(memory: str) -> None:
    url = put(f"{memory}/a.parquet", rows(0, 500))
    with fsspec.open(url, "rb") as file:
        content = file.read()
    with fsspec.open(url, "wb") as file:
        file.write(content[:-10])
    assert "not Parquet, or truncated" in refusal_of(url)


def test_a_file_that_vanishes_while_it_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet")
    expand = fsspec.implementations.local.LocalFileSystem.find

    def find_and_delete(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = expand(self, *args, **kwargs)
        path.unlink()
        return found

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.find", find_and_delete)
    assert refusal_of(tmp_path) == f"{path}: the file has gone since it was listed"


@pytest.mark.parametrize("row_groups", [(), (0,), (0, 0)])
def test_a_file_without_rows_alone(tmp_path: Path, row_groups: tuple[int, ...]) -> None:
    path = write(tmp_path / "a.parquet", row_groups)
    message = refusal_of(path)
    assert message.startswith(f"{KNOB}: {path}: 1 file(s), but no rows")


def test_a_file_without_rows_among_others(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [])
    full = write(tmp_path / "b.parquet", [4])
    write(tmp_path / "c.parquet", [0])
    files = listed(tmp_path)
    assert [file.num_rows for file in files] == [0, 4, 0]
    assert [(p.url, p.num_rows) for p in partitions(files, 100)] == [(str(full), 4)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": pa.array([1], pa.int8())}, r"b\.parquet: no column 'u', which .*a\.parquet has"),
        (
            {"label": pa.array([1], pa.int8()), "u": [1], "v": [2]},
            r"b\.parquet: column 'v' is not in .*a\.parquet",
        ),
        (
            {"label": pa.array([1], pa.int8()), "u": ["1"]},
            r"b\.parquet: column 'u' is string, but int64 in .*a\.parquet; write both files with one type",
        ),
    ],
)
def test_files_with_other_columns(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    write(tmp_path / "a.parquet")
    write_table(tmp_path / "b.parquet", columns)
    with pytest.raises(SchemaError, match=message):
        listed(tmp_path)


def test_columns_in_another_order_are_the_same_columns(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    write_table(tmp_path / "b.parquet", {"u": [7], "label": pa.array([1], pa.int8())})
    tables = [read_table(p, ["label", "u"]) for p in partitions(listed(tmp_path), 100)]
    assert [t.column("u").to_pylist() for t in tables] == [[0, 1, 2], [7]]


def test_folders_with_other_keys(tmp_path: Path) -> None:
    write(tmp_path / "date=1" / "a.parquet")
    write(tmp_path / "day=2" / "a.parquet")
    message = refusal_of(tmp_path, error=SchemaError)
    assert "no column 'date'" in message
    assert f"{tmp_path}/day=2/a.parquet" in message


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    """Names are all that a column goes by; which of the two is meant cannot be said."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array([0]), pa.array([1]), pa.array([2])], ["label", "u", "u"]), path)
    message = refusal_of(path, error=SchemaError)
    assert str(path) in message
    assert "'u'" in message


# --- cutting into partitions ------------------------------------------------------------------------------------------


def file_of(*row_groups: int, url: str = "f") -> SampleFile:
    return SampleFile(url, {}, {}, row_groups)


def cut(target_rows: int, *row_groups: int) -> list[tuple[tuple[int, ...], int, int]]:
    return [(p.row_groups, p.first_row, p.num_rows) for p in partitions([file_of(*row_groups)], target_rows)]


@pytest.mark.parametrize(
    ("row_groups", "target_rows", "expected"),
    [
        ((4, 4, 4), 8, [((0, 1), 0, 8), ((2,), 8, 4)]),
        ((4, 4, 4), 7, [((0,), 0, 4), ((1,), 4, 4), ((2,), 8, 4)]),
        ((4, 4, 4), 100, [((0, 1, 2), 0, 12)]),
        ((9, 1, 1), 5, [((0,), 0, 9), ((1, 2), 9, 2)]),
        ((1, 9, 1), 5, [((0,), 0, 1), ((1,), 1, 9), ((2,), 10, 1)]),
        ((0, 3, 0, 2, 0), 5, [((1, 3), 0, 5)]),
        ((0, 3, 0, 2, 0), 3, [((1,), 0, 3), ((3,), 3, 2)]),
        ((9, 0, 1), 5, [((0,), 0, 9), ((2,), 9, 1)]),
        ((0,), 5, []),
        ((), 5, []),
    ],
)
def test_row_groups_are_joined_up_to_the_target(
    row_groups: tuple[int, ...], target_rows: int, expected: list[tuple[tuple[int, ...], int, int]]
) -> None:
    assert cut(target_rows, *row_groups) == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 20), max_size=6), max_size=4), st.integers(1, 40))
def test_partitions_cover_every_row_once(sizes: list[list[int]], target_rows: int) -> None:
    files = [file_of(*groups, url=str(i)) for i, groups in enumerate(sizes)]
    found = partitions(files, target_rows)
    starts = [np.cumsum([0, *groups]) for groups in sizes]
    covered = []
    for part in found:
        groups, start = sizes[int(part.url)], starts[int(part.url)]
        assert part.num_rows == sum(groups[g] for g in part.row_groups) > 0
        assert part.num_rows <= target_rows or len(part.row_groups) == 1
        assert part.first_row == start[part.row_groups[0]]
        covered += [(int(part.url), g) for g in part.row_groups]
    assert covered == [(i, g) for i, groups in enumerate(sizes) for g, size in enumerate(groups) if size]
    for one, two in pairwise(found):
        assert one.url != two.url or one.num_rows + two.num_rows > target_rows or len(two.row_groups) > 1


def test_partitions_of_real_files_read_back_to_the_whole(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [0, 3, 0, 2, 4])
    write(tmp_path / "b.parquet", [1, 0, 5], start=9)
    parts = partitions(listed(tmp_path), 5)
    tables = [read_table(p, ["label", "u"]) for p in parts]
    assert len(parts) > 2
    assert [t.num_rows for t in tables] == [p.num_rows for p in parts]
    assert pa.concat_tables(tables).equals(rows(0, 15))
    for part, table in zip(parts, tables, strict=True):
        offset = 9 if part.url.endswith("b.parquet") else 0
        assert table.column("u")[0].as_py() == part.first_row + offset


# --- the order of an epoch --------------------------------------------------------------------------------------------

PARTS = partitions([file_of(*[1] * 50)], 1)


def test_storage_order_without_shuffling() -> None:
    assert epoch_order(PARTS, seed=3, epoch=5, shuffle=False) == PARTS


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 1000), st.integers(0, 20))
def test_shuffled_order_is_a_permutation(seed: int, epoch: int, size: int) -> None:
    found = epoch_order(PARTS[:size], seed, epoch, shuffle=True)
    assert sorted(p.first_row for p in found) == list(range(size))


def test_order_is_made_by_seed_and_epoch() -> None:
    orders = {(s, e): tuple(p.first_row for p in epoch_order(PARTS, s, e, True)) for s in range(3) for e in range(4)}
    assert len(set(orders.values())) == 12
    assert tuple(range(50)) not in orders.values()
    assert tuple(p.first_row for p in epoch_order(PARTS, 1, 2, True)) == orders[1, 2]


# --- reading ----------------------------------------------------------------------------------------------------------


def test_only_the_asked_columns_are_read(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", {"label": [0, 1], "u": [1, 2], "u.x": [3, 4], "h": [[5], [6, 7]]})
    part = only_partition(path)
    assert read_table(part, ["h", "label"]).select(["h", "label"]).to_pydict() == {"h": [[5], [6, 7]], "label": [0, 1]}
    assert read_table(part, ["u"]).to_pydict() == {"u": [1, 2]}
    assert read_table(part, ["u.x"]).to_pydict() == {"u.x": [3, 4]}


def test_reading_hive_keys_alone(tmp_path: Path) -> None:
    write(tmp_path / "day=1" / "a.parquet")
    assert read_table(only_partition(tmp_path), ["day"]).to_pydict() == {"day": ["1"] * 3}


def test_a_file_that_vanishes_after_it_was_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet")
    part = only_partition(path)
    path.unlink()
    message = read_refusal_of(part)
    assert message.startswith(f"{path}: row groups [0] cannot be read: ")
    assert "No such file" in message


def test_a_url_that_vanishes_after_it_was_listed(memory: str) -> None:
    url = put(f"{memory}/a.parquet", rows(0, 3))
    part = only_partition(url)
    fs, path = fsspec.core.url_to_fs(url)
    fs.rm(path)
    assert read_refusal_of(part).startswith(f"{part.url}: row groups [0] cannot be read: ")


@pytest.mark.parametrize(
    ("later", "shown"),
    [
        ([6], "6 rows found where the footer promised 5"),
        ([5], "row groups [0, 1] cannot be read"),
        ([], "row groups [0, 1] cannot be read"),
        ([2, 2], "4 rows found where the footer promised 5"),
    ],
)
def test_a_file_with_other_rows_than_listed(tmp_path: Path, later: list[int], shown: str) -> None:
    path = write(tmp_path / "a.parquet", [5] if later == [6] else [3, 2])
    part = only_partition(path)
    write(path, later)
    message = read_refusal_of(part)
    assert message.startswith(f"{path}: ")
    assert shown in message


def test_a_file_that_is_damaged_since_it_was_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [500])
    part = only_partition(path)
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(content)
    message = read_refusal_of(part)
    assert message.startswith(f"{path}: row groups [0] cannot be read: ")
    assert "\n" not in message


def test_no_file_stays_open(tmp_path: Path) -> None:
    good, bad = write(tmp_path / "a.parquet", [3, 3]), tmp_path / "b.parquet"
    bad.write_bytes(b"not Parquet at all")
    part = only_partition(good)
    read_table(part, ["u"])
    refusal_of(bad)
    read_refusal_of(Partition(str(good), (7,), 0, 3))
    gc.collect()  # the errors' tracebacks hold on to the readers
    fds = Path("/proc/self/fd")
    targets = [os.readlink(fd) for fd in fds.iterdir() if fd.is_symlink()] if fds.exists() else []
    assert not [target for target in targets if target.startswith(str(tmp_path))]


# --- dictionaries -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["local", "elsewhere"])
@pytest.mark.parametrize(
    ("values", "stored_so", "comes_so"),
    [
        (["a", None, "b"] * 400, True, True),
        (["a", None, "b"] * 400, False, False),  # there is no dictionary to be had for nothing
        ([f"{n:08x}" for n in range(1200)], True, False),  # it would have as many entries as there are rows
        ([None] * 1200, True, True),
    ],
)
def test_strings_that_repeat_come_as_dictionaries(
    values: list[str | None], stored_so: bool, comes_so: bool, where: str, tmp_path: Path, memory: str
) -> None:
    url = str(tmp_path / "a.parquet") if where == "local" else f"{memory}/a.parquet"
    with fsspec.open(url, "wb") as file:
        table = pa.table({"s": pa.array(values, pa.string()), "t": pa.array(values, pa.string())})
        pq.write_table(table, file, use_dictionary=stored_so, row_group_size=500)
    part = only_partition(url)
    found = read_table(part, ["s", "t"], {"s"})
    assert pa.types.is_dictionary(found.schema.field("s").type) == comes_so
    assert found.schema.field("t").type == pa.string()
    assert found.to_pydict() == table.to_pydict()
    assert read_table(part, ["s", "t"]).schema == table.schema


def test_one_row_group_whose_strings_do_not_repeat_is_enough(tmp_path: Path) -> None:
    tables = [pa.table({"s": [*"ab"] * 300}), pa.table({"s": [f"{n:08x}" for n in range(600)]})]
    with pq.ParquetWriter(tmp_path / "a.parquet", tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    found = read_table(only_partition(tmp_path / "a.parquet"), ["s"], {"s"})
    assert found.schema.field("s").type == pa.string()
    assert found.equals(pa.concat_tables(tables))
