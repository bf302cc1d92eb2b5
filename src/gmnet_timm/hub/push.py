"""Publishing on the Hugging Face Hub as one commit, and reading that commit back."""
import dataclasses
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelInfo
from huggingface_hub.utils import RevisionNotFoundError

from gmnet_timm import __version__
from gmnet_timm.errors import UserError
from gmnet_timm.hub.client import explaining, file_sha256, within
from gmnet_timm.hub.onnx import ONNX_NAME
from gmnet_timm.hub.publication import Publication
from gmnet_timm.hub.save import other_weights, save_folder
from gmnet_timm.weights.config import CARD_NAME

__all__ = ['Published', 'push']


UPLOAD_RATE = 100_000  # bytes per second that an upload is given time for


@dataclasses.dataclass(frozen=True)
class Published:
    """A commit that was read back and found to be what was sent."""

    repo_id: str
    commit: str  # full hash
    url: str  # of the commit, or of the pull request
    sha256: dict[str, str]  # by file name
    card_kept: bool  # whether a card that was there before is still there
    compared_with: str | None  # what the files compute the same logits as, None where there is nothing to compare
    others: tuple[str, ...]  # weights that were there before, and still are


def push(
        publication: Publication,
        repo_id: str,
        license: str | None = None,
        train_datasets: Sequence[str] = (),
        overwrite_card: bool = False,
        stated_preprocessing: bool = False,
        onnx: bool = False,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        message: str | None = None,
        token: str | None = None,
        timeout: float = 120.,
) -> Published:
    """Publish a model as one commit, and read that commit back.

    Args:
        publication: What to publish.
        repo_id: `owner/name`, or `name` for the owner of the token. It is created if it does not exist.
        license: Licence of the weights, an identifier of the Hub. By default that of the source.
        train_datasets: Identifiers on the Hub of the training data.
        overwrite_card: Replace a card that the repository has already.
        stated_preprocessing: As for `save_folder`.
        onnx: As for `save_folder`.
        private: Make a new repository private.
        revision: Branch to commit to, created if it does not exist.
        create_pr: Open a pull request instead of committing.
        message: Summary of the commit.
        token: Access token, by default the one huggingface_hub finds.
        timeout: Seconds that a request may take; an upload has a second more for each 100 kB.

    Raises:
        UserError: Anything failed; the message says what, and what state the repository is in.
    """
    api = HfApi(token=token, library_name='gmnet-timm', library_version=__version__)
    with tempfile.TemporaryDirectory() as parent:
        if '/' not in repo_id:
            with explaining('Cannot find out who you are, nothing was sent'):
                repo_id = f'{within(timeout, api.whoami)["name"]}/{repo_id}'
        saved = save_folder(
            publication, Path(parent) / 'model', repo_id=repo_id, license=license, train_datasets=train_datasets,
            overwrite_card=overwrite_card, stated_preprocessing=stated_preprocessing, onnx=onnx)
        with explaining(f'Cannot prepare {repo_id}, none of the files was sent'):
            name = repo_id
            repo_id = within(timeout, lambda: api.create_repo(name, private=private, exist_ok=True).repo_id)
            info = within(timeout, lambda: _info(api, repo_id, revision))
        present = {file.rfilename for file in info.siblings or []}
        if ONNX_NAME in present - {*saved.files}:
            raise UserError(
                f'{repo_id} holds an {ONNX_NAME} of earlier weights. Nothing was sent: give --onnx to replace it.')
        keep_card = not overwrite_card and CARD_NAME in present
        names = [name for name in saved.files if not (keep_card and name == CARD_NAME)]
        files = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(saved.path / name)) for name in names]
        with explaining(
                f'Cannot publish {repo_id}: nothing was committed, and an upload alone shows nowhere. '
                'The same command repeated completes it'):
            upload_timeout = timeout + sum((saved.path / name).stat().st_size for name in names) / UPLOAD_RATE
            within(upload_timeout, lambda: api.preupload_lfs_files(
                repo_id, files, revision=revision, create_pr=create_pr))
        with explaining(
                f'Cannot publish {repo_id}: no commit was confirmed. gmnet-timm verify {repo_id} says whether it was '
                'made, and the same command repeated completes it'):
            commit = within(timeout, lambda: api.create_commit(
                repo_id,
                files,
                commit_message=message or f'Upload {publication.source.description.size}',
                revision=revision,
                create_pr=create_pr,
                parent_commit=None if create_pr else info.sha,
            ))
        sha256 = {name: file_sha256(saved.path / name) for name in names}
        _read_back(api, repo_id, commit, sha256, upload_timeout)
    return Published(
        repo_id, commit.oid, commit.pr_url or commit.commit_url, sha256, keep_card, saved.compared_with,
        other_weights(present, saved.files))


def _info(api: HfApi, repo_id: str, revision: str | None) -> ModelInfo:
    """What is at the branch to commit to, after creating it if there is none."""
    try:
        return api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        assert revision is not None  # every repository has a main branch
        api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.model_info(repo_id, revision=revision)


def _read_back(api: HfApi, repo_id: str, commit: CommitInfo, sha256: dict[str, str], timeout: float) -> None:
    what = f'{repo_id} got the commit {commit.oid}, but it could not be read back; try gmnet-timm verify {repo_id}'
    with tempfile.TemporaryDirectory() as cache, explaining(what):
        for name, expected in sha256.items():
            path = within(timeout, functools.partial(
                api.hf_hub_download, repo_id, name, revision=commit.oid, cache_dir=cache))
            if file_sha256(Path(path)) != expected:
                raise UserError(
                    f'{repo_id} is damaged: {name} at commit {commit.oid} is not what was sent. Repeat the command.')
