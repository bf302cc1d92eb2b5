"""What classifiers make of the low and the high frequencies of images, for any timm model."""
from .split import frequency_bands, num_rings, radial_power_spectrum, split_frequencies

__all__ = ['frequency_bands', 'num_rings', 'radial_power_spectrum', 'split_frequencies']
