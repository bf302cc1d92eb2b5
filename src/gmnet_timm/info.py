"""Sizes, cost, provenance and weights of the models."""
import dataclasses

import torch
from timm.models import PretrainedCfg, create_model, get_pretrained_cfg

from gmnet_timm.weights.model import Source

__all__ = [
    'BIBTEX', 'PAPER', 'ModelInfo', 'PaperResult', 'count_cost', 'format_model', 'format_source',
    'format_table', 'model_info',
]


BIBTEX = '''@inproceedings{wang2026gmnet,
  title     = {{GmNet}: Revisiting Gating Mechanisms From A Frequency View},
  author    = {Wang, Yifan and Ma, Xu and Zhang, Yitian and Wang, Zhongruo and Kim, Sung-Cheol and Mirjalili, Vahid
               and Renganathan, Vidya and Fu, Yun},
  booktitle = {International Conference on Learning Representations},
  year      = {2026}
}'''


@dataclasses.dataclass(frozen=True)
class PaperResult:
    """A row of the paper's ImageNet-1k table (arXiv 2503.22841), and how its configuration is known."""

    params_m: float  # millions
    gflops: float  # multiply-adds in billions
    top1: float  # percent
    a100_ms: float  # latency on an NVIDIA A100, milliseconds
    iphone14_ms: float  # latency on an iPhone 14, milliseconds
    configuration: str  # 'released' by the authors, or 'reconstructed' from the paper's numbers


PAPER: dict[str, PaperResult] = {
    'gmnet_s1': PaperResult(3.7, 0.6, 75.5, 1.6, 1.0, 'reconstructed'),
    'gmnet_s2': PaperResult(6.2, 0.9, 78.3, 1.9, 1.1, 'reconstructed'),
    'gmnet_s3': PaperResult(7.8, 1.2, 79.3, 2.1, 1.3, 'released'),
    'gmnet_s4': PaperResult(17.0, 2.7, 81.5, 2.9, 1.9, 'reconstructed'),
}


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What is known of a registered model without its weights."""

    name: str
    params: int
    macs: int  # of convolutions and linear layers, for one image of `input_size`
    input_size: tuple[int, int, int]  # (C, H, W)
    weights: str | None  # where pretrained weights come from, None if there are none
    paper: PaperResult | None


def count_cost(model: torch.nn.Module, input_size: tuple[int, int, int]) -> tuple[int, int]:
    """Multiply-adds of the convolutions and linear layers for one image, and their outputs (timm: activations).

    Args:
        model: A model on any device, the meta device included.
        input_size: Channels, height and width of the image.
    """
    macs, outputs = [], []

    def count(module: torch.nn.Module, _: tuple, output: torch.Tensor) -> None:
        outputs.append(output.numel())
        macs.append(output.numel() * module.weight[0].numel())  # type: ignore[index, operator]

    layers = [module for module in model.modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    parameter, training = next(model.parameters()), model.training
    with torch.no_grad():
        model.eval()(torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype))
    model.train(training)
    for hook in hooks:
        hook.remove()
    return sum(macs), sum(outputs)


def model_info(name: str) -> ModelInfo:
    """Describe a model by its registered name.

    Raises:
        RuntimeError: timm knows no model of that name.
    """
    model = create_model(name)
    cfg = _pretrained_cfg(name)
    input_size = cfg.input_size
    return ModelInfo(
        name=name,
        params=sum(p.numel() for p in model.parameters()),
        macs=count_cost(model, input_size)[0],
        input_size=input_size,
        weights=f'hf-hub:{cfg.hf_hub_id}' if cfg.hf_hub_id else str(cfg.url or '') or None,
        paper=PAPER.get(name.split('.')[0]),
    )


def _pretrained_cfg(name: str) -> PretrainedCfg:
    return get_pretrained_cfg(name) or PretrainedCfg()


def format_table(infos: list[ModelInfo]) -> str:
    """A text table of models with paper results, one line each."""
    lines = [
        f'{"model":<9} {"params":>10} {"MACs":>13}  {"configuration":<13} {"paper: M":>8} {"GMACs":>5} {"top-1 %":>7} '
        f'{"A100 ms":>7} {"iPhone ms":>9}  weights',
    ]
    for info in infos:
        paper = info.paper
        assert paper is not None
        lines.append(
            f'{info.name:<9} {info.params:>10,} {info.macs:>13,}  {paper.configuration:<13} {paper.params_m:>8} '
            f'{paper.gflops:>5} {paper.top1:>7} {paper.a100_ms:>7} {paper.iphone14_ms:>9}  {info.weights or "none"}'
        )
    lines += [
        '',
        'params and MACs (convolutions and linear layers, one 224x224 image) are counted from the models here.',
        'Columns from "paper:" on are the numbers of arXiv 2503.22841; this project has not measured them.',
        'released: the configuration of the authors\' code. reconstructed: found from the paper\'s params and FLOPs.',
    ]
    return '\n'.join(lines)


def format_model(info: ModelInfo) -> str:
    """Everything known of one model, a line each."""
    cfg = _pretrained_cfg(info.name)
    rows = [
        ('model', info.name),
        ('params', f'{info.params:,}'),
        ('MACs', f'{info.macs:,} (convolutions and linear layers, one {"x".join(map(str, info.input_size))} image)'),
        ('input', f'{info.input_size}, {cfg.interpolation}, crop {cfg.crop_pct}, mean {cfg.mean}, std {cfg.std}'),
        ('paper', f'{cfg.paper_name}, {cfg.paper_ids}' if cfg.paper_name else 'none given'),
        ('origin', cfg.origin_url or 'none given'),
        ('weights', info.weights or 'none known'),
    ]
    if info.paper is not None:
        paper = info.paper
        known = 'as released by the authors' if paper.configuration == 'released' else \
            "reconstructed from the paper's parameter count and FLOPs"
        rows += [
            ('configuration', known),
            ("paper's numbers", (
                f'{paper.params_m} M params, {paper.gflops} GMACs, top-1 {paper.top1} %, '
                f'{paper.a100_ms} ms on A100, {paper.iphone14_ms} ms on iPhone 14 (not measured by this project)'
            )),
        ]
    return '\n'.join(f'{key + ":":<16} {value}' for key, value in rows)


def format_source(source: Source) -> str:
    """What a file or folder holds: the model, what states it, and the weights."""
    weights = source.checkpoint
    rows = [
        ('model', str(source.description)),
        ('stated by', ', '.join(source.stated_by) or 'nothing but the tensors'),
        ('weights', f'{len(weights.state_dict)} tensors of {weights.path}' + (', EMA' if weights.ema else '')),
        ('checked', f'against its {weights.protection}' if weights.protection else 'not possible, it has no checksum'),
    ]
    return '\n'.join(f'{key + ":":<16} {value}' for key, value in rows)
