"""A bundle's folder: versions that appear whole, and damage that is found."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from flowps.errors import BundleError
from flowps.serving.bundle import open_version, publication
from flowps.serving.rows import load_tables
from tests.serving.samples import make_bundle, spoil


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A bundle with one version."""
    make_bundle(tmp_path / "out")
    return tmp_path / "out"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def refusal(path: Path, verify: bool = False) -> str:
    with pytest.raises(BundleError) as refused:
        load_tables(path, verify)
    assert str(path) in str(refused.value)
    return str(refused.value)


class TestVersions:
    def test_are_numbered_and_the_newest_is_live(self, out):
        assert names(out) == {"1", "current"}
        assert make_bundle(out).number == 2
        assert open_version(out).number == 2
        assert names(out) == {"1", "2", "current"}

    def test_that_are_old_go(self, out):
        for _ in range(3):
            make_bundle(out, keep=2)
        assert names(out) == {"3", "4", "current"}
        make_bundle(out, keep=0)
        assert names(out) == {"3", "4", "5", "current"}
        make_bundle(out, keep=1)
        assert names(out) == {"6", "current"}

    def test_can_be_opened_by_their_own_folder(self, out):
        make_bundle(out)
        assert open_version(out / "1").number == 1
        assert open_version((out / "1").rename(out.parent / "copied")).number == 0

    def test_can_be_gone_back_to(self, out):
        make_bundle(out)
        (out / "current").write_text("1")
        assert open_version(out).number == 1
        assert make_bundle(out).number == 3

    def test_that_were_not_finished_leave_nothing(self, out):
        def fail() -> None:
            with publication(out) as publishing:
                (publishing.folder / "half").write_text("")
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert names(out) == {"1", "current"}
        assert open_version(out).number == 1

    def test_that_a_crash_has_left_unfinished_go_with_the_next(self, out):
        (out / "2.unfinished" / "embeddings").mkdir(parents=True)
        (out / "current.unfinished").write_text("2")
        assert open_version(out).number == 1
        assert make_bundle(out).number == 2
        assert names(out) == {"1", "2", "current"}

    def test_that_are_damaged_are_not_published(self, out):
        with publication(out) as publishing:
            shutil.copytree(out / "1", publishing.folder, dirs_exist_ok=True)
            spoil(publishing.folder / "hash.json")
            with pytest.raises(BundleError, match=r"hash.json: is damaged"):
                publishing.publish(2)
        assert names(out) == {"1", "current"}
        assert open_version(out).number == 1

    def test_come_one_at_a_time(self, out):
        handle = os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            with pytest.raises(BundleError, match="another export is writing there; wait until it has ended"), publication(out):
                raise AssertionError("not entered")
        finally:
            os.close(handle)

    def test_are_not_written_where_something_else_is(self, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.toml").write_text("")
        (tmp_path / "file").write_text("")
        (tmp_path / "numbers" / "7").mkdir(parents=True)
        for name, says in (
            ("run", r"holds something that is no bundle \(config.toml\)"), ("file", "is a file; choose another folder"),
            ("numbers", r"holds something that is no bundle \(7\)"), ("file/below", "is a file; choose another folder"),
        ):  # fmt: skip
            with pytest.raises(BundleError, match=f"{tmp_path / name}: {says}"):
                make_bundle(tmp_path / name)
        assert names(tmp_path / "run") == {"config.toml"}


class TestDamage:
    def test_no_bundle_says_how_to_make_one(self, tmp_path):
        assert "no such folder; make a bundle with python -m flowps.export" in refusal(tmp_path / "none")
        assert "is no bundle: it has no file current; make one with python -m flowps.export" in refusal(tmp_path)

    @pytest.mark.parametrize(
        ("content", "says"),
        [("", "holds ''"), ("two", "holds 'two', expected the number of a version"), ("9", "names version 9, but")],
    )
    def test_a_wrong_current_is_refused(self, out, content, says):
        (out / "current").write_text(content)
        assert says in refusal(out)

    def test_every_file_that_is_missing_or_shorter_is_found(self, out):
        files = [file.path for file in open_version(out).manifest.files]
        assert len(files) == 5
        for name in files:
            path = out / "1" / name
            whole = path.read_bytes()
            path.write_bytes(whole[:-1])
            assert f"{path}: is damaged: {len(whole) - 1:,} bytes, not {len(whole):,}" in refusal(out)
            path.unlink()
            assert f"{path}: cannot be read: No such file" in refusal(out)
            path.write_bytes(whole)
        load_tables(out, verify=True)

    def test_every_file_that_is_changed_is_found_by_its_checksum(self, out):
        for file in open_version(out).manifest.files:
            path = out / "1" / file.path
            whole = path.read_bytes()
            spoil(path, -1)
            assert f"{path}: is damaged: its SHA-256 is not that in the manifest" in refusal(out, verify=True)
            path.write_bytes(whole)

    def test_a_manifest_of_another_format_names_its_version(self, out):
        path = out / "1" / "manifest.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps({"format": 9, "flowps": "7.0"}))
        assert "has format 9, written by flowps 7.0; flowps" in refusal(out)
        path.write_text(json.dumps({key: value for key, value in content.items() if key != "slots"}))
        assert f"{path}: is damaged, or not a bundle's: Object missing required field `slots`" in refusal(out)
        path.write_bytes(b"\xff{")
        assert f"{path}: is damaged" in refusal(out)


class TestHash:
    def change(self, out: Path, change: object) -> None:
        """Change hash.json, and the manifest with it."""
        path = out / "1" / "hash.json"
        content = json.loads(path.read_text())
        change(content)  # type: ignore[operator]
        path.write_text(json.dumps(content))
        manifest = json.loads((out / "1" / "manifest.json").read_text())
        for file in manifest["files"]:
            if file["path"] == "hash.json":
                file["size_bytes"] = path.stat().st_size
        (out / "1" / "manifest.json").write_text(json.dumps(manifest))

    @pytest.mark.parametrize("at", range(9))
    def test_any_other_sign_is_refused(self, out, at):
        def change(content):
            content["slots"][1]["signs"][at][1] = "0" * 16

        self.change(out, change)
        found = refusal(out)
        assert re.search(
            r"hash.json: slot 'city' was hashed in another way when the bundle was made \(the sign of .* differs\)", found
        )
        assert "install the flowps that made the bundle, or export the run again" in found

    def test_another_seed_or_rule_is_refused(self, out):
        self.change(out, lambda content: content["slots"][0].update(seed="0" * 16))
        assert "slot 'user' was hashed in another way when the bundle was made (its seed or hash_size differs)" in refusal(out)
        self.change(out, lambda content: content.update(rule="md5"))
        assert "has rule 'md5' and 3 slots, expected 'xxh64' and 3" in refusal(out)

    def test_a_slot_that_lacks_is_refused(self, out):
        self.change(out, lambda content: content["slots"].pop())
        assert "has rule 'xxh64' and 2 slots, expected 'xxh64' and 3" in refusal(out)

    def test_values_of_another_make_are_checked_too(self, out):
        self.change(out, lambda content: content["slots"][0]["signs"].append([77, "0" * 16]))
        assert "the sign of 77 differs" in refusal(out)


def test_reading_a_bundle_changes_nothing(out):
    def state() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in sorted(out.rglob("*"))}

    before = state()
    load_tables(out, verify=True)
    assert state() == before
