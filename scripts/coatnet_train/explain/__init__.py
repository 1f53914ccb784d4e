"""Predictions for single images, explained by attention, predicted kernels or Grad-CAM."""
