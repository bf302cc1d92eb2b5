"""The `gmnet-timm` command: which sub-commands are there, and what does each take?"""
