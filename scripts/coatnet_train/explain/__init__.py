"""Predictions on single images, and what the model looked at."""
