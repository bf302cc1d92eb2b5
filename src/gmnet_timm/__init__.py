"""GmNet for timm. Importing this package registers its models: `timm.create_model('gmnet_s1')`."""
from .gated import Gate
from .gmnet import GmNet, gmnet_s1, gmnet_s2, gmnet_s3, gmnet_s4

__version__ = '0.1.0'

__all__ = ['Gate', 'GmNet', 'gmnet_s1', 'gmnet_s2', 'gmnet_s3', 'gmnet_s4']
