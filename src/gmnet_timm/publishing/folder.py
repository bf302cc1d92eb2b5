"""A folder that timm and transformers load: weights, configuration and card, proved before it is there."""
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.models._hub import save_config_for_hf

from gmnet_timm.checkpoint.config import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME
from gmnet_timm.checkpoint.integrity import weights_sha256
from gmnet_timm.checkpoint.writing import save_weights
from gmnet_timm.errors import UserError
from gmnet_timm.files import replacing_folder
from gmnet_timm.publishing.model_card import model_card
from gmnet_timm.publishing.onnx_file import ONNX_NAME, require_onnx, write_onnx
from gmnet_timm.publishing.proof import prove_folder
from gmnet_timm.publishing.publication import Publication

__all__ = ['SavedFolder', 'save_folder']


@dataclasses.dataclass(frozen=True)
class SavedFolder:
    """A folder that was written, and what was compared with it."""

    path: Path
    original: str  # what it computes the same logits as
    files: tuple[str, ...]  # names of what was written


def save_folder(
        publication: Publication,
        folder: str | Path,
        repo_id: str | None = None,
        license: str | None = None,
        train_datasets: Sequence[str] = (),
        force: bool = False,
        overwrite_card: bool = False,
        stated_preprocessing: bool = False,
        onnx: bool = False,
) -> SavedFolder:
    """Write model.safetensors, config.json and README.md, and prove that timm loads the model that the source defines.

    Args:
        publication: What to write.
        folder: Folder to create.
        repo_id: `owner/name` that the card's examples load, the folder itself if None.
        license: Licence of the weights, an identifier of the Hub. By default that of the source, else apache-2.0.
        train_datasets: Identifiers on the Hub of the training data.
        force: Replace these files in a folder that exists.
        overwrite_card: Write a new card even if the source or the folder has one.
        stated_preprocessing: The user stated preprocessing, so the source's own is not to be compared.
        onnx: Write an ONNX file and its preprocessing too. A card that is kept and names the file has the same effect.

    Raises:
        UserError: The folder exists and `force` is not set, or what was written does not load to the same model.
    """
    folder, license = Path(folder), license or publication.license or 'apache-2.0'
    if folder.exists() and not force:
        raise UserError(f'{folder} exists: choose another name, or give --force to replace the files in it.')
    model_id = f'hf-hub:{repo_id}' if repo_id else f'local-dir:{folder}'
    card = None if overwrite_card else publication.card
    onnx = onnx or card is not None and ONNX_NAME in card
    if onnx:
        require_onnx()
    elif (folder / ONNX_NAME).exists():
        raise UserError(f'{folder} holds an {ONNX_NAME} of earlier weights: give --onnx to replace it, or remove it.')
    if card is None:
        name = (repo_id or folder.resolve().name).split('/')[-1]
        card = str(model_card(publication, name, model_id, license, train_datasets, onnx=onnx))
    with replacing_folder(folder, force=force) as temporary:
        keep_card = not overwrite_card and (folder / CARD_NAME).exists()
        _write_files(publication, temporary, None if keep_card else card, license, onnx)
        original = prove_folder(publication.source, temporary, stated_preprocessing)
        files = tuple(str(path.relative_to(temporary)) for path in sorted(temporary.rglob('*')) if path.is_file())
    return SavedFolder(folder, original, files)


def _write_files(publication: Publication, folder: Path, card: str | None, license: str, onnx: bool) -> None:
    source, description = publication.source, publication.source.description
    model = source.build()
    cfg: dict[str, Any] = {**vars(model)['pretrained_cfg'], **source.data_config, 'license': license, 'pool_size': None}
    cfg.pop('tag', None)  # it names the training data of the published models
    model.pretrained_cfg = cfg  # type: ignore[assignment]
    save_weights(model.state_dict(), folder / WEIGHTS_NAME, description, force=True)
    save_config_for_hf(
        model,
        folder / CONFIG_NAME,  # type: ignore[arg-type]  # timm before 1.0.30 says str and needs a Path
        model_config={'label_names': publication.class_names, 'global_pool': description.full_args['global_pool']},
    )
    config = json.loads((folder / CONFIG_NAME).read_text(encoding='utf-8'))
    config.update(architecture=description.size, weights_sha256=weights_sha256(model.state_dict()))
    config.pop('model_args', None)
    # num_classes has an entry of its own, and transformers passes both to `create_model`
    if description.distinct_args:
        config['model_args'] = description.distinct_args
    if description.full_args['in_chans'] not in (1, 3):  # timm before 1.0.30 would adapt it from three channels
        config['pretrained_cfg']['first_conv'] = None
    text = json.dumps(config, indent=2, allow_nan=False) + '\n'
    (folder / CONFIG_NAME).write_text(text, encoding='utf-8')
    if card is not None:
        (folder / CARD_NAME).write_text(card, encoding='utf-8')
    if onnx:
        write_onnx(model, source.data_config, folder)
