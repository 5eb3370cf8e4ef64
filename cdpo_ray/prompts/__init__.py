"""Text in: prompt sets, files and hub data sets."""
