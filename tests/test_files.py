import errno
import os

import pytest

from gmnet_timm.errors import UserError
from gmnet_timm.files import replacing, write_text


def test_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / 'recipe.yaml'
    write_text(path, 'one', force=False)
    with pytest.raises(UserError, match='exists.*--force'):
        write_text(path, 'two', force=False)
    assert path.read_text() == 'one'
    write_text(path, 'two')
    assert path.read_text() == 'two'

    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(UserError, match=r'Cannot write .*recipe\.yaml: the disk is full'):
        write_text(path, 'three')
    assert os.listdir(tmp_path) == ['recipe.yaml'] and path.read_text() == 'two'


def test_a_failing_block_leaves_the_old_file(tmp_path):
    path = tmp_path / 'plot.png'
    path.write_text('old')
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        assert temporary.suffix == '.png' and temporary.parent == tmp_path
        temporary.write_text('new')
        1 / 0  # noqa: B018
    assert os.listdir(tmp_path) == ['plot.png'] and path.read_text() == 'old'


def test_folders_are_created(tmp_path):
    write_text(tmp_path / 'a' / 'b' / 'recipe.yaml', 'one')
    assert (tmp_path / 'a' / 'b' / 'recipe.yaml').read_text() == 'one'
    with pytest.raises(UserError, match='Cannot write'):
        write_text(tmp_path / 'a' / 'b' / 'recipe.yaml' / 'below', 'one')
