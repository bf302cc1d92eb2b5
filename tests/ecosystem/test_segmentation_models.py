"""segmentation-models-pytorch with `tu-gmnet_s1`."""
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from model_helpers import as_features, create, overfit
from skimage import data

STRIDES = {32: (4, 8, 16, 32), 16: (4, 8, 16, 16), 8: (4, 8, 8, 8)}
CASES = [
    ('Unet', {}, 32),
    ('FPN', {'decoder_dropout': 0.}, 32),
    ('DeepLabV3Plus', {}, 16),
    ('DeepLabV3Plus', {'encoder_output_stride': 8}, 8),
]


@pytest.fixture(scope='module')
def batch():
    """Two pieces of a photograph of coins, and which pixels are bright."""
    photo = torch.from_numpy(data.coins()).float() / 255
    images = torch.stack([photo[140:236, left:left + 96] for left in (30, 150)])[:, None].expand(-1, 3, -1, -1)
    return images, (images[:, 0] > .5).long()


@pytest.mark.parametrize('architecture, options, output_stride', CASES)
def test_learns(architecture, options, output_stride, batch):
    model = getattr(smp, architecture)('tu-gmnet_s1', encoder_weights=None, classes=2, **options)
    images, labels = batch
    assert model(images).shape == (2, 2, 96, 96)
    assert overfit(model, lambda: torch.nn.functional.cross_entropy(model(images), labels), steps=25) < .3


@pytest.mark.parametrize('architecture, options, output_stride', CASES)
def test_encoder_is_ours(architecture, options, output_stride, batch):
    """Its features are those of the classifier, at the strides that the decoder wants."""
    model = getattr(smp, architecture)('tu-gmnet_s1', encoder_weights=None, **options).eval()
    classifier = create(output_stride=output_stride)
    model.encoder.model.load_state_dict(as_features(classifier))
    with torch.no_grad():
        _, empty, *features = model.encoder(batch[0])
        expected = classifier.forward_intermediates(batch[0], intermediates_only=True)
    assert empty.shape[1] == 0  # GmNet has nothing of stride 2, the library stands in for it
    assert [96 // feature.shape[-1] for feature in features] == list(STRIDES[output_stride])
    for feature, value in zip(features, expected, strict=True):
        torch.testing.assert_close(feature, value)


DECODERS = ('Unet', 'UnetPlusPlus', 'MAnet', 'Linknet', 'FPN', 'PSPNet', 'DeepLabV3', 'DeepLabV3Plus', 'PAN', 'UPerNet',
            'Segformer', 'DPT')


@pytest.mark.parametrize('decoder', DECODERS)
def test_every_decoder_takes_it(decoder):
    assert {cls.__name__ for cls in smp.MODEL_ARCHITECTURES_MAPPING.values()} == set(DECODERS)
    model = getattr(smp, decoder)('tu-gmnet_s1', encoder_weights=None, classes=5).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 128, 128)).shape == (1, 5, 128, 128)


def test_weights_that_do_not_exist():
    """The library's default asks for some, the error says what can be done."""
    with pytest.raises(RuntimeError, match='No pretrained weights of gmnet_s1 are known here'):
        smp.Unet('tu-gmnet_s1')
    assert not timm.list_pretrained('gmnet*')
