"""Checking recipes against the parser of the train.py that will read them.

train.py hands the YAML of `-c` to argparse as defaults. Versions of the script differ in what they check then: some
take any key and any value, so that a mistyped `warmup_epoch` trains with the default and nobody notices.
"""
import dataclasses
import difflib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from gmnet_timm.errors import UserError
from gmnet_timm.yaml_file import read_yaml

__all__ = ['Option', 'check_config', 'check_file', 'read_options', 'train_script']

# Run in a process of its own: the script brings its checkout's timm, which must not mix with the one imported here.
_DUMP = '''
import argparse, json, os, runpy, sys
sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[1])))
parser = runpy.run_path(sys.argv[1], run_name='train')['parser']
flags = (argparse._StoreTrueAction, argparse._StoreFalseAction)
print('options: ' + json.dumps({
    a.dest: dict(
        type='bool' if isinstance(a, flags) else 'mapping' if 'ParseKwargs' in type(a).__name__
        else getattr(a.type, '__name__', 'str'),
        nargs=a.nargs, choices=a.choices and list(a.choices), default=a.default)
    for a in parser._actions if a.dest != 'help'
}, default=repr))
'''

_TYPES: dict[str, tuple[type, ...]] = {
    'int': (int,), 'float': (int, float), 'str': (str,), 'bool': (bool,), 'mapping': (dict,),
}

_KINDS = {'int': 'a whole number', 'float': 'a number', 'str': 'text', 'bool': 'true or false', 'mapping': 'a mapping'}


@dataclasses.dataclass(frozen=True)
class Option:
    """What train.py's parser says of one argument.

    Attributes:
        type: int, float, str, bool (a flag) or mapping (key=value pairs).
        nargs: As in argparse.
        choices: As in argparse.
        default: As in argparse. Only where this is None, the argument may be null.
    """

    type: str
    nargs: int | str | None
    choices: list[Any] | None
    default: Any


def train_script(path: str | None = None) -> str:
    """The train.py at `path`, or that of the checkout that the environment variable TIMM_SCRIPTS names.

    Raises:
        UserError: There is none.
    """
    if path is None and 'TIMM_SCRIPTS' not in os.environ:
        raise UserError('Give --train-script, or set TIMM_SCRIPTS to a checkout of timm, which has train.py.')
    script = Path(path or os.environ['TIMM_SCRIPTS'])
    script = script / 'train.py' if script.is_dir() else script
    if not script.is_file():
        raise UserError(f'There is no {script}.')
    return str(script)


def read_options(script: str) -> dict[str, Option]:
    """Read the options of a train.py, by the names that its YAML file and its namespace use.

    Args:
        script: Path of train.py, which is executed up to its `main`.

    Raises:
        UserError: It fails, or has no parser.
    """
    done = subprocess.run([sys.executable, '-c', _DUMP, script], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith('options: ')]
    if done.returncode or not lines:
        reason = done.stderr.strip().splitlines()
        raise UserError(f'{script} gives no parser: {reason[-1] if reason else "it printed nothing"}')
    return {dest: Option(**option) for dest, option in json.loads(lines[-1].removeprefix('options: ')).items()}


def check_config(config: Any, options: dict[str, Option]) -> list[str]:
    """Say what in a YAML file's content the parser would misread.

    Args:
        config: From `read_yaml`.
        options: From `read_options`.

    Returns:
        One sentence per problem.
    """
    if not isinstance(config, dict):
        return ['it is not a mapping of argument names to values']
    return [problem for key, value in config.items() for problem in _problems(str(key), value, options)]


def check_file(path: str | Path, script: str) -> list[str]:
    """`check_config` for a YAML file and a train.py.

    Raises:
        UserError: The file cannot be read as YAML.
    """
    return check_config(read_yaml(path), read_options(script))


def _problems(key: str, value: Any, options: dict[str, Option]) -> list[str]:
    if key not in options:
        near = difflib.get_close_matches(key.replace('-', '_'), options, n=1)
        return [f'{key} is not an argument of train.py' + (f', {near[0]} is' if near else '')]
    option = options[key]
    if value is None:
        return [] if option.default is None else [f'{key} may not be null']
    many = option.nargs in ('+', '*') or isinstance(option.nargs, int)
    if option.type in ('bool', 'mapping') or not many:
        values = [value]
    elif not isinstance(value, list):
        return [f'{key} is a list, not {value!r}']
    elif isinstance(option.nargs, int) and option.nargs != len(value):
        return [f'{key} has {option.nargs} values, not {len(value)}']
    else:
        values = value
    found = [f'{key}: {v!r} is not {_KINDS[option.type]}{_hint(v, option)}' for v in values if not _fits(v, option)]
    if option.choices:
        found += [f'{key}: {v!r} is not one of {option.choices}' for v in values if v not in option.choices]
    return found


def _fits(value: Any, option: Option) -> bool:
    if isinstance(value, bool):
        return option.type == 'bool'
    return isinstance(value, _TYPES[option.type])


def _hint(value: Any, option: Option) -> str:
    # YAML 1.1 only reads a number with an exponent as one if it also has a point and a sign.
    return ' (YAML needs a point and a sign in it: 3.0e-3)' if option.type == 'float' and isinstance(value, str) else ''
