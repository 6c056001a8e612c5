"""The template: what trains a decoder, to be read from top to bottom."""
