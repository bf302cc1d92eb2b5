"""First imports in two threads, of stand-ins and of the real packages."""
import concurrent.futures
import itertools
import sys

import pytest
from stand_ins import CHECK, OFF, PYTHONS, SRC, call, find_python, write_stand_ins


@pytest.fixture(params=PYTHONS)
def python(request):
    return find_python(request.param)


PAIR = """
import faulthandler, sys, threading, time

def run(code, delay):
    time.sleep(delay)
    try:
        exec(code, {})
    except BaseException as e:
        print(f'{e!r} raised by {code!r}')

first, second, delay, limit = sys.argv[1:]
faulthandler.dump_traceback_later(float(limit), exit=True)
threads = [threading.Thread(target=run, args=args) for args in [(first, 0), (second, float(delay))]]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
""" + CHECK
KNOWN_AT_ONCE = "; assert is_model('gmnet_s1')"  # in the thread that imported, whatever the other one is doing
WHOLE = [
    'from timm import is_model' + KNOWN_AT_ONCE,
    'import gmnet_timm; from timm import is_model' + KNOWN_AT_ONCE,
    'from gmnet_timm import GmNet; from timm import is_model' + KNOWN_AT_ONCE,
    'import gmnet_timm',
    'import torch',
    "import importlib.util; importlib.util.find_spec('timm.models')",
]
# Python itself may fail to import two parts of one package in two threads. timm's parts import one another in circles:
# of the real ones, one part is enough for that, beside an import of timm.
PARTS = [
    'from timm.models import is_model' + KNOWN_AT_ONCE,
    'from timm.data import create_transform',
    'from timm.layers import DropPath',
    'import gmnet_timm.gmnet',
]
SLEEP = 0.03
DELAYS = [0, 1.5 * SLEEP, 2.5 * SLEEP]


@pytest.fixture(scope='module')
def slow_folder(tmp_path_factory):
    return write_stand_ins(tmp_path_factory.mktemp('stand-ins'), SLEEP)


def is_part(code):
    return code.startswith(('from timm.', 'import gmnet_timm.'))


def run_pair(folder, first, second, delay, may_fail=False, **kwargs):
    if 'import gmnet_timm.gmnet' in (first, second):  # holds the models while it waits for the other thread's timm
        first, second = first.replace(KNOWN_AT_ONCE, ''), second.replace(KNOWN_AT_ONCE, '')
    output = call(PAIR, folder, first, second, delay, 60, **kwargs)
    case = f'{first} | {second} | {delay}: {output}'
    assert 'could not register' not in output and 'AssertionError' not in output, case
    assert may_fail or 'raised by' not in output, case


def run_stand_in_pairs(folder, triples, **kwargs):
    def run(triple):
        first, second, delay = triple
        parts = is_part(first) + is_part(second)
        try:
            run_pair(folder, *triple, may_fail=parts == 2, **kwargs)
        except AssertionError as e:
            # Python itself fails, rarely, where a thread locks a part before the other one has begun with timm: where
            # others use the processor, after any delay. It is not to happen twice.
            if parts == 0 or '_DeadlockError' not in str(e):
                raise
            run_pair(folder, *triple, **kwargs)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # they sleep most of the time
        assert len(list(pool.map(run, triples))) >= 5


def test_imports_in_two_threads(slow_folder):
    timm, gmnet_timm, names, *_ = WHOLE
    run_stand_in_pairs(slow_folder, [
        (timm, 'from timm.data import create_transform', 1.5 * SLEEP),
        (timm, gmnet_timm, 0),
        (timm, 'import gmnet_timm.gmnet', 1.5 * SLEEP),
        (timm, PARTS[0], 0.5 * SLEEP),
        (PARTS[0], names, 2.5 * SLEEP),
    ])


@pytest.mark.slow
def test_all_imports_in_two_threads(slow_folder, python):
    delays = DELAYS if python == sys.executable else DELAYS[1:2]
    run_stand_in_pairs(slow_folder, itertools.product([*WHOLE, *PARTS], [*WHOLE, *PARTS], delays), python=python)


@pytest.mark.slow
def test_all_imports_in_two_threads_without_the_entry_point(slow_folder):
    explicit = [code for code in [*WHOLE, *PARTS] if 'gmnet_timm' in code]
    others = [code.replace(KNOWN_AT_ONCE, '') for code in [*WHOLE, *PARTS] if code not in explicit]
    pairs = [*itertools.product(explicit, others), *itertools.product(others, explicit)]
    run_stand_in_pairs(slow_folder, [(*pair, delay) for pair in pairs for delay in DELAYS], env=OFF)


@pytest.mark.slow
@pytest.mark.parametrize('first, second, delay', [
    (WHOLE[0], WHOLE[1], 0.1), (WHOLE[2], PARTS[0], 0.5), (WHOLE[0], PARTS[3], 1.2),
])
def test_real_imports_in_two_threads(first, second, delay):
    run_pair(SRC, first, second, delay, may_fail=is_part(second), options=())
