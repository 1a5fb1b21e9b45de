"""Training: mixed precision, optimizers of few bits, checkpoints that a run goes on from exactly."""
