"""A small XVLM-like vision-language model over emoji scenes; ``model.py`` is what ``mfcompile`` loads."""
