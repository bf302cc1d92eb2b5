import time
import types

import pytest
import torch
from hub_server import TOKEN, HubServer
from huggingface_hub import constants, file_download
from publishing_helpers import LABELS, tiny_model

from gmnet_timm.cli.main import main


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / 'checkpoint.pth'
    torch.save(tiny_model().state_dict(), path)
    return path


@pytest.fixture
def names(tmp_path):
    path = tmp_path / 'names.txt'
    path.write_text('\n'.join(LABELS) + '\n')
    return path


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server, and huggingface_hub in this process talking to it without waiting between its attempts."""
    with HubServer() as server:
        monkeypatch.setattr(constants, 'ENDPOINT', server.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace('https://huggingface.co', server.url)
        for module in (constants, file_download):  # before 1.0 the latter had a copy of its own
            monkeypatch.setattr(module, 'HUGGINGFACE_CO_URL_TEMPLATE', template, raising=False)
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True, raising=False)
        monkeypatch.setenv('HF_TOKEN', TOKEN)
        from huggingface_hub.utils import _http
        impatient = types.SimpleNamespace(**{**vars(time), 'sleep': lambda seconds: None})
        monkeypatch.setattr(_http, 'time', impatient)
        yield server


@pytest.fixture
def run(capsys):
    """Run the command line; gives its exit status, stdout and stderr."""
    def run(*args):
        status = main([str(arg) for arg in args])
        return (status, *capsys.readouterr())

    return run
