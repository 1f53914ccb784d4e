"""LightConv in two dimensions: one kernel a head, softmax-normalised, the same at every position."""
