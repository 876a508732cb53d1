"""Kernel templates: one folder a family, one contract (`base`)."""
