"""What classifiers make of the low and the high frequencies of images, for any timm model."""
from gmnet_timm.frequency.bands import BandAccuracy, SplitOptions, evaluate_bands
from gmnet_timm.frequency.gates import Product, Tap, find_gates, find_products
from gmnet_timm.frequency.spectra import LayerSpectrum, layer_spectra
from gmnet_timm.frequency.split import frequency_bands, num_rings, radial_power_spectrum, split_frequencies

__all__ = [
    'BandAccuracy', 'LayerSpectrum', 'Product', 'SplitOptions', 'Tap', 'evaluate_bands', 'find_gates', 'find_products',
    'frequency_bands', 'layer_spectra', 'num_rings', 'radial_power_spectrum', 'split_frequencies',
]
