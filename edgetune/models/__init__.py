"""Pretrained models and their encoders."""
