"""Is what is published whole, does it agree with itself, and what had to be assumed?"""
import dataclasses
import functools
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from timm.models._hub import hf_split

from gmnet_timm import __version__
from gmnet_timm.errors import MissingExtraError, UserError
from gmnet_timm.hub.card import TAGS
from gmnet_timm.hub.client import explaining, file_sha256, within
from gmnet_timm.hub.loading import load_as_from_hub, same_logits
from gmnet_timm.hub.onnx import ONNX_NAME, PREPROCESSOR_NAME, find_difference
from gmnet_timm.weights.class_names import check_class_names
from gmnet_timm.weights.config import CARD_NAME, CONFIG_NAME, WEIGHTS_NAMES, read_config
from gmnet_timm.weights.description import (
    ModelDescription,
    describe_config,
    describe_metadata,
    describe_tensors,
)
from gmnet_timm.weights.files import SHA256_KEY, Checkpoint, read_checkpoint, weights_sha256
from gmnet_timm.weights.layouts import named_as, to_authors
from gmnet_timm.weights.preprocessing import resolve_preprocessing

__all__ = ['Check', 'verify']


@dataclasses.dataclass(frozen=True)
class Check:
    """A thing that `verify` looked at."""

    name: str
    ok: bool | None  # None where it can be neither confirmed nor denied
    detail: str


def verify(name: str, token: str | None = None, timeout: float = 120.) -> list[Check]:
    """Check a published repository or a folder.

    Args:
        name: A folder, or `owner/name[@revision]` on the Hub. timm's prefixes `local-dir:` and `hf-hub:` may be given,
            and decide where both exist.
        token: Access token, by default the one huggingface_hub finds.
        timeout: Seconds that a request may take; the download of a file may take ten times as long.

    Returns:
        One entry per check. The logits are not computed where weights or configuration are wrong. They are those of
        the model that `timm.create_model('hf-hub:…')` loads.

    Raises:
        UserError: There is nothing to check, or the Hub cannot be reached.
    """
    scheme, _, path = name.rpartition(':') if name.startswith(('local-dir:', 'hf-hub:', 'hf_hub:')) else ('', '', name)
    local = scheme == 'local-dir' or not scheme and Path(path).is_dir()
    if not local and '/' not in path:
        raise UserError(f'{path} is neither a folder nor the owner/name of a repository.')
    folder, checks, load = _download(path, token, timeout) if not local else (Path(path), [], load_as_from_hub)
    file = next((folder / file for file in WEIGHTS_NAMES if (folder / file).is_file()), None)
    if file is None:
        raise UserError(f'{name} has no {" or ".join(WEIGHTS_NAMES)}.')
    weights, recorded = None, None
    try:
        weights = read_checkpoint(file)
        recorded = describe_metadata(weights.metadata, file.name)
        checks.append(_check_weights(weights, recorded))
        checks += _check_assumed(recorded)
        checks.append(_check_config(folder, weights, recorded))
    except Exception as e:  # whatever a broken repository raises is the finding
        checks.append(_failed('weights' if weights is None else 'config', e))
    checks.append(_finding('card', _check_card, folder))
    if weights is None or any(check.ok is False and check.name in ('weights', 'config') for check in checks):
        return [*checks, Check('logits', None, 'not computed, for what is wrong above')]
    try:
        model = load(folder)
        checks.append(_check_logits(model, weights, recorded))
    except Exception as e:
        return [*checks, _failed('logits', e)]
    card = folder / CARD_NAME
    shown = card.is_file() and ONNX_NAME in card.read_text(encoding='utf-8', errors='replace')
    if shown or (folder / ONNX_NAME).exists():
        checks.append(_finding('onnx', _check_onnx, folder, model))
    return checks


def _download(name: str, token: str | None, timeout: float) -> tuple[Path, list[Check], Any]:
    """The files of a published repository in the cache, what the server says of them, and how timm loads it."""
    repo_id, revision = hf_split(name)
    api = HfApi(token=token, library_name='gmnet-timm', library_version=__version__)
    with explaining(f'Cannot read {name}'):
        info = within(timeout, lambda: api.model_info(repo_id, revision=revision, files_metadata=True))
        files = {file.rfilename: file for file in info.siblings or []}
        paths = {
            file: Path(within(10 * timeout, functools.partial(
                hf_hub_download, repo_id, file, revision=info.sha, token=token)))
            for file in (CONFIG_NAME, CARD_NAME, *WEIGHTS_NAMES, ONNX_NAME, PREPROCESSOR_NAME) if file in files
        }
    weights_name = next((file for file in WEIGHTS_NAMES if file in paths), None)
    if weights_name is None:
        raise UserError(f'{name} has no {" or ".join(WEIGHTS_NAMES)}.')
    lfs = files[weights_name].lfs
    checks = [Check('commit', True, f'{repo_id} at {info.sha}')]
    if lfs is not None:
        same = file_sha256(paths[weights_name]) == lfs['sha256']
        detail = f'SHA-256 of {weights_name} {"as" if same else "is not what"} the server says'
        checks.append(Check('download', same, detail))
    pickles = [file for file in files if file.endswith(('.bin', '.pth', '.pt', '.tar', '.pkl', '.ckpt'))]
    if pickles:
        checks.append(Check('pickles', None, f'also holds files that may carry code: {", ".join(pickles)}'))

    def load(_: Path) -> Any:
        return within(10 * timeout, lambda: timm.create_model(f'hf-hub:{repo_id}@{info.sha}', pretrained=True).eval())

    return paths[weights_name].parent, checks, load


def _finding(name: str, check, *args) -> Check:
    try:
        return check(*args)
    except Exception as e:  # whatever a broken repository raises is the finding
        return _failed(name, e)


def _failed(name: str, error: Exception) -> Check:
    return Check(name, False, f'{type(error).__name__}: {" ".join(str(error).split())}')


def _check_weights(weights: Checkpoint, recorded: ModelDescription | None) -> Check:
    state_dict, _ = to_authors(weights.state_dict)
    description = recorded or describe_tensors(state_dict)
    name = weights.path.name
    description.check_fits(state_dict, f'the metadata of {name}' if recorded else name)
    sha256 = weights.metadata.get(SHA256_KEY)
    what = f'{len(weights.state_dict)} tensors, {description}'
    if sha256 is None and weights.protection:
        return Check('weights', True, f'{what}; {weights.protection} are right')
    if sha256 is None:
        return Check('weights', None, f'{what}; no SHA-256 is recorded, so a flipped bit would go unnoticed')
    return Check('weights', True, f'{what}; SHA-256 {sha256} as recorded')


def _check_assumed(recorded: ModelDescription | None) -> list[Check]:
    if recorded is None:
        return [Check('assumed', None, 'the weights file does not record its model, so only config.json says '
                      'activation, pooling and output stride')]
    if recorded.assumed:
        values = ', '.join(f'{key} {recorded.full_args[key]}' for key in recorded.assumed)
        return [Check('assumed', None, f'nobody stated {values}: assumed when these weights were published')]
    return []


def _check_config(folder: Path, weights: Checkpoint, recorded: ModelDescription | None) -> Check:
    config = read_config(folder)
    described = describe_config(config)
    described.check_fits(to_authors(weights.state_dict)[0], CONFIG_NAME)
    if recorded is not None:
        mine, theirs = described.full_args, recorded.full_args
        different = [f'{key} {mine.get(key)} against {theirs.get(key)}' for key in {**mine, **theirs}
                     if mine.get(key) != theirs.get(key)]
        if different:
            return Check('config', False, f'contradicts what the weights file records: {"; ".join(different)}')
    if 'num_classes' in config.model_args:
        return Check('config', False, 'has num_classes under model_args, which transformers cannot load')
    if config.weights_sha256 not in (None, weights_sha256(weights.state_dict)):
        return Check('config', False, 'was written for other weights than these')
    resolve_preprocessing(described.full_args['in_chans'], config.pretrained_cfg)
    if config.label_names is not None:
        check_class_names(config.label_names, described.full_args['num_classes'])
    labels = f'{len(config.label_names)} class names' if config.label_names else 'no class names'
    return Check('config', True, f'{described}, {labels}')


def _check_card(folder: Path) -> Check:
    if not (folder / CARD_NAME).is_file():
        return Check('card', False, f'there is no {CARD_NAME}')
    data = ModelCard.load(folder / CARD_NAME).data
    missing = [tag for tag in TAGS[:3] if tag not in (data.tags or [])]
    if data.library_name != 'timm':
        return Check('card', None, f'names the library {data.library_name}, so the Hub shows no usage with timm')
    if missing:
        return Check('card', None, f'lacks the tags {", ".join(missing)}')
    return Check('card', True, f'licence {data.license}, {len(data.eval_results or [])} evaluation results')


def _check_logits(theirs: Any, weights: Checkpoint, recorded: ModelDescription | None) -> Check:
    """What timm loads from the Hub, made from config.json, against the model that the weights file describes."""
    state_dict, _ = to_authors(weights.state_dict)
    mine = (recorded or describe_tensors(state_dict)).create()
    mine.load_state_dict(named_as(state_dict, mine))
    with torch.no_grad():
        image = torch.zeros(1, *timm.data.resolve_model_data_config(theirs)['input_size'])
        if not torch.isfinite(theirs(image)).all():
            return Check('logits', False, 'not finite')
    what = f'the model that {weights.path.name} records' if recorded else 'the one assumed from the tensors alone'
    same = same_logits(mine, theirs)
    if recorded is None and not same:
        return Check('logits', None, f'what timm loads from {CONFIG_NAME} computes differently from {what}')
    return Check('logits', same, f'what timm loads from {CONFIG_NAME} and {what} {"agree" if same else "disagree"}')


def _check_onnx(folder: Path, model: Any) -> Check:
    """The ONNX file and its preprocessing against timm's model, made from config.json."""
    try:
        difference = find_difference(folder, model, timm.data.resolve_model_data_config(model))
    except MissingExtraError as e:
        return Check('onnx', None, f'not compared: {e}')
    return Check('onnx', difference is None, difference or f"{ONNX_NAME} and timm's model agree, images included")
