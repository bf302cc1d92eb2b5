"""The config.json of a folder or repository that timm loads as `local-dir:` or `hf-hub:`."""
import contextlib
import dataclasses
import functools
import json
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from timm.models._hub import hf_split, load_model_config_from_hf

from gmnet_timm.errors import UserError

__all__ = [
    'CARD_NAME', 'CONFIG_NAME', 'LOCATION_KEYS', 'REQUEST_ERRORS', 'WEIGHTS_NAMES', 'WEIGHTS_NAME', 'Config',
    'download_repository', 'offline_without_address', 'read_config', 'read_hub_config', 'read_text',
]

WEIGHTS_NAME = 'model.safetensors'
WEIGHTS_NAMES = (WEIGHTS_NAME, 'pytorch_model.bin')  # what timm's save_for_hf writes, in the order in which it looks
CONFIG_NAME = 'config.json'
CARD_NAME = 'README.md'

# What huggingface_hub raises when a request fails, whichever HTTP library it uses: they share these ancestors.
# It wraps failed uploads in RuntimeError, and takes broken answers for ValueError or KeyError.
REQUEST_ERRORS: tuple[Any, ...] = (OSError, RuntimeError, ValueError, KeyError, *HfHubHTTPError.__bases__)

# Entries of a pretrained_cfg that say where weights are. They are of where it came from, not of what is written.
LOCATION_KEYS = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'architecture', 'custom_load',
                 'tag', 'label_offset')

_MAX_BYTES = 10_000_000  # thousands of class names with their descriptions are far smaller
_MAX_PIXELS = 2 ** 14  # of a side


@dataclasses.dataclass(frozen=True)
class Config:
    """The entries of a config.json, with checked types."""

    path: Path
    name: str  # of the model
    model_args: dict[str, Any]
    num_classes: int
    pretrained_cfg: dict[str, Any]
    label_names: list[str] | None
    weights_sha256: str | None  # of the weights that it was written with, where this package wrote it
    others: dict[str, Any] = dataclasses.field(default_factory=dict)  # all entries, for what is not understood here


def read_config(folder: Path) -> Config:
    """Read the config.json in a folder.

    Raises:
        UserError: There is none, or an entry is not what timm takes.
    """
    path = folder / CONFIG_NAME
    try:
        config = json.loads(read_text(path), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as e:
        raise UserError(f'{path} cannot be read as JSON: {e}') from e
    if not isinstance(config, dict):
        raise UserError(f'{path} does not describe a model.')
    cfg = _entry(path, config, 'pretrained_cfg', dict, {})
    _check_input(path, cfg)
    labels = _entry(path, config, 'label_names', list, None)
    if labels is not None and not all(isinstance(label, str) for label in labels):
        raise UserError(f'{path}: label_names are not strings.')
    num_classes = config.get('num_classes', cfg.get('num_classes'))
    if type(num_classes) is not int or num_classes < 0:
        raise UserError(f'{path}: num_classes {num_classes!r} is not a number of classes.')
    return Config(
        path=path,
        name=_entry(path, config, 'architecture', str),
        model_args=_entry(path, config, 'model_args', dict, None) or {},
        num_classes=num_classes,
        pretrained_cfg=cfg,
        label_names=labels,
        weights_sha256=_entry(path, config, 'weights_sha256', str, None),
        others=config,
    )


def read_hub_config(name: str, where: str) -> Config:
    """The configuration behind a model name with a scheme, `local-dir:FOLDER` or `hf-hub:OWNER/NAME`.

    Args:
        name: The model name.
        where: What names it, for errors.

    Raises:
        UserError: It cannot be read, from the network or the cache.
    """
    scheme, _, model_id = name.partition(':')
    if scheme == 'local-dir':
        return read_config(Path(model_id))
    try:
        cfg, architecture, model_args = load_model_config_from_hf(model_id)
    except (*REQUEST_ERRORS, TypeError, AssertionError) as e:
        raise UserError(
            f'{where} names the model {name}, but its config.json cannot be read: '
            f'{" ".join(str(e).split())[:300]}') from e
    return Config(Path(name), architecture, model_args or {}, cfg['num_classes'], cfg, cfg.get('label_names'), None)


def read_text(path: Path) -> str:
    """The text of a small file.

    Raises:
        UserError: It cannot be read, or is too large to be what it should be.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f'{path} is too large for a {path.name}.')
        return path.read_text(encoding='utf-8-sig')  # without the mark that some editors put first
    except (OSError, ValueError) as e:
        raise UserError(f'{path} cannot be read as text: {e}') from e


def _entry(path: Path, config: dict[str, Any], key: str, kind: type, *default: Any) -> Any:
    value = config.get(key, *default)
    if value is None and default == (None,) or isinstance(value, kind):
        return value
    raise UserError(f'{path}: {key} is {"missing" if key not in config else f"not a {kind.__name__}"}.')


def _check_input(path: Path, cfg: dict[str, Any]) -> None:
    for key in ('input_size', 'test_input_size'):
        size = cfg.get(key)
        if size is None:
            continue
        whole = isinstance(size, list) and len(size) == 3 and all(type(n) is int for n in size)
        if not (whole and all(0 < n <= _MAX_PIXELS for n in size)):
            raise UserError(f'{path}: {key} {str(size)[:100]} is not channels, height and width.')


def _refuse_constant(name: str) -> float:
    raise ValueError(f'{name} is not a number in JSON')


def download_repository(name: str) -> Path:
    """The folder in the cache with weights, configuration and card of a repository."""
    repo_id, revision = hf_split(name.partition(':')[2])
    offline = not _is_known_host(constants.ENDPOINT)
    download = functools.partial(hf_hub_download, repo_id, revision=revision, local_files_only=offline)
    try:
        with contextlib.suppress(EntryNotFoundError):
            download(CARD_NAME)
        download(CONFIG_NAME)
        return Path(download(WEIGHTS_NAME)).parent
    except REQUEST_ERRORS as e:
        why = f'{constants.ENDPOINT} has no address here, and nothing of it is in the cache. Is there a network?' \
            if offline else ' '.join(str(e).split())[:300]
        raise UserError(f'{name} cannot be read: {why}') from e


@contextlib.contextmanager
def offline_without_address() -> Iterator[None]:
    """Ask no Hub that has no address here, as with HF_HUB_OFFLINE: huggingface_hub would try for half a minute."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _is_known_host(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _is_known_host(address: str) -> bool:
    """Whether a name has an address here, or a proxy would ask for it."""
    try:
        return bool(urllib.request.getproxies() or socket.getaddrinfo(urllib.parse.urlsplit(address).hostname, None))
    except OSError:
        return False
