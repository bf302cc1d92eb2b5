"""What classifiers make of the low and the high frequencies of images, for any timm model."""
from .bands import BandAccuracy, SplitOptions, evaluate_bands
from .gates import Product, Tap, find_gates, find_products
from .spectra import LayerSpectrum, layer_spectra
from .split import frequency_bands, num_rings, radial_power_spectrum, split_frequencies

__all__ = [
    'BandAccuracy', 'LayerSpectrum', 'Product', 'SplitOptions', 'Tap', 'evaluate_bands', 'find_gates', 'find_products',
    'frequency_bands', 'layer_spectra', 'num_rings', 'radial_power_spectrum', 'split_frequencies',
]
