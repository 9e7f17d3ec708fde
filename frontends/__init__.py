"""Front ends: a model and example inputs become a CapturedGraph."""
