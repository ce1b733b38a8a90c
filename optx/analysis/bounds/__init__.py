"""Certified bounds of what a trained network can do to its inputs."""
