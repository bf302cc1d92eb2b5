"""What a classifier says of one image, its split, and how pictures are read."""
import math

import numpy as np
import pytest
import torch
from PIL import Image

from gmnet_timm.errors import UserError
from gmnet_timm.frequency import answers
from gmnet_timm.frequency.bands import Band, BandSplit, SplitOptions, list_bands
from gmnet_timm.frequency.data import create_band_loader, prepare_picture, read_picture


def test_logits_that_are_not_finite_are_refused():
    split = BandSplit(torch.rand(1, 1, 64, 64))
    with pytest.raises(UserError, match='NaN or infinite'):
        answers.confidences(lambda x: torch.full((len(x), 3), math.nan), split, [Band('raw')])


@pytest.mark.parametrize('options', [
    SplitOptions(), SplitOptions(keep_dc=True), SplitOptions(restore_contrast=True), SplitOptions(space='pixels')])
def test_a_picture_that_is_transformed_once_splits_as_numpy_does(options):
    mean, std = (.3, .4, .5), (.2, .25, .3)
    images = torch.randn(1, 3, 33, 48, dtype=torch.float64)
    split = BandSplit(images, options, mean, std)
    scale, offset = np.ones((3, 1, 1)), np.zeros((3, 1, 1))
    if options.space == 'pixels':
        scale, offset = np.array(std).reshape(3, 1, 1), np.array(mean).reshape(3, 1, 1)
    x = images[0].numpy() * scale + offset
    radius = np.hypot(33 * np.fft.fftfreq(33)[:, None], 48 * np.fft.fftfreq(48))
    for band in list_bands([5, 12.5], ('low', 'high', 'band-pass', 'band-stop')):
        inside = radius <= (np.inf if band.radius is None else band.radius)
        mask = {'raw': inside, 'low': inside, 'high': ~inside}.get(band.kind)
        if band.inner_radius is not None:
            ring = inside & (radius > band.inner_radius)
            mask = ring if band.kind == 'band-pass' else ~ring
        expected = np.fft.ifft2(np.fft.fft2(x) * mask).real
        if band.kind in ('high', 'band-pass'):
            if options.restore_contrast:
                expected = expected * (x.std((1, 2)) / expected.std((1, 2)))[:, None, None]
            if options.keep_dc:
                expected = expected + x.mean((1, 2), keepdims=True)
        np.testing.assert_allclose(split(band)[0], (expected - offset) / scale, atol=1e-9)


# --- pictures --------------------------------------------------------------------------------------------------------

CONFIG = dict(input_size=(3, 48, 48), mean=(.5,) * 3, std=(.5,) * 3, interpolation='bicubic', crop_pct=1.)


def test_what_is_not_an_image_or_too_large_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    (tmp_path / 'a.png').write_text('not a picture')
    with pytest.raises(UserError, match='a.png cannot be read as an image'):
        read_picture(tmp_path / 'a.png', 3)
    Image.new('1', (10_000, 10_000)).save(tmp_path / 'large.png')
    monkeypatch.setattr(Image.Image, 'load', lambda self: pytest.fail('decoded'))
    monkeypatch.setattr('PIL.ImageFile.ImageFile.load', lambda self: pytest.fail('decoded'))
    with pytest.raises(UserError, match='10000x10000 pixels, 100 million'):
        read_picture(tmp_path / 'large.png', 3)


@pytest.mark.parametrize('channels, mode', [(1, 'L'), (2, 'LA'), (3, 'RGB'), (4, 'RGBA')])
def test_pictures_of_one_to_four_channels(tmp_path, channels, mode):
    Image.new('RGB', (60, 50), (255, 0, 0)).save(tmp_path / 'a.png')
    assert read_picture(tmp_path / 'a.png', channels).mode == mode
    config = {**CONFIG, 'input_size': (channels, 48, 48), 'mean': (.5,) * channels, 'std': (.5,) * channels}
    assert prepare_picture(read_picture(tmp_path / 'a.png', channels), config).shape == (1, channels, 48, 48)


def test_arrays_of_any_number_of_channels(tmp_path):
    config = {**CONFIG, 'input_size': (6, 48, 48), 'mean': (0.,) * 6, 'std': (1.,) * 6}
    array = np.broadcast_to(np.arange(6, dtype=np.uint8) * 51, (60, 70, 6))
    np.save(tmp_path / 'a.npy', array)
    image = prepare_picture(read_picture(tmp_path / 'a.npy', 6), config)
    torch.testing.assert_close(image, (torch.arange(6.) / 5).view(1, 6, 1, 1).expand(1, 6, 48, 48))
    np.save(tmp_path / 'b.npy', array / np.float32(255))
    torch.testing.assert_close(prepare_picture(read_picture(tmp_path / 'b.npy', 6), config), image)
    with pytest.raises(UserError, match=r'\(60, 70, 6\), the model takes \(height, width, 3\)'):
        read_picture(tmp_path / 'a.npy', 3)
    Image.new('RGB', (60, 70)).save(tmp_path / 'a.png')
    with pytest.raises(UserError, match='6 channels.*npy'):
        read_picture(tmp_path / 'a.png', 6)
    np.save(tmp_path / 'c.npy', array.astype(object), allow_pickle=True)
    with pytest.raises(UserError, match='c.npy must hold uint8'):
        read_picture(tmp_path / 'c.npy', 6)
    np.save(tmp_path / 'd.npy', array.astype(np.float32))
    with pytest.raises(UserError, match='from 0 to 1'):
        read_picture(tmp_path / 'd.npy', 6)


def test_models_of_four_channels_are_evaluated_on_an_image_folder(tmp_path):
    (tmp_path / 'a').mkdir()
    Image.new('RGBA', (60, 50), (255, 0, 0, 51)).save(tmp_path / 'a' / '0.png')
    config = {**CONFIG, 'input_size': (4, 48, 48), 'mean': (0.,) * 4, 'std': (1.,) * 4}
    images, _ = next(iter(create_band_loader(str(tmp_path), config, workers=0)))
    torch.testing.assert_close(images[0, :, 0, 0], torch.tensor([1., 0., 0., .2]))
    with pytest.raises(UserError, match='5 channels'):
        create_band_loader(str(tmp_path), {**config, 'input_size': (5, 48, 48)})
