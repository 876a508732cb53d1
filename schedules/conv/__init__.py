"""Convolutions and pooling over channels-last tensors."""
