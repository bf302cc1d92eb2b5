import errno
import os
import stat

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


def make_special(path, kind):
    if kind == 'device':
        try:
            os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # a /dev/null of our own
        except PermissionError:
            pytest.skip('only root makes devices')
    elif kind == 'link to a device':
        path.symlink_to('/dev/null')
    elif kind == 'pipe':
        os.mkfifo(path)
    else:
        path.mkdir()


@pytest.mark.parametrize('kind', ['device', 'link to a device', 'pipe', 'folder'])
def test_only_regular_files_are_replaced(tmp_path, kind):
    path = tmp_path / 'out'
    make_special(path, kind)
    before = os.lstat(path)
    with pytest.raises(UserError, match='is not a regular file and is not replaced'):
        write_text(path, 'one')
    after = os.lstat(path)
    assert (before.st_ino, before.st_mode, before.st_rdev) == (after.st_ino, after.st_mode, after.st_rdev)
    assert os.listdir(tmp_path) == ['out']


def test_name_that_is_too_long(tmp_path):
    with pytest.raises(UserError, match='Cannot write .*File name too long'):
        write_text(tmp_path / ('x' * 300), 'one')
