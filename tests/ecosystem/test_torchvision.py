"""torchvision's detectors and feature extractor, and timm's, on our features."""
import pytest
import timm
import torch
from model_helpers import overfit
from skimage import data
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FeaturePyramidNetwork, box_iou


class Pyramid(torch.nn.Module):
    out_channels = 64

    def __init__(self):
        super().__init__()
        self.body = timm.create_model('gmnet_s1', features_only=True, out_indices=(1, 2, 3))
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels)

    def forward(self, x):
        return self.fpn({str(i): features for i, features in enumerate(self.body(x))})


def test_retina_net_learns_to_find_coins():
    """Its boxes in evaluation, once it has seen one picture often enough, are those it was given.

    Faster R-CNN learns in examples/detection.py.
    """
    picture = torch.from_numpy(data.coins()[88:158, 10:138]).float().expand(3, -1, -1) / 255
    boxes = torch.tensor([[14., 16, 58, 58], [73, 18, 113, 56]])
    anchors = AnchorGenerator(((32,), (48,), (64,)), ((1.,),) * 3)
    model = RetinaNet(Pyramid(), 2, anchor_generator=anchors, min_size=70, max_size=128)
    target = {'boxes': boxes, 'labels': torch.ones(2, dtype=torch.long)}
    # two copies, BatchNorm gets nothing to learn from one value at stride 32
    assert overfit(model, lambda: sum(model([picture] * 2, [target] * 2).values()), steps=40) < .3
    found = model.eval()([picture])[0]
    assert (box_iou(found['boxes'][:2], boxes).amax(0) > .7).all()
    assert (found['scores'][:2] > .5).all() and (found['labels'][:2] == 1).all()


X = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(1))


def create_seeded(**kwargs):
    """The same weights each time, with layer scales that let the blocks matter."""
    torch.manual_seed(0)
    return timm.create_model('gmnet_s1', init_values=.3, **kwargs).eval()


@pytest.fixture
def expected():
    with torch.no_grad():
        return create_seeded().forward_intermediates(X, intermediates_only=True)


def test_torchvisions_feature_extractor(expected):
    extract = create_feature_extractor(create_seeded(), {f'stages.{i}': f'{i}' for i in range(4)})
    with torch.no_grad():
        features = extract(X)
    for i, value in enumerate(expected):
        torch.testing.assert_close(features[f'{i}'], value)
    assert not any('head' in name for name, _ in extract.named_parameters())  # what is not needed is gone


@pytest.mark.parametrize('kind', ['list', 'dict', 'hook', 'getter', 'fx'])
def test_timms_feature_extractors(kind, expected):
    extract = create_seeded(features_only=True, feature_cls=kind)
    with torch.no_grad():
        features = extract(X)
    features = list(features.values()) if isinstance(features, dict) else features
    assert [f.shape[1] for f in features] == extract.feature_info.channels()
    for feature, value in zip(features, expected, strict=True):
        torch.testing.assert_close(feature, value)
