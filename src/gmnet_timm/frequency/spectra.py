"""Radial power spectra of a model's features: before and after its modules, and of both operands of its gates."""
import contextlib
import dataclasses
import fnmatch
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from gmnet_timm.errors import UserError, listed
from gmnet_timm.frequency.positions import Layout, stated_layout
from gmnet_timm.frequency.processes import gathered, share
from gmnet_timm.frequency.progress import progress
from gmnet_timm.frequency.signals import LayerSpectrum
from gmnet_timm.frequency.tallies import GateTally, ModuleTally, Tally
from gmnet_timm.frequency.tracing import (
    FoundProduct,
    Product,
    Recorder,
    Trace,
    evaluation_mode,
    trace,
    uncompiled,
    watch_modules,
)

__all__ = ['find_blocks', 'layer_spectra', 'list_layers', 'strongest_channels']

_logger = logging.getLogger(__name__)

KINDS = ('gate', 'activation')


def find_blocks(model: nn.Module, found: Trace) -> tuple[list[str], list[str]]:
    """The blocks of a model: what timm's `group_matcher` calls its blocks, else modules with numbered names.

    Where timm groups whole stages, the numbered modules right below them are taken. By their names alone, blocks are
    called modules with parts that contain no other such module.

    Args:
        model: The model.
        found: What one pass of it did.

    Returns:
        Names of blocks in the order of the pass, those whose output holds maps, and those whose output does not.
    """
    called = [name for name in found.classes if '#' not in name and (name, 'output') in found.modules]
    with_parts = [name for name in called if any(True for _ in found.classes[name].children())]
    numbered = [name for name in with_parts if re.search(r'(^|[._])\d+$', name)]
    matcher: Any = getattr(model, 'group_matcher', lambda coarse: {})(coarse=False)
    patterns = _block_patterns(matcher) if isinstance(matcher, dict) else []
    blocks = [name for name in called if any(re.fullmatch(pattern, name) for pattern in patterns)]
    if callable(matcher):
        blocks = [name for name in _grouped(model, matcher) if name in called]
    elif blocks:
        parts = {name: [other for other in numbered if re.fullmatch(re.escape(name) + r'(\.[a-z_]+)?\.\d+', other)]
                 for name in blocks}
        is_stage = all(pattern.count(r'\d') == 1 for pattern in patterns)
        blocks = [part for name in blocks for part in (parts[name] if is_stage and len(parts[name]) > 1 else [name])]
    else:
        blocks = [name for name in numbered if not any(other.startswith(f'{name}.') for other in numbered)]
    order = {name: i for i, name in enumerate(dict.fromkeys(name for name, side in found.modules))}
    blocks = sorted(set(blocks), key=order.__getitem__)
    with_maps = [name for name in blocks if found.modules[name, 'output'] is not None]
    return with_maps, [name for name in blocks if name not in with_maps]


def chosen_blocks(model: nn.Module, found: Trace) -> list[str]:
    """The blocks that hold maps; a warning names the others."""
    blocks, others = find_blocks(model, found)
    if others:
        _logger.warning(f'Left out, as they hold no maps, or where positions are cannot be found: {listed(others)}.')
    return blocks


def _grouped(model: nn.Module, matcher: Callable[[str], Any]) -> list[str]:
    """The modules that hold the parameters of one group each, where timm says the group by a function of names."""
    groups: dict[Any, list[list[str]]] = {}
    for name, _ in model.named_parameters():
        groups.setdefault(matcher(name), []).append(name.split('.')[:-1])
    return ['.'.join(os.path.commonprefix(paths)) for paths in groups.values()]


def _block_patterns(matcher: dict[str, Any]) -> list[str]:
    """What timm matches with the names of a model's blocks, [] where it does not say."""
    entries = [entry for key, entry in matcher.items() if not key.startswith('stem')]
    entries = [pair for entry in entries for pair in ([(entry, None)] if isinstance(entry, str) else entry)]
    return [pattern for pattern, place in entries if place is None and r'\d' in pattern]


def list_layers(model: nn.Module, images: torch.Tensor) -> list[tuple[str, str]]:
    """What `layer_spectra` can look at: gates and activations that hold maps, then the blocks.

    Args:
        model: As for `layer_spectra`.
        images: Normalised images (B, C, H, W), on the device of the model.

    Returns:
        Name and kind of each, 'module' for blocks, in the model's order.
    """
    model = uncompiled(model)
    with evaluation_mode(model):
        found = trace(model, images, activations=True)
    products = _chosen_products(found, KINDS, None)
    return [
        *((name, product.kind) for name, product in products.items()),
        *((name, 'module') for name in find_blocks(model, found)[0])]


def strongest_channels(maps: torch.Tensor, count: int) -> list[int]:
    """The channels of maps (C, H, W) with the most energy apart from their mean, in their order."""
    return sorted(maps.flatten(1).var(1, correction=0).topk(min(count, len(maps))).indices.tolist())


def layer_spectra(
        model: nn.Module,
        loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
        modules: Sequence[str] | None = None,
        *,
        gates: Sequence[str] | None = None,
        kinds: Sequence[str] = ('gate',),
        layout: str | None = None,
        window: str | None = None,
        channels: int | None = 8,
        alias_images: int = 4,
        show_progress: bool = False,
        on_maps: Callable[[str, str, torch.Tensor], None] | None = None,
) -> list[LayerSpectrum]:
    """Mean radial power spectra of layers over a set of images.

    With an initialised process group each process gives a part of the images, and all get the numbers of the whole.

    Args:
        model: Any model that takes images, in evaluation mode during the call.
        loader: Batches of normalised images (B, C, H, W) and labels.
        modules: Names of modules or patterns such as 'stages.*.blocks.0', whose input and output are looked at.
        gates: Names or patterns of products to look at. With neither, all gates; the blocks of a model without gates.
        kinds: 'gate' (an entry per position and channel in both operands), 'activation' (x * (f(x) / x)).
        layout: 'NCHW', 'NHWC', 'NLC' or 'NCL' where the layout of the named modules is known better than it is found.
        window: None or 'hann', as for `radial_power_spectrum`.
        channels: Look at this many channels of each map, evenly spaced, None for all. Spectra of all channels can cost
            more than the passes that they watch; `Signal.high_error` says what the choice costs in accuracy.
        alias_images: Number of images for aliased energy, 0 for none.
        show_progress: Show how far it is.
        on_maps: Takes the maps (B, C, H, W) that spectra are made of, for pictures of them, with the names of the layer
            and of the signal.

    Returns:
        One entry per call of a module or product, in the model's order.

    Raises:
        UserError: A name matches nothing, a module is not called, a layer holds no maps, or there are no images.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise UserError(f'The kinds are {", ".join(KINDS)}, got {", ".join(unknown)}.')
    if channels is not None and channels < 1:
        raise UserError(f'The number of channels must be positive, got {channels}.')
    model = uncompiled(model)
    device = next(model.parameters(), torch.empty(0)).device
    batches = (batch.to(device) for batch, *_ in progress(loader, 'layers', 'batch', show=show_progress))
    first = next(batches, None)
    watcher = None
    if first is not None:
        with evaluation_mode(model):
            watcher = _Watcher(model, first[:2], modules, gates, kinds, layout, window, channels, alias_images, on_maps)
            watcher.run(itertools.chain([first], batches))
    parts = [part for part in gathered(None if watcher is None else watcher.portable()) if part is not None]
    if not parts:
        raise UserError('There is no image to look at.')
    results = None if watcher is None else watcher.results(parts)
    return next(result for result in gathered(results) if result is not None)  # a process may have no image


class _Watcher:
    """What is looked at of a model, and what was seen of it in this process."""

    def __init__(self, model, images, modules, gates, kinds, layout, window, channels, alias_images, on_maps):
        self.model, self.window, self.channels, self.on_maps = model, window, channels, on_maps
        self.activations = 'activation' in kinds
        found = trace(model, images, activations=self.activations)
        products = _chosen_products(found, kinds, gates) if gates or modules is None else {}
        if modules is None and gates is None and not products:
            modules = chosen_blocks(model, found)
        self.layouts = module_layouts(model, found, modules or [], layout)
        if not self.layouts and not products:
            raise UserError('The model has no gates and no blocks that hold maps. Name the modules to look at.')
        self.gates = {
            name: GateTally.of(product.kind, product.layout, share(alias_images))
            for name, product in products.items() if product.layout is not None}
        tallies = {}  # of one tensor, such as the output of a block and the input of the next
        self.measured = set()
        for key, found_layout in self.layouts.items():
            if found.same[key] not in tallies:
                tallies[found.same[key]] = Tally(found_layout)
                self.measured.add(key)
        self.modules = {
            name: ModuleTally({side: tallies[found.same[name, side]] for side in ('input', 'output')
                               if (name, side) in self.layouts})
            for name in dict.fromkeys(name for name, _ in self.layouts)}

    def run(self, batches: Iterable[torch.Tensor]) -> None:
        """Look at batches of images."""
        recorder = Recorder(self.model, self._on_product, activations=self.activations)
        names = list(dict.fromkeys(name.partition('#')[0] for name in self.modules))
        hooks = recorder.hooked(self._on_module, names) if self.gates \
            else watch_modules(self.model, names, self._on_module)
        with torch.no_grad(), hooks:
            for batch in batches:
                with recorder.watch(batch) if self.gates else contextlib.nullcontext():
                    self.model(batch)

    def _on_module(self, name: str, side: str, x: torch.Tensor) -> None:
        if (name, side) in self.measured:
            self.modules[name].add(side, x, self.window, self.channels)
        if self.on_maps is not None and (name, side) in self.layouts:
            self.on_maps(name, side, self.layouts[name, side].maps(x, self.channels))

    def _on_product(self, product: Product) -> None:
        tally = self.gates.get(product.name)
        if tally is None:
            return
        tally.add(product, self.window, self.channels)
        if self.on_maps is not None:
            for signal, part in tally.signals.items():
                self.on_maps(product.name, signal, part.layout.maps(getattr(product, signal), self.channels))

    def portable(self) -> list[GateTally | ModuleTally]:
        """What was seen, as another process can take it."""
        return [*(dataclasses.replace(tally, function=None) for tally in self.gates.values()), *self.modules.values()]

    def results(self, parts: Sequence[list[GateTally | ModuleTally]]) -> list[LayerSpectrum]:
        """Of all processes."""
        own = [*self.gates.items(), *self.modules.items()]
        return [
            tally.merged(seen).result(name)  # type: ignore[arg-type]
            for (name, tally), *seen in zip(own, *parts, strict=True)]


def _chosen_products(found: Trace, kinds: Sequence[str], patterns: Sequence[str] | None) -> dict[str, FoundProduct]:
    """Products of these kinds that match and hold maps; all that hold maps without patterns."""
    products = {name: product for name, product in found.products.items() if product.kind in kinds}
    with_maps = {name: product for name, product in products.items() if product.layout is not None}
    if not patterns:
        return with_maps
    names = _match(patterns, list(products), 'gate')
    without = [name for name in names if name not in with_maps]
    if without:
        raise UserError(
            f'The gate {listed(without)} holds no maps, or where their positions are cannot be found, such as after a '
            'matrix that mixes all tokens.')
    return {name: products[name] for name in names}


def _match(patterns: Sequence[str], names: list[str], what: str) -> list[str]:
    """Names that match, in their order; a name without ':' and '#' takes all activations and calls of the module."""
    chosen = set()
    for pattern in patterns:
        hits = [name for name in names if fnmatch.fnmatchcase(name, pattern)
                or fnmatch.fnmatchcase(re.split('[:#]', name)[0], pattern)]
        if not hits:
            near = [name for name in names if pattern.rpartition('.')[2].strip('*') in name] or names
            raise UserError(f'The model has no {what} {pattern} that runs. There are {listed(near) or "none"}.')
        chosen.update(hits)
    return [name for name in names if name in chosen]


def module_layouts(
        model: nn.Module,
        found: Trace,
        patterns: Sequence[str],
        layout: str | None,
) -> dict[tuple[str, str], Layout]:
    """Layouts of what enters and leaves the modules that match, by name and 'input' or 'output'."""
    existing = [name for name, _ in model.named_modules()]
    called = list(dict.fromkeys(name for name, _ in found.modules))
    for pattern in patterns:
        hits = [name for name in existing if fnmatch.fnmatchcase(name, pattern)]
        if hits and not any(name.partition('#')[0] in hits for name in called):
            raise UserError(f'The module {listed(hits)} is not called when the model runs.')
        if not hits and pattern not in called:
            raise UserError(f'The model has no module {pattern}. There are {listed(existing[1:])}.')
    layouts: dict[tuple[str, str], Layout] = {}
    for name in _match(patterns, called, 'module'):
        for side in ('input', 'output'):
            found_layout = found.modules.get((name, side))
            if layout is not None and (name, side) in found.shapes:
                prefix = getattr(model, 'num_prefix_tokens', 0) if 'L' in layout else 0
                found_layout = stated_layout(layout, found.shapes[name, side], found.images, prefix)
            if found_layout is not None:
                layouts[name, side] = found_layout
        if not any((name, side) in layouts for side in ('input', 'output')):
            raise UserError(
                f'{name} has no maps as its input or output, or where their positions are cannot be found. If it has, '
                'state the layout (--layout NCHW, NHWC, NLC or NCL).')
    return layouts
