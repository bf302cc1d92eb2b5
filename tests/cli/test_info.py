import subprocess
import sys

import pytest
import torch
from model_helpers import SIZES, create

from gmnet_timm import __version__
from gmnet_timm.cli import main as cli
from gmnet_timm.info import PAPER, count_cost, model_info


def test_cost_of_a_convolution_and_a_linear_layer():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 5, stride=2, groups=1), torch.nn.Flatten(), torch.nn.Linear(8 * 6 * 6, 10)).train()
    assert count_cost(model, (3, 15, 15))[0] == 8 * 6 * 6 * 3 * 5 * 5 + 8 * 6 * 6 * 10
    assert model.training


def test_model_info():
    info = model_info('gmnet_s3')
    assert (info.params, info.macs, info.weights) == (7_791_544, 1_236_181_248, None)
    assert info.paper.configuration == 'released'
    assert {name for name in SIZES if PAPER[name].configuration == 'reconstructed'} == set(SIZES) - {'gmnet_s3'}
    assert model_info('resnet18').weights.startswith('hf-hub:timm/resnet18')


def test_info_table(capsys):
    assert cli.main(['info']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == list(SIZES)
    assert lines[3].split() == [
        'gmnet_s3', '7,791,544', '1,236,181,248', 'released', '7.8', '1.2', '79.3', '2.1', '1.3', 'none']


def test_info_of_one_model(capsys):
    assert cli.main(['info', 'gmnet_s1']) == 0
    out = capsys.readouterr().out
    for text in ('3,661,600', 'reconstructed', 'arXiv:2503.22841', 'none known', '75.5 %', 'not measured by this'):
        assert text in out


def test_info_of_a_checkpoint(capsys, tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save({'state_dict': create('gmnet_s2', num_classes=4).state_dict()}, path)
    assert cli.main(['info', str(path)]) == 0
    out = capsys.readouterr().out
    assert "timm.create_model('gmnet_s2', in_chans=3, num_classes=4)" in out and 'nothing but the tensors' in out


def test_info_of_nothing(capsys):
    assert cli.main(['info', 'gmnet_s9']) == 1
    captured = capsys.readouterr()
    assert captured.out == '' and captured.err.startswith('error: gmnet_s9 is neither a model nor a file or folder')


def test_module_and_script_are_the_same_command():
    def output(*command):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    script = output('gmnet-timm', '--help')
    assert script == output(sys.executable, '-m', 'gmnet_timm', '--help') and 'usage: gmnet-timm' in script
    assert output('gmnet-timm', '--version') == f'gmnet-timm {__version__}\n'


@pytest.mark.parametrize('argv, usage', [
    ([], 'gmnet-timm '), (['no-such-command'], 'gmnet-timm '), (['--strange', 'info'], 'gmnet-timm '),
    (['info', 'a', 'b'], 'gmnet-timm info '), (['info', '--strange'], 'gmnet-timm info '),
    (['recipe', '--gpus', 'x'], 'gmnet-timm recipe '), (['freq', 'eval', 'a', '--strange'], 'gmnet-timm freq eval '),
])
def test_wrong_arguments_show_the_usage_of_their_command(argv, usage, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(argv)
    assert e.value.code == 2
    assert capsys.readouterr().err.startswith(f'usage: {usage}')


@pytest.mark.parametrize('argv', [['--version'], ['freq', '--help'], ['demo', '--help']])
def test_help_needs_neither_torch_nor_timm(argv):
    """They take seconds to import. Python's own list of what was imported, not a clock."""
    command = [sys.executable, '-X', 'importtime', '-m', 'gmnet_timm', *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rsplit('|', 1)[-1].strip().split('.')[0] for line in done.stderr.splitlines()}
    assert 'gmnet_timm' in imported
    assert not imported & {'torch', 'torchvision', 'timm', 'numpy', 'huggingface_hub', 'matplotlib', 'scipy', 'PIL'}
