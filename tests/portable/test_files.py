import hashlib

import pytest

from segmentation.files import atomic_path, sha256_file, sha256_json, write_json


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_replaces_the_file_and_makes_its_folder(tmp_path):
    path = tmp_path / "deep/a.json"
    for value in ({"b": 1}, {"é": [1.5, None]}):
        write_json(path, value)
    assert path.read_text(encoding="utf-8") == '{\n  "é": [\n    1.5,\n    null\n  ]\n}\n'
    assert sha256_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert list(path.parent.iterdir()) == [path]


def test_json_holds_no_number_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"miou": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_json_hash_ignores_the_order_of_keys():
    assert sha256_json({"a": 1, "b": [2, 3]}) == sha256_json({"b": [2, 3], "a": 1})
    assert sha256_json({"a": 1, "b": [2, 3]}) != sha256_json({"a": 1, "b": [3, 2]})
