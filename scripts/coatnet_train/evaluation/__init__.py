"""Scores, predictions and features of trained models."""
