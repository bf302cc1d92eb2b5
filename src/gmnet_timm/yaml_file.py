"""Reading YAML that somebody else may have written: bounded in size, nesting and aliases, and never a traceback."""
import os
from pathlib import Path
from typing import Any

import yaml

from gmnet_timm.errors import UserError

__all__ = ['read_yaml']

MAX_BYTES = 100_000  # twenty times an args.yaml; PyYAML reads about 60 kB per second
MAX_DEPTH = 30
MAX_NODES = 20_000  # with every alias counted as what it stands for
MAX_DIGITS = 100  # Python prints no integers of some thousand digits


class _BoundedLoader(yaml.SafeLoader):
    """A SafeLoader that refuses what takes far more room or time than its text."""

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = 0
        self.nodes = 0
        self.sizes: dict[int, int] = {}  # nodes below a composed node, itself included, by its id

    def compose_node(self, parent, index):
        is_alias = self.check_event(yaml.AliasEvent)
        self.depth += 1
        before = self.nodes
        node = super().compose_node(parent, index)
        self.depth -= 1
        if is_alias and id(node) not in self.sizes:
            raise yaml.YAMLError('an alias stands for something that contains it')
        self.nodes += self.sizes[id(node)] if is_alias else 1
        self.sizes.setdefault(id(node), self.nodes - before)
        if self.nodes > MAX_NODES:
            raise yaml.YAMLError(f'more than {MAX_NODES:,} values, with those that aliases repeat')
        return node

    def compose_scalar_node(self, anchor):
        node = super().compose_scalar_node(anchor)
        if node.tag == 'tag:yaml.org,2002:int' and len(node.value) > MAX_DIGITS:
            raise yaml.YAMLError(f'a whole number of more than {MAX_DIGITS} digits')
        return node

    def get_event(self):
        if self.depth > MAX_DEPTH:  # here, because PyYAML would go on down by recursion
            raise yaml.YAMLError(f'nested more than {MAX_DEPTH} deep')
        return super().get_event()


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file as `yaml.safe_load` does, within bounds.

    Args:
        path: A file of at most `MAX_BYTES`.

    Returns:
        What the file holds, None if that is nothing.

    Raises:
        UserError: It is not a readable file, not YAML, or larger, deeper or more repetitive than arguments ever are.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for ever
        raise UserError(f'{path} cannot be read: it is not a regular file')
    try:
        with open(path, 'rb') as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(f'{path} cannot be read: it is larger than {MAX_BYTES:,} bytes')
        loader = _BoundedLoader(content.decode())
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except UserError:
        raise
    except OSError as e:
        raise UserError(f'{path} cannot be read: {e.strerror}') from e
    except Exception as e:  # PyYAML's constructors raise almost anything: KeyError for `!!bool x`, for example
        raise UserError(f'{path} cannot be read as YAML: {_reason(e)}') from e


def _reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f'{error.problem}, line {error.problem_mark.line + 1}'
    if isinstance(error, (yaml.YAMLError, UnicodeDecodeError)):
        return str(error).splitlines()[0]
    return f'a value does not fit its tag ({type(error).__name__})'
