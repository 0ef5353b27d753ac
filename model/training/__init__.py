"""Training: the synthetic world, the two stages, and the recipe of the bundled model."""
