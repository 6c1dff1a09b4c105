"""What every room may use: checks of arguments, files, progress, tables for the screen, compiled programs."""
