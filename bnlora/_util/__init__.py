"""Helpers for all packages: argument checks, files, progress bars, tables for display, compiled programs."""
