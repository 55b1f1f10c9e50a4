"""Checking files and folders of workflows."""

from __future__ import annotations

from pathlib import Path

from saga.workflow_files import check_files
from saga.workflow_yaml import MAX_YAML_BYTES
from tests.saga.test_workflow_yaml import GOOD


def lines(*paths: str | Path, services: list[str] | None = None) -> list[str]:
    return [str(fault) for fault in check_files(paths, services)]


def test_checking_files_reports_every_file_and_raises_for_none(tmp_path: Path) -> None:
    good, bad, binary = tmp_path / "good.yaml", tmp_path / "bad.yaml", tmp_path / "binary.yaml"
    good.write_text(GOOD)
    bad.write_text(GOOD.replace("max_attempts: 3", "max_attempts: 0"))
    binary.write_bytes(b"name: \xff\xfe")
    huge = tmp_path / "huge.yaml"
    huge.write_bytes(b"#" * (MAX_YAML_BYTES + 1))
    assert lines(good) == []
    assert lines(str(bad), good, tmp_path / "missing.yaml", binary, huge) == [
        f"{bad}:8:27: steps[0].retry.max_attempts: expected int >= 1, got 0",
        f"{tmp_path / 'missing.yaml'}: cannot be read: No such file or directory",
        f"{binary}:1:7: expected UTF-8, got byte 0xff",
        f"{huge}:1:1: expected at most 262144 bytes of YAML",
    ]


def test_two_files_that_define_the_same_workflow_are_reported(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(GOOD)
    second.write_text(GOOD)
    assert lines(first, second) == [f"{second}: name: workflow order is defined in {first} too"]


def test_checking_files_knows_the_services_when_they_are_given(tmp_path: Path) -> None:
    file = tmp_path / "w.yaml"
    file.write_text(GOOD)
    assert lines(file, services=["inventory"]) == [
        f"{file}:13:14: steps[1].service: unknown service payment; known: inventory"
    ]


def test_a_folder_stands_for_the_workflow_files_in_it(tmp_path: Path) -> None:
    (tmp_path / "b.yml").write_text(GOOD.replace("max_attempts: 3", "max_attempts: 0"))
    (tmp_path / "a.yaml").write_text(GOOD)
    (tmp_path / "notes.txt").write_text("no workflow")
    (tmp_path / "c.yaml").mkdir()
    assert lines(tmp_path) == [
        f"{tmp_path}/b.yml:8:27: steps[0].retry.max_attempts: expected int >= 1, got 0",
        f"{tmp_path}/c.yaml: cannot be read: Is a directory",
    ]
    assert lines(tmp_path / "c.yaml") == [f"{tmp_path}/c.yaml: no file in it ends in .yaml or .yml"]
