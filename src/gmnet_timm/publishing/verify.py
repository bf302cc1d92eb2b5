"""Is what is published whole, does it agree with itself, and what had to be assumed?"""
import dataclasses
import functools
from pathlib import Path

import timm
import torch
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from timm.models._hub import hf_split

from gmnet_timm import __version__
from gmnet_timm.checkpoint.class_names import check_class_names
from gmnet_timm.checkpoint.config import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME, read_config
from gmnet_timm.checkpoint.description import (
    ModelDescription,
    describe_config,
    describe_metadata,
    describe_tensors,
)
from gmnet_timm.checkpoint.integrity import SHA256_KEY, weights_sha256
from gmnet_timm.checkpoint.preprocessing import resolve_preprocessing
from gmnet_timm.checkpoint.reading import Checkpoint, read_checkpoint
from gmnet_timm.errors import MissingExtraError, UserError
from gmnet_timm.publishing.model_card import TAGS
from gmnet_timm.publishing.onnx_file import ONNX_NAME, PREPROCESSOR_NAME, find_difference
from gmnet_timm.publishing.proof import same_logits
from gmnet_timm.publishing.push import file_sha256
from gmnet_timm.publishing.requests import explaining, within

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
        One entry per check. The logits are not computed where weights or configuration are wrong.

    Raises:
        UserError: There is nothing to check, or the Hub cannot be reached.
    """
    scheme, _, path = name.rpartition(':') if name.startswith(('local-dir:', 'hf-hub:')) else ('', '', name)
    local = scheme == 'local-dir' or not scheme and Path(path).is_dir()
    if not local and '/' not in path:
        raise UserError(f'{path} is neither a folder nor the owner/name of a repository.')
    folder, checks = (Path(path), []) if local else _download(path, token, timeout)
    if not (folder / WEIGHTS_NAME).is_file():
        raise UserError(f'{name} has no {WEIGHTS_NAME}.')
    weights, recorded = None, None
    try:
        weights = read_checkpoint(folder / WEIGHTS_NAME)
        recorded = describe_metadata(weights.metadata, WEIGHTS_NAME)
        checks.append(_check_weights(weights, recorded))
        checks += _check_assumed(recorded)
        checks.append(_check_config(folder, weights, recorded))
    except Exception as e:  # whatever a broken repository raises is the finding
        checks.append(_failed('weights' if weights is None else 'config', e))
    checks.append(_finding('card', _check_card, folder))
    if weights is None or any(check.ok is False and check.name in ('weights', 'config') for check in checks):
        return [*checks, Check('logits', None, 'not computed, for what is wrong above')]
    checks.append(_finding('logits', _check_logits, folder, weights, recorded))
    card = folder / CARD_NAME
    shown = card.is_file() and ONNX_NAME in card.read_text(encoding='utf-8', errors='replace')
    if shown or (folder / ONNX_NAME).exists():
        checks.append(_finding('onnx', _check_onnx, folder))
    return checks


def _download(name: str, token: str | None, timeout: float) -> tuple[Path, list[Check]]:
    """The files of a published repository in a folder of the cache, and what the server says of them."""
    repo_id, revision = hf_split(name)
    api = HfApi(token=token, library_name='gmnet-timm', library_version=__version__)
    with explaining(f'Cannot read {name}'):
        info = within(timeout, lambda: api.model_info(repo_id, revision=revision, files_metadata=True))
        files = {file.rfilename: file for file in info.siblings or []}
        paths = {
            file: Path(within(10 * timeout, functools.partial(
                hf_hub_download, repo_id, file, revision=info.sha, token=token)))
            for file in (CONFIG_NAME, CARD_NAME, WEIGHTS_NAME, ONNX_NAME, PREPROCESSOR_NAME) if file in files
        }
    if WEIGHTS_NAME not in paths:
        raise UserError(f'{name} has no {WEIGHTS_NAME}.')
    lfs = files[WEIGHTS_NAME].lfs
    checks = [Check('commit', True, f'{repo_id} at {info.sha}')]
    if lfs is not None:
        same = file_sha256(paths[WEIGHTS_NAME]) == lfs['sha256']
        detail = f'SHA-256 of {WEIGHTS_NAME} {"as" if same else "is not what"} the server says'
        checks.append(Check('download', same, detail))
    pickles = [file for file in files if file.endswith(('.bin', '.pth', '.pt', '.tar', '.pkl', '.ckpt'))]
    if pickles:
        checks.append(Check('pickles', None, f'also holds files that may carry code: {", ".join(pickles)}'))
    return paths[WEIGHTS_NAME].parent, checks


def _finding(name: str, check, *args) -> Check:
    try:
        return check(*args)
    except Exception as e:  # whatever a broken repository raises is the finding
        return _failed(name, e)


def _failed(name: str, error: Exception) -> Check:
    return Check(name, False, f'{type(error).__name__}: {" ".join(str(error).split())}')


def _check_weights(weights: Checkpoint, recorded: ModelDescription | None) -> Check:
    description = recorded or describe_tensors(weights.state_dict)
    description.check_fits(weights.state_dict, f'the metadata of {WEIGHTS_NAME}' if recorded else WEIGHTS_NAME)
    sha256 = weights.metadata.get(SHA256_KEY)
    what = f'{len(weights.state_dict)} tensors, {description}'
    if sha256 is None:
        return Check('weights', None, f'{what}; no SHA-256 is recorded, so a flipped bit would go unnoticed')
    return Check('weights', True, f'{what}; SHA-256 {sha256} as recorded')


def _check_assumed(recorded: ModelDescription | None) -> list[Check]:
    if recorded is None:
        return [Check('assumed', None, f'{WEIGHTS_NAME} does not record its model, so only config.json says '
                      'activation, pooling and output stride')]
    if recorded.assumed:
        values = ', '.join(f'{key} {recorded.full_args[key]}' for key in recorded.assumed)
        return [Check('assumed', None, f'nobody stated {values}: assumed when these weights were published')]
    return []


def _check_config(folder: Path, weights: Checkpoint, recorded: ModelDescription | None) -> Check:
    config = read_config(folder)
    described = describe_config(config)
    described.check_fits(weights.state_dict, CONFIG_NAME)
    if recorded is not None:
        mine, theirs = described.full_args, recorded.full_args
        different = [f'{key} {mine.get(key)} against {theirs.get(key)}' for key in {**mine, **theirs}
                     if mine.get(key) != theirs.get(key)]
        if different:
            return Check('config', False, f'contradicts what {WEIGHTS_NAME} records: {"; ".join(different)}')
    if 'num_classes' in config.model_args:
        return Check('config', False, 'has num_classes under model_args, which transformers cannot load')
    if config.weights_sha256 not in (None, weights_sha256(weights.state_dict)):
        return Check('config', False, f'was written for other weights than {WEIGHTS_NAME} holds')
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


def _check_logits(folder: Path, weights: Checkpoint, recorded: ModelDescription | None) -> Check:
    """timm's model, made from config.json, against the one that the weights file describes."""
    theirs = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    description = recorded or describe_tensors(weights.state_dict)
    mine = description.create()
    mine.load_state_dict(weights.state_dict)
    with torch.no_grad():
        image = torch.zeros(1, *timm.data.resolve_model_data_config(theirs)['input_size'])
        if not torch.isfinite(theirs(image)).all():
            return Check('logits', False, 'not finite')
    what = f'the model that {WEIGHTS_NAME} records' if recorded else 'the one assumed from the tensors alone'
    same = same_logits(mine, theirs)
    if recorded is None and not same:
        return Check('logits', None, f"timm's model from {CONFIG_NAME} computes differently from {what}")
    return Check('logits', same, f"timm's model from {CONFIG_NAME} and {what} {'agree' if same else 'disagree'}")


def _check_onnx(folder: Path) -> Check:
    """The ONNX file and its preprocessing against timm's model, made from config.json."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    try:
        difference = find_difference(folder, model, timm.data.resolve_model_data_config(model))
    except MissingExtraError as e:
        return Check('onnx', None, f'not compared: {e}')
    return Check('onnx', difference is None, difference or f"{ONNX_NAME} and timm's model agree, images included")
