import errno
import os
import signal
import stat
import subprocess
import sys

import pytest

from gmnet_timm.errors import UserError
from gmnet_timm.files import replacing, replacing_folder, write_text


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


def kill_while(code: str, tmp_path) -> None:
    """Run code that writes to `target` in a process that is killed where it calls `die()`."""
    script = (
        'import os, signal\n'
        'from pathlib import Path\n'
        'from gmnet_timm.files import replacing, replacing_folder\n'
        f'target = Path({str(tmp_path)!r}) / "target"\n'
        'die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n' + code)
    assert subprocess.run([sys.executable, '-c', script], timeout=60).returncode == -signal.SIGKILL


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    kill_while('with replacing(target) as t: t.write_text("half"); die()', tmp_path)
    (leftover,) = os.listdir(tmp_path)
    alive = tmp_path / leftover.replace(f'-{leftover.split("-")[4]}-', f'-{os.getpid()}-')
    elsewhere = tmp_path / leftover.replace(leftover.split('-')[3], '00000000')
    others = [alive, elsewhere, tmp_path / leftover.replace('target', 'target2'), tmp_path / '.0123abcd-target']
    for other in others:
        other.write_text('not ours to remove')
    write_text(tmp_path / 'target', 'whole')
    assert sorted(os.listdir(tmp_path)) == sorted(['target', *(other.name for other in others)])


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_folder_is_replaced_whole(tmp_path):
    target = tmp_path / 'target'
    with replacing_folder(target, force=False) as folder:
        (folder / 'weights').write_text('one')
        (folder / 'names').write_text('one')
    with pytest.raises(UserError, match='exists.*--force'), replacing_folder(target, force=False):
        pass
    (target / 'mine').write_text('kept')
    with replacing_folder(target) as folder:
        (folder / 'weights').write_text('two')
        assert contents(target)['weights'] == 'one'
    assert contents(target) == {'weights': 'two', 'names': 'one', 'mine': 'kept'}
    with pytest.raises(ZeroDivisionError), replacing_folder(target) as folder:
        (folder / 'weights').write_text('three')
        1 / 0  # noqa: B018
    assert contents(target)['weights'] == 'two' and os.listdir(tmp_path) == ['target']


@pytest.mark.parametrize('where', ['before', 'between'])
def test_killed_while_a_folder_is_replaced(where, tmp_path):
    """Killed between the two renames, the old folder is put back by the next call; never is one half new."""
    (tmp_path / 'target').mkdir()
    (tmp_path / 'target' / 'weights').write_text('old')
    stop = 'die()' if where == 'before' else (
        'rename = Path.rename\n    Path.rename = lambda self, to: rename(self, to) if self.name == "target" else die()')
    kill_while(f'with replacing_folder(target) as t:\n    (t / "weights").write_text("new")\n    {stop}', tmp_path)
    assert (tmp_path / 'target').exists() == (where == 'before')
    with pytest.raises(UserError, match='--force'), replacing_folder(tmp_path / 'target', force=False):
        pass
    assert contents(tmp_path / 'target') == {'weights': 'old'} and os.listdir(tmp_path) == ['target']
