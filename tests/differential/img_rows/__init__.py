"""Rows of the matrix, a module for each subcommand."""
