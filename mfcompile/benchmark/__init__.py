"""Every form of one pruned model measured in turns on this machine: ``mfcompile.bench`` and ``mfcompile bench``."""
