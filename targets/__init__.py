"""Machines that llmc builds for."""
