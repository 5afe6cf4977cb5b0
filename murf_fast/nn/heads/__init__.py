"""Heads on feature maps: segmentation and depth."""
