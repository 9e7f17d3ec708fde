"""A small BLIP-like vision-language model over emoji scenes; ``model.py`` is what ``mfcompile`` loads."""
