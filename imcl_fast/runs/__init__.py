"""A training run as others see it: its settings, and the folder of its files."""
