"""Thousands of damaged and hostile files: errors that say so, and never other weights, a crash, a hang or run code.

Each worker process reads a chunk of files, with a watchdog that ends it if one takes too long. Values without a
checksum cannot be covered: those of legacy torch files and of safetensors files without a recorded hash. That these are
never called checked is. The file of a failure can be made again: `make_case(seed)`.
"""
import collections
import contextlib
import faulthandler
import json
import os
import random
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoint_files import (
    Call,
    Entry,
    craft_zip,
    legacy_file,
    pickled,
    plain_weights,
    records_of,
    run_content,
    same,
    save_hashed,
    saved,
    storage,
    tensor,
    weights,
    zip_file,
    zip_of,
)

from gmnet_timm.gmnet import GmNet
from gmnet_timm.weights.description import describe_tensors
from gmnet_timm.weights.files import CheckpointError, read_checkpoint, read_outline

CASES = 4200
CHUNK = 2100
MAX_SECONDS = 10  # for one file
BEYOND = 256 << 20  # bytes of memory beside twice the file

CANARY = 'pickled_code_ran'


def original(kind: str, offset: float = 0.) -> bytes:
    """A file with nothing wrong with it."""
    if kind in ('zip', 'legacy'):
        content = run_content()
        content.update(state_dict_ema=weights(offset), state_dict=weights(offset + 100.))
        return saved(content, zipped=kind == 'zip')
    if kind == 'bare':
        return saved(weights(offset))
    if kind == 'plain':
        return safetensors.torch.save(plain_weights(offset))
    path = Path(f'original-{os.getpid()}.safetensors')
    save_hashed(plain_weights(offset), path, force=True)
    return path.read_bytes()


KINDS = ('zip', 'bare', 'legacy', 'plain', 'hashed')
CHECKED = ('zip', 'bare', 'hashed')  # with a checksum of the values
SUFFIX = {'plain': '.safetensors', 'hashed': '.safetensors'}


class Files:
    """Originals, and their like with other values."""

    def __init__(self) -> None:
        self.raw = {kind: (original(kind), original(kind, 5.)) for kind in KINDS}
        self.all = {raw for both in self.raw.values() for raw in both}


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """One injury, half of them where the structure is: in headers and pickles, and at both ends."""
    data = bytearray(raw)
    marks = [0, *(match.start() + rng.randrange(-4, 60) for match in re.finditer(b'PK|\x80\x02|"', raw))]
    at = rng.choice([rng.randrange(len(data)), min(max(rng.choice(marks), 0), len(data) - 1)])
    width = rng.choice((1, 2, 4, 8, 64))
    how = rng.randrange(9)
    if how < 4:
        data[at] ^= 1 << rng.randrange(8)
    elif how == 4:
        del data[at:]
    elif how == 5:
        data[at:at + width] = rng.choice((rng.randbytes(width), b'\xff' * width, bytes(width), raw[:width]))
    elif how == 6:
        data[at:at] = rng.randbytes(width)
    elif how == 7:
        del data[at:at + width]
    else:
        data[at:at + width] = raw[(source := rng.randrange(len(raw))):source + width]
    return bytes(data)


def damage(files: Files, rng: random.Random) -> tuple[str, bytes]:
    kind = rng.choice(KINDS)
    return kind, damaged(files.raw[kind][0], rng)


def splice(files: Files, rng: random.Random) -> tuple[str, bytes]:
    """Parts of two files in one: as by a download that was started again, or by somebody who hides one in another."""
    kind, other = rng.choice(KINDS), rng.choice(KINDS)
    a, b = files.raw[kind][0], files.raw[other][1]
    cut, cut_b = rng.randrange(len(a)), rng.randrange(len(b))
    return kind, rng.choice([
        a + b, damaged(a, rng) + b, a + damaged(b, rng), a[:cut] + b, a + b[cut_b:], a[:cut] + b[cut:],
        a[:cut] + b[cut_b:], rng.randbytes(rng.randrange(1, 100)) + a, a + rng.randbytes(rng.randrange(1, 100)),
        a + zip_of([]), zip_of([('x', b)]) + a, zip_of([('x', a)]), a[:cut] + b + a[cut:]])


def headers(files: Files, rng: random.Random) -> tuple[str, bytes]:
    """A zip file with right parts, put together wrongly."""
    kind = rng.choice(('zip', 'bare'))
    entries = [Entry(name, data) for name, data in records_of(files.raw[kind][0])]
    others = [Entry(name, data) for name, data in records_of(files.raw[kind][1])]
    entry = rng.choice(entries)
    options, end = {}, {}
    how = rng.randrange(9)
    numbers = (0, 1, 16, 32, 8, 1 << 11, 0xFFFF, 0xFFFFFFFF, len(entry.data), rng.randrange(1 << 16))
    fields = ('flags', 'method', 'crc', 'packed', 'size', 'disk', 'attributes', 'offset')
    limit = {'flags': 0xFFFF, 'method': 0xFFFF, 'disk': 0xFFFF}
    if how in (0, 1):
        field = rng.choice(fields)
        change = {field: rng.choice(numbers) & limit.get(field, 0xFFFFFFFF)}
        entry.central = change
        entry.local = change if how and field not in ('disk', 'attributes', 'offset') else {}
    elif how == 2:
        entry.name = rng.choice(entries).name
    elif how == 3:
        entries.insert(rng.randrange(len(entries)), rng.choice(others))
    elif how == 4:
        entries[entries.index(entry)] = Entry(entry.name, rng.choice(others).data, central={'crc': numbers[-1]})
    elif how == 5:
        entry.local = {'name': rng.choice(entries).name.encode()}
    elif how == 6:
        end = {rng.choice(('count', 'here', 'disk', 'start_disk')): rng.choice(numbers) & 0xFFFF}
    elif how == 7:
        end = {rng.choice(('size', 'offset')): rng.choice(numbers)}
    else:
        a, b = rng.choice(entries), rng.choice(entries)
        a.central, b.central = {'name': b.name.encode()}, {'name': a.name.encode()}
    options['zip64'] = rng.random() < 0.3
    for each in entries:
        each.zip64 = options['zip64'] and rng.random() < 0.3
    return kind, craft_zip(entries, **options, **end)


FROM_CPU = getattr(torch._utils, '_rebuild_device_tensor_from_cpu_tensor', None) \
    or torch._utils._rebuild_device_tensor_from_numpy  # torch 2.5 has only this one
HOSTILE: list[Callable[[], object]] = [
    lambda: Call(os.system, f'touch {CANARY}'),
    lambda: Call(eval, f'open({CANARY!r}, "w")'),
    lambda: Call(Path.touch, Path(CANARY)),
    lambda: Call(torch.hub.load, 'x', 'y'),
    lambda: tensor(6, (1 << 40,), (0,)),
    lambda: tensor(6, (1 << 30,), (1,)),
    lambda: tensor(1 << 30, (6,), (1,)),
    lambda: tensor(6, (-1,), (1,)),
    lambda: storage(1 << 40),
    lambda: Call(
        torch._utils._rebuild_qtensor, storage(6), 0, (1 << 32,), (1,), (torch.per_tensor_affine, 1., 0), False, {}),
    lambda: Call(FROM_CPU, tensor(6, (1 << 32,), (0,)), torch.float64, 'cpu', False),
    lambda: Call(collections.OrderedDict, [('a', Call(os.system, f'touch {CANARY}'))]),
]


def hostile_pickle(files: Files, rng: random.Random) -> tuple[str, bytes]:
    """A right file around a pickle that asks for code or memory."""
    value = rng.choice(HOSTILE)()
    good = tensor(6, (2, 3), (3, 1))
    content = rng.choice([
        value, {'a': value}, {'a': good, 'b': value}, {'state_dict': {'a': good}, 'args': value},
        {'state_dict': {'a': good}, 'optimizer': [{'x': (value,)}]}, [value] * 5, {'a': good, 'a' * 50: value},
        {'state_dict_ema': value, 'state_dict': {'a': good}}])
    data = pickled(content, protocol=rng.choice((2, 2, 2, 4)))
    if rng.random() < 0.3:
        data = damaged(data, rng)
    raw = struct.pack('<6f', *range(6))
    return 'foreign', zip_file(data, raw) if rng.random() < 0.5 else legacy_file(data, raw, ('0',))


MAKERS = (damage, damage, damage, splice, headers, headers, hostile_pickle)


def make_case(seed: int, files: Files) -> tuple[str, str, bytes]:
    """What was done, to which kind of file ('foreign' if there is no original to compare with), and the file."""
    rng = random.Random(seed)
    maker = MAKERS[seed % len(MAKERS)]
    kind, raw = maker(files, rng)
    return maker.__name__, kind, raw


def memory(what: str) -> int:
    """Bytes that Linux counts for this process: VmRSS now, VmHWM at most since the last reset."""
    return int(re.search(rf'{what}:\s+(\d+) kB', Path('/proc/self/status').read_text()).group(1)) * 1024


@contextlib.contextmanager
def watched(length: int, bounded: bool) -> Iterator[None]:
    faulthandler.dump_traceback_later(MAX_SECONDS, exit=True)
    with contextlib.suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5')  # resets VmHWM
    before = memory('VmRSS')
    yield
    faulthandler.cancel_dump_traceback_later()
    # what a pickle asks for is bounded by torch alone
    assert not bounded or memory('VmHWM') - before < 3 * length + BEYOND, 'memory'


def check(kind: str, raw: bytes, path: Path, files: Files) -> bool:
    """Whether the file was refused. Raises for what must not happen."""
    path.unlink(missing_ok=True)
    path.write_bytes(raw)
    refused = False
    try:
        with watched(len(raw), kind != 'foreign'):
            checkpoint = read_checkpoint(path)
    except CheckpointError as e:
        assert '\n' not in str(e) and len(str(e)) < 2000, 'message'
        refused = True
    else:
        state_dict = checkpoint.state_dict
        assert sum(value.numel() * value.element_size() for value in state_dict.values()) <= len(raw), 'size'
        if raw in files.all:  # a splice can be of all of one and nothing of the other
            pass
        elif kind in CHECKED:
            assert same(state_dict, plain_weights() if kind == 'hashed' else weights()), 'wrong weights'
            assert checkpoint.protection is not None or kind == 'hashed', 'protection'
        elif kind != 'foreign':
            assert checkpoint.protection is None, 'protection'
    with contextlib.suppress(CheckpointError), watched(len(raw), kind != 'foreign'):
        read_outline(path)
    assert not os.path.exists(CANARY), 'code ran'
    return refused


def work(start: int, count: int) -> dict:
    """Read a chunk of files; run in a process of its own."""
    files = Files()
    for kind in KINDS:
        path = Path(f'good{SUFFIX.get(kind, ".pth")}')
        assert not check(kind, files.raw[kind][0], path, files)
    outcomes: collections.Counter = collections.Counter()
    failures = []
    for seed in range(start, start + count):
        maker, kind, raw = make_case(seed, files)
        try:
            refused = check(kind, raw, Path(f'case{SUFFIX.get(kind, ".pth")}'), files)
        except Exception as e:
            failures.append(f'seed {seed}, {maker}, {kind}: {type(e).__name__}: {e}'[:500])
        else:
            outcomes[f'{maker} {"refused" if refused else "read"}'] += 1
    return {'outcomes': outcomes, 'failures': failures}


@pytest.mark.slow
def test_thousands_of_files(tmp_path):
    """0 wrong weights, 0 tracebacks, 0 hangs, 0 runs of code, and the memory bound."""
    chunks = [(start, min(CHUNK, CASES - start)) for start in range(0, CASES, CHUNK)]
    outcomes: collections.Counter = collections.Counter()
    for first, second in zip(chunks[::2], chunks[1::2], strict=True):
        processes = []
        for start, count in (first, second):
            (tmp_path / str(start)).mkdir()
            processes.append(subprocess.Popen(
                [sys.executable, __file__, str(start), str(count)], cwd=tmp_path / str(start), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path), 'OMP_NUM_THREADS': '1'}))
        for process in processes:
            out, errors = process.communicate(timeout=280)
            assert process.returncode == 0, errors[-3000:]  # a crash, or the watchdog
            result = json.loads(out)
            assert not result['failures']
            outcomes.update(result['outcomes'])
    assert sum(outcomes.values()) == CASES
    for maker in {maker.__name__ for maker in MAKERS}:
        assert outcomes[f'{maker} refused'] > 100, outcomes
    assert outcomes['damage read'] > 100  # damage to what is not used, or cannot be seen


def tiny_state_dict():
    torch.manual_seed(0)
    return GmNet(base_dim=2, depths=(1, 1), mlp_ratios=(2, 1), stem_chs=2, num_classes=3).state_dict()


def refuse(path, *words):
    with pytest.raises(CheckpointError) as info:
        state_dict = read_checkpoint(path).state_dict
        describe_tensors(state_dict).check_fits(state_dict, 'the file')
    for word in words:
        assert word in str(info.value)


@pytest.mark.parametrize('name, value, word', [
    ('head.weight', torch.zeros(()), 'head.weight'),
    ('head.weight', torch.zeros(3), 'head.weight'),
    ('head.weight', torch.zeros(0, 4), 'head.weight'),
    ('stem.0.conv.weight', torch.zeros(0, 3, 3, 3), 'stem.0.conv.weight'),
    ('stages.0.1.f1.conv.weight', torch.zeros(1, 2, 1, 1), ''),
    (f'stages.{"9" * 5000}.1.f1.conv.weight', torch.zeros(1), 'unexpected'),
    ('stages.0.999999.f1.conv.weight', torch.zeros(1), ''),
    ('stages.999999.0.0.conv.weight', torch.zeros(1), ''),
])
def test_tensors_that_make_no_model(name, value, word, tmp_path):
    torch.save({**tiny_state_dict(), name: value}, tmp_path / 'x.pth')
    refuse(tmp_path / 'x.pth', word)


@pytest.mark.slow
def test_every_wrong_shape(tmp_path):
    """A tensor of another size is never taken, whichever it is."""
    path = tmp_path / 'x.pth'
    for key, value in tiny_state_dict().items():
        wrong = value.new_zeros(2) if value.ndim == 0 else torch.cat([value, value[:1]])
        torch.save({**tiny_state_dict(), key: wrong}, path)
        refuse(path)


if __name__ == '__main__':
    started = time.monotonic()
    print(json.dumps(work(int(sys.argv[1]), int(sys.argv[2]))))
    print(f'{time.monotonic() - started:.0f} s', file=sys.stderr)
