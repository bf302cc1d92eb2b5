"""How well models work on only the low or only the high frequencies of images, and what their layers do with them."""
from gmnet_timm.frequency.bands import Band, BandAccuracy, SplitOptions, band_images, evaluate_bands, list_bands
from gmnet_timm.frequency.spectra import GateStatistics, LayerSpectrum, Signal, find_blocks, find_gates, layer_spectra
from gmnet_timm.frequency.split import (
    frequency_bands,
    modes_per_bin,
    num_radial_bins,
    radial_power_spectrum,
    split_frequencies,
)

__all__ = [
    'Band', 'BandAccuracy', 'GateStatistics', 'LayerSpectrum', 'Signal', 'SplitOptions', 'band_images', 'evaluate_bands',
    'find_blocks', 'find_gates', 'frequency_bands', 'layer_spectra', 'list_bands', 'modes_per_bin', 'num_radial_bins', 'radial_power_spectrum',
    'split_frequencies',
]
