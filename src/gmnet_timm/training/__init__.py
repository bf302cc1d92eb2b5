"""How is a GmNet trained with timm's train.py, and what does a run folder say?"""
