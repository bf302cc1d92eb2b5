"""The blocks that are found in one small model of every module of timm, beside what timm itself takes for features."""
import pytest
import timm
import torch
from packaging.version import Version
from timm.models._registry import _module_to_models

from gmnet_timm.frequency.spectra import find_blocks
from gmnet_timm.frequency.tracing import trace, watch_modules

# The smallest model of each module, the side of its images here, and its blocks: with maps + without. CrossViT, TNT and
# NASNet return several tensors per block, the last blocks of CaiT hold class tokens alone.
TABLE = """
beit_base_patch16_224@64: 12, halonet_h1@256: 19, test_byobnet@64: 4, cait_xxs24_224@64: 22+2, coat_tiny@64: 14,
convit_tiny@64: 12, convmixer_768_32@64: 32, test_convnext@64: 9, cpubone_nano@64: 7, crossvit_tiny_240@240: 6+18,
csatv2@128: 18, cs3darknet_focus_s@64: 9, cspnext_tiny@64: 4, davit_tiny@64: 6, deepseek_vit_412m@112: 32,
deit_tiny_patch16_224@64: 12, densenet121@64: 58, dla46x_c@64: 8, dpn48b@64: 17, edgenext_xx_small@64: 12,
efficientformer_l1@224: 15, efficientformerv2_s0@64: 14, test_efficientnet@64: 5, efficientvim_m1@96: 6,
efficientvit_b0@64: 10, efficientvit_m0@96: 6, vit_tiny_patch16_dinov3_qkvb@64: 12, fasternet_t0@64: 13,
fastvit_t8@64: 10, focalnet_tiny_srf@64: 12, mobilenetv2_100_ewp@64: 17, gcvit_xxtiny@64: 12, gemma4_vit_167m@64: 16,
ghostnet_050@64: 17, gmnet_s1@64: 20, hardcorenas_b@64: 19, hgnetv2_b0@64: 5, hiera_tiny_224@64: 12,
sam2_hiera_tiny@64: 12, hrnet_w18_small@64: 4, iformer_t@64: 26, inception_next_atto@64: 12, inception_resnet_v2@128:
42+2, inception_v3@128: 11+2, inception_v4@128: 22, lcnetv2_small@64: 10, levit_128s@96: 9, lowformer_b0@64: 11,
test_mambaout@64: 6, test_coatnet@64: 5, poolformerv2_s12@64: 12, gmlp_ti16_224@64: 30, mobilenetv3_small_050@64: 12,
mobilenetv5_base@64: 39, mobilevit_xxs@64: 10, mvitv2_tiny@64: 10, naflexvit_base_patch16_parfac_gap@64: 12,
nasnetalarge@64: 0+18, nest_tiny_jx@224: 12, nextvit_small@64: 20, test_nfnet@64: 4, pit_ti_224@64: 12,
pnasnet5large@64: 0+12, pvt_v2_b0@64: 8, qwen3_vit_88m@64: 12, rdnet_tiny@64: 7, regnetx_002@64: 13,
repghostnet_050@64: 17, repvit_m1@64: 20, res2next50@64: 16, resnest14d@64: 4, test_resnet@64: 4, resnetv2_18@64: 8,
rexnet_100@64: 17, selecsls42@64: 6, legacy_seresnet18@64: 8, sequencer2d_s@64: 18, shvit_s1@96: 11, skresnet18@64: 8,
starnet_s050@64: 10, swiftformer_xs@64: 16, swin_tiny_patch4_window7_224@64: 12, swinv2_tiny_window16_256@64: 12,
swinv2_cr_tiny_224@64: 12, tiny_vit_5m_224@64: 12, tnt_s_legacy_patch16_224@64: 0+12, tresnet_m@64: 21,
twins_svt_small@64: 18, vgg11@64: 21, visformer_tiny@64: 15, test_vit@64: 6, vit_tiny_r_s16_p8_224@64: 12,
test_vit_relpos@64: 9, samvit_base_patch16_224@64: 12, vitamin_small_224@64: 14, volo_d1_224@64: 20,
ese_vovnet19b_slim_dw@64: 4, legacy_xception@64: 32, xception41p@64: 13, xcit_nano_12_p8_224@64: 14
"""
FOUND = dict(line.split(': ') for line in TABLE.replace('\n', ' ').strip().split(', '))


def build(name, side):
    torch.manual_seed(0)
    cfg = timm.get_pretrained_cfg(name)
    fixed = cfg is not None and cfg.fixed_input_size
    return timm.create_model(name, **({'img_size': side} if fixed else {})).eval()


@pytest.mark.skipif(Version(timm.__version__) < Version('1.0.31'), reason='the table is of timm 1.0.31')
def test_the_table_has_every_module():
    modules = {module: models for module, models in _module_to_models.items()}
    names = {spec.partition('@')[0] for spec in FOUND}
    assert [module for module in timm.list_modules() if not names & set(modules[module])] == []


@pytest.mark.slow
@pytest.mark.parametrize('spec', FOUND)
@torch.no_grad()
def test_blocks(spec):
    """As many as the table says; and no map of a block holds the pixels of timm's feature map in another order."""
    name, _, side = spec.partition('@')
    if not timm.is_model(name):
        pytest.skip(f'this timm has no {name}')
    model, images = build(name, int(side)), torch.randn(2, 3, int(side), int(side))
    found = trace(model, images)
    blocks, others = find_blocks(model, found)
    assert f'{len(blocks)}' + (f'+{len(others)}' if others else '') == FOUND[spec]
    maps = {}

    def on_module(module, side, x):
        if side == 'output' and module in blocks:
            maps[module] = found.modules[module, 'output'].maps(x).clone()

    with watch_modules(model, blocks, on_module):
        model(images)
    if not hasattr(model, 'forward_intermediates'):
        return
    in_order = {module: _sorted(x) for module, x in maps.items()}
    for feature in model.forward_intermediates(images, intermediates_only=True):
        feature = feature[0] if isinstance(feature, tuple) else feature
        values = _sorted(feature)
        for module, x in maps.items():
            if x.shape == feature.shape and torch.allclose(in_order[module], values, rtol=1e-4, atol=1e-5):
                torch.testing.assert_close(x, feature, rtol=1e-4, atol=1e-5, msg=f'{module} is read in another order')


def _sorted(maps):
    return maps.flatten(2).sort(-1).values
