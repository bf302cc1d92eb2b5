"""What gates do to spectra in theory."""
