"""The page of `gmnet-timm freq explore` as a Hugging Face Space."""
import os
import sys

from gmnet_timm.cli.main import main

# A GmNet that `gmnet-timm push` has published. Several models, separated by spaces, stand side by side.
MODELS = os.environ.get('MODELS', 'hf-hub:OWNER/NAME')

if __name__ == '__main__':
    # A Space expects its page on every address of the container, at this port.
    sys.exit(main(['freq', 'explore', *MODELS.split(), '--host', '0.0.0.0', '--port', '7860']))
