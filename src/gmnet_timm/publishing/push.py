"""Publishing on the Hugging Face Hub, and back: files that load as they are, checked before and after they are sent."""
import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import timm
import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard, ModelInfo, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import RevisionNotFoundError
from timm.models._hub import hf_split, load_model_config_from_path, save_config_for_hf

from gmnet_timm import __version__
from gmnet_timm.checkpoint.architecture import Architecture, infer_architecture, load_model
from gmnet_timm.checkpoint.convert import save_weights
from gmnet_timm.checkpoint.integrity import SHA256_KEY
from gmnet_timm.checkpoint.reading import read_checkpoint
from gmnet_timm.errors import UserError
from gmnet_timm.publishing.model_card import TAGS, model_card
from gmnet_timm.publishing.source import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME, Source

__all__ = ['Check', 'Published', 'push', 'save_folder', 'verify']

# What huggingface_hub raises when a request fails, whichever HTTP library it uses: they share these ancestors.
# It wraps failed uploads in RuntimeError, and takes broken answers for ValueError.
_REQUEST_ERRORS: Tuple[Any, ...] = (OSError, RuntimeError, ValueError, KeyError, *HfHubHTTPError.__bases__)

_ADVICE = {
    401: 'Log in with `hf auth login`, or give a token with --token or HF_TOKEN.',
    403: 'The token does not allow this: it needs write permission there. --create-pr opens a pull request instead.',
    404: 'There is no such repository or revision, or the token does not show it.',
    409: 'The repository was changed by somebody else meanwhile.',
    412: 'The repository was changed by somebody else meanwhile.',
    429: 'The server asks for patience.',
}


@dataclasses.dataclass(frozen=True)
class Published:
    """A commit that was read back and found to be what was sent."""

    repo_id: str
    commit: str  # full hash
    url: str  # of the commit, or of the pull request
    sha256: Dict[str, str]  # by file name
    card_kept: bool  # whether a card that was there before is still there


@dataclasses.dataclass(frozen=True)
class Check:
    """A thing that `verify` looked at."""

    name: str
    ok: Optional[bool]  # None where it can be neither confirmed nor denied
    detail: str


def save_folder(
        source: Source,
        folder: Union[str, Path],
        repo_id: Optional[str] = None,
        license: Optional[str] = None,
        datasets: Sequence[str] = (),
        force: bool = False,
        overwrite_card: bool = False,
) -> Path:
    """Write model.safetensors, config.json and README.md, and check that timm loads them back to identical logits.

    Args:
        source: What to write.
        folder: Folder to create.
        repo_id: `owner/name` that the card's examples load, the folder itself if None.
        license: Licence of the weights, an identifier of the Hub. By default that of the source, else apache-2.0.
        datasets: Identifiers on the Hub of the training data.
        force: Replace these files in a folder that exists.
        overwrite_card: Write a new card even if the source or the folder has one.

    Raises:
        UserError: The folder exists and `force` is not set, or what was written does not load to the same model.
    """
    folder, license = Path(folder), license or source.license or 'apache-2.0'
    if folder.exists() and not force:
        raise UserError(f'{folder} exists: choose another name, or give --force to replace the files in it.')
    model_id = f'hf-hub:{repo_id}' if repo_id else f'local-dir:{folder}'
    card = None if overwrite_card else source.card
    if card is None:
        name = (repo_id or folder.resolve().name).split('/')[-1]
        card = str(model_card(source, name, model_id, license=license, datasets=datasets))
    with _temporary_folder_beside(folder) as temporary:
        _write_files(source, temporary, card, license)
        _check_logits(source, temporary)
        if not folder.exists():
            temporary.rename(folder)
            return folder
        for name in (WEIGHTS_NAME, CONFIG_NAME, CARD_NAME):
            if name != CARD_NAME or overwrite_card or not (folder / name).exists():
                os.replace(temporary / name, folder / name)
    return folder


def push(
        source: Source,
        repo_id: str,
        license: Optional[str] = None,
        datasets: Sequence[str] = (),
        overwrite_card: bool = False,
        private: Optional[bool] = None,
        revision: Optional[str] = None,
        create_pr: bool = False,
        message: Optional[str] = None,
        token: Optional[str] = None,
) -> Published:
    """Publish a model as one commit, and read that commit back.

    Args:
        source: What to publish.
        repo_id: `owner/name`, or `name` for the owner of the token. It is created if it does not exist.
        license: Licence of the weights, an identifier of the Hub. By default that of the source, else apache-2.0.
        datasets: Identifiers on the Hub of the training data.
        overwrite_card: Replace a card that the repository has already.
        private: Make a new repository private.
        revision: Branch to commit to, created if it does not exist.
        create_pr: Open a pull request instead of committing.
        message: Summary of the commit.
        token: Access token, by default the one huggingface_hub finds.

    Raises:
        UserError: Anything failed; the message says what, and what state the repository is in.
    """
    api = HfApi(token=token, library_name='gmnet-timm', library_version=__version__)
    with tempfile.TemporaryDirectory() as parent:
        if '/' not in repo_id:
            with _explaining('Cannot find out who you are, nothing was sent'):
                repo_id = f'{api.whoami()["name"]}/{repo_id}'
        folder = save_folder(
            source, Path(parent) / 'model', repo_id=repo_id, license=license, datasets=datasets,
            overwrite_card=overwrite_card)
        with _explaining(f'Cannot prepare {repo_id}, none of the files was sent'):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            info = _info(api, repo_id, revision)
        keep_card = not overwrite_card and any(file.rfilename == CARD_NAME for file in info.siblings or [])
        names = [WEIGHTS_NAME, CONFIG_NAME] + ([] if keep_card else [CARD_NAME])
        with _explaining(
                f'Cannot publish {repo_id}: no commit was confirmed, and an upload alone shows nowhere. '
                'The same command repeated completes it'):
            commit = api.create_commit(
                repo_id,
                [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(folder / name)) for name in names],
                commit_message=message or f'Upload {infer_architecture(source.state_dict).nearest_model_name}',
                revision=revision,
                create_pr=create_pr,
                parent_commit=None if create_pr else info.sha,
            )
        sha256 = {name: _file_sha256(folder / name) for name in names}
        _read_back(api, repo_id, commit, sha256)
    return Published(repo_id, commit.oid, commit.pr_url or commit.commit_url, sha256, keep_card)


def verify(name: str, token: Optional[str] = None) -> List[Check]:
    """Check a folder or a published repository: weights, configuration, card and logits.

    Args:
        name: A folder, or `owner/name` on the Hub, optionally with `@revision`. timm's prefixes `local-dir:` and
            `hf-hub:` may be given, and decide where both exist.
        token: Access token, by default the one huggingface_hub finds.

    Raises:
        UserError: There is nothing to check.
    """
    local = name.startswith('local-dir:') or (not name.startswith('hf-hub:') and Path(name).is_dir())
    name = name.split(':', 1)[1] if name.startswith(('local-dir:', 'hf-hub:')) else name
    if not local and '/' not in name:
        raise UserError(f'{name} is no folder, and no owner/name of a repository.')
    folder, checks = (Path(name), []) if local else _download(name, token)
    if not (folder / WEIGHTS_NAME).is_file():
        raise UserError(f'{name} has no {WEIGHTS_NAME}.')
    for check in (_verify_weights, _verify_config, _verify_card):
        checks.append(_finding(check, folder))
    if any(check.ok is False and check.name in ('weights', 'config') for check in checks):
        return [*checks, Check('logits', None, 'not computed, for what is wrong above')]
    return [*checks, _finding(_verify_logits, folder)]


def _write_files(source: Source, folder: Path, card: str, license: str) -> None:
    model, architecture = source.build(), source.architecture
    cfg: Dict[str, Any] = {**vars(model)['pretrained_cfg'], **source.data_config, 'license': license, 'pool_size': None}
    cfg.pop('tag', None)  # it names the training data of the published models
    model.pretrained_cfg = cfg  # type: ignore[assignment]
    save_weights(model.state_dict(), folder / WEIGHTS_NAME)
    save_config_for_hf(
        model,
        folder / CONFIG_NAME,  # type: ignore[arg-type]  # timm before 1.0.30 says str and needs a Path
        model_config={'label_names': source.label_names, 'global_pool': architecture.global_pool},
    )
    config = json.loads((folder / CONFIG_NAME).read_text(encoding='utf-8'))
    config.pop('model_args', None)
    if model_args := _model_args(architecture.model_args):
        config['model_args'] = model_args
    if architecture.in_chans not in (1, 3):  # timm before 1.0.30 would adapt it from three channels, and drop it
        config['pretrained_cfg']['first_conv'] = None
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
    (folder / CARD_NAME).write_text(card, encoding='utf-8')


def _model_args(args: Dict[str, Any]) -> Dict[str, Any]:
    """Arguments to record in config.json, the same with every version of timm.

    Not num_classes: it has its own entry, and transformers passes both to `create_model`.
    """
    return {key: value for key, value in args.items() if key != 'num_classes' and (key, value) != ('in_chans', 3)}


def _check_logits(source: Source, folder: Path) -> None:
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    if not torch.equal(_logits(model), _logits(source.build())):
        raise UserError('What timm loads back from the files does not compute the same logits. Nothing was published.')


@torch.no_grad()
def _logits(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return model(torch.randn(2, int(model.in_chans), 64, 64, generator=generator))  # type: ignore[arg-type]


@contextlib.contextmanager
def _temporary_folder_beside(folder: Path) -> Iterator[Path]:
    temporary = folder.with_name(f'.{secrets.token_hex(4)}-{folder.name}')
    try:
        temporary.mkdir(parents=True)
        yield temporary
    except OSError as e:
        raise UserError(f'Cannot write {folder}: {e}') from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _explaining(what: str) -> Iterator[None]:
    """Turn the failure of a request into an error that says what state things are in."""
    try:
        yield
    except _REQUEST_ERRORS as e:
        causes: List[BaseException] = [e]  # huggingface_hub wraps failures, and then advises to check the connection
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        answers = [(cause, response) for cause in causes if (response := getattr(cause, 'response', None)) is not None]
        cause, response = answers[0] if answers else (causes[-1], None)
        reason = ' '.join(str(cause).split('For more information')[0].split()).rstrip('.')
        advice = 'Is the network there?'
        if response is not None:
            advice = _ADVICE.get(response.status_code, 'The server has a problem.')
        raise UserError(f'{what}. {type(cause).__name__}: {reason}. {advice}') from e


def _info(api: HfApi, repo_id: str, revision: Optional[str]) -> ModelInfo:
    """What is at the branch to commit to, after creating it if there is none."""
    try:
        return api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        assert revision is not None  # every repository has a main branch
        api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.model_info(repo_id, revision=revision)


def _read_back(api: HfApi, repo_id: str, commit: CommitInfo, sha256: Dict[str, str]) -> None:
    what = f'{repo_id} got the commit {commit.oid}, but it could not be read back; try gmnet-timm verify {repo_id}'
    with tempfile.TemporaryDirectory() as cache, _explaining(what):
        for name, expected in sha256.items():
            path = api.hf_hub_download(repo_id, name, revision=commit.oid, cache_dir=cache)
            if _file_sha256(Path(path)) != expected:
                raise UserError(
                    f'{repo_id} is damaged: {name} at commit {commit.oid} is not what was sent. Repeat the command.')


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _download(name: str, token: Optional[str]) -> Tuple[Path, List[Check]]:
    """The files of a published repository in a folder of the cache, and what the server says of them."""
    repo_id, revision = hf_split(name)
    api = HfApi(token=token, library_name='gmnet-timm', library_version=__version__)
    with _explaining(f'Cannot read {name}'):
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
        files = {file.rfilename: file for file in info.siblings or []}
        paths = {
            file: Path(hf_hub_download(repo_id, file, revision=info.sha, token=token))
            for file in (CONFIG_NAME, CARD_NAME, WEIGHTS_NAME) if file in files
        }
    if WEIGHTS_NAME not in paths:
        raise UserError(f'{name} has no {WEIGHTS_NAME}.')
    lfs = files[WEIGHTS_NAME].lfs
    checks = [Check('commit', True, f'{repo_id} at {info.sha}')]
    if lfs is not None:
        same = _file_sha256(paths[WEIGHTS_NAME]) == lfs['sha256']
        detail = f'SHA-256 of {WEIGHTS_NAME} {"as" if same else "is not what"} the server says'
        checks.append(Check('download', same, detail))
    pickles = [file for file in files if file.endswith(('.bin', '.pth', '.pt', '.tar', '.pkl', '.ckpt'))]
    if pickles:
        checks.append(Check('pickles', None, f'also holds files that may carry code: {", ".join(pickles)}'))
    return paths[WEIGHTS_NAME].parent, checks


def _finding(verify: Callable[[Path], Check], folder: Path) -> Check:
    try:
        return verify(folder)
    except Exception as e:  # whatever a broken repository raises is the finding
        return Check(verify.__name__.split('_')[-1], False, f'{type(e).__name__}: {" ".join(str(e).split())}')


def _verify_weights(folder: Path) -> Check:
    checkpoint = read_checkpoint(folder / WEIGHTS_NAME)
    recorded = checkpoint.metadata.get(SHA256_KEY)
    what = f'{len(checkpoint.state_dict)} tensors, {infer_architecture(checkpoint.state_dict).describe()}'
    if recorded is None:
        return Check('weights', None, f'{what}; no SHA-256 is recorded, so a flipped bit would go unnoticed')
    return Check('weights', True, f'{what}; SHA-256 {recorded} as recorded')


def _verify_config(folder: Path) -> Check:
    architecture = infer_architecture(read_checkpoint(folder / WEIGHTS_NAME).state_dict)
    cfg, name, args = load_model_config_from_path(folder)
    described = Architecture.from_config(name, {**args, 'num_classes': cfg['num_classes']})
    if described != architecture:
        return Check('config', False, f'describes {described}, the tensors are {architecture}')
    if 'num_classes' in args:
        return Check('config', False, 'has num_classes under model_args, which transformers cannot load')
    labels = cfg.get('label_names')
    if labels is not None and len(labels) != architecture.num_classes:
        return Check('config', False, f'{len(labels)} class names for {architecture.num_classes} classes')
    return Check('config', True, f'{name}, {f"{len(labels)} class names" if labels else "no class names"}')


def _verify_card(folder: Path) -> Check:
    if not (folder / CARD_NAME).is_file():
        return Check('card', False, f'there is no {CARD_NAME}')
    data = ModelCard.load(folder / CARD_NAME).data
    missing = [tag for tag in TAGS[:3] if tag not in (data.tags or [])]
    if data.library_name != 'timm':
        return Check('card', None, f"names the library {data.library_name}, so the Hub shows no usage with timm")
    if missing:
        return Check('card', None, f'lacks the tags {", ".join(missing)}')
    return Check('card', True, f'licence {data.license}, {len(data.eval_results or [])} evaluation results')


def _verify_logits(folder: Path) -> Check:
    """timm's model, made from config.json, against ours, made from the shapes of the tensors."""
    theirs = _logits(timm.create_model(f'local-dir:{folder}', pretrained=True).eval())
    same = torch.equal(theirs, _logits(load_model(folder / WEIGHTS_NAME)))
    finite = bool(torch.isfinite(theirs).all())
    detail = "timm's model and the one from the tensors alone agree" if same else 'timm computes other logits'
    return Check('logits', same and finite, detail if finite else 'not finite')
