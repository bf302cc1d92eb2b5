"""What trained GmNets do to spectra, with the gate and with plain activations in its place."""
