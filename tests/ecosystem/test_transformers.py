"""transformers' TimmBackbone inside its detectors and segmenters. What publishes for transformers is in test_hub.py."""
import pytest
import torch
import transformers
from model_helpers import as_features, create, overfit
from transformers import DetrConfig, DetrForObjectDetection, TimmBackbone, TimmBackboneConfig, UperNetConfig


@pytest.mark.parametrize('output_stride, strides', [(None, (8, 16, 32)), (16, (8, 16, 16))])
def test_backbone_gives_our_features(output_stride, strides):
    config = TimmBackboneConfig(backbone='gmnet_s1', out_indices=(1, 2, 3), output_stride=output_stride)
    backbone = TimmBackbone(config).eval()
    classifier = create(output_stride=output_stride or 32)
    backbone._backbone.load_state_dict(as_features(classifier))
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        features = backbone(x).feature_maps
        expected = classifier.forward_intermediates(x, indices=[1, 2, 3], intermediates_only=True)
    assert backbone.channels == [80, 160, 320]
    assert tuple(96 // feature.shape[-1] for feature in features) == strides
    for feature, value in zip(features, expected, strict=True):
        torch.testing.assert_close(feature, value)


def test_detr_learns():
    config = DetrConfig(
        backbone_config=TimmBackboneConfig(backbone='gmnet_s1', out_indices=(3,)), num_labels=2, num_queries=5,
        d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, dropout=0.)
    model = DetrForObjectDetection(config)
    boxes = [torch.tensor([[.3, .3, .4, .4]]), torch.tensor([[.7, .6, .3, .5]])]  # centre, width and height
    labels = [{'class_labels': torch.tensor([i]), 'boxes': box} for i, box in enumerate(boxes)]
    x = torch.randn(2, 3, 96, 96)
    assert overfit(model, lambda: model(pixel_values=x, labels=labels).loss, steps=60) < .4
    with torch.no_grad():
        output = model.eval()(pixel_values=x)
    assert output.logits.shape == (2, 5, 3)
    best = output.logits.softmax(-1)[..., :2].amax(-1).argmax(-1)
    assert output.logits[range(2), best].argmax(-1).tolist() == [0, 1]


def test_upernet_learns():
    config = UperNetConfig(
        backbone_config=TimmBackboneConfig(backbone='gmnet_s1', out_indices=(0, 1, 2, 3)), num_labels=2, hidden_size=32,
        auxiliary_in_channels=160, auxiliary_channels=32)
    model = transformers.UperNetForSemanticSegmentation(config)
    x = torch.randn(2, 3, 64, 64)
    labels = torch.zeros(2, 64, 64, dtype=torch.long)
    labels[0, :, :32] = labels[1, 16:48] = 1
    assert overfit(model, lambda: model(pixel_values=x, labels=labels).loss, steps=25, lr=3e-3) < .4


OTHERS = {
    'ConditionalDetr': dict(out_indices=[3], num_queries=5),
    'DeformableDetr': dict(out_indices=[1, 2, 3], num_queries=5),
    'RTDetr': dict(out_indices=[1, 2, 3], encoder_in_channels=[80, 160, 320], num_queries=5, num_denoising=0),
    'MaskFormer': dict(out_indices=[0, 1, 2, 3]),
}


@pytest.mark.parametrize('name', OTHERS)
def test_others_reach_the_stem(name):
    options = OTHERS[name].copy()
    backbone = TimmBackboneConfig(backbone='gmnet_s1', out_indices=options.pop('out_indices'))
    config = getattr(transformers, f'{name}Config')(backbone_config=backbone, num_labels=2, **options)
    classes = [torch.tensor([0])] * 2
    if name == 'MaskFormer':
        model = transformers.MaskFormerForInstanceSegmentation(config)
        targets = dict(mask_labels=[torch.ones(1, 96, 96)] * 2, class_labels=classes)
    else:
        model = getattr(transformers, f'{name}ForObjectDetection')(config)
        targets = dict(labels=[{'class_labels': c, 'boxes': torch.tensor([[.5, .5, .4, .4]])} for c in classes])
    x = torch.randn(2, 3, 96, 96)
    assert overfit(model, lambda: model(pixel_values=x, **targets).loss, steps=1) == 1  # checks the gradient


@pytest.mark.parametrize('name', ['gmnet_s1', 'starnet_s1'])
def test_known_failures(name):
    """docs/ecosystem.md tells of them, and that they are not GmNet's alone; once mended, it is out of date."""
    with pytest.raises(IndexError, match='list index out of range'):
        DetrForObjectDetection(DetrConfig(use_timm_backbone=True, backbone=name))
    with pytest.raises(TypeError, match=r"__init__\(\) got an unexpected keyword argument 'out_indices'"):
        TimmBackbone(TimmBackboneConfig(backbone=name, features_only=False))
    backbone = TimmBackbone(TimmBackboneConfig(backbone=name))
    with pytest.raises(IndexError, match='list index out of range'):
        backbone(torch.randn(1, 3, 64, 64), output_hidden_states=True)
