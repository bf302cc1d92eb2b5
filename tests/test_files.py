"""Files and folders are written whole or not at all, and what killed processes leave behind is removed."""
import errno
import os
import resource
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gmnet_timm import files
from gmnet_timm.errors import UserError
from gmnet_timm.files import replacing, replacing_folder, write_text, writing


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
    path = tmp_path / 'plot.tar.png'
    path.write_text('old')
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        assert temporary.name == path.name and tmp_path in temporary.parents
        temporary.write_text('new')
        assert path.read_text() == 'old'
        1 / 0  # noqa: B018
    assert os.listdir(tmp_path) == ['plot.tar.png'] and path.read_text() == 'old'


def test_folders_are_created(tmp_path):
    write_text(tmp_path / 'a' / 'b' / 'recipe.yaml', 'one')
    assert (tmp_path / 'a' / 'b' / 'recipe.yaml').read_text() == 'one'
    with pytest.raises(UserError, match='Cannot write'):
        write_text(tmp_path / 'a' / 'b' / 'recipe.yaml' / 'below', 'one')


@pytest.mark.parametrize('write', [write_text, lambda path, text: replacing_folder(path).__enter__()])
def test_names_that_are_too_long(write, tmp_path):
    with pytest.raises(UserError, match=r'Cannot write .*: File name too long \(') as info:
        write(tmp_path / ('x' * 300), 'one')
    assert '\n' not in str(info.value) and os.listdir(tmp_path) == []
    with pytest.raises(UserError, match='cannot be the name of a file: .*null'):
        write(tmp_path / 'a\0b', 'one')


def test_a_name_of_the_greatest_length(tmp_path):
    path = tmp_path / ('x' * 251 + '.txt')
    write_text(path, 'one')
    assert path.read_text() == 'one'


def make_socket(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(path))


NOT_FILES = {
    'pipe': os.mkfifo,
    'folder': os.mkdir,
    'socket': make_socket,
    'link to a device': lambda path: path.symlink_to('/dev/full'),
    'link to a folder': lambda path: path.symlink_to(path.parent),
    'device': lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 7)),  # a second /dev/full
}


@pytest.mark.parametrize('kind', NOT_FILES)
def test_only_regular_files_are_replaced(kind, tmp_path):
    path = tmp_path / 'x'
    try:
        NOT_FILES[kind](path)
    except PermissionError:
        pytest.skip('only root makes devices')
    before = path.lstat()
    with pytest.raises(UserError, match='x is not a regular file, and is left alone'):
        write_text(path, 'text')
    assert (path.lstat().st_mode, path.lstat().st_ino) == (before.st_mode, before.st_ino)
    assert os.listdir(tmp_path) == ['x']


@pytest.mark.parametrize('path', ['/dev/full', '/dev/null', '/dev/stdout', '/', '.', ''])
def test_devices_of_the_machine(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if path == '/dev/stdout' and stat.S_ISREG(os.stat(path).st_mode):
        pytest.skip('the output is a file')
    with pytest.raises(UserError, match='is not a regular file'):
        write_text(path, 'text')


def test_the_file_behind_a_link_is_replaced(tmp_path):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'link').symlink_to('folder/file')
    write_text(tmp_path / 'link', 'one', force=False)  # it points to nothing yet
    with pytest.raises(UserError, match='link exists'):
        write_text(tmp_path / 'link', 'two', force=False)
    write_text(tmp_path / 'link', 'two')
    assert (tmp_path / 'link').is_symlink() and (tmp_path / 'folder' / 'file').read_text() == 'two'
    (tmp_path / 'loop').symlink_to('loop')
    with pytest.raises(UserError, match='Cannot write .*loop: Too many'):
        write_text(tmp_path / 'loop', 'three')


def test_limits_of_size(tmp_path):
    """A write that the system refuses in the middle, here and by torch."""
    path = tmp_path / 'x'
    path.write_text('old')
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[0][1]))
    try:
        with pytest.raises(UserError, match='Cannot write .*x: File too large'):
            write_text(path, 'text' * 10_000)
        with pytest.raises(UserError, match='Cannot write .*x: '), replacing(path) as temporary:
            torch.save(torch.ones(10_000), temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        signal.signal(signal.SIGXFSZ, before[1])
    assert os.listdir(tmp_path) == ['x'] and path.read_text() == 'old'


def test_a_full_disk(tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', disk], capture_output=True).returncode:
        pytest.skip('only root mounts file systems')
    try:
        (disk / 'x').write_text('old')
        for write in (
                lambda temporary: temporary.write_bytes(bytes(100_000)),
                lambda temporary: torch.save(torch.ones(100_000), temporary)):
            with pytest.raises(UserError, match=r'Cannot write .*x: the disk is full \(0 MB free\)'), \
                    replacing(disk / 'x') as temporary:
                write(temporary)
            assert os.listdir(disk) == ['x'] and (disk / 'x').read_text() == 'old'
        with pytest.raises(UserError, match='the disk is full'), replacing_folder(disk / 'new') as folder:
            (folder / 'y').write_bytes(bytes(100_000))
        assert os.listdir(disk) == ['x']
    finally:
        subprocess.run(['umount', disk], check=True)


def test_writing_to_a_device_that_is_full():
    with pytest.raises(UserError, match='Cannot write /dev/full: the disk is full'), writing(Path('/dev/full')), \
            open('/dev/full', 'w') as file:
        file.write('x' * 100_000)


def process(work: Callable[[Callable[[], None]], None]) -> int:
    """The id of a process that runs `work`, and has reached the point where that calls its argument, to sleep there."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        def wait() -> None:
            os.write(writer, b'x')
            time.sleep(100)
        try:
            work(wait)
        finally:
            os._exit(1)
    os.close(writer)
    assert os.read(reader, 1) == b'x'
    os.close(reader)
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    def write(wait):
        with replacing(path) as temporary:
            temporary.write_text('half')
            wait()

    path = tmp_path / 'x'
    writer = process(write)
    (tmp_path / '.gmnet-timm-foreign').write_text('a file of somebody else')
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / '.gmnet-timm-link').symlink_to('elsewhere')
    (tmp_path / '.gmnet-timm-empty').mkdir()  # of a process that was killed at the very start
    assert len(os.listdir(tmp_path)) == 5
    kill(writer)
    assert len(os.listdir(tmp_path)) == 5 and not path.exists()
    write_text(path, 'new')
    assert sorted(os.listdir(tmp_path)) == ['.gmnet-timm-foreign', '.gmnet-timm-link', 'elsewhere', 'x']


def test_files_of_living_processes_stay(tmp_path):
    def write(wait):
        with replacing(path) as temporary:
            temporary.write_text('slow')
            wait()

    path = tmp_path / 'x'
    child = process(write)
    for text in ('one', 'two'):
        write_text(path, text)
        write_text(tmp_path / 'y', text)
    (left,) = tmp_path.glob('.gmnet-timm-*')
    assert path.read_text() == 'two' and (left / 'new' / 'x').read_text() == 'slow'
    kill(child)
    write_text(tmp_path / 'y', 'three')
    assert path.read_text() == 'two' and sorted(os.listdir(tmp_path)) == ['x', 'y']


def test_many_writers_at_once(tmp_path):
    """Each write succeeds, and nobody ever sees part of one."""
    path = tmp_path / 'x'
    texts = [str(i) * 10_000 for i in range(4)]
    failures = []

    def write(text: str) -> None:
        for _ in range(50):
            try:
                write_text(path, text)
                if path.read_text() not in texts:
                    failures.append('part of a file')
            except Exception as e:
                failures.append(repr(e))

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    child = os.fork()
    if not child:
        write(texts[0])
        os._exit(len(failures))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.waitpid(child, 0)[1] == 0
    assert not failures and os.listdir(tmp_path) == ['x']


def read_folder(path: Path) -> dict[str, str]:
    return {entry.name: entry.read_text() for entry in path.iterdir() if entry.is_file()}


def test_a_folder_becomes_visible_whole(tmp_path):
    path = tmp_path / 'parent' / 'model'
    with replacing_folder(path, force=False) as temporary:
        (temporary / 'a').write_text('1')
        (temporary / 'b').write_text('1')
        assert temporary.name == 'model' and not path.exists()
    assert read_folder(path) == {'a': '1', 'b': '1'}
    with pytest.raises(UserError, match='model exists: choose another name, or give --force'), \
            replacing_folder(path, force=False):
        raise AssertionError('not reached')
    with pytest.raises(ZeroDivisionError), replacing_folder(path) as temporary:
        (temporary / 'a').write_text('2')
        1 / 0  # noqa: B018
    assert read_folder(path) == {'a': '1', 'b': '1'}
    with replacing_folder(path) as temporary:
        assert os.listdir(temporary) == []
        (temporary / 'a').write_text('2')
        (temporary / 'b').write_text('2')
        assert read_folder(path) == {'a': '1', 'b': '1'}
    assert read_folder(path) == {'a': '2', 'b': '2'} and os.listdir(path.parent) == ['model']


def test_what_else_a_folder_has_is_kept(tmp_path):
    path = tmp_path / 'model'
    (path / '.git' / 'objects').mkdir(parents=True)
    (path / '.git' / 'objects' / 'x').write_text('history')
    (path / '.git' / 'link').symlink_to('nowhere')
    (path / 'link').symlink_to('.git')
    (path / 'notes').write_text('mine')
    (path / 'a').write_text('old')
    with replacing_folder(path) as temporary:
        (temporary / 'a').write_text('new')
    assert read_folder(path) == {'a': 'new', 'notes': 'mine'}
    assert (path / '.git' / 'objects' / 'x').read_text() == 'history'
    assert os.readlink(path / '.git' / 'link') == 'nowhere' and os.readlink(path / 'link') == '.git'


def test_only_folders_are_replaced_by_folders(tmp_path):
    (tmp_path / 'file').write_text('x')
    os.mkfifo(tmp_path / 'pipe')
    for name in ('file', 'pipe'):
        with pytest.raises(UserError, match=f'{name} is not a folder'), replacing_folder(tmp_path / name):
            raise AssertionError('not reached')
    (tmp_path / 'model').mkdir()
    (tmp_path / 'link').symlink_to('model')
    with replacing_folder(tmp_path / 'link') as temporary:
        (temporary / 'a').write_text('1')
    assert (tmp_path / 'link').is_symlink() and read_folder(tmp_path / 'model') == {'a': '1'}


def test_a_folder_that_appears_in_the_meantime(tmp_path):
    path = tmp_path / 'model'
    with pytest.raises(UserError, match='exists'), replacing_folder(path, force=False) as temporary:
        (temporary / 'a').write_text('1')
        path.mkdir()
        (path / 'theirs').write_text('x')
    assert read_folder(path) == {'theirs': 'x'} and os.listdir(tmp_path) == ['model']


def test_a_second_move_that_fails(tmp_path, monkeypatch):
    path = tmp_path / 'model'
    path.mkdir()
    (path / 'a').write_text('old')
    rename = os.rename

    def failing(source, target):
        if Path(target) == path and Path(source).parent.name == 'new':
            raise OSError(errno.EIO, 'Input/output error')
        rename(source, target)

    monkeypatch.setattr(files.os, 'rename', failing)
    with pytest.raises(UserError, match='Cannot write .*model: Input/output error'), replacing_folder(path) as new:
        (new / 'a').write_text('new')
    assert read_folder(path) == {'a': 'old'} and os.listdir(tmp_path) == ['model']


@pytest.mark.parametrize('renames, visible, repaired', [
    (None, 'old', 'old'), (0, 'old', 'old'), (1, None, 'old'), (2, 'new', 'new')])
@pytest.mark.parametrize('force', [True, False])
def test_killed_while_a_folder_is_replaced(renames, visible, repaired, force, tmp_path):
    """Old or new or, between the two moves, nothing; and the old one again after the next run."""
    def write(wait):
        rename, done = os.rename, 0

        def counting(source, target):
            nonlocal done
            if done == renames:
                wait()
            rename(source, target)
            done += 1
            if done == renames:
                wait()

        os.rename = counting
        with replacing_folder(path) as temporary:
            for name in ('a', 'b'):
                (temporary / name).write_text('new')
            if renames is None:
                wait()

    path = tmp_path / 'model'
    path.mkdir()
    for name in ('a', 'b'):
        (path / name).write_text('old')
    kill(process(write))
    if visible is None:
        assert not path.exists()
    else:
        assert read_folder(path) == {'a': visible, 'b': visible}
    if force:
        write_text(tmp_path / 'other', 'x')  # any command that writes beside it
        assert read_folder(path) == {'a': repaired, 'b': repaired}
        with replacing_folder(path) as temporary:
            (temporary / 'a').write_text('third')
        assert read_folder(path) == {'a': 'third', 'b': repaired}
    else:
        with pytest.raises(UserError, match='exists'), replacing_folder(path, force=False):
            raise AssertionError('not reached')
        assert read_folder(path) == {'a': repaired, 'b': repaired}
    assert not list(tmp_path.glob('.gmnet-timm-*'))


def test_a_folder_is_never_seen_half_new(tmp_path):
    """A reader that looks all the time finds old or new, or for a moment none."""
    path = tmp_path / 'model'
    path.mkdir()
    names = [str(i) for i in range(5)]
    for name in names:
        (path / name).write_text('0')
    child = os.fork()
    if not child:
        for i in range(1, 200):
            with replacing_folder(path) as temporary:
                for name in names:
                    (temporary / name).write_text(str(i))
        os._exit(0)
    seen = set()
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        try:
            folder = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            texts = []
            for name in names:
                with open(os.open(name, os.O_RDONLY, dir_fd=folder)) as file:
                    texts.append(file.read())
        except FileNotFoundError:
            continue  # it was removed while it was read
        finally:
            os.close(folder)
        assert len(set(texts)) == 1
        seen.add(texts[0])
        time.sleep(0.001)
    assert ended[1] == 0 and len(seen) > 3
    assert read_folder(path) == dict.fromkeys(names, '199') and os.listdir(tmp_path) == ['model']
