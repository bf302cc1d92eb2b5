"""Inputs for which a number would be nonsense: an error that names the cause, never a figure with exit status 0."""
import csv
import logging

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from gmnet_timm.cli.main import main
from gmnet_timm.errors import UserError
from gmnet_timm.frequency import (
    create_band_loader,
    evaluate_bands,
    fourier_heatmap,
    input_sensitivity,
    layer_spectra,
    log_amplitudes,
)

CONFIG = dict(input_size=(3, 32, 32), interpolation='bicubic', crop_pct=1., mean=(.5,) * 3, std=(.5,) * 3)
COLOURS = ('blue', 'green', 'red')


def tiny(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('gmnet_s1', base_dim=4, depths=(1, 1, 1, 1), num_classes=3, **kwargs)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in COLOURS:
        (tmp_path / 'data' / name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / 'data' / name / f'{i}.png')
    return tmp_path / 'data'


def measures(model, images, labels):
    return {
        'eval': lambda: evaluate_bands(model, [(images, labels)], [4], show_progress=False),
        'heatmap': lambda: fourier_heatmap(model, images, labels, (.5,) * 3, [(1, 2)], .1, show_progress=False),
        'sensitivity': lambda: input_sensitivity(model, [(images, labels)], (.5,) * 3),
        'layers': lambda: layer_spectra(model, [(images, labels)]),
        'amplitude': lambda: log_amplitudes(model, [(images, labels)]),
    }


IMAGES, LABELS = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize('labels', [LABELS[:, None], nn.functional.one_hot(LABELS, 3), LABELS.float(), LABELS[:3]])
@pytest.mark.parametrize('name', ['eval', 'heatmap', 'sensitivity'])
def test_labels_that_are_no_class_indices(name, labels):
    with pytest.raises(UserError, match='one whole number per image'):
        measures(tiny().eval(), IMAGES, labels)[name]()


@pytest.mark.parametrize('name', measures(None, None, None))
def test_a_model_in_training_mode_is_left_as_it_was(name):
    model = tiny(drop_rate=.5)
    model.stem.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    found = measures(model, IMAGES, LABELS)[name]()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    if name == 'eval':
        assert found == measures(model.eval(), IMAGES, LABELS)[name]()


@pytest.mark.parametrize('name', measures(None, None, None))
def test_diverged_models(name):
    model = tiny().eval()
    for parameter in model.parameters():
        parameter.data.mul_(1e6)
    with pytest.raises(UserError, match='NaN or infinite'):
        measures(model, IMAGES, LABELS)[name]()


def test_a_gradient_that_is_zero():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
    nn.init.constant_(model[1].weight, 0)
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([0., 1e4, 0.]))
    with pytest.raises(UserError, match='gradient of the loss is zero'):
        input_sensitivity(model, [(IMAGES, torch.ones(4, dtype=torch.long))], (.5,) * 3)


# Classes


def loader(root, **kwargs):
    return create_band_loader(str(root), CONFIG, workers=0, num_classes=3, **kwargs)


def test_classes_in_another_order(folder, tmp_path, caplog):
    with pytest.raises(UserError, match='blue, green, red, and not green, blue, red.*--class-map'):
        loader(folder, class_names=['green', 'blue', 'red'])
    (tmp_path / 'order.txt').write_text('green\nblue\nred\n')
    assert loader(folder, class_names=['green', 'blue', 'red'], class_map=str(tmp_path / 'order.txt')).classes == [
        'green', 'blue', 'red']
    assert not caplog.records
    loader(folder, class_names=['a', 'b', 'c'])
    assert 'nothing shows that their order is the same' in caplog.text


@pytest.mark.parametrize('text, problem', [
    ('blue\ngrene\nred\n', "names 'grene', for which .* has no folder, and not green"),
    ('\ufeffblue\ngreen\nred\n', 'byte order mark'),
])
def test_class_maps_that_drop_folders(text, problem, folder, tmp_path):
    (tmp_path / 'map.txt').write_bytes(text.encode())
    with pytest.raises(UserError, match=problem):
        loader(folder, class_map=str(tmp_path / 'map.txt'))


def test_a_class_map_of_part_of_the_folders_says_so(folder, tmp_path, caplog):
    (tmp_path / 'map.txt').write_text('red\nblue\n')
    found = create_band_loader(str(folder), CONFIG, workers=0, class_map=str(tmp_path / 'map.txt'))
    assert sum(len(images) for images, _ in found) == 6 and 'does not name green' in caplog.text


def test_folders_that_are_no_data(folder, tmp_path):
    (tmp_path / 'flat').mkdir()
    Image.new('RGB', (8, 8)).save(tmp_path / 'flat' / 'a.png')
    with pytest.raises(UserError, match='no sub-folders. It needs one per class'):
        loader(tmp_path / 'flat')
    (tmp_path / 'webp' / 'a').mkdir(parents=True)
    Image.new('RGB', (8, 8)).save(tmp_path / 'webp' / 'a' / 'a.webp')
    with pytest.raises(UserError, match='which timm does not read: 1'):
        loader(tmp_path / 'webp')
    with pytest.raises(UserError, match='no such folder'):
        loader(tmp_path / 'nowhere')


def test_files_that_cannot_be_decoded_are_named(folder, caplog):
    (folder / 'red' / '1.png').write_bytes(b'nothing')
    found = loader(folder)
    with caplog.at_level(logging.WARNING):
        assert sum(len(images) for images, _ in found) == 8
    assert 'red/1.png cannot be decoded' in caplog.text and found.skipped == 1


# Tables that are gone on with


def test_rows_of_another_network_are_not_taken(folder, tmp_path, capsys):
    torch.save(tiny().state_dict(), tmp_path / 'm.pth')
    argv = ['freq', 'heatmap', str(tmp_path / 'm.pth'), '--data-dir', str(folder), '--workers', '0', '--img-size', '32',
            '--step', '8', '--amplitudes', '0.3', '--no-figure', '--output', str(tmp_path / 'out')]

    def rows(*more):
        assert main([*argv, *more]) == 0
        with (tmp_path / 'out' / 'heatmap.csv').open(newline='') as file:
            return len(list(csv.DictReader(file)))

    count = rows()
    assert rows() == count  # the same again
    assert rows('--model-kwargs', 'act_layer=relu') == 2 * count
    assert rows('--gp', 'max') == 3 * count
    (tmp_path / 'map.txt').write_text('red\ngreen\nblue\n')
    assert rows('--class-map', str(tmp_path / 'map.txt')) == 4 * count
    assert rows('--crop-pct', '0.7') == 5 * count


# What the commands say


@pytest.mark.parametrize('argv, message', [
    (['eval', 'gmnet_s1'], 'gmnet_s1 has no published weights. Give a checkpoint file'),
    (['eval', 'nowhere.pth'], 'neither a file or folder nor a model of timm'),
    (['eval', 'local-dir:nowhere'], 'local-dir:nowhere names no folder.'),
])
def test_messages(argv, message, folder, capsys):
    assert main(['freq', *argv, '--data-dir', str(folder)]) == 1
    err = capsys.readouterr().err
    assert message in err and '\\n' not in err


def test_every_command_has_an_output_of_its_own(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(tiny().state_dict(), 'm.pth')
    (tmp_path / 'run').mkdir()
    torch.save(tiny().state_dict(), 'run/model_best.pth.tar')
    common = ['--data-dir', str(folder), '--workers', '0', '--img-size', '32', '--no-figure']
    for argv in ('eval m.pth --radii 4', 'layers m.pth', 'amplitude m.pth run/model_best.pth.tar'):
        assert main(['freq', *argv.split(), *common]) == 0
    found = sorted(path.name for path in (tmp_path / 'output' / 'freq').iterdir())
    assert found == ['amplitude-m-run-model_best', 'eval-m', 'layers-m']
    assert main(['freq', 'eval', 'm.pth', '--radii', '4', *common]) == 1
