"""Shared by all pages: chart style, HTML template, figures as SVG."""
