"""Predict the effects of mutations."""
