"""How well models work on only the low or only the high frequencies of images, and what their layers do with them."""
from gmnet_timm.frequency.amplitude import LogAmplitude, log_amplitudes, relative_log_amplitude
from gmnet_timm.frequency.answers import confidences
from gmnet_timm.frequency.bands import (
    Band,
    BandAccuracy,
    BandSplit,
    SplitOptions,
    band_images,
    evaluate_bands,
    list_bands,
)
from gmnet_timm.frequency.data import create_band_loader
from gmnet_timm.frequency.gates import find_gates, find_products
from gmnet_timm.frequency.gaussian import predict_independent, predict_pointwise
from gmnet_timm.frequency.heatmap import HeatmapPoint, directions, fourier_basis, fourier_heatmap, radial_summary
from gmnet_timm.frequency.intervals import student_interval, wilson_interval
from gmnet_timm.frequency.paired import PairedDifference, compare_bands, paired_difference
from gmnet_timm.frequency.reports import load_results, save_results
from gmnet_timm.frequency.sensitivity import Sensitivity, input_sensitivity
from gmnet_timm.frequency.signals import GateStatistics, LayerSpectrum, Signal
from gmnet_timm.frequency.spectra import layer_spectra, list_layers
from gmnet_timm.frequency.split import (
    frequency_bands,
    high_frequency_energy,
    modes_per_bin,
    num_radial_bins,
    radial_power_spectrum,
    spectral_centroid,
    spectral_slope,
    split_frequencies,
)

__all__ = [
    'Band', 'BandAccuracy', 'BandSplit', 'GateStatistics', 'HeatmapPoint', 'LayerSpectrum',
    'LogAmplitude', 'PairedDifference', 'Sensitivity', 'Signal', 'SplitOptions', 'band_images',
    'compare_bands', 'confidences', 'create_band_loader', 'directions', 'evaluate_bands', 'find_gates',
    'find_products', 'fourier_basis', 'fourier_heatmap', 'frequency_bands', 'high_frequency_energy',
    'input_sensitivity', 'layer_spectra', 'list_bands', 'list_layers', 'load_results',
    'log_amplitudes', 'modes_per_bin', 'num_radial_bins', 'paired_difference', 'predict_independent',
    'predict_pointwise', 'radial_power_spectrum', 'radial_summary', 'relative_log_amplitude', 'save_results',
    'spectral_centroid', 'spectral_slope', 'split_frequencies', 'student_interval', 'wilson_interval',
]
