"""Captions, image features and batches."""
