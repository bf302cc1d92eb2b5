"""timm's registry as the model files of this package see it.

Model files import from here what a file inside timm imports from `timm.models._registry`, so that they could move there
unchanged. It adds what a plugin needs: names that timm itself ships stay timm's, an organisation on the Hub can be the
source of weights, and where there are no weights, the error says how to get some.
"""
import functools
import os
import sys
import warnings
from typing import Any, Callable, Dict

from timm.models._registry import generate_default_cfgs as _generate_default_cfgs
from timm.models._registry import get_pretrained_cfg, is_model, model_entrypoint
from timm.models._registry import register_model as _register_model
from torch import nn

__all__ = ['HUB_ORG_VARIABLE', 'generate_default_cfgs', 'register_model']

HUB_ORG_VARIABLE = 'GMNET_TIMM_HUB_ORG'

_warned_of_timm_models = False


def generate_default_cfgs(cfgs: Dict[str, Dict[str, Any]]):
    """timm's `generate_default_cfgs`, with weights at `$GMNET_TIMM_HUB_ORG/<model>.<tag>` where the variable is set."""
    org = os.environ.get(HUB_ORG_VARIABLE, '').strip('/')
    if org:
        cfgs = {name: {**cfg, 'hf_hub_id': f'{org}/{name}'} for name, cfg in cfgs.items()}
    return _generate_default_cfgs({**cfgs})


def register_model(fn: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Register a model entrypoint with timm, unless timm ships a model of that name itself.

    Raises:
        RuntimeError: By the registered entrypoint, for `pretrained=True` without a source of weights, or with one on
            the Hub that cannot be reached.
    """
    name = fn.__name__
    if is_model(name) and model_entrypoint(name).__module__.startswith('timm.'):
        _warn_of_timm_models(name)
        return fn

    @functools.wraps(fn)
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        try:
            return _prepared(fn(pretrained=pretrained, **kwargs), fn.__module__)
        except RuntimeError as e:
            if pretrained and 'No pretrained weights exist' in str(e):
                raise RuntimeError(_no_weights_message(name)) from None
            raise
        except OSError as e:
            if pretrained and type(e).__module__.startswith('huggingface_hub.'):
                raise RuntimeError(_hub_message(name, kwargs.get('pretrained_cfg'), e)) from e
            raise

    return _register_model(entrypoint)


def _prepared(model: nn.Module, module: str) -> nn.Module:
    """Let every way of loading weights take the names that `pretrained=True` takes, and NumPy files.

    timm applies a model file's `checkpoint_filter_fn` for `pretrained=True` alone. `checkpoint_path`, validate.py and
    `train.py --initial-checkpoint` call the model's `load_state_dict`, and for NumPy files its `load_pretrained`.
    """
    filter_fn = getattr(sys.modules[module], 'checkpoint_filter_fn', None)
    if filter_fn is not None and type(model).__module__ == module:
        model.register_load_state_dict_pre_hook(functools.partial(_filter_state_dict, filter_fn))
        type(model).load_pretrained = _load_pretrained  # type: ignore[attr-defined]
    return model


def _filter_state_dict(filter_fn: Callable, model: nn.Module, state_dict: Dict[str, Any], prefix: str, *_: Any) -> None:
    own = {key[len(prefix):]: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    state_dict.update({f'{prefix}{key}': value for key, value in filter_fn(own, model).items()})


def _load_pretrained(self: nn.Module, checkpoint_path: str, prefix: str = '') -> None:
    """Load weights from a file of NumPy, whatever its layout."""
    from gmnet_timm.weights.files import read_checkpoint  # here, because it stands above the model files
    from gmnet_timm.weights.layouts import to_authors

    state_dict = read_checkpoint(checkpoint_path).state_dict
    state_dict, _ = to_authors({key.removeprefix(prefix): value for key, value in state_dict.items()})
    self.load_state_dict(state_dict)


def _warn_of_timm_models(name: str) -> None:
    global _warned_of_timm_models
    if not _warned_of_timm_models:
        warnings.warn(
            f'timm ships {name} itself: its models keep their names, those of gmnet-timm are not registered.',
            stacklevel=3,
        )
        _warned_of_timm_models = True


def _hub_message(name: str, tag: Any, error: Exception) -> str:
    cfg = get_pretrained_cfg(f'{name}.{tag}' if isinstance(tag, str) and tag else name, allow_unregistered=True)
    where = f' from {cfg.hf_hub_id}' if cfg is not None and cfg.hf_hub_id else ''
    return (
        f'The weights of {name} could not be loaded{where}: there is no such repository, this token may not read it, '
        f'or there is no network and the cache does not have them. {" ".join(str(error).split())}'
    )


def _no_weights_message(name: str) -> str:
    return (
        f'No pretrained weights of {name} are known here. Ways to give some:\n'
        f"  a checkpoint of the authors:  timm.create_model('{name}', pretrained=True, "
        f"pretrained_cfg_overlay=dict(file='checkpoint.pth'))\n"
        f"  a repository on the Hub:      timm.create_model('hf-hub:owner/name', pretrained=True)\n"
        f'  an organisation on the Hub:   export {HUB_ORG_VARIABLE}=owner, for owner/{name}.in1k\n'
        f'The authors of GmNet link checkpoints from https://github.com/YFWang1999/GmNet.\n'
        f'Use pretrained=False for random weights.'
    )
