"""Training runs: one configuration, a run folder, checkpoints that continue bit for bit."""
