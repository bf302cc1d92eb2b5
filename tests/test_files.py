"""Files and folders are written whole or not at all, and nothing else is touched."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gmnet_timm.errors import TargetExistsError, UserError
from gmnet_timm.files import replacing, replacing_folder, write_text


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, SystemExit])
def test_what_fails_changes_nothing(tmp_path, error):
    (tmp_path / 'a').write_text('old')
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b' / 'x').write_text('old')
    for target, manager in (('a', replacing), ('b', replacing_folder), ('new', replacing), ('new', replacing_folder)):
        with pytest.raises((error, UserError)), manager(tmp_path / target) as temporary:
            (temporary / 'y' if temporary.is_dir() else temporary).write_text('half')
            raise error
    assert entries(tmp_path) == ['a', 'b'] and entries(tmp_path / 'b') == ['x']
    assert (tmp_path / 'a').read_text() == (tmp_path / 'b' / 'x').read_text() == 'old'


def test_files(tmp_path):
    write_text(tmp_path / 'deep' / 'er' / 'a.txt', 'one\r\n')
    assert (tmp_path / 'deep' / 'er' / 'a.txt').read_bytes() == b'one\r\n'
    with pytest.raises(TargetExistsError, match='a.txt exists'):
        write_text(tmp_path / 'deep' / 'er' / 'a.txt', 'two', force=False)
    (tmp_path / 'link').symlink_to(tmp_path / 'deep' / 'er' / 'a.txt')
    write_text(tmp_path / 'link', 'three')
    assert (tmp_path / 'link').is_symlink() and (tmp_path / 'deep' / 'er' / 'a.txt').read_text() == 'three'
    assert entries(tmp_path / 'deep' / 'er') == ['a.txt']


def test_folders_take_along_what_the_new_one_has_not(tmp_path):
    old = tmp_path / 'a'
    (old / 'sub').mkdir(parents=True)
    for name in ('kept', 'replaced', 'sub/kept', 'sub/replaced'):
        (old / name).write_text('old')
    (old / 'link').symlink_to('kept')
    with replacing_folder(old) as new:
        (new / 'sub').mkdir()
        for name in ('replaced', 'sub/replaced', 'sub/new'):
            (new / name).write_text('new')
    assert {str(p.relative_to(old)): p.read_text() for p in old.rglob('*') if p.is_file()} == {
        'kept': 'old', 'link': 'old', 'replaced': 'new', 'sub/kept': 'old', 'sub/replaced': 'new', 'sub/new': 'new'}
    assert (old / 'link').is_symlink() and entries(tmp_path) == ['a']


def test_what_is_not_a_file_or_folder_is_left_alone(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'file').write_text('x')
    for target, manager in (
            (tmp_path / 'pipe', replacing), (tmp_path, replacing), (tmp_path / 'file', replacing_folder),
            (Path('/dev/null'), replacing), (tmp_path / 'pipe', replacing_folder)):
        with pytest.raises(UserError, match='is left alone'), manager(target):
            pass
    assert entries(tmp_path) == ['file', 'pipe']


@pytest.mark.parametrize('path, reason', [
    ('/proc/x', '/proc'), ('a\0b', 'null'), ('x' * 300, 'long'), ('file/below', 'File exists')])
def test_reasons_name_the_cause(tmp_path, monkeypatch, path, reason):
    monkeypatch.chdir(tmp_path)
    Path('file').write_text('x')
    with pytest.raises(UserError, match='Cannot write') as info:
        write_text(path, 'x')
    assert 'disk is full' not in str(info.value) and (reason in str(info.value) or reason == '/proc')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='there is no /dev/full')
def test_a_full_disk(tmp_path):
    with pytest.raises(UserError, match='the disk is full'), replacing(tmp_path / 'a'), open('/dev/full', 'w') as full:
        full.write('x')
    assert entries(tmp_path) == []


def test_modes_are_those_of_new_files(tmp_path):
    (tmp_path / 'expected').write_text('x')
    write_text(tmp_path / 'a', 'x')
    with replacing_folder(tmp_path / 'b') as new:
        (new / 'x').write_text('x')
    (tmp_path / 'folder').mkdir()
    assert (tmp_path / 'a').stat().st_mode == (tmp_path / 'expected').stat().st_mode
    assert (tmp_path / 'b').stat().st_mode == (tmp_path / 'folder').stat().st_mode


def test_ctrl_c_leaves_nothing(tmp_path):
    code = '''
import signal, sys, time
from gmnet_timm.files import replacing_folder
signal.signal(signal.SIGINT, signal.default_int_handler)
with replacing_folder(sys.argv[1]) as folder:
    (folder / 'x').write_text('x')
    print('in', flush=True)
    time.sleep(60)
'''
    process = subprocess.Popen(
        [sys.executable, '-c', code, tmp_path / 'a'], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == 'in\n'
    time.sleep(.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0
    assert entries(tmp_path) == []
