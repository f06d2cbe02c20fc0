"""The seam with Lightning: the strategy, and what one ``fit`` of a trainer consists of."""
