"""Files written as a whole or not at all."""

import pytest

from dyncompile.drafts import drafted


def test_takes_the_place_at_the_end(tmp_path):
    path = tmp_path / "folder" / "file.json"
    with drafted(path) as draft:
        draft.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_what_fails_leaves_the_file_before(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("old")
    path.chmod(0o640)
    with pytest.raises(FileNotFoundError), drafted(path):
        (tmp_path / "nowhere").read_text()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with drafted(path) as draft:
        draft.write_text("new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640
